"""Nothing outside the tensors is read: each ends where a page begins that may not be touched, and begins after one."""

from __future__ import annotations

import pytest

CODE = '''
import ctypes, mmap, os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
import pytest, torch
from topk_support import routing
from kernel_registry.ops.moe.topk import cases, oracle, triton_few_experts, triton_router
from tests import interpreted

interpreted.quick(pytest.MonkeyPatch())
libc, held = ctypes.CDLL(None), []

def guarded(tensor):
    if tensor is None:
        return None
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    room = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    held.append(room)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(),
                            offset=(pages + 1) * mmap.PAGESIZE - size).view(tensor.shape)
    return copy.copy_(tensor)

def calls(traits, route):
    for flavour in ("random", "constant", "nonfinite", "masked_experts", "padded", "mapped", "mapped_all"):
        args, kwargs = cases.inputs(traits, 17, seed=3, flavour=flavour)
        args = tuple(map(guarded, args))
        kwargs = {name: guarded(value) if torch.is_tensor(value) else value for name, value in kwargs.items()}
        verdict = oracle.check(traits, args, kwargs, route(*args, **kwargs))
        assert verdict.passed, (traits, flavour, verdict.detail)

for traits in (routing(24, 4), routing(40, 32), routing(64, 10, 4, 1, shared=2), routing(36, 4, 3, 2),
               routing(20, 5, shared=3), routing(160, 8), routing(96, 6, 32, 2), routing(300, 8),
               routing(128, 8, scoring="softmax", has_bias=False), routing(64, 6, scoring="sqrtsoftplus")):
    for rows in (1, 2):
        if rows * traits["topk"] > 16:
            continue
        calls(traits, triton_router.topk(**traits, rows_per_program=rows))
for traits in (routing(8, 2, scoring="softmax", has_bias=False), routing(5, 2), routing(24, 1, has_bias=False)):
    calls(traits, triton_few_experts.topk(**traits, rows_per_program=16))

for module, traits in ((triton_router, routing(256, 8)), (triton_few_experts, routing(8, 2))):  # padded rows may not be
    experts = traits["num_experts"]
    room = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    held.append(room)
    logits = torch.frombuffer(room, dtype=torch.float32, count=mmap.PAGESIZE // 2).view(-1, experts)
    live = len(logits) // 2
    logits[:live] = torch.randn(live, experts)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    route, bias = module.topk(**traits), torch.zeros(experts)
    weights, ids = route(logits, bias, num_token_non_padded=torch.tensor(live))
    assert oracle.check(traits, (logits[:live], bias), {}, (weights[:live], ids[:live])).passed
    assert (ids[live:] == -1).all() and (weights[live:] == 0).all()
print("RESULT", len(held))
'''


def test_only_the_tensors_are_read(python, request):
    pytest.importorskip("triton")
    assert int(python(CODE, str(request.path.parent)).split("RESULT")[1]) > 200
