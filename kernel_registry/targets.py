"""`module:attribute` strings: imported when first needed, named in full when they can't be."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from pathlib import Path

from .errors import TargetError

FORM = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"


def is_target(text: object) -> bool:
    """Whether `text` has the form module:attribute."""
    return isinstance(text, str) and re.fullmatch(FORM, text) is not None


def load(target: str, where: object = None):
    """The object `target` names. Raises TargetError with the original error and the line that named it."""
    module_name, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # an import can fail in any way: a missing driver, a syntax error, a missing package
        raise TargetError(f"target {target!r} can't be imported: {type(error).__name__}: {error}", where=where,
                          hint=f"try `python -c 'import {module_name}'`, or disable the implementation") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise TargetError(f"target {target!r}: module {module_name!r} has no {attribute!r}", where=where,
                              hint=f"define it in {module_name}, or correct the name") from None
    return found


def source_file(target: str) -> Path | None:
    """The file that defines the target's module, found without importing it or the packages it is in (which may well
    import torch, or fail); None when there is none."""
    path, spec, name = None, None, ""
    for part in target.partition(":")[0].split("."):
        if spec is not None and path is None:
            return None  # a module that is no package has nothing inside
        name = f"{name}.{part}" if name else part
        loaded = sys.modules.get(name)
        spec = getattr(loaded, "__spec__", None) or _find(name, path)
        if spec is None:
            return None
        path = getattr(loaded, "__path__", None) or spec.submodule_search_locations
    return Path(spec.origin) if spec.origin and spec.has_location else None


def _find(name: str, path):
    """What importlib.util.find_spec finds, given the search path of the package instead of importing it."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # a foreign finder may fail in any way: then it has not found it
            continue
        if spec is not None:
            return spec
    return None


def source_hash(target: str, *more: str, data: str = "") -> str:
    """Sixteen hex digits over the target's name and the sources of its package folder, so that a helper that changed
    beside the kernel changes the hash too; over those of `more` targets and over `data`, where given. A target without
    a source file hashes its name alone."""
    digest, folders = hashlib.sha256(), set()
    for name in (target, *more):
        digest.update(name.encode())
        path = source_file(name)
        if path is not None and path.parent not in folders:
            folders.add(path.parent)
            for file in sorted(path.parent.glob("*.py")) or [path]:
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update(data.encode())
    return digest.hexdigest()[:16]
