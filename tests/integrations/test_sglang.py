"""SGLang's own routing with and without the registry's kernels in it. Needs sglang 0.5.23; not run without it."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch._subclasses import FakeTensorMode

hooks = pytest.importorskip("sglang.srt.plugins.hook_registry", reason="not run: sglang is not installed here")

from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import OverrideError  # noqa: E402
from kernel_registry.integrations import sglang as adapter  # noqa: E402

MODELS = yaml.safe_load(Path(__file__).with_name("sglang_models.yaml").read_text())
TOKENS = 5
_NOT_CONFIG = ("file", "experts", "bias", "shared", "own")


@pytest.fixture(scope="module")
def topk():
    """SGLang's module with the hooks in place. Without Dynamo: its functions run as they are written."""
    from sglang.srt.layers.moe import topk

    adapter.enable()
    before, torch._dynamo.config.disable = torch._dynamo.config.disable, True
    yield topk
    torch._dynamo.config.disable = before
    adapter.disable()


@pytest.fixture(autouse=True)
def forget():
    """Each test sees its own calls."""
    adapter._decisions.clear()
    adapter._elsewhere.clear()
    adapter._state["on"] = True


def inputs(experts, bias, dtype=torch.float32):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(TOKENS, experts, generator=generator).to(dtype)
    return torch.zeros(TOKENS, 16), logits, torch.randn(experts, generator=generator) / 8 if bias else None


def select(topk, row, on, logits=None, **more):
    """What select_experts gives for a row of the table, as (weights by expert id, ids)."""
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    hidden, own_logits, bias = inputs(row["experts"], row.get("bias", False))
    config = topk.TopKConfig(
        **{k: v for k, v in row.items() if k not in _NOT_CONFIG}, torch_native=True, correction_bias=bias,
        shared_experts=SharedExpertsConfig(num_fused_shared_experts=row.get("shared", 0)))
    adapter._state["on"] = on
    try:
        weights, ids, _ = topk.select_experts(hidden, own_logits if logits is None else logits, config, layer_id=0,
                                              **more)
    finally:
        adapter._state["on"] = True
    dense = torch.zeros(TOKENS, row["experts"] + row.get("shared", 0) + 1)  # the last column takes masked slots
    return dense.scatter_(1, ids.long() % dense.shape[1], weights.float()), ids


@pytest.mark.parametrize("model", MODELS)
def test_routes_as_sglang_does(topk, model):
    row = MODELS[model]
    theirs, their_ids = select(topk, row, on=False)
    assert not adapter._decisions
    ours, ids = select(topk, row, on=True)
    (seen,) = adapter.report().rows
    assert seen.kind == row["own"] and seen.kernel is not None, seen
    assert ids.dtype is torch.int32
    assert torch.equal(ids.sort(1).values.long(), their_ids.sort(1).values.long())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_fast_kernels_serve_the_table_but_for_softmax_with_a_bias(topk):
    """What ran above were the Triton kernels, in the interpreter."""
    if registry.platform().kind != "interpreter":
        pytest.skip("not run: tensors on a CPU get Triton kernels only where TRITON_INTERPRET is set")
    for row in MODELS.values():
        select(topk, row, on=True)
    slow = {r.kind for r in adapter.report().rows if r.kernel == "torch"}
    assert len(adapter.report().rows) >= 20 and slow == {"fused_topk_native"}


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-moe", "deepseek-v3-fused-shared"])
def test_padding_stays_theirs(topk, model):
    live = torch.tensor(3, dtype=torch.int32)
    theirs, their_ids = select(topk, MODELS[model], on=False, num_token_non_padded=live)
    ours, ids = select(topk, MODELS[model], on=True, num_token_non_padded=live)
    assert torch.equal(ids[3:].long(), their_ids[3:].long()) and (ids[3:] == -1).any()
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-moe", "deepseek-v3-fused-shared"])
def test_expert_placement_stays_theirs(topk, model):
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    experts = MODELS[model]["experts"]
    physical = torch.randperm(experts, generator=torch.Generator().manual_seed(1))
    info = ExpertLocationDispatchInfo("static", physical, physical[:, None], torch.ones(experts, dtype=torch.int64),
                                      experts)
    plain, _ = select(topk, MODELS[model], on=True)
    theirs, _ = select(topk, MODELS[model], on=False, expert_location_dispatch_info=info)
    ours, _ = select(topk, MODELS[model], on=True, expert_location_dispatch_info=info)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("model", ["deepseek-v3", "minimax-m2", "qwen3-moe"])
