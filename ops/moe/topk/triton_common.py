"""What the two Triton routers share: keys, lane-sorted lists, the selection rounds and the epilogue.

Layout. A tile is [ROWS, 32]: one token a row, 32 lanes, laid out so that a row never leaves its warp. A lane owns a few
experts, held as a tuple of [ROWS, 32] tensors (`keys`, `ids`), sorted best first in registers. A selection round is then
one maximum over the 32 list heads, one minimum over the ids that have it, and a pop in the lane that won: two
full-warp int32 reductions, each of which is a single REDUX instruction on sm_80 and later.

Keys. A choice (score + bias, float32) becomes an int32 that orders exactly as the float does, -inf and +inf included:
no clamping, so no two different finite choices are merged. NaN gets a key of its own below -inf, and an expert that is
taken, or a lane without one, a key below that. -0.0 can't appear in a choice: a score is at least +0.0, and +0.0 plus
-0.0 is +0.0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
REMOVED = tl.constexpr(-2147483648)  # an expert already taken, or a lane that has none
NAN_KEY = tl.constexpr(-2147483647)  # below the key of -inf
NEG_INF_KEY = tl.constexpr(-2139095041)  # ordered_key(-inf): 0xff800000 ^ 0x7fffffff
NO_ID = tl.constexpr(2147483647)
LONGEST_SORTED = tl.constexpr(32)  # lists longer than this are scanned


@triton.constexpr_function
def sorting_network(n):
    """Batcher's merge exchange for any n (Knuth 5.2.2, algorithm M), as pairs (i, j) with i < j."""
    pairs = []
    t = max((n - 1).bit_length(), 1)
    p = 1 << (t - 1)
    while p > 0:
        q, r, d = 1 << (t - 1), 0, p
        while True:
            pairs += [(i, i + d) for i in range(n - d) if (i & p) == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(pairs)


@triton.constexpr_function
def chunks(count, lanes, widest):
    """Splits `count` neighbouring experts over `lanes` lanes: (offset, width) of loads in which each lane takes `width`
    neighbours, widest first, so that most bytes move in wide vectors. The last chunk may be partly empty."""
    found, offset, width = [], 0, widest
    while width:
        while count - offset >= lanes * width:
            found.append((offset, width))
            offset += lanes * width
        width >>= 1
    if offset < count:
        found.append((offset, 1))
    return tuple(found)


@triton.constexpr_function
def depth_after(taken, count, length):
    """Entries of a lane's list that can still matter once `taken` of `count` slots are filled: no lane can win more."""
    return min(length, count - taken)


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


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)), for choices. With PTX, the same by the two NVIDIA approximations without their range handling:
    it only matters to scores below 2^-126, which come out as 0."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.rn.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.rn.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def accurate_sigmoid(x):
    """sigmoid to about 4e-7 relative for any x, where exp(x) by exp2(x * log2(e)) alone loses |x| * 6e-8; NaN gives 0.

    exp(-x) = 2^n * exp(r) with -x = n * ln(2) + r, and ln(2) in two parts of which the first times n is exact.
    """
    negated = -tl.minimum(tl.maximum(x, -104.0), 104.0)  # beyond these the result is 0 or 1 anyway
    n = tl.floor(negated * 1.4426950408889634 + 0.5)
    r = (negated - n * 0.693359375) + n * 2.12194440e-4
    e = tl.exp2(n) * tl.exp2(r * 1.4426950408889634)
    return tl.where(x == x, 1.0 / (1.0 + e), 0.0)


