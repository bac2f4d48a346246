"""The projection as a module: fused, or separate where wk is nvfp4. loader.py fills either from a checkpoint.

Parameters begin as NaN, so that what no checkpoint wrote can't pass for a weight. They are written in place and never
replaced: captured graphs and other holders keep what they hold.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import nn

from .formats import block_shape


class _Projection(nn.Module):
    def __init__(self, kernel: Callable, *, hidden_size: int, head_dim: int, num_heads: int, dtype="bfloat16",
                 wk_format: str = "none", group_size: int = 128, device=None):
        super().__init__()
        self.kernel = kernel
        self.traits = dict(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads,
                           dtype=str(dtype).removeprefix("torch."), wk_format=wk_format, group_size=group_size)
        self.hidden_size, self.head_dim, self.num_heads = hidden_size, head_dim, num_heads
        self.dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        self.wk_format, self.block = wk_format, block_shape(wk_format, group_size)
        for name, (shape, kind) in self._layout().items():
            empty = torch.empty(shape, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(self.unwritten(empty), requires_grad=False))

    @staticmethod
    def unwritten(tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` filled with NaN, with the byte of e4m3's NaN where there is none."""
        with torch.no_grad():
            tensor.view(torch.uint8).fill_(0x7F) if tensor.element_size() == 1 else tensor.fill_(float("nan"))
        return tensor

    def _apply(self, fn, recurse=True):
        """`to_empty` of what was on the meta device gives memory as it was left there: no proof of anything."""
        meta = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        super()._apply(fn, recurse)
        for name in meta:
            if not getattr(self, name).is_meta:
                self.unwritten(getattr(self, name))
        return self

    def extra_repr(self) -> str:
        return (f"hidden_size={self.hidden_size}, head_dim={self.head_dim}, num_heads={self.num_heads}, "
                f"dtype={self.dtype}, wk_format={self.wk_format}")


class FusedProjection(_Projection):
    """`weight` [D + N, H]: wk's rows, then weights_proj's. `kernel` is indexer.wk_weights_proj's, bound to the same
    traits."""

    def _layout(self):
        if self.wk_format == "nvfp4":
            raise ValueError("wk in nvfp4 has no exact form in a wider matrix; use SeparateProjection")
        return {"weight": ((self.head_dim + self.num_heads, self.hidden_size), self.dtype)}

    def forward(self, hidden_states):
        return self.kernel(hidden_states, self.weight)


class SeparateProjection(_Projection):
    """What nvfp4 keeps: wk as it is stored, its two scales, and weights_proj."""

    def _layout(self):
        if self.wk_format != "nvfp4":
            raise ValueError(f"wk_format={self.wk_format} can be fused; use FusedProjection")
        return {"wk": ((self.head_dim, self.hidden_size // 2), torch.uint8),
                "wk_scale": ((self.head_dim, self.hidden_size // 16), torch.float8_e4m3fn),
                "wk_global_scale": ((), torch.float32),
                "weights_proj": ((self.num_heads, self.hidden_size), self.dtype)}

    def forward(self, hidden_states):
        return self.kernel(hidden_states, self.wk, self.weights_proj, wk_scale=self.wk_scale,
                           wk_global_scale=self.wk_global_scale)


def projection(kernel: Callable, **traits) -> FusedProjection | SeparateProjection:
    """The module for these traits."""
    made = SeparateProjection if traits.get("wk_format") == "nvfp4" else FusedProjection
    return made(kernel, **traits)
