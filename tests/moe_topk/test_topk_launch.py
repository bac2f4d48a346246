"""kept_launch launches exactly what Triton would have compiled for a call, with what Triton would have passed to it.

Without a GPU, the kernel is one of tests/kept.py, around Triton's own specialisation and launcher. With a GPU, the
routers' second calls are judged by the oracle.
"""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from topk_support import implementations, kernel, routing, same_bits

from kernel_registry.ops.moe.topk import cases, oracle

triton = pytest.importorskip("triton")
from triton import knobs  # noqa: E402

from kernel_registry.ops.moe.topk import kept_launch as module  # noqa: E402
from kernel_registry.ops.moe.topk.router_kernel import router_kernel  # noqa: E402
from tests import kept  # noqa: E402
from tests.kept import vector  # noqa: E402

OPTIONS = dict(num_warps=1, num_stages=1)
CONSTANTS = {name: f"the value of {name}" for name in router_kernel.arg_names if name.isupper()}
stream = kept.stream


class Kernel(kept.Kernel):
    """The router's."""

    def __init__(self, scratch=0):
        super().__init__(router_kernel, CONSTANTS, OPTIONS, scratch)


FLOATS, INTS, LONGS = torch.float32, torch.int32, torch.int64
CHOICES = dict(
    logits=[vector(FLOATS), vector(FLOATS, 1), vector(FLOATS, 2)],
    bias=[vector(FLOATS), None, vector(FLOATS, 3)],
    weights=[vector(FLOATS), vector(FLOATS, 1)],
    ids=[vector(INTS), vector(INTS, 1)],
    num_valid=[None, vector(INTS, 0, 1), vector(INTS, 1, 1), vector(LONGS, 0, 1), vector(LONGS, 1, 1)],
    expert_map=[None, vector(INTS), vector(INTS, 1), vector(LONGS), vector(LONGS, 1)],
    num_tokens=[64, 1, 17, 2**31 - 1, 2**31, 2**31 + 16],
    row_stride=[256, 0, 1, 16, 17, 33, 2**31 - 1, 2**31, 2**31 + 1],
    column_stride=[1, 0, 2, 16, 17, 100, 2**31, 2**31 + 1],
    scale=[1.0, 2.5], shared=[1.0, 0.5],
)
PLAIN = tuple(values[0] for values in CHOICES.values())


def calls():
    """A plain call, calls that differ from it in one or two arguments, and calls that differ in many."""
    for places in itertools.combinations(range(len(PLAIN)), 2):
        for values in itertools.product(*(list(CHOICES.values())[place] for place in places)):
            call = list(PLAIN)
            for place, value in zip(places, values):
                call[place] = value
            yield tuple(call)
    choose = random.Random(0)
    for _ in range(2000):
        yield tuple(choose.choice(values) for values in CHOICES.values())


def test_launches_what_triton_compiles_for_the_call(stream):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    for call in calls():
        launch(3, *call)
        asked, made.launched = made.asked, []
        launch(3, *call)
        assert made.asked == asked and len(made.launched) == 1  # the second call is a launch, and Triton is not asked
        assert made.launched[0][0] == made.specialisation(*call), call
    assert len(made.made) > 1000


def test_later_calls_of_a_kind_do_not_ask_triton(stream):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    launch(3, *PLAIN)
    for tokens, stride in itertools.product(range(1, 50), (256, 128, 2048)):
        other = [vector(argument.dtype) if isinstance(argument, torch.Tensor) else argument for argument in PLAIN]
        other[6], other[7], other[9] = tokens, stride, tokens / 7
        launch(tokens, *other)
    assert made.asked == 1 and len(made.launched) == 49 * 3


