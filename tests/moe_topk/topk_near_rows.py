"""Rows that are hard to tell apart: (logits, bias) in float32 whose choices are equal, or units in the last place from
it, at every place of a row where the router's packed way must notice.
"""

from __future__ import annotations

import numpy as np
import torch

SPREADS = {
    "level": (0.0,),
    "steps": (0.0, 0.0, 0.25, 0.5, 1.0),
    "wide": (0.0, 0.5, -0.25, -3.0, -7.5, -9.0, -15.5, -20.0, -100.0, -1e4),
    "broken": (0.0, 0.0, 0.5, -2.0, -40.0, float("-inf"), float("nan")),
}
INF = float("inf")
DEAD = -1e4  # a logit whose score is 0


def moved(values: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """Float32 values that many units in the last place further; about 0 the unit is that of 2^-20."""
    with np.errstate(invalid="ignore"):
        return (values + ulps * np.spacing(np.maximum(np.abs(values), np.float32(2.0**-20)))).astype(np.float32)


def subset(rng, experts: int, count: int) -> np.ndarray:
    """`count` experts: anywhere, a run of neighbours, or fours that lie a power of two apart (one lane's, often)."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.permutation(experts)[:count]
    start = int(rng.integers(experts))
    if kind == 1:
        return (start + np.arange(count)) % experts
    stride = int(rng.choice([4, 8, 16, 32, 64, 128]))
    inside = (start // 4 * 4 + np.arange(4)[None, :] + stride * np.arange(experts)[:, None]).ravel()
    found = np.unique(inside[inside < experts])
    return rng.permutation(found)[:count]


def ladder(rng, traits, tokens: int, base: float, spread: str, reach: int):
    """Scores of one to three levels and of 0, a bias of few levels and some units in the last place about `base`."""
    experts = traits["num_experts"]
    level = np.float32(base) + rng.choice(SPREADS[spread], experts).astype(np.float32)
    unit = np.spacing(np.float32(abs(base) + 0.5))
    bias = (level + rng.integers(-reach, reach + 1, experts) * unit).astype(np.float32)
    logits = np.full((tokens, experts), DEAD, np.float32)
    for row in range(tokens):
        levels = rng.choice([0.0, 0.5, -1.0, 1.5], rng.integers(1, 4))
        count = rng.integers(1, experts + 1) if row % 2 else rng.integers(1, 2 * traits["topk"] + 2)
        some = subset(rng, experts, int(count))
        logits[row, some] = rng.choice(levels, len(some))
        if row % 3 == 0:
            logits[row] = np.where(logits[row] == DEAD, np.float32(-20), logits[row])
    return logits, bias


def inverse(score: np.ndarray, scoring: str) -> np.ndarray:
    """The logit that has a score, float64."""
    with np.errstate(all="ignore"):
        return np.log(score / (1 - score)) if scoring == "sigmoid" else np.log(np.expm1(score * score))


def clusters(rng, traits, tokens: int, bias: np.ndarray | None, reach: int, levels=(0.2, 0.9)):
    """Choices in clusters about few levels, whose members are some units in the last place apart, whatever the bias:
    where a level is out of an expert's reach its logit is random."""
    experts, topk = traits["num_experts"], traits["topk"]
    offset = np.zeros(experts) if bias is None else bias.astype(np.float64)
    logits = rng.normal(-3, 1, (tokens, experts)).astype(np.float32)
    for row in range(tokens):
        level = np.float32(np.median(offset)) + rng.uniform(*levels, rng.integers(1, topk + 3)).astype(np.float32)
        some = subset(rng, experts, int(rng.integers(2, 2 * topk + 4)))
        wanted = moved(rng.choice(level, len(some)), rng.integers(-reach, reach + 1, len(some))).astype(np.float64)
        x = inverse(wanted - offset[some], traits["scoring"])
        logits[row, some] = np.where(np.isfinite(x), x, logits[row, some]).astype(np.float32)
    return logits


def logit_clusters(rng, traits, tokens: int, depths, reach: int):
    """For softmax: logits about few depths below the row's largest, some units in the last place apart."""
    experts, topk = traits["num_experts"], traits["topk"]
    logits = np.empty((tokens, experts), np.float32)
    for row in range(tokens):
        top = np.float32(rng.choice([0.0, 1.0, 8.0, -5.5, 100.0, -300.0, rng.normal()]))
        logits[row] = top - 8 - 30 * rng.random(experts)
        some = subset(rng, experts, int(rng.integers(1, 3 * topk + 2)))
        used = rng.choice(depths, rng.integers(1, min(len(depths), topk + 2) + 1)).astype(np.float32)
        logits[row, some] = moved(top - rng.choice(used, len(some)), rng.integers(-reach, reach + 1, len(some)))
        if row % 2:
            logits[row, some[0]] = top
        if row % 11 == 5:
            logits[row, rng.integers(experts, size=3)] = rng.choice([-INF, INF, float("nan")], p=[0.6, 0.2, 0.2])
    return logits


def above(rng, traits, tokens: int, reach: int):
    """For sqrtsoftplus: logits from 10 to 1e30 and infinity, in clusters, among ordinary ones."""
    experts, topk = traits["num_experts"], traits["topk"]
    logits = rng.normal(0, 2, (tokens, experts)).astype(np.float32)
    for row in range(tokens):
        some = subset(rng, experts, int(rng.integers(1, 2 * topk + 4)))
        values = np.array([10, 45, 49, 55, 60, 64, 80, 100, 1e4, 1e10, 1e30, 3e38, INF], np.float32)
        used = rng.choice(values, rng.integers(1, topk + 2))
        logits[row, some] = moved(rng.choice(used, len(some)), rng.integers(-reach, reach + 1, len(some)))
    return logits


def tensors(traits, logits, bias, device):
    """The two as tensors of the traits' dtypes."""
    found = [None if a is None else torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (logits, bias)]
    return [None if t is None else t.to(getattr(torch, traits[name])).to(device)
            for t, name in zip(found, ("dtype", "bias_dtype"))]
