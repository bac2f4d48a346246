"""Switching transformers on and off: models at hand, later ones, copies, parts, overrides; whole or not at all."""

from __future__ import annotations

import copy

import pytest
from transformers_parts import NEW, generate, logits, state, switched_off  # noqa: F401  first: it may skip

import torch  # noqa: E402
import tiny_models as tiny  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import OverrideError  # noqa: E402
from kernel_registry.integrations import transformers as adapter  # noqa: E402


def test_classes_for_models_built_later(ran):
    old = tiny.model("glm4_moe")
    prompt, wanted = tiny.tokens(), generate(old, tiny.tokens())
    before = state(old)
    report = adapter.enable()
    assert adapter.enable() is report and not report.declined
    later = tiny.model("glm4_moe", experts="kernel_registry")
    assert torch.equal(generate(later, prompt), wanted)
    assert ran == {"moe.topk": NEW * tiny.LAYERS, "moe.experts": NEW * tiny.LAYERS}
    adapter.disable()
    assert state(old) == before
    assert not any(name.startswith("_kernel_registry") for module in later.modules() for name in vars(module))


def test_only_the_model_types_that_are_named():
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    own = MixtralTopKRouter.forward, Qwen3MoeTopKRouter.forward
    report = adapter.enable(model_types=["mixtral"])
    assert [row.kind for row in report.rows] == ["MixtralTopKRouter"]
    assert MixtralTopKRouter.forward is not own[0] and Qwen3MoeTopKRouter.forward is own[1]
    report.disable()
    assert (MixtralTopKRouter.forward, Qwen3MoeTopKRouter.forward) == own


def test_an_override_is_followed_and_told():
    model = tiny.model("qwen3_moe")
    with registry.override("moe.topk", "torch"), adapter.enable(model) as report:
        told = {(row.kernel, row.why) for row in report.rows if row.op == "moe.topk"}
    assert len(told) == 1 and told.pop()[0] == "torch"
    assert "override" in report.rows[0].why and "override" in str(report)


def test_an_override_that_can_not_be_followed_is_an_error_and_changes_nothing():
    model = tiny.model("qwen3_moe")
    before = state(model)
    with registry.override("moe.experts", "triton_grouped"), pytest.raises(OverrideError, match="dtype is float32"):
        adapter.enable(model)
    assert state(model) == before


def test_gpt_oss_weights_change_their_order_in_memory_only():
    model = tiny.model("gpt_oss")
    weight = model.model.layers[0].mlp.experts.down_proj
    was = weight.detach().clone()
    with adapter.enable(model):
        assert torch.equal(weight, was) and weight.transpose(1, 2).is_contiguous()
    assert torch.equal(weight, was) and weight.is_contiguous()


def test_a_deep_copy_is_switched_on_and_is_switched_off_by_itself(ran):
    model = tiny.model("gpt_oss")
    before, own = state(model), logits(model)
    adapter.enable(model)
    other = copy.deepcopy(model)
    for switched_off_first, still_on in ((other, model), (model, None)):
        adapter.disable(switched_off_first)
        ran.clear()
        torch.testing.assert_close(logits(switched_off_first), own, rtol=1e-4, atol=1e-4)
        assert not ran
        if still_on is not None:
            torch.testing.assert_close(logits(still_on), own, rtol=1e-4, atol=1e-4)
            assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS}
    assert state(model) == before and other.model.layers[0].mlp.experts.down_proj.is_contiguous()
    assert not any(name.startswith("_kernel_registry") or name == "forward" for module in other.modules()
                   for name in vars(module))


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_a_model_built_later_and_then_enabled_itself(model_first, runs, ran):
    """Whichever is switched off first, the other goes on, and then the model runs what transformers runs."""
    reports = [adapter.enable()]
    model = tiny.model("glm4_moe", experts="kernel_registry")
    if runs:
        logits(model)
    reports.append(adapter.enable(model))
    own = logits(model)
    torch.testing.assert_close(model(tiny.tokens()).logits, own, rtol=1e-4, atol=1e-4)  # records gradients
    first, second = reversed(reports) if model_first else reports
    first.disable()
    ran.clear()
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS}
    second.disable()
    ran.clear()
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert not ran and "kernel_registry" not in adapter._interfaces()[0]
    assert not any(name.startswith("_kernel_registry") or name == "forward" for module in model.modules()
                   for name in vars(module))


