"""Every shape, dtype and kind of values, each judged by the float64 oracle."""

from __future__ import annotations

import pytest
from topk_support import implementations, judged, named, routing

from kernel_registry.ops.moe.topk import cases

SHAPES = [
    # one group: expert counts of published models, powers of two or not, and the edges
    routing(2, 1), routing(3, 3), routing(31, 4), routing(64, 4), routing(72, 6), routing(96, 8), routing(128, 4),
    routing(160, 8), routing(192, 8), routing(256, 8), routing(256, 9, shared=1), routing(288, 8), routing(384, 8),
    routing(512, 22), routing(896, 16), routing(1000, 10), routing(40, 32), routing(32, 32), routing(20, 5, shared=3),
    # groups of 2, 3, 12, 20, 24, 32, 64 and 128 experts; group counts that are powers of two or not; all groups kept
    routing(256, 8, 8, 4), routing(256, 9, 8, 4, shared=1), routing(192, 8, 8, 4), routing(512, 8, 8, 4),
    routing(160, 6, 8, 3), routing(48, 6, 4, 2), routing(16, 3, 8, 2), routing(64, 8, 32, 4), routing(256, 8, 2, 1),
    routing(36, 4, 3, 2), routing(60, 5, 5, 2), routing(128, 8, 8, 8), routing(64, 8, 8, 1), routing(34, 2, 17, 1),
    routing(24, 6, 12, 3), routing(64, 10, 4, 1, shared=2), routing(96, 6, 32, 2),
    routing(680, 8, 17, 4), routing(1017, 9, 9, 2, shared=1),  # lists too long to sort in registers
]


SOFT, SPARSE = dict(scoring="softmax", has_bias=False), dict(scoring="sqrtsoftplus")
SHAPES += [
    # softmax: Qwen3, Qwen3-Next, gpt-oss, Mixtral, DeepSeek-V2 and its Lite; Hunyuan-like and the edges
    routing(128, 8, **SOFT), routing(512, 10, **SOFT), routing(128, 4, **SOFT), routing(8, 2, **SOFT),
    routing(160, 6, 8, 3, renormalize=False, **SOFT), routing(64, 6, renormalize=False, **SOFT),
    routing(66, 8, shared=2, renormalize=False, **SOFT), routing(162, 8, 6, 3, shared=2, **SOFT),
    routing(2, 1, **SOFT), routing(16, 1, renormalize=False, **SOFT), routing(896, 16, **SOFT), routing(40, 32, **SOFT),
    routing(512, 8, 2, 1, **SOFT), routing(1024, 8, 32, 4, renormalize=False, **SOFT), routing(1024, 32, **SOFT),
    # sqrtsoftplus: DeepSeek-V4, in groups, without a bias
    routing(256, 6, **SPARSE), routing(256, 8, 8, 4, **SPARSE), routing(384, 7, shared=1, **SPARSE),
    routing(256, 6, has_bias=False, **SPARSE), routing(64, 6, 8, 4, has_bias=False, renormalize=False, **SPARSE),
    # sigmoid without a bias; one routed expert, whose group may be decided by the second best of a lane
    routing(16, 1, has_bias=False, renormalize=False), routing(128, 8, has_bias=False),
    routing(64, 6, 8, 4, has_bias=False), routing(64, 1, 8, 2), routing(256, 2, 8, 1, shared=1),
    routing(64, 1, 8, 1, **SPARSE), routing(64, 1, 8, 2, **SOFT),
]
CALLS = [pytest.param(name, t, id=f"{name}-{named(t)}") for t in SHAPES for name in implementations(t)]


def test_the_triton_router_serves_every_shape():
    assert all("triton_router" in implementations(traits) for traits in SHAPES)


