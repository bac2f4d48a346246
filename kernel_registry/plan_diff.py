"""What one plan has otherwise than another, told in lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Iterator, Mapping

from .traits.trait import written

if TYPE_CHECKING:
    from .plan import Plan


def differences(one: "Plan", other: "Plan") -> Iterator[str]:
    """What `other` has otherwise than `one`: first where it runs, then call by call."""
    if one.device != other.device:
        yield f"device: {one.device} -> {other.device}"
    yield from _changed("", one.versions, other.versions)
    mine, theirs = ({_title(call): call for call in plan.calls} for plan in (one, other))
    for title in sorted({*mine, *theirs}):
        a, b = mine.get(title), theirs.get(title)
        if a is None or b is None:
            yield f"{'+' if a is None else '-'} {title}: {_choices(b or a)}"
            continue
        if a["table"] != b["table"]:
            yield f"~ {title}: {_choices(a)} -> {_choices(b)}"
        for name in sorted({*a["sources"]} & {*b["sources"]}):
            yield from (f"~ {title}: {told}" for told in _of_implementation(name, a, b))


def _of_implementation(name: str, a: dict, b: dict) -> Iterator[str]:
    """What two plans' entries of one call say otherwise of an implementation that both of them run."""
    tiles = list(_tiles_apart(*(call.get("tiles", {}).get(name, {}) for call in (a, b))))
    yield from (f"tiles of {name}: {told}" for told in tiles)
    if a["sources"][name] != b["sources"][name] and not tiles:  # tiles are a part of the source
        yield f"the source of {name} changed"
    had, has = (call.get("prepare", {}).get(name, "absent") for call in (a, b))
    if had != has:
        yield f"the preparation of {name}: {had} -> {has}"
    had, has = (spelt(call.get("options", {}).get(name, {})) for call in (a, b))
    yield from _changed("option ", had, has, f" of {name}")


def _changed(kind: str, had: Mapping[str, str], has: Mapping[str, str], of: str = "") -> Iterator[str]:
    for key in sorted({*had, *has}):
        if had.get(key) != has.get(key):
            yield f"{kind}{key}{of}: {had.get(key, 'absent')} -> {has.get(key, 'absent')}"


def _tiles_apart(a: dict, b: dict) -> Iterator[str]:
    """What differs between the tiles that two plans hold for one implementation."""
    if a.get("device") != b.get("device"):
        yield f"for {a.get('device', 'an unknown device')} -> for {b.get('device', 'an unknown device')}"
    had, has = ({n: json.dumps(tile) for n, tile in tiles.get("num_tokens", {}).items()} for tiles in (a, b))
    for count in sorted({*had, *has}, key=int):
        if had.get(count) != has.get(count):
            yield f"for {count} tokens: {had.get(count, 'not tuned')} -> {has.get(count, 'not tuned')}"


def _title(call: dict) -> str:
    scope = f"[{call['model']}] " if call["model"] else ""
    return f"{scope}{call['op']}({', '.join(f'{k}={written(v)}' for k, v in sorted(call['traits'].items()))})"


def _choices(call: dict) -> str:
    return " | ".join(f"{row['implementation']}{_when(row['when'])} ({row['decided_by']})" for row in call["table"])


def _when(when: Mapping[str, object]) -> str:
    """The same for a plan just frozen and for one that was read back, whose keys are in the order of their names."""
    told = {trait: dict(sorted(piece.items(), reverse=True)) if isinstance(piece, dict) else piece  # min before max
            for trait, piece in sorted(when.items())}
    return f" when {json.dumps(told)}".replace('"', "") if told else ""


def spelt(options: Mapping[str, object]) -> dict[str, str]:
    """`options` with their values as JSON: 1, 1.0 and true are equal in Python, and three different options."""
    return {name: json.dumps(value) for name, value in options.items()}
