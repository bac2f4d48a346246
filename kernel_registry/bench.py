"""Times of every implementation that can run here, on the op's named model workloads, side by side.

Each row is one implementation on one workload at one token count. Rounds alternate between the implementations, so that
a machine that slows down slows all of them; what is reported is the median. `ratio` is the time over the reference's
(the op's fallback) from the same rounds, and `regret` the time of what the registry chooses over the best time there
is: 1.0 means that the shipped order is the fastest. On a CPU an op may have its workloads reduced to smaller ones,
whose names say so.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Callable, Container, Iterable, Mapping, Sequence

from .catalog import Implementation, Op
from .errors import RegistryError, UnknownNameError, suggestion
from .harness import Harness, call_traits, device_of, harness, home, told
from .preparation import prepared_call
from .registry import Registry
from .traits.platform import Platform
from .verify import select

_ON_A_GPU = (1, 16, 64, 256, 1024, 4096, 16384)
TOKENS = {"cuda": _ON_A_GPU, "hip": _ON_A_GPU, "cpu": (1, 16, 256), "interpreter": (1,)}
_ROTATION = 8  # different inputs in turn: no call sees only what its own last replay left in cache
_ROUNDS = 7


@dataclass(frozen=True)
class BenchRow:
    """`microseconds` per call, None with `error` where it can't run; `ratio` to the reference; `regret` on the chosen
    row only. `method` says how it was timed: cuda graph, cuda events (not capturable) or perf_counter."""

    op: str
    workload: str
    tokens: int
    implementation: str
    chosen: bool
    microseconds: float | None
    ratio: float | None
    regret: float | None
    method: str
    error: str = ""


def bench(registry: Registry, *, ops: Iterable[str] = (), implementations: Iterable[str] = (),
          workloads: Iterable[str] = (), tokens: Sequence[int] = (), seconds: float = 0.3,
          progress: Callable[[BenchRow], None] | None = None) -> list[BenchRow]:
    """Times the named ops, implementations and workloads (all when none is named). `seconds` bounds the measuring of
    one implementation on one workload and token count. The reference and the chosen one are always among them; a named
    one that does not serve the call here is a row that says why. Raises UnknownNameError for an unknown name."""
    here = registry.platform()
    wanted, named = set(workloads), set(implementations)
    selected = [(op, chosen, harness(op)) for op, chosen in select(registry, ops, named)]
    known = {name for _, _, tools in selected for name in tools.workloads}
    for name in sorted(wanted - known):
        raise UnknownNameError(f"no workload {name!r}", hint=suggestion(name, known))
    rows: list[BenchRow] = []
    for op, chosen, tools in selected:
        for name, traits in tools.workloads.items():
            if wanted and name not in wanted:
                continue
            for count in tokens or TOKENS[here.kind]:
                found = _Bench(registry, op, tools, here, seconds).rows(name, traits, count, chosen, named)
                rows += found
                for row in found if progress else ():
                    progress(row)
    return rows


def to_json(registry: Registry, rows: Sequence[BenchRow]) -> str:
    """The rows with what they were measured on."""
    return json.dumps({"platform": str(registry.platform()), "rows": [asdict(row) for row in rows]}, indent=1)


class _Bench:
    def __init__(self, registry: Registry, op: Op, tools: Harness, here: Platform, seconds: float):
        self.registry, self.op, self.tools, self.here, self.seconds = registry, op, tools, here, seconds

    def rows(self, workload: str, traits: Mapping[str, object], tokens: int,
             chosen: Sequence[Implementation], named: Container[str]) -> list[BenchRow]:
        op = self.op
        affordable = self.tools.affordable(traits, device_of(self.here))
        if affordable != traits:
            workload, traits = f"{workload} (reduced)", affordable
        given = call_traits(op, traits, tokens)
        try:
            request = op.space.request(given, lambda: self.here)
            winner = self.registry.dispatch(op.name, **given).name
        except RegistryError as error:
            return [BenchRow(op.name, workload, tokens, "", False, None, None, None, "", told(error))]
        able = [i for i in op.implementations if home(self.here, i) == self.here and i.box.admits(request.traits)]
        reference = next((i.name for i in able if i.fallback), None)
        beside = [i for i in able if i in chosen or i.name in (winner, reference)]
        calls, errors = {}, {}
        for implementation in beside:
            try:
                calls[implementation.name] = self._call(implementation, given, request, tokens)
            except Exception as error:  # one that can't run is a row, and the rest are still measured
                errors[implementation.name] = told(error)
        times, method = measure(calls, device_of(self.here), self.seconds)
        best = min(times.values(), default=None)
        rows = []
        for implementation in beside:
            name, taken = implementation.name, times.get(implementation.name)
            rows.append(BenchRow(
                op.name, workload, tokens, name, name == winner, taken,
                taken / times[reference] if taken and reference in times else None,
                taken / best if taken and name == winner else None, method.get(name, ""), errors.get(name, "")))
        for implementation in (i for i in chosen if i.name in named and i not in able):
            why = "; ".join(map(str, implementation.box.failures(request.traits)))
            rows.append(BenchRow(op.name, workload, tokens, implementation.name, False, None, None, None, "", why))
        return rows

    def _call(self, implementation: Implementation, given, request, tokens: int) -> list[Callable[[], object]]:
        kernel = self.registry.dispatch(self.op.name, implementation=implementation.name, **given)
        calls = rotation(self.tools, request.traits, tokens, device_of(self.here))
        if implementation.prepare:
            calls = [prepared_call(self.op, kernel.table.winners(), kernel.request, *call) for call in calls]
        return on_each(kernel.raw, calls)


def rotation(tools: Harness, traits: Mapping[str, object], tokens: int, device: str) -> list[tuple]:
    """The rotating inputs of one call: (args, kwargs) of each."""
    plain = {name: value for name, value in traits.items() if name in tools.op.space.traits}
    return [tools.inputs(plain, tokens, seed=seed, device=device, flavour=tools.flavours[0])
            for seed in range(_ROTATION)]


def on_each(kernel: Callable, inputs: Iterable[tuple]) -> list[Callable[[], object]]:
    """The kernel on each of the inputs, after one run that compiles it."""
    calls = [lambda args=args, kwargs=kwargs: kernel(*args, **kwargs) for args, kwargs in inputs]
    calls[0]()
    return calls


def measure(calls: Mapping[object, list[Callable]], device: str,
            seconds: float) -> tuple[dict[object, float], dict[object, str]]:
    """Microseconds per call by name, and how each was timed."""
    replays, method = {}, {}
    for name, inputs in calls.items():
        replays[name], method[name] = _replay(inputs) if device == "cuda" else (_sweep(inputs), "perf_counter")
    repeats = {}
    for name, replay in replays.items():
        replay(1)
        once = max(replay(1), 1e-7)
        repeats[name] = max(1, min(1000, int(seconds / _ROUNDS / (once * 1e-6 * _ROTATION))))
    samples: dict[object, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, replay in replays.items():  # in turn, so that drift of the machine meets all alike
            samples[name].append(replay(repeats[name]))
    return {name: statistics.median(found) for name, found in samples.items()}, method


def _sweep(inputs: list[Callable]) -> Callable[[int], float]:
    """Times on the CPU: microseconds per call, the median of `repeats` sweeps over the rotating inputs."""
    def replay(repeats: int) -> float:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in inputs:
                call()
            found.append((time.perf_counter() - start) / len(inputs))
        return statistics.median(found) * 1e6
    return replay


def _replay(inputs: list[Callable]) -> tuple[Callable[[int], float], str]:
    """Times on the GPU: microseconds per call of a captured graph of all inputs; of plain launches where the kernel
    can't be captured."""
    import torch

    def launch():
        for call in inputs:
            call()

    method = "cuda graph"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    except RuntimeError:  # the kernel synchronises or allocates by other means
        torch.cuda.synchronize()
        method = "cuda events"

    def replay(repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            launch()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / repeats / len(inputs)
    return replay, method
