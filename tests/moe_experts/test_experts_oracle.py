"""The judge itself: it passes what is right, decides nearly every row, and finds each of many small mistakes."""

from __future__ import annotations

import pytest
import torch
from experts_support import FORMATS, judged, kernel, layer, mutant

from kernel_registry.ops.moe.experts import cases, oracle, reference
from kernel_registry.ops.moe.experts.oracle_numbers import Value, exactly, product, row_rounding, spreads

QUANTISED = ("fp8_block", "fp8_channel", "fp8_tensor_static", "int8", "int8_static")


def small(format: str, **other) -> dict:
    """Several blocks of 32 columns each way, with ragged ones."""
    group = 32 if format in ("fp8_block", "int4") else 128
    return layer(6, 3, 144, 80, format, **{"group_size": group, "has_bias": True, **other})


def verdict(make, traits, *, tokens=33, seed=0, flavour="random"):
    args, kwargs = cases.inputs(traits, tokens, seed=seed, flavour=flavour)
    return oracle.check(traits, args, kwargs, make(**traits)(*args, **kwargs))


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_passes_and_nearly_every_row_is_decided(format):
    undecided = rows = 0
    for seed, flavour in enumerate(cases.FLAVOURS):
        for dtype in ("bfloat16", "float32"):
            found = judged("torch", small(format, dtype=dtype), 33, flavour=flavour, seed=seed)
            undecided, rows = undecided + found.undecided, rows + found.rows
    assert undecided < 0.01 * rows


BIAS13 = "                h = h + w13_bias[expert].float()\n"
BIAS2 = "                y = y + w2_bias[expert].float()\n"
WEIGHTED, SPREAD = "else y * weight", "scale = matrix.scale_of_weight(scale)"
SCALED = ("fp8_block", "fp8_channel", "int8", "int8_w8a16", "int4")
SLOW_SUM = """
def _slow(x, w):
    total = torch.zeros(x.shape[0], w.shape[0])
    for k in range(0, w.shape[1], 16):
        total = (total + x[:, k:k + 16] @ w[:, k:k + 16].T).bfloat16().float()
    return total


def _multiply("""
MUTANTS = {  # name -> (changes of the reference's source, formats in which they are mistakes)
    "no first bias": (((BIAS13, "                pass\n"),), FORMATS),
    "no second bias": (((BIAS2, "                pass\n"),), FORMATS),
    "the first bias of the next expert": ((("w13_bias[expert]", "w13_bias[(expert + 1) % num_experts]"),), FORMATS),
    "the second bias of the next expert": ((("w2_bias[expert]", "w2_bias[(expert + 1) % num_experts]"),), FORMATS),
    "gate and up swapped": ((("gate, up = h.chunk(2, dim=1)", "up, gate = h.chunk(2, dim=1)"),), FORMATS),
    "weights of the next expert": ((("w2[expert]", "w2[(expert + 1) % num_experts]"),), FORMATS),
    "weight twice": (((WEIGHTED, "else y * weight * weight"),), FORMATS),
    "weight forgotten": (((WEIGHTED, "else y"),), FORMATS),
    "weight in bfloat16": ((("topk_weights.float()", "topk_weights.bfloat16().float()"),), FORMATS),
    "weight before the bias": (((BIAS2, "                y = y * weight\n" + BIAS2),
                                (WEIGHTED, "else y")), FORMATS),
    "a slot dropped": ((("range(1, topk)", "range(1, topk - 1)"),), FORMATS),
    "rows cast before the weight": (((WEIGHTED, "else y.to(hidden_states.dtype).float() * weight"),), FORMATS),
    "rows cast before the sum": (((WEIGHTED, "else (y * weight).to(hidden_states.dtype).float()"),), FORMATS),
    "a sum of slots in bfloat16": ((("total = total + rows[:, slot]",
                                     "total = (total + rows[:, slot]).bfloat16().float()"),), FORMATS),
    "a sum of products in bfloat16": ((("\ndef _multiply(", SLOW_SUM),
                                       ("return x @ weight.T", "return _slow(x, weight)"),
                                       ("y = x @ weight.T", "y = _slow(x, weight)"),
                                       ("return (x if x_scale is None else x * x_scale) @ (weight * scale).T",
                                        "return _slow(x if x_scale is None else x * x_scale, weight * scale)")),
                                      FORMATS),
    "the first result rounded": ((("activate(h, activation)", "activate(h.bfloat16().float(), activation)"),), FORMATS),
    "rounded before it is quantised": ((("operand(activate(h, activation)",
                                         "operand(activate(h, activation).bfloat16()"),), QUANTISED),
    "the activation left in float32": ((("x.to(getattr(torch, dtype)).float(), None", "x.float(), None"),),
                                       ("none", "int8_w8a16", "int4")),
    "row scales shifted": (((SPREAD, SPREAD + ".roll(1, 0)"),), SCALED),
    "one row's scale an eighth too large": (((SPREAD, SPREAD + ".clone(); scale[-1] *= 1.125"),), SCALED),
    "the last column group has the scale of the one before": (
        ((SPREAD, SPREAD + ".clone(); n = scale.shape[1] % 32 or 32; scale[:, -n:] = scale[:, -n - 1, None]"),),
        ("fp8_block", "int4")),
    "nibbles swapped": ((("w13[expert], None if", "(w13[expert] >> 4 | w13[expert] << 4), None if"),), ("int4",)),
}


