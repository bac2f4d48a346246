"""Cheap checks that a call's tensors are the ones that its kernel was dispatched for.

`make_checks` returns a function that costs a few comparisons when all is well; the words are found only when something
is wrong. It never reads a tensor's values, so it neither synchronises nor breaks a graph capture.
"""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.arguments import INTEGERS, refuse


def make_checks(*, num_experts: int, num_fused_shared_experts: int, has_bias: bool, dtype: str, bias_dtype: str):
    """check(router_logits, correction_bias, num_token_non_padded, expert_map): num_tokens, or an InputError."""
    logits_dtype, wanted_bias_dtype = getattr(torch, dtype), getattr(torch, bias_dtype)
    bias_shape = (num_experts,)
    map_sizes = (num_experts, num_experts + num_fused_shared_experts)

    def check(router_logits, correction_bias, num_token_non_padded, expert_map):
        shape = router_logits.shape if isinstance(router_logits, torch.Tensor) else ()
        if len(shape) != 2 or shape[1] != num_experts or router_logits.dtype is not logits_dtype:
            refuse("router_logits", router_logits, f"[tokens, {num_experts}] {dtype}")
        device = router_logits.device
        if correction_bias is None:
            if has_bias:
                raise InputError("correction_bias is None, dispatched with has_bias=True",
                                 hint="pass the bias, or dispatch with has_bias=False")
        elif not has_bias:
            raise InputError("a correction_bias was passed, dispatched with has_bias=False",
                             hint="pass None, or dispatch with has_bias=True")
        elif (not isinstance(correction_bias, torch.Tensor) or correction_bias.dtype is not wanted_bias_dtype
              or correction_bias.shape != bias_shape or correction_bias.device != device):
            refuse("correction_bias", correction_bias, f"[{num_experts}] {bias_dtype} on {device}")
        if num_token_non_padded is not None and (
                not isinstance(num_token_non_padded, torch.Tensor) or num_token_non_padded.dtype not in INTEGERS
                or num_token_non_padded.numel() != 1 or num_token_non_padded.device != device):
            refuse("num_token_non_padded", num_token_non_padded, f"one int32 or int64 element on {device}")
        if expert_map is not None and (
                not isinstance(expert_map, torch.Tensor) or expert_map.dtype not in INTEGERS
                or expert_map.dim() != 1 or expert_map.shape[0] not in map_sizes or expert_map.device != device):
            sizes = " or ".join(f"[{n}]" for n in dict.fromkeys(map_sizes))
            refuse("expert_map", expert_map, f"{sizes} int32 or int64 on {device}")
        return shape[0]

    return check
