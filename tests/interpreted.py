"""Triton's interpreter made quicker for the tests, without a change of what is computed, and the command line in it:

    TRITON_INTERPRET=1 python -m tests.interpreted verify --budget 9
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest


def quick(patch: pytest.MonkeyPatch) -> None:
    """All that no kernel can tell."""
    whole_reductions(patch)
    language_once(patch)
    dtypes_once(patch)


def whole_reductions(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter combines element by element in a reduction that it does not know; here, row by row of them,
    in the same order: it took most of the tests' time."""
    from triton.runtime import interpreter

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


def language_once(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks all of triton.language through for what to replace at every call of a function inside
    a kernel; here, at the first of a launch: it took half of what whole_reductions left."""
    from triton.runtime import interpreter

    original, language = interpreter._patch_lang, interpreter.tl

    def patch_lang(fn):
        seen = [module for module in (language, language.core) if any(v is module for v in fn.__globals__.values())]
        replaced = seen and not any(language.core.is_builtin(module.load) for module in seen)
        return SimpleNamespace(restore=lambda: None) if replaced else original(fn)  # undone by who did it

    patch.setattr(interpreter, "_patch_lang", patch_lang)


def dtypes_once(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes a table of all dtypes each time that it looks one up; here, once for each of them."""
    from triton.runtime import interpreter

    original = interpreter._get_np_dtype
    kept = lru_cache(maxsize=None)(original)
    patch.setattr(interpreter, "_get_np_dtype", lambda of: (  # pointers have no hash
        kept(of.scalar) if type(of.scalar) is interpreter.tl.dtype else original(of)))


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
    quick(for_all)
    wide_tiles(for_all, 256)
    main(prog_name="kernel-registry")
