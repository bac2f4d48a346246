"""indexer.wk_weights_proj for few tokens, in one Triton launch.

192 columns are too few to fill a GPU's multiprocessors, so their sums over the hidden size are cut into `splits`
pieces. The kernel is in fused_kernel.py; here is what it is compiled with.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton

from kernel_registry.errors import InputError

from .arrivals import Arrivals
from .checks import make_checks
from .fused_kernel import fused_kernel

INTERPRETED = triton.knobs.runtime.interpret
BLOCK_K = 128
MOST_TOKENS = 128


def fused(*, hidden_size, head_dim, num_heads, dtype="bfloat16", wk_format="none", splits=14, tokens_per_program=16,
          columns_per_program=16, num_warps=4, num_stages=3, **_):
    """A kernel with indexer.wk_weights_proj's signature for these traits, up to 128 tokens.

    splits is a part of what is computed: other pieces, other rounding. The others change how fast it is and no bit:
    tokens_per_program, 16 or 32 (from 64 on another instruction would multiply), columns_per_program, a power of two
    from 16 on, and Triton's own two.
    """
    check = make_checks(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype,
                        wk_format=wk_format)
    if tokens_per_program not in (16, 32):
        raise ValueError(f"tokens_per_program={tokens_per_program} is neither 16 nor 32")
    if columns_per_program < 16 or columns_per_program & (columns_per_program - 1):
        raise ValueError(f"columns_per_program={columns_per_program} is not a power of two from 16 on")
    if splits < 1:
        raise ValueError(f"splits={splits} is less than 1")
    columns, parts = head_dim + num_heads, [head_dim, num_heads]
    splits = min(splits, triton.cdiv(hidden_size, BLOCK_K))
    column_tiles = triton.cdiv(columns, columns_per_program)
    arrivals = Arrivals(column_tiles * triton.cdiv(MOST_TOKENS, tokens_per_program))
    constants = dict(HIDDEN=hidden_size, COLUMNS=columns, SPLITS=splits, BLOCK_T=tokens_per_program,
                     BLOCK_N=columns_per_program, BLOCK_K=BLOCK_K)

    def kernel(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        device = hidden_states.device
        out = torch.empty((*hidden_states.shape[:-1], columns), dtype=hidden_states.dtype, device=device)
        if out.numel():
            x = hidden_states.reshape(-1, hidden_size)
            if x.stride(1) != 1 and hidden_size > 1:
                x = x.contiguous()
            tokens = x.shape[0]
            if tokens > MOST_TOKENS:
                raise InputError(f"hidden_states has {tokens} tokens, this kernel takes up to {MOST_TOKENS}",
                                 hint="dispatch with num_tokens, or bind, which looks at each call")
            if not (INTERPRETED or hidden_states.is_cuda):
                raise InputError(f"hidden_states is on {device}, this kernel runs on a GPU",
                                 hint="move the tensors, or dispatch with platform='cpu'")
            with torch.cuda.device(device) if hidden_states.is_cuda else nullcontext():
                partial = torch.empty((splits, tokens, columns), dtype=torch.float32, device=device)
                fused_kernel[(column_tiles, splits, triton.cdiv(tokens, tokens_per_program))](
                    x, weight, out, partial, arrivals.take(device), tokens, x.stride(0), **constants,
                    num_warps=num_warps, num_stages=num_stages)
        return out.split(parts, dim=-1)

    return kernel
