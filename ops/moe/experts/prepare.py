"""The first launch of the grouped way: routes are aligned and, where the format asks for it, hidden rows quantised.

Neither needs the other, so they share a launch: the first programs align, each of the rest quantises one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..casts import widen
from .align import count_chunk, list_blocks, place_routes
from .arithmetic import largest_of, quantised, scale_of


@triton.jit
def quantise_row(token, hidden, row_stride, quantised_hidden, hidden_scale, static_scale, num_tokens,
                 HIDDEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ACT_QUANT: tl.constexpr,
                 KIND: tl.constexpr):
    """Quantises hidden[token]. hidden_scale is [groups, T] for a block format, [T] for a token one."""
    columns = tl.arange(0, BLOCK)
    live = columns < HIDDEN
    x = tl.load(hidden + token.to(tl.int64) * row_stride + columns, mask=live, other=0.0)
    x = widen(x)
    if ACT_QUANT == "fp8_block":
        GROUPS: tl.constexpr = BLOCK // GROUP
        x = tl.reshape(x, [GROUPS, GROUP])
        scale = scale_of(tl.max(tl.abs(x), axis=1), KIND)
        groups = tl.arange(0, GROUPS)
        tl.store(hidden_scale + groups.to(tl.int64) * num_tokens + token, scale, mask=groups * GROUP < HIDDEN)
        x = tl.reshape(quantised(x, scale[:, None], KIND), [BLOCK])
    elif static_scale is not None:
        x = quantised(x, tl.load(static_scale), KIND)
    else:
        scale = scale_of(largest_of(x, KIND), KIND)
        tl.store(hidden_scale + token, scale)
        x = quantised(x, scale, KIND)
    tl.store(quantised_hidden + token.to(tl.int64) * HIDDEN + columns, x, mask=live)


@triton.jit(do_not_specialize=["map_size", "num_tokens", "num_routes", "most_blocks", "align_programs"])
def prepare(topk_ids, expert_map, map_size, order, blocks, num_blocks, counts, tickets, hidden, row_stride,
            quantised_hidden, hidden_scale, static_scale, num_tokens, num_routes, most_blocks, align_programs,
            NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
            ROWS: tl.constexpr, CHUNK: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
            ACT_QUANT: tl.constexpr, KIND: tl.constexpr, FEW: tl.constexpr, DEPENDENT: tl.constexpr):
    """Grid: align_programs (FEW: 1 + NUM_EXPERTS; else one a chunk), and T more where ACT_QUANT is not "none".
    `tickets` [2] int32, of both products, become 0."""
    program = tl.program_id(0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if program == 0:
        tl.store(tickets + tl.arange(0, 2), 0)
    if program < align_programs:
        if not FEW:
            count_chunk(program, topk_ids, expert_map, map_size, counts, num_routes, NUM_EXPERTS, BINS, CHUNK)
        elif program == 0:
            list_blocks(topk_ids, expert_map, map_size, blocks, num_blocks, num_routes, most_blocks, NUM_EXPERTS, BINS,
                        BLOCK_M, STEP)
        else:
            place_routes(program - 1, topk_ids, expert_map, map_size, order, num_routes, NUM_EXPERTS, STEP, ROWS)
    elif ACT_QUANT != "none":
        quantise_row(program - align_programs, hidden, row_stride, quantised_hidden, hidden_scale, static_scale,
                     num_tokens, HIDDEN, BLOCK, GROUP, ACT_QUANT, KIND)


@triton.jit(do_not_specialize=["num_rows"])
def quantise_rows(rows, result, scale, num_rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
                  DEPENDENT: tl.constexpr):
    """Quantises each row [COLUMNS] float32 with a scale of its own. Grid: num_rows."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    quantise_row(tl.program_id(0), rows, COLUMNS, result, scale, None, num_rows, COLUMNS, BLOCK, BLOCK, "token", KIND)
