"""A box: the part of an op's trait space that an implementation declares it serves, or that an override matches.

A conjunction of one value set per trait, relations between traits, and, as a last resort, Python functions that return
their reason. `failures` is the one evaluator of the whole engine: dispatch asks for the first, explain for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Mapping, NamedTuple

from . import targets
from .contract import TraitSpace
from .errors import DocumentError, TargetError, UnknownNameError, suggestion
from .expressions import Expression, ExpressionError
from .predicates import ANY, PredicateError, ValueSet
from .traits.trait import REQUIRED, TraitValueError, written


class Failure(NamedTuple):
    """One predicate that does not hold: the trait (or relation), what it wanted and what it got."""

    what: str
    expected: str
    got: object

    def __str__(self):
        got = written(self.got)
        return f"{self.what} is {got}, serves {self.expected}" if self.expected else f"{self.what}: {got}"


@dataclass(frozen=True)
class PythonCheck:
    """`python: module:function`: called with the static traits, returns None or the reason it refuses."""

    target: str
    where: str

    def reason(self, traits: Mapping[str, object]) -> str | None:
        function = targets.load(self.target, self.where)
        try:
            answer = function(traits)
        except Exception as error:  # it may fail in any way; say which, and where it was declared
            raise TargetError(f"check {self.target} failed: {type(error).__name__}: {error}", where=self.where,
                              hint="a check takes the traits and returns None or the reason as text") from error
        if answer is not None and not isinstance(answer, str):
            raise DocumentError(f"{self.target} returned {answer!r}; a check returns None or the reason as text",
                                where=self.where)
        return answer


class Box:
    """`sets` maps trait names to value sets; an absent trait admits every value."""

    __slots__ = ("sets", "relations", "checks", "_tests", "_dynamic")

    def __init__(self, sets: Mapping[str, ValueSet], relations: tuple[Expression, ...] = (),
                 checks: tuple[PythonCheck, ...] = (), dynamic: tuple[str, ...] = ()):
        self.sets, self.relations, self.checks, self._dynamic = dict(sets), relations, checks, dynamic
        self._tests: tuple[tuple[str, Callable, ValueSet], ...] = tuple((n, s.admits, s) for n, s in self.sets.items())

    def ask_first(self, weight: Mapping[str, int]) -> None:
        """Tests the traits of greatest `weight` first: those that tell most implementations apart refuse soonest."""
        self._tests = tuple(sorted(self._tests, key=lambda test: -weight[test[0]]))

    def failures(self, traits: Mapping[str, object]) -> Iterator[Failure]:
        """Every predicate that `traits` do not satisfy, cheapest kind first; nothing when the box admits them."""
        held = True
        for name, admits, values in self._tests:
            if not admits(traits[name]):
                held = False
                yield Failure(name, values.text, traits[name])
        for relation in self.relations:
            if not relation.holds(traits):
                held = False
                got = ", ".join(f"{n}={written(traits[n])}" for n in sorted(relation.names))
                yield Failure("relation", "", f"{relation.text} does not hold for {got}")
        if held and self.checks:  # Python sees only traits that the declared predicates admit, and no dynamic ones
            static = {n: v for n, v in traits.items() if n not in self._dynamic}
            for check in self.checks:
                reason = check.reason(dict(static))
                if reason is not None:
                    yield Failure(check.target, "", reason)

    def admits(self, traits: Mapping[str, object], but_for: tuple[str, ...] = ()) -> bool:
        """Whether `failures` yields nothing, or nothing but failures of the traits in `but_for`."""
        for name, admits, _ in self._tests:  # of thousands of candidates nearly all leave here: no generator is made
            if not admits(traits[name]) and name not in but_for:
                return False
        return all(failure.what in but_for for failure in self.failures(traits))

    def covers(self, other: "Box") -> bool:
        """Provably contains `other`: each constraint here is implied by one there."""
        return (all(name in other.sets and values.covers(other.sets[name]) for name, values in self.sets.items())
                and set(self.relations) <= set(other.relations)
                and {c.target for c in self.checks} <= {c.target for c in other.checks})

    def meets(self, other: "Box") -> bool:
        """Could share a call: no trait provably keeps the two apart."""
        sets = other.sets
        return all(name not in sets or values.meets(sets[name]) for name, values in self.sets.items())


def read_box(space: TraitSpace, when: Mapping[str, object], where: Callable[[tuple], str], *,
             closed: bool) -> Box:
    """The box that a `when:` mapping declares. `where(path)` gives "file:line" of a key.

    closed=True is an implementation's: a semantic or layout trait it does not mention is pinned to its neutral value,
    and the platform must be mentioned. closed=False is an override's match: what it does not mention, it does not ask.
    """
    sets: dict[str, ValueSet] = {}
    relations: list[Expression] = []
    checks: list[PythonCheck] = []
    for key, spec in when.items():
        if key == "relations":
            relations = [_relation(space, text, where((key, i))) for i, text in enumerate(_texts(spec, where((key,))))]
        elif key == "python":
            checks = [_check(text, where((key, i))) for i, text in enumerate(_texts(spec, where((key,))))]
        else:
            try:
                trait = space.trait(key)
                values = space.value_set(trait, spec)
            except UnknownNameError:
                raise UnknownNameError(f"{space.op} has no trait {key!r}", where=where((key,)),
                                       hint=suggestion(key, [*space.all, "relations", "python"])) from None
            except (PredicateError, TraitValueError, ValueError) as error:
                raise DocumentError(str(error), where=where((key,)),
                                    hint=f"{trait.name} is a {trait.type}: a value, a list, `any`"
                                         + (", or min/max/multiple_of" if trait.type == "int" else "")
                                         + ", or not: ...") from None
            if trait.dynamic and getattr(values, "step", 1) != 1:
                raise DocumentError(f"{key}: multiple_of is not for a dynamic trait, which is cut into ranges",
                                    where=where((key,)))
            if not values.covers(space.value_set(trait, ANY)):
                sets[key] = values
    if closed:
        for name, trait in space.traits.items():
            if name in when:
                continue
            if trait.kind == "platform":
                raise DocumentError("says nothing about platform", where=where(()),
                                    hint="add e.g. `platform: [cuda>=sm_80, interpreter]`, or `platform: any`")
            if trait.kind in ("semantic", "layout"):
                if trait.default is REQUIRED:
                    raise DocumentError(f"says nothing about {name}, which has no neutral value", where=where(()),
                                        hint=f"add `{name}: ...` with what it serves, or `{name}: any`")
                sets[name] = space.value_set(trait, trait.default)
    return Box(sets, tuple(relations), tuple(checks), space.dynamic)


def _texts(spec: object, where: str) -> list:
    if not isinstance(spec, list) or not spec:
        raise DocumentError(f"expected a list of text, got {spec!r:.60}", where=where)
    return spec


def _relation(space: TraitSpace, text: object, where: str) -> Expression:
    try:
        return space.expression(text)
    except ExpressionError as error:
        raise DocumentError(str(error), where=where) from None


def _check(text: object, where: str) -> PythonCheck:
    if not targets.is_target(text):
        raise DocumentError(f"expected module:function, got {text!r}", where=where)
    return PythonCheck(text, where)
