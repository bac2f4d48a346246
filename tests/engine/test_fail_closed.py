"""Rule 1: unknown is an error, silence serves the neutral value only, and values have exactly their type."""

from __future__ import annotations

import pytest

from kernel_registry.contract import Contract, TraitSpace
from kernel_registry.errors import (
    DocumentError,
    NoImplementationError,
    OverrideError,
    RegistryError,
    TargetError,
    TraitError,
    UnknownNameError,
)
from kernel_registry.traits.trait import Trait


# ---- unknown names: in a call, in the YAML, in an override -----------------------------------------------------------


def test_an_unknown_trait_in_a_call(toy):
    registry = toy.registry({"a": {}})
    for ask in (registry.dispatch, registry.explain, registry.bind):
        with pytest.raises(UnknownNameError, match="no trait 'has_bais'") as caught:
            ask(toy.OP, size=8, has_bais=True)
        assert caught.value.hint == "did you mean 'has_bias'?"
    registry.dispatch(toy.OP, size=8)
    with pytest.raises(UnknownNameError):  # also after the good call is cached
        registry.dispatch(toy.OP, size=8, softcap=30)


def test_an_unknown_trait_in_the_yaml(toy):
    path = toy.write(
        "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n      a:\n"
        "        target: m:f\n        when:\n          platform: any\n          grups: 3\n"
    )
    with pytest.raises(UnknownNameError, match="toy.op has no trait 'grups'") as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:10" and "did you mean 'groups'" in caught.value.hint


def test_an_unknown_trait_in_an_override(toy):
    registry = toy.registry({"a": {}})
    path = toy.overrides({"use": "a", "when": {"sise": 8}})
    with pytest.raises(UnknownNameError, match="no trait 'sise'") as caught:
        registry.load_overrides(path)
    assert caught.value.where == f"{path}:6" and "'size'" in caught.value.hint
    with pytest.raises(UnknownNameError, match="no trait 'sise'"):
        registry.override(toy.OP, "a", sise=8)


def test_unknown_ops_and_implementations(toy):
    registry = toy.registry({"triton_grouped": {}})
    for ask in (registry.dispatch, registry.explain, registry.bind):
        with pytest.raises(UnknownNameError, match="no op 'toy.opp'") as caught:
            ask("toy.opp", size=8)
        assert "toy.op" in caught.value.hint
        with pytest.raises(UnknownNameError, match="no implementation 'triton_groped'") as caught:
            ask(toy.OP, implementation="triton_groped", size=8)
        assert "triton_grouped" in caught.value.hint
    with pytest.raises(UnknownNameError, match="no implementation"):
        registry.override(toy.OP, "nobody")
    with pytest.raises(UnknownNameError, match="no op"):
        registry.disable("toy.opp", "triton_grouped")
    for entry in ({"op": "toy.opp", "use": "triton_grouped"}, {"prefer": "triton_groped"}):
        path = toy.overrides(entry)
        with pytest.raises(UnknownNameError) as caught:
            registry.load_overrides(path)
        assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize("odd", [["a"], {"a": 1}, 3, object()])
def test_names_that_are_no_text(toy, odd):
    registry = toy.registry({"a": {}})
    with pytest.raises(UnknownNameError):
        registry.dispatch(toy.OP, implementation=odd, size=8)
    with pytest.raises(UnknownNameError):
        registry.dispatch(odd, size=8)
    with pytest.raises(UnknownNameError):
        registry.explain(odd, size=8)


def test_a_misspelt_trait_value(toy):
    registry = toy.registry({"a": {}})
    with pytest.raises(TraitError, match="did you mean 'softmax'"):
        registry.dispatch(toy.OP, size=8, scoring="sotfmax")


# ---- silence ---------------------------------------------------------------------------------------------------------

SILENT = """version: 1
ops:
  toy.op:
    contract: {contract}
    implementations:
      a:
        target: {targets}:a
        when: {platform: any}
"""


