"""Who wins: order, bind and its tables, explain as the selection told, the caches."""

from __future__ import annotations

import itertools
import json
import random
import threading
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_registry.errors import AmbiguityError, DocumentError, NoImplementationError, RegistryError, TraitError


def call(tokens=1, contiguous=True):
    return SimpleNamespace(tokens=tokens, contiguous=contiguous)


# ---- rule 3: no accidental winner ------------------------------------------------------------------------------------

NESTED = {
    "widest": {},
    "wide": {"size": {"min": 8}},
    "narrow": {"size": {"min": 8, "max": 64}},
    "exact": {"size": 16},
    "reference": {"when": {"groups": "any", "scoring": "any"}, "fallback": True},
}


@pytest.mark.parametrize("names", list(itertools.permutations(NESTED))[::7])
def test_the_provably_narrower_box_wins_in_every_order_of_the_file(shared_toy, names):
    registry = shared_toy.registry({name: NESTED[name] for name in names})
    won = [registry.dispatch(shared_toy.OP, size=s).name for s in (4, 8, 16, 64, 65)]
    assert won == ["widest", "narrow", "exact", "narrow", "wide"]
    assert registry.dispatch(shared_toy.OP, size=16, groups=2).name == "reference"


def test_rank_decides_where_no_box_is_narrower(toy):
    low, high = {"size": {"max": 64}}, {"size": {"min": 32}}
    for ranks, winner in (((0, 1), "high"), ((1, 0), "low"), ((-1, -2), "low")):
        registry = toy.registry({"low": {"when": low, "rank": ranks[0]}, "high": {"when": high, "rank": ranks[1]}})
        assert registry.dispatch(toy.OP, size=40).name == winner


def test_two_that_overlap_without_order_are_both_named_with_their_lines(toy):
    path = toy.file(
        {"first": {"size": {"max": 64}}, "other": {"size": {"min": 512}}, "second": {"size": {"min": 32, "max": 100}}}
    )
    lines = path.read_text().splitlines()
    at = {
        name: next(i for i, line in enumerate(lines, 1) if line.strip() == f"{name}:") for name in ("first", "second")
    }
    with pytest.raises(AmbiguityError) as caught:
        toy.registry(path).catalog
    message = str(caught.value)
    assert f"first ({path}:{at['first']})" in message and f"second ({path}:{at['second']})" in message
    assert "neither box is inside the other" in message and "rank" in caught.value.hint and "other (" not in message


def test_two_with_the_same_box_are_an_error_unless_ranked(toy):
    with pytest.raises(AmbiguityError, match="declare the same box"):
        toy.registry({"a": {"size": 8}, "b": {"size": [8]}}).catalog
    assert toy.registry({"a": {"size": 8}, "b": {"when": {"size": 8}, "rank": 1}}).dispatch(toy.OP, size=8).name == "b"


def test_ranges_of_a_derived_trait_open_below_compete(toy):
    """Both reach down without end: they overlap, and one is inside the other."""
    registry = toy.registry({"a": {"per_group": {"max": 128}}, "b": {"per_group": {"max": 64}}})
    assert [registry.dispatch(toy.OP, size=s).name for s in (64, 128)] == ["b", "a"]
    with pytest.raises(AmbiguityError):
        toy.registry(
            {
                "a": {"per_group": {"max": 128}},
                "b": {"per_group": {"max": 64}, "size": any_above(3)},
                "c": {"per_group": {"max": 96}, "size": {"max": 500}},
            }
        ).catalog


def any_above(low):
    return {"min": low}


def test_relations_do_not_prove_two_apart(toy):
    with pytest.raises(AmbiguityError):
        toy.registry({"a": {"relations": ["size % 2 == 0"]}, "b": {"relations": ["size % 2 == 1"]}}).catalog


def test_a_further_relation_makes_a_box_narrower(toy):
    registry = toy.registry({"a": {"relations": ["size > 4"]}, "b": {"relations": ["size % 2 == 0", "size > 4"]}})
    assert [registry.dispatch(toy.OP, size=s).name for s in (7, 8)] == ["a", "b"]


@pytest.mark.parametrize("narrow", [{"rank": -1}, {"fallback": True}])
def test_a_rank_that_contradicts_containment_is_an_error(toy, narrow):
    with pytest.raises(AmbiguityError, match="could never be chosen") as caught:
        toy.registry({"wide": {}, "narrow": {"when": {"size": 8}, **narrow}}).catalog
    assert "narrow" in str(caught.value) and "wide (" in str(caught.value)


def test_a_name_given_twice_is_an_error(toy):
    text = "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n" + 2 * (
        "      a:\n        target: m:f\n        when: {platform: any}\n"
    )
    with pytest.raises(DocumentError, match="key 'a' is given twice"):
        toy.registry(text).catalog


