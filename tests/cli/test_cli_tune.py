"""tune, and --tiles of the other commands."""

import json

import pytest
import yaml

from tests.fake_op import Clock

KERNEL = '''
import sys


def tiled(*, tiles, **_):
    def kernel(rows, factor=2.0):
        tile = tiles(len(rows))
        if tile["fail"]:
            raise RuntimeError("out of shared memory")
        sys.modules.get("fake_clock", time).sleep(tile["wait"] / 1e6)  # other processes have their own
        return [[x * factor + tile["off"] for x in row] for row in rows]
    return kernel
'''
TILES = '''
def tile(wait, off=0, fail=False):
    return {"wait": wait, "off": off, "fail": fail}


def default(traits, num_tokens):
    return tile(900)


def candidates(traits, num_tokens):
    return [tile(0)]
'''
ENTRIES = """
tiled: target: PACKAGE.kernels:tiled, tiles: PACKAGE.tiles, when: {platform: [cpu], size: {max: 64}}
torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any, groups: any, mode: any}
"""


@pytest.fixture
def tuned(op, run, monkeypatch):
    """The command in the op's folder: tuned(arguments) runs `tune fake.double ...`."""
    Clock(monkeypatch)
    op.write("tiles", TILES)
    op.extend("kernels", KERNEL)
    op.file = op.registry(ENTRIES)
    monkeypatch.chdir(op.folder)

    def invoke(*arguments, tokens=(2,)):
        counts = [word for n in tokens for word in ("--tokens", n)]
        return run("tune", "fake.double", *arguments, *counts, "--registry", op.file, "--seconds", "0.01")
    return invoke


def words(text):
    return " ".join(text.split())


def propose(op, tiles):
    op.extend("tiles", f"\n\ndef candidates(traits, num_tokens):\n    return [{tiles}]\n")


def test_tune_writes_what_explain_then_tells(tuned, run, op):
    result = tuned("size=4", "--output", "mine.yaml", tokens=(2, 4))
    assert result.exit_code == 0, result.output
    assert "on cpu" in result.output and "fake.double size=4\n" in result.output
    rows = [words(line) for line in result.stdout.splitlines() if line.startswith(" tiled")]
    assert [r.split()[:3] for r in rows] == [["tiled", "2", "written"], ["tiled", "4", "written"]]
    assert all(r.endswith("perf_counter wait=0 off=0 fail=False") for r in rows)
    assert "used with --tiles mine.yaml, KERNEL_REGISTRY_TILES=mine.yaml or registry.load_tiles('mine.yaml')" \
        in result.stdout
    told = run("explain", "fake.double", "size=4", "--registry", op.file, "--tiles", "mine.yaml").output
    assert "     tiles: tuned on cpu for 2, 4 tokens (mine.yaml:4)" in told
    again = tuned("size=4", "--output", "mine.yaml", tokens=(2, 4))
    assert again.stdout.count("already there") == 2 and "used with" not in again.stdout and again.exit_code == 0
    assert "written" in tuned("size=4", "--output", "mine.yaml", "--again").stdout


def test_the_file_beside_the_registry_needs_no_option(tuned, run, op):
    assert "used with" not in tuned("size=4").stdout and (op.folder / "tiles.yaml").is_file()
    assert "tuned on cpu for 2 tokens (tiles.yaml:4)" in run("explain", "fake.double", "size=4", "--registry",
                                                             op.file).output


def test_the_environment_names_a_file(tuned, run, op, monkeypatch):
    tuned("size=4", "--output", "mine.yaml")
    monkeypatch.setenv("KERNEL_REGISTRY_TILES", "mine.yaml")
    assert "tuned on cpu for 2 tokens (mine.yaml:4)" in run("explain", "fake.double", "size=4", "--registry",
                                                            op.file).output
    monkeypatch.setenv("KERNEL_REGISTRY_TILES", "gone.yaml")
    result = run("explain", "fake.double", "size=4", "--registry", op.file)
    assert result.exit_code == 2 and "gone.yaml: can't be read" in result.stderr


def test_tune_takes_a_model_or_workloads(tuned, op):
    assert "fake.double size=16\n" in tuned("--config", op.config, "--output", "a.yaml").stdout
    assert "fake.double size=32\n" in tuned("--config", op.config, "size=32", "--output", "b.yaml").stdout
    two = tuned("--workload", "tiny", "--workload", "grouped", "--output", "c.yaml")
    assert "size=4\n" in two.stdout and "size=16 groups=4\n" in two.stdout
    assert "not served" in two.stdout and "groups is 4, serves 1" in two.stdout and two.exit_code == 0
    assert [row["traits"] for row in yaml.safe_load((op.folder / "c.yaml").read_text())["tiles"]] == [{"size": 4}]


