"""What is told about tiles, by explain, a kernel and a plan; and the entry in registry.yaml that asks for them."""

from __future__ import annotations

import json
import sys

import pytest
from tiled_toy import TILES, call, on_device, open_registry, row, tile, tiles_file

from kernel_registry.errors import DocumentError, PlanError, TargetError
from kernel_registry.lint import lint_catalog
from kernel_registry.plan import Plan
from kernel_registry.traits.detection import Gpu
from kernel_registry.traits.platform import Platform

# ---- what is said ----------------------------------------------------------------------------------------------------

def test_explain_and_the_kernel_tell_where_tiles_come_from(tiled, monkeypatch):
    monkeypatch.setattr("kernel_registry.tiles.installed", lambda: {"triton": "3.6.0"})
    path = tiled.folder / "tuned.yaml"
    registry = open_registry(tiled, row({1: 7, 8: 8}, versions={"triton": "3.6.0"}))
    told = f"tuned on NVIDIA H200 for 1, 8 tokens ({path}:3); serves 1-32, others by the default"
    explanation = registry.explain(tiled.OP, size=8)
    assert f"\n     tiles: {told}\n" in explanation.text() + "\n"
    assert json.loads(explanation.json())["cases"][0]["tiles"] == told
    assert str(registry.dispatch(tiled.OP, size=8).tiles["a"]) == told
    monkeypatch.setattr("kernel_registry.tiles.installed", lambda: {"triton": "3.7.0"})
    assert str(open_registry(tiled, row({1: 7}, versions={"triton": "3.6.0"})).dispatch(tiled.OP, size=8).tiles["a"]) \
        == f"tuned on NVIDIA H200 for 1 token ({path}:3, timed with triton 3.6.0); serves 1-4, others by the default"
    assert str(open_registry(tiled, row({1: 7, 64: 8})).dispatch(tiled.OP, size=8).tiles["a"]).endswith(
        "; serves 1-4, 16-256, others by the default")


def test_two_files_that_serve_are_both_named(tiled):
    tiles_file(tiled, row({1: 1, 2: 1}), name="tiles.yaml")
    kernel = open_registry(tiled, row({2: 2})).dispatch(tiled.OP, size=8)
    assert f" for 1, 2 tokens ({tiled.folder / 'tiles.yaml'}:3, {tiled.folder / 'tuned.yaml'}:3); serves" in \
        str(kernel.tiles["a"])


def test_where_nothing_is_tuned_it_says_what_would(tiled, monkeypatch):
    registry = open_registry(tiled, row({1: 7}, device="NVIDIA H100"))
    told = str(registry.dispatch(tiled.OP, size=8, groups=2).tiles["a"])
    assert told == "analytic default; nothing tuned for these traits on NVIDIA H200 " \
        "(kernel-registry tune toy.op size=8 groups=2 --implementation a)"
    assert f"nothing tuned for these traits on NVIDIA H200, but on NVIDIA H100 ({tiled.folder / 'tuned.yaml'}:3) (k" \
        in registry.explain(tiled.OP, size=8).text()
    assert "the device is not known here; tuned for these traits on NVIDIA H100" in \
        registry.explain(tiled.OP, size=8, platform="sm_80").text()
    assert "tiles: analytic default; nothing tuned for these traits on cpu\n" in \
        registry.explain(tiled.OP, size=8, groups=2, platform="cpu").text() + "\n"


def test_an_implementation_without_tiles_has_no_such_line(toy):
    registry = toy.registry({"a": {}})
    assert "tiles" not in registry.explain(toy.OP, size=8).text() and registry.dispatch(toy.OP, size=8).tiles == {}


# ---- plans -----------------------------------------------------------------------------------------------------------

def frozen(toy, *rows, **options):
    registry = open_registry(toy, *rows, **options)
    registry.dispatch(toy.OP, size=8)
    return registry.freeze()


def source(plan):
    return plan.calls[0]["sources"]["a"]


