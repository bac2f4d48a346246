"""One mixture-of-experts layer of a model: routing, experts and what follows them, put together once.

    layer = moe_layer("deepseek-v3", w13, w2, w13_scale=s13, w2_scale=s2, correction_bias=bias, shared_expert=mlp)
    y = layer(hidden_states, router_logits, out=buffer)
    print(layer.explain())

Which kernels run, where the result is written, and when the shared expert runs are decided here and nowhere else:

- No shared output: `moe.experts` has the last word, and `moe.finalize` does not run. With `out`, the experts write into
  it where aliasing.py lets them, else what they return is copied there.
- A shared output: the experts return a buffer of their own, and `moe.finalize` adds to it in one launch: into `out`, or
  in place. Until then nothing of what the caller brought is written, so the shared expert may read hidden_states on
  another stream all the while.
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, Mapping

from .registry import Registry, registry as shipped

if TYPE_CHECKING:
    from .bound import BoundKernel
    from .contract import Workload
    from .traits.model_config import ModelConfig

TOPK, EXPERTS, FINALIZE = "moe.topk", "moe.experts", "moe.finalize"
_TENSORS = ("w13_scale", "w2_scale", "a13_scale", "a2_scale", "w13_bias", "w2_bias", "expert_map")


@dataclass(frozen=True)
class LayerTraits:
    """What a config says of a layer: traits of moe.topk and of moe.experts, and the factor of the routing weights."""

    name: str
    routing: Mapping[str, object]
    experts: Mapping[str, object]
    routed_scaling_factor: float = 1.0


def read_layer(config: "str | Mapping | ModelConfig", source: Registry = shipped) -> LayerTraits:
    """The layer of a model, through its ops' contracts, on one machine. Raises ConfigError for a config that can't be
    read, TraitError for a model whose layers these ops do not make up."""
    from .errors import TraitError
    from .planning import read_config

    config = read_config(config)
    routing, experts = (_workload(source, op, config) for op in (TOPK, EXPERTS))
    if routing is None or experts is None:
        raise TraitError(f"{TOPK if routing is None else EXPERTS} computes no layer of this model", where=config.name,
                         hint="`kernel-registry plan` has a note that says why")
    return LayerTraits(config.name, routing.traits, experts.traits, routing.arguments["routed_scaling_factor"])


def _workload(source: Registry, op: str, config: "ModelConfig") -> "Workload | None":
    return next(iter(source.catalog.op(op).contract.workloads(config)), None)


def moe_layer(config: "str | Mapping | ModelConfig | LayerTraits", w13, w2, *, correction_bias=None,
              shared_expert: Callable | None = None, shared_stream=None, group=None, registry: Registry = shipped,
              **tensors) -> "MoELayer":
    """The layer of a model with these weights, its kernels bound.

    config           what `kernel-registry plan` takes, or LayerTraits where a config does not say it all
    w13, w2          the experts' weights that are here; their shapes go before the config's, so shards are welcome.
                     Without an expert_map these are all experts that the router chooses among
    correction_bias  exactly where the router has one
    shared_expert    called with hidden_states, returns what is added; a call may bring `shared_output` instead
    shared_stream    a torch.cuda.Stream for it, beside routing and experts
    group            a torch.distributed process group over whose ranks the experts are spread: all of them make the
                     layer and call it together, each with tokens of its own (expert_parallel.py)
    registry         of the three ops
    tensors          the others of moe.experts: w13_scale, w2_scale, a13_scale, a2_scale, w13_bias, w2_bias, expert_map
    Raises TraitError where config and tensors contradict each other, and what a dispatch raises; over a group,
    RankError where another rank raised.
    """
    def given():
        return _given(config, w13, w2, correction_bias, shared_expert, shared_stream, registry, tensors)

    if group is None:
        return MoELayer(*given())
    from .expert_parallel import ExpertParallelLayer

    return ExpertParallelLayer.together(group, given)


def _given(config, w13, w2, correction_bias, shared_expert, shared_stream, registry: Registry,
           tensors: Mapping[str, object]) -> tuple:
    """MoELayer's arguments, from moe_layer's."""
    from .errors import TraitError, UnknownNameError, suggestion

    for name in tensors:
        if name not in _TENSORS:
            raise UnknownNameError(f"moe_layer got {name!r}", hint=suggestion(name, _TENSORS))
    traits = config if isinstance(config, LayerTraits) else read_layer(config, registry)
    has_bias = traits.routing.get("has_bias", True)
    if (correction_bias is not None) != has_bias:
        raise TraitError(f"correction_bias is {'missing' if has_bias else 'given'}, the router has has_bias={has_bias}",
                         where=traits.name)
    routed = traits.routing["num_experts"] + traits.routing.get("num_fused_shared_experts", 0)
    table = tensors.get("expert_map")
    if (w13 if table is None else table).shape[0] != routed:
        told = f"w13 has {w13.shape[0]} experts" if table is None else f"expert_map has {table.shape[0]} entries"
        raise TraitError(f"{told}, the router chooses among {routed}", where=traits.name,
                         hint="what it chooses and nobody has would count as zeros: pass an expert_map with an entry "
                              "for each of the router's experts, -1 for those of other machines")
    last = -1 if table is None else int(table.max())
    if last >= len(w13):  # kernels would skip it, like an expert that is elsewhere
        raise TraitError(f"expert_map names row {last} of w13, which has {len(w13)}", where=traits.name,
                         hint="entries are rows of w13 as it is here, and not the router's numbers")
    return (traits, w13, w2, {name: tensors.get(name) for name in _TENSORS}, correction_bias, shared_expert,
            shared_stream, registry)


@dataclass(eq=False, repr=False)
class MoELayer:
    """A layer to call; `moe_layer` makes it. `kernels` are the bound ones by op; `explain` tells why these."""

    traits: LayerTraits
    w13: object
    w2: object
    tensors: Mapping[str, object]
    correction_bias: object
    shared_expert: Callable | None
    shared_stream: object
    registry: Registry
    kernels: "Mapping[str, BoundKernel]" = field(init=False)
    requests: Mapping[str, Mapping[str, object]] = field(init=False)

    def __post_init__(self):
        routing, experts = dict(self.traits.routing), dict(self.traits.experts)
        if self.correction_bias is not None:
            routing["bias_dtype"] = self.correction_bias.dtype
        experts.update(
            topk=routing["topk"], num_experts=self.w13.shape[0], intermediate_size=self.w13.shape[1] // 2,
            hidden_size=self.w2.shape[1], has_bias=self.tensors["w13_bias"] is not None,
            expert_parallel=self.tensors["expert_map"] is not None)
        finalize = {name: experts[name] for name in ("num_experts", "topk", "hidden_size")}
        dtype = experts.get("dtype", "bfloat16")
        finalize.update(dtype=dtype, out_dtype=dtype, reduced=True, weights_applied=True, has_shared=True,
                        output_alias=True)
        self.requests = {TOPK: routing, EXPERTS: experts, FINALIZE: finalize}
        if self.w13.device.type == "cpu" and self.registry.platform().kind in ("cuda", "hip"):
            for traits in self.requests.values():
                traits["platform"] = "cpu"
        self._bind()
        self._context = copy_context()  # overrides that the layer was made under hold for its explanation too
        self._streams = None
        if self.shared_stream is not None:
            import torch

            self._streams = torch.cuda

    def _bind(self) -> None:
        """The kernels of `requests`."""
        self.kernels = {op: self.registry.bind(op, **traits) for op, traits in self.requests.items()}
        self._into = self.registry.bind(EXPERTS, **{**self.requests[EXPERTS], "output_alias": True})

    def __call__(self, hidden_states, router_logits, *, shared_output=None, num_token_non_padded=None, out=None,
                 observe: Callable | None = None):
        """[T, H] from hidden_states [T, H] and router_logits [T, E]; in `out`, which is returned, where it is given.

        shared_output         what the shared expert gave, where it is not this layer's to call
        num_token_non_padded  as moe.topk takes it; rows past it get zeros, and the shared output
        out                   may be any [T, H] that fits, hidden_states too
        observe               called after each op with its name, args, kwargs and result; for tests
        """
        forked = None
        if shared_output is None and self.shared_expert is not None:
            shared_output, forked = self._shared(hidden_states)
        try:
            topk = self._run(observe, TOPK, self.kernels[TOPK], (router_logits, self.correction_bias), dict(
                routed_scaling_factor=self.traits.routed_scaling_factor, num_token_non_padded=num_token_non_padded))
            given = (hidden_states, self.w13, self.w2, *topk)
            if shared_output is None:
                if out is None:
                    return self._run(observe, EXPERTS, self.kernels[EXPERTS], given, self.tensors)
                return self._run(observe, EXPERTS, self._into, given, {**self.tensors, "out": out})
            routed = self._run(observe, EXPERTS, self.kernels[EXPERTS], given, self.tensors)
        finally:
            if forked is not None:  # after an error too: the shared expert may read what is written next
                forked.wait_stream(self.shared_stream)
        return self._run(observe, FINALIZE, self.kernels[FINALIZE], (routed,), dict(
            shared_output=shared_output, out=routed if out is None else out))

    @staticmethod
    def _run(observe, op, kernel, args, kwargs):
        result = kernel(*args, **kwargs)
        if observe is not None:
            observe(op, args, kwargs, result)
        return result

    def _shared(self, hidden_states):
        """(the shared expert's output, the stream that has to wait for it or None)."""
        if self._streams is None:
            return self.shared_expert(hidden_states), None
        current = self._streams.current_stream(hidden_states.device)
        self.shared_stream.wait_stream(current)
        try:
            with self._streams.stream(self.shared_stream):
                output = self.shared_expert(hidden_states)
        except BaseException:
            current.wait_stream(self.shared_stream)
            raise
        output.record_stream(current)  # its memory is not given to others before `current` has read it
        return output, current

    def __repr__(self):
        chosen = ", ".join(f"{op}: {kernel.name}" for op, kernel in self.kernels.items())
        return f"<{type(self).__name__} {self.traits.name}, {chosen}>"

    def explain(self) -> str:
        """Which kernels run and why, and where the result goes: as it was decided when the layer was made."""
        stories = [self._story(op).text() for op in (TOPK, EXPERTS, FINALIZE)]
        return "\n\n".join([f"{self.traits.name}: one layer", *stories, self.output])

    @property
    def output(self) -> str:
        """Where the result goes, case by case, in words."""
        from .aliasing import WRITES

        experts, finalize = self._delivery(EXPERTS), self._delivery(FINALIZE)
        after = "" if experts.endswith(WRITES) else ": a copy follows"
        caller = "the call brings it, or there is none" if self.shared_expert is None else \
            "on a stream of its own" if self.shared_stream is not None else "before the experts"
        return "\n".join([
            "where the result goes",
            f"  no shared output: {FINALIZE} does not run; with `out`, {experts}{after}",
            f"  a shared output: {EXPERTS} returns a buffer; {finalize}, or adds in place where there is none",
            f"  the shared expert: {caller}; hidden_states are not written before it is done"])

    def _story(self, op: str, **more):
        return self._context.copy().run(lambda: self.registry.explain(op, **{**self.requests[op], **more}))

    def _delivery(self, op: str) -> str:
        """Who serves a call of `op` with `out`, and what it does with it."""
        from .selection import one_name

        told: dict[str, list[str]] = {}
        for case in self._story(op, output_alias=True).cases:
            winner = next(c for c in case.candidates if c.name == case.winner)
            told.setdefault(winner.output, []).append(winner.name)
        return "; ".join(f"{one_name(names)} {output}" for output, names in told.items())
