"""The shipped registry and models through the command line, as a new user types it; kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_registry.traits.model_config import shipped_models

ROOT = Path(__file__).parents[2]
PLATFORMS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "cpu", "interpreter")


def words(text):
    return " ".join(text.split())


def typed(*arguments):
    return subprocess.run([sys.executable, "-m", "kernel_registry.cli", *arguments], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, timeout=500)


def test_every_shipped_model_is_planned_on_every_platform(run):
    flags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    result = run("plan", *shipped_models(), *flags)
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.output.splitlines() if line.startswith(" moe.topk")]
    assert len(rows) == len(shipped_models()) * len(PLATFORMS) and not any("NONE" in row for row in rows)


@pytest.mark.parametrize("model, kernel", [
    ("deepseek-v3", "triton_biased_grouped"), ("minimax-m2", "triton_biased_single_group"),
    ("kimi-k3", "triton_biased_single_group"), ("qwen3-30b-a3b", "torch")])
def test_plan_gives_each_model_its_kernel_on_a_gpu(run, model, kernel):
    output = run("plan", model, "--platform", "sm_90", "--platform", "gfx950").output
    rows = [words(line) for line in output.splitlines() if line.startswith(" moe.topk")]
    assert all(row.split()[3] == kernel for row in rows) and len(rows) == 2
    assert all(("no fast kernel" in row) == (kernel == "torch") for row in rows)


def test_run_in_the_interpreter_executes_the_triton_kernel():
    pytest.importorskip("triton")
    result = typed("run", "deepseek-v3", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 triton_biased_grouped passed" in words(result.stdout) and "num_experts=256" in result.stdout
    assert result.stderr == ""


def test_run_says_why_only_the_reference_serves():
    pytest.importorskip("torch")
    result = typed("run", "mixtral-8x7b", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 torch passed" in words(result.stdout) and "scoring is softmax, serves sigmoid" in result.stdout


def test_verify_passes_every_shipped_implementation():
    pytest.importorskip("triton")
    result = typed("verify", "--interpret", "--budget", "15")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed, 0 not run" in result.stdout
    rows = [words(line).split() for line in result.stdout.splitlines() if line.startswith(" moe.topk")]
    assert len(rows) == 3 and all(row[2] == "passed" and int(row[3]) >= 3 for row in rows)  # model workloads ran