@pytest.mark.parametrize("scratch", [0, 128])
def test_the_c_function_gets_what_triton_passes(stream, monkeypatch, scratch):
    made = Kernel(scratch)
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    allocated = []

    def allocate(*request):
        allocated.append(request)
        return "a buffer"

    triton.set_allocator(allocate)
    mapped = [*PLAIN[:4], vector(INTS, 1, 1), vector(LONGS, 1), 5, 17, 2, 2.5, 0.5]
    for call, number in itertools.product((PLAIN, mapped), (7, 8)):
        launch(3, *call)
        stream.number = number  # the current stream is asked for at each launch
        made.launched, allocated[:] = [], []
        launch(11, *call)
        (specialisation, passed), = made.launched
        compiled = made.made[specialisation]
        requests = list(allocated)
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call]
        compiled.run(11, 1, 1, number, compiled.function, (1, 1, 0), None, None, None, *addresses, *CONSTANTS.values())
        assert passed == made.launched[1][1]
        assert len(requests) == (scratch > 0) and allocated == requests * 2
    triton.set_allocator(None)


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook", "function", "pre_run_hooks"])
def test_hooks_take_tritons_own_way(stream, monkeypatch, which):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)

    def hook(*_, **__):
        raise AssertionError("Triton calls its hooks itself")

    def add(present):
        if which == "pre_run_hooks":
            made.pre_run_hooks[:] = [hook] * present
        elif which == "function":  # in place of a chain, as was usual before there were chains
            monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook if present else chain)
        else:
            (getattr(knobs.runtime, which).add if present else getattr(knobs.runtime, which).remove)(hook)

    chain = knobs.runtime.launch_enter_hook
    add(True)
    try:
        launch(3, *PLAIN)
        launch(3, *PLAIN)
        assert made.asked == 2
    finally:
        add(False)
    launch(3, *PLAIN)
    assert made.asked == 3  # what was compiled for a profiler is not kept
    launch(3, *PLAIN)
    assert made.asked == 3 and len(made.launched) == 1
    add(True)
    try:
        launch(3, *PLAIN)
        assert made.asked == 4
    finally:
        add(False)


def test_another_device_takes_tritons_own_way(stream, monkeypatch):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    launch(3, *PLAIN)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(3, *PLAIN)
    assert made.asked == 2 and not made.launched


def test_devices_have_kernels_of_their_own(stream, monkeypatch):
    class Tensor(torch.Tensor):
        def get_device(self):
            return 1

    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    launch(3, *PLAIN)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(3, PLAIN[0].as_subclass(Tensor), *PLAIN[1:])
    assert made.asked == 2 and not made.launched


@pytest.mark.parametrize("version, cuda", [("3.5.1", "13.0"), ("3.10.0", "13.0"), ("4.0.0+git1a2b", "13.0"),
                                           ("3.9.0", None)])
def test_unknown_ground_takes_tritons_own_way(stream, monkeypatch, version, cuda):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    for _ in range(3):
        launch(3, *PLAIN)
    assert made.asked == 3 and not made.launched


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git9844da95", "3.9.0"])
def test_known_versions_are_kept(stream, monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    for _ in range(3):
        launch(3, *PLAIN)
    assert made.asked == 1 and len(made.launched) == 2


def test_a_wrapped_or_interpreted_kernel_takes_tritons_own_way(stream):
    asked = []

    class Other:
        arg_names = router_kernel.arg_names

        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append((grid, arguments, options))

    launch = module.kept_launch(Other(), CONSTANTS, OPTIONS)
    for _ in range(2):
        launch(3, *PLAIN)
    assert asked == [((3,), (*PLAIN, *CONSTANTS.values()), OPTIONS)] * 2


@pytest.mark.parametrize("unready", [None, object()])
def test_what_is_not_compiled_yet_is_not_kept(stream, monkeypatch, unready):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(made, "run", lambda *_, **__: unready)  # a hook that compiles elsewhere, or a future
        launch(3, *PLAIN)
    launch(3, *PLAIN)
    assert made.asked == 1
    launch(3, *PLAIN)
    assert made.asked == 1 and len(made.launched) == 1


@pytest.mark.parametrize("arrangement", ["flat", "tuple", "neither"])
def test_either_arrangement_of_arguments_and_no_other(stream, monkeypatch, arrangement):
    """Triton 3.6 hands its C function a kernel's arguments one by one, 3.7 and later as a tuple."""
    made, called, launched = Kernel(), [], []

    class Launcher:
        def __init__(self):
            self.launch = lambda *passed: launched.append(passed)

        def __call__(self, *passed):
            called.append(passed)
            head, arguments = (*passed[:5], "pdl", *passed[5:9]), passed[9:]
            if arrangement == "neither":
                self.launch(*arguments, *head)
            elif arrangement == "tuple":
                self.launch(*head, arguments)
            else:
                self.launch(*head, *arguments)

    compiled = Kernel.compiled
    monkeypatch.setattr(Kernel, "compiled", lambda *a: (c := compiled(*a), c.__dict__.update(_run=Launcher()))[0])
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    launch(3, *PLAIN)
    called.clear()
    launch(3, *PLAIN)
    passed, = launched
    assert made.asked == 1 and len(called) == (arrangement == "neither")  # the C function, else Triton's launcher
    addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in PLAIN]
    Launcher()(3, 1, 1, 7, 1000, (1, 1, 0), None, None, None, *addresses, *CONSTANTS.values())
    assert passed == launched[1]


