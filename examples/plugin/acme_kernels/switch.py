"""Softmax routing to the one best expert, in plain torch, for any device."""

from __future__ import annotations

import torch

from kernel_registry.ops.moe.topk.checks import make_checks


def topk(*, num_experts, renormalize, dtype, bias_dtype, **_):
    """A kernel with moe.topk's signature for these traits; the rest is fixed by `when` in registry.yaml."""
    check = make_checks(num_experts=num_experts, num_fused_shared_experts=0, has_bias=False, dtype=dtype,
                        bias_dtype=bias_dtype)

    def kernel(router_logits, correction_bias, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
               num_token_non_padded=None, expert_map=None):
        check(router_logits, correction_bias, num_token_non_padded, expert_map)
        score = torch.softmax(router_logits.float(), dim=-1).nan_to_num(nan=-1.0)  # NaN ranks below every score
        ids = score.argmax(dim=-1, keepdim=True)  # the first of equal ones
        weights = score.gather(1, ids).clamp(min=0.0)
        if renormalize:
            weights = weights / (weights + 1e-20)
        weights = weights * routed_scaling_factor
        if expert_map is not None:
            ids = expert_map[ids]
        ids = ids.to(torch.int32)
        if num_token_non_padded is not None:
            live = torch.arange(ids.shape[0], device=ids.device)[:, None] < num_token_non_padded
            ids, weights = torch.where(live, ids, -1), torch.where(live, weights, 0.0)
        return weights, ids

    return kernel
