"""What importing the traits costs and needs, and that the package has one name."""

import subprocess
import sys

import pytest

import kernel_registry

HEAVY = (
    "torch",
    "triton",
    "numpy",
    "yaml",
    "pydantic",
    "ctypes",
    "difflib",
    "importlib.metadata",
    "kernel_registry.ops",
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["trait", "dtype", "platform", "detection", "moe", "families", "model_config"])
def test_importing_a_module_loads_nothing_heavy(module):
    # The package's own __init__ is the engine's affair: a stand-in takes its place.
    code = (
        f"import sys, types; k = types.ModuleType('kernel_registry'); k.__path__ = {list(kernel_registry.__path__)!r}\n"
        f"sys.modules['kernel_registry'] = k; import kernel_registry.traits.{module}\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        f"ours = [m for m in sys.modules if m.startswith('kernel_registry.')]\n"
        f"print([m for m in ours if not m.startswith('kernel_registry.traits')])"
    )
    result = run(code)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"], result.stdout + result.stderr


def test_the_package_has_one_name():
    result = run("import traits")
    assert result.returncode and "import kernel_registry.traits, not traits" in result.stderr
