"""The traits of a sparse-attention indexer's projection, with the neutral value of each.

Sizes are *performance* traits; the dtype and what the checkpoint's `wk` is stored as are *semantic*.
"""

from __future__ import annotations

from .trait import Trait

HIDDEN_SIZE = Trait("hidden_size", "int", "performance", minimum=1, doc="H, columns of the hidden states")
HEAD_DIM = Trait("head_dim", "int", "performance", minimum=1, doc="D, rows of wk: the indexer's one key head")
NUM_HEADS = Trait("num_heads", "int", "performance", minimum=1, doc="N, rows of weights_proj: the indexer's heads")
DTYPE = Trait("dtype", "dtype", "semantic", default="bfloat16", doc="of the hidden states, the weights and the results")
WK_FORMAT = Trait("wk_format", "str", "semantic", default="none",
                  choices=("none", "fp8_block", "fp8_channel", "mxfp8", "nvfp4"),
                  doc="what quantised weights of the checkpoint are; all but nvfp4 become plain at load")
GROUP_SIZE = Trait("group_size", "int", "semantic", default=128, minimum=1,
                   doc="side of fp8_block's square blocks, as the checkpoint declares it")
PLATFORM = Trait("platform", "platform", "platform", doc="the machine; detected when it is not given")
NUM_TOKENS = Trait("num_tokens", "int", "performance", minimum=0, dynamic=True, doc="rows of the hidden states")

WK_WEIGHTS_PROJ_TRAITS = (HIDDEN_SIZE, HEAD_DIM, NUM_HEADS, DTYPE, WK_FORMAT, GROUP_SIZE, PLATFORM, NUM_TOKENS)