def test_names_in_two_files(toy):
    registry = toy.registry({"a": {}})
    again = toy.overrides(ops={toy.OP: {"implementations": toy.entries({"a": {"size": 8}})}})
    with pytest.raises(DocumentError, match="two implementations called 'a'") as caught:
        registry.load_overrides(again, allow_targets=True)
    assert str(again) in str(caught.value.where) and "the first at" in str(caught.value)


def test_one_op_has_one_contract(toy):
    other = toy.module("from kernel_registry.contract import Contract\nclass Other(Contract):\n    pass\n")
    registry = toy.registry({"a": {}})
    path = toy.overrides(ops={toy.OP: {"contract": f"{other}:Other"}})
    with pytest.raises(DocumentError, match="has two contracts"):
        registry.load_overrides(path, allow_targets=True)
    with pytest.raises(RegistryError, match="op 'b.op' has no contract"):
        registry.load_overrides(toy.overrides(ops={"b.op": {"implementations": {}}}), allow_targets=True)


sizes = st.one_of(
    st.just("any"),
    st.integers(1, 12),
    st.builds(lambda a, b: {"min": min(a, b), "max": max(a, b)}, st.integers(1, 12), st.integers(1, 12)),
    st.builds(lambda a: {"min": a}, st.integers(1, 12)),
    st.builds(lambda a: {"multiple_of": a}, st.integers(2, 4)),
    st.builds(lambda a: {"not": a}, st.integers(1, 12)),
)
tokens = st.one_of(
    st.just("any"),
    st.builds(lambda a: {"max": a}, st.integers(0, 9)),
    st.builds(lambda a: {"min": a}, st.integers(1, 9)),
    st.integers(0, 5),
    st.builds(lambda a, b: {"not": {"min": min(a, b), "max": max(a, b)}}, st.integers(1, 9), st.integers(1, 9)),
)
whens = st.fixed_dictionaries(
    {},
    optional={
        "size": sizes,
        "num_tokens": tokens,
        "scoring": st.sampled_from(["any", "softmax", ["sigmoid", "softmax"], {"not": "sqrt"}]),
        "groups": st.sampled_from(["any", 1, 2, {"min": 2}]),
        "contiguous": st.sampled_from(["any", True, False]),
        "platform": st.sampled_from(["any", ["cuda>=sm_80"], ["sm_90"], ["cpu"], {"not": "cuda"}]),
        "per_group": st.sampled_from(["any", {"max": 6}, {"min": 2, "max": 4}]),
        "relations": st.sampled_from([["size % 2 == 0"], ["size > groups"]]),
    },
)
entries = st.fixed_dictionaries({"when": whens, "rank": st.integers(-1, 3)}, optional={"fallback": st.just(True)})
tables = st.lists(entries, min_size=1, max_size=5).map(lambda every: {f"k{i}": e for i, e in enumerate(every)})
calls = st.fixed_dictionaries(
    {"size": st.integers(1, 12)},
    optional={
        "num_tokens": st.integers(0, 10),
        "scoring": st.sampled_from(["sigmoid", "softmax", "sqrt"]),
        "groups": st.sampled_from([1, 2, 3]),
        "contiguous": st.booleans(),
        "platform": st.sampled_from(["sm_90", "cpu", "gfx942"]),
    },
)

slow = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def loaded(toy, implementations):
    """The registry, or None where the file as drawn is ambiguous."""
    registry = toy.registry(implementations)
    try:
        registry.catalog
        return registry
    except AmbiguityError:
        return None


def outcome(registry, op, **traits):
    try:
        return registry.dispatch(op, **traits).name
    except RegistryError as error:
        return type(error)


@slow
@given(data=st.data(), implementations=tables, asked=st.lists(calls, min_size=1, max_size=6))
def test_the_order_of_the_file_decides_nothing(shared_toy, data, implementations, asked):
    names = list(implementations)
    shuffled = {n: implementations[n] for n in data.draw(st.permutations(names))}
    first, second = loaded(shared_toy, implementations), loaded(shared_toy, shuffled)
    assert (first is None) == (second is None)
    if first:
        for traits in asked:
            assert outcome(first, shared_toy.OP, **traits) == outcome(second, shared_toy.OP, **traits)


# ---- explain is the selection ----------------------------------------------------------------------------------------

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


# ---- bind and its tables ---------------------------------------------------------------------------------------------

SWITCH = {
    "small": {"num_tokens": {"max": 64}},
    "middle": {"num_tokens": {"min": 65, "max": 4096}},
    "big": {"num_tokens": {"min": 4097}},
}


