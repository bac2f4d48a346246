"""Overrides: rules that change a choice without code, in layers, each with its provenance.

A rule says `use` (strict: if it can't serve the call, the dispatch raises), `prefer` (soft) or `disable`, for the calls
that its `when` matches. The name of an implementation means its variants too, among which the registry's order decides.

Layers, strongest first: the call itself, contexts from the innermost out, rules of files that name the active model,
the environment's file, loaded files from the latest back, what the registry ships. Within one layer a narrower rule
goes first; two rules of one layer that could decide one call differently are an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from .box import Box, read_box
from .catalog import Catalog, Implementation
from .competition import bits, relations
from .document import Document
from .errors import AmbiguityError, OverrideError
from .schema import OverrideEntry

ACTIONS = ("use", "prefer", "disable")


@dataclass(frozen=True, eq=False)
class Rule:
    """One override. `where` is "file:line", or a description of the code that set it ("" where `layer` says it all).
    `frozen`, of a plan's rule, is what decided when the plan was frozen, so that freezing again gives the same plan.
    `family`: the name means the implementation's variants too; not so in a plan, or where a call names its own."""

    action: str
    op: str
    implementation: str
    box: Box
    where: str
    layer: str
    model: str | None = None
    reason: str = ""
    frozen: str = ""
    family: bool = False

    def __str__(self):
        reason = f" ({self.reason})" if self.reason else ""
        scope = f" for model {self.model}" if self.model else ""
        source = f"{self.layer}, {self.where}" if self.where else self.layer
        return f"{self.action} {self.implementation}{scope}: {source}{reason}"

    def means(self, one) -> bool:
        """Whether it names `one` (anything with a `name` and `variant_of`), or the implementation of that variant."""
        return self.implementation == one.name or self.family and self.implementation == one.variant_of

    def told_of(self, one: Implementation) -> str:
        """The rule as a reason why `one` is not chosen."""
        return str(self) if self.implementation == one.name else f"as a variant of {one.variant_of}: {self}"


@dataclass(frozen=True, eq=False)
class Layer:
    """Rules of equal strength: one file, one context. `rules` maps an op to its rules in the order they are asked.
    `closed`, of a strict plan: a call that no rule here decides gets no kernel."""

    name: str
    rules: Mapping[str, tuple[Rule, ...]]
    closed: bool = False

    def __iter__(self):
        return (rule for rules in self.rules.values() for rule in rules)

    def scoped(self, model: str | None) -> "Layer | None":
        """The part that applies inside registry.model(model); for None, the part that applies everywhere."""
        rules = {op: kept for op, every in self.rules.items() if (kept := tuple(r for r in every if r.model == model))}
        return Layer(self.name, rules, self.closed) if rules or self.closed else None


def make_rule(catalog: Catalog, action: str, op: str, implementation: str, when: Mapping[str, object], *,
              where: str, layer: str, model: str | None = None, reason: str = "", line=None) -> Rule:
    """A checked rule. Raises for unknown names and for a rule that can never have an effect."""
    owner = catalog.op(op, where)
    named = owner.implementation(implementation, where)
    box = read_box(owner.space, when, line or (lambda path: where), closed=False)
    if not named.box.meets(box):
        apart = [f"{name} is {box.sets[name]}, {implementation} serves {values}"
                 for name, values in named.box.sets.items() if name in box.sets and not values.meets(box.sets[name])]
        raise OverrideError(f"`{action} {implementation}` can never take effect: {'; '.join(apart)}", where=where,
                            hint="change the match, or name an implementation that serves it (kernel-registry list)")
    return Rule(action, op, implementation, box, where, layer, model, reason, family=True)


def read_layer(catalog: Catalog, document: Document, entries: list[OverrideEntry], name: str) -> Layer:
    """The layer that an override file describes."""
    rules: dict[str, list[Rule]] = {}
    for index, entry in enumerate(entries):
        path = ("overrides", index)
        where = document.where(path)
        chosen = [(action, getattr(entry, action)) for action in ACTIONS if getattr(entry, action) is not None]
        if len(chosen) != 1:
            raise OverrideError(f"expected exactly one of use, prefer and disable, got {len(chosen)}", where=where,
                                hint="one line holds one choice; write another line for another")
        (action, implementation), = chosen
        rule = make_rule(catalog, action, entry.op, implementation, entry.when, where=where, layer=name,
                         model=entry.model, reason=entry.reason,
                         line=lambda key, path=path: document.where((*path, "when", *key)))
        rules.setdefault(entry.op, []).append(rule)
    return Layer(name, {op: _ordered(tuple(found)) for op, found in rules.items()})


def _ordered(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """disable first (it only removes), then narrower first. Raises AmbiguityError for rules that contradict."""
    meets, wider, narrower = relations([rule.box for rule in rules])
    for i, rule in enumerate(rules):
        for j in bits(meets[i] & ~(wider[i] ^ narrower[i]) & ~(1 << i)):
            other = rules[j]
            if rule.model != other.model or rule.implementation == other.implementation:
                continue
            if "disable" in (rule.action, other.action):
                continue  # it only removes another implementation, which contradicts no choice
            raise AmbiguityError(f"`{rule.action} {rule.implementation}` here and `{other.action} "
                                 f"{other.implementation}` at {other.where} match the same calls", where=rule.where,
                                 hint="make one match narrower than the other, or remove one")
    around = [mask.bit_count() for mask in wider]
    order = sorted(range(len(rules)), key=lambda i: (rules[i].action != "disable", -around[i]))
    return tuple(rules[i] for i in order)


def pinned(implementation: Implementation) -> Layer:
    """The strongest layer of all: the call named its implementation."""
    rule = Rule("use", implementation.op, implementation.name, Box({}), where="", layer="the call named it")
    return Layer(rule.layer, {rule.op: (rule,)})

