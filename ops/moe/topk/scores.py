"""Scores of the Triton router, twice: `order` is fast and tells which expert goes before which, `weights` is accurate
and taken only of the chosen experts' logits.

Both depend on nothing but the logit (and for softmax on the row), so every way to choose sees the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fast_exp(x, PTX: tl.constexpr):
    """exp(x), for choices. With PTX, by the NVIDIA approximation without its range handling: below 2^-126 it is 0."""
    if PTX:
        return tl.inline_asm_elementwise("{ .reg .f32 t; mul.rn.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",
                                         "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp(x)


@triton.jit
def accurate_exp(x):
    """exp(x) to about 4e-7 relative, where exp2(x * log2(e)) alone loses |x| * 6e-8; beyond +-104 as at 104.

    x = n * ln(2) + r, exp(x) = 2^n * exp(r), and ln(2) in two parts of which the first times n is exact.
    """
    x = tl.minimum(tl.maximum(x, -104.0), 104.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def sqrtsoftplus(x, half_exp):
    """sqrt(log(1 + exp(x))), given half_exp = exp(-|x| / 2): no intermediate overflows, or loses a small score.

    log(1 + e) is e * P(e) with a polynomial P good to 1.4e-7 on [0, 1], a Chebyshev fit of degree 9.
    """
    e = half_exp * half_exp
    p = -0.00324403194 * e + 0.0198514929
    p = p * e - 0.0569595917
    p = p * e + 0.106036607
    p = p * e - 0.15305596
    p = p * e + 0.196759405
    p = p * e - 0.249541339
    p = p * e + 0.333299624
    p = p * e - 0.499999024
    p = p * e + 1.0
    return tl.where(x > 0, tl.sqrt(x + e * p), half_exp * tl.sqrt(p))


@triton.jit
def order(x, SCORING: tl.constexpr, PTX: tl.constexpr):
    """What the experts of a row are ordered by, from their logits: their scores, or, for softmax, the logits
    themselves, which have the same order without a sum over the row."""
    if SCORING == "sigmoid":
        if PTX:  # as below, but scores below 2^-126 come out as 0
            return tl.inline_asm_elementwise(
                "{ .reg .f32 t; mul.rn.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.rn.f32 t, t, 0f3F800000; "
                "rcp.approx.ftz.f32 $0, t; }", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return 1.0 / (1.0 + tl.exp(-x))
    elif SCORING == "sqrtsoftplus":
        return sqrtsoftplus(x, fast_exp(-0.5 * tl.abs(x), PTX))
    else:
        tl.static_assert(SCORING == "softmax")
        return x + 0.0  # -0.0 is no less than +0.0


@triton.jit
def weight(x, top, SCORING: tl.constexpr):
    """The scores of logits, for softmax times the row's sum of exp(logit - top); 0 instead of NaN."""
    if SCORING == "sigmoid":
        score = 1.0 / (1.0 + accurate_exp(-x))
    elif SCORING == "sqrtsoftplus":
        score = sqrtsoftplus(x, accurate_exp(-0.5 * tl.abs(x)))
    else:
        score = accurate_exp(x - top)
        x = x - top  # NaN too when the row's largest is an infinity
    return tl.where(x == x, score, 0.0)
