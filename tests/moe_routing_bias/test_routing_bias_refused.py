"""What moe.routing_bias refuses: everything that would make a preparation in place harmful."""

from __future__ import annotations

import pytest
import torch
from routing_bias_support import EXPERTS, NAME, OP, ROUTER, TO_BF16, Layer, band, exact, same_bits, untouched

from kernel_registry.errors import CaptureError, InputError, NoImplementationError, PreparationError, TraitError
from kernel_registry.preparation import preparation_of


def test_a_missing_target_is_an_error(registry):
    layer = Layer(exact())
    with pytest.raises(TraitError, match="missing bias_dtype"):
        registry.prepare(OP, layer, **ROUTER)
    with pytest.raises(TraitError, match="bias_dtype: expected a dtype"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype=None)
    with pytest.raises(NoImplementationError, match="bias_dtype is int32"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype="int32")
    assert untouched(layer, exact())


def test_a_call_without_a_bias_or_with_no_bias_is_an_error(registry):
    take = registry.bind(OP, **TO_BF16)
    with pytest.raises(InputError, match=rf"correction_bias is None, expected \[\.\.\., {EXPERTS}\] bfloat16"):
        take(None)
    for wrong in (3, torch.zeros(EXPERTS + 1, dtype=torch.bfloat16), exact().bfloat16()):
        with pytest.raises(PreparationError, match="correction_bias is not prepared"):
            take(wrong)


def test_a_module_without_the_parameter_is_an_error(registry):
    layer = Layer(exact())
    with pytest.raises(PreparationError, match=f"Layer has no parameter and no buffer called wrong.*\n.*gate.{NAME}"):
        registry.prepare(OP, layer, **TO_BF16, name="wrong")
    with pytest.raises(PreparationError, match="Linear has no parameter"):
        registry.prepare(OP, torch.nn.Linear(2, 2, bias=False), **TO_BF16)
    with pytest.raises(PreparationError, match="a NoneType was to be prepared"):
        registry.prepare(OP, None, **TO_BF16)


@pytest.mark.parametrize("bias", [torch.zeros(EXPERTS + 1), torch.zeros(EXPERTS, dtype=torch.int32), torch.tensor(1.0)])
def test_what_is_no_bias_of_these_experts(registry, bias):
    with pytest.raises(PreparationError, match=rf"correction_bias is \[.*\] .*, expected \[{EXPERTS}\] of floating"):
        registry.prepare(OP, bias, **TO_BF16)


def test_narrowing_that_changes_a_value_is_refused_with_the_counts(registry):
    layer = Layer(band())
    before, after = band().unique().numel(), band().bfloat16().unique().numel()
    assert before > 60 and after < 12
    pattern = rf"gate.{NAME} would go from float32 to bfloat16, .* of {before} distinct ones {after} would be left"
    with pytest.raises(PreparationError, match=pattern) as caught:
        registry.prepare(OP, layer, **TO_BF16)
    assert "bias_dtype=float32" in caught.value.hint and "narrow=True" in caught.value.hint
    assert untouched(layer, band()) and preparation_of(layer.gate.e_score_correction_bias) is None


def test_one_changed_value_is_enough_and_no_layer_is_changed_before_all_may_be(registry):
    odd = exact(1)
    odd[-1] = 1 + 2**-9
    model = torch.nn.ModuleList([Layer(exact()), Layer(odd.clone())])
    with pytest.raises(PreparationError, match=f"1.gate.{NAME} would go"):
        registry.prepare(OP, model, **TO_BF16)
    assert untouched(model[0], exact()) and untouched(model[1], odd)
    overflow = torch.nn.Parameter(torch.full((EXPERTS,), 65_536.0))
    with pytest.raises(PreparationError, match="of 1 distinct ones 1 would be left"):
        registry.prepare(OP, overflow, **ROUTER, bias_dtype="float16")


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_narrowing_by_name_says_how_many_tokens_change_experts(registry, scoring):
    layer = Layer(band())
    registry.prepare(OP, layer, **TO_BF16, scoring=scoring, narrow=True)
    bias = layer.gate.e_score_correction_bias
    assert same_bits(bias.data, band().bfloat16())  # to the nearest, ties to even
    report, = preparation_of(bias).report
    assert report.distinct_before == band().unique().numel() and report.distinct_after == bias.unique().numel()
    route = registry.dispatch("moe.topk", **{**ROUTER, "dtype": "float32"}, bias_dtype="float32",
                              implementation="torch", scoring=scoring)
    logits = torch.randn(1024, EXPERTS, generator=torch.Generator().manual_seed(0))
    sets = [{tuple(sorted(row)) for row in [ids]} for ids in route(logits, band())[1].tolist()]
    others = [{tuple(sorted(row)) for row in [ids]} for ids in route(logits, bias.data.float())[1].tolist()]
    assert report.tokens == 1024 and report.changed_tokens == sum(a != b for a, b in zip(sets, others)) > 100
    assert f"{report.changed_tokens} of 1024 random tokens change experts" in str(report)


