"""What only a GPU can show: many rows, options that agree bit for bit, graph capture and replay, one launch a call,
streams, and programmatic dependent launches that read nothing too early."""

from __future__ import annotations

import pytest
import torch
from test_topk_mutants import copied
from topk_support import DEFAULTS, routing, same_bits

from kernel_registry import registry
from kernel_registry.errors import CaptureError
from kernel_registry.ops.moe.topk import cases, oracle
from kernel_registry.registry import Registry
from kernel_registry.traits.platform import detect

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kernel_registry.ops.moe.topk import triton_router  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
dependent_launches = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None or torch.cuda.get_device_capability() < (9, 0),
    reason="needs programmatic dependent launch: sm_90 or later")

# Few kinds of kernels, each used by several tests: on a GPU most of the time goes into compiling them.
OPTIONS = [(1, None), (1, "early"), (1, "late"), (2, "early"), (4, "early")]  # rows a program, dependent launch
TRAITS = {name: {**DEFAULTS, **traits} for name, traits in cases.WORKLOADS.items()}
SHAPES = {"groups": TRAITS["deepseek-v3"], "one group": TRAITS["glm-4.5"], "softmax": TRAITS["qwen3-moe"],
          "sqrtsoftplus": TRAITS["deepseek-v4"]}
by_shape = pytest.mark.parametrize("shape", SHAPES)
by_option = pytest.mark.parametrize("rows,launch", OPTIONS)


def served(traits, option):
    return option[0] << (traits["topk"] - 1).bit_length() <= 32


def router(traits, rows=1, launch=None, module=triton_router):
    return module.topk(**traits, platform=detect(), rows_per_program=rows, dependent_launch=launch)


def different(got, expected) -> str:
    """Where two results differ in a bit, or ""."""
    for name, a, b in zip(("weights", "ids"), got, expected):
        if not same_bits(a, b):
            a, b = a.cpu().view(torch.int32), b.cpu().view(torch.int32)
            rows = (a != b).any(dim=1).nonzero().flatten().tolist()
            return f"{name} of {len(rows)} rows differ, the first in row {rows[0]}: {a[rows[0]]} and {b[rows[0]]}"
    return ""


def on_gpu(traits, tokens, **how):
    return cases.inputs(traits, tokens, device="cuda", **how)


# ---- results ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model,dtype", [(name, "float32") for name in TRAITS] + [
    (name, "bfloat16") for name in ("deepseek-v3-fused-shared", "kimi-k2", "qwen3-moe", "deepseek-v4")])
def test_many_rows(model, dtype):
    """Judged by the oracle with the plainest options; all others give the same bits, and so do parts of the batch."""
    traits = {**TRAITS[model], "dtype": dtype}
    options = [option for option in OPTIONS if served(traits, option)]
    made = {option: router(traits, *option) for option in options}
    for flavour, tokens in (("random", 10001), ("offset_bias", 1001), ("ties", 500), ("nonfinite", 500), ("large", 500),
                            ("masked_experts", 300)):
        args, kwargs = on_gpu(traits, tokens, seed=2, flavour=flavour)
        expected = made[1, None](*args, **kwargs)
        verdict = oracle.check(traits, args, kwargs, expected)
        assert verdict.passed, f"{flavour}: {verdict.detail}"
        if flavour == "random":
            print(f"{model} {dtype}: {verdict.detail}")
            assert verdict.undecided < 0.01 * verdict.rows or not verdict.rows
        for option in options:
            assert not (found := different(made[option](*args, **kwargs), expected)), f"{flavour} {option}: {found}"
            if flavour == "random":
                for part in (1, 2, 3, 7, 4097):
                    got = made[option](args[0][:part], args[1], **kwargs)
                    found = different(got, [whole[:part] for whole in expected])
                    assert not found, f"{option}, {part} rows: {found}"


@by_shape
@by_option
def test_the_same_again_and_again(shape, rows, launch):
    traits = SHAPES[shape]
    made = router(traits, rows, launch)
    args, kwargs = on_gpu(traits, 5000)
    first = made(*args, **kwargs)
    for repeat in range(100):
        assert not (found := different(made(*args, **kwargs), first)), f"repeat {repeat}: {found}"


