"""The kernel compiles ahead of time for the architectures it is declared for, without a GPU.

That what comes out is right is tested in the interpreter, and on a GPU where there is one. What is read off the result
is what makes it fast: loads of 16 bytes ahead of their use, the matrix unit, no register in memory.
"""

from __future__ import annotations

import pytest
from indexer_support import layer

from tests import compiled

BOXES = {  # name -> (traits, tokens, options, whether loads go ahead, in 16 bytes)
    "one token": (layer(7168, 128, 64), 1, {}, False),
    "16 tokens": (layer(7168, 128, 64), 16, {}, True),
    "128 tokens": (layer(7168, 128, 64), 128, dict(splits=7, block_k=128), True),
    "float16": (layer(6144, 128, 32, dtype="float16"), 16, {}, True),
    "ragged": (layer(511, 37, 11), 5, {}, False),
}
CODE = '''
import math
from contextlib import nullcontext
from kernel_registry.ops.indexer.wk_weights_proj import cases, triton_columns, triton_fused
from kernel_registry.traits.platform import Platform
from tests.compiled import Recorder, asked, build_launched, tell

target, arch, boxes = asked()
kernels, recorder = {True: triton_fused.fused_kernel, False: triton_columns.column_kernel}, Recorder()
triton_fused.fused_kernel = triton_columns.column_kernel = recorder
triton_fused.on_gpu = triton_columns.on_gpu = lambda device: nullcontext()
for traits, tokens, options, _ in boxes:
    args, kwargs = cases.inputs(traits, tokens)
    module, kernel = (triton_fused if tokens > 4 else triton_columns), kernels[tokens > 4]
    module.fused(**traits, **options, platform=Platform.parse(arch))(*args, **kwargs)
    (grid, arguments, keywords), = recorder.seen  # one launch
    recorder.seen.clear()
    result = build_launched(kernel, arguments, keywords, target)
    ptx = result.asm["ptx"]
    assert ("griddepcontrol.wait" in ptx) == (target.arch >= 90)
    tell(dict(
        size=len(result.asm["cubin"]), shared=result.metadata.shared, programs=math.prod(grid),
        ahead=ptx.count("cp.async.cg.shared.global"), wide=ptx.count("ld.global.v4"),
        matrix=ptx.count("mma.sync"), other=ptx.count("wgmma.mma") + ptx.count("tcgen05.mma"), spills=".local" in ptx,
        atomics=sum("atom." in line and "acq_rel" in line for line in ptx.splitlines())))
'''


@compiled.needs_triton
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_compiles(arch, python, tmp_path):
    done = compiled.results(python, tmp_path, CODE, arch, list(BOXES.values()))
    assert len(done) == len(BOXES)
    for (name, (*_, aligned)), got in zip(BOXES.items(), done):
        print(f"{arch} {name}: {got}")
        assert got["size"] > 1000 and got["shared"] <= 99 * 1024 and not got["spills"], name
        few = name == "one token"
        assert (got["matrix"] > 0) != few and not got["other"], name  # one instruction for every tile: the same bits
        assert got["atomics"] == (0 if few else 1), name
        assert not few or got["wide"] == 8, name  # two steps, of hidden states and of weights
        assert (got["ahead"] > 0) == aligned, name
