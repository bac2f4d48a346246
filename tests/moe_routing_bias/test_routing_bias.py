"""moe.routing_bias: a real router's bias, prepared in place; and its judge."""

from __future__ import annotations

import pytest
import torch
from routing_bias_support import EXPERTS, NAME, OP, ROUTER, TO_BF16, Counted, Layer, band, exact, same_bits

from kernel_registry.bench import bench
from kernel_registry.ops.moe.routing_bias import oracle
from kernel_registry.preparation import preparation_of
from kernel_registry.verify import verify


def test_the_parameter_stays_the_same_object_in_every_holder(registry):
    layer = Layer(exact())
    bias = layer.gate.e_score_correction_bias
    bias.weight_loader = loader = object()
    made = registry.prepare(OP, layer, **TO_BF16)
    assert [*made] == [f"gate.{NAME}"] and made[f"gate.{NAME}"] is bias
    assert all(holder is bias for holder in layer.holders)
    assert bias.dtype == torch.bfloat16 and type(bias) is torch.nn.Parameter and not bias.requires_grad
    assert bias.weight_loader is loader
    assert same_bits(bias.data, exact().bfloat16())
    report, = preparation_of(bias).report
    assert (report.parameter, report.before, report.after, report.tokens) == (f"gate.{NAME}", "float32", "bfloat16", 0)


def test_the_same_dtype_means_nothing_is_done(registry):
    layer = Layer(band())
    bias = layer.gate.e_score_correction_bias
    view = bias[1:]  # nobody minds: the storage stays
    pointer, version = bias.data_ptr(), bias._version
    with Counted() as counted:
        registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    assert (bias.data_ptr(), bias._version) == (pointer, version) and view.data_ptr() == pointer + 4
    assert counted.names == []
    assert str(preparation_of(bias).report[0]) == f"gate.{NAME}: float32 already, nothing done"


def test_repeating_it_changes_nothing(registry):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    bias = layer.gate.e_score_correction_bias
    pointer, bits = bias.data_ptr(), bias.data.clone()
    registry.prepare(OP, layer, **TO_BF16)
    assert bias.data_ptr() == pointer and same_bits(bias.data, bits)


def test_back_to_float32_is_exact(registry):
    bias = torch.nn.Parameter(band().bfloat16(), requires_grad=False)
    assert registry.prepare(OP, bias, **ROUTER, bias_dtype="float32") is bias
    assert same_bits(bias.data, band().bfloat16().float())


def test_float32_values_that_both_have_are_taken_and_odd_ones_stay(registry):
    values = torch.zeros(EXPERTS)
    values[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 2.0**-133])  # the last is subnormal in bfloat16
    bias = registry.prepare(OP, torch.nn.Parameter(values.clone(), requires_grad=False), **TO_BF16)
    assert same_bits(bias.data.float().nan_to_num(7.0), values.nan_to_num(7.0))


def test_a_bias_of_two_routers(registry):
    layer = Layer(exact(shape=(2, EXPERTS)))
    registry.prepare(OP, layer, **TO_BF16)
    assert same_bits(layer.gate.e_score_correction_bias.data, exact(shape=(2, EXPERTS)).bfloat16())


def test_a_buffer_is_found_too(registry):
    module = torch.nn.Module()
    module.register_buffer(NAME, exact())
    buffer = module.e_score_correction_bias
    registry.prepare(OP, module, **TO_BF16)
    assert module.e_score_correction_bias is buffer and buffer.dtype == torch.bfloat16


def test_every_layer_of_a_model_and_only_what_has_the_name(registry):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Layer(exact(seed)) for seed in range(3))
    model.not_e_score_correction_bias = torch.nn.Parameter(exact())
    made = registry.prepare(OP, model, **TO_BF16)
    assert [*made] == [f"layers.{n}.gate.{NAME}" for n in range(3)]
    assert model.not_e_score_correction_bias.dtype == torch.float32
    only = registry.prepare(OP, model, **ROUTER, bias_dtype="float32", name=f"1.gate.{NAME}")
    assert [*only] == [f"layers.1.gate.{NAME}"]
    assert [layer.gate.e_score_correction_bias.dtype for layer in model.layers] == \
        [torch.bfloat16, torch.float32, torch.bfloat16]


def test_another_name(registry):
    layer = Layer(exact())
    made = registry.prepare(OP, layer, **TO_BF16, name="correction")
    assert [*made] == ["experts.correction"] and layer.gate.e_score_correction_bias.dtype == torch.bfloat16


def test_it_verifies(registry):
    report = verify(registry, ops=[OP], budget=24)
    assert report.ok and {row.outcome for row in report.rows} == {"passed"}


def test_it_is_benchmarked(registry):
    row, = bench(registry, ops=[OP], workloads=["deepseek-v3-bf16"], tokens=[1], seconds=0.01)
    assert row.implementation == "in_place" and row.chosen and row.microseconds and not row.error


@pytest.mark.parametrize("wrong", [
    lambda bias: bias, lambda bias: bias.to(torch.float16), lambda bias: bias.bfloat16()[None],
    lambda bias: (bias + 1 / 64).bfloat16(), lambda bias: torch.where(bias == 0, -0.0, bias).bfloat16()])
def test_the_judge_sees_what_is_wrong(wrong):
    traits = dict(TO_BF16)
    values = exact()
    values[5] = 0.0
    assert oracle.check(traits, (values,), {}, values.bfloat16()).passed
    assert not oracle.check(traits, (values,), {}, wrong(values)).passed
