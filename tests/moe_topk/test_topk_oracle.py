"""The judge is judged: what it must refuse, what it must allow, and that it counts what it could not decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from topk_support import kernel, routing

from kernel_registry.ops.moe.topk import cases, oracle

TRAITS = routing(64, 7, 8, 4, shared=1)


def call(traits=TRAITS, flavour="random", tokens=6):
    args, kwargs = cases.inputs(traits, tokens, seed=1, flavour=flavour)
    weights, ids = kernel("reference", traits)(*args, **kwargs)
    return args, kwargs, weights, ids


def swapped_slots(weights, ids):
    ids[2, [0, 1]], weights[2, [0, 1]] = ids[2, [1, 0]], weights[2, [1, 0]]


def worse_expert(weights, ids):
    ids[0, 5] = next(e for e in range(64) if e not in ids[0].tolist())


SPOILT = {
    "another expert": worse_expert,
    "an expert twice": lambda w, i: i[3].__setitem__(1, i[3, 0].item()),
    "an id out of range": lambda w, i: i[3].__setitem__(5, 64),
    "a negative id": lambda w, i: i[3].__setitem__(5, -1),
    "two slots exchanged": swapped_slots,
    "a weight off by 3e-6": lambda w, i: w[1].__setitem__(0, w[1, 0] * (1 + 3e-6)),
    "a weight of NaN": lambda w, i: w[1].__setitem__(0, float("nan")),
    "weights not scaled": lambda w, i: w.div_(2.5),
    "the shared slot's weight": lambda w, i: w[1].__setitem__(6, 1.0),
    "the shared slot's id": lambda w, i: i[1].__setitem__(6, 65),
}


@pytest.mark.parametrize("about", SPOILT)
def test_refuses(about):
    args, kwargs, weights, ids = call()
    assert oracle.check(TRAITS, args, kwargs, (weights, ids)).passed
    SPOILT[about](weights, ids)
    verdict = oracle.check(TRAITS, args, kwargs, (weights, ids))
    assert not verdict.passed and verdict.detail


def test_refuses_wrong_form():
    args, kwargs, weights, ids = call()
    for wrong in ((weights.double(), ids), (weights, ids.long()), (weights[:, :6], ids), (weights[:5], ids[:5])):
        assert "expected" in oracle.check(TRAITS, args, kwargs, wrong).detail


def test_refuses_ids_in_padded_rows_and_unmapped_ids():
    args, kwargs, weights, ids = call(flavour="padded", tokens=40)
    live = int(kwargs["num_token_non_padded"])
    assert 0 < live < 40
    for spoil in (lambda w, i: i[live:].fill_(0), lambda w, i: w[live:].fill_(1e-30)):
        spoilt = weights.clone(), ids.clone()
        spoil(*spoilt)
        assert not oracle.check(TRAITS, args, kwargs, spoilt).passed
    args, kwargs, weights, ids = call(flavour="mapped")
    unmapped = kernel("reference", TRAITS)(*args, **{**kwargs, "expert_map": None})
    assert not oracle.check(TRAITS, args, kwargs, unmapped).passed


def test_exact_ties_are_decided_by_id():
    traits = routing(8, 2)
    logits, bias = torch.zeros(1, 8), torch.tensor([0, 1, 1, 1, 0, 0, 0, 0.0])
    weights = torch.full((1, 2), 0.5)
    verdict = oracle.check(traits, (logits, bias), {}, (weights, torch.tensor([[1, 2]], dtype=torch.int32)))
    assert verdict.passed and verdict.undecided == 0
    for ids in ([1, 3], [2, 1], [2, 3]):
        assert not oracle.check(traits, (logits, bias), {}, (weights, torch.tensor([ids], dtype=torch.int32))).passed


def test_near_ties_are_undecided_and_both_ways_allowed():
    traits = routing(8, 2)
    logits, bias = torch.zeros(1, 8), torch.tensor([2, 1, 1 + 2**-23, 0, 0, 0, 0, 0.0])
    weights = torch.full((1, 2), 0.5)
    for ids, fine in (([0, 2], True), ([0, 1], True), ([0, 3], False), ([1, 2], False)):
        verdict = oracle.check(traits, (logits, bias), {}, (weights, torch.tensor([ids], dtype=torch.int32)))
        assert verdict.passed == fine
        assert not fine or verdict.undecided == 1


def test_groups_that_are_nearly_tied():
    """Either group may be kept, but then the experts must be that group's best."""
    traits = routing(8, 2, 2, 1)
    logits, bias = torch.zeros(1, 8), torch.tensor([1, 1, 0.5, 0, 1, 1 + 2**-23, 0.5, 0])
    weights = torch.full((1, 2), 0.5)
    for ids, fine in (([0, 1], True), ([5, 4], True), ([0, 5], False), ([0, 2], False)):
        outputs = weights, torch.tensor([ids], dtype=torch.int32)
        assert oracle.check(traits, (logits, bias), {}, outputs).passed == fine


