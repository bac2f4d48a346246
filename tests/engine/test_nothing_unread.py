"""Rule 7: nothing is declared that nothing reads. Every key of a file and attribute of a contract has a reader."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import kernel_registry
from kernel_registry.contract import Contract, Request, Workload
from kernel_registry.errors import RegistryError
from kernel_registry.schema import (
    ImplementationEntry,
    OpEntry,
    OverrideEntry,
    OverrideFile,
    RegistryFile,
    TilesEntry,
    TilesFile,
    VariantEntry,
    Versions,
    json_schema,
)
from kernel_registry.traits.trait import KINDS, TYPES, Trait

ENGINE = Path(kernel_registry.__file__).parent


def reads(*, without=()) -> dict[str, set[str]]:
    """Attribute name -> the engine's modules that read an attribute of that name."""
    found: dict[str, set[str]] = {}
    for path in ENGINE.rglob("*.py"):
        if path.relative_to(ENGINE).parts[0] in ("ops", "traits") or path.name in without:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.setdefault(node.attr, set()).add(path.name)
    return found


@pytest.mark.parametrize(
    "model",
    [RegistryFile, OpEntry, ImplementationEntry, VariantEntry, OverrideFile, OverrideEntry, TilesFile, TilesEntry],
)
def test_every_key_of_a_file_is_read(model):
    readers = reads(without=("schema.py",))
    by_name = {"use", "prefer", "disable"}  # read by overrides.py through ACTIONS
    by_validate = {"version"}  # read where the file is validated, see test_document
    for name in model.model_fields:
        assert name in readers or name in by_name | by_validate, f"{model.__name__}.{name} has no reader"


BASE = {"when": {"size": 8}}
# key -> (an entry with it, what to look at): that a reader of that name exists is not enough
EFFECTS = {
    "target": ({"target": "gone_module:f"}, lambda r, op: r.dispatch(op, size=8)(None)),
    "options": ({"options": {"rows": 2}}, lambda r, op: r.dispatch(op, size=8).name),
    "summary": ({"summary": "one line"}, lambda r, op: r.catalog.op(op).by_name["a"].summary),
    "when": ({"when": {"size": 9}}, lambda r, op: r.dispatch(op, size=8).name),
    "rank": ({"rank": 7}, lambda r, op: r.catalog.op(op).by_name["a"].precedence),
    "fallback": ({"when": {}, "fallback": True}, lambda r, op: r.catalog.op(op).by_name["a"].precedence),
    "numerics": ({"numerics": "bits"}, lambda r, op: r.catalog.op(op).by_name["a"].numerics),
    "accepts_output_alias": ({"accepts_output_alias": True}, lambda r, op: r.catalog),  # see also test_aliasing
    "prepare": ({"prepare": "some.module:f"}, lambda r, op: r.catalog),  # see also test_prepare
    "tiles": ({"tiles": "some.module"}, lambda r, op: r.dispatch(op, size=8).name),
    "variants": ({"variants": {"many": {"when": {"num_tokens": {"min": 9}}}}}, lambda r, op: r.bind(op, size=8).name),
}


@pytest.mark.parametrize("key", EFFECTS)
def test_every_key_of_an_implementation_has_an_effect(toy, key):
    entry, look = EFFECTS[key]

    def seen(a):
        registry = toy.registry(
            {"a": a, "b": {"when": {"size": {"min": 1}}, "rank": -9, "target": f"{toy.targets}:b"}}
            if key != "fallback"
            else {"a": a}
        )
        try:
            return look(registry, toy.OP)
        except RegistryError as error:
            return type(error)

    assert seen({**BASE, **entry}) != seen(BASE)


def test_the_versions_of_a_row_are_those_that_are_compared():
    from kernel_registry.tile_files import PACKAGES

    assert tuple(Versions.model_fields) == PACKAGES


def test_every_key_of_an_implementation_is_tested_for_its_effect():
    assert set(EFFECTS) == set(ImplementationEntry.model_fields)


