"""Experts without quantisation: `moe.experts` in vLLM's modular interface.

vLLM brings the output's buffer, and torch.ops.kernel_registry.moe_experts_out declares that it writes there: in a
compiled graph nothing else would tell that the buffer changes.
"""

from __future__ import annotations

import functools

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from ... import torch_ops  # noqa: F401  registers torch.ops.kernel_registry
from ...traits.dtype import dtype_name
from .choosing import Declined, choose, remember

OP = "moe.experts"
_ACTIVATIONS = {MoEActivation.SILU: "silu", MoEActivation.GELU: "gelu"}


def switch():
    """Makes vLLM build `Method` where it would build its own; returns the undo."""
    name = UnquantizedFusedMoEMethod.__name__
    if name in op_registry_oot:
        remember(name, OP, declined=f"{op_registry_oot[name].__qualname__} of another plugin has its place")
        return lambda: None
    UnquantizedFusedMoEMethod.register_oot(Method)
    return functools.partial(op_registry_oot.pop, name)


class Experts(modular_kernel.FusedMoEExpertsModular):
    """moe.experts: takes the weights as vLLM loads them, and writes what they give, summed, into the output."""

    expects_unquantized_inputs = True

    @staticmethod
    def activation_format():
        return modular_kernel.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu() or current_platform.is_cuda_alike()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config) -> bool:
        # passthrough: experts that exchange and reduce between ranks themselves, so that nothing does it after them
        return not (moe_parallel_config.use_all2all_kernels or moe_parallel_config.use_passthrough_all2all)

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        return (0,), (0,), (M, K)

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input) -> None:
        torch.ops.kernel_registry.moe_experts_out(
            output, hidden_states, w1, w2, topk_weights, topk_ids, w13_bias=self.w1_bias, w2_bias=self.w2_bias,
            expert_map=expert_map, activation=_ACTIVATIONS[activation])


class Method(UnquantizedFusedMoEMethod):
    """vLLM's method, with the registry's experts in it where they serve the layer."""

    def __init__(self, moe):
        super().__init__(moe)
        try:
            traits = read(moe)
            choose(OP, traits)
        except Declined as declined:
            remember(UnquantizedFusedMoEMethod.__name__, OP, declined=str(declined))
            return
        self.experts_cls = Experts
        if not current_platform.is_cpu():
            self.unquantized_backend = UnquantizedMoeBackend.TRITON  # that which leaves weights as they are loaded
        remember(UnquantizedFusedMoEMethod.__name__, OP, [traits])


def read(moe) -> dict[str, object]:
    """The traits of moe.experts for a layer's config (FusedMoEConfig). Raises Declined."""
    served, why = Experts.is_supported_config(Experts, moe, None, None, Experts.activation_format())
    if not served:
        raise Declined(why)
    if moe.moe_backend != "auto":
        raise Declined(f"vLLM's moe_backend is {moe.moe_backend}: experts of one's own choice stay")
    if moe.experts_per_token == 1:
        raise Declined("with one expert for a token vLLM may have applied its weight to the input")
    for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
        if getattr(moe, name) is not None:
            raise Declined(f"{name} is given")
    return dict(num_experts=moe.num_local_experts, topk=moe.experts_per_token, hidden_size=moe.hidden_dim,
                intermediate_size=moe.intermediate_size_per_partition, dtype=dtype_name(moe.in_dtype),
                activation=_ACTIVATIONS[moe.activation], has_bias=moe.has_bias,
                expert_parallel=moe.moe_parallel_config.use_ep, output_alias=True)
