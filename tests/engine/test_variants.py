"""`variants`: one entry for a kernel that is tuned for several ranges. Each variant becomes an implementation."""

from __future__ import annotations

import json
import re

import pytest
from engine_support import call
from variants_support import KERNELS, MANY, text

from kernel_registry.errors import (AmbiguityError, DocumentError, OverrideError, PlanError, RegistryError,
                                    UnknownNameError)
from kernel_registry.schema import json_schema


def refused(toy, *lines):
    """What loading a file says whose variant `b`, on line 14, has `lines` from line 16 on."""
    path = toy.write(text(*lines))
    with pytest.raises(RegistryError) as caught:
        toy.registry(path).catalog
    file, _, line = str(caught.value.where).rpartition(":")
    assert file == str(path)
    return caught.value, int(line)


def implementations(toy, source):
    return toy.registry(source).catalog.op(toy.OP).by_name


# ---- what a variant becomes ------------------------------------------------------------------------------------------


def test_variants_are_the_entries_that_one_would_write_out(toy, family):
    def shown(entry):
        box = {name: values.text for name, values in entry.box.sets.items()}
        return box, *(getattr(entry, name) for name in ("target", "numerics", "fallback", "rank", "options"))

    whole = {name: value for name, value in family["a"].items() if name != "variants"}
    written = {"a": whole}
    for name, variant in family["a"]["variants"].items():
        written[f"a.{name}"] = {
            **whole,
            "options": {**whole["options"], **variant["options"]},
            "when": {**whole["when"], **variant["when"]},
        }
    short, long = implementations(toy, {"a": family["a"]}), implementations(toy, written)
    assert {name: shown(entry) for name, entry in short.items()} == {name: shown(long[name]) for name in long}
    assert [short[name].variant_of for name in ("a", "a.pairs", "a.quads")] == ["", "a", "a"]


def test_options_are_laid_over_by_key_and_the_narrower_goes_first(toy, family):
    registry = toy.registry(family)
    names = [implementation.name for implementation in registry.catalog.op(toy.OP).implementations]
    assert names == ["a.quads", "a.pairs", "a", "rest"]
    kernel = registry.bind(toy.OP, size=8)
    assert kernel.name == "a|.pairs|.quads"
    assert [kernel(call(tokens)) for tokens in (63, 64, 512)] == [(1, "late"), (2, "late"), (4, "early")]
    assert registry.bind(toy.OP, size=32).name == "a"


def test_a_variant_has_its_own_place_summary_and_rank_or_those_of_its_implementation(toy):
    more = "        rank: 1\n        summary: one\n        target: {targets}:a"
    path = toy.write(text("rank: 3", "when: {size: 8}").replace("        target: {targets}:a", more))
    found = implementations(toy, path)
    assert [(found[n].summary, found[n].rank, found[n].where) for n in ("a", "a.b")] == [
        ("one", 1, f"{path}:6"),
        ("another", 3, f"{path}:16"),
    ]
    path.write_text(path.read_text().replace("            summary: another\n", "").replace("            rank: 3\n", ""))
    assert [(i.summary, i.rank) for name, i in implementations(toy, path).items() if name != "c"] == [("one", 1)] * 2


def test_lines_of_when_replace_and_relations_and_checks_are_added(toy):
    module = toy.module(KERNELS)
    entry = {
        "when": {"size": {"max": 32}, "groups": {"max": 4}, "relations": ["size > 1"], "python": [f"{module}:refuse"]},
        "variants": {"b": {"when": {"size": {"max": 16}, "relations": ["size > 2 * groups"]}}},
    }
    registry = toy.registry({"a": entry, "rest": {"when": {"size": 13, "groups": "any"}, "rank": -1}})
    box = registry.catalog.op(toy.OP).by_name["a.b"].box
    assert [relation.text for relation in box.relations] == ["size > 1", "size > 2 * groups"]
    assert [check.target for check in box.checks] == [f"{module}:refuse"]
    assert (box.sets["size"].text, box.sets["groups"].text) == ("<= 16", "<= 4")
    winners = {size: registry.dispatch(toy.OP, size=size).name for size in (2, 3, 13, 16, 17)}
    assert winners == {2: "a", 3: "a.b", 13: "rest", 16: "a.b", 17: "a"}
    more = {**entry, "variants": {"b": {"when": {"python": [f"{module}:narrow"]}}}}
    checks = implementations(toy, {"a": more})["a.b"].box.checks
    assert [check.target for check in checks] == [f"{module}:refuse", f"{module}:narrow"]


