"""Machines and patterns of machines.

A `Platform` is one machine: NVIDIA compute capability, AMD gfx target, plain CPU, or Triton's interpreter (which runs
GPU kernels on the CPU). A `PlatformPattern` is a range of architectures of one kind: "cuda>=sm_80,<sm_100", "gfx942".

Architectures compare as numbers: sm_100 is (10, 0); gfx90a is (9, 0, 10), the last two digits being hexadecimal. The
order says nothing about families: gfx1100 (a graphics part) is above gfx950 (an accelerator), so bound `hip>=` from
above where that matters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_SM = re.compile(r"sm_([1-9][0-9]?)([0-9])")
_GFX = re.compile(r"gfx([1-9][0-9]?)([0-9a-f])([0-9a-f])")
_BARE = ("cpu", "interpreter")
_DEVICE_KINDS = {"cuda": "sm_80", "hip": "gfx942"}  # kind -> an example of its architectures
_NAMES = "sm_90, gfx942, cpu or interpreter"


class PlatformError(ValueError):
    """Text that names no platform, or no pattern of platforms."""


def _arch(text: str) -> tuple[str, tuple[int, ...]] | None:
    """("cuda", (9, 0)) for "sm_90", ("hip", (9, 4, 2)) for "gfx942", None for anything else."""
    match = _SM.fullmatch(text)
    if match:
        return "cuda", (int(match[1]), int(match[2]))
    match = _GFX.fullmatch(text)
    if match:
        return "hip", (int(match[1]), int(match[2], 16), int(match[3], 16))
    return None


@dataclass(frozen=True, slots=True)
class Platform:
    """One machine. `kind` is cuda, hip, cpu or interpreter; `arch` is (9, 0) for sm_90, (9, 4, 2) for gfx942, and ()
    for the last two kinds. str() gives the name that `parse` takes."""

    kind: str
    arch: tuple[int, ...] = ()

    def __post_init__(self):
        digits = {"cuda": (100, 10), "hip": (100, 16, 16), "cpu": (), "interpreter": ()}.get(self.kind)
        fits = (digits is not None and isinstance(self.arch, tuple) and len(self.arch) == len(digits)
                and all(type(n) is int and 0 <= n < limit for n, limit in zip(self.arch, digits))
                and (not digits or self.arch[0] > 0))
        if not fits:
            raise PlatformError(f"kind {self.kind!r} with architecture {self.arch!r} is no platform; expected {_NAMES}")

    @classmethod
    def parse(cls, value: "str | Platform") -> "Platform":
        """The platform called `value`: "sm_90", "gfx942", "cpu", "interpreter". Raises PlatformError."""
        if isinstance(value, Platform):
            return value
        if not isinstance(value, str):
            raise PlatformError(f"{type(value).__name__} is not a platform; expected {_NAMES}")
        if value in _BARE:
            return cls(value)
        arch = _arch(value)
        if arch is None:
            raise PlatformError(f"unknown platform {value!r}; {_advice(value)}")
        return cls(*arch)

    def __str__(self):
        if self.kind == "cuda":
            return f"sm_{self.arch[0]}{self.arch[1]}"
        if self.kind == "hip":
            return f"gfx{self.arch[0]}{self.arch[1]:x}{self.arch[2]:x}"
        return self.kind


KNOWN = tuple(map(Platform.parse, (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120",
    "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1250", "cpu", "interpreter")))
"""Well-known platforms, for lint, plan and coverage. Any other sm_ or gfx is a platform too."""


class Bound(NamedTuple):
    """One end of a range of architectures."""

    arch: tuple[int, ...]
    inclusive: bool


@dataclass(frozen=True, slots=True)
class PlatformPattern:
    """A range of architectures of one kind. `low` and `high` are its ends, None = open; a cpu has none."""

    kind: str
    low: Bound | None = None
    high: Bound | None = None

    @classmethod
    def parse(cls, text: "str | PlatformPattern") -> "PlatformPattern":
        """Reads "cuda", "cuda>=sm_80", "hip<gfx950", "cuda>=sm_80,<sm_100", "cuda==sm_90", "sm_90", "cpu",
        "interpreter". Raises PlatformError for anything else, and for a range that holds nothing."""
        if isinstance(text, PlatformPattern):
            return text
        if not isinstance(text, str):
            raise PlatformError(f"{type(text).__name__} is not a platform pattern; expected text such as 'cuda>=sm_80'")
        compact = "".join(text.split())
        if compact in _BARE or compact in _DEVICE_KINDS:
            return cls(compact)
        exact = _arch(compact)
        if exact:
            return cls(exact[0], Bound(exact[1], True), Bound(exact[1], True))
        kind = next((k for k in _DEVICE_KINDS if compact.startswith(k)), None)
        if kind is None:
            raise PlatformError(f"{text!r} is no platform pattern; {_advice(compact)}")
        low = high = None
        for clause in compact[len(kind):].split(","):
            operator = re.match(r"[<>=!~]*", clause)[0]
            arch = _arch(clause[len(operator):])
            if operator not in ("<", "<=", ">", ">=", "==") or arch is None:
                raise PlatformError(f"{text!r}: {clause!r} is no bound; expected <, <=, ==, >= or > and an "
                                    f"architecture such as {_DEVICE_KINDS[kind]}")
            if arch[0] != kind:
                raise PlatformError(f"{text!r}: {clause[len(operator):]} is an architecture of {arch[0]}, "
                                    f"not of {kind}")
            bound = Bound(arch[1], "=" in operator)
            if (low is not None and operator[0] in ">=") or (high is not None and operator[0] in "<="):
                raise PlatformError(f"{text!r}: one lower and one upper bound are enough")
            low = bound if operator[0] in ">=" else low
            high = bound if operator[0] in "<=" else high
        if not _overlap(low, high):
            raise PlatformError(f"{text!r}: nothing lies between its bounds")
        return cls(kind, low, high)

    def matches(self, platform: Platform) -> bool:
        """Whether `platform` lies in the range."""
        return self.covers(PlatformPattern(platform.kind, *[Bound(platform.arch, True) if platform.arch else None] * 2))

    def covers(self, other: "PlatformPattern") -> bool:
        """Whether every platform of `other` is provably one of this pattern."""
        return self.kind == other.kind and _reaches(other.low, self.low, 1) and _reaches(other.high, self.high, -1)

    def meets(self, other: "PlatformPattern") -> bool:
        """Whether a platform could lie in both."""
        return self.kind == other.kind and _overlap(self.low, other.high) and _overlap(other.low, self.high)

    def __str__(self):
        name = lambda bound: str(Platform(self.kind, bound.arch))  # noqa: E731
        if self.low is not None and self.low == self.high:
            return name(self.low)
        ends = [sign + ("=" if bound.inclusive else "") + name(bound)
                for sign, bound in ((">", self.low), ("<", self.high)) if bound is not None]
        return self.kind + ",".join(ends)


def _overlap(low: Bound | None, high: Bound | None) -> bool:
    if low is None or high is None:
        return True
    return low.arch < high.arch or (low.arch == high.arch and low.inclusive and high.inclusive)


def _reaches(inner: Bound | None, outer: Bound | None, sign: int) -> bool:
    """Whether the `inner` end is at or inside the `outer` end; sign 1 for lower ends, -1 for upper ones."""
    if outer is None or inner is None:
        return outer is None
    if inner.arch != outer.arch:
        return (inner.arch > outer.arch) == (sign > 0)
    return outer.inclusive or not inner.inclusive


def _advice(text: str) -> str:
    """What to write instead of `text`."""
    suffixed = re.fullmatch(r"(sm_[0-9]{2,3})[af]", text)
    if suffixed:
        return f"the suffix belongs to compilation targets, the machine is {suffixed[1]}"
    from difflib import get_close_matches

    near = get_close_matches(text.lower(), [*map(str, KNOWN), *_DEVICE_KINDS], n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"expected {_NAMES}"


def detect() -> Platform:
    """The machine this process would run on; never raises. See `kernel_registry.traits.detection`."""
    return detect_with_reason()[0]


def detect_with_reason() -> tuple[Platform, str]:
    """`detect()`, and what it was seen by, in words."""
    from .detection import look

    return look()
