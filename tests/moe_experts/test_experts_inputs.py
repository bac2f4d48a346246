"""Tensors that contradict the dispatched traits get an error that names the argument, what it was and what it should
be; traits that contradict each other are no call at all; and what the harness itself is given."""

from __future__ import annotations

import pytest
import torch
from experts_support import FORMATS, OP, implementations, kernel, layer

from kernel_registry import registry
from kernel_registry.errors import InputError, TraitError
from kernel_registry.ops.moe.experts import cases

QUANTISED = layer(4, 2, 96, 64, "fp8_tensor_static", has_bias=True, expert_parallel=True, output_alias=True)
PLAIN = layer(4, 2, 96, 64)
BLOCKS = layer(4, 2, 160, 192, "fp8_block")
INT4 = layer(4, 2, 96, 64, "int4", group_size=32)
bf16 = torch.bfloat16

BAD = {  # about -> (traits, argument, its value, what the error says)
    "rank": (PLAIN, "hidden_states", torch.zeros(3, 1, 96, dtype=bf16), r"hidden_states is \[3, 1, 96\].*\[tokens, 96"),
    "columns": (PLAIN, "hidden_states", torch.zeros(3, 95, dtype=bf16), r"hidden_states is \[3, 95\].*\[tokens, 96\]"),
    "dtype": (PLAIN, "hidden_states", torch.zeros(3, 96), r"hidden_states is .*float32.*\[tokens, 96\] bfloat16"),
    "strides": (PLAIN, "hidden_states", torch.zeros(96, 3, dtype=bf16).t(), r"hidden_states is strided.*contiguous"),
    "no tensor": (PLAIN, "hidden_states", [0.0], r"hidden_states is list"),
    "w13 rows": (PLAIN, "w13", torch.zeros(4, 64, 96, dtype=bf16), r"w13 is \[4, 64, 96\].*\[4, 128, 96\] bfloat16"),
    "w13 dtype": (PLAIN, "w13", torch.zeros(4, 128, 96), r"w13 is .*float32.*bfloat16"),
    "w13 device": (PLAIN, "w13", torch.zeros(4, 128, 96, dtype=bf16, device="meta"), r"w13 is .* on meta, expected .*"),
    "w13 strides": (PLAIN, "w13", torch.zeros(4, 96, 128, dtype=bf16).transpose(1, 2), r"w13 is strided"),
    "w2 transposed": (PLAIN, "w2", torch.zeros(4, 64, 96, dtype=bf16), r"w2 is \[4, 64, 96\].*\[4, 96, 64\]"),
    "w13 not packed": (INT4, "w13", torch.zeros(4, 128, 96, dtype=torch.uint8), r"w13 is .*\[4, 128, 48\] uint8"),
    "weights' tokens": (PLAIN, "topk_weights", torch.zeros(4, 2), r"topk_weights is \[4, 2\].*\[3, 2\]"),
    "weights' dtype": (PLAIN, "topk_weights", torch.zeros(3, 2).double(), r"topk_weights is .*float64.*float32 or"),
    "ids' slots": (PLAIN, "topk_ids", torch.zeros(3, 3, dtype=torch.int32), r"topk_ids is \[3, 3\].*\[3, 2\]"),
    "ids' dtype": (PLAIN, "topk_ids", torch.zeros(3, 2, dtype=torch.int16), r"topk_ids is .*int16.*int32 or int64"),
    "no scale": (QUANTISED, "w13_scale", None, r"w13_scale is None, expected .*\[4\] float32"),
    "scale shape": (BLOCKS, "w13_scale", torch.zeros(4, 3, 2), r"w13_scale is \[4, 3, 2\].*\[4, 4, 2\]"),
    "second scale": (BLOCKS, "w2_scale", torch.zeros(4, 2, 1), r"w2_scale is \[4, 2, 1\].*\[4, 2, 2\] float32"),
    "scale dtype": (BLOCKS, "w13_scale", torch.zeros(4, 4, 2, dtype=bf16), r"w13_scale is .*bfloat16.*float32"),
    "a scale unasked": (PLAIN, "w2_scale", torch.zeros(4), r"w2_scale was passed, expected None.*weight_quant=none"),
    "no given scale": (QUANTISED, "a13_scale", None, r"a13_scale is None, expected \[1\] or scalar float32"),
    "given scale's size": (QUANTISED, "a2_scale", torch.zeros(2), r"a2_scale is \[2\].*\[1\] or scalar"),
    "a given scale unasked": (BLOCKS, "a2_scale", torch.zeros(1), r"a2_scale was passed.*act_quant=fp8_block"),
    "no bias": (QUANTISED, "w2_bias", None, r"w2_bias is None, expected .*\[4, 96\]"),
    "bias shape": (QUANTISED, "w13_bias", torch.zeros(4, 96), r"w13_bias is \[4, 96\].*\[4, 128\]"),
    "a bias unasked": (PLAIN, "w13_bias", torch.zeros(4, 128), r"w13_bias was passed.*has_bias=False"),
    "no map": (QUANTISED, "expert_map", None, r"expert_map is None.*int32 or int64"),
    "map dtype": (QUANTISED, "expert_map", torch.zeros(32), r"expert_map is .*float32.*int32 or int64"),
    "a map unasked": (PLAIN, "expert_map", torch.arange(4), r"expert_map was passed.*expert_parallel=False"),
    "no out": (QUANTISED, "out", None, r"out is missing, dispatched with output_alias=True"),
    "out's dtype": (QUANTISED, "out", torch.zeros(3, 96), r"out is .*float32.*\[3, 96\] bfloat16"),
    "out's rows": (QUANTISED, "out", lambda device: torch.zeros(96, dtype=bf16, device=device).expand(3, 96),
                   r"rows of out overlap"),
    "an out unasked": (PLAIN, "out", torch.zeros(3, 96, dtype=bf16), r"out was passed.*output_alias=False"),
}
POSITIONAL = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids")


