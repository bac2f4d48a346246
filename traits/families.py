"""Reads families.yaml: which config field, or constant, gives each trait of a model family. Data in, dataclasses out.

The file is checked whole when it is read: an unknown key, a trait that the op does not have, a constant that the trait
refuses, a model_type claimed twice, and a key written twice are errors that name the place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Mapping

from .experts import (ACTIVATION, APPLY_ROUTER_WEIGHT_ON_INPUT, DTYPE, HAS_BIAS, HIDDEN_SIZE, INTERMEDIATE_SIZE)
from .moe import TOPK_TRAITS
from .trait import TraitValueError, close

TRAITS = {trait.name: trait for trait in TOPK_TRAITS if trait.type != "platform" and not trait.dynamic}
NEEDED = ("num_experts", "topk", "scoring", "has_bias", "renormalize")  # no family leaves these to a neutral value
EXPERTS_TRAITS = {trait.name: trait for trait in (HIDDEN_SIZE, INTERMEDIATE_SIZE, DTYPE, ACTIVATION, HAS_BIAS,
                                                  APPLY_ROUTER_WEIGHT_ON_INPUT)}
EXPERTS_NEEDED = ("hidden_size", "intermediate_size", "dtype", "activation")
ABSENT = object()


class FamiliesError(ValueError):
    """families.yaml does not have its shape; the message names the place in it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one value comes from. `fields` are names of the same thing, of which a config has one or agrees in all.

    always    the family's own constant: a config may leave the field out but not contradict it
    default   used when the config leaves the field out or has null there; ABSENT = the field is required
    """

    fields: tuple[str, ...] = ()
    always: object = ABSENT
    default: object = ABSENT


@dataclass(frozen=True, slots=True)
class Layers:
    """Which of `total` decoder layers route. `kinds` (field -> the words that mean routed) decides alone when the
    config has the field, so does `listed` (indices); else layer i routes if first <= i <= last, i is not in `skipped`,
    and i + offset is a multiple of `every`."""

    total: Source
    first: Source = Source(always=0)
    last: Source = Source(always=-1)
    every: Source = Source(always=1)
    offset: int = 0
    skipped: Source = Source(always=())
    listed: Source = Source(always=None)
    kinds: Mapping[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experts:
    """The sources of a family's traits of moe.experts, those that routing does not give. `must` (field -> values): with
    another value in a field, the experts are not what the traits describe."""

    traits: Mapping[str, Source]
    must: Mapping[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """One family: the sources of its traits, of the call's arguments and of the number of shared experts. `experts` is
    a text where moe.experts has no traits that describe them: why."""

    name: str
    model_types: tuple[str, ...]
    traits: Mapping[str, Source]
    layers: Layers
    routed_scaling_factor: Source = Source(always=1.0)
    shared_experts: Source = Source(always=0)
    must: Mapping[str, tuple] = field(default_factory=dict)  # field -> values it may have, when the config has it
    variant_field: str = ""
    variants: Mapping[str, Mapping[str, Source]] = field(default_factory=dict)  # its value -> further traits
    notes: tuple[str, ...] = ()
    experts: Experts | str = "nothing is known about them"


@lru_cache(maxsize=1)
def shipped() -> dict[str, Family]:
    """The families of families.yaml, by model_type."""
    path = Path(__file__).with_name("families.yaml")
    return parse(path.read_text(encoding="utf-8"), path.name)


def parse(text: str, where: str = "families") -> dict[str, Family]:
    """`text` (YAML) as families by model_type. Raises FamiliesError."""
    import yaml

    try:
        document = yaml.load(text, Loader=_loader(yaml))
    except yaml.YAMLError as error:
        raise FamiliesError(f"{where}: not YAML: {error}") from None
    _keys(document, where, needed=("version", "families"))
    if document["version"] != 1 or isinstance(document["version"], bool):
        raise FamiliesError(f"{where}: version: expected 1, got {document['version']!r}")
    _mapping(document["families"], f"{where}: families")
    by_type: dict[str, Family] = {}
    for name, body in document["families"].items():
        family = _family(name, body, f"{where}: {name}")
        for model_type in family.model_types:
            if model_type in by_type:
                owner = by_type[model_type].name
                raise FamiliesError(f"{where}: {name}: model_types: {model_type!r} belongs to {owner}")
            by_type[model_type] = family
    return by_type


def _family(name: str, body: object, at: str) -> Family:
    _keys(body, at, needed=("model_types", "traits", "layers"),
          optional=("routed_scaling_factor", "shared_experts", "must", "variants", "notes", "experts"))
    traits = _traits(body["traits"], f"{at}: traits")
    variant_field, variants = "", {}
    if "variants" in body:
        place = f"{at}: variants"
        _keys(body["variants"], place, needed=("field", "cases"))
        variant_field = _text(body["variants"]["field"], f"{place}: field")
        _mapping(body["variants"]["cases"], f"{place}: cases")
        variants = {_text(case, place): _traits(more, f"{place}: {case}")
                    for case, more in body["variants"]["cases"].items()}
    for given in [{**traits, **more} for more in variants.values()] or [traits]:
        missing = [n for n in NEEDED if n not in given]
        if missing:
            raise FamiliesError(f"{at}: traits: {missing[0]} is missing: no family leaves it to a default")
    sources = {key: _source(body[key], f"{at}: {key}") for key in ("routed_scaling_factor", "shared_experts")
               if key in body}
    if "experts" in body:
        sources["experts"] = _experts(body["experts"], f"{at}: experts")
    must = _must(body, at)
    return Family(name, tuple(_text(t, f"{at}: model_types") for t in _list(body["model_types"], f"{at}: model_types")),
                  traits, _layers(body["layers"], f"{at}: layers"), must=must, variant_field=variant_field,
                  variants=variants, notes=tuple(_text(n, f"{at}: notes") for n in _list(body.get("notes", []), at)),
                  **sources)


def _experts(body: object, at: str) -> Experts | str:
    if isinstance(body, str):
        return _text(body, at)
    _keys(body, at, needed=("traits",), optional=("must",))
    traits = _traits(body["traits"], f"{at}: traits", EXPERTS_TRAITS, "moe.experts")
    missing = [name for name in EXPERTS_NEEDED if name not in traits]
    if missing:
        raise FamiliesError(f"{at}: traits: {missing[0]} is missing: no family leaves it to a default")
    return Experts(traits, _must(body, at))


def _must(body: Mapping, at: str) -> dict[str, tuple]:
    return {f: _list(v, f"{at}: must: {f}") for f, v in _mapping(body.get("must", {}), f"{at}: must").items()}


def _traits(body: object, at: str, known: Mapping = TRAITS, op: str = "moe.topk") -> dict[str, Source]:
    _mapping(body, at)
    for name in body:
        if name not in known:
            hint = close(name, known) or f"known: {', '.join(known)}"
            raise FamiliesError(f"{at}: {name!r} is no trait of {op}; {hint}")
    sources = {name: _source(value, f"{at}: {name}") for name, value in body.items()}
    for name, source in sources.items():
        for constant in (source.always, source.default):
            try:
                if constant is not ABSENT:
                    known[name].parse(constant)
            except TraitValueError as error:
                raise FamiliesError(f"{at}: {error}") from None
    return sources


def _layers(body: object, at: str) -> Layers:
    sources = ("total", "first", "last", "every", "skipped", "listed")
    _keys(body, at, needed=("total",), optional=(*sources[1:], "offset", "kinds"))
    offset = body.get("offset", 0)
    if type(offset) is not int:
        raise FamiliesError(f"{at}: offset: expected a whole number, got {offset!r}")
    kinds = {f: _list(v, f"{at}: kinds: {f}") for f, v in _mapping(body.get("kinds", {}), f"{at}: kinds").items()}
    return Layers(offset=offset, kinds=kinds, **{k: _source(body[k], f"{at}: {k}") for k in sources if k in body})


def _source(body: object, at: str) -> Source:
    """"n_group" is short for {from: n_group}."""
    if isinstance(body, str):
        body = {"from": body}
    _keys(body, at, optional=("from", "always", "default"))
    fields = body.get("from", [])
    fields = (fields,) if isinstance(fields, str) else _list(fields, f"{at}: from")
    if "always" in body and ("default" in body):
        raise FamiliesError(f"{at}: 'always' and 'default' exclude each other")
    if not fields and "always" not in body:
        raise FamiliesError(f"{at}: expected 'from' (config fields) or 'always' (a constant)")
    return Source(tuple(_text(f, f"{at}: from") for f in fields),
                  body.get("always", ABSENT), body.get("default", ABSENT))


# ---- shapes ----------------------------------------------------------------------------------------------------------

def _mapping(value: object, at: str) -> dict:
    if not isinstance(value, dict):
        raise FamiliesError(f"{at}: expected a mapping, got {type(value).__name__}")
    return value


def _keys(value: object, at: str, needed=(), optional=()) -> None:
    _mapping(value, at)
    for key in value:
        if key not in needed and key not in optional:
            known = (*needed, *optional)
            raise FamiliesError(f"{at}: unknown key {key!r}; {close(key, known) or 'known: ' + ', '.join(known)}")
    for key in needed:
        if key not in value:
            raise FamiliesError(f"{at}: {key} is missing")


def _list(value: object, at: str) -> tuple:
    if not isinstance(value, list):
        raise FamiliesError(f"{at}: expected a list, got {type(value).__name__}")
    return tuple(value)


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or not value:
        raise FamiliesError(f"{at}: expected text, got {value!r}")
    return value


@lru_cache(maxsize=1)
def _loader(yaml):
    """The safe loader, but a key written twice is an error: YAML itself keeps the last and says nothing."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    problem = f"key {key!r} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
