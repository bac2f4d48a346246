"""Finding tiles: every candidate timed on this machine, the fastest judged by the op's oracle before it is written.

Candidates are timed as `bench` times implementations, one after the other; the fastest few and the default are then
timed again side by side, so that drift of the machine decides nothing. What wins has to be right on every flavour of
inputs, at the number of tokens it is for and at one more, which is no multiple of anything. Each number of tokens is
written before the next is begun, and one that is written already is left alone: an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Sequence

from .bench import TOKENS, measure, on_each, rotation
from .bound import make_kernel
from .catalog import Implementation, Op
from .contract import Request
from .errors import DocumentError, TargetError, TraitError
from .harness import Harness, call_traits, device_of, harness, told
from .precompile import Job, precompile
from .registry import Registry
from .tile_files import Row, Tile, add_tile, installed, open_rows, static_traits
from .tiles import candidates
from .traits.platform import Platform, detect
from .verify import UNDECIDED_LIMIT, UNDECIDED_SLACK

WRITTEN, PRESENT, NOT_SERVED, NOTHING = "written", "already there", "not served", "nothing works"
_FINALISTS = 4  # timed again side by side, with the default
_MOST_WRONG = 5  # after so many the kernel is wrong, whatever its tile


@dataclass(frozen=True)
class Attempt:
    """Candidate `number` of `of`: its time per call, None with `error` where it does not compile or launch."""

    implementation: str
    tokens: int
    tile: Tile
    number: int
    of: int
    microseconds: float | None
    error: str = ""


@dataclass(frozen=True)
class TuneRow:
    """What came of one number of tokens. `wrong` are tiles that were the fastest left, and why the oracle refused each;
    `ratio` is the time over the default tile's, timed beside it; `method` says how it was timed."""

    op: str
    implementation: str
    tokens: int
    outcome: str
    detail: str = ""
    tile: Tile | None = None
    microseconds: float | None = None
    ratio: float | None = None
    method: str = ""
    tried: int = 0
    failed: tuple[Attempt, ...] = ()
    wrong: tuple[tuple[Tile, str], ...] = ()


def tune(registry: Registry, op: str, traits: Mapping[str, object], *, output: str | Path,
         implementations: Iterable[str] = (), tokens: Sequence[int] = (), again: bool = False, seconds: float = 0.1,
         jobs: int = 1, progress: Callable[[Attempt | TuneRow], None] | None = None) -> list[TuneRow]:
    """Tunes the named implementations of `op` (all that take tiles, when none is named) for calls with these static
    traits and each number of tokens, and writes what is found into the file `output`. `seconds` bounds the measuring of
    one candidate. On a CPU an op may have its sizes reduced, and the tiles are for those. `again` also tunes what is
    written already. With `jobs`, candidates are first compiled in that many processes. Raises for unknown names, for
    traits that are no call, and for a file that is refused."""
    owner, here = registry.catalog.op(op), registry.platform()
    tools = harness(owner)
    static = _static(owner, tools, traits, here)
    device = registry.state.tuned.device(here, ask_torch=True)
    if device is None:
        raise TraitError(f"kernels for {here} can't be timed here: this machine is {detect()}", where=op,
                         hint="tiles are found on the device that they are for")
    output = Path(output)
    if not output.absolute().parent.is_dir():
        raise DocumentError("can't be written: there is no such folder", where=output, hint="make it, or name another")
    tuners = [_Tuner(registry, owner, tools, here, implementation, static, device, seconds, progress)
              for implementation in _chosen(owner, implementations)]
    asked = [(tuner, count) for tuner in tuners for count in tokens or TOKENS[here.kind]]
    if jobs > 1:
        precompile(tools, [job for tuner, count in asked if tuner.known(count, output, again) is None
                           for job in tuner.jobs(count)], device_of(here), jobs)
    rows = []
    for tuner, count in asked:
        rows.append(tuner.known(count, output, again) or tuner.tune(count, output))
        if progress:
            progress(rows[-1])
    return rows


