"""Bugs put in by changing one place of an implementation or of the loader, each of which is found."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import indexer_failures
import pytest

from kernel_registry.ops import indexer as package
from kernel_registry.ops.moe import casts

SOURCES = Path(package.__file__).parent
KERNEL, FACTORY, TORCH, REFERENCE = "fused_kernel.py", "triton_fused.py", "torch_fused.py", "reference.py"
COLUMNS, CHECKS = "triton_columns.py", "checks.py"
FORMATS, STAGES, LOADER, MODULE, CASTS = "formats.py", "stages.py", "loader.py", "module.py", "casts.py"
IMPLEMENTATIONS = {KERNEL: "triton_fused", COLUMNS: "triton_columns",
                   CHECKS: "triton_fused", CASTS: "triton_fused", FACTORY: "triton_fused", TORCH: "torch_fused",
                   REFERENCE: "reference"}
STORED = "tl.store(partial + split * tokens * COLUMNS + place, total, mask=mask)"
_numbers = itertools.count()

MUTANTS = {  # bug -> (file, what stands there once, what replaces it)
    "a piece forgotten": (KERNEL, "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)"),
    "pieces overlap": (KERNEL, "(split * steps + step)", "(split + step)"),
    "too few steps": (KERNEL, "BLOCK_K + SPLITS - 1) // SPLITS", "BLOCK_K) // SPLITS"),
    "pieces on top of each other": (KERNEL, STORED, "tl.store(partial + place, total, mask=mask)"),
    "pieces in bfloat16": (KERNEL, STORED, STORED.replace("total,", "casts.widen(casts.narrow(total, tl.bfloat16)),")),
    "the last product forgotten": (KERNEL, "some = k < HIDDEN", "some = k < HIDDEN - 1"),
    "the last token forgotten": (KERNEL, "token < tokens,", "token < tokens - 1,"),
    "the last column forgotten": (KERNEL, "column < COLUMNS", "column < COLUMNS - 1"),
    "nobody adds up": (KERNEL, "== SPLITS - 1:", "== SPLITS:"),
    "before the last has come": (KERNEL, "== SPLITS - 1:", "== SPLITS - 2:"),
    "counters stay": (KERNEL, "tl.store(count, 0)", "tl.store(count, SPLITS)"),
    "strides forgotten": (KERNEL, "* row_x +", "* HIDDEN +"),
    "bits cut off": (CASTS, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    "columns far apart": (CHECKS, "return x if x.stride(1) == 1 or x.shape[1] == 1 else", "return x if x.dim() else"),
    "columns: one step": (COLUMNS, "tl.static_range(0, HIDDEN, BLOCK_K)", "tl.static_range(0, 1, BLOCK_K)"),
    "columns: the last product forgotten": (COLUMNS, "first + lane < HIDDEN", "first + lane < HIDDEN - 1"),
    "columns: strides forgotten": (COLUMNS, "token * row_x", "token * HIDDEN"),
    "columns: one token's columns": (COLUMNS, "tl.store(out + token * COLUMNS + column", "tl.store(out + column"),
    "columns: sums of 16 bits": (COLUMNS, "total += casts.widen(w) * casts.widen(a)",
                                 "total += casts.widen(casts.narrow(casts.widen(w) * casts.widen(a), tl.bfloat16))"),
    "copies": (FACTORY, "return out.split(parts, dim=-1)",
               "return tuple(part.contiguous() for part in out.split(parts, dim=-1))"),
    "torch: split a column off": (TORCH, "parts = [head_dim, num_heads]", "parts = [head_dim - 1, num_heads + 1]"),
    "torch: two multiplications": (TORCH, "return linear(hidden_states, weight).split(parts, dim=-1)",
                                   "return linear(hidden_states, weight[:head_dim]), linear(hidden_states, "
                                   "weight[head_dim:])"),
    "reference: nvfp4 in bfloat16": (REFERENCE, "hidden_states.float(), wk)",
                                     "hidden_states.float(), wk.bfloat16().float())"),
    "reference: the other rows": (REFERENCE, "weight[:head_dim])", "weight[-head_dim:])"),
    "blocks by division": (FORMATS, "    width = width or columns\n",
                           "    width, height = width or columns, -(-rows // len(scale))\n"),
    "the last columns left as they are": (FORMATS, "    if ragged:\n", "    if False:\n"),
    "the first rows' scales": (FORMATS, "[first:None if count is None else first + count]", "[:count]"),
    "bytes as numbers": (FORMATS, "scale = scale.view(torch.float8_e8m0fnu)", "pass"),
    "names by their beginning": (LOADER, "component in stage.components", "component.startswith('w')"),
    "no look ahead": (LOADER, "isinstance(weights, Collection)", "False"),
    "a layer too early": (STAGES, 'self.ready("wk") and', 'self.ready("wk") or'),
    "rows of the other": (STAGES, "first += self.spans[component][0]", "first += 0"),
    "the caller's buffer": (STAGES, "copy=True", "copy=False"),
    "values not looked at": (STAGES, "self.look(key, source, tensor)", "pass"),
    "rounded": (STAGES, "if changed:", "if False:"),
    "infinities": (STAGES, "if not (limits if scale is None else limits.to(dtype)).isfinite().all():", "if False:"),
    "twice": (STAGES, "if key in sources:", "if False:"),
    "both forms": (STAGES, "and other != component", "and False"),
    "without a scale": (STAGES, "return weight is not None and (", "return weight is not None and (True or "),
    "zeros for NaN": (MODULE, 'tensor.fill_(float("nan"))', "tensor.fill_(0)"),
    "what to_empty brings": (MODULE, "                self.unwritten(getattr(self, name))", "                pass"),
}
IN_THE_INTERPRETER = ("bits cut off",)  # compiled, the cast is Triton's


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """What is wrong with a private copy of the op's package with one place changed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"indexer_mutant_{next(_numbers)}"

    def failure(device, implementation="", file="", place="", changed=""):
        op = tmp_path / name / "indexer" / "wk_weights_proj"
        shutil.copytree(SOURCES, op.parent, ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / name / "moe").mkdir()
        shutil.copy(casts.__file__, tmp_path / name / "moe" / CASTS)
        if file:
            path = tmp_path / name / "moe" / CASTS if file == CASTS else op / file
            text = path.read_text()
            assert text.count(place) == 1, f"{file} has {place!r} {text.count(place)} times, the mutant needs it once"
            path.write_text(text.replace(place, changed))
        importlib.invalidate_caches()
        if implementation:
            return indexer_failures.numerics(
                importlib.import_module(f"{name}.indexer.wk_weights_proj.{implementation}"), device)
        module, loader = (importlib.import_module(f"{name}.indexer.wk_weights_proj.{one}") for one in
                          ("module", "loader"))
        return indexer_failures.loading(SimpleNamespace(module=module, loader=loader))

    yield failure
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("implementation", ["triton_fused", "torch_fused", "reference", ""])
def test_the_copy_as_it_is_passes(copied, implementation, device):
    if implementation == "triton_fused":
        pytest.importorskip("triton")
    assert copied(device, implementation) == ""


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(copied, bug, device):
    if device == "cuda" and bug in IN_THE_INTERPRETER:
        pytest.skip("a line that runs in the interpreter only")
    file, place, changed = MUTANTS[bug]
    implementation = IMPLEMENTATIONS.get(file, "")
    if implementation == "triton_fused":
        pytest.importorskip("triton")
    try:
        found = copied(device, implementation, file, place, changed)
    except AssertionError:
        raise
    except Exception as error:  # refused where it should not be
        found = repr(error)
    print(f"{bug}: {found}")
    assert found
