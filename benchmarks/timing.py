"""How long calls take on a GPU that does nothing else, without what the host adds."""

from __future__ import annotations

import statistics
from typing import Callable, Sequence

import torch


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 15, dropped: int = 3) -> float:
    """Microseconds for one of `calls`, which run one after the other in a CUDA graph: the median of `replays`, after
    `dropped` more that warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + dropped):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls) * 1e3)
    return statistics.median(times[dropped:])