def test_a_wrong_tile_is_told_and_fails(tuned, op):
    propose(op, "tile(0, off=1), tile(1)")
    result = tuned("size=4")
    assert result.exit_code == 1
    assert "WRONG: tiled, 2 tokens, wait=0 off=1 fail=False: off by 1 (2 tokens, random inputs)" in result.stderr
    assert "off: 1" not in (op.folder / "tiles.yaml").read_text() and "wait: 1," in (
        op.folder / "tiles.yaml").read_text()


def test_what_does_not_launch_is_counted_and_told_when_asked(tuned, op):
    propose(op, "tile(0, fail=True), tile(1)")
    result = tuned("size=4")
    row, = [words(line).split() for line in result.stdout.splitlines() if line.startswith(" tiled")]
    assert row[5:7] == ["3", "1"] and "shared memory" not in result.output and result.exit_code == 0
    told = tuned("size=4", "--again", "--verbose").stderr
    assert "failed: tiled, 2 tokens, wait=0 off=0 fail=True: RuntimeError: out of shared memory" in told


def test_where_nothing_works_it_fails(tuned, op):
    op.extend("tiles", "\n\ndef default(traits, num_tokens):\n    return tile(0, fail=True)\n")
    propose(op, "")
    result = tuned("size=4")
    assert result.exit_code == 1 and "nothing works" in result.stdout and not (op.folder / "tiles.yaml").exists()


def test_candidates_are_shown_on_a_terminal_only(tuned, monkeypatch):
    assert tuned("size=4").stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = tuned("size=4", "--again").stderr
    lines = [line for line in shown.splitlines() if "tiled, 2 tokens" in line and " us " in line]
    assert len(lines) >= 2 and any("wait=900" in line for line in lines) and any("wait=0" in line for line in lines)


@pytest.mark.parametrize("arguments, said", [
    (("size=4", "--implementation", "torch"), "torch takes no tiles"),
    (("size=4", "--implementation", "tild"), "did you mean 'tiled'"),
    (("sise=4",), "did you mean 'size'"),
    ((), "missing size"),
    (("size=4", "platform=cpu"), "platform is not given to tune"),
    (("size=4", "num_tokens=3"), "num_tokens is not given to tune"),
    (("--workload", "tinny"), "did you mean 'tiny'"),
    (("--workload", "tiny", "--config", "x"), "give --config or --workload, not both"),
    (("size=4", "--output", "gone/tiles.yaml"), "there is no such folder"),
    (("size=4", "--tiles", "gone.yaml"), "gone.yaml: can't be read"),
    (("size=4", "--tokens", "0"), "0 is not in the range"),
])
def test_a_wrong_question_is_one_message_and_exit_code_2(tuned, arguments, said):
    result = tuned(*arguments)
    assert result.exit_code == 2 and said in result.stderr


def test_lint_reads_the_tiles_too(tuned, run, op):
    (op.folder / "tiles.yaml").write_text("version: 1\ntiles:\n- device: x\n")
    result = run("lint", "--registry", op.file)
    assert result.exit_code == 1 and "tiles.yaml:3: error: tiles.0.op is missing" in result.output
    both = run("lint", op.file, "--tiles", "tiles.yaml")
    assert both.exit_code == 2 and "FILE is checked on its own" in both.stderr


def test_schema_of_a_tiles_file(run):
    schema = json.loads(run("schema", "--tiles").output)
    assert set(schema["properties"]) == {"version", "tiles"} and "TilesEntry" in schema["$defs"]
    assert "overrides" in json.loads(run("schema", "--overrides").output)["properties"]
    assert "ops" in json.loads(run("schema").output)["properties"]


def test_a_plan_for_a_model_records_what_is_tuned(tuned, run, op):
    before = run("plan", op.config, "--registry", op.file, "--json", "a.json")
    assert before.exit_code == 0, before.output
    tuned("size=16")
    run("plan", op.config, "--registry", op.file, "--json", "b.json")
    difference = run("diff", "a.json", "b.json")
    assert difference.exit_code == 1 and "tiles of tiled: for 2 tokens: not tuned -> " in difference.output
    call, = json.loads((op.folder / "b.json").read_text())["calls"]
    assert call["tiles"]["tiled"]["device"] == "cpu"
