"""Who else holds a bias, by whatever way: each is either kept in step with it, or named and the preparation refused."""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch

from kernel_registry.errors import PreparationError
from kernel_registry.ops.moe.routing_bias import in_place

OP, NAME = "moe.routing_bias", "e_score_correction_bias"
EXPERTS = 64
TO_BF16 = dict(num_experts=EXPERTS, topk=4, num_expert_group=4, topk_group=2, dtype="bfloat16", bias_dtype="bfloat16")
ODD = torch.full((EXPERTS,), 1 + 2.0**-9)  # no value of bfloat16


def parameter(*shape) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(torch.Size(shape or (EXPERTS,)).numel()).float().reshape(shape or (-1,)),
                              requires_grad=False)


def gate(bias=None) -> torch.nn.Module:
    module = torch.nn.Module()
    module.e_score_correction_bias = parameter() if bias is None else bias
    return module


def model(*gates) -> torch.nn.Module:
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList(gates or (gate(), gate()))
    return module


# ---- views -----------------------------------------------------------------------------------------------------------

def test_two_parameters_of_one_storage_are_not_torn_apart(registry):
    first = gate()
    tied = model(first, gate(torch.nn.Parameter(first.e_score_correction_bias.data, requires_grad=False)))
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} is a view of layers.0.{NAME}"):
        registry.prepare(OP, tied, **TO_BF16)
    assert {bias.dtype for bias in tied.parameters()} == {torch.float32}


def test_rows_that_are_parameters_of_the_same_name_are_not_torn_off(registry):
    both = parameter(2, EXPERTS)
    rows = model(gate(both), *(gate(torch.nn.Parameter(row, requires_grad=False)) for row in both.data))
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} is a view of .*; layers.2.{NAME} is a view of"):
        registry.prepare(OP, rows, **TO_BF16)


class Slotted:
    __slots__ = ("row",)

    def __init__(self, row):
        self.row = row


@pytest.mark.parametrize("hold, name", [
    (Slotted, "what a Slotted holds"),
    (lambda row: functools.partial(print, row), "item 0 of a tuple|what a partial holds"),
    (lambda row: [None, row], "item 1 of a list"),
    (lambda row: lambda: row, rf"a tensor \[{EXPERTS - 3}\] torch.float32"),
    (lambda row: row.numpy(), rf"a tensor \[{EXPERTS - 3}\] torch.float32"),
], ids=["slots", "partial", "list", "closure", "array"])
def test_a_view_that_has_no_name_is_described(registry, hold, name):
    bias = parameter()
    held = hold(bias.data[3:])
    with pytest.raises(PreparationError, match=f"({name}) is a view of correction_bias"):
        registry.prepare(OP, bias, **TO_BF16)
    assert bias.dtype == torch.float32 and held is not None
    del held
    registry.prepare(OP, bias, **TO_BF16)
    assert bias.dtype == torch.bfloat16


def test_a_view_among_frozen_objects_is_found(registry):
    """Servers freeze what they loaded, which hides it from the collector."""
    bias = parameter()
    elsewhere = {"row": bias[3:]}
    gc.freeze()
    try:
        with pytest.raises(PreparationError, match="'row' in a dict is a view of correction_bias"):
            registry.prepare(OP, bias, **TO_BF16)
        assert gc.get_freeze_count()
        elsewhere.clear()
        registry.prepare(OP, bias, **TO_BF16)
    finally:
        gc.unfreeze()
    assert bias.dtype == torch.bfloat16
    registry.prepare(OP, parameter(), **TO_BF16)
    assert not gc.get_freeze_count()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_a_storage_are_nobodys_view(registry):
    kept = torch.nn.LazyLinear(3), torch.eye(3).to_sparse()  # a lazy one raises ValueError, a sparse one another
    bias = registry.prepare(OP, parameter(), **TO_BF16)
    assert bias.dtype == torch.bfloat16 and kept


