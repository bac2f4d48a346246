"""The two launches for few tokens with their products on the matrix unit, which serve large experts, on small ones."""

from __future__ import annotations

import pytest
from experts_support import judged, layer, named

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, triton_few_tokens

ODD = dict(has_bias=True, activation="swigluoai", expert_parallel=True, dtype="float16")


def experts(monkeypatch, traits, first=(), second=()):
    """The kernel with these changes of the launch parameters."""
    monkeypatch.setattr(triton_few_tokens, "ELEMENTWISE", 0)
    up, down = triton_few_tokens._tiles(True, traits["topk"], traits["hidden_size"], traits["intermediate_size"],
                                        traits["group_size"])
    assert up["DOT"]
    monkeypatch.setattr(triton_few_tokens, "_tiles", lambda *_: ({**up, **dict(first)}, {**down, **dict(second)}))
    return triton_few_tokens.experts(**traits, platform=registry.platform())


@pytest.mark.parametrize("traits", [
    layer(12, 8, 384, 256, "fp8_block"), layer(12, 8, 300, 200, "fp8_block", **ODD),
    layer(6, 3, 511, 130, "fp8_block", group_size=32), layer(6, 3, 300, 200, "fp8_block", group_size=64, **ODD),
    layer(6, 1, 256, 192, "fp8_block", apply_router_weight_on_input=True), layer(20, 16, 140, 264, "fp8_block")],
    ids=named)
@pytest.mark.parametrize("ahead", (False, True))
def test_sizes(traits, ahead, device, monkeypatch):
    judged("few", traits, 2, device=device, made=experts(monkeypatch, traits, (), {"AHEAD": ahead}))


@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_flavours(flavour, device, monkeypatch):
    traits = layer(6, 2, 160, 192, "fp8_block", has_bias=True)
    judged("few", traits, 3, flavour=flavour, device=device, made=experts(monkeypatch, traits))


@pytest.mark.parametrize("group", (32, 64, 128))
@pytest.mark.parametrize("activation", ("silu", "swigluoai"))
def test_whole_groups_are_quantised_by_the_first_launch(group, activation, device, monkeypatch):
    traits = layer(6, 2, 300, 200, "fp8_block", group_size=group, activation=activation)
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            made = experts(patch, traits, {"BLOCK_N": group, "PARTS": 1}, {"AHEAD": ahead})
            judged("few", traits, 2, device=device, made=made)


@pytest.mark.parametrize("activation", ("silu", "swigluoai"))
@pytest.mark.parametrize("parts", (1, 2, 4))
def test_weights_through_a_descriptor(parts, activation, device, monkeypatch):
    traits = layer(6, 2, 384, 200, "fp8_block", activation=activation)
    made = experts(monkeypatch, traits, {"BLOCK_N": 32 // parts, "PARTS": parts, "DESCRIPTOR": True})
    judged("few", traits, 2, device=device, made=made)
