"""A toy op whose implementation `a` takes tiles, and tiles files for it."""

from __future__ import annotations

from types import SimpleNamespace

import yaml

from kernel_registry.traits.detection import Gpu
from kernel_registry.traits.platform import Platform

KERNELS = '''
def a(*, tiles, **traits):
    """Its kernel gives the tile of a call, as the real ones launch with it."""
    return lambda x: tiles(x.tokens)


def with_options(*, tiles, rows=1):
    return lambda x: (rows, tiles(x.tokens))


def without(**traits):
    return lambda x: None
'''
TILES = '''
def default(traits, num_tokens):
    return {"up": {"M": num_tokens, "fast": traits["groups"] > 1}, "warps": 4}


def candidates(traits, num_tokens):
    return []
'''
TILE = "{up: {M: %d, fast: true}, warps: 8}"


def tile(m):
    return {"up": {"M": m, "fast": True}, "warps": 8}


def default(tokens):
    """What TILES says for groups=1."""
    return {"up": {"M": tokens, "fast": False}, "warps": 4}


def call(tokens):
    return SimpleNamespace(tokens=tokens, contiguous=True)


def on_device(monkeypatch, name, platform):
    monkeypatch.setattr("kernel_registry.tiles.find", lambda: (Gpu("", Platform.parse(platform), name), "a fake"))


def row(counts, **other):
    """An entry of a tiles file: number of tokens -> M."""
    return {"device": "NVIDIA H200", "op": "toy.op", "implementation": "a", "traits": {"size": 8},
            "num_tokens": {n: tile(m) for n, m in counts.items()}, **other}


def tiles_file(toy, *rows, name="tuned.yaml"):
    return toy.write(yaml.safe_dump({"version": 1, "tiles": list(rows)}, sort_keys=False), name)


def open_registry(toy, *rows, **options):
    registry = toy.registry({"a": toy.entry}, **options)
    if rows:
        registry.load_tiles(tiles_file(toy, *rows))
    return registry
