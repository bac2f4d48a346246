"""Tiles: the launch parameters that an implementation is bound with, tuned where somebody tuned, else its own default.

An implementation that declares `tiles: MODULE` in registry.yaml gets a function of num_tokens as keyword `tiles`. It
answers with the tuned tile whose number of tokens is nearest in log scale, from the rows for this device and exactly
these static traits, and with `MODULE.default(traits, num_tokens)` where none is near.

Rows come from tiles.yaml beside the registry file, then from what is loaded, then from the file that the environment
names: for the same number of tokens the later one goes first. Within a file, rows timed with the installed versions go
before others, and newer ones before older.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

from . import targets
from .catalog import Catalog, Implementation, Op
from .contract import Request
from .document import read
from .errors import DocumentError, RegistryError, TargetError
from .schema import plain_tile
from .tile_files import PACKAGES, Row, Tile, installed, read_rows, static_traits
from .traits.detection import find
from .traits.platform import Platform
from .traits.trait import REQUIRED, written

FILE = "tiles.yaml"
ENVIRONMENT_VARIABLE = "KERNEL_REGISTRY_TILES"
# How many times more or fewer tokens a tuned tile serves: two doublings of the rows an expert gets, hence of a block's
# best height; further off, the default knows better. What is tuned for counts 16 times apart leaves no gap.
REACH = 4
_REMEMBERED = 4096  # tiles by number of tokens: a server that meets every number up to this asks once for each


@dataclass(frozen=True)
class Tiling:
    """Where the tiles of one implementation come from, for one set of static traits. `str()` says it in words.

    device    the device that rows were looked up for; None where it is not known
    tuned     number of tokens -> tile, ascending; empty: the default serves all
    where     file and line of each tuned tile, by number of tokens
    notes     what else `str()` tells
    """

    device: str | None
    tuned: Mapping[int, Tile] = field(default_factory=dict)
    where: Mapping[int, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    notes: str = ""

    def nearest(self, num_tokens: int) -> int | None:
        """The tuned number of tokens whose tile serves: the nearest in log scale, of two as near the smaller. None
        where that is more than REACH times off, and the default serves."""
        tokens = max(1, num_tokens)

        def off(count: int) -> float:
            return max(count / tokens, tokens / count)

        count = min(self.tuned, key=off, default=None)
        return count if count is not None and off(count) <= REACH else None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """What tuned tiles serve: (first, last) numbers of tokens, apart and ascending."""
        found: list[tuple[int, int]] = []
        for count in self.tuned:
            first, last = -(-count // REACH), count * REACH
            if found and first <= found[-1][1] + 1:
                first = found.pop()[0]
            found.append((first, last))
        return found

    def __str__(self):
        if not self.tuned:
            return f"analytic default; {self.notes}"
        counts = ", ".join(map(str, self.tuned))
        spans = ", ".join(f"{first}-{last}" for first, last in self.spans)
        return f"tuned on {self.device} for {counts} token{'s' * (counts != '1')} ({', '.join(self.rows)}" \
               f"{self.notes}); serves {spans}, others by the default"


class Tuned:
    """The rows of every file, read when first asked for."""

    def __init__(self, catalog: Catalog, files: Iterable[str | Path] = ()):
        self._catalog, self.files = catalog, tuple(files)
        self._rows: dict[tuple[str, str], list[tuple[int, Row]]] | None = None
        self._names: dict[Platform | None, str] = {}

    def read(self) -> None:
        """Reads every file now. Raises for one that is wrong."""
        if self._rows is None:
            rows: dict[tuple[str, str], list[tuple[int, Row]]] = {}
            for strength, path in enumerate(self.files):
                try:
                    found = read_rows(self._catalog, read(path))
                except RegistryError as error:
                    if path != os.environ.get(ENVIRONMENT_VARIABLE):
                        raise
                    raise type(error)(f"{error.message} (in the tiles file that {ENVIRONMENT_VARIABLE} names)",
                                      where=error.where, hint=error.hint) from error
                for row in found:
                    rows.setdefault((row.op, row.implementation), []).append((strength, row))
            self._rows = rows

    def tiling(self, op: Op, implementation: Implementation, traits: Mapping[str, object], *,
               device: str | None = None, ask_torch: bool = False) -> Tiling:
        """The tiling of `implementation`, which declares tiles, for a request's `traits`: on `device`, or on that of
        this machine where the traits are for its platform."""
        self.read()
        wanted = static_traits(op.space, traits)
        device = device or self.device(_platform(op, traits), ask_torch)
        fitting = [(strength, row) for strength, row in self._rows.get((op.name, implementation.name), ())
                   if row.traits == wanted]
        here = installed() if fitting else {}
        of_device = sorted(((strength, row.versions == here, *_order(row.versions), row) for strength, row in fitting
                            if row.device == device), key=lambda found: found[:-1])
        if not of_device:
            others = ", ".join(f"{name} ({where})" for name, where in {r.device: r.where for _, r in fitting}.items())
            return Tiling(device, notes=_nothing(op, implementation, wanted, device, others))
        chosen = {count: row for *_, row in of_device for count in row.tiles}
        chosen = {count: chosen[count] for count in sorted(chosen)}
        used = list({id(row): row for row in chosen.values()}.values())
        foreign = {package: row.versions[package] for row in used for package in row.versions
                   if row.versions != here}
        notes = "".join(f", timed with {package} {number}" for package, number in foreign.items())
        return Tiling(device, {count: row.tiles[count] for count, row in chosen.items()},
                      {count: row.lines[count] for count, row in chosen.items()}, tuple(row.where for row in used),
                      notes)

    def device(self, platform: Platform | None, ask_torch: bool = False) -> str | None:
        """What this machine's device is called, if it is of this platform, else None. AMD's driver tells no name: torch
        does, once its device is initialised, which a kernel that is bound is about to do (`ask_torch`)."""
        if platform is not None and platform.kind in ("cpu", "interpreter"):
            return str(platform)
        if platform not in self._names:
            found, _ = find()
            if platform not in (found.platform, None):
                return None
            name = found.name or (_torch_name() if ask_torch else "")
            if not name:
                return None
            self._names[platform] = name
        return self._names[platform]


def _torch_name() -> str:
    try:
        import torch

        return torch.cuda.get_device_name()
    except Exception:  # no torch, or one without this device: what is bound will say so in its own words
        return ""


def files(registry_file: str | Path, loaded: Sequence[str], environment: bool) -> tuple[str | Path, ...]:
    """Every tiles file, the weakest first."""
    beside = Path(registry_file).with_name(FILE)
    named = os.environ.get(ENVIRONMENT_VARIABLE) if environment else None
    return (*([beside] if beside.is_file() else []), *loaded, *([named] if named else []))


def chooser(op: Op, implementation: Implementation, request: Request, tiling: Tiling | None) -> Callable[[int], Tile]:
    """The keyword `tiles` of the implementation's target. Decides once per number of tokens; asking again is one
    look-up in a dict, in C. A tile is shared by all who ask: it is not to be changed. Imports the implementation's
    module of tiles."""
    traits = _not_dynamic(op, request.traits)
    default = targets.load(f"{implementation.tiles}:default", implementation.where)
    tiling = tiling or Tiling(None)
    for count, tile in tiling.tuned.items():
        expected = form(_proposed(implementation, default(traits, count)))
        if form(tile) != expected:
            raise DocumentError(f"the tile for {count} tokens is not one that {implementation.name} takes: "
                                f"{_apart(form(tile), expected)}", where=tiling.where[count],
                                hint="the kernel has changed since, or a key is misspelt: run `kernel-registry tune` "
                                     "again, or remove the line")

    def choose(num_tokens: int) -> Tile:
        count = tiling.nearest(num_tokens)
        return default(traits, num_tokens) if count is None else tiling.tuned[count]

    return _Remembered(choose).__getitem__


class _Remembered(dict):
    """num_tokens -> tile, asked once for each; emptied when it is full, so that it can't grow for ever."""

    def __init__(self, choose: Callable[[int], Tile]):
        super().__init__()
        self.choose = choose

    def __missing__(self, num_tokens: int) -> Tile:
        if len(self) >= _REMEMBERED:
            self.clear()
        tile = self[num_tokens] = self.choose(num_tokens)
        return tile


