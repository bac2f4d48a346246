"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
from variants_support import FAMILY, KERNELS


@pytest.fixture
def family(toy):
    """FAMILY with a target that tells its options."""
    target = f"{toy.module(KERNELS)}:rows"
    return {**FAMILY, "a": {"target": target, **FAMILY["a"]}}
