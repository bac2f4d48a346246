"""The selection, told: what `decide` saw for one request, as data, as text and as JSON.

Nothing here chooses. The winner comes from the same `table` and `decide` that dispatch uses; this module only asks each
candidate for all of its failures instead of the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Mapping, Sequence

from .catalog import Implementation, Op
from .contract import Request
from .errors import RegistryError
from .overrides import Layer
from .selection import REFUSALS, Considered, decide, table


@dataclass(frozen=True)
class Candidate:
    """One implementation's part in the story: `failures` are all the reasons, `denied` the rule that disables it,
    `options` what its target is given beside the traits."""

    name: str
    where: str
    failures: tuple[str, ...]
    denied: str = ""
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return not self.failures and not self.denied


@dataclass(frozen=True)
class Case:
    """The story for one range of the open traits (or for all of them: no conditions)."""

    conditions: tuple[str, ...]
    winner: str | None
    decided_by: str
    candidates: tuple[Candidate, ...]
    rules: tuple[Considered, ...]
    error: str = ""

    @property
    def near_misses(self) -> tuple[Candidate, ...]:
        """Candidates that would have gone first, or served at all, but for one predicate."""
        names = [c.name for c in self.candidates]
        before = self.candidates[:names.index(self.winner)] if self.winner in names else self.candidates
        return tuple(c for c in before if len(c.failures) + bool(c.denied) == 1)


@dataclass(frozen=True)
class Explanation:
    """Why this implementation, and why not the others. `str()` is the text."""

    op: str
    request: str
    traits: dict[str, object]
    cases: tuple[Case, ...]

    @property
    def winner(self) -> str | None:
        """What `dispatch(...).name` is for the same traits; None where that dispatch raises."""
        names = [case.winner for case in self.cases]
        return None if None in names else "|".join(dict.fromkeys(names))

    def json(self) -> str:
        """Canonical JSON of everything in the text, and of the options."""
        cases = [{
            "conditions": list(case.conditions), "winner": case.winner, "decided_by": case.decided_by,
            "error": case.error,
            "candidates": [{"name": c.name, "where": c.where, "serves": c.serves, "failures": list(c.failures),
                            "denied": c.denied, "options": c.options} for c in case.candidates],
            "near_misses": [c.name for c in case.near_misses],
            "overrides": [{"rule": str(rule), "where": rule.where, "layer": rule.layer, "outcome": outcome}
                          for rule, outcome in case.rules]} for case in self.cases]
        traits = {k: v if isinstance(v, (int, bool)) else str(v) for k, v in self.traits.items()}
        story = {"op": self.op, "traits": traits, "winner": self.winner, "cases": cases}
        return json.dumps(story, indent=2, sort_keys=True)

    def text(self) -> str:
        lines = [self.request]
        for case in self.cases:
            lines += _case_lines(case)
        return "\n".join(lines)

    __str__ = text


def explain(op: Op, request: Request, layers: Sequence[Layer]) -> Explanation:
    """The story of one request; one case per range of the open traits on which the outcome differs."""
    pieces = table(op, request, layers, told=True).pieces(op, request)
    cases = tuple(_case(op, conditions, traits, layers) for conditions, traits in pieces)
    shown = {name: value for name, value in request.traits.items() if name not in request.open}
    return Explanation(op.name, str(request), shown, cases)


def _case(op: Op, conditions: tuple[str, ...], traits: dict[str, object], layers: Sequence[Layer]) -> Case:
    rules: list[Considered] = []
    winner, decided_by, error = None, "", ""
    try:
        decision = decide(op, traits, layers, rules)
        winner = decision.implementation.name
        decided_by = str(decision.rule) if decision.rule else f"the registry's order, {decision.implementation.where}"
    except REFUSALS as failure:
        error = failure.message
    denied: dict[str, str] = {}
    for rule, outcome in rules:
        if rule.action == "disable":
            denied.setdefault(rule.implementation, str(rule))
    candidates = tuple(_candidate(i, traits, denied.get(i.name, "")) for i in op.implementations)
    return Case(conditions, winner, decided_by, candidates, tuple(rules), error)


def _candidate(implementation: Implementation, traits: dict[str, object], denied: str) -> Candidate:
    try:
        failures = tuple(str(failure) for failure in implementation.box.failures(traits))
    except RegistryError as error:  # a Python check that can't be asked, of one that the decision did not need to ask
        failures = (error.message,)
    return Candidate(implementation.name, implementation.where, failures, denied, implementation.options)


def _case_lines(case: Case) -> list[str]:
    head = f"  when {', '.join(case.conditions)}:" if case.conditions else ""
    lines = [head] if head else []
    lines.append(f"  -> {case.winner}  [{case.decided_by}]" if case.winner else f"  -> nothing: {case.error}")
    for rule, outcome in case.rules:
        lines.append(f"     override  {rule}: {outcome}")
    near = {c.name for c in case.near_misses}
    width = max((len(c.name) for c in case.candidates), default=0)
    for candidate in case.candidates:
        reasons = [*candidate.failures, *([candidate.denied] if candidate.denied else [])]
        if candidate.name == case.winner:
            mark, story = "*", "chosen"
        elif not reasons:
            mark, story = " ", "could serve, but " + _why_not(case)
        elif candidate.name in near:
            mark, story = "~", "one predicate away: " + reasons[0]
        else:
            mark, story = "x", "; ".join(reasons)
        lines.append(f"   {mark} {candidate.name:<{width}}  {story}")
    return lines


def _why_not(case: Case) -> str:
    """Why one that could serve is not what serves."""
    if any(rule.action != "disable" and (outcome == "decides" or rule.action == "use") for rule, outcome in case.rules):
        return "another was asked for"  # and serves, or can't: a strict choice lets nothing else in
    return "goes later" if case.winner else "the loaded plan, which is strict, does not hold this call"
