"""Every op as torch.ops.kernel_registry.<op>: what torch's own checks, torch.compile and fake tensors make of it.

The registered op is tested with the shipped kernels (Triton's interpreter without a GPU); which implementation ran is
seen with kernels that sign their output, behind a library of their own.
"""

from __future__ import annotations

import inspect
import itertools
import traceback
import warnings

import pytest

torch = pytest.importorskip("torch")

import kernel_registry.torch_ops as torch_ops  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import CaptureError, InputError, OverrideError, TraitError  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

OP = torch.ops.kernel_registry.moe_topk
DEEPSEEK = dict(topk=8, num_expert_group=8, topk_group=4)
CASES = {  # experts, dtype, bias, op arguments: both Triton kernels and what only the reference serves
    "grouped": (256, torch.float32, True, {**DEEPSEEK, "routed_scaling_factor": 2.5}),
    "grouped with a shared slot": (256, torch.float32, True, {**DEEPSEEK, "topk": 9, "num_fused_shared_experts": 1}),
    "one group, 160 experts": (160, torch.float32, True, {"topk": 8}),
    "bfloat16 logits": (64, torch.bfloat16, True, {"topk": 6}),
    "reference: softmax without bias": (64, torch.float32, False, {"topk": 4, "scoring": "softmax"}),
    "reference: logits' own rounding": (64, torch.bfloat16, True, {"topk": 4, "score_dtype": "logits"}),
}
_names = itertools.count()


@pytest.fixture(params=CASES, ids=lambda name: name)
def case(request):
    """(tokens -> args of the op, keyword arguments)."""
    experts, dtype, has_bias, arguments = CASES[request.param]
    where = device()

    def args(tokens: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(tokens, experts, generator=generator).to(dtype)
        bias = torch.randn(experts, generator=generator).to(where) if has_bias else None
        return logits.to(where), bias
    return args, arguments


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # the interpreter's exp overflows
        yield
    torch._dynamo.reset()


def device() -> str:
    return "cuda" if registry.platform().kind in ("cuda", "hip") else "cpu"


def extras(args, arguments):
    """The tensors that the op takes beside the first two: rows that are padding, and a permutation of the experts."""
    logits, _ = args
    experts = logits.shape[1] + arguments.get("num_fused_shared_experts", 0)
    return {"num_token_non_padded": torch.tensor([2], device=logits.device),
            "expert_map": torch.arange(experts, dtype=torch.int32, device=logits.device).flip(0)}


def same(a, b) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# ---- torch's own checks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(case, tokens):
    args, arguments = case
    assert set(torch.library.opcheck(OP.default, args(tokens), arguments).values()) == {"SUCCESS"}


def test_opcheck_with_padding_and_map(case):
    args, arguments = case
    given = args(3)
    found = torch.library.opcheck(OP.default, given, {**arguments, **extras(given, arguments)})
    assert set(found.values()) == {"SUCCESS"}


def test_every_op_with_a_schema_is_a_torch_op():
    offered = {torch_ops.op_name(name): op.contract for name, op in registry.catalog.ops.items() if op.contract.schema}
    assert "moe_topk" in offered
    for name, contract in offered.items():
        schema = getattr(torch.ops.kernel_registry, name).default._schema
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.kernel_registry, name).default.tags
        told = {a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty for a in schema.arguments}
        taken = {p.name: p.default for p in inspect.signature(contract.unpack).parameters.values()}
        if contract.schema_out:
            mutating = getattr(torch.ops.kernel_registry, name + "_out").default._schema
            assert taken.pop("out") is None and mutating.is_mutable and not schema.is_mutable and not mutating.returns
            assert {a.name for a in mutating.arguments if a.is_write} == {"out"}
            same = {a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty
                    for a in mutating.arguments if not a.is_write}
            assert same.items() <= told.items(), f"{name}_out: other arguments or defaults than without out"
        assert told == taken, f"{name}: the schema and unpack have different arguments or defaults"


@pytest.mark.parametrize("backend", ["CPU", "CUDA", "Meta"])
def test_every_device_has_a_kernel(backend):
    """ROCm's tensors are CUDA's to torch."""
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("kernel_registry::moe_topk", backend)


def test_it_is_the_dispatched_kernel(case):
    args, arguments = case
    given = args(5)
    traits, call_args, call_kwargs = registry.catalog.op("moe.topk").contract.unpack(*given, **arguments)
    assert same(OP(*given, **arguments), registry.dispatch("moe.topk", **traits)(*call_args, **call_kwargs))


def test_wrong_tensors_are_the_registrys_own_errors():
    logits = torch.zeros(2, 256, device=device())
    with pytest.raises(InputError, match=r"correction_bias is \[255\] float32 .* expected \[256\] float32"):
        OP(logits, torch.zeros(255, device=device()), 8, 8, 4)
    with pytest.raises(TraitError, match="num_experts % num_expert_group == 0 does not hold"):
        OP(logits, torch.zeros(256, device=device()), 8, 7, 4)


