"""What only a GPU can show: one launch a call, in a graph too, and counters that launches do not share."""

from __future__ import annotations

import gc

import pytest
import torch
from indexer_checkpoints import checkpoint
from indexer_support import SIZES, layer, model, same, weight

from kernel_registry import registry
from kernel_registry.ops.indexer.wk_weights_proj import cases, oracle, reference, torch_fused
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader

pytest.importorskip("triton")
from kernel_registry.ops.indexer.wk_weights_proj import triton_columns, triton_fused  # noqa: E402
from tests.launches import on_device  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEEPSEEK = layer(7168, 128, 64)
TILES = dict(columns_per_program=16)
WIDE = dict(splits=7, block_k=128)


def made(**options):
    return triton_fused.fused(**DEEPSEEK, **options, platform=registry.platform())


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 128])
@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_a_models_layer(tokens, flavour):
    args, kwargs = cases.inputs(DEEPSEEK, tokens, device="cuda", flavour=flavour)
    expected = made()(*args)
    verdict = oracle.check(DEEPSEEK, args, kwargs, expected)
    assert verdict.passed, verdict.detail
    for got, wanted in zip(made(**TILES)(*args), expected):
        assert same(got, wanted)
    for kernel in (made(**WIDE), torch_fused.fused(**DEEPSEEK), reference.separate(**DEEPSEEK)):
        assert oracle.check(DEEPSEEK, args, kwargs, kernel(*args)).passed


def test_one_launch():
    args, _ = cases.inputs(DEEPSEEK, 4, device="cuda")
    for made_by, name in ((triton_columns, "column_kernel"), (triton_fused, "fused_kernel")):
        kernel = made_by.fused(**DEEPSEEK, platform=registry.platform())
        assert on_device(lambda: kernel(*args)) == [name]


@pytest.mark.parametrize("spare", [True, False])
def test_graphs_beside_each_other_and_beside_calls(spare):
    """Two graphs and plain calls on three streams at once, a thousand times: the same bits each time. Also where the
    graph must zero its own counters."""
    kernel = made(**WIDE)
    calls = [cases.inputs(DEEPSEEK, tokens, seed=tokens, device="cuda")[0] for tokens in (128, 100, 7)]
    expected = [torch.cat(kernel(*call), -1).clone() for call in calls]
    graphs, outputs = [], []
    for call in calls[:2]:
        if not spare:
            triton_arrivals = kernel.__closure__[[*kernel.__code__.co_freevars].index("arrivals")].cell_contents
            triton_arrivals.spare[call[0].device].clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(torch.cat([torch.cat(kernel(*call), -1) for _ in range(3)]))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(1000):
        for stream, graph in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            plain = torch.cat(kernel(*calls[2]), -1)
    torch.cuda.synchronize()
    assert same(plain, expected[2])
    for got, wanted in zip(outputs, expected):
        assert same(got, wanted.repeat(3, 1))


def test_every_replay_gives_the_same_bits():
    kernel = made()
    args, _ = cases.inputs(DEEPSEEK, 128, device="cuda")
    first = torch.cat(kernel(*args), -1)
    for _ in range(500):
        assert torch.equal(torch.cat(kernel(*args), -1), first)


def test_a_graph_that_outlives_its_kernel():
    """registry.reload() makes other kernels: what the graph counts in must not become another tensor's memory."""
    kernel = made(**WIDE)
    args, _ = cases.inputs(DEEPSEEK, 128, device="cuda")
    expected = torch.cat(kernel(*args), -1).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = kernel(*args)
    torch.cuda.synchronize()
    del kernel
    gc.collect()
    others = [torch.full((1024 * 48,), -1, dtype=torch.int32, device="cuda") for _ in range(20)]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same(torch.cat(outputs, -1), expected) and all((other == -1).all() for other in others)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_graph_sees_what_a_reload_wrote(home):
    """From a checkpoint on either device into parameters on the GPU, the bits that the CPU's have."""
    traits = layer(**SIZES, wk_format="fp8_block")
    holder = model((0,), wk_format="fp8_block").to("cuda")
    own = holder.layers["0"].indexer.wk_weights_proj
    own.kernel = triton_fused.fused(**traits, platform=registry.platform())
    x = torch.randn(4, SIZES["hidden_size"], device="cuda").bfloat16()
    loader, graph, outputs = Loader(holder), torch.cuda.CUDAGraph(), None
    for seed in (0, 1):
        tensors, expected = checkpoint("fp8_block", seed=seed)
        loader.load_weights((name, tensor.to(home)) for name, tensor in tensors.items())
        loader.finish(registry)
        assert same(weight(holder), expected)
        if outputs is None:
            own(x)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                outputs = own(x)
        graph.replay()
        torch.cuda.synchronize()
        verdict = oracle.check(traits, (x, expected), {}, outputs)
        assert verdict.passed, verdict.detail
