"""moe.routing_bias in the forward pass, and how moe_router decides whether a bias is prepared at all."""

from __future__ import annotations

import pytest
import torch
from routing_bias_support import EXPERTS, OP, ROUTER, TO_BF16, Counted, Layer, band, exact, same_bits, untouched

from kernel_registry import Registry, moe_router
from kernel_registry.errors import OverrideError, PreparationError, TraitError
from kernel_registry.preparation import preparation_of


def test_a_forward_pass_makes_no_call_for_the_bias(registry):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    take, bias = registry.bind(OP, **TO_BF16), layer.gate.e_score_correction_bias
    with Counted() as counted:
        for _ in range(3):
            assert take(bias) is bias
    assert counted.names == []


def test_a_float32_bias_and_bfloat16_logits_are_routed_as_they_are():
    """On the GPU by kernels that cast in registers, on the CPU by the reference: with no cast of the bias."""
    layer = Layer(band())
    bias, pointer = layer.gate.e_score_correction_bias, layer.gate.e_score_correction_bias.data_ptr()
    for platform in ("cpu", "interpreter", "sm_90", "gfx942"):
        registry = Registry(plugins=False, environment=False, platform=platform)
        route = moe_router(bias, registry=registry, **ROUTER)
        assert route.traits["bias_dtype"] == "float32" and route.traits["dtype"] == "bfloat16"
        assert route.name.startswith("torch" if platform == "cpu" else "triton_biased_grouped")
        assert bias.data_ptr() == pointer and same_bits(bias.data, band())
    route = moe_router(bias, registry=Registry(plugins=False, environment=False, platform="cpu"), **ROUTER)
    logits = torch.randn(5, EXPERTS).bfloat16()
    with Counted() as counted:
        route(logits, bias)
    assert counted.names and counted.casts == 0
    with Counted() as counted:  # what is saved: the same with a cast in every call
        route(logits, bias.data.to(torch.bfloat16).to(torch.float32))
    assert counted.casts == 2


NARROW = """
version: 1
ops:
  moe.topk:
    implementations:
      narrow:
        target: kernel_registry.ops.moe.topk.reference:topk
        rank: 1
        when: {platform: any, dtype: any, bias_dtype: bfloat16, num_expert_group: any, topk_group: any, contiguous: any}
"""


@pytest.fixture
def narrow(tmp_path):
    """A registry with one router more, which goes first where the bias is bfloat16 and takes no other."""
    path = tmp_path / "narrow.yaml"
    path.write_text("version: 1\nops:" + NARROW.partition("ops:")[2])
    registry = Registry(plugins=False, environment=False, platform="cpu")
    registry.load_overrides(path, allow_targets=True)
    return registry


def test_a_router_of_one_dtype_does_not_decide_while_another_takes_the_bias_as_it_is(narrow):
    layer = Layer(exact())
    route = moe_router(layer.gate.e_score_correction_bias, registry=narrow, **ROUTER)
    assert route.name == "torch" and untouched(layer, exact())
    assert preparation_of(layer.gate.e_score_correction_bias) is None


@pytest.mark.parametrize("bias", [exact().double(), exact()[::2].repeat_interleave(2)])
def test_a_bias_that_is_taken_as_it_is_needs_nothing_of_moe_routing_bias(registry, bias):
    """Nor that its dtype be one that a bias can be given."""
    with registry.disable(OP, "in_place"):
        route = moe_router(bias, registry=registry, **ROUTER)
    assert route.traits["bias_dtype"] == str(bias.dtype).removeprefix("torch.")
    assert route(torch.randn(5, EXPERTS).bfloat16(), bias)[1].shape == (5, 4)


def test_a_router_that_was_asked_for_gets_the_dtype_that_it_declares(narrow):
    layer = Layer(exact())
    bias = layer.gate.e_score_correction_bias
    route = moe_router(bias, registry=narrow, implementation="narrow", **ROUTER)
    assert route.name == "narrow" and bias.dtype == torch.bfloat16
    assert narrow.bind(OP, **TO_BF16)(bias) is bias
    weights, ids = route(torch.randn(5, EXPERTS).bfloat16(), bias)
    assert weights.shape == ids.shape == (5, 4)
    with pytest.raises(PreparationError, match="would go from float32 to bfloat16"):
        moe_router(Layer(band()).gate.e_score_correction_bias, registry=narrow, implementation="narrow", **ROUTER)
    wide = Layer(band()).gate.e_score_correction_bias
    moe_router(wide, registry=narrow, implementation="narrow", narrow=True, **ROUTER)
    assert wide.dtype == torch.bfloat16


def test_what_no_router_serves_is_told_for_the_bias_as_it_is(narrow):
    bias = Layer(exact()).gate.e_score_correction_bias
    with pytest.raises(OverrideError, match="bias_dtype is float32, serves bfloat16"):
        moe_router(bias, registry=narrow, implementation="narrow", **ROUTER, scoring="softmax")
    with pytest.raises(TraitError, match="bias_dtype follows from the bias"):
        moe_router(bias, registry=narrow, **TO_BF16)
    with pytest.raises(TraitError, match="got no bias\n.*has_bias=False"):
        moe_router(None, registry=narrow, **ROUTER)
