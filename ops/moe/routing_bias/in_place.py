"""moe.routing_bias: the parameter itself takes the router's dtype, once; a forward pass finds nothing left to do."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch

from kernel_registry.contract import CAPTURED, Prepared
from kernel_registry.errors import CaptureError, PreparationError
from kernel_registry.ops.moe.arguments import names, refuse

from .probe import TOKENS, changed_tokens
from .views import views

NAME = "e_score_correction_bias"
_GUARDED = "_kernel_registry_guarded_biases"  # of a module: dotted names of the parameters that a load may not round


@dataclass(frozen=True)
class Aligned:
    """What happened to one parameter: its dtypes, how many distinct values it had and has (None on the meta device),
    and, where values changed, of how many probed tokens the experts did."""

    parameter: str
    before: str
    after: str
    distinct_before: int | None = None
    distinct_after: int | None = None
    tokens: int = 0
    changed_tokens: int = 0

    def __str__(self):
        if self.before == self.after:
            return f"{self.parameter}: {self.before} already, nothing done"
        told = f"{self.parameter}: {self.before} to {self.after}"
        if self.tokens:
            told += (f", {self.distinct_before} distinct values became {self.distinct_after}; {self.changed_tokens} of "
                     f"{self.tokens} random tokens change experts")
        return told


def routing_bias(*, num_experts, bias_dtype):
    """The kernel: gives back what it gets, whose tag, and with it dtype and shape, the registry has looked at."""
    def take(correction_bias):
        if correction_bias is None:
            refuse("correction_bias", correction_bias, f"[..., {num_experts}] {bias_dtype}")
        return correction_bias
    return take


def prepare(subject, *, num_experts, topk, num_expert_group, topk_group, num_fused_shared_experts, scoring, bias_dtype,
            name=NAME, narrow=False):
    """Gives every bias in `subject` the dtype `bias_dtype`; whole or not at all.

    subject  a Parameter or tensor, or a module: then each parameter or buffer in it whose dotted name ends in `name`
    narrow   also where that changes values, and for what is loaded later

    Returns the tensor, or those of a module by name, with a tuple of `Aligned` as the report."""
    biases = _find(subject, name, num_experts)
    target = getattr(torch, bias_dtype)
    changing = {path: bias for path, bias in biases.items() if bias.dtype != target}
    for path, bias in changing.items():
        if getattr(bias, CAPTURED, False):
            raise CaptureError(f"{path} was read by a captured CUDA graph, which keeps the address of its "
                               f"{names([bias.dtype])} storage",
                               hint="prepare before capturing, or prepare a new parameter in its place, then capture")
        if not narrow:
            _refuse_rounding(path, bias, target)
    left = views(changing, subject) if changing else []
    if left:
        raise PreparationError(f"views would be left behind with the old dtype: {'; '.join(left)}",
                               hint="drop them, prepare, and take them again from the parameter")
    made = {path: bias.detach().to(target) for path, bias in changing.items()}
    report = tuple(_told(path, bias.data, made[path], num_experts=num_experts, topk=topk,
                         num_expert_group=num_expert_group, topk_group=topk_group,
                         num_fused_shared_experts=num_fused_shared_experts, scoring=scoring)
                   if path in made else Aligned(path, names([target]), names([target]))
                   for path, bias in biases.items())
    for path, values in made.items():  # last, when nothing is left that may fail
        biases[path].data = values  # the object stays, and with it every holder's reference to it
    if not isinstance(subject, torch.nn.Module):
        return Prepared(subject, report)
    ours = {id(bias) for bias in biases.values()}
    for path in (path for path, tensor in _tensors(subject).items() if id(tensor) in ours):
        _guard(subject, path, narrow)
    return Prepared(biases, report)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those with several names under each."""
    return {**dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False))}