@pytest.mark.parametrize("about", MUTANTS)
def test_mistakes_are_found(about):
    changes, formats = MUTANTS[about]
    for format in formats:
        found = verdict(mutant(*changes), small(format), seed=5)
        assert found.passed is False, f"{format}: {found.detail}"


def test_mistakes_with_the_weight_on_input_are_found():
    traits = layer(6, 1, 144, 80, has_bias=True, apply_router_weight_on_input=True)
    assert verdict(mutant(), traits).passed
    for old, new in (("y if apply_router_weight_on_input else y * weight", "y * weight"),
                     ("                h = h * weight\n", "                pass\n"),
                     (BIAS13, "                h = h + w13_bias[expert].float() / weight\n")):
        assert verdict(mutant((old, new)), traits).passed is False, new


@pytest.mark.parametrize("activation", ("gelu", "swigluoai", "swigluoai_packed"))
def test_mistakes_in_an_activation_are_found(activation):
    traits = small("none", activation=activation)
    assert verdict(mutant(), traits, flavour="outliers").passed
    changes = {"gelu": [("gelu(gate)", "gelu(gate, approximate='tanh')")],
               "swigluoai": [("h[:, 0::2], h[:, 1::2]", "h.chunk(2, dim=1)"), ("up + 1", "up")],
               "swigluoai_packed": [("_ALPHA = 7.0, 1.702", "_ALPHA = 7.0, 1.0"), ("up.clamp(-_LIMIT, _LIMIT)", "up"),
                                    ("gate.clamp(max=_LIMIT)", "gate")]}
    for change in changes[activation]:
        assert verdict(mutant(change), traits, flavour="outliers").passed is False, change


