"""A Triton kernel's launch at little host cost: what Triton compiled for a call's like is kept, and launched directly.

Triton's own call binds, specialises and hashes every argument, constant and option again each time, which takes the
host several times as long as the launch itself. Here the first call of a kind goes that way, and its compiled kernel is
kept under a key of whatever Triton specialises on. A later call of that kind hands addresses, which need no query of
the driver as tensors do, to the function that launches the kernel. Whatever is out of the ordinary takes Triton's own
way again: hooks (profilers), another device than the current one, the interpreter, AMD, an unknown Triton.

Settings that change what Triton compiles (its knobs and environment) are read by the first call of a kind only.
"""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Callable, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))  # the versions of Triton whose launchers were read for this
EXPANDED = 4096  # descriptors that a launch remembers: one for each layer's weights
ONES = (1, 1, 1)  # programs along what a grid leaves out


class Described(NamedTuple):
    """A tensor that a kernel reads through the descriptor make(tensor). For one launch, tensors of one shape and dtype
    have descriptors that differ in the address alone."""

    tensor: Tensor
    make: Callable


class Launcher(NamedTuple):
    """What launches a compiled kernel: function(*grid, stream, *between, *arguments); or, as_sequence, with the
    arguments as one sequence. A descriptor among them is passed as what expand(descriptor) lists."""

    function: Callable
    between: tuple
    as_sequence: bool
    expand: Callable | None


def kept_launch(kernel, **parameters):
    """launch(grid, *arguments), which is kernel[grid](*arguments, **parameters): `parameters` are the kernel's
    compile-time constants, which it names last, and launch options. Arguments, which are not counted here, are tensors
    of one device (the first is one), None, ints of at least 0 (no bool, no float), and one Described at most.
    """
    names = tuple(kernel.arg_names)
    count = sum(name not in parameters for name in names)
    if any(name in parameters for name in names[:count]):
        raise TypeError(f"a kernel of {names}, of which {(*parameters,)} are constants: they go last")

    def launch_plainly(grid, *arguments):
        return kernel[grid](*(a.make(a.tensor) if type(a) is Described else a for a in arguments), **parameters)

    if not can_keep(kernel):
        return launch_plainly
    constants = tuple(parameters[name] for name in names[count:])
    kept: dict[tuple, tuple | bool] = {}  # False: this kind takes Triton's own way

    def launch(grid, *arguments):
        device = arguments[0].get_device()
        # Triton compiles anew for a pointer that is None, of another dtype, or not a multiple of 16; and for an integer
        # that is 1, a multiple of 16, or too large for int32. Where it does not, what is found for a finer key is what
        # it had compiled.
        key, values, described, place = [device], [], None, None
        for argument in arguments:
            kind = type(argument)
            if kind is int:
                key.append(1 if argument == 1 else (argument & 15 == 0, argument >> 31))
                values.append(argument)
            elif argument is None:
                key.append(None)
                values.append(None)
            elif kind is Described:
                described, place = argument, len(values)
                key.append((Described, argument.tensor.dtype))
                values.append(None)
            else:
                address = argument.data_ptr()
                key.append((address & 15, argument.dtype))
                values.append(address)
        key = tuple(key)
        found = kept.get(key)
        if not found or device != torch.cuda.current_device() or hooked(kernel):
            compiled = launch_plainly(grid, *arguments)
            if (found is None and type(compiled) is CompiledKernel  # a profiler's kernel may be instrumented
                    and device == torch.cuda.current_device() and not hooked(kernel)):
                how = launcher(compiled, len(names), place, described and described.make(described.tensor))
                # `compiled` owns the module: hold it
                kept[key] = how is not None and (compiled, how, {}, driver.active.get_current_stream)
            return
        _, (function, between, as_sequence, expand), expanded, current_stream = found
        if described is not None:
            of = described.tensor.data_ptr(), described.tensor.shape
            parts = expanded.get(of)
            if parts is None:
                if len(expanded) >= EXPANDED:
                    expanded.clear()
                parts = expanded[of] = expand(described.make(described.tensor))
            values[place:place + 1] = parts
        values += constants
        function(*grid, *ONES[len(grid):], current_stream(device), *between, *((values,) if as_sequence else values))

    return launch


def can_keep(kernel) -> bool:
    """Whether this is a kernel, a machine and a Triton whose launch is understood."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return isinstance(kernel, triton.JITFunction) and torch.version.cuda is not None and version in KNOWN


def hooked(kernel) -> bool:
    """Whether somebody wants to be told of a launch, which Triton does."""
    runtime = knobs.runtime
    return bool(kernel.pre_run_hooks or getattr(runtime.launch_enter_hook, "calls", True)
                or getattr(runtime.launch_exit_hook, "calls", True))  # a chain of hooks may be empty


def launcher(compiled, count: int, place: int | None = None, descriptor=None) -> Launcher | None:
    """The Launcher of a kernel of `count` arguments, its constants included, of which the one at `place` is
    `descriptor`, where there is one.

    Its function is the one in C that `compiled.run` calls when it has allocated what the kernel needs. Which arguments
    go where differs between Triton's versions, so a copy of `compiled.run` is asked. If the kernel needs an allocation,
    or the answer is not understood, the function is `compiled.run` itself, or with a descriptor there is none: None.
    """
    run, metadata = compiled.run, compiled.metadata
    between = (compiled.function, compiled.packed_metadata, None, None, None)  # no launch metadata, no hooks
    if hasattr(run, "launch") and metadata.global_scratch_size == metadata.profile_scratch_size == 0:
        function, around = _in_c(run.launch)
        arguments = [object() for _ in range(count)]
        before, after = arguments[:place], arguments[place + 1:] if place is not None else []

        def passed(argument) -> list:
            asked, everything = copy.copy(run), []
            asked.launch = around(lambda *given: everything.extend(given))
            asked(1, 1, 1, 0, *between, *before, *([] if place is None else [argument]), *after)
            return everything

        found = passed(descriptor)
        as_sequence = isinstance(found[-1], (list, tuple))
        start = 0 if as_sequence else next((i for i, one in enumerate(found) if one is arguments[0]), 0)
        given = found[-1] if as_sequence else found[start:]
        middle = slice(len(before), len(given) - len(after))
        if (found[:4] == [1, 1, 1, 0] and [*given[:middle.start], *given[middle.stop:]] == [*before, *after]
                and (place is not None or middle.start == middle.stop)):
            def expand(descriptor) -> tuple:
                everything = passed(descriptor)
                parts = (everything[-1] if as_sequence else everything[start:])[middle]
                return tuple(part.data_ptr() if isinstance(part, Tensor) else part for part in parts)

            return Launcher(function, tuple(found[4:-1] if as_sequence else found[4:start]), as_sequence, expand)
    return Launcher(run, between, False, None) if place is None else None


def _in_c(launch):
    """The function in C that `launch` is, or is Triton's wrapper of, which takes descriptors apart; and a function that
    makes what `launch` would be for another function."""
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    if "launcher" not in names:
        return launch, lambda function: function

    def around(function):
        cells = (CellType(function) if name == "launcher" else cell for name, cell in zip(names, launch.__closure__))
        return FunctionType(launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(cells))

    return launch.__closure__[names.index("launcher")].cell_contents, around
