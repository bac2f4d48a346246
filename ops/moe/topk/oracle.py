"""The judge of moe.topk: float64, numpy, sharing no code with any implementation.

A float32 kernel and a float64 result must choose the same experts only where float32 can tell them apart. A choice c
is given an error of 2 * 2^-24 * max(1, |c|), or of 2^-24 * (2|c| + (4 + |x|) * score) where that is less (small scores
keep their digits), a group score the sum of its members' errors; two values are near when they differ by at most the
sum of their errors: 4 * 2^-24 for choices about 1, twice that for group scores.

decided     nothing chosen is near anything left out, of groups and of experts, unless the two are equal in every
            implementation (the same logit and bias, a bias too large to feel the score, both NaN, the same infinity),
            where the lowest id goes first: the chosen set must be exactly the float64 one.
undecided   any choice of groups that differs by groups near the boundary is allowed, and inside it every chosen expert
            must be near or above the K-th best, every other near or below. Counted and reported: a caller asserts that
            they are few, or the check would mean little.

In every row: ids distinct and in range, descending but for near ones, equal experts in the order of their ids, weights
within 2e-6 relative of the float64 weights of the kernel's own ids, shared slots, map and padding exact.

Where float32 itself can't represent a score (a sigmoid below 2^-126, a softplus below that under the root) that much
absolute error is allowed. For softmax, whose float32 meaning includes rounding x - max, |x - max| * 2^-24 is added to
the relative tolerance.

With score_dtype="logits" the meaning is a sequence of eager torch ops: that sequence is repeated here on the same
device, with the ranking done by numpy, and every bit must agree.
"""

from __future__ import annotations

import numpy as np
import torch

from kernel_registry.contract import Verdict

from .oracle_eager import check_bits
from .oracle_numbers import EPS, TINY, Wrong, clear_cut, errors, gap, group_scores, labels, ranking, scores64
from .oracle_rows import Row

WEIGHT_RTOL = 2e-6


def _unmap(ids, table, choice_order, count):
    """Logical ids behind physical ones [T, count]; where several have one physical id, the best-ranked unused one."""
    experts = choice_order.shape[1]
    inverse: dict[int, list[int]] = {}
    for logical, physical in enumerate(table[:experts].tolist()):
        inverse.setdefault(physical, []).append(logical)
    if len(inverse) == experts:
        flat = np.full(int(max(inverse)) + 1 if inverse else 0, -1) if min(inverse) >= 0 else None
        if flat is not None:
            for physical, logical in inverse.items():
                flat[physical] = logical[0]
            known = (ids >= 0) & (ids < len(flat))
            return np.where(known, flat[np.where(known, ids, 0)], -1)
    logical = np.full_like(ids, -1)
    for row in range(len(ids)):
        place = np.argsort(choice_order[row])
        used: set[int] = set()
        for slot in range(count):
            free = [e for e in inverse.get(int(ids[row, slot]), []) if e not in used]
            if free:
                logical[row, slot] = min(free, key=lambda e: place[e])
                used.add(int(logical[row, slot]))
    return logical


def check(traits, args, kwargs, outputs) -> Verdict:
    """Judges the outputs of one call of moe.topk with these traits, args and kwargs."""
    rows = args[0].shape[0]
    try:
        if traits.get("score_dtype", "float32") == "logits":
            check_form(traits, args, outputs)
            rows = check_bits(traits, args, kwargs, outputs)
            return Verdict(True, rows, 0, f"{rows} rows, bit for bit")
        return _check(traits, args, kwargs, outputs)
    except Wrong as wrong:
        return Verdict(False, rows, 0, str(wrong))


def check_form(traits, args, outputs):
    tokens, topk = args[0].shape[0], traits["topk"]
    weights, ids = outputs
    for name, got, dtype in (("topk_weights", weights, torch.float32), ("topk_ids", ids, torch.int32)):
        if tuple(got.shape) != (tokens, topk) or got.dtype != dtype or got.device != args[0].device:
            raise Wrong(f"{name} is {list(got.shape)} {got.dtype} on {got.device}, "
                         f"expected [{tokens}, {topk}] {dtype} on {args[0].device}")
    return weights.cpu().numpy().astype(np.float64), ids.cpu().numpy().astype(np.int64)


