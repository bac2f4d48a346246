"""Rule 5: override layers, their strength and strictness, and what a user's file may not do."""

from __future__ import annotations

import gc
import itertools
import sys
from contextlib import ExitStack, contextmanager

import pytest
from engine_support import call
from override_support import EVERY, NAMES, TWO

from kernel_registry.errors import (
    AmbiguityError,
    DocumentError,
    NoImplementationError,
    OverrideError,
    UnknownNameError,
)


# ---- the lattice -----------------------------------------------------------------------------------------------------


@contextmanager
def layered(toy, layers, monkeypatch, **when):
    """A registry with one override per named layer, each choosing the implementation of that layer's name."""
    options = {}
    if "environment" in layers:
        monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", str(toy.overrides({"use": "environment", "when": when})))
        options["environment"] = True
    registry = toy.registry(EVERY, **options)
    with ExitStack() as stack:
        for layer in ("file1", "file2"):
            if layer in layers:
                registry.load_overrides(toy.overrides({"use": layer, "when": when}))
        if "model" in layers:  # a line of a file that names the model: even of the oldest file
            registry._files = (
                (str(toy.overrides({"use": "model", "model": "draft", "when": when})), False),
                *registry._files,
            )
            registry.reload()
        if "context" in layers:
            stack.enter_context(registry.override(toy.OP, "context", **when))
        stack.enter_context(registry.model("draft"))
        yield registry, {"implementation": "call"} if "call" in layers else {}


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("weakest", range(7))
def test_the_strongest_of_any_run_of_layers_decides(toy, monkeypatch, count, weakest):
    layers = NAMES[weakest : weakest + count]
    with layered(toy, layers, monkeypatch) as (registry, pin):
        kernel = registry.dispatch(toy.OP, size=8, **pin)
        assert kernel.name == layers[-1] == registry.explain(toy.OP, size=8, **pin).winner
        assert kernel(call()) == layers[-1]
        other = registry.dispatch(toy.OP, size=8, groups=2, scoring="softmax", **pin)  # the same for other traits
        assert other.name == layers[-1]


@pytest.mark.parametrize("weaker, stronger", list(itertools.combinations(NAMES[:-1], 2)))
def test_a_weaker_layer_decides_where_the_stronger_does_not_match(toy, monkeypatch, weaker, stronger):
    with layered(toy, (stronger,), monkeypatch, groups=2) as (registry, _):
        assert registry.dispatch(toy.OP, size=8, groups=2).name == stronger
        assert registry.dispatch(toy.OP, size=8, groups=1).name == "shipped"
    with layered(toy, (weaker, stronger), monkeypatch) as (registry, _):
        assert registry.dispatch(toy.OP, size=8).name == stronger


def test_explain_names_the_layer(toy, monkeypatch):
    for layer, shown in (
        ("file1", "file /"),
        ("environment", "environment KERNEL_REGISTRY_OVERRIDES"),
        ("context", "context"),
        ("model", "for model draft"),
        ("call", "the call"),
    ):
        with layered(toy, ("shipped", layer), monkeypatch) as (registry, pin):
            (case,) = registry.explain(toy.OP, size=8, **pin).cases
            assert case.winner == layer and shown in case.decided_by
        monkeypatch.delenv("KERNEL_REGISTRY_OVERRIDES", raising=False)


def test_the_model_scope_applies_only_inside_it(toy):
    registry = toy.registry(EVERY)
    registry.load_overrides(toy.overrides({"use": "model", "model": "draft"}, {"use": "file1"}))
    assert registry.dispatch(toy.OP, size=8).name == "file1"
    with registry.model("draft"):
        draft = registry.dispatch(toy.OP, size=8)
        assert draft.name == "model" and registry.explain(toy.OP, size=8).winner == "model"
        with registry.model("target"):
            assert registry.dispatch(toy.OP, size=8).name == "file1"
        with registry.override(toy.OP, "context"):
            assert registry.dispatch(toy.OP, size=8).name == "context"
            assert registry.dispatch(toy.OP, size=8, implementation="call").name == "call"
        assert registry.dispatch(toy.OP, size=8) is draft
    assert registry.dispatch(toy.OP, size=8).name == "file1"


def test_an_empty_environment_variable_names_no_file(toy, monkeypatch):
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", "")
    assert toy.registry(EVERY, environment=True).dispatch(toy.OP, size=8).name == "shipped"


def test_the_environment_is_left_alone_unless_asked_for(toy, monkeypatch):
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", str(toy.overrides({"use": "environment"})))
    assert toy.registry(EVERY).dispatch(toy.OP, size=8).name == "shipped"
    assert toy.registry(EVERY, environment=True).dispatch(toy.OP, size=8).name == "environment"


