"""Tuned tiles as data: which rows a bound kernel gets, what is said about them, and which files are refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kernel_registry import Registry, shipped_registry
from kernel_registry.document import read
from kernel_registry.errors import (
    DocumentError,
    PlanError,
    RegistryError,
    TargetError,
    TraitError,
    UnknownNameError,
)
from kernel_registry.lint import lint_catalog
from kernel_registry.plan import Plan
from kernel_registry.tile_files import Row, add_tile, installed, read_rows
from kernel_registry.tiles import Tiling, chooser
from kernel_registry.traits.detection import Gpu
from kernel_registry.traits.platform import Platform

KERNELS = '''
def a(*, tiles, **traits):
    """Its kernel gives the tile of a call, as the real ones launch with it."""
    return lambda x: tiles(x.tokens)


def with_options(*, tiles, rows=1):
    return lambda x: (rows, tiles(x.tokens))


def without(**traits):
    return lambda x: None
'''
TILES = '''
def default(traits, num_tokens):
    return {"up": {"M": num_tokens, "fast": traits["groups"] > 1}, "warps": 4}


def candidates(traits, num_tokens):
    return []
'''
TILE = "{up: {M: %d, fast: true}, warps: 8}"


def tile(m):
    return {"up": {"M": m, "fast": True}, "warps": 8}


def call(tokens):
    return SimpleNamespace(tokens=tokens, contiguous=True)


@pytest.fixture
def tiled(toy, monkeypatch):
    """A Toy whose implementation `a` takes tiles, on a machine with one H200."""
    toy.kernels, toy.tiles = toy.module(KERNELS), toy.module(TILES)
    toy.entry = {"target": f"{toy.kernels}:a", "tiles": toy.tiles, "when": {"groups": "any"}}
    on_device(monkeypatch, "NVIDIA H200", "sm_90")
    return toy


def on_device(monkeypatch, name, platform):
    monkeypatch.setattr("kernel_registry.tiles.find", lambda: (Gpu("", Platform.parse(platform), name), "a fake"))


def row(counts, **other):
    """An entry of a tiles file: number of tokens -> M."""
    return {"device": "NVIDIA H200", "op": "toy.op", "implementation": "a", "traits": {"size": 8},
            "num_tokens": {n: tile(m) for n, m in counts.items()}, **other}


def tiles_file(toy, *rows, name="tuned.yaml"):
    return toy.write(yaml.safe_dump({"version": 1, "tiles": list(rows)}, sort_keys=False), name)


def open_registry(toy, *rows, **options):
    registry = toy.registry({"a": toy.entry}, **options)
    if rows:
        registry.load_tiles(tiles_file(toy, *rows))
    return registry


# ---- which tile a call gets ------------------------------------------------------------------------------------------

def test_without_a_row_the_default_of_the_implementation_serves(tiled):
    kernel = open_registry(tiled).dispatch(tiled.OP, size=8, groups=2)
    assert kernel(call(5)) == {"up": {"M": 5, "fast": True}, "warps": 4}
    assert not kernel.tiles["a"].tuned


@pytest.mark.parametrize("tokens, nearest", [
    (0, 1), (1, 1), (2, 1), (3, 8), (8, 8), (9, 8), (16, 8), (17, 32), (32, 32), (10**6, 32)])
def test_the_nearest_in_log_scale_serves_and_of_two_the_smaller(tiled, tokens, nearest):
    """8 and 32 are equally far from 16, 1 and 8 from 2.83."""
    kernel = open_registry(tiled, row({32: 132, 1: 101, 8: 108})).dispatch(tiled.OP, size=8)
    assert kernel(call(tokens)) == tile(100 + nearest)


def test_nearest_agrees_with_logarithms():
    from math import log

    counts = {n: {} for n in (1, 3, 7, 64, 100, 4096)}
    for tokens in range(1, 5000):
        assert Tiling("x", counts).nearest(tokens) == min(counts, key=lambda n: (abs(log(n) - log(tokens)) + 1e-12 * n))


@pytest.mark.parametrize("other", [{"traits": {"size": 16}}, {"traits": {"size": 8, "scoring": "softmax"}},
                                   {"device": "NVIDIA H100"}])
def test_a_row_for_something_else_does_not_serve(tiled, other):
    kernel = open_registry(tiled, row({1: 7}, **other)).dispatch(tiled.OP, size=8)
    assert kernel(call(1))["warps"] == 4


def test_traits_of_a_row_may_be_said_in_any_spelling(tiled):
    said = {"dtype": "fp32", "size": 8, "groups": 1}
    assert open_registry(tiled, row({1: 7}, traits=said)).dispatch(tiled.OP, size=8)(call(1)) == tile(7)


def test_dynamic_traits_are_no_part_of_the_match(tiled):
    registry = open_registry(tiled, row({1: 7}))
    assert registry.dispatch(tiled.OP, size=8, num_tokens=1, contiguous=False)(call(1)) == tile(7)
    assert registry.bind(tiled.OP, size=8)(call(1)) == tile(7)


@pytest.mark.parametrize("here, platform, name", [
    ("sm_90", "gfx942", ""),  # no driver's name, and torch is not asked for a plan
    ("sm_90", "sm_100", "NVIDIA H200"),  # another machine than this one
    ("interpreter", "sm_90", "NVIDIA H200"), ("cpu", "sm_90", "NVIDIA H200")])
def test_for_another_platform_than_this_machine_s_the_default_serves(tiled, monkeypatch, here, platform, name):
    on_device(monkeypatch, name, platform)
    kernel = open_registry(tiled, row({1: 7}), platform=here).dispatch(tiled.OP, size=8)
    assert kernel(call(1))["warps"] == 4


def test_a_cpu_and_the_interpreter_are_devices_of_their_own(tiled):
    for device in ("cpu", "interpreter"):
        kernel = open_registry(tiled, row({1: 7}, device=device), platform=device).dispatch(tiled.OP, size=8)
        assert kernel(call(1)) == tile(7) and kernel.tiles["a"].device == device


def test_where_no_driver_tells_the_name_torch_is_asked_when_a_kernel_is_bound(tiled, monkeypatch):
    on_device(monkeypatch, "", "gfx942")
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_name=lambda: "AMD Instinct MI300X",
                                                 is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    registry = open_registry(tiled, row({1: 7}, device="AMD Instinct MI300X"), platform="gfx942")
    assert "the device is not known here; tuned for these traits on AMD Instinct MI300X" in \
        registry.explain(tiled.OP, size=8).text()
    assert registry.dispatch(tiled.OP, size=8)(call(1)) == tile(7)
    assert "tuned on AMD Instinct MI300X" in registry.explain(tiled.OP, size=8).text()


def test_a_torch_that_does_not_know_the_device_keeps_nobody_from_binding(tiled, monkeypatch):
    on_device(monkeypatch, "", "gfx942")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    kernel = open_registry(tiled, platform="gfx942").dispatch(tiled.OP, size=8)
    assert kernel(call(1))["warps"] == 4 and kernel.tiles["a"].device is None


# ---- versions, files and their order ---------------------------------------------------------------------------------

def test_of_two_rows_in_a_file_the_installed_versions_then_the_newer_go_first(tiled, monkeypatch):
    rows = [row({1: 36, 8: 36, 16: 36}, versions={"triton": "3.6.0"}),
            row({1: 310, 8: 310}, versions={"triton": "3.10.0"}), row({1: 39}, versions={"triton": "3.9.0"})]
    for here, expected in (("3.6.0", (36, 36, 36)), ("3.9.0", (39, 310, 36)), ("3.10.0", (310, 310, 36)),
                           ("4.0.0", (310, 310, 36))):
        monkeypatch.setattr("kernel_registry.tiles.installed", lambda: {"triton": here})
        for order in (rows, rows[::-1]):
            kernel = open_registry(tiled, *order).dispatch(tiled.OP, size=8)
            assert tuple(kernel(call(n))["up"]["M"] for n in (1, 8, 16)) == expected


def test_installed_versions_leave_out_the_build(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def version(package):
        if package == "triton":
            raise PackageNotFoundError
        return "2.11.0+cu128"

    monkeypatch.setattr("kernel_registry.tile_files.version", version)
    assert installed() == {"torch": "2.11.0"}


def test_the_file_beside_the_registry_serves_and_loaded_files_then_the_environment_are_stronger(tiled, monkeypatch):
    tiles_file(tiled, row({1: 1, 2: 1, 4: 1, 8: 1}), name="tiles.yaml")
    paths = [tiles_file(tiled, row({n: m for n in (2, 4, 8)[m - 2:]}), name=f"{m}.yaml") for m in (2, 3, 4)]
    monkeypatch.setenv("KERNEL_REGISTRY_TILES", str(paths[2]))
    registry = open_registry(tiled, environment=True)
    for path in paths[:2]:
        registry.load_tiles(path)
    kernel = registry.dispatch(tiled.OP, size=8)
    assert [kernel(call(n))["up"]["M"] for n in (1, 2, 4, 8)] == [1, 2, 3, 4]
    assert kernel.tiles["a"].where[8] == f"{paths[2]}:9"
    without = open_registry(tiled).dispatch(tiled.OP, size=8)
    assert without(call(8))["up"]["M"] == 1


def test_kernels_in_use_follow_load_tiles_and_reload(tiled):
    registry = open_registry(tiled)
    kernel = registry.dispatch(tiled.OP, size=8)
    assert kernel(call(1))["warps"] == 4
    path = tiles_file(tiled, row({1: 7}))
    registry.load_tiles(path)
    assert kernel(call(1)) == tile(7) and registry.dispatch(tiled.OP, size=8) is kernel
    path.write_text(path.read_text().replace("M: 7", "M: 9"))
    assert kernel(call(1)) == tile(7)
    registry.reload()
    assert kernel(call(1)) == tile(9)


def test_a_refused_file_changes_nothing(tiled):
    registry = open_registry(tiled, row({1: 7}))
    kernel = registry.dispatch(tiled.OP, size=8)
    with pytest.raises(UnknownNameError, match=r"bad.yaml:3: toy.op has no implementation 'b'"):
        registry.load_tiles(tiled.write("version: 1\ntiles:\n- {device: x, op: toy.op, implementation: b, traits: {}, "
                                        "num_tokens: {1: {a: 1}}}\n", "bad.yaml"))
    registry.reload()
    assert kernel(call(1)) == tile(7)


def test_the_shipped_file_is_read_when_a_kernel_that_takes_tiles_is_first_asked_for(tiled):
    """Nobody else pays for it, nor learns that it is wrong."""
    tiled.write("version: 1\ntiles: 3\n", "tiles.yaml")
    plain = {"target": f"{tiled.kernels}:without", "when": {"groups": "any", "size": 16}}
    registry = tiled.registry({"a": tiled.entry, "b": plain})
    registry.dispatch(tiled.OP, size=16)
    assert registry.explain(tiled.OP, size=16).winner == "b"
    for ask in (registry.explain, registry.dispatch):
        with pytest.raises(DocumentError, match=r"tiles.yaml:2: tiles: Input should be a valid list"):
            ask(tiled.OP, size=8)


def test_variants_have_rows_of_their_own(tiled):
    tiled.entry.update(target=f"{tiled.kernels}:with_options", variants={
        "many": {"options": {"rows": 2}, "when": {"num_tokens": {"min": 64}}}})
    registry = open_registry(tiled, row({64: 7}, implementation="a.many"))
    kernel = registry.dispatch(tiled.OP, size=8)
    assert kernel(call(64)) == (2, tile(7)) and kernel(call(63))[1]["warps"] == 4
    assert {name: bool(tiling.tuned) for name, tiling in kernel.tiles.items()} == {"a": False, "a.many": True}


@pytest.mark.parametrize("rows", [(), ({},)])
def test_the_module_is_told_the_same_whether_dynamic_traits_are_known_or_not(tiled, rows):
    tiled.entry["tiles"] = asked = tiled.module(TILES.replace("    return {", "    ASKED.append(traits)\n    return {")
                                                + "\nASKED = []\n")
    registry = open_registry(tiled, *(row({1: 7}) for _ in rows))
    for more in ({}, {"num_tokens": 1, "contiguous": False}):
        registry.dispatch(tiled.OP, size=8, **more)(call(1))
    first, second = sys.modules[asked].ASKED
    assert first == second and set(first) == {"size", "groups", "scoring", "has_bias", "dtype", "platform", "per_group"}


# ---- what it costs ---------------------------------------------------------------------------------------------------

def test_a_tile_is_chosen_once_for_each_number_of_tokens(tiled):
    asked = tiled.module(TILES.replace("    return {", "    ASKED.append(num_tokens)\n    return {") + "\nASKED = []\n")
    tiled.entry["tiles"] = asked
    kernel = open_registry(tiled).dispatch(tiled.OP, size=8)
    assert kernel(call(5)) is kernel(call(5)) and kernel(call(6))["up"]["M"] == 6
    assert sys.modules[asked].ASKED == [5, 6]


def chosen(toy, registry):
    kernel = registry.dispatch(toy.OP, size=8)
    op = registry.catalog.op(toy.OP)
    return chooser(op, op.by_name["a"], kernel.request, kernel.tiles["a"])


def test_asking_again_runs_no_python_code(tiled):
    """One look-up in C, whether the tile is tuned or the default's."""
    for rows in ((), (row({1: 7, 8: 8}),)):
        tiles = chosen(tiled, open_registry(tiled, *rows))
        tiles(3)
        frames = []
        sys.setprofile(lambda frame, event, argument: frames.append(event))
        try:
            tiles(3)
        finally:
            sys.setprofile(None)
        assert "call" not in frames


