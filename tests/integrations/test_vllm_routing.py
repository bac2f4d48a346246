"""Routing in vLLM: its routers with the registry's kernel in them, beside its own."""

from __future__ import annotations

import functools

import pytest
import vllm_parts
from vllm_parts import EXPERTS, GROUPED, TOKENS, TOPK, bias, dense, grouped_router, logits, make

ROUTINGS = {
    "softmax": {},
    "softmax, as it is": dict(renormalize=False),
    "a factor that vLLM applies elsewhere": dict(routed_scaling_factor=2.5),
    "softmax in groups": dict(GROUPED, renormalize=False, routed_scaling_factor=2.5),
    "sigmoid in groups": dict(GROUPED, scoring_func="sigmoid", bias=True, routed_scaling_factor=2.5),
    "one group": dict(use_grouped_topk=True, num_expert_group=1, topk_group=1, scoring_func="sigmoid", bias=True),
}


@pytest.fixture
def adapter():
    with vllm_parts.adapter_off() as package:
        yield package


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_registrys_routing_is_that_of_vllms_own_router(adapter, name):
    import torch

    more = dict(ROUTINGS[name])
    if more.pop("bias", False):
        more["e_score_correction_bias"] = bias()
    own = make(**more).select_experts(None, logits())
    adapter.enable("routing")
    router = make(**more)
    weights, ids = router.select_experts(None, logits(), torch.int64)
    assert type(router).__name__ == "KernelRegistryCPURouter" and isinstance(router, type(router).__mro__[1])
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.allclose(dense(weights, ids), dense(*own), rtol=1e-5, atol=1e-7)
    assert [row.kernel is not None for row in adapter.report().rows] == [True]


@pytest.mark.parametrize("more, reason", [
    (dict(custom_routing_function=max), "custom_routing_function is given"),
    (dict(zero_expert_type="identity", num_logical_experts=12, bias=True), "routes otherwise than by the scores"),
    (dict(hash_indices_table="table"), "hash_indices_table is given"),
    (dict(bias_vl="bias", bias=True, scoring_func="sigmoid"), "bias_vl is given"),
    (dict(num_fused_shared_experts=1), "num_fused_shared_experts is given"),
    (dict(scoring_func="sqrtsoftplus", bias=True), "scoring_func is sqrtsoftplus"),
    (dict(use_grouped_topk=True, num_expert_group=5, topk_group=1), "16 experts make no 5 groups"),
    (dict(use_grouped_topk=True, num_expert_group=16, topk_group=16), "16 experts make no 16 groups"),
])
def test_what_is_declined_gets_vllms_own_router_and_one_line(adapter, caplog, monkeypatch, more, reason):
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    more = {key: bias() if key in ("bias", "bias_vl") else value for key, value in more.items()}
    more = {"e_score_correction_bias" if key == "bias" else key: value for key, value in more.items()}
    adapter.enable("routing")
    routers = [make(**more), make(**more)]
    assert not any(type(router).__name__.startswith("KernelRegistry") for router in routers)
    rows = adapter.report().rows
    assert len(rows) == 2 and all(row.kernel is None and reason in row.why for row in rows)
    lines = [record.message for record in caplog.records if "stays with vLLM" in record.message]
    assert len(lines) == 1 and reason in lines[0]


def test_an_argument_of_a_later_vllm_is_declined_where_it_is_used(adapter):
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    def later(top_k, global_num_experts, scale_of_the_moon=1.0, use_grouped_topk=False, num_expert_group=None,
              topk_group=None, renormalize=True, scoring_func="softmax", routed_scaling_factor=1.0,
              e_score_correction_bias=None, num_logical_experts=None):
        return create_fused_moe_router(top_k, global_num_experts)
    assert type(routed(later, TOPK, EXPERTS)).__name__ == "KernelRegistryCPURouter"
    assert type(routed(later, TOPK, EXPERTS, 2.0)).__name__ == "CPURouter"
    assert "scale_of_the_moon is given" in adapter.report().declined[0].why


def test_a_factory_without_a_parameter_that_is_read_is_declined(adapter):
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    def of_another_plugin(*args, **kwargs):
        return create_fused_moe_router(*args, **kwargs)
    assert type(routed(of_another_plugin, top_k=TOPK, global_num_experts=EXPERTS)).__name__ == "CPURouter"
    assert "has no parameter" in adapter.report().declined[0].why


def test_a_model_that_imports_the_factory_itself_is_served(adapter):
    """As vLLM 0.33's Step 5 does, past the module of the layers."""
    from vllm.model_executor.layers.fused_moe.router import router_factory

    adapter.enable("routing")
    served = router_factory.create_fused_moe_router(top_k=TOPK, global_num_experts=EXPERTS)
    assert type(served).__name__ == "KernelRegistryCPURouter"
    adapter.disable()
    assert type(router_factory.create_fused_moe_router(top_k=TOPK, global_num_experts=EXPERTS)).__name__ == "CPURouter"


