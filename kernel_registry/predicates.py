"""What a line under `when:` means: a set of values of one trait.

Three kinds of set cover every trait: `Ints` (unions of ranges, with an optional multiple), `Words` (text, dtypes and
booleans: these, or all but these) and `Platforms` (ranges of architectures). Each answers three questions:

    admits(value)   does it contain this value?                      the verdict of a dispatch
    covers(other)   does it provably contain all of another set?     which of two implementations is narrower
    meets(other)    could a value lie in both?                       whether two implementations compete at all

`covers` never says yes without proof and `meets` never says no without proof.
"""

from __future__ import annotations

from math import inf, lcm

from .traits.platform import KNOWN, Platform, PlatformPattern
from .traits.trait import Trait, written

ANY = "any"  # the word in YAML for "every value", said aloud


class PredicateError(ValueError):
    """The YAML under a trait is not a set of that trait's values; the message says what was expected."""


def value_set(trait: Trait, spec: object) -> "ValueSet":
    """The set that the YAML value `spec` under trait `trait` describes: a value, a list, `any`, a mapping of
    min/max/multiple_of, or `{not: ...}`. Raises PredicateError."""
    read = {"platform": _platforms, "int": _ints}.get(trait.type, _words)
    found = read(trait, spec)
    if found.empty:
        raise PredicateError(f"{trait.name}: nothing is left of {spec}; it would match no value")
    return found


class ValueSet:
    """Base: `text` is how the set reads in YAML, shortened for people; `empty` is whether it provably holds nothing."""

    __slots__ = ("text",)

    def __repr__(self):
        return f"{type(self).__name__}({self.text})"

    def __str__(self):
        return self.text


class Ints(ValueSet):
    """Whole numbers in a union of closed `ranges` (ascending, disjoint), restricted to multiples of `step`."""

    __slots__ = ("ranges", "step", "admits")

    def __init__(self, ranges, step: int = 1, text: str = ""):
        self.step = step
        self.ranges = _merged(ranges, step)
        self.text = text or " or ".join(_range_text(low, high) for low, high in self.ranges) or "nothing"
        self.admits = self._membership()

    def _membership(self):
        step = self.step
        if all(low == high for low, high in self.ranges):
            return frozenset(low for low, _ in self.ranges).__contains__
        if len(self.ranges) == 1:
            (low, high), = self.ranges
            return (lambda v: low <= v <= high) if step == 1 else (lambda v: low <= v <= high and v % step == 0)
        ranges = self.ranges
        return lambda v: v % step == 0 and any(low <= v <= high for low, high in ranges)

    @property
    def empty(self) -> bool:
        return not self.ranges

    def covers(self, other: "Ints") -> bool:
        return all(
            any(low <= a and b <= high for low, high in self.ranges)
            and (other.step % self.step == 0 or (a == b and a % self.step == 0))
            for a, b in other.ranges)

    def meets(self, other: "Ints") -> bool:
        step = lcm(self.step, other.step)
        return any(_up(max(a, c), step) <= min(b, d) for a, b in self.ranges for c, d in other.ranges)

    def edges(self) -> tuple[int, ...]:
        """Values on and just across every boundary of the set; the domain's own limits are for the caller to apply."""
        out = set()
        for low, high in self.ranges:
            for bound in (low, high):
                if bound not in (inf, -inf):
                    out |= {bound - self.step, bound - 1, bound, bound + 1, bound + self.step}
            if self.step > 1:
                base = low if low != -inf else 0
                out |= {base, base + 1}
        return tuple(sorted(out))


class Words(ValueSet):
    """Exactly these `values`, or with `negated` all but these; `domain` is every value there is, when that is known."""

    __slots__ = ("values", "negated", "domain", "admits")

    def __init__(self, values, negated: bool = False, domain=(), text: str = ""):
        values = frozenset(values)
        if negated and domain:
            values, negated = frozenset(domain) - values, False
        self.values, self.negated, self.domain = values, negated, tuple(domain)
        shown = "|".join(sorted(written(v) for v in values)) or "nothing"
        self.text = text or (("not " + shown if values else ANY) if negated else shown)
        self.admits = (lambda v: v not in values) if negated else values.__contains__

    @property
    def empty(self) -> bool:
        return not self.values and not self.negated

    def covers(self, other: "Words") -> bool:
        if self.negated:
            return self.values <= other.values if other.negated else self.values.isdisjoint(other.values)
        return not other.negated and other.values <= self.values

    def meets(self, other: "Words") -> bool:
        if self.negated and other.negated:
            return True
        if self.negated or other.negated:
            finite, cofinite = (other, self) if self.negated else (self, other)
            return not finite.values <= cofinite.values
        return not self.values.isdisjoint(other.values)

    def edges(self) -> tuple:
        return tuple(sorted(self.values | frozenset(self.domain), key=str))


