"""Rules of softmax, sqrtsoftplus and scores without a bias, with results worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from topk_support import implementations, named, routing, run

NAN, INF = float("nan"), float("inf")
SOFT, SPARSE = dict(scoring="softmax", has_bias=False), dict(scoring="sqrtsoftplus")


def each(*traits_list):
    return pytest.mark.parametrize("name,traits", [
        pytest.param(name, t, id=f"{name}-{named(t)}") for t in traits_list for name in implementations(t)])


@each(routing(64, 4, **SOFT), routing(64, 4, 8, 2, **SOFT), routing(64, 4, renormalize=False, **SOFT))
@pytest.mark.parametrize("odd", [NAN, INF])
def test_softmax_of_a_row_with_a_nan_or_an_infinity(name, traits, odd, device):
    """Every score of such a row is NaN: the lowest ids of what ranks best, weights 0; other rows are as they were."""
    logits = torch.linspace(3, -3, 64).repeat(3, 1).to(device)
    logits[1, 37] = odd
    weights, ids = run(name, traits, logits, None)
    first = 16 if traits["num_expert_group"] > 1 else 0  # kept groups hold NaN, below the -inf of those dropped
    assert ids.tolist() == [[0, 1, 2, 3], [first, first + 1, first + 2, first + 3], [0, 1, 2, 3]]
    assert (weights[1] == 0).all() and (weights[[0, 2]] > 0).all()


@each(routing(64, 4, **SOFT), routing(64, 4, renormalize=False, **SOFT))
def test_softmax_of_nothing_but_minus_infinity(name, traits, device):
    logits = torch.full((2, 64), -INF, device=device)
    logits[1, 40] = -1e30  # the one score is 1, all others are 0
    weights, ids = run(name, traits, logits, None)
    assert ids.tolist() == [[0, 1, 2, 3], [40, 0, 1, 2]]
    assert weights.tolist() == [[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]


@each(routing(64, 3, renormalize=False, **SOFT), routing(64, 3, **SOFT))
@pytest.mark.parametrize("shift", [0.0, 100.0, -3000.0])
def test_softmax_weights(name, traits, shift, device):
    """Shares of the whole row, or, renormalised, of the chosen alone: softmax after top-k is the same thing."""
    logits = torch.zeros(1, 64, device=device)
    logits[0, [5, 60, 33]] = torch.tensor([3.0, 2.0, 1.0], device=device)
    weights, ids = run(name, traits, logits + shift, None, routed_scaling_factor=2.0)
    assert ids[0].tolist() == [5, 60, 33]
    total = math.exp(3) + math.exp(2) + math.exp(1) + (0 if traits["renormalize"] else 61)
    expected = torch.tensor([[2 * math.exp(x) / total for x in (3, 2, 1)]])
    torch.testing.assert_close(weights.cpu(), expected, rtol=2e-6, atol=0)


@each(routing(64, 4, 8, 2, has_bias=False), routing(64, 4, 8, 2, **SOFT),
      routing(64, 4, 8, 2, has_bias=False, **SPARSE))
def test_without_a_bias_a_group_counts_its_largest_only(name, traits, device):
    logits = torch.full((1, 64), -2.0, device=device)
    logits[0, 8:16] = 1.0  # a group of many good ones is not as good as one with the best
    logits[0, [3, 49]] = torch.tensor([2.0, 1.5], device=device)
    assert run(name, traits, logits, None)[1][0].tolist() == [3, 49, 0, 1]


@each(routing(64, 4, has_bias=False), routing(64, 4, has_bias=False, **SPARSE), routing(64, 4, **SOFT))
def test_both_zeros_are_one_value(name, traits, device):
    logits = torch.full((2, 64), -1.0, device=device)
    logits[0, [3, 9, 20, 33, 34]] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 0.0], device=device)
    logits[1, [3, 9, 20, 33, 34]] = torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0], device=device)
    assert run(name, traits, logits, None)[1].tolist() == [[3, 9, 20, 33]] * 2


@each(routing(64, 4, **SPARSE), routing(64, 4, has_bias=False, **SPARSE), routing(64, 4, 8, 2, **SPARSE))
def test_sqrtsoftplus_from_tiny_to_huge(name, traits, device):
    bias = torch.zeros(64, device=device) if traits["has_bias"] else None
    logits = torch.full((3, 64), -100.0, device=device)
    logits[0, [7, 5, 3, 1]] = torch.tensor([1e30, 60.0, 3.0, -40.0], device=device)
    logits[1, [7, 5, 3, 1]] = torch.tensor([-60.0, -61.0, -62.0, -80.0], device=device)
    logits[2, [7, 5, 3, 1]] = torch.tensor([INF, 3e38, 1e38, 1e9], device=device)
    weights, ids = run(name, traits, logits, bias)
    assert ids.tolist() == [[7, 5, 3, 1]] * 3
    score = [[1e15, 60**0.5, math.log1p(math.exp(3)) ** 0.5, math.exp(-20)],
             [math.exp(-x / 2) for x in (60, 61, 62, 80)]]
    expected = torch.tensor(score, dtype=torch.float64)
    expected = expected / (expected.sum(1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights[:2].double().cpu(), expected, rtol=2e-6, atol=0)
    assert weights[2].tolist() == [0.0] * 4  # infinite over infinite, and finite over infinite
