"""tune: candidates are timed, the fastest is judged, what is right is written, and a second run goes on from there."""

from __future__ import annotations

import sys
import time

import pytest
import yaml

from kernel_registry import Registry, bench
from kernel_registry.errors import DocumentError, RegistryError, TargetError, TraitError, UnknownNameError
from kernel_registry.tile_files import installed
from kernel_registry.tuning import NOT_SERVED, NOTHING, PRESENT, WRITTEN, Attempt, TuneRow, tune
from tests.fake_op import Clock, FakeOp

KERNEL = '''
import sys


def tiled(*, tiles, **_):
    def kernel(rows, factor=2.0):
        tile = tiles(len(rows))
        if tile["how"]["fail"]:
            raise RuntimeError("out of shared memory")
        sys.modules.get("fake_clock", time).sleep(tile["wait"] / 1e6)  # other processes have their own
        odd = tile["how"]["odd_is_wrong"] and len(rows) % 2
        return [[x * factor + tile["how"]["off"] * 1e-3 + odd for x in row] for row in rows]
    return kernel
'''
TILES = '''
TILE = {"wait": 900, "how": {"off": 0, "fail": False, "odd_is_wrong": False}}
ASKED = []


def default(traits, num_tokens):
    return TILE


def candidates(traits, num_tokens):
    ASKED.append((traits, num_tokens))
    return [TILE, tile(450), tile(0)]


def tile(wait, **how):
    return {"wait": wait, "how": {**TILE["how"], **how}}
'''
TILED = "tiled: target: PACKAGE.kernels:tiled, tiles: PACKAGE.tiles, when: {platform: any, size: {max: 64}}"
OTHER = "torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any, groups: any, mode: any}"


@pytest.fixture
def op(tmp_path, monkeypatch):
    Clock(monkeypatch)
    fake = FakeOp(tmp_path, monkeypatch)
    fake.write("tiles", TILES)
    fake.extend("kernels", KERNEL)
    fake.output = tmp_path / "found.yaml"
    yield fake
    fake.forget()


def open_registry(op, implementations=f"{TILED}\n{OTHER}", **options):
    return Registry(op.registry(implementations), plugins=False, environment=False, **{"platform": "cpu", **options})


def run(op, registry=None, traits={"size": 4}, **options):
    return tune(registry or open_registry(op), "fake.double", traits, output=op.output,
                **{"tokens": [2], "seconds": 0.01, **options})


def propose(op, *tiles):
    """Has the module propose `tiles`, as Python text, beside its default."""
    op.extend("tiles", f"\n\ndef candidates(traits, num_tokens):\n    return [{', '.join(tiles)}]\n")


def test_the_fastest_is_written_and_then_used(op):
    row, = run(op)
    assert (row.outcome, row.implementation, row.tokens, row.tried) == (WRITTEN, "tiled", 2, 3)
    assert row.tile["wait"] == 0 and row.microseconds < 450 and row.ratio < 0.5 and row.method == "perf_counter"
    data = yaml.safe_load(op.output.read_text())
    assert data == {"version": 1, "tiles": [{
        "device": "cpu", "op": "fake.double", "implementation": "tiled", "traits": {"size": 4},
        "versions": installed(), "num_tokens": {2: row.tile}}]}
    registry = open_registry(op)
    registry.load_tiles(op.output)
    kernel = registry.dispatch("fake.double", size=4)
    assert kernel.tiles["tiled"].tuned == {2: row.tile}


def test_the_default_is_among_the_candidates_and_no_candidate_is_tried_twice(op):
    propose(op, "tile(1800)", "tile(1800)")
    row, = run(op)
    assert row.tried == 2 and row.tile["wait"] == 900 and row.ratio == 1.0


def test_candidates_are_asked_for_canonical_traits_and_each_number_of_tokens(op):
    run(op, traits={"size": 4, "mode": "plain"}, tokens=[1, 3])
    (first, one), (_, three) = sys.modules[f"{op.package}.tiles"].ASKED
    assert (one, three) == (1, 3) and first["size"] == 4 and first["groups"] == 1 and first["per_group"] == 4
    assert str(first["platform"]) == "cpu"


def test_one_that_raises_is_counted_with_its_reason(op):
    propose(op, "tile(0, fail=True)", "tile(10)")
    seen = []
    row, = run(op, progress=seen.append)
    assert row.tile["wait"] == 10 and row.tried == 3
    assert [a.error for a in row.failed] == ["RuntimeError: out of shared memory"]
    assert [type(event) for event in seen] == [Attempt] * 3 + [TuneRow] and seen[-1] is row
    assert [(a.number, a.of) for a in seen[:-1]] == [(1, 3), (2, 3), (3, 3)]
    assert [a.microseconds is None for a in seen[:-1]] == [False, True, False]


