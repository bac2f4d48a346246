"""moe.topk in one Triton launch for few experts and many tokens: Mixtral's router and its like.

Serves 2 to 32 experts in one group, one or two slots, no fused shared experts, renormalised weights; sigmoid,
sqrtsoftplus or softmax, with or without a bias except that softmax has none; logits and bias of float32, bfloat16 or
float16; any strides, contiguous logits faster than others. Its results are triton_router's, bit for bit.
The kernel is in few_experts_kernel.py; here is what it is compiled with.
"""

from __future__ import annotations

import torch
import triton

from .checks import make_checks
from .few_experts_kernel import few_experts_kernel
from .kept_launch import kept_launch
from .route import INTERPRETED, make_route


def topk(*, num_experts, topk, num_fused_shared_experts=0, scoring="sigmoid", has_bias=True, dtype="float32",
         bias_dtype="float32", platform=None, rows_per_program=128, dependent_launch=False, **_):
    """A kernel with moe.topk's signature for these traits.

    Its options change how fast it is at which sizes, and no result:
    rows_per_program  tokens that one program routes, a power of two from 16 to 256: two threads each, or four where
                      there are more than 16 experts
    dependent_launch  "early": on sm_90 and later, a programmatic dependent launch, as triton_router has it. false, and
                      on other platforms: an ordinary launch
    """
    check = make_checks(num_experts=num_experts, num_fused_shared_experts=0, has_bias=has_bias, dtype=dtype,
                        bias_dtype=bias_dtype)
    if rows_per_program not in (16, 32, 64, 128, 256):
        raise ValueError(f"rows_per_program={rows_per_program} is not 16, 32, 64, 128 or 256")
    if dependent_launch not in (None, False, "early"):
        raise ValueError(f"dependent_launch={dependent_launch!r} is not early or false")
    on_cuda = not INTERPRETED and platform is not None and platform.kind == "cuda"
    dependent = dependent_launch or None if on_cuda and platform.arch >= (9, 0) else None
    places = triton.next_power_of_2(num_experts)
    lanes = max(2, places // 8)
    per = places // lanes
    constants = dict(
        SCORING=scoring, NUM_EXPERTS=num_experts, TOPK=topk, ROWS=rows_per_program, LANES=lanes, PER=per,
        DEPENDENT=dependent, PTX=torch.version.cuda is not None and not INTERPRETED)
    # AMD's accelerators have warps of 64; its graphics parts, and what came after gfx9, have 32.
    wave = 64 if platform is not None and platform.kind == "hip" and platform.arch < (10,) else 32
    options = dict(num_warps=max(1, rows_per_program * lanes // wave), num_stages=1)
    if dependent:
        options["launch_pdl"] = True  # which only NVIDIA's back end knows
    widest = min(16 // getattr(torch, dtype).itemsize, per, num_experts & -num_experts)  # a power of two: row by row
    dense = kept_launch(few_experts_kernel, {**constants, "WIDTH": widest, "DENSE": True}, options)
    strided = kept_launch(few_experts_kernel, {**constants, "WIDTH": 1, "DENSE": False}, options)

    def by_strides(programs, logits, bias, weights, ids, num_valid, expert_map, num_tokens, row_stride, column_stride,
                   *factors):
        launch = dense if (row_stride, column_stride) == (num_experts, 1) else strided
        launch(programs, logits, bias, weights, ids, num_valid, expert_map, num_tokens, row_stride, column_stride,
               *factors)

    return make_route(check, num_experts, topk, rows_per_program, by_strides, by_strides)
