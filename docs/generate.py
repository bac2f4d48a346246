"""Writes docs/registry.md from the code it describes: the pydantic schema, the predicates, the traits and the errors.

    python docs/generate.py            writes it
    python docs/generate.py --check    prints what differs and exits 1 instead

Examples in its tables are evaluated here by the engine that will read them.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Iterable, Sequence

import yaml
from kernel_registry import Registry, errors, schema
from kernel_registry.contract import TraitSpace
from kernel_registry.expressions import Expression, ExpressionError
from kernel_registry.predicates import PredicateError
from kernel_registry.traits.platform import KNOWN, PlatformPattern
from kernel_registry.traits.trait import REQUIRED, Trait, TraitValueError

OUT = Path(__file__).with_name("registry.md")

_FORMS = (  # trait, YAML, values to try
    ("num_experts", "256", (128, 256)),
    ("num_experts", "[160, 256, 384]", (160, 256, 512)),
    ("num_experts", "{min: 2, max: 1024}", (1, 2, 1024, 1025)),
    ("num_experts", "{max: 512, multiple_of: 32}", (32, 100, 512, 544)),
    ("num_experts", "{not: [160, 384]}", (160, 256)),
    ("num_experts", "{not: {min: 513}}", (512, 513)),
    ("num_experts", "any", (1, 896)),
    ("scoring", "sigmoid", ("sigmoid", "softmax")),
    ("scoring", "[sigmoid, softmax]", ("softmax", "sqrtsoftplus")),
    ("scoring", "{not: softmax}", ("sqrtsoftplus", "softmax")),
    ("has_bias", "true", (True, False)),
    ("dtype", "[float32, bf16]", ("float32", "bfloat16", "float16")),
)
_REFUSED_FORMS = (
    ("num_experts", "'256'"), ("num_experts", "{min: 8, max: 4}"), ("num_experts", "{least: 4}"), ("num_experts", "[]"),
    ("scoring", "sigmiod"), ("has_bias", "1"), ("dtype", "float33"), ("scoring", "{not: any}"),
)
_PATTERNS = ("cuda", "cuda>=sm_80", "cuda>=sm_80,<sm_100", "sm_90", "hip>=gfx90a", "hip>=gfx90a,<gfx1100", "gfx942",
             "cpu", "interpreter")
_RELATIONS = (
    "num_experts % num_expert_group == 0", "topk <= topk_group * experts_per_group",
    "scoring == 'sigmoid' or not has_bias", "1 < num_expert_group <= 8", "num_experts // num_expert_group in (32, 64)",
    "len(scoring) < 8",
    "num_experts / 2 > 64", "scoring.upper() == 'SIGMOID'",
)


def rows(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body])


def code(text: object) -> str:
    return f"`{text}`"


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- keys ------------------------------------------------------------------------------------------------------------

def keys(model: type) -> str:
    described = model.model_json_schema()
    required = described.get("required", [])
    lines = []
    for name, field in described["properties"].items():
        given = field.get("default")
        default = "**required**" if name in required else \
            "" if given in (None, "", {}, []) else f"default {code(shown(given))}"
        lines.append((code(name), _type(field), default, field.get("description", "")))
    return rows(("key", "value", "", "meaning"), lines)


def _type(field: dict) -> str:
    if "const" in field:
        return code(field["const"])
    if "anyOf" in field:
        return " or ".join(_type(f) for f in field["anyOf"] if f.get("type") != "null")
    if "$ref" in field:
        return "see `" + field["$ref"].rsplit("/", 1)[1] + "`"
    if field.get("type") == "array":
        return "list of " + _type(field["items"]).removeprefix("see ")
    if field.get("type") == "object":
        inner = next(iter(field.get("patternProperties", {}).values()), None) or field.get("additionalProperties")
        return "name: " + _type(inner).removeprefix("see ") if isinstance(inner, dict) else "mapping"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[field["type"]]


# ---- when ------------------------------------------------------------------------------------------------------------

def forms(space: TraitSpace) -> str:
    lines = []
    for name, text, values in _FORMS:
        found, trait = space.value_set(space.trait(name), yaml.safe_load(text)), space.trait(name)
        verdicts = [(shown(v), found.admits(trait.parse(v))) for v in values]
        lines.append((code(f"{name}: {text}"), code(found), ", ".join(v for v, yes in verdicts if yes),
                      ", ".join(v for v, yes in verdicts if not yes)))
    return rows(("YAML", "read as", "admits, for example", "refuses"), lines)


def refused_forms(space: TraitSpace) -> str:
    lines = []
    for name, text in _REFUSED_FORMS:
        try:
            space.value_set(space.trait(name), yaml.safe_load(text))
        except (PredicateError, TraitValueError, ValueError) as error:
            lines.append((code(f"{name}: {text}"), error))
        else:
            raise SystemExit(f"{name}: {text} is not refused any more")
    return rows(("YAML", "refused because"), lines)


def patterns() -> str:
    lines = []
    for text in _PATTERNS:
        pattern = PlatformPattern.parse(text)
        lines.append((code(text), ", ".join(str(p) for p in KNOWN if pattern.matches(p))))
    return rows(("pattern", "known platforms that it matches"), lines)


def relations(space: TraitSpace) -> str:
    lines = []
    for text in _RELATIONS:
        try:
            Expression(text)
            space.expression(text)
            lines.append((code(text), "yes"))
        except ExpressionError as error:
            lines.append((code(text), f"no: {error}"))
    return rows(("relation", "accepted"), lines)


# ---- traits and errors -----------------------------------------------------------------------------------------------

def traits(space: TraitSpace) -> str:
    def default(trait: Trait) -> str:
        if trait.dynamic:
            return "read off each call"
        if trait.type == "platform":
            return "detected"
        return "**required**" if trait.default is REQUIRED else code(shown(trait.default))
    lines = [(code(t.name), t.kind + (", dynamic" if t.dynamic else ""), t.expected, default(t), t.doc)
             for t in space.traits.values()]
    lines += [(code(name), "derived", "whole number", "", code(f"= {expression.text}"))
              for name, expression in space.derived.items()]
    return rows(("trait", "kind", "values", "when absent", "meaning"), lines)


def every_error() -> str:
    lines = []
    for cls in vars(errors).values():
        if inspect.isclass(cls) and issubclass(cls, errors.RegistryError):
            bases = [b.__name__ for b in cls.__mro__ if b.__module__ == "builtins" and b not in Exception.__mro__]
            first = " ".join(inspect.getdoc(cls).split())
            lines.append((code(cls.__name__), code(bases[0]) if bases else "", first))
    return rows(("error", "also a", "raised for"), lines)


_TEXT = """\
<!-- Generated by docs/generate.py from the code. Do not edit: change the code or the generator, and run it. -->

