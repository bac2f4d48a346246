"""What only a GPU can show of a layer: how much it launches, the shared expert beside it, graph capture, torch.compile
with the code that it makes for a GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import kernel_registry.torch_ops  # noqa: E402, F401
from kernel_registry import moe_layer, registry  # noqa: E402
from kernel_registry.layer import EXPERTS, FINALIZE, TOPK, LayerTraits  # noqa: E402
from kernel_registry.ops.moe.experts import cases  # noqa: E402
from tests.launches import of_experts, on_device  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = dict(num_experts=64, topk=6, hidden_size=512, intermediate_size=256, dtype="bfloat16")
TRAITS = LayerTraits("small", dict(num_experts=64, topk=6), SIZES, 2.5)


def made(tokens, **more):
    (hidden, w13, w2, *_), tensors = cases.inputs(SIZES, tokens, device="cuda")
    logits = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).cuda()
    bias = torch.linspace(-0.1, 0.1, 64).cuda()
    return moe_layer(TRAITS, w13, w2, correction_bias=bias, **tensors, **more), hidden, logits


def fallback(layer) -> bool:
    """Whether the experts are the reference's."""
    return registry.catalog.op(EXPERTS).implementation(layer.kernels[EXPERTS].name.split("|")[0]).fallback


@pytest.mark.parametrize("tokens", [1, 128, 512])
@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_launches_what_its_ops_launch_and_no_copy_more(tokens, shared):
    """With `out`, one launch for the routing, the experts' own, one for moe.finalize where there is a shared output, in
    this order and nothing after."""
    layer, hidden, logits = made(tokens)
    brought = dict(shared_output=hidden * 0.5) if shared else {}
    out, steps = torch.empty_like(hidden), []
    layer(hidden, logits, out=out, **brought, observe=lambda *step: steps.append(step))
    alone = {op: on_device(lambda: (layer._into if kwargs.get("out") is out and op == EXPERTS else layer.kernels[op])(
        *args, **kwargs)) for op, args, kwargs, _ in steps}
    found = on_device(lambda: layer(hidden, logits, out=out, **brought))
    print(f"{tokens} tokens: {len(found)} launches: {found}")
    assert len(alone[TOPK]) == 1 and len(alone.get(FINALIZE, [0])) == 1
    assert len(found) == sum(map(len, alone.values()))
    assert found[-1] == ("finalize_kernel" if shared else alone[EXPERTS][-1])
    if not fallback(layer):  # whose cast at the end is a copy
        assert len(alone[EXPERTS]) == of_experts(SIZES, tokens)
        assert not any("memcpy" in name.lower() or "copy" in name.lower() for name in found)
    fresh = on_device(lambda: layer(hidden, logits, **brought))
    assert len(fresh) == len(found), "with `out` it launches no more than without"


def test_the_shared_expert_on_another_stream():
    """It reads hidden_states while the experts run and `out`, full of NaN, is its neighbour, or is hidden_states: the
    same bits as on one stream, again and again."""
    stream = torch.cuda.Stream()

    def slow(x):
        for _ in range(20):  # long enough to be under way when the experts end
            x = torch.tanh(x.float() * 1.001).to(x.dtype)
        return x

    layer, hidden, logits = made(256, shared_expert=slow, shared_stream=stream)
    alone, *_ = made(256, shared_expert=slow)
    expected = alone(hidden, logits)
    buffer = torch.empty(2, *hidden.shape, dtype=hidden.dtype, device="cuda")
    for repeat in range(50):
        buffer[0] = hidden
        buffer[1] = float("nan")
        assert torch.equal(layer(buffer[0], logits, out=buffer[1]), expected), repeat
        assert torch.equal(buffer[0], hidden)
        assert torch.equal(layer(buffer[0], logits, out=buffer[0]), expected), repeat


@pytest.mark.parametrize("shared", [None, "stream"])
def test_a_captured_layer_replays(shared):
    if fallback(made(1)[0]):
        pytest.skip("the reference of moe.experts can't be captured")
    more = dict(shared_expert=torch.tanh, shared_stream=torch.cuda.Stream()) if shared else {}
    layer, hidden, logits = made(16, **more)
    out = torch.empty_like(hidden)
    layer(hidden, logits, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(hidden, logits, out=out)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        hidden.copy_(torch.randn(hidden.shape, generator=generator))
        logits.copy_(torch.randn(logits.shape, generator=generator))
        expected = layer(hidden, logits).clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second replays a captured graph
@pytest.mark.parametrize("shared", [False, True])
def test_a_compiled_layer_writes_into_a_part_of_a_buffer(mode, shared):
    """Through the ops that declare `out` changed: the same bits as uncompiled, before, beside and after other code that
    reads and writes the buffer, and one graph for every call."""
    ops = torch.ops.kernel_registry
    if mode == "reduce-overhead" and fallback(made(1)[0]):
        pytest.skip("the reference of moe.experts can't be captured")
    (_, w13, w2, *_), _ = cases.inputs(SIZES, 16, device="cuda")
    bias = torch.linspace(-0.1, 0.1, 64).cuda()

    def layer(hidden, logits, buffer):
        buffer[:, :8] += 1
        weights, ids = ops.moe_topk(logits, bias, 6, routed_scaling_factor=2.5)
        if shared:
            routed = ops.moe_experts(hidden * 0.5, w13, w2, weights, ids)
            ops.moe_finalize_out(buffer[:, 8:], routed, None, None, 64, torch.tanh(hidden))
        else:
            ops.moe_experts_out(buffer[:, 8:], hidden * 0.5, w13, w2, weights, ids)
        return buffer * 2

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(16, 512, generator=generator).bfloat16().cuda()
        logits = torch.randn(16, 64, generator=generator).cuda()
        buffer = torch.full((16, 520), 7.0, dtype=torch.bfloat16, device="cuda")
        other = buffer.clone()
        expected = layer(hidden, logits, other)
        assert torch.equal(compiled(hidden, logits, buffer), expected), seed
        assert torch.equal(buffer, other) and (buffer[:, :8] == 8).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
