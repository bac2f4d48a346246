"""What the Triton implementations do on the host in each call: checks, outputs, one launch."""

from __future__ import annotations

import torch
import triton

from kernel_registry.errors import InputError

INTERPRETED = triton.knobs.runtime.interpret


def make_route(check, num_experts: int, topk: int, rows: int, plain, mapping_shared):
    """A kernel with moe.topk's signature.

    check            what make_checks returned
    rows             tokens that a program routes
    plain            a kept_launch
    mapping_shared   the one for an expert_map that has entries for fused shared experts too
    """

    def route(router_logits, correction_bias, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
              num_token_non_padded=None, expert_map=None):
        num_tokens = check(router_logits, correction_bias, num_token_non_padded, expert_map)
        device = router_logits.device
        weights = torch.empty_strided((num_tokens, topk), (topk, 1), dtype=torch.float32, device=device)
        ids = torch.empty_strided((num_tokens, topk), (topk, 1), dtype=torch.int32, device=device)
        if num_tokens == 0:
            return weights, ids
        if not (INTERPRETED or router_logits.is_cuda):
            raise InputError(f"router_logits is on {device}, this kernel runs on a GPU",
                             hint="move the tensors, or dispatch with platform='cpu'")
        if correction_bias is not None and not correction_bias.is_contiguous():
            correction_bias = correction_bias.contiguous()
        launch = plain
        if expert_map is not None:
            expert_map = expert_map.contiguous()
            launch = mapping_shared if expert_map.shape[0] > num_experts else plain
        launch(-(-num_tokens // rows), router_logits, correction_bias, weights, ids, num_token_non_padded, expert_map,
               num_tokens, *router_logits.stride(), routed_scaling_factor, shared_expert_weight)
        return weights, ids

    return route
