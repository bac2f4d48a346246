"""benchmarks/: what they print from made-up times, and what they call wrong. Nothing here is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a script of benchmarks/ as Python would find it when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def get(name):
        if name != "plot_topk":
            pytest.importorskip("torch")
            pytest.importorskip("triton")
        for other in ("topk", "topk_peers", "plot_topk"):
            monkeypatch.delitem(sys.modules, other, raising=False)
        return __import__(name)
    return get


# ---- tables and drawing ----------------------------------------------------------------------------------------------

def made_up(config, dtype, tokens, us, **other):
    shape = {"gpt_oss": dict(E=128, K=4, G=1, TG=1), "dsv3": dict(E=256, K=8, G=8, TG=4)}[config]
    return {"kind": "graph", "config": config, "dtype": dtype, "tokens": tokens, "shape": shape, "us": us,
            "chosen": "small", "wrong_rows": {}, "machine": "Nobody's GPU", "torch": "2.11", "triton": "3.6",
            "peers": {"sglang": "0.5.23"}, "copy_bytes_per_s": 4.3e12, **other}


ROWS = [
    made_up("gpt_oss", "float32", 1, {"floor": 9.0, "ours": 9.0, "sglang": 9.0}),  # measured again further down
    made_up("gpt_oss", "float32", 1, {"floor": 1.0}, machine="Another GPU"),
    made_up("gpt_oss", "float32", 1, {"floor": 1.2, "empty": 1.0, "bytes": 0.1, "ours": 2.0, "sglang": 3.0,
                                      "vllm": 2.5}, variants={"small": 2.0, "large": 1.6, "torch": None}),
    made_up("gpt_oss", "float32", 4096, {"floor": 4.0, "empty": 1.0, "bytes": 0.5, "ours": 6.0, "sglang": 9.0,
                                         "vllm": None}, variants={"small": 6.0, "large": 6.6}),
    made_up("dsv3", "float32", 1, {"floor": 1.25, "empty": 1.0, "ours": None, "sglang": 3.0, "torch": 40.0}),
    made_up("dsv3", "bfloat16", 4096, {"floor": 4.0, "ours": 5.0, "flashinfer": 4.0}, wrong_rows={"flashinfer": 31}),
    made_up("gpt_oss", "float32", 1, {"floor": 11.0, "ours": 8.0, "sglang": 13.5}, kind="host"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_reading_keeps_the_latest_rows_of_the_last_machine(module, file):
    rows, others = module("plot_topk").read(file)
    assert others == 1
    assert [(row["kind"], row["config"], row["dtype"], row["tokens"]) for row in rows] == [
        ("graph", "gpt_oss", "float32", 1), ("graph", "gpt_oss", "float32", 4096), ("graph", "dsv3", "float32", 1),
        ("graph", "dsv3", "bfloat16", 4096), ("host", "gpt_oss", "float32", 1)]
    assert rows[0]["us"]["ours"] == 2.0


def test_tables(module, file):
    plot = module("plot_topk")
    text = plot.report(plot.read(file)[0])
    head, *parts = text.split("\n\n")
    assert head == "Nobody's GPU, torch 2.11, Triton 3.6, a large copy moves 4.30 TB/s. Peers: sglang 0.5.23."
    assert dict(zip(parts[::2], (part.splitlines() for part in parts[1::2]))) == {
        "### Best peer over ours, float32 logits": [
            "|  | 1 | 4096 |", "| --- | --- | --- |",
            "| gpt-oss 128/4 | 1.25 vllm | 1.50 sglang |", "| DeepSeek-V3 256/8/4/8 |  |  |"],
        "### Ours over the floor, float32 logits": [
            "|  | 1 | 4096 |", "| --- | --- | --- |",
            "| gpt-oss 128/4 | 1.67 | 1.50 |", "| DeepSeek-V3 256/8/4/8 |  |  |"],
        "### Regret of the choice, float32 logits": [
            "|  | 1 | 4096 |", "| --- | --- | --- |",
            "| gpt-oss 128/4 | 1.25 small | 1.00 small |", "| DeepSeek-V3 256/8/4/8 |  |  |"],
        "### Best peer over ours, bfloat16 logits": [
            "|  | 4096 |", "| --- | --- |", "| DeepSeek-V3 256/8/4/8 | 0.80 flashinfer |"],
        "### Ours over the floor, bfloat16 logits": [
            "|  | 4096 |", "| --- | --- |", "| DeepSeek-V3 256/8/4/8 | 1.25 |"],
        "### Host time of one eager call of one token, float32 logits, microseconds": [
            "|  | tokens | floor | sglang | ours |", "| --- | --- | --- | --- | --- |",
            "| gpt-oss 128/4 | 1 | 11.00 | 13.50 | 8.00 |"],
        "### Rows routed otherwise than float64 does": [
            "- DeepSeek-V3 256/8/4/8, bfloat16, 4096 tokens: flashinfer 31"],
    }


def test_full_tables_hold_every_time(module, file):
    plot = module("plot_topk")
    assert ("| gpt-oss 128/4 | 4096 | 4.00 | 1.00 | 0.50 | 9.00 | refused |  | 6.00 |"
            in plot.report(plot.read(file)[0], full=True).splitlines())


def test_drawing(module, file, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plot, path = module("plot_topk"), tmp_path / "topk.svg"
    monkeypatch.setattr(sys, "argv", ["plot_topk.py", str(file), "--draw", str(path)])
    plot.main()
    words = {"".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert {"gpt-oss 128/4", "DeepSeek-V3 256/8/4/8", "tokens", "microseconds", "ours", "sglang", "vllm",
            "floor: bytes at copy bandwidth"} <= words
    assert not {"flashinfer", "torch"} & words  # times for bfloat16 only; off the scale
    first = path.read_bytes()
    plot.main()
    assert path.read_bytes() == first  # the same figures, the same file


def test_nothing_to_draw(module, file, tmp_path):
    pytest.importorskip("matplotlib")
    plot = module("plot_topk")
    with pytest.raises(SystemExit, match="no times of float16 logits"):
        plot.draw(plot.read(file)[0], tmp_path / "topk.svg", "float16")


# ---- what is wrong ---------------------------------------------------------------------------------------------------

SHAPES = ("dsv3", "kimi_k3", "qwen3_next", "mixtral", "deepseek_v4")


@pytest.fixture
def routed(module):
    """A function that gives the module, a shape, its first inputs and what plain torch answers for them."""
    def get(name, dtype="float32"):
        topk = module("topk")
        c = topk.CONFIGS[name]
        x, bias, w, i = topk.inputs(c, dtype, 33, device="cpu")[0]
        weights, ids = topk.peers(c, "/nowhere")["torch"](x, bias, w, i)
        return topk, c, x, bias, weights, ids
    return get


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_right_is_not_called_wrong(routed, name, dtype):
    topk, c, x, bias, weights, ids = routed(name, dtype)
    assert weights.shape == ids.shape == (33, c["K"])
    assert topk.wrong_rows(weights, ids, x, bias, c) == 0
    assert topk.wrong_rows(weights.flip(1), ids.flip(1).int(), x, bias, c) == 0  # any order


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_wrong_is_called_wrong(routed, name):
    topk, c, x, bias, weights, ids = routed(name)

    def count(change):
        w, i = weights.clone(), ids.clone()
        change(w, i)
        return topk.wrong_rows(w, i, x, bias, c)

    scores, choice = topk.scored(x.double(), bias, c)

    def misroute(w, i):  # with the weights that belong to those ids
        i[:, -1] = choice.argmin(-1)
        chosen = scores.gather(1, i)
        w.copy_(chosen / chosen.sum(-1, keepdim=True) * c["scale"])

    assert count(lambda w, i: i[3].fill_(int(i[3, 0]))) == 1  # one expert over and over
    assert count(lambda w, i: i[4:6, 0].fill_(c["E"])) == 2  # no expert
    assert count(misroute) == 33
    assert count(lambda w, i: w.mul_(1.03)) == 33
    assert count(lambda w, i: w[7].fill_(float("nan"))) == 1
    assert count(lambda w, i: w[8, -1].mul_(1.03)) == 1
    assert count(lambda w, i: w.mul_(1.01)) == 0


def test_ties_are_anyones(module):
    topk = module("topk")
    c = topk.CONFIGS["gpt_oss"]
    x, weights = topk.torch.zeros(2, 128), topk.torch.full((2, 4), 0.25)
    assert topk.wrong_rows(weights, topk.torch.tensor([[5, 9, 70, 127], [0, 1, 2, 3]]), x, None, c) == 0


def test_dropped_groups_stay_dropped_where_every_choice_is_negative(module):
    topk = module("topk")
    c = topk.CONFIGS["dsv3"]
    x, bias, w, i = topk.inputs(c, "float32", 33, device="cpu")[0]
    _, ids = topk.peers(c, "/nowhere")["torch"](x, bias - 3, w, i)
    assert max(len(set(row)) for row in (ids // 32).tolist()) == 4


# ---- the run, with a clock of ours -----------------------------------------------------------------------------------

def arguments(topk, *given):
    return topk.parser().parse_args(list(given))


def device(topk):
    return "cuda" if topk.torch.cuda.is_available() else "cpu"  # where the registry's kernels run; the floors, too


def rows_of(topk, config, args, clock=lambda call, sets: 2.0):
    origin = {"copy_bytes_per_s": 1e12, "machine": "none"}
    return list(topk.rows_of(config, "float32", args, origin, clock, device(topk)))


@pytest.mark.parametrize("config", ["dsv3", "qwen3_next", "gpt_oss", "mixtral", "deepseek_v4"])
def test_rows(module, config, capsys, tmp_path):
    topk = module("topk")
    args = arguments(topk, "--peers", str(tmp_path), "--tokens", "1,5", "--variants")
    rows = rows_of(topk, config, args)
    assert [(row["kind"], row["config"], row["tokens"]) for row in rows] == [("graph", config, 1), ("graph", config, 5)]
    for row in rows:
        moved = row["tokens"] * (row["shape"]["E"] * 4 + row["shape"]["K"] * 8)
        assert row["us"] == {"floor": 2.0, "empty": 2.0, "ours": 2.0, "torch": 2.0,
                             "bytes": round(moved / 1e12 * 1e6, 3)}
        assert row["wrong_rows"] == {} and row["machine"] == "none"
        assert row["variants"][row["chosen"]] == 2.0 and "torch" in row["variants"]
        assert "torch 2.0 (1.00)" in topk.told(row) and f"regret 1.00 of {row['chosen']}" in topk.told(row)
    assert "# sglang absent: No module named 'sglang'" in capsys.readouterr().out


def test_a_peer_that_fails_or_errs_is_told(module, monkeypatch, capsys):
    topk = module("topk")
    def refuses(x, bias, w, i):
        raise ValueError("not for me")

    def errs(x, bias, w, i):
        return w.fill_(0.5), i.fill_(3)

    monkeypatch.setattr(topk, "peers", lambda *_: {"refuses": refuses, "errs": errs})
    monkeypatch.setattr(topk, "variants", lambda *_: ("good", {"good": topk.ours(topk.CONFIGS["mixtral"], "float32"),
                                                               "bad": errs}))
    (row,) = rows_of(topk, "mixtral", arguments(topk, "--tokens", "4", "--variants"))
    assert row["us"]["refuses"] is None and row["us"]["errs"] == 2.0 and row["us"]["ours"] == 2.0
    assert row["wrong_rows"] == {"errs": 4, "bad": 4}
    assert "# mixtral float32 4 refuses: not for me" in capsys.readouterr().out
    assert topk.told(row).endswith("WRONG {'errs': 4, 'bad': 4}")


def test_host_rows(module, monkeypatch):
    topk = module("topk")
    monkeypatch.setattr(topk.torch.cuda, "synchronize", lambda: None)
    (row,) = rows_of(topk, "mixtral", arguments(topk, "--host", "--skip", "sglang"),
                     lambda call, sets: topk.host_time(call, sets, calls=2, rounds=5))
    assert row["kind"] == "host" and row["tokens"] == 1 and "bytes" not in row["us"]
    assert row["us"]["ours"] > 0 and row["us"]["torch"] > 0


def test_runs_are_appended(module, monkeypatch, tmp_path, capsys):
    topk = module("topk")
    out = tmp_path / "rows.json"
    (tmp_path / "versions.json").write_text('{"sglang": "0.5.23"}')
    monkeypatch.setattr(topk.torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(topk, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(topk, "graph_time", lambda call, sets: 2.0)
    whole = topk.rows_of
    monkeypatch.setattr(topk, "rows_of", lambda *given: whole(*given, device=device(topk)))
    for config in ("mixtral", "gpt_oss"):
        monkeypatch.setattr(sys, "argv", ["topk.py", "--peers", str(tmp_path), "--configs", config, "--tokens", "1",
                                          "--out", str(out)])
        topk.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["config"], row["dtype"]) for row in rows] == [
        ("mixtral", "float32"), ("mixtral", "bfloat16"), ("gpt_oss", "float32"), ("gpt_oss", "bfloat16")]
    assert {(row["machine"], row["torch"], row["triton"], *row["peers"].items()) for row in rows} == {
        ("none", topk.torch.__version__, topk.triton.__version__, ("sglang", "0.5.23"))}


def test_which_peers_each_shape_has(module):
    module("topk")
    from topk import CONFIGS
    from topk_peers import builders

    assert {name: set(builders(c, Path())) - {"torch", "sglang"} for name, c in CONFIGS.items()} == {
        "dsv3": {"flashinfer", "flashinfer_pdl", "vllm"},
        **dict.fromkeys(("minimax_m2", "glm45", "kimi_k2", "kimi_k3"), {
            "flashinfer", "flashinfer_pdl", "vllm", "vllm_sigmoid", "sglang_cuda", "tokenspeed"}),
        **dict.fromkeys(("qwen3_moe", "gpt_oss", "mixtral"), {
            "vllm", "sglang_cuda", "tokenspeed", "tokenspeed_pdl", "triton_kernels"}),
        "qwen3_next": {"vllm", "sglang_cuda", "tokenspeed", "tokenspeed_pdl"},
        "deepseek_v4": {"vllm", "vllm_triton", "tokenspeed", "tokenspeed_triton"},
    }
