"""The selection, told: what `decide` saw for one request, as data, as text and as JSON.

Nothing here chooses. The winner comes from the same `table` and `decide` that dispatch uses; this module only asks each
candidate for all of its failures instead of the first.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Container, Mapping, Sequence

from . import aliasing
from .catalog import Implementation, Op
from .contract import Request
from .errors import RegistryError
from .overrides import Layer, Rule
from .selection import REFUSALS, Considered, decide, denier, one_name, table
from .tiles import Tuned


@dataclass(frozen=True)
class Candidate:
    """One implementation's part in the story: `failures` are all the reasons, `denied` the rule that disables it,
    `options` what its target is given beside the traits, `lasting` those failures that no open trait can mend,
    `variant_of` the implementation whose variant it is, `output` what it does with an `out` that the call brings,
    `prepare` the function that makes the arguments that it takes prepared."""

    name: str
    where: str
    failures: tuple[str, ...]
    denied: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    lasting: tuple[str, ...] = ()
    variant_of: str = ""
    output: str = ""
    prepare: str = ""

    @property
    def serves(self) -> bool:
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that keeps it from serving."""
        return (*self.failures, self.denied) if self.denied else self.failures


@dataclass(frozen=True)
class Case:
    """The story for one range of the open traits (or for all of them: no conditions). What a candidate is told to fail
    by an open trait is its condition, or that it serves some values only, never a value picked from the range."""

    conditions: tuple[str, ...]
    winner: str | None
    decided_by: str
    candidates: tuple[Candidate, ...]
    rules: tuple[Considered, ...]
    error: str = ""
    tiles: str = ""  # where the winner's tiles come from, if it takes any
    starts: Mapping[str, object] = field(default_factory=dict)  # the least value of each trait that has a condition

    @property
    def near_misses(self) -> tuple[Candidate, ...]:
        """Candidates that would have gone first, or served at all, but for one predicate."""
        names = [c.name for c in self.candidates]
        before = self.candidates[:names.index(self.winner)] if self.winner in names else self.candidates
        return tuple(c for c in before if len(c.reasons) == 1)


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
        return None if None in names else one_name(names)

    @property
    def in_no_range(self) -> dict[str, tuple[str, ...]]:
        """Where there are several cases, the candidates that can serve in none of them, whatever the open traits are,
        each with the reasons."""
        if len(self.cases) < 2:
            return {}
        found = {}
        for first, *others in zip(*(case.candidates for case in self.cases)):
            denied = (first.denied,) if first.denied and all(c.denied == first.denied for c in others) else ()
            if first.lasting or denied:
                found[first.name] = (*first.lasting, *denied)
        return found

    def json(self) -> str:
        """Canonical JSON of everything in the text, and of the options."""
        cases = [{
            "conditions": list(case.conditions), "winner": case.winner, "decided_by": case.decided_by,
            "error": case.error, "tiles": case.tiles,
            "candidates": [{"name": c.name, "where": c.where, "serves": c.serves, "failures": list(c.failures),
                            "denied": c.denied, "options": c.options, "variant_of": c.variant_of, "output": c.output,
                            "prepare": c.prepare}
                           for c in case.candidates],
            "near_misses": [c.name for c in case.near_misses],
            "overrides": [{"rule": str(rule), "where": rule.where, "layer": rule.layer, "outcome": outcome}
                          for rule, outcome in case.rules]} for case in self.cases]
        traits = {k: v if isinstance(v, (int, bool)) else str(v) for k, v in self.traits.items()}
        story = {"op": self.op, "traits": traits, "winner": self.winner, "cases": cases,
                 "in_no_range": self.in_no_range}
        return json.dumps(story, indent=2, sort_keys=True)

    def text(self) -> str:
        never = self.in_no_range
        everyone = self.cases[0].candidates if self.cases else ()
        labels, folded = _fold([c for c in everyone if c.name in never])
        near = {c.name for case in self.cases for c in case.near_misses}
        rows = [("x~"[name in near], labels[name], _told(reasons, name in near))
                for name, reasons in never.items() if name not in folded]
        parts = [(["  in no range:"] * bool(never), rows), *(_case_rows(case, never) for case in self.cases)]
        width = max((len(label) for _, rows in parts for _, label, _ in rows), default=0)
        return "\n".join([self.request, *(line for head, rows in parts for line in (
            *head, *(f"   {mark} {label:<{width}}  {told}" for mark, label, told in rows)))])

    __str__ = text


