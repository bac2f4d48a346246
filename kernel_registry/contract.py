"""What an op is: the traits that choose its kernel, and how to read them off tensors and off a model's config.

An op's package subclasses `Contract`; the engine turns the class into a `TraitSpace`, which is the only thing that
knows how a caller's traits become canonical. Fail closed: an unknown trait, a wrong type, a missing required trait, or
values that contradict a relation of the contract are errors that say what to do.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Callable, ClassVar, Mapping, NamedTuple, Sequence

from .errors import TraitError, UnknownNameError, suggestion
from .expressions import Expression, ExpressionError
from .predicates import ValueSet, value_set
from .traits.trait import REQUIRED, Trait, written

CAPTURED = "_kernel_registry_captured"  # attribute of a tensor that a captured graph reads: its storage has to stay
OUTPUT_ALIAS = "output_alias"  # the trait that says whether a call brings `out`


@dataclass(frozen=True)
class Workload:
    """One call that a model makes: canonical or plain `traits` (no platform) and the call's keyword `arguments`."""

    name: str
    traits: Mapping[str, object]
    arguments: Mapping[str, object]
    layers: int = 1
    notes: tuple[str, ...] = ()


class Prepared(NamedTuple):
    """What a preparation may return: what it made, and what it tells of it."""

    value: object
    report: object = None


class Contract:
    """Base of an op's contract. Subclasses fill the class attributes and override the static methods they support."""

    traits: ClassVar[Sequence[Trait]] = ()
    derived: ClassVar[Mapping[str, str]] = {}  # name -> expression over the traits; predicates may use it
    relations: ClassVar[Sequence[str]] = ()  # must hold for every call, whichever implementation serves it
    dynamic: ClassVar[Mapping[str, Callable]] = {}  # dynamic trait -> reads it off a call's first argument
    schema: ClassVar[str] = ""  # torch.library schema of the op, without its name; "" = not offered as a torch op
    schema_out: ClassVar[str] = ""  # that of its form that begins with `Tensor(a!) out` and returns nothing
    oracle: ClassVar[str] = ""  # "module:function": check(traits, args, kwargs, outputs) -> Verdict
    cases: ClassVar[str] = ""  # "module": inputs(), FLAVOURS and named workloads
    prepared: ClassVar[Sequence[str]] = ()  # arguments that an implementation which declares `prepare` takes tagged
    # Of an op with the trait output_alias, whose kernels take a keyword `out`:
    read_until_end: ClassVar[Sequence[str]] = ()  # tensors that a kernel may read when it has begun to write `out`
    in_place: ClassVar[Sequence[str]] = ()  # those of them that may be `out` itself: no element is read once written

    @staticmethod
    def signature(*args, **kwargs):
        """The signature that every implementation's kernel has."""
        raise TypeError("this contract gives no signature")

    @staticmethod
    def parameters(traits: Mapping[str, object]) -> "Mapping[str, tuple[tuple[int, ...], str]]":
        """Shape and dtype of each argument that a layer of these canonical traits keeps from call to call."""
        return {}

    @staticmethod
    def unpack(*args, **kwargs) -> tuple[dict[str, object], tuple, dict[str, object]]:
        """One call of the torch op as (traits, args, kwargs): what to dispatch for, and what to call with. With a
        `schema_out` it has a keyword `out=None` more."""
        raise TypeError("this contract offers no torch op")

    @staticmethod
    def fake(*args, **kwargs):
        """The torch op's outputs without data, for tracing: shapes, dtypes and devices."""
        raise TypeError("this contract offers no torch op")

    @staticmethod
    def workloads(config) -> Sequence[Workload]:
        """The calls that the model of a Hugging Face `config` makes to this op; empty when it makes none."""
        return ()


@dataclass(frozen=True)
class Request:
    """One call's traits, canonical and complete. `open` names the dynamic traits left to the call; `detected` tells
    that the caller named no platform, so that it is whatever this machine's is."""

    op: str
    traits: dict[str, object]
    open: tuple[str, ...] = ()
    detected: bool = False

    def __str__(self):
        shown = ", ".join(f"{k}={written(v)}" for k, v in self.traits.items() if k not in self.open)
        return f"{self.op}({shown})"


