"""moe.topk: which experts serve each token, and with what weight.

    (router_logits [T, E], correction_bias [E] | None, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
     num_token_non_padded=None, expert_map=None) -> (topk_weights [T, K] float32, topk_ids [T, K] int32)

router_logits         float32, bfloat16 or float16; any strides; T may be 0
correction_bias       float32, bfloat16 or float16, on the logits' device; None exactly when has_bias is false
routed_scaling_factor multiplies the routed weights, renormalised or not
shared_expert_weight  weight of the fused shared experts' slots (the last n of K, ids E..E+n-1)
num_token_non_padded  int32 or int64 tensor of one element on the logits' device, may change between graph replays; rows
                      at or past it get ids -1 and weights 0
expert_map            int32 or int64 [E] or [E + n], logical to physical ids; shared ids pass through it only in the
                      second form
Raises kernel_registry.errors.InputError for tensors that contradict the dispatched traits.

The meaning, step by step, is in docs/moe_topk.md. Sources: DeepSeek-V3 technical report section 2.1.2 (arXiv
2412.19437), and the choices among existing implementations that docs/moe_topk.md gives reasons for.
"""

from __future__ import annotations

from kernel_registry.contract import Contract, Workload
from kernel_registry.traits import moe


class TopK(Contract):
    """Traits, signature and readers of moe.topk."""

    traits = (
        moe.NUM_EXPERTS, moe.TOPK, moe.NUM_EXPERT_GROUP, moe.TOPK_GROUP, moe.NUM_FUSED_SHARED_EXPERTS, moe.SCORING,
        moe.HAS_BIAS, moe.RENORMALIZE, moe.DTYPE, moe.BIAS_DTYPE, moe.SCORE_DTYPE, moe.PLATFORM, moe.NUM_TOKENS,
        moe.CONTIGUOUS,
    )
    derived = {
        "experts_per_group": "num_experts // num_expert_group",
        "num_routed": "topk - num_fused_shared_experts",
    }
    relations = (
        "num_experts % num_expert_group == 0",
        "topk_group <= num_expert_group",
        "num_routed >= 1",
        "num_routed <= topk_group * experts_per_group",
    )
    dynamic = {
        "num_tokens": lambda router_logits: router_logits.shape[0],
        "contiguous": lambda router_logits: router_logits.is_contiguous(),
    }
    schema = (
        "(Tensor router_logits, Tensor? correction_bias, int topk, int num_expert_group=1, int topk_group=1, "
        "int num_fused_shared_experts=0, str scoring='sigmoid', bool renormalize=True, str score_dtype='float32', "
        "float routed_scaling_factor=1.0, float shared_expert_weight=1.0, Tensor? num_token_non_padded=None, "
        "Tensor? expert_map=None) -> (Tensor, Tensor)"
    )
    oracle = "kernel_registry.ops.moe.topk.oracle:check"
    cases = "kernel_registry.ops.moe.topk.cases"

    @staticmethod
    def signature(router_logits, correction_bias, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
                  num_token_non_padded=None, expert_map=None):
        """See the module's docstring."""

    @staticmethod
    def unpack(router_logits, correction_bias, topk, num_expert_group=1, topk_group=1, num_fused_shared_experts=0,
               scoring="sigmoid", renormalize=True, score_dtype="float32", routed_scaling_factor=1.0,
               shared_expert_weight=1.0, num_token_non_padded=None, expert_map=None):
        """One call of the torch op, see `schema`, as (traits, args, kwargs) of a dispatch and of the kernel."""
        traits = dict(
            num_experts=router_logits.shape[-1], topk=topk, num_expert_group=num_expert_group, topk_group=topk_group,
            num_fused_shared_experts=num_fused_shared_experts, scoring=scoring, has_bias=correction_bias is not None,
            renormalize=renormalize, dtype=router_logits.dtype,
            bias_dtype="float32" if correction_bias is None else correction_bias.dtype, score_dtype=score_dtype)
        return traits, (router_logits, correction_bias), dict(
            routed_scaling_factor=routed_scaling_factor, shared_expert_weight=shared_expert_weight,
            num_token_non_padded=num_token_non_padded, expert_map=expert_map)

    @staticmethod
    def fake(router_logits, correction_bias, topk, *_, **__):
        """Outputs of the torch op without data: shapes, dtypes and device only."""
        import torch

        shape = (router_logits.shape[0], topk)
        return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)

    @staticmethod
    def workloads(config) -> list[Workload]:
        """The routing call of every MoE layer of a model, read off its Hugging Face config."""
        from kernel_registry.traits.model_config import routing

        found = routing(config)
        return [Workload("routing", found.traits, found.arguments, found.moe_layers, found.notes)]
