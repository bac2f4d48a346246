"""The processes that the tests of this folder share, and the backends that this machine has."""

from __future__ import annotations

import pytest
from ranks_support import Ranks


@pytest.fixture(scope="session")
def ranks():
    pytest.importorskip("torch.distributed")
    every = Ranks()
    yield every
    every.stop()


def pytest_generate_tests(metafunc):
    """`backend` and `world`: gloo on the CPU everywhere, NCCL with a GPU for each rank where there are as many."""
    if {"backend", "world"} <= {*metafunc.fixturenames}:
        torch = pytest.importorskip("torch")
        gpus = torch.cuda.device_count()
        cases = [pytest.param(backend, world, id=f"{backend}-{world}", marks=pytest.mark.skipif(
            backend == "nccl" and gpus < world, reason=f"NCCL with {world} ranks needs {world} GPUs, {gpus} here"))
            for backend in ("gloo", "nccl") for world in (2, 4)]
        metafunc.parametrize(("backend", "world"), cases)
