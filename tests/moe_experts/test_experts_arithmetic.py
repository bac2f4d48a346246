"""What the expert kernels compute with, element by element."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kernel_registry.ops.moe.experts.arithmetic import row_exponent  # noqa: E402


@triton.jit
def exponents(largest, result, N: tl.constexpr):
    tl.store(result + tl.arange(0, N), row_exponent(tl.load(largest + tl.arange(0, N))))


def test_rows_of_any_size_lie_within_float16(device):
    powers = torch.ldexp(torch.ones(256, device=device), torch.arange(-128, 128, device=device))
    for mantissa in (1.0, 1.5, 2.0 - 2.0**-23):
        largest = powers * mantissa  # up to the largest float32
        result = torch.empty_like(largest)
        exponents[(1,)](largest, result, N=256)
        assert (torch.frexp(result).mantissa == 0.5).all(), "a power of two"
        within = (largest / result).half()
        assert within.isfinite().all()
        assert (within[28:] >= 2.0**14).all(), "with all of float16's digits"
