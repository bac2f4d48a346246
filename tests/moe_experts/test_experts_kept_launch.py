"""The general kept_launch launches exactly what Triton would have compiled for a call, with what Triton would have
passed to it, tensor descriptors among it.

Without a GPU, the kernel is one of tests/kept.py, around Triton's own specialisation, launcher and wrapper that expands
descriptors. With a GPU, the experts' second calls are compared with their first and judged by the oracle.
"""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from experts_support import implementations, kernel, layer

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, oracle

triton = pytest.importorskip("triton")
from triton import knobs  # noqa: E402
from triton.runtime import _allocation, driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from kernel_registry.ops.moe import kept_launch as module  # noqa: E402
from kernel_registry.ops.moe.experts import grouped, triton_grouped  # noqa: E402
from kernel_registry.ops.moe.experts.launch import INTERPRETED, launch_of  # noqa: E402
from kernel_registry.ops.moe.kept_launch import Described  # noqa: E402
from tests import kept, launches  # noqa: E402
from tests.kept import vector  # noqa: E402

CONSTANTS = {name: f"the value of {name}" for name in grouped.grouped_up.arg_names if name.isupper()}
OPTIONS = dict(num_warps=4, num_stages=3, launch_pdl=True)
ON_HOPPER = [dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 1, 64, 64], fp4_padded=False)]
GRID = 3, 5
stream = kept.stream


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


# ---- descriptors -----------------------------------------------------------------------------------------------------

@either_form
@either_descriptor
@pytest.mark.parametrize("place", [1, 3, 14])
def test_a_descriptor_is_passed_as_triton_passes_it(stream, form, descriptors, place):
    made, one, other = form(descriptors=descriptors), weights(), weights()
    launch = keep(made)
    launch(GRID, *described(one, place))
    for tensor in (one, other, one):
        check_second(made, launch, described(tensor, place))
    assert made.asked == 1


@either_form
def test_a_descriptor_is_encoded_once_for_an_address(stream, form):
    made, one, two, three = form(descriptors=ON_HOPPER), weights(), weights(), weights()
    launch = keep(made)
    launch(GRID, *described(one))
    stream.encoded.clear()
    for tensor in (one, two, one, two, three, one[:], two):
        launch(GRID, *described(tensor))
    assert [found.address for found in stream.encoded] == [tensor.data_ptr() for tensor in (one, two, three)]


@either_form
def test_so_many_descriptors_are_remembered(stream, form, monkeypatch):
    monkeypatch.setattr(module, "EXPANDED", 3)
    made, tensors = form(descriptors=ON_HOPPER), [weights() for _ in range(4)]
    launch = keep(made)
    launch(GRID, *described(tensors[0]))
    stream.encoded.clear()
    for i in (0, 1, 2, 0, 1, 2, 3, 3, 0, 3, 1):  # 3 is one too many, so it is remembered alone
        launch(GRID, *described(tensors[i]))
    assert [found.address for found in stream.encoded] == [tensors[i].data_ptr() for i in (0, 1, 2, 3, 0, 1)]
    for tensor in tensors * 2:
        check_second(made, launch, described(tensor))


@either_form
@either_descriptor
def test_no_tensor_is_held(stream, form, descriptors):
    """Weights that nobody else holds are freed, which a plain call's are too."""
    made, tensor, hidden = form(descriptors=descriptors), weights(), vector(BF16)
    launch, gone = keep(made), (weakref.ref(tensor), weakref.ref(hidden))
    for _ in range(3):
        launch(GRID, hidden, *described(tensor)[1:])
    assert made.asked == 1
    made.launched.clear()
    del tensor, hidden
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("sizes", [dict(scratch=128), dict(profile_scratch=64)], ids=["scratch", "profile scratch"])
def test_an_allocation_beside_a_descriptor_takes_tritons_own_way(stream, sizes):
    made = Kernel(**sizes, descriptors=ON_HOPPER)
    launch = keep(made)
    for _ in range(3):
        launch(GRID, *described(weights()))
    assert made.asked == 3 and not made.launched
    compiled, = made.made.values()
    assert module.launcher(compiled, len(made.arg_names), 3, describe(weights())) is None


