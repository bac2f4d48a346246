"""The judge of moe.experts: float64, sharing no code with any implementation or with formats.py.

Each call is computed twice in float64: with the inputs of both multiplications as they are (exact), and with them
quantised or rounded where the contract says (rounded). Beside the second runs a bound of how far a float32 kernel can
be from it: its accumulation, its activation function, and quantised numbers that lie so near a boundary between two
that float32 may take the other (oracle_numbers.py). Two demands:

every element   lies between the two numbers that the bounds' ends are cast to. Where float32 leaves no doubt, which is
                nearly everywhere in 16 bits, that is one number: a wrong row, scale, expert, bias or weight, a cast too
                many or a sum in less than float32 shows. A row that is outside gets a second look, if few are: it is
                right if some numbers, of those that float32 may have on the other side of a boundary, bring it inside.
the whole call  has, against the exact result, at most 1.15 times the root mean square error of float32 arithmetic: that
                of the rounded result after its one cast, and float32's own noise, which shows in 32 bits only. Asked
                where the mean is made up of 300 elements or more, since that of few says little.

undecided       rows whose bounds are wider than a tenth of the row's own size, or not finite: of these the first demand
                says little. Counted and reported; a caller asserts that they are few.

A token without an expert here must be 0, `out` must be what is returned, and no result shares memory with an input.
Runs on the device of the outputs, expert by expert, in memory of a few experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_registry import contract

from .oracle_numbers import (HALVED_FROM, U, Value, activated, exactly, jumps, operand, plus, product, row_rounding,
                             spreads, times, weights64)

RMS_RATIO = 1.15
_ELEMENTS = 300
_DOUBTFUL = 0.1
_ROWS = 4096  # of one expert at a time
_LOOKED_AT = 16  # one row in so many, and four more, may get the second look; fp8 needs it for one in some 250
_NEUTRAL = dict(dtype="bfloat16", weight_quant="none", act_quant="none", group_size=128, activation="silu",
                has_bias=False, apply_router_weight_on_input=False, expert_parallel=False, output_alias=False)


@dataclass(frozen=True)
class Verdict(contract.Verdict):
    """`undecided` tokens have bounds too wide to say much. `error` is the relative root mean square error against exact
    arithmetic, `least` that of float32 arithmetic with one cast."""

    error: float = 0.0
    least: float = 0.0


class Wrong(Exception):
    """Carries the detail of a failed verdict."""


def check(traits, args, kwargs, outputs) -> Verdict:
    """Judges the output of one call of moe.experts with these traits, args and kwargs."""
    traits, rows = {**_NEUTRAL, **traits}, args[0].shape[0]
    try:
        _check_form(traits, args, kwargs, outputs)
        if not outputs.numel():
            return Verdict(True, rows, 0, "no rows")
        exact, rounded, bound = evaluate(traits, args, kwargs)
        undecided = _check_elements(traits, args, kwargs, outputs, rounded, bound)
        return _check_error(outputs, exact, rounded, bound / spreads(outputs.numel()), undecided)
    except Wrong as wrong:
        return Verdict(False, rows, 0, str(wrong))


def evaluate(traits, args, kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H] float64, before the cast: the exact result, the rounded one, and the bound of float32's distance from
    that."""
    traits = {**_NEUTRAL, **traits}
    hidden, topk_weights = args[0], args[3]
    shape = hidden.shape
    exact, rounded, squares = (torch.zeros(shape, dtype=torch.float64, device=hidden.device) for _ in range(3))
    row = _rows_of_weights(traits, args[4], kwargs.get("expert_map"))
    halved = traits["dtype"] == "bfloat16" and traits["topk"] > 1 and shape[0] >= HALVED_FROM

    multiply = _multiply(traits, kwargs, hidden.device)

    for expert in row[row >= 0].unique().tolist():
        layers, biases = _weights(traits, args, kwargs, expert)
        for token, slot in zip(*(part.split(_ROWS) for part in torch.nonzero(row == expert, as_tuple=True))):
            x, weight = exactly(hidden[token].double()), topk_weights[token, slot].double()[:, None]
            y = _expert(traits, x, layers, biases, weight, lambda x, matrix, scale: exactly(x.at @ matrix.T))
            exact.index_add_(0, token, y.at)
            y = _expert(traits, x, layers, biases, weight, multiply)
            rounded.index_add_(0, token, y.at)
            # a sum of K numbers in float32 rounds K times
            own = (U * traits["topk"] * y.at).square() + (row_rounding(y.at).square() if halved else 0.0)
            squares.index_add_(0, token, y.spread.square() + own)
    return exact, rounded, spreads(rounded.numel()) * squares.sqrt()