def test_half_precision_logits_are_routed_in_float32(topk, model):
    """As SGLang's GPU routers do, where its torch code would round the scores to bfloat16."""
    logits = inputs(MODELS[model]["experts"], False)[1].bfloat16()
    theirs, _ = select(topk, MODELS[model], on=False, logits=logits.float())
    ours, _ = select(topk, MODELS[model], on=True, logits=logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ---- functions that only SGLang's GPU path calls: against its torch code for the same --------------------------------

@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gpu_router_with_a_bias(topk, scoring, shared, scaled):
    hidden, logits, bias = inputs(64, True)
    call = dict(hidden_states=hidden, gating_output=logits, correction_bias=bias, topk=6 + shared, renormalize=True,
                scoring_func=scoring, num_fused_shared_experts=shared, routed_scaling_factor=2.5,
                apply_routed_scaling_factor_on_output=scaled)
    theirs, their_ids = topk.biased_topk_impl(**call)
    ours, ids = topk.biased_topk_jit_kernel_impl(**call)
    dense = [torch.zeros(TOKENS, 65).scatter_(1, i.long(), w) for w, i in ((theirs, their_ids), (ours, ids))]
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-6, atol=1e-7)


def test_the_gpu_router_masks_padded_rows_where_sglang_counts_on_it(topk, monkeypatch):
    hidden, logits, bias = inputs(64, True)
    call = dict(hidden_states=hidden, gating_output=logits, correction_bias=bias, topk=6, renormalize=True,
                scoring_func="sqrtsoftplus", num_token_non_padded=torch.tensor(2, dtype=torch.int32))
    assert (topk.biased_topk_jit_kernel_impl(**call)[1] >= 0).all()
    adapter._decisions.clear()
    monkeypatch.setattr(topk, "_is_cuda", True)  # on CUDA it leaves the mask to this router
    weights, ids = topk.biased_topk_jit_kernel_impl(**call)
    assert (ids[:2] >= 0).all() and (ids[2:] == -1).all() and not weights[2:].any()


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gpu_router_without_a_bias(topk, renormalize):
    hidden, logits, _ = inputs(128, False)
    adapter._state["on"] = False
    theirs, their_ids = topk.fused_topk_native(hidden, logits, 8, renormalize)
    adapter._state["on"] = True
    ours, ids = topk.fused_topk(hidden, logits, 8, renormalize)  # by position, in this function's order
    assert torch.equal(ids.long(), their_ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ---- what stays with SGLang ------------------------------------------------------------------------------------------

def test_a_bias_for_each_token_stays_and_is_told(topk, caplog):
    hidden, logits, bias = inputs(64, True)
    with caplog.at_level(logging.WARNING, "kernel_registry"):
        for _ in range(3):
            topk.biased_grouped_topk(hidden, logits, bias.expand(TOKENS, 64), 8, True, 8, 4)
    row = adapter.report().declined[0]
    assert row.kind == "biased_grouped_topk" and "2 dimensions" in row.why
    told = [r for r in caplog.records if "biased_grouped_topk(" in r.message]
    assert len(told) == 1 and "stays with SGLang" in told[0].message


def test_a_function_of_the_models_own_is_told_at_load(topk, caplog):
    def llama4_routing(**_):
        raise AssertionError("not called at load")

    layer = SimpleNamespace(_runner_backend_bound=True, topk_config=topk.TopKConfig(
        top_k=1, custom_routing_function=llama4_routing))
    with caplog.at_level(logging.WARNING, "kernel_registry"):
        for _ in range(2):
            topk.TopK.bind_runner_backend(layer, None)
    assert len([r for r in caplog.records if "llama4_routing" in r.message]) == 1
    assert "function of its own" in adapter.report().line


def test_a_runner_that_routes_by_itself_is_told_at_load(topk):
    layer = SimpleNamespace(_runner_backend_bound=True, topk_config=topk.TopKConfig(
        top_k=1, output_format=topk.TopKOutputFormat.BYPASSED))
    topk.TopK.bind_runner_backend(layer, None)
    (row,) = adapter.report().declined
    assert "BYPASSED" in row.kind and "routes by itself" in row.why


def test_what_no_kernel_serves_runs_sglangs_code(topk):
    with registry.disable("moe.topk", "torch"), registry.disable("moe.topk", "triton_unbiased"):
        theirs, _ = select(topk, MODELS["qwen3-moe"], on=False)
        ours, _ = select(topk, MODELS["qwen3-moe"], on=True)
    assert torch.equal(ours, theirs) and "1 stay" in adapter.report().line


PLAIN = (("topk", 8), ("renormalize", True), ("scoring_func", "softmax"))


def test_a_device_without_kernels_keeps_sglangs_own(topk):
    assert adapter._decide("grouped_topk", 64, torch.float32, "xpu", None, PLAIN) is None
    assert "no kernels for xpu" in adapter.report().declined[0].why


def test_on_a_gpu_a_fallback_is_declined_unless_it_was_asked_for(topk):
    with FakeTensorMode():  # tensors on a GPU that is not there
        assert adapter._decide("fused_topk", 2048, torch.float32, "cuda", None, PLAIN) is None
        assert "no fast kernel" in adapter.report().declined[0].why
        adapter._decisions.clear()
        with registry.override("moe.topk", "torch"):
            assert adapter._decide("fused_topk", 2048, torch.float32, "cuda", None, PLAIN) is not None
    assert adapter._decide("fused_topk", 2048, torch.float32, "cpu", None, PLAIN) is not None


def test_an_override_that_cannot_be_followed_is_not_hidden(topk):
    with registry.override("moe.topk", "triton_biased_grouped"), pytest.raises(OverrideError):
        select(topk, MODELS["qwen3-moe"], on=True)


# ---- the report, compiled code, sglang.kernels -----------------------------------------------------------------------

def test_the_report_follows_overrides(topk):
    select(topk, MODELS["deepseek-v3"], on=True)
    with registry.override("moe.topk", "torch"):
        (row,) = adapter.report().rows
    assert row.kernel == "torch" and "override" in row.why and "num_expert_group=8" in row.module


def test_torch_compile_traces_no_dispatch(topk):
    hidden, logits, bias = inputs(64, True)

    def route(logits):
        return topk.biased_grouped_topk(hidden_states=hidden, gating_output=logits, correction_bias=bias, topk=8,
                                        renormalize=True, num_expert_group=8, topk_group=4, routed_scaling_factor=2.5)

    torch._dynamo.config.disable = False
    try:
        compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
        weights, ids = compiled(logits)
        assert len(adapter.report().served) == 1
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with registry.override("moe.topk", "triton_unbiased"), pytest.raises(OverrideError):
            compiled(logits)  # decided inside the op, at each call: nothing is compiled again
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    finally:
        torch._dynamo.config.disable = True
    eager = route(logits)
    assert torch.equal(weights, eager[0]) and torch.equal(ids, eager[1])


def test_the_ops_are_in_sglangs_inventory(topk):
    from sglang.kernels.registry import registry as inventory
    from sglang.kernels.selector import get_kernel
    from sglang.kernels.spec import KernelBackend

    _, logits, bias = inputs(64, True)
    weights, ids = get_kernel("moe.topk")(logits, bias, topk=8, num_expert_group=8, topk_group=4)
    assert ids.shape == weights.shape == (TOKENS, 8)
    mine = [spec for spec in inventory.all_specs() if spec.target.startswith("kernel_registry.")]
    assert {spec.op for spec in mine} >= {"moe.topk", "moe.experts", "moe.finalize"}
    assert all(spec.backend is KernelBackend.PLUGIN and len(inventory.get(spec.op)) == 1 for spec in mine)


def test_an_op_that_sglang_has_itself_is_left_alone(topk, monkeypatch):
    from sglang.kernels.registry import registry as inventory
    from sglang.kernels.spec import KernelBackend, KernelSpec

    theirs = [KernelSpec(op="moe.finalize", backend=KernelBackend.TRITON, target="theirs:finalize")]
    monkeypatch.setitem(inventory._by_op, "moe.finalize", theirs)
    adapter._register_kernels()
    assert inventory.get("moe.finalize") == theirs[:1]


def test_each_dtype_is_a_kind_of_call(topk):
    """A kernel is bound, and an override may be refused, for each of them: none is decided by another's sight."""
    for dtype in (torch.float32, torch.bfloat16):
        select(topk, MODELS["qwen3-moe"], on=True, logits=inputs(128, False, dtype)[1])
    assert len(adapter.report().served) == 2


def test_hooks_are_registered_once(topk):
    before = {target: len(found) for target, found in hooks.HookRegistry._hooks.items()}
    adapter.enable()
    assert {target: len(found) for target, found in hooks.HookRegistry._hooks.items()} == before


@pytest.mark.parametrize("absent", ["kernels", "masks", "torch_ops"])
def test_a_switch_that_fails_leaves_nothing_switched(topk, monkeypatch, absent):
    """SGLang logs the error of a plugin and goes on, with what the plugin had registered until then."""
    monkeypatch.setattr(adapter, "_state", {"on": False, "hooked": False, "masks": None})
    monkeypatch.setattr(hooks.HookRegistry, "_hooks", defaultdict(list))
    if absent == "masks":
        monkeypatch.delattr(topk, "_fused_gate_masks_padded_rows")
    elif absent == "kernels":
        monkeypatch.setitem(sys.modules, "sglang.kernels.spec", None)
    else:
        monkeypatch.delattr("kernel_registry.torch_ops")
        monkeypatch.setitem(sys.modules, "kernel_registry.torch_ops", None)
    for _ in range(2):  # nor does it pass for switched on when it is tried again
        with pytest.raises((ImportError, AttributeError)):
            adapter.enable()
        assert not adapter._state["on"] and not hooks.HookRegistry._hooks
