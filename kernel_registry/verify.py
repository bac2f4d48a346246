"""Conformance, driven by the registry: what an implementation declares is what is tested.

For every implementation the declared box is sampled inside, on its edges and just outside (see sampling.py), beside the
op's named model workloads. Inside and edge points run and are judged by the contract's oracle; points outside must be
refused by a dispatch that names the implementation. Implementations with one `numerics` tag are compared bit for bit.
What can't run on this machine is "not run", with the reason, and never counts as passed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Callable, Iterable, Iterator, Sequence

from .catalog import Implementation, Op
from .errors import NoImplementationError, OverrideError, RegistryError, UnknownNameError, suggestion
from .harness import Harness, bits, device_of, harness, home, judges_itself, told, why_not_here
from .registry import Registry
from .sampling import Point, sample
from .traits.platform import Platform
from .traits.trait import written

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
BUDGET = 48  # points run per implementation, beside the refusals, which cost nothing
UNDECIDED_LIMIT = 0.01  # of the rows of model workloads; above it the comparison would pass for want of decisions
_UNDECIDED_SLACK = 2  # rows that may be undecided however few were judged
_TOKENS = (33, 1, 64, 17, 5)
_TOKENS_CAP = {"interpreter": 300, "cpu": 20_000}  # a larger call would take minutes there


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
    def ok(self) -> bool:
        """Nothing failed and something ran."""
        return not self.failures and any(row.outcome == PASSED for row in self.rows)

    def json(self) -> str:
        return json.dumps({**asdict(self), "ok": self.ok}, indent=1)


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


class _Verifier:
    def __init__(self, registry: Registry, op: Op, budget: int, seed: int, notes: list[str]):
        self.registry, self.op, self.budget, self.seed, self.notes = registry, op, budget, seed, notes
        self.here = registry.platform()
        self.ran: dict[str, list[tuple[Point, int, str]]] = {}  # implementation -> points that ran, with how

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
        judged = undecided = 0
        for index, point in enumerate(points):
            row = self._run(tools, implementation, point, index, device_of(platform))
            if point.where == "model":  # other values may sit on a tie by design
                judged += row.rows
                undecided += round(row.undecided * row.rows)
            yield row
        if undecided > max(_UNDECIDED_SLACK, UNDECIDED_LIMIT * judged):
            yield self._row(implementation, "all", "", FAILED, f"{undecided} of {judged} rows of model workloads were "
                            "undecided: the comparison proves too little")
        for point in found.outside[:2 * self.budget]:
            yield self._refused(implementation, point)

    def _run(self, tools: Harness, implementation: Implementation, point: Point, index: int, device: str) -> Row:
        """One point, executed and judged. Whatever is raised is a failure: the box said it serves this.

        Model workloads get plain values and various token counts, other points each flavour of values in turn."""
        is_model = point.where == "model"
        if is_model and "num_tokens" in point.traits:
            point = self._with_tokens(implementation, point, _TOKENS[index % len(_TOKENS)])
        tokens = point.traits.get("num_tokens", _TOKENS[index % len(_TOKENS)])
        flavour = tools.flavours[0 if is_model else index % len(tools.flavours)]
        title = f"{point.about}: {_text(point)} ({flavour}, seed {self.seed + index})"
        cap = _TOKENS_CAP.get(self.here.kind)
        if cap is not None and tokens > cap:
            return self._row(implementation, point.where, title, NOT_RUN,
                             f"{tokens} tokens are too many for the {self.here}")
        try:
            kernel = self.registry.dispatch(self.op.name, implementation=implementation.name, **point.traits)
            verdict, _ = tools.judge(kernel, point.traits, tokens=tokens, seed=self.seed + index, flavour=flavour,
                                     device=device)
        except Exception as error:
            return self._row(implementation, point.where, title, FAILED, "inside its box, but raised " + told(error))
        self.ran.setdefault(implementation.name, []).append((point, tokens, flavour))
        if verdict.passed is None:
            return self._row(implementation, point.where, title, NOT_RUN,
                             f"the oracle can't judge it: {verdict.detail}")
        fraction = verdict.undecided / verdict.rows if verdict.rows else 0.0
        return self._row(implementation, point.where, title, PASSED if verdict.passed else FAILED,
                         str(verdict.detail or ""), fraction, verdict.rows)

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

    def _numerics(self, tools: Harness, implementations: Sequence[Implementation]) -> Iterator[Row]:
        """Implementations that claim bit identity, each against the first of its tag that can run here."""
        for tag in sorted({i.numerics for i in implementations if i.numerics}):
            group = [i for i in self.op.implementations if i.numerics == tag]
            runnable = [i for i in group if home(self.here, i) is not None]
            for other in (i for i in group if i not in runnable):
                yield self._row(other, "numerics", f"numerics {tag}", NOT_RUN, why_not_here(self.here, other))
            for other in runnable[1:]:
                yield from self._pair(tools, tag, runnable[0], other)

    def _pair(self, tools: Harness, tag: str, first: Implementation, second: Implementation) -> Iterator[Row]:
        shared = []
        for implementation, other in ((first, second), (second, first)):
            for index, (point, tokens, flavour) in enumerate(self.ran.get(implementation.name, ())):
                request = self.op.space.request(point.traits, lambda: self.here)
                if other.box.admits(request.traits):
                    shared.append((point, tokens, flavour, self.seed + index))
        if not shared:
            yield self._row(second, "numerics", f"numerics {tag}", NOT_RUN,
                            f"no sampled call is served by {first.name} too")
        for point, tokens, flavour, seed in shared[:self.budget]:
            outputs = []
            title = f"bit for bit with {first.name}: {_text(point)} ({flavour}, seed {seed})"
            try:
                for implementation in (first, second):
                    kernel = self.registry.dispatch(self.op.name, implementation=implementation.name, **point.traits)
                    device = device_of(point.traits["platform"]) if "platform" in point.traits else device_of(self.here)
                    outputs.append(bits(tools.judge(kernel, point.traits, tokens=tokens, seed=seed, flavour=flavour,
                                                    device=device)[1]))
            except Exception as error:
                yield self._row(second, "numerics", title, FAILED, told(error))
                continue
            same = outputs[0] == outputs[1]
            yield self._row(second, "numerics", title, PASSED if same else FAILED,
                            "" if same else f"differs in some bit, though both declare numerics {tag!r}")

    def _row(self, implementation: Implementation, where: str, point: str, outcome: str, detail: str = "",
             undecided: float = 0.0, rows: int = 0) -> Row:
        return Row(self.op.name, implementation.name, where, point, outcome, detail, undecided, rows)


def _text(point: Point) -> str:
    return ", ".join(f"{k}={written(v)}" for k, v in point.traits.items())
