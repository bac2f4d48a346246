"""What the experts' tests share: traits in short, the implementations that serve them here, one judged call, mutants of
the reference, and a naive evaluation in float64."""

from __future__ import annotations

import itertools
import math
import types
from functools import lru_cache
from pathlib import Path

import torch

from kernel_registry import harness, registry
from kernel_registry.ops.moe.experts import cases, oracle, reference

OP = "moe.experts"
FORMATS = {  # (weight_quant, act_quant) that go together
    "none": ("none", "none"),
    "fp8_block": ("fp8_block", "fp8_block"),
    "fp8_channel": ("fp8_channel", "fp8_token"),
    "fp8_channel_static": ("fp8_channel", "fp8_tensor"),
    "fp8_tensor": ("fp8_tensor", "fp8_token"),
    "fp8_tensor_static": ("fp8_tensor", "fp8_tensor"),
    "int8": ("int8_channel", "int8_token"),
    "int8_static": ("int8_channel", "int8_tensor"),
    "int8_w8a16": ("int8_w8a16", "none"),
    "int4": ("int4_w4a16", "none"),
}
ACTIVATIONS = ("silu", "gelu", "swigluoai", "swigluoai_packed")
NEUTRAL = dict(dtype="bfloat16", weight_quant="none", act_quant="none", group_size=128, activation="silu",
               has_bias=False, apply_router_weight_on_input=False, expert_parallel=False, output_alias=False)


def layer(num_experts=6, topk=2, hidden_size=96, intermediate_size=64, format="none", **other) -> dict:
    """A full traits dict. `format` is one of FORMATS."""
    weight_quant, act_quant = FORMATS[format]
    return {**NEUTRAL, "num_experts": num_experts, "topk": topk, "hidden_size": hidden_size,
            "intermediate_size": intermediate_size, "weight_quant": weight_quant, "act_quant": act_quant, **other}


def named(traits: dict) -> str:
    """Traits as a test's id, without what is usual."""
    sizes = "x".join(str(traits[n]) for n in ("num_experts", "topk", "hidden_size", "intermediate_size"))
    return "-".join([sizes, *(f"{name}={value}" for name, value in traits.items()
                              if name in NEUTRAL and value != NEUTRAL[name])])


def implementations(traits: dict, tokens: int = 8) -> list[str]:
    """Names of everything in the registry that serves these traits on this machine, the reference ("torch") among
    them."""
    op, here = registry.catalog.op(OP), registry.platform()
    serving = []
    for implementation in op.implementations:
        platform = harness.home(here, implementation)
        request = op.space.request({**traits, "num_tokens": tokens, "platform": platform or here}, lambda: here)
        if platform is not None and implementation.box.admits(request.traits):
            serving.append(implementation.name)
    return serving


def kernel(name: str, traits: dict, tokens: int = 8):
    """The kernel of the implementation called `name`, bound to these traits."""
    return registry.dispatch(OP, implementation=name, **traits, num_tokens=tokens)


def judged(name: str, traits: dict, tokens: int, *, flavour="random", seed=0, device="cpu", made=None):
    """One call on generated inputs, asserted right by the oracle; its verdict."""
    args, kwargs = cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour)
    verdict = oracle.check(traits, args, kwargs, (made or kernel(name, traits, tokens))(*args, **kwargs))
    assert verdict.passed, f"{name} {named(traits)} {flavour} seed {seed}: {verdict.detail}"
    return verdict


_numbers = itertools.count()


def mutant(*changes: tuple[str, str]):
    """reference.experts with each (old, new) text of its source replaced; a text that is not there is an error."""
    source = Path(reference.__file__).read_text()
    for old, new in changes:
        assert old in source, f"the reference no longer has {old!r}"
        source = source.replace(old, new)
    name = f"{reference.__package__}.mutant_{next(_numbers)}"  # inside the package, for its relative imports
    module = types.ModuleType(name)
    module.__package__ = reference.__package__
    exec(compile(source, name, "exec"), vars(module))
    return module.experts


# ---- a naive evaluation ----------------------------------------------------------------------------------------------

