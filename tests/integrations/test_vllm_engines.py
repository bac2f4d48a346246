"""vLLM's real engines with tiny models: the tokens with the registry's kernels and without, and who made them.

Runs where vLLM is installed, in the environment that it is in; elsewhere everything here is reported as not run. An
engine takes its time to start, so each run below serves several tests, and several models where it can.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_parts  # noqa: F401  not run where vLLM is not installed
from installed import own_entry_points, pretend_installed
from vllm_engine import MOE_LAYERS, NEW_TOKENS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MODELS = tuple(MOE_LAYERS)
STOCK = tuple(name for name in MODELS if name != "minimax_m2")  # vLLM on a CPU refuses MiniMax-M2's routing
pytestmark = pytest.mark.xdist_group("engines")  # one process's, whose runs serve several tests
TOLERANCE = 1e-4  # of logprobs near -3 in float32; another expert or another weight moves them by 1e-2 and more


class Engines:
    """Runs vllm_engine.py, each job once and in a process of its own. All jobs share models and vLLM's cache of
    compiled models."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, {}
        points = {**own_entry_points()["vllm.general_plugins"], "zz_counts": "vllm_counts:plugin"}
        pretend_installed(folder / "site", "kernel-registry-tests", {"vllm.general_plugins": points})

    def __call__(self, mode: str, *names: str, setting: str = "", processes: bool = False, **environment: str):
        """The results of a job, and what it logged."""
        key = (mode, names, setting, processes, *environment.items())
        if key not in self.done:
            self.done[key] = self._run(mode, names, setting, processes, environment)
        return self.done[key]

    def _run(self, mode, names, setting, processes, environment):
        calls = self.folder / f"calls_{len(self.done)}"
        calls.mkdir()
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNEL_REGISTRY_VLLM")}
        env |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, self.folder / "site"))),
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                "VLLM_MLA_DISABLE": "1", "VLLM_CACHE_ROOT": str(self.folder / "cache"), "KERNEL_CALLS": str(calls),
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)), "KERNEL_REGISTRY_VLLM": setting, **environment}
        done = subprocess.run([sys.executable, HERE / "vllm_engine.py", self.folder / "models", mode, *names], env=env,
                              capture_output=True, text=True, timeout=900, cwd=self.folder)
        log = done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert done.returncode == 0 and lines, log[-4000:]
        return json.loads(lines[0].removeprefix("RESULT ")), log


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return Engines(tmp_path_factory.mktemp("vllm"))


def assert_same(result: dict, wanted: dict) -> None:
    assert result.get("error") is None and wanted.get("error") is None
    assert result["tokens"] == wanted["tokens"]
    for row, other in zip(result["logprobs"], wanted["logprobs"], strict=True):
        assert row == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize("name", STOCK)
def test_an_eager_engine_gives_its_own_tokens(engines, name):
    stock, on = (engines("eager", *MODELS, setting=setting)[0][name] for setting in ("", "1"))
    assert_same(on, stock)
    assert stock["calls"] == {}  # without the setting nothing of the registry runs
    assert "moe.topk" not in stock["report"]


def test_minimax_m2_runs_where_stock_vllm_refuses_its_routing(engines):
    stock, on = (engines("eager", *MODELS, setting=setting)[0]["minimax_m2"] for setting in ("", "1"))
    assert stock["error"].startswith("AssertionError")
    assert_same(on, engines("reference", "minimax_m2")[0]["minimax_m2"])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_step_ran_the_registrys_kernels(engines, name):
    on = engines("eager", *MODELS, setting="1")[0][name]
    expected = MOE_LAYERS[name] * NEW_TOKENS
    assert on["calls"] == {"here": {"moe.topk torch": expected, "moe.experts torch": expected}}


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_engine_gives_its_own_tokens(engines, name):
    stock = engines("compiled", *STOCK)[0]  # first, so that its compiled models lie in the cache
    on = engines("compiled", *MODELS, setting="1")[0][name]
    assert_same(on, stock[name] if name in STOCK else engines("reference", "minimax_m2")[0][name])
    calls = on["calls"]["here"]
    assert calls["moe.topk torch"] == calls["moe.experts torch"] >= MOE_LAYERS[name] * NEW_TOKENS
    assert calls["moe.topk torch"] % MOE_LAYERS[name] == 0


def test_the_worker_process_is_switched_on_and_what_is_declined_stays_with_vllm_and_is_told(engines, tmp_path):
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text("version: 1\noverrides: [{op: moe.experts, disable: torch, reason: a test}]\n")
    results, log = engines("eager", "qwen3_moe", setting="1", processes=True, KERNEL_REGISTRY_OVERRIDES=str(overrides))
    on = results["qwen3_moe"]
    assert_same(on, engines("eager", *MODELS)[0]["qwen3_moe"])
    (where, calls), = on["calls"].items()
    assert where == "another" and set(calls) == {"moe.topk torch"}
    steps, rest = divmod(calls["moe.topk torch"], MOE_LAYERS["qwen3_moe"])
    assert not rest and steps >= NEW_TOKENS  # prompts need not all arrive before the first step
    told = [line for line in log.splitlines() if "UnquantizedFusedMoEMethod stays with vLLM" in line]
    assert len(told) == 1 and "WARNING" in told[0] and "disable torch" in told[0]
    assert "moe.experts -> stays with the runtime" in on["report"] and "moe.topk -> torch" in on["report"]
