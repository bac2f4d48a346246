"""moe.finalize: every rule of docs/moe_finalize.md, on every implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from finalize_support import REDUCED, SUITE, judged, layer, numerics_failure

from kernel_registry import registry
from kernel_registry.errors import InputError
from kernel_registry.ops.moe.finalize import cases, oracle, reference

modules = [reference]
if __import__("importlib").util.find_spec("triton"):
    from kernel_registry.ops.moe.finalize import triton_finalize

    modules.append(triton_finalize)
each = pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__.rpartition(".")[2])


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).cpu()


# ---- values ----------------------------------------------------------------------------------------------------------

@each
def test_the_suite(module, device):
    assert numerics_failure(module, device=device) == ""


@pytest.mark.parametrize("columns", [32, 128])
def test_columns_per_program_change_no_bit(columns, device, monkeypatch):
    triton_finalize = pytest.importorskip("kernel_registry.ops.moe.finalize.triton_finalize")
    monkeypatch.setattr(triton_finalize, "WHOLE", False)
    for seed, traits in enumerate(SUITE):
        args, kwargs = cases.inputs(traits, 5, seed=seed, device=device, flavour="not_local")
        expected = triton_finalize.finalize(**traits, columns_per_program=1024)(*args, **kwargs).clone()
        got = triton_finalize.finalize(**traits, columns_per_program=columns)(*args, **kwargs)
        assert torch.equal(bits(got), bits(expected)), traits


@each
@pytest.mark.parametrize("topk", range(1, 17))
def test_every_number_of_slots(module, topk, device):
    judged(module, layer(32, topk, 47, has_shared=topk % 2 == 0), 3, flavour="ordered", seed=topk, device=device)


@each
@pytest.mark.parametrize("hidden", [1, 2, 31, 32, 511, 2880])
def test_every_hidden_size(module, hidden, device):
    judged(module, layer(32, 4, hidden, expert_parallel=True), 3, flavour="not_local", device=device)


@each
def test_no_tokens(module, device):
    for traits in SUITE:
        args, kwargs = cases.inputs(traits, 0, device=device)
        assert module.finalize(**traits)(*args, **kwargs).shape == (0, traits["hidden_size"])


@each
def test_a_rows_result_does_not_depend_on_the_other_rows(module, device):
    traits = layer(8, 6, 51, has_shared=True)
    args, kwargs = cases.inputs(traits, 11, device=device, flavour="not_local")
    made = module.finalize(**traits)
    whole = made(*args, **kwargs)
    for count in (1, 4, 10):
        part_args, part_kwargs, expected = cases.prefix(args, kwargs, whole, count)
        assert torch.equal(bits(made(*part_args, **part_kwargs)), bits(expected))


@each
def test_a_token_without_a_local_slot(module, device):
    traits = layer(4, 2, 8, has_shared=True)
    rows = torch.full((2, 2, 8), float("nan"), dtype=torch.bfloat16, device=device)
    weights, ids = torch.full((2, 2), float("nan"), device=device), torch.tensor([[-1, 4], [9, -7]], device=device)
    shared = torch.arange(16.0, device=device).view(2, 8).bfloat16()
    assert torch.equal(module.finalize(**traits)(rows, weights, ids, shared_output=shared), shared)
    zeros = module.finalize(**{**traits, "has_shared": False})(rows, weights, ids)
    assert torch.equal(zeros, torch.zeros_like(shared))


@each
def test_an_empty_map_has_no_local_expert(module, device):
    traits = layer(4, 2, 8, expert_parallel=True)
    rows = torch.full((2, 2, 8), float("nan"), dtype=torch.bfloat16, device=device)
    ids = torch.tensor([[0, 1], [2, 3]], device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    result = module.finalize(**traits)(rows, torch.ones(2, 2, device=device), ids, expert_map=nothing)
    assert torch.equal(result, torch.zeros_like(result))


@each
def test_the_sum_is_rounded_once(module, device):
    """256 + 1 + 1 + 1 + 1 is 260; rounded to bfloat16 after each addition it stays 256."""
    rows = torch.tensor([256.0, 1, 1, 1, 1], dtype=torch.bfloat16, device=device).view(1, 5, 1)
    assert module.finalize(**layer(8, 5, 1, weights_applied=True))(rows).item() == 260


# ---- where it is written ---------------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_but_out_is_written(module, dtype, device):
    traits = layer(8, 3, 21, out_dtype=dtype, output_alias=True)
    args, kwargs = cases.inputs(traits, 4, device=device)
    buffer = torch.full((6, 30), 7.0, dtype=getattr(torch, dtype), device=device)
    kwargs["out"] = out = buffer[1:5, 4:25]
    out.fill_(float("nan"))
    result = module.finalize(**traits)(*args, **kwargs)
    assert result is out and oracle.check(traits, args, kwargs, result).passed
    around = torch.ones_like(buffer, dtype=torch.bool)
    around[1:5, 4:25] = False
    assert (buffer[around] == 7).all()


@each
def test_out_may_be_the_shared_output_or_the_reduced_rows(module, device):
    traits = layer(8, 3, 21, has_shared=True, **REDUCED)
    made, in_place = module.finalize(**traits), module.finalize(**{**traits, "output_alias": True})
    for name in ("expert_output", "shared_output"):
        (rows, *_), kwargs = cases.inputs(traits, 4, device=device)
        expected = made(rows, **kwargs)
        out = {"expert_output": rows, **kwargs}[name]
        assert in_place(rows, **kwargs, out=out) is out and torch.equal(bits(out), bits(expected)), name


@each
def test_nothing_left_to_do(module, device):
    """The experts reduced, there is no shared output and no factor: no kernel, and the same storage."""
    traits = layer(8, 3, 21, **REDUCED)
    made, in_place = module.finalize(**traits), module.finalize(**{**traits, "output_alias": True})
    rows = torch.randn(4, 21, device=device).bfloat16()
    out = rows[:]  # another object
    with torch.profiler.profile() as seen:
        results = made(rows), in_place(rows, out=out)
    assert not [event.name for event in seen.events() if event.name.startswith("aten::")]
    assert results[0] is rows and results[1] is out


@each
@pytest.mark.parametrize("more", [dict(factor=2.5), dict(out_dtype="float32"), dict(out=True), dict(padded=True)])
def test_something_left_to_do(module, more, device):
    traits = layer(8, 3, 21, **REDUCED)
    rows = torch.randn(4, 21, device=device).bfloat16()
    traits["out_dtype"] = more.get("out_dtype", "bfloat16")
    kwargs = {"routed_scaling_factor": more.get("factor", 1.0)}
    if "out" in more or "padded" in more:
        buffer = torch.full((4, 25), float("nan"), device=device).bfloat16()
        traits["output_alias"], kwargs["out"] = True, buffer[:, :21]
        if "padded" in more:  # the same place to begin, and rows of another length
            buffer[:, :21] = rows
            rows = buffer.view(-1)[:84].view(4, 21).clone()
    result = module.finalize(**traits)(rows, **kwargs)
    assert result.data_ptr() != rows.data_ptr()
    assert oracle.check(traits, (rows,), kwargs, result).passed


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "rows of another size": (dict(), lambda a, k: ((a[0][:, :, 1:], *a[1:]), k), r"expert_output is \[3, 4, 7\]"),
    "rows of another dtype": (dict(), lambda a, k: ((a[0].half(), *a[1:]), k), "expert_output is .* float16"),
    "rows that are no tensor": (dict(), lambda a, k: (([], *a[1:]), k), "expert_output is list"),
    "no weights": (dict(), lambda a, k: ((a[0], None, a[2]), k), "topk_weights is missing"),
    "weights twice": (dict(weights_applied=True), lambda a, k: ((a[0], torch.ones(3, 4), a[2]), k),
                      "topk_weights is given, dispatched with weights_applied=True"),
    "ids of another shape": (dict(), lambda a, k: ((*a[:2], a[2][:2]), k), r"topk_ids is \[2, 4\]"),
    "ids that are no integers": (dict(), lambda a, k: ((*a[:2], a[2].float()), k), "topk_ids is .* float32"),
    "no ids beside a map": (dict(expert_parallel=True), lambda a, k: ((*a[:2], None), k), "topk_ids is missing"),
    "no map": (dict(expert_parallel=True), lambda a, k: (a, {}), "expert_map is missing"),
    "a map": (dict(), lambda a, k: (a, {"expert_map": torch.zeros(4, dtype=torch.int32)}), "expert_map is given"),
    "a map in two dimensions": (dict(expert_parallel=True), lambda a, k: (a, {"expert_map": k["expert_map"][None]}),
                                r"expert_map is \[1, 32\]"),
    "no shared output": (dict(has_shared=True), lambda a, k: (a, {}), "shared_output is missing"),
    "a shared output": (dict(), lambda a, k: (a, {"shared_output": a[0][:, 0]}), "shared_output is given"),
    "no out": (dict(output_alias=True), lambda a, k: (a, {}), "out is missing"),
    "an out": (dict(), lambda a, k: (a, {"out": a[0][:, 0]}), "out is given"),
    "an out of another dtype": (dict(output_alias=True), lambda a, k: (a, {"out": k["out"].float()}),
                                r"out is \[3, 8\] float32 .* expected \[3, 8\] bfloat16"),
    "an out of another shape": (dict(output_alias=True), lambda a, k: (a, {"out": k["out"][:2]}), r"out is \[2, 8\]"),
    "ids where the experts reduced": (REDUCED, lambda a, k: ((*a[:2], torch.zeros(3, 4, dtype=torch.int32)), k),
                                      "topk_ids is given"),
}


@each
@pytest.mark.parametrize("what", WRONG)
def test_refused(module, what):
    other, change, message = WRONG[what]
    traits = layer(8, 4, 8, **other)
    args, kwargs = change(*cases.inputs(traits, 3))
    with pytest.raises(InputError, match=message):
        module.finalize(**traits)(*args, **kwargs)


def test_contradicting_traits_are_refused():
    from kernel_registry.errors import TraitError

    for wrong in (dict(reduced=True), dict(reduced=True, weights_applied=True, expert_parallel=True)):
        with pytest.raises(TraitError, match="contradict"):
            registry.dispatch("moe.finalize", num_experts=8, topk=2, hidden_size=8, **wrong)


# ---- the judge -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_the_oracle_refuses_one_wrong_element(flavour):
    for traits in SUITE:
        args, kwargs = cases.inputs(traits, 5, flavour=flavour)
        right = reference.finalize(**traits)(*args, **kwargs)
        finite = right.isfinite().nonzero()
        if not len(finite):
            continue
        row, column = finite[len(finite) // 2].tolist()
        right[row, column] = right[row, column] * 1.02 + 1e-2
        verdict = oracle.check(traits, args, kwargs, right)
        assert not verdict.passed and f"row {row}, column {column}" in verdict.detail


def test_the_oracle_compares_bits_where_the_order_decides():
    traits = layer(8, 8, 64, dtype="float32", out_dtype="float32", weights_applied=True)
    args, kwargs = cases.inputs(traits, 6, flavour="ordered")
    verdict = judged(reference, traits, 6, flavour="ordered")
    assert verdict.exact == 1
    backwards = reference.finalize(**traits)(args[0].flip(1), None, args[2].flip(1), **kwargs)
    assert "order of the slots" in oracle.check(traits, args, kwargs, backwards).detail


def test_the_oracle_wants_the_result_in_out():
    traits = layer(8, 3, 21, output_alias=True)
    args, kwargs = cases.inputs(traits, 4)
    result = reference.finalize(**traits)(*args, **kwargs)
    assert oracle.check(traits, args, kwargs, result).passed
    assert not oracle.check(traits, args, kwargs, result.clone()).passed


def test_prefix_is_a_call_of_its_own():
    traits = layer(8, 3, 21, output_alias=True, has_shared=True)
    call = cases.inputs(traits, 6)
    args, kwargs, outputs = cases.prefix(*call, reference.finalize(**traits)(*call[0], **call[1]), 2)
    assert oracle.check(traits, args, kwargs, outputs).passed
    assert dataclasses.is_dataclass(oracle.Verdict) and outputs.shape == (2, 21)
