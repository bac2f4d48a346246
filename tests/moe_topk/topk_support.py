"""What the routing tests share: traits in short, who serves them, one judged call, the numerics suite."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from kernel_registry.ops.moe.topk import cases, oracle

DEFAULTS = dict(num_expert_group=1, topk_group=1, num_fused_shared_experts=0, scoring="sigmoid", has_bias=True,
                renormalize=True, dtype="float32", bias_dtype="float32", score_dtype="float32")


def routing(num_experts: int, topk: int, groups: int = 1, kept: int = 1, shared: int = 0, **other) -> dict:
    """A full traits dict; `topk` counts the shared slots."""
    return {**DEFAULTS, "num_experts": num_experts, "topk": topk, "num_expert_group": groups, "topk_group": kept,
            "num_fused_shared_experts": shared, **other}


def implementations(traits: dict) -> list[str]:
    """Names of the modules that serve these traits: the reference always, the Triton router what its docstring says."""
    groups, experts = traits["num_expert_group"], traits["num_experts"]
    size = experts // groups
    softmax = traits["scoring"] == "softmax"
    fits = groups == 1 or (groups <= 32 and 2 <= size <= (128 if traits["has_bias"] else 1024))
    served = (traits["score_dtype"] == "float32" and experts <= 1024 and traits["topk"] <= 32 and fits
              and {traits["dtype"], traits["bias_dtype"]} <= {"float32", "bfloat16", "float16"}
              and not (softmax and traits["has_bias"]))
    return ["reference", "triton_router"] if served else ["reference"]


def row_counts(traits: dict) -> list[int]:
    """Every rows_per_program that the Triton router takes for these traits."""
    slots = 1 << (traits["topk"] - 1).bit_length()
    return [rows for rows in (1, 2, 4, 8, 16) if rows * slots <= 32]


def named(traits: dict) -> str:
    """Traits as a test's id, without what is usual."""
    parts = [] if traits["scoring"] == "sigmoid" else [traits["scoring"]]
    parts.append(f"{traits['num_experts']}e")
    parts += [f"{traits['num_expert_group']}g{traits['topk_group']}"] if traits["num_expert_group"] > 1 else []
    parts.append(f"k{traits['topk']}")
    parts += [f"shared{traits['num_fused_shared_experts']}"] if traits["num_fused_shared_experts"] else []
    parts += [] if traits["has_bias"] else ["nobias"]
    return "-".join(parts if traits["renormalize"] else [*parts, "raw"])


def kernel(name: str, traits: dict, package: str = "kernel_registry.ops.moe.topk", **options):
    """The kernel that an implementation's factory makes for these traits, and options of its own."""
    return importlib.import_module(f"{package}.{name}").topk(**traits, **options)


def run(name: str, traits: dict, logits, bias, **kwargs):
    return kernel(name, traits)(logits, bias, **kwargs)


def judged(name: str, traits: dict, tokens: int, *, flavour="random", seed=0, device="cpu", made=None, **changed):
    """One call on generated inputs, asserted right by the oracle; its verdict."""
    args, kwargs = cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour)
    kwargs.update(changed)
    verdict = oracle.check(traits, args, kwargs, (made or kernel(name, traits))(*args, **kwargs))
    assert verdict.passed, f"{name} {flavour} seed {seed}: {verdict.detail}"
    return verdict


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


DECIDING_GROUP = routing(64, 4, 8, 2)


def deciding_group(device="cpu"):
    """Duplicates of a group's maximum decide which groups are kept: logits, bias and the right ids.

    Group 0 has {2.0, 1.9}, group 4 {1.0, 1.0} and group 5 {1.25, 0.25} as its largest choices; the rest are small. The
    sums are 3.9, 2.0 and 1.5, so groups 0 and 4 are kept; counting group 4's maximum once would keep group 5.
    """
    logits, bias = torch.zeros(1, 64), torch.full((64,), -1.0)  # every score is 0.5
    bias[3], bias[6], bias[33], bias[38], bias[40], bias[47] = 1.5, 1.4, 0.5, 0.5, 0.75, -0.25
    return logits.to(device), bias.to(device), [3, 6, 33, 38]


SUITE = (
    (routing(32, 4, 4, 2), ("random", "offset_bias", "ties", "negative_bias", "nonfinite", "tiny_scores", "underflow")),
    (routing(48, 7, 4, 2, shared=1), ("random", "constant", "masked_experts", "mapped")),
    (routing(40, 6), ("random", "offset_bias", "ties", "negative_bias", "nonfinite", "tiny_scores", "underflow",
                      "constant")),
    (routing(64, 5, shared=1), ("random", "masked_experts", "mapped_all", "padded")),
    (routing(24, 5), ("nonfinite", "masked_experts")),  # at most one expert a lane
    (routing(64, 1, 8, 2), ("random", "offset_bias")),  # one routed expert
    (routing(40, 4, scoring="softmax", has_bias=False), ("random", "ties", "large", "nonfinite")),
    (routing(32, 4, 4, 2, scoring="softmax", has_bias=False, renormalize=False), ("random", "ties", "large")),
    (routing(40, 4, scoring="sqrtsoftplus"), ("random", "offset_bias", "large", "tiny_scores")),
)


def numerics_failure(module: ModuleType, *, grouped: bool | None, device="cpu", tokens=14) -> str:
    """The numerics suite in brief, for one implementation's module: the first thing found wrong, or "".

    grouped: True for a router of groups, False for one of a single group, None for one that serves both.
    """
    for traits, flavours in SUITE:
        if grouped is not None and grouped != (traits["num_expert_group"] > 1):
            continue
        made = module.topk(**traits)
        for flavour in flavours:
            try:
                judged(module.__name__, traits, tokens, flavour=flavour, seed=len(flavour), device=device, made=made)
            except AssertionError as failure:
                return str(failure)
    if grouped is not False:
        logits, bias, right = deciding_group(device)
        ids = module.topk(**DECIDING_GROUP)(logits, bias)[1][0].tolist()
        if ids != right:
            return f"duplicates of a group's maximum: {ids}, expected {right}"
    return ""
