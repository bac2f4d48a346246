"""Numbers for the judge of moe.experts: what the stored formats hold, in float64, and how far float32 may be off.

Values come as `Value`, a number and the root mean square (`spread`) of what a right float32 kernel may be away from it.
Spreads and not largest errors, because the second multiplication would make of those a bound that allows everything:
errors of different elements are independent, so they add up as squares. What is near a boundary between two quantised
numbers may jump; how likely that is follows from its spread.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

U = 2.0**-24  # half a unit in the last place of float32, relative
# An fp8 instruction of Hopper's tensor cores adds 32 products and what was there, each cut to some 13 bits below the
# largest: 33 cuts of up to 2**-13 of it, which come to about 2**-13 of the root of the sum of squares. Measured on an
# H200: of 20 layers in three formats all are inside with this, 18 with half, 14 with a quarter.
FP8_TENSOR_CORES = 2.0**-13
# With that many tokens a bfloat16 layer's rows may wait for their sum over slots in 11 bits, three more than the result
# has: half a unit in the last of these, evenly spread. (contract.py says so)
HALVED_FROM = 512
ROW_ROUNDING = 2.0**-12 / math.sqrt(3)
# A normal error of spread 1 by a few points and their weights. The last is where one in a million lies; its weight is
# such that SPREADS times the spread of a jump from there covers the jump.
SPREADS = 8
_ERRORS = ((1.0, 0.4), (2.0, 0.1), (5.0, 2 / SPREADS**2))


class Value(NamedTuple):
    at: Tensor
    spread: Tensor


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
    act = traits["act_quant"]
    if act == "none":
        dtype = getattr(torch, traits["dtype"])
        return Value(x.at.to(dtype).double(), _jumps(x, lambda at: at.to(dtype).double()))
    largest = 448.0 if act.startswith("fp8") else 127.0
    if act.endswith("tensor"):
        scale, scale_spread = given.double().reshape(1, 1), 0.0
    else:
        scale, scale_spread = _dynamic_scale(x, largest, traits["group_size"] if act == "fp8_block" else x.at.shape[1])

    def stored(ratio: Tensor) -> Tensor:
        ratio = ratio.clamp(-largest, largest)
        return ratio.round() if largest == 127.0 else ratio.float().to(torch.float8_e4m3fn).double()

    # The contract divides in float32, so for the hidden states, which are known exactly, there is one right number.
    ratio = (x.at.float() / scale.float()).double()
    spread = (x.spread / scale).square() + (ratio * (scale_spread + 2 * U)).square() * (x.spread > 0)
    number, jumps = stored(ratio), _jumps(Value(ratio, spread.sqrt()), stored)
    return Value(number * scale, scale * (jumps.square() + (number * (scale_spread + U)).square()).sqrt())


def _dynamic_scale(x: Value, largest: float, width: int) -> tuple[Tensor, Tensor]:
    """(scale, its relative spread) of each element of x, from the largest of `width` columns, in float32."""
    scales, spreads = [], []
    for part, spread in zip(x.at.split(width, dim=1), x.spread.split(width, dim=1)):
        amax = part.abs().amax(1, keepdim=True).float().clamp(min=1e-10)
        # not `amax / largest`: on a GPU torch would multiply by the reciprocal, which is no right division
        scales.append((amax / torch.full_like(amax, largest)).double().expand_as(part))
        spreads.append((spread.amax(1, keepdim=True) / amax.double()).expand_as(part))
    return torch.cat(scales, 1), torch.cat(spreads, 1)


def _jumps(x: Value, rounded) -> Tensor:
    """The spread of rounded(x), for x with its own."""
    here = rounded(x.at)
    return sum(weight / 2 * (rounded(x.at + sign * far * x.spread) - here).square()
               for far, weight in _ERRORS for sign in (-1, 1)).sqrt()


def product(traits, x: Value, weight: Tensor, on_gpu: bool) -> Value:
    """x [N, columns] times weight [rows, columns], accumulated in float32.

    Rounding errors of a sum grow with the root of its length and with the root of the sum of squared terms. Tensor
    cores, which cut instead of rounding, have errors that grow with the length.
    """
    columns = weight.shape[1]
    accumulation = U * math.sqrt(columns) / 2
    if on_gpu:
        accumulation += FP8_TENSOR_CORES if traits["act_quant"].startswith("fp8") else U * columns / 128
    squares = (accumulation * x.at).square() + x.spread.square()
    return Value(x.at @ weight.T, (squares.float() @ weight.float().square().T).sqrt().double())


def plus(x: Value, bias: Tensor) -> Value:
    at = x.at + bias.double()
    return Value(at, x.spread + U * at.abs())


def times(x: Value, weight: Tensor) -> Value:
    at = x.at * weight
    return Value(at, x.spread * weight.abs() + U * at.abs())


def activated(traits, h: Value) -> Value:
    """Gate and up rows [N, 2I] to [N, I]; the spread is what the function makes of the corners of its input's."""
    def split(t):
        return (t[:, 0::2], t[:, 1::2]) if traits["activation"] == "swigluoai" else t.chunk(2, dim=1)
    (gate, up), (gate_spread, up_spread) = split(h.at), split(h.spread)
    at = _activation(traits["activation"], gate, up)
    # exponentials in float32; in gelu 1 + erf cancels, which leaves an error of the gate's size
    own = 4 * U * at.abs() + U * (gate * up).abs()
    corners = [_activation(traits["activation"], gate + a * gate_spread, up + b * up_spread)
               for a in (-1, 1) for b in (-1, 1)]
    return Value(at, own + torch.stack([(corner - at).abs() for corner in corners]).amax(0))


def _activation(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        return 0.5 * gate * torch.erfc(-gate / math.sqrt(2)) * up
    gate, up = torch.minimum(gate, torch.full_like(gate, 7.0)), up.clamp(-7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
