"""Files of tuned tiles: reading one against a catalog, and writing one more tile into one.

A row says which launch parameters (a "tile") were the fastest of those tried, by number of tokens, for one
implementation with one set of static traits on one device. What is read is checked whole before any of it is used.
Writing edits lines, so that whatever else stands in the file, comments included, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Iterator, Mapping

from . import aliasing
from .catalog import Catalog, Op
from .contract import TraitSpace
from .document import Document, parse, read, write_whole
from .errors import DocumentError, RegistryError, TraitError, suggestion
from .schema import TilesEntry, TilesFile, validate
from .traits.platform import Platform
from .traits.trait import REQUIRED

PACKAGES = ("torch", "triton")
HEADER = "# Written by `kernel-registry tune`: what was the fastest, and right. docs/tiles.md says how it is used.\n"

Tile = Mapping[str, object]


@dataclass(frozen=True)
class Row:
    """One entry of a file. `traits` are canonical and complete but for the platform, derived and dynamic ones; `place`
    is its index in the file, `where` its file and line, and `lines` has the file and line of each tile."""

    device: str
    op: str
    implementation: str
    traits: Mapping[str, object]
    versions: Mapping[str, str]
    tiles: Mapping[int, Tile]
    where: str = ""
    lines: Mapping[int, str] | None = None
    place: int = -1

    @property
    def identity(self) -> tuple:
        """What no two rows of a file share."""
        return self.device, self.op, self.implementation, tuple(self.traits.values()), tuple(self.versions.items())


def static_traits(space: TraitSpace, traits: Mapping[str, object]) -> dict[str, object]:
    """Those of a request's canonical `traits` that a row is for. Where the result goes makes no other tile fast."""
    return {name: traits[name] for name, trait in space.traits.items()
            if trait.type != "platform" and not trait.dynamic and name != aliasing.TRAIT}


