"""Frozen plans: canonical, comparable, loadable, refused when they no longer fit."""

from __future__ import annotations

import json
import os

import pytest
from engine_support import call

from kernel_registry.errors import OverrideError, PlanError, RegistryError
from kernel_registry.plan import Plan

THREE = {
    "small": {"num_tokens": {"max": 64}},
    "big": {"num_tokens": {"min": 65}},
    "fused": {"when": {"scoring": "softmax", "groups": "any"}},
    "reference": {"when": {"groups": "any"}, "fallback": True},
}


def ask(registry, op, order=1):
    for traits in (
        {"size": 8},
        {"size": 8, "scoring": "softmax"},
        {"size": 8, "groups": 2},
        {"size": 8, "num_tokens": 3},
    )[::order]:
        registry.dispatch(op, **traits)
    return registry


def test_a_plan_holds_every_choice(toy):
    plan = ask(toy.registry(THREE), toy.OP).freeze()
    data = json.loads(plan.text())
    assert (
        data["version"] == 1
        and data["device"] == "sm_90"
        and set(data["versions"]) == {"kernel-registry", "torch", "triton"}
    )
    bound = next(
        c
        for c in data["calls"]
        if c["traits"]
        == {"size": 8, "groups": 1, "scoring": "sigmoid", "has_bias": True, "dtype": "float32", "platform": "sm_90"}
    )
    assert bound["op"] == toy.OP and bound["model"] is None
    assert bound["table"] == [
        {"when": {"num_tokens": {"max": 64}}, "implementation": "small", "decided_by": "registry"},
        {"when": {"num_tokens": {"min": 65}}, "implementation": "big", "decided_by": "registry"},
    ]
    assert set(bound["sources"]) == {"small", "big"} and all(len(h) == 16 for h in bound["sources"].values())
    assert len(data["calls"]) == 4


def test_the_text_does_not_depend_on_the_order_of_the_calls_or_of_the_file(toy):
    shuffled = dict(reversed(THREE.items()))
    plans = [ask(toy.registry(t), toy.OP, order).freeze() for t in (THREE, shuffled) for order in (1, -1)]
    assert len({p.text() for p in plans}) == 1 and len({p.fingerprint for p in plans}) == 1
    assert len(plans[0].fingerprint) == 64 and plans[0].diff(plans[1]) == []


CHILD = """
import sys
from kernel_registry import Registry
registry = Registry(sys.argv[1], plugins=False, environment=False, platform="sm_90")
for size in map(int, sys.argv[2].split(",")):
    registry.dispatch("toy.op", size=size)
print(registry.freeze().fingerprint)
"""


def test_every_process_gives_the_same_fingerprint(toy, python):
    path = toy.file(THREE)
    prints = {
        python(CHILD, str(path), "8,16", PYTHONHASHSEED="1"),
        python(CHILD, str(path), "16,8", PYTHONHASHSEED="2"),
    }
    registry = toy.registry(path)
    registry.dispatch(toy.OP, size=8), registry.dispatch(toy.OP, size=16)
    prints.add(registry.freeze().fingerprint + "\n")
    assert len(prints) == 1
    assert python(CHILD, str(path), "8", PYTHONHASHSEED="1") not in prints


def test_save_and_load(toy, tmp_path):
    plan = ask(toy.registry(THREE), toy.OP).freeze()
    path = tmp_path / "plan.json"
    path.write_text("something older")
    plan.save(path)
    again = Plan.load(path)
    assert again.text() == plan.text() == path.read_text() and again.fingerprint == plan.fingerprint
    assert [p for p in os.listdir(tmp_path) if p.endswith(".part")] == []


def test_a_plan_that_can_not_be_written_leaves_nothing_behind(toy, tmp_path):
    plan = ask(toy.registry(THREE), toy.OP).freeze()
    folder = tmp_path / "plans"
    (folder / "taken").mkdir(parents=True)
    for path in (folder / "taken", folder / "gone" / "plan.json"):
        with pytest.raises(PlanError, match="can't be written"):
            plan.save(path)
    assert os.listdir(folder) == ["taken"]


def good(toy):
    return json.loads(ask(toy.registry(THREE), toy.OP).freeze().text())


