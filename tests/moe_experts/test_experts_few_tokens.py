"""The two launches for few tokens with their products on the matrix unit, which serve large experts, on small ones."""

from __future__ import annotations

import pytest
from experts_support import judged, layer, named

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, triton_few_tokens

ODD = dict(has_bias=True, activation="swigluoai", expert_parallel=True, dtype="float16")


def experts(traits):
    return triton_few_tokens.experts(**traits, platform=registry.platform(), matrix_unit=True)


@pytest.mark.parametrize("traits", [
    layer(12, 8, 384, 256, "fp8_block"), layer(12, 8, 300, 200, "fp8_block", **ODD),
    layer(6, 3, 511, 130, "fp8_block", group_size=32), layer(6, 3, 300, 200, "fp8_block", group_size=64, **ODD),
    layer(6, 1, 256, 192, "fp8_block", apply_router_weight_on_input=True), layer(20, 16, 140, 264, "fp8_block")],
    ids=named)
def test_sizes(traits, device):
    judged("few", traits, 2, device=device, made=experts(traits))


@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_flavours(flavour, device):
    traits = layer(6, 2, 160, 192, "fp8_block", has_bias=True)
    judged("few", traits, 3, flavour=flavour, device=device, made=experts(traits))
