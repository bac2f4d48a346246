"""How many kernels a call of moe.experts launches, and how many a whole layer: as tests/launches.py has it, and beside
them no operation of torch, whatever the format and wherever the result goes.

Nothing is computed here. test_layer_on_gpu.py asks a GPU's profiler for the same numbers.
"""

from __future__ import annotations

import pytest
import torch
from experts_support import FORMATS, kernel, layer

from kernel_registry import moe_layer, registry
from kernel_registry.layer import LayerTraits
from kernel_registry.ops.moe.experts import cases
from tests import launches

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="calls are counted in the interpreter")

TOKENS = (1, 2, 33, 511, 512, 2730, 2731)  # with three slots up to 8193 routes


@pytest.mark.parametrize("format", FORMATS)
def test_experts(format, monkeypatch):
    for alias in (False, True):
        traits = layer(6, 3, 96, 64, format, output_alias=alias, has_bias=True, expert_parallel=True)
        for tokens in TOKENS:
            args, kwargs = cases.inputs(traits, tokens)
            call = registry.dispatch("moe.experts", **traits, num_tokens=tokens)
            with launches.counted(monkeypatch) as found:
                call(*args, **kwargs)
            assert len(found) == launches.of_experts(traits, tokens), f"{tokens} tokens: {found}"


def test_large_experts_in_fp8_blocks_are_grouped_for_one_token_too(monkeypatch):
    traits = layer(2, 2, 64, 2176, "fp8_block")
    args, kwargs = cases.inputs(traits, 1)
    with launches.counted(monkeypatch) as found:
        registry.dispatch("moe.experts", **traits, num_tokens=1)(*args, **kwargs)
    assert len(found) == launches.of_experts(traits, 1) == launches.GROUPED, found


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_layer(format, shared, monkeypatch):
    sizes = layer(6, 3, 96, 64, format)
    for tokens in TOKENS:
        (hidden, w13, w2, *_), tensors = cases.inputs(sizes, tokens)
        made = moe_layer(LayerTraits("small", dict(num_experts=6, topk=3), sizes, 2.5), w13, w2,
                         correction_bias=torch.zeros(6), **tensors)
        logits, brought = torch.zeros(tokens, 6), dict(shared_output=hidden.clone()) if shared else {}
        for more in ({}, {"out": torch.empty_like(hidden)}):
            with launches.counted(monkeypatch) as found:
                made(hidden, logits, **brought, **more)
            expected = launches.TOPK + launches.of_experts(sizes, tokens) + launches.FINALIZE * shared
            assert len(found) == expected, f"{tokens} tokens: {found}"


def test_a_copy_is_counted(monkeypatch):
    """The count itself: the reference launches no Triton kernel, and many operations of torch."""
    traits = layer()
    args, kwargs = cases.inputs(traits, 5)
    with launches.counted(monkeypatch) as found:
        kernel("torch", traits)(*args, **kwargs)
        torch.empty(3)[1:].view(2, 1)
        torch.zeros(3).copy_(torch.empty(3))
    assert "aten.bincount.default" in found and found[-2:] == ["aten.zeros.default", "aten.copy_.default"]