@pytest.mark.parametrize(
    "trait, neutral, other",
    [
        ("groups", 1, 2),
        ("scoring", "sigmoid", "softmax"),
        ("has_bias", True, False),
        ("dtype", "float32", "bfloat16"),
        ("contiguous", True, False),
    ],
)
def test_silence_about_a_semantic_or_layout_trait_serves_its_neutral_value_only(toy, trait, neutral, other):
    registry = toy.registry(SILENT)
    fixed = {"contiguous": True, "size": 8}
    assert registry.dispatch(toy.OP, **{**fixed, trait: neutral}).name == "a"
    with pytest.raises(NoImplementationError, match=trait):
        registry.dispatch(toy.OP, **{**fixed, trait: other})
    assert registry.explain(toy.OP, **{**fixed, trait: other}).winner is None


def test_silence_about_a_performance_trait_serves_every_value(toy):
    registry = toy.registry(SILENT)
    assert {
        registry.dispatch(toy.OP, size=s, num_tokens=t, contiguous=True).name for s in (1, 999) for t in (0, 10**6)
    } == {"a"}


def test_the_platform_must_be_mentioned(toy):
    path = toy.write(SILENT.replace("        when: {platform: any}\n", ""))
    with pytest.raises(DocumentError, match="says nothing about platform") as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:6" and "platform: any" in caught.value.hint


def test_a_semantic_trait_without_a_neutral_value_must_be_mentioned(toy):
    module = toy.module(
        "from kernel_registry.contract import Contract\nfrom kernel_registry.traits.trait import Trait\n"
        "class C(Contract):\n    traits = (Trait('layout', 'str', 'semantic'), "
        "Trait('platform', 'platform', 'platform'))\n"
    )
    text = SILENT.replace("{contract}", f"{module}:C")
    with pytest.raises(DocumentError, match="says nothing about layout, which has no neutral value"):
        toy.registry(text).catalog
    registry = toy.registry(text.replace("platform: any", "platform: any, layout: nhd"))
    assert registry.dispatch(toy.OP, layout="nhd").name == "a"
    with pytest.raises(NoImplementationError):
        registry.dispatch(toy.OP, layout="hnd")


def test_a_platform_that_is_not_served_is_not_served_though_it_is_the_only_implementation(toy):
    registry = toy.registry({"a": {"platform": ["hip>=gfx90a"]}}, platform="cpu")
    with pytest.raises(NoImplementationError, match="platform is cpu, serves hip>=gfx90a"):
        registry.dispatch(toy.OP, size=8)
    assert registry.dispatch(toy.OP, size=8, platform="gfx942").name == "a"


def test_silence_in_an_override_asks_nothing(toy):
    """A match is the other way round: what it does not mention, it does not ask."""
    registry = toy.registry({"a": {"groups": "any"}, "b": {"when": {"groups": "any"}, "rank": -1}})
    with registry.override(toy.OP, "b"):
        assert registry.dispatch(toy.OP, size=8, groups=4).name == "b"


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trait, right, wrong",
    [
        ("size", 8, [True, 8.0, "8", None, 0, -1, [8], {8}]),
        ("groups", 1, [True, 1.0, False]),
        ("has_bias", True, [1, 1.0, "true", None, 0]),
        ("scoring", "softmax", ["soft", 1, b"softmax", None, ""]),
        ("dtype", "float32", ["float33", 32, None]),
        ("platform", "sm_90", ["sm90", 90, "cuda", None]),
        ("num_tokens", 1, [True, 1.0, -1]),
        ("contiguous", True, [1, 0]),
    ],
)
def test_a_wrong_type_never_hides_behind_a_right_one(toy, trait, right, wrong):
    """1 == True == 1.0 and they hash alike, so the right call goes first and fills the caches."""
    registry = toy.registry({"a": {n: "any" for n in ("groups", "scoring", "has_bias", "dtype")}})
    given = {"size": 8, trait: right}
    first = registry.dispatch(toy.OP, **given)
    for value in wrong:
        for ask in (registry.dispatch, registry.explain):
            with pytest.raises(TraitError, match=f"toy.op: {trait}: expected"):
                ask(toy.OP, **{**given, trait: value})
    assert registry.dispatch(toy.OP, **given) is first


