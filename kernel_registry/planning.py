"""The kernels that would serve a model, read off its Hugging Face config: for any platform, running nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Mapping

from .catalog import Implementation, Op
from .contract import Workload
from .errors import UnknownNameError
from .explain import Case, Explanation
from .plan import Plan, frozen_call, versions
from .registry import Registry
from .selection import table
from .traits.platform import Platform
from .traits.trait import written

if TYPE_CHECKING:
    from .traits.model_config import ModelConfig

HOST = "host"  # the word for this machine among names of platforms
_REASONS = 3  # predicates named in `why`


@dataclass(frozen=True)
class PlanRow:
    """What one op of a model gets on one platform. `implementation` is None where nothing serves it; names joined by
    "|" where it depends on a dynamic trait. `fast` is false where a fallback serves any of it. `layers` is how many of
    the model's layers make this call. `reasons` are why, one for each of the explanation's cases."""

    op: str
    workload: Workload
    layers: int
    platform: str
    implementation: str | None
    fast: bool
    reasons: tuple[str, ...]
    explanation: Explanation

    @property
    def why(self) -> str:
        """The reasons as one text: a reason that holds in every case once, others with the conditions of theirs."""
        if len(set(self.reasons)) == 1:
            return self.reasons[0]
        heads = [", ".join(case.conditions) for case in self.explanation.cases]
        return "; ".join(f"{head}: {reason}" for head, reason in zip(heads, self.reasons))

    @property
    def overridden(self) -> bool:
        """Whether an override decides any of it."""
        return any(outcome == "decides" for case in self.explanation.cases for _, outcome in case.rules)


def read_config(config: "str | Mapping | ModelConfig") -> "ModelConfig":
    """A path to a config.json or its folder, a shipped model's name, or the config as a mapping. Raises ConfigError."""
    from .traits.model_config import ModelConfig, load_config

    return config if isinstance(config, ModelConfig) else load_config(config)


def plan_model(registry: Registry, config: "str | Mapping | ModelConfig",
               platforms: Iterable[str | Platform] = ()) -> list[PlanRow]:
    """A row per op that the model uses and platform (this machine's when none is given). Raises ConfigError for a
    config that can't be read, UnknownNameError for what is no platform."""
    config = read_config(config)
    targets = list(dict.fromkeys(parse_platform(registry, p) for p in platforms)) or [registry.platform()]
    rows = []
    for op in registry.catalog.ops.values():
        for workload in op.contract.workloads(config):
            rows += [plan_call(registry, op, workload, platform) for platform in targets]
    return rows


def parse_platform(registry: Registry, name: str | Platform) -> Platform:
    """`Platform.parse` with the registry's own error; "host" is the registry's platform, so usually this machine's."""
    if name == HOST:
        return registry.platform()
    try:
        return Platform.parse(name)
    except ValueError as error:
        raise UnknownNameError(str(error)) from None


def freeze_model(registry: Registry, config: "str | Mapping | ModelConfig", platform: str | Platform = HOST) -> Plan:
    """The plan that `registry.freeze()` would give for the model on `platform`, without importing a kernel."""
    config = read_config(config)
    where = parse_platform(registry, platform)
    calls: dict[str, dict] = {}
    for op in registry.catalog.ops.values():
        for workload in op.contract.workloads(config):
            request = op.space.request({**workload.traits, **_platform_traits(op, where)}, lambda: where)
            decided = table(op, request, registry.state.layers(None, op))
            call = frozen_call(op, request, decided, registry.state.tilings(op, request, decided))
            calls[json.dumps(call, sort_keys=True)] = call  # two workloads may make one and the same call
    return Plan(str(where), versions(), tuple(calls[key] for key in sorted(calls)))


def plan_call(registry: Registry, op: Op, workload: Workload, platform: Platform) -> PlanRow:
    """What one call of an op gets on one platform, and why; a model's config gives such calls, and so do the modules of
    a runtime."""
    explanation = registry.explain(op.name, **{**workload.traits, **_platform_traits(op, platform)})
    winners = [op.by_name[name] for case in explanation.cases if (name := case.winner) is not None]
    fast = bool(winners) and not any(w.fallback for w in winners) and explanation.winner is not None
    reasons = tuple(_why(op, case, explanation.traits) + _at_load(op, case) for case in explanation.cases)
    return PlanRow(op.name, workload, workload.layers, str(platform), explanation.winner, fast, reasons, explanation)


def _platform_traits(op: Op, platform: Platform) -> dict[str, Platform]:
    return {name: platform for name, trait in op.space.traits.items() if trait.type == "platform"}


def _why(op: Op, case: Case, traits: Mapping[str, object]) -> str:
    deciding = next((rule for rule, outcome in case.rules if outcome == "decides"), None)
    if case.winner is None:
        return case.error
    if deciding is not None:
        return f"override: {deciding}"
    winner = op.by_name[case.winner]
    return _no_fast_kernel(op, case) if winner.fallback else _matched(op, winner, traits)


def _at_load(op: Op, case: Case) -> str:
    return "; prepared at load" if case.winner is not None and op.by_name[case.winner].prepare else ""


def _no_fast_kernel(op: Op, case: Case) -> str:
    """Why only a fallback serves: the kernel that comes closest, and what it lacks."""
    refused = [c for c in case.candidates if not op.by_name[c.name].fallback]
    if not refused:
        return "no fast kernel: none is registered"
    nearest = min(refused, key=lambda c: (len(c.failures) + bool(c.denied), not c.denied,
                                          any(f.startswith("platform") for f in c.failures), bool(c.variant_of)))
    reasons = [*nearest.failures, *([nearest.denied] if nearest.denied else [])]
    more = f" and {len(reasons) - _REASONS} more" if len(reasons) > _REASONS else ""
    return f"no fast kernel: nearest is {nearest.name}, refused because {'; '.join(reasons[:_REASONS])}{more}"


def _matched(op: Op, winner: Implementation, traits: Mapping[str, object]) -> str:
    """What sets the winner's box apart: first the predicates that the other kernels fail, then its own sizes. Of a
    variant, what sets its implementation apart: which of them serves is a question of sizes."""
    winner = op.by_name.get(winner.variant_of, winner)
    told = [name for name in winner.box.sets if name in traits and op.space.all[name].type != "platform"]
    rivals = [i.box for i in op.implementations if i is not winner and not i.variant_of and not i.fallback]
    telling = [n for n in told if any(n in box.sets and not box.sets[n].admits(traits[n]) for box in rivals)]
    sizes = [n for n in told if op.space.all[n].type == "int" and not _neutral(op, n, traits)]
    shown = list(dict.fromkeys([*telling, *sizes]))[:_REASONS]
    told = [_served(n, traits[n], str(winner.box.sets[n])) for n in shown]
    return ", ".join(told) or "the first in order that serves it"


def _neutral(op: Op, name: str, traits: Mapping[str, object]) -> bool:
    return op.space.all[name].default == traits[name]


def _served(name: str, value: object, values: str) -> str:
    return f"{name}={written(value)}" + ("" if values == written(value) else f" (serves {values})")

