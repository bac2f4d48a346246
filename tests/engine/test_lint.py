"""What lint finds without a GPU: what is never chosen, serves nothing, is not there, or nobody serves."""

from __future__ import annotations

import sys

import pytest

from kernel_registry import shipped_registry
from kernel_registry.coverage import search
from kernel_registry.lint import lint_catalog, lint_file

ALL = {"groups": "any", "scoring": "any", "has_bias": "any", "dtype": "any", "contiguous": "any", "platform": "any"}


def found(toy, implementations):
    return [str(f) for f in lint_catalog(toy.registry(implementations).catalog)]


def messages(toy, implementations):
    return [f.partition("warning: ")[2] for f in found(toy, implementations)]


def test_the_shipped_registry_is_clean():
    assert lint_file(shipped_registry()) == []


def test_a_total_registry_is_clean(toy):
    assert found(toy, {"a": {"size": 8}, "everything": {"when": ALL, "fallback": True}}) == []


def test_one_that_is_never_chosen(toy):
    path = toy.file(
        {"a": {"when": {"size": 8}, "rank": 1}, "b": {"size": [8]}, "everything": {"when": ALL, "fallback": True}}
    )
    (finding,) = lint_catalog(toy.registry(path).catalog)
    assert finding.level == "warning" and finding.where == f"{path}:13"
    assert finding.message.startswith(f"b is never chosen: a ({path}:6) has the same box")


def test_one_that_serves_nothing(toy):
    for when in (
        {"size": {"max": 4}, "groups": {"min": 5}},  # the contract: size % groups == 0
        {"size": {"max": 4}, "per_group": {"min": 5}},
        {"size": 8, "relations": ["size > 8"]},
    ):
        lines = messages(toy, {"none": when, "everything": {"when": ALL, "fallback": True}})
        assert len(lines) == 1 and lines[0].startswith("none serves nothing")


def test_a_relation_that_no_tried_size_satisfies_is_not_called_proof(toy):
    """7 divides no size that lint tries on its own: the implementation is fine."""
    assert (
        found(
            toy,
            {
                "sevens": {"size": {"min": 3}, "relations": ["size % 7 == 0"]},
                "everything": {"when": ALL, "fallback": True},
            },
        )
        == []
    )
    assert (
        found(
            toy,
            {
                "sevens": {"size": {"min": 3}, "relations": ["size == 3 * 131"]},
                "everything": {"when": ALL, "fallback": True},
            },
        )
        == []
    )


@pytest.mark.parametrize(
    "missing, value, shown",
    [
        ("groups", 1, "groups="),
        ("scoring", {"not": "sqrt"}, "scoring=sqrt"),
        ("has_bias", True, "has_bias=false"),
        ("contiguous", True, "contiguous=false"),
        ("platform", {"not": "cpu"}, "platform=cpu"),
        ("size", {"max": 1000}, "size=1001"),
        ("size", {"not": 77}, "size=77"),
        ("num_tokens", {"min": 1}, "num_tokens=0"),
        ("num_tokens", {"max": 4096}, "num_tokens=4097"),
        ("dtype", ["float32"], "dtype="),
        ("dtype", {"not": "bfloat16"}, "dtype=bfloat16"),
        ("per_group", {"max": 128}, "size="),
    ],
)
def test_a_gap_is_found_with_a_witness_that_dispatch_refuses(toy, missing, value, shown):
    registry = toy.registry({"everything": {"when": {**ALL, missing: value}, "fallback": True}})
    (finding,) = lint_catalog(registry.catalog)
    assert "nothing serves" in finding.message and shown in finding.message
    op = registry.catalog.op(toy.OP)
    witness = search(
        op, lambda t: not any(i.box.admits(t) for i in op.implementations), op.implementations, covered=True
    ).witness
    call = {n: v for n, v in witness.items() if n in op.space.traits}
    assert registry.explain(toy.OP, **call).winner is None


def test_the_gap_between_two(toy):
    (line,) = messages(toy, {"low": {**ALL, "size": {"max": 64}}, "high": {**ALL, "size": {"min": 66}}})
    assert "nothing serves size=65," in line


def test_an_architecture_that_does_not_exist(toy):
    lines = messages(
        toy, {"a": {"platform": ["cuda>=sm_80", "sm_97", "hip>gfx1250"]}, "everything": {"when": ALL, "fallback": True}}
    )
    assert [line.partition(" matches")[0] for line in lines] == ["a: platform sm_97", "a: platform hip>gfx1250"]


def test_a_module_that_is_not_there(toy):
    path = toy.file(
        {"a": {"target": "gone_module.kernels:f", "when": {"size": 8}}, "everything": {"when": ALL, "fallback": True}}
    )
    (finding,) = lint_file(path)
    assert (
        finding.where == f"{path}:6"
        and "a: the module of target 'gone_module.kernels:f' is not installed" in finding.message
    )


def test_an_op_without_implementations(toy):
    (finding,) = lint_file(toy.file({}))
    assert finding.message == "toy.op has no implementation"


def test_errors_of_loading_are_findings(toy):
    path = toy.file({"a": {"size": {"max": 9}}, "b": {"size": {"min": 5}}})
    (finding,) = lint_file(path)
    assert (
        finding.level == "error"
        and finding.where.startswith(f"{path}:")
        and "nothing says which goes first (narrow" in finding.message
    )
    (finding,) = lint_file(toy.folder / "gone.yaml")
    assert finding.level == "error" and "can't be read" in finding.message
    assert str(finding).startswith(f"{toy.folder / 'gone.yaml'}: error: can't be read")


def test_a_check_that_can_not_be_asked_is_a_finding_and_the_rest_is_still_linted(toy):
    path = toy.file(
        {
            "a": {"python": ["gone_module:f"], "size": 8},
            "b": {"platform": ["sm_97"], "size": 9},
            "everything": {"when": ALL, "fallback": True},
        }
    )
    lines = [str(f) for f in lint_file(path)]
    assert any("error: target 'gone_module:f' can't be imported" in line for line in lines), lines
    assert any("platform sm_97 matches none" in line for line in lines)


def test_lint_imports_no_target(toy):
    module = toy.module("def f(**t):\n    return lambda x: 1\n")
    assert found(toy, {"a": {"target": f"{module}:f", "when": ALL}}) == []
    assert module not in sys.modules


def test_a_trait_of_free_text_is_covered_by_any_only(toy):
    module = toy.module(
        "from kernel_registry.contract import Contract\nfrom kernel_registry.traits.trait import Trait\n"
        "class C(Contract):\n    traits = (Trait('layout', 'str', 'semantic'), Trait('kind', 'dtype', 'performance'),"
        " Trait('platform', 'platform', 'platform'))\n"
    )
    text = (
        "version: 1\nops:\n  toy.op:\n    contract: "
        + module
        + ":C\n    implementations:\n      a:\n        target: {targets}:a\n"
        "        when: {platform: any, layout: %s}\n"
    )
    assert lint_catalog(toy.registry(text % "any").catalog) == []
    (finding,) = lint_catalog(toy.registry(text % "[nhd, hnd]").catalog)
    assert "nothing serves layout=" in finding.message


def test_ten_thousand_implementations_are_linted_within_the_budget_of_the_search(shared_toy, monkeypatch):
    """Structure, not time: the search gives up rather than try every combination."""
    implementations = {f"k{i}": {**ALL, "size": {"min": 10 * i + 1, "max": 10 * (i + 1)}} for i in range(300)}
    catalog = shared_toy.registry(implementations).catalog
    (finding,) = lint_catalog(catalog)
    assert "nothing serves" in finding.message and "size=3001" in finding.message
