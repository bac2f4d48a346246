"""Float64 numbers for the judge of moe.topk: scores, ranks, how far float32 may be off, what is equal everywhere."""

from __future__ import annotations

import numpy as np

EPS = 2.0**-24
TINY = 2.0**-126
FLOAT32_OVERFLOW = 2.0**128 - 2.0**103  # sums from here on round to infinity


class Wrong(Exception):
    """Carries the detail of a failed verdict."""


def scores64(logits: np.ndarray, scoring: str) -> np.ndarray:
    """Scores in float64 of logits [T, E]."""
    with np.errstate(all="ignore"):
        if scoring == "sigmoid":
            return 1.0 / (1.0 + np.exp(-logits))
        if scoring == "softmax":
            e = np.exp(logits - logits.max(axis=1, keepdims=True))
            return e / e.sum(axis=1, keepdims=True)
        if scoring == "sqrtsoftplus":
            return np.sqrt(np.logaddexp(0.0, logits))
    raise ValueError(f"scoring {scoring!r}")


def ranking(values: np.ndarray) -> np.ndarray:
    """[T, N] -> indices best first: descending, NaN last, lowest index on ties."""
    missing = np.isnan(values)
    return np.lexsort((np.where(missing, 0.0, -values), missing), axis=-1)


def gap(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """better - worse, for values in rank order: 0 between equals (two infinities, two NaN), inf above a NaN."""
    with np.errstate(invalid="ignore"):
        apart = np.where(better == worse, 0.0, better - worse)
    return np.where(np.isnan(better) & np.isnan(worse), 0.0, np.where(np.isnan(worse), np.inf, apart))


def errors(choice, score, logits, scoring) -> np.ndarray:
    """[T, E] how far float32 may be from each choice."""
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(choice)
        depth = np.abs(logits - logits.max(1, keepdims=True)) if scoring == "softmax" else np.abs(logits)
        relative = np.where(score == 0, 0.0, (4 + depth) * score)  # of a logit of -inf: 0, not inf * 0
        fine = EPS * (2 * size + relative) + (2.0**-63 if scoring == "sqrtsoftplus" else TINY)
        return np.where(np.isfinite(choice), np.minimum(2 * EPS * np.maximum(1.0, size), fine), 0.0)


def labels(logits, bias, choice, score) -> np.ndarray:
    """[T, E, 2]: experts of a row with equal labels have equal choices in every implementation."""
    logits, bias = np.broadcast_arrays(logits + 0.0, bias + 0.0)  # no -0.0
    with np.errstate(invalid="ignore"):
        absorbed = (np.abs(bias) * EPS / 4 > score) | np.isinf(choice)  # adding the score changes no bit
    first = np.where(np.isnan(choice), np.nan, np.where(absorbed, np.inf, logits))
    return np.stack([first, np.where(np.isnan(choice), 0.0, np.where(np.isinf(choice), choice, bias))], axis=-1)


def clear_cut(values, error, order, count) -> np.ndarray:
    """[T] whether the last of `count` and all that follow are further apart than their errors."""
    values, error = np.take_along_axis(values, order, 1), np.take_along_axis(error, order, 1)
    apart = gap(np.broadcast_to(values[:, count - 1:count], values[:, count:].shape), values[:, count:])
    return (apart > error[:, count - 1:count] + error[:, count:]).all(axis=1)


def group_scores(choice: np.ndarray, error: np.ndarray, has_bias: bool):
    """[T, G, P] -> group scores [T, G] as float32 would have them but for rounding, their errors, their members."""
    members = ranking(choice)[..., :2 if has_bias else 1]
    best = np.take_along_axis(choice, members, -1)
    error = np.take_along_axis(error, members, -1).sum(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        score = best.sum(-1)
    score = np.where(np.abs(score) >= FLOAT32_OVERFLOW, np.copysign(np.inf, score), score)
    return score, error, members
