"""Trait: one named property of a call that may decide which kernel serves it.

A trait makes values canonical, so that equal calls have equal traits, and refuses everything else: True is not the
number 1, "fp32" is "float32", and a misspelt choice is an error that names the choices.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dtype import dtype_name
from .platform import Platform

TYPES = ("int", "bool", "str", "dtype", "platform")
KINDS = ("semantic", "layout", "performance", "platform")


class TraitValueError(ValueError):
    """A value that a trait can't have; the message names the trait, what it got and what it expected."""


class _Required:
    """The default of a trait that the caller must give. One object, also after a copy or a pickle."""

    __slots__ = ()

    def __repr__(self):
        return "REQUIRED"

    def __reduce__(self):
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True, slots=True)
class Trait:
    """One property of a call.

    name      how callers, registry.yaml and explanations spell it
    type      int | bool | str | dtype | platform
    kind      what silence about it means. An implementation that does not mention a *semantic* or *layout* trait serves
              only its default; one that does not mention a *performance* trait serves any value; the *platform* must
              be mentioned.
    default   the neutral value, already canonical; REQUIRED = the caller gives it (a platform is detected instead)
    choices   for str: every value there is, () when any word will do
    minimum   for int: the least value
    dynamic   may be left to the call, e.g. num_tokens
    doc       one line for people
    """

    name: str
    type: str
    kind: str
    default: object = REQUIRED
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    dynamic: bool = False
    doc: str = ""

    def __post_init__(self):
        problem = None
        if not isinstance(self.name, str) or not self.name.isidentifier():
            problem = "a trait's name is an identifier"
        elif self.type not in TYPES:
            problem = f"type is one of {', '.join(TYPES)}, not {self.type!r}"
        elif self.kind not in KINDS:
            problem = f"kind is one of {', '.join(KINDS)}, not {self.kind!r}"
        elif (self.type == "platform") != (self.kind == "platform"):
            problem = "the type platform and the kind platform go together"
        elif self.choices and self.type != "str":
            problem = "choices are for the type str"
        elif self.minimum is not None and self.type != "int":
            problem = "a minimum is for the type int"
        if problem:
            raise ValueError(f"trait {self.name!r}: {problem}")
        if self.default is not REQUIRED and self.parse(self.default) != self.default:
            raise ValueError(f"trait {self.name!r}: the default {self.default!r} is not canonical, "
                             f"{self.parse(self.default)!r} is")

    def parse(self, value: object):
        """`value` made canonical: an int, bool, str, dtype name or Platform. Raises TraitValueError."""
        return _PARSERS[self.type](self, value)

    @property
    def expected(self) -> str:
        """What values there are, for messages."""
        if self.type == "int":
            return "a whole number" + ("" if self.minimum is None else f" >= {self.minimum}")
        if self.type == "str":
            return f"one of {', '.join(self.choices)}" if self.choices else "a word"
        return {"bool": "true or false", "dtype": "a dtype such as float32 or bfloat16",
                "platform": "a platform such as sm_90, gfx942, cpu or interpreter"}[self.type]

    def _refuse(self, value: object, hint: str = ""):
        return TraitValueError(f"{self.name}: expected {self.expected}, got {_shown(value)}{hint and f'; {hint}'}")


def _parse_int(trait: Trait, value: object) -> int:
    if type(value) is not int:
        from numbers import Integral  # numpy's integers and IntEnum are numbers too; a tensor is not

        if isinstance(value, bool) or not isinstance(value, Integral):
            raise trait._refuse(value)
        value = int(value)
    if trait.minimum is not None and value < trait.minimum:
        raise trait._refuse(value)
    return value


def _parse_bool(trait: Trait, value: object) -> bool:
    if value is not True and value is not False:
        raise trait._refuse(value)
    return value


def _parse_str(trait: Trait, value: object) -> str:
    if not isinstance(value, str) or not value or (trait.choices and value not in trait.choices):
        raise trait._refuse(value, close(value, trait.choices))
    return str(value)


def _parse_dtype(trait: Trait, value: object) -> str:
    try:
        return dtype_name(value)
    except ValueError as error:
        raise trait._refuse(value, str(error)) from None


def _parse_platform(trait: Trait, value: object) -> Platform:
    try:
        return Platform.parse(value)
    except ValueError as error:
        raise trait._refuse(value, str(error)) from None


_PARSERS = {"int": _parse_int, "bool": _parse_bool, "str": _parse_str, "dtype": _parse_dtype,
            "platform": _parse_platform}


def close(value: object, known) -> str:
    """"did you mean 'x'?" for a misspelt `value`, or "" when nothing is close."""
    if not isinstance(value, str) or not known:
        return ""
    from difflib import get_close_matches

    near = get_close_matches(value.lower(), [str(k) for k in known], n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def written(value: object) -> str:
    """A canonical value as it is written in YAML and on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: object) -> str:
    """A short, safe repr: a tensor or a broken __repr__ must not turn a message into a page or a second error."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
