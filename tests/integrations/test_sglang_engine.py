"""SGLang's real engine on a CPU with tiny random models: the same tokens with the plugin and without, and who routed.

The plugin is found as it is when installed, by its entry point, in the engine's own processes. Needs sglang 0.5.23; not
run where it is absent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("sglang.srt.plugins.hook_registry", reason="not run: sglang is not installed here")
HERE = Path(__file__).parent
PACKAGE = HERE / "sglang_package"
sys.path[:0] = [str(HERE), str(PACKAGE)]

import kr_sglang_test  # noqa: E402
from installed import ROOT, own_entry_points, pretend_installed  # noqa: E402
from kr_sglang_test.generate import NEW_TOKENS, PROMPTS  # noqa: E402
from kr_sglang_test.models import MODELS  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a module of the test package as installed beside the registry; the settings are environment variables."""
    site = tmp_path_factory.mktemp("site")
    pretend_installed(site, "kr-sglang-test", kr_sglang_test.ENTRY_POINTS)
    pretend_installed(site, "kernel-registry", own_entry_points())

    def run(module, *arguments, **settings):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT, PACKAGE))),
                       "SGLANG_PLATFORM": "torch_cpu", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", **settings}
        environment.pop("TRITON_INTERPRET", None)  # a CPU, as users have it
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", f"kr_sglang_test.{module}", *map(str, arguments)],
                              env=environment, cwd=site, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return done
    return run


def engine(run, folder, trace, **settings):
    """(tokens by prompt, their log-probabilities, lines of the trace, log) of a run of the engine."""
    done = run("generate", folder, KR_SGLANG_TEST_TRACE=str(trace), **settings)
    answers = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("[[["))
    tokens = [[token for _, token in answer] for answer in answers]
    chances = [chance for answer in answers for chance, _ in answer]
    return tokens, chances, Counter(trace.read_text().split()), done.stdout + done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_the_engine_gives_the_same_tokens(run, tmp_path, model):
    run("models", model, tmp_path / model)
    layers = MODELS[model][2]
    theirs, their_chances, without, _ = engine(run, tmp_path / model, tmp_path / "off")
    ours, chances, trace, log = engine(run, tmp_path / model, tmp_path / "on", KERNEL_REGISTRY_SGLANG="1")
    assert without["kernel"] == 0, "installed, but not switched on"
    assert [len(tokens) for tokens in ours] == [NEW_TOKENS] * len(PROMPTS)
    assert ours == theirs and chances == pytest.approx(their_chances, rel=0, abs=2e-5)
    assert trace["kernel"] == trace["routing"] == without["routing"] >= layers * NEW_TOKENS
    (line,) = {line.split("kernel_registry: ")[1] for line in log.splitlines() if " runs counted: " in line}
    assert "num_experts=64" in line and "topk=8" in line
