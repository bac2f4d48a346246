"""Which tuned tile a call gets: from which rows, of which file, and what it costs to ask."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from tiled_toy import TILES, call, default, on_device, open_registry, row, tile, tiles_file

from kernel_registry.errors import DocumentError, UnknownNameError
from kernel_registry.tile_files import installed
from kernel_registry.tiles import REACH, Tiling, chooser

# ---- which tile a call gets ------------------------------------------------------------------------------------------

def test_without_a_row_the_default_of_the_implementation_serves(tiled):
    kernel = open_registry(tiled).dispatch(tiled.OP, size=8, groups=2)
    assert kernel(call(5)) == {"up": {"M": 5, "fast": True}, "warps": 4}
    assert not kernel.tiles["a"].tuned


@pytest.mark.parametrize("tokens, nearest", [
    (0, 1), (1, 1), (2, 1), (3, 8), (8, 8), (9, 8), (16, 8), (17, 32), (32, 32), (128, 32), (129, None), (10**6, None)])
def test_the_nearest_in_log_scale_serves_and_of_two_the_smaller(tiled, tokens, nearest):
    """8 and 32 are equally far from 16, 1 and 8 from 2.83. More than 128, four times the most, is the default's."""
    kernel = open_registry(tiled, row({32: 132, 1: 101, 8: 108})).dispatch(tiled.OP, size=8)
    assert kernel(call(tokens)) == (tile(100 + nearest) if nearest else default(tokens))


@pytest.mark.parametrize("tokens, tuned", [(0, False), (1, False), (2, True), (32, True), (33, False), (4096, False)])
def test_a_lone_row_serves_up_to_four_times_fewer_or_more_tokens(tiled, tokens, tuned):
    kernel = open_registry(tiled, row({8: 7})).dispatch(tiled.OP, size=8)
    assert kernel(call(tokens)) == (tile(7) if tuned else default(tokens))


def test_nearest_agrees_with_logarithms():
    from math import log

    counts = {n: {} for n in (1, 3, 7, 64, 100, 4096)}
    tiling = Tiling("x", counts)
    for tokens in range(1, 20_000):
        near = min(counts, key=lambda n: (abs(log(n) - log(tokens)) + 1e-12 * n))
        assert tiling.nearest(tokens) == (near if near <= REACH * tokens and tokens <= REACH * near else None)
        assert (tiling.nearest(tokens) is None) == all(not first <= tokens <= last for first, last in tiling.spans)
    assert tiling.spans == [(1, 400), (1024, 16384)] and Tiling("x").nearest(1) is None and Tiling("x").spans == []


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
