"""A model's own calls, dispatched and executed on this machine, each checked against its op's oracle; and its whole
layer, of which each op is checked on what the op before it gave."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

from .errors import RegistryError, TraitError
from .harness import call_traits, device_of, harness, quiet, told
from .layer import EXPERTS, FINALIZE, TOPK, LayerTraits, moe_layer, read_layer
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


def run_model(registry: Registry, config: "str | Mapping | ModelConfig", *, tokens: Sequence[int] = (),
              ops: Sequence[str] = (), seed: int = 0,
              progress: Callable[[RunRow], None] | None = None) -> list[RunRow]:
    """Runs every op that the model uses, then its whole layer where these ops make one up, or only the named `ops` and
    no layer, on random inputs of each of the `tokens` counts. By default those are 1, 16 and 256 (1 and 16 in the
    interpreter), and for an op the first of each range in which another kernel is chosen; one that would take long here
    is a row that was not run. On a CPU an op may have its sizes reduced; the row says so. A kernel that raises is a
    failed row; a config that can't be read raises ConfigError, an op that is not known UnknownNameError."""
    config = read_config(config)
    here = registry.platform()
    rows = []
    for op in [registry.catalog.op(name) for name in ops] or registry.catalog.ops.values():
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
    for row in () if ops else _layers(registry, config, tokens, seed):
        rows.append(row)
        if progress:
            progress(row)
    return rows


LAYER = "layer"  # the op of a row that is a whole layer


def _layers(registry: Registry, config, tokens: Sequence[int], seed: int) -> Iterator[RunRow]:
    """A row for each number of tokens."""
    if not {TOPK, EXPERTS, FINALIZE} <= {*registry.catalog.ops}:
        return
    try:
        traits = read_layer(config, registry)
    except TraitError:  # the model's layers are others
        return
    shared = bool(registry.catalog.op(FINALIZE).contract.workloads(config))
    here = registry.platform()
    for count in tokens or (_TOKENS_INTERPRETED if here.kind == "interpreter" else TOKENS):
        try:
            layer, call, reduced = _layer(registry, traits, shared, count, seed, device_of(here))
            names = [registry.explain(op, **call_traits(registry.catalog.op(op), asked, count)).winner
                     for op, asked in layer.requests.items() if shared or op != FINALIZE]
            row = RunRow(LAYER, config.name, count, " + ".join(names), "", None, count, 0, "passed", "", reduced)
            yield replace(row, **_judged(registry, layer, call))
        except Exception as error:  # told in the table
            yield RunRow(LAYER, config.name, count, None, "", None, 0, 0, "failed", told(error))


def _layer(registry: Registry, traits: LayerTraits, shared: bool, tokens: int, seed: int, device: str):
    """(a layer of these traits, one call of it, the traits that were reduced). What comes out is to be written into a
    buffer that is full of NaN. The shared expert is a stand-in.

    Where the experts are fewer than the router's, a map takes several of its ids to each of them."""
    import torch

    routing, experts = harness(registry.catalog.op(TOPK)), harness(registry.catalog.op(EXPERTS))
    sizes = experts.affordable(traits.experts, device)
    reduced = {name: value for name, value in sizes.items() if traits.experts[name] != value}
    how = dict(seed=seed, device=device)
    (logits, bias), _ = routing.inputs(traits.routing, tokens, flavour=routing.flavours[0], **how)
    (hidden, w13, w2, *_), tensors = experts.inputs(sizes, tokens, flavour=experts.flavours[0], **how)
    if sizes["num_experts"] != traits.routing["num_experts"]:
        tensors["expert_map"] = torch.arange(traits.routing["num_experts"], device=device) % sizes["num_experts"]
    layer = moe_layer(replace(traits, experts=sizes), w13, w2, correction_bias=bias, registry=registry,
                      shared_expert=(lambda x: x * 0.5) if shared else None,
                      shared_stream=torch.cuda.Stream() if shared and device == "cuda" else None, **tensors)
    return layer, ((hidden, logits), {"out": torch.full_like(hidden, float("nan"))}), reduced


def _judged(registry: Registry, layer, call) -> dict[str, object]:
    """The fields of a row that say whether every op of one call was right."""
    steps = []
    args, kwargs = call
    with quiet():
        result = layer(*args, **kwargs, observe=lambda *step: steps.append(step))
    if result is not kwargs["out"] or result is not steps[-1][3]:
        return dict(verdict="failed", detail="the result is not in `out`")
    undecided = 0
    for op, args, kwargs, outputs in steps:
        traits = {**layer.kernels[op].traits, **({"output_alias": True} if kwargs.get("out") is not None else {})}
        with quiet():
            verdict = harness(registry.catalog.op(op)).check(traits, args, kwargs, outputs)
        undecided = max(undecided, verdict.undecided)
        if not verdict.passed:
            return dict(verdict="failed", undecided=undecided, detail=f"{op}: {verdict.detail}")
    return dict(verdict="passed", undecided=undecided)


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
