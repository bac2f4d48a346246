"""verify, bench and run: the commands that execute kernels."""

import json

import pytest


def words(text):
    return " ".join(text.split())


@pytest.fixture
def wrong(op):
    """The registry file with a kernel that is wrong above 64 and declares 65."""
    return op.registry("""
      wide: target: PACKAGE.kernels:wrong_above_64, when: {platform: any, size: {max: 65}}
      gpu: target: PACKAGE.kernels:double, rank: 1, when: {platform: sm_90}
      torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any, groups: any, mode: any}
    """)


def test_verify_passes_and_says_what_it_did(run, op):
    result = run("verify", "--registry", op.file, "--budget", "9", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "on cpu, 9 points per implementation, seed 3" in result.output
    assert "fake.double quick passed" in words(result.output) and "0 failed, 0 not run" in result.output


def test_verify_fails_for_a_wrong_declaration_and_reports_what_did_not_run(run, wrong):
    result = run("verify", "--registry", wrong)
    assert result.exit_code == 1
    assert "FAILED wide, edge: size 65" in result.output and "off by 1" in result.output
    assert "not run: gpu: serves sm_90, this machine is cpu" in result.output
    assert "fake.double gpu not run" in words(result.output)
    assert run("verify", "--registry", wrong, "--implementation", "torch", "--budget", "9").exit_code == 0


def test_verify_of_nothing_that_runs_is_no_success(run, wrong):
    result = run("verify", "--registry", wrong, "--implementation", "gpu")
    assert result.exit_code == 1 and "nothing was verified on this machine" in result.output


def test_verify_never_passes_what_only_refused(run, op, monkeypatch):
    for name in ("_TOKENS_CAP", "_TOKENS_MOST"):
        monkeypatch.setattr(f"kernel_registry.verify.{name}", {"cpu": 100}, raising=False)
    file = op.registry("huge: target: PACKAGE.kernels:wrong, when: {platform: any, num_tokens: {min: 2000}}\n"
                       "torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any}")
    result = run("verify", "--registry", file, "--budget", "9")
    assert result.exit_code == 0 and "fake.double huge not run" in words(result.output)
    assert "not run: huge: 2000 tokens are too many for the cpu" in result.output
    alone = run("verify", "--registry", file, "--budget", "9", "--implementation", "huge")
    assert alone.exit_code == 1 and "nothing was verified on this machine" in alone.output


def test_verify_writes_json(run, op, tmp_path):
    path = tmp_path / "report.json"
    run("verify", "--registry", op.file, "--budget", "6", "--json", path)
    data = json.loads(path.read_text())
    assert data["ok"] and {r["implementation"] for r in data["rows"]} == {"quick", "torch"}
    printed = json.loads(run("verify", "--registry", op.file, "--budget", "6", "--json", "-").stdout)
    assert printed["rows"] == data["rows"]


def test_verify_of_an_unknown_name(run, op):
    assert run("verify", "--registry", op.file, "--op", "fake.dooble").exit_code == 2
    result = run("verify", "--registry", op.file, "--implementation", "quik")
    assert result.exit_code == 2 and "did you mean 'quick'" in result.stderr


def test_bench_shows_ratio_choice_and_regret(run, op):
    result = run("bench", "--registry", op.file, "--workload", "tiny", "--tokens", "2", "--seconds", "0.01")
    assert result.exit_code == 0
    quick, = [words(line).split() for line in result.output.splitlines() if " quick " in line]
    assert quick[:4] == ["fake.double", "tiny", "2", "quick"] and "yes" in quick and "perf_counter" in quick
    data = json.loads(run("bench", "--registry", op.file, "--workload", "tiny", "--tokens", "2", "--seconds", "0.01",
                          "--json", "-").stdout)
    assert {r["implementation"] for r in data["rows"]} == {"quick", "torch"}


@pytest.mark.parametrize("wrong, said", [(("--workload", "tinny"), "did you mean 'tiny'"),
                                         (("--implementation", "quik"), "did you mean 'quick'"),
                                         (("--op", "fake.dooble"), "did you mean 'fake.double'")])
def test_bench_of_an_unknown_name_is_refused(run, op, wrong, said):
    result = run("bench", "--registry", op.file, *wrong)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""


def test_run_executes_and_checks(run, op):
    result = run("run", op.config, "--registry", op.file, "--tokens", "2", "--tokens", "5")
    assert result.exit_code == 0
    rows = [words(line) for line in result.output.splitlines() if line.startswith(" fake.double")]
    assert [r.split()[:4] for r in rows] == [["fake.double", tokens, "quick", "passed"] for tokens in ("2", "5")]
    assert "0.0e+00 0 of 2 the registry's order" in rows[0]


def test_run_takes_the_default_token_counts(run, op):
    rows = [line.split()[1] for line in run("run", op.config, "--registry", op.file).output.splitlines()
            if line.startswith(" fake.double")]
    assert rows == ["1", "16", "256"]


def test_run_takes_the_first_count_of_each_range_and_tells_what_takes_long(run, op):
    op.registry("""
      few: target: PACKAGE.kernels:double, when: {platform: any, num_tokens: {max: 63}}
      some: target: PACKAGE.kernels:double, when: {platform: any, num_tokens: {min: 64, max: 50000}}
      many: target: PACKAGE.kernels:double, when: {platform: any, num_tokens: {min: 50001}}
    """)
    result = run("run", op.config, "--registry", op.file)
    rows = [words(line).split()[1:4] for line in result.output.splitlines() if line.startswith(" fake.double")]
    assert rows == [["1", "few", "passed"], ["16", "few", "passed"], ["64", "some", "passed"],
                    ["256", "some", "passed"], ["50001", "many", "not"]]
    assert result.exit_code == 0
    assert "not run: fake.double with 50001 tokens (many): takes long on the cpu; ask for it with --tokens 50001" \
        in result.output
    asked = run("run", op.config, "--registry", op.file, "--tokens", "50001")
    assert "fake.double 50001 many passed" in words(asked.output) and "not run" not in asked.output


def test_run_with_a_wrong_result_fails(run, op):
    file = op.registry("bad: target: PACKAGE.kernels:wrong, when: {platform: any}")
    result = run("run", op.config, "--registry", file)
    assert result.exit_code == 1 and "failed" in result.stdout and "off by 0.001" in result.stderr


def test_run_passes_the_model_s_arguments(run, op):
    op.write("contract", (op.folder / op.package / "contract.py").read_text().replace('"factor": 2.0', '"factor": 3.0'))
    op.extend("kernels", "\n\ndef fixed(**_):\n"
                         "    return lambda rows, factor=2.0: [[x * 3.0 for x in row] for row in rows]\n")
    file = op.registry("fixed: target: PACKAGE.kernels:fixed, when: {platform: any}")
    assert run("run", op.config, "--registry", file).exit_code == 0


def test_run_of_a_kernel_that_raises_is_a_failed_row(run, op):
    op.config.write_text(json.dumps({"fake_size": 100}))
    file = op.registry("r: target: PACKAGE.kernels:raises_above_64, when: {platform: any}")
    result = run("run", op.config, "--registry", file)
    assert result.exit_code == 1 and "shared memory exhausted" in result.stderr


def test_run_of_a_missing_config_or_of_no_registered_op(run, op, tmp_path):
    assert run("run", tmp_path / "none.json", "--registry", op.file).exit_code == 2
    op.config.write_text("{}")
    assert "uses none of the registered ops" in run("run", op.config, "--registry", op.file).output


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_interpret_is_set_before_the_platform_is_asked(run, monkeypatch, command):
    import os

    monkeypatch.setenv("TRITON_INTERPRET", "")
    seen = []
    monkeypatch.setattr("kernel_registry.cli.common.Registry",
                        lambda path: seen.append(os.environ["TRITON_INTERPRET"]) or 1 / 0)
    with pytest.raises(AssertionError):  # the runner's own check: the division stops the command here
        run(command, "--interpret")
    assert seen == ["1"]


def test_without_torch_run_says_what_to_install(run, op):
    op.write("cases", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    result = run("run", op.config, "--registry", op.file)
    assert result.exit_code == 2 and "pip install 'kernel-registry[kernels]'" in result.stderr
    op.write("cases", "import there_is_no_such_module\n")
    op.forget()
    result = run("run", op.config, "--registry", op.file)
    assert result.exit_code == 2 and "there_is_no_such_module" in result.stderr and "pip install" not in result.stderr