def _weights(traits, args, kwargs, expert: int):
    """(both layers' matrices in float64, their biases or None) of one expert."""
    hidden, w13, w2, *_ = args

    def pick(name):
        return kwargs[name][expert] if kwargs.get(name) is not None else None

    halves = 1 if traits["activation"] == "swigluoai" else 2
    return ((weights64(traits, w13[expert], pick("w13_scale"), hidden.shape[1], halves),
             weights64(traits, w2[expert], pick("w2_scale"), traits["intermediate_size"], 1)),
            (pick("w13_bias"), pick("w2_bias")))


def _multiply(traits, kwargs, device):
    """What becomes of the inputs of a multiplication, for `_expert`: they are rounded, and summed in float32."""
    return lambda x, matrix, scale: product(traits, operand(traits, x, kwargs.get(scale)), matrix, device.type != "cpu")


def _expert(traits, x: Value, layers, biases, weight: Tensor, multiply) -> Value:
    """One expert's weighted rows. `multiply(x, matrix, name of the given scale)` says what becomes of its inputs."""
    on_input = traits["apply_router_weight_on_input"]

    def layer(x: Value, index: int, scale: str, weighted: bool) -> Value:
        y = multiply(x, layers[index], scale)
        y = y if biases[index] is None else plus(y, biases[index])
        return times(y, weight) if weighted else y

    a = activated(traits, layer(x, 0, "a13_scale", on_input))
    return layer(a, 1, "a2_scale", not on_input)


def _rows_of_weights(traits, topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """[T, K] int64: the row of w13 that serves each slot, -1 for none."""
    ids = topk_ids.to(torch.int64)
    if expert_map is not None:
        padded = torch.cat([expert_map.to(torch.int64), ids.new_tensor([-1])])
        outside = (ids < 0) | (ids >= len(expert_map))
        ids = padded[ids.masked_fill(outside, len(expert_map))]
    return ids.masked_fill((ids < 0) | (ids >= traits["num_experts"]), -1)


def _check_form(traits, args, kwargs, outputs) -> None:
    hidden = args[0]
    if not isinstance(outputs, Tensor):
        raise Wrong(f"the output is a {type(outputs).__name__}, expected a tensor")
    if outputs.shape != hidden.shape or outputs.dtype != hidden.dtype or outputs.device != hidden.device:
        raise Wrong(f"the output is {list(outputs.shape)} {outputs.dtype} on {outputs.device}, "
                    f"expected {list(hidden.shape)} {hidden.dtype} on {hidden.device}")
    out = kwargs.get("out")
    if out is not None:
        if outputs.data_ptr() != out.data_ptr() or outputs.stride() != out.stride():
            raise Wrong("the output is not the `out` that was given")
        return
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor) and outputs.numel() and \
                tensor.untyped_storage().data_ptr() == outputs.untyped_storage().data_ptr():
            raise Wrong("the output shares memory with an input")


def _outside(outputs: Tensor, rounded: Tensor, bound: Tensor) -> Tensor:
    """Which elements are not between the numbers that the ends of their bounds are cast to. Those without bounds are
    not: an input of an expert that is here was not finite."""
    low, high = (rounded - bound).to(outputs.dtype), (rounded + bound).to(outputs.dtype)
    return ((outputs < low) | (outputs > high) | torch.isnan(outputs)) & (low <= high)


def _explained(traits, args, kwargs, token: int, output: Tensor, rounded: Tensor, bound: Tensor) -> bool:
    """Whether a row is inside its bounds once some of the numbers that float32 may have on the other side of a boundary
    are there. Each makes a known row of differences: the one that leaves least off goes first."""
    steps = _jumps(traits, args, kwargs, token)
    scale = torch.where(bound > 0, 1 / bound, 0.0)
    rows, moved = steps * scale, rounded.clone()
    size = rows.square().sum(1)
    for _ in range(len(steps)):
        gain = 2 * rows @ ((output.double() - moved) * scale) - size
        best = int(gain.argmax())
        if not bool(gain[best] > 0):
            break
        moved += steps[best]
        size[best] = float("inf")  # once each
        if not bool(_outside(output, moved, bound).any()):
            return True
    return False


