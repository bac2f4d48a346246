"""Numbers for the judge of moe.experts: what the stored formats hold, in float64, and how far float32 may be off.

Values come as `Value`, a number and the root mean square (`spread`) of what a right float32 kernel may be away from it.
Spreads and not largest errors, because the second multiplication would make of those a bound that allows everything:
errors of different elements are independent, so they add up as squares. What is near a boundary between two quantised
numbers may jump; how likely that is follows from its spread. Where one jump outweighs all else of a row its spread says
too little: `jumps` tells each that there may be, for a second look at the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

U = 2.0**-24  # half a unit in the last place of float32, relative
# An fp8 instruction of Hopper's tensor cores adds FP8_DEPTH products and the sum so far, each cut towards 0 to 13 bits
# below the largest of them; the sum of FP8_COLUMNS is then left to float32. Rows simulated so came out as an H200's.
FP8_TENSOR_CORES = 2.0**-13
FP8_DEPTH, FP8_COLUMNS = 32, 128
# With that many tokens a bfloat16 layer's rows may wait for their sum over slots in 11 bits, three more than the result
# has: half a unit in the last of these, evenly spread. (contract.py says so)
HALVED_FROM = 512
FALSE_ALARM = 1e-6  # the probability that some element of a right layer is called wrong, at most
_SPREADS = 8
_REACH = 12  # spreads to a boundary that is jumped over: more than for sums of many errors, for the tail of fp8's own
# A normal error of spread 1 by a few points and their weights. The last is where one in a million lies; its weight is
# such that _SPREADS times the spread of a jump from there covers the jump.
_ERRORS = ((1.0, 0.4), (2.0, 0.1), (5.0, 2 / _SPREADS**2))


def spreads(elements: int) -> float:
    """How many spreads a right result may be off, so that of `elements` normal errors one is beyond with FALSE_ALARM at
    most. 8 are enough for 40 million; no fewer for fewer, since not every error is quite normal."""
    return max(_SPREADS, math.sqrt(2 * math.log(2 * max(1, elements) / FALSE_ALARM)))


class Value(NamedTuple):
    at: Tensor
    spread: Tensor
    common: Tensor | float = 0.0  # of an operand: its scale's relative spread, which moves a group's columns together


def exactly(at: Tensor) -> Value:
    return Value(at, torch.zeros_like(at))


def weights64(traits, stored: Tensor, scale: Tensor | None, columns: int, halves: int) -> Tensor:
    """[rows, columns] float64 weights of one expert. `halves`: the row blocks of scales start anew at the second."""
    if traits["weight_quant"] == "int4_w4a16":
        flat = stored.to(torch.int16)
        weight = torch.empty(stored.shape[0], columns, dtype=torch.float64, device=stored.device)
        weight[:, 0::2], weight[:, 1::2] = flat % 16 - 8, flat // 16 - 8
    else:
        weight = stored.to(torch.float32).double()
    if scale is None:
        return weight
    scale, group = scale.double(), traits["group_size"]
    if traits["weight_quant"] == "fp8_block":
        spread = [part.repeat_interleave(group, 0)[:len(weight) // halves] for part in scale.chunk(halves)]
        return weight * torch.cat(spread).repeat_interleave(group, 1)[:, :columns]
    if traits["weight_quant"] == "int4_w4a16":
        return weight * scale.repeat_interleave(group, 1)[:, :columns]
    return weight * scale.reshape(-1, 1)  # one for each row, or one


def operand(traits, x: Value, given: Tensor | None) -> Value:
    """What a multiplication takes: x quantised, or rounded to the hidden states' dtype."""
    ratio, scale, scale_spread, stored = _ratio(traits, x, given)
    here = stored(ratio.at)
    square = sum(weight / 2 * (stored(ratio.at + sign * far * ratio.spread) - here).square()
                 for far, weight in _ERRORS for sign in (-1, 1))
    return Value(here * scale, scale * (square + (here * scale_spread).square()).sqrt(), scale_spread)


def jumps(traits, x: Value, given: Tensor | None) -> Tensor:
    """[2, *x.shape] by how much `operand` may be another number, the next below and the next above; 0 where a right
    kernel has only one."""
    ratio, scale, _, stored = _ratio(traits, x, given)
    here = stored(ratio.at)
    found = []
    for sign in (-1, 1):
        other = here
        for far in range(_REACH, 0, -1):  # the nearest last
            there = stored(ratio.at + sign * far * ratio.spread)
            other = torch.where(there != here, there, other)
        found.append((other - here) * scale)
    return torch.stack(found)


def _ratio(traits, x: Value, given: Tensor | None):
    """(what is rounded, its scale, the scale's relative spread, the function that rounds) where x is an operand."""
    act = traits["act_quant"]
    if act == "none":
        dtype = getattr(torch, traits["dtype"])
        return x, 1.0, 0.0, lambda at: at.to(dtype).double()
    largest = 448.0 if act.startswith("fp8") else 127.0
    if act.endswith("tensor"):
        scale, scale_spread = given.double().reshape(1, 1), 0.0
    else:
        scale, scale_spread = _dynamic_scale(x, largest, _width(traits, x.at.shape[1]))

    def stored(ratio: Tensor) -> Tensor:
        ratio = ratio.clamp(-largest, largest)
        return ratio.round() if largest == 127.0 else ratio.float().to(torch.float8_e4m3fn).double()

    # The contract divides in float32, so for the hidden states, which are known exactly, there is one right number.
    ratio = (x.at.float() / scale.float()).double()
    spread = (x.spread / scale).square() + (ratio * (scale_spread + 2 * U)).square() * (x.spread > 0)
    return Value(ratio, spread.sqrt()), scale, scale_spread + U, stored


