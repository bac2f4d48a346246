"""The exact way to choose: exact keys, lanes' lists sorted in registers, one pair (key, id) after the other.

Keys. A choice (float32) becomes an int32 that orders exactly as the float does, -inf and +inf included: no clamping, so
no two different finite choices are merged. NaN gets a key of its own below -inf, and an expert that is taken, or a lane
without one, a key below that. -0.0 can't appear in a choice: a score is at least +0.0, and +0.0 plus -0.0 is +0.0.

Selection. Each lane sorts its list, best first. A round is then one maximum over the 32 list heads, one minimum over
the ids that have it, and a pop in the lane that won: two full-warp int32 reductions, each of which is a single REDUX
instruction on sm_80 and later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import lanes, networks

LANES = lanes.LANES
NO_ID = lanes.NO_ID
REMOVED = tl.constexpr(-2147483648)  # an expert already taken, or a lane that has none
NAN_KEY = tl.constexpr(-2147483647)  # below the key of -inf
DROPPED_LOGIT_KEY = tl.constexpr(-2139095042)  # below the key of -inf: a logit's score is 0 at least
NEG_INF_KEY = tl.constexpr(-2139095041)  # ordered_key(-inf): 0xff800000 ^ 0x7fffffff
INF_KEY = tl.constexpr(2139095040)  # ordered_key(+inf)
LONGEST_SORTED = tl.constexpr(16)  # lists longer than this are scanned


@triton.jit
def ordered_key(value):
    """float32 -> int32 with the same order; NaN below everything."""
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, key, NAN_KEY)


@triton.jit
def key_value(key):
    """The float32 that has this key: the inverse of ordered_key (some NaN for NAN_KEY)."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def depth_after(taken, count, length):
    """Entries of a lane's list that can still matter once `taken` of `count` slots are filled: no lane can win more."""
    return min(length, count - taken)


@triton.jit
def exchange(keys, ids, A: tl.constexpr, B: tl.constexpr):
    """Puts the better of entries A < B at A: the larger key, on equal keys the lower id."""
    swap = (keys[B] > keys[A]) | ((keys[B] == keys[A]) & (ids[B] < ids[A]))
    high_key = tl.where(swap, keys[B], keys[A])
    low_key = tl.where(swap, keys[A], keys[B])
    high_id = tl.where(swap, ids[B], ids[A])
    low_id = tl.where(swap, ids[A], ids[B])
    keys = keys[:A] + (high_key,) + keys[A + 1:B] + (low_key,) + keys[B + 1:]
    ids = ids[:A] + (high_id,) + ids[A + 1:B] + (low_id,) + ids[B + 1:]
    return keys, ids


@triton.jit
def sort_lanes(keys, ids):
    """Sorts each lane's list, best first."""
    pairs: tl.constexpr = networks.sorting_network(len(keys))
    for p in tl.static_range(len(pairs)):
        keys, ids = exchange(keys, ids, pairs[p][0], pairs[p][1])
    return keys, ids