def _static(op: Op, tools: Harness, traits: Mapping[str, object], here: Platform) -> dict[str, object]:
    """`traits` made canonical and complete, as they are run here."""
    for name in traits:
        trait = op.space.trait(name)
        if trait.dynamic or trait.type == "platform":
            raise TraitError(f"{name} is not given to tune: " + (
                "it times on this machine" if trait.type == "platform" else "it tunes for one after the other"
                if name == "num_tokens" else "a tile serves all its values"), where=op.name, hint="drop it" + (
                    ", or say --tokens N" if name == "num_tokens" else ""))
    full = static_traits(op.space, op.space.request(traits, lambda: here).traits)
    return static_traits(op.space, tools.affordable(full, device_of(here)))


def _chosen(op: Op, names: Iterable[str]) -> list[Implementation]:
    able = [i for i in op.implementations if i.tiles]
    chosen = [op.implementation(name) for name in names] or able
    without = next((i for i in chosen if not i.tiles), None)
    if without is not None or not chosen:
        raise TargetError(f"{without.name} takes no tiles" if without else "no implementation takes tiles",
                          where=without.where if without else op.name, hint="`tiles: MODULE` in its entry says where "
                          "they come from; " + (f"those that do: {', '.join(i.name for i in able)}" if able else
                                                "docs/tiles.md"))
    return chosen