# ---- fake tensors and torch.compile ----------------------------------------------------------------------------------

def test_fake_outputs_have_the_real_ones_shapes_and_dtypes(case):
    args, arguments = case
    real = OP(*args(7), **arguments)
    with FakeTensorMode() as mode:
        logits, bias = (mode.from_tensor(t) if t is not None else None for t in args(7))
        fake = OP(logits, bias, **arguments)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
    assert [t.dtype for t in real] == [torch.float32, torch.int32]


def test_meta_tensors():
    weights, ids = OP(torch.empty(11, 256, device="meta"), torch.empty(256, device="meta"), **DEEPSEEK)
    assert (weights.shape, weights.dtype, weights.device.type) == ((11, 8), torch.float32, "meta")
    assert (ids.shape, ids.dtype, ids.device.type) == ((11, 8), torch.int32, "meta")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
def test_compiled_equals_eager(case, dynamic):
    args, arguments = case
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=dynamic)
    def layer(logits, bias):
        weights, ids = OP(logits * 1.0, bias, **arguments)
        return weights + 0.0, ids

    built = set()
    for tokens in (2, 5, 17) if dynamic else (5,):
        given = args(tokens, seed=tokens)
        assert same(layer(*given), OP(*given, **arguments))
        built.add(graphs.frame_count)  # a float argument makes torch build its first graph twice, so not always 1
    assert len(built) == 1, f"a number of tokens was specialised on: graphs after each call {built}"


def test_inductor_compiles_it():
    """The default backend, once: it generates code around the op, so it needs a compiler for that code."""
    logits, bias = torch.randn(4, 64, device=device()), torch.randn(64, device=device())

    def layer(logits, bias):
        weights, ids = OP(torch.nn.functional.relu(logits), bias, 4)
        return weights * 2, ids
    try:
        compiled = torch.compile(layer, fullgraph=True)(logits, bias)
    except Exception as error:  # which class depends on torch's version
        if "No working C++ compiler" not in str(error):
            raise
        pytest.skip("this machine has no C++ compiler")
    assert same(compiled, layer(logits, bias))


# ---- the choice stays outside the graph ------------------------------------------------------------------------------

@pytest.fixture
def signed(toy):
    """A registry of moe.topk whose kernels fill the weights with their own number, and its torch op."""
    module = toy.module("""
        import torch


        def signing(number):
            def factory(*, topk, **_):
                def kernel(router_logits, correction_bias, **_):
                    shape = router_logits.shape[0], topk
                    return torch.full(shape, number), torch.zeros(shape, dtype=torch.int32)
                return kernel
            return factory


        one, two, host = signing(1.0), signing(2.0), signing(3.0)
        """.replace("\n        ", "\n"))
    everything = "dtype: any, bias_dtype: any, contiguous: any, num_expert_group: any, topk_group: any"
    path = toy.write(f"""
version: 1
ops:
  moe.topk:
    contract: kernel_registry.ops.moe.topk.contract:TopK
    implementations:
      one: {{target: "{module}:one", when: {{platform: "cuda", {everything}}}, rank: 1}}
      two: {{target: "{module}:two", when: {{platform: "cuda", {everything}}}}}
      host: {{target: "{module}:host", when: {{platform: "cpu", {everything}}}}}
""")
    libraries = []

    def build(**options):
        source = toy.registry(path, **options)
        name = f"kernel_registry_test_{next(_names)}"
        libraries.append(torch.library.Library(name, "DEF"))
        torch_ops.register(source, "moe.topk", libraries[-1])
        return source, getattr(torch.ops, name).moe_topk
    yield build
    for library in libraries:
        library._destroy()


@pytest.fixture
def on_cuda(signed, monkeypatch):
    """`signed` for a machine whose GPU tensors lie, for this test, on the CPU."""
    source, op = signed(platform="sm_90")
    contract = source.catalog.op("moe.topk").contract
    unpack = contract.unpack
    monkeypatch.setattr(contract, "unpack", staticmethod(lambda *a, **k: _as_gpu(*unpack(*a, **k))))
    return source, op


def _as_gpu(traits, args, kwargs):
    return {**traits, "platform": "sm_90"}, _OnGpu(args), kwargs


class _OnGpu(tuple):
    """Arguments of which the first says that it lies on a GPU, to whoever asks by index."""

    def __getitem__(self, index):
        class Claim:
            device = torch.device("cuda")
        return Claim


ARGUMENTS = torch.zeros(2, 16), torch.zeros(16), 4


def who(outputs) -> float:
    return outputs[0][0, 0].item()