def test_what_is_remembered_is_bounded(tiled):
    tiles = chosen(tiled, open_registry(tiled))
    for n in range(20_000):
        assert tiles(n)["up"]["M"] == n
    assert len(tiles.__self__) <= 4096


# ---- what is said ----------------------------------------------------------------------------------------------------

def test_explain_and_the_kernel_tell_where_tiles_come_from(tiled, monkeypatch):
    monkeypatch.setattr("kernel_registry.tiles.installed", lambda: {"triton": "3.6.0"})
    path = tiled.folder / "tuned.yaml"
    registry = open_registry(tiled, row({1: 7, 8: 8}, versions={"triton": "3.6.0"}))
    told = f"tuned on NVIDIA H200 for 1, 8 tokens ({path}:3)"
    explanation = registry.explain(tiled.OP, size=8)
    assert f"\n     tiles: {told}\n" in explanation.text() + "\n"
    assert json.loads(explanation.json())["cases"][0]["tiles"] == told
    assert str(registry.dispatch(tiled.OP, size=8).tiles["a"]) == told
    monkeypatch.setattr("kernel_registry.tiles.installed", lambda: {"triton": "3.7.0"})
    assert str(open_registry(tiled, row({1: 7}, versions={"triton": "3.6.0"})).dispatch(tiled.OP, size=8).tiles["a"]) \
        == f"tuned on NVIDIA H200 for 1 token ({path}:3, timed with triton 3.6.0)"


