"""Files: what is read, and what is refused with the line that is wrong."""

from __future__ import annotations

import pytest

from kernel_registry.document import parse, read
from kernel_registry.errors import DocumentError, OverrideError
from kernel_registry.schema import OverrideFile, RegistryFile, validate


def refused(text: str) -> str:
    with pytest.raises(DocumentError) as caught:
        parse(text, "f.yaml")
    return str(caught.value)


def test_values_and_their_lines():
    document = parse("a: 1\nb:\n  - x\n  - true\nc: {d: 'no', e: null}\n", "f.yaml")
    assert document.data == {"a": 1, "b": ["x", True], "c": {"d": "no", "e": None}}
    assert document.where(("b", 1)) == "f.yaml:4"
    assert document.where(("c", "e")) == "f.yaml:5"
    assert document.where(("b", 7, "gone")) == "f.yaml:2"  # the closest parent that is there
    assert document.where() == "f.yaml:1"


def test_a_key_is_text_whatever_it_looks_like():
    assert parse("1: a\ntrue: b\n", "f.yaml").data == {"1": "a", "true": "b"}


def test_an_anchor_used_modestly_is_read():
    assert parse("a: &x [1, 2]\nb: *x\n", "f.yaml").data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text, line, what",
    [
        ("a: [1, 2\nb: 3\n", 2, "is not YAML"),
        ("a: 'x\n", 2, "is not YAML"),
        ("a:\n\t- 1\n", 2, "is not YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 1\n", 3, "'b' is given twice (first on line 2)"),
        ("a: &x\n  b: *x\n", 1, "contains itself"),
        ("a: &x [*x]\n", 1, "contains itself"),
        ("a: *nothing\n", 1, "undefined alias"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "merge keys"),
        ("? [a, b]\n: 1\n", 1, "a key must be plain text"),
        ("? {a: b}\n: 1\n", 1, "a key must be plain text"),
        ("a: 2020-01-01\n", 1, "'timestamp'"),
        ("a: !!binary aGk=\n", 1, "'binary'"),
        ("a: !!python/name:os.system\n", 1, "'os.system'"),
        ("a: !!python/object/apply:os.system [echo hi]\n", 1, "'os.system'"),
        ("a: !!set {x, y}\n", 1, "'set'"),
        ("a: !!omap [x: 1]\n", 1, "'omap'"),
        ("a: !mine {x: 1}\n", 1, "mine"),
        ("a: !!int x\n", 1, "'x'"),
        ("---\na: 1\n---\nb: 2\n", 3, "is not YAML"),
    ],
)
def test_refused_with_the_line(text, line, what):
    message = refused(text)
    assert message.startswith(f"f.yaml:{line}: ") and what in message


def test_an_alias_bomb_is_refused_before_it_goes_off():
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    assert "anchors expand to more than" in refused(text)