def form(tile: Tile, place: str = "") -> dict[str, type]:
    """The names of a tile's values, with their types: {"up.BLOCK_M": int}."""
    found = {}
    for key, value in tile.items():
        found.update(form(value, f"{place}{key}.") if isinstance(value, Mapping) else {f"{place}{key}": type(value)})
    return found


def candidates(op: Op, implementation: Implementation, traits: Mapping[str, object], num_tokens: int) -> list[Tile]:
    """What `tune` tries: the default first, then what the implementation's module proposes, each once. Raises
    TargetError for one that could not stand in a file or has other keys than the default."""
    default, proposed = (targets.load(f"{implementation.tiles}:{name}", implementation.where)
                         for name in ("default", "candidates"))
    found: list[Tile] = []
    traits = _not_dynamic(op, traits)
    for tile in (default(traits, num_tokens), *proposed(traits, num_tokens)):
        if form(_proposed(implementation, tile)) != form(found[0] if found else tile):
            raise TargetError(f"{implementation.tiles} proposes a tile of another form than its default: "
                              f"{_apart(form(tile), form(found[0]))}", where=implementation.where,
                              hint="every tile has the same keys; give those that one does not use a neutral value")
        if not any(_same(tile, other) for other in found):
            found.append(tile)
    return found


def _not_dynamic(op: Op, traits: Mapping[str, object]) -> dict[str, object]:
    """What an implementation's module is told: the same whether the call's dynamic traits are known or left open."""
    return {name: value for name, value in traits.items() if name not in op.space.dynamic}