def test_two_files_that_serve_are_both_named(tiled):
    tiles_file(tiled, row({1: 1, 2: 1}), name="tiles.yaml")
    kernel = open_registry(tiled, row({2: 2})).dispatch(tiled.OP, size=8)
    assert str(kernel.tiles["a"]) == \
        f"tuned on NVIDIA H200 for 1, 2 tokens ({tiled.folder / 'tiles.yaml'}:3, {tiled.folder / 'tuned.yaml'}:3)"


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
    assert plan.calls[0]["tiles"] == {"a": {"device": "NVIDIA H200", "num_tokens": {}}}
    assert other.calls[0]["tiles"]["a"]["num_tokens"] == {"1": tile(7), "8": tile(8)}
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


@pytest.mark.parametrize("wrong", [3, {"a": 3}, {"gone": {"device": "x", "num_tokens": {}}}, {"a": {"device": "x"}},
                                   {"a": {"device": 3, "num_tokens": {}}}, {"a": {"device": "x", "num_tokens": []}},
                                   {"a": {"device": "x", "num_tokens": {"few": {}}}}])
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


# ---- files that are refused ------------------------------------------------------------------------------------------

GOOD = """version: 1
tiles:
- device: NVIDIA H200
  op: toy.op
  implementation: a
  traits: {size: 8}
  versions: {torch: 2.11.0, triton: 3.6.0}
  num_tokens:
    1: {up: {M: 7, fast: true}, warps: 8}
    8: {up: {M: 8, fast: true}, warps: 8}
"""
REFUSED = [  # (what is replaced, by what, line, error, words)
    ("version: 1", "version: 2", 1, DocumentError, "unknown version 2"),
    ("tiles:\n", "tile:\n", 2, DocumentError, "unknown key 'tile'.*did you mean 'tiles'"),
    ("  op:", "  oop:", 4, DocumentError, "unknown key 'oop'.*did you mean 'op'"),
    ("device: NVIDIA H200", "device: 3", 3, DocumentError, "tiles.0.device: Input should be a valid string, got 3"),
    ("device: NVIDIA H200", "device: ''", 3, DocumentError, "tiles.0.device: .*at least 1 character"),
    ("toy.op", "toy.opp", 4, UnknownNameError, "no op 'toy.opp'.*did you mean 'toy.op'"),
    ("implementation: a", "implementation: aa", 5, UnknownNameError, "toy.op has no implementation 'aa'"),
    ("implementation: a", "implementation: b", 5, DocumentError, "b takes no tiles.*known: a"),
    ("{size: 8}", "{size: 8, sise: 1}", 6, UnknownNameError, "toy.op has no trait 'sise'.*did you mean 'size'"),
    ("{size: 8}", "{size: eight}", 6, TraitError, "size: expected a whole number"),
    ("{size: 8}", "{size: 8, groups: 3}", 6, TraitError, "size % groups == 0 does not hold"),
    ("{size: 8}", "{groups: 1}", 6, TraitError, "missing size"),
    ("{size: 8}", "{size: 8, num_tokens: 1}", 6, TraitError, "num_tokens is no trait of a row.*`num_tokens`"),
    ("{size: 8}", "{size: 8, contiguous: true}", 6, TraitError, "contiguous is no trait of a row.*left to the call"),
    ("{size: 8}", "{size: 8, platform: sm_90}", 6, TraitError, "platform is no trait of a row.*goes with the device"),
    ("{size: 8}", "{size: 8, per_group: 8}", 6, TraitError, "per_group is no trait of a row.*derived"),
    ("{size: 8}", "{size: [8]}", 6, DocumentError, "tiles.0.traits.size: expected text, a finite number"),
    ("torch: 2.11.0", "numpy: 2.11.0", 7, DocumentError, "unknown key 'numpy'.*known: torch, triton"),
    ("triton: 3.6.0", "triton: 3.6", 7, DocumentError, "tiles.0.versions.triton: .*valid string, got 3.6"),
    ("    1:", "    0:", 9, DocumentError, "tiles.0.num_tokens.0.*pattern"),
    ("    1:", "    01:", 9, DocumentError, "tiles.0.num_tokens.01.*pattern"),
    ("    1:", "    few:", 9, DocumentError, "tiles.0.num_tokens.few.*pattern"),
    ("    1:", "    8:", 10, DocumentError, r"key '8' is given twice \(first on line 9\)"),
    ("M: 7", "M: 7.5", 9, DocumentError, "num_tokens.1: M is neither a whole number, true, false, text"),
    ("M: 7", "M: [7]", 9, DocumentError, "num_tokens.1: M is neither"),
    ("M: 7", "M: {}", 9, DocumentError, "num_tokens.1: M is not a mapping of launch parameters"),
    ("{up: {M: 7, fast: true}, warps: 8}", "7", 9, DocumentError, "num_tokens.1: the tile is not a mapping"),
    ("  num_tokens:\n    1: {up: {M: 7, fast: true}, warps: 8}\n    8: {up: {M: 8, fast: true}, warps: 8}",
     "  num_tokens: {}", 8, DocumentError, "tiles.0.num_tokens: Dictionary should have at least 1 item"),
    ("  traits: {size: 8}\n", "", 3, DocumentError, "tiles.0.traits is missing"),
]


