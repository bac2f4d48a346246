"""What only a GPU can show: launches a call, and that what a captured graph reads stays where it is."""

from __future__ import annotations

import time

import pytest
import torch

from kernel_registry import Registry, moe_router
from kernel_registry.errors import CaptureError

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OP = "moe.routing_bias"
ROUTER = dict(num_experts=256, topk=8, num_expert_group=8, topk_group=4, dtype="bfloat16")
TO_BF16 = dict(ROUTER, bias_dtype="bfloat16")


@pytest.fixture(scope="module")
def registry():
    return Registry(plugins=False, environment=False)


def exact() -> torch.nn.Parameter:
    return torch.nn.Parameter((torch.randint(-255, 256, (256,)) / 64).cuda(), requires_grad=False)


def launches(call) -> list[str]:
    """Names of the kernels and copies that a call runs on the device, when it has run before."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_a_call_and_two_with_a_cast(registry):
    logits, bias = torch.randn(16, 256).bfloat16().cuda(), exact()
    route = moe_router(bias, registry=registry, **ROUTER)
    assert route.traits["bias_dtype"] == "float32" and len(launches(lambda: route(logits, bias))) == 1
    narrow = registry.bind("moe.topk", **TO_BF16)
    assert len(launches(lambda: narrow(logits, bias.to(torch.bfloat16)))) == 2
    registry.prepare(OP, bias, **TO_BF16)
    take = registry.bind(OP, **TO_BF16)
    assert len(launches(lambda: narrow(logits, take(bias)))) == 1


def test_a_bias_that_a_graph_reads_stays(registry):
    logits, bias = torch.randn(16, 256).bfloat16().cuda(), exact()
    registry.prepare(OP, bias, **TO_BF16)
    route, take = registry.bind("moe.topk", **TO_BF16), registry.bind(OP, **TO_BF16)
    route(logits, take(bias))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = route(logits, take(bias))
        with pytest.raises(CaptureError, match="while a CUDA graph is captured"):
            registry.prepare(OP, bias, **TO_BF16)
    with pytest.raises(CaptureError, match="was read by a captured CUDA graph"):
        registry.prepare(OP, bias, **ROUTER, bias_dtype="float32")
    bias.data.copy_(exact())  # a reload: the same storage, which the graph reads
    graph.replay()
    assert torch.equal(ids, route(logits, bias)[1])


def test_the_biases_of_61_layers_take_a_small_part_of_two_seconds(registry):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(61))
    for layer in model.layers:
        layer.e_score_correction_bias = exact()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    registry.prepare(OP, model, **TO_BF16)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1 and torch.cuda.memory_allocated() <= before


def test_a_call_is_compiled_where_cuda_runs(registry):
    """Whether a graph is captured, which a call asks there, is nothing that a traced graph could hold."""
    bias, take = registry.prepare(OP, exact(), **TO_BF16), registry.bind(OP, **TO_BF16)
    x = torch.ones(256, device="cuda")
    assert torch.equal(torch.compile(lambda x: x + take(bias), backend="eager", fullgraph=True)(x), x + bias)
