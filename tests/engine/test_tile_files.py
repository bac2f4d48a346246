"""Files of tuned tiles: which are refused, with which words, and how one more tile is written into one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiled_toy import TILE, open_registry, tile

from kernel_registry import Registry, shipped_registry
from kernel_registry.document import read
from kernel_registry.errors import DocumentError, RegistryError, TraitError, UnknownNameError
from kernel_registry.tile_files import Row, add_tile, read_rows

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