@by_shape
@by_option
def test_several_streams(shape, rows, launch):
    traits = SHAPES[shape]
    made = router(traits, rows, launch)
    calls = [on_gpu(traits, 300 + 50 * seed, seed=seed) for seed in range(4)]
    expected = [made(*args, **kwargs) for args, kwargs in calls]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(50):
        for (args, kwargs), stream, count, (weights, ids) in zip(calls, streams, wrong, expected):
            with torch.cuda.stream(stream):
                got = made(*args, **kwargs)
                count += (got[1] != ids).sum() + (got[0].view(torch.int32) != weights.view(torch.int32)).sum()
    torch.cuda.synchronize()
    assert [count.item() for count in wrong] == [0] * len(calls)


# ---- the registry's choice -------------------------------------------------------------------------------------------

def switch_points(table) -> set[int]:
    """The token counts from which a bound kernel's table takes another implementation."""
    own = set(table.bounds) if table.trait == "num_tokens" else set()
    return own.union(*(switch_points(branch) for branch in table.branches))


@pytest.mark.parametrize("model", TRAITS)
def test_a_switch_of_implementation_changes_no_bit(model):
    traits = TRAITS[model]
    bound = registry.dispatch("moe.topk", **traits)
    points = sorted(switch_points(bound.table))
    args, kwargs = on_gpu(traits, max(points, default=64) + 1)
    whole = bound(*args, **kwargs)
    print(f"{model}: {bound.name}, switches at {points}")
    assert points or bound.name == "triton_few_experts", "nothing to switch between"
    for tokens in sorted({1, *(point + step for point in points for step in (-1, 0, 1))}):
        named = registry.dispatch("moe.topk", num_tokens=tokens, **traits)
        for about, call in (("bound", bound), (f"dispatched for {tokens}: {named.name}", named)):
            found = different(call(args[0][:tokens], args[1], **kwargs), [part[:tokens] for part in whole])
            assert not found, f"{tokens} tokens, {about}: {found}"
    for point in points:
        names = [registry.dispatch("moe.topk", num_tokens=tokens, **traits).name for tokens in (point - 1, point)]
        assert names[0] != names[1], f"{names[0]} on both sides of {point}"


# ---- CUDA graphs and launches ----------------------------------------------------------------------------------------

