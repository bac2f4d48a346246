"""The kernel for few experts: moe.topk of one group and at most two slots, for many tokens at once.

A program routes ROWS tokens. A few neighbouring threads, LANES of them, share a row, and each holds PER of its experts
in registers: a tuple of PER tensors [THREADS]. A thread finds the two best of its own experts in a tree of merges; one
more merge for each doubling of LANES finds the row's. From there on a lane is a slot of its row.

THREADS, ROWS * LANES, is the number of threads. So a thread has one number of each tensor, in the same layout from the
first load to the last store, and nothing goes through shared memory. Tensors are flat, and [ROWS, LANES] only where a
row's lanes are reduced: of tiles in three dimensions, Triton would put neighbouring threads on different rows.

The order is that of exact.py, pairs (key, id) compared exactly, and the scores are those of scores.py: every result is
the router kernel's, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import exact, lanes, scores

NO_ID = lanes.NO_ID
REMOVED, INF_KEY = exact.REMOVED, exact.INF_KEY


@triton.jit
def unstack(x, WIDTH: tl.constexpr):
    """[THREADS, WIDTH] -> tuple of WIDTH tensors [THREADS], in order."""
    if WIDTH == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], WIDTH // 2, 2]))
        evens = unstack(even, WIDTH // 2)
        odds = unstack(odd, WIDTH // 2)
        out = ()
        for i in tl.static_range(WIDTH // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def to_lanes(x, LANES: tl.constexpr):
    """[ROWS] -> [ROWS * LANES], to each lane its row's."""
    shape: tl.constexpr = [x.shape[0], LANES]
    return tl.reshape(tl.broadcast_to(x[:, None], shape), [x.shape[0] * LANES])


@triton.jit
def merge(key0, id0, key1, id1, other_key0, other_id0, other_key1, other_id1, ahead, ASCENDING: tl.constexpr):
    """The two best of two and two others, each best first: (key, id, key, id). `ahead`: whether the others' best is
    better than ours. ASCENDING: all ids of the others are higher, so where keys are equal ours are better."""
    second_key = tl.where(ahead, key0, key1)
    second_id = tl.where(ahead, id0, id1)
    other_key = tl.where(ahead, other_key1, other_key0)
    other_id = tl.where(ahead, other_id1, other_id0)
    further = other_key > second_key
    if not ASCENDING:
        further = further | ((other_key == second_key) & (other_id < second_id))
    return (tl.where(ahead, other_key0, key0), tl.where(ahead, other_id0, id0),
            tl.where(further, other_key, second_key), tl.where(further, other_id, second_id))


@triton.jit
def two_best(keys, ids):
    """Of a thread's experts, ids ascending, the two best: (key, id, key, id), the better first."""
    if len(keys) == 1:
        return keys[0], ids[0], tl.full(keys[0].shape, REMOVED, tl.int32), tl.full(keys[0].shape, NO_ID, tl.int32)
    elif len(keys) == 2:
        swap = keys[1] > keys[0]
        return (tl.maximum(keys[0], keys[1]), tl.where(swap, ids[1], ids[0]),
                tl.minimum(keys[0], keys[1]), tl.where(swap, ids[0], ids[1]))
    else:
        HALF: tl.constexpr = len(keys) // 2
        key0, id0, key1, id1 = two_best(keys[:HALF], ids[:HALF])
        other_key0, other_id0, other_key1, other_id1 = two_best(keys[HALF:], ids[HALF:])
        return merge(key0, id0, key1, id1, other_key0, other_id0, other_key1, other_id1, other_key0 > key0, True)


@triton.jit
def merge_lanes(key0, id0, key1, id1, other_key0, other_id0, other_key1, other_id1):
    """`merge` for two threads of a row, in either order."""
    ahead = (other_key0 > key0) | ((other_key0 == key0) & (other_id0 < id0))
    return merge(key0, id0, key1, id1, other_key0, other_id0, other_key1, other_id1, ahead, False)


