"""The host side of the two Triton routers: checks, outputs, one launch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton

from kernel_registry.errors import InputError

from .checks import make_checks

INTERPRETED = triton.knobs.runtime.interpret
PROGRAMS = 8192  # about twice what a GPU holds of one-warp programs; beyond that each takes several blocks of rows

_nothing = nullcontext()


def make_launcher(kernel, *, num_experts, topk, num_fused_shared_experts, renormalize, dtype, bias_dtype, **constants):
    """A function with moe.topk's signature that launches `kernel` once, or not at all when there are no tokens.

    `constants` are the kernel's own compile-time parameters beyond those that both routers have.
    """
    check = make_checks(num_experts=num_experts, num_fused_shared_experts=num_fused_shared_experts, has_bias=True,
                        dtype=dtype, bias_dtype=bias_dtype)
    rows = 16 if INTERPRETED else 1  # a program's tokens; rows never mix, so their number changes no result
    constants.update(
        NUM_EXPERTS=num_experts, TOPK=topk, NUM_SHARED=num_fused_shared_experts, RENORMALIZE=bool(renormalize), ROWS=rows,
        WIDEST=16 // getattr(torch, dtype).itemsize, PTX=torch.version.cuda is not None and not INTERPRETED)
    # Triton binds arguments faster by position than by name: the constants in the kernel's order, without and with
    # shared ids in the map.
    plain, mapping_shared = (
        tuple({**constants, "MAP_SHARED": flag}[name] for name in kernel.arg_names if name.isupper())
        for flag in (False, True))

    def launch(router_logits, correction_bias, *, routed_scaling_factor=1.0, shared_expert_weight=1.0,
               num_token_non_padded=None, expert_map=None):
        check(router_logits, correction_bias, num_token_non_padded, expert_map)
        num_tokens = router_logits.shape[0]
        weights = router_logits.new_empty((num_tokens, topk), dtype=torch.float32)
        ids = router_logits.new_empty((num_tokens, topk), dtype=torch.int32)
        if num_tokens == 0:
            return weights, ids
        if not (INTERPRETED or router_logits.is_cuda):
            raise InputError(f"router_logits is on {router_logits.device}, this kernel runs on a GPU",
                             hint="move the tensors, or dispatch with platform='cpu'")
        if correction_bias.stride(0) != 1:
            correction_bias = correction_bias.contiguous()
        if expert_map is not None and expert_map.stride(0) != 1:
            expert_map = expert_map.contiguous()
        tail = mapping_shared if expert_map is not None and expert_map.shape[0] > num_experts else plain
        with _nothing if INTERPRETED or router_logits.get_device() == torch.cuda.current_device() \
                else torch.cuda.device(router_logits.device):
            kernel[(min(-(-num_tokens // rows), PROGRAMS),)](
                router_logits, correction_bias, weights, ids, num_token_non_padded, expert_map, num_tokens,
                *router_logits.stride(), float(routed_scaling_factor), float(shared_expert_weight), *tail,
                num_warps=1, num_stages=1)
        return weights, ids

    return launch
