"""Conformance, driven by the registry: what an implementation declares is what is tested.

For every implementation the declared box is sampled inside, on its edges and just outside (see sampling.py), beside the
op's named model workloads. Inside and edge points run and are judged by the contract's oracle; points outside must be
refused by a dispatch that names the implementation. Implementations with one `numerics` tag are compared bit for bit,
each with each, but the variants of one implementation each with it instead: it serves every call of theirs. Two that
serve different numbers of tokens are compared on the rows that a large call begins with.
What can't run on this machine is "not run", with the reason, and never counts as passed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

from .box import Box
from .catalog import Implementation, Op
from .errors import NoImplementationError, OverrideError, RegistryError, UnknownNameError, suggestion
from .harness import Harness, bits, device_of, harness, home, judges_itself, told, why_not_here
from .registry import Registry
from .sampling import Point, nearest, sample
from .traits.platform import Platform
from .traits.trait import written

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
BUDGET = 48  # points run per implementation, beside the refusals, which cost nothing
UNDECIDED_LIMIT = 0.01  # of the rows of model workloads; above it the comparison would pass for want of decisions
UNDECIDED_SLACK = 2  # rows that may be undecided however few were judged
_TOKENS = (33, 1, 64, 17, 5)
_TOKENS_CAP = {"interpreter": 300, "cpu": 20_000}  # more points of larger calls would take minutes there
_TOKENS_MOST = {"interpreter": 12_288, "cpu": 100_000}  # the few points of a box that asks for more than the cap have
# so many in all: three of 4096, one of 12288
_FEW = 2  # comparisons of two implementations that each take more tokens than the cap
_INSIDE = ("model", "edge", "inside")


@dataclass(frozen=True)
class Row:
    """One point of one implementation. `undecided` is the fraction of rows on which rounding leaves a choice open."""

    op: str
    implementation: str
    where: str  # model, edge, inside, outside, numerics or all
    point: str
    outcome: str
    detail: str = ""
    undecided: float = 0.0
    rows: int = 0


@dataclass(frozen=True)
class Report:
    """Every row, and what bounded the run."""

    rows: tuple[Row, ...]
    platform: str
    budget: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.outcome == FAILED)

    @property
    def results(self) -> dict[tuple[str, str], str]:
        """By (op, implementation): failed if anything failed, passed if a call inside its box ran and was judged, else
        not run. That calls outside are refused proves nothing about a kernel."""
        found = {(row.op, row.implementation): NOT_RUN for row in self.rows}
        ran = [row for row in self.rows if row.outcome == PASSED and row.where in _INSIDE]
        for row in (*ran, *self.failures):
            found[row.op, row.implementation] = row.outcome
        return found

    @property
    def ok(self) -> bool:
        """Nothing failed and some implementation passed."""
        return not self.failures and PASSED in self.results.values()

    def json(self) -> str:
        results = [{"op": op, "implementation": name, "result": told} for (op, name), told in self.results.items()]
        return json.dumps({**asdict(self), "results": results, "ok": self.ok}, indent=1)


def verify(registry: Registry, *, ops: Iterable[str] = (), implementations: Iterable[str] = (), budget: int = BUDGET,
           seed: int = 0, progress: Callable[[Row], None] | None = None) -> Report:
    """Verifies every implementation, or the named ones, on this machine. Each is given `budget` points to run.

    The same registry, budget and seed test the same points. Raises UnknownNameError for a name that nothing declares.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for op, chosen in select(registry, ops, implementations):
        for row in _Verifier(registry, op, budget, seed, notes).rows(chosen):
            rows.append(row)
            if progress:
                progress(row)
    return Report(tuple(rows), str(registry.platform()), budget, seed, tuple(notes))


def select(registry: Registry, ops: Iterable[str],
           implementations: Iterable[str]) -> list[tuple[Op, list[Implementation]]]:
    """The named ops (all when none is named), each with its named implementations; ops without one are left out."""
    chosen_ops = [registry.catalog.op(name) for name in ops] or list(registry.catalog.ops.values())
    names = set(implementations)
    known = {name for op in chosen_ops for name in op.by_name}
    for name in sorted(names - known):
        raise UnknownNameError(f"no implementation {name!r}", hint=suggestion(name, known))
    selected = [(op, [i for i in op.implementations if not names or i.name in names]) for op in chosen_ops]
    return [(op, found) for op, found in selected if found]


