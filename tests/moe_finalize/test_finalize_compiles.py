"""The kernel compiles ahead of time for every architecture it is declared for, without a GPU.

That what comes out is right is tested in the interpreter, and on a GPU where there is one. What is read off the result
is what makes it fast: loads of 16 bytes, all of them before the first addition, nothing in shared memory.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from finalize_support import REDUCED, layer

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx90a": ("hip", "gfx90a", 64), "gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64),
           "gfx1100": ("hip", "gfx1100", 32), "gfx1250": ("hip", "gfx1250", 32)}
BOXES = {  # name -> (traits, columns a program, flavour, vectors of 16 bytes loaded on NVIDIA; None: narrower ones)
    "deepseek": (layer(256, 8, 7168, has_shared=True), 1024, "random", 9),
    "few tokens": (layer(256, 8, 7168), 256, "random", 8),
    "expert parallel": (layer(32, 16, 2880, expert_parallel=True, output_alias=True), 256, "wide_ids", 16),
    "float32 rows": (layer(64, 4, 2048, dtype="float32", weights_applied=True), 256, "no_ids", 8),
    "reduced": (layer(64, 6, 5120, has_shared=True, **REDUCED), 1024, "random", 2),
    "strided": (layer(64, 2, 511, dtype="float16", out_dtype="float32"), 512, "strided", None),
}
CODE = '''
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_registry.ops.moe.finalize import cases, triton_finalize
from kernel_registry.traits.platform import Platform

SHORT = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
         torch.int64: "*i64"}
target, arch, boxes = json.loads(sys.argv[1])
kernel, seen = triton_finalize.finalize_kernel, []


class Recorder:  # what the factory's kernel would launch, without launching
    def __getitem__(self, grid):
        return lambda *arguments, **keywords: seen.append((grid, arguments, keywords))


triton_finalize.finalize_kernel, triton_finalize.INTERPRETED = Recorder(), True
for traits, columns, flavour in boxes:
    args, kwargs = cases.inputs(traits, 3, seed=1, flavour=flavour)
    made = triton_finalize.finalize(**traits, platform=Platform.parse(arch), columns_per_program=columns)
    made(*args, **kwargs)
    grid, arguments, keywords = seen.pop()
    assert grid == (3, -(-traits["hidden_size"] // columns)), grid
    constants = {name: keywords.pop(name) for name in list(keywords) if name in kernel.arg_names}
    types, divisible = {}, []
    for name, value in zip(kernel.arg_names, arguments):
        if value is None or type(value) is int and value == 1:
            constants[name] = value
            continue
        types[name] = SHORT[value.dtype] if torch.is_tensor(value) else "fp32" if type(value) is float else "i32"
        if (value.data_ptr() if torch.is_tensor(value) else value if type(value) is int else 1) % 16 == 0:
            divisible.append(name)
    result = triton.compile(
        ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
                  constexprs=constants,
                  attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}),
        target=GPUTarget(*target), options=keywords)
    ptx = result.asm.get("ptx", "").splitlines()
    loads = [n for n, line in enumerate(ptx) if "ld.global" in line and ".v4.b32" in line]
    sums = [n for n, line in enumerate(ptx) if line.strip().startswith(("fma.rn.f32", "add.f32", "add.rn.f32"))]
    print("RESULT " + json.dumps(dict(
        size=len(result.asm["cubin" if target[0] == "cuda" else "hsaco"]), shared=result.metadata.shared,
        vectors=len(loads), early=not (loads and sums) or max(loads) < min(sums))))
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch, python, tmp_path):
    boxes = [box[:3] for box in BOXES.values()]
    output = python(CODE, json.dumps([TARGETS[arch], arch, boxes]), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = [json.loads(line) for line in output.split("RESULT ")[1:]]
    assert len(done) == len(BOXES)
    for (name, (*_, vectors)), got in zip(BOXES.items(), done):
        print(f"{arch} {name}: {got}")
        assert got["size"] > 1000 and got["shared"] == 0, name
        if arch.startswith("sm") and vectors is not None:
            assert got["vectors"] == vectors and got["early"], name
