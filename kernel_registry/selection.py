"""The selection: one call's traits in, one implementation out. Dispatch, explain, plan and lint all ask here.

Override layers are asked strongest first, then the implementations in their order; the first that admits the traits
wins. When dynamic traits are left open, `table` cuts their domain where any candidate or rule could change its mind
and decides once per piece, so that nothing is left to decide at call time but in which piece the call falls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, replace
from typing import Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from .catalog import Implementation, Op
from .contract import Request
from .errors import NoImplementationError, OverrideError, PlanError
from .overrides import Layer, Rule
from .predicates import Ints

REFUSALS = (NoImplementationError, OverrideError, PlanError)  # what `decide` raises when a call gets no kernel


@dataclass(frozen=True)
class Decision:
    """The winner and the rule that decided it; `rule` is None where the registry's own order did."""

    implementation: Implementation
    rule: Rule | None = None


class Considered(NamedTuple):
    """One override rule that matched the call, and what came of it: "decides", "in force" or why it does not apply."""

    rule: Rule
    outcome: str


def decide(op: Op, traits: Mapping[str, object], layers: Sequence[Layer],
           trace: list[Considered] | None = None) -> Decision:
    """The one decision. Appends every matching rule it asks to `trace`, when given.

    Raises OverrideError when a strict choice can't serve the call, PlanError when a strict plan does not hold it,
    NoImplementationError when nothing serves it.
    """
    denied: dict[str, Rule] = {}
    note = trace.append if trace is not None else (lambda considered: None)
    for position, layer in enumerate(layers):
        for rule in layer.rules.get(op.name, ()):
            if not rule.box.admits(traits):
                continue
            if rule.action == "disable":
                denied.setdefault(rule.implementation, rule)
                note(Considered(rule, "in force"))
                continue
            chosen = op.implementation(rule.implementation, rule.where)  # a context may outlive what it names
            reasons = [str(f) for f in chosen.box.failures(traits)]
            denial = denier(denied, chosen)
            if denial:
                reasons.append(f"disabled by a layer at least as strong ({denial})")
            if not reasons:
                note(Considered(rule, "decides"))
                if rule.family:  # its variants lie inside it: they serve nothing where it does not, but may go first
                    out = {**denied, **_variants_out(op, rule, traits, layers[position:], note)}
                    chosen = next(i for i in op.implementations if rule.means(i) and not denier(out, i)
                                  and i.box.admits(traits))
                return Decision(chosen, rule)
            note(Considered(rule, "can't serve: " + "; ".join(reasons)))
            if rule.action == "use":
                hint = "narrow its `when`, or say `prefer` to let the registry fall back" if rule.where else \
                    "call without implementation=, or name one that serves these traits (explain tells which)"
                raise OverrideError(f"`{rule}` was asked for, but can't serve {op.name}: {'; '.join(reasons)}",
                                    where=rule.where, hint=hint)
        if layer.closed:
            raise PlanError(f"the loaded plan does not hold this call of {op.name}", where=layer.name,
                            hint="freeze again with this call, or load the plan with strict=False")
    for implementation in op.implementations:
        if not (denied and denier(denied, implementation)) and implementation.box.admits(traits):
            return Decision(implementation)
    raise NoImplementationError(f"nothing serves {op.name} for these traits", hint=_why_nothing(op, traits, denied))


def _variants_out(op: Op, rule: Rule, traits: Mapping[str, object], layers: Sequence[Layer],
                  note: Callable[[Considered], None]) -> dict[str, Rule]:
    """The disabling rules, by the name they say, that weaker layers have for variants of the implementation that `rule`
    names: it does not choose among them, so those that are out stay out."""
    out: dict[str, Rule] = {}
    for other in (other for layer in layers for other in layer.rules.get(op.name, ())):
        if other.action == "disable" and other.implementation in op.by_name and other.box.admits(traits) \
                and op.by_name[other.implementation].variant_of == rule.implementation:
            out.setdefault(other.implementation, other)
            note(Considered(other, "in force"))
    return out


