"""indexer.wk_weights_proj: the indexer's keys and its heads' weights, two projections of the same hidden states.

    (hidden_states [..., H], weight [D + N, H], weights_proj=None, *, wk_scale=None, wk_global_scale=None)
    -> (k [..., D], head_weights [..., N])

    k = hidden_states wk^T and head_weights = hidden_states weights_proj^T, summed in float32, cast once to dtype

hidden_states    dtype [tokens, H] or with more leading dimensions; any strides; none of them needs to hold a token
weight           dtype [D + N, H], contiguous: the rows of wk, then those of weights_proj, as registry.prepare makes it
k, head_weights  dtype; views of one result [..., D + N] where the weights are fused: strided, no copy

Where wk_format is nvfp4 nothing is fused, since wk has no exact form in dtype:

weight           uint8 [D, H / 2]: two e2m1 numbers a byte, the lower half first
weights_proj     dtype [N, H]; None exactly when fused
wk_scale         float8_e4m3fn [D, H / 16], one for 16 columns
wk_global_scale  float32 [] or [1]; a weight is e2m1 * wk_scale * wk_global_scale

Raises kernel_registry.errors.InputError for tensors that contradict the dispatched traits.

Source: DeepSeek-V3.2's indexer; vLLM pull requests 38684, 38870, 42944 and 46078. docs/indexer.md has the reasons.
"""

from __future__ import annotations

from kernel_registry.contract import Contract
from kernel_registry.traits import indexer


class WkWeightsProj(Contract):
    """Traits, signature and readers of indexer.wk_weights_proj."""

    traits = indexer.WK_WEIGHTS_PROJ_TRAITS
    relations = ("wk_format != 'nvfp4' or hidden_size % 16 == 0",)
    dynamic = {"num_tokens": lambda hidden_states: hidden_states.numel() // hidden_states.shape[-1]}
    oracle = "kernel_registry.ops.indexer.wk_weights_proj.oracle:check"
    cases = "kernel_registry.ops.indexer.wk_weights_proj.cases"
    prepared = ("weight",)

    @staticmethod
    def signature(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        """See the module's docstring."""
