"""Sets of trait values: every YAML form, and the algebra against brute force over a finite domain."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_registry.box import Box
from kernel_registry.competition import relations
from kernel_registry.expressions import Expression
from kernel_registry.predicates import Ints, PredicateError, value_set
from kernel_registry.traits.platform import KNOWN, Platform
from kernel_registry.traits.trait import Trait, TraitValueError

INT = Trait("n", "int", "performance", minimum=0)
FREE = Trait("m", "int", "performance")  # without a least value
WORD = Trait("w", "str", "semantic", default="a", choices=("a", "b", "c"))
OPEN = Trait("o", "str", "semantic", default="a")  # any word will do
FLAG = Trait("f", "bool", "semantic", default=True)
DTYPE = Trait("d", "dtype", "semantic", default="float32")
PLATFORM = Trait("platform", "platform", "platform")

INTS = range(-12, 60)
DTYPES = ("float32", "bfloat16", "float16", "int8")
DOMAIN = {
    "n": [v for v in INTS if v >= 0],
    "m": list(INTS),
    "w": list("abc"),
    "o": ["a", "b", "other", "word"],
    "f": [True, False],
    "d": list(DTYPES),
    "platform": [*KNOWN, Platform("cuda", (7, 5)), Platform("hip", (12, 0, 0))],
}


@pytest.mark.parametrize(
    "trait, spec, inside, text",
    [
        (INT, 8, [8], "8"),
        (INT, [8, 4], [4, 8], "4|8"),
        (INT, [3, 4, 5], [3, 4, 5], "3|4|5"),
        (INT, "any", DOMAIN["n"], "any"),
        (INT, {"min": 57}, [57, 58, 59], ">= 57"),
        (INT, {"max": 2}, [0, 1, 2], "<= 2"),
        (INT, {"min": 2, "max": 4}, [2, 3, 4], "2..4"),
        (INT, {"min": 3, "max": 20, "multiple_of": 8}, [8, 16], "3..20, multiple of 8"),
        (INT, {"multiple_of": 16}, [0, 16, 32, 48], "multiple of 16"),
        (INT, {"min": 40, "multiple_of": 16}, [48], ">= 40, multiple of 16"),
        (INT, {"max": 40, "multiple_of": 16}, [0, 16, 32], "<= 40, multiple of 16"),
        (INT, {"not": 3}, [v for v in DOMAIN["n"] if v != 3], "not (3)"),
        (INT, {"not": [0, 1]}, [v for v in DOMAIN["n"] if v > 1], "not (0|1)"),
        (INT, {"not": {"min": 2, "max": 58}}, [0, 1, 59], "not (2..58)"),
        (INT, {"not": {"not": [3, 5]}}, [3, 5], None),
        (INT, {"min": -5, "max": 1}, [0, 1], "<= 1"),
        (FREE, {"min": -3, "max": -1}, [-3, -2, -1], "-3..-1"),
        (FREE, {"multiple_of": 30}, [0, 30], "multiple of 30"),
        (FREE, {"not": {"min": -11}}, [-12], None),
        (WORD, "b", ["b"], "b"),
        (WORD, ["c", "a"], ["a", "c"], "a|c"),
        (WORD, "any", ["a", "b", "c"], "any"),
        (WORD, {"not": "b"}, ["a", "c"], "not b"),
        (WORD, {"not": ["b", "c"]}, ["a"], "not b|c"),
        (OPEN, {"not": "b"}, ["a", "other", "word"], "not b"),
        (OPEN, "any", DOMAIN["o"], "any"),
        (FLAG, True, [True], "true"),
        (FLAG, [True, False], [True, False], None),
        (FLAG, "any", [True, False], "any"),
        (FLAG, {"not": True}, [False], "not true"),
        (DTYPE, "bf16", ["bfloat16"], "bfloat16"),
        (DTYPE, ["fp32", "half"], ["float32", "float16"], "float16|float32"),
        (DTYPE, {"not": "fp32"}, ["bfloat16", "float16", "int8"], "not float32"),
        (PLATFORM, "cpu", [Platform("cpu")], "cpu"),
        (
            PLATFORM,
            ["gfx942", "interpreter"],
            [Platform("hip", (9, 4, 2)), Platform("interpreter")],
            "gfx942|interpreter",
        ),
        (PLATFORM, ["cuda>=sm_100"], [p for p in KNOWN if p.kind == "cuda" and p.arch >= (10, 0)], "cuda>=sm_100"),
        (
            PLATFORM,
            ["cuda>=sm_80,<sm_100"],
            [p for p in KNOWN if p.kind == "cuda" and (8, 0) <= p.arch < (10, 0)],
            None,
        ),
        (PLATFORM, "any", DOMAIN["platform"], "any"),
        (PLATFORM, {"not": ["cuda", "hip"]}, [Platform("cpu"), Platform("interpreter")], "not cuda|hip"),
    ],
)
def test_every_form(trait, spec, inside, text):
    found = value_set(trait, spec)
    domain = DOMAIN[trait.name]
    assert [v for v in domain if found.admits(v)] == [v for v in domain if v in inside]
    if text is not None:
        assert str(found) == text


@pytest.mark.parametrize(
    "trait, spec, message",
    [
        (INT, "8", "expected a whole number >= 0"),
        (INT, 8.0, "expected a whole number >= 0"),
        (INT, True, "expected a whole number >= 0"),
        (INT, -1, "expected a whole number >= 0"),
        (INT, None, "expected a whole number"),
        (INT, [8, "x"], "expected a whole number"),
        (INT, [], "an empty list matches nothing"),
        (INT, {}, "expected min, max, multiple_of or not"),
        (INT, {"mn": 8}, "expected min, max, multiple_of or not, got ['mn']"),
        (INT, {"not": 8, "max": 9}, "expected min, max, multiple_of or not, got ['not']"),
        (INT, {"min": 8.0}, "n.min: expected a whole number"),
        (INT, {"min": True}, "n.min: expected a whole number"),
        (INT, {"max": "8"}, "n.max: expected a whole number"),
        (INT, {"multiple_of": 0}, "n.multiple_of: expected at least 1"),
        (INT, {"multiple_of": -8}, "n.multiple_of: expected at least 1"),
        (INT, {"min": 9, "max": 8}, "min 9 is greater than max 8"),
        (INT, {"min": 9, "max": 15, "multiple_of": 8}, "nothing is left of"),
        (INT, {"max": -1}, "nothing"),
        (INT, {"not": {"multiple_of": 8}}, "'n % 8 != 0'"),
        (INT, {"not": "any"}, "nothing"),
        (INT, {"not": {"min": 0}}, "nothing"),
        (WORD, "d", "expected one of a, b, c"),
        (WORD, {"min": 1}, "expected a value, a list or {not: ...}"),
        (WORD, [], "an empty list matches nothing"),
        (WORD, {"not": ["a", "b", "c"]}, "nothing"),
        (WORD, {"not": "any"}, "nothing"),
        (WORD, 1, "expected one of"),
        (FLAG, 1, "expected true or false"),
        (FLAG, "true", "expected true or false"),
        (FLAG, {"not": [True, False]}, "nothing"),
        (DTYPE, "float23", "did you mean"),
        (DTYPE, "fp8", "names no one format"),
        (DTYPE, {"not": "any"}, "nothing"),
        (OPEN, {"not": "any"}, "nothing"),
        (PLATFORM, "sm_9", "no platform pattern"),
        (PLATFORM, [], "expected a list of patterns"),
        (PLATFORM, [80], "expected a list of patterns"),
        (PLATFORM, {"not": "any"}, "nothing"),
        (PLATFORM, {"min": "sm_80"}, "expected patterns or {not: ...}"),
        (PLATFORM, ["cuda>=sm_90,<sm_80"], "nothing lies between"),
    ],
)
def test_what_is_no_set_of_values(trait, spec, message):
    with pytest.raises((PredicateError, TraitValueError, ValueError)) as caught:
        value_set(trait, spec)
    assert message in str(caught.value)


# ---- the algebra, against brute force --------------------------------------------------------------------------------

numbers = st.integers(-12, 59)
ranges = st.builds(
    lambda a, b, keys, step: (
        {k: v for k, v in (("min", min(a, b)), ("max", max(a, b))) if k in keys}
        | ({"multiple_of": step} if step > 1 else {})
    ),
    numbers,
    numbers,
    st.sampled_from([("min", "max"), ("min",), ("max",)]),
    st.sampled_from([1, 1, 1, 2, 3, 4, 8]),
)
plain = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=4), ranges, st.just("any"))
specs = {
    "m": st.one_of(plain, st.builds(lambda s: {"not": s}, plain)),
    "w": st.one_of(
        st.just("any"),
        st.lists(st.sampled_from("abc"), min_size=1),
        st.builds(lambda s: {"not": s}, st.lists(st.sampled_from("abc"), min_size=1)),
    ),
    "o": st.one_of(
        st.just("any"),
        st.lists(st.sampled_from(["a", "b"]), min_size=1),
        st.builds(lambda s: {"not": s}, st.lists(st.sampled_from(["a", "b"]), min_size=1)),
    ),
    "platform": st.one_of(
        st.just("any"),
        *(
            st.builds(
                wrap,
                st.lists(
                    st.sampled_from(
                        [
                            "cuda",
                            "hip",
                            "cpu",
                            "interpreter",
                            "sm_90",
                            "gfx942",
                            "cuda>=sm_80",
                            "cuda<sm_90",
                            "cuda>sm_86",
                            "hip>=gfx942",
                            "cuda>=sm_89,<=sm_100",
                            "hip<gfx950",
                        ]
                    ),
                    min_size=1,
                    max_size=3,
                ),
            )
            for wrap in (lambda s: s, lambda s: {"not": s})
        ),
    ),
}
TRAITS = {"m": FREE, "w": WORD, "o": OPEN, "platform": PLATFORM}


def made(trait, spec):
    try:
        return value_set(trait, spec)
    except ValueError:
        return None  # nothing lies in it


@pytest.mark.parametrize("name", list(specs))
def test_covers_and_meets_never_lie(name):
    domain = DOMAIN[name]

    @settings(max_examples=300, deadline=None)
    @given(specs[name], specs[name])
    def check(one, other):
        a, b = made(TRAITS[name], one), made(TRAITS[name], other)
        if a is None or b is None:
            return
        in_a, in_b = {v for v in domain if a.admits(v)}, {v for v in domain if b.admits(v)}
        if a.covers(b):
            assert in_b <= in_a  # covers never says yes without proof
        if in_a & in_b:
            assert a.meets(b)  # meets never says no without proof
        assert a.meets(b) == b.meets(a)
        assert a.covers(a) and a.meets(a)

    check()


@settings(max_examples=300, deadline=None)
@given(specs["m"], specs["m"])
def test_ints_are_exact_where_no_multiple_is_involved(one, other):
    """The domain reaches past every bound drawn, so what holds on it holds everywhere."""
    a, b = made(FREE, one), made(FREE, other)
    if a is None or b is None or a.step != 1 or b.step != 1:
        return
    far = [*range(-40, 100)]
    in_a, in_b = {v for v in far if a.admits(v)}, {v for v in far if b.admits(v)}
    assert a.covers(b) == (in_b <= in_a)
    assert a.meets(b) == bool(in_a & in_b)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.sampled_from([1, 2, 5]))
def test_ints_in_normal_form_admit_what_was_said(pairs, step):
    pairs = [(min(p), max(p)) for p in pairs]
    found = Ints(pairs, step)
    for v in INTS:
        assert found.admits(v) == (v % step == 0 and any(low <= v <= high for low, high in pairs))
    assert list(found.ranges) == sorted(found.ranges)
    assert set(found.edges()) >= {bound for r in found.ranges for bound in r}


@settings(max_examples=200, deadline=None)
@given(specs["w"], specs["w"])
def test_words_of_a_known_domain_are_exact(one, other):
    a, b = made(WORD, one), made(WORD, other)
    if a is None or b is None:
        return
    in_a, in_b = {v for v in "abc" if a.admits(v)}, {v for v in "abc" if b.admits(v)}
    assert a.covers(b) == (in_b <= in_a) and a.meets(b) == bool(in_a & in_b)


# ---- competition: all pairs at once, the same answers ----------------------------------------------------------------

RELATIONS = [Expression("m > 3"), Expression("m % 2 == 0")]


@st.composite
def boxes(draw):
    sets = {}
    for name in draw(st.sets(st.sampled_from(list(specs)))):
        found = made(TRAITS[name], draw(specs[name]))
        if found is not None:
            sets[name] = found
    return Box(sets, tuple(draw(st.sets(st.sampled_from(RELATIONS)))))


def check_relations(every):
    meets, wider, narrower = relations(every)
    for i, a in enumerate(every):
        for j, b in enumerate(every):
            assert bool(meets[i] >> j & 1) == a.meets(b)
            assert bool(wider[i] >> j & 1) == b.covers(a)
            assert bool(narrower[i] >> j & 1) == a.covers(b)


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes(), min_size=1, max_size=12))
def test_relations_agree_with_pairs(every):
    check_relations(every)


def some_ranges(count, seed):
    import random

    draw = random.Random(seed)
    out = []
    for _ in range(count):
        a, b = sorted(draw.choices(range(120), k=2))
        out.append(Ints([draw.choice([(a, b), (a, a), (a, float("inf")), (float("-inf"), b)])]))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_relations_of_many_ranges_take_the_sorted_path_and_agree(seed, monkeypatch):
    from kernel_registry import competition

    taken = []
    real = competition._sorted_ranges
    monkeypatch.setattr(competition, "_sorted_ranges", lambda *a: taken.append(1) or real(*a))
    ranged = [
        Box({"m": r, **({"w": value_set(WORD, "a")} if i % 3 else {})}) for i, r in enumerate(some_ranges(130, seed))
    ]
    check_relations([*ranged, Box({}), Box({"w": value_set(WORD, ["a", "b"])})])
    assert taken, "with more than 64 distinct ranges the sorted path is what is tested here"


def test_relations_of_many_sets_that_are_no_ranges():
    pieces = [value_set(FREE, {"not": [i, i + 3]}) for i in range(70)]
    check_relations([Box({"m": p}) for p in pieces])


def test_no_boxes():
    assert relations([]) == ([], [], [])
