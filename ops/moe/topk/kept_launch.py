"""The router's launch at little host cost: ../kept_launch.py, with the key of a router's arguments written out.

A router takes so little time that the loop over its arguments there would be seen.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..kept_launch import can_keep, hooked, launcher

ARGUMENTS = ("logits", "bias", "weights_out", "ids_out", "num_valid", "expert_map", "num_tokens", "row_stride",
             "column_stride", "routed_scaling_factor", "shared_expert_weight")  # what the key and the launch know of


def kept_launch(kernel, constants: dict, options: dict):
    """launch(programs, *ARGUMENTS) for a router kernel with these compile-time constants and launch options.

    The caller sees to it that logits, bias and outputs have the same dtypes in all calls, and all tensors one device.
    """
    names = tuple(kernel.arg_names)
    if names[:len(ARGUMENTS)] != ARGUMENTS or {*names[len(ARGUMENTS):]} != {*constants}:
        raise TypeError(f"a kernel of {names} and constants {(*constants,)}: the key must hold each argument's kind")
    constants = tuple(constants[name] for name in names[len(ARGUMENTS):])  # by position is faster than by name
    kept: dict[tuple, tuple] = {}

    def launch_plainly(programs, logits, *others):
        *others, routed_scaling_factor, shared_expert_weight = others
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            return kernel[(programs,)](logits, *others, float(routed_scaling_factor), float(shared_expert_weight),
                                       *constants, **options)

    def launch(programs, logits, bias, weights, ids, num_valid, expert_map, num_tokens, row_stride, column_stride,
               routed_scaling_factor, shared_expert_weight):
        device = logits.get_device()
        logits_at, weights_at, ids_at = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        bias_at = bias if bias is None else bias.data_ptr()
        num_valid_at = num_valid if num_valid is None else num_valid.data_ptr()
        map_at = expert_map if expert_map is None else expert_map.data_ptr()
        # Triton compiles anew for a pointer that is None, of another dtype, or not a multiple of 16; and for an integer
        # that is 1, a multiple of 16, or too large for int32 (num_tokens: only the last).
        key = (device, logits_at & 15, weights_at & 15, ids_at & 15, bias_at and bias_at & 15,
               num_valid_at and (num_valid_at & 15, num_valid.dtype), map_at and (map_at & 15, expert_map.dtype),
               num_tokens >> 31, row_stride & 15, row_stride == 1, row_stride >> 31,
               column_stride == 1 or (column_stride & 15, column_stride >> 31))
        found = kept.get(key)
        hooks = hooked(kernel)
        if hooks or found is None or device != torch.cuda.current_device():
            compiled = launch_plainly(programs, logits, bias, weights, ids, num_valid, expert_map, num_tokens,
                                      row_stride, column_stride, routed_scaling_factor, shared_expert_weight)
            if not hooks and type(compiled) is CompiledKernel:  # a profiler's kernel may be instrumented
                # `compiled` owns the module: hold it
                kept[key] = (compiled, launcher(compiled, len(names)), driver.active.get_current_stream)
            return
        _, (function, between, as_sequence, _), current_stream = found
        arguments = (logits_at, bias_at, weights_at, ids_at, num_valid_at, map_at, num_tokens, row_stride,
                     column_stride, routed_scaling_factor, shared_expert_weight, *constants)
        if as_sequence:
            arguments = (arguments,)
        function(programs, 1, 1, current_stream(device), *between, *arguments)

    return launch if can_keep(kernel) else launch_plainly
