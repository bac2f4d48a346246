"""What the tests of overrides share: implementations to choose from."""

from __future__ import annotations

NAMES = ("shipped", "file1", "file2", "environment", "model", "context", "call")
EVERY = {name: {"when": {"groups": "any", "scoring": "any"}, "rank": -i} for i, name in enumerate(NAMES)}
TWO = {"a": {"size": {"max": 64}}, "b": {"when": {"groups": "any"}, "fallback": True}}