# Reference: registry.yaml, override files and tiles files

All are YAML, read safely (no tags, no duplicate keys, bounded anchors, UTF-8), with `version: 1` at the top. A key
that is not listed here is an error that suggests the nearest one. `kernel-registry lint FILE` checks a registry file;
`kernel-registry schema`, `kernel-registry schema --overrides` and `kernel-registry schema --tiles` print the JSON
Schema for editors.

- [Registry file](#registry-file)
- [`when`: the calls that an implementation serves](#when-the-calls-that-an-implementation-serves)
- [Order](#order)
- [Override file](#override-file)
- [Tiles file](#tiles-file)
{op_links}
- [Errors](#errors)

## Registry file

`RegistryFile`

{registry_file}

`OpEntry`, under the op's name

{op_entry}

`ImplementationEntry`, under the implementation's name

{implementation_entry}

`VariantEntry`, under a name of its own in `variants`

{variant_entry}

Names of ops and implementations start with a letter and go on with letters, digits, `_`, `-` and `.`; those of
variants have no `.`. A target is a factory: it is called once per binding with those static traits that it names as
keyword parameters (all of them, if it has `**`) and with the `options` of the entry, and returns the kernel. It has to
name every option, `**` is not enough, and an option may not have the name of a trait. With `tiles` it is also given a
keyword of that name, which it has to name too ([tiles.md](tiles.md)). A target is imported when it is first bound, not
before. With `prepare` the kernel takes the arguments that the contract names in `prepared` only as that function made
them: `def function(subject, *, TRAITS, OWN)`, called by `registry.prepare` with what its caller has, the traits that it
names (`**` is refused: the tag has these), and the caller's keywords that are no traits. It returns tensors or modules,
or a tuple, list or mapping of them, or a `kernel_registry.contract.Prepared` with a report.

### variants

One kernel that is tuned for several ranges is one entry:

```yaml
router:
  target: package.module:topk
  options: {{dependent_launch: late}}
  when: {{platform: cuda, scoring: softmax, topk: {{max: 32}}}}
  variants:
    pairs:
      options: {{rows_per_program: 2}}
      when: {{topk: {{max: 16}}, num_tokens: {{min: 640}}}}
```

Each variant is an implementation of its own. `router.pairs` gets `dependent_launch: late` and `rows_per_program: 2`,
and its `when` is `{{platform: cuda, scoring: softmax, topk: {{max: 16}}, num_tokens: {{min: 640}}}}`. Target,
`numerics` and `fallback` are those of `router`. A variant has to be provably narrower than its implementation, and so
goes first; one that is wider in a trait, or has the very same box, is an error. Two that overlap with neither inside
the other need a `rank`, as [everywhere](#order). A variant has no variants. `list`, `explain`, `verify`, `bench`, plans
and `dispatch(implementation=NAME)` know each by its own name; [override files](#override-file) can mean all by one.

## `when`: the calls that an implementation serves

A mapping of traits to sets of values, and two more keys, `relations` and `python`. A call is served when every line
holds. What a line that is *not* there means depends on the kind of the trait:

| kind | an implementation that does not mention it serves |
|---|---|
| semantic, layout | only the neutral value (the trait's default); a trait without one must be mentioned |
| performance | every value |
| platform | must be mentioned |

Derived traits may be used like the others and count as performance traits. In an override's `when`, what is not
mentioned is not asked.

{forms}

`not` takes a value, a list or `{{min, max}}`. `multiple_of` is for whole numbers that are known at dispatch, so not
for a dynamic trait, whose domain is cut into ranges. Refused when the file is read:

{refused_forms}

### platform

A pattern or a list of them; `any` for all. Architectures compare as numbers, and the order says nothing about families:
gfx1100, a graphics part, is above gfx950, so bound `hip` from above where that matters. `interpreter` is Triton's
interpreter, which runs GPU kernels on the CPU. Names of the form `sm_NN` and `gfxNNN` that are not in the table are
platforms too.

{patterns}

### relations

A list of expressions over the traits, all of which must hold. They are parsed, never evaluated as Python. There are
names of static traits, whole numbers, text, `true` and `false`; `+ - * // %`, comparisons (chained ones too), `and`,
`or`, `not`, parentheses, `min()` and `max()`. A division by zero makes a relation false.

{relations}

### python

The last resort: a list of `module:function`. The function gets the static traits as a dict, after everything else in
the box has admitted them, and returns None, or the reason for its refusal as text. `lint` and the order of
implementations can't look into it.

## Order

The implementations of an op are put in order once, at load, and a call goes to the first that admits it:

1. those that are not `fallback` before those that are,
2. higher `rank` first,
3. a provably narrower box first.

Two implementations that could admit one call, with the same `fallback` and `rank` and neither box inside the other, are
an error that names both lines. So is a rank that puts a wider box before a narrower one, which could then never be
chosen. The order in the file decides nothing.

## Override file

`OverrideFile`

{override_file}

`OverrideEntry`

{override_entry}

`use` is strict: a call that it matches and can't serve raises. `prefer` is its soft form. In one file a narrower rule
goes first, and two rules that would decide one call differently are an error. A rule that can never have an effect is
an error when the file is loaded; one that no dispatched call matched is an error at `freeze()`. The name of an
implementation means its variants too: `disable` takes all of them away, and with `use` and `prefer` the order decides
among those that serve the call. The name of a variant means that one. How files, contexts and plans are layered is in
[overrides.md](overrides.md).

## Tiles file

`TilesFile`

{tiles_file}

`TilesEntry`

{tiles_entry}

`Versions`

{versions}

What tiles are, how they are found and which one a call gets is in [tiles.md](tiles.md). {ops}
## Errors

All derive from `kernel_registry.errors.RegistryError`, and say where (file and line), what was expected and what to do.

{errors}
"""
_OP = """
## {name}

Contract `{contract}`. Traits:

{traits}

{relations}{kernel}"""


def op_section(op) -> str:
    contract, torch_name = op.contract, f"kernel_registry::{op.name.replace('.', '_')}"
    relations = ", ".join(code(r.text) for r in op.space.relations)
    kernel = "\n" + filled(f"A kernel's signature: `{inspect.signature(contract.signature)}`.")
    if contract.prepared:
        kernel += "\n" + filled("As `registry.prepare` makes it, for kernels that declare `prepare`: "
                                f"{', '.join(code(name) for name in contract.prepared)}.")
    if contract.schema:
        kernel += "\n" + filled(f"As a torch op: `{torch_name}{contract.schema}`.")
    if contract.schema_out:
        kernel += "\n" + filled(f"Writing into `out`: `{torch_name}_out{contract.schema_out}`.")
    return _OP.format(name=op.name, contract=op.contract_target, traits=traits(op.space), kernel=kernel,
                      relations=filled(f"Every call must satisfy: {relations}."))


def filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def document() -> str:
    ops = Registry(plugins=False, environment=False, platform="cpu").catalog.ops
    space = ops["moe.topk"].space
    return _TEXT.format(
        registry_file=keys(schema.RegistryFile), op_entry=keys(schema.OpEntry), override_file=keys(schema.OverrideFile),
        implementation_entry=keys(schema.ImplementationEntry), variant_entry=keys(schema.VariantEntry),
        override_entry=keys(schema.OverrideEntry), tiles_file=keys(schema.TilesFile),
        tiles_entry=keys(schema.TilesEntry), versions=keys(schema.Versions),
        forms=forms(space), refused_forms=refused_forms(space), patterns=patterns(), relations=relations(space),
        op_links="\n".join(f"- [{name}](#{name.replace('.', '')})" for name in ops),
        ops="".join(op_section(op) for op in ops.values()), errors=every_error())


def main() -> None:
    text = document()
    if "--check" not in sys.argv:
        OUT.write_text(text, encoding="utf-8")
        return
    committed = OUT.read_text(encoding="utf-8") if OUT.is_file() else ""
    print("".join(difflib.unified_diff(committed.splitlines(True), text.splitlines(True), str(OUT.name), "generated")))
    sys.exit(committed != text)


if __name__ == "__main__":
    main()
