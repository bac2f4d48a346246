"""One row of moe.topk that is too close to call, examined at length for the judge: which results float32 allows."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np

from .oracle_numbers import group_scores, ranking

_MOST_SETS = 2000  # sets of groups tried for one row, and as many of those that hold every chosen expert before them


class Row:
    """One row that the margins alone don't decide, examined at length."""

    def __init__(self, choice, error, labels, groups, kept, has_bias, count):
        self.error, self.count, self.determined = error, count, True
        self.labels = [tuple("nan" if np.isnan(part) else part for part in label) for label in labels.tolist()]
        self.choice, self.size = choice, len(choice) // groups
        self.sure, self.alike, self.wanted = list(range(groups)), [], 0  # groups kept for sure, the others by likeness
        if kept == groups:
            return
        size = self.size
        shape = (1, groups, size)
        score, group_error, members = (found[0] for found in group_scores(choice.reshape(shape), error.reshape(shape),
                                                                           has_bias))
        order = ranking(score[None])[0]
        identity = [("nan",) if np.isnan(score[g]) else (score[g],) if np.isinf(score[g])
                    else tuple(sorted(self.labels[g * size + m] for m in members[g])) for g in range(groups)]
        near = _near_boundary(score, group_error, order, kept)
        self.sure = [g for g in order[:kept] if g not in near]
        self.wanted = kept - len(self.sure)
        self.determined = len({identity[g] for g in near}) == 1 or self.wanted == len(near)
        alike: dict[tuple, list[int]] = {}
        for g in near:
            alike.setdefault(identity[g], []).append(g)
        self.alike = list(alike.values())

    def judge(self, ids) -> str:
        """Why `ids` are not an allowed result, or "" when they are: allowed by some set of groups that may be kept."""
        home = {e // self.size for e in ids}
        needed = [max((place + 1 for place, g in enumerate(like) if g in home), default=0) for like in self.alike]
        anyhow = [0] * len(self.alike)  # once the kept groups have no number left, a dropped expert's -inf is next
        likely, others = (islice(_prefixes(self.alike, self.wanted, least), _MOST_SETS) for least in (needed, anyhow))
        for some in chain(likely, others):
            reason = self._against(*self._masked([*self.sure, *some]), ids)
            if not reason:
                return ""
        return reason

    def _masked(self, kept) -> tuple[np.ndarray, list]:
        """Choices and labels with all but the groups in `kept` masked."""
        masked, names = np.full_like(self.choice, -np.inf), [(np.inf, -np.inf)] * len(self.choice)
        for g in kept:
            members = slice(g * self.size, (g + 1) * self.size)
            masked[members], names[members] = self.choice[members], self.labels[members]
        return masked, names

    def _against(self, choice, names, ids) -> str:
        order = ranking(choice[None])[0]
        boundary = choice[order[self.count - 1]]
        near = _near_boundary(choice, self.error, order, self.count)
        if len({names[e] for e in near}) > 1 and any(e in near for e in order[self.count:]):
            self.determined = False
        chosen = set(ids)
        for e in range(len(choice)):
            if e in near:
                if e not in chosen and any(names[e] == names[o] and o > e for o in chosen):
                    return f"left out expert {e} for an equal one with a higher id"
            elif e in chosen and _below(choice[e], boundary):
                return f"chose expert {e} with choice {choice[e]}, the last should be {boundary}"
            elif e not in chosen and _below(boundary, choice[e]):
                return f"left out expert {e} with choice {choice[e]}, the last should be {boundary}"
        for a, b in zip(ids, ids[1:]):
            if names[a] == names[b] and a > b:
                return f"equal experts {a}, {b} are not in the order of their ids"
            if _below(choice[a], choice[b]) and not _near(choice[a], choice[b], self.error[a] + self.error[b]):
                return f"expert {a} with choice {choice[a]} stands before {b} with {choice[b]}"
        return ""


def _prefixes(lists, count, least):
    """Every way to take `count` entries in all from the fronts of some lists, at least `least[i]` of list i: of equal
    groups the lowest ids are kept."""
    if not lists:
        if count == 0:
            yield []
        return
    most = min(len(lists[0]), count - sum(least[1:]))  # what the others need, and can give, leaves no dead ends
    for taken in range(most, max(least[0], count - sum(map(len, lists[1:]))) - 1, -1):
        for rest in _prefixes(lists[1:], count - taken, least[1:]):
            yield lists[0][:taken] + rest


def _near_boundary(values, error, order, count) -> list[int]:
    """Entries that float32 could have on either side of the cut after `count`, with the last one inside."""
    last = order[count - 1]
    return sorted(int(e) for e in order if e == last or _near(values[e], values[last], error[e] + error[last]))


def _below(a, b) -> bool:
    """Whether a ranks strictly below b; NaN is below every number."""
    return bool((np.isnan(a) and not np.isnan(b)) or a < b)


def _near(a, b, tolerance) -> bool:
    if np.isnan(a) or np.isnan(b):
        return bool(np.isnan(a) and np.isnan(b))
    return bool(a == b or abs(a - b) <= tolerance)  # inf - finite is inf, never near
