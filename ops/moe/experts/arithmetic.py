"""What the expert kernels compute with: quantised values, one step of a product for each weight format, activations.

Everything is float32 once it has left a matrix unit; nothing here rounds but the quantisers, whose arithmetic is that
of formats.py: IEEE divisions, to nearest even. A NaN stays one: fp8 stores it; int8 has none, and its scale is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..casts import INTERPRETED

SWIGLU_ALPHA = tl.constexpr(1.702)  # gpt-oss
SWIGLU_LIMIT = tl.constexpr(7.0)
FP8_MOST = tl.constexpr(448.0)
INT8_MOST = tl.constexpr(127.0)
LEAST_MOST = tl.constexpr(1e-10)  # a row of zeros has a scale too
KEPT = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def to_fp8(x):
    """float32 within +-448 as float8_e4m3fn, to nearest even. Triton's interpreter cuts bits off: there it is rounded
    before, and NaN made by hand."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # below 2**-6 the format has steps of 2**-9
        near = tl.where(tl.abs(x) < 0.015625, small, rounded).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(x == x, near, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """1 / (1 + exp(-x)) to a few units in the last place. The plain form takes NVIDIA's compiler three times as many
    instructions, for denormal numbers that make no difference here."""
    if PTX:
        return tl.inline_asm_elementwise("""{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """The activation of one element, float32."""
    if ACTIVATION == "silu":
        return gate * sigmoid(gate, PTX) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, SWIGLU_LIMIT, KEPT)
        up = tl.minimum(tl.maximum(up, -SWIGLU_LIMIT, KEPT), SWIGLU_LIMIT, KEPT)
        return (up + 1.0) * (gate * sigmoid(gate * SWIGLU_ALPHA, PTX))


@triton.jit
def largest_of(x, KIND: tl.constexpr):
    """The largest absolute value of x [N], float32. Of int8's NaN if there is one: as an integer it is largest."""
    if KIND == "int8":
        return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    else:
        return tl.max(tl.abs(x), axis=0)


@triton.jit
def scale_of(largest, KIND: tl.constexpr):
    """The dynamic scale of a group whose largest absolute value is given."""
    if KIND == "int8":
        return tl.div_rn(tl.maximum(largest, LEAST_MOST, KEPT), INT8_MOST)
    else:
        return tl.div_rn(tl.maximum(largest, LEAST_MOST), FP8_MOST)


@triton.jit
def divided(x, y):
    """x / y to nearest even, for finite y far from the ends of float32: tl.div_rn without its branch for the rest."""
    reciprocal = 1.0 / y
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, y, x), reciprocal, quotient)


@triton.jit
def quantised(x, scale, KIND: tl.constexpr):
    """x / scale in the storage type of KIND, "fp8" or "int8"; x float32, scale broadcast against it."""
    # brought into range before the division, which an infinity would make NaN; what is near the most is rounded to it
    most = scale * (INT8_MOST if KIND == "int8" else FP8_MOST)
    y = divided(tl.minimum(tl.maximum(x, -most, KEPT), most, KEPT), scale)
    if KIND == "int8":
        # adding and taking away 1.5 * 2**23 rounds to nearest even, as the float32 sum has no bits left for a fraction
        return ((y + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        return to_fp8(y)


@triton.jit
def row_exponent(largest):
    """A power of two, float32, by which a row with this largest absolute value is divided to lie within float16, with
    all of float16's digits for what is near the largest."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, 2.0 ** -100), 2.0 ** 127) * 2.0 ** -14
