"""moe.routing_bias and the loading of checkpoints: before, after, again, and what is guarded from then on."""

from __future__ import annotations

import copy

import pytest
import torch
from routing_bias_support import EXPERTS, NAME, OP, ROUTER, TO_BF16, Layer, band, exact, same_bits, untouched

from kernel_registry.errors import PreparationError


def write_torch(path, tensors):
    torch.save(tensors, path)


def read_torch(path):
    return torch.load(path, weights_only=True)


def write_safetensors(path, tensors):
    pytest.importorskip("safetensors.torch").save_file(tensors, path)


def read_safetensors(path):
    return pytest.importorskip("safetensors.torch").load_file(path)


@pytest.fixture(params=["safetensors", "torch"])
def checkpoint(request, tmp_path):
    """Writes a bias as a checkpoint of one layer; returns how to read it."""
    write, read = {"safetensors": (write_safetensors, read_safetensors), "torch": (write_torch, read_torch)
                   }[request.param]

    def make(values, name="shard"):
        write(tmp_path / name, {f"gate.{NAME}": values, "gate.weight": torch.ones(EXPERTS, 8)})
        return lambda: read(tmp_path / name)
    return make


def by_copy(layer, tensors):
    """As the loaders of serving engines do it."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


def by_state_dict(layer, tensors):
    layer.load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_before_or_after_loading_gives_the_same_bits(registry, checkpoint, load):
    read = checkpoint(exact(3))
    first, last = Layer(torch.zeros(EXPERTS)), Layer(torch.zeros(EXPERTS))
    registry.prepare(OP, first, **TO_BF16)
    load(first, read())
    load(last, read())
    registry.prepare(OP, last, **TO_BF16)
    a, b = first.gate.e_score_correction_bias, last.gate.e_score_correction_bias
    assert same_bits(a.data, b.data) and same_bits(a.data, exact(3).bfloat16())
    take = registry.bind(OP, **TO_BF16)
    assert take(a) is a and take(b) is b


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_narrowed_before_or_after_loading_gives_the_same_bits(registry, checkpoint, load):
    read = checkpoint(band(3))
    first, last = Layer(torch.zeros(EXPERTS)), Layer(torch.zeros(EXPERTS))
    registry.prepare(OP, first, **TO_BF16, narrow=True)
    load(first, read())
    load(last, read())
    registry.prepare(OP, last, **TO_BF16, narrow=True)
    assert same_bits(first.gate.e_score_correction_bias.data, last.gate.e_score_correction_bias.data)


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_a_reload_keeps_object_storage_dtype_and_tag(registry, checkpoint, load):
    layer, take = Layer(exact()), registry.bind(OP, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16)
    bias = layer.gate.e_score_correction_bias
    pointer = bias.data_ptr()
    load(layer, checkpoint(exact(7))())
    assert layer.gate.e_score_correction_bias is bias is take(bias) and bias.data_ptr() == pointer
    assert same_bits(bias.data, exact(7).bfloat16())


def test_a_later_load_that_would_round_is_refused_too(registry, checkpoint):
    layer, read = Layer(torch.zeros(EXPERTS)), checkpoint(band())
    registry.prepare(OP, layer, **TO_BF16)
    for _ in range(2):
        with pytest.raises(PreparationError, match=f"gate.{NAME} would go from float32 to bfloat16, which changes"):
            by_state_dict(layer, read())
        assert not layer.gate.e_score_correction_bias.any()
        registry.prepare(OP, layer, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16, narrow=True)
    by_state_dict(layer, read())
    assert same_bits(layer.gate.e_score_correction_bias.data, band().bfloat16())
    copied = copy.deepcopy(layer)  # the guard is no obstacle to copying
    by_state_dict(copied, checkpoint(exact(), "other")())


def test_a_parameter_that_was_made_in_the_narrow_dtype_is_guarded(registry, checkpoint):
    layer = Layer(torch.zeros(EXPERTS, dtype=torch.bfloat16))
    registry.prepare(OP, layer, **TO_BF16)
    with pytest.raises(PreparationError, match="would go from float32 to bfloat16"):
        by_state_dict(layer, checkpoint(band())())


def test_a_parameter_on_the_meta_device(registry):
    with torch.device("meta"):
        layer = Layer(torch.empty(EXPERTS))
    bias = layer.gate.e_score_correction_bias
    with pytest.raises(PreparationError, match="before its values are there"):
        registry.prepare(OP, layer, **TO_BF16)
    registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    registry.prepare(OP, layer, **TO_BF16, narrow=True)
    assert layer.gate.e_score_correction_bias is bias and bias.is_meta and bias.dtype == torch.bfloat16
    registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")  # wider: needs no values
    assert bias.dtype == torch.float32


def test_another_parameter_in_its_place_has_to_be_prepared(registry, checkpoint):
    layer, take = Layer(exact()), registry.bind(OP, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16)
    layer.load_state_dict(checkpoint(band())(), strict=False, assign=True)
    assert untouched(layer, band())
    with pytest.raises(PreparationError, match="correction_bias is not prepared"):
        take(layer.gate.e_score_correction_bias)
