"""Fixtures of the indexer's tests: they run on CUDA tensors where there is a GPU, else in the interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
