"""The rules of moe.topk, one by one, with results worked out by hand or equal to the reference in every id."""

from __future__ import annotations

import math

import pytest
import torch
from topk_support import (DECIDING_GROUP, deciding_group, implementations, judged, kernel, routing, row_counts, run,
                          same_bits)

from kernel_registry.ops.moe.topk import cases

GROUPED, SINGLE = routing(64, 6, 8, 4), routing(64, 6)
BOTH = [GROUPED, SINGLE]
NAN, INF = float("nan"), float("inf")


def each(traits_list):
    return [pytest.param(name, t, id=f"{name}-{t['num_expert_group']}{t['scoring'].replace('sigmoid', '')}")
            for t in traits_list for name in implementations(t)]


ALL = pytest.mark.parametrize("name,traits", each(BOTH))
OTHERS = [routing(64, 6, 8, 4, scoring="softmax", has_bias=False),
          routing(64, 6, scoring="sqrtsoftplus", has_bias=False)]
ANY_SCORING = pytest.mark.parametrize("name,traits", each(BOTH + OTHERS))


@pytest.mark.parametrize("name", implementations(DECIDING_GROUP))
def test_duplicates_of_a_groups_maximum_count_twice(name, device):
    logits, bias, right = deciding_group(device)
    assert run(name, DECIDING_GROUP, logits, bias)[1][0].tolist() == right


@pytest.mark.parametrize("name", implementations(GROUPED))
def test_experts_of_dropped_groups_are_masked_even_when_all_choices_are_negative(name, device):
    logits, bias = torch.zeros(1, 64, device=device), torch.full((64,), -5.0, device=device)
    bias[8:40] = -4.0  # groups 1 to 4
    assert run(name, GROUPED, logits, bias)[1][0].tolist() == [8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("name", implementations(GROUPED))
def test_masked_means_minus_infinity(name, device):
    """Kept groups with too few numbers: experts of dropped groups (-inf) rank above NaN, tie with a bias of -inf."""
    logits, bias = torch.zeros(2, 64, device=device), torch.zeros(64, device=device)
    logits[:, 2:] = NAN  # groups 1 to 7 have no number: ties between them go to the lowest ids, 1 to 3 are kept
    logits[1, 0] = NAN  # group 0 has one number: its sum is NaN like all others
    ids = run(name, GROUPED, logits, bias)[1].tolist()
    assert ids[0] == [0, 1, 32, 33, 34, 35]
    assert ids[1] == [1, 32, 33, 34, 35, 36]
    bias[3], bias[0:3], bias[4:8] = -INF, 1.0, 1.0
    bias[8:32] = -INF
    bias[32:] = -30.0
    logits = torch.zeros(1, 64, device=device)
    traits = {**GROUPED, "topk": 10, "topk_group": 1}
    assert run(name, traits, logits, bias)[1][0].tolist() == [0, 1, 2, 4, 5, 6, 7, 3, 8, 9]


@ALL
def test_nan_ranks_below_minus_infinity(name, traits, device):
    logits, bias = torch.zeros(1, 64, device=device), torch.full((64,), -INF, device=device)
    logits[0, :60] = NAN
    ids = run(name, {**traits, "topk_group": traits["num_expert_group"]}, logits, bias)[1][0].tolist()
    assert ids == [60, 61, 62, 63, 0, 1]


@ALL
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_of_one_value(name, traits, value, device):
    weights, ids = run(name, traits, torch.full((3, 64), value, device=device), torch.zeros(64, device=device))
    # the groups kept hold nothing but NaN, which ranks below the -inf of the groups dropped
    first = 32 if value != value and traits["num_expert_group"] > 1 else 0
    assert ids.tolist() == [list(range(first, first + 6))] * 3
    expected = 1 / 6 if value == INF else 0.0
    torch.testing.assert_close(weights.cpu(), torch.full((3, 6), expected), rtol=1e-6, atol=0)


@ALL
def test_both_signs_of_nan_and_of_zero(name, traits, device):
    logits = torch.full((1, 64), -0.0, device=device)
    logits[0, 1::2] = 0.0
    logits[0, 0], logits[0, 2] = NAN, torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    bias = torch.zeros(64, device=device)
    bias[::3] = -0.0
    expected = run("reference", traits, logits, bias)[1][0].tolist()
    assert run(name, traits, logits, bias)[1][0].tolist() == expected
    assert not {0, 2} & set(expected)


@ALL
def test_huge_choices_keep_their_order(name, traits, device):
    """Neighbouring floats at the end of the range are different choices: nothing is clamped."""
    top = torch.finfo(torch.float32).max
    bias = torch.full((64,), -top, device=device)
    below = torch.nextafter(torch.tensor(-top), torch.tensor(0.0)).item()
    bias[[5, 13, 21, 29]] = below
    logits = torch.zeros(1, 64, device=device)
    traits = {**traits, "topk": 4, "topk_group": traits["num_expert_group"]}
    assert run(name, traits, logits, bias)[1][0].tolist() == [5, 13, 21, 29]


@pytest.mark.parametrize("name", implementations(GROUPED))
def test_group_scores_that_overflow_tie(name, device):
    bias = torch.full((64,), 3e38, device=device)
    bias[56:] = 3.4e38  # their sums are +inf, as all the others are
    ids = run(name, {**GROUPED, "topk_group": 1}, torch.zeros(1, 64, device=device), bias)[1]
    assert ids[0].tolist() == list(range(6))


@ALL
@pytest.mark.parametrize("flavour", ["ties", "constant", "signed_zero", "nonfinite", "masked_experts"])
@pytest.mark.parametrize("shared", [0, 1])
def test_ties_are_in_order_of_ids(name, traits, flavour, shared, device):
    """Where experts are exactly equal, every implementation gives the same ids in the same order."""
    traits = {**traits, "num_fused_shared_experts": shared, "topk": traits["topk"] + shared}
    for seed in range(3):
        args, kwargs = cases.inputs(traits, 32, seed=seed, device=device, flavour=flavour)
        assert torch.equal(kernel(name, traits)(*args, **kwargs)[1], kernel("reference", traits)(*args, **kwargs)[1])


@ALL
def test_the_bias_is_not_rounded(name, traits, device):
    bias = torch.full((64,), 7.0, device=device)
    picked = [3, 11, 19, 27, 35, 43]
    for place, expert in enumerate(picked):  # steps that bfloat16 does not have at 7
        bias[expert] = 7.0 + 0.001 * (6 - place)
    traits = {**traits, "topk_group": traits["num_expert_group"]}
    assert run(name, traits, torch.zeros(1, 64, device=device), bias)[1][0].tolist() == picked


@ALL
def test_small_scores_keep_their_digits(name, traits, device):
    logits = torch.full((1, 64), -80.0, device=device)
    logits[0, :6] = torch.tensor([-15.0, -18.0, -20.0, -40.0, -60.0, -79.0])
    bias = torch.zeros(64, device=device)
    bias[:6] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    traits = {**traits, "topk_group": traits["num_expert_group"], "renormalize": False}
    weights, ids = run(name, traits, logits, bias)
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5]
    expected = torch.tensor([[1 / (1 + math.exp(-x)) for x in logits[0, :6].tolist()]], dtype=torch.float64)
    torch.testing.assert_close(weights.double().cpu(), expected, rtol=2e-6, atol=0)


