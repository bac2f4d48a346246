"""Routes in the order of their experts, and the blocks of rows that one program of a grouped product takes.

A route is one slot of one token, r = token * K + slot. Sorted by (expert, r) without padding, the routes of an expert
are one run; a block is up to BLOCK_M routes of one run. Routes without a local expert are left out.

    order         [R] int32            order[p] is the route at position p
    blocks        [3, NB] int32        a block's expert, its first position, its number of rows
    num_blocks    [1] int32            how many blocks there are; NB is the most there can be

One program counts and writes the blocks; each of the others places the routes of one expert, which it knows how from
two passes over all ids: how many go before it, then where its own are. Nothing depends on which program is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_expert(topk_ids, expert_map, map_size, routes, live, NUM_EXPERTS: tl.constexpr):
    """The local experts of `routes`, NUM_EXPERTS where there is none; an id is never used before it was checked."""
    ids = tl.load(topk_ids + routes, mask=live, other=-1)
    if expert_map is not None:
        known = (ids >= 0) & (ids < map_size)
        ids = tl.load(expert_map + tl.where(known, ids, 0), mask=known, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS).to(tl.int32)


@triton.jit
def store_blocks(counts, blocks, num_blocks, most_blocks, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr,
                 BLOCK_M: tl.constexpr):
    """Writes the blocks of experts that have `counts` [BINS] routes."""
    experts = tl.arange(0, BINS)
    starts = tl.cumsum(counts, 0) - counts
    per_expert = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(per_expert, 0) - per_expert
    tl.store(num_blocks, tl.sum(per_expert))
    for block in range(0, tl.max(per_expert)):
        there = block < per_expert
        tl.store(blocks + first + block, experts, mask=there)
        tl.store(blocks + most_blocks + first + block, starts + block * BLOCK_M, mask=there)
        tl.store(blocks + 2 * most_blocks + first + block, tl.minimum(counts - block * BLOCK_M, BLOCK_M), mask=there)


@triton.jit
def list_blocks(topk_ids, expert_map, map_size, blocks, num_blocks, num_routes, most_blocks, NUM_EXPERTS: tl.constexpr,
                BINS: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr):
    """One program writes all blocks."""
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_routes, STEP):
        routes = begin + tl.arange(0, STEP)
        ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
        counts += tl.histogram(ids, BINS, mask=ids < NUM_EXPERTS)
    store_blocks(counts, blocks, num_blocks, most_blocks, NUM_EXPERTS, BINS, BLOCK_M)


@triton.jit
def place_routes(expert, topk_ids, expert_map, map_size, order, num_routes, NUM_EXPERTS: tl.constexpr,
                 STEP: tl.constexpr):
    """One program writes the run of `expert`."""
    before = tl.zeros([STEP], tl.int32)
    for begin in range(0, num_routes, STEP):
        routes = begin + tl.arange(0, STEP)
        ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
        before += (ids < expert).to(tl.int32)
    at = tl.sum(before)
    for begin in range(0, num_routes, STEP):
        routes = begin + tl.arange(0, STEP)
        ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
        own = (ids == expert).to(tl.int32)
        through = tl.cumsum(own, 0)
        tl.store(order + at + through - own, routes, mask=own != 0)
        at += tl.sum(own)
