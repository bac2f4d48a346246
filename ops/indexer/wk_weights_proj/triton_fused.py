"""indexer.wk_weights_proj for few tokens, in one Triton launch.

192 columns are too few to fill a GPU's multiprocessors, so their sums over the hidden size are cut into `splits`
pieces. The kernel is in fused_kernel.py; here is what it is compiled with.
"""

from __future__ import annotations

import torch
import triton

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.experts.launch import dependent_launch, on_gpu

from .arrivals import Arrivals
from .checks import as_rows, make_checks
from .fused_kernel import fused_kernel

BLOCK_T = 16  # tokens a program, as few as a matrix unit multiplies
MOST_TOKENS = 128


def fused(*, hidden_size, head_dim, num_heads, dtype="bfloat16", wk_format="none", platform=None, splits=14,
          block_k=256, columns_per_program=32, num_warps=4, num_stages=4, **_):
    """A kernel with indexer.wk_weights_proj's signature for these traits, up to 128 tokens.

    splits and block_k, a power of two from 16 on, are a part of what is computed: other pieces, other rounding. The
    others change how fast it is and no bit: columns_per_program, a power of two from 16 on, and Triton's own two.
    """
    check = make_checks(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype,
                        wk_format=wk_format)
    for name, value in (("block_k", block_k), ("columns_per_program", columns_per_program)):
        if value < 16 or value & (value - 1):
            raise ValueError(f"{name}={value} is not a power of two from 16 on")
    if splits < 1:
        raise ValueError(f"splits={splits} is less than 1")
    columns, parts = head_dim + num_heads, [head_dim, num_heads]
    splits = min(splits, triton.cdiv(hidden_size, block_k))
    column_tiles = triton.cdiv(columns, columns_per_program)
    arrivals = Arrivals(column_tiles * triton.cdiv(MOST_TOKENS, BLOCK_T))
    dependent = dependent_launch(platform)
    options = dict(HIDDEN=hidden_size, COLUMNS=columns, SPLITS=splits, BLOCK_T=BLOCK_T, BLOCK_N=columns_per_program,
                   BLOCK_K=block_k, DEPENDENT=dependent, num_warps=num_warps, num_stages=num_stages,
                   **({"launch_pdl": True} if dependent else {}))

    def kernel(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        device = hidden_states.device
        out = torch.empty((*hidden_states.shape[:-1], columns), dtype=hidden_states.dtype, device=device)
        if out.numel():
            x = as_rows(hidden_states)
            tokens = x.shape[0]
            if tokens > MOST_TOKENS:
                raise InputError(f"hidden_states has {tokens} tokens, this kernel takes up to {MOST_TOKENS}",
                                 hint="dispatch with num_tokens, or bind, which looks at each call")
            with on_gpu(device):
                partial = torch.empty((splits, tokens, columns), dtype=torch.float32, device=device)
                fused_kernel[(column_tiles, splits, triton.cdiv(tokens, BLOCK_T))](
                    x, weight, out, partial, arrivals.take(device), tokens, x.stride(0), **options)
        return out.split(parts, dim=-1)

    return kernel
