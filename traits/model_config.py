"""A model's published config.json, read into the traits of its routing and of its experts. What each field means is
data: families.yaml.

Nothing is guessed: a missing or contradictory field is a ConfigError that names the file, the field and what was
expected. Extra prediction (MTP) layers are not counted; they are no layers of the model's own forward pass.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from . import families
from .experts import ACTIVATION, EXPERTS_TRAITS
from .families import ABSENT, Family, Layers, Source
from .trait import _shown, close

_MODELS = Path(__file__).with_name("models")


class ConfigError(ValueError):
    """A config that can't be read, is no mixture of experts known here, or has a missing or contradictory field."""


@dataclass(frozen=True)
class ModelConfig:
    """A config as published: `name` for people, `source` (a path, or "shipped:<name>"), `data` (the JSON object)."""

    name: str
    source: str
    data: Mapping[str, object]


@dataclass(frozen=True)
class Routing:
    """How a model routes.

    traits          canonical traits of moe.topk, all but the platform and the dynamic ones; no shared expert fused
    arguments       keyword arguments of the call: routed_scaling_factor
    moe_layers      how many layers route
    shared_experts  how many experts every token passes, beside the routed ones
    notes           what the traits can't say
    """

    traits: Mapping[str, object]
    arguments: Mapping[str, object]
    moe_layers: int
    shared_experts: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertLayers:
    """What a model's routed experts are.

    traits       canonical traits of moe.experts, all but the platform and the dynamic ones: whole layers, one machine
    moe_layers   how many layers have them
    notes        what the traits can't say
    """

    traits: Mapping[str, object]
    moe_layers: int
    notes: tuple[str, ...] = ()


def shipped_models() -> tuple[str, ...]:
    """The names of the configs that come with the package."""
    return tuple(sorted(path.stem for path in _MODELS.glob("*.json")))


def known_model_types() -> tuple[str, ...]:
    """Every model_type that families.yaml describes."""
    return tuple(sorted(families.shipped()))


# ---- loading ---------------------------------------------------------------------------------------------------------

def load_config(source: "str | Path | Mapping[str, object]") -> ModelConfig:
    """The config at `source`: a config.json or its folder, the name of a shipped config ("deepseek-v3"), or the object
    itself. A path that exists goes before a shipped name. Raises ConfigError."""
    if isinstance(source, Mapping):
        named = [source.get(key) for key in ("_name_or_path", "model_type")]
        return ModelConfig(next((n for n in named if n and isinstance(n, str)), "config"), "", dict(source))
    if not isinstance(source, (str, Path)) or not str(source):
        raise ConfigError(f"expected a path, the name of a shipped config or a mapping, got {_shown(source)}")
    path = Path(source)
    try:
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long, a NUL character, a folder that may not be searched
        raise ConfigError(f"{source}: can't be read: {error}") from None
    if folder:
        path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{source}: the folder has no config.json")
    elif not exists:
        if str(source) in shipped_models():
            return ModelConfig(str(source), f"shipped:{source}", _read(_MODELS / f"{source}.json"))
        raise ConfigError(f"{source}: no such file or folder, and no shipped config of that name; "
                          + (close(str(source), shipped_models()) or f"shipped: {', '.join(shipped_models())}"))
    name = path.parent.name if path.name == "config.json" else path.stem
    return ModelConfig(name or path.stem, str(path), _read(path))