def _width(traits, columns: int) -> int:
    """How many columns of an operand have one scale."""
    return traits["group_size"] if traits["act_quant"] == "fp8_block" else columns


def _dynamic_scale(x: Value, largest: float, width: int) -> tuple[Tensor, Tensor]:
    """(scale, its relative spread) of each element of x, from the largest of `width` columns, in float32."""
    scales, spreads = [], []
    for part, spread in zip(x.at.split(width, dim=1), x.spread.split(width, dim=1)):
        amax = part.abs().amax(1, keepdim=True).float().clamp(min=1e-10)
        # not `amax / largest`: on a GPU torch would multiply by the reciprocal, which is no right division
        scales.append((amax / torch.full_like(amax, largest)).double().expand_as(part))
        spreads.append((spread.amax(1, keepdim=True) / amax.double()).expand_as(part))
    return torch.cat(scales, 1), torch.cat(spreads, 1)


def product(traits, x: Value, weight: Tensor, on_gpu: bool) -> Value:
    """x [N, columns] times weight [rows, columns], accumulated in float32.

    Rounding errors of a sum grow with the root of its length and with the root of the sum of squared terms. Tensor
    cores, which cut instead of rounding, have errors that grow with the length; fp8 has `_cut`.
    """
    columns, fp8 = weight.shape[1], traits["act_quant"].startswith("fp8")
    accumulation = U * math.sqrt(columns) / 2 + (U * columns / 128 if on_gpu and not fp8 else 0.0)
    squares = (accumulation * x.at).square() + x.spread.square()
    squares = (squares.float() @ weight.float().square().T).double()
    if on_gpu and fp8:
        squares += _cut(x.at, weight) + _moved_together(x, weight, _width(traits, columns))
    return Value(x.at @ weight.T, squares.sqrt())


def _cut(x: Tensor, weight: Tensor) -> Tensor:
    """The squared spread of fp8 tensor cores' sums: of each instruction, a third of the squares of the largest product
    and of the sum before it, 13 bits down. Of random columns 1.1 to 1.8 such spreads are the root mean square error,
    since most of the 32 products have few enough bits to lose none. Beside a sum before that is much larger than they
    are most lose some: all of them where it is 80 times their root mean square. One in 200,000 is 7 to 11 off: short
    sums have the longer tail. Without the sum before, which is large where the result is, that is 23.
    """
    columns = x.shape[1]
    # the squares of the largest, over all instructions, are at most this: mean square products say too little
    squares = (columns / FP8_DEPTH * (x**4 @ (weight**4).T)).sqrt()
    for start in range(0, columns, FP8_COLUMNS):
        total = 0.0
        parts = [t[:, start:start + FP8_COLUMNS].split(FP8_DEPTH, 1) for t in (x, weight)]
        for a, b, a_next, b_next in zip(*(t[:-1] for t in parts), *(t[1:] for t in parts)):
            total = total + a @ b.T
            products = (a_next.float().square() @ b_next.float().square().T / FP8_DEPTH).sqrt().clamp(min=1e-30)
            losing = 1 + (FP8_DEPTH - 1) * ((total.abs() / products - 16) / 64).clamp(0, 1)
            squares += total.square() * losing
    return FP8_TENSOR_CORES**2 / 3 * squares


def _moved_together(x: Value, weight: Tensor, width: int) -> Tensor:
    """The squared spread that the scales of x, one for `width` columns each, give its sums: unlike errors of its
    elements, which are independent, theirs add up as the terms themselves do."""
    moved = x.at * x.common
    return sum((a @ b.T).square() for a, b in zip(moved.split(width, 1), weight.split(width, 1)))


def row_rounding(y: Tensor) -> Tensor:
    """The spread of y's rounding to 11 bits."""
    mantissa = torch.frexp(y).mantissa
    return 2.0**-12 / math.sqrt(3) * (y / mantissa.masked_fill(mantissa == 0, 1.0))


def plus(x: Value, bias: Tensor) -> Value:
    at = x.at + bias.double()
    return Value(at, x.spread + U * at.abs())


def times(x: Value, weight: Tensor) -> Value:
    at = x.at * weight
    return Value(at, x.spread * weight.abs() + U * at.abs())


def activated(traits, h: Value) -> Value:
    """Gate and up rows [N, 2I] to [N, I]; the spread is what the function makes of the ends of its inputs'."""
    def split(t):
        return (t[:, 0::2], t[:, 1::2]) if traits["activation"] == "swigluoai" else t.chunk(2, dim=1)
    (gate, up), (gate_spread, up_spread) = split(h.at), split(h.spread)
    at = _activation(traits["activation"], gate, up)
    # exponentials in float32; in gelu 1 + erf cancels, which leaves an error of the gate's size
    own = 4 * U * at.abs() + U * (gate * up).abs()

    def moved(gate_by, up_by):
        return torch.stack([_activation(traits["activation"], gate + sign * gate_by, up + sign * up_by) - at
                            for sign in (-1, 1)]).abs().amax(0)
    return Value(at, own + torch.hypot(moved(gate_spread, 0.0), moved(0.0, up_spread)))


def _activation(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        return 0.5 * gate * torch.erfc(-gate / math.sqrt(2)) * up
    gate, up = torch.minimum(gate, torch.full_like(gate, 7.0)), up.clamp(-7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