def one_name(names: Iterable[str]) -> str:
    """Several implementations' names as one: "router|.pairs|torch" for router, router.pairs and torch."""
    shown, family = [], None
    for name in dict.fromkeys(names):
        whole, _, variant = name.rpartition(".")
        shown.append(f".{variant}" if whole == family else name)
        family = family if whole == family else name
    return "|".join(shown)


def denier(denied: Mapping[str, Rule], implementation: Implementation) -> Rule | None:
    """Which of the disabling rules `denied`, by the name they say, disables it: its own or its implementation's."""
    return denied.get(implementation.name) or denied.get(implementation.variant_of)


def _why_nothing(op: Op, traits: Mapping[str, object], denied: Mapping[str, Rule]) -> str:
    lines = []
    for implementation in op.implementations[:12]:
        reasons = [str(f) for f in implementation.box.failures(traits)]
        denial = denier(denied, implementation)
        if denial:
            reasons.append(denial.told_of(implementation))
        lines.append(f"{implementation.name}: {'; '.join(reasons)}")
    left = len(op.implementations) - len(lines)
    return "every candidate refused:\n    " + "\n    ".join(lines or ["none is registered"]) \
        + (f"\n    and {left} more" if left > 0 else "")


@dataclass(frozen=True)
class Table:
    """A tree over the open traits: at each level the piece is found by bisection in `bounds` (ints) or by value.

    `trait` is None at a leaf, which holds a decision, or in a table made to be told, why there is none. Levels on which
    nothing depends do not appear.
    """

    trait: str | None
    bounds: tuple = ()
    branches: tuple["Table", ...] = ()
    decision: Decision | None = None
    refusal: str = ""

    def winners(self) -> tuple[str, ...]:
        """Names of the implementations that can run, in table order, each once."""
        if self.trait is None:
            return (self.decision.implementation.name,)
        return tuple(dict.fromkeys(name for branch in self.branches for name in branch.winners()))

    def pieces(self, op: Op, request: Request) -> Iterator[tuple[dict[str, str], dict[str, object]]]:
        """Every leaf as its conditions, by trait, and a full set of traits inside it: of each range its least value."""
        inside = {**request.traits, **{name: _samples(op, name, ())[0] for name in request.open}}
        yield from self._pieces({}, inside, op)

    def _pieces(self, labels, inside, op):
        if self.trait is None:
            yield labels, inside
            return
        flags = isinstance(self.bounds[0], bool)
        values = self.bounds if flags else (op.space.traits[self.trait].minimum or 0, *self.bounds)
        for label, value, branch in zip(self.labels(), values, self.branches):
            conditions = {**labels, self.trait: f"{self.trait} {label}"}
            yield from branch._pieces(conditions, {**inside, self.trait: value}, op)

    def labels(self) -> list[str]:
        if self.bounds and isinstance(self.bounds[0], bool):
            return [str(value).lower() for value in self.bounds]
        starts = [None, *self.bounds]
        ends = [*self.bounds, None]
        return [f">= {a}" if b is None else f"< {b}" if a is None else f"{a}..{b - 1}" for a, b in zip(starts, ends)]


def table(op: Op, request: Request, layers: Sequence[Layer], *, told: bool = False) -> Table:
    """Decisions for every value of the request's open traits; a single leaf when nothing depends on them.

    Raises what `decide` raises for any of them; with `told`, for explain, such a piece is a leaf with a refusal."""
    if not request.open:
        return _branch(op, request.traits, (), layers, told)
    traits = {**request.traits, **{name: _samples(op, name, ())[0] for name in request.open}}
    # What fails for another reason than an open trait fails on every piece: ask it once, not once a piece.
    candidates = tuple(i for i in op.implementations if i.box.admits(traits, request.open))
    if not any(layer.rules.get(op.name) for layer in layers):  # a rule may deny the certain one, or name a later one
        candidates = _up_to_certain(candidates, request.open)
    if not candidates and not told:
        decide(op, traits, layers)  # raises, with every reason
    return _branch(replace(op, implementations=candidates), traits, request.open, layers, told)