def _find(subject, name: str, num_experts: int) -> dict[str, torch.Tensor]:
    if isinstance(subject, torch.Tensor):
        found = {"correction_bias": subject}
    elif isinstance(subject, torch.nn.Module):
        wanted, every, once = name.split("."), _tensors(subject), {}
        for path, tensor in every.items():
            if path.split(".")[-len(wanted):] == wanted:
                once.setdefault(id(tensor), (path, tensor))  # under the first of its names
        found = dict(once.values())
        if not found:
            near = [path for path in every if "bias" in path.rpartition(".")[2]]
            raise PreparationError(f"{type(subject).__name__} has no parameter and no buffer called {name}",
                                   hint=f"name=... says what it is called; there is {', '.join(near[:5])}" if near else
                                   "it has none with `bias` in its name: is it a layer without one?")
    else:
        raise PreparationError(f"a {type(subject).__name__} was to be prepared, expected a module or a parameter",
                               hint="pass the router's module, or the bias itself")
    for path, bias in found.items():
        if not bias.is_floating_point() or not bias.dim() or bias.shape[-1] != num_experts:
            raise PreparationError(f"{path} is {list(bias.shape)} {names([bias.dtype])}, expected [{num_experts}] of "
                                   "floating point", hint="give the num_experts of this layer, or another name=")
    return found


def _rounded(values: torch.Tensor, target: torch.dtype) -> bool:
    """Whether `target` does not hold some of the values; a NaN stays one."""
    before, after = values.double(), values.to(target).double()
    return bool(((before != after) & ~(before.isnan() & after.isnan())).any())


def _distinct(values: torch.Tensor) -> int | None:
    return None if values.is_meta else values.detach().double().unique().numel()


def _refuse_rounding(path: str, values: torch.Tensor, target: torch.dtype) -> None:
    values = values.detach()
    change = f"{path} would go from {names([values.dtype])} to {names([target])}"
    hint = f"use a router that takes bias_dtype={names([values.dtype])}, or narrow=True to accept other experts"
    if values.is_meta:
        if torch.promote_types(values.dtype, target) != target:
            raise PreparationError(f"{change} before its values are there, so nothing says that they stay", hint=hint)
    elif _rounded(values, target):
        raise PreparationError(f"{change}, which changes values: of {_distinct(values)} distinct ones "
                               f"{_distinct(values.to(target))} would be left", hint=hint)


def _told(path: str, old: torch.Tensor, new: torch.Tensor, **router) -> Aligned:
    probe = {}
    if not old.is_meta and _rounded(old, new.dtype):
        probe = dict(tokens=TOKENS * (old.numel() // router["num_experts"]),
                     changed_tokens=changed_tokens(old, new, **router))
    return Aligned(path, names([old.dtype]), names([new.dtype]), _distinct(old), _distinct(new), **probe)


def _guard(root: torch.nn.Module, path: str, narrow: bool) -> None:
    """From now on `load_state_dict` refuses to round the values of this parameter, unless `narrow`. Each module on the
    way looks, so that one that loads many parameters refuses before it has written the first."""
    parts = path.split(".")
    for depth in range(len(parts)):
        module = root.get_submodule(".".join(parts[:depth]))
        guarded = vars(module).get(_GUARDED)
        if guarded is None:
            guarded = set()
            object.__setattr__(module, _GUARDED, guarded)
            module.register_load_state_dict_pre_hook(_refuse_rounded_load)
        (guarded.discard if narrow else guarded.add)(".".join(parts[depth:]))


def _refuse_rounded_load(module, state_dict, prefix, local_metadata, *_):
    if local_metadata.get("assign_to_params_buffers"):
        return  # what is loaded takes the parameter's place, and is not rounded; it has no tag, which kernels see
    for name in sorted(vars(module).get(_GUARDED, ())):
        given = state_dict.get(prefix + name)
        try:
            bias = attrgetter(name)(module)
        except AttributeError:  # it was taken out since
            continue
        if isinstance(given, torch.Tensor) and given.is_floating_point() and given.shape == bias.shape:
            _refuse_rounding(prefix + name, given, bias.dtype)
