"""list, explain, plan, diff, lint and schema: the questions that run nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def words(text):
    return " ".join(text.split())


# ---- list ------------------------------------------------------------------------------------------------------------

def test_list_shows_every_implementation_in_order_and_the_traits_of_an_op(run, op):
    every = run("list", "--registry", op.file)
    assert every.exit_code == 0
    assert every.output.index("quick") < every.output.index("torch (fallback)")
    assert "the quick one" in every.output and "registry.yaml:6" in every.output
    one = words(run("list", "fake.double", "--registry", op.file).output)
    assert "size int performance (required)" in one and "mode plain|fancy semantic plain" in one
    assert "per_group int performance (derived) = size // groups" in one


def test_list_shows_the_options_of_those_that_have_any(run, op):
    plain = run("list", "fake.double", "--registry", op.file).output
    op.file.write_text(op.file.read_text().replace("summary: the quick one", "summary: the quick one, "
                                                   "options: {rows: 2, early: true, launch: late}"))
    told = run("list", "fake.double", "--registry", op.file).output
    assert "the quick one (rows=2, early=true, launch=late)" in words(told)
    rest = told.replace(" (rows=2, early=true, launch=late)", "")
    assert words(rest.replace("─", "")) == words(plain.replace("─", ""))


# ---- explain ---------------------------------------------------------------------------------------------------------

def test_explain_says_who_and_why(run, op):
    result = run("explain", "fake.double", "size=100", "--registry", op.file)
    assert result.exit_code == 0
    assert "-> torch" in result.output and "size is 100, serves <= 64" in words(result.output)
    assert str(op.folder) not in run_in(op.folder, run, "explain", "fake.double", "size=100", "--registry", op.file)


def run_in(folder, run, *arguments):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return run(*arguments).output
    finally:
        os.chdir(before)


def test_explain_takes_a_platform_a_model_and_an_implementation(run, op):
    common = ("fake.double", "--registry", op.file)
    assert "-> torch" in run("explain", *common, "size=8", "platform=gfx942").output
    assert "-> quick" in run("explain", *common, "size=8", "platform=sm_90").output
    assert "size=16" in run("explain", *common, "--config", op.config).output
    assert "size=100" in run("explain", *common, "--config", op.config, "size=100").output
    assert "-> torch" in run("explain", *common, "size=8", "--implementation", "torch").output
    refused = run("explain", *common, "size=100", "--implementation", "quick")
    assert refused.exit_code == 1 and "-> nothing" in refused.output


def test_explain_json(run, op):
    data = json.loads(run("explain", "fake.double", "size=100", "mode=fancy", "--json", "--registry", op.file).output)
    assert data["winner"] == "torch" and data["traits"]["size"] == 100 and data["traits"]["mode"] == "fancy"


def test_explain_of_a_model_with_several_calls_tells_each(run, op):
    contract = op.folder / op.package / "contract.py"
    contract.write_text(contract.read_text().replace(', notes=("a fake",))]', '), Workload("2", {"size": 99}, {})]'))
    arguments = ("explain", "fake.double", "--config", op.config, "--registry", op.file)
    assert [d["winner"] for d in json.loads(run(*arguments, "--json").output)] == ["quick", "torch"]
    assert run(*arguments).output.count("fake.double(") == 2


def test_overrides_apply_and_the_later_file_is_stronger(run, op, tmp_path):
    files = []
    for name, use in (("a", "torch"), ("b", "quick")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"version: 1\noverrides:\n  - {{op: fake.double, use: {use}, reason: incident {name}}}\n")
        files.append(path)
    base = ("explain", "fake.double", "size=8", "--registry", op.file)
    assert "-> torch" in run(*base, "--overrides", files[0]).output
    both = run(*base, "--overrides", files[0], "--overrides", files[1]).output
    assert "-> quick" in both and "incident b" in both


@pytest.mark.parametrize("arguments, said", [
    (("fake.dooble", "size=1"), "did you mean 'fake.double'"),
    (("fake.double", "sise=1"), "did you mean 'size'"),
    (("fake.double", "size=many"), "expected a whole number >= 1, got 'many'"),
    (("fake.double", "size=0"), "expected a whole number >= 1"),
    (("fake.double", "groups=2"), "missing size"),
    (("fake.double", "size=3", "groups=2"), "size % groups == 0 does not hold"),
    (("fake.double", "size=3", "mode=fanci"), "did you mean 'fancy'"),
    (("fake.double", "size=3", "platform=sm90"), "did you mean 'sm_90'"),
    (("fake.double", "size=3", "--implementation", "quik"), "did you mean 'quick'"),
    (("fake.double", "size=3", "--overrides", "missing.yaml"), "can't be read"),
    (("fake.double", "size"), "expected TRAIT=VALUE, got 'size'"),
    (("fake.double", "size=1", "size=2"), "size is given twice"),
    (("fake.double", "--config", "no-such-model"), "no-such-model"),
])
def test_a_wrong_question_is_one_message_on_stderr_and_exit_code_2(run, op, arguments, said):
    result = run("explain", *arguments, "--registry", op.file)
    assert result.exit_code == 2
    assert said in result.stderr and result.stdout == ""


def test_an_unknown_command_is_told_with_a_suggestion(run):
    result = run("explian")
    assert result.exit_code == 2 and "did you mean 'explain'" in result.stderr


# ---- plan and diff ---------------------------------------------------------------------------------------------------

def test_plan_says_what_serves_and_when_nothing_fast_does(run, op):
    flags = ("--platform", "sm_90", "--platform", "gfx942", "--platform", "host")
    result = run("plan", op.config, "--registry", op.file, *flags)
    lines = {line.split()[2]: words(line) for line in result.output.splitlines() if line.startswith(" fake.double")}
    assert result.exit_code == 0 and "note: a fake" in result.output
    assert "size=16, factor=2.0" in result.output and "in 3 layers" in result.output
    assert "3 sm_90 quick" in lines["sm_90"] and "size=16 (serves <= 64)" in lines["sm_90"]
    assert "torch no fast kernel: nearest is quick, refused because platform is gfx942" in lines["gfx942"]
    assert "cpu (host) quick" in lines["cpu"]


def test_plan_of_several_models_shows_the_good_ones_and_fails_for_the_bad_one(run, op, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    result = run("plan", bad, op.config, "--registry", op.file)
    assert result.exit_code == 2 and "bad.json" in result.stderr and "quick" in result.stdout


def test_plan_of_a_model_that_uses_no_registered_op(run, op, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "uses none of the registered ops" in run("plan", other, "--registry", op.file).output


def test_plan_tells_choices_that_depend_on_the_number_of_tokens(run, op):
    op.registry("""
      few: target: PACKAGE.kernels:double, when: {platform: any, num_tokens: {max: 64}}
      many: target: PACKAGE.kernels:reference, when: {platform: any, num_tokens: {min: 65}}
    """)
    first, second = run("plan", op.config, "--registry", op.file).output.splitlines()[-2:]
    assert words(first).startswith("fake.double 3 cpu (host) few num_tokens < 65 ")
    assert words(second) == "many num_tokens >= 65"  # what it shares with the line above is not repeated


def test_plan_tells_each_reason_where_they_differ(run, op, tmp_path):
    path = tmp_path / "o.yaml"
    path.write_text("version: 1\noverrides: [{op: fake.double, use: torch, when: {num_tokens: {max: 8}}}]\n")
    output = run("plan", op.config, "--registry", op.file, "--overrides", path).output
    first, second = (words(line) for line in output.splitlines()[-2:])
    assert "torch num_tokens < 9 override: use torch" in first
    assert second.startswith("quick num_tokens >= 9 size=16 (serves <= 64)")


def test_a_plan_says_what_an_override_decided(run, op, tmp_path):
    path = tmp_path / "o.yaml"
    path.write_text("version: 1\noverrides: [{op: fake.double, use: torch, reason: incident 7}]\n")
    assert "override: use torch" in words(run("plan", op.config, "--registry", op.file, "--overrides", path).output)


def test_a_written_plan_is_the_one_that_freeze_gives(run, op, tmp_path):
    from kernel_registry import Registry
    from kernel_registry.plan import Plan

    path = tmp_path / "plan.json"
    result = run("plan", op.config, "--registry", op.file, "--json", path)
    assert result.exit_code == 0
    registry = Registry(op.file, plugins=False, platform="cpu")
    registry.bind("fake.double", size=16)
    assert Plan.load(path).fingerprint == registry.freeze().fingerprint
    assert Plan.load(path).fingerprint[:16] in result.stderr
    assert run("plan", op.config, op.config, "--registry", op.file, "--json", path).exit_code == 2


def test_diff_tells_what_changed(run, op, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run("plan", op.config, "--registry", op.file, "--json", a)
    run("plan", op.config, "--registry", op.file, "--json", b, "--platform", "gfx942")
    same, other = run("diff", a, a), run("diff", a, b)
    assert same.exit_code == 0 and "the same plan" in same.output
    assert other.exit_code == 1 and "device: cpu -> gfx942" in other.output and "torch" in other.output
    assert run("diff", a, tmp_path / "none.json").exit_code == 2
    assert run("diff", a, op.config).exit_code == 2


# ---- lint and schema -------------------------------------------------------------------------------------------------

def test_lint_exits_1_on_an_error_and_on_a_warning_only_when_strict(run, op):
    assert run("lint", op.file).exit_code == 0
    assert "0 errors, 0 warnings" in run("lint", "--registry", op.file).output
    file = op.registry("lost: target: PACKAGE.missing:f, when: {platform: any, groups: any, mode: any}")
    warned = run("lint", file)
    assert warned.exit_code == 0 and "warning: lost" in warned.output and run("lint", file, "--strict").exit_code == 1
    tied = op.registry("a: target: PACKAGE.kernels:double, when: {platform: any}\n"
                       "b: target: PACKAGE.kernels:double, when: {platform: any}")
    for arguments in ((tied,), ("--registry", tied)):
        result = run("lint", *arguments)
        assert result.exit_code == 1 and "error" in result.output and "registry.yaml:7" in result.output
    assert run("lint", tied, "--registry", tied).exit_code == 2


def test_schema_is_json_schema(run):
    registry, overrides = (json.loads(run("schema", *flags).output) for flags in ((), ("--overrides",)))
    assert "ops" in registry["required"] and "overrides" in overrides["properties"]
    assert registry["$schema"].startswith("https://json-schema.org/")


# ---- how it prints, and what it loads --------------------------------------------------------------------------------

def test_nothing_is_cut_or_coloured_outside_a_terminal(op):
    result = subprocess.run(
        [sys.executable, "-m", "kernel_registry.cli", "plan", op.config, "--registry", op.file, "--platform", "gfx942"],
        capture_output=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(op.folder), "COLUMNS": "40", "TERM": "xterm"})
    text = result.stdout.decode()
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in text
    assert "no fast kernel: nearest is quick, refused because platform is gfx942, serves cuda>=sm_80|cpu" in text


@pytest.mark.parametrize("arguments, absent", [
    (["explain", "moe.topk", "num_experts=256", "num_expert_group=8", "topk_group=4", "topk=8", "platform=sm_90"],
     {"torch", "triton", "rich"}),
    (["schema"], {"torch", "triton", "rich"}),
    (["plan", "deepseek-v3", "--platform", "sm_90"], {"torch", "triton"}),
    (["lint"], {"torch", "triton", "rich"}),
    (["list"], {"torch", "triton"}),
])
def test_questions_load_neither_torch_nor_triton(arguments, absent):
    code = ("import sys\nfrom kernel_registry.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            f"loaded = {absent!r} & set(sys.modules)\nassert not loaded, loaded\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["list", "explain", "plan", "diff", "run", "lint", "verify", "bench", "schema"])
def test_every_command_helps_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output and f"kernel-registry {command}" in result.output
