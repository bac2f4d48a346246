"""Counters for launches of which the last program to arrive has more to do.

They are zero when a launch begins and when it ends, so that nothing but the launch itself is on the device. Two
launches that may run at once must not share one: each stream has its own, and each launch in a captured graph too, as
a graph may be replayed beside anything.
"""

from __future__ import annotations

import torch

# For good: a graph has their addresses, and may be replayed when the kernel that it was captured from is long gone
# (registry.reload() and load_overrides() make others).
_captured: list[torch.Tensor] = []


class Arrivals:
    """`size` counters for each launch. Not thread safe where threads share a stream, which orders nothing then."""

    SPARE = 512  # launches that can be captured between two calls outside a capture

    def __init__(self, size: int):
        self.size = size
        self.streams: dict[tuple, torch.Tensor] = {}
        self.spare: dict[torch.device, list[torch.Tensor]] = {}

    def take(self, device: torch.device) -> torch.Tensor:
        """The counters of the launch that follows on the current stream, int32 [size]."""
        if device.type != "cuda":
            return torch.zeros(self.size, dtype=torch.int32, device=device)
        spare = self.spare.setdefault(device, [])
        if torch.cuda.is_current_stream_capturing():
            if not spare:  # zeroed by the graph itself, in its own memory: right, and one node more
                return torch.zeros(self.size, dtype=torch.int32, device=device)
            _captured.append(spare.pop())
            return _captured[-1]
        if len(spare) < self.SPARE:
            fresh = torch.zeros((2 * self.SPARE, self.size), dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # zero before a launch on another stream counts in it
            spare.extend(fresh)
        key = device, torch.cuda.current_stream(device).cuda_stream
        if key not in self.streams:
            self.streams[key] = spare.pop()
        return self.streams[key]