def test_a_broken_environment_file_names_the_variable(toy, monkeypatch):
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", "/nowhere/overrides.yaml")
    with pytest.raises(DocumentError, match="/nowhere/overrides.yaml: .*KERNEL_REGISTRY_OVERRIDES"):
        toy.registry(EVERY, environment=True).dispatch(toy.OP, size=8)


# ---- use, prefer, disable --------------------------------------------------------------------------------------------


def test_use_is_strict_and_prefer_is_soft(toy):
    registry = toy.registry({**TWO, "c": {"when": {"size": {"max": 100}}, "rank": -1}})
    path = toy.overrides({"use": "c"})
    registry.load_overrides(path)
    assert registry.dispatch(toy.OP, size=8).name == "c"
    with pytest.raises(OverrideError, match="size is 200, serves <= 100") as caught:
        registry.dispatch(toy.OP, size=200)
    assert caught.value.where == f"{path}:3"
    assert registry.explain(toy.OP, size=200).winner is None
    assert "can't serve: size is 200, serves <= 100" in registry.explain(toy.OP, size=200).text()
    soft = toy.registry({**TWO, "c": {"when": {"size": {"max": 100}}, "rank": -1}})
    soft.load_overrides(toy.overrides({"prefer": "c"}))
    assert soft.dispatch(toy.OP, size=8).name == "c" and soft.dispatch(toy.OP, size=200).name == "b"
    assert "can't serve: size is 200" in soft.explain(toy.OP, size=200).text()


def test_the_same_in_a_context_and_in_a_call(toy):
    registry = toy.registry(TWO)
    with registry.override(toy.OP, "a"):
        assert registry.dispatch(toy.OP, size=8).name == "a"
        with pytest.raises(OverrideError, match=r"registry\.override\('toy\.op', 'a'\)"):
            registry.dispatch(toy.OP, size=65)
    with registry.override(toy.OP, "a", prefer=True):
        assert registry.dispatch(toy.OP, size=65).name == "b"
    with pytest.raises(OverrideError, match="use a: the call named it"):
        registry.dispatch(toy.OP, size=65, implementation="a")


def test_a_strict_choice_that_can_not_serve_some_ranges_is_refused_at_bind(toy):
    registry = toy.registry({"a": {"num_tokens": {"max": 64}}, "b": {"when": {}, "fallback": True}})
    with registry.override(toy.OP, "a"):
        with pytest.raises(OverrideError, match="num_tokens is 65"):
            registry.bind(toy.OP, size=8)
        assert registry.explain(toy.OP, size=8).winner is None
    with registry.override(toy.OP, "a", num_tokens={"max": 32}):
        kernel = registry.bind(toy.OP, size=8)
        assert [kernel(call(t)) for t in (32, 33, 64, 65)] == ["a", "a", "a", "b"]


def test_disable(toy):
    registry = toy.registry(TWO)
    with registry.disable(toy.OP, "a"):
        assert registry.dispatch(toy.OP, size=8).name == "b"
        assert registry.dispatch(toy.OP, size=8, implementation="a").name == "a"  # the call is stronger
        with registry.disable(toy.OP, "b"), pytest.raises(NoImplementationError, match="disable b"):
            registry.dispatch(toy.OP, size=8)
    with registry.disable(toy.OP, "a", size={"min": 32}):
        assert [registry.dispatch(toy.OP, size=s).name for s in (31, 32)] == ["a", "b"]


def test_a_stronger_use_beats_a_weaker_disable_and_not_the_other_way_round(toy):
    registry = toy.registry(TWO)
    registry.load_overrides(toy.overrides({"disable": "a"}))
    with registry.override(toy.OP, "a"):
        assert registry.dispatch(toy.OP, size=8).name == "a"
    weak = toy.registry(TWO)
    weak.load_overrides(toy.overrides({"use": "a"}))
    with weak.disable(toy.OP, "a"), pytest.raises(OverrideError, match="disabled by a layer at least as strong"):
        weak.dispatch(toy.OP, size=8)
    weak = toy.registry(TWO)
    weak.load_overrides(toy.overrides({"prefer": "a"}))
    with weak.disable(toy.OP, "a"):
        assert weak.dispatch(toy.OP, size=8).name == "b"


def test_within_a_file_the_narrower_line_goes_first_in_any_order(toy):
    lines = [{"use": "b"}, {"use": "a", "when": {"size": {"max": 32}}}, {"prefer": "b", "when": {"size": 8}}]
    for order in itertools.permutations(lines):
        registry = toy.registry(TWO)
        registry.load_overrides(toy.overrides(*order))
        assert [registry.dispatch(toy.OP, size=s).name for s in (8, 9, 33)] == ["b", "a", "b"]


