"""What exists: ops and their implementations, read from registry files, checked, and put in order.

Implementations of an op are ordered once, at load: no fallback before a kernel, higher rank first, provably narrower
first. A call goes to the first that admits it. Two that could admit one call while nothing says which goes first are
an error here, so that no accident of registration order ever decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Iterable, Mapping

from . import aliasing, targets
from .box import Box, read_box
from .competition import bits, relations
from .contract import Contract, TraitSpace
from .document import Document
from .errors import AmbiguityError, DocumentError, TargetError, TraitError, UnknownNameError, suggestion
from .schema import OpEntry, VariantEntry


@dataclass(frozen=True, eq=False)
class Implementation:
    """One kernel as declared. `where` is the file and line of its entry."""

    op: str
    name: str
    target: str
    box: Box
    where: str
    summary: str = ""
    rank: int = 0
    fallback: bool = False
    numerics: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    accepts_output_alias: bool = False
    tiles: str = ""  # the module that has `default` and `candidates`, where the target takes tiles
    prepare: str = ""  # the function that makes its prepared arguments, where it takes such
    variant_of: str = ""  # the name of the implementation under whose `variants` it stands

    @property
    def precedence(self) -> tuple[bool, int]:
        """Smaller goes first; among equals the narrower box does."""
        return (self.fallback, -self.rank)

    def __str__(self):
        return f"{self.name} ({self.where})"


@dataclass(frozen=True, eq=False)
class Op:
    """An op: its contract, trait space, and implementations in the order in which they are asked."""

    name: str
    contract: type[Contract]
    contract_target: str
    space: TraitSpace
    implementations: tuple[Implementation, ...]
    by_name: Mapping[str, Implementation] = field(repr=False)

    def implementation(self, name: object, where: object = None) -> Implementation:
        """The implementation called `name`. Raises UnknownNameError with a suggestion."""
        try:
            return self.by_name[name]
        except (KeyError, TypeError):
            raise UnknownNameError(f"{self.name} has no implementation {name!r}", where=where,
                                   hint=suggestion(name, self.by_name)) from None


@dataclass(frozen=True, eq=False)
class Catalog:
    """Every op, immutable. A change builds a new one and swaps it whole."""

    ops: Mapping[str, Op]

    def op(self, name: object, where: object = None) -> Op:
        """The op called `name`. Raises UnknownNameError with a suggestion."""
        try:
            return self.ops[name]
        except (KeyError, TypeError):
            raise UnknownNameError(f"no op {name!r}", where=where, hint=suggestion(name, self.ops)) from None


Source = tuple[Document, Mapping[str, OpEntry]]


def build(sources: Iterable[Source]) -> Catalog:
    """The catalog of all `sources` together. Raises for anything that would make a choice accidental or impossible."""
    sources = list(sources)
    contracts: dict[str, tuple[str, str]] = {}
    for document, ops in sources:
        for name, entry in ops.items():
            if entry.contract is None:
                continue
            where = document.where(("ops", name, "contract"))
            if name in contracts and contracts[name][0] != entry.contract:
                raise DocumentError(f"{name} has two contracts: {entry.contract} here, {contracts[name][0]} at "
                                    f"{contracts[name][1]}", where=where,
                                    hint="an op has one contract; leave `contract` out where implementations are added")
            contracts.setdefault(name, (entry.contract, where))
    spaces = {name: _space(name, target, where) for name, (target, where) in contracts.items()}
    found: dict[str, dict[str, Implementation]] = {name: {} for name in contracts}
    for document, ops in sources:
        for name, entry in ops.items():
            if name not in contracts:
                raise UnknownNameError(f"op {name!r} has no contract", where=document.where(("ops", name)),
                                       hint="add `contract: module:Class`; " + suggestion(name, contracts))
            for implementation in _read(document, name, entry, spaces[name]):
                first = found[name].setdefault(implementation.name, implementation)
                if first is not implementation:
                    raise DocumentError(f"{name} has two implementations called {implementation.name!r} "
                                        f"(the first at {first.where})", where=implementation.where,
                                        hint="rename one; the last would otherwise replace the first silently")
    return Catalog({name: Op(name, spaces[name].contract, contracts[name][0], spaces[name],
                             _ordered(name, tuple(named.values())), named) for name, named in found.items()})


def _space(op: str, target: str, where: str) -> TraitSpace:
    contract = targets.load(target, where)
    if not (isinstance(contract, type) and issubclass(contract, Contract)):
        raise TargetError(f"{target} is not a subclass of kernel_registry.contract.Contract", where=where,
                          hint="`contract` names the op's class, e.g. kernel_registry.ops.moe.topk.contract:TopK")
    try:
        return TraitSpace(op, contract)
    except TraitError as error:
        raise TraitError(f"contract {target}: {error.message}", where=where, hint=error.hint) from None


def _read(document: Document, op: str, entry: OpEntry, space: TraitSpace) -> Iterable[Implementation]:
    for name, item in entry.implementations.items():
        path = ("ops", op, "implementations", name)
        _refuse_traits(document, path, name, item.options, space)
        _refuse_two_tiles(document, path, name, item.tiles, item.options, space)
        box = read_box(space, item.when, closed=True,
                       where=lambda key: document.where((*path, "when", *key) if key else path))
        whole = Implementation(op, name, item.target, box, document.where(path), item.summary, item.rank, item.fallback,
                               item.numerics, item.options, item.accepts_output_alias, item.tiles or "",
                               item.prepare or "")
        if whole.accepts_output_alias and aliasing.TRAIT not in space.traits:
            raise DocumentError(f"{name} accepts an output that {op} never gets: its contract has no trait "
                                f"{aliasing.TRAIT}", where=document.where((*path, "accepts_output_alias")),
                                hint="drop the line")
        if whole.prepare and not space.contract.prepared:
            raise DocumentError(f"{name} declares a preparation, but no argument of {op} is one: "
                                f"{space.contract.__name__}.prepared is empty",
                                where=document.where((*path, "prepare")),
                                hint="name the arguments there, or drop the line")
        yield whole
        for short, variant in item.variants.items():
            yield _variant(document, (*path, "variants", short), whole, variant, space)


def _variant(document: Document, path: tuple, whole: Implementation, entry: VariantEntry, space: TraitSpace
             ) -> Implementation:
    """The implementation that `entry` makes of `whole`. From here on nothing but its `variant_of` tells it apart from
    one that is written out."""
    name = f"{whole.name}.{path[-1]}"
    _refuse_traits(document, path, name, entry.options, space)
    _refuse_two_tiles(document, path, name, whole.tiles, entry.options, space)
    own = read_box(space, entry.when, lambda key: document.where((*path, "when", *key)), closed=False)
    wider = [trait for trait, values in whole.box.sets.items() if trait in entry.when
             and not (trait in own.sets and values.covers(own.sets[trait]))]
    if wider:  # else the order of the two would be open, and a rule for the implementation would reach other calls
        apart = "; ".join(f"{t} is {own.sets.get(t, 'any')}, {whole.name} serves {whole.box.sets[t]}" for t in wider)
        raise DocumentError(f"{name} is not provably inside {whole.name} ({whole.where}), whose variant it is: {apart}",
                            where=document.where((*path, "when", wider[0])),
                            hint=f"narrow it, widen {whole.name}, or write it out as an implementation of its own")
    box = Box({**whole.box.sets, **own.sets}, whole.box.relations + own.relations, whole.box.checks + own.checks,
              space.dynamic)
    if box.covers(whole.box):
        raise DocumentError(f"{name} declares the same box as {whole.name} ({whole.where}), whose variant it is: one "
                            "of the two could never be chosen", where=document.where(path),
                            hint=f"narrow it with a line in its `when`, or give its options to {whole.name}")
    return replace(whole, name=name, box=box, where=document.where(path), summary=entry.summary or whole.summary,
                   rank=whole.rank if entry.rank is None else entry.rank, options={**whole.options, **entry.options},
                   variant_of=whole.name)


def _refuse_traits(document: Document, path: tuple, name: str, options: Iterable[str], space: TraitSpace) -> None:
    for option in options:
        if option in space.all:
            raise DocumentError(f"option {option!r} of {name} is a trait of {space.op}",
                                where=document.where((*path, "options", option)),
                                hint="say in `when` which of its values are served, or rename the option")


def _refuse_two_tiles(document: Document, path: tuple, name: str, module: str | None, options: Iterable[str],
                      space: TraitSpace) -> None:
    """The target gets one keyword `tiles`."""
    other = "a trait" if "tiles" in space.all else "an option" if "tiles" in options else ""
    if module and other:
        key = ("options", "tiles") if other == "an option" else ("tiles",)
        raise DocumentError(f"{name} declares tiles, and {other} is called `tiles` too", where=document.where(
            (*path, *key)), hint=f"the target is given the keyword `tiles`: rename {other.partition(' ')[2]}")


def _ordered(op: str, implementations: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """Best first. Raises AmbiguityError for a pair that competes without an order, or whose rank contradicts it."""
    meets, wider, narrower = relations([i.box for i in implementations])
    peers: dict[tuple[bool, int], int] = {}  # precedence -> mask of the implementations that have it
    for index, implementation in enumerate(implementations):
        peers[implementation.precedence] = peers.get(implementation.precedence, 0) | 1 << index
    earlier, mask = {}, 0  # precedence -> mask of those that go first whatever their box
    for precedence in sorted(peers):
        earlier[precedence] = mask
        mask |= peers[precedence]
    for index, this in enumerate(implementations):
        for other in bits(wider[index] & ~narrower[index] & earlier[this.precedence]):
            raise _contradiction(this, implementations[other])
        rivals = meets[index] & peers[this.precedence] & ~(wider[index] ^ narrower[index]) & ~(1 << index)
        for other in bits(rivals):
            raise _ambiguity(op, this, implementations[other], same=bool(wider[index] >> other & 1))
    # Narrower first is a partial order; the number of boxes around a box extends it to a total one.
    around = [mask.bit_count() for mask in wider]
    order = sorted(range(len(implementations)), key=lambda i: (implementations[i].precedence, -around[i]))
    distinct: dict[str, set[int]] = {}
    for implementation in implementations:
        for name, values in implementation.box.sets.items():
            distinct.setdefault(name, set()).add(id(values))
    weight = {name: len(sets) for name, sets in distinct.items()}
    for implementation in implementations:
        implementation.box.ask_first(weight)
    return tuple(implementations[i] for i in order)


def _contradiction(narrow: Implementation, wide: Implementation) -> AmbiguityError:
    why = "is a fallback" if narrow.fallback and not wide.fallback else f"has rank {narrow.rank}"
    return AmbiguityError(
        f"{narrow.name} {why}, yet everything it serves is also served by the wider {wide.name} ({wide.where}, rank "
        f"{wide.rank}): it could never be chosen", where=narrow.where,
        hint="a narrower box goes first: give it at least the same rank, or narrow the wider one with `not`")


def _ambiguity(op: str, a: Implementation, b: Implementation, *, same: bool) -> AmbiguityError:
    how = "declare the same box" if same else "both serve some calls, and neither box is inside the other"
    return AmbiguityError(f"{op}: {a} and {b} {how}: nothing says which goes first", where=b.where,
                          hint="narrow one with a `when`, or give one a `rank`")
