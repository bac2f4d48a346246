"""Preparation at load: from the two projections of one indexer to the module that runs both."""

from __future__ import annotations

from typing import Callable, Mapping

import torch
from torch import nn

from kernel_registry.errors import CheckpointError

from .loader import Loader
from .module import projection


def prepare(source: nn.Module | Mapping[str, torch.Tensor], *, kernel: Callable | None = None, hidden_size: int,
            head_dim: int, num_heads: int, dtype="bfloat16", wk_format: str = "none", group_size: int = 128,
            device=None, **_):
    """A FusedProjection, or with wk_format="nvfp4" a SeparateProjection, of `source`: an indexer with the modules `wk`
    and `weights_proj`, or tensors by their names in a checkpoint behind the indexer's ("wk.weight", ...). What else it
    has is left alone, and so is `source`.

    kernel  indexer.wk_weights_proj's for the same traits; the attribute `kernel` may be set later instead
    Raises CheckpointError as Loader does."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    holder = nn.Module()
    holder.wk_weights_proj = projection(kernel, hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads,
                                        dtype=dtype, wk_format=wk_format, group_size=group_size,
                                        device=_device(tensors) if device is None else device)
    loader = Loader(holder)
    if not loader.load_weights(tensors.items()):
        raise CheckpointError(f"none of {', '.join(tensors) or 'no tensors'} belongs to an indexer's projection",
                              hint="expected wk.weight and weights_proj.weight, or wk_weights_proj.weight")
    loader.finish()
    return holder.wk_weights_proj


def _device(tensors: Mapping[str, torch.Tensor]):
    return next(iter(tensors.values())).device if tensors else None