# ---- all or nothing --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", ["_distinct", "changed_tokens"])
def test_a_failure_on_the_way_leaves_every_bias_as_it_was(registry, step, monkeypatch):
    two = model(gate(), gate(torch.nn.Parameter(ODD.clone(), requires_grad=False)))
    pointers = [bias.data_ptr() for bias in two.parameters()]
    works, calls = getattr(in_place, step), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == {"_distinct": 4, "changed_tokens": 1}[step]:
            raise RuntimeError("out of memory")
        return works(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(in_place, step, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            registry.prepare(OP, two, **TO_BF16, narrow=True)
    assert [(bias.dtype, bias.data_ptr()) for bias in two.parameters()] == [(torch.float32, p) for p in pointers]
    take = registry.bind(OP, **TO_BF16)
    with pytest.raises(PreparationError, match="correction_bias is not prepared"):
        take(two.layers[0].e_score_correction_bias)


def test_a_load_that_is_refused_has_written_nothing(registry):
    two = model()
    registry.prepare(OP, two, **TO_BF16)
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} would go from float32 to bfloat16"):
        two.load_state_dict({f"layers.0.{NAME}": torch.zeros(EXPERTS), f"layers.1.{NAME}": ODD})
    for bias in two.parameters():
        assert torch.equal(bias.float(), parameter().data)


def test_a_load_into_a_part_of_the_model_is_refused_too(registry):
    two = model()
    registry.prepare(OP, two, **TO_BF16)
    for part, name in ((two.layers, f"1.{NAME}"), (two.layers[1], NAME)):
        with pytest.raises(PreparationError, match=f"{name} would go"):
            part.load_state_dict({name: ODD}, strict=False)
    registry.prepare(OP, two.layers[1], **TO_BF16, narrow=True)  # of the part alone: the model's own look stays
    two.layers[1].load_state_dict({NAME: ODD})
    assert torch.equal(two.layers[1].e_score_correction_bias, ODD.bfloat16())
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} would go"):
        two.load_state_dict({f"layers.1.{NAME}": ODD}, strict=False)


def test_preparing_one_again_leaves_the_guard_of_the_others(registry):
    two = model()
    registry.prepare(OP, two, **TO_BF16)
    registry.prepare(OP, two, **TO_BF16, name=f"0.{NAME}", narrow=True)
    two.load_state_dict({f"layers.0.{NAME}": ODD}, strict=False)
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} would go"):
        two.load_state_dict({f"layers.1.{NAME}": ODD}, strict=False)
    assert len(two._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("alias", ["experts.correction", f"experts.{NAME}"])
def test_a_load_under_another_of_its_names_is_refused_too(registry, alias):
    layer = torch.nn.Module()
    layer.gate, layer.experts = gate(), torch.nn.Module()
    setattr(layer.experts, alias.partition(".")[2], layer.gate.e_score_correction_bias)
    assert [*registry.prepare(OP, layer, **TO_BF16)] == [f"gate.{NAME}"]
    with pytest.raises(PreparationError, match=f"{alias} would go"):
        layer.load_state_dict({alias: ODD}, strict=False)
    with pytest.raises(PreparationError, match=f"gate.{NAME} would go"):
        layer.load_state_dict({f"gate.{NAME}": ODD}, strict=False)


def test_what_the_guard_has_no_business_with(registry):
    two = model()
    registry.prepare(OP, two, **TO_BF16)
    with pytest.raises(RuntimeError, match="size mismatch"):  # torch's own error, which says what is wrong
        two.load_state_dict({f"layers.0.{NAME}": ODD[:3]}, strict=False)
    two.load_state_dict({f"layers.0.{NAME}": torch.ones(EXPERTS).to(torch.float8_e4m3fn)}, strict=False)
    assert torch.equal(two.layers[0].e_score_correction_bias, torch.ones(EXPERTS).bfloat16())
    copied = copy.deepcopy(two)
    del two.layers[1].e_score_correction_bias
    two.load_state_dict({f"layers.1.{NAME}": ODD}, strict=False)
    with pytest.raises(PreparationError, match=f"layers.1.{NAME} would go"):  # a copy has its own guard
        copied.load_state_dict({f"layers.1.{NAME}": ODD}, strict=False)


class Sharded(torch.nn.Parameter):
    """A parameter class of a serving engine's own, with what its loader needs."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_parameter_of_another_class_keeps_it(registry):
    bias = Sharded(parameter().data, requires_grad=False)
    bias.weight_loader = loader = object()
    layer, take = gate(bias), registry.bind(OP, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16)
    assert layer.e_score_correction_bias is bias is take(bias) and type(bias) is Sharded
    assert bias.weight_loader is loader and bias.dtype == torch.bfloat16