@pytest.mark.parametrize("name,traits", CALLS)
def test_shape(name, traits, device):
    """Random values: right, and almost never too close to call."""
    verdict = judged(name, traits, 33, seed=traits["num_experts"], device=device)
    assert verdict.undecided <= 1


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("traits", [routing(192, 6, 8, 4), routing(160, 6), routing(96, 6, **SPARSE)], ids=named)
def test_dtypes(traits, dtype, bias_dtype, device):
    traits = {**traits, "dtype": dtype, "bias_dtype": bias_dtype}
    for name in implementations(traits):
        for flavour in ("random", "offset_bias"):
            judged(name, traits, 17, flavour=flavour, seed=3, device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("traits", [
    routing(128, 8, **SOFT), routing(160, 6, 8, 3, renormalize=False, **SOFT), routing(96, 6, has_bias=False),
    routing(96, 6, has_bias=False, **SPARSE)], ids=named)
def test_dtypes_of_logits(traits, dtype, device):
    for name in implementations(traits):
        for flavour in ("random", "large", "tiny_scores"):
            judged(name, {**traits, "dtype": dtype}, 15, flavour=flavour, seed=3, device=device)


FLAVOURED = [
    routing(128, 8, 8, 4), routing(48, 7, 3, 2, shared=1), routing(96, 6), routing(33, 8, shared=2),
    routing(128, 8, **SOFT), routing(8, 2, **SOFT), routing(64, 8, 8, 3, shared=2, renormalize=False, **SOFT),
    routing(72, 6, **SPARSE), routing(64, 6, 8, 4, **SPARSE), routing(48, 7, has_bias=False, shared=1, **SPARSE),
    routing(64, 6, 8, 4, has_bias=False), routing(40, 4, has_bias=False, renormalize=False),
]


@pytest.mark.parametrize("flavour", cases.FLAVOURS)
@pytest.mark.parametrize("traits", FLAVOURED, ids=named)
def test_flavour(traits, flavour, device, tiles_of):
    tiles_of(32)
    for name in implementations(traits):
        for seed in (1, 2):
            judged(name, traits, 21, flavour=flavour, seed=seed, device=device)


@pytest.mark.parametrize("traits", [routing(128, 8, 8, 4), routing(96, 6), routing(96, 6, **SOFT),
                                    routing(64, 6, 8, 4, **SOFT), routing(96, 6, **SPARSE)], ids=named)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights(traits, renormalize, scale, device):
    traits = {**traits, "renormalize": renormalize}
    for name in implementations(traits):
        for flavour in ("random", "tiny_scores"):
            judged(name, traits, 17, flavour=flavour, device=device, routed_scaling_factor=scale)


@pytest.mark.parametrize("traits", [
    routing(256, 8, 8, 4), routing(256, 8), routing(128, 8, **SOFT), routing(160, 6, 8, 3, **SOFT),
    routing(256, 6, **SPARSE)], ids=named)
def test_few_rows_are_undecided(traits, device, tiles_of):
    """The comparison means something: under 1% of random rows are too close to call."""
    tiles_of(128)
    for name in implementations(traits):
        verdict = judged(name, traits, 600, device=device)
        print(f"{name} {named(traits)}: {verdict.undecided} of {verdict.rows} rows undecided")
        assert verdict.undecided < 0.01 * verdict.rows or not verdict.rows


@pytest.mark.parametrize("traits", [
    routing(128, 8, **SOFT), routing(160, 6, 8, 3, renormalize=False, **SOFT), routing(64, 6, scoring="softmax"),
    routing(256, 6, **SPARSE), routing(256, 8, 8, 4, **SPARSE), routing(64, 4, has_bias=False),
    routing(64, 6, 8, 4, has_bias=False), routing(16, 1, **SOFT), routing(64, 4, 64, 8, has_bias=False),
    routing(128, 8, 64, 8), routing(2048, 40),
], ids=lambda t: f"{'bias' if t['has_bias'] else 'plain'}-{named(t)}")
@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_reference_serves_the_rest(traits, flavour, device):
    judged("reference", traits, 14, flavour=flavour, seed=5, device=device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("traits", [
    routing(256, 9, 8, 4, shared=1), routing(96, 6), routing(160, 6, 8, 3, **SOFT), routing(64, 6, **SPARSE),
    routing(64, 6, renormalize=False),
], ids=named)
def test_scores_in_the_dtype_of_the_logits(traits, dtype, device):
    """score_dtype="logits" is the eager sequence, bit for bit."""
    for bias_dtype in {dtype, "float32"}:
        full = {**traits, "dtype": dtype, "bias_dtype": bias_dtype, "score_dtype": "logits"}
        for flavour in cases.FLAVOURS:
            if bias_dtype == "float16" and flavour == "huge_bias":
                continue  # its values are not float16 numbers
            judged("reference", full, 15, flavour=flavour, seed=4, device=device)
