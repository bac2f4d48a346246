"""Inputs of moe.finalize for tests, verify, bench and run: plain ones, and every kind that has broken a sum somewhere.

`inputs` makes one call; FLAVOURS names the kinds of values, the first being what a model gives; WORKLOADS the layers of
published models. Everything is drawn on the CPU from the seed, so that each device sees the same numbers.
"""

from __future__ import annotations

import torch

FLAVOURS = (
    "random",  # normal rows, weights that add up to one
    "ordered",  # large numbers that cancel and small ones between them: another order of the slots is another sum
    "not_local",  # most ids are -1, out of range or mapped to -1, their rows and weights NaN; some tokens have no other
    "strided",  # rows, shared output and out are slices of padded buffers, or columns far apart; the padding is NaN
    "wide_ids",  # int64 ids and map, bfloat16 weights, a float32 shared output
    "no_ids",  # topk_ids is None, where that is possible
    "large",  # rows near the largest float16, whose sum has no float16
    "nonfinite",  # NaN and infinities in rows that count, and weights of 0
)


def _layer(experts, topk, hidden, **other):
    return {"num_experts": experts, "topk": topk, "hidden_size": hidden, **other}


_REDUCED = {"reduced": True, "weights_applied": True}
WORKLOADS = {
    "deepseek-v3": _layer(256, 8, 7168),
    "deepseek-v3-ep8": _layer(32, 8, 7168, expert_parallel=True),
    "deepseek-v3-shared": _layer(256, 8, 7168, has_shared=True),
    "deepseek-v3-reduced": _layer(256, 8, 7168, has_shared=True, **_REDUCED),
    "deepseek-v3-float32": _layer(256, 8, 7168, dtype="float32", weights_applied=True),
    "glm-4.5-air": _layer(128, 8, 4096, has_shared=True),
    "qwen3-30b-a3b": _layer(128, 8, 2048, weights_applied=True),
    "gpt-oss-20b": _layer(32, 4, 2880),
    "mixtral-8x7b": _layer(8, 2, 4096),
    "llama-4-maverick": _layer(128, 1, 5120, has_shared=True),
    "kimi-k3": _layer(896, 16, 7168, out_dtype="bfloat16", dtype="float16"),
}


def _values(flavour, shape, normal, integers):
    """The rows, float32."""
    if flavour == "ordered":
        return torch.tensor([2.0**15, -(2.0**15), 2.0**-9, 3 * 2.0**-10, 1.0])[integers(0, 5, shape)]
    if flavour == "large":
        return 60_000 * (1 - 0.05 * normal(*shape).abs().clamp(max=1))
    rows = normal(*shape)
    if flavour == "nonfinite":
        odd = torch.tensor([float("nan"), float("inf"), float("-inf")])[integers(0, 3, shape)]
        rows = torch.where(integers(0, 9, shape) == 0, odd, rows)
    return rows


def _padded(values: torch.Tensor, odd: bool, fill=float("nan")) -> torch.Tensor:
    """`values` in a larger buffer: rows 5 columns longer, or, `odd`, the columns far apart."""
    if odd:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((*values.shape[:-1], values.shape[-1] + 5), fill, dtype=values.dtype, device=values.device)
    wide[..., 2:-3] = values
    return wide[..., 2:-3]


def inputs(traits, num_tokens: int, *, seed: int = 0, device="cpu", flavour: str = "random"):
    """(args, kwargs) of one call with these traits (canonical values; absent ones have their defaults)."""
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour {flavour!r} is not one of {', '.join(FLAVOURS)}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    experts, topk, hidden = traits["num_experts"], traits["topk"], traits["hidden_size"]
    reduced, parallel = traits.get("reduced", False), traits.get("expert_parallel", False)
    dtype, out_dtype = (getattr(torch, traits.get(name, "bfloat16")) for name in ("dtype", "out_dtype"))
    wide, strided = flavour == "wide_ids", flavour == "strided"
    integer = torch.int64 if wide else torch.int32
    rows = _values(flavour, (num_tokens, hidden) if reduced else (num_tokens, topk, hidden), normal, integers)
    weights, ids, kwargs = None, None, {"routed_scaling_factor": 2.0 if flavour == "ordered" else 2.5}
    if not traits.get("weights_applied", False):
        weights = torch.softmax(normal(num_tokens, topk), dim=1)
        if flavour == "ordered":
            weights = torch.full((num_tokens, topk), 0.5)
        elif flavour == "nonfinite":
            weights = torch.where(integers(0, 4, weights.shape) == 0, 0.0, weights)
    if not reduced and (flavour != "no_ids" or parallel):
        known, table = experts, None
        if parallel:
            known = 4 * experts
            table = torch.full((known,), -1)
            table[torch.randperm(known, generator=generator)[:experts]] = torch.arange(experts)
            kwargs["expert_map"] = table.to(integer).to(device)
        ids = integers(0, known, (num_tokens, topk))
        if flavour == "not_local":
            odd = torch.tensor([-1, known, -(2**31), 2**31 - 1])[integers(0, 4, ids.shape)]
            ids = torch.where(integers(0, 3, ids.shape) == 0, ids, odd)
            ids[::4] = -1
            here = (ids >= 0) & (ids < known)
            if table is not None:
                here &= table[ids.clamp(0, known - 1)] >= 0
            rows[~here] = float("nan")
            if weights is not None:
                weights[~here] = float("nan")
        ids = ids.to(integer).to(device)
    rows = rows.to(dtype).to(device)
    if weights is not None:
        weights = weights.to(torch.bfloat16 if wide else torch.float32).to(device)
    if traits.get("has_shared", False):
        shared = normal(num_tokens, hidden).to(torch.float32 if wide else out_dtype).to(device)
        kwargs["shared_output"] = _padded(shared, False) if strided else shared
    if traits.get("output_alias", False):
        out = torch.full((num_tokens, hidden), float("nan"), dtype=out_dtype, device=device)
        kwargs["out"] = _padded(out, False) if strided else out
    return (_padded(rows, seed % 2 == 1) if strided else rows, weights, ids), kwargs


def prefix(args, kwargs, outputs, count: int):
    """The call of the first `count` rows alone, (args, kwargs, outputs): rows never mix, so these are its outputs."""
    per_row = {name: kwargs[name][:count] for name in ("shared_output", "out") if name in kwargs}
    return tuple(arg if arg is None else arg[:count] for arg in args), {**kwargs, **per_row}, outputs[:count]
