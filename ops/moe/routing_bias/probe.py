"""What another bias does to the choice of experts: random tokens, routed with both."""

from __future__ import annotations

import torch

from kernel_registry.ops.moe.topk.reference import topk as reference

TOKENS = 1024


def changed_tokens(before, after, *, num_experts, topk, num_expert_group, topk_group, num_fused_shared_experts,
                   scoring, tokens=TOKENS, seed=0) -> int:
    """Of `tokens` tokens with normal logits, how many get another set of experts with `after` than with `before`. Each
    row of a bias of several routers has its own tokens."""
    route = reference(num_experts=num_experts, topk=topk - num_fused_shared_experts,
                      num_expert_group=num_expert_group, topk_group=topk_group, num_fused_shared_experts=0,
                      scoring=scoring, has_bias=True, renormalize=False, dtype="float32", bias_dtype="float32",
                      score_dtype="float32")
    draw = torch.Generator().manual_seed(seed)  # of the host, so that every device sees the same tokens
    changed = 0
    for one, other in zip(*(bias.detach().float().reshape(-1, num_experts) for bias in (before, after))):
        logits = torch.randn(tokens, num_experts, generator=draw).to(one.device)
        ids = [route(logits, bias)[1].sort(dim=-1).values for bias in (one, other)]
        changed += int((ids[0] != ids[1]).any(dim=-1).sum())
    return changed