def test_every_key_of_a_variant_has_an_effect(toy, family):
    from kernel_registry.schema import VariantEntry

    def seen(**more):
        registry = toy.registry({"a": {**family["a"], "variants": {"b": {"when": MANY, **more}}}})
        b = registry.catalog.op(toy.OP).by_name["a.b"]
        return b.summary, b.rank, registry.bind(toy.OP, size=8)(call(300))

    others = {"options": {"rows": 8}, "summary": "other", "rank": 5, "when": {"num_tokens": {"min": 512}}}
    assert set(others) == set(VariantEntry.model_fields)
    for key, value in others.items():
        assert seen(**{key: value}) != seen(options={"rows": 2}) != seen()


# ---- order -----------------------------------------------------------------------------------------------------------


def test_two_variants_that_overlap_with_neither_inside_the_other_need_a_rank(toy):
    variants = {"b": {"when": {"size": {"max": 16}}}, "d": {"when": MANY}}
    path = toy.file({"a": {"when": {}, "variants": variants}})
    with pytest.raises(AmbiguityError, match=r"a\.b \(.*a\.d \(.*neither box is inside the other"):
        toy.registry(path).catalog
    variants["d"]["rank"] = 1
    assert toy.registry({"a": {"when": {}, "variants": variants}}).bind(toy.OP, size=8).name == "a.b|a.d"


def test_two_variants_with_the_same_box_are_ambiguous(toy):
    variants = {"b": {"when": MANY}, "d": {"when": MANY}}
    with pytest.raises(AmbiguityError, match="declare the same box"):
        toy.registry({"a": {"when": {}, "variants": variants}}).catalog


def test_a_variant_of_lower_rank_than_its_implementation_could_never_be_chosen(toy):
    error, line = refused(toy, "rank: -1", "when: {size: 8}")
    assert isinstance(error, AmbiguityError) and line == 14 and "a.b has rank -1" in error.message


# ---- what is refused when the file is read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when, line, apart",
    [
        (["size: {max: 64}"], 17, "size is <= 64, a serves <= 32"),
        (["size: any"], 17, "size is any, a serves <= 32"),
        (["size: {min: 33}"], 17, "size is >= 33, a serves <= 32"),
        (["num_tokens: 8", "platform: any"], 18, "platform is any, a serves cuda>=sm_80|cpu"),
        (["num_tokens: 8", "has_bias: false"], 18, "has_bias is false, a serves true"),  # a does not mention it
        (["size: 33", "groups: 5"], 18, "groups is 5, a serves <= 4; size is 33, a serves <= 32"),
    ],
)
def test_a_variant_that_is_not_inside_its_implementation_is_refused(toy, when, line, apart):
    error, at = refused(toy, "when:", *(f"  {entry}" for entry in when))
    assert isinstance(error, DocumentError) and at == line
    assert error.message.startswith("a.b is not provably inside a (")
    assert error.message.endswith(f"whose variant it is: {apart}")
    assert ":6)" in error.message and "widen a" in error.hint


@pytest.mark.parametrize(
    "when", ["{}", "{size: {max: 32}}", "{groups: [1, 2, 3, 4]}", "{dtype: float32}", "{relations: [size > 1]}"]
)
def test_a_variant_with_the_box_of_its_implementation_is_refused(toy, when):
    error, line = refused(toy, f"when: {when}")
    assert isinstance(error, DocumentError) and line == 14
    assert error.message.startswith("a.b declares the same box as a (") and "narrow it" in error.hint