def test_where_all_raise_nothing_is_written(op):
    op.extend("tiles", "\nTILE = tile(0, fail=True)\n")
    propose(op)
    row, = run(op)
    assert row.outcome == NOTHING and "out of shared memory" in row.detail and not op.output.exists()


def test_a_wrong_one_is_told_and_never_written(op):
    propose(op, "tile(0, off=1)", "tile(300)")
    row, = run(op)
    assert row.outcome == WRITTEN and row.tile["wait"] == 300
    (tile, reason), = row.wrong
    assert tile["how"]["off"] == 1 and reason == "off by 0.001 (2 tokens, random inputs)"
    assert "off: 1" not in op.output.read_text()


def test_one_that_is_wrong_only_at_the_next_number_of_tokens_is_refused(op):
    propose(op, "tile(0, odd_is_wrong=True)", "tile(300)")
    row, = run(op)
    assert row.tile["wait"] == 300 and row.wrong[0][1] == "off by 1 (3 tokens, random inputs)"
    few = TILED.replace("size: {max: 64}", "num_tokens: {max: 2}")
    row, = run(op, open_registry(op, f"{few}\n{OTHER}"), again=True)  # a call of three is never its own
    assert row.tile["how"]["odd_is_wrong"]


def test_every_flavour_is_judged(op):
    op.write("oracle", (op.folder / op.package / "oracle.py").read_text() + '''

honest = check


def check(traits, args, kwargs, outputs):
    verdict = honest(traits, args, kwargs, outputs)
    if not any(map(any, args[0])) and outputs and STRICT:
        verdict.passed, verdict.detail = False, "zeros"
    return verdict


STRICT = True
''')
    row, = run(op)
    assert row.outcome == NOTHING and row.wrong[0][1] == "zeros (2 tokens, zeros inputs)"


@pytest.mark.parametrize("change, said", [
    ("verdict.passed, verdict.detail = None, 'too hard'", "the oracle can't judge it: too hard (2 tokens, random"),
    ("verdict.rows, verdict.undecided = 100, 3", "3 of 100 rows are undecided: that proves too little (2 tokens"),
    ("raise ValueError('no such shape')", "ValueError: no such shape (2 tokens, random inputs)"),
])
def test_what_the_oracle_can_not_judge_is_not_written(op, change, said):
    op.extend("oracle", f"\n\nhonest = check\n\n\ndef check(*call):\n    verdict = honest(*call)\n    {change}\n"
                        "    return verdict\n")
    row, = run(op)
    assert row.outcome == NOTHING and row.detail.startswith(said) and not op.output.exists()


def test_where_the_kernel_is_wrong_with_every_tile_the_search_ends(op):
    propose(op, *(f"tile({n}, off=1)" for n in range(9)))
    op.extend("tiles", "\nTILE = tile(9, off=1)\n")
    row, = run(op)
    assert row.outcome == NOTHING and len(row.wrong) == 5


# ---- resuming --------------------------------------------------------------------------------------------------------

def asked(op):
    return [tokens for _, tokens in sys.modules[f"{op.package}.tiles"].ASKED]


def test_an_interrupted_run_goes_on_where_it_stopped(op):
    def stop(event):
        if isinstance(event, Attempt) and event.tokens == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(op, tokens=[2, 4, 8], progress=stop)
    assert list(yaml.safe_load(op.output.read_text())["tiles"][0]["num_tokens"]) == [2]
    rows = run(op, tokens=[2, 4, 8])
    assert [(r.tokens, r.outcome) for r in rows] == [(2, PRESENT), (4, WRITTEN), (8, WRITTEN)]
    assert rows[0].detail == f"{op.output}:10" and rows[0].tile["wait"] == 0
    assert asked(op) == [2, 4, 4, 8]
    assert list(yaml.safe_load(op.output.read_text())["tiles"][0]["num_tokens"]) == [2, 4, 8]


def test_again_times_anew_and_replaces_the_line(op):
    run(op, tokens=[2, 4])
    op.output.write_text(op.output.read_text().replace("wait: 0", "wait: 7") + "# the end\n")
    row, = run(op, tokens=[2], again=True)
    assert row.outcome == WRITTEN
    data = yaml.safe_load(op.output.read_text())
    assert {n: t["wait"] for n, t in data["tiles"][0]["num_tokens"].items()} == {2: 0, 4: 7}
    assert op.output.read_text().endswith("# the end\n")


@pytest.mark.parametrize("key, other", [("device", "NVIDIA H200"), ("implementation", "second"),
                                        ("traits", "{size: 4, groups: 2}"), ("versions", "{triton: 1.0.0}")])