def test_the_switch_points_are_exact_on_both_sides(toy):
    kernel = toy.registry(SWITCH).bind(toy.OP, size=8)
    assert kernel.name == "small|middle|big"
    assert [kernel(call(t)) for t in (0, 64, 65, 4096, 4097, 10**9)] == [
        "small",
        "small",
        "middle",
        "middle",
        "big",
        "big",
    ]
    assert "num_tokens" not in kernel.traits and kernel.table.bounds == (65, 4097)


def test_a_multi_range_and_a_single_value_cut_exactly(toy):
    registry = toy.registry(
        {
            "odd": {"when": {"num_tokens": {"not": {"min": 3, "max": 5}}}, "rank": 1},
            "one": {"num_tokens": 4},
            "rest": {},
        }
    )
    kernel = registry.bind(toy.OP, size=8)
    assert [kernel(call(t)) for t in range(8)] == ["odd"] * 3 + ["rest", "one", "rest"] + ["odd"] * 2


def test_two_open_traits_make_a_table_of_two_levels(toy):
    registry = toy.registry(
        {"fast": {"num_tokens": {"max": 8}, "contiguous": True}, "strided": {"contiguous": False}, "rest": {}}
    )
    kernel = registry.bind(toy.OP, size=8)
    got = {(t, c): kernel(call(t, c)) for t in (8, 9) for c in (True, False)}
    assert got == {(8, True): "fast", (9, True): "rest", (8, False): "strided", (9, False): "strided"}


def test_rules_cut_the_table_too(toy):
    registry = toy.registry({"a": {}, "b": {"when": {}, "rank": -1}})
    registry.load_overrides(toy.overrides({"use": "b", "when": {"num_tokens": {"min": 10, "max": 19}}}))
    kernel = registry.bind(toy.OP, size=8)
    assert [kernel(call(t)) for t in (9, 10, 19, 20)] == ["a", "b", "b", "a"]


@pytest.mark.parametrize("rule", [{"prefer": "late"}, {"disable": "certain"}])
def test_an_implementation_after_a_certain_one_still_cuts_when_a_rule_reaches_it(toy, rule):
    registry = toy.registry(
        {
            "certain": {},
            "late": {"when": {"num_tokens": {"max": 64}, "scoring": "any"}, "rank": -1},
            "last": {"when": {"groups": "any"}, "fallback": True},
        }
    )
    assert registry.bind(toy.OP, size=8).table.trait is None
    registry.load_overrides(toy.overrides(rule))
    kernel = registry.bind(toy.OP, size=8)
    assert [kernel(call(t)) for t in (64, 65)] == ["late", "certain" if "prefer" in rule else "last"]


def test_thousands_of_ranges_of_an_open_trait_are_cut_in_one_sweep(shared_toy):
    """Structure, not time: each implementation is asked on the pieces it serves, not on every piece."""
    from kernel_registry import box as module

    registry = shared_toy.registry(
        {f"k{i}": {"num_tokens": {"min": 10 * i, "max": 10 * i + 9}} for i in range(500)}
        | {"rest": {"when": {}, "fallback": True}}
    )
    registry.catalog
    asked, real = 0, module.Box.admits

    def counted(self, traits, but_for=()):
        nonlocal asked
        asked += 1
        return real(self, traits, but_for)

    module.Box.admits = counted
    try:
        kernel = registry.bind(shared_toy.OP, size=8)
    finally:
        module.Box.admits = real
    assert asked < 5 * 501
    assert [kernel(call(t)) for t in (0, 9, 10, 2505, 4999, 5000)] == ["k0", "k0", "k1", "k250", "k499", "rest"]


def test_nothing_is_read_at_call_time_when_nothing_depends_on_it(toy):
    kernel = toy.registry({"a": {}, "b": {"size": {"max": 4}}}).bind(toy.OP, size=8)
    assert kernel.table.trait is None
    assert kernel("an object without tokens or contiguity") == "a"
    assert kernel.raw("anything") == "a"


def test_static_traits_prune_the_table(toy):
    registry = toy.registry({**SWITCH, "wide": {"when": {"size": 9}, "rank": 1}})
    assert registry.bind(toy.OP, size=9).table.trait is None


def test_bind_refuses_dynamic_traits_and_dispatch_takes_them(toy):
    registry = toy.registry(SWITCH)
    with pytest.raises(TraitError, match="bind leaves num_tokens to the call"):
        registry.bind(toy.OP, size=8, num_tokens=3)
    kernel = registry.dispatch(toy.OP, size=8, num_tokens=65)
    assert kernel.name == "middle" and kernel.traits["num_tokens"] == 65
    assert kernel(call(1)) == "middle"  # what was dispatched for is what runs
    assert registry.dispatch(toy.OP, size=8) is registry.bind(toy.OP, size=8)


