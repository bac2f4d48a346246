"""indexer.wk_weights_proj as one multiplication of torch, whose result is split into two views.

A library may sum a column in another order in a wider matrix. docs/indexer.md says where that changes bits.
"""

from __future__ import annotations

from torch.nn.functional import linear

from .checks import make_checks


def fused(*, hidden_size, head_dim, num_heads, dtype="bfloat16", wk_format="none", **_):
    """A kernel with indexer.wk_weights_proj's signature for these traits."""
    check = make_checks(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype,
                        wk_format=wk_format)
    parts = [head_dim, num_heads]

    def kernel(hidden_states, weight, weights_proj=None, *, wk_scale=None, wk_global_scale=None):
        check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale)
        return linear(hidden_states, weight).split(parts, dim=-1)

    return kernel
