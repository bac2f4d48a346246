"""Rule 6: live kernels follow a reload, and a refused file changes nothing."""

from __future__ import annotations

import sys
import threading

import pytest
from engine_support import call
from override_support import EVERY, TWO

from kernel_registry.errors import DocumentError, OverrideError, RegistryError, UnknownNameError


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
    from kernel_registry.traits.platform import Platform

    import kernel_registry.state as state

    here = ["cpu"]
    monkeypatch.setattr(state, "detect", lambda: Platform.parse(here[0]))
    registry = toy.registry({"a": {"platform": "cuda"}, "b": {"platform": "cpu"}}, platform=None)
    assert registry.dispatch(toy.OP, size=8).name == "b" and str(registry.platform()) == "cpu"
    here[0] = "sm_90"
    assert registry.dispatch(toy.OP, size=8).name == "b"
    registry.reload()
    assert registry.dispatch(toy.OP, size=8).name == "a" and str(registry.platform()) == "sm_90"


def test_a_handle_follows_the_detected_platform_unless_its_caller_named_one(toy, monkeypatch):
    from kernel_registry.traits.platform import Platform

    import kernel_registry.state as state

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
