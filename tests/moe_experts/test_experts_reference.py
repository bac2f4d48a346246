"""The reference against a naive evaluation in float64, in every combination of formats and options."""

from __future__ import annotations

import itertools

import pytest
import torch
from experts_support import ACTIVATIONS, FORMATS, kernel, layer, naive

from kernel_registry.ops.moe.experts import cases, oracle

OPTIONS = [dict(has_bias=bias, expert_parallel=parallel, **routing)
           for bias, parallel, routing in itertools.product((False, True), (False, True), (
               dict(topk=2), dict(topk=1, apply_router_weight_on_input=True)))]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_combination(format, activation):
    """Ragged in every way: blocks of 16 over 24 rows in each half, over 40 columns, and int4 groups likewise."""
    group = 16 if format in ("fp8_block", "int4") else 128
    for seed, options in enumerate(OPTIONS):
        traits = layer(3, hidden_size=40, intermediate_size=24, format=format, group_size=group, dtype="float32",
                       activation=activation, **options)
        tokens = 24 if options["expert_parallel"] else 4  # few of which have an expert here
        args, kwargs = cases.inputs(traits, tokens, seed=seed, flavour="invalid_ids" if seed % 2 else "random")
        expected = naive(traits, args, kwargs)
        got = kernel("torch", traits)(*args, **kwargs)
        assert expected.norm() > 0
        assert distance(got, expected) < 2e-6, (options, distance(got, expected))
        # and the judge's own evaluation, which every other implementation is held to
        assert distance(oracle.evaluate(traits, args, kwargs)[1], expected) < 1e-6, options


@pytest.mark.parametrize("dtype, far", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_16_bits(dtype, far):
    """The first result is rounded once and the sum once: no more than that is lost."""
    traits = layer(4, 3, 64, 48, dtype=dtype, has_bias=True)
    args, kwargs = cases.inputs(traits, 16)
    assert distance(kernel("torch", traits)(*args, **kwargs), naive(traits, args, kwargs)) < far


def test_the_naive_evaluation_tells_formats_apart():
    """Else the comparisons above would prove little: moving one thing moves the result."""
    traits = layer(3, 2, 40, 24, "fp8_block", group_size=16, dtype="float32")
    args, kwargs = cases.inputs(traits, 4)
    expected = naive(traits, args, kwargs)
    kwargs["w13_scale"] = kwargs["w13_scale"].roll(1, 1)
    assert distance(naive(traits, args, kwargs), expected) > 0.1
    assert distance(naive({**traits, "activation": "gelu"}, args, kwargs), expected) > 0.1


def test_padding_is_not_read():
    """Hidden states and weights of NaN, where the ids are -1, and experts of NaN that no token has."""
    for flavour in ("padded", "unused_experts"):
        for format in FORMATS:
            traits = layer(topk=1, format=format, has_bias=True)
            args, kwargs = cases.inputs(traits, 33, flavour=flavour)
            unserved = (args[4] < 0).all(1)
            got = kernel("torch", traits)(*args, **kwargs)
            assert unserved.any() and got.isfinite().all()
            assert (got[unserved] == 0).all() and (got[~unserved] != 0).any()