def test_a_logit_of_minus_infinity_leaves_the_tie_near():
    """Its score is 0 without an error, which must not make the error of its choice NaN."""
    traits = routing(8, 2, 2, 1)
    logits, bias = torch.zeros(1, 8), torch.tensor([0.5, 1, 0, 0, 0.5, 1 + 2**-23, 0, 0])
    logits[0, [1, 5]] = float("-inf")
    for ids, weights, fine in (([5, 4], [0, 1.0], True), ([0, 1], [1.0, 0], True), ([0, 2], [0.5, 0.5], False)):
        outputs = torch.tensor([weights]), torch.tensor([ids], dtype=torch.int32)
        assert oracle.check(traits, (logits, bias), {}, outputs).passed == fine


def test_several_logical_experts_at_one_physical_id():
    traits = routing(16, 3)
    args, kwargs = cases.inputs(traits, 20)
    kwargs["expert_map"] = torch.arange(16) // 4
    outputs = kernel("reference", traits)(*args, **kwargs)
    assert oracle.check(traits, args, kwargs, outputs).passed
    outputs[1][3, 0] = (outputs[1][3, 0] + 1) % 4
    assert not oracle.check(traits, args, kwargs, outputs).passed


@pytest.mark.parametrize("scoring,function", [
    ("sigmoid", lambda x: 1 / (1 + math.exp(-x))), ("sqrtsoftplus", lambda x: math.sqrt(math.log1p(math.exp(x))))])
def test_scores(scoring, function):
    x = [-30.0, -1.5, 0.0, 0.25, 12.0]
    np.testing.assert_allclose(oracle.scores64(np.array([x]), scoring)[0], [function(v) for v in x], rtol=1e-14)


def test_softmax_scores():
    e = [math.exp(v) for v in (0.5, -2.0, 3.0)]
    got = oracle.scores64(np.array([[0.5, -2.0, 3.0]]), "softmax")[0]
    np.testing.assert_allclose(got, [v / sum(e) for v in e], rtol=1e-14)


@pytest.mark.parametrize("change", [lambda w, i: w[0].__setitem__(0, torch.nextafter(w[0, 0], torch.tensor(9.0))),
                                    lambda w, i: i[0].__setitem__(0, (i[0, 0] + 1) % 64)])
def test_the_eager_meaning_is_compared_bit_for_bit(change):
    traits = {**routing(64, 6, 8, 4), "dtype": "bfloat16", "score_dtype": "logits"}
    args, kwargs, weights, ids = call(traits)
    assert oracle.check(traits, args, kwargs, (weights, ids)).passed
    change(weights, ids)
    assert not oracle.check(traits, args, kwargs, (weights, ids)).passed


def test_the_two_meanings_differ():
    """bfloat16 scores choose other experts than float32 scores do, so one can't stand in for the other."""
    traits = {**routing(256, 8), "dtype": "bfloat16"}
    args, kwargs = cases.inputs(traits, 200)
    outputs = kernel("reference", {**traits, "score_dtype": "logits"})(*args, **kwargs)
    assert not oracle.check(traits, args, kwargs, outputs).passed


@pytest.mark.parametrize("traits", [TRAITS, routing(64, 6, scoring="softmax", has_bias=False),
                                    {**routing(64, 6, 8, 4), "dtype": "bfloat16", "score_dtype": "logits"}],
                         ids=["grouped", "softmax", "eager"])
def test_the_reference_is_one_graph_under_compile(traits):
    args, kwargs = cases.inputs(traits, 5)
    made = kernel("reference", traits)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(*args, **kwargs), made(*args, **kwargs)):
        assert torch.equal(got, expected)


def test_cases_are_reproducible_and_named_flavours_only():
    for a, b in zip(cases.inputs(TRAITS, 5, seed=3)[0], cases.inputs(TRAITS, 5, seed=3)[0]):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="flavour 'odd' is not one of random"):
        cases.inputs(TRAITS, 5, flavour="odd")
    strided = [cases.inputs({**TRAITS, "contiguous": False}, 5, seed=seed)[0][0] for seed in (0, 1)]
    assert not any(t.is_contiguous() for t in strided)


@pytest.mark.parametrize("traits, tokens, seed", [
    (routing(512, 192, 256, 192, shared=64, scoring="sqrtsoftplus", has_bias=False, dtype="float64"), 33, 125),
    (routing(512, 32, 64, 16, shared=6, scoring="sqrtsoftplus", has_bias=False, dtype="float64"), 3, 185)])
def test_hundreds_of_groups_too_close_to_call_are_judged(traits, tokens, seed):
    """Scores that all but vanish: any set of groups may be kept, and the one that the ids came from has to be found."""
    args, kwargs = cases.inputs(traits, tokens, seed=seed, flavour="underflow")
    verdict = oracle.check(traits, args, kwargs, kernel("reference", traits)(*args, **kwargs))
    assert verdict.passed, verdict.detail
    assert verdict.undecided == verdict.rows == tokens
