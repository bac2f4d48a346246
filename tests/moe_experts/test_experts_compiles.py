"""The expert kernels compile ahead of time for the architectures they are declared for, without a GPU.

Compiling is not running: that what comes out is right is tested in the interpreter, and on a GPU where there is one.
What is read off the result is that it fits: shared memory within what the architecture has, no spilt registers on the
one that the tiles were chosen on.
"""

from __future__ import annotations

import pytest
from experts_support import layer

from tests import compiled

SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx90a": 64, "gfx942": 64, "gfx950": 160}  # KiB
PLAIN = ("none", "int8_w8a16", "int4")
ALL = (*PLAIN, "fp8_block", "fp8_channel", "int8_static")
CODE = '''
from contextlib import nullcontext
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from kernel_registry.ops.moe.experts import cases, triton_few_tokens, triton_grouped
from kernel_registry.traits.platform import Platform
from tests.compiled import asked, tell

target, arch, calls = asked()


class Driver:  # of a machine that is not here
    launcher_cls = None
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    map_python_to_cpp_type = staticmethod(lambda kind: "int")


driver.set_active(Driver())
for module in (triton_grouped, triton_few_tokens):
    module.on_gpu = lambda device: nullcontext()
triton_grouped.multiprocessors = lambda device: 132
made = []
JITFunction.__getitem__ = lambda self, grid: lambda *given, **named: made.append(
    (self.__name__, self.warmup(*given, grid=grid, **named)))
for module, traits, tokens in calls:
    args, kwargs = cases.inputs(traits, tokens)
    options = {"few, matrix unit": dict(matrix_unit=True)}.get(module, {})
    {"grouped": triton_grouped}.get(module, triton_few_tokens).experts(
        **traits, **options, platform=Platform.parse(arch))(*args, **kwargs)
    tell([[name, kernel.metadata.shared, "launch_dependents" in kernel.asm.get("ptx", "")] for name, kernel in made])
    made.clear()
'''
CHAIN = ["prepare", "grouped_up", "grouped_down", "sum_slots"]


@compiled.needs_triton
@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch, python, tmp_path):
    formats = ALL if arch in ("sm_89", "sm_90", "sm_100") else PLAIN
    calls = []
    for format in formats:
        odd = dict(activation="swigluoai", has_bias=True, expert_parallel=True, dtype="float16")
        calls.append(("grouped", layer(4, 2, 512, 384, format), 8))
        calls.append(("grouped", layer(4, 3, 264, 192, format, **odd), 1100))
        if format in ("none", "fp8_block"):
            calls.append(("few", layer(4, 2, 512, 384, format), 1))
    names = {"few": ["pair_up", "pair_down"]}
    for (module, _, tokens), kernels in zip(calls, made(arch, calls, python, tmp_path)):
        assert [name for name, *_ in kernels if name != "quantise_rows"] == \
            names.get(module, CHAIN)


@compiled.needs_triton
@pytest.mark.parametrize("arch", ("sm_89", "sm_90", "sm_100"))
def test_few_tokens_on_the_matrix_unit_compile(arch, python, tmp_path):
    odd = dict(activation="swigluoai", has_bias=True, expert_parallel=True, dtype="float16")
    calls = [("few, matrix unit", layer(8, 8, 256, 1536, "fp8_block"), 1),
             ("few, matrix unit", layer(4, 3, 264, 600, "fp8_block", **odd), 1)]
    for kernels in made(arch, calls, python, tmp_path):
        assert [name for name, *_ in kernels] == ["pair_up_dot", "pair_down_dot"]


@compiled.needs_triton
def test_persistent_products_compile(python, tmp_path):
    odd = dict(activation="gelu", has_bias=True, expert_parallel=True, dtype="float16")
    calls = [("grouped", layer(8, 2, 640, 384, "fp8_block"), 1100),
             ("grouped", layer(8, 3, 256, 128, "fp8_block", **odd), 300),
             ("grouped", layer(8, 2, 320, 192), 1100)]
    both = ["prepare", "persistent_up", "persistent_down", "sum_slots"]
    names = [[name for name, *_ in kernels] for kernels in made("sm_90", calls, python, tmp_path)]
    assert names == [both, both, ["prepare", "grouped_up", "persistent_down", "sum_slots"]]


def made(arch, calls, python, tmp_path) -> list:
    """The kernels of each call, compiled in another process: (name, shared memory, lets the next launch in)."""
    results = compiled.results(python, tmp_path, CODE, arch, calls)
    assert len(results) == len(calls)
    for (_, traits, _), kernels in zip(calls, results):
        for name, shared, dependent in kernels:
            assert shared <= SHARED[arch] * 1024, (arch, traits, name, shared)
            assert dependent == (arch in ("sm_90", "sm_100")), "lets the next launch in where the GPU can"
    return results
