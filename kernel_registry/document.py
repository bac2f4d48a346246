"""YAML files, read safely and with the line of every value.

`read` turns a file into plain data (dict, list, str, int, float, bool, None) and remembers where each value stood, so
that whoever finds fault with a value later can name file and line. It refuses what makes a configuration file lie:
duplicate keys, tags, keys that are not text, and anchors that expand without bound.
"""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .errors import DocumentError

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_MAX_DEPTH = 100  # a registry needs eight; far above this libyaml, which recurses in C, dies without an exception
_MAX_ALIAS_VISITS = 10_000  # a "billion laughs" file passes this at once; no honest one comes near it


@contextmanager
def paused_collection():
    """No garbage collection inside: reading makes hundreds of thousands of objects and no cycles, and walking them all
    again and again took a third of the time for ten thousand implementations."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class Document:
    """`data` as plain Python values; `lines` maps a path of keys and indices to its 1-based line."""

    source: str
    data: object
    lines: dict[tuple, int] = field(repr=False)

    def where(self, path: tuple = ()) -> str:
        """"file:line" of the value at `path`, or of its closest parent that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source}:{self.lines.get(path, 1)}"


def read(path: str | Path) -> Document:
    """The document in the file `path`. Raises `DocumentError` for a missing, unreadable or malformed file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a path with a null byte
        raise DocumentError(f"can't be read: {error}", where=path, hint="name a readable YAML file") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """The document in `text`; `source` names it in errors."""
    import yaml

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = None
    try:
        _refuse_depth(yaml, kind(text), source)
        loader = kind(text)
        node = loader.get_single_node()
        builder = _Builder(source, loader)
        data = builder.build(node, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DocumentError(f"is not YAML: {problem}", where=where,
                            hint="check indentation, quotes and brackets") from None
    finally:
        if loader is not None:
            loader.dispose()
    return Document(source, data, builder.lines)


def write_whole(path: str | Path, text: str) -> None:
    """Writes the file whole or not at all: a temporary file beside it, then a rename."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_depth(yaml, loader, source: str) -> None:
    """Reads the events, which come one by one whatever the depth, before the tree is composed, which recurses."""
    depth = 0
    try:
        while loader.check_event():
            event = loader.get_event()
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise _too_deep(source, event.start_mark)
    except yaml.scanner.ScannerError as error:
        if "nesting depth" in (error.problem or ""):  # newer builds of libyaml have a bound, and meet it looking ahead
            raise _too_deep(source, error.problem_mark) from None
        raise
    finally:
        loader.dispose()


def _too_deep(source: str, mark) -> DocumentError:
    return DocumentError(f"is nested too deeply to be a registry (more than {_MAX_DEPTH} levels)",
                         where=f"{source}:{mark.line + 1}", hint="a registry needs about eight")


class _Builder:
    """Walks PyYAML's node tree once, so that positions, duplicates and alias growth are all seen in one place."""

    def __init__(self, source: str, loader):
        self.source, self.loader, self.lines = source, loader, {}
        self.seen: set[int] = set()
        self.open: set[int] = set()
        self.alias_visits = 0

    def where(self, node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"

    def build(self, node, path: tuple):
        if id(node) in self.open:
            raise DocumentError("an anchor contains itself", where=self.where(node), hint="write the value out")
        if id(node) in self.seen or self.alias_visits:  # inside an expanded alias every node counts again
            self.alias_visits += id(node) in self.seen
            if self.alias_visits > _MAX_ALIAS_VISITS:
                raise DocumentError(
                    f"anchors expand to more than {_MAX_ALIAS_VISITS} values", where=self.where(node),
                    hint="write the values out; a registry needs no nested anchors")
        self.seen.add(id(node))
        self.open.add(id(node))
        if node.tag not in _TAGS:
            raise DocumentError(f"a value has the YAML type {node.tag.rsplit(':', 1)[-1]!r}", where=self.where(node),
                                hint="only text, numbers, true/false, null, lists and mappings are read; "
                                     "quote it if it is text")
        self.lines.setdefault(path, node.start_mark.line + 1)
        try:
            return getattr(self, "_" + node.id)(node, path)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node, path):
        result: dict[str, object] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar" or key_node.tag == "tag:yaml.org,2002:merge":
                raise DocumentError("a key must be plain text (no merge keys, lists or mappings)",
                                    where=self.where(key_node))
            key = key_node.value
            if key in result:
                raise DocumentError(f"key {key!r} is given twice (first on line {first[key]})",
                                    where=self.where(key_node),
                                    hint="remove one; the last would otherwise win silently")
            first[key] = line
            self.lines[(*path, key)] = line  # the key's own line: what a person looks for
            result[key] = self.build(value_node, (*path, key))
        return result

    def _sequence(self, node, path):
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node, path):
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            raise DocumentError(f"value {node.value!r}: {error}", where=self.where(node)) from None
