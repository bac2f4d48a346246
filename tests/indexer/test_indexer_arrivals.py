"""Whose counters a launch gets, by streams and captures that are only pretended; on a GPU: test_indexer_on_gpu.py."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from kernel_registry.ops.indexer.wk_weights_proj import arrivals

DEVICE = torch.device("cuda", 0)


class Cuda:
    """What arrivals.py asks of torch.cuda."""

    def __init__(self):
        self.stream, self.capturing, self.waits = 7, False, 0

    def is_current_stream_capturing(self):
        return self.capturing

    def current_stream(self, device):
        def synchronize():
            assert not self.capturing
            self.waits += 1
        return SimpleNamespace(cuda_stream=self.stream, synchronize=synchronize)


@pytest.fixture
def cuda(monkeypatch):
    pretended = Cuda()
    monkeypatch.setattr(arrivals, "torch", SimpleNamespace(
        cuda=pretended, int32=torch.int32, zeros=lambda *a, dtype, device: torch.zeros(*a, dtype=dtype)))
    monkeypatch.setattr(arrivals, "_captured", [])
    return pretended


def memory(counters):
    return counters.data_ptr()


def test_a_stream_keeps_its_own(cuda):
    taken = arrivals.Arrivals(3)
    first = taken.take(DEVICE)
    assert first.shape == (3,) and first.dtype is torch.int32 and not first.any() and cuda.waits == 1
    assert memory(taken.take(DEVICE)) == memory(first)
    cuda.stream = 8
    assert memory(taken.take(DEVICE)) != memory(first) and cuda.waits == 1
    assert memory(taken.take(torch.device("cuda", 1))) not in (memory(first), memory(taken.take(DEVICE)))
    cuda.stream = 7
    assert memory(taken.take(DEVICE)) == memory(first)


def test_each_captured_launch_has_its_own(cuda):
    taken = arrivals.Arrivals(3)
    plain = taken.take(DEVICE)
    cuda.capturing = True
    seen = [taken.take(DEVICE) for _ in range(2 * taken.SPARE + 5)]  # more than there are: the last zero their own
    assert len({memory(counters) for counters in [plain, *seen]}) == len(seen) + 1
    assert cuda.waits == 1 and not any(counters.any() for counters in seen)
    cuda.capturing = False
    assert memory(taken.take(DEVICE)) == memory(plain) and cuda.waits == 2  # there are enough again


def test_what_a_graph_counts_in_outlives_the_kernel(cuda):
    taken = arrivals.Arrivals(3)
    taken.take(DEVICE)
    cuda.capturing = True
    kept = weakref.ref(taken.take(DEVICE))
    del taken
    gc.collect()
    assert kept() is not None
