"""Sizes and routings at the edges, through every implementation that serves them here, judged in float64."""

from __future__ import annotations

import pytest
import torch
from experts_support import ACTIVATIONS, FORMATS, implementations, judged, kernel, layer, named

from kernel_registry.ops.moe.experts import cases

SMALL = layer(4, 2, 96, 64)


def all_judged(traits: dict, tokens: int, device, **how):
    for name in implementations(traits, tokens):
        judged(name, traits, tokens, device=device, **how)


@pytest.mark.parametrize("tokens", (0, 1, 7, 8, 33, 222))
def test_tokens(tokens, device):
    for format in ("none", "fp8_block"):
        all_judged(layer(5, 2, 96, 64, format), tokens, device)


@pytest.mark.parametrize("topk", (1, 2, 4, 6, 8, 9, 10))
def test_topk(topk, device):
    all_judged(layer(topk, topk, 64, 48), 9, device)  # as many slots as experts: every token goes to all
    all_judged(layer(12, topk, 64, 48, expert_parallel=True), 33, device)


@pytest.mark.parametrize("traits", [
    layer(2, 2, 511, 64), layer(2, 2, 2880, 32), layer(2, 2, 64, 192, "fp8_block"), layer(2, 2, 511, 192, "fp8_block"),
    layer(2, 2, 511, 130, "fp8_channel"), layer(2, 1, 2880, 64, "int8"), layer(2, 2, 66, 34, "int4", group_size=32),
    layer(1, 1, 64, 64), layer(2, 2, 64, 2880, has_bias=True, activation="swigluoai"), layer(2, 2, 1, 1),
    layer(2, 2, 7, 3, "fp8_block", group_size=2), layer(300, 2, 32, 16)], ids=named)
def test_sizes(traits, device):
    all_judged(traits, 9, device)


@pytest.mark.parametrize("flavour", cases.FLAVOURS)
@pytest.mark.parametrize("format", ("none", "fp8_block", "int8_static", "int4"))
def test_flavours(format, flavour, device):
    for seed, more in enumerate((dict(), dict(expert_parallel=True, has_bias=True))):
        all_judged(layer(format=format, **more), 33, device, flavour=flavour, seed=seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, activation, device):
    for bias in (False, True):
        all_judged(layer(4, 2, 160, 96, format, activation=activation, has_bias=bias), 17, device)
    all_judged(layer(4, 1, 160, 96, format, activation=activation, apply_router_weight_on_input=True), 17, device)


@pytest.mark.parametrize("expert_parallel", (False, True))
def test_no_expert_here_gives_zeros(expert_parallel, device):
    traits = layer(expert_parallel=expert_parallel, has_bias=True)
    for name in implementations(traits, 7):
        args, kwargs = cases.inputs(traits, 7, device=device, flavour="none_local")
        got = kernel(name, traits, 7)(*args, **kwargs)
        assert got.shape == args[0].shape and (got == 0).all(), name


@pytest.mark.parametrize("flavour", ("random", "padded", "none_local", "one_expert"))
def test_what_was_in_out_never_shows(flavour, device):
    """`out` holds NaN before, and the same call without `out` says what it has to hold after, bit for bit."""
    for expert_parallel in (False, True):
        traits = {**SMALL, "expert_parallel": expert_parallel, "output_alias": True}
        fresh = {**traits, "output_alias": False}
        for name in implementations(traits, 33):
            args, kwargs = cases.inputs(traits, 33, device=device, flavour=flavour)
            assert kwargs["out"].isnan().all()
            got = kernel(name, traits, 33)(*args, **kwargs)
            assert got is kwargs["out"] and got.isfinite().all(), name
            if name in implementations(fresh, 33):
                out = kwargs.pop("out")
                assert torch.equal(kernel(name, fresh, 33)(*args, **kwargs), out), name


def test_inputs_stay_as_they_are(device):
    for format in ("none", "fp8_block", "int4"):
        traits = layer(format=format, has_bias=True, expert_parallel=True)
        for name in implementations(traits, 9):
            args, kwargs = cases.inputs(traits, 9, device=device)
            before = [t.clone() for t in (*args, *kwargs.values())]
            kernel(name, traits, 9)(*args, **kwargs)
            for tensor, old in zip((*args, *kwargs.values()), before):
                assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8)), name


def test_equal_ids_count_one_by_one(device):
    """A token with the same expert in both slots: once with the sum of the weights, but for rounding."""
    traits = layer(dtype="float32")
    for name in implementations(traits, 5):
        (hidden, w13, w2, weights, ids), _ = cases.inputs(traits, 5, device=device)
        ids[:, 1] = ids[:, 0]
        twice = kernel(name, traits, 5)(hidden, w13, w2, weights, ids)
        weights[:, 0], ids[:, 1] = weights.sum(1), -1
        assert torch.allclose(kernel(name, traits, 5)(hidden, w13, w2, weights, ids), twice, rtol=1e-4, atol=1e-5), name