def test_one_element_one_unit_off_is_found():
    """Where float32 leaves no doubt about the number that the result is cast to."""
    traits = small("none")
    args, kwargs = cases.inputs(traits, 33)
    got = kernel("torch", traits)(*args, **kwargs)
    _, rounded, bound = oracle.evaluate(traits, args, kwargs)
    sure = ((rounded - bound).bfloat16() == (rounded + bound).bfloat16()).nonzero()
    assert len(sure) > 0.5 * got.numel()
    token, column = sure[len(sure) // 2].tolist()
    got.view(torch.int16)[token, column] += 1
    found = oracle.check(traits, args, kwargs, got)
    assert found.passed is False
    assert found.detail.startswith(f"1 of 33 rows are wrong; the first is row {token}, ")
    assert f"column {column} is" in found.detail


@pytest.mark.parametrize("about, change", [
    ("dtype", lambda got, args: got.float()), ("shape", lambda got, args: got[:-1]),
    ("a tuple", lambda got, args: (got,)), ("an input", lambda got, args: args[0].copy_(got)),
    ("NaN", lambda got, args: got.index_fill(0, torch.tensor([3]), float("nan"))),
    ("a row of another", lambda got, args: got.index_copy(0, torch.tensor([3]), got[4:5])),
    ("a row of 0", lambda got, args: got.index_fill(0, torch.tensor([3]), 0))])
def test_the_form_of_a_result(about, change):
    traits = small("none")
    args, kwargs = cases.inputs(traits, 9)
    assert oracle.check(traits, args, kwargs, kernel("torch", traits)(*args, **kwargs)).passed
    args, kwargs = cases.inputs(traits, 9)
    assert oracle.check(traits, args, kwargs, change(kernel("torch", traits)(*args, **kwargs), args)).passed is False


def test_out_must_be_what_is_returned():
    traits = small("none", output_alias=True)
    args, kwargs = cases.inputs(traits, 9)
    assert kwargs["out"].isnan().all()
    got = kernel("torch", traits)(*args, **kwargs)
    assert got is kwargs["out"] and oracle.check(traits, args, kwargs, got).passed
    assert oracle.check(traits, args, kwargs, got.clone()).passed is False


def test_the_whole_calls_error_is_held_against_float32():
    """An error inside every element's bounds, but in all of them, is more than 1.15 times that of float32."""
    traits = small("none", dtype="float32")
    args, kwargs = cases.inputs(traits, 33)
    _, rounded, bound = oracle.evaluate(traits, args, kwargs)
    size = float(rounded.square().mean().sqrt())
    far = (rounded + 0.9 * bound).float()
    assert float((far - rounded).square().mean().sqrt()) > 1.2e-6 * size
    assert "more than 1.15 times" in oracle.check(traits, args, kwargs, far).detail
    assert oracle.check(traits, args, kwargs, rounded.float()).passed


# ---- numbers near a boundary -----------------------------------------------------------------------------------------

BLOCKS = layer(6, 1, 256, 256, "fp8_block")


@pytest.fixture
def tensor_cores(monkeypatch):
    """The judge takes what it judges for a GPU's, so that float32 leaves some quantised numbers open."""
    monkeypatch.setattr(oracle, "product", lambda traits, x, weight, on_gpu: product(traits, x, weight, True))


def jumped(factor: float, rows: int = 1, others: int = 3):
    """(args, kwargs, outputs) of a right call but that in some rows numbers are on the other side of a boundary: the
    one of the largest consequence, multiplied by `factor`, and after it `others`. Asserts that it shows."""
    args, kwargs = cases.inputs(BLOCKS, 65)
    _, rounded, bound = oracle.evaluate(BLOCKS, args, kwargs)
    found = rounded.clone()
    for token in range(rows):
        steps = oracle._jumps(BLOCKS, args, kwargs, token)
        order = (steps / bound[token]).abs().amax(1).argsort(descending=True)
        # the bound covers one jump and little beside it: as far again, where that jump shows most
        column = (steps[order[0]] / bound[token]).abs().argmax()
        same = [i for i in order[1:].tolist() if steps[i, column] * steps[order[0], column] > 0][:others]
        found[token] += factor * steps[order[0]] + steps[same].sum(0)
    outputs = found.bfloat16()
    assert int(oracle._outside(outputs, rounded, bound).any(1).sum()) == rows
    return args, kwargs, outputs


@pytest.mark.parametrize("rows", [1, 8])
def test_numbers_on_the_other_side_of_a_boundary_explain_a_row(tensor_cores, rows):
    """Their sum is beyond the row's bounds, which know them by their spreads only."""
    args, kwargs, outputs = jumped(1.0, rows)
    found = oracle.check(BLOCKS, args, kwargs, outputs)
    assert found.passed, found.detail


def test_what_no_such_number_explains_is_wrong(tensor_cores):
    args, kwargs, outputs = jumped(1.7)
    assert oracle.check(BLOCKS, args, kwargs, outputs).passed is False


def test_many_rows_outside_are_wrong_whatever_explains_them(tensor_cores):
    args, kwargs, outputs = jumped(1.0, rows=9)
    assert oracle.check(BLOCKS, args, kwargs, outputs).detail.startswith("9 of 65 rows are wrong; the first is row 0,")


def power(x):
    """The power of two in the size of x; 0 in 0."""
    return torch.where(x == 0, 0.0, 2.0 ** (torch.frexp(x).exponent - 1))


def summed_by_tensor_cores(x, w):
    """x [N, 128] times w [R, 128], fp8 numbers, as Hopper sums them: 32 products at a time and the sum before, each cut
    to 13 bits below the largest, which goes by the factors' powers of two; then the sum is cut to 13 bits."""
    total = x.new_zeros(len(x), len(w))
    for a, b in zip(x.split(32, 1), w.split(32, 1)):
        largest = (power(a)[:, None] * power(b)).amax(2)
        unit = torch.maximum(largest, power(total)).clamp(min=1e-30)[..., None] * 2.0**-13
        total = (torch.cat([a[:, None] * b, total[..., None]], 2) / unit).trunc().sum(2) * unit[..., 0]
        unit = power(total).clamp(min=1e-30) * 2.0**-13
        total = (total / unit).trunc() * unit
    return total


@pytest.mark.parametrize("columns", [128, 1536])
@pytest.mark.parametrize("few_large", [False, True])
def test_sums_that_are_cut_like_tensor_cores_do_have_their_spread(few_large, columns):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(16, columns, generator=generator), torch.randn(64, columns, generator=generator)
    x = (x**3 if few_large else x).to(torch.float8_e4m3fn).double()
    w = w.to(torch.float8_e4m3fn).double()
    total = sum(summed_by_tensor_cores(a, b) for a, b in zip(x.split(128, 1), w.split(128, 1)))
    right = product({"act_quant": "fp8_token"}, exactly(x), w, True)
    off = ((total - right.at) / right.spread).flatten().abs()
    assert 0.8 < off.square().mean().sqrt() < 1.9 and off.max() < 8
    without = product({"act_quant": "fp8_token"}, exactly(x), w, False)
    assert ((total - right.at) / without.spread).abs().max() > 100


def test_products_beside_a_much_larger_sum_before_lose_bits():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 128, generator=generator) for rows in (16, 256))
    x[:, :32], w[:, :32] = 8 * x[:, :32].abs(), 8 * w[:, :32].abs()
    x, w = (t.to(torch.float8_e4m3fn).double() for t in (x, w))
    right = product({"act_quant": "fp8_token"}, exactly(x), w, True)
    off = ((summed_by_tensor_cores(x, w) - right.at) / right.spread).flatten().abs()
    assert 0.5 < off.square().mean().sqrt() < 1.9 and off.max() < 8


