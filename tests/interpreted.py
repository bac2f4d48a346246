"""Triton's interpreter made quicker for the tests, without a change of what is computed, and the command line in it:

    TRITON_INTERPRET=1 python -m tests.interpreted verify --budget 9
"""

from __future__ import annotations

import numpy as np
import pytest


def whole_reductions(patch: pytest.MonkeyPatch) -> None:
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

    patch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)


def wide_tiles(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Has the Triton routers made from then on take that many rows a tile, or up to the next power of two, where Triton
    is interpreted: it takes little more time over many rows than over few. On a GPU a tile is a row."""
    from kernel_registry.ops.moe.topk import kept_launch, triton_router

    place, original = kept_launch.ARGUMENTS.index("num_tokens"), triton_router.kept_launch
    rows = 1 << (rows - 1).bit_length()

    def wide(kernel, constants, options):
        launch, step = original(kernel, {**constants, "ROWS": rows}, options), constants["TILES"] * rows
        return lambda programs, *arguments: launch(-(-arguments[place] // step), *arguments)

    if triton_router.INTERPRETED:
        patch.setattr(triton_router, "kept_launch", wide)


if __name__ == "__main__":
    from kernel_registry.cli import main

    for_all = pytest.MonkeyPatch()
    whole_reductions(for_all)
    wide_tiles(for_all, 256)
    main(prog_name="kernel-registry")
