"""The projection's loader: every form of a checkpoint, in any order, and whose names are its own."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from indexer_checkpoints import FORMATS, HEAD_DIM, HEADS, HIDDEN, checkpoint, plain, state, untouched
from indexer_support import SIZES, layer, model, quantised, same, weight
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError, InputError
from kernel_registry.ops.indexer.wk_weights_proj import formats, reference
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection

each_format = pytest.mark.parametrize("wk_format, scale_dtype", FORMATS, ids=lambda value: str(value).split(".")[-1])


# ---- forms -----------------------------------------------------------------------------------------------------------

@each_format
@pytest.mark.parametrize("fused, both", [(False, False), (False, True), (True, False)])
def test_every_form(wk_format, scale_dtype, fused, both):
    made = model(wk_format=wk_format)
    tensors, expected = {}, {}
    for number in (0, 1):
        more, expected[number] = checkpoint(wk_format, scale_dtype, prefix=f"layers.{number}.indexer.", seed=number,
                                            fused=fused, both=both)
        tensors.update(more)
    parameters = [weight(made, number) for number in (0, 1)]
    places = [parameter.data_ptr() for parameter in parameters]
    loader = Loader(made)
    assert loader.load_weights(tensors.items()) == set(tensors)
    loader.finish(registry)
    for number in (0, 1):
        assert same(weight(made, number), expected[number])
        assert weight(made, number) is parameters[number] and parameters[number].data_ptr() == places[number]


@pytest.mark.parametrize("rows, columns", [(192, 7100), (1, 1), (128, 128), (129, 127), (257, 40)])
@pytest.mark.parametrize("wk_format, scale_dtype", FORMATS[1:])
def test_every_number_is_its_own_times_its_blocks_scale(wk_format, scale_dtype, rows, columns):
    stored, scale, exact = quantised(rows, columns, wk_format, 5, scale_dtype=scale_dtype)
    assert same(formats.dequantize_fp8(stored, scale, formats.block_shape(wk_format)).bfloat16(), exact)


def test_the_blocks_are_those_declared():
    """192 rows with 2 scales: the second one begins at row 128, and not in the middle."""
    stored = torch.ones(192, 256).to(torch.float8_e4m3fn)
    values = formats.dequantize_fp8(stored, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (128, 128))
    assert values[:, 0].tolist() == [1.0] * 128 + [3.0] * 64 and values[0].tolist() == [1.0] * 128 + [2.0] * 128
    with pytest.raises(InputError, match=r"scale is \[2, 2\], expected \[\(3, 4\)\]"):
        formats.dequantize_fp8(stored, torch.ones(2, 2), (64, 64))


def test_a_declared_block_of_another_size():
    made = model((0,), wk_format="fp8_block", group_size=64)
    stored, scale, exact = quantised(HEAD_DIM, HIDDEN, "fp8_block", 1, group=64)
    loader = Loader(made)
    loader.load_weights({"layers.0.indexer.wk.weight": stored, "layers.0.indexer.wk.weight_scale_inv": scale,
                         "layers.0.indexer.weights_proj.weight": plain(HEADS)}.items())
    loader.finish(registry)
    assert same(weight(made)[:HEAD_DIM], exact)


@pytest.mark.parametrize("shape", [(HEAD_DIM,), (HEAD_DIM, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_a_scale_for_each_row(shape, name):
    made = model((0,), wk_format="fp8_channel")
    tensors, expected = checkpoint("fp8_channel", scale_name=name)
    tensors[f"layers.0.indexer.wk.{name}"] = tensors[f"layers.0.indexer.wk.{name}"].reshape(shape)
    loader = Loader(made)
    loader.load_weights(tensors.items())
    loader.finish(registry)
    assert same(weight(made), expected)


def test_another_dtype_that_has_all_the_values():
    made = model((0,))
    tensors, expected = checkpoint()
    wider = {name: tensor.float() for name, tensor in tensors.items()}
    loader = Loader(made)
    loader.load_weights(wider.items())
    loader.finish(registry)
    assert same(weight(made), expected)


# ---- order -----------------------------------------------------------------------------------------------------------

def test_every_order_and_every_cut_into_calls():
    """The four tensors of a layer in all orders, between those of another layer, in one to many calls."""
    first, expected = checkpoint("fp8_block", both=True)
    second, other = checkpoint("fp8_block", prefix="layers.1.indexer.", seed=7)
    drawn = random.Random(0)
    for order in itertools.permutations(first):
        rest = list(second)
        drawn.shuffle(rest)
        names = list(order)
        for name in rest:
            names.insert(drawn.randrange(len(names) + 1), name)
        made = model(wk_format="fp8_block")
        loader = Loader(made)
        while names:
            count = drawn.randint(1, 3)
            loader.load_weights((name, {**first, **second}[name]) for name in names[:count])
            del names[:count]
        loader.finish(registry)
        assert same(weight(made), expected) and same(weight(made, 1), other)


def test_a_buffer_that_is_used_again():
    """A reader that yields every tensor in one buffer: what waits for its scale is a copy."""
    made = model((0,), wk_format="fp8_block")
    tensors, expected = checkpoint("fp8_block")
    buffer = torch.zeros(HEAD_DIM * HIDDEN * 2, dtype=torch.uint8)
    loader = Loader(made)
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).flatten()
        buffer[:] = 0x55
        buffer[:len(data)] = data
        loader.load_weights([(name, buffer[:len(data)].view(tensor.dtype).view(tensor.shape))])
    buffer.zero_()
    loader.finish(registry)
    assert same(weight(made), expected)


def test_loading_again():
    """All layers, then one of them: the parameters stay where they are, and half a layer is never written."""
    made = model()
    loader = Loader(made)
    for seed in (0, 50):
        for number in (0, 1):
            tensors, expected = checkpoint(prefix=f"layers.{number}.indexer.", seed=seed + number)
            loader.load_weights(tensors.items())
        loader.finish(registry)
        assert same(weight(made, 1), expected)
    before = state(weight(made))
    tensors, expected = checkpoint(seed=99)
    (first, *rest) = tensors.items()
    loader.load_weights([first])
    assert untouched(weight(made), before)
    with pytest.raises(CheckpointError, match=r"unwritten rows of weight \(weights_proj.weight\): 136..191"):
        loader.finish(registry)
    loader.load_weights(rest)
    loader.finish(registry)
    assert same(weight(made), expected) and weight(made).data_ptr() == before[0]


# ---- names -----------------------------------------------------------------------------------------------------------

STRANGERS = (
    "layers.0.indexer.wkv.weight", "layers.0.indexer.wk_norm.weight", "layers.0.indexer.hawk.proj.weight",
    "layers.0.indexer2.wk.weight", "layers.0.wk.weight", "layers.0.indexer.k.wk.weight", "xlayers.0.indexer.wk.weight",
    "model.layers.0.indexer.wk.weight", "layers.00.indexer.wk.weight", "layers.0.indexer.wk_weights_projx.weight",
    "layers.0.indexer.wk_weights_proj_weights_proj.weight", "layers.0.indexer.wq_b.weight", "wk.weight", "wk", "",
    "layers.2.indexer.wk.weight", "layers.0.indexer.wkweight", "layers.0.indexer", "layers.0.indexer.WK.weight",
    "layers.10.indexer.wk.weight", "layers.0.indexer.weights_proj_weight", "layers.0.indexer.k_norm.weight",
)


def test_names_that_are_not_its_own():
    made = model()
    loader = Loader(made)
    assert loader.load_weights((name, object()) for name in STRANGERS) == set()
    tensors, expected = checkpoint()
    names = [*tensors, *STRANGERS]
    random.Random(1).shuffle(names)
    assert Loader(made).load_weights((name, tensors.get(name)) for name in names) == set(tensors)
    assert same(weight(made), expected)
    others = made.layers["0"].indexer
    assert not torch.isnan(others.wkv.weight).any() and not torch.isnan(others.wk_norm.weight).any()


@pytest.mark.parametrize("leaf", ["bias", "weight_zero_point", "weight.scale", "", "qweight", "weight_scale_2"])
def test_names_below_its_own_that_it_has_not(leaf):
    made = model((0,))
    before = state(weight(made))
    name = f"layers.0.indexer.wk.{leaf}".rstrip(".")
    with pytest.raises(CheckpointError) as error:
        Loader(made).load_weights([(name, plain(HEAD_DIM))], file="shard.safetensors")
    assert str(error.value).startswith(f"shard.safetensors: {name} is no parameter of this projection, expected "
                                       "layers.0.indexer.wk.weight or ")
    assert untouched(weight(made), before)


def test_the_scale_of_quantised_hidden_states_is_not_needed():
    made = model((0,), wk_format="fp8_block")
    tensors, expected = checkpoint("fp8_block")
    tensors["layers.0.indexer.wk.input_scale"] = torch.ones(1)
    loader = Loader(made)
    assert loader.load_weights(tensors.items()) == set(tensors)
    loader.finish(registry)
    assert same(weight(made), expected)


@pytest.mark.parametrize("layers, without", [((1,), ()), ((0, 1), (0,)), ((), ()), ((0, 1), (0, 1))])
def test_stages_and_layers_without_an_indexer(layers, without):
    made = model(layers, without)
    here = [number for number in layers if number not in without]
    loader = Loader(made)
    taken = set()
    for number in (0, 1):
        tensors, expected = checkpoint(prefix=f"layers.{number}.indexer.", seed=number)
        taken |= loader.load_weights(tensors.items())
        if number in here:
            assert same(weight(made, number), expected)
    assert taken == {name for name in taken if int(name.split(".")[1]) in here} and len(taken) == 2 * len(here)
    loader.finish(registry)


def test_a_projection_on_its_own_and_two_in_one_place():
    traits = layer(**SIZES)
    alone = FusedProjection(reference.separate(**traits), **traits)
    tensors, expected = checkpoint(prefix="")
    loader = Loader(alone)
    loader.load_weights(tensors.items())
    loader.finish(registry)
    assert same(alone.weight, expected)
    two = nn.Module()
    two.one, two.other = alone, FusedProjection(None, **traits)
    with pytest.raises(ValueError, match="two projections"):
        Loader(two)
