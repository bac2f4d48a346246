"""Fills the projections of a model from a checkpoint's tensors, in any order and over any number of calls.

    loader = Loader(model)                       # finds the model's FusedProjection and SeparateProjection modules
    loader.load_weights([(name, tensor), ...])   # or loader.load_files(paths), of safetensors
    loader.finish()                              # raises unless every row of every projection was written, and prepares

For a projection at model.layers.3.indexer.wk_weights_proj these names are its own, and no others; a name belongs to it
by its whole components, so wkv, wk_norm or hawk.proj never do:

    model.layers.3.indexer.wk.weight                  and .weight_scale or .weight_scale_inv
    model.layers.3.indexer.weights_proj.weight        and its scale
    model.layers.3.indexer.wk_weights_proj.weight     both in one, instead, and its scale

Names of layers that this model lacks (another pipeline stage's, or one without an indexer) are left to the caller, as
all others. A module is written when its last tensor has come, all of it at once; until then its tensors are staged. A
tensor that is refused therefore leaves every parameter as it was, and what was staged before it too.
"""

from __future__ import annotations

from typing import Iterable

import torch
from torch import nn

from kernel_registry.errors import CheckpointError
from kernel_registry.registry import Registry, registry as shipped

from .formats import SCALE_DTYPES, dequantize_fp8, scale_shapes
from .module import FusedProjection, SeparateProjection

OP = "indexer.wk_weights_proj"
FP8 = torch.float8_e4m3fn
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("weight_scale_inv", "weight_scale")  # both are what the weight is multiplied with
UNUSED = ("input_scale",)  # of quantised hidden states, which these are not


class Loader:
    """The projections in `model` and what has been staged for them."""

    def __init__(self, model: nn.Module):
        self.stages: dict[tuple[str, ...], _Fused | _Separate] = {}
        for path, module in model.named_modules():
            if isinstance(module, (FusedProjection, SeparateProjection)):
                *parent, own = path.split(".") if path else ["wk_weights_proj"]
                if tuple(parent) in self.stages:
                    raise ValueError(f"{'.'.join(parent)} has two projections; a checkpoint's names can't tell them")
                made = _Fused if isinstance(module, FusedProjection) else _Separate
                self.stages[tuple(parent)] = made(module, ".".join(parent), own)

    def find(self, name: str):
        """(stage, component, rest of the name) of the projection that `name` belongs to, or None."""
        parts = name.split(".")
        for at, component in enumerate(parts):
            stage = self.stages.get(tuple(parts[:at]))
            if stage is not None and component in stage.components:
                return stage, component, ".".join(parts[at + 1:])
        return None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, file: object = "") -> set[str]:
        """Takes the tensors that belong to projections and returns their names. `file` is for messages. Raises
        CheckpointError for one that can't be taken."""
        taken = set()
        for name, tensor in weights:
            found = self.find(name)
            if found is not None:
                stage, component, leaf = found
                stage.add(component, leaf, tensor, _Source(name, str(file)))
                taken.add(name)
        return taken

    def load_files(self, paths: Iterable) -> set[str]:
        """`load_weights` of safetensors files. Of each file no other tensors are read."""
        try:
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as error:
            raise ImportError("reading safetensors files needs: pip install 'kernel-registry[safetensors]'") from error

        taken = set()
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    names = [name for name in file.keys() if self.find(name)]
                    taken |= self.load_weights(((name, file.get_tensor(name)) for name in names), file=path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"no safetensors file: {error}", where=path) from error
        return taken

    def check(self) -> None:
        """Raises CheckpointError, naming everything that is missing, unless all was written."""
        missing = [line for stage in self.stages.values() for line in stage.missing()]
        if missing:
            raise CheckpointError("the checkpoint is incomplete:\n    " + "\n    ".join(missing),
                                  hint="load the tensors that are missing and call finish() again")

    def finish(self, registry: Registry = shipped) -> None:
        """`check`, and the projections become what kernels that `registry` dispatches take: registry.prepare of each. A
        loader that has finished may load again, all projections or some."""
        self.check()
        for stage in self.stages.values():
            registry.prepare(OP, stage.module, **stage.module.traits)
            stage.sources.clear()