@pytest.mark.parametrize(
    "lines, line, message, hint",
    [
        (["variants: {d: {when: {size: 8}}}"], 16, "unknown key 'variants'", "only an implementation has `variants`"),
        (["target: m:f", "when: {size: 8}"], 16, "unknown key 'target'", "only an implementation has `target`"),
        (["option: {rows: 2}", "when: {size: 8}"], 16, "unknown key 'option'", "did you mean 'options'?"),
        (["rank: 1"], 14, "variants.b.when is missing", "add `when"),
        (["when: {size: 8, sise: 8}"], 16, "toy.op has no trait 'sise'", "did you mean 'size'"),
        (["when:", "  size: eight"], 17, "size: ", "size is a int"),
        (["when:", "  relations: size > 2"], 17, "expected a list of text", ""),
        (["when:", "  relations:", "  - size > 2", "  - len(size)"], 19, "len", ""),
        (["when: {size: 8}", "options:", "  rows: 2", "  size: 8"], 19, "option 'size' of a.b is a trait", "`when`"),
        (["when: {size: 8}", "options: {rows: [1]}"], 17, "expected text, a finite number", ""),
    ],
)
def test_an_error_in_a_variant_points_to_its_line(toy, lines, line, message, hint):
    error, at = refused(toy, *lines)
    assert at == line and message in error.message and hint in error.hint


@pytest.mark.parametrize("name", ["x.y", "2b", "'b c'", "''"])
def test_a_variant_has_a_plain_name(toy, name):
    path = toy.write(text("when: {size: 8}").replace("          b:\n", f"          {name}:\n"))
    with pytest.raises(DocumentError, match="String should match pattern") as caught:
        toy.registry(path).catalog
    assert caught.value.where == f"{path}:14"


@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_is_written_out_and_a_variant_is_refused(toy, first):
    out = {"a.b": {"size": 9}}
    both = {"a": {"when": {}, "variants": {"b": {"when": MANY}}}}
    path = toy.file({**out, **both} if first else {**both, **out})
    with pytest.raises(DocumentError, match="two implementations called 'a.b'") as caught:
        toy.registry(path).catalog
    lines = path.read_text().splitlines()
    assert lines[int(caught.value.where.rpartition(":")[2]) - 1].strip() == ("b:" if first else "a.b:")


def test_the_json_schema_knows_variants(toy):
    for kind in ("registry", "overrides"):
        definitions = json_schema(kind)["$defs"]
        (entry,) = definitions["ImplementationEntry"]["properties"]["variants"]["patternProperties"].items()
        assert entry == (r"^[A-Za-z][\w\-]*$", {"$ref": "#/$defs/VariantEntry"})
        variant = definitions["VariantEntry"]
        assert set(variant["properties"]) == {"summary", "options", "when", "rank"}
        assert variant["required"] == ["when"] and variant["additionalProperties"] is False


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_disabling_an_implementation_disables_its_variants(toy, family):
    other = {"target": f"{toy.targets}:other", "when": {"size": 8, "num_tokens": {"min": 9000}}}
    family["a.other"] = other  # written out: its name alone does not make it a variant
    family["ab"] = {"when": {"size": {"min": 33}}}
    registry = toy.registry(family)
    kernel = registry.bind(toy.OP, size=8)
    registry.load_overrides(toy.overrides({"disable": "a", "when": {"size": 8}}))
    assert kernel.name == "rest|a.other"
    assert registry.bind(toy.OP, size=16).name == "a|.pairs" and registry.bind(toy.OP, size=64).name == "ab"


def test_disabling_a_variant_disables_it_only(toy, family):
    registry = toy.registry(family)
    registry.load_overrides(toy.overrides({"disable": "a.pairs"}))
    assert registry.bind(toy.OP, size=8).name == "a|.quads"


