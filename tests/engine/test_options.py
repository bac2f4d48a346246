"""`options`: what an entry passes to its target beside the traits, so that one target is several implementations."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kernel_registry.errors import DocumentError, PlanError, TargetError
from kernel_registry.lint import lint_catalog
from kernel_registry.plan import Plan
from kernel_registry.schema import json_schema

KERNELS = """
called = []

def rows(*, size, rows=1, launch="late", **_):
    called.append(rows)
    return lambda x: (size, rows, launch)

def swallows(**options):
    called.append(options)
    return lambda x: options

def positional(rows, /, **_):
    called.append(rows)
    return lambda x: rows

def narrow(*, size, num_tokens=0, rows_per_program=1):
    called.append(rows_per_program)
    return lambda x: rows_per_program

def bare():
    return lambda x: 0
"""

TEXT = """version: 1
ops:
  toy.op:
    contract: {contract}
    implementations:
      a:
        target: {targets}:a
        when: {platform: any}
        options:
          launch: early
          OPTION
"""


@pytest.fixture
def kernels(toy):
    return toy.module(KERNELS)


def table(kernels, options, name="rows"):
    entry = {"target": f"{kernels}:{name}", "when": {}}
    return {"a": {**entry, **({"options": options} if options is not None else {})}}


def frozen(toy, kernels, options, name=None):
    registry = toy.registry(toy.file(table(kernels, options), name=name))
    registry.dispatch(toy.OP, size=8)
    return registry.freeze()


# ---- what the target gets --------------------------------------------------------------------------------------------


def test_one_target_serves_as_several_implementations(toy, kernels):
    target = f"{kernels}:rows"
    registry = toy.registry(
        {
            "big": {"target": target, "options": {"rows": 2, "launch": "early"}, "when": {"num_tokens": {"min": 64}}},
            "small": {"target": target, "options": {"rows": 4}, "when": {"num_tokens": {"max": 63}}},
            "plain": {"target": target, "when": {"groups": 2}},
        }
    )
    kernel = registry.bind(toy.OP, size=8)
    assert [kernel(SimpleNamespace(tokens=t, contiguous=True)) for t in (63, 64)] == [(8, 4, "late"), (8, 2, "early")]
    assert registry.dispatch(toy.OP, size=8, groups=2)(None) == (8, 1, "late")


@pytest.mark.parametrize("value", [True, False, 1, 0, -3, 2.0, 0.5, "early", "1", "", "true"])
def test_a_scalar_arrives_as_it_was_written(toy, kernels, value):
    got = toy.registry(table(kernels, {"rows": value})).dispatch(toy.OP, size=8)(None)[1]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, options, keywords, hint",
    [
        ("rows", {"launch": "early", "row": 2}, "size, rows, launch", "; did you mean 'rows'?"),
        ("narrow", {"rows": 2}, "size, num_tokens, rows_per_program", "; known: rows_per_program"),
        ("narrow", {"sise": 2}, "size, num_tokens, rows_per_program", "; known: rows_per_program"),  # not size
        ("swallows", {"rows": 2}, "none", "`**` is not enough"),
        ("swallows", {"options": 2}, "none", "`**` is not enough"),
        ("positional", {"rows": 2}, "none", "`**` is not enough"),
        ("bare", {"rows": 2}, "none", "`**` is not enough"),
    ],
)
def test_an_option_that_the_target_does_not_name_is_an_error_before_it_is_called(
    toy, kernels, name, options, keywords, hint
):
    import sys

    path = toy.file(table(kernels, options, name))
    registry = toy.registry(path)
    assert registry.explain(toy.OP, size=8).winner == "a"  # loaded and asked without an import
    with pytest.raises(TargetError) as caught:
        registry.dispatch(toy.OP, size=8)
    (wrong,) = options.keys() - {"launch"}
    assert caught.value.where == f"{path}:6"
    assert caught.value.message == f"{kernels}:{name} takes no option {wrong!r}: its keywords are {keywords}"
    assert caught.value.hint.endswith(hint)
    assert sys.modules[kernels].called == [] and registry.kernels == ()


# ---- what is refused when the file is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("trait", ["size", "scoring", "platform", "num_tokens", "contiguous", "per_group"])
def test_an_option_can_not_pretend_to_be_a_trait(toy, trait):
    path = toy.write(TEXT.replace("OPTION", f"{trait}: 1"))
    with pytest.raises(DocumentError, match=f"option '{trait}' of a is a trait of toy.op") as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:11" and "`when`" in caught.value.hint


@pytest.mark.parametrize(
    "option, message",
    [
        *[
            (f"rows: {value}", r"options.rows: expected text, a finite number, true or false, got [^(]*$")
            for value in ("[1, 2]", "{min: 1}", "null", ".inf", ".nan")
        ],
        ("rows-per-program: 1", "options.rows-per-program"),
        ("2rows: 1", "options.2rows"),
    ],
)
def test_an_option_is_a_name_and_a_scalar(toy, option, message):
    path = toy.write(TEXT.replace("OPTION", option))
    with pytest.raises(DocumentError, match=message) as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:11"


@pytest.mark.parametrize("options", ["[rows]", "rows", "3"])
def test_options_are_a_mapping(toy, options):
    path = toy.write(TEXT.partition("        options:")[0] + f"        options: {options}\n")
    with pytest.raises(DocumentError, match="a.options: ") as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:9"


def test_the_json_schema_says_scalars():
    options = json_schema()["$defs"]["ImplementationEntry"]["properties"]["options"]
    (value,) = options["patternProperties"].values()
    assert {member["type"] for member in value["anyOf"]} == {"boolean", "integer", "number", "string"}


# ---- a reload --------------------------------------------------------------------------------------------------------


def test_a_reload_with_other_options_rebuilds_live_kernels_and_forgets_the_old(toy, kernels):
    path = toy.file(table(kernels, {"rows": 2}))
    registry = toy.registry(path)
    every = registry.dispatch(toy.OP, size=8), registry.dispatch(toy.OP, size=8, num_tokens=3)
    assert [kernel(None)[1] for kernel in every] == [2, 2]
    for options, rows in (({"rows": 4}, 4), (None, 1), ({"rows": True}, True)):
        toy.file(table(kernels, options), name=path.name)
        registry.reload()
        again = registry.dispatch(toy.OP, size=8), registry.dispatch(toy.OP, size=8, num_tokens=3)
        assert [kernel(None)[1] for kernel in every] == [rows, rows] and all(a is b for a, b in zip(again, every))
        assert registry.dispatch(toy.OP, size=9)(None)[1] is rows


def test_a_reload_with_an_option_that_the_target_does_not_name_changes_nothing(toy, kernels):
    path = toy.file(table(kernels, {"rows": 2}))
    registry = toy.registry(path)
    kernel, state = registry.dispatch(toy.OP, size=8), registry.state
    toy.file(table(kernels, {"row": 4}), name=path.name)
    with pytest.raises(TargetError, match="takes no option 'row'"):
        registry.reload()
    assert registry.state is state and kernel(None)[1] == 2


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_holds_the_options_of_those_that_have_any(toy, kernels):
    target = f"{kernels}:rows"
    registry = toy.registry(
        {
            "big": {"target": target, "options": {"rows": 2, "launch": "early"}, "when": {"num_tokens": {"min": 64}}},
            "rest": {"target": target, "when": {"groups": "any"}},
            "unused": {"target": target, "options": {"rows": 9}, "when": {"size": 9}, "rank": 1},
        }
    )
    registry.dispatch(toy.OP, size=8), registry.dispatch(toy.OP, size=8, groups=2)
    calls = {c["traits"]["groups"]: c for c in json.loads(registry.freeze().text())["calls"]}
    assert calls[1]["options"] == {"big": {"rows": 2, "launch": "early"}} and set(calls[1]["sources"]) == {
        "big",
        "rest",
    }
    assert "options" not in calls[2]  # as before there were options: such plans keep their fingerprints


@pytest.mark.parametrize(
    "before, after, changes",
    [
        ({"rows": 1}, {"rows": 2}, ["option rows of a: 1 -> 2"]),
        ({"rows": 1}, {"rows": True}, ["option rows of a: 1 -> true"]),
        ({"rows": 1}, {"rows": 1.0}, ["option rows of a: 1 -> 1.0"]),
        ({"rows": 1}, {"rows": "1"}, ['option rows of a: 1 -> "1"']),
        (None, {"rows": 1}, ["option rows of a: absent -> 1"]),
        (
            {"rows": 1, "launch": "late"},
            {"launch": "early"},
            ['option launch of a: "late" -> "early"', "option rows of a: 1 -> absent"],
        ),
    ],
)
def test_a_changed_option_changes_the_fingerprint_is_named_by_diff_and_refuses_the_plan(
    toy, kernels, before, after, changes
):
    one, two = frozen(toy, kernels, before), frozen(toy, kernels, after)
    assert one.fingerprint != two.fingerprint
    lines = one.diff(two)
    assert [line.partition("): ")[2] for line in lines] == changes
    assert all(line.startswith("~ toy.op(") for line in lines)
    assert len(two.diff(one)) == len(changes)

    registry = toy.registry(table(kernels, after))
    state, kernel = registry.state, registry.dispatch(toy.OP, size=8)
    with pytest.raises(PlanError, match="toy.op: the options of a changed since the plan was frozen"):
        registry.load_plan(one)
    assert registry.state is state and registry.dispatch(toy.OP, size=8) is kernel


def test_the_order_of_options_is_no_difference(toy, kernels, tmp_path):
    one = frozen(toy, kernels, {"rows": 2, "launch": "early"})
    two = frozen(toy, kernels, {"launch": "early", "rows": 2})
    assert one.text() == two.text() and one.diff(two) == []
    one.save(tmp_path / "plan.json")
    registry = toy.registry(table(kernels, {"launch": "early", "rows": 2}))
    registry.load_plan(tmp_path / "plan.json")
    assert registry.dispatch(toy.OP, size=8)(None) == (8, 2, "early") and registry.freeze().text() == one.text()


@pytest.mark.parametrize("options", [[], None, {"a": 3}, {"a": []}, {"b": {"rows": 2}}])
def test_a_plan_with_malformed_options_is_no_whole_plan(toy, kernels, tmp_path, options):
    data = json.loads(frozen(toy, kernels, {"rows": 2}).text())
    data["calls"][0]["options"] = options
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="call 0 is malformed"):
        Plan.load(path)


# ---- told ------------------------------------------------------------------------------------------------------------


def test_explain_tells_options_in_json_and_keeps_its_text(toy, kernels):
    one, other = (
        toy.registry(toy.file(table(kernels, o), name="r.yaml")).explain(toy.OP, size=8)
        for o in ({"rows": 2, "launch": "early"}, None)
    )
    told = [json.loads(e.json())["cases"][0]["candidates"][0]["options"] for e in (one, other)]
    assert told == [{"rows": 2, "launch": "early"}, {}]
    assert one.text() == other.text()


def test_lint_finds_nothing_in_two_entries_of_one_target(toy, kernels):
    whole = {n: "any" for n in ("groups", "scoring", "has_bias", "dtype")}
    entry = {"target": f"{kernels}:rows", "options": {"rows": 2}}
    for other in ({"rows": 2}, {"rows": 4}):
        catalog = toy.registry(
            {"a": {**entry, "when": {"size": 8}}, "b": {**entry, "options": other, "when": whole}}
        ).catalog
        assert lint_catalog(catalog) == []