@ALL
def test_sums_of_weights(name, traits, device):
    traits = {**traits, "topk": 8, "num_fused_shared_experts": 2}
    args, _ = cases.inputs(traits, 9, device=device)
    weights, ids = kernel(name, traits)(*args, routed_scaling_factor=2.5, shared_expert_weight=0.4)
    torch.testing.assert_close(weights[:, :6].sum(1).cpu(), torch.full((9,), 2.5), rtol=1e-6, atol=0)
    assert torch.equal(weights[:, 6:].cpu(), torch.full((9, 2), 0.4))
    assert ids[:, 6:].tolist() == [[64, 65]] * 9


@ALL
def test_only_zero_scores_give_zero_weights(name, traits, device):
    logits, bias = torch.full((2, 64), -100.0, device=device), torch.zeros(64, device=device)
    weights, ids = run(name, traits, logits, bias, routed_scaling_factor=2.5)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert weights.abs().max() <= 1e-18


@ANY_SCORING
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_shared", [False, True])
def test_expert_map(name, traits, dtype, with_shared, device):
    traits = {**traits, "topk": 7, "num_fused_shared_experts": 1}
    args, _ = cases.inputs(traits, 9, device=device)
    plain = kernel(name, traits)(*args)[1]
    table = torch.arange(64 + with_shared, device=device, dtype=dtype) * 3 + 100
    table[5] = -1  # an expert that is elsewhere
    mapped = kernel(name, traits)(*args, expert_map=table)[1]
    expected = plain.clone()
    columns = 7 if with_shared else 6
    expected[:, :columns] = table.to(torch.int32)[plain[:, :columns].long()]
    assert mapped.dtype == torch.int32 and torch.equal(mapped, expected)
    spread = torch.stack([table, torch.zeros_like(table)], dim=1)[:, 0]  # stride 2
    assert torch.equal(kernel(name, traits)(*args, expert_map=spread)[1], expected)


@ANY_SCORING
@pytest.mark.parametrize("live", [-2, 0, 1, 18, 19, 20, 2**40])
def test_padded_rows(name, traits, live, device):
    """Rows at or past num_token_non_padded: ids -1, weights 0, shared slots too; the others as if alone."""
    traits = {**traits, "topk": 7, "num_fused_shared_experts": 1}
    (logits, bias), _ = cases.inputs(traits, 19, device=device)
    made = kernel(name, traits)
    expected = made(logits, bias)
    count = max(0, min(live, 19))
    logits[count:] = NAN
    number = torch.tensor(live, dtype=torch.int64 if live > 1000 else torch.int32, device=device)
    table = torch.arange(65, device=device)
    for given in (number, number.reshape(1)):
        weights, ids = made(logits, bias, num_token_non_padded=given, expert_map=table)
        assert same_bits(weights[:count], expected[0][:count]) and torch.equal(ids[:count], expected[1][:count])
        assert (ids[count:] == -1).all() and (weights[count:] == 0).all()