def test_an_override_takes_effect_without_a_new_graph(on_cuda):
    source, op = on_cuda
    graphs = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(lambda x, b, k: op(x, b, k), backend=graphs, fullgraph=True)
    assert who(layer(*ARGUMENTS)) == 1
    with source.override("moe.topk", "two"):
        assert who(layer(*ARGUMENTS)) == 2
        with source.disable("moe.topk", "two"), pytest.raises(OverrideError, match="two.* disabled"):
            layer(*ARGUMENTS)
    assert who(layer(*ARGUMENTS)) == 1
    assert graphs.frame_count == 1


def test_a_loaded_override_file_and_a_reload_take_effect_without_a_new_graph(on_cuda, toy):
    source, op = on_cuda
    graphs = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(lambda x, b, k: op(x, b, k), backend=graphs, fullgraph=True)
    assert who(layer(*ARGUMENTS)) == 1
    file = toy.write("version: 1\noverrides: [{op: moe.topk, disable: one}]\n")
    source.load_overrides(file)
    assert who(layer(*ARGUMENTS)) == 2
    file.write_text("version: 1\n")
    source.reload()
    assert who(layer(*ARGUMENTS)) == 1
    assert graphs.frame_count == 1


def test_a_host_tensor_on_a_gpu_machine_is_dispatched_for_the_cpu(signed):
    source, op = signed(platform="sm_90")
    assert who(op(*ARGUMENTS)) == 3
    assert source.dispatch("moe.topk", num_experts=16, topk=4).name == "one"


# ---- past torch's dispatcher -----------------------------------------------------------------------------------------

@pytest.fixture
def through(monkeypatch):
    """Whether each dispatch of the shipped registry was made below torch's dispatcher."""
    found, dispatch = [], registry.dispatch

    def noting(op, **traits):
        found.append(any(frame.filename == torch._ops.__file__ for frame in traceback.extract_stack()))
        return dispatch(op, **traits)

    monkeypatch.setattr(registry, "dispatch", noting)
    return found


def test_a_call_that_nobody_looks_at_goes_past_the_dispatcher(case, through):
    args, arguments = case
    wanted, found = OP(*args(3), **arguments), torch_ops.calling("moe.topk")(*args(3), **arguments)
    assert through == [True, False] and all(same(a, b) for a, b in zip(found, wanted))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops that are called inside."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_a_call_that_somebody_looks_at_is_the_op(through):
    call = torch_ops.calling("moe.topk")
    logits, bias = torch.randn(2, 64, device=device()), torch.zeros(64, device=device())
    with Seen() as seen:
        call(logits, bias, topk=4)
    assert seen.ops[0] is OP.default
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(logits, bias, topk=4)
    assert "kernel_registry::moe_topk" in {event.key for event in profile.key_averages()}
    call(torch.nn.Parameter(logits), bias, topk=4)
    call(logits.clone().requires_grad_(), bias, topk=4)  # torch tells a backward that kernels have none
    call(logits, bias.clone().requires_grad_(), topk=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one row after another is slow
        ids = torch.vmap(lambda rows: call(rows, bias, topk=4)[1])(logits[None])  # kernels can't read its tensors
    assert through == [True] * 6 and torch.equal(ids[0], OP(logits, bias, topk=4)[1])
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(logits), mode.from_tensor(bias), topk=4)[0].shape == (2, 4)
    graphs = []
    torch.compile(lambda *a: call(*a, topk=4), backend=lambda graph, _: graphs.append(graph) or graph.forward,
                  fullgraph=True)(logits, bias)
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"][0] is OP.default


# ---- graph capture ---------------------------------------------------------------------------------------------------

def capturing(monkeypatch, state: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state)


def test_a_dispatch_first_made_during_capture_is_an_error(signed, monkeypatch):
    source, op = signed(platform="cpu")
    op(*ARGUMENTS)  # resolved before the capture begins
    capturing(monkeypatch, True)
    assert who(op(*ARGUMENTS)) == 3, "what was dispatched before must work while capturing"
    with pytest.raises(CaptureError, match=r"moe\.topk\(num_experts=16, topk=5.*before CUDA-graph capture") as caught:
        op(*ARGUMENTS[:2], 5)
    assert "dispatch or bind it once" in str(caught.value)
    capturing(monkeypatch, False)
    assert op(*ARGUMENTS[:2], 5)[0].shape == (2, 5), "the refused dispatch must have left nothing behind"


def test_an_override_first_met_during_capture_is_an_error(signed, monkeypatch):
    source, _ = signed(platform="sm_90")
    source.dispatch("moe.topk", num_experts=16, topk=4)
    capturing(monkeypatch, True)
    with source.override("moe.topk", "two"), pytest.raises(CaptureError):
        source.dispatch("moe.topk", num_experts=16, topk=4)
