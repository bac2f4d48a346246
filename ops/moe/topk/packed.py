"""The fast way to the same choice: keys and ids packed into one integer, with a check that knows when that is exact.

A window is laid over a row's choices, so high that the largest fit in, and what lies in it is brought to fixed point,
23 bits for up to 256 experts: rounded and clamped, hence in an order that never contradicts that of the choices. With
the expert's id below, it is one int32 per expert: larger is better, on equal choices the lower id, no two being equal.
A selection round is then a single maximum over the warp, and a lane's list is sorted by integer minima and maxima.

What packing can't tell, it says. Two neighbours among the chosen that round to the same number are put in order by
their exact keys (`repair`). Everything else is a doubt, and a row in doubt is decided again (exact.py):
- the last chosen and the best one left out round to the same number, or so do three chosen in a row;
- of a lane with more experts than places, the best that did not fit rounds to no less than the last chosen;
- the last chosen lies at or below the window: far below the best, NaN, -inf;
- the last group kept and the first one dropped have scores too close to tell, or a group's second best is below the
  window.
So every result is what the exact way gives, bit for bit.

Where the choice is a logit of 16 bits itself, as in softmax routing, nothing has to be rounded: its exact key leaves
room for the id, equal numbers are equal choices, and only a row that is void or a list that ran out is in doubt
(`fits_whole`).
"""

from __future__ import annotations

from math import comb

import triton
import triton.language as tl

from . import exact, lanes, networks

LANES = lanes.LANES
EMPTY = exact.REMOVED  # below every packed choice


@triton.constexpr_function
def id_bits(num_experts):
    """Low bits of a packed choice that hold the id: 8, or more where there are more than 256 experts."""
    return max(8, (num_experts - 1).bit_length())


@triton.constexpr_function
def fits_whole(scoring, has_bias, logit_bits):
    """Whether a choice is a logit whose float32 form has its lowest 13 bits 0: all of its digits fit above an id."""
    return scoring == "softmax" and not has_bias and logit_bits == 16


@triton.constexpr_function
def window_reach(scoring):
    """How far the window reaches above the largest bias, or for softmax above the row's largest logit."""
    return {"sigmoid": 1.0, "sqrtsoftplus": 7.0, "softmax": 0.0}[scoring]


@triton.constexpr_function
def widest_window(scoring):
    """What is further below the top of the window than this is left to the exact way: it is wide, not often needed."""
    return {"sigmoid": 8.0, "sqrtsoftplus": 16.0, "softmax": 16.0}[scoring]


@triton.jit
def bias_window(biases, SCORING: tl.constexpr):
    """The window for every row, [1, 1] each: its bottom comes to 0 and its top to 1 as choice * scale + offset.

    Its bottom is the least of the lanes' largest biases: as many experts as there are lanes are above it whatever their
    scores, so it holds all that can be chosen, and no more than it must, for width costs digits."""
    high = tl.full([1, LANES], 0.0 if len(biases) == 0 else float("-inf"), tl.float32)
    for i in tl.static_range(len(biases)):
        high = tl.maximum(high, tl.max(biases[i], axis=2))
    key = exact.ordered_key(high)
    top = exact.key_value(tl.max(key, axis=1)[:, None]) + window_reach(SCORING)
    bottom = tl.maximum(exact.key_value(tl.min(key, axis=1)[:, None]), top - widest_window(SCORING))
    scale = 1.0 / (top - bottom)
    return scale, -bottom * scale


@triton.jit
def row_window(choices, SCORING: tl.constexpr):
    """The window for each row from its largest choice, [ROWS, 1] each; if there is a NaN, one that holds nothing."""
    top = choices[0]
    for i in tl.static_range(1, len(choices)):
        top = tl.maximum(top, choices[i], propagate_nan=tl.PropagateNan.ALL)
    key = tl.where(top == top, exact.ordered_key(top), exact.INF_KEY)
    top = exact.key_value(tl.max(key, axis=1)[:, None])
    scale = tl.full(top.shape, 1.0 / widest_window(SCORING), tl.float32)
    return scale, (widest_window(SCORING) - top) * scale


@triton.jit
def fixed_point(choice, scale, offset, BITS: tl.constexpr, PTX: tl.constexpr):
    """int32 [ROWS, 32] whose upper bits order the choices and whose BITS lowest are 0; NaN as if below the window."""
    if PTX:  # the clamping comes with the multiplication
        inside = tl.inline_asm_elementwise("fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [choice, scale, offset],
                                           dtype=tl.float32, is_pure=True, pack=1)
    else:
        inside = choice * scale + offset
        inside = tl.where(inside > 0.0, tl.minimum(inside, 1.0), 0.0)  # no maximum: Triton 3.6's interpreter keeps NaN
    # A power of two added leaves a number below 1 in the low bits of the sum, as many as have room above the id.
    POWER: tl.constexpr = 1 << (BITS - 8)
    BELOW_ONE: tl.constexpr = 1.0 - POWER / 4194304
    return (inside * BELOW_ONE + POWER).to(tl.int32, bitcast=True) << BITS


@triton.jit
def whole_point(choice, BITS: tl.constexpr, PTX: tl.constexpr):
    """int32 [ROWS, 32] in the order of choices that fit whole, NaN as or above +inf; of a number, the BITS lowest are
    0."""
    bits = choice.to(tl.int32, bitcast=True)
    if not PTX:  # where the sum that made the choice a NaN has left it with a sign of its own
        bits = tl.where(choice == choice, bits, exact.INF_KEY)
    return bits ^ ((bits >> 31) & (0x7FFFFFFF >> BITS << BITS))


