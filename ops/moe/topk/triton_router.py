"""moe.topk in one Triton launch: scores, bias, groups, top-k, weights, shared slots, map, padding.

Serves sigmoid and sqrtsoftplus with or without a bias, and softmax without one; any number of experts up to 1024, in
one group or in 2 to 32 groups of 2 or more; up to 32 slots; logits and bias of float32, bfloat16 or float16; any
strides.
The kernel is in router_kernel.py; here is what it is compiled with.
"""

from __future__ import annotations

import torch
import triton

from .checks import make_checks
from .kept_launch import kept_launch
from .packed import list_depth
from .route import INTERPRETED, make_route
from .router_kernel import router_kernel


def topk(*, num_experts, topk, num_expert_group=1, topk_group=1, num_fused_shared_experts=0, scoring="sigmoid",
         has_bias=True, renormalize=True, dtype="float32", bias_dtype="float32", platform=None, rows_per_program=1,
         dependent_launch=False, max_registers=None, **_):
    """A kernel with moe.topk's signature for these traits.

    Its options change how fast it is at which sizes, and no result:
    rows_per_program  tokens that one warp routes before it finishes them together: 1, 2, 4, 8 or 16, as many as have
                      room for their slots in 32 lanes
    dependent_launch  "early" or "late": on sm_90 and later, a programmatic dependent launch. The kernel's programs take
                      their places while the kernel before it (say, the one that makes the logits) still runs, and wait
                      there before they read anything; the next such kernel may take its places at once, or when this
                      one's experts are chosen. false, and on other platforms: an ordinary launch
    max_registers     for NVIDIA's compiler, per thread: fewer leave room for more programs at a time
    """
    check = make_checks(num_experts=num_experts, num_fused_shared_experts=num_fused_shared_experts, has_bias=has_bias,
                        dtype=dtype, bias_dtype=bias_dtype)
    slots = triton.next_power_of_2(topk)
    if rows_per_program not in (1, 2, 4, 8, 16) or rows_per_program * slots > 32:
        raise ValueError(f"rows_per_program={rows_per_program} does not fit topk={topk}: rows * slots is at most 32")
    if dependent_launch not in (None, False, "early", "late"):
        raise ValueError(f"dependent_launch={dependent_launch!r} is not early, late or false")
    on_cuda = not INTERPRETED and platform is not None and platform.kind == "cuda"
    dependent = dependent_launch or None if on_cuda and platform.arch >= (9, 0) else None
    # A group's score is the sum of its two best; those kept have two good ones each, so the best of all are spread more
    # evenly over the lanes than at random.
    summed = has_bias and topk_group < num_expert_group
    group_lanes = 32 // triton.next_power_of_2(num_expert_group)
    tile_rows = 16 if INTERPRETED else 1
    constants = dict(
        SCORING=scoring, NUM_EXPERTS=num_experts, TOPK=topk, GROUPS=num_expert_group, TOPK_GROUP=topk_group,
        NUM_SHARED=num_fused_shared_experts, RENORMALIZE=bool(renormalize), WIDEST=16 // getattr(torch, dtype).itemsize,
        GROUP_LANES=group_lanes, SLOTS=slots, TILES=rows_per_program, ROWS=tile_rows, DEPENDENT=dependent,
        DEPTH=list_depth(topk - num_fused_shared_experts, group_lanes * topk_group,
                         -(-num_experts // (num_expert_group * group_lanes)), least=2 if summed else 1,
                         rare=2e-4 if summed else 1e-4),
        PTX=torch.version.cuda is not None and not INTERPRETED)
    options = dict(num_warps=1, num_stages=1)
    if dependent:
        options["launch_pdl"] = True  # which only NVIDIA's back end knows, as the next
    if max_registers and on_cuda:
        options["maxnreg"] = max_registers
    plain, mapping_shared = (kept_launch(router_kernel, {**constants, "MAP_SHARED": mapped}, options)
                             for mapped in (False, True))
    return make_route(check, num_experts, topk, rows_per_program * tile_rows, plain, mapping_shared)