@pytest.mark.parametrize("about", BAD)
def test_refused(about, device):
    traits, argument, value, message = BAD[about]
    for name in implementations(traits, 3):
        args, kwargs = cases.inputs(traits, 3, device=device)
        given = {**dict(zip(POSITIONAL, args)), **kwargs}
        kernel(name, traits, 3)(**given)  # as they are, they are right
        if callable(value):  # a move to another device would change its strides
            given[argument] = value(device)
        else:
            on_device = isinstance(value, torch.Tensor) and value.device.type == "cpu"
            given[argument] = value.to(device) if on_device else value
        with pytest.raises(InputError, match=message):
            kernel(name, traits, 3)(**given)


@pytest.mark.parametrize("change, relation", [
    (dict(weight_quant="fp8_block"), "fp8_block"), (dict(act_quant="fp8_token"), "fp8_channel"),
    (dict(weight_quant="int8_w8a16", act_quant="int8_token"), "int8_channel"),
    (dict(weight_quant="fp8_block", act_quant="fp8_token"), "fp8_block"),
    (dict(group_size=64), "group_size"), (dict(weight_quant="int4_w4a16", hidden_size=95), "hidden_size % 2"),
    (dict(dtype="float64"), "dtype"), (dict(apply_router_weight_on_input=True), "topk == 1"),
    (dict(topk=5), "topk <= num_experts")])
def test_traits_that_contradict_each_other(change, relation):
    with pytest.raises(TraitError, match=relation):
        registry.dispatch(OP, **{**PLAIN, **change})


@pytest.mark.parametrize("format", FORMATS)
def test_every_pair_of_formats_is_a_call(format):
    assert registry.dispatch(OP, **layer(format=format)).traits["weight_quant"] == FORMATS[format][0]


# ---- what tests, verify, bench and run are given ---------------------------------------------------------------------

