"""Reading SGLang's router calls, and the adapter where SGLang is not: neither needs it."""

from __future__ import annotations

import importlib.util

import pytest

from kernel_registry.integrations.sglang_calls import Call, Declined, Router, read
from kernel_registry.integrations.switch import switched_on

BIAS = ("float32", 1)
GROUPED = dict(topk=8, renormalize=True, num_expert_group=8, topk_group=4, num_fused_shared_experts=0,
               routed_scaling_factor=2.5, apply_routed_scaling_factor_on_output=False)
UNGROUPED = dict(topk=8, renormalize=True, scoring_func="softmax")


def no_masks(_):
    return False


def call(name="biased_grouped_topk", bias=BIAS, settings=GROUPED, masks=no_masks, **more):
    return read(name, bias, {**settings, **more}, masks)


def test_a_factor_is_applied_here_only_where_sglang_asks_for_it():
    assert call() == Call(8, 8, 4, 0, "sigmoid", True, 1.0, 0.4, False)
    assert call(apply_routed_scaling_factor_on_output=True).routed_scaling_factor == 2.5


def test_the_shared_slot_undoes_a_factor_that_comes_later():
    assert call(num_fused_shared_experts=1).shared_expert_weight == 0.4
    scaled = call(num_fused_shared_experts=1, apply_routed_scaling_factor_on_output=True)
    assert scaled.shared_expert_weight == 1.0 and scaled.num_fused_shared_experts == 1


def test_no_groups_is_one_group():
    got = call("fused_topk_native", None, UNGROUPED)
    assert (got.num_expert_group, got.topk_group, got.scoring) == (1, 1, "softmax")
    assert call(num_expert_group=None, topk_group=None)[1:3] == (1, 1)


def test_padding_is_masked_only_by_the_router_that_sglang_counts_on():
    assert call("biased_topk_jit_kernel_impl", masks=lambda scoring: scoring == "sigmoid").masks_padding
    assert not call("biased_grouped_topk", masks=lambda scoring: True).masks_padding


@pytest.mark.parametrize("more, why", [
    (dict(bias=("float32", 2)), "2 dimensions"),
    (dict(packed_out="Tensor"), "packed_out=Tensor has no trait"),
    (dict(sqrtsoftplus_log1p=True), "sqrtsoftplus_log1p=True has no trait"),
    (dict(a_new_one=3), "a_new_one=3 has no trait"),
    (dict(num_fused_shared_experts=2), "2 fused shared experts"),
    (dict(num_fused_shared_experts=1, routed_scaling_factor=None), "without a routed_scaling_factor"),
    (dict(name="fused_topk", settings=UNGROUPED), "softmax"),
    (dict(name="fused_topk", settings=UNGROUPED, bias=None, apply_routed_scaling_factor_on_output=True), "softmax"),
    (dict(name="fused_topk", scoring_func="sigmoid", num_fused_shared_experts=1), "no slot"),
    (dict(name="fused_topk_softmax_torch_raw_logits", bias=None), "raw logits"),
])
def test_what_has_no_trait_is_declined_with_the_reason(more, why):
    with pytest.raises(Declined, match=why):
        call(**more)


def test_a_new_parameter_at_its_neutral_value_is_served():
    assert call(a_new_one=None, another=False, count=0) == call()


def test_order_and_defaults_are_the_functions_own():
    def theirs(hidden_states, gating_output, topk, correction_bias=None, scoring_func="sigmoid", packed_out=None):
        """Some other order than the adapter's."""

    router = Router.of("theirs", theirs)
    logits, bias, padding, settings = router.read(("h", "logits", 8, "bias"), {"packed_out": object()})
    assert (logits, bias, padding) == ("logits", "bias", None)
    assert dict(settings) == {"topk": 8, "scoring_func": "sigmoid", "packed_out": "object"}


@pytest.mark.parametrize("said, on", [("1", True), ("0", False), ("", False)])
def test_the_setting(monkeypatch, said, on):
    monkeypatch.setenv("KERNEL_REGISTRY_SGLANG", said)
    assert switched_on("KERNEL_REGISTRY_SGLANG") is on


def test_another_value_of_the_setting_is_an_error(monkeypatch):
    monkeypatch.setenv("KERNEL_REGISTRY_SGLANG", "yes")
    with pytest.raises(ValueError, match="expected 1"):
        switched_on("KERNEL_REGISTRY_SGLANG")


def test_off_the_plugin_imports_no_runtime(python):
    out = python("""
import os, sys
os.environ.pop("KERNEL_REGISTRY_SGLANG", None)
from kernel_registry.integrations import sglang
sglang.plugin()
print([name for name in sys.modules if name.split(".")[0] == "sglang"], "kernel_registry.torch_ops" in sys.modules)
""")
    assert out.strip() == "[] False"


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="sglang is installed here")
def test_without_the_runtime_enable_says_what_is_missing():
    from kernel_registry.integrations import sglang

    with pytest.raises(ImportError, match="sglang 0.5.23"):
        sglang.enable()
