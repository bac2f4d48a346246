"""Fixtures of moe.routing_bias's tests."""

from __future__ import annotations

import pytest

from kernel_registry import Registry


@pytest.fixture(scope="module")
def registry():
    return Registry(plugins=False, environment=False, platform="cpu")
