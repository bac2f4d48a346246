"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
from tiled_toy import KERNELS, TILES, on_device


@pytest.fixture
def tiled(toy, monkeypatch):
    """A Toy whose implementation `a` takes tiles, on a machine with one H200."""
    toy.kernels, toy.tiles = toy.module(KERNELS), toy.module(TILES)
    toy.entry = {"target": f"{toy.kernels}:a", "tiles": toy.tiles, "when": {"groups": "any"}}
    on_device(monkeypatch, "NVIDIA H200", "sm_90")
    return toy
