"""The two grouped products of an expert layer, over the blocks that align.py makes, and the sum over slots.

`grouped_up` is the first: hidden rows times both halves of w13, activation, one rounding (or quantisation).
`grouped_down` is the second: times w2, bias, routing weight; its rows wait for `sum_slots`.
Both go along K in `contract`, which knows the weight formats. Order everywhere: accumulate in float32, dequantise, add
the bias, multiply by the routing weight, round once.

How a tile is computed, and nothing of what it gives, depends on these:
SWAP        the weights are the rows of the matrix unit's tile: few rows of activations then fill its narrow side
MERGED      both halves of w13 are one wide product
DESCRIPTOR  weights are read through a tensor descriptor (on Hopper by the tensor memory accelerator)
TAIL_M      blocks that are no higher take a smaller tile; 0: there is none
PASSES      sub-tiles of BLOCK_N columns that a program takes one after the other and quantises together
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..casts import INTERPRETED, narrow, widen
from .align import local_expert
from .arithmetic import activate, quantised, row_exponent, scale_of


@triton.jit
def tile_of(program, num_blocks, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(block, n): GROUP_M neighbouring blocks share each column of weights before the next column is read."""
    per_group = GROUP_M * TILES_N
    group = program // per_group
    first = group * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    within = program - group * per_group
    return first + within % height, within // height


@triton.jit
def load_weights(weights, expert, half, row0, k, ROWS: tl.constexpr, DEPTH: tl.constexpr, HALVES: tl.constexpr,
                 INTERLEAVED: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 DESCRIPTOR: tl.constexpr):
    """A tile [HEIGHT, BLOCK_K] of an expert's weights as they are stored, columns k..; 0 outside. Rows row0.. of a
    half; with HEIGHT = 2 * BLOCK_N rows row0.. of the first half above those of the second. DEPTH and k in elements
    of storage."""
    if DESCRIPTOR:
        return tl.reshape(weights.load([expert, half, row0, k]), [HEIGHT, BLOCK_K])
    else:
        HALF_STRIDE: tl.constexpr = DEPTH if INTERLEAVED else ROWS * DEPTH
        ROW_STRIDE: tl.constexpr = 2 * DEPTH if INTERLEAVED else DEPTH
        index = tl.arange(0, HEIGHT)
        rows = row0 + index % BLOCK_N
        columns = k + tl.arange(0, BLOCK_K)
        at = weights + expert.to(tl.int64) * (HALVES * ROWS * DEPTH) + half * HALF_STRIDE
        at += (rows.to(tl.int64) * ROW_STRIDE + index // BLOCK_N * HALF_STRIDE)[:, None] + columns[None, :]
        if ROWS % BLOCK_N == 0 and DEPTH % BLOCK_K == 0:
            return tl.load(at)
        elif DEPTH % BLOCK_K == 0:
            return tl.load(at, mask=(rows < ROWS)[:, None], other=0.0)
        else:
            return tl.load(at, mask=(rows < ROWS)[:, None] & (columns < DEPTH)[None, :], other=0.0)


@triton.jit
def multiply(a, w, acc, FORMAT: tl.constexpr, SWAP: tl.constexpr):
    """acc + a [M, K] times w [N, K] (int4: [N, K / 2] bytes), as [M, N], or [N, M] when SWAP."""
    if FORMAT == "int4":
        low, high = (w & 15).to(tl.int8) - 8, (w >> 4).to(tl.int8) - 8
        w = tl.reshape(tl.join(low, high), [w.shape[0], 2 * w.shape[1]])
    if FORMAT == "int4" or FORMAT == "int8_w8a16":
        w = w.to(tl.float32).to(a.dtype)  # exact: no more than 8 bits
    if INTERPRETED and FORMAT != "int8":  # which multiplies the bits of a bfloat16
        a, w = widen(a), widen(w)
    if SWAP:
        a, w = w, a
    if FORMAT == "int8":
        return tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
    elif INTERPRETED:
        return tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(w), acc)


