"""Cheap checks that a call's tensors are the ones that its kernel was dispatched for. None reads a tensor's values."""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.arguments import names, refuse


def make_checks(*, hidden_size: int, head_dim: int, num_heads: int, dtype: str, wk_format: str):
    """check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale) raises an InputError or returns None."""
    plain = getattr(torch, dtype)
    rows = head_dim + num_heads
    if wk_format == "nvfp4":
        expected = {"weight": (torch.uint8, [(head_dim, hidden_size // 2)]),
                    "weights_proj": (plain, [(num_heads, hidden_size)]),
                    "wk_scale": (torch.float8_e4m3fn, [(head_dim, hidden_size // 16)]),
                    "wk_global_scale": (torch.float32, [(), (1,)])}
    else:
        expected = {"weight": (plain, [(rows, hidden_size)])}

    def check(hidden_states, weight, weights_proj, wk_scale, wk_global_scale):
        if not isinstance(hidden_states, torch.Tensor) or hidden_states.dtype is not plain \
                or hidden_states.dim() < 2 or hidden_states.shape[-1] != hidden_size:
            refuse("hidden_states", hidden_states, f"[..., {hidden_size}] {dtype} of two dimensions or more")
        device = hidden_states.device
        for name, given in (("weight", weight), ("weights_proj", weights_proj), ("wk_scale", wk_scale),
                            ("wk_global_scale", wk_global_scale)):
            if name not in expected:
                if given is not None:
                    raise InputError(f"{name} is given, dispatched with wk_format={wk_format}, whose weights are fused",
                                     hint="pass None, or dispatch with wk_format='nvfp4'")
                continue
            kind, shapes = expected[name]
            if not isinstance(given, torch.Tensor) or given.dtype is not kind or tuple(given.shape) not in shapes \
                    or given.device != device or not given.is_contiguous():
                refuse(name, given, f"contiguous {' or '.join(str([*s]) for s in shapes)} {names([kind])} on {device}")

    return check


def as_rows(hidden_states: torch.Tensor) -> torch.Tensor:
    """[tokens, H] with unit stride, which is a view wherever it can be."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
