"""Whether every rank would run the same kernels, asked once, before the first forward.

    from kernel_registry import distributed
    distributed.agree()                     # on every rank, after the model's ops are bound

A rank with an override file, a registry, a version or a device of its own runs other kernels than its peers, and what
comes of it looks like a model that is slightly wrong. `agree` gathers one fingerprint a rank, of its plan and of its
lines of override files: a line that changes nothing yet may decide what is bound later. Plans and lines go round only
where fingerprints differ, to be told apart. Every rank reaches the same verdict from the same data and so raises the
same error, or none does.

Nothing here waits: a rank that is dead or stuck is the process group's to notice, with its own error and timeout. A
rank that can't freeze takes part all the same, so that its peers hear why instead of waiting for it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

from .errors import PlanError, RankError
from .overrides import Rule
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
    failure = None
    try:
        plan, lines = (freeze or registry.freeze)(), _overrides(registry)
        mine = _print(plan, lines), ""
    except Exception as error:  # of any kind: peers that were left waiting would learn nothing of it
        failure, mine = error, ("", f"{type(error).__name__}: {error}")
    found = dict(zip(ranks, _gather(dist, mine, group)))
    if len(set(found.values())) == 1 and failure is None:
        return plan
    failed = {rank: (f"has no plan: {error}",) for rank, (_, error) in found.items() if error}
    if failed:
        raise RankError(_told(failed), differences=failed, hint="see what that rank says") from failure
    has = dict(zip(ranks, _gather(dist, (plan.text(), lines), group)))
    ((most, _),) = Counter(found.values()).most_common(1)  # what most have is what was meant; else what the first has
    alike = [rank for rank in ranks if found[rank] == most]
    apart = {rank: tuple(_differences(*has[alike[0]], *has[rank])) for rank in ranks if rank not in alike}
    raise RankError(_told(apart, alike), differences=apart, hint=_HINT)


def _gather(dist, value, group) -> list:
    """What each rank of the group gives, plain data only: the ranks' releases may not be the same."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _overrides(registry: Registry) -> tuple[tuple[str, str], ...]:
    """Every line of every override file, the strongest file first: (what it means, as it is told), for a plan does not
    say which line decided, and the same line may stand elsewhere on another rank."""
    return tuple(line for layer in registry.state.file_layers
                 for line in sorted((_meaning(rule), str(rule)) for rule in layer))


def _meaning(rule: Rule) -> str:
    box = rule.box
    when = [*(f"{name}: {values}" for name, values in box.sets.items()), *(relation.text for relation in box.relations),
            *(check.target for check in box.checks)]
    return f"{rule.op}: {rule.action} {rule.implementation} for {rule.model} when {sorted(when)}"


def _print(plan: Plan, lines: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(repr((plan.fingerprint, [meaning for meaning, _ in lines])).encode()).hexdigest()


def _differences(text: str, lines: Sequence, other_text: str, other_lines: Sequence) -> list[str]:
    """What the second rank has otherwise than the first, a line each, of the plans' texts and the override lines."""
    try:
        found = Plan.parse(text, "the plan of most ranks").diff(Plan.parse(other_text, "the plan of this rank"))
    except PlanError as error:  # another release, that writes other plans
        found = [f"{error.where} {error.message}"]
    for sign, some, others in (("-", lines, other_lines), ("+", other_lines, lines)):
        known = {meaning for meaning, _ in others}
        found += [f"{sign} {told}" for meaning, told in some if meaning not in known]
    return found or ["the same lines of override files, of another strength"]


def _told(apart: Mapping[int, Sequence[str]], alike: Sequence[int] = ()) -> str:
    """Ranks with the same story together: of many that share a wrong file, one paragraph."""
    stories: dict[tuple[str, ...], list[int]] = {}
    for rank, lines in apart.items():
        stories.setdefault(tuple(lines), []).append(rank)
    paragraphs = []
    for lines, ranks in stories.items():
        verb = f"differ{'s' * (len(ranks) == 1)} from {_named(alike)}" if alike else "can't be compared"
        paragraphs.append("\n    ".join((f"{_named(ranks)} {verb}", *lines)))
    return "\n".join(paragraphs)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