class Platforms(ValueSet):
    """A union of `patterns`, each a range of architectures of one kind ("cuda>=sm_80", "gfx942", "cpu")."""

    __slots__ = ("patterns", "negated", "_known")

    def __init__(self, patterns, negated: bool = False, text: str = ""):
        self.patterns, self.negated = tuple(patterns), negated
        self.text = text or ("not " if negated else "") + "|".join(str(p) for p in self.patterns)
        self._known: dict[Platform, bool] = {}  # a process sees one or two platforms: remember the answer

    def admits(self, platform: Platform) -> bool:
        answer = self._known.get(platform)
        if answer is None:
            answer = any(p.matches(platform) for p in self.patterns) != self.negated
            self._known[platform] = answer
        return answer

    @property
    def empty(self) -> bool:
        return not self.patterns and not self.negated

    def covers(self, other: "Platforms") -> bool:
        if self.negated or other.negated:
            if self.negated and other.negated:  # all but A contains all but B when B contains A
                return Platforms(other.patterns).covers(Platforms(self.patterns))
            if self.negated:
                return not Platforms(self.patterns).meets(other)
            return False
        return all(any(a.covers(b) for a in self.patterns) for b in other.patterns)

    def meets(self, other: "Platforms") -> bool:
        if self.negated and other.negated:
            return True
        if self.negated or other.negated:
            finite, cofinite = (other, self) if self.negated else (self, other)
            return not Platforms(cofinite.patterns).covers(finite)
        return any(a.meets(b) for a in self.patterns for b in other.patterns)

    def edges(self) -> tuple[Platform, ...]:
        return KNOWN


# ---- reading the YAML ------------------------------------------------------------------------------------------------

def _ints(trait: Trait, spec) -> Ints:
    bottom = -inf if trait.minimum is None else trait.minimum
    if spec == ANY:
        return Ints([(bottom, inf)], text=ANY)
    if isinstance(spec, dict):
        if set(spec) == {"not"}:
            inner = _ints(trait, spec["not"])
            if inner.step != 1:
                raise PredicateError(f"{trait.name}: 'not' can't hold multiple_of; write a relation such as "
                                     f"'{trait.name} % {inner.step} != 0'")
            return Ints(_gaps(inner.ranges, bottom), text=f"not ({inner.text})")
        unknown = set(spec) - {"min", "max", "multiple_of"}
        if unknown or not spec:
            raise PredicateError(f"{trait.name}: expected min, max, multiple_of or not, "
                                 f"got {sorted(unknown) or 'nothing'}")
        low, high, step = spec.get("min", bottom), spec.get("max", inf), spec.get("multiple_of", 1)
        for key, value in spec.items():
            if type(value) is not int:
                raise PredicateError(f"{trait.name}.{key}: expected a whole number, got {value!r}")
        if step < 1:
            raise PredicateError(f"{trait.name}.multiple_of: expected at least 1, got {step}")
        if low > high:
            raise PredicateError(f"{trait.name}: min {low} is greater than max {high}: nothing can match")
        low = max(low, bottom)
        return Ints([(low, high)], step, text=_range_text(low, high, step, bottom))
    values = [trait.parse(v) for v in _listed(trait, spec)]
    return Ints([(v, v) for v in values], text="|".join(str(v) for v in sorted(set(values))))


def _words(trait: Trait, spec) -> Words:
    domain = (True, False) if trait.type == "bool" else trait.choices
    if spec == ANY:
        return Words((), negated=True, domain=domain, text=ANY)
    if isinstance(spec, dict):
        if set(spec) != {"not"}:
            raise PredicateError(f"{trait.name}: expected a value, a list or {{not: ...}}, got {spec!r}")
        if spec["not"] == ANY:
            return Words((), domain=domain)
        values = [trait.parse(v) for v in _listed(trait, spec["not"])]
        return Words(values, negated=True, domain=domain, text="not " + "|".join(sorted(map(written, values))))
    return Words([trait.parse(v) for v in _listed(trait, spec)], domain=domain)


def _platforms(trait: Trait, spec) -> Platforms:
    negated = isinstance(spec, dict)
    if negated:
        if set(spec) != {"not"}:
            raise PredicateError(f"platform: expected patterns or {{not: ...}}, got {spec!r}")
        spec = spec["not"]
    if spec == ANY:
        return Platforms(()) if negated else Platforms((), negated=True, text=ANY)
    items = spec if isinstance(spec, list) else [spec]
    if not items or not all(isinstance(item, (str, Platform)) for item in items):
        raise PredicateError("platform: expected a list of patterns such as 'cuda>=sm_80', 'gfx942', 'cpu', "
                             f"got {spec!r}")
    return Platforms([PlatformPattern.parse(str(item)) for item in items], negated)


def _listed(trait: Trait, spec) -> list:
    items = spec if isinstance(spec, list) else [spec]
    if not items:
        raise PredicateError(f"{trait.name}: an empty list matches nothing")
    return items


def _merged(ranges, step: int) -> tuple[tuple[float, float], ...]:
    """Ascending, disjoint, ends pulled in to multiples of `step`, neighbours joined."""
    fitted = []
    for low, high in ranges:
        low = _up(low, step)
        high = high if high == inf else high // step * step
        if low <= high:
            fitted.append((low, high))
    merged: list[tuple[float, float]] = []
    for low, high in sorted(fitted):
        if merged and low <= merged[-1][1] + step:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _up(value, step: int):
    """The smallest multiple of `step` that is not below `value`; -inf has none (and -inf // 1 is not a number)."""
    return value if value == -inf else -(-value // step) * step


def _gaps(ranges, bottom) -> list[tuple[float, float]]:
    out, start = [], bottom
    for low, high in ranges:
        if start < low:
            out.append((start, low - 1))
        start = high + 1
    if start < inf:
        out.append((start, inf))
    return out


def _range_text(low, high, step: int = 1, bottom=None) -> str:
    suffix = f", multiple of {step}" if step > 1 else ""
    if low == high:
        return str(low)
    if high == inf:
        return ("any" if low in (-inf, bottom) and not suffix else f">= {low}" if low not in (-inf, bottom) else "") \
            + (suffix if low not in (-inf, bottom) else suffix[2:])
    return (f"<= {high}" if low in (-inf, bottom) else f"{low}..{high}") + suffix
