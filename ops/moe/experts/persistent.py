"""The two grouped products for many rows on Hopper: as in grouped.py, with the work divided among groups of warps.

One program a multiprocessor. A group of warps loads: it takes tiles one after the other, fills a ring of stages in
shared memory and never waits for a product. Two groups compute, 64 rows of a block each: while one scales a product of
fp8, which the matrix unit can't, the other's is under way. What they wait for are barriers in shared memory.

Tiles are handed out by a counter in memory, so that blocks of one expert, which read the same weights, begin at the
same time whatever each of them takes: the second finds them in the L2 cache.

Written in Gluon, Triton's language for what a machine is told itself, because Triton waits for each product. Serves
16-bit weights (the second product) and fp8 blocks of 128, whose rows are whole steps of BLOCK_K.

    a_ring   [2 * STAGES, 64, BLOCK_K]        rows of the first and of the second group
    w_ring   [2 * STAGES, BLOCK_N, BLOCK_K]   weights of the first and of the second half of a tile: gate and up, or
                                              neighbouring columns
    x_ring   [STAGES, 128] float32            scales of the rows
    s_ring   [STAGES, 2] float32              scales of both halves
    full     a stage can be read; empty: both groups have read it
    tiles    [2 * 4] int32                    (expert, first position, rows, tile) of this tile and the next; no rows:
                                              the end. told: can be read; heard: both groups have read it
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..casts import narrow, widen
from .arithmetic import activate, quantised, row_exponent, scale_of
from .grouped import tile_of

WARPS = 4  # of each group
COMPUTE_REGISTERS = gl.constexpr(232)  # of a thread; the first group that computes has what the others leave: 232 too
LOAD_REGISTERS = gl.constexpr(40)
# Under its name of Triton 3.6, or the later one:
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
ROWS_OF_GROUP = gl.constexpr(64)
LOADERS = gl.constexpr(32 * WARPS)  # threads of the group that loads


def describe(matrix, block) -> TensorDescriptor:
    """What a kernel here reads `matrix` [rows, columns] through, in blocks of a multiple of 128 bytes a row."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.element_size(), rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)


