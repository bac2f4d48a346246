"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
import tiled_toy
import variants_support


@pytest.fixture
def family(toy):
    """FAMILY with a target that tells its options."""
    target = f"{toy.module(variants_support.KERNELS)}:rows"
    return {**variants_support.FAMILY, "a": {"target": target, **variants_support.FAMILY["a"]}}


@pytest.fixture
def tiled(toy, monkeypatch):
    """A Toy whose implementation `a` takes tiles, on a machine with one H200."""
    toy.kernels, toy.tiles = toy.module(tiled_toy.KERNELS), toy.module(tiled_toy.TILES)
    toy.entry = {"target": f"{toy.kernels}:a", "tiles": toy.tiles, "when": {"groups": "any"}}
    tiled_toy.on_device(monkeypatch, "NVIDIA H200", "sm_90")
    return toy
