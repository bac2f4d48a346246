"""Cheap checks that a call's tensors are the ones that its kernel was dispatched for, and whether it has work to do.

Neither reads a tensor's values, so neither synchronises nor breaks a graph capture.
"""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.arguments import FLOATS, INTEGERS, names, refuse


def make_checks(*, topk: int, hidden_size: int, dtype: str, out_dtype: str, reduced: bool, weights_applied: bool,
                has_shared: bool, expert_parallel: bool, output_alias: bool):
    """check(expert_output, topk_weights, topk_ids, shared_output, expert_map, out): num_tokens, or an InputError."""
    row_dtype, result_dtype = getattr(torch, dtype), getattr(torch, out_dtype)
    rest = (hidden_size,) if reduced else (topk, hidden_size)
    told = f"[tokens, {', '.join(map(str, rest))}] {dtype}"

    def check(expert_output, topk_weights, topk_ids, shared_output, expert_map, out):
        if not isinstance(expert_output, torch.Tensor) or expert_output.shape[1:] != rest or expert_output.dim() < 2 \
                or expert_output.dtype is not row_dtype:
            refuse("expert_output", expert_output, told)
        tokens, device = expert_output.shape[0], expert_output.device

        def tensor(name, given, dtypes, shape, wanted, why):
            """`given` is such a tensor exactly when it is `wanted`."""
            if (given is None) == wanted:
                raise InputError(f"{name} is {'missing' if wanted else 'given'}, dispatched with {why}",
                                 hint=f"{'pass it' if wanted else 'pass None'}, or dispatch with other traits")
            if wanted and (not isinstance(given, torch.Tensor) or given.dtype not in dtypes or given.device != device
                           or given.shape != shape):
                refuse(name, given, f"{[*shape]} {names(dtypes)} on {device}")

        slots, row = (tokens, topk), (tokens, hidden_size)
        if topk_weights is not None or not weights_applied:
            tensor("topk_weights", topk_weights, FLOATS, slots, not weights_applied,
                   f"weights_applied={weights_applied}")
        if topk_ids is not None or expert_parallel:
            tensor("topk_ids", topk_ids, INTEGERS, slots, not reduced,
                   f"reduced={reduced}, expert_parallel={expert_parallel}")
        if shared_output is not None or has_shared:
            tensor("shared_output", shared_output, FLOATS, row, has_shared, f"has_shared={has_shared}")
        if expert_map is not None or expert_parallel:
            size = expert_map.shape if isinstance(expert_map, torch.Tensor) and expert_map.dim() == 1 else ("experts",)
            tensor("expert_map", expert_map, INTEGERS, size, expert_parallel, f"expert_parallel={expert_parallel}")
        if out is not None or output_alias:
            tensor("out", out, (result_dtype,), row, output_alias, f"output_alias={output_alias}")
        return tokens

    return check


def make_finished(*, dtype: str, out_dtype: str, reduced: bool, has_shared: bool):
    """finished(expert_output, routed_scaling_factor, out): whether the result stands in expert_output already."""
    possible = reduced and not has_shared and dtype == out_dtype

    def finished(expert_output, routed_scaling_factor, out):
        return possible and routed_scaling_factor == 1 and (
            out is None or (out.data_ptr() == expert_output.data_ptr() and out.stride() == expert_output.stride()))

    return finished
