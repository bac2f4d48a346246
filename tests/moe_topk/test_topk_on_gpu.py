"""What only a GPU can show: graph capture and replay, one launch a call, many rows, determinism."""

from __future__ import annotations

import pytest
import torch
from topk_support import implementations, judged, kernel, routing, same_bits

from kernel_registry.ops.moe.topk import cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODELS = [pytest.param(traits, id=name) for name, traits in cases.WORKLOADS.items() if traits["scoring"] == "sigmoid"]


def full(traits):
    return routing(traits["num_experts"], traits["topk"], traits["num_expert_group"], traits["topk_group"],
                   traits.get("num_fused_shared_experts", 0))


@pytest.mark.parametrize("traits", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows(traits, dtype):
    traits = {**full(traits), "dtype": dtype}
    name = implementations(traits)[1]
    verdict = judged(name, traits, 20001, device="cuda", seed=2)
    assert verdict.undecided_fraction < 0.01
    args, kwargs = cases.inputs(traits, 5000, device="cuda")
    first = kernel(name, traits)(*args, **kwargs)
    for _ in range(20):
        for got, expected in zip(kernel(name, traits)(*args, **kwargs), first):
            assert same_bits(got, expected)
    for tokens in (1, 7, 4097):  # one block of rows a program, or several
        part = kernel(name, traits)(args[0][:tokens], args[1], **kwargs)
        assert same_bits(part[0], first[0][:tokens]) and torch.equal(part[1], first[1][:tokens])


@pytest.mark.parametrize("traits", [routing(256, 9, 8, 4, shared=1), routing(160, 8)], ids=["grouped", "single"])
def test_graph_replay_sees_new_values(traits):
    name = implementations(traits)[1]
    (logits, bias), _ = cases.inputs(traits, 50, device="cuda")
    number = torch.tensor([50], device="cuda")
    table = torch.arange(traits["num_experts"], device="cuda", dtype=torch.int32)
    made = kernel(name, traits)
    made(logits, bias, num_token_non_padded=number, expert_map=table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = made(logits, bias, num_token_non_padded=number, expert_map=table)
    for live in (0, 13, 50):
        logits.copy_(torch.randn_like(logits))
        bias.copy_(torch.randn_like(bias))
        table.copy_(torch.randperm(len(table), device="cuda"))
        number.fill_(live)
        weights.fill_(float("nan")), ids.fill_(12345)
        graph.replay()
        expected = made(logits, bias, num_token_non_padded=number, expert_map=table)
        assert same_bits(weights, expected[0]) and torch.equal(ids, expected[1])
        assert (ids[live:] == -1).all()


@pytest.mark.parametrize("traits", [routing(256, 9, 8, 4, shared=1), routing(160, 8)], ids=["grouped", "single"])
def test_one_launch(traits):
    made = kernel(implementations(traits)[1], traits)
    args, _ = cases.inputs(traits, 50, device="cuda")
    kwargs = dict(num_token_non_padded=torch.tensor(40, device="cuda"), expert_map=torch.arange(traits["num_experts"], device="cuda"))
    made(*args, **kwargs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made(*args, **kwargs)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