@triton.jit
def unstack(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 32, WIDTH] -> tuple of WIDTH tensors [ROWS, 32], in order."""
    if WIDTH == 1:
        return (tl.reshape(x, [ROWS, LANES]),)
    elif WIDTH == 2:
        a, b = tl.split(x)
        return (a, b)
    elif WIDTH == 4:
        even, odd = tl.split(tl.reshape(x, [ROWS, LANES, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, LANES, 4, 2]))
        e = unstack(even, ROWS, 4)
        o = unstack(odd, ROWS, 4)
        return (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])


@triton.jit
def chunk_experts(OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  GROUP_LANES: tl.constexpr):
    """Ids of the WIDTH neighbouring experts that each lane has in a chunk, [1, 32, WIDTH], and which of them exist."""
    lane = tl.arange(0, LANES)[None, :, None]
    within = OFFSET + (lane % GROUP_LANES) * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return (lane // GROUP_LANES) * GROUP_SIZE + within, (within < GROUP_SIZE) & (lane < GROUPS * GROUP_LANES)


@triton.jit
def load_bias(bias, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, WIDEST: tl.constexpr):
    """The bias in the layout of load_choices, a tuple of [1, 32, width] float32: the same for every row."""
    found = ()
    parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
    for part in tl.static_range(len(parts)):
        expert, exists = chunk_experts(parts[part][0], parts[part][1], GROUPS, GROUP_SIZE, GROUP_LANES)
        found = found + (tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32),)
    return found


@triton.jit
def load_chunk(logits, bias, rows, live, row_stride, column_stride, OFFSET: tl.constexpr, WIDTH: tl.constexpr,
               GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr,
               MASK_ROWS: tl.constexpr, PTX: tl.constexpr):
    """WIDTH neighbouring experts of each lane: keys of their choices and their ids, tuples of [ROWS, 32]."""
    expert, exists = chunk_experts(OFFSET, WIDTH, GROUPS, GROUP_SIZE, GROUP_LANES)
    PARTIAL: tl.constexpr = OFFSET + GROUP_LANES * WIDTH > GROUP_SIZE or GROUPS * GROUP_LANES < LANES
    place = logits + rows[:, None, None] * row_stride + expert.to(tl.int64) * column_stride
    if PARTIAL:
        x = tl.load(place, mask=exists & live[:, None, None], other=0.0)
    elif MASK_ROWS:
        x = tl.load(place, mask=live[:, None, None], other=0.0)
    else:
        x = tl.load(place)
    key = ordered_key(sigmoid(x.to(tl.float32), PTX) + bias)
    if PARTIAL:
        key = tl.where(exists, key, REMOVED)
        expert = tl.where(exists, expert, NO_ID)
    return unstack(key, ROWS, WIDTH), unstack(tl.broadcast_to(expert, [ROWS, LANES, WIDTH]), ROWS, WIDTH)


@triton.jit
def load_choices(logits, bias, rows, live, row_stride, column_stride,
                 GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr,
                 WIDEST: tl.constexpr, MASK_ROWS: tl.constexpr, PTX: tl.constexpr):
    """Every lane's experts: keys of their choices and their ids, tuples of [ROWS, 32], ids ascending within a lane.

    The lane's group is lane // GROUP_LANES. A place in the list without an expert has the key REMOVED and comes last.
    `bias` is what load_bias returned.
    """
    keys = ()
    ids = ()
    parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
    for part in tl.static_range(len(parts)):
        more_keys, more_ids = load_chunk(logits, bias[part], rows, live, row_stride, column_stride, parts[part][0],
                                         parts[part][1], GROUPS, GROUP_SIZE, GROUP_LANES, ROWS, MASK_ROWS, PTX)
        keys = keys + more_keys
        ids = ids + more_ids
    return keys, ids


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
    pairs: tl.constexpr = sorting_network(len(keys))
    for p in tl.static_range(len(pairs)):
        keys, ids = exchange(keys, ids, pairs[p][0], pairs[p][1])
    return keys, ids


@triton.jit
def select(keys, ids, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """The COUNT best experts of each row from its lanes' sorted lists: ids [ROWS, 32], slot by slot, best first."""
    slot = tl.arange(0, LANES)[None, :]
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
def scan(keys, ids, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """What `select` returns, from unsorted lists of any length: each round looks for the best expert after the last one.

    More work a round than `select`, but little code: a sorting network for over 32 entries takes minutes to compile.
    """
    slot = tl.arange(0, LANES)[None, :]
    chosen = tl.zeros([ROWS, LANES], dtype=tl.int32)
    last_key = tl.full([ROWS, 1], NO_ID, tl.int32)  # above every key
    last_id = tl.full([ROWS, 1], -1, tl.int32)
    for taken in range(COUNT):
        head_key = tl.full([ROWS, LANES], REMOVED, tl.int32)
        head_id = tl.full([ROWS, LANES], NO_ID, tl.int32)
        for i in tl.static_range(len(keys)):
            later = (keys[i] < last_key) | ((keys[i] == last_key) & (ids[i] > last_id))
            better = later & ((keys[i] > head_key) | ((keys[i] == head_key) & (ids[i] < head_id)))
            head_key = tl.where(better, keys[i], head_key)
            head_id = tl.where(better, ids[i], head_id)
        last_key = tl.max(head_key, axis=1)[:, None]
        last_id = tl.min(tl.where(head_key == last_key, head_id, NO_ID), axis=1)[:, None]
        chosen = tl.where(slot == taken, last_id, chosen)
    return chosen


@triton.jit
def chosen_scores(logits, chosen, rows, live, row_stride, column_stride, COUNT: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Unbiased scores of the chosen experts from their own logits, [ROWS, 32]; 0 past slot COUNT."""
    read = (tl.arange(0, LANES) < COUNT)[None, :]
    if MASK_ROWS:
        read = read & live[:, None]
    x = tl.load(logits + rows[:, None] * row_stride + chosen.to(tl.int64) * column_stride, mask=read, other=float("-inf"))
    return accurate_sigmoid(x.to(tl.float32))


@triton.jit
def finish(chosen, weight, rows, live, inside, weights_out, ids_out, expert_map, routed_scaling_factor,
           shared_expert_weight, NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, NUM_SHARED: tl.constexpr,
           RENORMALIZE: tl.constexpr, MAP_SHARED: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Renormalisation, scaling, shared slots, map and padding; stores both outputs."""
    ROUTED: tl.constexpr = TOPK - NUM_SHARED
    slot = tl.arange(0, LANES)[None, :]
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
    weight = weight * routed_scaling_factor
    ids = chosen
    if NUM_SHARED > 0:
        weight = tl.where(slot < ROUTED, weight, shared_expert_weight)
        ids = tl.where(slot < ROUTED, chosen, NUM_EXPERTS + slot - ROUTED)
    if expert_map is not None:
        mapped = slot < (TOPK if MAP_SHARED else ROUTED)
        ids = tl.where(mapped, tl.load(expert_map + ids, mask=mapped, other=0).to(tl.int32), ids)
    written = slot < TOPK
    if MASK_ROWS:
        weight = tl.where(live[:, None], weight, 0.0)
        ids = tl.where(live[:, None], ids, -1)
        written = written & inside[:, None]
    place = rows[:, None] * TOPK + slot
    tl.store(weights_out + place, weight, mask=written)
    tl.store(ids_out + place, ids, mask=written)