def _check(traits, args, kwargs, outputs) -> Verdict:
    weights, ids = check_form(traits, args, outputs)
    experts, topk = traits["num_experts"], traits["topk"]
    shared = traits.get("num_fused_shared_experts", 0)
    groups, kept = traits.get("num_expert_group", 1), traits.get("topk_group", 1)
    scoring, has_bias = traits.get("scoring", "sigmoid"), traits.get("has_bias", True)
    count = topk - shared
    tokens = len(ids)
    padded = kwargs.get("num_token_non_padded")
    live = tokens if padded is None else min(tokens, max(0, int(padded.reshape(-1)[0])))
    if not (np.all(ids[live:] == -1) and np.all(weights[live:] == 0)):
        raise Wrong("a padded row has ids other than -1 or weights other than 0")
    weights, ids = weights[:live], ids[:live]
    if live == 0:
        return Verdict(True, 0, 0, "no live rows")

    logits = args[0][:live].to(torch.float64).cpu().numpy()
    bias = args[1].to(torch.float64).cpu().numpy() if has_bias else np.zeros(experts)
    score = scores64(logits, scoring)
    with np.errstate(invalid="ignore"):
        choice = score + bias
    error = errors(choice, score, logits, scoring)

    # the float64 result, and whether its margins decide the row
    masked, decided = choice, np.ones(live, bool)
    if kept < groups:
        shape = (live, groups, experts // groups)
        group_score, group_error, _ = group_scores(choice.reshape(shape), error.reshape(shape), has_bias)
        order = ranking(group_score)
        decided &= clear_cut(group_score, group_error, order, kept)
        keep = np.zeros((live, groups), bool)
        np.put_along_axis(keep, order[:, :kept], True, 1)
        masked = np.where(np.repeat(keep, experts // groups, axis=1), choice, -np.inf)
    order = ranking(masked)
    if count < experts:
        decided &= clear_cut(masked, error, order, count)

    label = labels(logits, bias, choice, score)
    routed = ids[:, :count]
    table = kwargs.get("expert_map")
    table = None if table is None else table.cpu().numpy().astype(np.int64)
    if table is not None:
        routed = _unmap(routed, table, order, count)
    expected_shared = np.arange(experts, experts + shared)
    if table is not None and len(table) > experts:
        expected_shared = table[expected_shared]
    if not np.all(ids[:, count:] == expected_shared):
        raise Wrong(f"shared slots hold {ids[0, count:]}, expected {expected_shared}")

    repeated = (np.diff(np.sort(routed, axis=1), axis=1) == 0).any(axis=1)
    bad = ~np.all((routed >= 0) & (routed < experts), axis=1) | repeated
    if bad.any():
        row = int(np.argmax(bad))
        raise Wrong(f"row {row}: ids {ids[row, :count]} are not distinct ids of known experts")

    wrong = decided & (np.sort(routed, 1) != np.sort(order[:, :count], 1)).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise Wrong(f"row {row}: chose {np.sort(routed[row])}, float64 chooses {np.sort(order[row, :count])}")
    mine, slack = np.take_along_axis(masked, routed, 1), np.take_along_axis(error, routed, 1)
    disorder = decided & (gap(mine[:, :-1], mine[:, 1:]) < -(slack[:, :-1] + slack[:, 1:])).any(axis=1)
    names = np.take_along_axis(label, routed[:, :, None], 1)
    same = ((names[:, :-1] == names[:, 1:]) | (np.isnan(names[:, :-1]) & np.isnan(names[:, 1:]))).all(-1)
    disorder |= decided & (same & (np.diff(routed, axis=1) < 0)).any(axis=1)
    if disorder.any():
        row = int(np.argmax(disorder))
        raise Wrong(f"row {row}: ids {routed[row]} are not in descending order of choice: {mine[row]}")

    undecided = 0
    for row in np.flatnonzero(~decided):
        examined = Row(choice[row], error[row], label[row], groups, kept, has_bias, count)
        reason = examined.judge(routed[row].tolist())
        if reason:
            raise Wrong(f"row {row}: {reason}")
        undecided += not examined.determined
    _check_weights(traits, kwargs, weights, score, logits, routed, count)
    return Verdict(True, live, undecided, f"{live} rows, {undecided} undecided")


def _check_weights(traits, kwargs, weights, score, logits, routed, count):
    scale = float(kwargs.get("routed_scaling_factor", 1.0))
    own = np.take_along_axis(score, routed, 1)
    own = np.where(np.isnan(own), 0.0, own)
    absolute = 2.0**-63 if traits.get("scoring") == "sqrtsoftplus" else TINY
    total = own.sum(1, keepdims=True) + 1e-20 if traits.get("renormalize", True) else np.ones((len(own), 1))
    with np.errstate(invalid="ignore"):
        expected = own / total
        expected = np.where(np.isnan(expected), 0.0, expected) * scale  # inf / inf, of sqrtsoftplus
    rtol = np.full_like(expected, WEIGHT_RTOL)
    if traits.get("scoring", "sigmoid") == "softmax":
        with np.errstate(invalid="ignore"):
            depth = np.abs(np.take_along_axis(logits, routed, 1) - logits.max(1, keepdims=True))
        rtol += np.where(np.isfinite(depth), depth, 0.0) * EPS
    with np.errstate(invalid="ignore"):
        off = ~(np.abs(weights[:, :count] - expected) <= rtol * np.abs(expected) + absolute * abs(scale) / total + TINY)
    off &= weights[:, :count] != expected  # inf is inf
    if off.any():
        row, slot = map(int, np.argwhere(off)[0])
        raise Wrong(f"row {row}, slot {slot}: weight {weights[row, slot]!r}, expected {expected[row, slot]!r} "
                     f"for expert {routed[row, slot]}")
    expected_shared = float(np.float32(kwargs.get("shared_expert_weight", 1.0)))
    if not np.all(weights[:, count:] == expected_shared):
        raise Wrong(f"shared slots have weights {weights[0, count:]}, expected {expected_shared}")
