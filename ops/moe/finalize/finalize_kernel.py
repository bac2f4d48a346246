"""The kernel: BLOCK columns of one token's output a program.

It is bound by memory, so what counts is how many loads are under way at once: first the ids of all slots are loaded,
then all entries of the map, then all rows, and only then is anything added. A slot that is not local is masked out of
its loads: they are not made. Each column is one thread's, so the sum has one order, whatever BLOCK is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import casts


@triton.jit
def slot_experts(ids, expert_map, map_size, TOPK: tl.constexpr):
    """The expert of each of a token's slots as this rank counts them; `ids` points to the token's."""
    experts = ()
    for slot in tl.static_range(TOPK):
        experts = experts + (tl.load(ids + slot),)
    if expert_map is not None:
        mapped = ()
        for slot in tl.static_range(TOPK):
            expert = experts[slot]
            mapped = mapped + (tl.load(expert_map + expert, mask=(expert >= 0) & (expert < map_size), other=-1),)
        experts = mapped
    return experts


@triton.jit(do_not_specialize=["map_size"])
def finalize_kernel(
    rows, weights, ids, shared, expert_map, out, map_size, routed_scaling_factor,
    row_token, row_slot, row_column, shared_token, shared_column, out_token, out_column,
    TOPK: tl.constexpr, NUM_EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr,
):
    """rows [T, TOPK, HIDDEN]; weights [T, TOPK] or None and ids [T, TOPK] or None, contiguous; shared [T, HIDDEN] or
    None; expert_map [map_size] or None; out [T, HIDDEN]; then the strides. DENSE: those of columns are 1."""
    token = tl.program_id(0).to(tl.int64)  # times a stride: past 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    if not DENSE:
        column = column.to(tl.int64)
    if ids is not None:
        experts = slot_experts(ids + token * TOPK, expert_map, map_size, TOPK)
    row = rows + token * row_token
    loaded = ()
    factors = ()
    for slot in tl.static_range(TOPK):
        if ids is not None:
            expert = experts[slot]
            if weights is not None:
                local = (expert >= 0) & (expert < NUM_EXPERTS)
                factors = factors + (tl.load(weights + token * TOPK + slot, mask=local, other=0.0),)
            expert = tl.broadcast_to(expert, [BLOCK])  # the interpreter can't broadcast a mask
            read = inside & (expert >= 0) & (expert < NUM_EXPERTS)
            loaded = loaded + (tl.load(row + column * row_column, mask=read, other=0.0),)
        else:
            loaded = loaded + (tl.load(row + column * row_column, mask=inside, other=0.0),)
            if weights is not None:
                factors = factors + (tl.load(weights + token * TOPK + slot),)
        row += row_slot  # step by step: slot * row_slot may be past 2^31 where row_slot is not
    if shared is not None:
        beside = tl.load(shared + token * shared_token + column * shared_column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOPK):
        if weights is not None:
            total = total + casts.widen(loaded[slot]) * casts.widen(factors[slot])
        else:
            total = total + casts.widen(loaded[slot])
    total = total * routed_scaling_factor
    if shared is not None:
        total = total + casts.widen(beside)
    tl.store(out + token * out_token + column * out_column, casts.narrow(total, out.dtype.element_ty), mask=inside)
