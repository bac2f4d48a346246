"""What only a GPU can show: offsets past 2^31, one launch a call or none, graph capture and replay."""

from __future__ import annotations

import pytest
import torch
from finalize_support import REDUCED, layer

from kernel_registry.ops.moe.finalize import cases, oracle

pytest.importorskip("triton")
from kernel_registry.ops.moe.finalize import triton_finalize  # noqa: E402
from tests.launches import on_device  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("model", cases.WORKLOADS)
@pytest.mark.parametrize("tokens", [1, 33, 515])
def test_model_layers(model, tokens):
    traits = cases.WORKLOADS[model]
    args, kwargs = cases.inputs(traits, tokens, device="cuda")
    for columns in (256, 512):
        result = triton_finalize.finalize(**traits, columns_per_program=columns)(*args, **kwargs)
        verdict = oracle.check(traits, args, kwargs, result)
        assert verdict.passed, verdict.detail


@pytest.mark.parametrize("traits", [layer(256, 8, 7168, has_shared=True, output_alias=True),
                                    layer(32, 8, 7168, expert_parallel=True, output_alias=True),
                                    layer(256, 8, 7168, has_shared=True, output_alias=True, **REDUCED)])
def test_one_launch_and_no_copy(traits):
    args, kwargs = cases.inputs(traits, 16, device="cuda")
    made = triton_finalize.finalize(**traits)
    assert on_device(lambda: made(*args, **kwargs)) == ["finalize_kernel"]


def test_no_launch_where_nothing_is_left_to_do():
    made = triton_finalize.finalize(**layer(256, 8, 7168, **REDUCED))
    rows = torch.randn(16, 7168, device="cuda").bfloat16()
    assert on_device(lambda: made(rows)) == []


def test_offsets_past_two_to_the_31():
    """The last token's rows begin past 2^31 elements; and slots that lie further apart than that."""
    traits = layer(8, 2, 16384, weights_applied=True)
    tokens = 2**31 // (2 * 16384) + 3
    made = triton_finalize.finalize(**traits)
    rows = torch.empty(tokens, 2, 16384, dtype=torch.bfloat16, device="cuda")
    rows[-4:] = torch.randn(4, 2, 16384, device="cuda").bfloat16()
    apart = torch.empty(2, tokens, 2 * 16384, dtype=torch.bfloat16, device="cuda")[:, -4:, :16384].transpose(0, 1)
    apart.copy_(rows[-4:])
    tail = rows[-4:]
    expected = (tail[:, 0].float() + tail[:, 1].float()).bfloat16()
    assert rows.numel() > 2**31 and apart.stride(1) > 2**31
    assert torch.equal(made(rows)[-4:], expected)
    assert torch.equal(made(apart), expected)


def test_a_captured_graph_replays_with_other_values():
    traits = layer(32, 8, 2880, expert_parallel=True, has_shared=True, output_alias=True)
    made = triton_finalize.finalize(**traits)
    args, kwargs = cases.inputs(traits, 7, device="cuda")
    made(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made(*args, **kwargs)
    other_args, other = cases.inputs(traits, 7, seed=5, device="cuda", flavour="not_local")
    for mine, others in zip((*args, kwargs["shared_output"], kwargs["expert_map"]),
                            (*other_args, other["shared_output"], other["expert_map"])):
        mine.copy_(others)
    kwargs["out"].fill_(float("nan"))
    graph.replay()
    verdict = oracle.check(traits, args, kwargs, kwargs["out"])
    assert verdict.passed, verdict.detail
