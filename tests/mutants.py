"""Mutants: the ops with one place of their source changed, to see that a suite finds the bug."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernel_registry import ops

OPS = Path(ops.__file__).parent
_numbers = itertools.count()


@contextmanager
def copied(file: str = "", place: str = "", changed: str = ""):
    """A private copy of the ops in which `place`, which stands once in `file`, is another text; a function that imports
    a module of it. Without a file the copy is as the ops are. What it imported is forgotten in the end."""
    name = f"mutant_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        copy = Path(folder, name)
        for family in (path.parent for path in OPS.glob("*/__init__.py")):  # not ops/__init__.py: it has another name
            shutil.copytree(family, copy / family.name, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            text = (copy / file).read_text()
            assert text.count(place) == 1, f"{file} has {place!r} {text.count(place)} times, the mutant needs it once"
            (copy / file).write_text(text.replace(place, changed))
        patch.syspath_prepend(folder)
        try:
            yield lambda module: importlib.import_module(f"{name}.{module}")
        finally:
            for module in [m for m in sys.modules if m.split(".")[0] == name]:
                del sys.modules[module]
