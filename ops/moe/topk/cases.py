"""Inputs of moe.topk for tests, verify, bench and run: plain ones, and every kind that has broken a router somewhere.

`inputs` makes one call; FLAVOURS names the kinds of values, the first being what a model gives; WORKLOADS the routers
of published models. Everything is drawn on the CPU from the seed, so that each device sees the same numbers.
"""

from __future__ import annotations

import torch

FLAVOURS = (
    "random",  # normal logits, small bias
    "offset_bias",  # a bias in a narrow band far from 0, as trained models have: bfloat16 would merge its values
    "ties",  # logits and biases of very few levels: many exact ties, inside groups and between them
    "constant",  # one value everywhere
    "tiny_scores",  # logits between -60 and -12: the bias chooses, weights come from scores down to 1e-26
    "underflow",  # logits below -90: every float32 score is 0
    "large",  # logits up to +-80, biases up to +-30
    "negative_bias",  # every choice is negative
    "huge_bias",  # biases up to the largest float32, where sums of two overflow
    "signed_zero",  # zeros of both signs
    "nonfinite",  # rows with NaN, +inf and -inf in several patterns among ordinary rows
    "masked_experts",  # biases of -inf leave few experts, or fewer than K
    "padded",  # num_token_non_padded below T, padded rows NaN
    "mapped",  # expert_map over the routed experts, int64
    "mapped_all",  # expert_map over routed and shared experts, int32
)

_SIGMOID = {"scoring": "sigmoid", "has_bias": True}


def _workload(experts, topk, groups=1, kept=1, **other):
    return {"num_experts": experts, "topk": topk, "num_expert_group": groups, "topk_group": kept, **_SIGMOID, **other}


WORKLOADS = {
    "deepseek-v3": _workload(256, 8, 8, 4),
    "deepseek-v3-fused-shared": _workload(256, 9, 8, 4, num_fused_shared_experts=1),
    "a.x-k1": _workload(192, 8, 8, 4),
    "bailing-hybrid": _workload(512, 8, 8, 4),
    "minimax-m2": _workload(256, 8),
    "glm-4.5": _workload(160, 8),
    "glm-4.5-air": _workload(128, 8),
    "glm-5.3": _workload(288, 8),
    "kimi-k2": _workload(384, 8),
    "kimi-k3": _workload(896, 16),
    "nemotron-3-super": _workload(512, 22),
    "qwen3-moe": _workload(128, 8, scoring="softmax", has_bias=False),
    "qwen3-next": _workload(512, 10, scoring="softmax", has_bias=False),
    "gpt-oss": _workload(128, 4, scoring="softmax", has_bias=False),
    "mixtral": _workload(8, 2, scoring="softmax", has_bias=False),
    "llama-4": _workload(128, 1, has_bias=False, renormalize=False),
    "deepseek-v2": _workload(160, 6, 8, 3, scoring="softmax", has_bias=False, renormalize=False),
    "deepseek-v4": _workload(256, 6, scoring="sqrtsoftplus"),
}


def _values(flavour, num_tokens, experts, normal, integers, uniform):
    """(logits, bias) in float32 for a flavour; `normal`, `integers`, `uniform` draw."""
    logits, bias = normal(num_tokens, experts), normal(experts) * 0.1
    if flavour == "offset_bias":
        bias = 6.817 + 0.246 * uniform(experts)
    elif flavour == "ties":
        logits, bias = integers(-1, 2, (num_tokens, experts)), integers(0, 2, (experts,)) * 0.5
    elif flavour == "constant":
        logits, bias = torch.full_like(logits, 0.75), torch.full_like(bias, 0.5)
    elif flavour == "tiny_scores":
        logits = -12 - 48 * uniform(num_tokens, experts)
    elif flavour == "underflow":
        logits = -90 - logits.abs()
    elif flavour == "large":
        logits, bias = logits * 25, bias * 100
    elif flavour == "negative_bias":
        bias = -3 - bias.abs()
    elif flavour == "huge_bias":
        bias = torch.tensor([-3.4e38, -1e38, 1e38, 3.4e38])[integers(0, 4, (experts,)).long()]
    elif flavour == "signed_zero":
        logits = torch.where(uniform(num_tokens, experts) < 0.5, 0.0, -0.0)
        bias = torch.where(uniform(experts) < 0.5, 0.0, -0.0)
    elif flavour == "nonfinite":
        odd = torch.tensor([float("nan"), float("inf"), float("-inf")])
        for row in range(num_tokens):
            kind = row % 7
            if kind == 0:
                logits[row] = odd[(row // 7) % 3]  # a whole row
            elif kind == 1:
                logits[row, row % experts] = float("nan")
            elif kind == 2:
                logits[row, : experts // 2] = float("nan")  # whole groups, where there are any
            elif kind == 3:
                where = uniform(experts) < 0.9
                logits[row, where] = odd[integers(0, 3, (experts,)).long()][where]
    elif flavour == "masked_experts":
        bias[uniform(experts) < 0.8] = float("-inf")
    return logits, bias


def inputs(traits, num_tokens: int, *, seed: int = 0, device="cpu", flavour: str = "random"):
    """(args, kwargs) of one call with these traits (canonical values; absent ones have their defaults)."""
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour {flavour!r} is not one of {', '.join(FLAVOURS)}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator).float()

    experts, shared = traits["num_experts"], traits.get("num_fused_shared_experts", 0)
    logits, bias = _values(flavour, num_tokens, experts, normal, integers, uniform)
    kwargs = {"routed_scaling_factor": 2.5}
    if shared:
        kwargs["shared_expert_weight"] = 0.75
    if flavour == "padded":
        live = int(uniform(1) * (num_tokens + 1))
        logits[live:] = float("nan")
        kwargs["num_token_non_padded"] = torch.tensor([live], dtype=torch.int32 if seed % 2 else torch.int64,
                                                      device=device)
    elif flavour == "mapped":
        kwargs["expert_map"] = torch.randperm(experts, generator=generator).to(device)
    elif flavour == "mapped_all":
        kwargs["expert_map"] = torch.randperm(experts + shared, generator=generator).to(torch.int32).to(device)
    logits = logits.to(getattr(torch, traits.get("dtype", "float32"))).to(device)
    if not traits.get("contiguous", True):
        if seed % 2:
            logits = logits.t().contiguous().t()
        else:
            wide = torch.full((num_tokens, experts + 3), float("nan"), dtype=logits.dtype, device=device)
            wide[:, :experts] = logits
            logits = wide[:, :experts]
    if not traits.get("has_bias", True):
        return (logits, None), kwargs
    return (logits, bias.to(getattr(torch, traits.get("bias_dtype", "float32"))).to(device)), kwargs


def prefix(args, kwargs, outputs, count: int):
    """The call of the first `count` rows alone, (args, kwargs, outputs): rows never mix, so these are its outputs."""
    logits, bias = args
    return (logits[:count], bias), kwargs, tuple(output[:count] for output in outputs)
