"""The two launches of an expert layer for few tokens: every route reads its expert's weights itself, nothing is sorted.

`pair_up` takes one route and some rows of both halves of w13, `pair_down` one token and some rows of w2, of all of the
token's experts. Products are elementwise in float32: with one row of activations a matrix unit has nothing to share,
and memory is the limit. `pair_down` has its first weights under way before it waits for `pair_up`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..casts import narrow, widen
from .align import local_expert
from .arithmetic import activate, quantised, scale_of


@triton.jit
def quantised_groups(x, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """x [BLOCK] float32 to (values, scales) [BLOCK]: what a block-quantised copy of x holds, and its scales."""
    groups = tl.reshape(x, [BLOCK // GROUP, GROUP])
    scale = scale_of(tl.max(tl.abs(groups), axis=1), "fp8")
    values = widen(quantised(groups, scale[:, None], "fp8"))
    scale = tl.broadcast_to(scale[:, None], [BLOCK // GROUP, GROUP])
    return tl.reshape(values, [BLOCK]), tl.reshape(scale, [BLOCK])


@triton.jit
def finish_up(gate, up, w13_bias, topk_weights, act, expert, route, rows, INTERMEDIATE: tl.constexpr,
              INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ROUND: tl.constexpr,
              PTX: tl.constexpr):
    """Stores one route's activations of `rows`, of which gate and up are the products."""
    inside = rows < INTERMEDIATE
    if w13_bias is not None:
        at = w13_bias + expert.to(tl.int64) * (2 * INTERMEDIATE)
        step: tl.constexpr = 2 if INTERLEAVED else 1
        half: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE
        gate += widen(tl.load(at + step * rows, mask=inside, other=0.0))
        up += widen(tl.load(at + half + step * rows, mask=inside, other=0.0))
    if WEIGHT_ON_INPUT:
        weight = widen(tl.load(topk_weights + route))
        gate *= weight
        up *= weight
    y = activate(gate, up, ACTIVATION, PTX)
    if ROUND is not None:
        y = widen(narrow(y, ROUND))
    tl.store(act + route.to(tl.int64) * INTERMEDIATE + rows, y, mask=inside)


@triton.jit
def finish_down(y, w2_bias, topk_weights, topk_ids, expert_map, map_size, out, out_stride, token, rows,
                TOPK: tl.constexpr, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
                WEIGHT_ON_INPUT: tl.constexpr):
    """Stores one token's result in `rows`, the sum over slots of their products y [SLOTS, rows]: as a tree, since the
    slots lie in several threads, and one after the other took barriers and registers for each."""
    slots = tl.arange(0, SLOTS)
    routes = token * TOPK + slots
    experts = local_expert(topk_ids, expert_map, map_size, routes, slots < TOPK, NUM_EXPERTS)
    local = experts < NUM_EXPERTS
    inside = rows < HIDDEN
    if w2_bias is not None:
        y += widen(tl.load(w2_bias + experts.to(tl.int64)[:, None] * HIDDEN + rows[None, :],
                           mask=local[:, None] & inside[None, :], other=0.0))
    if not WEIGHT_ON_INPUT:
        weights = widen(tl.load(topk_weights + routes, mask=local, other=0.0))
        y *= weights[:, None]
    total = tl.sum(tl.where(local[:, None], y, 0.0), axis=0)
    tl.store(out + token.to(tl.int64) * out_stride + rows, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["map_size"])
