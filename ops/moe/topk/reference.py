"""moe.topk in plain torch: what every trait combination means, and the fallback that serves all of them.

Runs on any device and under torch.compile. Sorts are stable, so that ties go to the lowest id (torch.topk promises no
order), and NaN is ranked below every number by a sort of its own.

`score_dtype="float32"` computes in float32 after an exact upcast. `score_dtype="logits"` computes, op by op, in the
dtype that eager torch code gives: scores in the logits' dtype, choices in the dtype to which score and bias promote,
group scores in the choices' dtype, weights in the scores' dtype, and float32 only at the end.
"""

from __future__ import annotations

import torch

from .checks import make_checks


def _score(x: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "sigmoid":
        return torch.sigmoid(x)
    if scoring == "softmax":
        return torch.softmax(x, dim=-1)
    # softplus without a threshold: nothing overflows, and small values keep their digits
    return torch.sqrt(torch.log1p(torch.exp(-x.abs())) + torch.clamp(x, min=0))


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Indices along the last dimension, best first: descending, NaN last, lowest index first on ties."""
    order = torch.sort(values.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")),
                       dim=-1, descending=True, stable=True).indices
    missing = torch.gather(values.isnan(), -1, order).to(torch.int8)  # -inf and NaN: the numbers go first
    return torch.gather(order, -1, torch.sort(missing, dim=-1, stable=True).indices)


def _sum_in_order(weights: torch.Tensor) -> torch.Tensor:
    """[T, K] -> [T, 1], added slot by slot: torch.sum may choose its order by T, and a row must not depend on that."""
    total = weights[:, :1]
    for slot in range(1, weights.shape[1]):
        total = total + weights[:, slot:slot + 1]
    return total


def _group_score(choice: torch.Tensor, has_bias: bool) -> torch.Tensor:
    """[T, G, P] -> [T, G]: the sum of the two largest choices, or the largest one without a bias. NaN ranks lowest."""
    best = torch.gather(choice, -1, _rank(choice)[..., :2 if has_bias else 1])
    return best.sum(dim=-1) if has_bias else best[..., 0]


def topk(*, num_experts, topk, num_expert_group=1, topk_group=1, num_fused_shared_experts=0, scoring="sigmoid",
         has_bias=True, renormalize=True, dtype="float32", bias_dtype="float32", score_dtype="float32", **_):
    """A kernel with moe.topk's signature for these traits."""
    check = make_checks(num_experts=num_experts, num_fused_shared_experts=num_fused_shared_experts, has_bias=has_bias,
                        dtype=dtype, bias_dtype=bias_dtype)
    routed = topk - num_fused_shared_experts
    group_size = num_experts // num_expert_group

    def reference(router_logits, correction_bias, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
                  num_token_non_padded=None, expert_map=None):
        check(router_logits, correction_bias, num_token_non_padded, expert_map)
        num_tokens = router_logits.shape[0]
        logits = router_logits.contiguous()  # strided rows take another path through exp, with other last bits
        if score_dtype == "float32":
            logits = logits.float()
        score = _score(logits, scoring)
        if not has_bias:
            choice = score
        elif score_dtype == "float32":
            choice = score + correction_bias.float()
        else:
            choice = score + correction_bias
        if topk_group < num_expert_group:
            group_score = _group_score(choice.view(num_tokens, num_expert_group, group_size), has_bias)
            kept = _rank(group_score)[:, :topk_group]
            keep = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, kept, True)
            choice = choice.masked_fill(~keep.repeat_interleave(group_size, dim=1), float("-inf"))
        ids = _rank(choice)[:, :routed]
        weights = torch.gather(score, 1, ids)
        weights = torch.where(weights.isnan(), torch.zeros_like(weights), weights)
        if renormalize:
            total = _sum_in_order(weights) if score_dtype == "float32" else weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + 1e-20)
            if scoring == "sqrtsoftplus" or weights.dtype == torch.float16:  # inf / inf; float16 has no 1e-20: 0 / 0
                weights = torch.where(weights.isnan(), torch.zeros_like(weights), weights)
        weights = (weights * routed_scaling_factor).float()
        if expert_map is not None and expert_map.shape[0] == num_experts:
            ids = expert_map[ids]
        ids = ids.to(torch.int32)
        if num_fused_shared_experts:
            shared = torch.arange(num_experts, num_experts + num_fused_shared_experts, dtype=torch.int32,
                                  device=ids.device).expand(num_tokens, -1)
            ids = torch.cat([ids, shared], dim=1)
            weights = torch.cat([weights, weights.new_full(shared.shape, shared_expert_weight)], dim=1)
        if expert_map is not None and expert_map.shape[0] != num_experts:
            ids = expert_map[ids.long()].to(torch.int32)
        if num_token_non_padded is not None:
            live = (torch.arange(num_tokens, device=ids.device) < num_token_non_padded)[:, None]
            ids, weights = torch.where(live, ids, -1), torch.where(live, weights, 0.0)
        return weights, ids

    return reference
