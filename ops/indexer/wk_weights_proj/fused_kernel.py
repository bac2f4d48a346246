"""The kernel of triton_fused.py: a matrix of few rows and few columns, its long sums cut into pieces.

A program sums one piece, for a tile of tokens and columns, into `partial`. Of the programs of a tile, the one that is
last to count itself in `arrived` adds up the pieces, in their order, whichever order they came in; and sets the count
to 0 again, for the next launch. So the bits of a result depend on the size of the pieces and of BLOCK_K alone, neither
on the timing nor on the other rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...moe import casts

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["tokens"])
def fused_kernel(
    x, weight, out, partial, arrived, tokens, row_x,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x [tokens, HIDDEN], rows row_x apart; weight [COLUMNS, HIDDEN]; out [tokens, COLUMNS]; partial float32
    [SPLITS, tokens, COLUMNS]; arrived int32 [token tiles, column tiles], all 0 before and after. The grid: column
    tiles, SPLITS, token tiles."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real, inside = token < tokens, column < COLUMNS
    lane = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = ((HIDDEN + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K + lane
        some = k < HIDDEN
        a = tl.load(x + token.to(tl.int64)[:, None] * row_x + k[None, :], mask=real[:, None] & some[None, :], other=0.0)
        b = tl.load(weight + column[:, None] * HIDDEN + k[None, :], mask=inside[:, None] & some[None, :], other=0.0)
        if INTERPRETED:  # which has no exact product of bfloat16
            a, b = casts.widen(a), casts.widen(b)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    place = token[:, None] * COLUMNS + column[None, :]
    mask = real[:, None] & inside[None, :]
    tl.store(partial + split * tokens * COLUMNS + place, total, mask=mask)
    tl.debug_barrier()  # every thread's part is stored before one thread says so
    count = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1:
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for piece in tl.static_range(SPLITS):  # .cg: from where all multiprocessors see what others have written
            total += tl.load(partial + piece * tokens * COLUMNS + place, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out + place, casts.narrow(total, out.dtype.element_ty), mask=mask)
        tl.store(count, 0)