def test_a_model_below_torch_compile_is_the_model():
    model = tiny.model("qwen3_moe")
    compiled = torch.compile(model, backend="eager")
    report = adapter.enable(compiled)
    assert not report.declined and adapter.enable(compiled) is adapter.enable(model) is report
    adapter.disable(compiled)
    assert adapter._REPORT not in vars(model) and adapter._REPORT not in vars(compiled)


def test_routers_below_accelerates_hooks_are_served(ran):
    """As a model has them that is spread over devices: they move tensors, and then call the forward that they keep."""
    hooks = pytest.importorskip("accelerate.hooks", reason="not run: accelerate is not installed in this environment")
    model = tiny.model("qwen3_moe")
    own = logits(model)
    for layer in model.model.layers:
        for module in (layer.mlp.gate, layer.mlp.experts):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    before = state(model)
    with adapter.enable(model) as report:
        assert not report.declined
        torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS} and state(model) == before


@pytest.mark.parametrize("first", ["hooks", "registry"])
def test_accelerates_hooks_come_and_go_meanwhile(ran, first):
    hooks = pytest.importorskip("accelerate.hooks", reason="not run: accelerate is not installed in this environment")
    model = tiny.model("qwen3_moe")
    own, routers = logits(model), [layer.mlp.gate for layer in model.model.layers]

    def hook():
        for router in routers:
            hooks.add_hook_to_module(router, hooks.AlignDevicesHook("cpu", io_same_device=True))
    if first == "hooks":
        hook()
    report = adapter.enable(model)
    if first == "hooks":
        hooks.remove_hook_from_submodules(model)
    else:
        hook()
    logits(model)
    assert ran["moe.topk"] == tiny.LAYERS
    report.disable()
    calls = dict(ran)
    assert torch.equal(logits(model), own) and ran == calls
    assert all(hasattr(router, "_hf_hook") == (first == "registry") == ("forward" in vars(router))
               for router in routers)


@pytest.mark.parametrize("part_first", [False, True])
def test_a_part_of_a_model_that_is_switched_on_is_refused(part_first):
    model = tiny.model("qwen3_moe")
    before = state(model.model), state(model)
    first, second = (model.model, model) if part_first else (model, model.model)
    adapter.enable(first)
    within = state(model)
    with pytest.raises(ValueError, match="mlp.experts is switched on already"):
        adapter.enable(second)
    assert state(model) == within
    adapter.disable(first)
    assert (state(model.model), state(model)) == before


def test_two_models_with_one_config_are_refused():
    model = tiny.model("qwen3_moe")
    other = type(model)(model.config)
    before = state(other)
    with adapter.enable(model):
        with pytest.raises(ValueError, match="is also that of another model"):
            adapter.enable(other)
    assert state(other) == before


def test_compiled_before_anything_was_decided_is_an_error_that_says_what_to_do():
    adapter.enable()
    model = tiny.model("qwen3_moe", experts="kernel_registry")
    with pytest.raises(Exception, match="was not decided before torch.compile traced it"):
        logits(torch.compile(model, backend="eager", fullgraph=True))


def test_enabling_twice_is_once_and_a_failure_changes_nothing(monkeypatch):
    model = tiny.model("qwen3_moe")
    before = state(model)
    assert adapter.enable(model) is adapter.enable(model)
    adapter.disable(model)
    adapter.disable(model)
    assert state(model) == before
    monkeypatch.setattr(type(model), "set_experts_implementation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.enable(model)
    monkeypatch.undo()
    assert state(model) == before
