"""The router's launch at little host cost: what Triton compiled for a call's like is kept, and launched directly.

Triton's own call binds, specialises and hashes every argument, constant and option again each time, which takes the
host several times as long as the launch itself. Here the first call of a kind goes that way, and its compiled kernel is
kept under a key of whatever Triton specialises on. A later call of that kind hands addresses, which need no query of
the driver as tensors do, to the function that launches the kernel. Whatever is out of the ordinary takes Triton's own
way again: hooks (profilers), another device than the current one, the interpreter, AMD, an unknown Triton.

Settings that change what Triton compiles (its knobs and environment) are read by the first call of a kind only.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

ARGUMENTS = ("logits", "bias", "weights_out", "ids_out", "num_valid", "expert_map", "num_tokens", "row_stride",
             "column_stride", "routed_scaling_factor", "shared_expert_weight")  # what the key and the launch know of
KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))  # the versions of Triton whose launchers were read for this


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
        runtime = knobs.runtime
        hooked = (kernel.pre_run_hooks or getattr(runtime.launch_enter_hook, "calls", True)
                  or getattr(runtime.launch_exit_hook, "calls", True))  # a chain of hooks may be empty
        if hooked or found is None or device != torch.cuda.current_device():
            compiled = launch_plainly(programs, logits, bias, weights, ids, num_valid, expert_map, num_tokens,
                                      row_stride, column_stride, routed_scaling_factor, shared_expert_weight)
            if not hooked and type(compiled) is CompiledKernel:  # a profiler's kernel may be instrumented
                # `compiled` owns the module: hold it
                kept[key] = (compiled, *_launcher(compiled, len(names)), driver.active.get_current_stream)
            return
        _, function, between, as_tuple, current_stream = found
        arguments = (logits_at, bias_at, weights_at, ids_at, num_valid_at, map_at, num_tokens, row_stride,
                     column_stride, routed_scaling_factor, shared_expert_weight, *constants)
        if as_tuple:
            arguments = (arguments,)
        function(programs, 1, 1, current_stream(device), *between, *arguments)

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    can_keep = isinstance(kernel, triton.JITFunction) and torch.version.cuda is not None and version in KNOWN
    return launch if can_keep else launch_plainly


def _launcher(compiled, count):
    """(function, between, as_tuple): what launches a kernel of `count` arguments, its constants included, when it is
    called as function(*grid, stream, *between, *arguments); or, as_tuple, with the arguments as one tuple.

    The function is the one in C that `compiled.run` calls when it has allocated what the kernel needs. Which arguments
    go where differs between Triton's versions, so a copy of `compiled.run` is asked. If the kernel needs an allocation,
    or the answer is not understood, the function is `compiled.run` itself.
    """
    run, metadata = compiled.run, compiled.metadata
    between = (compiled.function, compiled.packed_metadata, None, None, None)  # no launch metadata, no hooks
    if hasattr(run, "launch") and metadata.global_scratch_size == metadata.profile_scratch_size == 0:
        arguments = tuple(object() for _ in range(count))
        asked, passed = copy.copy(run), []
        asked.launch = lambda *everything: passed.extend(everything)
        asked(1, 1, 1, 0, *between, *arguments)
        if passed[:4] == [1, 1, 1, 0]:
            if passed[-1] == arguments:
                return run.launch, tuple(passed[4:-1]), True
            if tuple(passed[-count:]) == arguments:
                return run.launch, tuple(passed[4:-count]), False
    return run, between, False
