"""A hidden state that is not finite makes of its own row what the reference does, and of no other anything else."""

from __future__ import annotations

import pytest
import torch
from experts_support import layer

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, reference, triton_few_tokens, triton_grouped

SIZES = (6, 2, 160, 96)
SWIGLU = dict(activation="swigluoai")
LAYERS = {
    "none": layer(*SIZES), "none_swiglu": layer(*SIZES, **SWIGLU), "float16": layer(*SIZES, dtype="float16", **SWIGLU),
    "fp8_block": layer(*SIZES, "fp8_block", group_size=32),
    "fp8_block_swiglu": layer(*SIZES, "fp8_block", group_size=64, **SWIGLU),
    "fp8_channel": layer(*SIZES, "fp8_channel"), "fp8_static": layer(*SIZES, "fp8_tensor_static"),
    "int8": layer(*SIZES, "int8"), "int8_swiglu": layer(*SIZES, "int8", **SWIGLU)}
KERNELS = [("few", name) for name in LAYERS if name.startswith(("none", "float16", "fp8_block"))]
KERNELS += [("few_dot", name) for name in LAYERS if name.startswith("fp8_block")]
KERNELS += [("grouped", name) for name in LAYERS]
NAN, INF = float("nan"), float("inf")


def results(kernel, traits, tokens, poison, device):
    """What the kernel makes of clean hidden states and of poisoned ones, and the reference of the latter. `poison`:
    (row, column, value)."""
    module = triton_grouped if kernel == "grouped" else triton_few_tokens
    options = dict(matrix_unit=True) if kernel == "few_dot" else {}
    args, kwargs = cases.inputs(traits, tokens, seed=5, device=device)
    poisoned = args[0].clone()
    for row, column, value in poison:
        poisoned[row, column] = value
    experts = module.experts(**traits, **options, platform=registry.platform())
    return (experts(*args, **kwargs), experts(poisoned, *args[1:], **kwargs),
            reference.experts(**traits)(poisoned, *args[1:], **kwargs))


@pytest.mark.parametrize("kernel, name", KERNELS)
def test_nan(kernel, name, device):
    poison = [(1, 0, NAN), (3, 159, NAN), *((4, column, NAN) for column in range(160))]
    clean, got, expected = results(kernel, LAYERS[name], 6, poison, device)
    for row in range(6):
        if row in (1, 3, 4):
            assert got[row].isnan().all() and expected[row].isnan().all()
        else:
            assert torch.equal(got[row], clean[row])


@pytest.mark.parametrize("kernel, name", KERNELS)
def test_infinite(kernel, name, device):
    clean, got, expected = results(kernel, LAYERS[name], 4, [(0, 3, INF), (2, 40, -INF)], device)
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.equal(got[1::2], clean[1::2])
    finite = expected.isfinite()  # where a limit, or a given scale's, makes it so
    torch.testing.assert_close(got[finite], expected[finite], rtol=0.02, atol=0.02)
