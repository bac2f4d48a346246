"""Each script of examples/ runs in a process of its own, from another folder, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_registry import Registry

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEEPSEEK = dict(num_experts=256, num_expert_group=8, topk_group=4, topk=8)


@pytest.fixture(scope="module")
def grouped() -> str:
    """The name of the kernel that DeepSeek-V3's router gets: an implementation and its variants, by num_tokens."""
    registry = Registry(plugins=False, environment=False, platform="interpreter")
    name = registry.explain("moe.topk", **DEEPSEEK).winner
    assert name.startswith("triton_biased_grouped|.")
    return name


@pytest.fixture
def example(tmp_path):
    """Runs examples/NAME.py and returns what it printed. Without a GPU unless TRITON_INTERPRET says otherwise."""
    def run(name: str, by: tuple[str, ...] = (), **environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNEL_REGISTRY_OVERRIDES")}
        env = {**env, "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}", "CUDA_VISIBLE_DEVICES": "",
               "TMPDIR": str(tmp_path), **environment}
        done = subprocess.run([sys.executable, *by, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True,
                              timeout=300, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


GPU_MACHINE = """
import runpy, sys
from kernel_registry import state
from kernel_registry.traits.platform import Platform
state.detect = lambda: Platform.parse("sm_90")
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["moe_layer", "routing_bias", "indexer_load", "incident"])
def test_what_needs_no_gpu_does_not_mind_one(example, name):
    """Their tensors are on the CPU: on a machine with a GPU, a kernel for that would refuse them."""
    assert example(name, by=("-c", GPU_MACHINE))


def test_every_script_is_tested():
    tested = {"quickstart", "override_and_reload", "freeze_and_compare", "torch_op", "moe_layer", "routing_bias",
              "indexer_load", "incident", "expert_parallel"}
    assert {p.stem for p in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("interpreted", [False, True], ids=["cpu", "interpreter"])
def test_quickstart(example, grouped, interpreted):
    out = example("quickstart", **({"TRITON_INTERPRET": "1"} if interpreted else {}))
    name = grouped if interpreted else "torch"
    assert out.startswith(f"{'interpreter' if interpreted else 'cpu'} runs {name}\n")
    assert re.findall(r"^   \* (\S+) +chosen$", out, re.M) == [name.partition("|")[0]]  # for 16 tokens
    assert out.endswith("16 tokens agree with the definition\n")


def test_override_and_reload(example, grouped):
    lines = example("override_and_reload").splitlines()
    assert [line for line in lines if line.startswith("serving")] == [
        f"serving with {grouped}", "serving with torch", f"serving with {grouped}"]
    assert "refused: overrides.yaml:4: moe.topk has no implementation 'triton_biased_gruoped'" in lines
    rule = "disable triton_biased_grouped: file overrides.yaml, overrides.yaml:4 (incident 42)"
    assert f"override  {rule}: in force" in lines
    (told,) = [line for line in lines if "one predicate away" in line]  # the variants go with it, in its line
    assert re.fullmatch(rf"~ triton_biased_grouped and its \d variants +one predicate away: {re.escape(rule)}", told)


def test_incident(example):
    told = example("incident")
    start, written, why, back = told.split("\n\n-- ")
    monitor = "monitor: 1 tokens right, 4 tokens right, 16 tokens {}, 40 tokens right"
    wrong, right = monitor.format("WRONG"), monitor.format("right")
    assert start.splitlines() == ["routing with house_router", wrong]
    assert re.fullmatch(r"""the line is written, the process reloads
decode, 16 tokens still holds what ran before
  moe\.topk\(num_experts=32, .*\) at num_tokens=16, contiguous=true: house_router -> torch
WRONG
captured again: decode, 16 tokens
RIGHT""".replace("WRONG", wrong).replace("RIGHT", right), written)
    rule = "use torch: file overrides.yaml, overrides.yaml:4 (incident 42)"
    change = ("house_router (registry) -> house_router when {num_tokens: {max: 15}} (registry) | "
              "torch when {num_tokens: {min: 16, max: 16}} (override) | "
              "house_router when {num_tokens: {min: 17}} (registry)")
    assert why.splitlines()[1:] == [f"-> torch  [{rule}]", f"override  {rule}: decides", change]
    assert back.splitlines()[3:] == ["captured again: decode, 16 tokens", "the plan is the one before: True", wrong,
                                     "the engine served all the while, and none of its steps failed"]
    assert back.splitlines()[2].endswith(": torch -> house_router")


def test_freeze_and_compare(example, grouped):
    lines = example("freeze_and_compare").splitlines()
    assert lines[0].startswith("rank 0 and rank 1 agree: ")
    changed = [line for line in lines if line.startswith("  ~ moe.topk(")]
    assert len(changed) == 1 and changed[0].endswith(" (registry) -> torch (override)")
    before = changed[0].partition("): ")[2].partition(" -> ")[0].split(" | ")
    assert [row.partition(" when {num_tokens: {")[0] for row in before] == [
        name if not name.startswith(".") else f"triton_biased_grouped{name}" for name in grouped.split("|")]
    assert all(re.search(r"when {num_tokens: {(min: \d+)?(, )?(max: \d+)?}} \(registry\)$", row) for row in before)
    assert f"from the plan: {grouped}" in lines
    assert lines[-1].startswith("not in the plan: ")


def test_torch_op(example, grouped):
    assert example("torch_op").splitlines() == [
        f"2, 3 and 5 tokens: 1 graph, served by {grouped}",
        f"under an override: 1 graph, served so far by {grouped}, torch"]


def test_moe_layer(example):
    lines = example("moe_layer").splitlines()
    assert lines[0] == "published: 256 experts, weights fp8_block" and "where the result goes" in lines
    assert lines[-2] == "ran: moe.topk, moe.experts, moe.finalize"
    assert lines[-1].startswith("the same result in a slice")


def test_expert_parallel(example):
    lines = example("expert_parallel").splitlines()
    assert lines[0] == "2 ranks agree"
    assert lines[1] == "over 2 ranks" and len(lines) == 6
    assert re.fullmatch(r"5 and 3 tokens, \d+ and \d+ at the experts: the layer in one piece agrees", lines[4])
    assert lines[5] == "with another override file: rank 1 differs from rank 0"


def test_routing_bias(example):
    lines = example("routing_bias").splitlines()
    assert lines[0] == "e_score_correction_bias: float32 to bfloat16"
    assert lines[1] == "refused: correction_bias is not prepared"
    assert re.fullmatch(r"refused: .* which changes values: of 25\d distinct ones \d+ would be left", lines[2])
    assert lines[3:] == ["routed as it is: bfloat16 logits, float32 bias", "(4, 8) experts chosen"]


def test_indexer_load(example):
    pytest.importorskip("safetensors")
    assert example("indexer_load").splitlines() == [
        "model.layers.0.self_attn.indexer.wk.weight_scale_inv of FOLDER/model-00001.safetensors has come without its "
        "weight",
        "6 tensors taken; the third layer's and k_norm's are left to others",
        "k [2, 5, 128], weights [2, 5, 64]: two views of one result",
        "wk in fp8_block: torch_fused", "wk in nvfp4: torch_separate"]
