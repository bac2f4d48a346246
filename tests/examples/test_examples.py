"""Each script of examples/ runs in a process of its own, from another folder, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GROUPED = "triton_biased_grouped|triton_biased_grouped_pairs"  # which of them, a call's num_tokens says


@pytest.fixture
def example(tmp_path):
    """Runs examples/NAME.py and returns what it printed. Without a GPU unless TRITON_INTERPRET says otherwise."""
    def run(name: str, **environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNEL_REGISTRY_OVERRIDES")}
        env = {**env, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path), **environment}
        done = subprocess.run([sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True,
                              timeout=120, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


def test_every_script_is_tested():
    tested = {"quickstart", "override_and_reload", "freeze_and_compare", "torch_op"}
    assert {p.stem for p in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("interpreted", [False, True], ids=["cpu", "interpreter"])
def test_quickstart(example, interpreted):
    out = example("quickstart", **({"TRITON_INTERPRET": "1"} if interpreted else {}))
    names = ["triton_biased_grouped", "triton_biased_grouped_pairs"] if interpreted else ["torch"]
    assert out.startswith(f"{'interpreter' if interpreted else 'cpu'} runs {'|'.join(names)}\n")
    assert re.findall(r"^   \* (\w+) +chosen$", out, re.M) == names[:1]  # for 16 tokens
    assert out.endswith("16 tokens agree with the definition\n")


def test_override_and_reload(example):
    lines = example("override_and_reload").splitlines()
    assert [line for line in lines if line.startswith("serving")] == [
        f"serving with {GROUPED}", "serving with torch", f"serving with {GROUPED}"]
    assert "refused: overrides.yaml:4: moe.topk has no implementation 'triton_biased_gruoped'" in lines
    for place, name in ((4, "triton_biased_grouped"), (5, "triton_biased_grouped_pairs")):
        assert any(line.startswith(f"override  disable {name}: ") and f"overrides.yaml:{place} (incident 42)" in line
                   for line in lines)


def test_freeze_and_compare(example):
    lines = example("freeze_and_compare").splitlines()
    assert lines[0].startswith("rank 0 and rank 1 agree: ")
    changed = [line for line in lines if line.startswith("  ~ moe.topk(")]
    assert len(changed) == 1 and changed[0].endswith(" (registry) -> torch (override)")
    assert re.search(r": triton_biased_grouped when {num_tokens: {max: \d+}} \(registry\) "
                     r"\| triton_biased_grouped_pairs when {num_tokens: {min: \d+}} \(registry\) ->", changed[0])
    assert f"from the plan: {GROUPED}" in lines
    assert lines[-1].startswith("not in the plan: ")


def test_torch_op(example):
    assert example("torch_op").splitlines() == [
        f"2, 3 and 5 tokens: 1 graph, served by {GROUPED}",
        f"under an override: 1 graph, served so far by {GROUPED}, torch"]
