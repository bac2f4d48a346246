"""explain is the selection told: it never differs from a dispatch, and says why, case by case."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack, suppress

import pytest
from drawn_registries import calls, loaded, outcome, slow, tables, whens
from engine_support import call
from hypothesis import given
from hypothesis import strategies as st

from kernel_registry.errors import NoImplementationError, RegistryError

rules = st.fixed_dictionaries(
    {"action": st.sampled_from(["use", "prefer", "disable"]), "name": st.integers(0, 4)},
    optional={"when": whens.map(lambda w: {k: v for k, v in w.items()})},
)


@slow
@given(
    implementations=tables,
    asked=st.lists(calls, min_size=1, max_size=4),
    files=st.lists(st.lists(rules, max_size=3), max_size=2),
    inside=st.lists(rules, max_size=2),
    pin=st.one_of(st.none(), st.integers(0, 4)),
)
def test_explain_and_dispatch_never_differ(shared_toy, implementations, asked, files, inside, pin):
    toy = shared_toy
    registry = loaded(toy, implementations)
    if registry is None:
        return
    names = list(implementations)
    for lines in files:
        with suppress(RegistryError):  # refused as a whole, then nothing changed
            registry.load_overrides(
                toy.overrides(
                    *(
                        {line["action"]: names[line["name"] % len(names)], "when": line.get("when", {})}
                        for line in lines
                    )
                )
            )
    with ExitStack() as stack:
        for line in inside:
            name, when = names[line["name"] % len(names)], line.get("when", {})
            with suppress(RegistryError):
                stack.enter_context(
                    registry.disable(toy.OP, name, **when)
                    if line["action"] == "disable"
                    else registry.override(toy.OP, name, prefer=line["action"] == "prefer", **when)
                )
        for traits in asked:
            if pin is not None:
                traits = {**traits, "implementation": names[pin % len(names)]}
            try:
                explanation = registry.explain(toy.OP, **traits)
            except RegistryError as error:
                assert outcome(registry, toy.OP, **traits) is type(error)
                continue
            got = outcome(registry, toy.OP, **traits)
            assert explanation.winner == (got if isinstance(got, str) else None), explanation.text()
            text, data = explanation.text(), json.loads(explanation.json())
            assert data["winner"] == explanation.winner
            for case in explanation.cases:
                assert (case.winner is None) == bool(case.error)
                assert case.winner is None or f"-> {case.winner}" in text
            check_every_piece(registry, toy.OP, traits, explanation)


def check_every_piece(registry, op, traits, explanation):
    """A dispatch with the open traits given agrees with the bound kernel's choice for that call."""
    if explanation.winner is None:
        return
    bound = registry.dispatch(op, **traits)
    for count, flag in itertools.product((0, 1, 2, 5, 6, 9, 10, 11), (True, False)):
        full = {"num_tokens": count, "contiguous": flag, **traits}
        if full["num_tokens"] == count and full["contiguous"] == flag:
            assert bound(call(count, flag)) == registry.dispatch(op, **full).name


def test_explain_tells_apart_the_ranges_that_nothing_serves(toy):
    registry = toy.registry({"small": {"num_tokens": {"max": 64}}, "big": {"num_tokens": {"min": 1000}}})
    with pytest.raises(NoImplementationError, match="num_tokens"):
        registry.dispatch(toy.OP, size=8)
    explanation = registry.explain(toy.OP, size=8)
    assert explanation.winner is None
    assert [(case.conditions, case.winner) for case in explanation.cases] == [
        (("num_tokens < 65",), "small"),
        (("num_tokens 65..999",), None),
        (("num_tokens >= 1000",), "big"),
    ]
    assert registry.dispatch(toy.OP, size=8, num_tokens=3).name == "small"


RANGES = {
    "many": {"when": {"num_tokens": {"min": 1024}, "scoring": "any"}, "rank": 3},
    "far": {"when": {"scoring": "softmax", "size": {"min": 16}, "num_tokens": {"max": 2048}}, "rank": 2},
    "softmax": {"when": {"scoring": "softmax"}, "rank": 1},
    "base": {"when": {"scoring": "any"}, "rank": 0},
    "dense": {"when": {"contiguous": True, "has_bias": "any"}, "rank": -1},
    "vast": {"when": {"num_tokens": {"min": 9000}, "has_bias": "any"}, "rank": -2},
}


def test_explain_tells_a_range_by_its_condition_and_not_by_a_value_picked_from_it(toy):
    explanation = toy.registry(RANGES).explain(toy.OP, size=8)
    few, many = explanation.cases
    assert few.candidates[0].failures == ("num_tokens < 1024, serves >= 1024",)
    assert (few.starts, many.starts) == ({"num_tokens": 0}, {"num_tokens": 1024})
    assert "~ many     one predicate away: num_tokens < 1024, serves >= 1024" in explanation.text()
    assert "num_tokens is" not in explanation.text() and "contiguous is" not in explanation.text()
    assert "serves contiguous true only" in explanation.text()  # no condition: nothing depends on it
    whole = toy.registry(RANGES).explain(toy.OP, size=8, implementation="base").text()
    assert "serves num_tokens >= 9000 only" in whole and "when num_tokens" not in whole
    assert "num_tokens is 3, serves >= 1024" in toy.registry(RANGES).explain(toy.OP, size=8, num_tokens=3).text()