SPOILED = [
    lambda d: "not json",
    lambda d: "[]",
    lambda d: "",
    lambda d: json.dumps({**d, "version": 2}),
    lambda d: json.dumps({**d, "extra": 1}),
    lambda d: json.dumps({k: v for k, v in d.items() if k != "device"}),
    lambda d: json.dumps({**d, "versions": []}),
    lambda d: json.dumps({**d, "calls": {}}),
    lambda d: json.dumps({**d, "calls": [3]}),
    *[
        lambda d, k=k, v=v: json.dumps({**d, "calls": [{**d["calls"][0], k: v}]})
        for k, v in (
            ("op", 3),
            ("model", 3),
            ("traits", []),
            ("table", []),
            ("table", [{}]),
            ("table", None),
            ("sources", []),
            ("sources", {}),
            ("surprise", 1),
        )
    ],
    lambda d: json.dumps({**d, "calls": [{k: v for k, v in d["calls"][0].items() if k != "table"}]}),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_file_that_is_no_whole_plan(toy, tmp_path, spoil):
    path = tmp_path / "plan.json"
    path.write_text(spoil(good(toy)))
    registry = ask(toy.registry(THREE), toy.OP)
    state = registry.state
    with pytest.raises(PlanError) as caught:
        registry.load_plan(path)
    assert caught.value.where == path and registry.state is state


def test_a_plan_that_is_not_there(toy, tmp_path):
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    for path in (tmp_path / "gone.json", tmp_path, tmp_path / "latin.json"):
        with pytest.raises(PlanError, match="is not a plan"):
            toy.registry(THREE).load_plan(path)


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_diff_names_what_changed(toy):
    one = ask(toy.registry(THREE), toy.OP)
    plan = one.freeze()
    one.load_overrides(
        toy.overrides(
            {"use": "reference", "when": {"scoring": "sigmoid", "groups": 2}},
            {"use": "reference", "when": {"num_tokens": {"max": 9}, "scoring": "sigmoid", "groups": 1}},
        )
    )
    one.dispatch(toy.OP, size=32, groups=4)
    lines = plan.diff(one.freeze())
    assert (
        len([line for line in lines if line.startswith("~ ")]) == 3
        and len([line for line in lines if line.startswith("+ ")]) == 1
    )
    assert any("reference (registry) -> reference (override)" in line for line in lines)
    assert any(
        "small when {num_tokens: {max: 64}}" in line and "reference when {num_tokens: {max: 9}} (override)" in line
        for line in lines
    )
    back = one.freeze().diff(plan)
    assert len(back) == len(lines) and any(line.startswith("- ") for line in back)


def test_the_device_and_versions_are_part_of_a_plan(toy):
    plan, other = (ask(toy.registry(THREE, platform=p), toy.OP).freeze() for p in ("sm_90", "sm_100"))
    assert plan.fingerprint != other.fingerprint and "device: sm_90 -> sm_100" in plan.diff(other)
    newer = Plan(plan.device, {**plan.versions, "torch": "99"}, plan.calls)
    assert newer.fingerprint != plan.fingerprint and plan.diff(newer) == [f"torch: {plan.versions['torch']} -> 99"]


def test_a_changed_source_changes_the_fingerprint(toy):
    factory = "def f(**t):\n    return lambda x: {}\n"
    module = toy.module(factory.format(1))
    registry = toy.registry({"a": {"target": f"{module}:f", "when": {}}})
    registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    toy.module(factory.format(2), module)
    changed = registry.freeze()
    assert changed.fingerprint != plan.fingerprint
    (line,) = plan.diff(changed)
    assert line.startswith("~ toy.op(") and line.endswith("the source of a changed")


def test_a_helper_beside_the_kernel_counts_as_its_source(toy):
    package = toy.folder / "pack_age"
    package.mkdir()
    (package / "__init__.py").write_text("")
    toy.module("X = 1\n", "pack_age.helper")
    toy.module("def f(**t):\n    return lambda x: 1\n", "pack_age.kernel")
    registry = toy.registry({"a": {"target": "pack_age.kernel:f", "when": {}}})
    registry.dispatch(toy.OP, size=8)
    before = registry.freeze().fingerprint
    toy.module("X = 2\n", "pack_age.helper")
    assert registry.freeze().fingerprint != before


def test_contexts_and_pinned_calls_are_not_the_configuration(toy):
    registry = ask(toy.registry(THREE), toy.OP)
    plan = registry.freeze()
    registry.dispatch(toy.OP, size=99, implementation="reference")
    with registry.override(toy.OP, "reference"):
        kept = registry.dispatch(toy.OP, size=98)
        assert registry.freeze().text() == plan.text()
    assert kept.name == "reference"


def test_the_model_scope_is_part_of_a_call(toy):
    registry = toy.registry(THREE)
    registry.load_overrides(toy.overrides({"use": "reference", "model": "draft"}))
    registry.dispatch(toy.OP, size=8)
    with registry.model("draft"):
        registry.dispatch(toy.OP, size=8)
    rows = {
        c["model"]: [r["implementation"] for r in c["table"]] for c in json.loads(registry.freeze().text())["calls"]
    }
    assert rows == {None: ["small", "big"], "draft": ["reference"]}


# ---- unused overrides ------------------------------------------------------------------------------------------------


def test_an_override_that_nothing_matched_is_an_error_at_freeze(toy):
    registry = ask(toy.registry(THREE), toy.OP)
    path = toy.overrides(
        {"disable": "small", "when": {"size": 8}},
        {"use": "big", "when": {"size": 512, "num_tokens": {"min": 65}}, "reason": "incident 7"},
    )
    registry.load_overrides(path)
    with pytest.raises(OverrideError, match="no dispatched call matched") as caught:
        registry.freeze()
    assert f"use big: file {path}, {path}:7 (incident 7)" in str(caught.value) and "disable small" not in str(
        caught.value
    )
    registry.dispatch(toy.OP, size=512)
    registry.freeze()


def test_a_line_for_a_model_needs_a_call_inside_that_model(toy):
    registry = ask(toy.registry(THREE), toy.OP)
    registry.load_overrides(toy.overrides({"use": "reference", "model": "draft"}))
    with pytest.raises(OverrideError, match="use reference for model draft"):
        registry.freeze()
    with registry.model("draft"):
        registry.dispatch(toy.OP, size=8)
    registry.freeze()


# ---- batch invariance ------------------------------------------------------------------------------------------------


def test_a_choice_that_depends_on_the_batch_is_refused_where_invariance_is_asked(toy):
    registry = toy.registry(THREE)
    registry.dispatch(toy.OP, size=8)
    with pytest.raises(
        PlanError, match="small or big depending on num_tokens.*not declared to agree bit for bit"
    ) as caught:
        registry.freeze(batch_invariant=True)
    assert "numerics" in caught.value.hint
    registry.freeze()


@pytest.mark.parametrize("tags, fine", [(("x", "x"), True), (("x", "y"), False), (("x", None), False)])
def test_the_numerics_tag_says_that_they_agree(toy, tags, fine):
    table = {n: {"when": THREE[n], **({"numerics": t} if t else {})} for n, t in zip(("small", "big"), tags)}
    registry = toy.registry(table)
    registry.bind(toy.OP, size=8)
    if fine:
        assert len(registry.freeze(batch_invariant=True).calls) == 1
    else:
        with pytest.raises(PlanError):
            registry.freeze(batch_invariant=True)


def test_an_override_to_one_of_them_makes_it_invariant(toy):
    registry = toy.registry({**THREE, "reference": {"when": {}, "fallback": True}})
    registry.bind(toy.OP, size=8)
    registry.load_overrides(toy.overrides({"use": "reference", "when": {"size": 8}}))
    registry.freeze(batch_invariant=True)


def test_tiles_that_depend_on_the_batch_are_refused_too(toy):
    target = toy.module("def tiled(*, tiles, **traits):\n    return lambda x: tiles(x.tokens)\n")
    tiles = toy.module("def default(traits, num_tokens):\n    return {'rows': num_tokens}\n")
    entry = {"target": f"{target}:tiled", "tiles": tiles, "when": {}}
    for name, fine in (("tiled", False), ("sure", True)):
        registry = toy.registry({name: {**entry, **({"numerics": "any tile"} if fine else {})}})
        registry.dispatch(toy.OP, size=8, num_tokens=3)
        registry.freeze(batch_invariant=True)  # of one number of tokens there is one tile
        registry.bind(toy.OP, size=8)
        if fine:
            registry.freeze(batch_invariant=True)
        else:
            with pytest.raises(PlanError, match="runs tiled with tiles that depend on num_tokens.*bit for bit"):
                registry.freeze(batch_invariant=True)


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_plan_decides_and_freezes_to_itself(toy, tmp_path):
    registry = ask(toy.registry(THREE), toy.OP)
    registry.load_overrides(toy.overrides({"use": "reference", "when": {"scoring": "sigmoid", "groups": 2}}))
    plan = registry.freeze()
    plan.save(tmp_path / "plan.json")
    other = toy.registry({**THREE, "newer": {"when": {"size": 8, "groups": "any", "scoring": "any"}, "rank": 9}})
    assert other.dispatch(toy.OP, size=8).name == "newer"
    other.load_plan(tmp_path / "plan.json", strict=False)
    ask(other, toy.OP)
    assert other.freeze().text() == plan.text()
    kernel = other.bind(toy.OP, size=8)
    assert [kernel(call(t)) for t in (64, 65)] == ["small", "big"]
    assert str(tmp_path / "plan.json") in other.explain(toy.OP, size=8).cases[0].decided_by


def test_a_loaded_plan_is_stronger_than_files_and_weaker_than_contexts(toy):
    registry = toy.registry(THREE)
    registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    registry.load_overrides(toy.overrides({"use": "reference"}))
    kernel = registry.dispatch(toy.OP, size=8)
    assert kernel.name == "reference"
    registry.load_plan(plan)
    assert kernel.name == "small|big"  # live kernels follow
    with registry.override(toy.OP, "reference"):
        assert registry.dispatch(toy.OP, size=8).name == "reference"
    assert registry.dispatch(toy.OP, size=8, implementation="reference").name == "reference"


def test_a_strict_plan_refuses_what_it_does_not_hold_and_explain_says_so(toy):
    registry = toy.registry(THREE)
    registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    registry.load_plan(plan)
    with pytest.raises(PlanError, match="does not hold this call of toy.op") as caught:
        registry.dispatch(toy.OP, size=9)
    assert "strict=False" in caught.value.hint
    explanation = registry.explain(toy.OP, size=9)
    assert explanation.winner is None and "does not hold" in explanation.text()
    assert registry.dispatch(toy.OP, size=8, num_tokens=3).name == "small"  # a part of a call that it holds
    with registry.model("draft"), pytest.raises(PlanError):  # what was frozen outside a model is no plan for it
        registry.dispatch(toy.OP, size=8)
    with registry.override(toy.OP, "reference", size=9):
        assert registry.dispatch(toy.OP, size=9).name == "reference"
        with pytest.raises(PlanError):  # a context that says nothing of this call changes nothing for it
            registry.dispatch(toy.OP, size=10)
    registry.load_plan(plan, strict=False)
    assert registry.dispatch(toy.OP, size=9).name == "small|big"


def test_loading_is_refused_whole_when_a_live_kernel_is_not_held(toy):
    registry = toy.registry(THREE)
    registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    live = registry.dispatch(toy.OP, size=9)
    state = registry.state
    with pytest.raises(PlanError, match="kernel in use"):
        registry.load_plan(plan)
    assert (
        registry.state is state and live(call()) == "small" and registry.dispatch(toy.OP, size=10).name == "small|big"
    )


def spoil(plan, **changes):
    data = json.loads(plan.text())
    for c in data["calls"]:
        c.update(changes)
    return Plan(data["device"], data["versions"], tuple(data["calls"]), source="plan.json")


def test_a_plan_that_does_not_fit_is_refused_and_nothing_changes(toy):
    registry = toy.registry(THREE)
    kernel = registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    (call_,) = plan.calls
    bad = {
        "no op 'toy.opp'": spoil(plan, op="toy.opp"),
        "no trait 'softcap'": spoil(plan, traits={**call_["traits"], "softcap": 30}),
        "scoring: expected": spoil(plan, traits={**call_["traits"], "scoring": "tanh"}),
        "no implementation 'gone'": spoil(
            plan, table=[{"when": {}, "implementation": "gone", "decided_by": "registry"}]
        ),
        "fused can't serve": spoil(plan, table=[{"when": {}, "implementation": "fused", "decided_by": "registry"}]),
        "small can't serve": spoil(
            plan, table=[{"when": {"num_tokens": {"min": 65}}, "implementation": "small", "decided_by": "registry"}]
        ),
        "a condition on python": spoil(
            plan, table=[{"when": {"python": ["os:system"]}, "implementation": "small", "decided_by": "registry"}]
        ),
        "the source of small changed": spoil(plan, sources={"small": "0" * 16}),
    }
    state = registry.state
    for message, spoiled in bad.items():
        with pytest.raises(PlanError) as caught:
            registry.load_plan(spoiled)
        assert message in str(caught.value) and caught.value.where == "plan.json", message
        assert registry.state is state and registry.dispatch(toy.OP, size=8) is kernel


def test_a_reload_checks_the_loaded_plan_again(toy):
    path = toy.file(THREE)
    registry = toy.registry(path)
    registry.dispatch(toy.OP, size=8)
    registry.load_plan(registry.freeze())
    toy.file({n: w for n, w in THREE.items() if n != "big"}, name=path.name)
    state = registry.state
    with pytest.raises(RegistryError, match="no implementation 'big'"):
        registry.reload()
    assert registry.state is state


def test_a_changed_source_refuses_a_strict_load(toy):
    factory = "def f(**t):\n    return lambda x: {}\n"
    module = toy.module(factory.format(1))
    registry = toy.registry({"a": {"target": f"{module}:f", "when": {}}})
    registry.dispatch(toy.OP, size=8)
    plan = registry.freeze()
    registry.load_plan(plan)
    toy.module(factory.format(2), module)
    with pytest.raises(PlanError, match="the source of a changed since the plan was frozen"):
        registry.load_plan(plan)
