"""The order of operations, bit for bit: dequantise, then the bias, then the routing weight, then one cast.

The three orders that have been shipped elsewhere and were wrong (vLLM's pull requests 31676, 31931 and 31962 tell of
them) are put into the reference, and must fail.
"""

from __future__ import annotations

import pytest
import torch
from experts_exact import first_layer, second_layer
from experts_support import FORMATS, implementations, kernel, layer, mutant, named

DTYPES = ("bfloat16", "float16", "float32")
PLAIN = tuple(name for name, (_, act) in FORMATS.items() if act == "none")


def exact(format: str, dtype: str = "bfloat16", *, on_input=False) -> dict:
    """A top-1 layer that is ragged in its blocks of 32 and in a tile's 64."""
    group = 32 if format in ("fp8_block", "int4") else 128
    return layer(5, 1, 144, 80, format, group_size=group, has_bias=True, dtype=dtype,
                 apply_router_weight_on_input=on_input)


def wrong(make, args, kwargs, right, device) -> int:
    """How many elements are not the right ones."""
    got = make(*(t.to(device) for t in args), **{name: t.to(device) for name, t in kwargs.items()})
    assert right.isfinite().all() and (right != 0).any()
    return int((got.cpu() != right).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_second_layer(format, dtype, device):
    traits = exact(format, dtype)
    for tokens in (1, 33):
        args, kwargs, right = second_layer(traits, tokens)
        for name in implementations(traits, tokens):
            off = wrong(kernel(name, traits, tokens), args, kwargs, right, device)
            assert not off, f"{name} {named(traits)}: {off} of {right.numel()} elements differ in some bit"


@pytest.mark.parametrize("on_input", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", PLAIN)
def test_first_layer(format, dtype, on_input, device):
    traits = exact(format, dtype, on_input=on_input)
    for tokens in (1, 33):
        args, kwargs, right = first_layer(traits, tokens)
        for name in implementations(traits, tokens):
            off = wrong(kernel(name, traits, tokens), args, kwargs, right, device)
            assert not off, f"{name} {named(traits)}: {off} of {right.numel()} elements differ in some bit"


SECOND = "                y = y + w2_bias[expert].float()\n"
FIRST = "                h = h + w13_bias[expert].float()\n"
ON_INPUT = "                h = h * weight\n"
NEXT = "            a, scale = "
WEIGHTED = "y if apply_router_weight_on_input else y * weight"
MUTANTS = {
    "bias before dequantisation": ((SECOND, SECOND[:-1] + " * second.scale_of_weight(w2_scale[expert])[:, 0]\n"),),
    "weight before bias": ((SECOND, "                y = y * weight\n" + SECOND), (WEIGHTED, "y")),
    "cast before weight": ((WEIGHTED, "y.to(hidden_states.dtype).float() * weight"),),
    "bias before dequantisation, first layer": (
        (FIRST, FIRST[:-1] + " * first.scale_of_weight(w13_scale[expert])[:, 0]\n"),),
    "weight before bias, first layer": ((FIRST, ON_INPUT + FIRST), (ON_INPUT + NEXT, "                pass\n" + NEXT)),
}


@pytest.mark.parametrize("about", MUTANTS)
def test_the_orders_that_were_wrong_fail(about):
    first = about.endswith("first layer")
    traits = exact("int8_w8a16" if first else "fp8_channel", on_input=first)
    args, kwargs, right = (first_layer if first else second_layer)(traits, 33)
    elements = right.numel() if not first else right[:, :traits["intermediate_size"]].numel()
    assert wrong(mutant()(**traits), args, kwargs, right, "cpu") == 0
    assert wrong(mutant(*MUTANTS[about])(**traits), args, kwargs, right, "cpu") > 0.05 * elements


@pytest.mark.parametrize("format", ("fp8_block", "fp8_tensor", "int8", "int4"))
def test_a_cast_before_the_weight_fails_in_every_format(format):
    traits = exact(format)
    args, kwargs, right = second_layer(traits, 33)
    assert wrong(mutant(*MUTANTS["cast before weight"])(**traits), args, kwargs, right, "cpu") > 0.05 * right.numel()


def test_slots_are_summed_in_order_in_float32(device):
    """Three slots of one token: 2^24 + 1 + 1 is 2^24 in this order, 1 + 1 + 2^24 is not; then one cast."""
    traits = layer(3, 3, 16, 16, has_bias=True, dtype="float32")
    for order, right in (((0, 1, 2), 2.0**24), ((1, 2, 0), 2.0**24 + 2)):
        args = (torch.zeros(1, 16), torch.zeros(3, 32, 16), torch.zeros(3, 16, 16), torch.ones(1, 3),
                torch.tensor([order], dtype=torch.int32))
        biases = torch.tensor([2.0**24, 1.0, 1.0])[:, None].expand(3, 16).contiguous()
        kwargs = {"w13_bias": torch.zeros(3, 32), "w2_bias": biases}
        for name in implementations(traits, 1):
            assert not wrong(kernel(name, traits, 1), args, kwargs, torch.full((1, 16), right), device), name


def test_slots_are_summed_in_order_where_they_are_sorted(device):
    """As above, in an output that can't hold 2^24 + 1: 2^24 + 1 - 2^24 is 0 in this order, and 1 in others."""
    traits = layer(3, 3, 16, 16, has_bias=True)
    ids = torch.tensor([[0, 1, 2], [2, 1, 0], [0, 2, 1]], dtype=torch.int32)
    right = torch.tensor([0.0, 1.0, 1.0])[:, None].expand(3, 16)
    args = (torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(3, 32, 16, dtype=torch.bfloat16),
            torch.zeros(3, 16, 16, dtype=torch.bfloat16), torch.ones(3, 3), ids)
    biases = torch.tensor([2.0**24, 1.0, -(2.0**24)])[:, None].expand(3, 16).contiguous()
    kwargs = {"w13_bias": torch.zeros(3, 32), "w2_bias": biases}
    names = implementations(traits, 3)
    assert {"torch", "triton_grouped"} <= {*names} or device == "cuda"
    for name in names:
        assert not wrong(kernel(name, traits, 3), args, kwargs, right, device), name