def test_batch_invariance_is_declined(adapter, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    adapter.enable("routing")
    assert type(make()).__name__ == "CPURouter"

def test_eplb_and_the_capture_of_ids_stay_vllms(adapter, monkeypatch):
    import torch
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", lambda topk_ids, **_: topk_ids + 100)
    state, captured = EplbLayerState(), []
    for name in ("expert_load_view", "logical_to_physical_map", "logical_replica_count", "should_record_tensor"):
        setattr(state, name, torch.zeros(1))
    state.num_unpadded_tokens_tensors = [None]
    plain, router = grouped_router(), grouped_router(eplb_state=state)
    router.set_capture_fn(lambda ids: captured.append(ids.clone()))
    weights, ids = router.select_experts(None, logits())
    assert type(router).__name__ == "KernelRegistryGroupedTopKRouter"
    assert torch.equal(captured[0], plain.select_experts(None, logits())[1])
    assert torch.equal(ids, captured[0] + 100)


@pytest.fixture
def padding(monkeypatch):
    """A forward context with these rows as padding: more than there are tokens, as vLLM has it."""
    import torch
    from types import SimpleNamespace
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    rows = torch.tensor([False, True, False, False, True, False, True, True])
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "1")
    monkeypatch.setattr(fused_topk_router, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(fused_topk_router, "get_forward_context", lambda: SimpleNamespace(is_padding=rows))
    return rows[:TOKENS]


def assert_skipped(router, skipped) -> None:
    import torch

    weights, ids = router.select_experts(None, logits())
    assert torch.equal((ids == -1).all(1), skipped) and torch.equal((weights == 0).all(1), skipped)
    assert torch.equal((ids == -1).any(1), skipped) and torch.equal((weights == 0).any(1), skipped)


@pytest.mark.parametrize("skip_padding", [False, True])
def test_rows_of_padding_are_skipped_where_vllm_is_told_to(adapter, padding, skip_padding):
    assert_skipped(grouped_router(skip_padding=skip_padding), padding & skip_padding)


def test_routers_without_groups_skip_padding_as_vllms_do(adapter, padding, monkeypatch):
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router, router_factory

    @functools.wraps(router_factory.create_fused_moe_router)
    def factory(**arguments):
        return fused_topk_router.FusedTopKRouter(**arguments)
    router = routed(factory, top_k=TOPK, global_num_experts=EXPERTS)
    assert_skipped(router, padding)
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    assert_skipped(router, padding & False)


def test_the_torch_op_is_what_torch_asks_of_one(adapter):
    import torch

    adapter.enable("routing")
    router = make(**GROUPED, scoring_func="sigmoid", e_score_correction_bias=bias())
    arguments = (logits(), router.kernel_registry_bias, router.kernel_registry_call)
    torch.library.opcheck(torch.ops.kernel_registry_vllm.topk.default, arguments)
    compiled = torch.compile(router.select_experts, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(None, logits()), router.select_experts(None, logits())))


def test_on_a_gpu_a_fallback_is_declined_unless_it_was_asked_for(adapter, monkeypatch):
    from kernel_registry import Registry
    from kernel_registry.integrations.vllm import choosing, routing

    gpu = Registry(plugins=False, environment=False, platform="sm_90")
    for module in (choosing, routing):
        monkeypatch.setattr(module, "registry", gpu)
        monkeypatch.setattr(module, "here", dict)
    adapter.enable("routing")
    more = dict(scoring_func="softmax", e_score_correction_bias=bias())  # for which there is no fast kernel
    assert type(make(**more)).__name__ == "CPURouter"
    assert "no fast kernel" in adapter.report().declined[0].why
    assert type(make()).__name__ == "KernelRegistryCPURouter"
    with gpu.override("moe.topk", "torch"):
        assert type(make(**more)).__name__ == "KernelRegistryCPURouter"


def test_an_override_that_cannot_be_followed_is_an_error(adapter):
    from kernel_registry.errors import OverrideError
    from kernel_registry.integrations.vllm import routing

    adapter.enable("routing")
    with routing.registry.override("moe.topk", "triton_biased_grouped"), pytest.raises(OverrideError):
        make()


def test_a_router_follows_an_override_that_comes_later(adapter, tmp_path):
    from kernel_registry.integrations.vllm import routing

    adapter.enable("routing")
    router = make(scoring_func="softmax")
    router.select_experts(None, logits())
    kernel, _ = routing._kernels[router.kernel_registry_call, logits().dtype]
    file = tmp_path / "overrides.yaml"
    file.write_text("version: 1\noverrides: [{op: moe.topk, use: torch, when: {scoring: softmax, has_bias: false}}]\n")
    reg = routing.registry
    files = reg._files
    try:
        reg.load_overrides(file)
        assert kernel.name == "torch" and "override" in str(adapter.report())
    finally:
        with reg._lock:
            reg._swap(files=files)