def test_every_key_of_an_override_has_an_effect(toy):
    base = {"use": "b"}
    others = {
        "op": {"op": "other.op", "use": "c"},
        "use": {"use": "a"},
        "prefer": {"prefer": "a"},
        "disable": {"disable": "b"},
        "when": {"use": "b", "when": {"size": 9}},
        "model": {"use": "b", "model": "draft"},
        "reason": {"use": "b", "reason": "why"},
    }
    assert set(others) == set(OverrideEntry.model_fields)

    def seen(entry):
        both = toy.file({"a": {}, "b": {"when": {}, "fallback": True}})
        import yaml

        data = yaml.safe_load(both.read_text())
        data["ops"]["other.op"] = {"contract": toy.contract, "implementations": toy.entries({"c": {}})}
        both.write_text(yaml.safe_dump(data, sort_keys=False))
        registry = toy.registry(both)
        path = toy.overrides(entry, name="o.yaml")
        registry.load_overrides(path)
        return registry.explain(toy.OP, size=8).text().replace(str(both), "")

    plain = seen(base)
    assert all(seen(entry) != plain for entry in others.values())


@pytest.mark.parametrize("cls", [Contract, Workload, Request, Trait])
def test_every_attribute_of_a_contract_is_read(cls):
    """Outside the class: a name that only its own declaration knows is one that nothing reads."""
    own = Path(inspect.getsourcefile(cls)).name
    names = [n for n in vars(cls) if not n.startswith("_") and n != "doc"]
    assert names
    readers = reads()
    source = "".join(
        p.read_text() for p in (ENGINE / "traits", ENGINE.parent / "traits") if p.is_dir() for p in p.glob("*.py")
    )
    for name in names:
        where = readers.get(name, set())
        assert where - {own} or where or f".{name}" in source, f"{cls.__name__}.{name} has no reader"


def test_contract_attributes_are_read_outside_contract_py():
    readers = reads(without=("contract.py",))
    in_space = {"traits", "derived", "relations"}  # TraitSpace, in contract.py itself, is their reader
    for name in (n for n in vars(Contract) if not n.startswith("_")):
        assert name in readers or name in in_space, f"Contract.{name} has no reader"


def test_every_kind_of_trait_means_something_else(toy):
    """Silence: semantic and layout pin, performance does not, platform must be mentioned. See test_fail_closed."""
    assert set(KINDS) == {"semantic", "layout", "performance", "platform"} and set(TYPES) == {
        "int",
        "bool",
        "str",
        "dtype",
        "platform",
    }


def test_the_json_schema_has_exactly_the_keys_that_are_read():
    for kind, top, entry in (
        ("registry", RegistryFile, ImplementationEntry),
        ("overrides", OverrideFile, OverrideEntry),
        ("tiles", TilesFile, TilesEntry),
    ):
        schema = json_schema(kind)
        assert schema["$schema"].startswith("https://json-schema.org/") and set(schema["properties"]) == set(
            top.model_fields
        )
        definition = schema["$defs"][entry.__name__]
        assert set(definition["properties"]) == set(entry.model_fields) and definition["additionalProperties"] is False


@pytest.mark.parametrize("place", ["top", "op", "implementation", "when"])
def test_an_unknown_key_is_refused_with_a_suggestion_everywhere(toy, place):
    wrong = {
        "top": "version: 1\nop: {}\nops: {}\n",
        "op": "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementation: {}\n",
        "implementation": "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n"
        "      a: {target: 'm:f', when: {platform: any}, priority: 3, ranc: 3}\n",
        "when": "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n"
        "      a: {target: 'm:f', when: {platform: any, relation: [size > 3]}}\n",
    }[place]
    with pytest.raises(RegistryError) as caught:
        toy.registry(wrong).catalog
    assert "unknown key" in str(caught.value) or "no trait" in str(caught.value)
    assert caught.value.hint