def test_rows_for_something_else_are_left_alone(op, key, other):
    registry = open_registry(op, f"{TILED}, rank: 1\n{TILED.replace('tiled:', 'second:', 1)}\n{OTHER}")
    run(op, registry, implementations=["tiled"])
    lines = op.output.read_text().splitlines()
    at, = [n for n, line in enumerate(lines) if line.lstrip("- ").startswith(f"{key}:")]
    lines[at] = lines[at].partition(":")[0] + f": {other}"
    op.output.write_text("\n".join(lines) + "\n")
    row, = run(op, registry, implementations=["tiled"])
    assert row.outcome == WRITTEN
    text = op.output.read_text()
    assert text.startswith("\n".join(lines)) and len(yaml.safe_load(text)["tiles"]) == 2


# ---- what is refused -------------------------------------------------------------------------------------------------

def test_a_call_that_is_not_served_is_a_row(op):
    row, = run(op, traits={"size": 65})
    assert (row.outcome, row.detail) == (NOT_SERVED, "size is 65, serves <= 64") and not op.output.exists()


@pytest.mark.parametrize("traits, options, error, said", [
    ({"size": 4, "num_tokens": 2}, {}, TraitError, "num_tokens is not given to tune.*--tokens N"),
    ({"size": 4, "platform": "sm_90"}, {}, TraitError, "platform is not given to tune: it times on this machine"),
    ({"sise": 4}, {}, UnknownNameError, "did you mean 'size'"),
    ({}, {}, TraitError, "missing size"),
    ({"size": 4}, {"implementations": ["torch"]}, TargetError, "torch takes no tiles.*those that do: tiled"),
    ({"size": 4}, {"implementations": ["tild"]}, UnknownNameError, "did you mean 'tiled'"),
])
def test_a_wrong_question_is_refused(op, traits, options, error, said):
    with pytest.raises(error, match=f"(?s){said}"):
        run(op, traits=traits, **options)


def test_an_op_without_tiles_has_nothing_to_tune(op):
    with pytest.raises(TargetError, match="no implementation takes tiles"):
        run(op, open_registry(op, OTHER))


def test_another_platform_than_this_machine_s_can_not_be_timed(op, monkeypatch):
    with pytest.raises(TraitError, match="kernels for gfx950 can't be timed here"):
        run(op, open_registry(op, platform="gfx950"))


def test_a_file_that_is_refused_is_refused_before_anything_is_timed(op):
    op.output.write_text("version: 1\ntiles:\n- {device: x, op: gone, implementation: tiled, traits: {}, num_tokens: "
                         "{1: {a: 1}}}\n")
    seen = []
    with pytest.raises(UnknownNameError, match=f"{op.output}:3: no op 'gone'"):
        run(op, progress=seen.append)
    assert not seen
    op.output = op.folder / "gone" / "tiles.yaml"
    with pytest.raises(DocumentError, match="there is no such folder"):
        run(op, progress=seen.append)
    assert not seen


@pytest.mark.parametrize("tile, said", [
    ("{'wait': 1}", "how.off is missing"),
    ("{**tile(1), 'more': 2}", "more is not among its keys"),
    ("{**tile(1), 'wait': True}", "wait is a bool, expected a int"),
    ("{**tile(1), 'wait': 1.5}", "wait is neither a whole number"),
    ("{**tile(1), 3: 1}", "has a key that is not text: 3"),
    ("{}", "not a mapping of launch parameters"),
    ("None", "not a mapping of launch parameters"),
])
def test_a_candidate_that_could_not_be_written_or_used_is_an_error(op, tile, said):
    propose(op, tile)
    with pytest.raises(TargetError, match=said):
        run(op)


def test_a_module_without_candidates_is_told(op):
    op.write("tiles", TILES.replace("def candidates", "def candidats"))
    with pytest.raises(TargetError, match="has no 'candidates'"):
        run(op)


def test_on_a_cpu_sizes_are_reduced_and_the_row_is_for_those(op):
    op.extend("cases", "\n\ndef reduced(traits):\n    return {**traits, 'size': min(traits['size'], 8)}\n")
    row, = run(op, traits={"size": 60})
    assert row.outcome == WRITTEN and yaml.safe_load(op.output.read_text())["tiles"][0]["traits"] == {"size": 8}


def test_a_device_that_is_broken_ends_the_run_with_a_word_on_what_to_do(op, monkeypatch):
    propose(op, "tile(0, fail=True)")

    def settle(self, calls=[]):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr("kernel_registry.tuning._Tuner._settle", settle)
    with pytest.raises(RegistryError, match="(?s)tiled broke the device with .*'fail': True.*another run goes on"):
        run(op)


# ---- compiling first -------------------------------------------------------------------------------------------------

WITNESS = """

def tiled(*, tiles, **_):
    import os

    def kernel(rows, factor=2.0):
        with open(os.environ["WITNESS"], "a") as file:
            file.write(f"{os.getpid()} {len(rows)} {tiles(len(rows))['wait']}\\n")
        if tiles(len(rows))["how"]["fail"]:
            os._exit(1)
        return [[x * factor for x in row] for row in rows]
    return kernel
"""