@ANY_SCORING
def test_strides(name, traits, device):
    (logits, bias), _ = cases.inputs(traits, 12, device=device)
    made = kernel(name, traits)
    expected = made(logits, bias)
    wide = torch.full((24, 200), NAN, device=device)
    views = {"rows of a wider tensor": wide[:12, 5:69], "every other row": wide[::2, :64],
             "every third column": wide[:12, :192:3], "transposed": torch.empty(64, 12, device=device).t(),
             "reversed order": wide.flatten()[1:].as_strided((12, 64), (64, 1))}
    for about, view in views.items():
        view.copy_(logits)
        weights, ids = made(view, bias)
        assert same_bits(weights, expected[0]) and torch.equal(ids, expected[1]), about
    one_row = logits[:1].expand(5, 64)
    assert torch.equal(made(one_row, bias)[1], expected[1][:1].expand(5, 6)), "stride 0"
    if bias is not None:
        spread = torch.stack([bias, bias * 0], 1)[:, 0]
        assert torch.equal(made(logits, spread)[1], expected[1]), "bias of stride 2"


@ALL
def test_rows_further_than_int32_reaches(name, traits, device):
    """Offsets are 64-bit: the last of three rows starts past 2^31 elements."""
    import mmap

    stride, traits = 2**30 + 16, {**traits, "dtype": "bfloat16"}
    elements = 2 * stride + 64
    if device == "cuda":
        flat = torch.empty(elements, dtype=torch.bfloat16, device=device)
    else:  # pages that are never touched cost nothing
        flat = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)
    view = flat.as_strided((3, 64), (stride, 1))
    (logits, bias), _ = cases.inputs(traits, 3, device=device)
    view.copy_(logits)
    made = kernel(name, traits)
    for got, expected in zip(made(view, bias), made(logits, bias)):
        assert same_bits(got, expected)


@ALL
def test_columns_further_than_int32_reaches(name, traits, device):
    """The other way round: a transposed view whose last column starts past 2^31 elements."""
    import mmap

    stride, traits = 2**25 + 2**21, {**traits, "dtype": "bfloat16"}
    elements = 63 * stride + 3
    assert elements > 2**31
    if device == "cuda":
        flat = torch.empty(elements, dtype=torch.bfloat16, device=device)
    else:
        flat = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)
    view = flat.as_strided((3, 64), (1, stride))
    (logits, bias), _ = cases.inputs(traits, 3, device=device)
    view.copy_(logits)
    made = kernel(name, traits)
    for got, expected in zip(made(view, bias), made(logits, bias)):
        assert same_bits(got, expected)


@ALL
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 31, 33, 131])
def test_token_counts(name, traits, tokens, device):
    judged(name, traits, tokens, device=device)
    args, kwargs = cases.inputs(traits, tokens, device=device)
    weights, ids = kernel(name, traits)(*args, **kwargs)
    assert weights.shape == ids.shape == (tokens, 6) and weights.dtype == torch.float32 and ids.dtype == torch.int32


@pytest.mark.parametrize("traits", BOTH, ids=lambda t: str(t["num_expert_group"]))
def test_more_rows_a_program(traits, device):
    """Few programs, each routing several rows after each other, give the same bits as a program a row."""
    args, kwargs = cases.inputs(traits, 100, device=device)
    expected = kernel("triton_router", traits)(*args, **kwargs)
    for rows in row_counts(traits):
        for got, wanted in zip(kernel("triton_router", traits, rows_per_program=rows)(*args, **kwargs), expected):
            assert same_bits(got, wanted)


@ANY_SCORING
def test_a_row_depends_on_nothing_else(name, traits, device):
    """Alone, elsewhere, in a batch of another size, beside NaN: the same bits; and the inputs stay as they were."""
    (logits, bias), kwargs = cases.inputs(traits, 40, device=device)
    before = logits.clone(), None if bias is None else bias.clone()
    made = kernel(name, traits)
    weights, ids = made(logits, bias, **kwargs)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = made(logits[order], bias, **kwargs)
    assert same_bits(shuffled[0], weights[order]) and torch.equal(shuffled[1], ids[order])
    for row in (0, 7, 39):
        alone = made(logits[row:row + 1], bias, **kwargs)
        assert same_bits(alone[0][0], weights[row]) and torch.equal(alone[1][0], ids[row])
    beside = logits.clone()
    beside[1::2] = NAN
    assert same_bits(made(beside, bias, **kwargs)[0][::2], weights[::2])
    assert same_bits(logits, before[0]) and (bias is None or same_bits(bias, before[1]))
    again = made(logits, bias, **kwargs)
    assert same_bits(again[0], weights) and again[0].data_ptr() != weights.data_ptr()


@ALL
def test_a_bias_changed_in_place_is_seen(name, traits, device):
    (logits, bias), _ = cases.inputs(traits, 4, device=device)
    made = kernel(name, traits)
    made(logits, bias)
    bias.data.copy_(torch.arange(64, 0, -1))
    assert made(logits, bias)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 4
