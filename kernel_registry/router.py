"""A router and the correction bias that it reads: bound, and prepared where that is needed, once, at load.

    route = moe_router(gate.e_score_correction_bias, num_experts=256, topk=8, dtype="bfloat16")
    topk_weights, topk_ids = route(router_logits, gate.e_score_correction_bias)

The bias stays as the checkpoint has it wherever a router, the reference among them, takes it so: then nothing is done
to it. Only where none does (an override, `implementation`, a registry of one's own) is it given a dtype that the chosen
router takes, by `moe.routing_bias`, which refuses to change a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import Registry, registry as shipped

if TYPE_CHECKING:
    from .bound import BoundKernel

TOPK, ROUTING_BIAS = "moe.topk", "moe.routing_bias"
_DTYPES = ("float32", "bfloat16", "float16")  # what a bias can be given, widest first


def moe_router(bias, *, registry: Registry = shipped, narrow: bool = False, implementation: str | None = None,
               **traits) -> "BoundKernel":
    """The `moe.topk` kernel for these traits, or the `implementation` of it, with `bias` in the dtype that it takes:
    its own wherever that is served. `narrow` allows that values change. Raises what the dispatch of the bias as it is
    raises where none of the dtypes is served."""
    from .errors import TraitError
    from .selection import REFUSALS
    from .traits.dtype import dtype_name

    if "bias_dtype" in traits:
        raise TraitError("bias_dtype follows from the bias and the router", where=TOPK, hint="drop it")
    if bias is None:
        raise TraitError("moe_router got no bias", where=TOPK,
                         hint=f"a router without one needs no preparation: bind {TOPK!r} with has_bias=False")
    own, refusal = dtype_name(bias.dtype), None
    for dtype in dict.fromkeys((own, *_DTYPES)):
        try:
            route = registry.bind(TOPK, implementation=implementation, bias_dtype=dtype, **traits)
        except REFUSALS as error:
            refusal = refusal or error
            continue
        if dtype != own:
            registry.prepare(ROUTING_BIAS, bias, bias_dtype=dtype, narrow=narrow, **traits)
        return route
    raise refusal