def explain(op: Op, request: Request, layers: Sequence[Layer], tuned: Tuned) -> Explanation:
    """The story of one request; one case per range of the open traits on which the outcome differs."""
    pieces = table(op, request, layers, told=True).pieces(op, request)
    cases = tuple(_case(op, request, conditions, traits, layers, tuned) for conditions, traits in pieces)
    shown = {name: value for name, value in request.traits.items() if name not in request.open}
    return Explanation(op.name, str(request), shown, cases)


def _case(op: Op, request: Request, conditions: Mapping[str, str], traits: dict[str, object],
          layers: Sequence[Layer], tuned: Tuned) -> Case:
    rules: list[Considered] = []
    winner, decided_by, error, tiles = None, "", "", ""
    try:
        decision = decide(op, traits, layers, rules)
        winner = decision.implementation.name
        tiles = str(tuned.tiling(op, decision.implementation, traits)) if decision.implementation.tiles else ""
        decided_by = str(decision.rule) if decision.rule else f"the registry's order, {decision.implementation.where}"
    except REFUSALS as failure:
        error = failure.message
    denied: dict[str, Rule] = {}
    for rule, outcome in rules:
        if rule.action == "disable":
            denied.setdefault(rule.implementation, rule)
    candidates = tuple(_candidate(i, request.open, conditions, traits, denier(denied, i)) for i in op.implementations)
    return Case(tuple(conditions.values()), winner, decided_by, candidates, tuple(rules), error, tiles,
                {name: traits[name] for name in conditions})


def _candidate(implementation: Implementation, left_open: Sequence[str], conditions: Mapping[str, str],
               traits: dict[str, object], denial: Rule | None) -> Candidate:
    def told(failure) -> str:
        name = failure.what
        if name not in left_open:
            return str(failure)
        return f"{conditions[name]}, serves {failure.expected}" if name in conditions else \
            f"serves {name} {failure.expected} only"

    try:
        found = list(implementation.box.failures(traits))
        failures = tuple(map(told, found))
        lasting = tuple(str(failure) for failure in found if failure.what not in left_open)
    except RegistryError as error:  # a Python check that can't be asked, of one that the decision did not need to ask
        failures = lasting = (error.message,)
    denied = denial.told_of(implementation) if denial else ""
    output = ""
    if traits.get(aliasing.TRAIT, False):
        output = aliasing.WRITES if implementation.accepts_output_alias else aliasing.COPIES
    return Candidate(implementation.name, implementation.where, failures, denied, implementation.options, lasting,
                     implementation.variant_of, output, implementation.prepare)


def _told(reasons: Sequence[str], near: bool) -> str:
    return f"one predicate away: {reasons[0]}" if near else "; ".join(reasons)


def _fold(refused: Sequence[Candidate]) -> tuple[dict[str, str], set[str]]:
    """(name -> label, names left out): what refuses an implementation refuses its variants, so they share its line."""
    names = {c.name for c in refused}
    folded = {c.name: c.variant_of for c in refused if c.variant_of in names}
    count = Counter(folded.values())
    more = {name: f" and its {n} variants" if n > 1 else " and its variant" for name, n in count.items()}
    return {name: name + more.get(name, "") for name in names}, {*folded}


def _case_rows(case: Case, told: Container[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """(the lines at the head of a case, a row of mark, label and reason for each candidate that has not been told)."""
    head = [f"  when {', '.join(case.conditions)}:"] if case.conditions else []
    head.append(f"  -> {case.winner}  [{case.decided_by}]" if case.winner else f"  -> nothing: {case.error}")
    head += [f"     tiles: {case.tiles}"] if case.tiles else []
    head += [f"     override  {rule}: {outcome}" for rule, outcome in case.rules]
    near = {c.name for c in case.near_misses}
    labels, folded = _fold([c for c in case.candidates if c.name not in told and not c.serves])
    rows = []
    for c in case.candidates:
        if c.name == case.winner:
            prepared = c.prepare and f", takes what registry.prepare makes with {c.prepare}"
            rows.append(("*", c.name, "chosen" + (c.output and f", {c.output}") + prepared))
        elif c.serves:
            rows.append((" ", c.name, f"could serve, but {_why_not(case, c)}" + (c.output and f"; {c.output}")))
        elif c.name in labels and c.name not in folded:
            rows.append(("x~"[c.name in near], labels[c.name], _told(c.reasons, c.name in near)))
    return head, rows


def _why_not(case: Case, candidate: Candidate) -> str:
    """Why one that could serve is not what serves."""
    if any(rule.action != "disable" and (outcome == "decides" or rule.action == "use") and not rule.means(candidate)
           for rule, outcome in case.rules):
        return "another was asked for"  # and serves, or can't: a strict choice lets nothing else in
    return "goes later" if case.winner else "the loaded plan, which is strict, does not hold this call"