def test_a_plan_holds_the_tiles_that_are_used(tiled):
    plan, other = frozen(tiled), frozen(tiled, row({8: 8, 1: 7}))
    assert plan.calls[0]["tiles"] == {"a": {"device": "NVIDIA H200", "num_tokens": {}, "serves": []}}
    assert other.calls[0]["tiles"]["a"] == {
        "device": "NVIDIA H200", "num_tokens": {"1": tile(7), "8": tile(8)}, "serves": [[1, 32]]}
    changed = frozen(tiled, row({8: 8, 1: 6}))
    assert len({source(p) for p in (plan, other, changed)}) == len({p.fingerprint for p in (plan, other, changed)}) == 3
    elsewhere = frozen(tiled, row({1: 7}, device="NVIDIA H100"), row({1: 7}, traits={"size": 9}))
    assert elsewhere.fingerprint == plan.fingerprint  # a row that is not used changes nothing


def test_the_difference_of_two_plans_names_the_tiles(tiled):
    default, one, two = frozen(tiled), frozen(tiled, row({1: 7})), frozen(tiled, row({1: 7, 8: 8}))
    (line,), (more,) = default.diff(one), one.diff(two)
    assert line.endswith('tiles of a: for 1 tokens: not tuned -> {"up": {"M": 7, "fast": true}, "warps": 8}')
    assert 'tiles of a: for 8 tokens: not tuned -> {"up": {"M": 8' in more and not one.diff(one)


def test_the_source_of_the_tiles_module_is_a_part_of_the_source(tiled):
    """Also where it lies in another folder than the kernel."""
    folder = tiled.folder / "apart"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "choice.py").write_text(TILES)
    tiled.entry["tiles"] = "apart.choice"
    before = source(frozen(tiled))
    (folder / "choice.py").write_text(TILES + "# changed\n")
    assert source(frozen(tiled)) != before


@pytest.mark.parametrize("then, now", [([row({1: 7})], []), ([], [row({1: 7})]), ([row({1: 7})], [row({1: 8})]),
                                       ([row({1: 7})], [row({1: 7, 8: 7})])])
def test_a_plan_is_refused_where_its_tiles_changed(tiled, tmp_path, then, now):
    path = tmp_path / "plan.json"
    frozen(tiled, *then).save(path)
    open_registry(tiled, *then).load_plan(path)
    registry = open_registry(tiled, *now)
    kernel = registry.dispatch(tiled.OP, size=8)
    before = kernel(call(1))
    with pytest.raises(PlanError, match="toy.op: the tiles of a for NVIDIA H200 changed since the plan was frozen"):
        registry.load_plan(path)
    assert kernel(call(1)) == before


def test_a_plan_made_where_the_device_is_not_known_fits_every_device(tiled, tmp_path, monkeypatch):
    monkeypatch.setattr("kernel_registry.tiles.find", lambda: (Gpu("", Platform("cpu"), "cpu"), "a fake"))
    path = tmp_path / "plan.json"
    plan = frozen(tiled, row({1: 7}))
    plan.save(path)
    assert "tiles" not in plan.calls[0]
    on_device(monkeypatch, "NVIDIA H200", "sm_90")
    registry = open_registry(tiled, row({1: 7}))
    registry.load_plan(path)
    assert registry.dispatch(tiled.OP, size=8)(call(1)) == tile(7)


_NONE = {"device": "x", "num_tokens": {}, "serves": []}


@pytest.mark.parametrize("wrong", [3, {"a": 3}, {"gone": _NONE}, {"a": {"device": "x"}}, {"a": {**_NONE, "device": 3}},
                                   {"a": {**_NONE, "num_tokens": []}}, {"a": {**_NONE, "num_tokens": {"few": {}}}},
                                   {"a": {**_NONE, "serves": None}}, {"a": {"device": "x", "num_tokens": {}}}])
