"""Rules 5 and 6: override layers, their strength and strictness; and that a refused file changes nothing."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import sys
import threading
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from kernel_registry.errors import (
    AmbiguityError,
    DocumentError,
    NoImplementationError,
    OverrideError,
    RegistryError,
    UnknownNameError,
)

NAMES = ("shipped", "file1", "file2", "environment", "model", "context", "call")
EVERY = {name: {"when": {"groups": "any", "scoring": "any"}, "rank": -i} for i, name in enumerate(NAMES)}


def call(tokens=1, contiguous=True):
    return SimpleNamespace(tokens=tokens, contiguous=contiguous)


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

TWO = {"a": {"size": {"max": 64}}, "b": {"when": {"groups": "any"}, "fallback": True}}


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
    import sys

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


# ---- contexts, threads, asyncio --------------------------------------------------------------------------------------


def test_contexts_nest_and_the_innermost_match_decides(toy):
    registry = toy.registry(EVERY)
    outside = registry.dispatch(toy.OP, size=8)
    with registry.override(toy.OP, "file1"):
        with registry.override(toy.OP, "file2", groups=2):
            assert registry.dispatch(toy.OP, size=8, groups=2).name == "file2"
            assert registry.dispatch(toy.OP, size=8).name == "file1"
            inner = registry.dispatch(toy.OP, size=8)
            assert registry.dispatch(toy.OP, size=8) is inner
        assert registry.dispatch(toy.OP, size=8, groups=2).name == "file1"
    assert registry.dispatch(toy.OP, size=8) is outside


def test_a_context_is_left_after_an_error(toy):
    registry = toy.registry(EVERY)
    with pytest.raises(KeyError), registry.override(toy.OP, "call"):
        raise KeyError
    assert registry.dispatch(toy.OP, size=8).name == "shipped"


def test_kernels_bound_before_a_context_stay_as_they_are(toy):
    registry = toy.registry(EVERY)
    kernel = registry.dispatch(toy.OP, size=8)
    with registry.override(toy.OP, "call"):
        assert kernel(call()) == "shipped"
        inside = registry.dispatch(toy.OP, size=8)
    assert inside(call()) == "call" and inside.name == "call"


def test_a_context_of_one_registry_is_none_of_another(toy):
    one, two = toy.registry(EVERY), toy.registry(EVERY)
    with one.override(toy.OP, "call"):
        assert two.dispatch(toy.OP, size=8).name == "shipped"


def test_threads_see_only_their_own_context(toy):
    registry = toy.registry(EVERY)
    names = ("file1", "file2", "environment", "context", None)
    start, wrong = threading.Barrier(len(names)), []

    def work(name):
        start.wait()
        for size in range(1, 200):
            if name is None:
                found = registry.dispatch(toy.OP, size=size).name
            else:
                with registry.override(toy.OP, name):
                    found = registry.dispatch(toy.OP, size=size).name
            if found != (name or "shipped"):
                wrong.append((name, found))

    with registry.override(toy.OP, "call"):  # the parent's context does not leak into a new thread either
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_one_override_object_in_several_threads_and_nested_in_itself(toy):
    registry = toy.registry(EVERY)
    shared = registry.override(toy.OP, "call")
    inside, leave, failed = threading.Barrier(2), threading.Event(), []

    def other():
        try:
            with shared:
                inside.wait()
                leave.wait()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    with shared, shared:
        inside.wait()
    leave.set()
    thread.join()
    assert not failed and registry.dispatch(toy.OP, size=8).name == "shipped"


def test_tasks_see_only_their_own_context(toy):
    registry = toy.registry(EVERY)

    async def work(name):
        with registry.override(toy.OP, name):
            for size in range(1, 30):
                await asyncio.sleep(0)
                assert registry.dispatch(toy.OP, size=size).name == name

    async def main():
        with registry.override(toy.OP, "model"):
            tasks = [asyncio.create_task(work(name)) for name in ("file1", "file2", "call")]
            inherited = asyncio.create_task(asyncio.sleep(0, registry.dispatch(toy.OP, size=8).name))
            for _ in range(20):
                await asyncio.sleep(0)
                assert registry.dispatch(toy.OP, size=8).name == "model"
            await asyncio.gather(*tasks)
            assert await inherited == "model"
        assert registry.dispatch(toy.OP, size=8).name == "shipped"

    asyncio.run(main())


def test_a_copied_context_carries_the_override(toy):
    registry = toy.registry(EVERY)
    with registry.override(toy.OP, "call"):
        copied = contextvars.copy_context()
    assert copied.run(lambda: registry.dispatch(toy.OP, size=8).name) == "call"


def test_kernels_of_a_context_are_forgotten_when_nobody_holds_them(toy):
    registry = toy.registry(EVERY)
    for size in range(1, 20):
        with registry.override(toy.OP, "call"):
            registry.dispatch(toy.OP, size=size)
    gc.collect()
    assert not registry.kernels


# ---- live kernels follow; a refused file changes nothing -------------------------------------------------------------


def test_live_kernels_follow_load_overrides_and_reload(toy):
    path = toy.file(TWO)
    registry = toy.registry(path)
    kernel, open_kernel = registry.dispatch(toy.OP, size=8, num_tokens=1), registry.bind(toy.OP, size=8)
    overrides = toy.overrides({"use": "b"}, name="o.yaml")
    registry.load_overrides(overrides)
    assert kernel(call()) == open_kernel(call()) == "b" and kernel.name == "b"
    assert registry.dispatch(toy.OP, size=8, num_tokens=1) is kernel
    toy.overrides({"disable": "b", "when": {"size": 9}}, name="o.yaml")
    registry.reload()
    assert kernel(call()) == "a" and registry.bind(toy.OP, size=8) is open_kernel
    toy.file({**TWO, "new": {"when": {"size": 8}}}, name=path.name)
    registry.reload()
    assert kernel(call()) == open_kernel(call()) == "new"


def test_a_handle_keeps_its_context_after_a_reload(toy):
    registry = toy.registry(EVERY)
    with registry.override(toy.OP, "context"):
        kernel = registry.dispatch(toy.OP, size=8)
        with registry.model("draft"):
            draft = registry.dispatch(toy.OP, size=8, implementation="call")
    registry.load_overrides(toy.overrides({"use": "file1"}, {"use": "model", "model": "draft"}))
    assert kernel(call()) == "context" and draft(call()) == "call"
    assert registry.dispatch(toy.OP, size=8).name == "file1"


def test_a_dispatch_inside_a_context_sees_a_reload(toy):
    path = toy.file(TWO)
    registry = toy.registry(path)
    with registry.override(toy.OP, "b", groups=2):
        assert registry.dispatch(toy.OP, size=8).name == "a"
        toy.file({**TWO, "new": {"when": {"size": 8}}}, name=path.name)
        registry.reload()
        assert registry.dispatch(toy.OP, size=8).name == "new"


class Snapshot:
    """What a caller can see of a registry: decisions, live kernels, explanations, caches."""

    CALLS = ({"size": 8}, {"size": 65}, {"size": 8, "groups": 2}, {"size": 8, "num_tokens": 3})

    def __init__(self, toy, registry):
        self.toy, self.registry = toy, registry
        self.kernels = [registry.dispatch(toy.OP, **c) for c in self.CALLS]
        self.functions = [k.raw for k in self.kernels]
        self.told = [registry.explain(toy.OP, **c).json() for c in self.CALLS]
        self.state, self.cache, self.files = registry.state, dict(registry._cache), registry._files

    def check(self):
        registry, toy = self.registry, self.toy
        assert registry.state is self.state and registry._cache == self.cache and registry._files == self.files
        assert [k.raw for k in self.kernels] == self.functions
        assert all(registry.dispatch(toy.OP, **c) is k for c, k in zip(self.CALLS, self.kernels))
        assert [registry.explain(toy.OP, **c).json() for c in self.CALLS] == self.told


GOOD = "- {op: toy.op, use: b}\n"
REFUSED = {
    "is no YAML": "version: 1\noverrides: [\n",
    "is not there": None,
    "unknown version": "version: 2\n",
    "unknown key": "version: 1\noverides: []\n",
    "a good line and an unknown op": "version: 1\noverrides:\n" + GOOD + "- {op: toy.opp, use: a}\n",
    "a good line and an unknown implementation": "version: 1\noverrides:\n"
    + GOOD
    + "- {op: toy.op, disable: aa, when: {size: 8}}\n",
    "a good line and an unknown trait": "version: 1\noverrides:\n" + GOOD + "- {op: toy.op, use: a, when: {sice: 8}}\n",
    "a good line and one without effect": "version: 1\noverrides:\n"
    + GOOD
    + "- {op: toy.op, use: a, when: {size: 100}}\n",
    "a good line and two that tie": "version: 1\noverrides:\n- {op: toy.op, prefer: b, when: {groups: 2}}\n"
    + GOOD
    + "- {op: toy.op, use: a, when: {size: {max: 64}}}\n- {op: toy.op, prefer: b, when: {size: {max: 64}}}\n",
    "a live kernel would have nothing": "version: 1\noverrides:\n- {op: toy.op, disable: b}\n",
    "a live kernel could not be served": "version: 1\noverrides:\n- {op: toy.op, use: a}\n",
    "adds implementations": "version: 1\noverrides:\n"
    + GOOD
    + "ops: {toy.op: {implementations: {c: {target: 'm:f', when: {platform: any}}}}}\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_override_file_changes_nothing(toy, what):
    registry = toy.registry(TWO)
    registry.load_overrides(toy.overrides({"prefer": "b", "when": {"size": 3}}))
    before = Snapshot(toy, registry)
    path = toy.folder / "gone.yaml" if REFUSED[what] is None else toy.write(REFUSED[what])
    with pytest.raises(RegistryError) as caught:
        registry.load_overrides(path)
    assert caught.value.where or "a kernel in use, <" in caught.value.message, "every error says where"
    before.check()
    registry.reload()  # and the refused file is not among those read again


BROKEN = {
    "is no YAML": "version: 1\nops: {\n",
    "is empty": "",
    "unknown key": "version: 1\nops: {}\nimplementations: {}\n",
    "the op is gone": "version: 1\nops: {}\n",
    "the implementation of a live kernel is gone": "TWO minus b",
    "two that tie": "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n"
    "      x: {target: 'm:f', when: {platform: any}}\n      y: {target: 'm:f', when: {platform: any}}\n",
    "a contract that can't be imported": "version: 1\nops:\n  toy.op:\n    contract: gone_module:C\n",
    "a target that can't be imported": "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n"
    "      x: {target: 'gone_module:f', when: {platform: any, groups: any, contiguous: any}}\n",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_reload_of_a_broken_file_changes_nothing(toy, what):
    path = toy.file(TWO)
    registry = toy.registry(path)
    before = Snapshot(toy, registry)
    good = path.read_text()
    if BROKEN[what].startswith("TWO"):
        toy.file({"a": TWO["a"]}, name=path.name)
    else:
        toy.write(BROKEN[what], path.name)
    for _ in range(2):
        with pytest.raises(RegistryError):
            registry.reload()
        before.check()
    path.write_text(good)
    registry.reload()
    assert all(k is registry.dispatch(toy.OP, **c) for c, k in zip(before.CALLS, before.kernels))


def test_a_first_load_that_fails_may_be_tried_again(toy):
    path = toy.write("version: 1\nops: {\n")
    registry = toy.registry(path)
    for _ in range(2):
        with pytest.raises(DocumentError):
            registry.dispatch(toy.OP, size=8)
    toy.file(TWO, name=path.name)
    assert registry.dispatch(toy.OP, size=8).name == "a"


def test_a_context_that_outlives_what_it_names(toy):
    path = toy.file({**TWO, "c": {"when": {}, "rank": -1}})
    registry = toy.registry(path)
    with registry.override(toy.OP, "c"):
        toy.file(TWO, name=path.name)
        registry.reload()
        for ask in (registry.dispatch, registry.explain):
            with pytest.raises(UnknownNameError, match="no implementation 'c'"):
                ask(toy.OP, size=8)
    assert registry.dispatch(toy.OP, size=8).name == "a"


def test_a_reload_while_others_dispatch(toy):
    path = toy.file(TWO)
    registry = toy.registry(path)
    kernel = registry.dispatch(toy.OP, size=8)
    stop, wrong = threading.Event(), []

    def ask():
        while not stop.is_set():
            for size in (8, 9, 70):
                got = registry.dispatch(toy.OP, size=size)
                if got(call()) not in ("a", "b", "new") or (size == 8 and got is not kernel):
                    wrong.append(size)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    [t.start() for t in threads]
    for turn in range(6):
        toy.file({**TWO, "new": {"when": {"size": 8}}} if turn % 2 else TWO, name=path.name)
        registry.reload()
    stop.set()
    [t.join() for t in threads]
    assert not wrong and kernel.name == "new"


def test_a_reload_detects_the_platform_again_and_forgets_what_was_asked_for_the_old_one(toy, monkeypatch):
    import kernel_registry.state as state
    from kernel_registry.traits.platform import Platform

    here = ["cpu"]
    monkeypatch.setattr(state, "detect", lambda: Platform.parse(here[0]))
    registry = toy.registry({"a": {"platform": "cuda"}, "b": {"platform": "cpu"}}, platform=None)
    assert registry.dispatch(toy.OP, size=8).name == "b" and str(registry.platform()) == "cpu"
    here[0] = "sm_90"
    assert registry.dispatch(toy.OP, size=8).name == "b"
    registry.reload()
    assert registry.dispatch(toy.OP, size=8).name == "a" and str(registry.platform()) == "sm_90"


def test_a_handle_follows_the_detected_platform_unless_its_caller_named_one(toy, monkeypatch):
    import kernel_registry.state as state
    from kernel_registry.traits.platform import Platform

    here = ["cpu"]
    monkeypatch.setattr(state, "detect", lambda: Platform.parse(here[0]))
    registry = toy.registry({"a": {"platform": "cuda"}, "b": {"platform": "cpu"}}, platform=None)
    follows, stays = registry.dispatch(toy.OP, size=8), registry.dispatch(toy.OP, size=8, platform="cpu")
    assert follows.name == stays.name == "b"
    assert len(registry.freeze().calls) == 1  # one call, spelt in two ways
    here[0] = "sm_90"
    registry.reload()
    assert follows.name == follows(call()) == "a" and str(follows.traits["platform"]) == "sm_90"
    assert stays.name == stays(call()) == "b" and str(stays.traits["platform"]) == "cpu"
    assert registry.dispatch(toy.OP, size=8) is follows
    assert registry.dispatch(toy.OP, size=8, platform="cpu") is stays


def test_values_of_a_dynamic_trait_do_not_fill_the_memory(toy, monkeypatch):
    import kernel_registry.state as state

    monkeypatch.setattr(state, "_LATEST", 8)
    monkeypatch.setattr(sys.modules["kernel_registry.registry"], "_FAST_CACHE_LIMIT", 8)
    registry = toy.registry(TWO)
    held, kept = registry.dispatch(toy.OP, size=8, num_tokens=1), registry.dispatch(toy.OP, size=8)
    for tokens in range(2, 100):
        kernel = registry.dispatch(toy.OP, size=8, num_tokens=tokens)
        assert registry.dispatch(toy.OP, size=8, num_tokens=tokens) is kernel
    assert len(registry.kernels) <= 18
    assert registry.dispatch(toy.OP, size=8, num_tokens=1) is held  # in use, so remembered
    assert registry.dispatch(toy.OP, size=8) is kept
    latest = registry.kernels
    del kernel
    registry.load_overrides(toy.overrides({"use": "b"}))
    assert held.name == kept.name == "b" and set(map(id, registry.kernels)) <= set(map(id, latest))
    assert registry.dispatch(toy.OP, size=8, num_tokens=1) is held


def test_a_call_that_names_its_implementation_is_told_as_such(toy):
    registry = toy.registry(TWO)
    told = registry.explain(toy.OP, size=8, implementation="b").text()
    assert "[use b: the call named it]" in told and "a  could serve, but another was asked for" in told
    refused = registry.explain(toy.OP, size=65, implementation="a").text()
    assert "-> nothing: `use a: the call named it` was asked for, but can't serve" in refused
    assert "b  could serve, but another was asked for" in refused and "goes later" not in refused
    with pytest.raises(OverrideError, match="hint: call without implementation="):
        registry.dispatch(toy.OP, size=65, implementation="a")