@pytest.fixture
def checked(tiled):
    """A function that loads a tiles file of this text, where `a` takes tiles and `b` does not."""
    plain = {"target": f"{tiled.kernels}:without", "fallback": True, "when": {"groups": "any"}}
    registry = tiled.registry({"a": tiled.entry, "b": plain})
    registry.catalog

    def load(text):
        registry.load_tiles(tiled.write(text, "tuned.yaml"))
    return load


def test_the_good_file_is_good(checked):
    checked(GOOD)


@pytest.mark.parametrize("old, new, line, error, said", REFUSED, ids=[f"{new[:30]!r}" for _, new, *_ in REFUSED])
def test_what_is_wrong_in_a_file_is_told_with_its_line(checked, tiled, old, new, line, error, said):
    assert GOOD.count(old) == 1
    with pytest.raises(error, match=f"(?s){tiled.folder}/tuned.yaml:{line}: .*{said}"):
        checked(GOOD.replace(old, new))


@pytest.mark.parametrize("traits", ["{size: 8}", "{size: 8, groups: 1, dtype: fp32}"])
def test_two_rows_for_one_thing_are_refused(checked, tiled, traits):
    again = GOOD.partition("tiles:\n")[2].replace("{size: 8}", traits).replace("    1:", "    2:")
    with pytest.raises(DocumentError, match="tuned.yaml:11: the same device, implementation, traits and versions as at "
                                            ".*tuned.yaml:3"):
        checked(GOOD + again)
    checked(GOOD + again.replace("3.6.0", "3.7.0"))


