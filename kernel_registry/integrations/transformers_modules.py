"""What the modules of transformers say about themselves: the arguments of moe_topk and moe_experts, read off them.

Routers are read by a table, transformers.yaml. Experts follow the contract of transformers' experts interface, whose
attributes are the same in all models. Neither is taken at its word: what a module computes is compared, once, at load,
with what the registry would compute for what was read, on a few random numbers in float32. A new version of
transformers that routes or gates otherwise is then not served, instead of served wrongly.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Mapping

import torch

from ..registry import Registry
from ..traits.experts import ACTIVATION

_KNOWN_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_TOPK = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")  # fields of configs
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS, _COLUMNS = 16, 24  # of the comparisons
_compared: dict[tuple, str] = {}  # what came of those of routers


class Declined(Exception):
    """The module is nothing that the registry serves; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Family:
    """A row of transformers.yaml, which says what its keys are."""

    classes: Mapping[str, str]
    gate: str
    fixed: Mapping[str, object]
    read: Mapping[str, str]
    gate_bias: str | None = None
    correction_bias: str | None = None

    @property
    def takes_bias(self) -> bool:
        """Whether forward has the correction bias as an argument."""
        return self.correction_bias == "argument"

    def bias(self, module, arguments: tuple):
        if self.takes_bias:
            return arguments[0]
        return None if self.correction_bias is None else getattr(module, self.correction_bias)

    def logits(self, module, hidden_states):
        """The gate's product, as the module's own code has it: these logits are part of what it returns."""
        weight = module.weight
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.gate == "float32":
            return torch.nn.functional.linear(hidden_states.float(), weight.float())
        bias = None if self.gate_bias is None else getattr(module, self.gate_bias)
        return torch.nn.functional.linear(hidden_states.to(weight.dtype), weight, bias)


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """The rows of transformers.yaml, by class name."""
    import yaml

    data = yaml.safe_load(Path(__file__).with_name("transformers.yaml").read_text(encoding="utf-8"))
    rows = [Family(**row) for row in data["routers"].values()]
    return {name: row for row in rows for name in row.classes}


def family_of(module) -> Family | None:
    return next((families()[c.__name__] for c in type(module).__mro__ if c.__name__ in families()), None)


def own_forward(module_class):
    """The class's forward, below ours where we replaced it."""
    return getattr(module_class.forward, "kernel_registry_own", module_class.forward)


def is_experts(module) -> bool:
    """Whether transformers' experts interface dispatches this module's forward."""
    return hasattr(module, "_apply_gate") and isinstance(getattr(module, "is_transposed", None), bool)


# ---- routers ---------------------------------------------------------------------------------------------------------

def read_router(module, family: Family) -> dict[str, object]:
    """The keyword arguments of moe_topk for this router. Raises Declined."""
    _plain_tensors(module, ["weight"])
    missing = [name for name in family.read.values() if not isinstance(getattr(module, name, None), (int, float))]
    if missing:
        raise Declined(f"it has no {missing[0]}, or no number there")
    call = {**family.fixed, **{argument: getattr(module, name) for argument, name in family.read.items()}}
    key = (type(module), own_forward(type(module)), *call.items())
    if key not in _compared:  # once for each class and each call: a model has many layers of one kind
        _compared[key] = _routes_otherwise(module, family, call)
    if _compared[key]:
        raise Declined(_compared[key])
    return call


def router_example(module, family: Family, call: Mapping) -> tuple[tuple, dict]:
    """(args, kwargs) of moe_topk as a forward of this router passes them, for no token."""
    weight, experts = module.weight, module.weight.shape[0]
    dtype = torch.float32 if family.gate == "float32" else weight.dtype
    bias = family.bias(module, (weight.new_empty(experts, dtype=torch.float32),))
    return (weight.new_empty((0, experts), dtype=dtype), bias), dict(call)


