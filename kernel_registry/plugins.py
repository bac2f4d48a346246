"""Plugins: installed packages that contribute registry files, through the entry-point group `kernel_registry.plugins`.

An entry point names a function without arguments that returns the path of a registry file, or several. A plugin is
taken whole or not at all: if it can't be imported, or its files don't fit with what is loaded so far, it is left out
and reported (a warning, `kernel-registry list`, Registry.state.plugin_failures), and everything else works.
"""

from __future__ import annotations

import warnings
from typing import Iterable, NamedTuple

from .catalog import Source, build
from .document import read
from .schema import RegistryFile, validate

GROUP = "kernel_registry.plugins"


class PluginFailure(NamedTuple):
    """A plugin that was left out, and why."""

    name: str
    error: str


def plugin_sources(sources: list[Source], entry_points: Iterable | None = None
                   ) -> tuple[list[Source], tuple[PluginFailure, ...]]:
    """`sources` and those of every plugin that fits, in order of plugin name; the failures of the others."""
    failures = []
    for entry_point in sorted(_installed() if entry_points is None else entry_points, key=lambda e: (e.name, e.value)):
        try:
            contributed = _read(entry_point)
            build([*sources, *contributed])  # a plugin that collides or is ambiguous must not take the rest down
        except Exception as error:  # whatever a plugin raises is its own failure
            failures.append(PluginFailure(entry_point.name, f"{type(error).__name__}: {error}"))
            warnings.warn(f"kernel_registry plugin {entry_point.name!r} is left out: {error}", RuntimeWarning,
                          stacklevel=2)
        else:
            sources = [*sources, *contributed]
    return sources, tuple(failures)


def _read(entry_point) -> list[Source]:
    answer = entry_point.load()()
    paths = answer if isinstance(answer, (list, tuple)) else [answer]
    documents = [read(path) for path in paths]
    return [(document, validate(RegistryFile, document).ops) for document in documents]


def _installed():
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)
