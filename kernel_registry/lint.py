"""What is wrong, or suspicious, in a registry file, found without a GPU and without importing a kernel.

Errors are what loading refuses (ambiguities, contradictions, unknown names, wrong values). Warnings are entries that
load but can't do what they seem to: never chosen, serving nothing, a target that isn't there, calls nobody serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, NamedTuple

from . import targets
from .catalog import Catalog, Implementation, Op, build
from .competition import bits, relations
from .coverage import search
from .document import paused_collection, read
from .errors import RegistryError
from .predicates import Platforms
from .schema import RegistryFile, validate
from .traits.platform import KNOWN
from .traits.trait import written


class Finding(NamedTuple):
    """`level` is "error" or "warning"; `where` is "file:line"."""

    level: str
    where: str
    message: str

    def __str__(self):
        return f"{self.where}: {self.level}: {self.message}"


@paused_collection()
def lint_file(path: str | Path) -> list[Finding]:
    """Findings for one registry file on its own."""
    try:
        document = read(path)
        catalog = build([(document, validate(RegistryFile, document).ops)])
    except RegistryError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return [Finding("error", str(error.where or path), error.message + hint)]
    return lint_catalog(catalog, str(path))


def lint_catalog(catalog: Catalog, source: str = "registry") -> list[Finding]:
    """Findings for everything that is loaded: warnings, and errors only where a Python check can't be asked, since a
    catalog with other errors does not exist."""
    return [finding for op in catalog.ops.values() for finding in _lint_op(op, source)]


def _lint_op(op: Op, source: str) -> Iterator[Finding]:
    first = op.implementations[0].where if op.implementations else source
    if not op.implementations:
        yield Finding("warning", first, f"{op.name} has no implementation")
        return
    yield from _shadowed(op)
    broken = False
    for implementation in op.implementations:
        whole = op.by_name.get(implementation.variant_of)  # what a variant has from there is told there
        if whole is None and targets.source_file(implementation.target) is None:
            yield Finding("warning", implementation.where, f"{implementation.name}: the module of target "
                          f"{implementation.target!r} is not installed here")
        if whole is None and implementation.tiles and targets.source_file(f"{implementation.tiles}:default") is None:
            yield Finding("warning", implementation.where, f"{implementation.name}: the module of its tiles, "
                          f"{implementation.tiles!r}, is not installed here")
        if whole is None and implementation.prepare and targets.source_file(implementation.prepare) is None:
            yield Finding("warning", implementation.where, f"{implementation.name}: the module of its preparation, "
                          f"{implementation.prepare!r}, is not installed here")
        if whole is None or whole.box.sets.get("platform") is not implementation.box.sets.get("platform"):
            yield from _unknown_architectures(implementation)
        try:
            if _serves_nothing(op, implementation):
                yield Finding("warning", implementation.where, f"{implementation.name} serves nothing: no call that "
                              "was tried satisfies both its `when` and the relations of the contract")
        except RegistryError as error:
            broken = True
            yield Finding("error", str(error.where), error.message)
    if broken:
        return  # what a check that can't be asked would serve is unknown
    gap = search(op, lambda traits: not any(i.box.admits(traits) for i in op.implementations), op.implementations,
                 covered=True)
    if gap.witness is not None:
        shown = ", ".join(f"{n}={written(v)}" for n, v in gap.witness.items() if n in op.space.traits)
        yield Finding("warning", first, f"{op.name}: nothing serves {shown}")
    elif not gap.complete:
        yield Finding("warning", first, f"{op.name}: too many combinations to prove that every call is served; "
                      "none of those tried is unserved")


def _serves_nothing(op: Op, implementation: Implementation) -> bool:
    def admitted(traits):
        return implementation.box.admits(traits)

    for dense in (False, True):
        inside = search(op, admitted, (implementation,), dense=dense)
        if inside.witness is not None or not inside.complete:
            return False
    return True


def _shadowed(op: Op) -> Iterator[Finding]:
    _, wider, narrower = relations([i.box for i in op.implementations])
    for index, implementation in enumerate(op.implementations):  # an earlier one with the same box wins always
        for other in bits(wider[index] & narrower[index] & ((1 << index) - 1)):
            yield Finding("warning", implementation.where, f"{implementation.name} is never chosen: "
                          f"{op.implementations[other]} has the same box and goes first (only an override reaches it)")
            break


def _unknown_architectures(implementation: Implementation) -> Iterator[Finding]:
    values = implementation.box.sets.get("platform")
    if isinstance(values, Platforms):
        for pattern in values.patterns:
            if not any(pattern.matches(platform) for platform in KNOWN):
                yield Finding("warning", implementation.where, f"{implementation.name}: platform {pattern} matches "
                              f"none of the known ones ({', '.join(map(str, KNOWN))})")
