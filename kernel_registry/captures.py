"""Which kernels a captured CUDA graph holds, and whether they are still those that would run.

    with registry.capture("decode, 16 tokens"), torch.cuda.graph(graph):
        layer(hidden_states, router_logits, out=out)
    ...
    for capture in registry.reload():       # those that the changed files have left behind
        print(capture)                      # capture them again: until then they replay what they hold

A graph replays what ran when it was captured, whatever the registry decides later. While a capture is noted, each
handle has its function behind one that notes the call: which kernel, with which dynamic traits, and what ran.
Afterwards the handles are as they were, so that calls outside of captures cost nothing. Only the thread that captures
is listened to; decisions, and with them a reload, wait until it is done.

Not seen: a graph that is captured without this, and calls of `kernel.raw`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Callable, Iterator, Mapping

from .aliasing import COPIES, TRAIT, WRITES
from .bound import BoundKernel, first_argument
from .catalog import Op
from .errors import CaptureError
from .traits.trait import written

if TYPE_CHECKING:
    from .state import State


@dataclass(frozen=True)
class Held:
    """One call in a capture: the handle, the call's dynamic traits, and what ran, as `what_runs` says it."""

    kernel: BoundKernel
    dynamic: Mapping[str, object]
    ran: Mapping[str, str]

    def __str__(self):
        at = ", ".join(f"{name}={written(value)}" for name, value in self.dynamic.items())
        now = what_runs(self.kernel, self.dynamic)
        keys = [key for key in now if self.ran[key] != now[key]]
        keys = keys[:1] if "implementation" in keys else keys  # another name says it all
        told = ", ".join(f"{self.ran[key]} -> {now[key]}" for key in keys) or self.ran["implementation"]
        return f"{self.kernel.request}{f' at {at}' if at else ''}: {told}"


@dataclass(frozen=True)
class Capture:
    """What the graph of this name holds, each call once. `str()` tells what would run instead."""

    name: str
    calls: tuple[Held, ...]

    @property
    def outdated(self) -> tuple[Held, ...]:
        """The calls that would run something else now."""
        return tuple(held for held in self.calls if what_runs(held.kernel, held.dynamic) != held.ran)

    def __str__(self):
        outdated = self.outdated
        return f"{self.name} {'still holds what ran before' if outdated else 'holds what runs now'}" + "".join(
            f"\n  {held}" for held in outdated)


def what_runs(kernel: BoundKernel, dynamic: Mapping[str, object]) -> dict[str, str]:
    """Everything about a call that a change of files can change."""
    table = kernel.table
    while table.trait is not None:
        value = dynamic[table.trait]
        table = table.branches[value if isinstance(value, bool) else bisect_right(table.bounds, value)]
    one = table.decision.implementation
    tiling, tokens = kernel.tiles.get(one.name), {**kernel.request.traits, **dynamic}.get("num_tokens", 0)
    tuned = None if tiling is None else tiling.nearest(tokens)
    output = (COPIES, WRITES)[one.accepts_output_alias] if kernel.request.traits.get(TRAIT) else ""
    return {"implementation": one.name, "target": one.target, "prepare": one.prepare,
            "options": json.dumps(dict(one.options), sort_keys=True), "output": output,
            "tile": "the default tile" if tuned is None else json.dumps(tiling.tuned[tuned], sort_keys=True)}


@contextmanager
def noted(state: "State") -> Iterator[dict[tuple, Held]]:
    """Fills the dict with the calls that this thread makes of the state's kernels meanwhile."""
    calls: dict[tuple, Held] = {}
    handles = {id(kernel): (kernel, kernel.raw) for kernel in state.kernels()}
    try:
        for kernel, call in handles.values():
            kernel.run(_noting(kernel, state.catalog.op(kernel.op), call, calls, get_ident()))
        yield calls
    finally:
        for kernel, call in handles.values():
            kernel.run(call)
    late = next((kernel for kernel in state.kernels() if id(kernel) not in handles), None)
    if late is not None:  # it may have been called, and was not listened to
        raise CaptureError(f"{late.request} was dispatched for the first time while a capture was noted",
                           hint="dispatch or bind it once, and run it once, before capturing")


def _noting(kernel: BoundKernel, op: Op, call: Callable, calls: dict[tuple, Held], thread: int) -> Callable:
    first = first_argument(op)

    def note(*args, **kwargs):
        if get_ident() == thread:
            subject = first(args, kwargs)
            dynamic = {name: op.contract.dynamic[name](subject) for name in kernel.request.open}
            calls[(id(kernel), *dynamic.values())] = Held(kernel, dynamic, what_runs(kernel, dynamic))
        return call(*args, **kwargs)
    return note