def test_every_candidate_is_run_once_in_other_processes_first(op, monkeypatch):
    import os

    witness = op.folder / "witness"
    monkeypatch.setenv("WITNESS", str(witness))
    op.extend("kernels", WITNESS)
    rows = run(op, tokens=[2, 4], jobs=2)
    assert [r.outcome for r in rows] == [WRITTEN, WRITTEN]
    lines = [tuple(map(int, line.split())) for line in witness.read_text().splitlines()]
    others = [line for line in lines if line[0] != os.getpid()]
    assert lines[:6] == others
    assert sorted(line[1:] for line in others) == [(n, w) for n in (2, 4) for w in (0, 450, 900)]
    assert len({pid for pid, *_ in others}) == 2
    witness.unlink()
    run(op, tokens=[2, 4, 8], jobs=2)
    assert {n for pid, n, _ in (tuple(map(int, line.split())) for line in witness.read_text().splitlines())
            if pid != os.getpid()} == {8}  # what is written already is not compiled


def test_a_process_that_dies_costs_nothing(op, monkeypatch):
    monkeypatch.setenv("WITNESS", str(op.folder / "witness"))
    op.extend("kernels", WITNESS.replace("os._exit(1)", "os._exit(1) if factor_of_parent != os.getpid() else 1 / 0")
              .replace("    import os\n", "    import os\n    factor_of_parent = int(os.environ['PARENT'])\n", 1))
    import os

    monkeypatch.setenv("PARENT", str(os.getpid()))
    propose(op, "tile(0, fail=True)", "tile(1)")
    row, = run(op, jobs=3)
    assert row.outcome == WRITTEN and row.failed[0].error.startswith("ZeroDivisionError")


# ---- a kernel in Triton: on a GPU, else in its interpreter -----------------------------------------------------------

TRITON = '''
import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, y, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n - SKIP
    tl.store(y + at, tl.load(x + at, mask=keep) * FACTOR, mask=keep)


def double(*, tiles, **_):
    def kernel(rows, factor=2.0):
        tile = tiles(rows.shape[0])
        out = torch.zeros_like(rows)
        _double[(triton.cdiv(rows.numel(), tile["BLOCK"]),)](rows, out, rows.numel(), factor, **tile)
        return out
    return kernel
'''
CHOICES = '''
def tile(block, skip=0, warps=4):
    return {"BLOCK": block, "SKIP": skip, "num_warps": warps}


def default(traits, num_tokens):
    return tile(16)


def candidates(traits, num_tokens):
    return [tile(2048, 1), tile(1024), tile(48), tile(2**30)]
'''


def test_a_triton_kernel_is_tuned_where_it_runs(op, monkeypatch):
    """A wrong one, one that is much faster, one that Triton refuses (48 is no power of two), and one too large."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from kernel_registry.traits.platform import detect

    here = detect()
    monkeypatch.setattr(bench, "time", time)
    op.write("kernels", TRITON)
    op.write("tiles", CHOICES)
    op.write("cases", "import torch\n\nFLAVOURS = ('random', 'zeros')\nWORKLOADS = {}\n\n\n"
             "def inputs(traits, num_tokens, *, seed, device, flavour):\n"
             "    torch.manual_seed(seed)\n    make = torch.zeros if flavour == 'zeros' else torch.rand\n"
             "    return (make(num_tokens, traits['size'], device=device),), {'factor': 2.0}\n")
    op.write("oracle", (op.folder / op.package / "oracle.py").read_text().replace(
        "rows, = args", "rows, outputs = args[0].tolist(), outputs.tolist()"))
    entry = "tiled: target: PACKAGE.kernels:double, tiles: PACKAGE.tiles, when: {platform: [cuda, hip, interpreter]}"
    registry = open_registry(op, entry, platform=None)
    on_gpu = here.kind in ("cuda", "hip")
    size = 100_000 if on_gpu else 60  # so many that programs of sixteen take longer than a launch
    row, = run(op, registry, traits={"size": size}, tokens=[7])
    assert row.outcome == WRITTEN and row.tile == {"BLOCK": 1024, "SKIP": 0, "num_warps": 4} and len(row.failed) == 2
    assert row.tried == 5 and [wrong["SKIP"] for wrong, _ in row.wrong] in ([1], [])  # the judge meets it if it is fast
    assert row.method == ("cuda graph" if on_gpu else "perf_counter")
    data, = yaml.safe_load(op.output.read_text())["tiles"]
    assert data["device"] == (torch.cuda.get_device_name() if on_gpu else "interpreter")
    registry.load_tiles(op.output)
    x = torch.rand(7, size, device="cuda" if on_gpu else "cpu")
    assert torch.equal(registry.dispatch("fake.double", size=size)(x, factor=2.0), 2 * x)
