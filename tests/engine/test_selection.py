"""Who wins: order, bind and its tables, the caches."""

from __future__ import annotations

import itertools
import random
import threading

import pytest
from drawn_registries import calls, loaded, outcome, slow, tables
from engine_support import call
from hypothesis import given
from hypothesis import strategies as st

from kernel_registry.errors import AmbiguityError, DocumentError, RegistryError, TraitError


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
