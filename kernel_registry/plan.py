"""A frozen plan: every choice a process made, in a form that can be compared, stored and loaded.

The text of a plan is canonical JSON: the same choices give the same bytes in every process and on every rank, so that
`fingerprint` (SHA-256 of the text) is what ranks compare at start-up and what compile caches may key on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping

from . import targets
from .box import Box, read_box
from .catalog import Catalog, Implementation, Op
from .contract import Request
from .document import write_whole
from .errors import OverrideError, PlanError, RegistryError
from .overrides import Layer, Rule
from .plan_diff import differences, spelt
from .selection import Table
from .tiles import Tiling, Tuned
from .traits.platform import Platform

if TYPE_CHECKING:
    from .state import State

VERSION = 1
_PACKAGES = ("kernel-registry", "torch", "triton")


@dataclass(frozen=True)
class Plan:
    """Choices for `calls`, each a dict: op, model (scope or null), traits, table (list of {when, implementation,
    decided_by}), sources (implementation -> hash) and, where some of them have any, options (implementation -> its
    options), prepare (implementation -> the function that makes its prepared arguments) and tiles (implementation ->
    the device, each tile that is tuned for it, by num_tokens, and the first and last numbers of tokens that these
    serve; absent where the device was not known). `strict` and `source` say how a loaded plan is applied."""

    device: str
    versions: dict[str, str]
    calls: tuple[dict, ...]
    source: str = "a frozen plan"
    strict: bool = False

    def text(self) -> str:
        """Canonical JSON."""
        content = {"version": VERSION, "device": self.device, "versions": self.versions, "calls": list(self.calls)}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """64 hex digits; equal exactly when device, versions and every choice are."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the plan whole or not at all."""
        try:
            write_whole(path, self.text())
        except OSError as error:
            raise PlanError(f"can't be written: {error}", where=path) from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """The plan in a file that `save` wrote. Raises PlanError for anything else."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(f"is not a plan: {error}", where=path, hint="freeze() writes one") from error
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, source: str | Path) -> "Plan":
        """The plan that `text()` wrote; `source` says where it was found. Raises PlanError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"is not a plan: {error}", where=source, hint="freeze() writes one") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise PlanError(f"is not a plan of version {VERSION}", where=source, hint="freeze again with this release")
        if not (set(data) == {"version", "device", "versions", "calls"} and isinstance(data["device"], str)
                and isinstance(data["versions"], dict) and isinstance(data["calls"], list)):
            raise PlanError("is not a whole plan", where=source, hint="freeze() writes one")
        for index, call in enumerate(data["calls"]):
            if not _is_call(call):
                raise PlanError(f"is not a whole plan: call {index} is malformed", where=source,
                                hint="freeze() writes one")
        return cls(data["device"], data["versions"], tuple(data["calls"]), source=str(source))

    def diff(self, other: "Plan") -> list[str]:
        """What `other` has otherwise, a line each, calls told by op and traits; empty for equal fingerprints."""
        return list(differences(self, other))

    def checked(self, catalog: Catalog, tuned: Tuned) -> "Plan":
        """This plan; raises PlanError when it does not fit `catalog`, and the tiles that are `tuned`, any more."""
        problems = [problem for call in self.calls for problem in self._problems(call, catalog, tuned)]
        if problems:
            raise PlanError("; ".join(dict.fromkeys(problems)), where=self.source, hint="verify, then freeze again")
        return self

    def _problems(self, call: dict, catalog: Catalog, tuned: Tuned) -> Iterator[str]:
        try:
            op = catalog.op(call["op"])
            request = op.space.request(call["traits"], lambda: Platform.parse(self.device))
            for row in call["table"]:
                found = op.implementation(row["implementation"])
                strange = sorted({*row["when"]} - {*request.open})
                if strange:
                    yield f"{op.name}: a condition on {', '.join(strange)}, which the call does not leave open"
                elif not (found.box.admits({**request.traits, **dict.fromkeys(request.open, 0)}, request.open)
                          and found.box.meets(self._box(op, call, row))):
                    yield f"{found.name} can't serve {request} any more"
            for name, source in call["sources"].items():
                found = op.implementation(name)
                if found.prepare != call.get("prepare", {}).get(name, ""):
                    yield f"{op.name}: the preparation of {name} changed since the plan was frozen"
                tiles = call.get("tiles", {}).get(name)
                if tiles and _tiles(tuned.tiling(op, found, request.traits, device=tiles["device"])) != tiles:
                    yield f"{op.name}: the tiles of {name} for {tiles['device']} changed since the plan was frozen"
                elif _source(found, tiles) != source:
                    yield f"{op.name}: the source of {name} changed since the plan was frozen"
                if spelt(found.options) != spelt(call.get("options", {}).get(name, {})):
                    yield f"{op.name}: the options of {name} changed since the plan was frozen"
        except RegistryError as error:
            yield error.message

    def layer(self, catalog: Catalog) -> Layer:
        """The plan as an override layer: one strict rule per call and piece of its table."""
        rules: dict[str, list[Rule]] = {}
        for call in self.calls:
            op = catalog.op(call["op"], self.source)
            for row in call["table"]:
                rules.setdefault(op.name, []).append(
                    Rule("use", op.name, row["implementation"], self._box(op, call, row), self.source, self.source,
                         call["model"], frozen=row["decided_by"]))
        return Layer(self.source, {op: tuple(found) for op, found in rules.items()}, closed=self.strict)

    def _box(self, op: Op, call: dict, row: dict) -> Box:
        return read_box(op.space, {**call["traits"], **row["when"]}, lambda path: self.source, closed=False)


