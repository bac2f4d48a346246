"""Where a result goes when the caller brings `out`: the kernel writes into it, or its result is copied there.

`out` is handed to a kernel whose implementation declares `accepts_output_alias`, if its columns lie side by side and
none of its bytes belongs to an argument that the contract says is read until the end. Otherwise the kernel gets a fresh
buffer, or returns one, and a copy follows; an implementation that does not declare it never sees `out`. What a caller
gets is the same either way.

Bytes decide, never objects: a wrapper around the same memory is the same memory, other memory of the same storage is
not, and an address in common says nothing of how far either reaches. Nothing here imports torch: a tensor is what has
`data_ptr`, `shape`, `stride` and so on.
"""

from __future__ import annotations

import inspect
from typing import Callable, Collection, Mapping, NamedTuple, Sequence

from .contract import OUTPUT_ALIAS, Contract
from .errors import InputError

TRAIT = OUTPUT_ALIAS
WRITES, COPIES = "writes into out", "copies into out"


class Decision(NamedTuple):
    """`alias` (the kernel writes into out) or `copy`, and why."""

    action: str
    reason: str


def plan(out, reads: Mapping[str, object], *, accepts: bool, in_place: Collection[str] = ()) -> Decision:
    """What happens to `out` in a call that reads the tensors `reads`, by name (None: not given), until its end.

    accepts   whether the implementation declares accepts_output_alias
    in_place  names of those that may be `out` itself, exactly the same elements: a kernel reads none once it is written
    Raises InputError for an `out` whose elements are not all different ones.
    """
    if not accepts:
        refuse_repeated(out)
        return Decision("copy", "the implementation does not write into a given output")
    obstacle = why_not(out, tuple(reads), tuple(reads.values()), in_place)
    if obstacle:
        return Decision("copy", obstacle)
    return Decision("alias", "the implementation writes into it, and it shares no memory with what is read")


def why_not(out, names: Sequence[str], tensors: Sequence, in_place: Collection[str] = ()) -> str:
    """What keeps a kernel that takes `out` from writing into this one, "" where nothing does. Asked in every call, so
    the usual answer, that all lie apart, costs three looks at a tensor."""
    if out.is_contiguous():
        first = out.data_ptr()
        past = first + out.nbytes
    else:
        refuse_repeated(out)
        if out.stride()[-1] != 1 and out.shape[-1] != 1:
            return "columns of out do not lie side by side"
        first, past = span(out)
    for index, tensor in enumerate(tensors):
        if tensor is None or (start := tensor.data_ptr()) >= past \
                or (start + tensor.nbytes <= first and tensor.is_contiguous()):
            continue
        if not (apart(out, tensor) or names[index] in in_place and same(out, tensor)):
            return f"out shares memory with {names[index]}, which is read until the end"
    return ""


def span(tensor) -> tuple[int, int]:
    """The addresses of the first byte that a tensor touches and of the one after its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if 0 in tensor.shape:
        return start, start
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return start, start + (last + 1) * tensor.element_size()


def same(one, other) -> bool:
    """Whether two tensors are the same elements in the same order."""
    return (one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
            and one.dtype == other.dtype)


def apart(one, other) -> bool:
    """Whether no byte belongs to both tensors. False where that can't be told: it is for strided tensors whose ranges
    interleave, unless both are rows of one length, as slices of a padded buffer's columns are."""
    (first, past), (start, end) = span(one), span(other)
    if past <= start or end <= first or first == past or start == end:
        return True
    (step, width), (other_step, other_width) = _rows(one), _rows(other)
    if step != other_step or not step:
        return False
    offset = (start - first) % step
    return width <= offset and offset + other_width <= step


def _rows(tensor) -> tuple[int, int]:
    """(bytes from one row to the next, bytes of a row) of a tensor that is rows with gaps; (0, 0) of any other."""
    shape, steps, item = tensor.shape, tensor.stride(), tensor.element_size()
    if len(shape) != 2 or steps[1] != 1 and shape[1] != 1 or steps[0] < shape[1]:
        return 0, 0
    return steps[0] * item, shape[1] * item


def refuse_repeated(out) -> None:
    """Raises InputError where an element of `out` may stand in several places of it."""
    if out.is_contiguous():
        return
    reach = 1
    for step, size in sorted(zip(out.stride(), out.shape)):
        if size > 1:
            if step < reach:
                raise InputError(f"rows of out overlap: [{', '.join(map(str, out.shape))}] with strides "
                                 f"{tuple(out.stride())}",
                                 hint="pass a tensor in which every element has a place of its own")
            reach += (size - 1) * step


def refuse_misfit(out, result) -> None:
    """Raises InputError unless `out` is of the result's shape, dtype and device."""
    if out.shape != result.shape or out.dtype != result.dtype or out.device != result.device:
        raise InputError(f"out is {_told(out)}, the result is {_told(result)}",
                         hint="pass an `out` like the result, or dispatch with output_alias=False")


def _told(tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def arguments_read(contract: type[Contract]) -> Callable[[tuple, Mapping[str, object]], Sequence]:
    """reads(args, kwargs): the arguments of a call that the contract says are read until the end, in its order."""
    names = tuple(contract.read_until_end)
    parameters = inspect.signature(contract.signature).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    count = len(positional)
    others = names[count:] if names[:count] == tuple(positional) else None  # as they are written down, in C

    def reads(args, kwargs):
        if others is not None and len(args) == count:
            return (*args, *map(kwargs.get, others))
        return [kwargs.get(name) if name in kwargs or name not in positional[:len(args)]
                else args[positional.index(name)] for name in names]

    return reads


def delivering(kernel: Callable, contract: type[Contract], *, accepts: bool) -> Callable:
    """A kernel of the same signature whose result is in `out`, made once for a dispatch with output_alias=True.

    `kernel` takes `out` if it `accepts`, else it is one that returns its result."""
    reads, names, in_place = arguments_read(contract), tuple(contract.read_until_end), frozenset(contract.in_place)

    def write(*args, out=None, **kwargs):
        if out is None:
            raise _missing()
        try:
            obstacle = why_not(out, names, reads(args, kwargs), in_place)
        except AttributeError:
            _refuse_others(("out", *names), (out, *reads(args, kwargs)))
            raise
        if not obstacle:
            return kernel(*args, out=out, **kwargs)
        return out.copy_(kernel(*args, out=out.new_empty(out.shape), **kwargs))

    def copy(*args, out=None, **kwargs):
        if out is None:
            raise _missing()
        _refuse_others(("out",), (out,))
        refuse_repeated(out)
        result = kernel(*args, **kwargs)
        refuse_misfit(out, result)
        return out.copy_(result)

    return write if accepts else copy


def _refuse_others(names: Sequence[str], given: Sequence) -> None:
    """Raises InputError for the first that is no tensor."""
    for name, tensor in zip(names, given):
        if tensor is not None and not hasattr(tensor, "is_contiguous"):
            raise InputError(f"{name} is of type {type(tensor).__name__}, expected a tensor",
                             hint=f"pass a tensor as {name}, or leave it out where the traits do not ask for it")


def _missing() -> InputError:
    return InputError(f"out is missing, dispatched with {TRAIT}=True",
                      hint=f"pass it, or dispatch with {TRAIT}=False")
