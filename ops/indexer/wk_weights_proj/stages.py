"""What has come for one projection of a model, and when it is written: once it is all there, all of it at once.

A tensor is looked at twice. `admit` knows its name, shape and dtype alone, so that a file's header is enough for it;
`take` looks at the values. Only tensors that nothing can be said against are staged, as they came, and the projection's
parameters are written from them row by row: beside the model there is never more than one layer's weights.
"""

from __future__ import annotations

from typing import Iterator

import torch

from kernel_registry.errors import CheckpointError

from .formats import SCALE_DTYPES, dequantize_fp8, scale_shapes

FP8 = torch.float8_e4m3fn
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("weight_scale_inv", "weight_scale")  # both are what the weight is multiplied with
PIECE = 2**15  # numbers that are looked at or written at a time: little memory, and torch takes no second thread for
# so few, whose waiting for one another costs more than the work where cores are busy

Key = tuple[str, str]


class Source:
    """A checkpoint's tensor as its name and header describe it. `dtype` may be a name that torch has not."""

    def __init__(self, name: str, file: str, shape, dtype):
        self.name, self.file, self.shape, self.dtype = name, file, tuple(shape), dtype

    def __str__(self):
        return f"{self.name} of {self.file}" if self.file else self.name

    def refuse(self, what: str, expected: str, hint: str = ""):
        raise CheckpointError(f"{self.name} {what}, expected {expected}", where=self.file or None, hint=hint)

    def told(self) -> str:
        return f"is {[*self.shape]} {named(self.dtype)}"


def named(*dtypes) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class Stage:
    """`sources` says where every tensor came from since the last finish(), staged or written; `come` has the staged."""

    def __init__(self, module, parent: str, own: str):
        self.module, self.prefix, self.own = module, parent and parent + ".", own
        self.components = {"wk", "weights_proj", own}
        self.sources: dict[Key, Source] = {}
        self.come: dict[Key, torch.Tensor] = {}

    def admit(self, component: str, leaf: str, source: Source, sources: dict[Key, Source]) -> Key:
        """What `source` is here. Raises CheckpointError unless it may come after `sources`."""
        if any(parameter.is_meta for parameter in self.module.parameters()):
            source.refuse("has nowhere to go", f"{self.prefix}{self.own} on a device, and not on meta",
                          "model.to_empty(device=...) before loading")
        names = self.leaves(component)
        if leaf not in names:
            source.refuse("is no parameter of this projection",
                          " or ".join(f"{self.prefix}{component}.{name}" for name in names) or
                          f"{self.prefix}wk and {self.prefix}weights_proj, which are not fused with wk_format=nvfp4")
        key = component, "scale" if leaf in self.SAME else leaf
        if key in sources:
            raise CheckpointError(f"{source.name} comes twice, first as {sources[key]}", where=source.file or None,
                                  hint="a reload begins after finish()")
        self.expect(key, source, sources)
        return key

    def take(self, key: Key, source: Source, tensor: torch.Tensor) -> None:
        """Stages an admitted tensor, or writes the parameters with it where it is the last one."""
        self.look(key, source, tensor)
        self.sources[key] = source
        self.come[key] = tensor
        if self.complete():
            with torch.no_grad():
                self.write()
            self.come.clear()
        else:  # a caller may use its buffer again
            plain = key[1] == "weight" and tensor.dtype in PLAIN
            self.come[key] = tensor.to(self.module.dtype if plain else tensor.dtype, copy=True)

    def unwritten(self, name: str, parameter: torch.Tensor, first: int = 0) -> list[str]:
        """The rows of a parameter, numbered from `first`, that still hold NaN, in words."""
        rows = parameter.reshape(parameter.shape[0] if parameter.dim() else 1, -1)
        if parameter.is_meta:
            return self.empty(name, [*range(first, first + len(rows))])
        return self.empty(name, (torch.nonzero(rows.isnan().any(1)).flatten() + first).tolist())

    def empty(self, name: str, rows: list[int]) -> list[str]:
        return [f"{self.prefix}{self.own}: unwritten rows of {name}: {_ranges(rows)}"] if rows else []


