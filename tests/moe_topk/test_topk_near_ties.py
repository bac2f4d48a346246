"""Choices that the packed way can't tell apart: the ids are those of the exact rule in its order, and the judge agrees.

The rows are drawn from a seed; each kind aims at one thing that packed.py must notice (its docstring lists them).
"""

from __future__ import annotations

import numpy as np
import pytest
import topk_near_rows as rows_of
from topk_exact import assert_exact
from topk_support import kernel, named, routing, row_counts

SPARSE = dict(scoring="sqrtsoftplus")
SOFT = dict(scoring="softmax", has_bias=False)
BIASED = [routing(256, 8, 8, 4), routing(256, 8), routing(64, 6, 8, 3, **SPARSE), routing(40, 5),
          routing(36, 4, 3, 2)]
BASES = (0.0, 3.0, 34.5, -7.0, 1e3, 1e6)


@pytest.fixture
def checked(device, tiles_of):
    """checked(traits, draw, seed, about): the rows that draw(rng, tokens) makes, by the router with as few and as many
    rows a program as there can be, in turn."""

    def checked(traits, draw, seed, about):
        rows = row_counts(traits)[-(seed % 2)]
        tokens = 32 if traits["num_expert_group"] > 1 and traits["has_bias"] else 64  # pairs are reduced in Python
        tiles_of(tokens // rows)
        logits, bias = draw(np.random.default_rng([seed, traits["num_experts"]]), tokens)
        assert_exact(traits, kernel("triton_router", traits, rows_per_program=rows),
                     *rows_of.tensors(traits, logits, bias, device), about=f"{about}, seed {seed}")

    return checked


@pytest.mark.parametrize("spread", rows_of.SPREADS)
@pytest.mark.parametrize("traits", BIASED, ids=named)
def test_biases_a_few_units_apart(traits, spread, checked):
    """Chains of near-equal choices over whole rows, in one lane and in several; groups whose scores are as near; with
    a wide spread, choices below the window, and groups whose second best is."""
    for seed, base in enumerate(BASES if spread in ("level", "steps") else BASES[::2]):
        checked(traits, lambda rng, tokens: rows_of.ladder(rng, traits, tokens, base, spread, (1, 3, 12)[seed % 3]),
                seed, f"bias about {base}, {spread}")


@pytest.mark.parametrize("bias", [None, 0.0, 7.0, -7.0])
@pytest.mark.parametrize("traits", [
    routing(256, 8, 8, 4), routing(256, 8), routing(896, 16), routing(256, 6, **SPARSE),
    routing(160, 8, 8, 4, **SPARSE), routing(512, 22), routing(48, 4)], ids=named)
def test_scores_a_few_units_apart(traits, bias, checked):
    """Clusters of choices that the logits make: two, three or more, among the chosen, at the boundary, left out."""
    traits = {**traits, "has_bias": bias is not None}
    levels = (0.2, 0.9) if traits["scoring"] == "sigmoid" else (0.2, 2.5 if bias == -7 else 6.8)

    def draw(rng, tokens):
        made = None if bias is None else rng.normal(bias, 0.05, traits["num_experts"]).astype(np.float32)
        return rows_of.clusters(rng, traits, tokens, made, reach, levels), made

    for seed, reach in enumerate((1, 4)):
        checked(traits, draw, seed, f"{reach} units")


DEPTHS = {
    "near the best": (0.0, 0.0, 0.25, 1.0, 2.0),
    "at the window's edge": (0.0, 15.0, 15.9, 15.99999, 16.0, 16.00001, 16.1, 17.0),
    "far below": (0.0, 5.0, 15.0, 20.0, 40.0, 80.0, 100.0),
}


@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize("traits", [
    routing(128, 8, **SOFT), routing(512, 10, **SOFT), routing(128, 4, **SOFT), routing(8, 2, **SOFT),
    routing(160, 6, 8, 3, renormalize=False, **SOFT), routing(64, 6, 32, 6, **SOFT), routing(512, 8, 2, 1, **SOFT),
    routing(128, 8, dtype="bfloat16", **SOFT), routing(512, 10, dtype="float16", **SOFT),
    routing(160, 6, 8, 3, dtype="bfloat16", renormalize=False, **SOFT),
    routing(64, 6, 32, 6, dtype="float16", **SOFT)], ids=named)
def test_logits_a_few_units_apart(traits, depths, checked):
    for seed, reach in enumerate((1, 4)):
        checked(traits, lambda rng, tokens: (rows_of.logit_clusters(rng, traits, tokens, DEPTHS[depths], reach), None),
                seed, f"{reach} units")


@pytest.mark.parametrize("base", [None, 0.0, -7.0, 1e3])
@pytest.mark.parametrize("traits", [
    routing(256, 6, **SPARSE), routing(64, 6, 8, 3, **SPARSE), routing(40, 5, **SPARSE)], ids=named)
def test_scores_above_the_window(traits, base, checked):
    """sqrtsoftplus has no bound: logits of 60 are above the window, up to 1e30 and infinity."""
    traits = {**traits, "has_bias": base is not None}

    def draw(rng, tokens):
        bias = None if base is None else rng.normal(base, 0.05, traits["num_experts"])
        return rows_of.above(rng, traits, tokens, reach), bias

    for seed, reach in enumerate((0, 3)):
        checked(traits, draw, seed, f"{reach} units")


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16")],
                         ids="-".join)
