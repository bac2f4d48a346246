"""Inputs of moe.experts for tests, verify, bench and run: plain ones, and every kind that broke a kernel somewhere.

`inputs` makes one call; FLAVOURS names the kinds of values, the first being what a model gives; WORKLOADS the layers of
published models as one GPU has them. Those are gigabytes of weights, so `reduced` makes small layers of them, which
verify, bench and run use on a CPU.

Small layers are drawn on the CPU from the seed, so that each device sees the same numbers. Large ones are drawn on
their device, expert by expert, and kept: until another layer is asked for, calls differ in their tokens and routing
only, as a model's do.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .formats import ACTIVATIONS, w2_matrix, w13_matrix

FLAVOURS = (
    "random",  # normal hidden states and weights, each token to K experts, all as likely
    "skewed",  # few experts get most tokens, by Zipf's law
    "padded",  # some tokens are padding: ids -1, hidden states and routing weights NaN
    "one_expert",  # every token to the same expert, its other slots -1
    "none_local",  # no slot of any token has its expert here
    "invalid_ids",  # ids below 0 and past the end, some of which are valid when cut to 32 bits
    "unused_experts",  # experts that no token uses have weights, scales and biases of NaN
    "zero_rows",  # some hidden states are all 0: dynamic scales have nothing to go by
    "outliers",  # large columns of hidden states; routing weights that are large, tiny, negative and 0
    "int64_ids",  # int64 ids, bfloat16 routing weights, float32 biases
    "half_weights",  # float16 routing weights and biases
)

_FP8_BLOCK = {"weight_quant": "fp8_block", "act_quant": "fp8_block"}


def _workload(experts, topk, hidden, intermediate, **other):
    return {"num_experts": experts, "topk": topk, "hidden_size": hidden, "intermediate_size": intermediate, **other}


WORKLOADS = {
    "deepseek-v3-tp8": _workload(256, 8, 7168, 256, **_FP8_BLOCK),
    "deepseek-v3-ep8": _workload(32, 8, 7168, 2048, expert_parallel=True, **_FP8_BLOCK),
    "kimi-k2-tp8": _workload(384, 8, 7168, 256, **_FP8_BLOCK),
    "kimi-k2-tp8-int4": _workload(384, 8, 7168, 256, weight_quant="int4_w4a16", group_size=32),
    "glm-4.5-tp8": _workload(160, 8, 5120, 192, **_FP8_BLOCK),  # 192 rows: a ragged block
    "minimax-m2": _workload(256, 8, 3072, 1536, **_FP8_BLOCK),
    "qwen3-30b": _workload(128, 8, 2048, 768),
    "qwen3-30b-fp8-channel": _workload(128, 8, 2048, 768, weight_quant="fp8_channel", act_quant="fp8_token"),
    "qwen3-30b-fp8-tensor": _workload(128, 8, 2048, 768, weight_quant="fp8_tensor", act_quant="fp8_tensor"),
    "qwen3-30b-int8": _workload(128, 8, 2048, 768, weight_quant="int8_channel", act_quant="int8_token"),
    "qwen3-next-80b": _workload(512, 10, 2048, 512),
    "gpt-oss-20b": _workload(32, 4, 2880, 2880, activation="swigluoai", has_bias=True),
    "mixtral-8x7b": _workload(8, 2, 4096, 14336),
    "mixtral-8x7b-int8": _workload(8, 2, 4096, 14336, weight_quant="int8_w8a16"),
    "llama-4-scout-tp8": _workload(16, 1, 5120, 1024, apply_router_weight_on_input=True),
}

_MACHINES = 8  # with expert_parallel: how many times the experts that are here
_SMALL = 2**22  # weights of a layer that a CPU makes, multiplies and judges in a moment
_DRAWN_ON_CPU = 2**24


def _weights_in(traits) -> int:
    return 3 * traits["num_experts"] * traits["hidden_size"] * traits["intermediate_size"]


def reduced(traits):
    """`traits` of a layer that is small enough for any machine; the same traits where they already are.

    Formats, activation and options stay, and so does topk up to 32. There are four more experts than slots, and a size
    keeps its remainder by 128, hence what is ragged about it, above 256.
    """
    if _weights_in(traits) <= _SMALL:
        return dict(traits)
    topk = min(traits["topk"], 32)
    sizes = {name: size if size < 384 else 256 + size % 128
             for name in ("hidden_size", "intermediate_size") for size in [traits[name]]}
    return {**traits, **sizes, "topk": topk, "num_experts": min(traits["num_experts"], topk + 4)}


def inputs(traits, num_tokens: int, *, seed: int = 0, device="cpu", flavour: str = "random"):
    """(args, kwargs) of one call with these traits (canonical values; absent ones have their defaults)."""
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour {flavour!r} is not one of {', '.join(FLAVOURS)}")
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, traits.get("dtype", "bfloat16"))
    id_dtype, weight_dtype, other_dtype = {
        "int64_ids": (torch.int64, torch.bfloat16, torch.float32),
        "half_weights": (torch.int32, torch.float16, torch.float16),
    }.get(flavour, (torch.int64 if flavour == "invalid_ids" and seed % 2 else torch.int32, torch.float32, dtype))

    ids, table = _routing(traits, num_tokens, flavour, generator)
    weights = 0.05 + torch.rand(ids.shape, generator=generator)
    weights = weights / weights.sum(dim=1, keepdim=True) * (0.5 + torch.rand(num_tokens, 1, generator=generator))
    hidden = torch.randn(num_tokens, traits["hidden_size"], generator=generator)
    some = torch.rand(num_tokens, generator=generator) < 0.3
    layer = _layer(traits, seed, device, other_dtype)
    if flavour == "padded":
        ids[some], hidden[some], weights[some] = -1, float("nan"), float("nan")
    elif flavour == "invalid_ids":
        invalid = [-1, -2, -2**31, traits["num_experts"] if table is None else len(table), 2**30, 2**31 - 1]
        invalid += [2**32, 2**32 + 1, -2**32, 2**40] if id_dtype == torch.int64 else []
        wrong = torch.rand(ids.shape, generator=generator) < 0.4
        ids[wrong] = torch.tensor(invalid)[torch.randint(len(invalid), ids.shape, generator=generator)][wrong]
    elif flavour == "unused_experts":
        used = torch.randperm(traits["num_experts"], generator=generator) % 2 == 0
        row = ids if table is None else table[ids]
        ids[(row < 0) | ~used[row]] = -1
        layer = _poisoned(layer, ~used)
    elif flavour == "zero_rows":
        hidden[some] = 0
    elif flavour == "outliers":
        hidden[:, torch.rand(hidden.shape[1], generator=generator) < 0.02] *= 8
        weights = torch.tensor([0.0, 1e-4, -2.0, 30.0])[torch.randint(4, ids.shape, generator=generator)]

    kwargs = {name: layer[name] for name in ("w13_scale", "w2_scale", "w13_bias", "w2_bias") if name in layer}
    act = ACTIVATIONS[traits.get("act_quant", "none")]
    if act is not None and not act.group:  # given scales, as if from other tokens: few values are beyond them
        shape = (1,) if seed % 2 else ()
        kwargs["a13_scale"] = torch.full(shape, 3.7 / act.largest, device=device)
        kwargs["a2_scale"] = torch.full(shape, 10.3 / act.largest, device=device)
    if table is not None:
        kwargs["expert_map"] = table.to(torch.int32 if seed % 2 else torch.int64).to(device)
    hidden = hidden.to(dtype).to(device)
    if traits.get("output_alias", False):
        kwargs["out"] = torch.full_like(hidden, float("nan"))  # what is not written shows
    return (hidden, layer["w13"], layer["w2"], weights.to(weight_dtype).to(device), ids.to(id_dtype).to(device)), kwargs


def prefix(args, kwargs, outputs, count: int):
    """The call of the first `count` rows alone, (args, kwargs, outputs): rows never mix, so these are its outputs."""
    hidden, w13, w2, weights, ids = args
    if "out" in kwargs:
        kwargs = {**kwargs, "out": kwargs["out"][:count]}
    return (hidden[:count], w13, w2, weights[:count], ids[:count]), kwargs, outputs[:count]


def _routing(traits, tokens: int, flavour: str, generator):
    """(ids [T, K] int64, expert_map int64 or None)."""
    experts, topk, table = traits["num_experts"], traits["topk"], None
    everywhere = experts
    if traits.get("expert_parallel", False):
        everywhere = _MACHINES * experts
        table = torch.full((everywhere,), -1)
        here = torch.randperm(everywhere, generator=generator)[:experts]
        table[here] = torch.randperm(experts, generator=generator)
    if flavour == "none_local":
        ids = torch.full((tokens, topk), -1)
        if table is not None:
            elsewhere = (table < 0).nonzero()[:, 0]
            ids = elsewhere[torch.randint(len(elsewhere), (tokens, topk), generator=generator)]
        return ids, table
    if flavour == "one_expert":
        ids = torch.full((tokens, topk), -1)
        one = experts // 2 if table is None else int((table == experts // 2).nonzero())
        ids.scatter_(1, torch.randint(topk, (tokens, 1), generator=generator), one)
        return ids, table
    if topk > everywhere:
        return torch.randint(everywhere, (tokens, topk), generator=generator), table
    score = -torch.rand(tokens, everywhere, generator=generator).log().neg().log()  # Gumbel: the K best are a sample
    if flavour == "skewed":
        score -= 1.2 * (1.0 + torch.randperm(everywhere, generator=generator)).log()
    return score.topk(topk, dim=1).indices, table


def _layer(traits, seed: int, device, other_dtype) -> dict[str, torch.Tensor]:
    """Weights, scales and biases of all experts. Large ones do not depend on the seed."""
    names = ("num_experts", "hidden_size", "intermediate_size", "dtype", "weight_quant", "group_size", "activation",
             "has_bias")
    key = tuple((name, traits[name]) for name in names if name in traits)
    if _weights_in(traits) > _DRAWN_ON_CPU:
        return _large_layer(key, str(device), other_dtype)
    layer = _drawn(dict(key), torch.Generator().manual_seed(seed + 1), "cpu", other_dtype)
    return {name: tensor.to(device) for name, tensor in layer.items()}


@lru_cache(maxsize=1)
def _large_layer(key, device: str, other_dtype):
    return _drawn(dict(key), torch.Generator(device).manual_seed(1), device, other_dtype)


def _drawn(traits, generator, device, other_dtype) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, traits.get("dtype", "bfloat16"))
    layer = {}

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    for name, matrix in (("w13", w13_matrix(**traits)), ("w2", w2_matrix(**traits))):
        stored = torch.empty(matrix.stored_shape, dtype=matrix.format.stored or dtype, device=device)
        # scales of int4 come in the checkpoint's dtype, all others in float32
        scale_dtype = other_dtype if other_dtype in matrix.format.scale_dtypes else torch.float32
        scale = torch.empty(matrix.scale_shape or (0,), dtype=scale_dtype, device=device)
        for expert in range(matrix.experts):
            # rows and columns of different size, so that a scale in the wrong place is far off
            uneven = torch.exp(0.4 * normal(matrix.rows, 1)) * torch.exp(0.4 * normal(1, matrix.columns))
            weight = normal(matrix.rows, matrix.columns) * uneven / matrix.columns**0.5
            if matrix.scale_shape is None:
                stored[expert] = weight.to(dtype)
            else:
                stored[expert], scale[expert] = matrix.quantise(weight, scale_dtype)
        layer[name] = stored
        if matrix.scale_shape is not None:
            layer[f"{name}_scale"] = scale
        if traits.get("has_bias", False):
            layer[f"{name}_bias"] = (0.5 * normal(matrix.experts, matrix.rows)).to(other_dtype)
    return layer


def _poisoned(layer, unused: torch.Tensor) -> dict[str, torch.Tensor]:
    """A copy in which whatever of the `unused` experts can be NaN is."""
    poisoned = {}
    for name, tensor in layer.items():
        poisoned[name] = tensor = tensor.clone()
        rows = unused.to(tensor.device)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8)[rows] = 0x7F
        elif tensor.is_floating_point():
            tensor[rows] = float("nan")
    return poisoned
