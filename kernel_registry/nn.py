"""A mixture-of-experts layer as a torch module, from a model's config: for engines of one's own.

    from kernel_registry.nn import MoE

    layer = MoE("qwen3-30b-a3b", device="cuda")
    layer.load_state_dict(weights)          # gate, experts.w13, experts.w2 and what else layer.state_dict() has
    y = layer(hidden_states)                # [..., H]
    print(layer.explain())                  # which kernels run, and why

It is the gate's product and the torch ops moe_topk, moe_experts and, with a shared expert, moe_finalize. Each
dispatches behind tracing: torch.compile sees one graph, and an override or a reload needs no other. `moe_layer` is the
same for who has logits and tensors at hand, and wants to say where the result is written.
"""

from __future__ import annotations

from typing import Mapping

import torch

from . import torch_ops
from .errors import InputError, TraitError
from .layer import EXPERTS, FINALIZE, TOPK, LayerTraits, read_layer
from .registry import registry

_STATIC = {  # the traits that the torch ops take as arguments; they read all others off their tensors
    TOPK: ("topk", "num_expert_group", "topk_group", "scoring", "renormalize", "score_dtype"),
    EXPERTS: ("weight_quant", "act_quant", "group_size", "activation", "apply_router_weight_on_input"),
}

_topk, _experts = torch_ops.calling(TOPK), torch_ops.calling(EXPERTS)


def _canonical(op: str, traits: Mapping[str, object]) -> dict[str, object]:
    return dict(registry.catalog.op(op).space.request(traits, registry.platform).traits)


