"""The Triton router: moe.topk in one launch, with or without expert groups.

A program routes TILES * ROWS tokens, tile after tile, and then finishes all of them at once: the chosen experts of a
tile's rows take SLOTS lanes of one register each. On a GPU a tile is one row; in Triton's interpreter it is many.

A row is decided the packed way (packed.py), which says when it can't be sure; a row in doubt is decided again the exact
way (exact.py). Where there is no doubt both ways give the same ids in the same order, and rows never mix: how many rows
a program takes changes no bit of any result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import exact, groups, lanes, packed, scores

LANES = lanes.LANES


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def segment_sums(x, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 32] -> the same shape: to each lane the sum over its tile's SLOTS lanes, in one order for any TILES."""
    shape: tl.constexpr = [ROWS, LANES // SLOTS, SLOTS]
    total = tl.sum(tl.reshape(x, shape), axis=2)
    return tl.reshape(tl.broadcast_to(total[:, :, None], shape), [ROWS, LANES])


@triton.jit
def segment_largest(x, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 32] -> the same shape: to each lane the largest of its tile's SLOTS lanes, NaN left out."""
    shape: tl.constexpr = [ROWS, LANES // SLOTS, SLOTS]
    top = tl.max(tl.reshape(x, shape), axis=2)
    return tl.reshape(tl.broadcast_to(top[:, :, None], shape), [ROWS, LANES])


@triton.jit
def choose_fast(logits, biases, scale, offset, chosen, rows, valid, row_stride, column_stride, TILE: tl.constexpr,
                SCORING: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr,
                TOPK_GROUP: tl.constexpr, ROUTED: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
                DEPTH: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr, HAS_BIAS: tl.constexpr,
                MASK_ROWS: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr):
    """Puts the packed experts of a tile's rows into its lanes of `chosen`. Returns that, and which are in doubt: of a
    row any lane may say so. [ROWS, 32] each."""
    live = rows < valid
    choices, ids = lanes.load_choices(logits, biases, rows, live, row_stride, column_stride, SCORING, GROUPS,
                                      GROUP_SIZE, GROUP_LANES, ROWS, WIDEST, MASK_ROWS, PTX)
    if SCORING == "softmax" and not WHOLE:
        scale, offset = packed.row_window(choices, SCORING)
    lists, rest = packed.lane_lists(choices, ids, scale, offset, BITS, DEPTH, ROWS, WHOLE, PTX)
    doubt = tl.zeros([ROWS, LANES], tl.int1)
    if TOPK_GROUP < GROUPS:
        keep, doubt = groups.keep_fast(lists, offset, SCORING, GROUPS, TOPK_GROUP, GROUP_LANES, ROWS, HAS_BIAS, BITS,
                                       WHOLE)
        lists, rest = packed.drop(lists, rest, keep)
    chosen, unclear = packed.select(lists, rest, chosen, TILE, ROUTED, SLOTS, BITS, WHOLE)
    return chosen, (doubt | unclear) & live[:, None]


@triton.jit
def choose_exactly(logits, bias, rows, valid, row_stride, column_stride, SCORING: tl.constexpr, GROUPS: tl.constexpr,
                   GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, TOPK_GROUP: tl.constexpr, ROUTED: tl.constexpr,
                   SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr, HAS_BIAS: tl.constexpr,
                   PTX: tl.constexpr):
    """The experts of a tile's rows, [ROWS, 32], and whether all scores of a row are NaN, [ROWS, 1]. The bias is read
    again: rows in doubt are few, and to keep it would take registers from all others."""
    biases = lanes.load_bias(bias, GROUPS, GROUP_SIZE, GROUP_LANES, WIDEST)
    choices, ids = lanes.load_choices(logits, biases, rows, rows < valid, row_stride, column_stride, SCORING, GROUPS,
                                      GROUP_SIZE, GROUP_LANES, ROWS, WIDEST, True, PTX)
    keys = exact.choice_keys(choices, ids)
    no_numbers = tl.zeros([ROWS, 1], tl.int1)
    if SCORING == "softmax":
        keys, no_numbers = exact.softmax_keys(keys)
    keep = None
    if TOPK_GROUP < GROUPS:
        keep = groups.keep_exactly(keys, GROUPS, TOPK_GROUP, GROUP_LANES, ROWS, HAS_BIAS)
    chosen = exact.choose(keys, ids, keep, SCORING, ROUTED, SLOTS, GROUPS, GROUP_SIZE, GROUP_LANES, ROWS, WIDEST)
    return chosen, no_numbers


@triton.jit
def row_totals(logits, top, first, valid, row_stride, column_stride, TILES: tl.constexpr, SLOTS: tl.constexpr,
               GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr,
               WIDEST: tl.constexpr):
    """The sum of exp(logit - top) over all experts of each lane's row, [ROWS, 32]."""
    tile_of_lane = (tl.arange(0, LANES) // SLOTS)[None, :]
    totals = tl.full([ROWS, LANES], 1.0, tl.float32)
    for tile in tl.static_range(TILES):
        tile_top = tl.max(tl.where(tile_of_lane == tile, top, float("-inf")), axis=1)[:, None]
        total = lanes.exp_sum(logits, tile_top, first + tile, first + tile < valid, row_stride, column_stride, GROUPS,
                              GROUP_SIZE, GROUP_LANES, ROWS, WIDEST)
        totals = tl.where(tile_of_lane == tile, total, totals)
    return totals


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    logits, bias, weights_out, ids_out, num_valid, expert_map, num_tokens, row_stride, column_stride,
    routed_scaling_factor, shared_expert_weight,
    SCORING: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr, NUM_SHARED: tl.constexpr, RENORMALIZE: tl.constexpr, MAP_SHARED: tl.constexpr,
    WIDEST: tl.constexpr, GROUP_LANES: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):
    """DEPENDENT: None, or when the kernel after this one may start in a programmatic dependent launch, "early" or
    "late"; then nothing is read before the kernel before this one has finished, the bias included."""
    if DEPENDENT is not None:
        tl.extra.cuda.gdc_wait()
    if DEPENDENT == "early":
        tl.extra.cuda.gdc_launch_dependents()
    ROUTED: tl.constexpr = TOPK - NUM_SHARED
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    HAS_BIAS: tl.constexpr = bias is not None
    BITS: tl.constexpr = packed.id_bits(NUM_EXPERTS)
    WHOLE: tl.constexpr = packed.fits_whole(SCORING, HAS_BIAS, logits.dtype.element_ty.primitive_bitwidth)
    MASK_ROWS: tl.constexpr = TILES * ROWS > 1 or num_valid is not None
    lane = tl.arange(0, LANES)[None, :]
    first = tl.program_id(0).to(tl.int64) * (TILES * ROWS) + tl.arange(0, ROWS) * TILES  # times a stride: past 2^31
    valid = num_tokens
    if num_valid is not None:
        valid = tl.maximum(tl.minimum(tl.load(num_valid), num_tokens), 0).to(tl.int32)
    biases = lanes.load_bias(bias, GROUPS, GROUP_SIZE, GROUP_LANES, WIDEST)
    scale, offset = packed.bias_window(biases, SCORING)
    chosen = tl.zeros([ROWS, LANES], tl.int32)
    doubts = tl.zeros([ROWS, LANES], tl.int32)  # a bit a tile
    for tile in tl.static_range(TILES):
        chosen, doubt = choose_fast(logits, biases, scale, offset, chosen, first + tile, valid, row_stride,
                                    column_stride, tile, SCORING, GROUPS, GROUP_SIZE, GROUP_LANES, TOPK_GROUP, ROUTED,
                                    SLOTS, BITS, DEPTH, ROWS, WIDEST, HAS_BIAS, MASK_ROWS, WHOLE, PTX)
        doubts = doubts | tl.where(doubt, 1 << tile, 0)

    # From here on a lane is a slot of a row.
    slot = lane % SLOTS
    tile_of_lane = lane // SLOTS
    rows = first[:, None] + tile_of_lane
    live = rows < valid
    routed = (slot < ROUTED) & (tile_of_lane < TILES) & live
    place = logits + rows * row_stride
    tied = tl.zeros([ROWS, LANES], tl.int32)
    if not WHOLE:
        tied = packed.neighbours(chosen, ROUTED, SLOTS, BITS) & routed.to(tl.int32)
    chosen = ~chosen & ((1 << BITS) - 1)
    void = tl.zeros([ROWS, LANES], tl.int1)  # rows whose scores are all NaN
    doubts = tl.reduce(doubts | (tied << TILES), 1, either)[:, None]
    if tl.max(doubts, axis=0).reshape([]) != 0:
        if not WHOLE:
            found = routed & (chosen < NUM_EXPERTS)  # lists that ran out are no experts
            x = tl.load(place + chosen.to(tl.int64) * column_stride, mask=found, other=0.0).to(tl.float32)
            choice = scores.order(x, SCORING, PTX)
            if HAS_BIAS:
                choice = choice + tl.load(bias + chosen, mask=found, other=0.0).to(tl.float32)
            chosen, between = packed.repair(chosen, tied, exact.ordered_key(choice))
            doubts = doubts | tl.reduce(between << tile_of_lane, 1, either)[:, None]
        for which in range(TILES):
            again = ((doubts >> which) & 1) != 0
            if tl.max(again.to(tl.int32), axis=0).reshape([]) != 0:
                exactly, no_numbers = choose_exactly(
                    logits, bias, first + which, valid, row_stride, column_stride, SCORING, GROUPS, GROUP_SIZE,
                    GROUP_LANES, TOPK_GROUP, ROUTED, SLOTS, ROWS, WIDEST, HAS_BIAS, PTX)
                this = again & (tile_of_lane == which)
                chosen = tl.where(this, exactly, chosen)
                void = void | (this & no_numbers)
    if DEPENDENT == "late":
        tl.extra.cuda.gdc_launch_dependents()

    routed = routed & (void == 0)
    x = tl.load(place + chosen.to(tl.int64) * column_stride, mask=routed, other=float("-inf")).to(tl.float32)
    top = segment_largest(x, SLOTS, ROWS)
    weight = tl.where(routed, scores.weight(x, top, SCORING), 0.0)
    if RENORMALIZE:
        weight = weight / (segment_sums(weight, SLOTS, ROWS) + 1e-20)
        if SCORING == "sqrtsoftplus":
            weight = tl.where(weight == weight, weight, 0.0)  # inf / inf
    elif SCORING == "softmax":
        weight = weight / row_totals(logits, top, first, valid, row_stride, column_stride, TILES, SLOTS, GROUPS,
                                     GROUP_SIZE, GROUP_LANES, ROWS, WIDEST)
        weight = tl.where(routed, weight, 0.0)
    weight = weight * routed_scaling_factor
    if NUM_SHARED > 0:
        weight = tl.where(slot < ROUTED, weight, shared_expert_weight)
        chosen = tl.where(slot < ROUTED, chosen, NUM_EXPERTS + slot - ROUTED)
    if expert_map is not None:
        mapped = (slot < (TOPK if MAP_SHARED else ROUTED)) & (tile_of_lane < TILES) & live
        chosen = tl.where(mapped, tl.load(expert_map + chosen, mask=mapped, other=0).to(tl.int32), chosen)
    if MASK_ROWS:
        weight = tl.where(live, weight, 0.0)
        chosen = tl.where(live, chosen, -1)
    written = (slot < TOPK) & (tile_of_lane < TILES) & (rows < num_tokens)
    tl.store(weights_out + rows * TOPK + slot, weight, mask=written)
    tl.store(ids_out + rows * TOPK + slot, chosen, mask=written)