@pytest.mark.skipif(not INTERPRETED, reason="a layer's other kernels are interpreted")
@pytest.mark.parametrize("product, place", [("grouped_up", 1), ("grouped_down", 2)])
@pytest.mark.parametrize("experts", [(4, 8), (8, 4)], ids=str)
def test_layers_of_other_sizes_describe_their_own_weights(stream, monkeypatch, experts, product, place):
    """Layers whose constants are the same share a launch. The weights of a smaller one may begin where a larger one's
    do, or did."""
    made = kept.Kernel(getattr(grouped, product), {}, dict(num_warps=4, num_stages=1), descriptors=ON_HOPPER)
    monkeypatch.setattr(grouped, product, made)
    largest, _ = cases.inputs(layer(max(experts)), 1)
    for number in experts * 2:
        (hidden, _, _, *routing), _ = cases.inputs(layer(number), 1)
        asked, made.launched = made.asked, []
        run = triton_grouped.experts(**layer(number), platform=registry.platform())
        with launches.counted(monkeypatch):  # the other kernels compute nothing either
            run(hidden, *(weights[:number] for weights in largest[1:3]), *routing)
        maps = [one for _, passed in made.launched for one in one_by_one(passed) if isinstance(one, kept.TensorMap)]
        assert made.asked - asked + len(maps) == 1
        assert all((it.address, it.shape[0]) == (largest[place].data_ptr(), number) for it in maps)
    assert maps  # the last of them was a kept launch


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


# ---- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
formats = pytest.mark.parametrize("format", ("none", "fp8_block", "int8_w8a16"))
every_size = pytest.mark.parametrize("tokens", (1, 8, 40, 600))


@pytest.fixture
def asked(monkeypatch):
    """Names of the kernels that Triton was asked to launch, but for persistent.py's, which it always is."""
    names, own_run = [], triton.JITFunction.run

    def run(self, *arguments, **parameters):
        if not self.__name__.startswith("persistent"):
            names.append(self.__name__)
        return own_run(self, *arguments, **parameters)

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return names


def kernels(traits, tokens):
    found = {name: kernel(name, traits, tokens) for name in implementations(traits, tokens) if name != "torch"}
    assert found
    return found


def moved(args, offset=0):
    """The arguments with weights at another address, `offset` bytes from an aligned one."""
    def copied(tensor):
        memory = torch.empty(offset + tensor.nbytes, dtype=torch.uint8, device=tensor.device)
        return memory[offset:].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    hidden, w13, w2, *routing = args
    return hidden, copied(w13), copied(w2), *routing


@needs_gpu
@every_size
@formats
def test_second_calls_do_not_ask_triton_and_repeat_the_first(format, tokens, asked):
    traits = layer(16, 4, 512, 384, format)
    args, kwargs = cases.inputs(traits, tokens, device="cuda")
    layouts = {"as made": args, "elsewhere": moved(args), "at no multiple of 16": moved(args, 8), "last": moved(args)}
    for name, made in kernels(traits, tokens).items():
        first = {}
        for repeat in range(2):  # the second time all the kinds are kept, so one kept for another would be found
            for layout in (*layouts, "as made"):
                asked.clear()
                result = made(*layouts[layout], **kwargs)
                assert asked == [] or repeat == 0, name
                verdict = oracle.check(traits, args, kwargs, result)
                assert verdict.passed, f"{name} {layout}: {verdict.detail}"
                assert torch.equal(result, first.setdefault(layout, result)), f"{name} {layout}"


@needs_gpu
@every_size
@formats
def test_a_smaller_layer_whose_weights_begin_where_a_larger_ones_do(format, tokens):
    """And whose launches are the same, by their constants."""
    larger = cases.inputs(layer(16, 4, 512, 384, format), tokens, device="cuda")
    for experts in (8, 16, 8, 16):
        traits = layer(experts, 4, 512, 384, format)
        (hidden, _, _, *routing), _ = cases.inputs(traits, tokens, device="cuda")
        args = hidden, larger[0][1][:experts], larger[0][2][:experts], *routing
        kwargs = {name: scale[:experts] for name, scale in larger[1].items()}
        for name, made in kernels(traits, tokens).items():
            for _ in range(2):
                verdict = oracle.check(traits, args, kwargs, made(*args, **kwargs))
                assert verdict.passed, f"{name} of {experts} experts: {verdict.detail}"


@needs_gpu
@every_size
@formats
def test_a_second_call_in_a_graph(format, tokens, asked):
    traits = layer(16, 4, 512, 384, format, output_alias=True)
    args, kwargs = cases.inputs(traits, tokens, device="cuda")
    hidden, others = args[0], cases.inputs(traits, tokens, seed=1, device="cuda")[0][0]
    for name, made in kernels(traits, tokens).items():
        out = kwargs["out"]
        wanted = [made(x, *args[1:], **kwargs).clone() for x in (others, hidden)]
        torch.cuda.synchronize()
        asked.clear()
        graph, x = torch.cuda.CUDAGraph(), hidden.clone()
        with torch.cuda.graph(graph):
            made(x, *args[1:], **kwargs)
        assert asked == [], name
        for values, expected in zip((others, hidden, others), (*wanted, wanted[0])):
            x.copy_(values)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected), name
