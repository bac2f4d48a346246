"""moe.topk in one Triton launch for routers of one group: sigmoid, bias, top-k, weights, shared slots, map, padding.

Serves 2 to 1024 experts (any number), up to 32 slots, logits and bias of float32, bfloat16 or float16, any strides.
MiniMax-M2, Kimi-K2, GLM-4.5 and most current models route like this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_common as common
from .launch import make_launcher


@triton.jit(do_not_specialize=["num_tokens"])
def single_group_kernel(
    logits, bias, weights_out, ids_out, num_valid, expert_map, num_tokens, row_stride, column_stride,
    routed_scaling_factor, shared_expert_weight,
    NUM_EXPERTS: tl.constexpr, TOPK: tl.constexpr, NUM_SHARED: tl.constexpr, RENORMALIZE: tl.constexpr,
    MAP_SHARED: tl.constexpr, WIDEST: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):
    ROUTED: tl.constexpr = TOPK - NUM_SHARED
    MASK_ROWS: tl.constexpr = ROWS > 1 or num_valid is not None
    biases = common.load_bias(bias, 1, NUM_EXPERTS, 32, WIDEST)
    valid = num_tokens
    if num_valid is not None:
        valid = tl.maximum(tl.minimum(tl.load(num_valid), num_tokens), 0).to(tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)  # times a stride, it may pass 2^31
        inside = rows < num_tokens
        live = rows < valid
        keys, ids = common.load_choices(logits, biases, rows, live, row_stride, column_stride, 1, NUM_EXPERTS,
                                        32, ROWS, WIDEST, MASK_ROWS, PTX)
        keys, ids = common.sort_lanes(keys, ids)
        chosen = common.select(keys, ids, ROUTED, ROWS)
        score = common.chosen_scores(logits, chosen, rows, live, row_stride, column_stride, ROUTED, MASK_ROWS)
        common.finish(chosen, score, rows, live, inside, weights_out, ids_out, expert_map, routed_scaling_factor,
                      shared_expert_weight, NUM_EXPERTS, TOPK, NUM_SHARED, RENORMALIZE, MAP_SHARED, MASK_ROWS)


def topk(*, num_experts, topk, num_fused_shared_experts=0, renormalize=True, dtype="float32", bias_dtype="float32", **_):
    """A kernel with moe.topk's signature for these traits."""
    return make_launcher(single_group_kernel, num_experts=num_experts, topk=topk, renormalize=renormalize, dtype=dtype,
                         num_fused_shared_experts=num_fused_shared_experts, bias_dtype=bias_dtype)