@pytest.mark.parametrize("traits", [routing(256, 8, 8, 4), routing(160, 8), routing(256, 6, **SPARSE),
                                    routing(128, 8, **SOFT)], ids=named)
def test_half_precision(traits, dtypes, checked):
    """Few digits: exact ties of logits, and biases that keep theirs."""
    traits = {**traits, "dtype": dtypes[0], "bias_dtype": dtypes[1]}

    def draw(rng, tokens):
        bias = rng.normal(base, 0.02, traits["num_experts"]) if traits["has_bias"] else None
        return rng.normal(0, 0.3, (tokens, traits["num_experts"])), bias

    for seed, base in enumerate((0.0, 6.5, 1e3)):
        checked(traits, draw, seed, f"bias about {base}")


@pytest.mark.parametrize("traits", [routing(320, 20, 32, 2), routing(24, 6, 8, 2), routing(320, 20, 32, 2, **SPARSE),
                                    routing(320, 20, 32, 2, **SOFT)], ids=named)
def test_all_that_is_kept_is_chosen(traits, checked):
    """Nothing is left out in the kept groups; yet a NaN or a -inf there is no better than what the others have."""
    experts, size = traits["num_experts"], traits["num_experts"] // traits["num_expert_group"]

    def draw(rng, tokens):
        logits, good = rng.normal(0, 1, (tokens, experts)), rng.integers(0, traits["num_expert_group"], (tokens, 2))
        for row in range(tokens):
            for group in good[row]:
                logits[row, group * size:(group + 1) * size] += 6
            if row % 2 and traits["has_bias"]:
                logits[row, good[row, 0] * size + rng.integers(size)] = float("nan")
        if not traits["has_bias"]:
            return logits, None
        bias = rng.normal(0, 0.1, experts)
        bias[rng.integers(experts, size=9)] = float("nan" if seed else "-inf")
        return logits, bias

    for seed in (0, 1):
        checked(traits, draw, seed, "all kept")


@pytest.mark.parametrize("traits", [
    routing(64, 2, 8, 2), routing(36, 2, 3, 2), routing(64, 2, 8, 2, **SPARSE)], ids=named)
def test_groups_that_their_second_best_decides(traits, checked):
    """A group's second best is far below the window, or, of sqrtsoftplus, its best above; all sums are far apart, and
    of the experts chosen, one in each kept group, none is in doubt."""
    experts, groups = traits["num_experts"], traits["num_expert_group"]
    size = experts // groups

    def draw(rng, tokens):
        bias = -20 - 60 * rng.random(experts)
        best = np.arange(groups) * size + rng.integers(size, size=groups)
        bias[best] = rng.normal(0, 0.3, groups)
        logits = rng.normal(0, 1, (tokens, experts))
        if traits["scoring"] == "sqrtsoftplus":
            bias = rng.normal(0, 0.3, experts)
            logits[:, best] = 10 ** rng.uniform(2, 8, (tokens, groups))
        return logits, bias

    for seed in (0, 1):
        checked(traits, draw, seed, "second best")
