"""Exact casts between float32 and the dtypes of 16 bits, in Triton's interpreter too: that one cuts bits off instead of
rounding to the nearest bfloat16, and takes long, and it has no NaN in fp8. Compiled, these are Triton's own casts."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x):
    """float32 of float32, bfloat16, float16 or float8_e4m3fn."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED and x.dtype == tl.float8e4nv:
        y = x.to(tl.float32)
        return tl.where(tl.abs(y) < 464.0, y, float("nan"))  # which it takes for 480
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 as float32, bfloat16 or float16, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, near, (bits >> 16) | 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
