"""A kept launch of the experts' first product, around a kernel of tests/kept.py, and calls of it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from kernel_registry.ops.moe import kept_launch as module
from kernel_registry.ops.moe.experts import grouped
from kernel_registry.ops.moe.kept_launch import Described
from tests import kept
from tests.kept import vector

CONSTANTS = {name: f"the value of {name}" for name in grouped.grouped_up.arg_names if name.isupper()}
OPTIONS = dict(num_warps=4, num_stages=3, launch_pdl=True)
ON_HOPPER = [dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 1, 64, 64], fp4_padded=False)]
GRID = 3, 5


class Kernel(kept.Kernel):
    """The experts' first product."""

    def __init__(self, **other):
        super().__init__(grouped.grouped_up, CONSTANTS, OPTIONS, **other)


class OneByOne(Kernel):
    """Its launcher is like Triton 3.6's: the C function takes a kernel's arguments one by one, 13 others before them,
    and so does the wrapper that expands descriptors."""

    def launcher(self, in_c, specialisation):
        class Launcher:
            def __call__(self, x, y, z, stream, function, *others):
                self.launch(x, y, z, stream, function, False, True, None, None, *others)

        run, places = Launcher(), [i for i, (kind, _) in enumerate(specialisation) if kind.startswith("tensordesc")]
        run.launch = wrapped(in_c, self.expanded, places) if places else in_c
        return run

    def expanded(self, of):
        if not self.descriptors:
            return [of.base, *of.shape, *of.strides, of.padding == "nan", *of.shape, *of.strides]
        fill = driver.active.utils.fill_tma_descriptor
        return [fill(of.base.data_ptr(), 3, 2, 9, of.block_shape, of.shape, of.strides, 0), *of.shape, *of.strides]


def wrapped(launcher, expanded, places):
    def inner(*everything):
        passed = list(everything[:13])
        for i, argument in enumerate(everything[13:]):
            passed.extend(expanded(argument) if i in places else [argument])
        return launcher(*passed)
    return inner


either_form = pytest.mark.parametrize("form", [Kernel, OneByOne], ids=["installed", "3.6"])
either_descriptor = pytest.mark.parametrize("descriptors", [ON_HOPPER, []], ids=["encoded", "in parts"])


def keep(made):
    """launch(grid, *arguments) of a kernel above; constants may be named in any order."""
    return module.kept_launch(made, **dict(reversed(CONSTANTS.items())), **OPTIONS)


def weights(dtype=torch.bfloat16):
    return vector(dtype, size=2 * 8192)


def describe(tensor):
    return TensorDescriptor(tensor, [2, 2, 64, 64], [8192, 4096, 64, 1], [1, 1, 64, 64])


BF16, FLOATS, INTS, LONGS = torch.bfloat16, torch.float32, torch.int32, torch.int64
COUNTS = [33, 0, 1, 16, 17, 2**31 - 1, 2**31, 2**31 + 1]
CHOICES = dict(
    hidden=[vector(BF16), vector(BF16, 1), vector(BF16, 4), vector(FLOATS)],
    hidden_scale=[None, vector(FLOATS), vector(FLOATS, 1)],
    row_stride=[256, *COUNTS, 2**63, None],
    w13=[vector(BF16), vector(BF16, 1), vector(torch.int8), None, Described(weights(), describe),
         Described(weights(torch.float16), describe)],
    w13_scale=[vector(FLOATS), vector(FLOATS, 1), vector(BF16), None],
    w13_bias=[None, vector(BF16), vector(FLOATS), vector(FLOATS, 1)],
    topk_weights=[vector(FLOATS), vector(BF16), vector(BF16, 1)],
    order=[vector(INTS), vector(INTS, 1), vector(LONGS)],
    blocks=[vector(INTS), vector(INTS, 2)],
    num_blocks=[vector(INTS), vector(INTS, 3), vector(LONGS, 1)],
    act=[vector(BF16), vector(FLOATS), vector(FLOATS, 1)],
    act_scale=[None, vector(FLOATS), vector(FLOATS, 1)],
    num_tokens=COUNTS, num_routes=COUNTS, most_blocks=COUNTS,
)
PLAIN = tuple(values[0] for values in CHOICES.values())


def calls():
    """A plain call, calls that differ from it in one or two arguments, and calls that differ in many."""
    for places in itertools.combinations(range(len(PLAIN)), 2):
        for values in itertools.product(*(list(CHOICES.values())[place] for place in places)):
            yield replaced(dict(zip(places, values)))
    yield described(weights())  # the next argument is as the one in its place is in the call after this
    yield described(weights(), 4, w13=vector(FLOATS))
    choose = random.Random(0)
    for _ in range(2000):
        yield tuple(choose.choice(values) for values in CHOICES.values())


def replaced(arguments: dict):
    """The plain call with other arguments at these places."""
    return tuple(arguments.get(place, argument) for place, argument in enumerate(PLAIN))


def described(tensor, place=3, w13=PLAIN[3]):
    return replaced({3: w13, place: Described(tensor, describe)})


def as_triton_takes(call):
    return [argument.make(argument.tensor) if isinstance(argument, Described) else argument for argument in call]


def addresses(values):
    return tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values)


def one_by_one(passed):
    """What a C function was passed, whether it got the kernel's arguments as a sequence or not."""
    *others, last = passed
    return (*others, *last) if isinstance(last, (list, tuple)) else passed


def check_second(made, launch, call, grid=GRID, stream=7):
    """Makes a call that is not the first of its kind; asserts that it launches what Triton would, and how it would."""
    asked, made.launched = made.asked, []
    launch(grid, *call)
    assert made.asked == asked, "Triton was asked"
    (specialisation, passed), = made.launched
    assert specialisation == made.specialisation(*as_triton_takes(call))
    compiled = made.made[specialisation]
    compiled.run(*grid, *[1] * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata, None, None, None,
                 *addresses(as_triton_takes(call)), *CONSTANTS.values())
    expected = made.launched.pop()[1]
    assert len(passed) == len(expected)
    passed, expected = one_by_one(passed), one_by_one(expected)
    assert not any(map(torch.is_tensor, passed)), "tensors, which the C function would ask the driver about"
    assert passed == addresses(expected)