class Fused(Stage):
    """A scale is staged under its weight's component, whichever of its two names it has."""

    SAME = SCALES

    def __init__(self, module, parent, own):
        super().__init__(module, parent, own)
        height, total = module.head_dim, module.head_dim + module.num_heads
        self.spans = {"wk": (0, height), "weights_proj": (height, total), own: (0, total)}

    def leaves(self, component):
        return ("weight", *SCALES)

    def expect(self, key, source, sources):
        component, kind = key
        begin, end = self.spans[component]
        shape, block, declared = (end - begin, self.module.hidden_size), self.module.block, self.module.wk_format
        for (other, _), first in sources.items():
            if begin < self.spans[other][1] and self.spans[other][0] < end and other != component:
                source.refuse(f"has rows that came as {first}", "either the two projections or the fused one")
        hint = f"the projection was made with wk_format={declared!r}; make it with the checkpoint's"
        beside = sources.get((component, "scale" if kind == "weight" else "weight"))
        if kind == "scale":
            shapes = scale_shapes(shape, block) if block else []
            if not shapes:
                source.refuse(source.told(), f"no scale with wk_format={declared!r}", hint)
            if source.shape not in shapes or source.dtype not in SCALE_DTYPES:
                source.refuse(source.told(), f"{' or '.join(str([*s]) for s in shapes)} {named(*SCALE_DTYPES)}", hint)
            if beside and beside.dtype is not FP8:
                source.refuse(source.told(), f"no scale, since {beside} is not quantised")
        else:
            dtypes = (*PLAIN, FP8) if block else PLAIN
            if source.shape != shape or source.dtype not in dtypes:
                if source.dtype is torch.uint8:
                    hint = "packed weights are not fused: dispatch with wk_format='nvfp4', which keeps two projections"
                source.refuse(source.told(), f"{[*shape]} {named(*dtypes)}", hint)
            if beside and source.dtype is not FP8:
                source.refuse(source.told(), f"float8_e4m3fn, since there is {beside}")

    def look(self, key, source, tensor):
        component, kind = key
        weight, scale = (self.come.get((component, other)) for other in ("weight", "scale"))
        weight, scale = (tensor, scale) if kind == "weight" else (weight, tensor)
        if weight is None or weight.dtype is FP8 and scale is None:
            return  # what the numbers are is known when the other has come
        dtype, changed = self.module.dtype, 0
        for _, values in self.rows(weight, scale):
            limits = torch.stack(values.aminmax())  # NaN if there is one
            if not (limits if scale is None else limits.to(dtype)).isfinite().all():
                source.refuse("has values that are not finite", f"finite ones in {named(dtype)}")
            if scale is None and dtype is not values.dtype:
                changed += int((values.to(dtype).to(values.dtype) != values).sum())
        if changed:
            source.refuse(f"is {named(source.dtype)}, {changed} of its values change in {named(dtype)}",
                          f"values that {named(dtype)} has", "make the projection with a wider dtype")

    def rows(self, weight, scale) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, values) of all rows, a piece at a time: float32 where they are quantised."""
        count = max(1, PIECE // weight.shape[1])
        for first in range(0, len(weight), count):
            yield first, weight[first:first + count] if scale is None else \
                dequantize_fp8(weight, scale, self.module.block, first, count)

    def ready(self, component) -> bool:
        weight = self.come.get((component, "weight"))
        return weight is not None and (weight.dtype is not FP8 or (component, "scale") in self.come)

    def complete(self):
        return self.ready(self.own) or self.ready("wk") and self.ready("weights_proj")

    def write(self):
        for (component, kind), weight in self.come.items():
            if kind == "weight":
                for first, values in self.rows(weight, self.come.get((component, "scale"))):
                    first += self.spans[component][0]
                    self.module.weight[first:first + len(values)].copy_(values)

    def missing(self):
        lines = [f"{self.sources[component, kind]} has come without its {'scale' if kind == 'weight' else 'weight'}"
                 for component, kind in self.come if not self.ready(component)]
        for component in ("wk", "weights_proj"):
            name, (begin, end) = f"weight ({component}.weight)", self.spans[component]
            if not self.come:
                lines += self.unwritten(name, self.module.weight[begin:end], begin)
            elif not self.ready(component):
                lines += self.empty(name, [*range(begin, end)])
        return lines


class Separate(Stage):
    """Each tensor is a parameter of its own."""

    SAME = ()
    NAMES = {("wk", "weight"): "wk", ("wk", "weight_scale"): "wk_scale", ("wk", "weight_scale_2"): "wk_global_scale",
             ("weights_proj", "weight"): "weights_proj"}

    def leaves(self, component):
        return tuple(leaf for known, leaf in self.NAMES if known == component)

    def expect(self, key, source, sources):
        parameter = getattr(self.module, self.NAMES[key])
        if source.dtype is not parameter.dtype or (source.shape != tuple(parameter.shape) and
                                                   not (parameter.dim() == 0 and source.shape == (1,))):
            source.refuse(source.told(), f"{list(parameter.shape)} {named(parameter.dtype)}")

    def look(self, key, source, tensor):
        if tensor.dtype is torch.uint8:  # which is finite whatever it is
            return
        for some in tensor.reshape(-1).split(PIECE):
            if not some.float().isfinite().all():
                source.refuse("has values that are not finite", "finite ones")

    def complete(self):
        return len(self.come) == len(self.NAMES)

    def write(self):
        for key, tensor in self.come.items():
            parameter = getattr(self.module, self.NAMES[key])
            parameter.copy_(tensor.reshape(parameter.shape))

    def missing(self):
        if self.come:
            return [f"{self.prefix}{component}.{leaf} has not come" for component, leaf in self.NAMES
                    if (component, leaf) not in self.come]
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
