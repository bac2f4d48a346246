"""benchmarks/transformers_decode.py in small: it decodes with every contestant, and its tables are what it measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", reason="not run: transformers is not installed in this environment")
ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints, in a process of its own: one thread, and no interpreter in Triton's place."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *arguments], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str, title: str) -> list[dict[str, str]]:
    """A table of Markdown, below its title."""
    lines = text.partition(f"\n{title}\n\n")[2].partition("\n\n")[0].splitlines()
    heads, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, row)) for row in cells]


def test_decoding(tmp_path):
    text = run("transformers_decode.py", "--tiny", "--out", str(tmp_path / "rows.json"))
    written = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    names = {"eager", "batched_mm", "grouped_mm", "registry"}
    distances = rows(text, "distance from eager's")
    for key, shown in (("ms", rows(text, "milliseconds of a decode step")), ("distance of output", distances[::2]),
                       ("distance of logits", distances[1::2])):
        assert [row["batch"] for row in shown] == ["1", "3"]
        assert all(names <= {*row[key]} for row in written)
        assert all(float(row[name]) == pytest.approx(was[key][name], rel=1e-3) for row, was in zip(shown, written)
                   for name in was[key])
    for step, was in zip(rows(text, "milliseconds of a decode step"), written):
        turns = was["rounds"]
        assert {name: len(of) for name, of in turns.items()} == {name: 2 - (name == "eager") for name in turns}
        assert all(was["ms"][name] == statistics.median(turns[name].values()) for name in turns)
        best = min((name for name in turns if name not in ("eager", "registry")), key=was["ms"].get)
        for head, name in (("eager", "eager"), ("best other", best)):
            ratio = statistics.median(theirs / turns["registry"][i] for i, theirs in turns[name].items())
            assert float(step[f"{head} / registry"]) == pytest.approx(ratio, rel=1e-3)
    layer = rows(text, "microseconds of routing and experts, a layer")
    assert all(float(row[name]) > 0 for row in layer for name in names if row[""] == "called")
    assert all(0 < row[f"distance of {of}"]["registry"] < most for row in written
               for of, most in (("output", 0.02), ("logits", 0.05)))
    assert all(row["kernels"].count(",") == 1 for row in written)
    assert "tokens in float32: the same" in text
