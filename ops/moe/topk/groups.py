"""Scores of expert groups: the sum of a group's two largest choices, or the largest where there is no bias."""

from __future__ import annotations

import triton
import triton.language as tl

from . import exact, lanes, packed

LANES = lanes.LANES


@triton.jit
def two_largest(a_first, a_second, b_first, b_second):
    """The two largest of two descending pairs; equal values count twice."""
    first = tl.maximum(a_first, b_first)
    second = tl.maximum(tl.minimum(a_first, b_first), tl.maximum(a_second, b_second))
    return first, second


@triton.jit
def over_group(first, second, HAS_BIAS: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr):
    """The two largest of each lane's group, of which without a bias only the first matters: [ROWS, 32 // GROUP_LANES]
    each, from the two largest of each lane."""
    shape: tl.constexpr = [ROWS, LANES // GROUP_LANES, GROUP_LANES]
    if HAS_BIAS:
        return tl.reduce((tl.reshape(first, shape), tl.reshape(second, shape)), 2, two_largest)
    else:
        first = tl.max(tl.reshape(first, shape), axis=2)
        return first, first


@triton.jit
def to_lanes(x, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 32 // GROUP_LANES] -> [ROWS, 32]: to each lane its group's."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [ROWS, LANES // GROUP_LANES, GROUP_LANES]), [ROWS, LANES])


@triton.jit
def keep_exactly(keys, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr,
                 HAS_BIAS: tl.constexpr):
    """Whether each lane's group is among the TOPK_GROUP best, lowest group id on ties, [ROWS, 32] bool, from the exact
    keys of the lanes' experts."""
    first = keys[0]
    second = tl.full(first.shape, exact.REMOVED, tl.int32)
    for i in tl.static_range(1, len(keys)):
        second = tl.maximum(second, tl.minimum(first, keys[i]))
        first = tl.maximum(first, keys[i])
    first, second = over_group(first, second, HAS_BIAS, GROUP_LANES, ROWS)
    if HAS_BIAS:
        first = exact.ordered_key(exact.key_value(first) + exact.key_value(second))
    score = to_lanes(first, GROUP_LANES, ROWS)
    group = (tl.arange(0, LANES) // GROUP_LANES)[None, :]
    if GROUPS * GROUP_LANES < LANES:
        score = tl.where(group < GROUPS, score, exact.REMOVED)
    keep = score != score
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.max(score, axis=1)[:, None]
        winner = tl.min(tl.where(score == best, group, lanes.NO_ID), axis=1)[:, None]
        keep = keep | (group == winner)
        score = tl.where(group == winner, exact.REMOVED, score)
    return keep


@triton.jit
def margin(offset):
    """How many units of fixed point two groups' scores must differ by to stand in the right order, int32: the numbers
    are rounded, and so is the exact score, a float32 sum, whose last place is worth the more units the further the
    window is from 0."""
    return (16.0 + 4.0 * tl.minimum(tl.abs(offset), 8388608.0)).to(tl.int32)


@triton.jit
def keep_fast(lists, offset, SCORING: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr,
              GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr,
              WHOLE: tl.constexpr):
    """What keep_exactly returns, from the lanes' packed lists (packed.py), and whether that is in doubt, [ROWS, 32].

    A score is one or two packed numbers without their ids, with the group's id below: a round is one maximum."""
    MASK: tl.constexpr = LANES // GROUP_LANES - 1
    group = (tl.arange(0, LANES) // GROUP_LANES)[None, :]
    first = lists[0]
    second = tl.full(first.shape, exact.REMOVED, tl.int32)
    if len(lists) > 1:
        second = lists[1]
    first, second = over_group(first, second, HAS_BIAS, GROUP_LANES, ROWS)
    score = first >> BITS
    doubt = tl.zeros([ROWS, LANES], tl.int1)
    if HAS_BIAS:
        score = score + (second >> BITS)
        doubt = (to_lanes(second, GROUP_LANES, ROWS) <= packed.below_window(BITS)) & (group < GROUPS)
    if SCORING == "sqrtsoftplus":  # whose scores have no bound
        doubt = doubt | (to_lanes(first, GROUP_LANES, ROWS) >= packed.above_window(BITS))
    score = (to_lanes(score, GROUP_LANES, ROWS) * (MASK + 1)) | (MASK - group)
    if GROUPS * GROUP_LANES < LANES:
        score = tl.where(group < GROUPS, score, exact.REMOVED)
    left = score
    last = tl.max(left, axis=1)[:, None]
    for _ in tl.static_range(TOPK_GROUP - 1):
        left = tl.where(left >= last, exact.REMOVED, left)
        last = tl.max(left, axis=1)[:, None]
    if not WHOLE:
        following = tl.max(tl.where(left >= last, exact.REMOVED, left), axis=1)[:, None]
        doubt = doubt | (last - following <= margin(offset) * (MASK + 1))
    return score >= last, doubt