def test_a_kernel_is_bound_to_the_traits_its_factory_names(toy):
    module = toy.module(
        "def some(*, size, per_group):\n    return lambda x: (size, per_group)\n"
        "def every(*, groups, **rest):\n    return lambda x: (groups, sorted(rest))\n"
    )
    registry = toy.registry(
        {
            "a": {"target": f"{module}:some", "when": {"groups": "any"}},
            "b": {"target": f"{module}:every", "when": {"scoring": "softmax"}},
        }
    )
    assert registry.dispatch(toy.OP, size=8, groups=4)(None) == (8, 2)
    groups, rest = registry.dispatch(toy.OP, size=8, scoring="softmax")(call())
    assert groups == 1 and rest == ["dtype", "has_bias", "per_group", "platform", "scoring", "size"]  # no open ones


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_same_traits_same_object(toy):
    registry = toy.registry({"a": {"groups": "any", "dtype": "any"}})
    first = registry.dispatch(toy.OP, size=8, groups=2)
    assert registry.dispatch(toy.OP, size=8, groups=2) is first
    assert registry.dispatch(toy.OP, groups=2, size=8) is first
    assert registry.dispatch(toy.OP, groups=2, size=8, dtype="float32", scoring="sigmoid", platform="sm_90") is first
    assert registry.dispatch(toy.OP, size=8, groups=4) is not first
    assert registry.dispatch(toy.OP, size=8, groups=2, implementation="a") is not first


def test_the_cache_of_spellings_is_bounded_and_kernels_stay_the_same(toy, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["kernel_registry.registry"], "_FAST_CACHE_LIMIT", 16)
    registry = toy.registry({"a": {"size": "any"}})
    kernels = [registry.dispatch(toy.OP, size=s) for s in range(1, 100)]
    assert len(registry._cache) <= 16
    assert all(registry.dispatch(toy.OP, size=s) is k for s, k in enumerate(kernels, 1))


def test_a_cached_dispatch_decides_nothing(toy, monkeypatch):
    registry = toy.registry({"a": {}})
    first = registry.dispatch(toy.OP, size=8)
    monkeypatch.setattr(registry, "_resolve", None)
    assert registry.dispatch(toy.OP, size=8) is first


def test_a_factory_runs_once_whatever_number_of_threads_ask(toy):
    module = toy.module(
        "import time\nmade = []\ndef slow(**traits):\n    time.sleep(0.02)\n    made.append(traits)\n"
        "    return lambda x: 1\n"
    )
    registry = toy.registry({"a": {"target": f"{module}:slow", "when": {}}})
    got, start = [], threading.Barrier(8)

    def ask():
        start.wait()
        got.append(registry.dispatch(toy.OP, size=8))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    import sys

    assert len(set(map(id, got))) == 1 and len(got) == 8 and len(sys.modules[module].made) == 1


# ---- many implementations --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousands(shared_toy):
    """Ten thousand kernels of one op: a grid of sizes, groups, dtypes and platforms, and a reference."""
    draw = random.Random(1)
    implementations = {
        f"k{i}": {
            "size": {"min": 1 + 10 * (i % 1000), "max": 10 * (i % 1000 + 1)},
            "groups": "any",
            "dtype": ["float32", "bfloat16", "float16", "int8", "int16"][i // 1000 % 5],
            "platform": [["cuda"], ["hip"]][i // 5000],
        }
        for i in range(10_000)
    }
    names = list(implementations)
    draw.shuffle(names)
    when = {"groups": "any", "dtype": "any", "size": "any"}
    return shared_toy.registry(
        {**{n: implementations[n] for n in names}, "reference": {"when": when, "fallback": True}}
    )


def test_ten_thousand_implementations_of_one_op(thousands, shared_toy):
    op = shared_toy.OP
    assert thousands.dispatch(op, size=10, dtype="bf16").name == "k1000"
    assert thousands.dispatch(op, size=11, dtype="bf16").name == "k1001"
    assert thousands.dispatch(op, size=9995, dtype="int16", platform="gfx942").name == "k9999"
    assert thousands.dispatch(op, size=20_000).name == "reference"
    assert thousands.explain(op, size=777, dtype="int8").winner == "k3077"


def test_a_cold_dispatch_among_ten_thousand_asks_each_at_most_a_few_questions(thousands, shared_toy):
    """Structure, not time: the work per candidate does not grow with the number of candidates."""
    from kernel_registry import box as module

    asked = 0
    real = module.Box.failures

    def counted(self, traits):
        nonlocal asked
        asked += 1
        return real(self, traits)

    module.Box.failures = counted
    try:
        thousands.dispatch(shared_toy.OP, size=4321, dtype="int8")
    finally:
        module.Box.failures = real
    assert asked < 3 * 10_001