def test_a_file_that_is_not_there_is_told(tiled, monkeypatch):
    with pytest.raises(DocumentError, match="gone.yaml: can't be read"):
        open_registry(tiled).load_tiles("gone.yaml")
    monkeypatch.setenv("KERNEL_REGISTRY_TILES", "gone.yaml")
    registry = open_registry(tiled, environment=True)
    with pytest.raises(DocumentError, match="gone.yaml: can't be read.*file that KERNEL_REGISTRY_TILES names"):
        registry.dispatch(tiled.OP, size=8)


def test_the_shipped_file_is_right():
    registry = Registry(plugins=False, environment=False, platform="cpu")
    assert shipped_registry().with_name("tiles.yaml") in registry.state.tuned.files
    registry.state.tuned.read()


# ---- writing ---------------------------------------------------------------------------------------------------------

def written(registry, path, count, m, **other):
    fields = {"device": "NVIDIA H200", "op": "toy.op", "implementation": "a",
              "traits": {"size": 8, "groups": 1, "scoring": "sigmoid", "has_bias": True, "dtype": "float32"},
              "versions": {"torch": "2.11.0", "triton": "3.6.0"}, **other}
    add_tile(registry.catalog, path, Row(tiles={count: tile(m)}, **fields), count)


def test_a_new_file_is_laid_out_one_line_a_tile(tiled):
    path, registry = tiled.folder / "new.yaml", open_registry(tiled)
    for count, m in ((8, 8), (1, 7)):
        written(registry, path, count, m)
    header, _, rest = path.read_text().partition("\n")
    assert header.startswith("# Written by `kernel-registry tune`") and rest == GOOD