@triton.jit
def across(rows, columns, SWAP: tl.constexpr):
    """The product of a vector over M and one (or a scalar) over N, laid out as `multiply` lays out its result."""
    if len(columns.shape) == 0:
        return (rows * columns)[None, :] if SWAP else (rows * columns)[:, None]
    elif SWAP:
        return columns[:, None] * rows[None, :]
    else:
        return rows[:, None] * columns[None, :]


@triton.jit
def along(columns, SWAP: tl.constexpr):
    """A vector over N, laid out against what `multiply` gives."""
    return columns[:, None] if SWAP else columns[None, :]


@triton.jit
def halves_of(tile, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Both halves, [M, N] or [N, M] each, of a product with both halves of the weights."""
    if SWAP:
        return tl.split(tl.permute(tl.reshape(tile, [2, BLOCK_N, tile.shape[1]]), [1, 2, 0]))
    else:
        return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, BLOCK_N]), [0, 2, 1]))


@triton.jit
def step_scale(scale, expert, half, row0, k, FORMAT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
               HALVES: tl.constexpr, INTERLEAVED: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scales of a tile's rows at column k, float32: of a block format a scalar where the tile lies inside one block
    of weights, else a vector over rows row0.. of a half."""
    PER_ROW: tl.constexpr = (DEPTH + GROUP - 1) // GROUP
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), ROWS - 1)
    if FORMAT == "int4":
        row = rows * 2 + half if INTERLEAVED else half * ROWS + rows
        at = scale + expert.to(tl.int64) * (HALVES * ROWS * PER_ROW) + row.to(tl.int64) * PER_ROW
        return widen(tl.load(at + k // GROUP))
    elif INTERLEAVED:
        at = scale + expert.to(tl.int64) * ((2 * ROWS + GROUP - 1) // GROUP * PER_ROW)
        return tl.load(at + (rows * 2 + half) // GROUP * PER_ROW + k // GROUP)
    else:
        PER_HALF: tl.constexpr = (ROWS + GROUP - 1) // GROUP
        at = scale + (expert.to(tl.int64) * HALVES + half) * (PER_HALF * PER_ROW) + k // GROUP
        if BLOCK_N <= GROUP:
            return tl.load(at + row0 // GROUP * PER_ROW)
        else:
            return tl.load(at + rows // GROUP * PER_ROW)


@triton.jit
def whole_scale(scale, expert, half, row0, FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr, ROWS: tl.constexpr,
                HALVES: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scales of a tile's rows [BLOCK_N] float32, of a format that has one a row or one an expert."""
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), ROWS - 1)
    if PER_TENSOR:
        return tl.load(scale + expert + rows * 0)
    else:
        row = rows * 2 + half if INTERLEAVED else half * ROWS + rows
        return tl.load(scale + expert.to(tl.int64) * (HALVES * ROWS) + row)


@triton.jit
def contract(a, a_rows, a_live, a_scale, a_scale_stride, a_scale_at, weights, weight_scale, expert, row0,
             HALVES: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
             FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr,
             MERGED: tl.constexpr):
    """Rows a_rows of `a` times one or two halves of an expert's weights, dequantised: [M, N] float32 twice, the second
    of two halves only.

    a_rows    [BLOCK_M] offsets of the rows in elements, int64; a_live which of them exist
    a_scale   of row r and group g at a_scale[g * a_scale_stride + a_scale_at[r]]; a format with one scale a row or one
              in all has group 0 only
    """
    STEPPED: tl.constexpr = FORMAT == "fp8_block" or FORMAT == "int4"  # scales change along K
    FRESH: tl.constexpr = STEPPED or FORMAT == "fp8"  # Hopper's fp8 units keep few bits of long sums
    PACK: tl.constexpr = 2 if FORMAT == "int4" else 1
    KIND: tl.constexpr = tl.int32 if FORMAT == "int8" else tl.float32
    WIDTH: tl.constexpr = 2 * BLOCK_N if MERGED else BLOCK_N
    columns = tl.arange(0, BLOCK_K)
    a_tile = a + a_rows[:, None] + columns[None, :]
    if SWAP:
        first = tl.zeros([BLOCK_N if FRESH else WIDTH, BLOCK_M], KIND)
    else:
        first = tl.zeros([BLOCK_M, BLOCK_N if FRESH else WIDTH], KIND)
    second = first
    if STEPPED:  # scales are loaded one step ahead
        w_next = step_scale(weight_scale, expert, 0, row0, 0, FORMAT, ROWS, DEPTH, HALVES, INTERLEAVED, GROUP, BLOCK_N)
        v_next = w_next
        if HALVES == 2:
            v_next = step_scale(weight_scale, expert, 1, row0, 0, FORMAT, ROWS, DEPTH, HALVES, INTERLEAVED, GROUP,
                                BLOCK_N)
        if FORMAT == "fp8_block":
            x_next = tl.load(a_scale + a_scale_at, mask=a_live, other=0.0)
    for k in range(0, DEPTH, BLOCK_K):
        if STEPPED:
            ahead = tl.minimum(k + BLOCK_K, (DEPTH - 1) // BLOCK_K * BLOCK_K)
            w_scale, v_scale = w_next, v_next
            w_next = step_scale(weight_scale, expert, 0, row0, ahead, FORMAT, ROWS, DEPTH, HALVES, INTERLEAVED, GROUP,
                                BLOCK_N)
            if HALVES == 2:
                v_next = step_scale(weight_scale, expert, 1, row0, ahead, FORMAT, ROWS, DEPTH, HALVES, INTERLEAVED,
                                    GROUP, BLOCK_N)
            if FORMAT == "fp8_block":
                x_scale = x_next
                x_next = tl.load(a_scale + (ahead // GROUP).to(tl.int64) * a_scale_stride + a_scale_at, mask=a_live,
                                 other=0.0)
        if DEPTH % BLOCK_K == 0:
            x = tl.load(a_tile + k, mask=a_live[:, None], other=0.0)
        else:
            x = tl.load(a_tile + k, mask=a_live[:, None] & (columns < DEPTH - k)[None, :], other=0.0)
        w = load_weights(weights, expert, 0, row0, k // PACK, ROWS, DEPTH // PACK, HALVES, INTERLEAVED, WIDTH, BLOCK_N,
                         BLOCK_K // PACK, DESCRIPTOR)
        if HALVES == 2 and not MERGED:
            v = load_weights(weights, expert, 1, row0, k // PACK, ROWS, DEPTH // PACK, HALVES, INTERLEAVED, BLOCK_N,
                             BLOCK_N, BLOCK_K // PACK, DESCRIPTOR)
        if FRESH:
            p = multiply(x, w, None, FORMAT, SWAP)
            if MERGED:
                p, q = halves_of(p, BLOCK_N, SWAP)
            elif HALVES == 2:
                q = multiply(x, v, None, FORMAT, SWAP)
            if FORMAT == "fp8_block":
                first += p * across(x_scale, w_scale, SWAP)
                if HALVES == 2:
                    second += q * across(x_scale, v_scale, SWAP)
            elif FORMAT == "int4":
                first += p * along(w_scale, SWAP)
                if HALVES == 2:
                    second += q * along(v_scale, SWAP)
            else:
                first += p
                if HALVES == 2:
                    second += q
        else:
            first = multiply(x, w, first, FORMAT, SWAP)
            if HALVES == 2 and not MERGED:
                second = multiply(x, v, second, FORMAT, SWAP)
    if MERGED and not FRESH:
        first, second = halves_of(first, BLOCK_N, SWAP)
    if SWAP:
        first, second = tl.trans(first), tl.trans(second)
    if FORMAT == "fp8" or FORMAT == "int8" or FORMAT == "int8_w8a16":
        first, second = first.to(tl.float32), second.to(tl.float32)
        if FORMAT != "int8_w8a16":
            x_scale = tl.load(a_scale + a_scale_at, mask=a_live, other=0.0)[:, None]
            first, second = first * x_scale, second * x_scale
        first *= whole_scale(weight_scale, expert, 0, row0, FORMAT, PER_TENSOR, ROWS, HALVES, INTERLEAVED,
                             BLOCK_N)[None, :]
        if HALVES == 2:
            second *= whole_scale(weight_scale, expert, 1, row0, FORMAT, PER_TENSOR, ROWS, HALVES, INTERLEAVED,
                                  BLOCK_N)[None, :]
    return first, second


@triton.jit
def activated(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, expert, routes, live, row0,
              num_tokens, TOPK: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
              INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr, GROUP: tl.constexpr,
              STATIC: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr,
              MERGED: tl.constexpr, PTX: tl.constexpr):
    """[BLOCK_M, BLOCK_N] float32: activations of some routes of one expert, columns row0.. of I."""
    tokens = routes // TOPK
    gate, up = contract(
        hidden, tokens.to(tl.int64) * row_stride, live, hidden_scale, num_tokens, tokens * 0 if STATIC else tokens, w13,
        w13_scale, expert, row0, 2, HIDDEN, INTERMEDIATE, INTERLEAVED, FORMAT, PER_TENSOR, GROUP, BLOCK_M, BLOCK_N,
        BLOCK_K, SWAP, DESCRIPTOR, MERGED)
    if w13_bias is not None:
        columns = row0 + tl.arange(0, BLOCK_N)
        inside = columns < INTERMEDIATE
        at = w13_bias + expert.to(tl.int64) * (2 * INTERMEDIATE)
        step: tl.constexpr = 2 if INTERLEAVED else 1
        half: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
        gate += widen(tl.load(at + step * columns, mask=inside, other=0.0))[None, :]
        up += widen(tl.load(at + half + step * columns, mask=inside, other=0.0))[None, :]
    if WEIGHT_ON_INPUT:
        weight = widen(tl.load(topk_weights + routes, mask=live, other=0.0))
        gate *= weight[:, None]
        up *= weight[:, None]
    return activate(gate, up, ACTIVATION, PTX)


@triton.jit
def up_tile(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, order, act, act_scale, expert,
            start, height, tile, num_tokens, num_routes, TOPK: tl.constexpr, HIDDEN: tl.constexpr,
            INTERMEDIATE: tl.constexpr, INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr,
            GROUP: tl.constexpr, STATIC: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
            DESCRIPTOR: tl.constexpr, MERGED: tl.constexpr, PASSES: tl.constexpr, PTX: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)
    live = rows < height
    positions = start + rows
    routes = tl.load(order + positions, mask=live, other=0.0)
    row0 = tile * (PASSES * BLOCK_N)
    y = activated(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, expert, routes, live, row0,
                  num_tokens, TOPK, HIDDEN, INTERMEDIATE, INTERLEAVED, FORMAT, PER_TENSOR, GROUP, STATIC, ACTIVATION,
                  WEIGHT_ON_INPUT, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, DESCRIPTOR, MERGED, PTX)
    columns = row0 + tl.arange(0, BLOCK_N)
    to = act + positions.to(tl.int64)[:, None] * INTERMEDIATE + columns[None, :]
    there = live[:, None] & (columns < INTERMEDIATE)[None, :]
    if FORMAT == "fp8_block":
        most = tl.max(tl.where(there, tl.abs(y), 0.0), axis=1)
        if PASSES == 2:
            second = row0 + BLOCK_N
            if not DESCRIPTOR and INTERMEDIATE % BLOCK_N == 0:  # past the last row nothing is kept, so another is read
                second = tl.minimum(second, INTERMEDIATE - BLOCK_N)
            z = activated(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, expert, routes,
                          live, second, num_tokens, TOPK, HIDDEN, INTERMEDIATE, INTERLEAVED, FORMAT, PER_TENSOR,
                          GROUP, STATIC, ACTIVATION, WEIGHT_ON_INPUT, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, DESCRIPTOR,
                          MERGED, PTX)
            also = live[:, None] & (columns < INTERMEDIATE - BLOCK_N)[None, :]
            most = tl.maximum(most, tl.max(tl.where(also, tl.abs(z), 0.0), axis=1))
        scale = scale_of(most, "fp8")
        tl.store(act_scale + tile.to(tl.int64) * num_routes + positions, scale, mask=live)
        if PASSES == 2:
            tl.store(to + BLOCK_N, quantised(z, scale[:, None], "fp8"), mask=also)
        tl.store(to, quantised(y, scale[:, None], "fp8"), mask=there)
    elif STATIC:
        tl.store(to, quantised(y, tl.load(act_scale), FORMAT), mask=there)
    else:
        tl.store(to, narrow(y, act.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_tokens", "num_routes", "most_blocks"])
def grouped_up(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, order, blocks, num_blocks, act,
               act_scale, num_tokens, num_routes, most_blocks, TOPK: tl.constexpr, HIDDEN: tl.constexpr,
               INTERMEDIATE: tl.constexpr, INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr,
               GROUP: tl.constexpr, STATIC: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
               BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               GROUP_M: tl.constexpr, SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr, MERGED: tl.constexpr,
               PASSES: tl.constexpr, DEPENDENT: tl.constexpr, PTX: tl.constexpr):
    """act[p] = activation(both halves of w13 of p's expert times hidden[token of p]). Grid: most_blocks * tiles of N.

    act        [R, I] at sorted positions: rounded once, or quantised, or float32 where its rows are quantised as wholes
    act_scale  block format: written, [tiles, R]; STATIC: the given scale of act
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    TILES_N: tl.constexpr = (INTERMEDIATE + PASSES * BLOCK_N - 1) // (PASSES * BLOCK_N)
    count = tl.load(num_blocks)
    if tl.program_id(0) >= count * TILES_N:
        return
    block, tile = tile_of(tl.program_id(0), count, TILES_N, GROUP_M)
    expert = tl.load(blocks + block)
    start = tl.load(blocks + most_blocks + block)
    height = tl.load(blocks + 2 * most_blocks + block)
    if TAIL_M > 0 and height <= TAIL_M:
        up_tile(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, order, act, act_scale, expert,
                start, height, tile, num_tokens, num_routes, TOPK, HIDDEN, INTERMEDIATE, INTERLEAVED, FORMAT,
                PER_TENSOR, GROUP, STATIC, ACTIVATION, WEIGHT_ON_INPUT, TAIL_M if TAIL_M > 0 else 16, BLOCK_N,
                BLOCK_K, SWAP, DESCRIPTOR, MERGED, PASSES, PTX)
    else:
        up_tile(hidden, hidden_scale, row_stride, w13, w13_scale, w13_bias, topk_weights, order, act, act_scale, expert,
                start, height, tile, num_tokens, num_routes, TOPK, HIDDEN, INTERMEDIATE, INTERLEAVED, FORMAT,
                PER_TENSOR, GROUP, STATIC, ACTIVATION, WEIGHT_ON_INPUT, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
                DESCRIPTOR, MERGED, PASSES, PTX)


@triton.jit
def down_tile(act, act_scale, w2, w2_scale, w2_bias, topk_weights, order, result, row_scale, expert, start, height,
              tile, num_routes, TOPK: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
              FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr, GROUP: tl.constexpr, STATIC: tl.constexpr,
              WEIGHT_ON_INPUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)
    live = rows < height
    positions = start + rows
    row0 = tile * BLOCK_N
    y, _ = contract(act, positions.to(tl.int64) * INTERMEDIATE, live, act_scale, num_routes,
                    positions * 0 if STATIC else positions, w2, w2_scale, expert, row0, 1, INTERMEDIATE, HIDDEN, False,
                    FORMAT, PER_TENSOR, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, DESCRIPTOR, False)
    columns = row0 + tl.arange(0, BLOCK_N)
    inside = columns < HIDDEN
    if w2_bias is not None:
        y += widen(tl.load(w2_bias + expert.to(tl.int64) * HIDDEN + columns, mask=inside, other=0.0))[None, :]
    routes = tl.load(order + positions, mask=live, other=0.0)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if not WEIGHT_ON_INPUT:
        factor = widen(tl.load(topk_weights + routes, mask=live, other=0.0))
    if row_scale is not None:  # taken into the weight, which a power of two leaves as exact as it is
        exponent = row_exponent(tl.max(tl.abs(y), axis=1) * tl.abs(factor))
        TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
        tl.store(row_scale + routes.to(tl.int64) * TILES_N + tile, exponent, mask=live)
        factor = factor * (1.0 / exponent)
    y *= factor[:, None]
    to = result + routes.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    tl.store(to, narrow(y, result.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_routes", "most_blocks"])
def grouped_down(act, act_scale, w2, w2_scale, w2_bias, topk_weights, order, blocks, num_blocks, result, row_scale,
                 num_routes, most_blocks, TOPK: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                 FORMAT: tl.constexpr, PER_TENSOR: tl.constexpr, GROUP: tl.constexpr, STATIC: tl.constexpr,
                 WEIGHT_ON_INPUT: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, DESCRIPTOR: tl.constexpr,
                 DEPENDENT: tl.constexpr):
    """result[route] = routing weight * (act[p] times w2 of p's expert + bias). Grid: most_blocks * tiles of N.

    result     [R, H], rounded once
    row_scale  [R, tiles] or None: powers of two that `result` is divided by, for float16, which has the digits but not
               the range
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    count = tl.load(num_blocks)
    if tl.program_id(0) >= count * TILES_N:
        return
    block, tile = tile_of(tl.program_id(0), count, TILES_N, GROUP_M)
    expert = tl.load(blocks + block)
    start = tl.load(blocks + most_blocks + block)
    height = tl.load(blocks + 2 * most_blocks + block)
    if TAIL_M > 0 and height <= TAIL_M:
        down_tile(act, act_scale, w2, w2_scale, w2_bias, topk_weights, order, result, row_scale, expert, start, height,
                  tile, num_routes, TOPK, HIDDEN, INTERMEDIATE, FORMAT, PER_TENSOR, GROUP, STATIC, WEIGHT_ON_INPUT,
                  TAIL_M if TAIL_M > 0 else 16, BLOCK_N, BLOCK_K, SWAP, DESCRIPTOR)
    else:
        down_tile(act, act_scale, w2, w2_scale, w2_bias, topk_weights, order, result, row_scale, expert, start, height,
                  tile, num_routes, TOPK, HIDDEN, INTERMEDIATE, FORMAT, PER_TENSOR, GROUP, STATIC, WEIGHT_ON_INPUT,
                  BLOCK_M, BLOCK_N, BLOCK_K, SWAP, DESCRIPTOR)


@triton.jit(do_not_specialize=["map_size"])
def sum_slots(rows, row_scale, topk_ids, expert_map, map_size, out, out_stride, TOPK: tl.constexpr,
              HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
              DEPENDENT: tl.constexpr):
    """out[t] = sum over slots, in slot order, of rows[t * K + slot]; slots without a local expert are not read.
    Grid: (T, spans of TILES * TILE columns); row_scale [R, tiles of TILE columns] or None."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    TILES_N: tl.constexpr = (HIDDEN + TILE - 1) // TILE
    loaded = ()
    scales = ()
    for slot in tl.static_range(TOPK):  # all under way before the first is added
        route = token * TOPK + slot
        expert = local_expert(topk_ids, expert_map, map_size, route, True, NUM_EXPERTS)
        limit = tl.where(expert < NUM_EXPERTS, HIDDEN, 0)
        loaded = loaded + (tl.load(rows + route * HIDDEN + columns, mask=columns < limit, other=0.0),)
        if row_scale is not None:
            scales = scales + (tl.load(row_scale + route * TILES_N + tiles, mask=tiles * TILE < limit, other=0.0),)
    total = tl.zeros([TILES, TILE], tl.float32)
    for slot in tl.static_range(TOPK):
        if row_scale is not None:
            total += widen(loaded[slot]) * scales[slot][:, None]
        else:
            total += widen(loaded[slot])
    tl.store(out + token * out_stride + columns, narrow(total, out.dtype.element_ty), mask=columns < HIDDEN)
