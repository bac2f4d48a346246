"""What the tests of vLLM share: the adapter in this process, off before and after, and routers of vLLM's factory.

Importing it reports the importing tests as not run where vLLM is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("not run: vLLM is not installed in this environment", allow_module_level=True)

TOKENS, EXPERTS, TOPK = 6, 16, 4
GROUPED = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2)


@contextlib.contextmanager
def adapter_off():
    """The package, off before and after, with nothing remembered."""
    from kernel_registry.integrations import vllm
    from kernel_registry.integrations.vllm import choosing

    assert not vllm._undo
    choosing._told.clear()
    choosing.asked.clear()
    try:
        yield vllm
    finally:
        vllm.disable()
        choosing._told.clear()
        choosing.asked.clear()


def bias():
    import torch

    return torch.linspace(0, 0.5, EXPERTS)


def logits():
    import torch

    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))


def make(**more):
    """A router from the factory that vLLM's layers call."""
    from vllm.model_executor.layers.fused_moe import layer

    return layer.create_fused_moe_router(top_k=TOPK, global_num_experts=EXPERTS, **more)


def dense(weights, ids):
    """Weights by expert: what is left when order is no matter."""
    import torch

    return torch.zeros(TOKENS, EXPERTS).scatter_(1, ids.long(), weights)


def grouped_router(**more):
    """vLLM's router of GPUs, made here: its factory would look at the platform."""
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router, router_factory

    @functools.wraps(router_factory.create_fused_moe_router)
    def factory(*, use_grouped_topk, **arguments):
        return grouped_topk_router.GroupedTopKRouter(**arguments)
    return routed(factory, top_k=TOPK, global_num_experts=EXPERTS, scoring_func="sigmoid",
                  e_score_correction_bias=bias(), **GROUPED, **more)