def test_everything_else_in_the_file_stays(tiled):
    path, registry = tiled.folder / "old.yaml", open_registry(tiled)
    text = "# mine\n" + GOOD.replace("    8:", "    # measured twice\n    8:").replace("M: 7, fast: true}, warps: 8}",
                                                                                    "M: 7, fast: true}, warps: 8}  # !")
    path.write_text(text)
    written(registry, path, 1, 9)
    written(registry, path, 4, 4)
    written(registry, path, 16, 16)
    written(registry, path, 1, 1, device="AMD Instinct: MI300X")
    line = "    %d: " + TILE
    expected = text.replace("M: 7", "M: 9").replace("    # measured", line % (4, 4) + "\n    # measured") \
        + line % (16, 16) + "\n" + GOOD.partition("tiles:\n")[2].replace("NVIDIA H200", "'AMD Instinct: MI300X'") \
        .replace("M: 7", "M: 1").replace("    8: {up: {M: 8, fast: true}, warps: 8}\n", "")
    assert path.read_text() == expected


@pytest.mark.parametrize("text", [
    GOOD.replace("    1: {up: {M: 7, fast: true}, warps: 8}", "    1:\n      up: {M: 7, fast: true}\n      warps: 8"),
    "version: 1\ntiles: [{device: NVIDIA H200, op: toy.op, implementation: a, traits: {size: 8}, versions: {torch: "
    "2.11.0, triton: 3.6.0}, num_tokens: {1: {warps: 8}}}]\n",
    "version: 1\ntiles: [{device: x, op: toy.op, implementation: a, traits: {size: 8}, num_tokens: {1: {warps: 8}}}]\n",
])
def test_a_file_of_another_layout_is_refused_and_stays(tiled, text):
    path = tiled.write(text, "old.yaml")
    with pytest.raises(DocumentError, match="is not laid out as `kernel-registry tune` does it"):
        written(open_registry(tiled), path, 1, 9)
    assert path.read_text() == text and [p.name for p in tiled.folder.glob("*.part")] == []