@pytest.mark.parametrize("depth", [200, 5_000, 60_000, 400_000])
@pytest.mark.parametrize("piece, end", [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
def test_deep_nesting_is_refused_however_deep(depth, piece, end):
    if end == "" and depth > 60_000:
        depth = 60_000  # the scanner is quadratic in these; no need to wait
    assert "nested too deeply" in refused(piece * depth + "a" + end * depth)


def test_control_characters_are_refused():
    assert "is not YAML" in refused("a: \x00b\n")


@pytest.mark.parametrize(
    "content", [b"", b"# only a comment\n", b"---\n", b"null\n", b"- 1\n- 2\n", b"just text\n", b"42\n"]
)
def test_a_file_that_is_no_mapping(tmp_path, content):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    for model in (RegistryFile, OverrideFile):
        with pytest.raises(DocumentError, match=r"f\.yaml:[12]: expected a mapping that starts with `version: 1`"):
            validate(model, read(path))


def test_missing_unreadable_and_foreign_files(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: \xe9\n".encode("latin-1"))
    for path in (tmp_path / "gone.yaml", folder, latin, str(tmp_path / "nul\0.yaml"), tmp_path / ("x" * 300)):
        with pytest.raises(DocumentError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "can't be read" in str(caught.value)
        assert caught.value.hint


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert read(path).data == {"version": 1}


@pytest.mark.parametrize("version", ["2", "'1'", "1.0", "true", "null", "[1]"])
def test_an_unknown_version(version):
    with pytest.raises(DocumentError, match=r"f:1: unknown version .*\n.*reads `version: 1`"):
        validate(RegistryFile, parse(f"version: {version}\nops: {{}}\n", "f"))


REGISTRY_ERRORS = [
    ("version: 1\n", 1, "ops is missing", "add `ops"),
    ("version: 1\nopps: {}\n", 2, "unknown key 'opps'", "'ops'"),
    ("version: 1\nops:\n  a:\n    contact: m:C\n", 4, "unknown key 'contact'", "'contract'"),
    (
        "version: 1\nops:\n  a:\n    implementations:\n      x:\n        taget: m:f\n        target: m:f\n",
        6,
        "unknown key 'taget'",
        "'target'",
    ),
    (
        "version: 1\nops:\n  a:\n    implementations:\n      x:\n        when: {}\n",
        5,
        "target is missing",
        "add `target",
    ),
    ("version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m.f\n", 6, "target", ""),
    (
        "version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m:f\n        rank: high\n",
        7,
        "rank",
        "",
    ),
    (
        "version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m:f\n        rank: true\n",
        7,
        "rank",
        "",
    ),
    (
        "version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m:f\n        fallback: 1\n",
        7,
        "fallback",
        "",
    ),
    ("version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m:f\n        when:\n", 7, "when", ""),
    ("version: 1\nops:\n  a:\n    implementations:\n      x:\n        target: m:f\n        when: [a]\n", 7, "when", ""),
    ("version: 1\nops: []\n", 2, "ops", ""),
    ("version: 1\nops:\n  a:\n    contract: nonsense\n", 4, "contract", ""),
    ("version: 1\nops:\n  a:\n    implementations:\n      'x|y': {target: 'm:f'}\n", 5, "x|y", ""),
    ("version: 1\nops:\n  '': {}\n", 3, "ops", ""),
]


@pytest.mark.parametrize("text, line, message, hint", REGISTRY_ERRORS)
def test_the_shape_of_a_registry_file(text, line, message, hint):
    with pytest.raises(DocumentError) as caught:
        validate(RegistryFile, parse(text, "f.yaml"))
    assert str(caught.value).startswith(f"f.yaml:{line}: ") and message in str(caught.value)
    assert hint in caught.value.hint


def test_more_than_one_problem_is_counted():
    with pytest.raises(DocumentError, match=r"\(and 2 more\)"):
        validate(RegistryFile, parse("version: 1\nops: {}\na: 1\nb: 2\nc: 3\n", "f.yaml"))


OVERRIDE_ERRORS = [
    ("version: 1\noverrides:\n- {op: toy.op, us: a}\n", 3, "unknown key 'us'", "'use'"),
    ("version: 1\noverride: []\n", 2, "unknown key 'override'", "'overrides'"),
    ("version: 1\noverrides: {}\n", 2, "overrides", ""),
    ("version: 1\noverrides:\n- {use: a}\n", 3, "op is missing", "add `op"),
    ("version: 1\noverrides:\n- {op: toy.op, use: 3}\n", 3, "use", ""),
]


@pytest.mark.parametrize("text, line, message, hint", OVERRIDE_ERRORS)
def test_the_shape_of_an_override_file(text, line, message, hint):
    with pytest.raises(DocumentError) as caught:
        validate(OverrideFile, parse(text, "f.yaml"))
    assert str(caught.value).startswith(f"f.yaml:{line}: ") and message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("actions", [{}, {"use": "a", "disable": "b"}, {"use": "a", "prefer": "a"}])
def test_an_override_says_exactly_one_of_use_prefer_disable(toy, actions):
    registry = toy.registry({"a": {"size": 1}, "b": {"size": 2}})
    with pytest.raises(OverrideError, match=r"\.yaml:3: expected exactly one of use, prefer and disable, got"):
        registry.load_overrides(toy.overrides(actions))