@gluon.jit
def allocate(dtype: gl.constexpr, LAYOUT: gl.constexpr, ARRIVALS: gl.constexpr, BLOCK_N: gl.constexpr,
             BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """The rings and barriers above; ARRIVALS at `full` make a stage."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS_OF_GROUP, BLOCK_K], LAYOUT)
    w_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_N, BLOCK_K], LAYOUT)
    x_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * ROWS_OF_GROUP], FLAT)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 2], FLAT)
    tiles = gl.allocate_shared_memory(gl.int32, [8, 1], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    for slot in gl.static_range(2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=2)
    return a_ring, w_ring, x_ring, s_ring, full, empty, tiles, told, heard


@gluon.jit
def tell(number, tiles, told, heard, expert, start, height, tile):
    """Hands the number-th tile of this program to both groups that compute."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = number % 2
    mbarrier.wait(heard.index(slot), (number // 2 & 1) ^ 1)
    tiles.index(4 * slot).store(gl.full([1], expert, gl.int32, ONE))
    tiles.index(4 * slot + 1).store(gl.full([1], start, gl.int32, ONE))
    tiles.index(4 * slot + 2).store(gl.full([1], height, gl.int32, ONE))
    tiles.index(4 * slot + 3).store(gl.full([1], tile, gl.int32, ONE))
    mbarrier.arrive(told.index(slot))


@gluon.jit
def hear(number, tiles, told, heard):
    """(expert, first position, rows, tile) of the number-th tile of this program."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot = number % 2
    mbarrier.wait(told.index(slot), number // 2 & 1)
    expert = gl.max(tiles.index(4 * slot).load(ONE), axis=0)  # of one element: as a scalar
    start = gl.max(tiles.index(4 * slot + 1).load(ONE), axis=0)
    height = gl.max(tiles.index(4 * slot + 2).load(ONE), axis=0)
    tile = gl.max(tiles.index(4 * slot + 3).load(ONE), axis=0)
    mbarrier.arrive(heard.index(slot))
    return expert, start, height, tile


@gluon.jit
def load(a, a_desc, a_scale, a_scale_stride, w_desc, w_scale, order, blocks, num_blocks, most_blocks, ticket, a_ring,
         w_ring, x_ring, s_ring, full, empty, tiles, told, heard, TOPK: gl.constexpr, HALVES: gl.constexpr,
         DEPTH: gl.constexpr, ROWS: gl.constexpr, SCALED: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr,
         BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """The group that loads. HALVES == 2: rows of `a` [T, DEPTH] are gathered by their tokens; else `a` [R, DEPTH] lies
    in the order of the blocks. Rows that a block does not have are copies of its last one, or of the next block's."""
    SPAN: gl.constexpr = BLOCK_N if HALVES == 2 else 2 * BLOCK_N
    TILES_N: gl.constexpr = (ROWS + SPAN - 1) // SPAN
    PER_ROW: gl.constexpr = (DEPTH + GROUP - 1) // GROUP
    PER_HALF: gl.constexpr = (ROWS + GROUP - 1) // GROUP
    BITS: gl.constexpr = a.dtype.element_ty.primitive_bitwidth
    AT_ONCE: gl.constexpr = 128 // BITS
    ACROSS: gl.constexpr = BLOCK_K // AT_ONCE
    GATHER: gl.constexpr = gl.BlockedLayout([1, AT_ONCE], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    W_BYTES: gl.constexpr = 2 * BLOCK_N * BLOCK_K * BITS // 8
    A_BYTES: gl.constexpr = ROWS_OF_GROUP * BLOCK_K * BITS // 8  # of one group
    count = gl.load(num_blocks)
    step = 0
    number = 0
    index = gl.program_id(0)
    while index < count * TILES_N:
        block, tile = tile_of(index, count, TILES_N, GROUP_M)
        expert = gl.load(blocks + block)
        start = gl.load(blocks + most_blocks + block)
        height = gl.load(blocks + 2 * most_blocks + block)
        tell(number, tiles, told, heard, expert, start, height, tile)
        number += 1
        index = gl.num_programs(0) + gl.atomic_add(ticket, 1)

        row0 = tile * SPAN
        first_row = expert * (HALVES * ROWS) + row0
        second_row = first_row + (ROWS if HALVES == 2 else BLOCK_N)
        if HALVES == 2:
            rows = gl.arange(0, ROWS_OF_GROUP, gl.SliceLayout(1, GATHER))
            columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, GATHER))[None, :]
            low = gl.load(order + start + gl.minimum(rows, height - 1)) // TOPK
            high = gl.load(order + start + gl.minimum(rows + ROWS_OF_GROUP, height - 1)) // TOPK
            low_at = a + low.to(gl.int64)[:, None] * DEPTH + columns
            high_at = a + high.to(gl.int64)[:, None] * DEPTH + columns
        if SCALED:
            position = start + gl.minimum(gl.arange(0, 2 * ROWS_OF_GROUP, FLAT), height - 1)
            if HALVES == 2:
                x_at = a_scale + gl.load(order + position) // TOPK
            else:
                x_at = a_scale + position
            half = gl.arange(0, 2, FLAT)
            s_at = w_scale + expert.to(gl.int64) * (HALVES * PER_HALF * PER_ROW)
            if HALVES == 2:
                s_at = s_at + (half * PER_HALF + row0 // GROUP) * PER_ROW
            else:
                s_at = s_at + gl.minimum(row0 + half * BLOCK_N, ROWS - 1) // GROUP * PER_ROW

        for k in range(0, DEPTH, BLOCK_K):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            if HALVES == 2:
                mbarrier.expect(ready, W_BYTES)
            elif height > ROWS_OF_GROUP:
                mbarrier.expect(ready, W_BYTES + 2 * A_BYTES)
            else:
                mbarrier.expect(ready, W_BYTES + A_BYTES)
            copy_tile(w_desc, [first_row, k], ready, w_ring.index(2 * stage))
            copy_tile(w_desc, [second_row, k], ready, w_ring.index(2 * stage + 1))
            if HALVES == 2:
                copy_rows(a_ring.index(2 * stage), low_at + k)
                if height > ROWS_OF_GROUP:
                    copy_rows(a_ring.index(2 * stage + 1), high_at + k)
            else:
                copy_tile(a_desc, [start, k], ready, a_ring.index(2 * stage))
                if height > ROWS_OF_GROUP:
                    copy_tile(a_desc, [start + ROWS_OF_GROUP, k], ready, a_ring.index(2 * stage + 1))
            if SCALED:
                group = k // GROUP
                copy_rows(x_ring.index(stage), x_at + group.to(gl.int64) * a_scale_stride)
                copy_rows(s_ring.index(stage), s_at + group)
            if HALVES == 2 or SCALED:
                async_copy.mbarrier_arrive(ready, increment_count=False)  # each thread, once its copies are there
            step += 1
    tell(number, tiles, told, heard, 0, 0, 0, 0)


@gluon.jit
def contract(step, a_ring, w_ring, x_ring, s_ring, full, empty, MEMBER: gl.constexpr, GATHERED: gl.constexpr,
             DEPTH: gl.constexpr, SCALED: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
             ACC: gl.constexpr, BLOCK_N: gl.constexpr):
    """This group's rows times both halves of a tile's weights, dequantised: [64, BLOCK_N] float32 twice, and the step
    after the last."""
    zero = gl.zeros([ROWS_OF_GROUP, BLOCK_N], gl.float32, ACC)
    first = zero
    second = zero
    p = zero  # what the matrix unit makes: one set of registers, whose first value is never read
    for k in range(0, DEPTH, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if GATHERED:
            hopper.fence_async_shared()  # rows came by ordinary copies; the matrix unit reads by another way
        a = a_ring.index(2 * stage + MEMBER)
        w = w_ring.index(2 * stage).permute((1, 0))
        v = w_ring.index(2 * stage + 1).permute((1, 0))
        if SCALED:
            p = hopper.warpgroup_mma(a, w, p, use_acc=False, is_async=True)
            x = x_ring.index(stage).slice(ROWS_OF_GROUP * MEMBER, ROWS_OF_GROUP).load(gl.SliceLayout(1, ACC))
            w_factor = (x * s_ring.index(stage).slice(0, 1).load(gl.SliceLayout(1, ACC)))[:, None]
            v_factor = (x * s_ring.index(stage).slice(1, 1).load(gl.SliceLayout(1, ACC)))[:, None]
            p = hopper.warpgroup_mma_wait(0, deps=(p,))
            first += p * w_factor
            p = hopper.warpgroup_mma(a, v, p, use_acc=False, is_async=True)
            p = hopper.warpgroup_mma_wait(0, deps=(p,))
            mbarrier.arrive(empty.index(stage))
            second += p * v_factor
        else:
            first = hopper.warpgroup_mma(a, w, first, is_async=True)
            second = hopper.warpgroup_mma(a, v, second, is_async=True)
            first, second = hopper.warpgroup_mma_wait(2, deps=(first, second))  # those of the step before
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if not SCALED:
        first, second = hopper.warpgroup_mma_wait(0, deps=(first, second))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return first, second, step


@gluon.jit
def skip(step, full, empty, DEPTH: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """The steps of a tile in which this group has no rows."""
    for _ in range(0, DEPTH, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        mbarrier.arrive(empty.index(stage))
        step += 1
    return step


@gluon.jit
def compute_up(w13_bias, topk_weights, order, act, act_scale, num_routes, a_ring, w_ring, x_ring, s_ring, full, empty,
               tiles, told, heard, MEMBER: gl.constexpr, HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr,
               ACTIVATION: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
               STAGES: gl.constexpr):
    """The MEMBER-th group that computes, in the first product."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    OUT: gl.constexpr = gl.BlockedLayout([1, 16], [32 // (BLOCK_N // 16), BLOCK_N // 16], [4, 1], [1, 0])
    step = 0
    number = 1
    expert, start, height, tile = hear(0, tiles, told, heard)
    while height > 0:
        if height > ROWS_OF_GROUP * MEMBER:
            gate, up, step = contract(step, a_ring, w_ring, x_ring, s_ring, full, empty, MEMBER, True, HIDDEN, True,
                                      BLOCK_K, STAGES, ACC, BLOCK_N)
            row0 = tile * BLOCK_N
            rows = ROWS_OF_GROUP * MEMBER + gl.arange(0, ROWS_OF_GROUP, gl.SliceLayout(1, ACC))
            live = rows < height
            columns = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ACC))
            inside = columns < INTERMEDIATE
            if w13_bias is not None:
                at = w13_bias + expert.to(gl.int64) * (2 * INTERMEDIATE) + columns
                gate += widen(gl.load(at, mask=inside, other=0.0))[None, :]
                up += widen(gl.load(at + INTERMEDIATE, mask=inside, other=0.0))[None, :]
            if WEIGHT_ON_INPUT:
                routes = gl.load(order + start + rows, mask=live, other=0)
                weight = widen(gl.load(topk_weights + routes, mask=live, other=0.0))[:, None]
                gate *= weight
                up *= weight
            y = activate(gate, up, ACTIVATION, True)
            scale = scale_of(gl.max(gl.where(inside[None, :], gl.abs(y), 0.0), axis=1), "fp8")
            gl.store(act_scale + tile.to(gl.int64) * num_routes + start + rows, scale, mask=live)
            z = gl.convert_layout(quantised(y, scale[:, None], "fp8"), OUT)
            rows = ROWS_OF_GROUP * MEMBER + gl.arange(0, ROWS_OF_GROUP, gl.SliceLayout(1, OUT))
            columns = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT))
            to = act + (start + rows).to(gl.int64)[:, None] * INTERMEDIATE + columns[None, :]
            gl.store(to, z, mask=(rows < height)[:, None] & (columns < INTERMEDIATE)[None, :])
        else:
            step = skip(step, full, empty, HIDDEN, BLOCK_K, STAGES)
        expert, start, height, tile = hear(number, tiles, told, heard)
        number += 1


@gluon.jit
def compute_down(w2_bias, topk_weights, order, result, row_scale, a_ring, w_ring, x_ring, s_ring, full, empty, tiles,
                 told, heard, MEMBER: gl.constexpr, HIDDEN: gl.constexpr, INTERMEDIATE: gl.constexpr,
                 SCALED: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
                 STAGES: gl.constexpr):
    """The MEMBER-th group that computes, in the second product."""
    SPAN: gl.constexpr = 2 * BLOCK_N
    TILES_N: gl.constexpr = (HIDDEN + SPAN - 1) // SPAN
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32 if SCALED else 16])
    AT_ONCE: gl.constexpr = 128 // result.dtype.element_ty.primitive_bitwidth
    WIDE: gl.constexpr = BLOCK_N // AT_ONCE
    OUT: gl.constexpr = gl.BlockedLayout([1, AT_ONCE], [32 // WIDE, WIDE], [4, 1], [1, 0])
    step = 0
    number = 1
    expert, start, height, tile = hear(0, tiles, told, heard)
    while height > 0:
        if height > ROWS_OF_GROUP * MEMBER:
            rows = ROWS_OF_GROUP * MEMBER + gl.arange(0, ROWS_OF_GROUP, gl.SliceLayout(1, ACC))
            live = rows < height
            routes = gl.load(order + start + rows, mask=live, other=0)
            factor = gl.full([ROWS_OF_GROUP], 1.0, gl.float32, gl.SliceLayout(1, ACC))
            if not WEIGHT_ON_INPUT:
                factor = widen(gl.load(topk_weights + routes, mask=live, other=0.0))
            y, z, step = contract(step, a_ring, w_ring, x_ring, s_ring, full, empty, MEMBER, False, INTERMEDIATE,
                                  SCALED, BLOCK_K, STAGES, ACC, BLOCK_N)
            row0 = tile * SPAN
            columns = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ACC))
            if w2_bias is not None:
                at = w2_bias + expert.to(gl.int64) * HIDDEN + columns
                y += widen(gl.load(at, mask=columns < HIDDEN, other=0.0))[None, :]
                z += widen(gl.load(at + BLOCK_N, mask=columns + BLOCK_N < HIDDEN, other=0.0))[None, :]
            if row_scale is not None:  # as in grouped.py; columns past the end are another expert's
                most = gl.max(gl.where((columns < HIDDEN)[None, :], gl.abs(y), 0.0), axis=1)
                most = gl.maximum(most, gl.max(gl.where((columns + BLOCK_N < HIDDEN)[None, :], gl.abs(z), 0.0), axis=1))
                exponent = row_exponent(most * gl.abs(factor))
                gl.store(row_scale + routes.to(gl.int64) * TILES_N + tile, exponent, mask=live)
                factor = factor * (1.0 / exponent)
            y = gl.convert_layout(narrow(y * factor[:, None], result.dtype.element_ty), OUT)
            z = gl.convert_layout(narrow(z * factor[:, None], result.dtype.element_ty), OUT)
            rows = ROWS_OF_GROUP * MEMBER + gl.arange(0, ROWS_OF_GROUP, gl.SliceLayout(1, OUT))
            live = rows < height
            routes = gl.load(order + start + rows, mask=live, other=0).to(gl.int64)
            columns = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT))
            to = result + routes[:, None] * HIDDEN + columns[None, :]
            gl.store(to, y, mask=live[:, None] & (columns < HIDDEN)[None, :])
            gl.store(to + BLOCK_N, z, mask=live[:, None] & (columns + BLOCK_N < HIDDEN)[None, :])
        else:
            step = skip(step, full, empty, INTERMEDIATE, BLOCK_K, STAGES)
        expert, start, height, tile = hear(number, tiles, told, heard)
        number += 1


@gluon.jit(do_not_specialize=["num_tokens", "num_routes", "most_blocks"])
def persistent_up(hidden, hidden_scale, w13, w13_scale, w13_bias, topk_weights, order, blocks, num_blocks, act,
                  act_scale, num_tokens, num_routes, most_blocks, ticket, TOPK: gl.constexpr, HIDDEN: gl.constexpr,
                  INTERMEDIATE: gl.constexpr, GROUP: gl.constexpr, ACTIVATION: gl.constexpr,
                  WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
                  STAGES: gl.constexpr, DEPENDENT: gl.constexpr):
    """act, act_scale as grouped_up's, of fp8 blocks; `ticket` [1] int32 is 0. Grid: the multiprocessors."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    LAYOUT: gl.constexpr = w13.layout
    a_ring, w_ring, x_ring, s_ring, full, empty, tiles, told, heard = allocate(
        hidden.dtype.element_ty, LAYOUT, 1 + LOADERS, BLOCK_N, BLOCK_K, STAGES)
    gl.warp_specialize([
        (compute_up, (w13_bias, topk_weights, order, act, act_scale, num_routes, a_ring, w_ring, x_ring, s_ring, full,
                      empty, tiles, told, heard, 0, HIDDEN, INTERMEDIATE, ACTIVATION, WEIGHT_ON_INPUT, BLOCK_N,
                      BLOCK_K, STAGES)),
        (compute_up, (w13_bias, topk_weights, order, act, act_scale, num_routes, a_ring, w_ring, x_ring, s_ring, full,
                      empty, tiles, told, heard, 1, HIDDEN, INTERMEDIATE, ACTIVATION, WEIGHT_ON_INPUT, BLOCK_N,
                      BLOCK_K, STAGES)),
        (load, (hidden, None, hidden_scale, num_tokens, w13, w13_scale, order, blocks, num_blocks, most_blocks, ticket,
                a_ring, w_ring, x_ring, s_ring, full, empty, tiles, told, heard, TOPK, 2, HIDDEN, INTERMEDIATE, True,
                GROUP, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
    ], [4, 4], [COMPUTE_REGISTERS, LOAD_REGISTERS])


@gluon.jit(do_not_specialize=["num_routes", "most_blocks"])
def persistent_down(act, act_read, act_scale, w2, w2_scale, w2_bias, topk_weights, order, blocks, num_blocks, result,
                    row_scale, num_routes, most_blocks, ticket, TOPK: gl.constexpr, HIDDEN: gl.constexpr,
                    INTERMEDIATE: gl.constexpr, SCALED: gl.constexpr, GROUP: gl.constexpr,
                    WEIGHT_ON_INPUT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
                    GROUP_M: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr):
    """result, row_scale as grouped_down's, the latter [R, tiles of 2 * BLOCK_N]; act_read describes act; `ticket` [1]
    int32 is 0. Grid: the multiprocessors."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    LAYOUT: gl.constexpr = w2.layout
    a_ring, w_ring, x_ring, s_ring, full, empty, tiles, told, heard = allocate(
        act.dtype.element_ty, LAYOUT, 1 + (LOADERS if SCALED else 0), BLOCK_N, BLOCK_K, STAGES)
    gl.warp_specialize([
        (compute_down, (w2_bias, topk_weights, order, result, row_scale, a_ring, w_ring, x_ring, s_ring, full, empty,
                        tiles, told, heard, 0, HIDDEN, INTERMEDIATE, SCALED, WEIGHT_ON_INPUT, BLOCK_N, BLOCK_K,
                        STAGES)),
        (compute_down, (w2_bias, topk_weights, order, result, row_scale, a_ring, w_ring, x_ring, s_ring, full, empty,
                        tiles, told, heard, 1, HIDDEN, INTERMEDIATE, SCALED, WEIGHT_ON_INPUT, BLOCK_N, BLOCK_K,
                        STAGES)),
        (load, (act, act_read, act_scale, num_routes, w2, w2_scale, order, blocks, num_blocks, most_blocks, ticket,
                a_ring, w_ring, x_ring, s_ring, full, empty, tiles, told, heard, TOPK, 1, INTERMEDIATE, HIDDEN, SCALED,
                GROUP, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
    ], [4, 4], [COMPUTE_REGISTERS, LOAD_REGISTERS])
