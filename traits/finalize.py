"""The traits of moe.finalize, the end of a mixture-of-experts layer, with the neutral value of each.

Sizes, and that the caller brings `out`, are *performance* traits; what changes the result is *semantic*.
"""

from __future__ import annotations

from .experts import EXPERT_PARALLEL, HIDDEN_SIZE, NUM_EXPERTS, NUM_TOKENS, OUTPUT_ALIAS, PLATFORM, TOPK
from .trait import Trait

ROWS_DTYPE = Trait("dtype", "dtype", "semantic", default="bfloat16", doc="of the experts' rows")
OUT_DTYPE = Trait("out_dtype", "dtype", "semantic", default="bfloat16", doc="of the result")
REDUCED = Trait("reduced", "bool", "semantic", default=False, doc="the experts have summed over the slots already")
WEIGHTS_APPLIED = Trait("weights_applied", "bool", "semantic", default=False,
                        doc="the rows carry the routing weights already")
HAS_SHARED = Trait("has_shared", "bool", "semantic", default=False, doc="a shared expert's output is added")

FINALIZE_TRAITS = (NUM_EXPERTS, TOPK, HIDDEN_SIZE, ROWS_DTYPE, OUT_DTYPE, REDUCED, WEIGHTS_APPLIED, HAS_SHARED,
                   EXPERT_PARALLEL, OUTPUT_ALIAS, PLATFORM, NUM_TOKENS)
