"""Routes in the order of their experts, and the blocks of rows that one program of a grouped product takes.

A route is one slot of one token, r = token * K + slot. Sorted by (expert, r) without padding, the routes of an expert
are one run; a block is up to BLOCK_M routes of one run. Routes without a local expert are left out.

    order         [R] int32            order[p] is the route at position p
    blocks        [3, NB] int32        a block's expert, its first position, its number of rows
    num_blocks    [1] int32            how many blocks there are; NB is the most there can be

Few routes: one launch, in which one program writes the blocks (`list_blocks`), and one for each expert the expert's run
(`place_routes`). Many, where that is too much for one program: `count_chunk`, then, in a second launch, `place_chunks`,
which knows from the counts of all chunks where each of its routes goes. Both give the same: nothing depends on which
program is faster.
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
                 STEP: tl.constexpr, ROWS: tl.constexpr):
    """One program writes the run of `expert`: how many routes go before it, then where its own are. ROWS divides STEP:
    a thread counts along a row."""
    rows = tl.arange(0, ROWS)[:, None] * (STEP // ROWS) + tl.arange(0, STEP // ROWS)[None, :]
    before = tl.zeros([ROWS], tl.int32)
    for begin in range(0, num_routes, STEP):
        routes = begin + rows
        ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
        before += tl.sum((ids < expert).to(tl.int32), axis=1)
    at = tl.sum(before)
    for begin in range(0, num_routes, STEP):
        routes = begin + rows
        ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
        own = (ids == expert).to(tl.int32)
        through = tl.cumsum(own, axis=1)
        of_row = tl.sum(own, axis=1)
        first = at + tl.cumsum(of_row, axis=0) - of_row
        tl.store(order + first[:, None] + through - own, routes, mask=own != 0)
        at += tl.sum(of_row)


@triton.jit
def count_chunk(chunk, topk_ids, expert_map, map_size, counts, num_routes, NUM_EXPERTS: tl.constexpr,
                BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[chunk, e] is how many routes of the chunk go to expert e."""
    routes = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS, mask=ids < NUM_EXPERTS))


@triton.jit(do_not_specialize=["map_size", "num_routes", "num_chunks", "most_blocks"])
def place_chunks(topk_ids, expert_map, map_size, counts, order, blocks, num_blocks, num_routes, num_chunks, most_blocks,
                 NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr,
                 CHUNK: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Grid: 1 + chunks. The first program writes the blocks, program 1 + c places the routes of chunk c."""
    chunk = tl.program_id(0) - 1
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_chunks, ROWS):
        rows = begin + tl.arange(0, ROWS)
        found = tl.load(counts + rows[:, None] * BINS + bins[None, :], mask=rows[:, None] < num_chunks, other=0)
        total += tl.sum(found, axis=0)
        before += tl.sum(tl.where(rows[:, None] < chunk, found, 0), axis=0)
    if chunk < 0:
        store_blocks(total, blocks, num_blocks, most_blocks, NUM_EXPERTS, BINS, BLOCK_M)
        return
    base = tl.cumsum(total, 0) - total + before
    routes = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = local_expert(topk_ids, expert_map, map_size, routes, routes < num_routes, NUM_EXPERTS)
    earlier = (ids[None, :] == ids[:, None]) & (routes[None, :] < routes[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    local = ids < NUM_EXPERTS
    tl.store(order + tl.gather(base, tl.where(local, ids, 0), 0) + rank, routes, mask=local)
