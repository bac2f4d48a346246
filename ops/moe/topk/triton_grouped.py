"""moe.topk in one Triton launch for routers with expert groups: DeepSeek-V3 and its relatives.

Sigmoid, bias, sum of each group's two largest choices, choice of groups, top-k, weights, shared slots, map, padding.
Serves 2 to 32 groups of 2 to 128 experts (any numbers, 1024 experts in all), up to 32 slots, logits and bias of float32,
bfloat16 or float16, any strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_common as common
from .launch import make_launcher


@triton.jit
def two_largest(a_first, a_second, b_first, b_second):
    """The two largest of two descending pairs; equal values count twice."""
    first = tl.maximum(a_first, b_first)
    second = tl.maximum(tl.minimum(a_first, b_first), tl.maximum(a_second, b_second))
    return first, second


@triton.jit
def lane_two_largest(keys):
    """The two largest keys of each lane's unsorted list, [ROWS, 32] each."""
    first = keys[0]
    second = tl.full(first.shape, common.REMOVED, tl.int32)
    for i in tl.static_range(1, len(keys)):
        second = tl.maximum(second, tl.minimum(first, keys[i]))
        first = tl.maximum(first, keys[i])
    return first, second


@triton.jit
def group_keys(first, second, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr):
    """Each lane's group's score, the sum of the group's two largest choices, as a key, [ROWS, 32], from the two largest
    keys of each lane."""
    shape: tl.constexpr = [ROWS, 32 // GROUP_LANES, GROUP_LANES]
    first, second = tl.reduce((tl.reshape(first, shape), tl.reshape(second, shape)), 2, two_largest)
    score = common.ordered_key(common.key_value(first) + common.key_value(second))
    return tl.reshape(tl.broadcast_to(score[:, :, None], shape), [ROWS, 32])


@triton.jit
def keep_groups(score, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_LANES: tl.constexpr):
    """Whether each lane's group is among the TOPK_GROUP best, lowest group id on ties: [ROWS, 32] bool."""
    group = (tl.arange(0, 32) // GROUP_LANES)[None, :]
    if GROUPS * GROUP_LANES < 32:
        score = tl.where(group < GROUPS, score, common.REMOVED)
    keep = score != score
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.max(score, axis=1)[:, None]
        winner = tl.min(tl.where(score == best, group, common.NO_ID), axis=1)[:, None]
        keep = keep | (group == winner)
        score = tl.where(group == winner, common.REMOVED, score)
    return keep


@triton.jit
def mask_dropped(kept_keys, kept_ids, keys, ids, keep):
    """Lists that are the given ones in kept groups; in dropped groups those of `keys` and `ids`, whose ids ascend, with
    every choice -inf: experts of equal choices stand in the order of their ids."""
    out_keys = ()
    out_ids = ()
    for i in tl.static_range(len(keys)):
        masked = tl.where(ids[i] == common.NO_ID, common.REMOVED, common.NEG_INF_KEY)
        out_keys = out_keys + (tl.where(keep, kept_keys[i], masked),)
        out_ids = out_ids + (tl.where(keep, kept_ids[i], ids[i]),)
    return out_keys, out_ids


@triton.jit(do_not_specialize=["num_tokens"])
def grouped_kernel(
    logits, bias, weights_out, ids_out, num_valid, expert_map, num_tokens, row_stride, column_stride,
    routed_scaling_factor, shared_expert_weight,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr,
    NUM_SHARED: tl.constexpr, RENORMALIZE: tl.constexpr, MAP_SHARED: tl.constexpr, WIDEST: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, GROUP_LANES: tl.constexpr,
):
    ROUTED: tl.constexpr = TOPK - NUM_SHARED
    MASK_ROWS: tl.constexpr = ROWS > 1 or num_valid is not None
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    biases = common.load_bias(bias, GROUPS, GROUP_SIZE, GROUP_LANES, WIDEST)
    valid = num_tokens
    if num_valid is not None:
        valid = tl.maximum(tl.minimum(tl.load(num_valid), num_tokens), 0).to(tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)  # times a stride, it may pass 2^31
        inside = rows < num_tokens
        live = rows < valid
        keys, ids = common.load_choices(logits, biases, rows, live, row_stride, column_stride, GROUPS, GROUP_SIZE,
                                        GROUP_LANES, ROWS, WIDEST, MASK_ROWS, PTX)
        if len(keys) <= common.LONGEST_SORTED:
            best_keys, best_ids = common.sort_lanes(keys, ids)
            first = best_keys[0]
            if len(keys) > 1:
                second = best_keys[1]
            else:
                second = tl.full([ROWS, 32], common.REMOVED, tl.int32)
        else:
            best_keys, best_ids = keys, ids
            first, second = lane_two_largest(keys)
        if TOPK_GROUP < GROUPS:
            keep = keep_groups(group_keys(first, second, GROUP_LANES, ROWS), GROUPS, TOPK_GROUP, GROUP_LANES)
            best_keys, best_ids = mask_dropped(best_keys, best_ids, keys, ids, keep)
        if len(keys) <= common.LONGEST_SORTED:
            chosen = common.select(best_keys, best_ids, ROUTED, ROWS)
        else:
            chosen = common.scan(best_keys, best_ids, ROUTED, ROWS)
        score = common.chosen_scores(logits, chosen, rows, live, row_stride, column_stride, ROUTED, MASK_ROWS)
        common.finish(chosen, score, rows, live, inside, weights_out, ids_out, expert_map, routed_scaling_factor,
                      shared_expert_weight, NUM_EXPERTS, TOPK, NUM_SHARED, RENORMALIZE, MAP_SHARED, MASK_ROWS)


def topk(*, num_experts, topk, num_expert_group, topk_group, num_fused_shared_experts=0, renormalize=True,
         dtype="float32", bias_dtype="float32", **_):
    """A kernel with moe.topk's signature for these traits."""
    return make_launcher(grouped_kernel, num_experts=num_experts, topk=topk, renormalize=renormalize, dtype=dtype,
                         num_fused_shared_experts=num_fused_shared_experts, bias_dtype=bias_dtype,
                         GROUPS=num_expert_group, TOPK_GROUP=topk_group,
                         GROUP_LANES=32 // (1 << (num_expert_group - 1).bit_length()))
