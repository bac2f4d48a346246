"""Whether every rank would run the same kernels, asked once, before the first forward.

    from kernel_registry import distributed
    distributed.agree()                     # on every rank, after the model's ops are bound

A rank with an override file, a registry, a version or a device of its own runs other kernels than its peers, and what
comes of it looks like a model that is slightly wrong. `agree` gathers one fingerprint a rank; plans go round only where
fingerprints differ, to be told apart. Every rank reaches the same verdict from the same data and so raises the same
error, or none does.

Nothing here waits: a rank that is dead or stuck is the process group's to notice, with its own error and timeout. A
rank that can't freeze takes part all the same, so that its peers hear why instead of waiting for it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

from .errors import PlanError, RankError
from .plan import Plan
from .registry import Registry, registry as shipped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HINT = "start every rank with the same registry, override and tiles files, versions and environment"


def agree(registry: Registry = shipped, group: "ProcessGroup | None" = None, *,
          freeze: Callable[[], Plan] | None = None) -> Plan:
    """This rank's plan, once it is known to be every rank's. To be called by all ranks of `group` (None: all there are)
    after binding and before the first forward; an NCCL group needs torch.cuda.set_device before.

    freeze  makes the plan, `registry.freeze` where it is not given; an error in it reaches every rank
    Raises RankError on every rank when one differs or has no plan, and what torch raises when one does not answer.
    """
    import torch.distributed as dist

    group = group or dist.group.WORLD
    if dist.get_rank(group) < 0:  # torch would only warn, and nothing be compared
        raise PlanError("this process is no member of the group whose plans are compared",
                        hint="call agree on the members only, or pass the group that this rank is in")
    ranks = dist.get_process_group_ranks(group)
    plan = failure = None
    try:
        plan = (freeze or registry.freeze)()
    except Exception as error:  # of any kind: peers that were left waiting would learn nothing of it
        failure = error
    mine = (plan.fingerprint, "") if plan else ("", f"{type(failure).__name__}: {failure}")
    found = dict(zip(ranks, _gather(dist, mine, group)))
    if len(set(found.values())) == 1 and plan:
        return plan
    failed = {rank: (f"has no plan: {error}",) for rank, (_, error) in found.items() if error}
    if failed:
        raise RankError(_told(failed), differences=failed, hint="see what that rank says") from failure
    texts = dict(zip(ranks, _gather(dist, (plan.text(), _overrides(registry)), group)))
    model = _most_common([found[rank][0] for rank in ranks])
    alike = [rank for rank in ranks if found[rank][0] == model]
    apart = {rank: tuple(_differences(texts[alike[0]], texts[rank])) for rank in ranks if rank not in alike}
    raise RankError(_told(apart, alike), differences=apart, hint=_HINT)


def _gather(dist, value, group) -> list:
    """What each rank of the group gives, plain data only: the ranks' releases may not be the same."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _overrides(registry: Registry) -> tuple[str, ...]:
    """Every line of every override file: a plan does not say which decided, since paths differ between ranks."""
    return tuple(str(rule) for layer in registry.state.file_layers for rule in layer)


def _most_common(prints: Sequence[str]) -> str:
    """What most ranks have is taken for what was meant; among equals, what the first rank has."""
    counts = Counter(prints)
    return max(counts, key=lambda one: (counts[one], -prints.index(one)))


def _differences(has: tuple, other_has: tuple) -> Iterator[str]:
    """What one rank has -> what another has otherwise, a line each; both are (text of the plan, overrides)."""
    (text, overrides), (other_text, other_overrides) = has, other_has
    try:
        yield from Plan.parse(text, "the plan of most ranks").diff(Plan.parse(other_text, "the plan of this rank"))
    except PlanError as error:  # another release, that writes other plans
        yield f"{error.where} {error.message}"
    if overrides != other_overrides:
        yield f"overrides: {'; '.join(overrides) or 'none'} -> {'; '.join(other_overrides) or 'none'}"


def _told(apart: Mapping[int, Sequence[str]], alike: Sequence[int] = ()) -> str:
    """Ranks with the same story together: of many that share a wrong file, one paragraph."""
    stories: dict[tuple[str, ...], list[int]] = {}
    for rank, lines in apart.items():
        stories.setdefault(tuple(lines), []).append(rank)
    heads = f"would run other kernels than {_named(alike)}" if alike else "can't be compared"
    return "\n".join(f"{_named(ranks)} {heads}" + "".join(f"\n    {line}" for line in lines)
                     for lines, ranks in stories.items())


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
