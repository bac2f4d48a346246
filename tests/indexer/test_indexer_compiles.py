"""The kernel compiles ahead of time for the architectures it is declared for, without a GPU.

That what comes out is right is tested in the interpreter, and on a GPU where there is one. What is read off the result
is what makes it fast: loads of 16 bytes ahead of their use, the matrix unit, no register in memory.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from indexer_support import layer

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
BOXES = {  # name -> (traits, tokens, options, whether loads go ahead, in 16 bytes)
    "one token": (layer(7168, 128, 64), 1, {}, False),
    "16 tokens": (layer(7168, 128, 64), 16, {}, True),
    "128 tokens": (layer(7168, 128, 64), 128, dict(splits=7, block_k=128), True),
    "float16": (layer(6144, 128, 32, dtype="float16"), 16, {}, True),
    "ragged": (layer(511, 37, 11), 5, {}, False),
}
CODE = '''
import json, math, sys
from contextlib import nullcontext
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_registry.ops.indexer.wk_weights_proj import cases, triton_columns, triton_fused
from kernel_registry.traits.platform import Platform

SHORT = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
arch, target, boxes = json.loads(sys.argv[1])
kernels, seen = {True: triton_fused.fused_kernel, False: triton_columns.column_kernel}, []


class Recorder:  # what the factory's kernel would launch, without launching
    def __getitem__(self, grid):
        return lambda *arguments, **keywords: seen.append((grid, arguments, keywords))


triton_fused.fused_kernel = triton_columns.column_kernel = Recorder()
triton_fused.on_gpu = triton_columns.on_gpu = lambda device: nullcontext()
for traits, tokens, options, _ in boxes:
    args, kwargs = cases.inputs(traits, tokens)
    module, kernel = (triton_fused if tokens > 4 else triton_columns), kernels[tokens > 4]
    module.fused(**traits, **options, platform=Platform.parse(arch))(*args, **kwargs)
    grid, arguments, keywords = seen.pop()
    assert not seen  # one launch
    constants = {name: keywords.pop(name) for name in list(keywords) if name in kernel.arg_names}
    types, divisible = {}, []
    for name, value in zip(kernel.arg_names, arguments):
        types[name] = SHORT[value.dtype] if torch.is_tensor(value) else "i32"
        if torch.is_tensor(value) or name != "tokens" and value % 16 == 0:  # torch.empty's tensors are aligned
            divisible.append(name)
    result = triton.compile(
        ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
                  constexprs=constants,
                  attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}),
        target=GPUTarget(*target), options=keywords)
    ptx = result.asm["ptx"]
    assert ("griddepcontrol.wait" in ptx) == (target[1] >= 90)
    print("RESULT " + json.dumps(dict(
        size=len(result.asm["cubin"]), shared=result.metadata.shared, programs=math.prod(grid),
        ahead=ptx.count("cp.async.cg.shared.global"), wide=ptx.count("ld.global.v4"),
        matrix=ptx.count("mma.sync"), other=ptx.count("wgmma.mma") + ptx.count("tcgen05.mma"), spills=".local" in ptx,
        atomics=sum("atom." in line and "acq_rel" in line for line in ptx.splitlines()))))
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch, python, tmp_path):
    output = python(CODE, json.dumps([arch, TARGETS[arch], list(BOXES.values())]),
                    TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = [json.loads(line) for line in output.split("RESULT ")[1:]]
    assert len(done) == len(BOXES)
    for (name, (*_, aligned)), got in zip(BOXES.items(), done):
        print(f"{arch} {name}: {got}")
        assert got["size"] > 1000 and got["shared"] <= 99 * 1024 and not got["spills"], name
        few = name == "one token"
        assert (got["matrix"] > 0) != few and not got["other"], name  # one instruction for every tile: the same bits
        assert got["atomics"] == (0 if few else 1), name
        assert not few or got["wide"] == 8, name  # two steps, of hidden states and of weights
        assert (got["ahead"] > 0) == aligned, name