def _jumps(traits, args, kwargs, token: int) -> Tensor:
    """[n, H]: what each number that the second multiplication may have otherwise makes of a token's row."""
    hidden, _, w2, topk_weights, topk_ids = args
    steps = [hidden.new_zeros((0, hidden.shape[1]), dtype=torch.float64)]
    multiply = _multiply(traits, kwargs, hidden.device)
    row = _rows_of_weights(traits, topk_ids[token:token + 1], kwargs.get("expert_map"))[0]
    for slot in torch.nonzero(row >= 0).flatten().tolist():
        weight = topk_weights[token, slot].double().reshape(1, 1)

        def remembered(x, matrix, scale):
            if scale == "a2_scale":
                by = jumps(traits, x, kwargs.get(scale))[:, 0]
                which, column = by.nonzero(as_tuple=True)
                step = by[which, column, None] * matrix.T[column]
                steps.append(step if traits["apply_router_weight_on_input"] else step * weight)
            return multiply(x, matrix, scale)

        layers, biases = _weights(traits, args, kwargs, int(row[slot]))
        _expert(traits, exactly(hidden[token:token + 1].double()), layers, biases, weight, remembered)
    return torch.cat(steps)


def _check_elements(traits, args, kwargs, outputs: Tensor, rounded: Tensor, bound: Tensor) -> int:
    """The number of undecided rows. Raises Wrong at the first element that is outside its bounds, unexplained."""
    wrong = _outside(outputs, rounded, bound)
    rows = wrong.any(1).nonzero().flatten().tolist()
    if len(rows) <= 4 + len(wrong) // _LOOKED_AT:
        for token in rows:
            if _explained(traits, args, kwargs, token, outputs[token], rounded[token], bound[token]):
                wrong[token] = False
    if bool(wrong.any()):
        token, column = wrong.nonzero()[0].tolist()
        ids = args[4][token].tolist()
        raise Wrong(f"{int(wrong.any(1).sum())} of {len(wrong)} rows are wrong; the first is row {token}, ids {ids}: "
                    f"column {column} is {outputs[token, column].item()!r}, expected "
                    f"{rounded[token, column].item():.9g} within {bound[token, column].item():.2g} before the cast; "
                    f"{int(wrong[token].sum())} of its {wrong.shape[1]} columns are wrong")
    size = rounded.square().mean(1).sqrt()
    unknown = ~(rounded - bound <= rounded + bound)
    return int(((bound.square().mean(1).sqrt() > _DOUBTFUL * size) | unknown.any(1)).sum())


def _check_error(outputs: Tensor, exact: Tensor, rounded: Tensor, spread: Tensor, undecided: int) -> Verdict:
    """The verdict by the second demand."""
    rows = len(outputs)
    finite = torch.isfinite(exact) & torch.isfinite(rounded.to(outputs.dtype).double()) & torch.isfinite(outputs)
    exact = exact[finite]
    size = exact.square().mean().sqrt() if exact.numel() else exact.new_zeros(())
    if not bool(size > 0):
        return Verdict(True, rows, undecided, f"{rows} rows, all 0")
    mine = (outputs[finite].double() - exact).square()
    best = (rounded[finite].to(outputs.dtype).double() - exact).square()
    error = (mine.mean().sqrt() / size).item()
    least = ((best + spread[finite].square()).mean().sqrt() / size).item()
    effective = (best.sum().square() / best.square().sum().clamp(min=1e-300)).item()
    detail = f"{rows} rows, relative error {error:.3g}, of float32 arithmetic with one cast {least:.3g}"
    if error > RMS_RATIO * least and effective >= _ELEMENTS:
        return Verdict(False, rows, undecided, f"{detail}: more than {RMS_RATIO} times", error=error,
                       least=least)
    return Verdict(True, rows, undecided, detail, error=error, least=least)
