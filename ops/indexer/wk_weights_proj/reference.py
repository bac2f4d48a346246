"""indexer.wk_weights_proj as two multiplications: what it means, the fallback, and what nvfp4 keeps.

Of fused weights it multiplies with the rows of wk and with those of weights_proj. wk in nvfp4 is expanded to float32,
where it is exact, and not to dtype, where it is not.
"""

from __future__ import annotations

from torch.nn.functional import linear

from .checks import make_checks
from .formats import dequantize_nvfp4


def separate(*, hidden_size, head_dim, num_heads, dtype="bfloat16", wk_format="none", **_):
    """A kernel with indexer.wk_weights_proj's signature for these traits."""
    check = make_checks(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype,
                        wk_format=wk_format)

    def fused_rows(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        return linear(hidden_states, weight[:head_dim]), linear(hidden_states, weight[head_dim:])

    def nvfp4(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        wk = dequantize_nvfp4(weight, wk_scale, wk_global_scale)
        k = linear(hidden_states.float(), wk).to(hidden_states.dtype)
        return k, linear(hidden_states, weights_proj)

    return nvfp4 if wk_format == "nvfp4" else fused_rows
