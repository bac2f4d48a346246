"""What a routing call launches: one kernel with a prepared bias, or one that the router takes as it is; two with a
cast in every call."""

from __future__ import annotations

import pytest
import torch

from kernel_registry import Registry, moe_router
from tests import launches

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="calls are counted in the interpreter")

ROUTER = dict(num_experts=256, topk=8, num_expert_group=8, topk_group=4, dtype="bfloat16")


def exact() -> torch.nn.Parameter:
    values = torch.randint(-255, 256, (256,), generator=torch.Generator().manual_seed(0)) / 64
    return torch.nn.Parameter(values, requires_grad=False)


@pytest.mark.parametrize("tokens", [1, 600])
def test_one_launch_a_call_and_two_with_a_cast(monkeypatch, tokens):
    registry = Registry(plugins=False, environment=False, platform="interpreter")
    logits, bias = torch.randn(tokens, 256).bfloat16(), exact()
    route = moe_router(bias, registry=registry, **ROUTER)
    with launches.counted(monkeypatch) as found:
        route(logits, bias)
    assert len(found) == 1, found
    narrow = registry.bind("moe.topk", **ROUTER, bias_dtype="bfloat16")
    with launches.counted(monkeypatch) as found:
        narrow(logits, bias.to(torch.bfloat16))
    assert len(found) == 2 and "_to_copy" in found[0], found
    registry.prepare("moe.routing_bias", bias, **ROUTER, bias_dtype="bfloat16")
    take = registry.bind("moe.routing_bias", **ROUTER, bias_dtype="bfloat16")
    with launches.counted(monkeypatch) as found:
        narrow(logits, take(bias))
    assert len(found) == 1, found