def test_disabling_works_from_contexts_and_the_environment_too(toy, family, monkeypatch):
    registry = toy.registry(family)
    with registry.disable(toy.OP, "a", size=8):
        assert registry.bind(toy.OP, size=8).name == "rest"
        assert registry.bind(toy.OP, size=9).name == "a|.pairs"
    with registry.disable(toy.OP, "a.quads"):
        assert registry.bind(toy.OP, size=8).name == "a|.pairs"
    assert registry.bind(toy.OP, size=8).name == "a|.pairs|.quads"
    monkeypatch.setenv("KERNEL_REGISTRY_OVERRIDES", str(toy.overrides({"disable": "a"})))
    assert toy.registry(family, environment=True).bind(toy.OP, size=8).name == "rest"


def test_disabling_inside_a_model_reaches_its_variants_there_only(toy, family):
    registry = toy.registry(family)
    registry.load_overrides(toy.overrides({"disable": "a", "model": "draft"}))
    with registry.model("draft"):
        assert registry.bind(toy.OP, size=8).name == "rest"
    assert registry.bind(toy.OP, size=8).name == "a|.pairs|.quads"


@pytest.mark.parametrize("action", ["use", "prefer"])
def test_using_an_implementation_leaves_its_variants_to_the_order(toy, family, action):
    family["first"] = {"when": {"size": {"max": 64}, "relations": ["size > 0"]}, "rank": 9}
    registry = toy.registry(family)
    assert registry.bind(toy.OP, size=8).name == "first"
    with registry.override(toy.OP, "a", prefer=action == "prefer"):
        assert registry.bind(toy.OP, size=8).name == "a|.pairs|.quads"
        with registry.disable(toy.OP, "a.quads"):
            assert registry.bind(toy.OP, size=8).name == "a|.pairs"
    registry.load_overrides(toy.overrides({action: "a", "when": {"size": [8, 64]}}))
    assert registry.bind(toy.OP, size=8).name == "a|.pairs|.quads" and registry.bind(toy.OP, size=9).name == "first"
    if action == "use":
        with pytest.raises(OverrideError, match="`use a: .*size is 64, serves <= 32"):
            registry.bind(toy.OP, size=64)
    else:
        assert registry.bind(toy.OP, size=64).name == "first"


def test_using_a_variant_means_that_one(toy, family):
    registry = toy.registry(family)
    with registry.override(toy.OP, "a.pairs", prefer=True):
        assert registry.bind(toy.OP, size=8).name == "a|.pairs"
    with registry.override(toy.OP, "a.pairs"):
        with pytest.raises(OverrideError, match="num_tokens is 3, serves >= 64"):
            registry.dispatch(toy.OP, size=8, num_tokens=3)


def test_a_call_that_names_its_implementation_means_that_one(toy, family):
    registry = toy.registry(family)
    assert registry.dispatch(toy.OP, size=8, implementation="a").name == "a"
    assert registry.dispatch(toy.OP, size=8, num_tokens=999, implementation="a.pairs").name == "a.pairs"
    explanation = registry.explain(toy.OP, size=8, num_tokens=999, implementation="a")
    assert explanation.winner == "a"
    assert "     a.pairs  could serve, but another was asked for" in explanation.text().splitlines()
    with pytest.raises(UnknownNameError, match=r"did you mean 'a\.pairs'"):
        registry.dispatch(toy.OP, size=8, implementation="a.pair")


def test_a_variant_is_as_disabled_as_its_implementation_when_it_is_asked_for(toy, family):
    registry = toy.registry(family)
    path = toy.overrides({"disable": "a", "reason": "incident 12"}, {"use": "a.pairs", "when": MANY})
    registry.load_overrides(path)
    with pytest.raises(OverrideError, match=r"disabled by a layer at least as strong \(disable a: .*incident 12"):
        registry.dispatch(toy.OP, size=8, num_tokens=99)
    registry = toy.registry(family)
    registry.load_overrides(toy.overrides({"disable": "a"}))
    with registry.override(toy.OP, "a.pairs", num_tokens=99):  # a stronger layer
        assert registry.dispatch(toy.OP, size=8, num_tokens=99).name == "a.pairs"


