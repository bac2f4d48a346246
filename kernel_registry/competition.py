"""Which boxes compete, and which lie inside which: exact, and fast enough for ten thousand implementations of one op.

Every implementation is a bit of a Python integer. Per trait, implementations with an equal set form a group, and each
group gets three masks: who it meets, who is wider, who is narrower. A whole box's relation to all others is then the
AND of its groups' masks. Comparing groups pair by pair is quadratic in distinct sets only; plain integer ranges, the
one kind of which there may be thousands, are sorted instead.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from operator import or_
from typing import NamedTuple, Sequence

from .box import Box
from .predicates import Ints, ValueSet

_FEW = 64  # below this many distinct sets, pairwise is the faster way too


class Relations(NamedTuple):
    """Masks over all boxes, one per box (bit i is box i; a box meets, covers and lies inside itself)."""

    meets: list[int]
    wider: list[int]  # boxes that cover this one
    narrower: list[int]  # boxes that this one covers


def relations(boxes: Sequence[Box]) -> Relations:
    """How every box relates to every other: `wider` and `narrower` prove containment, `meets` is possible overlap."""
    everyone = (1 << len(boxes)) - 1
    meets, wider, narrower = ([everyone] * len(boxes) for _ in range(3))
    for name in sorted({name for box in boxes for name in box.sets}):
        _combine(boxes, [box.sets.get(name) for box in boxes], _by_trait, meets, wider, narrower)
    _combine(boxes, [_conditions(box) for box in boxes], _by_conditions, meets, wider, narrower)
    return Relations(meets, wider, narrower)


def bits(mask: int):
    """The positions of the ones in `mask`, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _combine(boxes, keys, compare, meets, wider, narrower) -> None:
    """ANDs into the three lists what one trait (or the boxes' extra conditions) says; equal keys share the work."""
    groups: dict[object, int] = {}
    values: list = []
    members: list[int] = []
    group_of: list[int] = []
    for i, key in enumerate(keys):
        identity = _identity(key)
        if identity not in groups:
            groups[identity] = len(values)
            values.append(key)
            members.append(0)
        group_of.append(groups[identity])
        members[groups[identity]] |= 1 << i
    if len(values) == 1:
        return  # all alike: says nothing that tells boxes apart
    masks = compare(values, members)
    for i, g in enumerate(group_of):
        m, w, n = masks[g]
        meets[i] &= m
        wider[i] &= w
        narrower[i] &= n


def _identity(key) -> object:
    if isinstance(key, Ints):
        return ("ints", key.ranges, key.step)
    if isinstance(key, ValueSet):
        return (type(key).__name__, getattr(key, "values", None) or getattr(key, "patterns", None), key.negated)
    return key


def _by_trait(values: list, members: list[int]) -> list[tuple[int, int, int]]:
    plain = [v is None or (isinstance(v, Ints) and v.step == 1 and len(v.ranges) == 1) for v in values]
    if len(values) > _FEW and all(plain):
        return _sorted_ranges(values, members)

    def meet(a, b):
        return a is None or b is None or a.meets(b)

    def cover(a, b):
        return a is None or (b is not None and a.covers(b))
    return _pairwise(values, members, meet, cover)


def _by_conditions(values: list, members: list[int]) -> list[tuple[int, int, int]]:
    return _pairwise(values, members, lambda a, b: True, lambda a, b: a <= b)


def _conditions(box: Box) -> frozenset:
    """Relations and Python checks: a box with fewer of them is wider; they never prove two boxes apart."""
    return frozenset(box.relations) | {check.target for check in box.checks}


def _pairwise(values, members, meet, cover) -> list[tuple[int, int, int]]:
    out = []
    for a in values:
        m = w = n = 0
        for b, mask in zip(values, members):
            if meet(a, b):
                m |= mask
            if cover(b, a):
                w |= mask
            if cover(a, b):
                n |= mask
        out.append((m, w, n))
    return out


def _sorted_ranges(values: list, members: list[int]) -> list[tuple[int, int, int]]:
    """For single ranges [low, high]: they meet when low <= their high and high >= their low, and so on, so every mask
    is an AND of two prefixes of the ranges sorted by one end."""
    free = sum(mask for value, mask in zip(values, members) if value is None)
    everyone = sum(members)
    ranges = [(*value.ranges[0], mask) for value, mask in zip(values, members) if value is not None]
    by_low = sorted(ranges, key=lambda r: r[0])
    by_high = sorted(ranges, key=lambda r: r[1])
    lows, highs = [r[0] for r in by_low], [r[1] for r in by_high]
    low_masks = [0, *accumulate((r[2] for r in by_low), or_)]
    high_masks = [0, *accumulate((r[2] for r in by_high), or_)]
    bound = everyone & ~free
    out = []
    for value in values:
        if value is None:
            out.append((everyone, free, everyone))
            continue
        low, high = value.ranges[0]
        starts_by_end = low_masks[bisect_right(lows, high)]
        ends_from_start = bound & ~high_masks[bisect_left(highs, low)]
        starts_by_start = low_masks[bisect_right(lows, low)]
        ends_from_end = bound & ~high_masks[bisect_left(highs, high)]
        starts_from_start = bound & ~low_masks[bisect_left(lows, low)]
        ends_by_end = high_masks[bisect_right(highs, high)]
        out.append((free | (starts_by_end & ends_from_start), free | (starts_by_start & ends_from_end),
                    starts_from_start & ends_by_end))
    return out
