"""Both Triton routers compile ahead of time for every architecture they are declared for, without a GPU.

Compiling is not running: that what comes out is right is tested in the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64)}
# experts, slots, groups, kept, shared, logits, options
BOXES = [
    (256, 8, 8, 4, 0, "fp32", ""), (256, 9, 8, 4, 1, "bf16", "map padding"), (36, 4, 3, 2, 0, "fp16", "strided"),
    (680, 8, 17, 4, 0, "fp32", "strided"),
    (256, 8, 1, 1, 0, "fp32", ""), (160, 9, 1, 1, 1, "bf16", "map padding"), (72, 6, 1, 1, 0, "fp16", "strided"),
]
CODE = '''
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_registry.ops.moe.topk import triton_grouped, triton_single_group

target, boxes = json.loads(sys.argv[1])
done = []
for experts, topk, groups, kept, shared, dtype, options in boxes:
    kernel = triton_grouped.grouped_kernel if groups > 1 else triton_single_group.single_group_kernel
    constants = dict(NUM_EXPERTS=experts, TOPK=topk, NUM_SHARED=shared, RENORMALIZE=True, MAP_SHARED="map" in options,
                     WIDEST=4 if dtype == "fp32" else 8, ROWS=1, PTX=target[0] == "cuda")
    if groups > 1:
        constants.update(GROUPS=groups, TOPK_GROUP=kept, GROUP_LANES=32 // (1 << (groups - 1).bit_length()))
    types = dict(logits=f"*{dtype}", bias="*fp32", weights_out="*fp32", ids_out="*i32", num_tokens="i32", row_stride="i32",
                 routed_scaling_factor="fp32", shared_expert_weight="fp32")
    if "map" in options:
        types["expert_map"] = "*i64"
    else:
        constants["expert_map"] = None
    if "padding" in options:
        types["num_valid"] = "*i32"
    else:
        constants["num_valid"] = None
    if "strided" in options:
        types["column_stride"] = "i32"
    else:
        constants["column_stride"] = 1
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
               for name in ("logits", "bias", "weights_out", "ids_out") if "strided" not in options}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                          target=GPUTarget(*target), options={"num_warps": 1, "num_stages": 1})
    binary = made.asm["cubin" if target[0] == "cuda" else "hsaco"]
    ptx = made.asm.get("ptx", "")
    done.append([len(binary), made.metadata.shared, ptx.count("redux.sync"), "bar.sync" in ptx])
print("RESULT " + json.dumps(done))
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch, python):
    output = python(CODE, json.dumps([TARGETS[arch], BOXES]))
    done = json.loads(output.split("RESULT ")[1])
    assert len(done) == len(BOXES)
    for (experts, topk, groups, kept, shared, *_), (size, shared_memory, reductions, barriers) in zip(BOXES, done):
        assert size > 1000
        if experts == 680:  # lists too long to sort are scanned in a loop, and its odd strides go through shared memory
            continue
        assert shared_memory == 0
        if arch.startswith("sm"):  # a row stays in its warp, and a full-warp maximum is one instruction
            assert not barriers
            assert reductions >= 2 * (topk - shared) + (2 * kept if kept < groups else 0)