def test_two_lines_that_contradict_each_other_are_an_error(toy):
    registry = toy.registry(TWO)
    path = toy.overrides({"use": "a", "when": {"size": {"max": 32}}}, {"use": "b", "when": {"size": {"min": 32}}})
    with pytest.raises(AmbiguityError, match="match the same calls") as caught:
        registry.load_overrides(path)
    assert caught.value.where == f"{path}:3" and f"`use b` at {path}:8" in caught.value.message
    for harmless in (
        [{"use": "a", "when": {"size": {"max": 32}}}, {"use": "b", "when": {"size": {"min": 33}}}],
        [{"use": "a", "when": {"size": {"max": 32}}}, {"use": "b", "when": {"size": {"min": 32}}, "model": "draft"}],
        [{"prefer": "b", "when": {"size": {"max": 32}}}, {"use": "b", "when": {"size": {"min": 32}}}],
    ):
        toy.registry(TWO).load_overrides(toy.overrides(*harmless))


@pytest.mark.parametrize("action", ["use", "prefer", "disable"])
def test_a_line_that_can_never_take_effect_is_an_error(toy, action):
    registry = toy.registry(TWO)
    path = toy.overrides({action: "a", "when": {"size": {"min": 100}}})
    with pytest.raises(OverrideError, match="can never take effect: size is >= 100, a serves <= 64") as caught:
        registry.load_overrides(path)
    assert caught.value.where == f"{path}:3" and caught.value.hint
    with pytest.raises(OverrideError, match="can never take effect"):
        registry.override(toy.OP, "a", size=100)


def test_wrong_values_in_a_match(toy):
    registry = toy.registry(TWO)
    path = toy.overrides({"use": "a", "when": {"scoring": "sotfmax"}})
    with pytest.raises(DocumentError, match="did you mean 'softmax'") as caught:
        registry.load_overrides(path)
    assert caught.value.where == f"{path}:6"
    with pytest.raises(DocumentError):
        registry.override(toy.OP, "a", size="8")


def test_an_override_that_could_not_be_made_does_not_also_warn(toy, recwarn):
    registry = toy.registry(TWO)
    with pytest.raises(UnknownNameError):
        registry.override(toy.OP, "gone")
    gc.collect()
    assert not recwarn.list


def test_an_override_that_is_never_entered_warns(toy):
    registry = toy.registry(TWO)
    with pytest.warns(RuntimeWarning, match="not entered with `with` has no effect"):
        registry.override(toy.OP, "b")
        gc.collect()


# ---- what a user's file may not do -----------------------------------------------------------------------------------


def test_adding_implementations_needs_allow_targets(toy):
    registry = toy.registry(TWO)
    path = toy.overrides({"use": "mine"}, ops={toy.OP: {"implementations": toy.entries({"mine": {"size": 8}})}})
    with pytest.raises(OverrideError, match="means imports of its choosing") as caught:
        registry.load_overrides(path)
    assert caught.value.where.startswith(f"{path}:") and "allow_targets=True" in caught.value.hint
    assert registry.dispatch(toy.OP, size=8).name == "a"
    registry.load_overrides(path, allow_targets=True)
    assert registry.dispatch(toy.OP, size=8).name == "mine"
    registry.reload()
    assert registry.dispatch(toy.OP, size=8).name == "mine"


def test_the_environment_can_not_add_implementations(toy, monkeypatch):
    path = toy.overrides(ops={toy.OP: {"implementations": toy.entries({"mine": {"size": 8}})}})
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", str(path))
    with pytest.raises(OverrideError, match="means imports of its choosing"):
        toy.registry(TWO, environment=True).catalog


def test_a_match_in_python_needs_allow_targets_too(toy, monkeypatch):
    evil = toy.module("def f(traits):\n    return None\n")
    path = toy.overrides({"use": "b", "when": {"python": [f"{evil}:f"]}})
    registry = toy.registry(TWO)
    with pytest.raises(OverrideError, match="matches with `python`") as caught:
        registry.load_overrides(path)
    assert caught.value.where == f"{path}:6"
    assert registry.dispatch(toy.OP, size=8).name == "a" and evil not in sys.modules
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", str(path))
    with pytest.raises(OverrideError, match="matches with `python`"):
        toy.registry(TWO, environment=True).catalog
    registry.load_overrides(path, allow_targets=True)
    assert registry.dispatch(toy.OP, size=8).name == "b" and evil in sys.modules
