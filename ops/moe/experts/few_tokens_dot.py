"""The two launches of few_tokens.py with their products on the matrix unit, for fp8 in blocks.

Converting fp8 weights and multiplying them one by one takes about as long as reading them. A matrix unit takes them as
they are, but wants at least 64 rows of weights and 8 columns of activations, where a token has one. So the rows of a
tile are several parts, each times a column of its own: another group of K in `pair_up_dot`, another slot too in
`pair_down_dot`. Of the product [parts * rows, parts] only what is in a row's own column is kept. A part is one group of
K wide, so a product is multiplied by both of its scales as soon as it has left the matrix unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..casts import INTERPRETED, widen
from .align import local_expert
from .arithmetic import quantised, scale_of
from .few_tokens import finish_down, finish_up


FEWEST = tl.constexpr(8)  # columns that a matrix unit multiplies


@triton.jit
def runs(at, live, first, k, DEPTH: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, EVICT: tl.constexpr):
    """[R, GROUP] from `at` [R], columns k + first.. of DEPTH; 0 outside and in rows that are not `live`."""
    columns = tl.arange(0, GROUP)
    there = live[:, None]
    if DEPTH % STEP != 0:
        there = there & (first[:, None] + columns[None, :] < DEPTH - k)
    return tl.load(at[:, None] + columns[None, :] + k, mask=there, other=0.0, eviction_policy=EVICT)


@triton.jit
def products(w, w_scale, x, x_scale):
    """[M, C] float32 of w [M, K] and x [C, K], both fp8, of which each row has a scale."""
    if INTERPRETED:
        p = tl.dot(widen(w), tl.trans(widen(x)), input_precision="ieee")
    else:
        p = tl.dot(w, tl.trans(x))
    return p * (w_scale[:, None] * x_scale[None, :])


@triton.jit
def with_scales(x):
    """(values, scales) of x [R, GROUP] float32, of which each row is quantised."""
    scale = scale_of(tl.max(tl.abs(x), axis=1), "fp8")
    return quantised(x, scale[:, None], "fp8"), scale


@triton.jit
def own_column(products, PARTS: tl.constexpr):
    """[PARTS, M / PARTS] of [M, C]: of each row the column of its part."""
    HEIGHT: tl.constexpr = products.shape[0] // PARTS
    part = tl.arange(0, PARTS * HEIGHT) // HEIGHT
    column = tl.arange(0, products.shape[1])
    return tl.reshape(tl.sum(tl.where(part[:, None] == column[None, :], products, 0.0), axis=1), [PARTS, HEIGHT])


@triton.jit(do_not_specialize=["map_size"])
def pair_up_dot(hidden, row_stride, w13, w13_scale, w13_bias, topk_weights, topk_ids, expert_map, map_size, act,
                TOPK: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr,
                INTERLEAVED: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                WEIGHT_ON_INPUT: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                DEPENDENT: tl.constexpr, PTX: tl.constexpr):
    """act [R, I] float32 at routes. Grid: (routes, tiles of N)."""
    route = tl.program_id(0)
    row0 = tl.program_id(1) * BLOCK_N
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = local_expert(topk_ids, expert_map, map_size, route, True, NUM_EXPERTS)
    if expert == NUM_EXPERTS:
        return
    M: tl.constexpr = 2 * PARTS * BLOCK_N
    COLUMNS: tl.constexpr = PARTS if PARTS > FEWEST else FEWEST
    STEP: tl.constexpr = PARTS * GROUP
    PER_ROW: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
    index = tl.arange(0, M)
    part, half = index // (2 * BLOCK_N) * GROUP, index // BLOCK_N % 2
    row = row0 + index % BLOCK_N
    live = row < INTERMEDIATE
    row = tl.where(live, row, 0)
    if INTERLEAVED:
        ROWS: tl.constexpr = (2 * INTERMEDIATE + GROUP - 1) // GROUP
        row = 2 * row + half
        scale_row = row // GROUP
    else:
        ROWS: tl.constexpr = (INTERMEDIATE + GROUP - 1) // GROUP * 2
        scale_row = half * (ROWS // 2) + row // GROUP
        row += half * INTERMEDIATE
    w_at = w13 + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + (row * HIDDEN + part)
    scale_at = w13_scale + expert.to(tl.int64) * (ROWS * PER_ROW) + (scale_row * PER_ROW + part // GROUP)
    own = tl.arange(0, COLUMNS) % PARTS * GROUP
    x_at = hidden + (route // TOPK).to(tl.int64) * row_stride + own
    acc = tl.zeros([M, COLUMNS], tl.float32)
    for k in tl.range(0, HIDDEN, STEP, num_stages=STAGES):
        w = runs(w_at, live, part, k, HIDDEN, STEP, GROUP, "evict_first")
        x = widen(runs(x_at, own < STEP, own, k, HIDDEN, STEP, GROUP, ""))  # all are live
        w_scale = tl.load(scale_at + k // GROUP, mask=part < HIDDEN - k, other=0.0)
        x, x_scale = with_scales(x)
        acc += products(w, w_scale, x, x_scale)
    both = tl.reshape(tl.sum(own_column(acc, PARTS), axis=0), [2, BLOCK_N])
    gate, up = tl.split(tl.trans(both))
    finish_up(gate, up, w13_bias, topk_weights, act, expert, route, row0 + tl.arange(0, BLOCK_N), INTERMEDIATE,
              INTERLEAVED, ACTIVATION, WEIGHT_ON_INPUT, None, PTX)


@triton.jit(do_not_specialize=["map_size"])
def pair_down_dot(act, w2, w2_scale, w2_bias, topk_weights, topk_ids, expert_map, map_size, out, out_stride,
                  TOPK: tl.constexpr, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
                  INTERMEDIATE: tl.constexpr, GROUP: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
                  BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr):
    """out [T, H]. Grid: (tokens, tiles of N). Takes registers for all activations of a token."""
    token = tl.program_id(0)
    M: tl.constexpr = SLOTS * PARTS * BLOCK_N
    COLUMNS: tl.constexpr = SLOTS * PARTS
    STEP: tl.constexpr = PARTS * GROUP
    PER_ROW: tl.constexpr = (INTERMEDIATE + GROUP - 1) // GROUP
    PER_EXPERT: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP * PER_ROW
    # The ids are there already: pair_up_dot lets this launch in only after it has waited for whoever made them.
    index = tl.arange(0, M)
    slot, part = index // (PARTS * BLOCK_N), index // BLOCK_N % PARTS * GROUP
    row = tl.program_id(1) * BLOCK_N + index % BLOCK_N
    expert = local_expert(topk_ids, expert_map, map_size, token * TOPK + slot, slot < TOPK, NUM_EXPERTS)
    live = (expert < NUM_EXPERTS) & (row < HIDDEN)
    expert = tl.where(live, expert, 0).to(tl.int64)
    row = tl.where(live, row, 0)
    w_at = w2 + expert * (HIDDEN * INTERMEDIATE) + (row * INTERMEDIATE + part)
    scale_at = w2_scale + expert * PER_EXPERT + (row // GROUP * PER_ROW + part // GROUP)
    own = tl.arange(0, COLUMNS)
    own_slot, own_part = own // PARTS, own % PARTS * GROUP
    own_route = token * TOPK + own_slot
    own_live = local_expert(topk_ids, expert_map, map_size, own_route, own_slot < TOPK, NUM_EXPERTS) < NUM_EXPERTS
    acc = tl.zeros([M, COLUMNS], tl.float32)
    # The loop's first weights are under way before it begins. Of activations there must be none among them, so all are
    # read in its first round, and wait in registers for theirs, of which each takes the first and puts it last.
    values, scales = (), ()
    for k in tl.static_range(0, INTERMEDIATE, STEP):
        values = values + (tl.zeros([COLUMNS, GROUP], tl.float8e4nv),)
        scales = scales + (tl.zeros([COLUMNS], tl.float32),)
    for k in tl.range(0, INTERMEDIATE, STEP, num_stages=STAGES):
        w = runs(w_at, live, part, k, INTERMEDIATE, STEP, GROUP, "evict_first")
        w_scale = tl.load(scale_at + k // GROUP, mask=part < INTERMEDIATE - k, other=0.0)
        if k == 0:
            a_at = act + (own_route + waited(k) if DEPENDENT else own_route).to(tl.int64) * INTERMEDIATE + own_part
            values, scales = (), ()
            for j in tl.static_range(0, INTERMEDIATE, STEP):
                a, a_scale = with_scales(runs(a_at, own_live, own_part, j, INTERMEDIATE, STEP, GROUP, ""))
                values, scales = values + (a,), scales + (a_scale,)
        acc += products(w, w_scale, values[0], scales[0])
        values, scales = values[1:] + (values[0],), scales[1:] + (scales[0],)
    y = tl.sum(tl.reshape(own_column(acc, COLUMNS), [SLOTS, PARTS, BLOCK_N]), axis=1)
    finish_down(y, w2_bias, topk_weights, topk_ids, expert_map, map_size, out, out_stride, token,
                tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), TOPK, SLOTS, NUM_EXPERTS, HIDDEN, WEIGHT_ON_INPUT)


@triton.jit
def waited(zero):
    """`zero`, once the launch before has finished. gdc_wait as a function of which the addresses of what it waits for
    are made: as an operation with effects on everything, it keeps newer compilers from pipelining the loop it is in."""
    return tl.inline_asm_elementwise("griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, $1;", "=r,r",
                                     [zero], dtype=tl.int32, is_pure=True, pack=1)
