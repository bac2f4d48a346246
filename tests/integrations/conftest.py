"""Whether the registry's kernels ran, for the tests of adapters."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.fixture
def ran(monkeypatch):
    """Counts the kernels of the registry that ran, by op: what `dispatch` returns, called."""
    from kernel_registry import registry

    counts: Counter = Counter()
    dispatch = registry.dispatch

    def counting(op, **traits):
        kernel = dispatch(op, **traits)

        def call(*args, **kwargs):
            counts[op] += 1
            return kernel(*args, **kwargs)
        return call

    monkeypatch.setattr(registry, "dispatch", counting)
    return counts
