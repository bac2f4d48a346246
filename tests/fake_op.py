"""A small op without torch, written to disk by the tests that need one: it doubles lists of numbers."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from kernel_registry import bench

_numbers = itertools.count()

_CONTRACT = '''
from kernel_registry.contract import Contract, Workload
from kernel_registry.traits.trait import Trait


class Double(Contract):
    traits = (
        Trait("size", "int", "performance", minimum=1),
        Trait("groups", "int", "semantic", default=1, minimum=1),
        Trait("mode", "str", "semantic", default="plain", choices=("plain", "fancy")),
        Trait("platform", "platform", "platform"),
        Trait("num_tokens", "int", "performance", minimum=0, dynamic=True),
    )
    derived = {"per_group": "size // groups"}
    relations = ("size % groups == 0",)
    dynamic = {"num_tokens": lambda rows, **_: len(rows)}
    cases = "PACKAGE.cases"
    oracle = "PACKAGE.oracle:check"

    @staticmethod
    def workloads(config):
        size = config.data.get("fake_size")
        return [Workload("double", {"size": size}, {"factor": 2.0}, layers=3, notes=("a fake",))] if size else []
'''
_CASES = '''
import random

FLAVOURS = ("random", "zeros")
WORKLOADS = {"tiny": {"size": 4}, "grouped": {"size": 16, "groups": 4}}


def inputs(traits, num_tokens, *, seed, device, flavour):
    draw = random.Random(seed).random if flavour == "random" else float
    return ([[draw() for _ in range(traits["size"])] for _ in range(num_tokens)],), {"factor": 2.0}
'''
_ORACLE = '''
from dataclasses import dataclass


@dataclass
class Verdict:
    passed: bool
    rows: int
    undecided: int = 0
    detail: str = ""
    max_weight_error: float = 0.0


UNDECIDED = 0


def check(traits, args, kwargs, outputs):
    rows, = args
    pairs = [(kwargs["factor"] * x, y) for row, out in zip(rows, outputs) for x, y in zip(row, out)]
    worst = max((abs(x - y) for x, y in pairs), default=0.0)
    shape = [len(row) for row in rows] == [len(out) for out in outputs]
    detail = "" if worst < 1e-9 else f"off by {worst:g}"
    return Verdict(shape and worst < 1e-9, len(rows), UNDECIDED and len(rows), detail, worst)
'''
_KERNELS = '''
import time


def double(**_):
    return lambda rows, factor=2.0: [[x * factor for x in row] for row in rows]


def reference(**_):
    return lambda rows, factor=2.0: [[x * factor for x in row] for row in rows]


def wrong(**_):
    return lambda rows, factor=2.0: [[x * factor + 1e-3 for x in row] for row in rows]


def wrong_above_64(*, size, **_):
    return lambda rows, factor=2.0: [[x * factor + (size > 64) for x in row] for row in rows]


def raises_above_64(*, size, **_):
    def kernel(rows, factor=2.0):
        if size > 64:
            raise RuntimeError("shared memory exhausted")
        return [[x * factor for x in row] for row in rows]
    return kernel


def last_bit(**_):
    return lambda rows, factor=2.0: [[x * factor * (1 + 2**-52) for x in row] for row in rows]


def slow(**_):
    def kernel(rows, factor=2.0):
        time.sleep(0.002)
        return [[x * factor for x in row] for row in rows]
    return kernel
'''


class Clock:
    """What `bench` measures with until the test ends, and kernels sleep by that find it as the module `fake_clock`: a
    look takes 30 microseconds, about as much as kernels that don't sleep would take between two, and a sleep as long as
    it says. A busy machine makes nothing slower."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setitem(sys.modules, "fake_clock", self)
        monkeypatch.setattr(bench, "time", self)

    def perf_counter(self) -> float:
        self.now += 30e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeOp:
    """The package of the op under `folder`; `registry` writes a registry file of implementations for it."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.package = folder, f"fake_op_{next(_numbers)}"
        monkeypatch.syspath_prepend(str(folder))
        self.monkeypatch = monkeypatch
        for name, text in (("__init__", ""), ("contract", _CONTRACT), ("cases", _CASES), ("oracle", _ORACLE),
                           ("kernels", _KERNELS)):
            self.write(name, text)

    def write(self, module: str, text: str) -> None:
        path = self.folder / self.package / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("PACKAGE", self.package))

    def extend(self, module: str, text: str) -> None:
        path = self.folder / self.package / f"{module}.py"
        path.write_text(path.read_text() + text.replace("PACKAGE", self.package))

    def registry(self, implementations: str, contract: str = "contract:Double") -> Path:
        """A registry file; each line is "name: kernel, rest of the entry as flow YAML, when as flow YAML"."""
        text = f"version: 1\nops:\n  fake.double:\n    contract: {self.package}.{contract}\n    implementations:\n"
        for line in implementations.strip().splitlines():
            name, _, entry = line.strip().partition(": ")
            entry = entry.replace("PACKAGE", self.package)
            text += f"      {name}: {{{entry}}}\n"
        path = self.folder / "registry.yaml"
        path.write_text(text)
        return path

    def forget(self) -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == self.package]:
            del sys.modules[name]
