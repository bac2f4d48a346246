"""Switching the registry on and off in vLLM: which seams are taken, given back, and left to another plugin."""

from __future__ import annotations

import importlib
import sys

import pytest
import vllm_parts
from installed import own_entry_points
from vllm_parts import make


@pytest.fixture
def adapter():
    with vllm_parts.adapter_off() as package:
        yield package


def seams():
    from vllm import envs
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe import layer

    return layer.create_fused_moe_router, dict(op_registry_oot), set(envs.environment_variables)


@pytest.mark.parametrize("setting, changes", [("", ()), ("0", ()), ("routing", (0, 2)), ("experts", (1, 2)),
                                              ("1", (0, 1, 2))])
def test_the_setting_says_which_seams_are_taken_and_off_gives_them_back(adapter, monkeypatch, setting, changes):
    before = seams()
    monkeypatch.setenv(adapter.SETTING, setting)
    adapter.plugin()
    once = seams()
    assert tuple(i for i in range(3) if once[i] != before[i]) == changes
    adapter.plugin()  # vLLM may call it again in a process
    assert seams() == once
    adapter.disable()
    assert seams() == before


def test_a_part_can_be_switched_on_after_another_and_named_twice(adapter):
    before = seams()
    adapter.enable("routing", "routing")
    adapter.enable("experts")
    assert all(now != then for now, then in zip(seams(), before))
    adapter.disable()
    assert seams() == before


def test_what_fails_on_the_way_leaves_nothing_switched_but_what_was(adapter, monkeypatch):
    from kernel_registry.integrations.vllm import experts

    def fails():
        raise AttributeError("no such seam")
    monkeypatch.setattr(experts, "switch", fails)
    before = seams()
    with pytest.raises(AttributeError, match="no such seam"):
        adapter.enable()
    assert seams() == before
    adapter.enable("routing")
    routing = seams()
    with pytest.raises(AttributeError):
        adapter.enable()
    assert seams() == routing != before


def test_in_a_vllm_without_the_seams_the_error_says_so(adapter, monkeypatch):
    before = seams()
    monkeypatch.delattr(adapter, "experts", raising=False)
    monkeypatch.setitem(sys.modules, f"{adapter.__name__}.experts", None)
    with pytest.raises(ImportError, match="tried with 0.32 and 0.33; without KERNEL_REGISTRY_VLLM vLLM runs"):
        adapter.enable()
    assert seams() == before


def test_a_broken_override_file_is_not_laid_to_vllm(python, tmp_path):
    (tmp_path / "overrides.yaml").write_text("version: 1\noverrides: nonsense\n")
    out = python("""
from kernel_registry.integrations import vllm
try:
    vllm.enable()
except Exception as error:
    print(type(error).__name__, error)
""", KERNEL_REGISTRY_OVERRIDES=str(tmp_path / "overrides.yaml"))
    assert out.startswith("DocumentError") and "overrides.yaml" in out and "0.32" not in out


def test_a_setting_that_means_nothing_is_an_error(adapter, monkeypatch):
    monkeypatch.setenv(adapter.SETTING, "yes")
    with pytest.raises(ValueError, match="KERNEL_REGISTRY_VLLM='yes', expected one of 1, routing, experts, 0"):
        adapter.plugin()
    with pytest.raises(ValueError, match="'router' is no part of it"):
        adapter.enable("router")


def test_the_package_declares_the_plugin():
    module, _, name = own_entry_points()["vllm.general_plugins"]["kernel_registry"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_model_compiled_without_the_plugin_is_not_found_with_it(adapter):
    from vllm import envs

    off = envs.compile_factors()
    adapter.enable()
    make()
    served = envs.compile_factors()
    make(custom_routing_function=max)
    assert off != served != envs.compile_factors() != off
    adapter.disable()
    assert envs.compile_factors() == off


def test_another_plugins_experts_are_left_in_their_place(adapter):
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class Other(UnquantizedFusedMoEMethod):
        pass
    UnquantizedFusedMoEMethod.register_oot(Other)
    try:
        adapter.enable("experts")
        assert op_registry_oot["UnquantizedFusedMoEMethod"] is Other
        assert "Other of another plugin has its place" in str(adapter.report())
        adapter.disable()
        assert op_registry_oot["UnquantizedFusedMoEMethod"] is Other
    finally:
        del op_registry_oot["UnquantizedFusedMoEMethod"]