class _Ran(NamedTuple):
    """A point that an implementation ran, and how. `call` is kept of those that took long: (args, kwargs, outputs)."""

    point: Point
    tokens: int
    flavour: str
    seed: int
    device: str
    call: tuple | None


class _Verifier:
    def __init__(self, registry: Registry, op: Op, budget: int, seed: int, notes: list[str]):
        self.registry, self.op, self.budget, self.seed, self.notes = registry, op, budget, seed, notes
        self.here = registry.platform()
        self.ran: dict[str, list[_Ran]] = {}
        self.cap = _TOKENS_CAP.get(self.here.kind, float("inf"))
        self.most = _TOKENS_MOST.get(self.here.kind, float("inf"))

    def rows(self, implementations: Sequence[Implementation]) -> Iterator[Row]:
        tools: Harness | None = None
        trouble = ""
        try:
            tools = harness(self.op)
        except RegistryError as error:
            trouble = told(error)
        for implementation in implementations:
            platform = home(self.here, implementation)
            if tools is None:
                yield self._row(implementation, "all", "", NOT_RUN, trouble)
            elif platform is None:
                yield self._row(implementation, "all", "", NOT_RUN, why_not_here(self.here, implementation))
            else:
                yield from self._implementation(tools, implementation, platform)
        if tools is not None:
            yield from self._numerics(tools, implementations)

    def _implementation(self, tools: Harness, implementation: Implementation, platform: Platform) -> Iterator[Row]:
        try:
            reason = judges_itself(self.op, implementation)
        except RegistryError as error:
            reason = told(error)
        if reason:
            yield self._row(implementation, "all", "", FAILED, reason)
            return
        found = sample(self.op, implementation, platform, tools.workloads, inside=self.budget, seed=self.seed)
        for edge in found.unreached:
            self.notes.append(f"{implementation.name}: no legal call found with {edge}, which its box names")
        models = found.model[:max(1, self.budget // 3)]
        edges = found.edge[:max(1, (self.budget - len(models)) * 3 // 4)]
        points = [*models, *edges, *found.inside[:max(0, self.budget - len(models) - len(edges))]]
        if not points:
            yield self._row(implementation, "all", "", FAILED, "no legal call lies inside its box")
            return
        for all_of, some_of, kind in ((found.model, models, "model workloads"), (found.edge, edges, "edges")):
            if len(some_of) < len(all_of):
                self.notes.append(f"{implementation.name}: the budget covers {len(some_of)} of {len(all_of)} {kind}")
        least = nearest(implementation.box.sets.get("num_tokens"), 0)
        few = [min((p for p in points if p.where == where), key=_size)
               for where in ("edge", "inside", "model") if any(p.where == where for p in points)] \
            if least > self.cap else []  # the smallest of each kind, with as few tokens as the box admits
        few = [p for n, p in enumerate(few, 1) if n == 1 or n * least <= self.most]
        judged = undecided = 0
        for index, point in enumerate(points):
            if point in few:
                row = self._run(tools, implementation, self._with_tokens(implementation, point, least), index,
                                device_of(platform), self.most)
            else:
                row = self._run(tools, implementation, point, index, device_of(platform), self.cap)
            if point.where == "model":  # other values may sit on a tie by design
                judged += row.rows
                undecided += round(row.undecided * row.rows)
            yield row
        if undecided > max(UNDECIDED_SLACK, UNDECIDED_LIMIT * judged):
            yield self._row(implementation, "all", "", FAILED, f"{undecided} of {judged} rows of model workloads were "
                            "undecided: the comparison proves too little")
        for point in found.outside[:2 * self.budget]:
            yield self._refused(implementation, point)

    def _run(self, tools: Harness, implementation: Implementation, point: Point, index: int, device: str,
             most: float) -> Row:
        """One point of at most `most` tokens, executed and judged. Whatever is raised is a failure: the box said it
        serves this.

        Model workloads get plain values and various token counts, other points each flavour of values in turn. On a CPU
        the sizes are reduced where the op says how."""
        is_model = point.where == "model"
        if is_model and "num_tokens" in point.traits:
            point = self._with_tokens(implementation, point, _TOKENS[index % len(_TOKENS)])
        point = self._affordable(tools, implementation, point, device)
        tokens = point.traits.get("num_tokens", _TOKENS[index % len(_TOKENS)])
        flavour = tools.flavours[0 if is_model else index % len(tools.flavours)]
        title = f"{point.about}: {_text(point)} ({flavour}, seed {self.seed + index})"
        if tokens > most:
            return self._row(implementation, point.where, title, NOT_RUN,
                             f"{tokens} tokens are too many for the {self.here}")
        try:
            kernel = self.registry.dispatch(self.op.name, implementation=implementation.name, **point.traits)
            verdict, call = tools.judge(kernel, point.traits, tokens=tokens, seed=self.seed + index, flavour=flavour,
                                        device=device)
        except Exception as error:
            return self._row(implementation, point.where, title, FAILED, "inside its box, but raised " + told(error))
        ran = _Ran(point, tokens, flavour, self.seed + index, device, call if tokens > self.cap else None)
        self.ran.setdefault(implementation.name, []).append(ran)
        if verdict.passed is None:
            return self._row(implementation, point.where, title, NOT_RUN,
                             f"the oracle can't judge it: {verdict.detail}")
        fraction = verdict.undecided / verdict.rows if verdict.rows else 0.0
        return self._row(implementation, point.where, title, PASSED if verdict.passed else FAILED,
                         str(verdict.detail or ""), fraction, verdict.rows)

    def _affordable(self, tools: Harness, implementation: Implementation, point: Point, device: str) -> Point:
        """`point` at the sizes that are run on `device`, where the implementation admits them."""
        traits = tools.affordable(point.traits, device)
        if traits == point.traits or not implementation.box.admits(
                self.op.space.request(traits, lambda: self.here).traits):
            return point
        return replace(point, about=f"{point.about}, reduced", traits=traits)

    def _with_tokens(self, implementation: Implementation, point: Point, tokens: int) -> Point:
        """`point` with that many tokens, where the implementation admits it."""
        traits = {**point.traits, "num_tokens": tokens}
        admitted = implementation.box.admits(self.op.space.request(traits, lambda: self.here).traits)
        return replace(point, traits=traits) if admitted else point

    def _refused(self, implementation: Implementation, point: Point) -> Row:
        title = f"{point.about}: {_text(point)}"
        try:
            self.registry.dispatch(self.op.name, implementation=implementation.name, **point.traits)
        except (OverrideError, NoImplementationError):
            return self._row(implementation, "outside", title, PASSED, "refused")
        except Exception as error:
            return self._row(implementation, "outside", title, FAILED,
                             "expected a refusal by selection, got " + told(error))
        return self._row(implementation, "outside", title, FAILED, "outside its box, yet dispatched when named")

    def _numerics(self, tools: Harness, chosen: Sequence[Implementation]) -> Iterator[Row]:
        """Every two implementations that claim bit identity and can share a call but for its number of tokens, at least
        one of them chosen; not two variants of one implementation: their bits are its bits."""
        names, told = {i.name for i in chosen}, set()
        for first, second in combinations(self.op.implementations, 2):
            if not first.numerics or first.numerics != second.numerics or not _meet(first.box, second.box):
                continue
            if first.variant_of and first.variant_of == second.variant_of:
                continue
            absent = next((i for i in (first, second) if home(self.here, i) is None), None)
            mine = next((i for i in (absent, second, first) if i is not None and i.name in names), None)
            if mine is None or (absent is not None and absent.name in told):
                continue
            if absent is None:
                yield from self._pair(tools, mine, second if mine is first else first)
                continue
            told.add(absent.name)
            yield self._row(mine, "numerics", f"numerics {mine.numerics}", NOT_RUN,
                            f"{absent.name} " * (absent is not mine) + why_not_here(self.here, absent))

    def _pair(self, tools: Harness, mine: Implementation, other: Implementation) -> Iterator[Row]:
        shared = []  # what one ran, and the other with the number of tokens for it
        for one, partner in ((other, mine), (mine, other)):
            for ran in self.ran.get(one.name, ()):
                traits = self.op.space.request(ran.point.traits, lambda: self.here).traits
                tokens = nearest(partner.box.sets.get("num_tokens"), min(ran.tokens, self.cap))
                served = partner.box.admits({**traits, "num_tokens": tokens})
                if served and (tokens == ran.tokens or min(tokens, ran.tokens) > 0):
                    shared.append((one, ran, partner, tokens))
        costly = sorted((s for s in shared if s[3] <= self.most),
                        key=lambda s: (s[3], s[1].point.where != "model", _size(s[1].point)))
        shared = [s for s in shared if s[3] <= self.cap] or costly[:_FEW]
        if not shared:
            yield self._row(mine, "numerics", f"numerics {mine.numerics}", NOT_RUN,
                            f"no sampled call is served by {other.name} too")
        for one, ran, partner, tokens in shared[:self.budget]:
            fewer = ""
            if tokens != ran.tokens:
                small, large = (partner, ran.tokens) if tokens < ran.tokens else (one, tokens)
                fewer = f", {small.name} on the first {min(tokens, ran.tokens)} of {large} tokens"
            title = f"bit for bit with {other.name}: {_text(ran.point)} ({ran.flavour}, seed {ran.seed}){fewer}"
            if fewer and tools.prefix is None:
                yield self._row(mine, "numerics", title, NOT_RUN, f"the cases of {self.op.name} have no `prefix`, so "
                                "that calls of different numbers of tokens can't be compared")
                continue
            try:
                same = self._same(tools, one, ran, partner, tokens)
            except Exception as error:
                yield self._row(mine, "numerics", title, FAILED, told(error))
                continue
            yield self._row(mine, "numerics", title, PASSED if same else FAILED,
                            "" if same else f"differs in some bit, though both declare numerics {mine.numerics!r}")

    def _same(self, tools: Harness, one: Implementation, ran: "_Ran", partner: Implementation, tokens: int) -> bool:
        """Whether `partner` with `tokens` tokens gives the bits of `one` on what it ran, in the rows that both have."""
        def kernel(implementation: Implementation, count: int):
            fixed = {**ran.point.traits, "num_tokens": count} if "num_tokens" in self.op.space.traits else \
                ran.point.traits
            return self.registry.dispatch(self.op.name, implementation=implementation.name, **fixed)

        (large, most), (small, count) = ((one, ran.tokens), (partner, tokens))[::1 if tokens <= ran.tokens else -1]
        call = ran.call if large is one else None
        if call is None:
            call = tools.call(kernel(large, most), ran.point.traits, most, ran.seed, ran.flavour, ran.device)
        args, kwargs, expected = call if count == most else tools.prefix(*call, count)
        return bits(kernel(small, count)(*args, **kwargs)) == bits(expected)

    def _row(self, implementation: Implementation, where: str, point: str, outcome: str, detail: str = "",
             undecided: float = 0.0, rows: int = 0) -> Row:
        return Row(self.op.name, implementation.name, where, point, outcome, detail, undecided, rows)


def _text(point: Point) -> str:
    return ", ".join(f"{k}={written(v)}" for k, v in point.traits.items())


def _size(point: Point) -> int:
    """What a call costs beside its tokens, to compare points of one box."""
    return sum(v for name, v in point.traits.items() if name != "num_tokens" and type(v) is int)


def _meet(one: Box, other: Box) -> bool:
    """Whether no trait keeps the two from sharing a call, the number of tokens left out."""
    return all(name == "num_tokens" or name not in other.sets or values.meets(other.sets[name])
               for name, values in one.sets.items())