def test_the_probe_routes_tokens_of_their_own_with_each_row(registry):
    both, one = (torch.nn.Parameter(values, requires_grad=False) for values in (torch.stack([band(), exact()]), band()))
    registry.prepare(OP, both, **TO_BF16, narrow=True)
    registry.prepare(OP, one, **TO_BF16, narrow=True)
    (of_both,), (of_one,) = preparation_of(both).report, preparation_of(one).report
    assert (of_both.tokens, of_one.tokens) == (2048, 1024)
    assert of_both.changed_tokens == of_one.changed_tokens > 0, "the second row's values are all kept"


def test_the_probe_leaves_shared_experts_out(registry):
    bias = torch.nn.Parameter(band(), requires_grad=False)
    registry.prepare(OP, bias, **{**TO_BF16, "topk": 5, "num_fused_shared_experts": 1}, narrow=True)
    other = torch.nn.Parameter(band(), requires_grad=False)
    registry.prepare(OP, other, **TO_BF16, narrow=True)
    assert preparation_of(bias).report[0].changed_tokens == preparation_of(other).report[0].changed_tokens


@pytest.mark.parametrize("hold, name", [
    (lambda layer, view: setattr(layer, "row", view), "row is a view"),
    (lambda layer, view: setattr(layer.experts, "row", view), "experts.row is a view"),
    (lambda layer, view: setattr(layer.experts, "rows", [None, view]), r"experts.rows\[1\] is a view"),
    (lambda layer, view: setattr(layer, "rows", {"text": view}), r"rows\['text'\] is a view"),
    (lambda layer, view: layer.register_buffer("kept", view), "kept is a view"),
    (lambda layer, view: setattr(layer.router, "row", view), "Router.row is a view"),
    (lambda layer, view: setattr(layer, "tied", torch.nn.Parameter(view, requires_grad=False)), "tied is a view"),
])
@pytest.mark.parametrize("take", [lambda bias: bias[1], lambda bias: bias.data, lambda bias: bias.view(-1).detach()],
                         ids=["row", "data", "flat"])
def test_views_that_would_be_left_behind_are_named(registry, hold, name, take):
    values = exact(shape=(2, EXPERTS))
    layer = Layer(values.clone())
    hold(layer, take(layer.gate.e_score_correction_bias))
    with pytest.raises(PreparationError, match=f"{name} of gate.{NAME}"):
        registry.prepare(OP, layer, **TO_BF16)
    assert untouched(layer, values)


def test_a_view_that_no_module_holds_is_found(registry):
    bias = torch.nn.Parameter(exact(), requires_grad=False)
    elsewhere = {"row": bias[3:]}
    with pytest.raises(PreparationError, match="'row' in a dict is a view of correction_bias"):
        registry.prepare(OP, bias, **TO_BF16)
    elsewhere.clear()
    registry.prepare(OP, bias, **TO_BF16)
    assert bias.dtype == torch.bfloat16


def test_the_tensor_of_which_the_bias_is_a_part_is_found(registry):
    layer = Layer(exact())
    layer.fused = torch.zeros(4, EXPERTS)
    layer.gate.e_score_correction_bias.data = layer.fused[2]
    with pytest.raises(PreparationError, match="fused is a view"):
        registry.prepare(OP, layer, **TO_BF16)


def test_garbage_is_nobodys_view(registry):
    layer = Layer(exact())
    cycle = {"row": layer.gate.e_score_correction_bias[1:]}
    cycle["self"] = cycle
    del cycle
    registry.prepare(OP, layer, **TO_BF16)
    assert layer.gate.e_score_correction_bias.dtype == torch.bfloat16


def test_refused_once_a_captured_graph_has_read_it(registry, monkeypatch):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    take, bias = registry.bind(OP, **TO_BF16), layer.gate.e_score_correction_bias
    pointer = bias.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr("kernel_registry.preparation.capturing", lambda: True)
        take(bias)
        with pytest.raises(CaptureError, match="while a CUDA graph is captured"):
            registry.prepare(OP, layer, **TO_BF16)
    with pytest.raises(CaptureError, match=f"gate.{NAME} was read by a captured CUDA graph"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    registry.prepare(OP, layer, **TO_BF16)  # nothing moves
    assert bias.data_ptr() == pointer and take(bias) is bias
