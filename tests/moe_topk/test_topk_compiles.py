"""The Triton router compiles ahead of time for every architecture it is declared for, without a GPU.

Compiling is not running: that what comes out is right is tested in the interpreter, and on a GPU where there is one.
What is read off the result is what makes the router fast: a row stays in its warp (no barrier, no shared memory), a
full-warp maximum is one instruction, registers leave room for many warps, and a dependent launch waits before it reads.
"""

from __future__ import annotations

import pytest
from topk_support import routing

from tests import compiled

LONGEST_SORTED = 16  # of the exact way, which scans longer lists in a loop


def box(*shape, rows=1, launch=None, only=(), registers=None, options="", **other):
    """What to compile: traits, the router's options, where (everywhere unless `only`), at most how many registers, and
    of `options` map, padding, strided (logits of any strides at any address)."""
    softmax = {"has_bias": False} if other.get("scoring") == "softmax" else {}
    return dict(traits=routing(*shape, **softmax, **other), rows=rows, launch=launch, only=only, registers=registers,
                options=options.split())


HOPPER, NEW = ("sm_90",), ("sm_90", "sm_100")
BOXES = {
    "groups": box(256, 8, 8, 4, registers=64),
    "map, padding, shared, pairs": box(80, 9, shared=1, dtype="bfloat16", bias_dtype="bfloat16", rows=2,
                                       options="map padding"),
    "softmax groups, quads, strided": box(48, 4, 4, 2, scoring="softmax", renormalize=False, dtype="float16", rows=4,
                                          options="strided"),
    "sqrtsoftplus, no bias": box(64, 6, scoring="sqrtsoftplus", has_bias=False, dtype="bfloat16"),
    "long lists": box(896, 16, only=HOPPER),
    "long lists of odd groups": box(306, 2, 17, 4, only=("sm_80", "gfx942")),
    "pairs of groups": box(256, 8, 8, 4, rows=2, only=HOPPER, registers=64),
    "one group": box(256, 8, only=HOPPER, registers=64),
    "pairs": box(256, 8, rows=2, only=HOPPER, registers=64),
    "early": box(48, 5, rows=2, launch="early", only=NEW),
    "late": box(40, 6, launch="late", only=NEW),
    "octets": box(128, 4, scoring="softmax", dtype="bfloat16", rows=8, only=HOPPER, registers=64),
}
CODE = '''
import os, re, subprocess, tempfile
import triton
from kernel_registry.ops.moe.topk import triton_router
from kernel_registry.traits.platform import Platform
from tests.compiled import asked, build, tell

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
target, arch, boxes = asked()
cuda = target.backend == "cuda"
seen = []
triton_router.kept_launch = lambda *of: seen.append(of)  # what the factory would launch, without launching
triton_router.torch.version.cuda = "13.0" if cuda else None


def registers(cubin):
    tool = getattr(triton.knobs.nvidia, "cuobjdump", None)
    if tool is None or not os.path.exists(tool.path):
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool.path, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\\d+)", usage)[1])


for made in boxes:
    traits, wanted = made["traits"], made["options"]
    triton_router.topk(**traits, platform=Platform.parse(arch), rows_per_program=made["rows"],
                       dependent_launch=made["launch"])
    (kernel, constants, options), with_shared = seen[-2:]
    if "map" in wanted:
        constants = with_shared[1]
    types = dict(logits="*" + SHORT[traits["dtype"]], weights_out="*fp32", ids_out="*i32", num_tokens="i32",
                 row_stride="i32", routed_scaling_factor="fp32", shared_expert_weight="fp32")
    absent = {}
    for name, given, kind, otherwise in (("bias", traits["has_bias"], "*" + SHORT[traits["bias_dtype"]], None),
                                         ("expert_map", "map" in wanted, "*i64", None),
                                         ("num_valid", "padding" in wanted, "*i32", None),
                                         ("column_stride", "strided" in wanted, "i32", 1)):
        if given:
            types[name] = kind
        else:
            absent[name] = otherwise
    aligned = {"weights_out", "ids_out", "bias", *(["logits", "row_stride"] if "strided" not in wanted else [])}
    aligned &= types.keys()
    result = build(kernel, types, {**constants, **absent}, aligned, target, options)
    binary, ptx = result.asm["cubin" if cuda else "hsaco"], result.asm.get("ptx", "")
    tell(dict(
        size=len(binary), shared=result.metadata.shared, reductions=ptx.count("redux.sync"), barrier="bar.sync" in ptx,
        registers=registers(binary) if cuda and made["registers"] else None,
        places={word: ptx.find(word) for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents",
                                                  "ld.global", "st.global")}))
'''


def fewest_reductions(traits, rows):
    """One for each expert and group chosen the fast way, two for each chosen exactly, but one loop where it scans."""
    groups, kept = traits["num_expert_group"], traits["topk_group"]
    routed = traits["topk"] - traits["num_fused_shared_experts"]
    fast, exactly = routed, routed
    lanes = 32 // (1 << (groups - 1).bit_length())
    if -(-traits["num_experts"] // (groups * lanes)) > LONGEST_SORTED:
        exactly = 1
    if kept < groups:
        fast, exactly = fast + kept + 1, exactly + kept
        if traits["scoring"] == "softmax" and traits["dtype"] != "float32":
            fast -= 1  # there is no doubt about such groups, and no look at the best one dropped
    return rows * fast + 2 * exactly


@compiled.needs_triton
@pytest.mark.parametrize("arch", compiled.EVERYWHERE)
def test_compiles(arch, python, tmp_path):
    names = [name for name, made in BOXES.items() if not made["only"] or arch in made["only"]]
    done = compiled.results(python, tmp_path, CODE, arch, [BOXES[name] for name in names])
    assert len(done) == len(names)
    for name, got in zip(names, done):
        made = BOXES[name]
        print(f"{arch} {name}: {got}")
        assert got["size"] > 1000, name
        assert got["shared"] == 0 and not got["barrier"], name
        if not arch.startswith("sm"):
            continue
        assert got["reductions"] >= fewest_reductions(made["traits"], made["rows"]), name
        if got["registers"] is not None and arch == "sm_90":
            assert got["registers"] <= made["registers"], name
        waits, starts, reads, writes = got["places"].values()
        assert 0 < reads < writes
        if made["launch"] is None:
            assert waits == starts == -1, name
        elif made["launch"] == "early":
            assert 0 < waits < starts < reads, name
        else:
            assert 0 < waits < reads < starts, name


def test_every_kind_is_compiled():
    made = BOXES.values()
    assert {m["rows"] for m in made} == {1, 2, 4, 8} and {m["launch"] for m in made} == {None, "early", "late"}
    assert {m["traits"]["dtype"] for m in made} == {"float32", "bfloat16", "float16"}
    assert {m["traits"]["scoring"] for m in made} == {"sigmoid", "softmax", "sqrtsoftplus"}
    assert {word for m in made for word in m["options"]} == {"map", "padding", "strided"}