class _Source:
    """Where a tensor came from, for messages."""

    def __init__(self, name: str, file: str):
        self.name, self.file = name, file

    def __str__(self):
        return f"{self.name} of {self.file}" if self.file else self.name

    def refuse(self, what: str, expected: str, hint: str = ""):
        raise CheckpointError(f"{self.name} {what}, expected {expected}", where=self.file or None, hint=hint)


def _told(tensor: torch.Tensor) -> str:
    return f"is {list(tensor.shape)} {_named(tensor.dtype)}"


def _named(*dtypes) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class _Stage:
    """What has come for one projection. `sources` says where from, by (component, "weight" or "scale")."""

    def __init__(self, module, parent: str, own: str):
        self.module, self.prefix, self.own = module, parent and parent + ".", own
        self.sources: dict[tuple[str, str], _Source] = {}
        self.components = {"wk", "weights_proj", own}

    def claim(self, key: tuple[str, str], source: _Source):
        if key in self.sources:
            raise CheckpointError(f"{source.name} comes twice, first as {self.sources[key]}", where=source.file or None,
                                  hint="a reload begins after finish()")

    def add(self, component: str, leaf: str, tensor: torch.Tensor, source: _Source):
        if leaf in UNUSED:
            return
        names = self.leaves(component)
        if leaf not in names:
            source.refuse("is no parameter of this projection",
                          " or ".join(f"{self.prefix}{component}.{name}" for name in names) or
                          f"{self.prefix}wk and {self.prefix}weights_proj, which are not fused with wk_format=nvfp4")
        if not isinstance(tensor, torch.Tensor):
            source.refuse(f"is a {type(tensor).__name__}", "a tensor")
        self.take(component, leaf, tensor.detach(), source)

    def unwritten(self, name: str, parameter: torch.Tensor, first: int = 0) -> list[str]:
        """The rows of a parameter, numbered from `first`, that still hold NaN, in words."""
        rows = parameter.reshape(parameter.shape[0] if parameter.dim() else 1, -1)
        empty = (torch.nonzero(rows.float().isnan().any(1)).flatten() + first).tolist()
        return [f"{self.prefix}{self.own}: unwritten rows of {name}: {_ranges(empty)}"] if empty else []


