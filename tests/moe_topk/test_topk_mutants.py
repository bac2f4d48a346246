"""Ten classic router bugs, each put into each implementation by changing one line: the numerics suite must find them all."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path

import pytest
from topk_support import numerics_failure

from kernel_registry.ops.moe import topk as package

SOURCES = Path(package.__file__).parent
_numbers = itertools.count()

# bug -> implementation -> (file, the line's part, what replaces it)
COMMON, GROUPED, SINGLE, REFERENCE = "triton_common.py", "triton_grouped.py", "triton_single_group.py", "reference.py"


def both(*change):
    return {"triton_grouped": change, "triton_single_group": change}


SCORE = "score = common.chosen_scores(logits, chosen, rows, live, row_stride, column_stride, ROUTED, MASK_ROWS)"
MUTANTS = {
    "second largest of a group must be another value": {
        "triton_grouped": (GROUPED, "second = tl.maximum(tl.minimum(a_first, b_first), tl.maximum(a_second, b_second))",
                           "second = tl.maximum(tl.where(a_first == b_first, common.REMOVED, tl.minimum(a_first, b_first)), "
                           "tl.maximum(a_second, b_second))"),
        "reference": (REFERENCE, "best = torch.gather(choice, -1, _rank(choice)[..., :2 if has_bias else 1])",
                      "best = torch.stack([choice.amax(-1), choice.masked_fill(choice == choice.amax(-1, True), -1e9).amax(-1)], -1)")},
    "dropped groups are filled with 0": {
        "triton_grouped": (COMMON, "NEG_INF_KEY = tl.constexpr(-2139095041)", "NEG_INF_KEY = tl.constexpr(0)"),
        "reference": (REFERENCE, '~keep.repeat_interleave(group_size, dim=1), float("-inf"))',
                      "~keep.repeat_interleave(group_size, dim=1), 0.0)")},
    "weights from the biased choice": {
        "triton_grouped": (GROUPED, SCORE, SCORE + " + tl.load(bias + chosen)"),
        "triton_single_group": (SINGLE, SCORE, SCORE + " + tl.load(bias + chosen)"),
        "reference": (REFERENCE, "weights = torch.gather(score, 1, ids)", "weights = torch.gather(choice, 1, ids)")},
    "no epsilon in the renormalisation": {
        **both(COMMON, "weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)", "weight = weight / tl.sum(weight, axis=1)[:, None]"),
        "reference": (REFERENCE, "weights = weights / (total + 1e-20)", "weights = weights / total")},
    "sigmoid by tanh": {
        **both(COMMON, "return tl.where(x == x, 1.0 / (1.0 + e), 0.0)",
               "return tl.where(x == x, 0.5 * ((1.0 - e) / (1.0 + e)) + 0.5, 0.0)"),
        "reference": (REFERENCE, "return torch.sigmoid(x)", "return 0.5 * torch.tanh(0.5 * x) + 0.5")},
    "bias rounded to bfloat16": {
        **both(COMMON, "mask=exists, other=0.0).to(tl.float32),)", "mask=exists, other=0.0).to(tl.bfloat16).to(tl.float32),)"),
        "reference": (REFERENCE, "choice = score + correction_bias.float()", "choice = score + correction_bias.bfloat16().float()")},
    "ties to the highest id": {
        **both(COMMON, "winner = tl.min(tl.where(keys[0] == best, ids[0], NO_ID), axis=1)[:, None]",
               "winner = tl.max(tl.where(keys[0] == best, ids[0], -1), axis=1)[:, None]"),
        "reference": (REFERENCE, "ids = _rank(choice)[:, :routed]", "ids = num_experts - 1 - _rank(choice.flip(-1))[:, :routed]")},
    "NaN like an expert already taken": {
        **both(COMMON, "NAN_KEY = tl.constexpr(-2147483647)", "NAN_KEY = tl.constexpr(-2147483648)"),
        "reference": (REFERENCE, "ids = _rank(choice)[:, :routed]",
                      "ids = _rank(choice)[:, :routed] * ~choice.gather(1, _rank(choice)[:, :routed]).isnan()")},
    "one slot too few": {
        "triton_grouped": (GROUPED, "chosen = common.select(best_keys, best_ids, ROUTED, ROWS)",
                           "chosen = common.select(best_keys, best_ids, ROUTED - 1, ROWS)"),
        "triton_single_group": (SINGLE, "chosen = common.select(keys, ids, ROUTED, ROWS)",
                                "chosen = common.select(keys, ids, ROUTED - 1, ROWS)"),
        "reference": (REFERENCE, "ids = _rank(choice)[:, :routed]", "ids = _rank(choice)[:, 1:routed + 1]")},
    "the scaling factor is forgotten": {
        **both(COMMON, "weight = weight * routed_scaling_factor", "weight = weight * 1.0"),
        "reference": (REFERENCE, "weights = (weights * routed_scaling_factor).float()", "weights = weights.float()")},
}
SERVES = {"triton_grouped": True, "triton_single_group": False, "reference": None}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A private copy of the op's package with one line changed; returns the implementation's module in it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"mutant_{next(_numbers)}"

    def make(implementation, file="", line="", changed=""):
        shutil.copytree(SOURCES, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            path = tmp_path / name / file
            text = path.read_text()
            assert text.count(line) == 1, f"{file} has the line {text.count(line)} times, the mutant needs it once: {line}"
            assert "\n" not in line + changed
            path.write_text(text.replace(line, changed))
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.{implementation}")

    yield make
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("implementation", SERVES)
def test_the_copy_as_it_is_passes(copied, implementation, device):
    assert numerics_failure(copied(implementation), grouped=SERVES[implementation], device=device) == ""


@pytest.mark.parametrize("bug,implementation", [(bug, i) for bug, served in MUTANTS.items() for i in served])
def test_killed(copied, bug, implementation, device):
    found = numerics_failure(copied(implementation, *MUTANTS[bug][implementation]), grouped=SERVES[implementation], device=device)
    print(f"{bug} in {implementation}: {found}")
    assert found


def test_there_are_ten():
    assert len(MUTANTS) == 10
    assert all("reference" in served for served in MUTANTS.values())
    assert sum("triton_grouped" in s for s in MUTANTS.values()) == 10
    assert sum("triton_single_group" in s for s in MUTANTS.values()) == 8  # two of the bugs need groups
