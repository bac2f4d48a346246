"""Bugs put in by changing one place of an implementation or of the loader, each of which is found."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import indexer_failures
import pytest

from tests import mutants

KERNEL, FACTORY, COLUMNS, CHECKS, TORCH, REFERENCE, FORMATS, STAGES, LOADER, MODULE = (
    f"indexer/wk_weights_proj/{name}.py" for name in ("fused_kernel", "triton_fused", "triton_columns", "checks",
                                                      "torch_fused", "reference", "formats", "stages", "loader",
                                                      "module"))
CASTS = "moe/casts.py"
IMPLEMENTATIONS = {KERNEL: "triton_fused", COLUMNS: "triton_columns",
                   CHECKS: "triton_fused", CASTS: "triton_fused", FACTORY: "triton_fused", TORCH: "torch_fused",
                   REFERENCE: "reference"}
STORED = "tl.store(partial + split * tokens * COLUMNS + place, total, mask=mask)"

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


@contextmanager
def judged(device, implementation, *change):
    """A function that says what is wrong with an implementation or, without one, with the loader, of a changed copy."""
    with mutants.copied(*change) as load:
        op = "indexer.wk_weights_proj"
        if implementation:
            module = load(f"{op}.{implementation}")
            yield lambda: indexer_failures.numerics(module, device)
        else:
            package = SimpleNamespace(module=load(f"{op}.module"), loader=load(f"{op}.loader"))
            yield lambda: indexer_failures.loading(package)


@pytest.mark.parametrize("implementation", ["triton_fused", "torch_fused", "reference", ""])
def test_the_copy_as_it_is_passes(implementation, device):
    if implementation == "triton_fused":
        pytest.importorskip("triton")
    with judged(device, implementation) as failure:
        assert failure() == ""


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(bug, device):
    if device == "cuda" and bug in IN_THE_INTERPRETER:
        pytest.skip("a line that runs in the interpreter only")
    file, place, changed = MUTANTS[bug]
    implementation = IMPLEMENTATIONS.get(file, "")
    if implementation == "triton_fused":
        pytest.importorskip("triton")
    with judged(device, implementation, file, place, changed) as failure:
        try:
            found = failure()
        except Exception as error:  # refused where it should not be
            found = repr(error)
    print(f"{bug}: {found}")
    assert found
