"""Compiling the candidates of a tuning in several processes at once, which fills the compiler's disk cache.

Each process runs each of its candidates once, on inputs of its own, and tells nothing: one that fails there fails again
where it is timed, and is told there. Processes are started afresh, not forked, and given what they need on stdin, so
that it does not matter what this one has initialised or which script it runs.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Sequence

from .bound import make_kernel
from .box import Box
from .catalog import Implementation
from .contract import Request
from .harness import Harness
from .tile_files import Tile

Job = tuple[Implementation, Request, int, Tile]  # what to bind, the number of tokens to call it with, and the tile
_CODE = "from kernel_registry.precompile import work; work()"


def precompile(tools: Harness, jobs: Sequence[Job], device: str, processes: int) -> None:
    """Runs each job once, in that many processes; returns when all are done."""
    names, cases = tuple(tools.op.space.traits), tools.op.contract.cases
    plain = [(replace(implementation, box=Box({})), *rest) for implementation, *rest in jobs]  # a box holds functions
    shares = [plain[start::processes] for start in range(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = []
    try:
        for share in filter(None, shares):
            worker = subprocess.Popen([sys.executable, "-c", _CODE], env=environment, stdin=subprocess.PIPE,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.append(worker)
            try:
                pickle.dump((names, cases, tools.flavours[0], device, share), worker.stdin)
                worker.stdin.close()
            except BrokenPipeError:  # it died: what it had is compiled where it is timed
                pass
        for worker in started:
            worker.wait()
    finally:
        for worker in started:
            worker.kill()  # those still running, when this process is interrupted
            worker.wait()


def work() -> None:
    """What a process does: reads its share from stdin and runs it."""
    names, cases, flavour, device, jobs = pickle.load(sys.stdin.buffer)
    inputs = importlib.import_module(cases).inputs
    made: tuple = (None, None)  # of one number of tokens at a time: they may be large
    for implementation, request, count, tile in jobs:
        try:
            if made[0] != count:
                made = count, inputs({name: value for name, value in request.traits.items() if name in names}, count,
                                     seed=0, device=device, flavour=flavour)
            args, kwargs = made[1]
            make_kernel(implementation, request, lambda num_tokens: tile)(*args, **kwargs)
        except Exception:
            pass