def pair_up(hidden, row_stride, w13, w13_scale, w13_bias, topk_weights, topk_ids, expert_map, map_size, act,
            TOPK: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
            INTERMEDIATE: tl.constexpr, INTERLEAVED: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
            ACTIVATION: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, ROUND: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr, PTX: tl.constexpr):
    """act [R, I] float32 at routes. Grid: (routes, tiles of N)."""
    route = tl.program_id(0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = local_expert(topk_ids, expert_map, map_size, route, True, NUM_EXPERTS)
    if expert == NUM_EXPERTS:
        return
    token = route // TOPK
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < INTERMEDIATE
    read = tl.where(inside, rows, 0)
    columns = tl.arange(0, BLOCK_K)
    HALF: tl.constexpr = HIDDEN if INTERLEAVED else INTERMEDIATE * HIDDEN
    ROW: tl.constexpr = 2 * HIDDEN if INTERLEAVED else HIDDEN
    x_at = hidden + token.to(tl.int64) * row_stride + columns
    gate_at = w13 + expert.to(tl.int64) * (2 * INTERMEDIATE * HIDDEN) + read[:, None] * ROW + columns[None, :]
    if FORMAT == "fp8_block":
        PER_ROW: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
        # A tile's rows lie inside one block of scales: of each half, or, interleaved, of both halves together.
        HALF_ROWS: tl.constexpr = 0 if INTERLEAVED else (INTERMEDIATE + GROUP - 1) // GROUP
        ROWS: tl.constexpr = (2 * INTERMEDIATE + GROUP - 1) // GROUP if INTERLEAVED else 2 * HALF_ROWS
        row = tl.program_id(1) * (2 * BLOCK_N if INTERLEAVED else BLOCK_N) // GROUP
        gate_scale = w13_scale + (expert.to(tl.int64) * ROWS + row) * PER_ROW + columns // GROUP
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
        if HIDDEN % BLOCK_K == 0:
            g = tl.load(gate_at + k, eviction_policy="evict_first")
            u = tl.load(gate_at + HALF + k, eviction_policy="evict_first")
            x = widen(tl.load(x_at + k))
        else:
            there = columns < HIDDEN - k
            g = tl.load(gate_at + k, mask=there[None, :], other=0.0, eviction_policy="evict_first")
            u = tl.load(gate_at + HALF + k, mask=there[None, :], other=0.0, eviction_policy="evict_first")
            x = widen(tl.load(x_at + k, mask=there, other=0.0))
        if FORMAT == "fp8_block":
            x, scale = quantised_groups(x, BLOCK_K, GROUP)
            x *= scale
            known = columns < HIDDEN - k
            gate += widen(g) * (x * tl.load(gate_scale + k // GROUP, mask=known, other=0.0))[None, :]
            up += widen(u) * (x * tl.load(gate_scale + HALF_ROWS * PER_ROW + k // GROUP, mask=known,
                                                  other=0.0))[None, :]
        else:
            gate += widen(g) * x[None, :]
            up += widen(u) * x[None, :]
    gate, up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    finish_up(gate, up, w13_bias, topk_weights, act, expert, route, rows, INTERMEDIATE, INTERLEAVED, ACTIVATION,
              WEIGHT_ON_INPUT, ROUND, PTX)


@triton.jit(do_not_specialize=["map_size"])
def pair_down(act, w2, w2_scale, w2_bias, topk_weights, topk_ids, expert_map, map_size, out, out_stride,
              TOPK: tl.constexpr, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
              INTERMEDIATE: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """out [T, H]. Grid: (tokens, tiles of N)."""
    token = tl.program_id(0)
    # The ids are there already: pair_up lets this launch in only after it has waited for whoever made them.
    slots = tl.arange(0, SLOTS)
    routes = token * TOPK + slots
    experts = local_expert(topk_ids, expert_map, map_size, routes, slots < TOPK, NUM_EXPERTS)
    local = experts < NUM_EXPERTS
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < HIDDEN
    columns = tl.arange(0, BLOCK_K)
    w_at = (w2 + experts.to(tl.int64)[:, None, None] * (HIDDEN * INTERMEDIATE) + rows[None, :, None] * INTERMEDIATE
            + columns[None, None, :])
    w_there = local[:, None, None] & inside[None, :, None]
    a_at = act + routes.to(tl.int64)[:, None] * INTERMEDIATE + columns[None, :]
    PER_ROW: tl.constexpr = (INTERMEDIATE + GROUP - 1) // GROUP
    PER_HALF: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
    GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
    acc = tl.zeros([SLOTS, BLOCK_N, BLOCK_K], tl.float32)
    w = tl.load(w_at, mask=w_there & (columns < INTERMEDIATE)[None, None, :], other=0.0, eviction_policy="evict_first")
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for k in tl.static_range(0, INTERMEDIATE, BLOCK_K):
        there = columns < INTERMEDIATE - k
        a = tl.load(a_at + k, mask=local[:, None] & there[None, :], other=0.0)
        if FORMAT == "fp8_block":
            a = tl.reshape(a, [SLOTS, GROUPS, GROUP])
            scale = scale_of(tl.max(tl.abs(a), axis=2), "fp8")
            a = widen(quantised(a, scale[:, :, None], "fp8")) * scale[:, :, None]
            group = k // GROUP + tl.arange(0, GROUPS)
            w_scale = tl.load(w2_scale + experts.to(tl.int64)[:, None] * (PER_HALF * PER_ROW)
                              + (tl.program_id(1) * BLOCK_N // GROUP) * PER_ROW + group[None, :],
                              mask=local[:, None] & (group < PER_ROW)[None, :], other=0.0)
            a = tl.reshape(a * w_scale[:, :, None], [SLOTS, BLOCK_K])
        if k > 0:
            w = tl.load(w_at + k, mask=w_there & there[None, None, :], other=0.0, eviction_policy="evict_first")
        acc += widen(w) * a[:, None, :]
    y = tl.sum(acc, axis=2)
    finish_down(y, w2_bias, topk_weights, topk_ids, expert_map, map_size, out, out_stride, token, rows, TOPK, SLOTS,
                NUM_EXPERTS, HIDDEN, WEIGHT_ON_INPUT)
