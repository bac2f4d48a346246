"""moe.experts in two Triton launches, for few tokens: no sorting, and the sum over slots inside of the second.

Serves unquantised weights and fp8_block. The kernels are in few_tokens.py and, for fp8_block with `matrix_unit`, in
few_tokens_dot.py; here is what they are compiled with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import few_tokens, few_tokens_dot
from .checks import make_checks
from .launch import INTERPRETED, dependent_launch, launch_of, on_gpu, ptx

_ROUNDED = {"bfloat16": tl.bfloat16, "float16": tl.float16}


def experts(*, num_experts, topk, hidden_size, intermediate_size, dtype="bfloat16", weight_quant="none",
            act_quant="none", group_size=128, activation="silu", has_bias=False, apply_router_weight_on_input=False,
            expert_parallel=False, output_alias=False, platform=None, matrix_unit=False, **_):
    """A kernel with moe.experts's signature for these traits. matrix_unit: whether products are its, or elementwise."""
    check = make_checks(num_experts=num_experts, topk=topk, hidden_size=hidden_size,
                        intermediate_size=intermediate_size, dtype=dtype, weight_quant=weight_quant,
                        act_quant=act_quant, group_size=group_size, activation=activation, has_bias=has_bias,
                        expert_parallel=expert_parallel, output_alias=output_alias)
    blocks = weight_quant == "fp8_block"
    dependent = dependent_launch(platform)
    pdl = {"launch_pdl": True} if dependent else {}
    shared = dict(TOPK=topk, NUM_EXPERTS=num_experts, HIDDEN=hidden_size, INTERMEDIATE=intermediate_size,
                  GROUP=group_size, WEIGHT_ON_INPUT=apply_router_weight_on_input, DEPENDENT=dependent, **pdl)
    if matrix_unit:
        first, second = few_tokens_dot.pair_up_dot, few_tokens_dot.pair_down_dot
        up, down = _matrix_tiles(topk, intermediate_size, group_size)
        if not ptx(platform):
            down.pop("maxnreg", None)  # which NVIDIA's compiler alone knows
    else:
        first, second = few_tokens.pair_up, few_tokens.pair_down
        up, down = _elementwise_tiles(blocks, hidden_size, intermediate_size, group_size)
        shared["FORMAT"] = weight_quant
        up["ROUND"] = None if blocks else _ROUNDED[dtype]
    columns_up, columns_down = -(-intermediate_size // up["BLOCK_N"]), -(-hidden_size // down["BLOCK_N"])
    first = launch_of(first, INTERLEAVED=activation == "swigluoai", ACTIVATION=activation, PTX=ptx(platform), **up,
                      **shared)
    second = launch_of(second, SLOTS=triton.next_power_of_2(topk), **down, **shared)

    def kernel(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
               a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None):
        tokens = check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale,
                       w13_bias, w2_bias, expert_map, out)
        device = hidden_states.device
        if out is None:
            out = torch.empty_like(hidden_states)
        if tokens == 0:
            return out
        map_size = 0 if expert_map is None else expert_map.shape[0]
        routes = tokens * topk
        act = torch.empty((routes, intermediate_size), dtype=torch.float32, device=device)
        with on_gpu(device):
            first((routes, columns_up), hidden_states, hidden_size, w13, w13_scale, w13_bias, topk_weights, topk_ids,
                  expert_map, map_size, act)
            second((tokens, columns_down), act, w2, w2_scale, w2_bias, topk_weights, topk_ids, expert_map, map_size,
                   out, out.stride(0))
        return out

    return kernel


def _matrix_tiles(topk: int, intermediate_size: int, group: int) -> tuple[dict, dict]:
    """Launch parameters of few_tokens_dot.py's kernels: what was fastest on an H200 (docs/benchmarks.md)."""
    slots = triton.next_power_of_2(topk)
    parts = max(2, 16 // slots)  # with the slots, the columns that a matrix unit multiplies anyhow
    up = dict(BLOCK_N=32, PARTS=2, STAGES=4, num_warps=4)
    down = dict(BLOCK_N=128 // (slots * parts), PARTS=parts, STAGES=4)
    if group == 128 and slots * intermediate_size <= 8 * 1536:
        return up, {**down, "num_warps": 4, "maxnreg": 168}  # so that a multiprocessor holds three programs
    return up, {**down, "num_warps": 8}  # the registers of four warps do not hold the activations


def _elementwise_tiles(blocks: bool, hidden_size: int, intermediate_size: int, group: int) -> tuple[dict, dict]:
    """The same of few_tokens.py's."""
    if INTERPRETED:  # which takes as long over a small tile as over a large one
        wide = max(group, 128)
        return (dict(BLOCK_N=group // 2 if blocks else 128, BLOCK_K=wide, STAGES=1, num_warps=4),
                dict(BLOCK_N=group if blocks else 128, BLOCK_K=wide, num_warps=4))
    if blocks:
        return (dict(BLOCK_N=4, BLOCK_K=1024, STAGES=1, num_warps=4), dict(BLOCK_N=8, BLOCK_K=128, num_warps=4))
    up = dict(BLOCK_N=2, BLOCK_K=1024, STAGES=1, num_warps=4) if hidden_size % 1024 == 0 else \
        dict(BLOCK_N=8, BLOCK_K=256, STAGES=4, num_warps=4)
    return up, dict(BLOCK_N=8, BLOCK_K=256, num_warps=8 if intermediate_size <= 1024 else 4)
