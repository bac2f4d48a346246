"""The traits of moe.experts, the expert layers of a mixture of experts, with the neutral value of each.

Sizes are *performance* traits. Formats, the activation, biases and where a weight goes change the result: they are
*semantic*, so silence serves the neutral value only, which is the plain bfloat16 layer of one machine. Where the result
goes changes nothing for an implementation that is silent about it: what it returns is copied there.
"""

from __future__ import annotations

from .trait import Trait

NUM_EXPERTS = Trait("num_experts", "int", "performance", minimum=1, doc="E, experts whose weights are here")
TOPK = Trait("topk", "int", "performance", minimum=1, doc="K, slots per token")
HIDDEN_SIZE = Trait("hidden_size", "int", "performance", minimum=1, doc="H, columns of the hidden states")
INTERMEDIATE_SIZE = Trait("intermediate_size", "int", "performance", minimum=1,
                          doc="I, columns of w2: of one expert, on this machine")
DTYPE = Trait("dtype", "dtype", "semantic", default="bfloat16", doc="of the hidden states and of the result")
WEIGHT_QUANT = Trait("weight_quant", "str", "semantic", default="none",
                     choices=("none", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_w8a16",
                              "int4_w4a16"),
                     doc="format of the weights")
ACT_QUANT = Trait("act_quant", "str", "semantic", default="none",
                  choices=("none", "fp8_block", "fp8_token", "fp8_tensor", "int8_token", "int8_tensor"),
                  doc="format of both multiplications' inputs; *_tensor has given scales, the others make theirs")
GROUP_SIZE = Trait("group_size", "int", "semantic", default=128, minimum=1,
                   doc="side of fp8_block's square blocks, columns of one scale of int4_w4a16")
ACTIVATION = Trait("activation", "str", "semantic", default="silu",
                   choices=("silu", "gelu", "swigluoai", "swigluoai_packed"),
                   doc="between the two multiplications; all have a gate and an up half")
HAS_BIAS = Trait("has_bias", "bool", "semantic", default=False, doc="each expert adds a bias after each multiplication")
APPLY_ROUTER_WEIGHT_ON_INPUT = Trait("apply_router_weight_on_input", "bool", "semantic", default=False,
                                     doc="the routing weight multiplies the first multiplication's result, not the "
                                         "second's")
EXPERT_PARALLEL = Trait("expert_parallel", "bool", "semantic", default=False,
                        doc="other machines have the other experts; expert_map says which are here")
OUTPUT_ALIAS = Trait("output_alias", "bool", "performance", default=False,
                     doc="the result goes into a given `out`: written there by implementations that "
                         "`accepts_output_alias`, else copied")
PLATFORM = Trait("platform", "platform", "platform", doc="the machine; detected when it is not given")
NUM_TOKENS = Trait("num_tokens", "int", "performance", minimum=0, dynamic=True, doc="T, rows of the hidden states")

EXPERTS_TRAITS = (NUM_EXPERTS, TOPK, HIDDEN_SIZE, INTERMEDIATE_SIZE, DTYPE, WEIGHT_QUANT, ACT_QUANT, GROUP_SIZE,
                  ACTIVATION, HAS_BIAS, APPLY_ROUTER_WEIGHT_ON_INPUT, EXPERT_PARALLEL, OUTPUT_ALIAS, PLATFORM,
                  NUM_TOKENS)
