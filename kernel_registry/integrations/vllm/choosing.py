"""What the registry decides for vLLM's modules, and what is told of it: one log line an outcome, one row a module."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Mapping

from ...contract import Workload
from ...errors import NoImplementationError, TraitError
from ...planning import HOST, PlanRow, parse_platform, plan_call
from ...registry import registry
from ..report import Row

asked: "list[Module]" = []  # in the order in which vLLM built them, which is the same in all of its processes
_told: set[str] = set()
_log = logging.getLogger("vllm.plugins.kernel_registry")  # below vLLM's own, so that its handlers and level hold


class Declined(Exception):
    """The module is nothing that the registry serves; the message is the reason."""


@dataclass(frozen=True)
class Module:
    """A module that was asked about: the traits of its calls, or why it stays with vLLM."""

    name: str
    kind: str
    op: str
    calls: tuple[Mapping[str, object], ...] = ()
    declined: str = ""

    def row(self) -> Row:
        """Its row of the report, by what the registry says now."""
        if self.declined:
            return Row(self.name, self.kind, self.op, None, self.declined)
        rows = [_plan(self.op, traits) for traits in self.calls]
        told = dict.fromkeys((row.implementation or "nothing", row.why) for row in rows)
        return Row(self.name, self.kind, self.op, "; ".join(dict.fromkeys(name for name, _ in told)),
                   "; ".join(why for _, why in told))


def choose(op: str, traits: Mapping[str, object]) -> None:
    """Binds the kernel of these traits, so that nothing is left to import when a model runs. Raises Declined where the
    registry has none, and what an override that can't be followed raises."""
    try:
        row = _plan(op, traits)
        if not row.fast and row.implementation and row.platform != "cpu" and not row.overridden:
            raise Declined(row.why)  # on a GPU vLLM's own kernel is faster than a fallback
        registry.bind(op, **traits, **here())
    except (NoImplementationError, TraitError) as error:
        raise Declined(" ".join(f"{error.message}: {error.hint}".split())) from error  # a log line is one line


def remember(kind: str, op: str, calls=(), declined: str = "") -> None:
    """Notes a module for the report, and tells the log, once for each outcome."""
    module = Module(f"{op} {sum(m.op == op for m in asked)}", kind, op, tuple(calls), declined)
    asked.append(module)
    row = module.row()
    line = f"{kind}: {op} -> {row.kernel}: {row.why}" if row.kernel else f"{kind} stays with vLLM: {row.why}"
    if line not in _told:
        _told.add(line)
        _log.log(logging.WARNING if declined else logging.INFO, "kernel_registry: %s", line)


def here() -> dict[str, str]:
    """The platform trait of vLLM's calls: none, but for a vLLM that runs on the host of a GPU machine."""
    from vllm.platforms import current_platform

    return {"platform": "cpu"} if current_platform.is_cpu() and registry.platform().kind in ("cuda", "hip") else {}


def _plan(op: str, traits: Mapping[str, object]) -> PlanRow:
    platform = parse_platform(registry, here().get("platform", HOST))
    return plan_call(registry, registry.catalog.op(op), Workload(op, traits, {}, 1), platform)
