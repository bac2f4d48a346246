"""A kernel whose launches can be kept where there is no GPU, for the tests of kept launches.

Triton's own specialisation and the Python side of its CUDA launcher run for real; a fake stands in for the compiler,
which notes for which specialisation a kernel was made, and for the C function at the end, which notes its arguments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature


class Kernel(triton.JITFunction):
    """The JIT function of `kernel`, but what it compiles is a note of Triton's specialisation, and nothing is launched.

    constants, options  what it must be called with
    scratch             bytes a program that its launch allocates
    descriptors         what Triton's metadata says of each of its tensor descriptors: nothing before Hopper
    """

    def __init__(self, kernel, constants, options, scratch=0, profile_scratch=0, descriptors=()):
        unspecialised = getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"]
        super().__init__(kernel.fn, do_not_specialize=unspecialised)
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.binder = create_function_from_signature(self.signature, self.params, backend)
        self.constants, self.options, self.descriptors = constants, options, [*descriptors]
        self.sizes = dict(global_scratch_size=scratch, profile_scratch_size=profile_scratch)
        self.made, self.asked, self.launched = {}, 0, []

    __hash__ = object.__hash__  # Triton's is of all that it calls, which may be interpreted

    def specialisation(self, *arguments):
        return tuple(map(tuple, self.binder(*arguments, **self.constants)[1]))

    def run(self, *arguments, grid, warmup, **parameters):
        bound, specialisation, options = self.binder(*arguments, **parameters)
        assert options == self.options and {name: bound[name] for name in self.constants} == self.constants
        self.asked += 1
        specialisation = tuple(map(tuple, specialisation))
        if specialisation not in self.made:
            self.made[specialisation] = self.compiled(specialisation)
        return self.made[specialisation]

    def compiled(self, specialisation):
        made = CompiledKernel.__new__(CompiledKernel)

        def in_c(*passed):  # and does not hold what is made
            self.launched.append((specialisation, passed))

        made.__dict__.update(src=None, module=None, function=1000 + len(self.made), packed_metadata=(1, 1, 0),
                             metadata=SimpleNamespace(**self.sizes), _run=self.launcher(in_c, specialisation))
        return made

    def launcher(self, in_c, specialisation):
        run = CudaLauncher.__new__(CudaLauncher)
        run.__dict__.update(self.sizes, global_scratch_align=16, profile_scratch_align=16, num_ctas=1, launch_pdl=True,
                            launch_cooperative_grid=False, gsan_enabled=False, arg_annotations=["an annotation"],
                            kernel_signature=b"a signature")
        types = {place: kind for place, (kind, _) in enumerate(specialisation)}
        run.launch = wrap_handle_tensordesc(in_c, types, self.descriptors)
        return run


class TensorMap(NamedTuple):
    """A tensor descriptor, encoded for the tensor memory accelerator."""

    address: int
    swizzle: int
    item_size: int
    dtype: int
    block: list
    shape: list
    strides: list
    padding: int


@pytest.fixture
def stream(monkeypatch):
    """As on an NVIDIA GPU, as far as can be told; CPU tensors are on its device -1. Its current stream, to be set, and
    the TensorMaps that were encoded."""
    current = SimpleNamespace(number=7, encoded=[])

    def fill(*description):
        current.encoded.append(TensorMap(*description))
        return current.encoded[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)  # in Triton 3.6, later
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda _: current.number, utils=utils))
    return current


def vector(dtype, offset=0, size=8):
    """A tensor whose address is `offset` elements from a multiple of 16."""
    memory = torch.empty(size + 64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[offset:offset + size]