def test_one_and_true_are_different_in_both_orders_of_asking(toy):
    registry = toy.registry({"a": {"groups": "any"}})
    with pytest.raises(TraitError):
        registry.dispatch(toy.OP, size=8, groups=True)
    kernel = registry.dispatch(toy.OP, size=8, groups=1)
    assert type(kernel.traits["groups"]) is int
    with pytest.raises(TraitError):
        registry.dispatch(toy.OP, size=8, groups=True)


def test_missing_traits_are_named_with_their_types(toy):
    with pytest.raises(TraitError, match=r"toy.op: missing size.*\n.*size=\.\.\. \(int\)"):
        toy.registry({"a": {}}).dispatch(toy.OP)


def test_traits_that_contradict_each_other(toy):
    registry = toy.registry({"a": {"groups": "any"}})
    with pytest.raises(TraitError, match="size % groups == 0 does not hold for groups=3, size=8"):
        registry.dispatch(toy.OP, size=8, groups=3)


def test_a_derived_trait_is_not_given(toy):
    registry = toy.registry({"a": {"per_group": {"min": 4}, "groups": "any"}})
    with pytest.raises(TraitError, match=r"'per_group' is derived \(size // groups\)"):
        registry.dispatch(toy.OP, size=8, per_group=8)
    assert registry.dispatch(toy.OP, size=8, groups=2).name == "a"
    with pytest.raises(NoImplementationError, match="per_group is 2, serves >= 4"):
        registry.dispatch(toy.OP, size=8, groups=4)


def test_equal_spellings_are_one_call(toy):
    registry = toy.registry({"a": {"dtype": "any"}})
    assert registry.dispatch(toy.OP, size=8, dtype="bf16") is registry.dispatch(toy.OP, dtype="torch.bfloat16", size=8)


# ---- contracts that would open a hole --------------------------------------------------------------------------------

PLATFORM = Trait("platform", "platform", "platform")
SIZE = Trait("size", "int", "performance", minimum=1)
TOKENS = Trait("tokens", "int", "performance", minimum=0, dynamic=True)
READ = {"tokens": lambda x: x.tokens}


@pytest.mark.parametrize(
    "attributes, message",
    [
        (dict(traits=(SIZE, SIZE)), "declares trait 'size' twice"),
        (dict(traits=(SIZE,), derived={"size": "3"}), "declares trait 'size' twice"),
        (dict(traits=(SIZE,), derived={"half": "sise // 2"}), "'sise', which is not a trait"),
        (dict(traits=(SIZE,), derived={"a": "b + 1", "b": "size + 1"}), "nor one derived before it"),
        (dict(traits=(SIZE,), derived={"a": "a + 1"}), "nor one derived before it"),
        (dict(traits=(SIZE,), derived={"half": "size / 2"}), "derived trait half"),
        (dict(traits=(SIZE,), relations=("sise > 1",)), "'sise', which is not a trait"),
        (dict(traits=(SIZE,), relations=("size >",)), "is not an expression"),
        (dict(traits=(TOKENS,)), "has no reader"),
        (dict(traits=(SIZE,), dynamic=READ), "reads 'tokens', which is no dynamic trait"),
        (dict(traits=(TOKENS,), dynamic=READ, derived={"twice": "tokens * 2"}), "reads the dynamic trait 'tokens'"),
        (dict(traits=(TOKENS,), dynamic=READ, relations=("tokens > 3",)), "reads the dynamic trait 'tokens'"),
        (dict(traits=(Trait("tokens", "int", "performance", dynamic=True),), dynamic=READ), "can't be cut into ranges"),
        (
            dict(traits=(Trait("tokens", "str", "performance", default="a", dynamic=True),), dynamic=READ),
            "can't be cut into ranges",
        ),
    ],
)
def test_a_contract_is_checked_when_it_is_loaded(attributes, message):
    with pytest.raises(TraitError) as caught:
        TraitSpace("toy.op", type("C", (Contract,), attributes))
    assert message in str(caught.value)


