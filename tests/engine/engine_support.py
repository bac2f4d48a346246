"""What the engine's tests share."""

from __future__ import annotations

from types import SimpleNamespace


def call(tokens=1, contiguous=True):
    """What a kernel of the toy op is called with."""
    return SimpleNamespace(tokens=tokens, contiguous=contiguous)