def multiplied_by_tensor_cores(x, x_scale, stored, scale, matrix):
    """The reference's product of fp8 blocks, in the arithmetic of Hopper."""
    total, weight, scale = 0.0, matrix.values(stored), matrix.scale_of_weight(scale)
    for k in range(0, weight.shape[1], 128):
        factor = x_scale[:, k, None] * scale[:, k]
        total = total + summed_by_tensor_cores(x[:, k:k + 128], weight[:, k:k + 128]) * factor
    return total


def test_what_tensor_cores_make_of_a_layer_is_right(tensor_cores, monkeypatch):
    """One product of 128 columns a row, with whose error no other slot's is mixed; its numbers are those of an H200."""
    traits = layer(8, 3, 512, 128, "fp8_block", has_bias=True, activation="gelu", dtype="float16")
    args, kwargs = cases.inputs(traits, 511, flavour="one_expert")
    monkeypatch.setattr(reference, "_multiply", multiplied_by_tensor_cores)
    got = reference.experts(**traits)(*args, **kwargs)
    assert got[48, 225] == -1.3623046875
    found = oracle.check(traits, args, kwargs, got)
    assert found.passed, found.detail
    assert found.undecided < 0.02 * found.rows


def test_a_scale_moves_its_columns_together():
    """A dynamic scale that is off by one of its spreads, and with it all that it multiplies."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randn(16, 128, generator=generator).double()
    weight = torch.randn(64, 128, generator=generator).abs().double() * at[0].sign()  # row 0: all products above 0
    scale_spread = torch.full_like(at, 1e-3)
    traits = {"act_quant": "fp8_block", "group_size": 128}
    right = product(traits, Value(at, scale_spread * at.abs(), scale_spread), weight, True)
    off = ((at * (1 + scale_spread)) @ weight.T - right.at).abs() / right.spread
    assert 0.9 < off[0].min() and off.max() < 1.0


def test_how_many_spreads_are_allowed_follows_from_the_number_of_elements():
    from math import erfc, sqrt

    for elements in (1, 10**4, 10**7, 10**8, 10**10):
        assert elements * erfc(spreads(elements) / sqrt(2)) < 1e-6 and spreads(elements) >= 8
    assert spreads(10**10) > 8


def test_a_row_that_waits_in_11_bits_has_that_rounding():
    y = torch.cat([torch.randn(10000, generator=torch.Generator().manual_seed(0)), torch.zeros(1)]).double()
    off = (y.half().double() - y).abs()
    spread = row_rounding(y)
    assert spread[-1] == 0 and (off <= 3**0.5 * spread).all()
    assert off.square().mean().sqrt() == pytest.approx(spread.square().mean().sqrt().item(), rel=0.05)