@dataclass(frozen=True)
class _Tuner:
    registry: Registry
    op: Op
    tools: Harness
    here: Platform
    implementation: Implementation
    static: Mapping[str, object]
    device: str
    seconds: float
    progress: Callable | None

    def known(self, count: int, output: Path, again: bool) -> TuneRow | None:
        """What came of a number of tokens for which there is nothing to do."""
        request = self._request(count)
        failures = [str(f) for f in self.implementation.box.failures(request.traits)]
        if failures:
            return self._row(count, NOT_SERVED, "; ".join(failures))
        row = self._written(count, {})
        found = next((r for r in open_rows(self.registry.catalog, output)[2] if r.identity == row.identity), None)
        if found is None or count not in found.tiles or again:
            return None
        return self._row(count, PRESENT, found.lines[count], tile=found.tiles[count])

    def jobs(self, count: int) -> Iterator[Job]:
        """What there is to compile."""
        request = self._request(count)
        for tile in candidates(self.op, self.implementation, request.traits, count):
            yield self.implementation, request, count, tile

    def tune(self, count: int, output: Path) -> TuneRow:
        """One number of tokens, from its candidates to the line in the file."""
        result = self._best(self._request(count), count)
        if result.tile is not None:
            add_tile(self.registry.catalog, output, self._written(count, result.tile), count)
        return result

    def _written(self, count: int, tile: Tile) -> Row:
        return Row(self.device, self.op.name, self.implementation.name, self.static, installed(), {count: tile})

    def _request(self, count: int) -> Request:
        return self.op.space.request(call_traits(self.op, self.static, count), lambda: self.here)

    def _kernel(self, request: Request, tile: Tile) -> Callable:
        return make_kernel(self.implementation, request, lambda num_tokens: tile)

    def _best(self, request: Request, count: int) -> TuneRow:
        tiles = candidates(self.op, self.implementation, request.traits, count)
        inputs = rotation(self.tools, request.traits, count, device_of(self.here))
        attempts = [self._attempt(request, count, tile, number, len(tiles), inputs)
                    for number, tile in enumerate(tiles, 1)]
        failed = tuple(a for a in attempts if a.microseconds is None)
        order = sorted((a.microseconds, a.number - 1) for a in attempts if a.microseconds is not None)
        if not order:
            return self._row(count, NOTHING, failed[0].error, tried=len(tiles), failed=failed)
        finalists = [index for _, index in order[:_FINALISTS]]
        if attempts[0] not in failed and 0 not in finalists:
            finalists.append(0)
        times, method = measure({index: on_each(self._kernel(request, tiles[index]), inputs) for index in finalists},
                                device_of(self.here), self.seconds * len(finalists))
        ranking = sorted(finalists, key=times.get) + [index for _, index in order if index not in finalists]
        del inputs  # the judge needs the memory
        wrong = []
        for index in ranking:
            reason = self._judged(tiles[index], count)
            if not reason:
                taken = times.get(index, attempts[index].microseconds)
                return self._row(count, WRITTEN, tile=tiles[index], microseconds=taken,
                                 ratio=taken / times[0] if 0 in times else None, method=method[finalists[0]],
                                 tried=len(tiles), failed=failed, wrong=tuple(wrong))
            wrong.append((tiles[index], reason))
            if len(wrong) == _MOST_WRONG:
                break
        return self._row(count, NOTHING, wrong[0][1], tried=len(tiles), failed=failed, wrong=tuple(wrong))

    def _attempt(self, request: Request, count: int, tile: Tile, number: int, of: int, inputs: list) -> Attempt:
        taken, error = None, ""
        try:
            calls = on_each(self._kernel(request, tile), inputs)
            self._settle()
            times, _ = measure({number: calls}, device_of(self.here), self.seconds)
            taken = times[number]
        except Exception as failure:  # too much shared memory, too many registers, a compiler that gives up
            error = told(failure)
            self._still_there(tile, failure)
        attempt = Attempt(self.implementation.name, count, tile, number, of, taken, error)
        if self.progress:
            self.progress(attempt)
        return attempt

    def _judged(self, tile: Tile, count: int) -> str:
        """Why the tile is not to be written; "" where the oracle found nothing."""
        for index, (tokens, flavour) in enumerate(self._questions(count)):
            request = self._request(tokens)
            plain = {name: value for name, value in request.traits.items() if name in self.op.space.traits}
            said = f" ({tokens} tokens, {flavour} inputs)"
            try:
                verdict, _ = self.tools.judge(self._kernel(request, tile), plain, tokens=tokens, seed=index,
                                              flavour=flavour, device=device_of(self.here))
                self._settle()
            except Exception as error:
                self._still_there(tile, error)
                return told(error) + said
            if verdict.passed is False:
                return (verdict.detail or "the oracle refuses its result") + said
            if index == 0 and verdict.passed is None:
                return f"the oracle can't judge it: {verdict.detail}{said}"
            if index == 0 and verdict.undecided > max(UNDECIDED_SLACK, UNDECIDED_LIMIT * verdict.rows):
                return f"{verdict.undecided} of {verdict.rows} rows are undecided: that proves too little{said}"
        return ""

    def _questions(self, count: int) -> Iterator[tuple[int, str]]:
        """(tokens, flavour) of each call that is judged: every flavour once, by turns at the count and at one more,
        where that is served; the first, plain inputs, at both."""
        one_more = count + self.implementation.box.admits(self._request(count + 1).traits)
        plain, *others = self.tools.flavours
        yield count, plain
        yield one_more, plain
        for index, flavour in enumerate(others):
            yield (count, one_more)[index % 2], flavour

    def _settle(self) -> None:
        """Waits for the device, so that a failure is told by the call that made it."""
        if device_of(self.here) == "cuda":
            import torch

            torch.cuda.synchronize()

    def _still_there(self, tile: Tile, failure: Exception) -> None:
        """Raises if the failure left the device unusable, as a wild read does: nothing after it can be trusted."""
        try:
            self._settle()
        except Exception:
            raise TargetError(f"{self.implementation.name} broke the device with {tile}: {told(failure)}",
                              where=self.implementation.where,
                              hint=f"mend the kernel or take the tile out of {self.implementation.tiles}.candidates; "
                                   "what was found before is written, and another run goes on from there") from failure

    def _row(self, count: int, outcome: str, detail: str = "", **more) -> TuneRow:
        return TuneRow(self.op.name, self.implementation.name, count, outcome, detail, **more)