@triton.jit
def row_best(keys, ids, LANES: tl.constexpr):
    """Of each row's experts the two best, [THREADS] each, to each lane its row's: (key, id, key, id)."""
    key0, id0, key1, id1 = two_best(keys, ids)
    shape: tl.constexpr = [key0.shape[0] // LANES, LANES]
    key0, id0, key1, id1 = tl.reduce((tl.reshape(key0, shape), tl.reshape(id0, shape), tl.reshape(key1, shape),
                                      tl.reshape(id1, shape)), 1, merge_lanes)
    return to_lanes(key0, LANES), to_lanes(id0, LANES), to_lanes(key1, LANES), to_lanes(id1, LANES)


@triton.jit
def load_keys(logits, bias, row, lane, live, row_stride, column_stride, SCORING: tl.constexpr,
              NUM_EXPERTS: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr,
              PTX: tl.constexpr):
    """The keys of each thread's experts, int32, and their ids, ascending: tuples of PER tensors [THREADS].

    A place without an expert has the key REMOVED. Neighbouring lanes read neighbouring vectors of WIDTH experts.
    For softmax, where one NaN makes all of a row's scores NaN, as one +inf does, it has the key of +inf.
    """
    keys = ()
    ids = ()
    for part in tl.static_range(PER // WIDTH):
        expert = (part * LANES + lane[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :]
        exists = expert < NUM_EXPERTS
        x = tl.load(logits + row[:, None] * row_stride + expert.to(row.dtype) * column_stride,
                    mask=live[:, None] & exists, other=0.0)
        choice = scores.order(x.to(tl.float32), SCORING, PTX)
        if bias is not None:
            choice = choice + tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
        key = exact.ordered_key(choice)
        if SCORING == "softmax":
            key = tl.where(choice == choice, key, INF_KEY)
        if (part + 1) * LANES * WIDTH > NUM_EXPERTS:
            key = tl.where(exists, key, REMOVED)
        keys = keys + unstack(key, WIDTH)
        ids = ids + unstack(expert, WIDTH)
    return keys, ids


@triton.jit(do_not_specialize=["num_tokens"])
def few_experts_kernel(
    logits, bias, weights_out, ids_out, num_valid, expert_map, num_tokens, row_stride, column_stride,
    routed_scaling_factor, shared_expert_weight,
    SCORING: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    PER: tl.constexpr, WIDTH: tl.constexpr, DENSE: tl.constexpr, PTX: tl.constexpr, DEPENDENT: tl.constexpr,
):
    """logits [T, NUM_EXPERTS] float32, bfloat16 or float16; bias [NUM_EXPERTS] or None; weights_out [T, TOPK] float32
    and ids_out [T, TOPK] int32, both contiguous; the rest as for router_kernel, shared_expert_weight without a use.

    DENSE: the logits are contiguous, which makes vectors of WIDTH known to be aligned, whatever NUM_EXPERTS is.
    DEPENDENT: None or "early", as for router_kernel.
    """
    if DEPENDENT is not None:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * ROWS  # times a stride: past 2^31
    valid = num_tokens
    if num_valid is not None:
        valid = tl.maximum(tl.minimum(tl.load(num_valid), num_tokens), 0).to(tl.int32)
    lane = tl.arange(0, ROWS * LANES) % LANES
    row = tl.arange(0, ROWS * LANES) // LANES
    live = row < tl.minimum(valid - first, ROWS).to(tl.int32)
    written = row < tl.minimum(num_tokens - first, ROWS).to(tl.int32)
    place = row * TOPK + lane
    weights_out += first * TOPK
    ids_out += first * TOPK
    if DENSE:
        row_step: tl.constexpr = NUM_EXPERTS
        column_step: tl.constexpr = 1
    else:
        row = row.to(tl.int64)
        row_step = row_stride
        column_step = column_stride
    logits += first * row_step
    keys, ids = load_keys(logits, bias, row, lane, live, row_step, column_step, SCORING, NUM_EXPERTS, LANES, PER, WIDTH,
                          PTX)
    key0, id0, key1, id1 = row_best(keys, ids, LANES)

    # From here on a lane is a slot of its row.
    used = live & (lane < TOPK)
    routed = used
    chosen = tl.where(lane == 0, id0, id1)
    top = None
    if SCORING == "softmax":  # a key is as good as its logit, and the first slot has the largest
        top = exact.key_value(key0)
        x = tl.where(lane == 0, top, exact.key_value(key1))
        void = key0 == INF_KEY  # every score is NaN, as they are if all logits are -inf: then x - top is
        chosen = tl.where(void, lane, chosen)
        routed = routed & (void == 0)
    else:
        x = tl.load(logits + row * row_step + chosen.to(row.dtype) * column_step, mask=routed, other=0.0)
        x = x.to(tl.float32)
    weight = tl.where(routed, scores.weight(x, top, SCORING), 0.0)
    total = to_lanes(tl.sum(tl.reshape(weight, [ROWS, LANES]), axis=1), LANES)
    weight = weight / (total + 1e-20)
    if SCORING == "sqrtsoftplus":
        weight = tl.where(weight == weight, weight, 0.0)  # inf / inf
    weight = weight * routed_scaling_factor
    if expert_map is not None:
        chosen = tl.load(expert_map + chosen, mask=used, other=0).to(tl.int32)
    tl.store(weights_out + place, tl.where(live, weight, 0.0), mask=written & (lane < TOPK))
    tl.store(ids_out + place, tl.where(live, chosen, -1), mask=written & (lane < TOPK))