@triton.jit
def exchange(entries, A: tl.constexpr, B: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Puts the larger of entries A < B at A if it is needed (HIGH), and the smaller one at B if that is (LOW)."""
    high, low = entries[A], entries[B]
    if HIGH:
        high = tl.maximum(entries[A], entries[B])
    if LOW:
        low = tl.minimum(entries[A], entries[B])
    return entries[:A] + (high,) + entries[A + 1:B] + (low,) + entries[B + 1:]


@triton.jit
def lane_lists(choices, ids, scale, offset, BITS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
               WHOLE: tl.constexpr, PTX: tl.constexpr):
    """The DEPTH best of each lane, packed, best first, and the best that did not fit: tuple of, and one, [ROWS, 32]."""
    MASK: tl.constexpr = (1 << BITS) - 1
    lists = ()
    for i in tl.static_range(len(choices)):  # the lower the id, the larger; NO_ID, no larger than any
        if WHOLE:
            number = whole_point(choices[i], BITS, PTX)
        else:
            number = fixed_point(choices[i], scale, offset, BITS, PTX)
        lists = lists + (number | (~ids[i] & MASK),)
    steps: tl.constexpr = networks.best_of_network(len(choices), min(len(choices), DEPTH + 1))
    for s in tl.static_range(len(steps)):
        lists = exchange(lists, steps[s][0], steps[s][1], steps[s][2], steps[s][3])
    rest = tl.full([ROWS, LANES], EMPTY, tl.int32)
    if len(choices) > DEPTH:
        rest = lists[DEPTH]
    return lists[:DEPTH], rest


@triton.jit
def drop(lists, rest, keep):
    """Lists and rest with nothing in the lanes whose groups are not kept."""
    kept = ()
    for place in tl.static_range(len(lists)):
        kept = kept + (tl.where(keep, lists[place], EMPTY),)
    return kept, tl.where(keep, rest, EMPTY)


@triton.jit
def below_window(BITS: tl.constexpr):
    """The largest packed choice, int32, that stands for one at or below the window."""
    return ((1 << (BITS - 8)) * tl.full([1, 1], 1.0, tl.float32)).to(tl.int32, bitcast=True) << BITS | ((1 << BITS) - 1)


@triton.jit
def above_window(BITS: tl.constexpr):
    """The smallest packed choice, int32, that stands for one at or above the top of the window."""
    return fixed_point(tl.full([1, 1], 1.0, tl.float32), 1.0, 0.0, BITS, False)


@triton.jit
def select(lists, rest, chosen, TILE: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
           WHOLE: tl.constexpr):
    """Puts the COUNT best of each row of a tile, from its lanes' lists, into its SLOTS lanes of `chosen`, packed, best
    first. Returns `chosen` and whether there is doubt: [ROWS, 32] each."""
    MASK: tl.constexpr = (1 << BITS) - 1
    lane = tl.arange(0, LANES)[None, :]
    first = tl.max(lists[0], axis=1)[:, None]
    last = first
    for taken in tl.static_range(COUNT):
        if taken > 0:
            last = tl.max(lists[0], axis=1)[:, None]
        chosen = tl.where(lane == TILE * SLOTS + taken, last, chosen)
        won = lists[0] == last
        popped = ()
        for place in tl.static_range(len(lists)):
            if place + 1 < len(lists):
                popped = popped + (tl.where(won, lists[place + 1], lists[place]),)
            else:
                popped = popped + (tl.where(won, EMPTY, lists[place]),)
        lists = popped
    if WHOLE:
        doubt = (rest > last) | (first >= exact.INF_KEY) | (last <= exact.NEG_INF_KEY)
    else:
        doubt = ((tl.maximum(lists[0], rest) | MASK) >= last) | (last <= below_window(BITS))
    return chosen, doubt


@triton.jit
def neighbours(chosen, COUNT: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr):
    """Whether the expert in a lane's slot and the one in the next slot round to the same number: [ROWS, 32] int32."""
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], chosen.shape)
    following = tl.gather(chosen, tl.minimum(lane + 1, LANES - 1), 1)
    return ((((chosen ^ following) >> BITS) == 0) & (lane % SLOTS < COUNT - 1)).to(tl.int32)


@triton.jit
def repair(ids, tied, keys):
    """Ids [ROWS, 32] with two neighbours that are `tied` put in the order of their exact `keys`, and the lanes tied to
    both sides, of which that says nothing."""
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], ids.shape)
    following = tl.minimum(lane + 1, LANES - 1)
    before = tl.maximum(lane - 1, 0)
    tied_before = tl.where(lane > 0, tl.gather(tied, before, 1), 0)
    other = tl.where(tied > 0, following, before)
    other_key = tl.gather(keys, other, 1)
    other_id = tl.gather(ids, other, 1)
    other_goes_first = (other_key > keys) | ((other_key == keys) & (other_id < ids))
    swap = ((tied > 0) & other_goes_first) | ((tied_before > 0) & (other_goes_first == 0))
    return tl.where(swap, other_id, ids), tied & tied_before


def list_depth(routed: int, lanes: int, longest: int, least: int = 1, rare: float = 1e-4) -> int:
    """How long a lane's list must be so that fewer than `rare` of all rows have more of their best in one lane, when
    those are any of the `longest` experts of each of `lanes` lanes; at least `least`, at most `longest`."""
    experts = lanes * longest
    routed = min(routed, experts)

    def overfull(depth):
        more = range(depth + 1, min(longest, routed) + 1)
        return lanes * sum(comb(longest, n) * comb(experts - longest, routed - n) for n in more) / comb(experts, routed)

    return next(depth for depth in range(min(least, longest), longest + 1) if overfull(depth) < rare)
