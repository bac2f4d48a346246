"""The traits that mixture-of-experts ops share, with the neutral value of each.

Sizes of the routing problem are *performance* traits, so an implementation limits them only where it has to. What
changes the result (groups, scoring, bias, renormalisation, dtypes) is *semantic*: silence serves the default only. The
defaults of those are the one-group sigmoid router with a float32 correction bias, which most current models have.
"""

from __future__ import annotations

from .trait import Trait

NUM_EXPERTS = Trait("num_experts", "int", "performance", minimum=1, doc="E, routed experts of one layer")
TOPK = Trait("topk", "int", "performance", minimum=1, doc="K, slots per token, fused shared experts included")
NUM_EXPERT_GROUP = Trait("num_expert_group", "int", "semantic", default=1, minimum=1,
                         doc="groups the experts are split into; 1 = ungrouped")
TOPK_GROUP = Trait("topk_group", "int", "semantic", default=1, minimum=1, doc="groups kept per token")
NUM_FUSED_SHARED_EXPERTS = Trait("num_fused_shared_experts", "int", "semantic", default=0, minimum=0,
                                 doc="n, shared experts that take the last n slots, with ids E..E+n-1")
SCORING = Trait("scoring", "str", "semantic", default="sigmoid", choices=("sigmoid", "softmax", "sqrtsoftplus"),
                doc="how a logit becomes a score")
HAS_BIAS = Trait("has_bias", "bool", "semantic", default=True,
                 doc="a correction bias [E] is added for the choice, not for the weights")
RENORMALIZE = Trait("renormalize", "bool", "semantic", default=True, doc="divide the routed weights by their sum")
DTYPE = Trait("dtype", "dtype", "semantic", default="float32", doc="of the router logits")
BIAS_DTYPE = Trait("bias_dtype", "dtype", "semantic", default="float32", doc="of the correction bias")
SCORE_DTYPE = Trait("score_dtype", "str", "semantic", default="float32", choices=("float32", "logits"),
                    doc="the arithmetic of the scores: float32 after an exact upcast, or the logits' own dtype, "
                        "rounding as eager code does")
PLATFORM = Trait("platform", "platform", "platform", doc="the machine; detected when it is not given")
NUM_TOKENS = Trait("num_tokens", "int", "performance", minimum=0, dynamic=True, doc="T, rows of the logits")
CONTIGUOUS = Trait("contiguous", "bool", "layout", default=True, dynamic=True,
                   doc="the logits are contiguous, row after row")

TOPK_TRAITS = (NUM_EXPERTS, TOPK, NUM_EXPERT_GROUP, TOPK_GROUP, NUM_FUSED_SHARED_EXPERTS, SCORING, HAS_BIAS,
               RENORMALIZE, DTYPE, BIAS_DTYPE, SCORE_DTYPE, PLATFORM, NUM_TOKENS, CONTIGUOUS)
