"""Fixtures of the routing tests: the same tests run on CUDA tensors where there is a GPU, else in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def whole_reductions():
    """Triton's interpreter combines element by element in a reduction that it does not know; here, row by row of them,
    in the same order: it took most of the tests' time."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self, inputs):
        if self.axis is None or self.keep_dims:
            return original(self, inputs)
        parts = [[self.to_tensor(part, x.dtype) for part in np.moveaxis(x.handle.data, self.axis, 0)] for x in inputs]
        total, *others = zip(*parts)
        for some in others:
            total = self.combine_fn.fn(*total, *some)
            total = total if isinstance(total, tuple) else (total,)
        return list(total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)
        yield


@pytest.fixture
def tiles_of(monkeypatch):
    """tiles_of(rows) has the Triton routers made from then on take that many rows a tile, or up to the next power of
    two, where Triton is interpreted: it takes little more time over many rows than over few. On a GPU a tile is a row.
    """
    from kernel_registry.ops.moe.topk import kept_launch, triton_router

    place, original = kept_launch.ARGUMENTS.index("num_tokens"), triton_router.kept_launch

    def tiles_of(rows):
        rows = 1 << (rows - 1).bit_length()

        def wide(kernel, constants, options):
            launch, step = original(kernel, {**constants, "ROWS": rows}, options), constants["TILES"] * rows
            return lambda programs, *arguments: launch(-(-arguments[place] // step), *arguments)

        if triton_router.INTERPRETED:
            monkeypatch.setattr(triton_router, "kept_launch", wide)

    return tiles_of
