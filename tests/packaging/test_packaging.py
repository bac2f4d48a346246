"""What gets installed: wheel, sdist, editable. Built from a copy of the tracked files, installed into new environments.

The fresh environments see the running one's packages for pydantic, yaml, click and rich, so that only setuptools may
have to be fetched, and that only where the running environment has none that is new enough.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


def tracked() -> list[str]:
    """Paths of the repository's files, relative to its root."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: " + done.stderr.strip())
    return [path for path in done.stdout.split("\0") if path and (ROOT / path).is_file()]


def run(*command, cwd: Path, expect: int = 0, **environment: str) -> str:
    """The command's stdout. Nothing of the checkout is importable unless `environment` says so."""
    unset = ("PYTHONPATH", "KERNEL_REGISTRY_OVERRIDES", "KERNEL_REGISTRY_TILES", "TRITON_INTERPRET")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, cwd=cwd,
                          env={**env, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment})
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def lend_setuptools(folder: Path) -> None:
    """Fills `folder` with a setuptools that pyproject.toml accepts: the running environment's, else one from pip."""
    try:
        found = metadata.distribution("setuptools")
        if int(found.version.split(".")[0]) >= 77:
            for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
                (folder / top).symlink_to(Path(found.locate_file(top)))
            return
    except metadata.PackageNotFoundError:
        pass
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "setuptools>=77", cwd=folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: `tree`, a copy of the tracked files; `away`, an empty one; `tools`, a setuptools that can build it."""
    base = tmp_path_factory.mktemp("packaging")
    for path in tracked():
        target = base / "tree" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())
    (base / "away").mkdir()
    (base / "tools").mkdir()
    lend_setuptools(base / "tools")
    return SimpleNamespace(base=base, tree=base / "tree", away=base / "away", tools=base / "tools")


@pytest.fixture(scope="module")
def built(place):
    """Paths of the wheel and of the sdist."""
    out = place.base / "dist"
    out.mkdir()
    code = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
    run(sys.executable, "-c", code, out, cwd=place.tree, PYTHONPATH=str(place.tools))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return SimpleNamespace(wheel=wheel, sdist=sdist)


class Environment:
    """A new virtual environment. `install` is pip's; `python` and `tool` run its interpreter and its console script."""

    def __init__(self, place, name: str):
        self.place, self.folder = place, place.base / name
        venv.create(self.folder, with_pip=False, symlinks=os.name != "nt")
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")

    def install(self, *what) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def pip(self, *arguments) -> None:
        run(sys.executable, "-m", "pip", "--python", self.bin / "python", "--quiet", *arguments, cwd=self.place.away,
            PYTHONPATH=str(self.place.tools))

    def borrow(self) -> None:
        """Makes the running environment's packages importable, after this one's own. Its .pth files are not followed,
        so that an editable install over there stays over there."""
        own = self.python("import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        lent = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (Path(own) / "borrowed.pth").write_text("\n".join(lent) + "\n")

    def python(self, code: str, expect: int = 0, cwd: Path | None = None) -> str:
        return run(self.bin / "python", "-c", code, cwd=cwd or self.place.away, expect=expect)

    def tool(self, *arguments: str) -> str:
        return run(self.bin / "kernel-registry", *arguments, cwd=self.place.away)


@pytest.fixture(scope="module")
def from_wheel(place, built):
    environment = Environment(place, "from-wheel")
    environment.install(built.wheel)
    environment.borrow()
    return environment


@pytest.fixture(scope="module")
def editable(place, built):
    environment = Environment(place, "editable")
    environment.install("--editable", place.tree)
    environment.borrow()
    return environment


@pytest.fixture(params=["from_wheel", "editable"])
def installed(request):
    return request.getfixturevalue(request.param)


# ---- what is in the archives -----------------------------------------------------------------------------------------

def test_the_wheel_holds_the_tracked_package_files_and_nothing_else(built):
    def place_in_wheel(path: str) -> str:
        return path if path.startswith("kernel_registry/") else f"kernel_registry/{path}"
    defaults = {f"kernel_registry/defaults/{name}.yaml" for name in ("registry", "tiles")}
    expected = {place_in_wheel(p) for p in tracked() if p.startswith(("kernel_registry/", "ops/", "traits/"))
                and p.endswith((".py", ".json", ".yaml", "py.typed"))} | defaults
    names = {n for n in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in n}
    assert names == expected
    assert {n.partition("/")[0] for n in names} == {"kernel_registry"}


def test_the_wheel_says_what_it_needs(built):
    archive = zipfile.ZipFile(built.wheel)
    text = {n.rpartition("/")[2]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    assert "Name: kernel-registry\n" in text["METADATA"]
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?:[^;\n]*)(?:; (.*))?$", text["METADATA"], re.M)
    assert {name for name, marker in required if not marker} == {"pydantic", "pyyaml", "click", "rich"}
    assert {"torch", "triton"} <= {name for name, marker in required if "kernels" in marker}
    assert text["top_level.txt"].split() == ["kernel_registry"]
    assert "kernel-registry = kernel_registry.cli:main" in text["entry_points.txt"]


def test_the_sdist_gives_the_same_wheel(place, built):
    unpacked, out = place.base / "unpacked", place.base / "from-sdist"
    out.mkdir()
    with tarfile.open(built.sdist) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    folder, = unpacked.iterdir()
    run(sys.executable, "-c", "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])", out,
        cwd=folder, PYTHONPATH=str(place.tools))
    wheel, = out.glob("*.whl")
    contents = [{n: zipfile.ZipFile(w).read(n) for n in zipfile.ZipFile(w).namelist() if not n.endswith("RECORD")}
                for w in (built.wheel, wheel)]
    assert contents[0] == contents[1]


# ---- what is importable ----------------------------------------------------------------------------------------------

def test_the_parts_are_there(installed):
    out = installed.python("""
import json
import kernel_registry, kernel_registry.traits.moe, kernel_registry.ops.moe.topk.contract
from kernel_registry.traits.model_config import load_config, routing
from pathlib import Path
traits = Path(kernel_registry.traits.__file__).parent
print(json.dumps({
    "registry": kernel_registry.shipped_registry().is_file(),
    "families": (traits / "families.yaml").is_file(),
    "models": len(list((traits / "models").glob("*.json"))),
    "experts": routing(load_config("deepseek-v3")).traits["num_experts"],
    "op": kernel_registry.registry.catalog.op("moe.topk").contract.__module__,
    "version": kernel_registry.__version__,
}))
""")
    found = json.loads(out)
    assert found.pop("models") >= 15
    assert found == {"registry": True, "families": True, "experts": 256, "op": "kernel_registry.ops.moe.topk.contract",
                     "version": metadata_version(installed)}


def metadata_version(environment) -> str:
    return environment.python("from importlib.metadata import version; print(version('kernel-registry'))").strip()


@pytest.mark.parametrize("name", ["ops", "traits", "tests", "registry", "defaults", "moe"])
def test_no_other_top_level_module_appears(installed, name):
    """ops and traits are other people's packages."""
    out = installed.python(f"""
import importlib.util
import kernel_registry
spec = importlib.util.find_spec({name!r})
print(spec and spec.origin)
""").strip()
    assert out == "None" or str(installed.place.base) not in out


def test_it_is_this_installation_that_is_tested(from_wheel, editable):
    for environment, home in ((from_wheel, from_wheel.folder), (editable, editable.place.tree)):
        where = Path(environment.python("import kernel_registry; print(kernel_registry.__file__)").strip())
        assert home.resolve() in where.resolve().parents


def test_an_editable_install_follows_the_files(place, editable):
    registry, kernels = place.tree / "registry.yaml", place.tree / "ops/moe/topk/__init__.py"
    before = registry.read_text(), kernels.read_text()
    try:
        registry.write_text(before[0].replace("triton_biased_grouped:", "renamed:"))
        kernels.write_text(before[1] + "\nEDITED = True\n")
        assert "renamed" in editable.tool("list")
        assert editable.python("import kernel_registry.ops.moe.topk as m; print(m.EDITED)") == "True\n"
    finally:
        registry.write_text(before[0])
        kernels.write_text(before[1])


@pytest.mark.parametrize("name", ["ops", "traits"])
def test_from_the_checkout_the_bare_names_are_refused(place, name):
    """With the checkout as the current folder the bare name is importable; a second copy of it must not come to be."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=place.tree, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ImportError: import kernel_registry.{name}, not {name}" in done.stderr


# ---- what works ------------------------------------------------------------------------------------------------------

def test_the_console_script(installed):
    assert installed.tool("--version").strip() == metadata_version(installed)
    assert "triton_biased_grouped" in installed.tool("plan", "deepseek-v3", "--platform", "sm_90")
    assert "triton_biased_single_group" in installed.tool("list")
    assert installed.tool("lint").strip().endswith("0 errors, 0 warnings")


def test_the_reference_routes(installed):
    if not any((Path(sysconfig.get_path(name)) / "torch").is_dir() for name in ("purelib", "platlib")):
        pytest.skip("torch is not installed beside the running interpreter")
    assert "passed" in installed.tool("run", "kimi-k2", "--tokens", "2")


def test_a_plugin_installs_and_is_found(place, from_wheel):
    before = from_wheel.tool("list")
    from_wheel.install(place.tree / "examples" / "plugin")
    try:
        assert "acme_switch" in from_wheel.tool("list") and "acme_switch" not in before
        call = ("explain", "moe.topk", "num_experts=128", "topk=1", "scoring=softmax", "has_bias=false", "platform=cpu")
        assert "-> acme_switch " in from_wheel.tool(*call)
        assert from_wheel.tool("lint").strip().endswith("0 errors, 0 warnings")
        if any((Path(sysconfig.get_path(name)) / "torch").is_dir() for name in ("purelib", "platlib")):
            verified = from_wheel.tool("verify", "--implementation", "acme_switch", "--budget", "12")
            assert verified.strip().endswith(" 0 failed, 0 not run")
    finally:
        from_wheel.pip("uninstall", "--yes", "acme-kernels")