def naive(traits: dict, args, kwargs) -> torch.Tensor:
    """[T, H] float64, slot by slot and element by element as the contract's words say it: a third opinion beside the
    reference and the oracle, for small layers."""
    hidden, w13, w2, topk_weights, topk_ids = args
    size, group = traits["intermediate_size"], traits["group_size"]
    interleaved = traits["activation"] == "swigluoai"
    result = torch.zeros(hidden.shape, dtype=torch.float64)

    @lru_cache
    def layers(expert: int):
        first = _weight(traits, w13[expert], _of(kwargs, "w13_scale", expert), group, None if interleaved else size)
        return first, _weight(traits, w2[expert], _of(kwargs, "w2_scale", expert), group, None)

    for token, slot in itertools.product(range(len(hidden)), range(traits["topk"])):
        expert = int(topk_ids[token, slot])
        if traits["expert_parallel"]:
            table = kwargs["expert_map"].tolist()
            expert = table[expert] if 0 <= expert < len(table) else -1
        if not 0 <= expert < traits["num_experts"]:
            continue
        weight = float(topk_weights[token, slot])
        first, second = layers(expert)
        h = first @ _operand(traits, hidden[token].double(), kwargs.get("a13_scale"), group)
        if traits["has_bias"]:
            h = h + kwargs["w13_bias"][expert].double()
        if traits["apply_router_weight_on_input"]:
            h = h * weight
        pairs = [(h[2 * i], h[2 * i + 1]) if interleaved else (h[i], h[size + i]) for i in range(size)]
        a = torch.tensor([_swiglu(traits["activation"], float(g), float(u)) for g, u in pairs], dtype=torch.float64)
        y = second @ _operand(traits, a, kwargs.get("a2_scale"), group)
        if traits["has_bias"]:
            y = y + kwargs["w2_bias"][expert].double()
        result[token] += y if traits["apply_router_weight_on_input"] else y * weight
    return result


def _of(kwargs, name: str, expert: int):
    return kwargs[name][expert].double() if name in kwargs else None


def _weight(traits, stored: torch.Tensor, scale, group: int, half: int | None) -> torch.Tensor:
    """Float64, one scale looked up for each element. `half`: where the up rows begin, and block rows anew."""
    quant = traits["weight_quant"]
    if quant == "int4_w4a16":
        rows, columns = stored.shape[0], 2 * stored.shape[1]
        weight = torch.tensor([[(int(stored[r, c // 2]) >> 4 * (c % 2)) % 16 - 8 for c in range(columns)]
                               for r in range(rows)], dtype=torch.float64)
    else:
        weight = stored.float().double()
    rows, columns = weight.shape

    def factor(r: int, c: int):
        if quant == "fp8_block":
            block = r // group if half is None or r < half else math.ceil(half / group) + (r - half) // group
            return scale[block, c // group]
        if quant == "int4_w4a16":
            return scale[r, c // group]
        return scale if quant == "fp8_tensor" else scale[r]

    if scale is None:
        return weight
    return weight * torch.tensor([[factor(r, c) for c in range(columns)] for r in range(rows)], dtype=torch.float64)


def _operand(traits, x: torch.Tensor, given, group: int) -> torch.Tensor:
    quant = traits["act_quant"]
    if quant == "none":
        return x.to(getattr(torch, traits["dtype"])).double()
    largest = 448 if quant.startswith("fp8") else 127
    parts = []
    for part in x.float().split(group if quant == "fp8_block" else len(x)):
        scale = given.reshape(()) if quant.endswith("tensor") else part.abs().max().clamp(min=1e-10) / largest
        number = (part / scale).clamp(-largest, largest)
        number = number.to(torch.float8_e4m3fn) if largest == 448 else number.round()
        parts.append(number.double() * scale.double())
    return torch.cat(parts)


def _swiglu(activation: str, gate: float, up: float) -> float:
    if activation == "silu":
        return gate / (1 + math.exp(-gate)) * up
    if activation == "gelu":
        return 0.5 * gate * (1 + math.erf(gate / math.sqrt(2))) * up
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return (up + 1) * gate / (1 + math.exp(-1.702 * gate))
