"""Fixtures of the routing tests: the same tests run on CUDA tensors where there is a GPU, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests import interpreted


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def whole_reductions():
    """Many times as fast in the interpreter, with the same results."""
    with pytest.MonkeyPatch.context() as patch:
        interpreted.whole_reductions(patch)
        yield


@pytest.fixture
def tiles_of():
    """tiles_of(rows): interpreted.wide_tiles, the last call of which counts."""
    with pytest.MonkeyPatch.context() as patch:
        def tiles_of(rows):
            patch.undo()
            interpreted.wide_tiles(patch, rows)

        yield tiles_of