class MoE(torch.nn.Module):
    """One layer of a model. Its parameters are empty until they are loaded, and record no gradients: kernels have none.

    config         what `kernel-registry plan` takes, a LayerTraits where a config does not say it all, or a config
                   object of transformers
    shared_expert  a module that takes hidden_states and returns what is added; None where there is none, or where its
                   output is passed to forward
    gate_bias      whether the gate adds a bias to the logits, as gpt-oss's does
    expert_map     for a part of the experts: [experts of the router] -> row of w13 here, or -1

    gate             [E, H], in the dtype that the router's logits have
    correction_bias  [E] float32, where the router has one
    w13, w2, ...     as moe.experts takes them, by the names of its arguments
    """

    def __init__(self, config: "str | Mapping | LayerTraits | object", *, shared_expert: torch.nn.Module | None = None,
                 gate_bias: bool = False, expert_map: torch.Tensor | None = None, device=None):
        super().__init__()
        traits = config if isinstance(config, LayerTraits) else read_layer(
            config.to_dict() if hasattr(config, "to_dict") else config)
        routing = _canonical(TOPK, traits.routing)
        experts = _canonical(EXPERTS, {**traits.experts, "topk": routing["topk"], "num_experts": routing["num_experts"],
                                       "expert_parallel": expert_map is not None})
        if routing["num_fused_shared_experts"]:
            raise TraitError("a fused shared expert is one of the experts' weights: MoE adds its output instead",
                             where=traits.name, hint="drop num_fused_shared_experts and pass a shared_expert")
        if expert_map is not None:
            if expert_map.shape != (routing["num_experts"],):
                raise TraitError(f"expert_map has the shape {list(expert_map.shape)}", where=traits.name,
                                 hint=f"it needs an entry for each of the router's {routing['num_experts']} experts")
            here, last = int((expert_map >= 0).sum()), int(expert_map.max())
            if last >= here:  # kernels would skip it, like an expert that is elsewhere
                raise TraitError(f"expert_map names row {last} of w13, which would have {here}", where=traits.name,
                                 hint="it numbers the experts that are here from 0, and has -1 for the others")
            experts["num_experts"] = here
        self.name, self.routed_scaling_factor = traits.name, traits.routed_scaling_factor
        self.hidden_size, self._published = experts["hidden_size"], getattr(torch, experts["dtype"])
        self.num_experts = routing["num_experts"]
        self.calls = {op: {name: given[name] for name in _STATIC[op]} for op, given in
                      ((TOPK, routing), (EXPERTS, experts))}

        def parameter(shape, dtype):
            return torch.nn.Parameter(torch.empty(shape, dtype=getattr(torch, dtype), device=device),
                                      requires_grad=False)

        self.gate = parameter((self.num_experts, self.hidden_size), routing["dtype"])
        self.gate_bias = parameter((self.num_experts,), routing["dtype"]) if gate_bias else None
        self.correction_bias = parameter((self.num_experts,), "float32") if routing["has_bias"] else None
        shapes = registry.catalog.op(EXPERTS).contract.parameters(experts)
        self.experts = torch.nn.ParameterDict({name: parameter(*kept) for name, kept in shapes.items()})
        self.kept = tuple(shapes)
        self.register_buffer("expert_map", expert_map if device is None or expert_map is None
                             else expert_map.to(device), persistent=False)
        self._table = None if expert_map is None else expert_map.cpu()
        self.shared_expert = shared_expert

    def _apply(self, *args, **kwargs):
        """The expert_map goes where the parameters go, and keeps what it says: to_empty leaves anything in a buffer, as
        is right for what is loaded afterwards, and this one is not."""
        before = self.expert_map
        super()._apply(*args, **kwargs)
        if before is not None:
            self.expert_map = (self._table if before.is_meta else before).to(self.expert_map.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden_states and of the result."""
        quantised = self.calls[EXPERTS]["weight_quant"] != "none"
        return self._published if quantised else self.experts["w2"].dtype

    def forward(self, hidden_states: torch.Tensor, *, shared_output: torch.Tensor | None = None,
                num_token_non_padded: torch.Tensor | None = None) -> torch.Tensor:
        """[..., H] from hidden_states [..., H]; `shared_output` [..., H] is added, beside or instead of what the
        layer's own shared expert gives. Rows past num_token_non_padded, all dimensions but the last counted as one, get
        nothing routed."""
        if hidden_states.dtype != self.dtype:
            raise InputError(f"hidden_states is {hidden_states.dtype}, expected {self.dtype}", where=self.name,
                             hint="cast it to the layer's dtype")
        flat = self._rows("hidden_states", hidden_states).contiguous()
        if self.shared_expert is not None and shared_output is None:
            shared_output = self.shared_expert(hidden_states)
        weights, ids = self._route(self.logits(flat), num_token_non_padded)
        result = self._routed(flat, weights, ids)
        if shared_output is not None:
            result = torch.ops.kernel_registry.moe_finalize(
                result, None, None, self.num_experts, shared_output=self._rows("shared_output", shared_output))
        return result.view(hidden_states.shape)

    def _rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """[T, H] of [..., H]; another tensor of as many elements would be cut into wrong rows."""
        if tensor.shape[-1:] != (self.hidden_size,):
            raise InputError(f"{name} is {[*tensor.shape]}, expected [..., {self.hidden_size}]", where=self.name)
        return tensor.reshape(-1, self.hidden_size)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The router's logits [T, E] of hidden_states [T, H]."""
        return torch.nn.functional.linear(hidden_states.to(self.gate.dtype), self.gate, self.gate_bias)

    def _route(self, logits, num_token_non_padded=None):
        return _topk(
            logits, self.correction_bias, routed_scaling_factor=self.routed_scaling_factor,
            num_token_non_padded=num_token_non_padded, **self.calls[TOPK])

    def _kept(self) -> dict[str, torch.Tensor]:
        return {name: self.experts[name] for name in self.kept}  # what torch.compile traces, as dict(...) it does not

    def _routed(self, hidden_states, weights, ids):
        kept = self._kept()
        return _experts(
            hidden_states, kept.pop("w13"), kept.pop("w2"), weights, ids, expert_map=self.expert_map, **kept,
            **self.calls[EXPERTS])

    def bind(self):
        """The PlanRow of each op, its kernel bound: for load time, when the parameters are on their device."""
        none = self.experts["w2"].new_empty((0, self.hidden_size), dtype=self.dtype)
        weights, ids = (none.new_empty((0, self.calls[TOPK]["topk"]), dtype=d) for d in (torch.float32, torch.int32))
        kept = self._kept()
        rows = [torch_ops.bind(TOPK, self.logits(none), self.correction_bias, **self.calls[TOPK]),
                torch_ops.bind(EXPERTS, none, kept.pop("w13"), kept.pop("w2"), weights, ids,
                               expert_map=self.expert_map, **kept, **self.calls[EXPERTS])]
        if self.shared_expert is not None:
            rows.append(torch_ops.bind(FINALIZE, none, None, None, self.num_experts, shared_output=none))
        return rows

    def explain(self) -> str:
        """Which kernel each op gets, and why."""
        return "\n".join([f"{self.name}: one layer", *(
            f"  {row.op} -> {row.implementation or 'nothing'}: {row.why}" for row in self.bind())])

    def extra_repr(self) -> str:
        return f"{self.name}, num_experts={self.num_experts}, topk={self.calls[TOPK]['topk']}, " \
               f"hidden_size={self.hidden_size}, dtype={self.dtype}"
