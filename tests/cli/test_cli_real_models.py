"""The shipped registry and models through the command line, as a new user types it; kernels in Triton's interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_registry import Registry
from kernel_registry.traits.model_config import experts, shipped_models

ROOT = Path(__file__).parents[2]
PLATFORMS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "cpu", "interpreter")


def words(text):
    return " ".join(text.split())


def typed(*arguments):
    return subprocess.run([sys.executable, "-m", "kernel_registry.cli", *arguments], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, timeout=500)


def interpreted(*arguments):
    """The same in Triton's interpreter, with more rows a tile, which saves nine tenths of the time."""
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.interpreted", *arguments], capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8", "TRITON_INTERPRET": "1"},
                          timeout=500)


def test_every_shipped_model_is_planned_on_every_platform(run):
    flags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    result = run("plan", *shipped_models(), *flags)
    assert result.exit_code == 0, result.stderr
    lines = result.output.splitlines()
    for op, models in (("moe.topk", shipped_models()), ("moe.experts", [m for m in shipped_models() if experts(m)])):
        rows = [line for line in lines if line.startswith(f" {op} ")]
        assert len(rows) == len(models) * len(PLATFORMS) and not any("NONE" in row for row in rows)


def planned(output, op="moe.topk"):
    """One op's rows of a plan, by platform: [(kernel, when, why), ...], a kernel that serves some calls only in its
    line."""
    found, columns, current, platform = {}, {}, None, None
    for line in output.splitlines():
        if line.startswith(" op "):
            starts = [match.start() for match in re.finditer(r"\S+", line)]
            columns = dict(zip(line.split(), zip(starts, [*starts[1:], None])))
        elif columns and set(line) - set(" ─"):
            cells = {name: line[start:end].strip() for name, (start, end) in columns.items()}
            current, platform = cells["op"] or current, cells["platform"] or platform
            if current != op:
                continue
            found.setdefault(platform, []).append((cells["kernel"], cells.get("when", ""), cells["why"]))
    return found


def span(when):
    """(first, past the last) of "num_tokens < 1024", "num_tokens 1024..4095" or "num_tokens >= 4096"."""
    numbers = [int(number) for number in re.findall(r"\d+", when.removeprefix("num_tokens "))]
    return (0, *numbers) if " < " in when else (*numbers, None) if " >= " in when else (numbers[0], numbers[1] + 1)


def entries():
    return Registry(plugins=False).catalog.op("moe.topk").by_name


@pytest.mark.parametrize("model, family, packed", [
    ("deepseek-v3", "triton_biased_grouped", 2),
    ("minimax-m2", "triton_biased_single_group", 2),
    ("deepseek-v4", "triton_biased_single_group", 2),
    ("kimi-k3", "triton_biased_single_group", 1),
    ("nemotron-3-super-120b-a12b", "triton_biased_single_group", 1),
    ("mixtral-8x7b", "triton_few_experts", 1),
    ("llama-4-scout", "triton_unbiased", 2),
    ("qwen3-30b-a3b", "triton_unbiased", 2),
    ("qwen3-next-80b-a3b", "triton_unbiased", 2),
    ("deepseek-v2", "triton_unbiased", 2)])
def test_plan_gives_each_model_its_kernels_on_a_gpu(run, model, family, packed):
    """All of one family, in ranges of num_tokens that follow each other; more rows a warp the more tokens there are."""
    output = run("plan", model, "--platform", "sm_90", "--platform", "gfx950").output
    rows = planned(output)
    assert [*rows] == ["sm_90", "gfx950"]
    assert not any("no fast kernel" in why for found in rows.values() for _, _, why in found)
    for found in rows.values():
        names = [name for name, _, _ in found]
        assert {entries()[name].variant_of or name for name in names} == {family} and len(set(names)) == len(names)
        counts = [entries()[name].options.get("rows_per_program", 1) for name in names]
        assert counts == sorted(counts) and counts[-1] >= packed
        if len(found) > 1:
            spans = [span(when) for _, when, _ in found]
            assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1][1] is None
        else:
            assert found[0][1] == ""
        assert found[0][2] and not any(why for _, _, why in found[1:])  # told once


@pytest.mark.parametrize("model, platform, nearest, lacks", [
    ("ernie-4.5-21b-a3b", "sm_90", "triton_biased_single_group", "scoring is softmax, serves sigmoid"),
    ("llama-4-scout", "cpu", "triton_unbiased", "platform is cpu, serves cuda"),
    ("deepseek-v3", "cpu", "triton_biased_grouped", "platform is cpu, serves cuda")])
def test_plan_says_why_only_the_reference_serves_a_model(run, model, platform, nearest, lacks):
    (kernel, when, why), = [*planned(run("plan", model, "--platform", platform).output).values()][0]
    assert (kernel, when) == ("torch", "") and lacks in why
    assert why.startswith(f"no fast kernel: nearest is {nearest}, ")