def _up_to_certain(candidates: tuple[Implementation, ...], open_names: tuple[str, ...]) -> tuple[Implementation, ...]:
    """Without those that come after one which no open trait can keep from serving."""
    for index, implementation in enumerate(candidates):
        if not any(name in implementation.box.sets for name in open_names):
            return candidates[:index + 1]
    return candidates


def _branch(op: Op, traits: dict[str, object], left: tuple[str, ...], layers: Sequence[Layer], told: bool) -> Table:
    if not left:
        try:
            return Table(None, decision=decide(op, traits, layers))
        except REFUSALS as error:
            if not told:
                raise
            return Table(None, refusal=error.message)
    name, rest = left[0], left[1:]
    samples = _samples(op, name, layers)
    branches = []
    for sample, candidates in zip(samples, _admitting(op, name, samples)):
        traits[name] = sample
        # Where none is left, all of them have the word: the error tells what each wanted.
        among = replace(op, implementations=candidates) if candidates else op
        branches.append(_branch(among, traits, rest, layers, told))
    return _joined(name, tuple(samples), branches)


def _admitting(op: Op, name: str, samples: list) -> Iterator[tuple[Implementation, ...]]:
    """For each sample in turn, the implementations that admit it, in their order: one sweep over the samples, because
    asking each of thousands of implementations on each of thousands of pieces takes minutes."""
    enter: list[list[int]] = [[] for _ in samples]
    leave: list[list[int]] = [[] for _ in [*samples, None]]
    for index, implementation in enumerate(op.implementations):
        values = implementation.box.sets.get(name)
        if values is None:
            spans = [(0, len(samples))]
        elif isinstance(values, Ints):
            spans = [(bisect_left(samples, low), bisect_right(samples, high)) for low, high in values.ranges]
        else:
            spans = [(i, i + 1) for i, sample in enumerate(samples) if values.admits(sample)]
        for start, end in spans:
            if start < end:
                enter[start].append(index)
                leave[end].append(index)
    active: list[int] = []
    for position in range(len(samples)):
        for index in leave[position]:
            del active[bisect_left(active, index)]
        for index in enter[position]:
            insort(active, index)
        yield tuple(op.implementations[index] for index in active)


def _samples(op: Op, name: str, layers: Sequence[Layer]) -> list:
    """One value inside each piece of trait `name` on which every box and rule is of one mind: for a number, the
    smallest of the piece."""
    trait = op.space.traits[name]
    if trait.type == "bool":
        return [False, True]
    bottom = trait.minimum or 0
    boxes = [i.box for i in op.implementations] + [r.box for layer in layers for r in layer.rules.get(op.name, ())]
    points = {p for box in boxes if name in box.sets for p in _switch_points(box.sets[name])}
    return sorted({bottom} | {p for p in points if p > bottom})


def _switch_points(values: Ints) -> set[int]:
    points = set()
    for low, high in values.ranges:
        points |= {int(low)} if low > float("-inf") else set()
        points |= {int(high) + 1} if high < float("inf") else set()
    return points


def _joined(name: str, starts: tuple, branches: list[Table]) -> Table:
    """Neighbouring pieces with the same outcome become one; a level with one outcome disappears."""
    if isinstance(starts[0], bool):
        return branches[0] if branches[0] == branches[1] else Table(name, starts, tuple(branches))
    bounds, kept = [], [branches[0]]
    for start, branch in zip(starts[1:], branches[1:]):
        if branch != kept[-1]:
            bounds.append(start)
            kept.append(branch)
    return kept[0] if len(kept) == 1 else Table(name, tuple(bounds), tuple(kept))
