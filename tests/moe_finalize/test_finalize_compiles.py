"""The kernel compiles ahead of time for every architecture it is declared for, without a GPU.

That what comes out is right is tested in the interpreter, and on a GPU where there is one. What is read off the result
is what makes it fast: loads of 16 bytes, all of them before the first addition, nothing in shared memory.
"""

from __future__ import annotations

import pytest
from finalize_support import REDUCED, layer

from tests import compiled

BOXES = {  # name -> (traits, columns a program, flavour, vectors of 16 bytes loaded on NVIDIA; None: narrower ones)
    "deepseek": (layer(256, 8, 7168, has_shared=True), 1024, "random", 9),
    "few tokens": (layer(256, 8, 7168), 256, "random", 8),
    "expert parallel": (layer(32, 16, 2880, expert_parallel=True, output_alias=True), 256, "wide_ids", 16),
    "float32 rows": (layer(64, 4, 2048, dtype="float32", weights_applied=True), 256, "no_ids", 8),
    "reduced": (layer(64, 6, 5120, has_shared=True, **REDUCED), 1024, "random", 2),
    "strided": (layer(64, 2, 511, dtype="float16", out_dtype="float32"), 512, "strided", None),
}
CODE = '''
from kernel_registry.ops.moe.finalize import cases, triton_finalize
from kernel_registry.traits.platform import Platform
from tests.compiled import Recorder, asked, build_launched, tell

target, arch, boxes = asked()
kernel, recorder = triton_finalize.finalize_kernel, Recorder()
triton_finalize.finalize_kernel, triton_finalize.INTERPRETED = recorder, True
for traits, columns, flavour in boxes:
    args, kwargs = cases.inputs(traits, 3, seed=1, flavour=flavour)
    made = triton_finalize.finalize(**traits, platform=Platform.parse(arch), columns_per_program=columns)
    made(*args, **kwargs)
    grid, arguments, keywords = recorder.seen.pop()
    assert grid == (3, -(-traits["hidden_size"] // columns)), grid
    result = build_launched(kernel, arguments, keywords, target)
    ptx = result.asm.get("ptx", "").splitlines()
    loads = [n for n, line in enumerate(ptx) if "ld.global" in line and ".v4.b32" in line]
    sums = [n for n, line in enumerate(ptx) if line.strip().startswith(("fma.rn.f32", "add.f32", "add.rn.f32"))]
    tell(dict(size=len(result.asm["cubin" if target.backend == "cuda" else "hsaco"]), shared=result.metadata.shared,
              vectors=len(loads), early=not (loads and sums) or max(loads) < min(sums)))
'''


@compiled.needs_triton
@pytest.mark.parametrize("arch", compiled.EVERYWHERE)
def test_compiles(arch, python, tmp_path):
    done = compiled.results(python, tmp_path, CODE, arch, [box[:3] for box in BOXES.values()])
    assert len(done) == len(BOXES)
    for (name, (*_, vectors)), got in zip(BOXES.items(), done):
        print(f"{arch} {name}: {got}")
        assert got["size"] > 1000 and got["shared"] == 0, name
        if arch.startswith("sm") and vectors is not None:
            assert got["vectors"] == vectors and got["early"], name
