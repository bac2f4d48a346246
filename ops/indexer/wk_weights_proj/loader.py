"""Fills the projections of a model from a checkpoint's tensors, in any order and over any number of calls.

    loader = Loader(model)                       # finds the model's FusedProjection and SeparateProjection modules
    loader.load_weights([(name, tensor), ...])   # or loader.load_files(paths), of safetensors
    loader.finish(registry)                      # raises unless every row of every projection was written, and prepares

For a projection at model.layers.3.indexer.wk_weights_proj these names are its own, and no others; a name belongs to it
by its whole components, so wkv, wk_norm or hawk.proj never do:

    model.layers.3.indexer.wk.weight                  and .weight_scale or .weight_scale_inv
    model.layers.3.indexer.weights_proj.weight        and its scale
    model.layers.3.indexer.wk_weights_proj.weight     both in one, instead, and its scale

Names of layers that this model lacks (another pipeline stage's, or one without an indexer) are left to the caller, as
all others. A module is written when its last tensor has come, all of it at once; until then its tensors are staged.

What the names, shapes and dtypes of a call say is looked at before its first tensor is taken, files or a list: a call
that is refused for one of them changes nothing at all. Values are looked at as they come, as is all that an iterator
yields; a tensor refused then changes nothing either, but the layers before it are written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

import torch
from torch import nn

from kernel_registry.errors import CheckpointError

from .module import FusedProjection, SeparateProjection
from .stages import Fused, Key, Separate, Source, Stage

OP = "indexer.wk_weights_proj"
UNUSED = ("input_scale",)  # of quantised hidden states, which these are not
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool}


class Loader:
    """The projections in `model` and what has been staged for them."""

    def __init__(self, model: nn.Module):
        self.stages: dict[tuple[str, ...], Stage] = {}
        for path, module in model.named_modules():
            if isinstance(module, (FusedProjection, SeparateProjection)):
                *parent, own = path.split(".") if path else ["wk_weights_proj"]
                if tuple(parent) in self.stages:
                    raise ValueError(f"{'.'.join(parent)} has two projections; a checkpoint's names can't tell them")
                if own in ("wk", "weights_proj"):
                    raise ValueError(f"{path} is called as one of the two projections that it holds; call it "
                                     "wk_weights_proj")
                made = Fused if isinstance(module, FusedProjection) else Separate
                self.stages[tuple(parent)] = made(module, ".".join(parent), own)

    def find(self, name: str) -> tuple[Stage, str, str] | None:
        """(stage, component, rest of the name) of the projection that `name` belongs to, or None."""
        parts = name.split(".")
        for at, component in enumerate(parts):
            stage = self.stages.get(tuple(parts[:at]))
            if stage is not None and component in stage.components:
                return stage, component, ".".join(parts[at + 1:])
        return None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor], *,
                     file: object = "") -> set[str]:
        """Takes the tensors that belong to projections and returns their names. `file` is for messages. Raises
        CheckpointError for one that can't be taken."""
        weights = weights.items() if isinstance(weights, Mapping) else weights
        if isinstance(weights, Collection):  # which can be gone through twice
            self._admit(_described(name, tensor, file) for name, tensor in weights if self.find(name))
        taken = set()
        for name, tensor in weights:
            if (found := self.find(name)) is not None:
                stage, component, leaf = found
                taken.add(name)
                if leaf not in UNUSED:
                    source = _described(name, tensor, file)
                    stage.take(stage.admit(component, leaf, source, stage.sources), source, tensor.detach())
        return taken

    def load_files(self, paths: Iterable) -> set[str]:
        """`load_weights` of safetensors files, or of one. Of each file no other tensors are read."""
        paths, taken = [paths] if isinstance(paths, (str, PathLike)) else [*paths], set()
        self._admit(source for path in paths for source in self._headers(path))
        for path in paths:
            taken |= self.load_weights(self._tensors(path), file=path)
        return taken

    def check(self) -> None:
        """Raises CheckpointError, naming everything that is missing, unless all was written."""
        missing = [line for stage in self.stages.values() for line in stage.missing()]
        if missing:
            raise CheckpointError("the checkpoint is incomplete:\n    " + "\n    ".join(missing),
                                  hint="load the tensors that are missing and call finish() again")

    def finish(self, registry) -> None:
        """`check`, and the projections become what the kernels of `registry`, a Registry, take: its prepare of each. A
        loader that has finished may load again, all projections or some."""
        self.check()
        for stage in self.stages.values():
            registry.prepare(OP, stage.module, **stage.module.traits)
            stage.sources.clear()

    def _admit(self, sources: Iterable[Source]) -> None:
        """Raises CheckpointError unless all of them may come, one after the other. Nothing is taken yet."""
        seen: dict[Stage, dict[Key, Source]] = {}
        for source in sources:
            stage, component, leaf = self.find(source.name)
            if leaf not in UNUSED:
                before = seen.setdefault(stage, dict(stage.sources))
                before[stage.admit(component, leaf, source, before)] = source

    def _headers(self, path) -> Iterator[Source]:
        with _opened(path) as file:
            for name in filter(self.find, file.keys()):
                header = file.get_slice(name)
                dtype = header.get_dtype()
                yield Source(name, str(path), header.get_shape(), SAFETENSORS.get(dtype, dtype))

    def _tensors(self, path) -> Iterator[tuple[str, torch.Tensor]]:
        with _opened(path) as file:
            for name in filter(self.find, file.keys()):
                yield name, file.get_tensor(name)


@contextmanager
def _opened(path):
    """A safetensors file, whose own errors become CheckpointErrors that name it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ImportError("reading safetensors files needs: pip install 'kernel-registry[safetensors]'") from error

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"no safetensors file: {error}", where=path) from error


def _described(name: str, tensor: torch.Tensor, file: object) -> Source:
    if not isinstance(tensor, torch.Tensor):
        Source(name, str(file), (), None).refuse(f"is a {type(tensor).__name__}", "a tensor")
    return Source(name, str(file), tensor.shape, tensor.dtype)