@pytest.mark.parametrize("name", cases.WORKLOADS)
def test_reduced_workloads_keep_what_is_difficult(name):
    real = cases.WORKLOADS[name]
    small = cases.reduced(real)
    changed = {key for key in real if small[key] != real[key]}
    assert changed <= {"num_experts", "hidden_size", "intermediate_size"} and changed
    assert small["num_experts"] > small["topk"] == real["topk"]
    for size in ("hidden_size", "intermediate_size"):
        assert small[size] % 128 == real[size] % 128 and small[size] > 128
    assert cases.reduced(small) == small  # once is enough
    registry.dispatch(OP, **small)


def test_a_small_layer_is_not_reduced():
    assert cases.reduced(PLAIN) == PLAIN and cases.reduced(BLOCKS) is not BLOCKS


def test_inputs_depend_on_the_seed_alone():
    traits = layer(format="fp8_block", has_bias=True)
    one, same, other = (cases.inputs(traits, 9, seed=seed) for seed in (1, 1, 2))
    for (args, kwargs), equal in ((same, True), (other, False)):
        for a, b in zip((*one[0], *one[1].values()), (*args, *kwargs.values())):
            assert torch.equal(a.float(), b.float()) == equal


def test_a_prefix_is_a_call_of_its_first_rows():
    traits = layer(expert_parallel=True, output_alias=True)
    args, kwargs = cases.inputs(traits, 9)
    args, kwargs, got = cases.prefix(args, kwargs, kernel("torch", traits)(*args, **kwargs), 4)
    kwargs["out"] = torch.full_like(kwargs["out"], float("nan"))
    again = kernel("torch", traits)(*args, **kwargs)
    assert again.shape == (4, 96) and torch.allclose(again.float(), got.float(), rtol=1e-2, atol=1e-3)


def test_flavours_are_what_they_say():
    traits = layer(16, 2, 96, 64, expert_parallel=True)

    def rows(flavour, **more):
        (hidden, _, _, weights, ids), kwargs = cases.inputs({**traits, **more}, 200, flavour=flavour, seed=1)
        known = (ids >= 0) & (ids < len(kwargs["expert_map"]))
        return hidden, weights, ids, torch.where(known, kwargs["expert_map"][ids.clamp(0, 127).long()], -1)

    assert set(rows("none_local")[3].flatten().tolist()) == {-1}
    assert {len(set(row.tolist()) - {-1}) for row in rows("one_expert")[3]} == {1}
    assert len(rows("one_expert")[3].unique()) == 2
    hidden, weights, ids, _ = rows("padded")
    assert torch.equal(hidden.isnan().all(1), (ids == -1).all(1)) and hidden.isnan().any()
    assert torch.equal(weights.isnan().all(1), (ids == -1).all(1))
    wrapped = rows("invalid_ids")[2]  # int64 for odd seeds
    assert ((wrapped >= 2**32) & (wrapped % 2**32 < 128)).any()
    most = rows("skewed")[2].flatten().bincount().max()
    assert most > 4 * rows("random")[2].flatten().bincount().max()


# ---- torch.ops ------------------------------------------------------------------------------------------------------

def test_the_torch_op(device):
    import kernel_registry.torch_ops  # noqa: F401

    op = torch.ops.kernel_registry.moe_experts
    for traits in (layer(has_bias=True, expert_parallel=True), layer(format="fp8_block", activation="gelu")):
        args, kwargs = cases.inputs(traits, 9, device=device)
        words = {name: traits[name] for name in ("weight_quant", "act_quant", "activation")}
        expected = registry.dispatch(OP, **traits)(*args, **kwargs)
        assert torch.equal(op(*args, **kwargs, **words), expected)
        compiled = torch.compile(lambda *a, **k: op(*a, **k, **words) + 1, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*args, **kwargs), expected + 1)


def test_the_torch_op_is_described_truly():
    import kernel_registry.torch_ops  # noqa: F401

    args, kwargs = cases.inputs(layer(has_bias=True), 5)
    torch.library.opcheck(torch.ops.kernel_registry.moe_experts.default, args, kwargs,
                          test_utils=("test_schema", "test_faketensor"))
