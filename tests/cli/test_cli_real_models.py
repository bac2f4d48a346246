"""The shipped registry and models through the command line, as a new user types it; kernels in Triton's interpreter."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_registry import Registry
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


def planned(output):
    """The rows of a plan, by platform: [(kernel, when, why), ...], a kernel that serves some calls only in its line."""
    found, columns, platform = {}, {}, None
    for line in output.splitlines():
        if line.startswith(" op "):
            starts = [match.start() for match in re.finditer(r"\S+", line)]
            columns = dict(zip(line.split(), zip(starts, [*starts[1:], None])))
        elif columns and set(line) - set(" ─"):
            cells = {name: line[start:end].strip() for name, (start, end) in columns.items()}
            platform = cells["platform"] or platform
            found.setdefault(platform, []).append((cells["kernel"], cells.get("when", ""), cells["why"]))
    return found


def span(when):
    """(first, past the last) of "num_tokens < 1024", "num_tokens 1024..4095" or "num_tokens >= 4096"."""
    numbers = [int(number) for number in re.findall(r"\d+", when.removeprefix("num_tokens "))]
    return (0, *numbers) if " < " in when else (*numbers, None) if " >= " in when else (numbers[0], numbers[1] + 1)


@pytest.mark.parametrize("model, kernel, others", [
    ("deepseek-v3", "triton_biased_grouped", ["pairs"]),
    ("minimax-m2", "triton_biased_single_group", ["pairs", "quads"]),
    ("deepseek-v4", "triton_biased_single_group", ["pairs", "quads"]),
    ("kimi-k3", "triton_biased_single_group", ["pairs"]),
    ("nemotron-3-super-120b-a12b", "triton_biased_single_group", []),
    ("mixtral-8x7b", "triton_softmax", ["pairs", "quads"]),
    ("qwen3-30b-a3b", "triton_softmax", ["pairs", "quads"]),
    ("qwen3-next-80b-a3b", "triton_softmax", ["pairs"]),
    ("deepseek-v2", "triton_softmax", ["pairs", "quads"])])
def test_plan_gives_each_model_its_kernels_on_a_gpu(run, model, kernel, others):
    output = run("plan", model, "--platform", "sm_90", "--platform", "gfx950").output
    rows = planned(output)
    assert [*rows] == ["sm_90", "gfx950"] and "no fast kernel" not in output
    for found in rows.values():
        assert [name for name, _, _ in found] == [kernel, *(f"{kernel}_{other}" for other in others)]
        if others:
            spans = [span(when) for _, when, _ in found]
            assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1][1] is None
        else:
            assert found[0][1] == ""
        assert found[0][2] and not any(why for _, _, why in found[1:])  # told once


@pytest.mark.parametrize("model, lacks", [
    ("llama-4-scout", "has_bias is false, serves true"), ("ernie-4.5-21b-a3b", "scoring is softmax, serves sigmoid")])
def test_plan_says_why_only_the_reference_serves_a_model(run, model, lacks):
    (kernel, when, why), = planned(run("plan", model, "--platform", "sm_90").output)["sm_90"]
    assert (kernel, when) == ("torch", "") and why.startswith("no fast kernel: nearest is triton_") and lacks in why


def test_plan_names_the_kernel_that_an_override_took_away(run, tmp_path):
    path = tmp_path / "o.yaml"
    path.write_text("version: 1\noverrides: [{op: moe.topk, disable: triton_biased_grouped, reason: incident 7}]\n")
    rows = planned(run("plan", "deepseek-v3", "--platform", "sm_90", "--overrides", path).output)["sm_90"]
    (few, _, why), (many, _, _) = rows
    assert (few, many) == ("torch", "triton_biased_grouped_pairs") and why.endswith("(incident 7)")
    assert "nearest is triton_biased_grouped, refused because disable triton_biased_grouped" in why


def test_run_in_the_interpreter_executes_the_triton_kernel():
    pytest.importorskip("triton")
    result = typed("run", "deepseek-v3", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 triton_biased_grouped passed" in words(result.stdout) and "num_experts=256" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("model, kernels", [
    ("ling-mini-2.0", {1024: "triton_biased_grouped_pairs"}),
    ("glm-4.5-air", {1024: "triton_biased_single_group_pairs", 4096: "triton_biased_single_group_quads"}),
    ("mixtral-8x7b", {3: "triton_softmax", 1024: "triton_softmax_pairs", 4096: "triton_softmax_quads"})])
def test_run_with_many_tokens_executes_the_kernel_that_serves_many(model, kernels):
    pytest.importorskip("triton")
    result = typed("run", model, "--interpret", *(word for tokens in kernels for word in ("--tokens", str(tokens))))
    assert result.returncode == 0, result.stderr
    for tokens, kernel in kernels.items():
        assert f"moe.topk {tokens} {kernel} passed 0 of {tokens}" in words(result.stdout)


def test_run_says_why_only_the_reference_serves():
    pytest.importorskip("torch")
    result = typed("run", "llama-4-scout", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 torch passed" in words(result.stdout) and "has_bias is false, serves true" in result.stdout


KERNELS = {"triton_biased_grouped": ["pairs"], "triton_biased_single_group": ["pairs", "quads"],
           "triton_softmax": ["pairs", "quads"]}


def test_verify_passes_every_shipped_implementation(tmp_path):
    """Those that serve many tokens only run at a few points in the interpreter, and it says so; whatever else it leaves
    out is a failure. Each is compared bit for bit with those whose calls it shares."""
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    result = typed("verify", "--interpret", "--budget", "15", "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed, " in result.stdout
    found = [words(line).split() for line in result.stdout.splitlines() if line.startswith(" moe.topk")]
    rows = {row[1]: row for row in found}
    entries = Registry(plugins=False).catalog.op("moe.topk").by_name
    assert {*rows} == {*entries} and all(row[2] == "passed" for row in rows.values())
    many = {name for name, entry in entries.items() if "num_tokens" in entry.box.sets}
    assert {*rows} - many == {*KERNELS, "torch"}
    assert all(int(rows[name][3].strip(",")) >= (1 if name in many else 2) for name in rows)  # model workloads ran
    for line in result.stdout.splitlines():
        if line.startswith("not run: "):
            name, why = line.removeprefix("not run: ").split(": ", 1)
            assert name in many and "too many for the interpreter" in why
    ran = {row["implementation"]: row["point"] for row in json.loads(report.read_text())["rows"]
           if row["outcome"] == "passed" and row["where"] in ("edge", "inside")}
    assert {*ran} == {*entries}
    compared = {(row["implementation"], row["point"].partition(":")[0].removeprefix("bit for bit with "))
                for row in json.loads(report.read_text())["rows"] if row["where"] == "numerics"}
    assert {frozenset(pair) for pair in compared} == {
        frozenset((a, b)) for base, others in KERNELS.items() for a, b in
        itertools.combinations((base, *(f"{base}_{other}" for other in others)), 2)}