class TraitSpace:
    """The traits of one op, by name, with everything that makes a caller's traits canonical."""

    def __init__(self, op: str, contract: type[Contract]):
        self.op, self.contract = op, contract
        self.traits: dict[str, Trait] = {}
        self._sets: dict[tuple[str, str], ValueSet] = {}
        for trait in contract.traits:
            if trait.name in self.traits or trait.name in contract.derived:
                raise TraitError(f"the contract declares trait {trait.name!r} twice", where=op)
            self.traits[trait.name] = trait
        self.dynamic = tuple(name for name, trait in self.traits.items() if trait.dynamic)
        self.derived: dict[str, Expression] = {}
        for name, text in contract.derived.items():
            self.derived[name] = self._expression(text, f"derived trait {name}")
        # A derived trait is a size: silence about it serves any value.
        self.all = {**self.traits, **{name: Trait(name, "int", "performance", doc=f"= {expression.text}")
                                      for name, expression in self.derived.items()}}
        self.relations = tuple(self._expression(text, "a relation of the contract") for text in contract.relations)
        for name in self.dynamic:
            trait = self.traits[name]
            if name not in contract.dynamic:
                raise TraitError(f"dynamic trait {name!r} has no reader in {contract.__name__}.dynamic", where=op)
            if trait.type != "bool" and (trait.type != "int" or trait.minimum is None):
                raise TraitError(f"dynamic trait {name!r} is neither a bool nor an int with a minimum: it can't be cut "
                                 "into ranges", where=op)
        for name in contract.dynamic:
            if name not in self.dynamic:
                raise TraitError(f"{contract.__name__}.dynamic reads {name!r}, which is no dynamic trait", where=op)
        self._check_output()
        missing = {*contract.prepared} - {*inspect.signature(contract.signature).parameters}
        if missing:
            raise TraitError(f"{contract.__name__}.prepared names {', '.join(sorted(missing))}, which the signature "
                             "does not have", where=op)

    def _check_output(self):
        """An op either has all that belongs to a given `out`, or none of it."""
        contract, trait = self.contract, self.traits.get(OUTPUT_ALIAS)
        if trait is None:
            for name in ("read_until_end", "in_place", "schema_out"):
                if getattr(contract, name):
                    raise TraitError(f"{contract.__name__}.{name} is about `out`, but there is no trait {OUTPUT_ALIAS}",
                                     where=self.op, hint=f"add the trait, or drop {name}")
            return
        if (trait.type, trait.kind, trait.dynamic, trait.default) != ("bool", "performance", False, False):
            raise TraitError(f"the trait {OUTPUT_ALIAS} is a bool of kind performance, false by default: "
                             "implementations that are silent about it serve it, by a copy", where=self.op)
        parameters = inspect.signature(contract.signature).parameters
        missing = {"out", *contract.read_until_end} - {*parameters}
        if missing or parameters["out"].kind is not inspect.Parameter.KEYWORD_ONLY or not contract.read_until_end:
            raise TraitError(f"the trait {OUTPUT_ALIAS} needs a keyword `out` in the signature and, in read_until_end, "
                             "names of arguments" + (f"; there is no {', '.join(sorted(missing))}" if missing else ""),
                             where=self.op)
        if not {*contract.in_place} <= {*contract.read_until_end}:
            raise TraitError("in_place names what read_until_end does not", where=self.op)

    def value_set(self, trait: Trait, spec: object) -> ValueSet:
        """`value_set(trait, spec)`, one object per distinct spec: thousands of implementations say the same things."""
        key = trait.name, repr(spec)
        if key not in self._sets:
            self._sets[key] = value_set(trait, spec)
        return self._sets[key]

    def expression(self, text: object) -> Expression:
        """`text` as a relation over this op's static traits. Raises ExpressionError."""
        expression = Expression(text)
        for name in sorted(expression.names):
            if name not in self.all:
                raise ExpressionError(f"{text!r} reads {name!r}, which is not a trait of {self.op}; "
                                      f"{suggestion(name, self.all)}")
            if self.all[name].type == "platform":
                raise ExpressionError(f"{text!r} reads {name!r}, which has no order here; give it patterns instead")
            if name in self.dynamic:
                raise ExpressionError(f"{text!r} reads the dynamic trait {name!r}; give it min/max instead, "
                                      "so that its switch points are known before the call")
        return expression

    def _expression(self, text: str, what: str) -> Expression:
        try:
            expression = Expression(text)
        except ExpressionError as error:
            raise TraitError(f"{what}: {error}", where=self.op) from None
        for name in sorted(expression.names):
            if name not in self.traits and name not in self.derived:
                raise TraitError(f"{what}: {text!r} reads {name!r}, which is not a trait, nor one derived before it",
                                 where=self.op)
            if name in self.dynamic:
                raise TraitError(f"{what}: {text!r} reads the dynamic trait {name!r}, which may be unknown until the "
                                 "call", where=self.op)
        return expression

    def trait(self, name: object) -> Trait:
        """The trait called `name`, derived ones included. Raises UnknownNameError with a suggestion."""
        try:
            return self.all[name]
        except (KeyError, TypeError):
            raise UnknownNameError(f"{self.op} has no trait {name!r}", hint=suggestion(name, self.all)) from None

    def complete(self, traits: Mapping[str, object]) -> dict[str, object] | None:
        """`traits`, canonical, with the derived ones; None where the contract forbids the combination."""
        full = dict(traits)
        try:
            for name, expression in self.derived.items():
                full[name] = expression(full)
        except ZeroDivisionError:
            return None
        return full if all(relation.holds(full) for relation in self.relations) else None

    def request(self, given: Mapping[str, object], detect: Callable[[], object]) -> Request:
        """`given` made canonical: parsed, defaulted, derived, checked. `detect` supplies an absent platform."""
        traits: dict[str, object] = {}
        for name in given:
            self.trait(name)
            if name in self.derived:
                raise TraitError(f"{name!r} is derived ({self.derived[name].text}); give the traits it is made of",
                                 where=self.op)
        open_traits, missing, detected = [], [], False
        for name, trait in self.traits.items():
            if name in given:
                try:
                    traits[name] = trait.parse(given[name])
                except ValueError as error:
                    raise TraitError(str(error), where=self.op) from None
            elif trait.type == "platform":
                traits[name], detected = detect(), True
            elif trait.dynamic:
                open_traits.append(name)
            elif trait.default is REQUIRED:
                missing.append(name)
            else:
                traits[name] = trait.default
        if missing:
            raise TraitError(f"missing {', '.join(missing)}: there is no neutral value for "
                             f"{'it' if len(missing) == 1 else 'them'}", where=self.op,
                             hint="give " + ", ".join(f"{n}=... ({self.traits[n].type})" for n in missing))
        for name, expression in self.derived.items():
            try:
                traits[name] = expression(traits)
            except (ZeroDivisionError, TypeError):
                raise TraitError(f"{name} = {expression.text} has no value for these traits", where=self.op) from None
        for relation in self.relations:
            if not relation.holds(traits):
                values = ", ".join(f"{n}={written(traits[n])}" for n in sorted(relation.names))
                raise TraitError(f"the traits contradict each other: {relation.text} does not hold for {values}",
                                 where=self.op)
        return Request(self.op, traits, tuple(open_traits), detected)