def test_a_plan_with_malformed_tiles_is_refused(tiled, tmp_path, wrong):
    path = tmp_path / "plan.json"
    data = json.loads(frozen(tiled).text())
    data["calls"][0]["tiles"] = wrong
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="not a whole plan"):
        Plan.load(path)


# ---- the entry in registry.yaml --------------------------------------------------------------------------------------

def test_a_target_that_does_not_take_tiles_is_told(tiled):
    tiled.entry["target"] = f"{tiled.kernels}:without"
    with pytest.raises(TargetError, match="takes no option 'tiles'"):
        open_registry(tiled).dispatch(tiled.OP, size=8)


def test_without_the_entry_a_target_gets_no_tiles(tiled):
    del tiled.entry["tiles"]
    with pytest.raises(TargetError, match="missing 1 required keyword-only argument: 'tiles'"):
        open_registry(tiled).dispatch(tiled.OP, size=8)


@pytest.mark.parametrize("change, line", [
    (lambda e: e.update(options={"tiles": 1}), "tiles: 1"),
    (lambda e: e.update(variants={"v": {"options": {"tiles": 1}, "when": {"size": 8}}}), "tiles: 1")])
def test_an_option_of_the_same_name_is_refused(tiled, change, line):
    change(tiled.entry)
    path = tiled.file({"a": tiled.entry})
    at = path.read_text().splitlines().index(next(x for x in path.read_text().splitlines() if x.strip() == line)) + 1
    with pytest.raises(DocumentError, match=f"{path}:{at}: a(.v)? declares tiles, and an option is called `tiles` too"):
        tiled.registry(path).catalog


@pytest.mark.parametrize("wrong", ["'a:b'", "a.b.", "3", "''"])
def test_tiles_of_an_entry_are_a_module(tiled, wrong):
    path = tiled.file({"a": tiled.entry})
    path.write_text(path.read_text().replace(f"tiles: {tiled.tiles}", f"tiles: {wrong}"))
    with pytest.raises(DocumentError, match=r"implementations.a.tiles: .*\n?"):
        tiled.registry(path).catalog


def test_the_module_is_imported_when_a_kernel_is_bound(tiled):
    registry = open_registry(tiled, row({1: 7}))
    registry.explain(tiled.OP, size=8).text()
    assert not [f for f in lint_catalog(registry.catalog) if "installed" in f.message]
    assert tiled.tiles not in sys.modules and tiled.kernels not in sys.modules
    registry.dispatch(tiled.OP, size=8)
    assert tiled.tiles in sys.modules


def test_lint_misses_a_module_that_is_not_there(tiled):
    tiled.entry["tiles"] = "gone.module"
    registry = open_registry(tiled)
    finding, = [f for f in lint_catalog(registry.catalog) if "installed" in f.message]
    assert "a: the module of its tiles, 'gone.module', is not installed here" in str(finding)
    with pytest.raises(TargetError, match="'gone.module:default' can't be imported"):
        registry.dispatch(tiled.OP, size=8)


@pytest.mark.parametrize("wrong, said", [
    ({"up": {"M": 7}, "warps": 8}, "up.fast is missing"),
    ({**tile(7), "wraps": 8}, "wraps is not among its keys"),
    ({"up": {"M": True, "fast": True}, "warps": 8}, "up.M is a bool, expected a int"),
    ({"up": 3, "warps": 8}, "up is not among its keys; up.M is missing; up.fast is missing"),
])
def test_a_tile_that_the_kernel_would_not_take_is_refused_when_bound(tiled, wrong, said):
    registry = open_registry(tiled, {**row({1: 7}), "num_tokens": {1: tile(7), 8: wrong}})
    path = tiled.folder / "tuned.yaml"
    line = path.read_text().splitlines().index("    8:") + 1
    with pytest.raises(DocumentError, match=f"{path}:{line}: the tile for 8 tokens is not one that a takes: {said}"):
        registry.dispatch(tiled.OP, size=8)