def test_plan_names_the_kernel_that_an_override_took_away(run, tmp_path):
    """The whole family, by the name of the implementation; or one variant, whose calls then go to the next."""
    path = tmp_path / "o.yaml"
    path.write_text("version: 1\noverrides: [{op: moe.topk, disable: triton_biased_grouped, reason: incident 7}]\n")
    (kernel, when, why), = planned(run("plan", "deepseek-v3", "--platform", "sm_90", "--overrides",
                                       path).output)["sm_90"]
    assert (kernel, when) == ("torch", "") and why.endswith("(incident 7)")
    assert "nearest is triton_biased_grouped, refused because disable triton_biased_grouped" in why
    before = [name for name, _, _ in planned(run("plan", "deepseek-v3", "--platform", "sm_90").output)["sm_90"]]
    path.write_text(path.read_text().replace("triton_biased_grouped", before[-1]))
    after = planned(run("plan", "deepseek-v3", "--platform", "sm_90", "--overrides", path).output)["sm_90"]
    assert len(before) > 1 and [name for name, _, _ in after] == before[:-1] and span(after[-1][1])[1] is None


def test_run_in_the_interpreter_executes_the_triton_kernel():
    pytest.importorskip("triton")
    result = typed("run", "deepseek-v3", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 triton_biased_grouped passed" in words(result.stdout) and "num_experts=256" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("model, ops", [
    ("ling-mini-2.0", ["moe.topk"]), ("glm-4.5-air", ["moe.topk"]),
    ("qwen3-30b-a3b", [])])  # one with its whole layer, whose experts take the interpreter minutes in the others
def test_run_with_many_tokens_executes_the_kernel_that_serves_many(run, model, ops):
    """The first number of tokens of each range up to 4096 that `plan` tells."""
    pytest.importorskip("triton")
    (rows,) = planned(run("plan", model, "--platform", "interpreter").output).values()
    kernels = {span(when)[0] or 3: name for name, when, _ in rows if span(when)[0] <= 4096}
    assert len(kernels) > 2
    result = interpreted("run", model, *(word for tokens in kernels for word in ("--tokens", str(tokens))),
                         *(word for op in ops for word in ("--op", op)))
    assert result.returncode == 0, result.stderr
    assert (" layer " in result.stdout) == (not ops)
    for tokens, kernel in kernels.items():
        assert f"moe.topk {tokens} {kernel} passed" in words(result.stdout)
        assert re.search(rf" {tokens} {re.escape(kernel)} passed \d+ of {tokens} ", words(result.stdout))


def test_run_of_one_op(run):
    pytest.importorskip("torch")
    result = run("run", "deepseek-v3", "--op", "moe.finalize", "--tokens", "2")
    assert result.exit_code == 0, result.output
    rows = [line.split()[:2] for line in result.output.splitlines() if " passed " in line]
    assert rows == [["moe.finalize", "2"]] and "moe.topk in" not in result.output
    assert "uses none of the named ops" in run("run", "deepseek-v3", "--op", "indexer.wk_weights_proj").output
    result = run("run", "deepseek-v3", "--op", "moe.finalise")
    assert result.exit_code == 2 and "did you mean 'moe.finalize'" in result.output


def test_run_says_why_only_the_reference_serves():
    pytest.importorskip("torch")
    result = typed("run", "ernie-4.5-21b-a3b", "--interpret", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    assert "moe.topk 3 torch passed" in words(result.stdout)
    assert "scoring is softmax, serves sigmoid" in result.stdout


def test_verify_passes_every_shipped_router(tmp_path):
    """Those that serve many tokens only run at a few points in the interpreter, and it says so; whatever else it leaves
    out is a failure. Each variant is compared bit for bit with the implementation whose variant it is."""
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    result = interpreted("verify", "--op", "moe.topk", "--budget", "15", "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed, " in result.stdout
    found = [words(line).split() for line in result.stdout.splitlines() if line.startswith(" moe.topk")]
    rows = {row[1]: row for row in found}
    known = entries()
    assert {*rows} == {*known} and all(row[2] == "passed" for row in rows.values())
    many = {name for name, entry in known.items() if "num_tokens" in entry.box.sets}
    assert many <= {name for name, entry in known.items() if entry.variant_of}
    for line in result.stdout.splitlines():
        if line.startswith("not run: "):
            name, why = line.removeprefix("not run: ").split(": ", 1)
            assert name in many and "too many for the interpreter" in why
    told = json.loads(report.read_text())["rows"]
    ran = {kind: {row["implementation"] for row in told if row["outcome"] == "passed" and row["where"] == kind}
           for kind in ("model", "edge", "inside", "outside")}
    assert ran["edge"] == ran["outside"] | {"torch"} == {*known}
    assert {name for name, entry in known.items() if not entry.variant_of} <= ran["model"] & ran["inside"]
    compared = {(row["implementation"], row["point"].partition(":")[0].removeprefix("bit for bit with "))
                for row in told if row["where"] == "numerics" and row["outcome"] == "passed"}
    assert {frozenset((name, entry.variant_of)) for name, entry in known.items() if entry.variant_of} <= {
        frozenset(pair) for pair in compared}
