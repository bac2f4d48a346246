"""Rules of the tree itself: who imports whom, and that no file names the machine it was written on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = set(sys.stdlib_module_names)


def tracked(*suffixes: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: " + done.stderr.strip(), allow_module_level=True)
    return [p for p in done.stdout.split("\0") if p.endswith(suffixes) and (ROOT / p).is_file()]


def modules(folder: str) -> list[str]:
    found = [p for p in tracked(".py") if p.startswith(folder + "/")]
    assert found, f"no module in {folder}"
    return found


def imports(path: str, text: str | None = None):
    """(absolute module name, whether at import time) of every import in a file, relative ones resolved as installed."""
    package = [*Path(path).parent.parts]
    if package[0] != "kernel_registry":
        package.insert(0, "kernel_registry")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8") if text is None else text)
    later = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
             for n in ast.walk(f)}
    later |= {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and ast.unparse(f.test) == "TYPE_CHECKING"
              for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in later


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", modules("traits"))
def test_traits_import_neither_the_engine_nor_ops_nor_a_framework(path):
    for name, _ in imports(path):
        top = name.partition(".")[0]
        assert within(name, "kernel_registry.traits") or top in STDLIB or top == "yaml", f"{path} imports {name}"


@pytest.mark.parametrize("path", modules("kernel_registry"))
def test_the_engine_imports_nothing_from_ops(path):
    for name, at_import in imports(path):
        assert not within(name, "kernel_registry.ops") and not within(name, "ops"), f"{path} imports {name}"
        heavy = name.partition(".")[0] in ("torch", "triton", "numpy")
        allowed = path in ("kernel_registry/torch_ops.py", "kernel_registry/nn.py") or \
            path.startswith("kernel_registry/integrations/")
        assert allowed or not (heavy and at_import), f"{path} imports {name} when it is imported"
    named = [node.value for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and re.fullmatch(r"(kernel_registry\.)?ops\.[\w.]+(:\w+)?", node.value)]
    assert not named, f"{path} names a module of ops: {named}"


@pytest.mark.parametrize("path", modules("ops"))
def test_ops_import_the_engines_public_base_only(path):
    public = ("kernel_registry.contract", "kernel_registry.errors", "kernel_registry.traits", "kernel_registry.ops")
    for name, _ in imports(path):
        top = name.partition(".")[0]
        ours = top in ("kernel_registry", "ops", "traits")
        assert not ours or any(within(name, p) for p in public), f"{path} imports {name}"


def test_the_walk_sees_what_it_must():
    """The three rules above rest on `imports`: it must resolve relative imports and tell late ones."""
    text = "import torch\nfrom ..errors import X\nfrom . import y\ndef f():\n    from kernel_registry.ops import moe\n"
    assert list(imports("traits/deep/module.py", text)) == [
        ("torch", True), ("kernel_registry.traits.errors.X", True), ("kernel_registry.traits.deep.y", True),
        ("kernel_registry.ops.moe", False)]
    assert list(imports("traits/module.py", "from ..errors import X\n")) == [("kernel_registry.errors.X", True)]
    assert list(imports("kernel_registry/module.py", "from .ops import x\n")) == [("kernel_registry.ops.x", True)]


MACHINE = re.compile(r"(?<![\w.$}>)])/(?:work|root|home|opt|Users|mnt|data|srv|scratch)/[\w.]")
HOSTS = re.compile(r"pypi\.(?:org|python)|python[h]osted|download\.pytorch|(?:extra-)?index-url\s*=?\s*\S*:/[/]", re.I)


def test_the_patterns_find_what_they_look_for():
    slash = "/"
    assert MACHINE.search(f"see {slash}home{slash}me") and MACHINE.search(f"'{slash}work{slash}x'")
    assert not MACHINE.search(f"docs{slash}work{slash}x") and not MACHINE.search(f"a{slash}home{slash}b")
    assert all(map(HOSTS.search, ("pypi" + ".org", "files.python" + "hosted.org", "--index-url http" + "://x")))


def test_no_file_names_a_machine_or_a_package_host():
    found = []
    for path in tracked(""):
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        found += [f"{path}:{number}: {line.strip():.100}" for number, line in enumerate(text.splitlines(), 1)
                  if MACHINE.search(line) or HOSTS.search(line)]
    assert not found


def test_no_python_file_at_the_root():
    """The wheel maps the root folder to a package that holds registry.yaml; a module here would be shipped with it."""
    assert [p for p in tracked(".py") if "/" not in p] == []
