"""A model's own calls, dispatched and executed on this machine, each checked against its op's oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

from .harness import call_traits, device_of, harness, told
from .planning import read_config
from .registry import Registry

if TYPE_CHECKING:
    from .traits.model_config import ModelConfig

TOKENS = (1, 16, 256)
_TOKENS_INTERPRETED = (1, 16)  # the interpreter takes milliseconds a row


@dataclass(frozen=True)
class RunRow:
    """One call. `max_weight_error` is relative to the oracle, None where the oracle gives none; `undecided` counts rows
    of `rows` on which rounding leaves the choice open. `verdict` is passed or failed, `detail` says why."""

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


def run_model(registry: Registry, config: "str | Mapping | ModelConfig", *, tokens: Sequence[int] = (), seed: int = 0,
              progress: Callable[[RunRow], None] | None = None) -> list[RunRow]:
    """Runs every op that the model uses, on random inputs of each of the `tokens` counts (by default 1, 16 and 256; 1
    and 16 in the interpreter). A kernel that raises is a failed row; a config that can't be read raises ConfigError."""
    config = read_config(config)
    here = registry.platform()
    tokens = tokens or (_TOKENS_INTERPRETED if here.kind == "interpreter" else TOKENS)
    rows = []
    for op in registry.catalog.ops.values():
        workloads = op.contract.workloads(config)
        tools = harness(op) if workloads else None
        for workload in workloads:
            for count in tokens:
                row = _run(registry, op, tools, config.name, call_traits(op, workload.traits, count),
                           workload.arguments, count, seed, device_of(here))
                rows.append(row)
                if progress:
                    progress(row)
    return rows


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
