"""A model's own calls, dispatched and executed on this machine, each checked against its op's oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

from .errors import RegistryError
from .harness import call_traits, device_of, harness, told
from .planning import read_config
from .registry import Registry

if TYPE_CHECKING:
    from .traits.model_config import ModelConfig

TOKENS = (1, 16, 256)
_TOKENS_INTERPRETED = (1, 16)  # the interpreter takes milliseconds a row
_SECONDS = {"interpreter": 2048, "cpu": 16_384}  # tokens that take seconds there; more only when asked for


@dataclass(frozen=True)
class RunRow:
    """One call. `max_weight_error` is relative to the oracle, None where the oracle gives none; `undecided` counts rows
    of `rows` on which rounding leaves the choice open. `verdict` is passed, failed or not run, `detail` says why.
    `reduced` has the traits that were run with other values than the model's, which a CPU can't afford."""

    op: str
    model: str
    tokens: int
    implementation: str | None
    decided_by: str
    max_weight_error: float | None
    rows: int
    undecided: int
    verdict: str
    detail: str = ""
    reduced: Mapping[str, object] = field(default_factory=dict)


def run_model(registry: Registry, config: "str | Mapping | ModelConfig", *, tokens: Sequence[int] = (), seed: int = 0,
              progress: Callable[[RunRow], None] | None = None) -> list[RunRow]:
    """Runs every op that the model uses, on random inputs of each of the `tokens` counts. By default those are 1, 16
    and 256 (1 and 16 in the interpreter), and the first of each range in which another kernel is chosen; one that would
    take long here is a row that was not run. On a CPU an op may have its sizes reduced; the row says so. A kernel that
    raises is a failed row; a config that can't be read raises ConfigError."""
    config = read_config(config)
    here = registry.platform()
    rows = []
    for op in registry.catalog.ops.values():
        workloads = op.contract.workloads(config)
        tools = harness(op) if workloads else None
        for workload in workloads:
            affordable = tools.affordable(workload.traits, device_of(here))
            reduced = {name: value for name, value in affordable.items() if workload.traits[name] != value}
            for count in tokens or _default_tokens(registry, op, affordable):
                traits = call_traits(op, affordable, count)
                if not tokens and count > _SECONDS.get(here.kind, count):
                    row = _left_out(registry, op, config.name, traits, count)
                else:
                    row = _run(registry, op, tools, config.name, traits, workload.arguments, count, seed,
                               device_of(here))
                row = replace(row, reduced=reduced)
                rows.append(row)
                if progress:
                    progress(row)
    return rows


def _default_tokens(registry: Registry, op, traits: Mapping[str, object]) -> list[int]:
    counts = {*(_TOKENS_INTERPRETED if registry.platform().kind == "interpreter" else TOKENS)}
    given = {name: value for name, value in call_traits(op, traits, 0).items() if name != "num_tokens"}
    try:
        starts = (case.starts.get("num_tokens") for case in registry.explain(op.name, **given).cases)
        return sorted(counts.union(filter(None, starts)))
    except RegistryError:  # told by the runs
        return sorted(counts)


def _left_out(registry: Registry, op, model: str, traits: Mapping[str, object], tokens: int) -> RunRow:
    case, *_ = registry.explain(op.name, **traits).cases
    return RunRow(op.name, model, tokens, case.winner, case.decided_by, None, 0, 0, "not run",
                  f"takes long on the {registry.platform()}; ask for it with --tokens {tokens}")


def _run(registry, op, tools, model, traits, arguments, tokens, seed, device) -> RunRow:
    name, decided_by = None, ""
    try:
        case, *_ = registry.explain(op.name, **traits).cases
        name, decided_by = case.winner, case.decided_by
        kernel = registry.dispatch(op.name, **traits)
        plain = {n: v for n, v in kernel.traits.items() if n in op.space.traits}
        verdict, _ = tools.judge(kernel, plain, tokens=tokens, seed=seed, flavour=tools.flavours[0], device=device,
                                 arguments=arguments)
    except Exception as error:  # told in the table: the other calls still run
        return RunRow(op.name, model, tokens, name, decided_by, None, 0, 0, "failed", told(error))
    return RunRow(op.name, model, tokens, name, decided_by, getattr(verdict, "max_weight_error", None), verdict.rows,
                  verdict.undecided, "passed" if verdict.passed else "failed", str(verdict.detail or ""))