@by_shape
@by_option
def test_graph_replay_sees_new_values(shape, rows, launch):
    traits = SHAPES[shape]
    (logits, bias), _ = on_gpu(traits, 50)
    number = torch.tensor([50], device="cuda")
    table = torch.arange(traits["num_experts"], device="cuda", dtype=torch.int32)
    made = router(traits, rows, launch)
    kwargs = dict(num_token_non_padded=number, expert_map=table)
    made(logits, bias, **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = made(logits, bias, **kwargs)
    for live in (0, 13, 50, 1, 49):
        logits.copy_(torch.randn_like(logits))
        if bias is not None:
            bias.copy_(torch.randn_like(bias))
        table.copy_(torch.randperm(len(table), device="cuda"))
        number.fill_(live)
        weights.fill_(float("nan")), ids.fill_(12345)
        graph.replay()
        args = (logits, bias)
        verdict = oracle.check(traits, args, kwargs, (weights, ids))
        assert verdict.passed, f"{live} live rows: {verdict.detail}"
        assert not (found := different((weights, ids), made(*args, **kwargs))), f"{live} live rows: {found}"
        assert (ids[live:] == -1).all() and (weights[live:] == 0).all()


@by_shape
@by_option
def test_one_launch(shape, rows, launch):
    traits = SHAPES[shape]
    made = router(traits, rows, launch)
    args, _ = on_gpu(traits, 50)
    kwargs = dict(num_token_non_padded=torch.tensor([40], device="cuda"),
                  expert_map=torch.arange(traits["num_experts"], device="cuda", dtype=torch.int32))
    for _ in range(2):  # the second call takes the kept launch
        made(*args, **kwargs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made(*args, **kwargs)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "router_kernel" in launched[0], launched


def test_a_dispatch_during_capture_is_refused_and_a_bound_one_is_captured():
    fresh = Registry()
    traits, unresolved = routing(96, 6), routing(72, 5)
    bound = fresh.dispatch("moe.topk", **traits)
    (logits, bias), _ = on_gpu(traits, 33)
    expected = bound(logits, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CaptureError, match="was not dispatched before CUDA-graph capture began"):
            fresh.dispatch("moe.topk", **unresolved)
        again = fresh.dispatch("moe.topk", **traits)  # known: no error
        result = bound(logits, bias)
    assert again is bound
    for part in result:
        part.fill_(7)
    graph.replay()
    assert not different(result, expected)
    assert fresh.dispatch("moe.topk", **unresolved).name  # and later it is resolved as ever


def test_a_torch_op_unresolved_during_capture_is_refused():
    import kernel_registry.torch_ops  # noqa: F401

    route = torch.ops.kernel_registry.moe_topk
    logits, bias = torch.randn(5, 88, device="cuda"), torch.zeros(88, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CaptureError, match="was not dispatched before CUDA-graph capture began"):
            route(logits, bias, topk=3)
        doubled = logits * 2  # a graph of something
    graph.replay()
    assert torch.equal(doubled, logits * 2)
    expected = route(logits, bias, topk=3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(logits, bias, topk=3)
    graph.replay()
    assert not different(captured, expected)


# ---- programmatic dependent launch -----------------------------------------------------------------------------------

@triton.jit
def produce(logits_from, bias_from, logits, bias, experts, total, nanoseconds, HAS_BIAS: tl.constexpr,
            BLOCK: tl.constexpr):
    """Lets the next kernel take its places at once, and writes the logits and the bias long after."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    now = began
    while now - began < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(logits + place, tl.load(logits_from + place, mask=place < total), mask=place < total)
    if HAS_BIAS:
        tl.store(bias + place, tl.load(bias_from + place, mask=place < experts), mask=place < experts)


@triton.jit
def consume(weights, ids, weights_to, ids_to, total, BLOCK: tl.constexpr):
    """Copies a result, in a dependent launch of its own."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(weights_to + place, tl.load(weights + place, mask=place < total), mask=place < total)
    tl.store(ids_to + place, tl.load(ids + place, mask=place < total), mask=place < total)


def chain(made, traits, tokens, *, steps=50, nanoseconds=300000):
    """`steps` times a late producer, the router and a consumer, all dependent launches with nothing between them: the
    results, and what is to come out, of one undisturbed call after the other. The producer is late by more than the
    host takes to launch the other two, or nothing would overlap."""
    generator = torch.Generator("cuda").manual_seed(0)
    experts, topk, has_bias = traits["num_experts"], traits["topk"], traits["has_bias"]
    logits_from = torch.randn(steps, tokens, experts, generator=generator, device="cuda")
    bias_from = torch.randn(steps, experts, generator=generator, device="cuda")
    logits, bias = torch.zeros(tokens, experts, device="cuda"), torch.zeros(experts, device="cuda")
    weights = torch.empty(steps, tokens, topk, device="cuda")
    ids = torch.empty(steps, tokens, topk, dtype=torch.int32, device="cuda")
    undisturbed = router(traits)
    expected = [undisturbed(logits_from[i], bias_from[i] if has_bias else None) for i in range(steps)]
    held = []  # no memory is handed from one step to another: that is the allocator's business, not the router's
    for measured in (False, True):  # the first time compiles
        torch.cuda.synchronize()
        for i in range(steps if measured else 2):
            produce[(-(-logits.numel() // 1024),)](
                logits_from[i], bias_from[i], logits, bias, experts, logits.numel(), nanoseconds, HAS_BIAS=has_bias,
                BLOCK=1024, num_warps=4, launch_pdl=True)
            result = made(logits, bias if has_bias else None)
            consume[(-(-ids[i].numel() // 1024),)](*result, weights[i], ids[i], ids[i].numel(), BLOCK=1024, num_warps=4,
                                                   launch_pdl=True)
            held.append(result)
        torch.cuda.synchronize()
        if not measured:
            weights.fill_(float("nan")), ids.fill_(12345)
    return list(zip(weights, ids)), expected


@dependent_launches
@by_shape
@by_option
@pytest.mark.parametrize("tokens", [1, 64, 1500])
def test_nothing_is_read_before_it_is_written(shape, rows, launch, tokens):
    traits = SHAPES[shape]
    got, expected = chain(router(traits, rows, launch), traits, tokens)
    wrong = [(step, found) for step, (a, b) in enumerate(zip(got, expected)) if (found := different(a, b))]
    assert not wrong, f"{len(wrong)} of {len(got)} steps, the first: {wrong[0]}"


@dependent_launches
@pytest.mark.parametrize("launch", ["early", "late"])
def test_a_router_that_does_not_wait_is_found(launch):
    """The chain above would show it: launches do overlap."""
    traits = SHAPES["one group"]
    with copied("triton_router", "router_kernel.py", "tl.extra.cuda.gdc_wait()", "pass") as module:
        got, expected = chain(router(traits, 1, launch, module), traits, 64)
    wrong = sum(bool(different(a, b)) for a, b in zip(got, expected))
    print(f"{launch}: {wrong} of {len(got)} steps read too early")
    assert wrong