def test_a_kept_kernel_stays_loaded(stream):
    made = Kernel()
    launch = module.kept_launch(made, CONSTANTS, OPTIONS)
    launch(3, *PLAIN)
    compiled = weakref.ref(*made.made.values())
    made.made.clear()
    gc.collect()
    assert compiled() is not None  # Triton unloads the module of a kernel that is gone
    launch(3, *PLAIN)
    assert made.asked == 1
    del launch
    gc.collect()
    assert compiled() is None


def test_an_argument_that_the_key_does_not_know_is_refused():
    def kernel_of(*names):
        return SimpleNamespace(arg_names=list(names))

    module.kept_launch(kernel_of(*module.ARGUMENTS, *CONSTANTS), CONSTANTS, OPTIONS)
    for names in ((*module.ARGUMENTS, "scores", *CONSTANTS), ("scores", *module.ARGUMENTS, *CONSTANTS),
                  (*module.ARGUMENTS[:-1], *CONSTANTS), (*module.ARGUMENTS, *list(CONSTANTS)[1:])):
        with pytest.raises(TypeError, match="each argument's kind"):
            module.kept_launch(kernel_of(*names), CONSTANTS, OPTIONS)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def laid_out(logits, offset, row_stride, column_stride=1):
    """The same values, `offset` elements from an aligned address, with these strides."""
    rows, columns = logits.shape
    memory = torch.zeros(offset + rows * row_stride + columns * column_stride, dtype=logits.dtype, device=logits.device)
    return memory[offset:].as_strided((rows, columns), (row_stride, column_stride)).copy_(logits)


@needs_gpu
@pytest.mark.parametrize("traits", [routing(256, 9, 8, 4, shared=1), routing(160, 8)], ids=["grouped", "single"])
@pytest.mark.parametrize("options", ["", "map padding"])
def test_second_calls_do_not_ask_triton_and_are_right(traits, options, monkeypatch):
    made = kernel(implementations(traits)[1], traits)
    asked = []
    own_run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *a, **k: (asked.append(1), own_run(*a, **k))[1])
    (logits, bias), _ = cases.inputs(traits, 40, device="cuda")
    experts = traits["num_experts"]
    kwargs = {}
    if options:
        kwargs = dict(expert_map=torch.randperm(experts, device="cuda"),
                      num_token_non_padded=torch.tensor([33], device="cuda"))
    first = {}
    layouts = list(itertools.product((0, 1, 4), (experts, experts + 16, experts + 1))) + [(0, 1, 40), (1, 1, 41)]
    for repeat in range(2):  # the second time all the kinds are kept, so one kept for another kind would be found
        for layout in layouts:
            args = (laid_out(logits, *layout), bias)
            asked.clear()
            result = made(*args, **kwargs)
            assert len(asked) == 0 or repeat == 0
            assert oracle.check(traits, args, kwargs, result).passed
            for got, expected in zip(result, first.setdefault(layout, result)):
                assert same_bits(got, expected)


@needs_gpu
def test_kept_launches_follow_the_current_stream():
    traits = routing(256, 8, 8, 4)
    made = kernel(implementations(traits)[1], traits)
    (logits, bias), _ = cases.inputs(traits, 40, device="cuda")
    expected = made(logits, bias)
    torch.cuda.synchronize()
    other = torch.empty_like(logits)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # on another stream the kernel would not wait for the copy behind this
        other.copy_(logits)
        result = made(other, bias)
    side.synchronize()
    assert all(map(same_bits, result, expected))