@pytest.mark.parametrize("prefer", [False, True])
def test_asking_for_an_implementation_leaves_out_the_variants_that_weaker_layers_disable(toy, family, prefer):
    registry = toy.registry(family)
    out = {"disable": "a.pairs", "when": {"num_tokens": {"max": 99}}, "reason": "incident 12"}
    registry.load_overrides(toy.overrides(out))
    with registry.override(toy.OP, "a", prefer=prefer):
        names = [registry.dispatch(toy.OP, size=8, num_tokens=n).name for n in (5, 99, 100, 600)]
        assert names == ["a", "a", "a.pairs", "a.quads"]
        assert registry.dispatch(toy.OP, size=8).table.winners() == ("a", "a.pairs", "a.quads")
        told = str(registry.explain(toy.OP, size=8, num_tokens=99))
        assert re.search(r"override  disable a\.pairs: .*incident 12\): in force", told)
        assert "-> a  [" in told
    registry.load_overrides(toy.overrides({"disable": "a"}))
    with registry.override(toy.OP, "a", prefer=prefer):  # the name brings back what the name took away
        assert registry.dispatch(toy.OP, size=8, num_tokens=600).name == "a.quads"
    with registry.override(toy.OP, "a.pairs", prefer=prefer):
        assert registry.dispatch(toy.OP, size=8, num_tokens=99).name == "a.pairs"


def test_one_file_may_not_ask_for_an_implementation_and_for_its_variant(toy, family):
    with pytest.raises(AmbiguityError, match="match the same calls"):
        toy.registry(family).load_overrides(toy.overrides({"use": "a"}, {"use": "a.pairs"}))


# ---- plans -----------------------------------------------------------------------------------------------------------


def frozen(toy, family, rows=2):
    pairs = {**family["a"]["variants"]["pairs"], "options": {"rows": rows}}
    a = {**family["a"], "variants": {**family["a"]["variants"], "pairs": pairs}}
    registry = toy.registry({**family, "a": a})
    registry.bind(toy.OP, size=8)
    return registry.freeze(batch_invariant=True)


def test_a_plan_with_variants_loads_again_and_gives_the_same_plan(toy, family, tmp_path):
    plan = frozen(toy, family)
    (entry,) = json.loads(plan.text())["calls"]
    assert [row["implementation"] for row in entry["table"]] == ["a", "a.pairs", "a.quads"]
    assert entry["options"] == {
        "a": {"launch": "late"},
        "a.pairs": {"launch": "late", "rows": 2},
        "a.quads": {"launch": "early", "rows": 4},
    }
    plan.save(tmp_path / "plan.json")
    registry = toy.registry(family)
    registry.load_plan(tmp_path / "plan.json")
    kernel = registry.bind(toy.OP, size=8)
    assert [kernel(call(tokens))[0] for tokens in (63, 64, 512)] == [1, 2, 4]
    assert registry.freeze().text() == plan.text() and registry.freeze().fingerprint == plan.fingerprint


def test_a_row_of_a_plan_means_the_one_that_it_names(toy, family):
    whole = {name: value for name, value in family["a"].items() if name != "variants"}
    registry = toy.registry({**family, "a": whole})
    registry.bind(toy.OP, size=8)
    plan = registry.freeze()
    registry = toy.registry(family)
    registry.load_plan(plan)
    assert registry.bind(toy.OP, size=8).name == "a"


def test_a_changed_option_of_a_variant_changes_the_fingerprint_and_refuses_the_plan(toy, family):
    one, two = frozen(toy, family), frozen(toy, family, rows=8)
    assert one.fingerprint != two.fingerprint and one.fingerprint == frozen(toy, family).fingerprint
    assert [line.partition("): ")[2] for line in one.diff(two)] == ["option rows of a.pairs: 2 -> 8"]
    with pytest.raises(PlanError, match=r"the options of a\.pairs changed since the plan was frozen"):
        toy.registry(family).load_plan(two)