def _routes_otherwise(module, family: Family, call: Mapping) -> str:
    """Why this router does not route as its family and `call` say; "" where it does."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator)

    twin = copy.copy(module)
    experts, width = module.weight.shape
    twin._parameters = {"weight": random(experts, width) / width ** 0.5}
    if family.gate_bias is not None:
        twin._parameters[family.gate_bias] = random(experts)
    bias, twin._buffers = random(experts) / 4, {}
    if family.correction_bias is not None and not family.takes_bias:
        twin._buffers[family.correction_bias] = bias
    hidden = random(_TOKENS, width)
    arguments = (bias,) if family.takes_bias else ()
    try:
        with torch.no_grad():
            logits, weights, ids = own_forward(type(module))(twin, hidden, *arguments)
            ours = family.logits(twin, hidden)
            wanted_weights, wanted_ids = _reference("moe.topk", ours, family.bias(twin, arguments), **call)
    except Exception as error:
        return f"its forward is not the one that the table describes: {type(error).__name__}: {error}"
    dense, wanted = torch.zeros(2, _TOKENS, experts)
    dense.scatter_(1, ids.long(), weights.float())
    wanted.scatter_(1, wanted_ids.long(), wanted_weights)
    if not torch.allclose(logits.float(), ours, rtol=1e-5, atol=1e-5) or \
            not torch.allclose(dense, wanted, rtol=1e-4, atol=1e-6):
        return "its forward routes otherwise than the table says"
    return ""


# ---- experts ---------------------------------------------------------------------------------------------------------

def read_experts(module) -> dict[str, object]:
    """The keyword arguments of moe_experts for these experts. Raises Declined."""
    unknown = [name for name, value in vars(module).items()
               if name.startswith(("has_", "is_")) and name not in _KNOWN_FLAGS and value]
    if unknown:
        raise Declined(f"{unknown[0]} has no trait")
    if not module.has_gate:
        raise Declined("its experts have no gate")
    _plain_tensors(module, ["gate_up_proj", "down_proj"])
    return {"activation": _activation(module), **_quantisation(module)}


def experts_tensors(module) -> tuple[tuple, dict]:
    """(w13, w2) and the other tensors of moe_experts by name. For traced code: attributes only."""
    w13, w2, more = module.gate_up_proj, module.down_proj, {}
    if module.is_transposed:  # laid out by `lay_out`, so that these are contiguous
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    if w13.element_size() == 1:
        more["w13_scale"], more["w2_scale"] = module.gate_up_proj_scale_inv, module.down_proj_scale_inv
    if module.has_bias:
        more["w13_bias"], more["w2_bias"] = module.gate_up_proj_bias, module.down_proj_bias
    return (w13, w2), more


def experts_example(module, call: Mapping) -> tuple[tuple, dict]:
    """(args, kwargs) of moe_experts as a forward of these experts passes them, for no token."""
    (w13, w2), more = experts_tensors(module)
    dtype = w2.dtype if w2.element_size() > 1 else getattr(module.config, "dtype", None) or torch.bfloat16
    hidden = w2.new_empty((0, w2.shape[1]), dtype=dtype)
    weights, ids = (w2.new_empty((0, _topk(module)), dtype=d) for d in (torch.float32, torch.int64))
    return (hidden, w13, w2, weights, ids), {**more, **call}


def _topk(module) -> int:
    """How many experts a token has, by the config: for the report and the first binding; a call brings its own."""
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    return next((value for name in _TOPK if isinstance(value := getattr(config, name, None), int)), 1)


def lay_out(module) -> "list[torch.nn.Parameter]":
    """Gives experts stored [E, in, out] the memory order of [E, out, in], which the kernels read. Shape and values stay
    as they are, so the module's own code runs as before. Returns what was changed; `.contiguous()` undoes it."""
    changed = []
    for parameter in (module.gate_up_proj, module.down_proj) if module.is_transposed else ():
        if not parameter.transpose(1, 2).is_contiguous():
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
            changed.append(parameter)
    return changed


def _quantisation(module) -> dict[str, object]:
    w13, w2 = module.gate_up_proj, module.down_proj
    if w13.dtype in _PLAIN and w2.dtype == w13.dtype:
        return {}
    block, scale = getattr(module, "block_size", None), getattr(module, "gate_up_proj_scale_inv", None)
    if w13.dtype is not torch.float8_e4m3fn or scale is None:
        raise Declined(f"weights in {w13.dtype} are in no format that moe.experts has")
    if not block or block[0] != block[1]:
        raise Declined(f"fp8 weights with block_size={block} have no format of moe.experts: it has square blocks")
    if getattr(module, "activation_scheme", "dynamic") != "dynamic":
        raise Declined("its fp8 activations have given scales, those of moe.experts' blocks are made")
    if scale.dtype is not torch.float32:
        raise Declined(f"its scales are {scale.dtype}, those of moe.experts are float32")
    if w2.shape[2] % block[0]:
        raise Declined(f"a block of {block[0]} rows has some of the gate and some of the up projection, whose "
                       f"{w2.shape[2]} rows are no multiple of it")
    return {"weight_quant": "fp8_block", "act_quant": "fp8_block", "group_size": block[0]}


def _activation(module) -> str:
    """The activation that `_apply_gate` is: that which gives the same for the same numbers."""
    rows = torch.randn(_TOKENS, 2 * _COLUMNS, generator=torch.Generator().manual_seed(0)) * 6
    try:
        with torch.no_grad():
            own = module._apply_gate(rows.clone())
    except Exception as error:
        raise Declined(f"its gate can't be asked: {type(error).__name__}: {error}") from error
    for activation in ACTIVATION.choices:
        if own.shape == (_TOKENS, _COLUMNS) and torch.allclose(own, _activated(activation), rtol=1e-4, atol=1e-5):
            return activation
    raise Declined(f"its gate is none of {', '.join(ACTIVATION.choices)}")


@lru_cache(maxsize=None)
def _activated(activation: str) -> torch.Tensor:
    """What moe.experts makes of those numbers between two products that change nothing."""
    rows = torch.randn(_TOKENS, 2 * _COLUMNS, generator=torch.Generator().manual_seed(0)) * 6
    one = torch.ones(_TOKENS, 1), torch.zeros(_TOKENS, 1, dtype=torch.int64)
    through = torch.eye(2 * _COLUMNS)
    return _reference("moe.experts", rows, through[None], through[None, :, :_COLUMNS].contiguous(), *one,
                      activation=activation)[:, :_COLUMNS]


def _plain_tensors(module, names) -> None:
    for name in names:
        tensor = getattr(module, name, None)
        if not isinstance(tensor, torch.Tensor) or type(tensor.data) is not torch.Tensor:
            kind = "missing" if tensor is None else f"a {type(tensor.data).__name__}"
            raise Declined(f"{name} is {kind}, expected a plain tensor")


@lru_cache(maxsize=1)
def _referee() -> Registry:
    """A registry of its own, so that comparisons leave no kernel in the user's plan."""
    return Registry(plugins=False, environment=False, platform="cpu")


def _reference(op: str, *args, **kwargs):
    traits, args, kwargs = _referee().catalog.op(op).contract.unpack(*args, **kwargs)
    return _referee().dispatch(op, **traits)(*args, **kwargs)
