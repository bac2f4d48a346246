"""Kernels compiled ahead of time for GPUs that are not here: what a test asks, and what a process answers.

Where kernels are interpreted none can be compiled, so a test hands its code to the fixture `python`, and that code has
from here what it is asked, how it compiles and how it tells what came out.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_89": ("cuda", 89, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx90a": ("hip", "gfx90a", 64), "gfx942": ("hip", "gfx942", 64), "gfx950": ("hip", "gfx950", 64),
           "gfx1100": ("hip", "gfx1100", 32), "gfx1250": ("hip", "gfx1250", 32)}
EVERYWHERE = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1250")
RESULT = "RESULT "
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def results(python, folder, code: str, arch: str, wanted: list) -> list:
    """What `code` tells when it is asked for `wanted` on `arch`."""
    output = python(code, json.dumps([arch, wanted]), TRITON_CACHE_DIR=str(folder / "cache"))
    return [json.loads(line.removeprefix(RESULT)) for line in output.splitlines() if line.startswith(RESULT)]


# ---- in the other process --------------------------------------------------------------------------------------------

def asked():
    """(Triton's target, its name, what is wanted)."""
    from triton.backends.compiler import GPUTarget

    arch, wanted = json.loads(sys.argv[1])
    return GPUTarget(*TARGETS[arch]), arch, wanted


def tell(result) -> None:
    print(RESULT + json.dumps(result))


class Recorder:
    """In a kernel's place, it notes what would be launched: (grid, arguments, keywords)."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.seen.append((grid, arguments, keywords))


def build(kernel, types: dict, constants: dict, aligned, target, options: dict):
    """The kernel compiled: its arguments by name are of `types`, those in `aligned` multiples of 16, or `constants`."""
    import triton
    from triton.compiler import ASTSource

    return triton.compile(
        ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
                  constexprs=constants,
                  attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}),
        target=target, options=options)


def build_launched(kernel, arguments: tuple, keywords: dict, target):
    """The kernel compiled for one launch's arguments, by the rules that Triton has for them."""
    import torch

    short = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
             torch.int64: "*i64"}
    constants = {name: keywords[name] for name in keywords if name in kernel.arg_names}
    types, aligned = {}, []
    for parameter, value in zip(kernel.params, arguments):
        name, special = parameter.name, not parameter.do_not_specialize
        if value is None or special and type(value) is int and value == 1:
            constants[name] = value
            continue
        types[name] = short[value.dtype] if torch.is_tensor(value) else "fp32" if type(value) is float else "i32"
        number = value.data_ptr() if torch.is_tensor(value) else value if type(value) is int else 1
        if special and number % 16 == 0:
            aligned.append(name)
    return build(kernel, types, constants, aligned, target,
                 {name: value for name, value in keywords.items() if name not in constants})
