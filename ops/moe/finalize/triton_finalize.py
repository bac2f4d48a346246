"""moe.finalize in one Triton launch, or none where nothing is left to do.

Serves everything that the op means: any hidden size, 1 to 16 slots, any strides of the rows, the shared output and
`out`. Columns that lie side by side are loaded in vectors as wide as the hidden size and the strides allow.
The kernel is in finalize_kernel.py; here is what it is compiled with.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton

from kernel_registry.errors import InputError

from .checks import make_checks, make_finished
from .finalize_kernel import finalize_kernel

INTERPRETED = triton.knobs.runtime.interpret
WHOLE = INTERPRETED


def finalize(*, num_experts, topk, hidden_size, dtype="bfloat16", out_dtype="bfloat16", reduced=False,
             weights_applied=False, has_shared=False, expert_parallel=False, output_alias=False, platform=None,
             columns_per_program=256, **_):
    """A kernel with moe.finalize's signature for these traits.

    columns_per_program, a power of two from 32 on, changes how fast it is at which sizes, and no result. In the
    interpreter, which takes as long over a few columns as over many, a program has all of them.
    """
    check = make_checks(topk=topk, hidden_size=hidden_size, dtype=dtype, out_dtype=out_dtype, reduced=reduced,
                        weights_applied=weights_applied, has_shared=has_shared, expert_parallel=expert_parallel,
                        output_alias=output_alias)
    finished = make_finished(dtype=dtype, out_dtype=out_dtype, reduced=reduced, has_shared=has_shared)
    if columns_per_program < 32 or columns_per_program & (columns_per_program - 1):
        raise ValueError(f"columns_per_program={columns_per_program} is not a power of two from 32 on")
    whole = max(32, triton.next_power_of_2(hidden_size))
    block = whole if WHOLE else min(columns_per_program, whole)
    wave = 64 if platform is not None and platform.kind == "hip" and platform.arch < (10,) else 32
    constants = dict(TOPK=1 if reduced else topk, NUM_EXPERTS=num_experts, HIDDEN=hidden_size, BLOCK=block)
    options = dict(num_warps=max(1, block // (8 * wave)), num_stages=1)  # 8 columns a thread: 16 bytes of 16-bit rows
    tiles = -(-hidden_size // block)
    result_dtype = getattr(torch, out_dtype)

    def kernel(expert_output, topk_weights=None, topk_ids=None, *, shared_output=None, routed_scaling_factor=1.0,
               expert_map=None, out=None):
        tokens = check(expert_output, topk_weights, topk_ids, shared_output, expert_map, out)
        if finished(expert_output, routed_scaling_factor, out):
            return expert_output if out is None else out
        device = expert_output.device
        if out is None:
            out = torch.empty((tokens, hidden_size), dtype=result_dtype, device=device)
        if tokens == 0:
            return out
        if not (INTERPRETED or expert_output.is_cuda):
            raise InputError(f"expert_output is on {device}, this kernel runs on a GPU",
                             hint="move the tensors, or dispatch with platform='cpu'")
        row_token, *row_slot, row_column = expert_output.stride()
        shared_token, shared_column = shared_output.stride() if has_shared else (0, 1)
        out_token, out_column = out.stride()
        with torch.cuda.device(device) if expert_output.is_cuda else nullcontext():
            finalize_kernel[(tokens, tiles)](
                expert_output, _dense(topk_weights), _dense(topk_ids), shared_output, _dense(expert_map), out,
                0 if expert_map is None else expert_map.shape[0], float(routed_scaling_factor), row_token,
                *(row_slot or (0,)), row_column, shared_token, shared_column, out_token, out_column, **constants,
                DENSE=row_column == shared_column == out_column == 1, **options)
        return out

    return kernel


def _dense(tensor):
    return tensor if tensor is None else tensor.contiguous()