def test_explain_tells_once_what_serves_in_no_range(toy):
    explanation = toy.registry(RANGES).explain(toy.OP, size=8)
    softmax, size = "scoring is sigmoid, serves softmax", "size is 8, serves >= 16"
    assert explanation.in_no_range == {"softmax": (softmax,), "far": (softmax, size)}
    head, *ranges = explanation.text().split("  when ")
    assert head.splitlines()[1:] == ["  in no range:", f"   x far      {softmax}; {size}",
                                     f"   ~ softmax  one predicate away: {softmax}"]
    assert len(ranges) == 2 and not any("softmax" in text or "far " in text for text in ranges)
    data = json.loads(explanation.json())
    assert [len(case["candidates"]) for case in data["cases"]] == [6, 6] and data["in_no_range"]["softmax"] == [softmax]
    alone = toy.registry(RANGES).explain(toy.OP, size=8, num_tokens=3)
    assert alone.in_no_range == {} and "in no range" not in alone.text()


def test_explain_tells_once_what_an_override_takes_from_every_range(toy):
    registry = toy.registry(RANGES)
    registry.load_overrides(toy.overrides({"disable": "base", "reason": "incident 12"}))
    explanation = registry.explain(toy.OP, size=8, contiguous=True)
    assert list(explanation.in_no_range) == ["far", "softmax", "base"] and len(explanation.cases) == 2
    assert explanation.text().count("   ~ base     one predicate away: disable base") == 1


def test_explain_names_every_failing_predicate(toy):
    registry = toy.registry(
        {
            "a": {"size": {"min": 16}, "dtype": ["bfloat16"], "platform": ["cpu"]},
            "b": {"when": {"dtype": "any"}, "fallback": True},
        }
    )
    explanation = registry.explain(toy.OP, size=8)
    a, b = explanation.cases[0].candidates
    assert set(a.failures) == {
        "size is 8, serves >= 16",
        "dtype is float32, serves bfloat16",
        "platform is sm_90, serves cpu",
    }
    assert b.serves and b.failures == () and explanation.cases[0].near_misses == ()
    text = explanation.text()
    assert all(failure in text for failure in a.failures) and "* b" in text and "chosen" in text
    assert a.where in explanation.json()


def test_near_misses_are_one_predicate_away_and_before_the_winner(toy):
    registry = toy.registry(
        {
            "near": {"when": {"size": {"min": 16}}, "rank": 2},
            "far": {"when": {"size": {"min": 32}, "dtype": "int8"}, "rank": 1},
            "winner": {"size": {"max": 100}},
            "later": {"when": {"scoring": "softmax"}, "rank": -1},
        }
    )
    explanation = registry.explain(toy.OP, size=8)
    assert [c.name for c in explanation.cases[0].near_misses] == ["near"]
    assert json.loads(explanation.json())["cases"][0]["near_misses"] == ["near"]
    assert "~ near    one predicate away: size is 8, serves >= 16" in explanation.text()
    assert "could serve, but goes later" not in explanation.text()


def test_explain_names_the_layer_file_line_and_reason_of_an_override(toy):
    registry = toy.registry({"a": {"size": 8}, "b": {}})
    path = toy.overrides({"disable": "a", "reason": "incident 12"}, {"prefer": "b", "when": {"size": 9}})
    registry.load_overrides(path)
    explanation = registry.explain(toy.OP, size=8)
    (case,) = explanation.cases
    assert explanation.winner == "b" and case.decided_by.startswith("the registry's order, ")
    rule = f"disable a: file {path}, {path}:3 (incident 12)"
    assert f"override  {rule}: in force" in explanation.text()
    told = json.loads(explanation.json())["cases"][0]
    assert told["overrides"] == [{"rule": rule, "where": f"{path}:3", "layer": f"file {path}", "outcome": "in force"}]
    assert [c["denied"] for c in told["candidates"]] == [rule, ""]
    assert registry.explain(toy.OP, size=9).cases[0].decided_by == f"prefer b: file {path}, {path}:6"


def test_the_json_of_an_explanation_is_canonical(toy):
    registry = toy.registry({"a": {"groups": "any"}})
    one, two = (registry.explain(toy.OP, **t).json() for t in ({"size": 8, "groups": 2}, {"groups": 2, "size": 8}))
    assert one == two and json.loads(one)["traits"]["platform"] == "sm_90"


def test_a_check_that_breaks_after_the_winner_does_not_break_explain(toy):
    registry = toy.registry({"a": {"size": {"min": 4}}, "b": {"when": {"python": ["gone_module:f"]}, "fallback": True}})
    call = {"size": 8, "num_tokens": 1, "contiguous": True}
    assert registry.dispatch(toy.OP, **call).name == "a"
    explanation = registry.explain(toy.OP, **call)
    assert explanation.winner == "a" and "gone_module" in explanation.text()