def test_a_file_that_can_not_be_written_is_told(tiled):
    (tiled.folder / "sub").mkdir()
    with pytest.raises(RegistryError, match="sub/gone/x.yaml: can't be written"):
        written(open_registry(tiled), tiled.folder / "sub" / "gone" / "x.yaml", 1, 1)


def test_what_is_written_is_what_is_read(tiled):
    """Text that YAML would take for something else included."""
    registry, path = open_registry(tiled), tiled.folder / "odd.yaml"
    odd = {"yes": "no", "1": "0x10", "a b": "# not a comment", "nested": {"null": "~", "é": "1.0", "n": -3}}
    written(registry, path, 3, 7, device="d: [x]", versions={})
    path.write_text(path.read_text().partition("    3:")[0] + "    1: {a: 1}\n")
    first, = read_rows(registry.catalog, read(path))
    add_tile(registry.catalog, path, replace(first, tiles={3: odd}), 3)
    found, = read_rows(registry.catalog, read(path))
    assert found.tiles == {1: {"a": 1}, 3: odd} and found.device == "d: [x]" and found.versions == {}


def test_the_shipped_file_is_one_that_tune_can_add_to(tiled):
    shipped = Path(shipped_registry()).with_name("tiles.yaml")
    path = tiled.write(shipped.read_text(), "copy.yaml")
    registry = Registry(plugins=False, environment=False, platform="cpu")
    rows = read_rows(registry.catalog, read(path))
    if rows:
        add_tile(registry.catalog, path, replace(rows[0], tiles={987654: {"a": 1}}), 987654)
    else:  # another op's rows would mean nothing to the toy's catalog
        written(open_registry(tiled), path, 1, 7)
    before, after = shipped.read_text().splitlines(), path.read_text().splitlines()
    assert len(after) > len(before) and [line for line in before if line not in after] == ["tiles: []"] * (not rows)
