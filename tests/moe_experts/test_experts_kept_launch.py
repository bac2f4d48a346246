"""The general kept_launch launches exactly what Triton would have compiled for a call, with what Triton would have
passed to it, or takes Triton's own way.

Without a GPU, the kernel is one of tests/kept.py, around Triton's own specialisation and launcher. Tensor descriptors:
test_experts_kept_descriptors.py; a GPU: test_experts_kept_launch_on_gpu.py.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from kept_launch_support import (  # noqa: E402
    CONSTANTS, FLOATS, GRID, LONGS, ON_HOPPER, OPTIONS, PLAIN, Kernel, OneByOne, as_triton_takes, calls, check_second,
    described, keep, replaced, weights)
from triton import knobs  # noqa: E402
from triton.runtime import _allocation  # noqa: E402

from kernel_registry.ops.moe import kept_launch as module  # noqa: E402
from kernel_registry.ops.moe.experts import grouped  # noqa: E402
from kernel_registry.ops.moe.experts.launch import launch_of  # noqa: E402
from tests import kept  # noqa: E402
from tests.kept import vector  # noqa: E402

stream = kept.stream


# ---- which kernel ----------------------------------------------------------------------------------------------------

def test_launches_what_triton_compiles_for_the_call(stream):
    made = Kernel(descriptors=ON_HOPPER)
    launch = keep(made)
    for call in calls():
        launch(GRID, *call)
        asked, made.launched = made.asked, []
        launch(GRID, *call)
        assert made.asked == asked and len(made.launched) == 1  # the second call is a launch, and Triton is not asked
        assert made.launched[0][0] == made.specialisation(*as_triton_takes(call)), call
    assert len(made.made) > 2000


def test_later_calls_of_a_kind_do_not_ask_triton(stream):
    made = Kernel()
    launch = keep(made)
    launch(GRID, *PLAIN)
    tokens = [n for n in range(2, 100) if n % 16]
    for number, stride in itertools.product(tokens, (256, 128, 2048)):
        other = [vector(argument.dtype) if isinstance(argument, torch.Tensor) else argument for argument in PLAIN]
        other[2], other[12], other[13] = stride, number, 16 * number + 1
        launch((number, 2), *other)
    assert made.asked == 1 and len(made.launched) == len(tokens) * 3


def test_a_kept_kernel_stays_loaded(stream):
    made = Kernel()
    launch = keep(made)
    launch(GRID, *PLAIN)
    compiled = weakref.ref(*made.made.values())
    made.made.clear()
    gc.collect()
    assert compiled() is not None  # Triton unloads the module of a kernel that is gone
    launch(GRID, *PLAIN)
    assert made.asked == 1
    del launch
    gc.collect()
    assert compiled() is None


def test_one_launch_for_the_same_kernel_and_constants():
    """Of the same type, too: Triton compiles anew for True instead of 1."""
    class Other:
        arg_names = ["x", "N"]

    made = Other()
    assert launch_of(made, N=1, num_warps=4) is launch_of(made, N=1, num_warps=4)
    assert len({launch_of(made, N=1), launch_of(made, N=True), launch_of(made, N=2), launch_of(made, N=1, num_warps=4),
                launch_of(Other(), N=1)}) == 5


# ---- what it is passed -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [Kernel, OneByOne, partial(Kernel, scratch=128), partial(Kernel, profile_scratch=64)],
                         ids=["installed", "3.6", "scratch", "profile scratch"])
def test_the_c_function_gets_what_triton_passes(stream, form):
    made, allocated = form(), []

    def allocate(*request):
        allocated.append(request)
        return "a buffer"

    triton.set_allocator(allocate)
    _allocation.set_profile_allocator(allocate)
    launch = keep(made)
    other = replaced({1: vector(FLOATS), 2: 1, 3: None, 7: vector(LONGS, 1), 12: 2**31})
    for call in (PLAIN, other):
        launch(GRID, *call)
        for number, grid in itertools.product((7, 8), ((11,), (11, 5), (11, 5, 2))):
            stream.number = number  # the current stream is asked for at each launch
            allocated.clear()
            check_second(made, launch, call, grid, number)
            assert len(allocated) == 2 * any(made.sizes.values()) and allocated[:1] == allocated[1:]
    triton.set_allocator(_allocation.NullAllocator())
    _allocation.set_profile_allocator(None)


@pytest.mark.parametrize("order", ["stream first", "others last", "one more"])
@pytest.mark.parametrize("call", [PLAIN, described(weights())], ids=["tensors", "a descriptor"])
def test_a_launcher_that_is_not_understood_is_called(stream, order, call):
    """Not what is behind it. With a descriptor Triton is asked, which alone knows what that launcher wants."""
    class Strange(Kernel):
        def launcher(self, in_c, specialisation):
            class Launcher:
                def __call__(self, x, y, z, stream, function, *others):
                    probed.append(self)
                    head, arguments = (x, y, z, stream, function, *others[:4]), others[4:]
                    self.launch(*{"stream first": (stream, *head, arguments), "others last": (*arguments, *head),
                                  "one more": (*head, (*arguments, "a table"))}[order])

            run = Launcher()
            run.launch = in_c
            return run

    probed, made = [], Strange(descriptors=ON_HOPPER)
    launch = keep(made)
    launch(GRID, *call)
    if call is PLAIN:
        check_second(made, launch, call)
    else:
        launch(GRID, *call)
        assert made.asked == 2 and not made.launched and len(probed) == 1


# ---- Triton's own way ------------------------------------------------------------------------------------------------

@contextmanager
def hooked(made, which):
    """A hook, of which Triton itself tells in its own launch."""
    def hook(*_, **__):
        raise AssertionError("Triton calls its hooks itself")

    with pytest.MonkeyPatch.context() as patch:
        if which == "pre_run_hooks":
            patch.setattr(made, which, [hook])
        elif which == "a function":  # in place of a chain, as was usual before there were chains
            patch.setattr(knobs.runtime, "launch_enter_hook", hook)
        else:
            patch.setattr(getattr(knobs.runtime, which), "calls", [hook])
        yield


@pytest.mark.parametrize("call", [PLAIN, described(weights())], ids=["tensors", "a descriptor"])
@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook", "a function", "pre_run_hooks"])
def test_hooks_take_tritons_own_way(stream, which, call):
    made = Kernel(descriptors=ON_HOPPER)
    launch = keep(made)
    with hooked(made, which):
        for _ in range(2):
            launch(GRID, *call)
    assert made.asked == 2
    launch(GRID, *call)
    assert made.asked == 3  # what was compiled for a profiler is not kept
    check_second(made, launch, call)
    made.launched.clear()
    with hooked(made, which):
        launch(GRID, *call)
    assert made.asked == 4 and not made.launched
    check_second(made, launch, call)


def test_another_device_takes_tritons_own_way(stream, monkeypatch):
    made = Kernel()
    launch = keep(made)
    for device, asked in ((1, 1), (1, 2), (-1, 3)):  # what was compiled, and loaded, for device 1 does not run on -1
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
        launch(GRID, *PLAIN)
        assert made.asked == asked and not made.launched
    check_second(made, launch, PLAIN)
    (compiled,), made.launched = made.made.values(), []
    own, compiled.function = compiled.function, "what is loaded on device 1"
    for device, asked in ((1, 4), (-1, 4)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
        launch(GRID, *PLAIN)
        assert made.asked == asked and [passed[4] for _, passed in made.launched] == [own] * (device == -1)


def test_devices_have_kernels_of_their_own(stream, monkeypatch):
    class Tensor(torch.Tensor):
        def get_device(self):
            return 1

    made = Kernel()
    launch = keep(made)
    launch(GRID, *PLAIN)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(GRID, PLAIN[0].as_subclass(Tensor), *PLAIN[1:])
    assert made.asked == 2 and not made.launched


@pytest.mark.parametrize("version, cuda, known", [
    ("3.5.1", "13.0", False), ("3.10.0", "13.0", False), ("4.0.0+git1a2b", "13.0", False), ("3.9.0", None, False),
    *((version, "13.0", True) for version in ("3.6.0", "3.6.0+git9844da95", "3.7.1", "3.8.0", "3.9.0"))])
def test_unknown_ground_takes_tritons_own_way(stream, monkeypatch, version, cuda, known):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    made = Kernel()
    launch = keep(made)
    for _ in range(3):
        launch(GRID, *PLAIN)
    assert (made.asked, len(made.launched)) == ((1, 2) if known else (3, 0))


def test_a_wrapped_or_interpreted_kernel_takes_tritons_own_way(stream):
    """Also one that returns what it launched, as Triton's autotuner does, which may launch another next time."""
    asked, compiled = [], Kernel().compiled(())

    class Other:
        arg_names, pre_run_hooks = grouped.grouped_up.arg_names, []

        def __getitem__(self, grid):
            return lambda *arguments, **parameters: asked.append((grid, arguments, parameters)) or compiled

    launch, call = keep(Other()), described(weights())
    for _ in range(2):
        launch(GRID, *call)
    assert asked == [(GRID, (*as_triton_takes(call),), {**CONSTANTS, **OPTIONS})] * 2


@pytest.mark.parametrize("unready", [None, object()])
def test_what_is_not_compiled_yet_is_not_kept(stream, monkeypatch, unready):
    made = Kernel()
    launch = keep(made)
    with monkeypatch.context() as patch:
        patch.setattr(made, "run", lambda *_, **__: unready)  # a hook that compiles elsewhere, or a future
        patch.setattr(torch.cuda, "current_device", lambda: 1 / 0)  # where one compiles ahead, there may be none
        launch(GRID, *PLAIN)
    launch(GRID, *PLAIN)
    assert made.asked == 1
    check_second(made, launch, PLAIN)


def test_constants_go_last():
    def kernel_of(*names):
        return SimpleNamespace(arg_names=list(names))

    for names in ("x y N M", "x y M N", "x y", "x N"):
        module.kept_launch(kernel_of(*names.split()), N=1, M=2, num_warps=4)
    for names in ("x N y", "N x y", "x M y N", "N M x"):
        with pytest.raises(TypeError, match="they go last"):
            module.kept_launch(kernel_of(*names.split()), N=1, M=2, num_warps=4)