def _is_call(call: object) -> bool:
    """Whether a loaded `call` has the form that `frozen_call` gives it."""
    return (isinstance(call, dict)
            and set(call) - {"options", "prepare", "tiles"} == {"op", "model", "traits", "table", "sources"}
            and isinstance(call["op"], str) and isinstance(call["model"], (str, type(None)))
            and isinstance(call["traits"], dict) and isinstance(call["sources"], dict)
            and isinstance(call["table"], list) and bool(call["table"])
            and all(isinstance(row, dict) and set(row) == {"when", "implementation", "decided_by"}
                    and isinstance(row["when"], dict) and row["implementation"] in call["sources"]
                    and row["decided_by"] in ("override", "registry") for row in call["table"])
            and isinstance(call.get("options", {}), dict)
            and all(name in call["sources"] and isinstance(options, dict)
                    for name, options in call.get("options", {}).items())
            and isinstance(call.get("prepare", {}), dict)
            and all(name in call["sources"] and isinstance(function, str)
                    for name, function in call.get("prepare", {}).items())
            and isinstance(call.get("tiles", {}), dict)
            and all(name in call["sources"] and isinstance(tiles, dict)
                    and set(tiles) == {"device", "num_tokens", "serves"} and isinstance(tiles["device"], str)
                    and isinstance(tiles["num_tokens"], dict) and all(map(str.isdecimal, tiles["num_tokens"]))
                    and isinstance(tiles["serves"], list)
                    for name, tiles in call.get("tiles", {}).items()))


def freeze(state: "State", *, batch_invariant: bool = False) -> Plan:
    """The plan of every kernel dispatched from `state` outside a context override."""
    calls: dict[str, dict] = {}  # by their text: the same call, with its platform given and detected, is one
    matched: set[int] = set()
    for kernel in state.kernels():
        implementation, scope = kernel.context
        if implementation is not None or (scope and scope.layers):
            continue  # an explicit choice of one caller, not of the configuration
        op = state.catalog.op(kernel.op)
        model = scope.model if scope else None
        if batch_invariant:
            _refuse_variance(op, kernel)
        call = frozen_call(op, kernel.request, kernel.table, kernel.tiles, model)
        calls[json.dumps(call, sort_keys=True)] = call
        for layer in state.file_layers:
            for rule in layer.rules.get(op.name, ()):
                if rule.model in (None, model) and _could_match(rule, kernel):
                    matched.add(id(rule))
    unused = [str(rule) for layer in state.file_layers for rule in layer if id(rule) not in matched]
    if unused:
        raise OverrideError("overrides that no dispatched call matched: " + "; ".join(unused),
                            hint="remove them, correct their `when`, or freeze after every op is dispatched")
    return Plan(str(state.platform), versions(), tuple(calls[key] for key in sorted(calls)))


