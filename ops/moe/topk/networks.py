"""Sorting networks, as lists of exchanges between places of a lane's list: fixed at compile time, no branch on data."""

from __future__ import annotations

import triton


@triton.constexpr_function
def sorting_network(n):
    """Batcher's merge exchange for any n (Knuth 5.2.2, algorithm M), as pairs (i, j) with i < j; the better
    goes to i."""
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
def best_of_network(n, count):
    """As much of sorting_network(n) as its first `count` places need: (i, j, whether i is needed, whether j is)."""
    needed, steps = set(range(count)), []
    for i, j in reversed(sorting_network(n)):
        if i in needed or j in needed:
            steps.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return tuple(reversed(steps))
