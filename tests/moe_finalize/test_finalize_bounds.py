"""Nothing outside the tensors is touched, nor a row that is skipped: where it may not be lie pages without access."""

from __future__ import annotations

import pytest

CODE = '''
import ctypes, mmap, os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
import pytest, torch
from finalize_support import SUITE, layer
from kernel_registry.ops.moe.finalize import cases, oracle, triton_finalize
from tests import interpreted

interpreted.quick(pytest.MonkeyPatch())
triton_finalize.WHOLE = False
libc, held = ctypes.CDLL(None), []

def room(pages, closed):
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    held.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in closed:
        assert libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    return memory

def guarded(tensor):
    """A copy between two pages without access, at the end of its room."""
    if not torch.is_tensor(tensor) or not tensor.numel():
        return tensor
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    copy = torch.frombuffer(room(pages + 2, (0, pages + 1)), dtype=tensor.dtype, count=tensor.numel(),
                            offset=(pages + 1) * mmap.PAGESIZE - size).view(tensor.shape)
    return copy.copy_(tensor)

for traits in SUITE:
    for seed, flavour in enumerate(cases.FLAVOURS):
        if flavour == "strided":
            continue
        args, kwargs = cases.inputs(traits, 7, seed=seed, flavour=flavour)
        args, kwargs = tuple(map(guarded, args)), {name: guarded(value) for name, value in kwargs.items()}
        made = triton_finalize.finalize(**traits, columns_per_program=32)
        verdict = oracle.check(traits, args, kwargs, made(*args, **kwargs))
        assert verdict.passed, (traits, flavour, verdict.detail)

hidden = mmap.PAGESIZE // 4  # a float32 row fills a page, and those of slots that are not local have no access
traits = layer(4, 2, hidden, dtype="float32", out_dtype="float32")
ids = torch.tensor([[1, -1], [4, 0], [-1, -1]])
rows = torch.frombuffer(room(6, ()), dtype=torch.float32).view(3, 2, hidden)
rows.copy_(torch.randn(3, 2, hidden))
start = ctypes.addressof(ctypes.c_char.from_buffer(held[-1]))
expected = (rows * ((ids >= 0) & (ids < 4))[..., None]).sum(1)
for page in (1, 2, 4, 5):
    assert libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
got = triton_finalize.finalize(**traits)(rows, torch.ones(3, 2), ids)
assert torch.equal(got, expected)
print("RESULT", len(held))
'''


def test_only_what_counts_is_touched(python, request):
    pytest.importorskip("triton")
    assert int(python(CODE, str(request.path.parent)).split("RESULT")[1]) > 100
