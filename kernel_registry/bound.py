"""A bound kernel: what a dispatch returns. It is callable, knows its name, and follows a reload.

Calling it costs one C call more than the raw function. When the choice depends on dynamic traits, the
raw function is a small table lookup built here, once; a kernel of the table is imported and bound with the others, so
that nothing is left to import at call time.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from functools import partial
from types import MappingProxyType
from typing import Callable, Mapping

from . import aliasing, preparation, targets
from .catalog import Implementation, Op
from .contract import Contract, Request
from .errors import TargetError, suggestion
from .selection import Table, one_name
from .tiles import Tiling, chooser


class BoundKernel(partial):
    """A kernel bound to its traits. Call it with the contract's arguments.

    op       the op's name
    request  the canonical traits it was dispatched for, and which dynamic ones are open
    context  what it was dispatched under: (pinned implementation or None, scope or None)
    tiles    where tiles come from, of each implementation in it that takes any, by its name (tiles.Tiling)

    A functools.partial without arguments forwards a call in C, at a third of what a Python `__call__` costs, and its
    function can be replaced in place, which is how a handle held by an engine follows a reload.
    """

    op: str
    request: Request
    context: object
    tiles: Mapping[str, Tiling]

    @classmethod
    def of(cls, request: Request, context: object, table: Table, call: Callable, tiles: Mapping[str, Tiling]
           ) -> "BoundKernel":
        kernel = cls(call)
        kernel.op, kernel.context = request.op, context
        kernel.set(request, table, call, tiles)
        return kernel

    def set(self, request: Request, table: Table, call: Callable, tiles: Mapping[str, Tiling]) -> None:
        """Points the handle at another choice; for the registry."""
        self.request, self.table, self.tiles = request, table, tiles
        self.run(call)

    def run(self, call: Callable) -> None:
        """Has the handle call this function from now on; for the registry."""
        self.__setstate__((call, (), {}, self.__dict__))

    @property
    def name(self) -> str:
        """The implementation's name; where the choice depends on a dynamic trait, names joined by "|", a variant's
        after its implementation's without it: "router|.pairs"."""
        return one_name(self.table.winners())

    @property
    def traits(self) -> Mapping[str, object]:
        """The canonical traits, the open ones left out."""
        return {n: v for n, v in self.request.traits.items() if n not in self.request.open}

    @property
    def raw(self) -> Callable:
        """The function that runs now, without the handle; it does not follow a reload."""
        return self.func

    def __repr__(self):
        return f"<{self.name} for {self.request}>"


def make_call(op: Op, request: Request, table: Table, made: dict[str, Callable],
              tilings: Mapping[str, Tiling] = MappingProxyType({})) -> Callable:
    """The raw function for `table`. `made` remembers kernels already built for this request, by implementation;
    `tilings` has where the tiles of an implementation come from, the default's where it has none."""
    if table.trait is None:
        implementation = table.decision.implementation
        if implementation.name not in made:
            tiles = chooser(op, implementation, request, tilings.get(implementation.name)) \
                if implementation.tiles else None
            made[implementation.name] = make_kernel(implementation, request, tiles, op.contract)
        return made[implementation.name]
    reader, first = op.contract.dynamic[table.trait], first_argument(op)

    def read(args, kwargs):
        return reader(first(args, kwargs))

    calls = [make_call(op, request, branch, made, tilings) for branch in table.branches]
    bounds = table.bounds
    if isinstance(bounds[0], bool):
        no, yes = calls

        def by_flag(*args, **kwargs):
            return (yes if read(args, kwargs) else no)(*args, **kwargs)
        return by_flag

    def by_range(*args, **kwargs):
        value = reader(args[0]) if args else read(args, kwargs)  # the first saves a call, and this one is in every call
        return calls[bisect_right(bounds, value)](*args, **kwargs)
    return by_range


def first_argument(op: Op) -> Callable:
    """A function of a call's args and kwargs: the argument that dynamic traits are read off."""
    name = next(iter(inspect.signature(op.contract.signature).parameters))

    def first(args, kwargs):
        if not args and name not in kwargs:
            raise TypeError(f"{op.name} was called without {name}")
        return args[0] if args else kwargs[name]
    return first


def make_kernel(implementation: Implementation, request: Request,
                tiles: Callable[[int], Mapping[str, object]] | None = None,
                contract: type[Contract] | None = None) -> Callable:
    """Imports the target and calls it with the traits it names, the options of its entry, and `tiles` where it takes
    tiles: the one place where a kernel comes to be. An option has to be named too: `**` would swallow one that nothing
    reads.

    Where the call brings `out`, what is returned is the kernel behind aliasing.py's decision, and where it takes
    prepared arguments, behind preparation.py's look at them; for both it takes the op's `contract`."""
    options = {**implementation.options, **({"tiles": tiles} if implementation.tiles else {})}
    factory = targets.load(implementation.target, implementation.where)
    static = {name: value for name, value in request.traits.items() if name not in request.open}
    brings_out, accepts = static.get(aliasing.TRAIT, False), implementation.accepts_output_alias
    if brings_out:
        static[aliasing.TRAIT] = accepts
    try:
        parameters = inspect.signature(factory).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        wanted = static if takes_all else {p.name: static[p.name] for p in parameters if p.name in static}
        keywords = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        strange = [name for name in options if name not in keywords]
        kernel = None if strange else factory(**wanted, **options)
    except Exception as error:  # a factory may fail in any way; say which, and where it was declared
        raise TargetError(f"{implementation.target} can't be bound: {type(error).__name__}: {error}",
                          where=implementation.where,
                          hint="a target is a function of the traits it names as keywords, and returns the kernel"
                          ) from error
    if strange:
        free = [name for name in keywords if name not in (*request.traits, *request.open)]
        raise TargetError(f"{implementation.target} takes no option {strange[0]!r}: its keywords are "
                          f"{', '.join(keywords) or 'none'}", where=implementation.where,
                          hint="a target names each option as a keyword, `**` is not enough"
                               + (f"; {suggestion(strange[0], free)}" if free else ""))
    if not callable(kernel):
        raise TargetError(f"{implementation.target} returned {type(kernel).__name__}, not a kernel to call",
                          where=implementation.where, hint="a target takes the traits and returns a function")
    if implementation.prepare and contract is not None:
        kernel = preparation.checking(kernel, implementation, request, contract)
    return aliasing.delivering(kernel, contract, accepts=accepts) if brings_out else kernel
