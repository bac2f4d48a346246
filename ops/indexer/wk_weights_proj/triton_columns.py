"""indexer.wk_weights_proj for a handful of tokens, in one Triton launch: a program for each column of each token.

With so few tokens a matrix unit has nothing to share, and a program that sums a whole column itself needs no other to
add to it. Each token reads all weights, the second one from the cache: above some four, triton_fused.py is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_registry.ops.moe.experts.launch import dependent_launch, on_gpu

from ...moe import casts
from .checks import as_rows, make_checks


@triton.jit
def column_kernel(x, weight, out, row_x, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
                  DEPENDENT: tl.constexpr):
    """x [tokens, HIDDEN], rows row_x apart; weight [COLUMNS, HIDDEN]; out [tokens, COLUMNS]. The grid: COLUMNS,
    tokens."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    column, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in tl.static_range(0, HIDDEN, BLOCK_K):
        inside = first + lane < HIDDEN
        w = tl.load(weight + column * HIDDEN + first + lane, mask=inside, other=0.0)
        a = tl.load(x + token * row_x + first + lane, mask=inside, other=0.0)
        total += casts.widen(w) * casts.widen(a)
    tl.store(out + token * COLUMNS + column, casts.narrow(tl.sum(total, axis=0), out.dtype.element_ty))


def fused(*, hidden_size, head_dim, num_heads, dtype="bfloat16", wk_format="none", platform=None, block_k=4096,
            num_warps=8, **_):
    """A kernel with indexer.wk_weights_proj's signature for these traits. block_k, a power of two, and num_warps say in
    which order a column is summed."""
    check = make_checks(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype,
                        wk_format=wk_format)
    columns, parts = head_dim + num_heads, [head_dim, num_heads]
    dependent = dependent_launch(platform)
    options = dict(HIDDEN=hidden_size, COLUMNS=columns, BLOCK_K=min(block_k, triton.next_power_of_2(hidden_size)),
                   DEPENDENT=dependent, num_warps=num_warps, **({"launch_pdl": True} if dependent else {}))

    def kernel(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        out = torch.empty((*hidden_states.shape[:-1], columns), dtype=hidden_states.dtype, device=hidden_states.device)
        if out.numel():
            x = as_rows(hidden_states)
            with on_gpu(hidden_states.device):
                column_kernel[(columns, x.shape[0])](x, weight, out, x.stride(0), **options)
        return out.split(parts, dim=-1)

    return kernel
