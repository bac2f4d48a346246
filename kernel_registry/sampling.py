"""Points of a box: inside it, on its edges and just outside, all of them legal calls of the op.

From a few base points inside the box (the op's named model workloads, then random ones) every trait is walked through
its domain with the others held. Where the box changes its mind, the last value it admits is an edge and the first it
refuses is just outside; that finds the edges of value sets, of derived traits and of relations alike. Edges that no
walk reaches are searched for by varying the other traits, and are named in `unreached` when that fails too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Iterable, Iterator, Mapping

from .catalog import Implementation, Op
from .predicates import Ints
from .traits.platform import KNOWN, Platform
from .traits.trait import REQUIRED, Trait

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 22, 32, 60, 64, 100, 128, 160, 192, 256, 384, 512, 896)
_TOKENS = (0, 1, 2, 3, 7, 17, 33)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_WALK = 1100  # whole numbers tried one by one; the edges that the registry names are tried wherever they lie
_TRIES = 4000  # random draws before a point is called unreachable
_BASES = 5  # walks start from this many points


@dataclass(frozen=True)
class Point:
    """One legal call. `where` is model, edge, inside or outside; `about` says what was varied, or names the workload;
    `traits` are canonical and complete, without the derived ones."""

    where: str
    about: str
    traits: Mapping[str, object]


@dataclass
class Sample:
    """Points by kind, each list in the order in which a budget should take them; and the edges not reached."""

    model: list[Point] = field(default_factory=list)
    edge: list[Point] = field(default_factory=list)
    inside: list[Point] = field(default_factory=list)
    outside: list[Point] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


def sample(op: Op, implementation: Implementation, platform: Platform, workloads: Mapping[str, Mapping[str, object]], *,
           inside: int, seed: int) -> Sample:
    """Points around `implementation`'s box on `platform`, which it must admit. `workloads` maps names to traits; those
    that the box refuses are left out. The same arguments give the same points."""
    return _Sampler(op, implementation, platform, seed).sample(workloads, inside)


def nearest(values: Ints | None, count: int) -> int:
    """The number in `values` (None: any) that is nearest to `count` among those up to it, else among those above."""
    if values is None:
        return count
    below = [min(high, count) for low, high in values.ranges if low <= count]
    return int(below[-1] if below else values.ranges[0][0])


class _Sampler:
    def __init__(self, op: Op, implementation: Implementation, platform: Platform, seed: int):
        self.op, self.space, self.box, self.platform = op, op.space, implementation.box, platform
        self.random = random.Random(f"{op.name}/{implementation.name}/{seed}")
        self.pools = {name: self._pool(trait) for name, trait in self.space.traits.items()}

    def sample(self, workloads: Mapping[str, Mapping[str, object]], inside: int) -> Sample:
        out = Sample()
        models: dict[tuple, tuple[list[str], dict]] = {}  # models that make one and the same call share a point
        for name, traits in workloads.items():
            full = self._complete({**self._neutral(), **traits, **self._platforms()})
            if full is not None and self.box.admits(full):
                models.setdefault(tuple(full.values()), ([], full))[0].append(name)
        out.model = [self._point("model", ", ".join(names), full) for names, full in models.values()]
        drawn = [full for full in (self._draw({}, self.box.admits) for _ in range(max(inside, _BASES))) if full]
        bases = [dict(p.traits) for p in self.random.sample(out.model, min(2, len(out.model)))]
        bases += [self._busy(full) for full in drawn[:_BASES - len(bases)]]
        edges: dict[str, list[Point]] = {}
        outside: dict[str, list[Point]] = {}
        for base in bases:
            for name in self.space.traits:
                for point in self._walk(base, name):
                    found = (edges if point.where == "edge" else outside).setdefault(name, [])
                    if point.about not in {p.about for p in found} or len(found) < _BASES:
                        found.append(point)
        for name, point in self._named_edges(edges, out.unreached):
            edges.setdefault(name, []).insert(0, point)
        seen: set = set()
        out.model = _unique(out.model, seen)
        out.edge = _unique(_in_turn(edges), seen)
        out.inside = _unique([self._point("inside", "random", full) for full in drawn[:inside]], seen)
        out.outside = _unique(_in_turn(outside), seen)
        return out

    def _busy(self, full: dict[str, object]) -> dict[str, object]:
        """`full` with more than no tokens, where that is admitted: an edge met in an empty call tests nothing."""
        empty = [name for name, t in self.space.traits.items() if t.dynamic and t.type == "int" and full[name] == 0]
        changed = self._complete({**full, **{name: 5 for name in empty}}) if empty else None
        return changed if changed is not None and self.box.admits(changed) else full

    # ---- one trait at a time ---------------------------------------------------------------------------------------

    def _walk(self, base: Mapping[str, object], name: str) -> Iterator[Point]:
        """Edges and outside points met by varying trait `name` from `base`."""
        trait = self.space.traits[name]
        calls = [(value, full) for value in self._domain(trait)
                 if (full := self._complete({**base, name: value})) is not None]
        flags = [self.box.admits(full) for _, full in calls]
        if trait.type != "int":
            for (value, full), admitted in zip(calls, flags):
                if not admitted or trait.type != "platform":
                    yield self._point("edge" if admitted else "outside", f"{name} {_shown(value)}", full)
            return
        turns = [i for i in range(1, len(calls)) if flags[i] != flags[i - 1]]
        here = base.get(name, 0)
        near = [i for i in turns if calls[i][0] > here][:1] + [i for i in turns if calls[i][0] <= here][-1:]
        for i in dict.fromkeys([*turns[:1], *turns[-1:], *near]):  # a modulus turns often: the ends and around the base
            for value, full in (calls[i - 1], calls[i]):
                yield self._point("edge" if self.box.admits(full) else "outside", f"{name} {value}", full)
        if calls and flags[0]:
            yield self._point("edge", f"{name} {calls[0][0]}, the least there is", calls[0][1])

    def _named_edges(self, found: Mapping[str, list[Point]], unreached: list[str]) -> Iterator[tuple[str, Point]]:
        """A point for every edge value that the box itself names and no walk has met."""
        for name, values in self.box.sets.items():
            if name not in self.space.all or self.space.all[name].type == "platform":
                continue
            met = {self._complete(p.traits)[name] for points in found.values() for p in points}
            for value in self._edge_values(name, values):
                if value in met:
                    continue
                fixed = {name: value} if name in self.space.traits else {}
                full = self._draw(fixed, lambda t, n=name, v=value: t[n] == v and self.box.admits(t))
                if full is None:
                    unreached.append(f"{name} {_shown(value)}")
                else:
                    yield name, self._point("edge", f"{name} {_shown(value)}", full)

    def _edge_values(self, name: str, values) -> list:
        if not isinstance(values, Ints):
            return [v for v in values.edges() if values.admits(v)]
        ends = {end for bounds in values.ranges for end in bounds if end not in (float("inf"), float("-inf"))}
        minimum = self.space.all[name].minimum
        # The trait's own least is no edge of a box.
        return sorted(int(e) for e in ends if minimum is None or e > minimum)

    # ---- legal calls -----------------------------------------------------------------------------------------------

    def _draw(self, fixed: Mapping[str, object], wanted) -> dict[str, object] | None:
        """A random legal call with the `fixed` traits that is `wanted`, or None after many tries."""
        pick, current = self.random.choice, None
        for attempt in range(_TRIES):
            if current is None or attempt % 20 == 0:
                current = {name: pick(pool) for name, pool in self.pools.items()}
            else:  # near a combination that failed lies many a one that does not
                for name in self.random.sample(list(self.pools), min(2, len(self.pools))):
                    current[name] = pick(self.pools[name])
            full = self._complete({**current, **self._platforms(), **fixed})
            if full is not None and wanted(full):
                return full
        return None

    def _complete(self, values: Mapping[str, object]) -> dict[str, object] | None:
        """`values` with the derived traits, or None where the contract forbids the combination."""
        full = {name: values[name] for name in self.space.traits if name in values}
        return self.space.complete(full) if len(full) == len(self.space.traits) else None

    def _neutral(self) -> dict[str, object]:
        values = {name: t.default for name, t in self.space.traits.items() if t.default is not REQUIRED}
        values.update({name: nearest(self.box.sets.get(name), 5)
                       for name, t in self.space.traits.items() if t.dynamic and t.type == "int"})
        return values

    def _platforms(self) -> dict[str, object]:
        return {name: self.platform for name, t in self.space.traits.items() if t.type == "platform"}

    def _pool(self, trait: Trait) -> list:
        """Values of a trait for random calls: those its own set admits, small ones and edges included."""
        values = self.box.sets.get(trait.name)
        if trait.type == "platform":
            return [self.platform]
        if trait.type == "int":
            candidates = {*(_TOKENS if trait.dynamic else _SIZES), trait.minimum or 0}
            if isinstance(values, Ints):
                candidates |= {v for v in values.edges() if v <= 4 * _WALK}
            if trait.default is not REQUIRED:
                candidates.add(trait.default)
            candidates = {v for v in candidates if trait.minimum is None or v >= trait.minimum}
            if isinstance(values, Ints) and not any(map(values.admits, candidates)):
                candidates = {nearest(values, 0)}
        else:
            candidates = set(self._domain(trait))
        kept = [v for v in candidates if values is None or values.admits(v)]
        return sorted(kept or candidates, key=str)

    def _domain(self, trait: Trait) -> Iterable:
        """Every value worth walking through, in order."""
        values = self.box.sets.get(trait.name)
        named = [] if values is None else list(values.edges())
        if trait.type == "platform":
            return KNOWN
        if trait.type == "bool":
            return (False, True)
        if trait.type == "int":
            least = 0 if trait.minimum is None else trait.minimum
            return sorted({*range(least, _WALK + 1), *(v for v in named if v >= least)})
        words = trait.choices or (_DTYPES if trait.type == "dtype" else ("another_word",))
        more = [trait.default] if trait.default is not REQUIRED else []
        return list(dict.fromkeys([*named, *words, *more]))

    def _point(self, where: str, about: str, full: Mapping[str, object]) -> Point:
        return Point(where, about, {name: full[name] for name in self.space.traits})


def _in_turn(groups: Mapping[str, list[Point]]) -> list[Point]:
    """One of each group, then the next of each: a budget that ends early has still seen every trait."""
    longest = max(map(len, groups.values()), default=0)
    return [points[i] for i in range(longest) for points in groups.values() if i < len(points)]


def _unique(points: Iterable[Point], seen: set) -> list[Point]:
    kept = []
    for point in points:
        key = tuple(point.traits.values())
        if key not in seen:
            seen.add(key)
            kept.append(point)
    return kept


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