def _read(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object (a model's config.json), got {type(data).__name__}")
    return data


def _object(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"field {twice!r} is written twice")
    return dict(pairs)


# ---- reading ---------------------------------------------------------------------------------------------------------

def routing(config: "ModelConfig | str | Path | Mapping[str, object]") -> Routing:
    """How the model of `config` (or of what `load_config` takes) routes. Raises ConfigError."""
    config = config if isinstance(config, ModelConfig) else load_config(config)
    reader = _Reader(config)
    family = reader.family()
    traits = reader.routing_traits(family)
    factor = reader.number(family.routed_scaling_factor)
    shared = reader.whole(family.shared_experts)
    moe_layers = reader.routed_layers(family.layers)
    notes = list(family.notes)
    if shared:
        notes.append(f"{shared} shared expert{'s' if shared > 1 else ''} beside the routed ones: run outside the "
                     "router, or fused into it by adding num_fused_shared_experts to topk")
    why_not = reader.not_described(family)
    if why_not:
        notes.append(f"no moe.experts: {why_not}")
    return Routing(traits, {"routed_scaling_factor": factor}, moe_layers, shared, tuple(notes))


def experts(config: "ModelConfig | str | Path | Mapping[str, object]") -> ExpertLayers | None:
    """The routed experts of the model of `config` (or of what `load_config` takes); None where moe.experts has no
    traits that describe them, which a note of its `routing` tells. Raises ConfigError."""
    config = config if isinstance(config, ModelConfig) else load_config(config)
    reader = _Reader(config)
    family = reader.family()
    if reader.not_described(family):
        return None
    routed = reader.routing_traits(family)
    quantisation, note = reader.quantisation()
    sources = family.experts.traits
    neutral = {t.name: t.default for t in EXPERTS_TRAITS if t.type != "platform" and not t.dynamic}
    traits = {**neutral,
              **{name: reader.trait(name, source, families.EXPERTS_TRAITS) for name, source in sources.items()},
              "num_experts": routed["num_experts"], "topk": routed["topk"], **quantisation}
    return ExpertLayers(traits, reader.routed_layers(family.layers), (note,) if note else ())


class _Reader:
    """One config's text model, and errors that name its fields."""

    def __init__(self, config: ModelConfig):
        self.where, self.prefix, self.data = config.source or config.name, "", config.data
        text = config.data.get("text_config")
        if isinstance(text, Mapping):  # a multimodal wrapper; the dtype may stand outside
            outer = {k: config.data[k] for k in ("torch_dtype", "dtype") if config.data.get(k) is not None}
            inner = {k for k in ("torch_dtype", "dtype") if text.get(k) is not None}
            self.prefix, self.data = "text_config.", {**({} if inner else outer), **text}

    def error(self, field: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self.prefix}{field}: {problem}")

    def family(self) -> Family:
        known = families.shipped()
        model_type = self.data.get("model_type")
        if not isinstance(model_type, str):
            problem = "missing" if model_type is None else f"expected text, got {_shown(model_type)}"
            raise self.error("model_type", f"{problem}; it names the model's family, one of {', '.join(sorted(known))}")
        if model_type not in known:
            dense = not any("expert" in str(key) for key in self.data)
            why = "no field speaks of experts, so this is a dense model, which routes nothing" if dense else \
                close(model_type, known)
            raise self.error("model_type", f"{model_type!r} is no mixture-of-experts family known here; "
                                           f"{why}{why and '; '}known: {', '.join(sorted(known))}")
        return known[model_type]

    def variant(self, family: Family) -> Mapping[str, Source]:
        if not family.variants:
            return {}
        value = self.required(family.variant_field, f"one of {', '.join(family.variants)}")
        if not isinstance(value, str) or value not in family.variants:
            raise self.error(family.variant_field, f"expected one of {', '.join(family.variants)} for model_type "
                                                   f"{family.name!r}, got {_shown(value)}")
        return family.variants[value]

    def required(self, field: str, expected: str):
        if self.data.get(field) is None:
            raise self.error(field, f"{'null' if field in self.data else 'missing'}; expected {expected}")
        return self.data[field]

    def value(self, source: Source, parse, expected: str):
        """The source's value, made canonical by `parse` (which raises ValueError). Names of one field must agree."""
        def read(field):
            value = self.data[field]
            try:
                return parse(value)
            except ValueError:
                raise self.error(field, f"expected {expected}, got {_shown(value)}") from None

        given = [(field, read(field)) for field in source.fields if self.data.get(field) is not None]
        for field, value in given[1:]:
            if value != given[0][1]:
                raise self.error(field, f"{_shown(value)} contradicts {given[0][0]}, which is {_shown(given[0][1])}")
        if source.always is not ABSENT:
            constant = source.always
            if given and given[0][1] != constant:
                raise self.error(given[0][0], f"{_shown(given[0][1])} contradicts model_type "
                                              f"{self.data['model_type']!r}, which has {_shown(constant)}")
            return constant
        if given:
            return given[0][1]
        if source.default is not ABSENT:
            return source.default
        return self.required(source.fields[0], expected)

    def routing_traits(self, family: Family) -> dict[str, object]:
        for field, allowed in family.must.items():
            value = self.data.get(field)
            if value is not None and value not in allowed:
                raise self.error(field, f"{_shown(value)} contradicts model_type {self.data['model_type']!r}, "
                                        f"which has {' or '.join(map(repr, allowed))}")
        sources = {**family.traits, **self.variant(family)}
        traits = {name: self.trait(name, sources[name]) if name in sources else trait.default
                  for name, trait in families.TRAITS.items()}
        self.check_shape(traits, sources)
        return traits

    def not_described(self, family: Family) -> str:
        """Why moe.experts has no traits for the model's experts; "" where it has."""
        if isinstance(family.experts, str):
            return family.experts
        for field, allowed in family.experts.must.items():
            value = self.data.get(field)
            if value is not None and value not in allowed:
                return f"{self.prefix}{field} is {_shown(value)}, which has no trait"
        for field in family.experts.traits["activation"].fields:
            word = self.data.get(field)
            if isinstance(word, str) and word not in ACTIVATION.choices:
                return f"{self.prefix}{field} is {_shown(word)}, expected {ACTIVATION.expected}"
        return ""

    def quantisation(self) -> tuple[dict[str, object], str]:
        """The traits that `quantization_config` gives, and a note where it gives none that moe.experts has."""
        found = self.data.get("quantization_config")
        if found is None:
            return {}, ""
        if not isinstance(found, Mapping):
            raise self.error("quantization_config", f"expected an object, got {_shown(found)}")
        method, block = found.get("quant_method"), found.get("weight_block_size")
        kept = found.get("modules_to_not_convert") or found.get("ignored_layers") or ()
        spared = [name for name in kept if "expert" in str(name) and "shared" not in str(name)]
        square = isinstance(block, list) and len(block) == 2 and block[0] == block[1] and type(block[0]) is int
        if method == "fp8" and square and block[0] > 0 and not spared \
                and found.get("activation_scheme", "dynamic") == "dynamic":
            rounded = found.get("scale_fmt") == "ue8m0"
            return ({"weight_quant": "fp8_block", "act_quant": "fp8_block", "group_size": block[0]},
                    "scale_fmt ue8m0: scales of activations are powers of two in the model's own code, float32 here"
                    if rounded else "")
        return {}, (f"quantization_config (quant_method {_shown(method)}) gives no format of moe.experts that is known "
                    "here: these are the experts in the model's dtype")

    def trait(self, name: str, source: Source, known: Mapping = families.TRAITS):
        trait = known[name]
        return trait.parse(self.value(source, trait.parse, trait.expected))

    def whole(self, source: Source, minimum: int = 0) -> int:
        def parse(value):
            if type(value) is not int or value < minimum:
                raise ValueError
            return value
        return self.value(source, parse, f"a whole number >= {minimum}")

    def number(self, source: Source) -> float:
        def parse(value):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError
            return float(value)
        return self.value(source, parse, "a number above 0")

    def check_shape(self, traits: Mapping[str, object], sources: Mapping[str, Source]) -> None:
        experts, topk = traits["num_experts"], traits["topk"]
        groups, kept = traits["num_expert_group"], traits["topk_group"]

        def field(trait):
            names = sources[trait].fields if trait in sources else ()
            return next((n for n in names if self.data.get(n) is not None), names[0] if names else trait)

        if topk > experts:
            raise self.error(field("topk"), f"{topk} chosen experts exceed {field('num_experts')}, which is {experts}")
        if experts % groups:
            raise self.error(field("num_expert_group"),
                             f"{groups} groups do not divide {field('num_experts')}, which is {experts}")
        if kept > groups:
            raise self.error(field("topk_group"),
                             f"{kept} kept groups exceed {field('num_expert_group')}, which is {groups}")
        if topk > kept * (experts // groups):
            raise self.error(field("topk_group"), f"{kept} kept groups of {experts // groups} experts hold fewer than "
                                                  f"{field('topk')}, which is {topk}")

    def routed_layers(self, layers: Layers) -> int:
        total = self.whole(layers.total, minimum=1)
        count = self._listed(layers, total)
        if count is None:
            if not (layers.first.fields or layers.every.fields) and layers.kinds:
                self.required(next(iter(layers.kinds)), "which layers route, one entry per layer")
            first, every = self.whole(layers.first), self.whole(layers.every, minimum=1)
            last = self.whole(layers.last, minimum=-1)
            skipped = self._indices(layers.skipped, total)
            last = total - 1 if last == -1 else last
            count = sum(first <= i <= last and (i + layers.offset) % every == 0 and i not in skipped
                        for i in range(total))
        if count == 0:
            raise self.error((layers.first.fields or layers.total.fields)[0], f"none of the {total} layers routes: "
                             "a dense model has no routing")
        return count

    def _listed(self, layers: Layers, total: int) -> int | None:
        """The count, when the config says layer by layer which route."""
        for field, routed in layers.kinds.items():
            kinds = self.data.get(field)
            if kinds is None:
                continue
            if not isinstance(kinds, (list, str)) or len(kinds) != total:
                raise self.error(field, f"expected one entry for each of the {total} layers, got "
                                        + (f"{len(kinds)}" if isinstance(kinds, (list, str)) else _shown(kinds)))
            return sum(kind in routed for kind in kinds)
        indices = self._indices(layers.listed, total)
        return None if indices is None else len(indices)

    def _indices(self, source: Source, total: int):
        def parse(value):
            if not isinstance(value, list) or not all(type(i) is int and 0 <= i < total for i in value):
                raise ValueError
            return frozenset(value)
        return self.value(source, parse, f"a list of layer indices below {total}")
