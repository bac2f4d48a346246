"""Properties that hold for any input whatever, on arbitrary bit patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from topk_support import implementations, kernel, routing, same_bits

from kernel_registry.ops.moe.topk import oracle

SMALL = [routing(12, 3, 3, 2), routing(16, 4, 4, 2, shared=1), routing(18, 5), routing(33, 4, shared=2)]
OTHERS = [routing(18, 5, scoring="softmax", has_bias=False), routing(20, 4, scoring="sqrtsoftplus"),
          routing(12, 3, 3, 2, scoring="softmax", has_bias=False, renormalize=False),
          routing(16, 4, 4, 2, shared=1, has_bias=False)]
CALLS = [(name, traits) for traits in SMALL for name in implementations(traits)]
SETTINGS = settings(max_examples=25, deadline=None, database=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
OTHER_CALLS = [(name, traits) for traits in OTHERS for name in implementations(traits)]
SPECIAL = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x00000001,
           0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x007FFFFF]
BITS = st.one_of(st.sampled_from(SPECIAL), st.integers(0, 2**32 - 1))


def floats(bits) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


@st.composite
def any_call(draw, calls):
    name, traits = draw(st.sampled_from(calls))
    experts = traits["num_experts"]
    rows = draw(st.integers(1, 3))
    logits = floats(draw(st.lists(BITS, min_size=rows * experts, max_size=rows * experts))).reshape(rows, experts)
    bias = floats(draw(st.lists(BITS, min_size=experts, max_size=experts))) if traits["has_bias"] else None
    return name, traits, logits, bias


@SETTINGS
@given(any_call(CALLS))
def test_any_bits(device, call):
    any_bits(device, call)


@SETTINGS
@given(any_call(OTHER_CALLS))
def test_any_bits_of_other_scores(device, call):
    any_bits(device, call)


def any_bits(device, call):
    """Ids distinct and in range, weights neither NaN nor negative, the ids those of the reference, rows independent."""
    name, traits, logits, bias = call
    logits, bias = logits.to(device), None if bias is None else bias.to(device)
    experts = traits["num_experts"]
    routed = traits["topk"] - traits["num_fused_shared_experts"]
    made = kernel(name, traits)
    weights, ids = made(logits, bias)
    for row in ids[:, :routed].tolist():
        assert len(set(row)) == routed and all(0 <= e < experts for e in row)
    assert ids[:, routed:].tolist() == [list(range(experts, experts + traits["topk"] - routed))] * len(ids)
    assert (weights >= 0).all()
    assert torch.isfinite(weights).all()
    alone = made(logits[-1:].clone(), bias)
    assert same_bits(alone[0], weights[-1:]) and torch.equal(alone[1], ids[-1:])
    verdict = oracle.check(traits, (logits, bias), {}, (weights, ids))
    assert verdict.passed, verdict.detail


@st.composite
def few_levels(draw):
    name, traits = draw(st.sampled_from(CALLS + OTHER_CALLS))
    experts = traits["num_experts"]
    values = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.0, float("nan"), float("-inf"), float("inf")])
    levels = st.sampled_from(draw(st.lists(values, min_size=1, max_size=3)))
    offsets = st.sampled_from([-1.0, 0.0, 0.25, 7.0, float("-inf")])
    steps = st.sampled_from(draw(st.lists(offsets, min_size=1, max_size=2)))
    logits = torch.tensor(draw(st.lists(levels, min_size=2 * experts, max_size=2 * experts))).reshape(2, experts)
    bias = torch.tensor(draw(st.lists(steps, min_size=experts, max_size=experts))) if traits["has_bias"] else None
    return name, traits, logits, bias


@SETTINGS
@given(few_levels())
def test_ties_go_to_the_lowest_id(device, call):
    """Inputs of few levels: every implementation gives the reference's ids, in its order."""
    name, traits, logits, bias = call
    logits, bias = logits.to(device), None if bias is None else bias.to(device)
    expected = kernel("reference", traits)(logits, bias)[1]
    assert torch.equal(kernel(name, traits)(logits, bias)[1], expected)
    verdict = oracle.check(traits, (logits, bias), {}, (kernel(name, traits)(logits, bias)))
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_every_half_precision_logit(dtype, scoring, device, tiles_of):
    """All 65,536 bit patterns as logits, 64 a row: the scores of a row's experts are those of the exact upcast."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    everything = everything.reshape(1024, 64)[::8].to(device)
    tiles_of(128)
    traits = routing(64, 32, dtype=str(dtype).removeprefix("torch."), renormalize=False, scoring=scoring)
    bias = torch.zeros(64, device=device)
    for name in implementations(traits):
        outputs = kernel(name, traits)(everything, bias)
        verdict = oracle.check(traits, (everything, bias), {}, outputs)
        assert verdict.passed, f"{name}: {verdict.detail}"
