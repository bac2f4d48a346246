"""The serving runtimes, each in an environment of its own (they pin what others can't have), and their tests.

    nox -f tests/integrations/noxfile.py                # all of them; `make runtimes` does this
    nox -f tests/integrations/noxfile.py -s vllm        # one; what follows -- goes to pytest

An environment lasts until what is installed in it changes, here or in environments/; RUNTIMES names the folder where
they are. A runtime that can't be installed on this machine is skipped, and told as not run. TORCH: as for make.
"""

import hashlib
import inspect
import os
import sys
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TORCH = os.environ.get("TORCH", "torch==2.13.0")
WORKERS = os.environ.get("WORKERS", "2")
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
OURS = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["kernels"], "pytest>=8", "pytest-xdist>=3.5")

nox.options.envdir = os.environ.get("RUNTIMES") or str(CACHE / "kernel_registry" / "runtimes")


def runtime(name, *tests, then=lambda session: None, **variables):
    """A session that installs environments/NAME.*, does what comes `then`, and runs the tests with the variables."""
    alone, listed = (HERE / "environments" / f"{name}{kind}.txt" for kind in (".no_deps", ""))
    files = sorted((HERE / "environments").glob(f"{name}.*"))
    parts = [sys.version, TORCH, *OURS, inspect.getsource(then), *(path.read_text() for path in files)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    where = Path(nox.options.envdir) / name
    stamp = where / "installed"
    complete = stamp.is_file() and stamp.read_text() == digest

    def install(session):
        session.install(TORCH, *OURS)
        if alone in files:
            session.install("--no-deps", "-r", alone)
        if listed in files:
            session.install(TORCH, "-r", listed)
        then(session)
        stamp.write_text(digest)

    @nox.session(name=name, reuse_venv=complete)
    def run(session):
        try:
            complete and stamp.is_file() or install(session)  # nox makes it anew where its Python is gone
        except CommandFailed as error:
            session.skip(f"not run: {name} can't be installed on this machine: {error.reason}")
        session.chdir(ROOT)
        session.run("python", "-m", "pytest", "-n", WORKERS, "--dist=loadgroup",
                    *(f"tests/integrations/{test}" for test in tests), *session.posargs,
                    env={key: value.format(environment=where) for key, value in variables.items()})


def vllm(session):
    """Builds for CUDA, which break the import, go; the next version's Python comes, without its libraries."""
    folder = Path(session.virtualenv.location)
    session.run("python", "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec")
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "-r",
                HERE / "environments" / "vllm.next.txt")
    (wheel,) = folder.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "next", [name for name in file.namelist() if name.endswith((".py", "METADATA"))])
    wheel.unlink()


def sglang(session):
    """Its import of torchvision, whose wheel is linked against CUDA, comes through."""
    session.run("python", HERE / "sglang_package" / "torchvision_operators.py")


runtime("vllm", "test_vllm_engines.py", "test_vllm_switch.py", "test_vllm_routing.py", "test_vllm_experts.py",
        then=vllm, KERNEL_REGISTRY_NEXT_VLLM="{environment}/next")
runtime("sglang", "test_sglang.py", "test_sglang_calls.py", "test_sglang_engine.py", then=sglang)
runtime("tokenspeed", "test_tokenspeed.py")
TRANSFORMERS = [f"test_transformers{part}.py" for part in ("", "_switch", "_declined", "_benchmark")]
runtime("transformers", *TRANSFORMERS)
runtime("transformers_5_17", *TRANSFORMERS)
