"""Preparation at load: what the kernels take as `weight`, from whatever a caller has of one indexer."""

from __future__ import annotations

from typing import Callable, Mapping

import torch
from torch import nn

from kernel_registry.errors import CheckpointError

from .loader import Loader
from .module import FusedProjection, SeparateProjection, projection

Source = "torch.Tensor | FusedProjection | SeparateProjection | nn.Module | Mapping[str, torch.Tensor]"


def prepare(source: Source, *, hidden_size: int, head_dim: int, num_heads: int, dtype: str = "bfloat16",
            wk_format: str = "none", group_size: int = 128, kernel: Callable | None = None, device=None):
    """The projection module of `source`, or the weight itself where that is all there is:

    an indexer with the modules `wk` and `weights_proj`   -> FusedProjection, or SeparateProjection with nvfp4
    tensors by their names in a checkpoint behind the indexer's ("wk.weight", ...)   -> the same
    a projection that a Loader has filled                 -> itself
    a model or indexer that holds such projections        -> those, by name
    a tensor: fused rows, or with nvfp4 the packed wk     -> itself

    What else an indexer has is left alone, and so is `source`.

    kernel  indexer.wk_weights_proj's for the same traits; the attribute `kernel` may be set later instead
    device  where a module that is made lives; that of the tensors by default
    Raises CheckpointError for a tensor or projection of other sizes than the traits', and as Loader does."""
    traits = dict(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, dtype=dtype, wk_format=wk_format,
                  group_size=group_size)
    if isinstance(source, torch.Tensor):
        name = "wk" if wk_format == "nvfp4" else "weight"
        expected = getattr(projection(None, **traits, device="meta"), name)
        if (source.shape, source.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(f"{name} is {[*source.shape]} {_named(source)}, expected {[*expected.shape]} "
                                  f"{_named(expected)}", hint="give the indexer, or its tensors by name")
        if not source.is_meta and bool(source.isnan().any()):
            raise CheckpointError(f"{name} has NaN: a row that no checkpoint wrote, or a broken one",
                                  hint="prepare after loading")
        return source
    held = {name: module for name, module in source.named_modules()
            if isinstance(module, (FusedProjection, SeparateProjection))} if isinstance(source, nn.Module) else {}
    if held:
        for name, module in held.items():
            told = ", ".join(f"{trait}={module.traits[trait]} for {value}" for trait, value in traits.items()
                             if module.traits[trait] != value)
            if told:
                raise CheckpointError(f"{name or 'the projection'} was made with other traits: {told}",
                                      hint="make both with the same traits")
        Loader(source).check()
        return held.get("", held)
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    holder = nn.Module()
    holder.wk_weights_proj = projection(kernel, **traits, device=_device(tensors) if device is None else device)
    loader = Loader(holder)
    if not loader.load_weights(tensors.items()):
        raise CheckpointError(f"none of {', '.join(tensors) or 'no tensors'} belongs to an indexer's projection",
                              hint="expected wk.weight and weights_proj.weight, or wk_weights_proj.weight")
    loader.check()
    return holder.wk_weights_proj


def _device(tensors: Mapping[str, torch.Tensor]):
    return next(iter(tensors.values())).device if tensors else None


def _named(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
