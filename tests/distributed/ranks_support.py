"""Real processes as ranks: started once, since each imports torch, and given a fresh process group for every run."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

TIMEOUT = 60  # seconds in which a collective has to be done; a whole run, or a start, has twice as many
READY = "ready"


class Died(Exception):
    """A rank's process ended without an answer."""


class Failed(Exception):
    """A rank raised; carries its traceback."""


class Ranks:
    """`run(world, function, *args)` calls function(rank, device, *args) in `world` processes that share a process
    group, and returns their results by rank. The function is found by its module's name, so it is a module's own."""

    def __init__(self):
        self._context = multiprocessing.get_context("spawn")
        self._workers: list = []
        # One folder for all runs: a group's last member looks for its store's file when it lets go of the group.
        self._stores = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._runs = itertools.count()

    def run(self, world: int, function, *args, backend: str = "gloo", timeout: float = TIMEOUT,
            dying: tuple[int, ...] = ()) -> list:
        """What each rank returned; None for those that are expected to die."""
        fresh = range(len(self._workers), world)
        self._workers += [self._start() for _ in fresh]
        started = [self._answer(rank) for rank in fresh]  # a group's timeout is not for a start on a busy machine
        if any(answer != READY for answer in started):
            self.stop()
            raise Failed(f"ranks that start answered {started}")
        store = str(Path(self._stores.name) / f"run_{next(self._runs)}")
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            pipe.send((function, rank, world, backend, store, timeout, args))
        answers = [self._answer(rank) for rank in range(world)]
        wrong = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers)
                 if isinstance(answer, Exception) and not (rank in dying and isinstance(answer, Died))]
        if wrong:
            self.stop()
            raise Failed("\n".join(wrong))
        if dying:
            self.stop()
        return [None if isinstance(answer, Died) else answer for answer in answers]

    def _start(self):
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def _answer(self, rank: int):
        process, pipe = self._workers[rank]
        try:
            if not pipe.poll(2 * TIMEOUT):
                return Failed("no answer in time")
            good, value = pipe.recv()
        except (EOFError, ConnectionError):
            return Died("its process ended")
        return value if good else Failed(value)

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []


def work(pipe) -> None:
    """What a process does until its pipe is closed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # the ranks share few cores
    pipe.send((True, READY))
    while True:
        try:
            function, rank, world, backend, store, timeout, args = pipe.recv()
        except (EOFError, ConnectionError):
            return
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=timeout))
            dist.barrier()  # a rank that is done at once would leave while others are still joining
            answer = True, function(rank, device, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)  # once the group is left: whoever has it may start the next run