def frozen_call(op: Op, request: Request, table: Table, tilings: Mapping[str, Tiling], model: str | None = None
                ) -> dict:
    """One of a plan's `calls`: what `table` decides for `request`, with the tiles that are tuned for it."""
    winners = [op.by_name[name] for name in table.winners()]
    options = {winner.name: dict(winner.options) for winner in winners if winner.options}
    prepare = {winner.name: winner.prepare for winner in winners if winner.prepare}
    tiles = {name: _tiles(tiling) for name, tiling in tilings.items() if tiling.device}
    return {"op": op.name, "model": model, "traits": _plain(request, op), "table": _rows(table),
            "sources": {winner.name: _source(winner, tiles.get(winner.name)) for winner in winners},
            **({"options": options} if options else {}), **({"prepare": prepare} if prepare else {}),
            **({"tiles": tiles} if tiles else {})}


def _tiles(tiling: Tiling) -> dict:
    """What a plan holds of a tiling; no tiles: the default's."""
    return {"device": tiling.device, "num_tokens": {str(count): tile for count, tile in tiling.tuned.items()},
            "serves": [[*span] for span in tiling.spans]}


def _source(implementation: Implementation, tiles: dict | None) -> str:
    """The hash of all that says what an implementation runs: its code, that of its tiles, and what is tuned."""
    more = [f"{implementation.tiles}:default"] if implementation.tiles else []
    more += [implementation.prepare] if implementation.prepare else []
    tuned = tiles["num_tokens"] if tiles else {}
    return targets.source_hash(implementation.target, *more, data=json.dumps(tuned, sort_keys=True) if tuned else "")


def _could_match(rule: Rule, kernel) -> bool:
    request = kernel.request
    return rule.box.admits({**request.traits, **dict.fromkeys(request.open, 0)}, request.open)


def _refuse_variance(op: Op, kernel) -> None:
    winners = [op.by_name[name] for name in kernel.table.winners()]
    tags = {winner.numerics for winner in winners}
    if len(winners) > 1 and (None in tags or len(tags) > 1):
        raise PlanError(f"{kernel.request} runs {' or '.join(kernel.table.winners())} depending on "
                        f"{kernel.table.trait}, and they are not declared to agree bit for bit", where=op.name,
                        hint="override to one of them, or give both the same `numerics` tag once verify proves it")
    tiled = next((winner for winner in winners if winner.tiles and winner.numerics is None), None)
    if tiled and "num_tokens" in kernel.request.open:
        raise PlanError(f"{kernel.request} runs {tiled.name} with tiles that depend on num_tokens, and it is not "
                        "declared to agree bit for bit whichever it is", where=op.name,
                        hint="override to one that takes no tiles, or give it a `numerics` tag where no tile changes "
                             "a bit")


def _rows(table: Table, when: dict | None = None) -> list[dict]:
    when = when or {}
    if table.trait is None:
        rule = table.decision.rule
        by = (rule.frozen or "override") if rule else "registry"  # not which: paths differ between ranks
        return [{"when": when, "implementation": table.decision.implementation.name, "decided_by": by}]
    rows = []
    if isinstance(table.bounds[0], bool):
        pieces: Iterable = table.bounds
    else:
        starts, ends = (None, *table.bounds), (*table.bounds, None)
        pieces = [{k: v for k, v in (("min", a), ("max", b and b - 1)) if v is not None} for a, b in zip(starts, ends)]
    for piece, branch in zip(pieces, table.branches):
        rows += _rows(branch, {**when, table.trait: piece})
    return rows


def _plain(request, op: Op) -> dict[str, object]:
    return {name: value if isinstance(value, (int, bool)) else str(value)
            for name, value in request.traits.items() if name in op.space.traits and name not in request.open}


def versions() -> dict[str, str]:
    """The installed versions that a plan depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