@triton.jit
def select(keys, ids, COUNT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """The COUNT best experts of each row from its lanes' sorted lists: ids [ROWS, 32], lane % SLOTS the slot."""
    slot = (tl.arange(0, LANES) % SLOTS)[None, :]
    chosen = tl.zeros([ROWS, LANES], dtype=tl.int32)
    for taken in tl.static_range(COUNT):
        best = tl.max(keys[0], axis=1)[:, None]
        winner = tl.min(tl.where(keys[0] == best, ids[0], NO_ID), axis=1)[:, None]
        chosen = tl.where(slot == taken, winner, chosen)
        if taken + 1 < COUNT:
            won = ids[0] == winner
            next_keys = ()
            next_ids = ()
            for depth in tl.static_range(depth_after(taken + 1, COUNT, len(keys))):
                if depth + 1 < len(keys):
                    next_keys = next_keys + (tl.where(won, keys[depth + 1], keys[depth]),)
                    next_ids = next_ids + (tl.where(won, ids[depth + 1], ids[depth]),)
                else:
                    next_keys = next_keys + (tl.where(won, REMOVED, keys[depth]),)
                    next_ids = next_ids + (ids[depth],)
            keys = next_keys
            ids = next_ids
    return chosen


@triton.jit
def scan(keys, COUNT: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
         GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr):
    """What `select` returns, from lists as load_choices has them: more work a round, but a loop. A network that sorts
    28 entries takes half a minute to compile; and places instead of ids leave registers to the fast way."""
    slot = (tl.arange(0, LANES) % SLOTS)[None, :]
    chosen = tl.zeros([ROWS, LANES], dtype=tl.int32)
    for taken in range(COUNT):
        head = keys[0]
        for i in tl.static_range(1, len(keys)):
            head = tl.maximum(head, keys[i])
        best = tl.max(head, axis=1)[:, None]
        place = tl.full([ROWS, LANES], -1, tl.int32)
        for i in tl.static_range(len(keys)):  # from the last place to the first: the lowest id that has it
            place = tl.where(keys[len(keys) - 1 - i] == best, len(keys) - 1 - i, place)
        candidate = lanes.id_at(place, GROUPS, GROUP_SIZE, GROUP_LANES, WIDEST)
        winner = tl.min(candidate, axis=1)[:, None]
        chosen = tl.where(slot == taken, winner, chosen)
        place = tl.where(candidate == winner, place, -1)
        left = ()
        for i in tl.static_range(len(keys)):
            left = left + (tl.where(place == i, REMOVED, keys[i]),)
        keys = left
    return chosen


@triton.jit
def mask_dropped(kept_keys, kept_ids, keys, ids, keep, SCORING: tl.constexpr):
    """Lists that are the given ones in kept groups; in dropped groups those of `keys` and `ids`, whose ids ascend, with
    every choice -inf: experts of equal choices stand in the order of their ids. Where the keys are those of logits, a
    -inf of a kept group goes first, for its score is 0."""
    DROPPED: tl.constexpr = DROPPED_LOGIT_KEY if SCORING == "softmax" else NEG_INF_KEY
    out_keys = ()
    out_ids = ()
    for i in tl.static_range(len(keys)):
        masked = tl.where(ids[i] == NO_ID, REMOVED, DROPPED)
        out_keys = out_keys + (tl.where(keep, kept_keys[i], masked),)
        out_ids = out_ids + (tl.where(keep, kept_ids[i], ids[i]),)
    return out_keys, out_ids


@triton.jit
def choice_keys(choices, ids):
    """The exact keys of what load_choices returned."""
    keys = ()
    for i in tl.static_range(len(choices)):
        keys = keys + (tl.where(ids[i] == NO_ID, REMOVED, ordered_key(choices[i])),)
    return keys


@triton.jit
def softmax_keys(keys):
    """Keys of a row's logits, all of NaN if every score of the row is; and whether it is so, [ROWS, 1]: there is a NaN
    or a +inf, or nothing but -inf."""
    top = keys[0]
    void = keys[0] == NAN_KEY
    for i in tl.static_range(1, len(keys)):
        top = tl.maximum(top, keys[i])
        void = void | (keys[i] == NAN_KEY)
    top = tl.max(tl.where(void, INF_KEY, top), axis=1)[:, None]
    void = (top == INF_KEY) | (top == NEG_INF_KEY)
    out = ()
    for i in tl.static_range(len(keys)):
        out = out + (tl.where(void & (keys[i] != REMOVED), NAN_KEY, keys[i]),)
    return out, void


@triton.jit
def choose(keys, ids, keep, SCORING: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr,
           GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr):
    """The COUNT best experts of each row, ids [ROWS, 32], lane % SLOTS the slot. `keep`: None, or which lanes' groups
    are kept."""
    if len(keys) > LONGEST_SORTED:
        if keep is not None:
            keys, ids = mask_dropped(keys, ids, keys, ids, keep, SCORING)
        chosen = scan(keys, COUNT, SLOTS, GROUPS, GROUP_SIZE, GROUP_LANES, ROWS, WIDEST)
    else:
        best_keys, best_ids = sort_lanes(keys, ids)
        if keep is not None:
            best_keys, best_ids = mask_dropped(best_keys, best_ids, keys, ids, keep, SCORING)
        chosen = select(best_keys, best_ids, COUNT, SLOTS, ROWS)
    return chosen
