"""How variants are told: names, explain, plan, list and lint."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from variants_support import MANY, text

from kernel_registry.cli import main
from kernel_registry.errors import NoImplementationError
from kernel_registry.lint import lint_catalog, lint_file
from kernel_registry.selection import one_name


@pytest.mark.parametrize(
    "names, name",
    [
        ("", ""),
        ("a", "a"),
        ("a.x", "a.x"),
        ("a a.x a.y torch", "a|.x|.y|torch"),
        ("a.x a", "a.x|a"),  # not after its implementation's name
        ("a.x a.y", "a.x|a.y"),
        ("b a.b a a.x b.c", "b|a.b|a|.x|b.c"),  # not right after its own implementation's
        ("a b a.x", "a|b|a.x"),
        ("a torch a.x a", "a|torch|a.x"),
        ("a a.x a a.y", "a|.x|.y"),
        ("a a a.x a.x", "a|.x"),
        ("a ab ab.x a.x", "a|ab|.x|a.x"),
        ("a.b a.b.x", "a.b|.x"),  # an implementation whose own name has a dot
        ("a a.b.x", "a|a.b.x"),
    ],
)
def test_names_of_one_call_are_told_short(names, name):
    assert one_name(names.split()) == name


def test_the_bound_kernel_and_the_explanation_tell_the_same_name(toy, family):
    registry = toy.registry(family)
    for size, name in ((8, "a|.pairs|.quads"), (16, "a|.pairs"), (32, "a"), (33, "rest")):
        assert registry.bind(toy.OP, size=size).name == registry.explain(toy.OP, size=size).winner == name
    with registry.override(toy.OP, "rest", num_tokens={"max": 100}):
        assert registry.bind(toy.OP, size=8).name == registry.explain(toy.OP, size=8).winner == "rest|a.pairs|a.quads"


def shown(explanation):
    """The rows of the text: (mark, name with what is folded into it, what is told), in order, without heads."""
    rows = [re.fullmatch(r"   ([ x~*]) (\S+(?: and its \S.*?)?)  +(\S.*)", line)
            for line in explanation.text().splitlines()]
    return [match.groups() for match in rows if match and match[2] != "override"]


def test_explain_folds_the_variants_of_a_refused_implementation_into_its_line(toy, family):
    registry = toy.registry(family)
    assert shown(registry.explain(toy.OP, size=33, num_tokens=9)) == [
        ("~", "a and its 2 variants", "one predicate away: size is 33, serves <= 32"),
        ("*", "rest", "chosen"),
    ]
    text = registry.explain(toy.OP, size=33, num_tokens=9).text()
    assert "a.pairs" not in text and "a.quads" not in text
    one = {**family["a"], "variants": {"pairs": family["a"]["variants"]["pairs"]}}
    one_variant = toy.registry({**family, "a": one}).explain(toy.OP, size=33, num_tokens=9)
    assert [name for _, name, _ in shown(one_variant)] == ["a and its variant", "rest"]


def test_explain_folds_where_the_open_traits_make_several_ranges_too(toy, family):
    family["many"] = {"when": {"groups": "any", **MANY}, "rank": -1}
    explanation = toy.registry(family).explain(toy.OP, size=33)
    assert len(explanation.cases) == 2 and [*explanation.in_no_range] == ["a.quads", "a.pairs", "a"]  # each by its name
    head, body = explanation.text().split("  when ", 1)
    assert head.splitlines()[1:] == ["  in no range:", "   ~ a and its 2 variants  one predicate away: size is 33, "
                                     "serves <= 32"]
    assert "a.pairs" not in body and "variant" not in body


def test_a_variant_that_is_refused_while_its_implementation_serves_has_its_own_line(toy, family):
    registry = toy.registry(family)
    assert shown(registry.explain(toy.OP, size=8, num_tokens=99)) == [
        ("~", "a.quads", "one predicate away: num_tokens is 99, serves >= 512"),
        ("*", "a.pairs", "chosen"),
        (" ", "a", "could serve, but goes later"),
        (" ", "rest", "could serve, but goes later"),
    ]
    ranges = registry.explain(toy.OP, size=16)
    assert ranges.in_no_range == {"a.quads": ("size is 16, serves 8",)}  # while a serves in each range
    rows = shown(ranges)
    assert rows[0] == ("x", "a.quads", "size is 16, serves 8") and [row[1] for row in rows].count("a.quads") == 1
    assert not any("variant" in name for _, name, _ in rows)


def test_a_disabled_family_is_one_line_and_a_disabled_variant_has_its_own(toy, family):
    registry = toy.registry(family)
    with registry.disable(toy.OP, "a"):
        for explanation in (registry.explain(toy.OP, size=8), registry.explain(toy.OP, size=8, num_tokens=999)):
            rows = shown(explanation)
            assert [name for _, name, _ in rows] == ["a and its 2 variants", "rest"]
            assert rows[0][2].startswith("one predicate away: disable a: context")
    with registry.disable(toy.OP, "a.pairs"):
        rows = shown(registry.explain(toy.OP, size=8, num_tokens=999))
    assert [(mark, name) for mark, name, _ in rows] == [("*", "a.quads"), ("x", "a.pairs"), (" ", "a"), (" ", "rest")]
    assert "disable a.pairs: context" in rows[1][2]


def test_the_json_of_an_explanation_folds_nothing_and_says_whose_variant_each_is(toy, family):
    family["a.other"] = {"when": {"size": {"min": 40}}}  # written out: its name alone does not make it a variant
    story = json.loads(toy.registry(family).explain(toy.OP, size=33, num_tokens=9).json())
    (case,) = story["cases"]
    assert {c["name"]: c["variant_of"] for c in case["candidates"]} == {
        "a.quads": "a", "a.pairs": "a", "a": "", "a.other": "", "rest": ""}
    assert all(c["failures"] for c in case["candidates"] if c["name"] != "rest")


def test_plan_tells_why_this_family_once(toy, family):
    from kernel_registry.planning import _why

    family["c"] = {"when": {"groups": {"min": 2}}}
    registry = toy.registry(family)
    explanation = registry.explain(toy.OP, size=8)
    reasons = {_why(registry.catalog.op(toy.OP), case, explanation.traits) for case in explanation.cases}
    assert len(explanation.cases) == 3 and len(reasons) == 1 and "size=8 (serves <= 32)" in reasons.pop()
    with registry.disable(toy.OP, "a"):  # the nearest is told as the implementation, not as one of its variants
        (case,) = registry.explain(toy.OP, size=8).cases
        assert _why(registry.catalog.op(toy.OP), case, explanation.traits).startswith("no fast kernel: nearest is a,")


def test_explain_says_that_the_rule_on_its_implementation_disabled_a_variant(toy, family):
    registry = toy.registry({"a": family["a"]})
    path = toy.overrides({"disable": "a", "reason": "incident 12"})
    registry.load_overrides(path)
    explanation = registry.explain(toy.OP, size=8, num_tokens=99)
    rule = f"disable a: file {path}, {path}:3 (incident 12)"
    (case,) = explanation.cases
    denied = {candidate.name: candidate.denied for candidate in case.candidates}
    assert denied == {"a": rule, "a.pairs": f"as a variant of a: {rule}", "a.quads": f"as a variant of a: {rule}"}
    assert f"   ~ a and its 2 variants  one predicate away: {rule}" in explanation.text().splitlines()
    assert f"override  {rule}: in force" in explanation.text()
    with pytest.raises(NoImplementationError, match="a.pairs: as a variant of a: disable a: file"):
        registry.dispatch(toy.OP, size=8, num_tokens=99)


def test_explain_says_which_of_those_that_were_asked_for_goes_first(toy, family):
    registry = toy.registry(family)
    with registry.override(toy.OP, "a"):
        lines = registry.explain(toy.OP, size=8, num_tokens=999).text().splitlines()
    told = {line.split()[0] if line[3] == " " else line.split()[1]: line.rpartition("  ")[2] for line in lines[3:]}
    assert "use a: context" in lines[1] and told == {
        "a.quads": "chosen",
        "a.pairs": "could serve, but goes later",
        "a": "could serve, but goes later",
        "rest": "could serve, but another was asked for",
    }


def test_list_shows_each_variant_where_it_stands(toy, family):
    family["a"]["summary"] = "routes"
    family["a"] = {**family["a"], "variants": {"pairs": {**family["a"]["variants"]["pairs"], "summary": "two rows"}}}
    path = toy.file(family)
    done = CliRunner().invoke(main, ["list", "--registry", str(path)], catch_exceptions=False)
    rows = {line.split()[1]: line for line in done.output.splitlines() if line.split()[:1] == [toy.OP]}
    assert list(rows) == ["a.pairs", "a", "rest"]
    assert "two rows (launch=late, rows=2)" in rows["a.pairs"] and "routes (launch=late)" in rows["a"]


def test_lint_tells_what_a_variant_has_from_its_implementation_once(toy):
    def found(variant):
        whole = {"target": "gone_module:f", "when": {"platform": "sm_77"}, "variants": {"b": {"when": variant}}}
        findings = lint_catalog(toy.registry({"a": whole, "c": {"when": {}, "fallback": True}}).catalog)
        return [f.message.partition(":")[0] for f in findings if "gone_module" in f.message or "sm_77" in f.message]

    assert found({"size": 8}) == ["a", "a"]
    assert found({"platform": ["sm_77"], "size": 8}) == ["a.b", "a", "a"]  # a line of its own
    assert lint_file(toy.write(text("when: {size: {max: 64}}")))[0].level == "error"


def test_lint_finds_a_variant_that_serves_nothing(toy):
    entry = {"when": {}, "variants": {"b": {"when": {"size": 9, "relations": ["size > 9"]}}}}
    path = toy.file({"a": entry})
    (finding,) = [f for f in lint_file(path) if "serves nothing: no call" in f.message]
    line = path.read_text().splitlines()[int(finding.where.rpartition(":")[2]) - 1]
    assert finding.message.startswith("a.b serves nothing") and line.strip() == "b:"