def test_a_bad_contract_is_named_with_the_line_of_the_file(toy):
    module = toy.module(
        "from kernel_registry.contract import Contract\nclass C(Contract):\n    derived = {'a': 'b'}\n"
        "class D:\n    pass\n"
    )
    for name, kind in (("C", TraitError), ("D", TargetError), ("E", TargetError)):
        path = toy.write(SILENT.replace("{contract}", f"{module}:{name}"))
        with pytest.raises(kind) as caught:
            toy.registry(path).catalog
        assert caught.value.where == f"{path}:4" and f"{module}:{name}" in str(caught.value)


def test_a_derived_trait_without_a_value_is_an_error(toy):
    space = TraitSpace(
        "toy.op",
        type(
            "C",
            (Contract,),
            dict(traits=(SIZE, Trait("by", "int", "performance", minimum=0)), derived={"part": "size // by"}),
        ),
    )
    with pytest.raises(TraitError, match="part = size // by has no value"):
        space.request({"size": 8, "by": 0}, lambda: None)


def test_every_error_of_the_engine_is_a_registry_error():
    assert all(issubclass(e, RegistryError) for e in (DocumentError, NoImplementationError, OverrideError, TraitError))


# ---- Python, the last resort -----------------------------------------------------------------------------------------

CHECKS = """
def odd(traits):
    return None if traits["size"] % 2 else f"size {traits['size']} is even"

def yes(traits):
    return True

def none(traits):
    return None

def broken(traits):
    raise KeyError("nothing here")

seen = []

def records(traits):
    seen.append(dict(traits))
    traits.clear()
"""


def test_a_python_check_decides_and_its_reason_is_told(toy):
    checks = toy.module(CHECKS)
    registry = toy.registry({"a": {"python": [f"{checks}:odd"]}, "b": {"when": {}, "fallback": True}})
    assert registry.dispatch(toy.OP, size=7).name == "a" and registry.dispatch(toy.OP, size=8).name == "b"
    assert f"{checks}:odd: size 8 is even" in registry.explain(toy.OP, size=8).text()


@pytest.mark.parametrize(
    "check, kind, message",
    [
        ("yes", DocumentError, "returned True; a check returns None or the reason"),
        ("broken", TargetError, "failed: KeyError: 'nothing here'"),
        ("gone", TargetError, "has no 'gone'"),
    ],
)
def test_a_check_that_gives_no_reason_is_an_error_with_its_line(toy, check, kind, message):
    checks = toy.module(CHECKS)
    path = toy.write(SILENT.replace("platform: any", f"platform: any, python: ['{checks}:{check}']"))
    registry = toy.registry(path)
    for ask in (registry.dispatch, registry.explain):
        with pytest.raises(kind) as caught:
            ask(toy.OP, size=8, contiguous=True)
        assert caught.value.where == f"{path}:8" and message in str(caught.value)


def test_checks_see_static_traits_that_the_rest_admits_and_can_not_change_them(toy):
    checks = toy.module(CHECKS)
    registry = toy.registry(
        {
            "a": {"size": {"min": 4}, "python": [f"{checks}:records", f"{checks}:odd"]},
            "b": {"when": {}, "fallback": True},
        }
    )
    assert registry.dispatch(toy.OP, size=2).name == "b"
    assert registry.dispatch(toy.OP, size=5, num_tokens=3).name == "a"
    import sys

    seen = sys.modules[checks].seen
    assert seen and all(s["size"] == 5 and "num_tokens" not in s and "contiguous" not in s for s in seen)


@pytest.mark.parametrize("python", ["m:f", ["m.f"], [3], [None], [], {"m": "f"}])
def test_the_form_of_python(toy, python):
    with pytest.raises(DocumentError):
        toy.registry({"a": {"python": python}}).catalog
