"""What the tests of moe.finalize share: traits in short, one judged call, the numerics suite."""

from __future__ import annotations

from types import ModuleType

from kernel_registry.ops.moe.finalize import cases, oracle

DEFAULTS = dict(dtype="bfloat16", out_dtype="bfloat16", reduced=False, weights_applied=False, has_shared=False,
                expert_parallel=False, output_alias=False)


def layer(num_experts: int, topk: int, hidden_size: int, **other) -> dict:
    """A full traits dict."""
    return {**DEFAULTS, "num_experts": num_experts, "topk": topk, "hidden_size": hidden_size, **other}


def judged(module: ModuleType, traits: dict, tokens: int, *, flavour="random", seed=0, device="cpu", **options):
    """One call on generated inputs, asserted right by the oracle; its verdict."""
    args, kwargs = cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour)
    verdict = oracle.check(traits, args, kwargs, module.finalize(**traits, **options)(*args, **kwargs))
    assert verdict.passed, f"{module.__name__} {flavour} seed {seed}: {verdict.detail}"
    return verdict


REDUCED = dict(reduced=True, weights_applied=True)
SUITE = (
    layer(8, 4, 40, has_shared=True),
    layer(8, 6, 51, expert_parallel=True, dtype="float16", output_alias=True),
    layer(16, 8, 33, dtype="float32", out_dtype="float32", weights_applied=True),
    layer(16, 3, 130, dtype="float32", out_dtype="float32", has_shared=True, output_alias=True),
    layer(16, 1, 64, out_dtype="float16", has_shared=True, expert_parallel=True),
    layer(16, 8, 37, has_shared=True, **REDUCED),
    layer(16, 8, 40, **REDUCED),
    layer(16, 8, 32, out_dtype="float32", output_alias=True, **REDUCED),
)


def numerics_failure(module: ModuleType, *, device="cpu", **options) -> str:
    """The numerics suite for one implementation's module: the first thing found wrong, or ""."""
    for traits in SUITE:
        for seed, flavour in enumerate(cases.FLAVOURS):
            try:
                judged(module, traits, 9, flavour=flavour, seed=seed, device=device, **options)
            except AssertionError as failure:
                return str(failure)
    return ""