def installed() -> dict[str, str]:
    """The versions here of what compiles kernels, those that are absent left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # 2.11.0+cu128: the build says nothing about a tile
        except PackageNotFoundError:
            pass
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_rows(catalog: Catalog, document: Document) -> tuple[Row, ...]:
    """The rows of a tiles file. Raises for the first thing that is wrong, with its line."""
    rows: dict[tuple, Row] = {}
    for index, entry in enumerate(validate(TilesFile, document).tiles):
        row = _row(catalog, document, index, entry)
        first = rows.setdefault(row.identity, row)
        if first is not row:
            raise DocumentError(f"the same device, implementation, traits and versions as at {first.where}",
                                where=row.where, hint="one row holds all numbers of tokens: move them there")
    return tuple(rows.values())


def _row(catalog: Catalog, document: Document, index: int, entry: TilesEntry) -> Row:
    path = ("tiles", index)
    op = catalog.op(entry.op, document.where((*path, "op")))
    implementation = op.implementation(entry.implementation, document.where((*path, "implementation")))
    if not implementation.tiles:
        able = [i.name for i in op.implementations if i.tiles]
        raise DocumentError(f"{implementation.name} takes no tiles (its entry at {implementation.where} declares none)",
                            where=document.where((*path, "implementation")), hint=suggestion(implementation.name, able))
    traits = _traits(op, entry.traits, lambda name=None: document.where((*path, "traits", *([name] if name else []))))
    lines = {int(count): document.where((*path, "num_tokens", count)) for count in entry.num_tokens}
    tiles = {int(count): tile for count, tile in entry.num_tokens.items()}
    return Row(entry.device, op.name, implementation.name, traits, entry.versions.model_dump(exclude_none=True), tiles,
               document.where(path), lines, index)


def _traits(op: Op, given: Mapping[str, object], where) -> dict[str, object]:
    """`given` made canonical and complete."""
    for name, value in given.items():
        try:
            trait = op.space.trait(name)
            if trait.dynamic or trait.type == "platform" or name in op.space.derived:
                instead = "stands under `num_tokens`" if name == "num_tokens" else "goes with the device" \
                    if trait.type == "platform" else "is left to the call" if trait.dynamic else "is derived"
                raise TraitError(f"{name} is no trait of a row: it {instead}", hint=f"remove `{name}`")
            trait.parse(value)
        except ValueError as error:
            if not isinstance(error, RegistryError):
                error = TraitError(str(error))
            raise type(error)(error.message, where=where(name), hint=error.hint) from None
    try:
        request = op.space.request(given, lambda: Platform("cpu"))
    except RegistryError as error:
        raise type(error)(error.message, where=where(), hint=error.hint) from None
    return static_traits(op.space, request.traits)


# ---- writing ---------------------------------------------------------------------------------------------------------

def open_rows(catalog: Catalog, path: Path) -> tuple[str, Document, tuple[Row, ...]]:
    """(text, document, rows) of the file at `path`, or of a new one where there is none."""
    if not path.exists():
        text = f"{HEADER}version: 1\ntiles: []\n"
        document = parse(text, str(path))
    else:
        document = read(path)
        text = path.read_text(encoding="utf-8-sig")
    return text, document, read_rows(catalog, document)


def add_tile(catalog: Catalog, path: str | Path, row: Row, count: int) -> None:
    """Writes the tile of `row` for `count` tokens into the file at `path`, whole or not at all. Every other tile and
    every comment stays; a file that is not laid out as this module does it is refused."""
    path = Path(path)
    text, document, rows = open_rows(catalog, path)
    old = next((r for r in rows if r.identity == row.identity), None)
    lines = text.splitlines()
    if old is None:
        lines = [line if line.strip() != "tiles: []" else "tiles:" for line in lines]
        lines += _entry(catalog.op(row.op).space, row, count)
    else:
        _edit(lines, document, old, count, _line(count, row.tiles[count]))
    fresh = "\n".join(lines) + "\n"
    wanted = {r.identity: dict(r.tiles) for r in rows}
    wanted.setdefault(row.identity, {})[count] = row.tiles[count]
    if not _says(catalog, fresh, path, wanted):
        raise DocumentError("is not laid out as `kernel-registry tune` does it: a line could not be added without "
                            "changing others", where=old.where if old else path,
                            hint="one line for each number of tokens, as docs/tiles.md shows; or name another file")
    try:
        write_whole(path, fresh)
    except OSError as error:
        raise DocumentError(f"can't be written: {error}", where=path, hint="name a file that can be written") from error


def _says(catalog: Catalog, text: str, path: Path, wanted: dict) -> bool:
    try:
        return {r.identity: dict(r.tiles) for r in read_rows(catalog, parse(text, str(path)))} == wanted
    except RegistryError:
        return False


def _edit(lines: list[str], document: Document, old: Row, count: int, line: str) -> None:
    """Replaces the line of `count`, or puts one in the order of the counts."""
    at = {n: document.lines["tiles", old.place, "num_tokens", str(n)] - 1 for n in old.tiles}
    if count in at:
        found = lines[at[count]].find(" #")
        lines[at[count]] = line + (" " + lines[at[count]][found:] if found >= 0 else "")
        return
    above = [n for n in at if n < count]
    lines.insert(at[max(above)] + 1 if above else at[min(at)], line)


def _entry(space: TraitSpace, row: Row, count: int) -> Iterator[str]:
    said = {name: value for name, value in row.traits.items()
            if space.traits[name].default is REQUIRED or space.traits[name].default != value}
    yield f"- device: {_flow(row.device)}"
    yield f"  op: {_flow(row.op)}"
    yield f"  implementation: {_flow(row.implementation)}"
    yield f"  traits: {_flow(said)}"
    yield f"  versions: {_flow(dict(row.versions))}"
    yield "  num_tokens:"
    yield _line(count, row.tiles[count])


def _line(count: int, tile: Tile) -> str:
    return f"    {count}: {_flow(tile)}"


def _flow(value: object) -> str:
    """`value` as YAML in one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
