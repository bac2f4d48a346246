"""A search through an op's trait space, one representative value per piece on which every box is of one mind.

Depth first over the traits, with the implementations still alive at each node. A subtree that an implementation without
further conditions serves entirely is not entered, so an op with a catch-all costs one step.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Callable, Mapping, NamedTuple, Sequence

from .catalog import Implementation, Op
from .expressions import Expression
from .predicates import ANY, Ints
from .traits.platform import KNOWN
from .traits.trait import REQUIRED, Trait

_BUDGET = 400_000  # box tests before the search gives up; under two seconds
_SIZES = (1, 2, 8, 64, 256)  # sizes tried for a number even where no box mentions it, so that relations have material
_DENSE = 1024  # how many values of a number are tried one by one where relations had too little material
_DENSE_BUDGET = 50_000
_DTYPES = ("float32", "bfloat16", "float16")  # what callers commonly have; a call with int64 logits needs no kernel
_OTHER = "something-else"  # stands for every word that no box mentions


class Found(NamedTuple):
    """`witness` is a full set of traits, or None; `complete` tells whether every combination was tried or excluded."""

    witness: Mapping[str, object] | None
    complete: bool


def representatives(op: Op, trait: Trait, implementations: Sequence[Implementation], dense: bool = False) -> list:
    """Values of one trait: on and across every boundary that a box draws, the neutral value, the known domain, and a
    word that nothing mentions. `dense`: of a number that relations read, also those in between."""
    if trait.type == "platform":
        return list(KNOWN)
    if trait.type == "bool":
        return [True, False]
    values = set(trait.choices)
    for implementation in implementations:
        found = implementation.box.sets.get(trait.name)
        values |= set(found.edges()) if found is not None else set()
    if trait.default is not REQUIRED:
        values.add(trait.default)
    if trait.type == "int":
        domain = op.space.value_set(trait, ANY)
        values |= {*_SIZES, *_mentioned(op, trait, implementations)}
        if dense and any(trait.name in expression.names for expression in _expressions(op, implementations)):
            values |= {v for i in implementations for v in _first(i.box.sets.get(trait.name, domain))}
        values = {v for v in values if domain.admits(v)}
    elif trait.type == "dtype":
        values |= set(_DTYPES)
    elif not trait.choices:
        values.add(_OTHER)
    return sorted(values, key=lambda v: (str(type(v)), v))


def _expressions(op: Op, implementations: Sequence[Implementation]) -> list[Expression]:
    return [*op.space.relations, *op.space.derived.values(), *(r for i in implementations for r in i.box.relations)]


def _mentioned(op: Op, trait: Trait, implementations: Sequence[Implementation]) -> set[int]:
    """Numbers written in an expression that reads the trait, and their neighbours."""
    return {n + d for expression in _expressions(op, implementations) if trait.name in expression.names
            for n in _numbers(expression.text) for d in (-1, 0, 1)}


@lru_cache(maxsize=1024)
def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\b\d+\b", text)))


def _first(values: Ints) -> set[int]:
    """The first `_DENSE` values of each range."""
    out: set[int] = set()
    for low, high in values.ranges:
        start = int(low) if low != float("-inf") else 0
        out |= set(range(start, min(int(high), start + _DENSE) + 1 if high != float("inf") else start + _DENSE))
    return out


def search(op: Op, wanted: Callable[[Mapping[str, object]], bool], implementations: Sequence[Implementation], *,
           covered: bool = False, dense: bool = False) -> Found:
    """A legal combination of traits for which `wanted` holds. `covered` looks for what nothing serves: then a subtree
    is left as soon as one implementation serves all of it; otherwise as soon as none of `implementations` is alive."""
    names = list(op.space.traits)
    values = {name: representatives(op, trait, implementations, dense) for name, trait in op.space.traits.items()}
    budget = _DENSE_BUDGET if dense else _BUDGET
    # A trait that few boxes mention splits least: asking it late keeps the tree narrow.
    mentions = {n: sum(n in i.box.sets for i in implementations) for n in names}
    if not any(i.box.checks for i in implementations):  # a check may read anything
        related = {name for expression in _expressions(op, implementations) for name in expression.names}
        for n in names:  # where boxes tell no values apart, any value that is served stands for all
            if n not in related and mentions[n] <= (not covered and len(implementations) == 1):
                values[n] = [next((v for v in (op.space.traits[n].default, *values[n]) if v is not REQUIRED and all(
                    n not in i.box.sets or i.box.sets[n].admits(v) for i in implementations)), values[n][0])]
    names.sort(key=lambda n: (-mentions[n], len(values[n])))
    spent = 0

    def descend(depth: int, traits: dict[str, object], alive: list[Implementation]) -> Mapping[str, object] | None:
        nonlocal spent
        if not covered and not alive:
            return None
        if covered and any(_free_of(i, names[depth:], op) for i in alive):
            return None
        if depth == len(names):
            full = op.space.complete(traits)
            return full if full is not None and wanted(full) else None
        name = names[depth]
        for value in values[name]:
            spent += 1 + len(alive)
            if spent > budget:
                return None
            traits[name] = value
            still = [i for i in alive if name not in i.box.sets or i.box.sets[name].admits(value)]
            found = descend(depth + 1, traits, still)
            if found is not None:
                return found
        traits.pop(name, None)
        return None

    witness = descend(0, {}, list(implementations))
    return Found(witness, spent <= budget)


def _free_of(implementation: Implementation, names: Sequence[str], op: Op) -> bool:
    box = implementation.box
    unmet = set(box.relations) - set(op.space.relations)  # the contract's own relations hold for every legal call
    return not unmet and not box.checks and not any(n in box.sets for n in (*names, *op.space.derived))