def _proposed(implementation: Implementation, tile: object) -> Tile:
    try:
        return plain_tile(tile)
    except ValueError as error:
        raise TargetError(f"{implementation.tiles} proposes {tile!r}: {error}", where=implementation.where,
                          hint="a tile is a dict of text to whole numbers, true, false, text or such dicts") from None


def _same(a: Tile, b: Tile) -> bool:
    return a == b and form(a) == form(b)


def _apart(mine: Mapping[str, type], expected: Mapping[str, type]) -> str:
    """Where two forms differ, in words."""
    said = [f"{name} is not among its keys" for name in mine if name not in expected]
    said += [f"{name} is missing" for name in expected if name not in mine]
    said += [f"{name} is a {mine[name].__name__}, expected a {kind.__name__}" for name, kind in expected.items()
             if mine.get(name, kind) is not kind]
    return "; ".join(said)


def _platform(op: Op, traits: Mapping[str, object]) -> Platform | None:
    return next((traits[name] for name, trait in op.space.traits.items() if trait.type == "platform"), None)


def _order(versions: Mapping[str, str]) -> tuple:
    """Sorts newer versions after older ones."""
    return tuple(([int(n) for n in re.findall(r"\d+", versions.get(package, ""))], versions.get(package, ""))
                 for package in PACKAGES)


def _nothing(op: Op, implementation: Implementation, traits: Mapping[str, object], device: str | None,
             others: str) -> str:
    if device is None:
        return "the device is not known here" + (f"; tuned for these traits on {others}" if others else "")
    told = f"nothing tuned for these traits on {device}" + (f", but on {others}" if others else "")
    if device in ("cpu", "interpreter"):
        return told
    return f"{told} (kernel-registry tune {op.name} {said(op, traits)} --implementation {implementation.name})"


def said(op: Op, traits: Mapping[str, object]) -> str:
    """The static traits that differ from their default, as the command line takes them."""
    return " ".join(f"{name}={written(value)}" for name, value in static_traits(op.space, traits).items()
                    if op.space.traits[name].default is REQUIRED or op.space.traits[name].default != value)
