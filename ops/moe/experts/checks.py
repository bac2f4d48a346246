"""Cheap checks that a call's tensors are the ones that its kernel was dispatched for.

`make_checks` works out what each argument has to be and returns a function that costs a few comparisons an argument
when all is well; the words are found only when something is wrong. It never reads a tensor's values, so it neither
synchronises nor breaks a graph capture.
"""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.arguments import FLOATS, INTEGERS, names, refuse

from .formats import ACTIVATIONS, WEIGHTS, w2_matrix, w13_matrix


def make_checks(*, num_experts, topk, hidden_size, intermediate_size, dtype="bfloat16", weight_quant="none",
                act_quant="none", group_size=128, activation="silu", has_bias=False, expert_parallel=False,
                output_alias=False, **_):
    """check(<the arguments of the kernel>): num_tokens, or an InputError that names what is wrong."""
    hidden_dtype, weights, act = getattr(torch, dtype), WEIGHTS[weight_quant], ACTIVATIONS[act_quant]
    sizes = dict(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size,
                 weight_quant=weight_quant, group_size=group_size, activation=activation)
    w13_is, w2_is = w13_matrix(**sizes), w2_matrix(**sizes)
    stored = (weights.stored or hidden_dtype,)
    scaled, static = bool(weights.rows), act is not None and not act.group
    w13_shape, w2_shape = w13_is.stored_shape, w2_is.stored_shape
    w13_scales, w2_scales = w13_is.scale_shape, w2_is.scale_shape
    biases = (num_experts, 2 * intermediate_size), (num_experts, hidden_size)

    def check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale, w13_bias,
              w2_bias, expert_map, out):
        shape = hidden_states.shape if isinstance(hidden_states, torch.Tensor) else ()
        if (len(shape) != 2 or shape[1] != hidden_size or hidden_states.dtype is not hidden_dtype
                or not hidden_states.is_contiguous()):
            refuse("hidden_states", hidden_states, f"contiguous [tokens, {hidden_size}] {dtype}")
        tokens, device = shape[0], hidden_states.device

        def need(name, tensor, wanted, dtypes):
            if (not isinstance(tensor, torch.Tensor) or tensor.shape != wanted or tensor.dtype not in dtypes
                    or tensor.device != device or not tensor.is_contiguous()):
                refuse(name, tensor, f"contiguous {list(wanted)} {names(dtypes)} on {device}")

        need("w13", w13, w13_shape, stored)
        need("w2", w2, w2_shape, stored)
        need("topk_weights", topk_weights, (tokens, topk), FLOATS)
        need("topk_ids", topk_ids, (tokens, topk), INTEGERS)
        if scaled:
            need("w13_scale", w13_scale, w13_scales, weights.scale_dtypes)
            need("w2_scale", w2_scale, w2_scales, weights.scale_dtypes)
        elif w13_scale is not None or w2_scale is not None:
            _unasked("w13_scale" if w13_scale is not None else "w2_scale", f"weight_quant={weight_quant}")
        if static:
            for name, tensor in (("a13_scale", a13_scale), ("a2_scale", a2_scale)):
                if (not isinstance(tensor, torch.Tensor) or tensor.numel() != 1 or tensor.dim() > 1
                        or tensor.dtype is not torch.float32 or tensor.device != device):
                    refuse(name, tensor, f"[1] or scalar float32 on {device}")
        elif a13_scale is not None or a2_scale is not None:
            _unasked("a13_scale" if a13_scale is not None else "a2_scale", f"act_quant={act_quant}")
        if has_bias:
            need("w13_bias", w13_bias, biases[0], FLOATS)
            need("w2_bias", w2_bias, biases[1], FLOATS)
        elif w13_bias is not None or w2_bias is not None:
            _unasked("w13_bias" if w13_bias is not None else "w2_bias", "has_bias=False")
        if expert_parallel:
            if (not isinstance(expert_map, torch.Tensor) or expert_map.dim() != 1 or expert_map.shape[0] == 0
                    or expert_map.dtype not in INTEGERS or expert_map.device != device
                    or not expert_map.is_contiguous()):
                refuse("expert_map", expert_map, f"contiguous [experts of all machines] int32 or int64 on {device}")
        elif expert_map is not None:
            _unasked("expert_map", "expert_parallel=False")
        if output_alias:  # its rows may lie apart
            if (not isinstance(out, torch.Tensor) or out.shape != (tokens, hidden_size) or out.dtype is not hidden_dtype
                    or out.device != device):
                refuse("out", out, f"{[tokens, hidden_size]} {names([hidden_dtype])} on {device}")
        elif out is not None:
            _unasked("out", "output_alias=False")
        return tokens

    return check


def _unasked(name: str, traits: str):
    raise InputError(f"{name} was passed, expected None: dispatched with {traits}",
                     hint=f"leave {name} out, or dispatch with the trait that asks for it")
