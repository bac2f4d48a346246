"""Shared fixtures. Without a GPU, Triton runs in its interpreter: the switch must be set before anything imports it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_registry.traits.platform import detect

if detect().kind not in ("cuda", "hip"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others, a thread that waits for another keeps a core from work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("KERNEL_REGISTRY_OVERRIDES", "KERNEL_REGISTRY_TILES"):
    os.environ.pop(name, None)  # a developer's own files are not what is tested

OP = "toy.op"
_numbers = itertools.count()

_CONTRACT = '''
from kernel_registry.contract import Contract
from kernel_registry.traits.trait import Trait


class Toy(Contract):
    """An op whose kernels take any object with .tokens and .contiguous, and return their own name."""

    traits = (
        Trait("size", "int", "performance", minimum=1),
        Trait("groups", "int", "semantic", default=1, minimum=1),
        Trait("scoring", "str", "semantic", default="sigmoid", choices=("sigmoid", "softmax", "sqrt")),
        Trait("has_bias", "bool", "semantic", default=True),
        Trait("dtype", "dtype", "semantic", default="float32"),
        Trait("platform", "platform", "platform"),
        Trait("num_tokens", "int", "performance", minimum=0, dynamic=True),
        Trait("contiguous", "bool", "layout", default=True, dynamic=True),
    )
    derived = {"per_group": "size // groups"}
    relations = ("size % groups == 0",)
    dynamic = {"num_tokens": lambda x: x.tokens, "contiguous": lambda x: x.contiguous}

    @staticmethod
    def signature(x):
        """One object."""
'''

_TARGETS = """
def __getattr__(name):  # every name is a factory of kernels that say who they are and what they were bound to
    if name.startswith("__"):
        raise AttributeError(name)

    def factory(**traits):
        def kernel(x):
            return name
        kernel.traits = traits
        return kernel
    return factory
"""


class Toy:
    """Writes contracts, targets and registry files into a folder that is importable, and makes registries of them."""

    OP = OP

    def __init__(self, folder: Path):
        self.folder = folder
        self.contract = f"{self.module(_CONTRACT)}:Toy"
        self.targets = self.module(_TARGETS)

    def module(self, text: str, name: str | None = None) -> str:
        """A module with this source, under a name that nothing else has; returns the name."""
        name = name or f"toy_{os.getpid()}_{next(_numbers)}"
        self.folder.joinpath(*name.split(".")).with_suffix(".py").write_text(text)
        importlib.invalidate_caches()
        return name

    def write(self, text: str, name: str | None = None) -> Path:
        """A file with this text, {contract} and {targets} filled in."""
        path = self.folder / (name or f"file_{next(_numbers)}.yaml")
        path.write_text(text.replace("{contract}", self.contract).replace("{targets}", self.targets))
        return path

    def entries(self, implementations: dict) -> dict:
        """Implementation entries from short ones: name -> a `when`, or a whole entry. Filled in: the target, and that
        any platform and contiguous or not are served."""
        out = {}
        for name, entry in implementations.items():
            entry = (
                dict(entry)
                if {"when", "target", "rank", "fallback", "numerics", "summary", "options"} & set(entry)
                else {"when": entry}
            )
            when = {"platform": "any", "contiguous": "any", **entry.pop("when", {})}
            out[name] = {"target": f"{self.targets}:{name}", "when": when, **entry}
        return out

    def file(self, implementations: dict, *, name: str | None = None, contract: bool = True, op: str = OP) -> Path:
        """A registry file with these implementations of one op."""
        import yaml

        entry = {"implementations": self.entries(implementations)}
        if contract:
            entry = {"contract": self.contract, **entry}
        return self.write(yaml.safe_dump({"version": 1, "ops": {op: entry}}, sort_keys=False), name)

    def overrides(self, *entries: dict, name: str | None = None, **more) -> Path:
        """An override file with these entries; `op` filled in."""
        import yaml

        data = {"version": 1, "overrides": [{"op": OP, **entry} for entry in entries], **more}
        return self.write(yaml.safe_dump(data, sort_keys=False), name)

    def registry(self, source: dict | str | Path, **options):
        """A Registry of implementations, of a file's text, or of a file: without plugins or environment, on sm_90."""
        from kernel_registry import Registry

        path = (
            self.file(source) if isinstance(source, dict) else self.write(source) if isinstance(source, str) else source
        )
        return Registry(path, **{"plugins": False, "environment": False, "platform": "sm_90", **options})


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter several times as fast, with the same results."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") and importlib.util.find_spec("triton"):
            from tests import interpreted

            interpreted.quick(patch)
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests of kernels have their tensors: on a GPU where there is one, else on the CPU for the interpreter."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def toy(tmp_path):
    with _importable(tmp_path):
        yield Toy(tmp_path)


@pytest.fixture(scope="session")
def shared_toy(tmp_path_factory):
    """One Toy for property tests, which need many files and no fresh folder."""
    folder = tmp_path_factory.mktemp("toy")
    with _importable(folder):
        yield Toy(folder)


class _importable:
    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __enter__(self):
        sys.path.insert(0, self.folder)

    def __exit__(self, *exc):
        sys.path.remove(self.folder)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(self.folder + os.sep):
                del sys.modules[name]
        importlib.invalidate_caches()


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh interpreter that can import this kernel_registry and modules in tmp_path; returns its
    output. Fails the test, with the traceback, when it exits with an error."""
    import kernel_registry

    def run(code: str, *arguments: str, expect: int = 0, **environment: str) -> str:
        paths = [str(Path(kernel_registry.__file__).parents[1]), str(tmp_path)]
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=tmp_path,
            env={**env, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
        assert done.returncode == expect, done.stderr
        return done.stdout

    return run
