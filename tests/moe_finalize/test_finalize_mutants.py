"""Bugs put in by changing one line of either implementation, each of which the numerics suite finds.

None reads or writes where no memory is: test_finalize_bounds.py is for those."""

from __future__ import annotations

import pytest
from finalize_support import numerics_failure

from tests import mutants

KERNEL, FACTORY, REFERENCE = (f"moe/finalize/{name}.py" for name in ("finalize_kernel", "triton_finalize", "reference"))
CASTS, CHECKS = "moe/casts.py", "moe/finalize/checks.py"
ROWS = "total = total + casts.widen(loaded[slot])\n"
WEIGHTED = "casts.widen(loaded[slot]) * casts.widen(factors[slot])"

MUTANTS = {  # bug -> (file, what stands there once, what replaces it)
    "bfloat16 sum": (KERNEL, ROWS,
                     "total = casts.widen(casts.narrow(total + casts.widen(loaded[slot]), tl.bfloat16))\n"),
    "bfloat16 products": (KERNEL, WEIGHTED, f"casts.widen(casts.narrow({WEIGHTED}, tl.bfloat16))"),
    "bfloat16 weights": (KERNEL, "casts.widen(factors[slot])",
                         "casts.widen(casts.narrow(casts.widen(factors[slot]), tl.bfloat16))"),
    "cast before the shared output": (KERNEL, "total = total * routed_scaling_factor",
                                      "total = casts.widen(casts.narrow(total * routed_scaling_factor, tl.bfloat16))"),
    "bits cut off": (CASTS, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    "ties away from even": (CASTS, "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    "the last slot first": (KERNEL, "    for slot in tl.static_range(TOPK):\n        if weights is not None:\n"
                                    "            total",
                            "    for slot in tl.static_range(TOPK - 1, -1, -1):\n        if weights is not None:\n"
                            "            total"),
    "skipped slots are read": (KERNEL, "read = inside & (expert >= 0) & (expert < NUM_EXPERTS)", "read = inside"),
    "skipped weights are read": (KERNEL, "slot, mask=local, other=0.0", "slot"),
    "ids beyond the experts count": (KERNEL, "(expert >= 0) & (expert < NUM_EXPERTS)\n            loaded",
                                     "(expert >= 0)\n            loaded"),
    "-1 counts": (KERNEL, "inside & (expert >= 0) &", "inside &"),
    "the map is not used": (KERNEL, "experts = mapped", "mapped = experts"),
    "shared output twice": (KERNEL, "total + casts.widen(beside)", "total + casts.widen(beside) + casts.widen(beside)"),
    "shared output scaled": (KERNEL, "    total = total * routed_scaling_factor\n    if shared is not None:\n"
                                     "        total = total + casts.widen(beside)",
                             "    if shared is not None:\n        total = total + casts.widen(beside)\n"
                             "    total = total * routed_scaling_factor"),
    "no scaling": (KERNEL, "total = total * routed_scaling_factor", "total = total * 1.0"),
    "strides of rows forgotten": (FACTORY, "row_token, *row_slot, row_column = expert_output.stride()",
                                  "row_token, *row_slot, row_column = expert_output.contiguous().stride()"),
    "strides of out forgotten": (FACTORY, "out_token, out_column = out.stride()",
                                 "out_token, out_column = hidden_size, 1"),
    "a fresh output": (FACTORY, "        if out is None:\n", "        if True:\n"),
    "finished too soon": (CHECKS, "routed_scaling_factor == 1 and", "True and"),
    "reference: bfloat16 sum": (REFERENCE, "total = total + (row", "total = total.bfloat16().float() + (row"),
    "reference: skipped slots are read": (REFERENCE, "torch.where(here[:, slot, None], row, 0.0)",
                                          "row * here[:, slot, None]"),
    "reference: the last slot first": (REFERENCE, "in range(topk):", "in reversed(range(topk)):"),
    "reference: shared output scaled": (REFERENCE, "total * routed_scaling_factor\n        if has_shared:\n"
                                                   "            total = total + shared_output.float()",
                                        "total * routed_scaling_factor\n        if has_shared:\n"
                                        "            total = total + shared_output.float() * routed_scaling_factor"),
    "reference: a map of too many": (REFERENCE, "known = (topk_ids >= 0) & (topk_ids < size)",
                                     "known = topk_ids < size"),
}
IN_THE_INTERPRETER = ("bits cut off", "ties away from even")  # compiled, the cast is Triton's


@pytest.mark.parametrize("implementation", ["reference", "triton_finalize"])
def test_the_copy_as_it_is_passes(implementation, device):
    if implementation != "reference":
        pytest.importorskip("triton")
    with mutants.copied() as load:
        assert numerics_failure(load(f"moe.finalize.{implementation}"), device=device) == ""


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(bug, device):
    if device == "cuda" and bug in IN_THE_INTERPRETER:
        pytest.skip("a line that runs in the interpreter only")
    file, place, changed = MUTANTS[bug]
    if file != REFERENCE:
        pytest.importorskip("triton")
    with mutants.copied(file, place, changed) as load:
        module = load(f"moe.finalize.{'reference' if file == REFERENCE else 'triton_finalize'}")
        try:
            found = numerics_failure(module, device=device)
        except Exception as error:  # an access out of bounds
            found = repr(error)
    print(f"{bug}: {found}")
    assert found