class _Fused(_Stage):
    """`rows` is the fused weight as far as it has come, NaN elsewhere; `waiting` holds fp8 weights and scales, each of
    which has come without the other."""

    def __init__(self, module, parent, own):
        super().__init__(module, parent, own)
        height, total = module.head_dim, module.head_dim + module.num_heads
        self.spans = {own: (0, total), "wk": (0, height), "weights_proj": (height, total)}
        self.rows: torch.Tensor | None = None
        self.waiting: dict[tuple[str, str], torch.Tensor] = {}

    def leaves(self, component):
        return ("weight", *SCALES)

    def take(self, component, leaf, tensor, source):
        begin, end = self.spans[component]
        kind = "weight" if leaf == "weight" else "scale"
        shape, block, declared = (end - begin, self.module.hidden_size), self.module.block, self.module.wk_format
        self.claim((component, kind), source)
        for (other, _), first in self.sources.items():
            if begin < self.spans[other][1] and self.spans[other][0] < end and other != component:
                source.refuse(f"has rows that came as {first}", "either the two projections or the fused one")
        hint = f"the projection was made with wk_format={declared!r}; make it with the checkpoint's"
        if kind == "scale":
            shapes = scale_shapes(shape, block) if block else []
            if not shapes:
                source.refuse(_told(tensor), f"no scale with wk_format={declared!r}", hint)
            if tuple(tensor.shape) not in shapes or tensor.dtype not in SCALE_DTYPES:
                source.refuse(_told(tensor), f"{' or '.join(str([*s]) for s in shapes)} {_named(*SCALE_DTYPES)}", hint)
        else:
            dtypes = (*PLAIN, FP8) if block else PLAIN
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
                if tensor.dtype is torch.uint8:
                    hint = "packed weights are not fused: dispatch with wk_format='nvfp4', which keeps two projections"
                source.refuse(_told(tensor), f"{[*shape]} {_named(*dtypes)}", hint)
        partner = self.waiting.get((component, "scale" if kind == "weight" else "weight"))
        beside = self.sources.get((component, "scale" if kind == "weight" else "weight"))
        if kind == "weight" and tensor.dtype is not FP8:
            if beside:
                source.refuse(_told(tensor), f"float8_e4m3fn, since there is {beside}")
            self.write(component, self.exact(tensor, source), source)
        elif beside and partner is None:
            source.refuse(_told(tensor), f"no scale, since {beside} is not quantised")
        elif partner is None:
            self.waiting[component, kind] = tensor.clone()  # a caller may use its buffer again
        else:
            weight, scale = (tensor, partner) if kind == "weight" else (partner, tensor)
            values = dequantize_fp8(weight, scale.to(weight.device), block)
            self.write(component, values.to(self.module.dtype), source)
            del self.waiting[component, "scale" if kind == "weight" else "weight"]
        self.sources[component, kind] = source
        if self.rows is not None and not self.rows.isnan().any():
            with torch.no_grad():
                self.module.weight.copy_(self.rows)
            self.rows = None

    def exact(self, tensor, source):
        """`tensor` in the module's dtype, if that has all of its values."""
        cast = tensor.to(self.module.dtype)
        changed = int(((cast.to(tensor.dtype) != tensor) & tensor.isfinite()).sum())
        if changed:
            dtype = _named(self.module.dtype)
            source.refuse(f"is {_named(tensor.dtype)}, {changed} of its values change in {dtype}",
                          f"values that {dtype} has", "make the projection with a wider dtype")
        return cast

    def write(self, component, values, source):
        """Stages rows."""
        if not values.isfinite().all():
            source.refuse("has values that are not finite", f"finite ones in {_named(values.dtype)}")
        if self.rows is None:
            self.rows = self.module.unwritten(torch.empty_like(self.module.weight))
        begin, end = self.spans[component]
        self.rows[begin:end].copy_(values)

    def missing(self):
        lines = [f"{source} has come without its {'scale' if kind == 'weight' else 'weight'}"
                 for (component, kind), source in self.sources.items() if (component, kind) in self.waiting]
        rows = self.module.weight if self.rows is None else self.rows
        for component in ("wk", "weights_proj"):
            begin, end = self.spans[component]
            lines += self.unwritten(f"weight ({component}.weight)", rows[begin:end], begin)
        return lines


class _Separate(_Stage):
    """`come` holds the tensors by parameter until all are there."""

    NAMES = {("wk", "weight"): "wk", ("wk", "weight_scale"): "wk_scale", ("wk", "weight_scale_2"): "wk_global_scale",
             ("weights_proj", "weight"): "weights_proj"}

    def __init__(self, module, parent, own):
        super().__init__(module, parent, own)
        self.come: dict[str, torch.Tensor] = {}

    def leaves(self, component):
        return tuple(leaf for known, leaf in self.NAMES if known == component)

    def take(self, component, leaf, tensor, source):
        self.claim((component, leaf), source)
        name = self.NAMES[component, leaf]
        parameter = getattr(self.module, name)
        if tensor.dtype is not parameter.dtype or (tensor.shape != parameter.shape and
                                                   not (parameter.dim() == 0 and tuple(tensor.shape) == (1,))):
            source.refuse(_told(tensor), f"{list(parameter.shape)} {_named(parameter.dtype)}")
        if tensor.dtype is not torch.uint8 and not tensor.float().isfinite().all():
            source.refuse("has values that are not finite", "finite ones")
        self.sources[component, leaf] = source
        self.come[name] = tensor.reshape(parameter.shape).clone()
        if len(self.come) == len(self.NAMES):
            with torch.no_grad():
                for name, given in self.come.items():
                    getattr(self.module, name).copy_(given)
            self.come.clear()

    def missing(self):
        if self.come:
            return [f"{self.prefix}{component}.{leaf} has not come" for (component, leaf), name in self.NAMES.items()
                    if name not in self.come]
        # wk's bytes have no NaN, and are written together with the others
        return [line for name in ("wk_scale", "wk_global_scale", "weights_proj")
                for line in self.unwritten(name, getattr(self.module, name))]


def _ranges(numbers: list[int]) -> str:
    """"0..127, 130" for the sorted `numbers`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in found)
