"""The projection's loader: every form of a checkpoint, in any order, and everything that must be refused."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from indexer_support import SIZES, Indexer, bits, layer, model, quantised, same, weight
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError, InputError
from kernel_registry.ops.indexer.wk_weights_proj import formats, oracle, reference
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection, SeparateProjection
from kernel_registry.ops.indexer.wk_weights_proj.prepare import prepare

HIDDEN, HEAD_DIM, HEADS = SIZES.values()
ROWS = HEAD_DIM + HEADS
FORMATS = [("none", None), ("fp8_block", torch.float32), ("fp8_block", torch.bfloat16),
           ("fp8_block", torch.float8_e8m0fnu), ("fp8_channel", torch.float32), ("fp8_channel", torch.float8_e8m0fnu),
           ("mxfp8", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)]
each_format = pytest.mark.parametrize("wk_format, scale_dtype", FORMATS, ids=lambda value: str(value).split(".")[-1])


def plain(rows=ROWS, seed=0, dtype=torch.bfloat16):
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint(wk_format="none", scale_dtype=torch.float32, *, prefix="layers.0.indexer.", seed=0, fused=False,
               both=False, scale_name="weight_scale_inv"):
    """(tensors by name, the fused bfloat16 weight) of one layer; `both`: weights_proj is quantised too."""
    tensors, parts = {}, []
    for number, (name, rows) in enumerate([("wk_weights_proj", ROWS)] if fused else
                                          [("wk", HEAD_DIM), ("weights_proj", HEADS)]):
        if wk_format == "none" or name == "weights_proj" and not both:
            parts.append(plain(rows, seed + 1000 * number))
            tensors[f"{prefix}{name}.weight"] = parts[-1]
        else:
            stored, scale, exact = quantised(rows, HIDDEN, wk_format, seed + 1000 * number, scale_dtype=scale_dtype)
            tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.{scale_name}"] = stored, scale
            parts.append(exact)
    return tensors, torch.cat(parts)


def untouched(parameter, before) -> bool:
    return parameter.data_ptr() == before[0] and torch.equal(bits(parameter), before[1])


def state(parameter):
    return parameter.data_ptr(), bits(parameter).clone()


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


# ---- what is incomplete ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("left_out, told", [
    ("wk.weight", "layers.0.indexer.wk.weight_scale_inv of a.safetensors has come without its weight"),
    ("wk.weight_scale_inv", "layers.0.indexer.wk.weight of a.safetensors has come without its scale"),
    ("weights_proj.weight", r"unwritten rows of weight (weights_proj.weight): 136..191"),
])
def test_finish_names_what_is_missing(left_out, told):
    made = model((0,), wk_format="fp8_block")
    tensors, expected = checkpoint("fp8_block")
    last = {f"layers.0.indexer.{left_out}": tensors.pop(f"layers.0.indexer.{left_out}")}
    loader = Loader(made)
    loader.load_weights(tensors.items(), file="a.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError) as error:
            loader.finish(registry)
        assert told in str(error.value)
    assert torch.isnan(weight(made)).all()
    loader.load_weights(last.items())
    loader.finish(registry)
    assert same(weight(made), expected)


def test_finish_names_every_projection_that_nothing_came_for():
    made = model((0, 1, 5))
    loader = Loader(made)
    loader.load_weights(checkpoint(prefix="layers.1.indexer.")[0].items())
    with pytest.raises(CheckpointError) as error:
        loader.finish(registry)
    for number in (0, 5):
        assert f"layers.{number}.indexer.wk_weights_proj: unwritten rows of weight (wk.weight): 0..135" in \
            str(error.value)
    assert "layers.1" not in str(error.value)


@pytest.mark.parametrize("rows, told", [([0], "wk.weight): 0"), ([135, 136], "wk.weight): 135"),
                                        ([191], "weights_proj.weight): 191"),
                                        ([3, 4, 9], "wk.weight): 3..4, 9")])
def test_finish_looks_at_the_rows_themselves(rows, told):
    """Whoever left a row unwritten: the proof is NaN in the parameter, not what the loader remembers."""
    made = model((0,))
    loader = Loader(made)
    loader.load_weights(checkpoint()[0].items())
    with torch.no_grad():
        weight(made)[rows] = float("nan")
    with pytest.raises(CheckpointError) as error:
        loader.finish(registry)
    assert told in str(error.value)


# ---- what is refused -------------------------------------------------------------------------------------------------

def nan(tensor):
    tensor = tensor.clone()
    tensor.view(torch.uint8)[1, 5] = 0x7F
    return tensor


WRONG = {  # name -> (format, tensor's name, what it is instead, what the message says)
    "shape": ("none", "wk.weight", plain(HEAD_DIM - 1), r"is [135, 300] bfloat16, expected [136, 300] float32 or "),
    "transposed": ("none", "wk.weight", plain(HEAD_DIM).t(), "is [300, 136] bfloat16, expected [136, 300]"),
    "one dimension": ("none", "weights_proj.weight", plain(HEADS).flatten(), "is [16800] bfloat16"),
    "dtype": ("none", "wk.weight", torch.ones(HEAD_DIM, HIDDEN, dtype=torch.int32), "int32, expected [136, 300] "),
    "float64": ("none", "wk.weight", torch.ones(HEAD_DIM, HIDDEN, dtype=torch.float64), "float64, expected"),
    "other fp8": ("fp8_block", "wk.weight", torch.ones(HEAD_DIM, HIDDEN).to(torch.float8_e5m2), "float8_e5m2, "),
    "undeclared fp8": ("none", "wk.weight", torch.ones(HEAD_DIM, HIDDEN).to(torch.float8_e4m3fn),
                       "float8_e4m3fn, expected [136, 300] float32 or bfloat16 or float16\n  hint: the projection was "
                       "made with wk_format='none'"),
    "undeclared scale": ("none", "wk.weight_scale", torch.ones(2, 3), "no scale with wk_format='none'"),
    "packed": ("none", "wk.weight", torch.zeros(HEAD_DIM, HIDDEN // 2, dtype=torch.uint8), "wk_format='nvfp4'"),
    "narrowing": ("none", "wk.weight", plain(HEAD_DIM, dtype=torch.float32), "of its values change in bfloat16"),
    "NaN": ("none", "wk.weight", torch.full((HEAD_DIM, HIDDEN), float("nan")), "not finite"),
    "infinity": ("none", "wk.weight", torch.full((HEAD_DIM, HIDDEN), float("inf")), "not finite"),
    "no tensor": ("none", "wk.weight", [1.0], "is a list, expected a tensor"),
    "scale's shape": ("fp8_block", "wk.weight_scale_inv", torch.ones(2, 2), "is [2, 2] float32, expected [2, 3] "),
    "scale for channels": ("fp8_block", "wk.weight_scale_inv", torch.ones(HEAD_DIM, 1), "expected [2, 3] "),
    "scale for blocks": ("fp8_channel", "wk.weight_scale", torch.ones(2, 3), "expected [136] or [136, 1] "),
    "scale's dtype": ("fp8_block", "wk.weight_scale_inv", torch.ones(2, 3, dtype=torch.int32), "is [2, 3] int32"),
    "mx scale": ("mxfp8", "wk.weight_scale", torch.ones(HEAD_DIM, 9), "expected [136, 10] "),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("at", ["first", "staged", "loaded"])
def test_a_bad_tensor_changes_nothing(case, at):
    wk_format, name, bad, told = WRONG[case]
    made = model((0,), wk_format=wk_format)
    tensors, expected = checkpoint(wk_format, scale_name="weight_scale" if wk_format == "mxfp8" else "weight_scale_inv")
    name = f"layers.0.indexer.{name}"
    loader = Loader(made)
    if at == "loaded":
        loader.load_weights(tensors.items())
        loader.finish(registry)
    elif at == "staged":
        loader.load_weights((other, tensor) for other, tensor in tensors.items() if other.split(".")[3] !=
                            name.split(".")[3])
    before = state(weight(made))
    with pytest.raises(CheckpointError) as error:
        loader.load_weights([(name, bad)], file="model-00002.safetensors")
    assert str(error.value).startswith(f"model-00002.safetensors: {name} ") and told in str(error.value)
    assert "expected" in str(error.value)
    assert untouched(weight(made), before)
    loader.load_weights((other, tensor) for other, tensor in tensors.items()
                        if at != "staged" or other.split(".")[3] == name.split(".")[3])
    loader.finish(registry)  # the right one instead, after all
    assert same(weight(made), expected)


@pytest.mark.parametrize("weight_first", [True, False])
def test_values_that_are_not_finite_once_scaled(weight_first):
    made = model((0,), wk_format="fp8_block")
    tensors, expected = checkpoint("fp8_block")
    order = ["layers.0.indexer.wk.weight", "layers.0.indexer.wk.weight_scale_inv"]
    first, second = order if weight_first else order[::-1]
    bad = {order[0]: nan(tensors[order[0]]), order[1]: torch.full((2, 3), float("inf"))}[second]
    loader = Loader(made)
    loader.load_weights([(first, tensors[first])])
    with pytest.raises(CheckpointError, match=f"{second} has values that are not finite"):
        loader.load_weights([(second, bad)])
    loader.load_weights((name, tensor) for name, tensor in tensors.items() if name != first)
    loader.finish(registry)
    assert same(weight(made), expected)


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_scale_beside_a_weight_that_needs_none(weight_first):
    made = model((0,), wk_format="fp8_block")
    pair = [("layers.0.indexer.wk.weight", plain(HEAD_DIM)), ("layers.0.indexer.wk.weight_scale_inv", torch.ones(2, 3))]
    first, second = pair if weight_first else pair[::-1]
    loader = Loader(made)
    loader.load_weights([first])
    with pytest.raises(CheckpointError, match="no scale, since .*wk.weight is" if weight_first else
                       "expected float8_e4m3fn, since there is .*wk.weight_scale_inv"):
        loader.load_weights([second])


@pytest.mark.parametrize("wk_format", ["none", "fp8_block"])
def test_what_comes_twice(wk_format):
    made = model((0,), wk_format=wk_format)
    tensors, expected = checkpoint(wk_format)
    loader = Loader(made)
    loader.load_weights(tensors.items(), file="one.safetensors")
    before = state(weight(made))
    for name in tensors:
        with pytest.raises(CheckpointError) as error:
            loader.load_weights([(name, tensors[name] * 1 if wk_format == "none" else tensors[name])], file="two")
        assert str(error.value).startswith(f"two: {name} comes twice, first as {name} of one.safetensors")
    with pytest.raises(CheckpointError, match="wk_weights_proj.weight has rows that came as .*one.safetensors"):
        loader.load_weights([("layers.0.indexer.wk_weights_proj.weight", plain())])
    assert untouched(weight(made), before)
    if wk_format == "fp8_block":
        scale = tensors["layers.0.indexer.wk.weight_scale_inv"]
        with pytest.raises(CheckpointError, match="comes twice"):  # by its other name
            loader.load_weights([("layers.0.indexer.wk.weight_scale", scale)])
    loader.finish(registry)


def test_a_list_is_looked_at_before_it_is_taken():
    """An iterator can't be: there the layers before the bad tensor are written."""
    good, expected = checkpoint()
    bad = {"layers.1.indexer.wk.weight": plain(HEAD_DIM - 1)}
    made = model()
    before = state(weight(made))
    for weights in ({**good, **bad}, {**good, **bad}.items(), [*good.items(), *bad.items()],
                    [*good.items(), ("layers.1.indexer.wk.weight", 1)]):
        loader = Loader(made)
        with pytest.raises(CheckpointError, match="layers.1.indexer.wk"):
            loader.load_weights(weights)
        assert untouched(weight(made), before)
        with pytest.raises(CheckpointError, match=r"unwritten rows of weight \(wk.weight\): 0..135"):
            loader.check()
    with pytest.raises(CheckpointError, match="layers.1.indexer.wk"):
        loader.load_weights(iter([*good.items(), *bad.items()]))
    assert same(weight(made), expected)


def test_modules_built_on_the_meta_device():
    """to_empty leaves memory as it was: it must be NaN before anything is loaded, and nothing is loaded before it."""
    made = model((0, 1)).to("meta")
    loader = Loader(made)
    tensors, expected = checkpoint()
    with pytest.raises(CheckpointError, match="layers.0.indexer.wk.weight has nowhere to go"):
        loader.load_weights(tensors.items())
    with pytest.raises(CheckpointError, match=r"unwritten rows of weight \(wk.weight\): 0..135"):
        loader.finish(registry)
    original = torch.empty_like
    try:  # as memory is that held another model's weights
        torch.empty_like = lambda *args, **kwargs: original(*args, **kwargs).zero_()
        made.to_empty(device="cpu")
    finally:
        torch.empty_like = original
    loader.load_weights(tensors.items())
    with pytest.raises(CheckpointError) as error:
        loader.finish(registry)
    assert "layers.1.indexer.wk_weights_proj: unwritten rows" in str(error.value)
    assert "layers.0" not in str(error.value) and same(weight(made), expected)


def test_a_projection_that_is_called_as_one_of_its_two():
    made = nn.Module()
    made.wk = FusedProjection(None, **layer(**SIZES))
    with pytest.raises(ValueError, match="wk is called as one of the two"):
        Loader(made)


# ---- the modules, nvfp4 and preparation ------------------------------------------------------------------------------

def nvfp4(sizes, seed=0):
    """A layer's tensors as ModelOpt names them, and the arguments of the op that they are."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim, heads = sizes.values()
    wk = torch.randint(0, 256, (head_dim, hidden // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(head_dim, hidden // 16, generator=generator) * 8 + 1).to(torch.float8_e4m3fn)
    tensors = {"wk.weight": wk, "wk.weight_scale": scale, "wk.weight_scale_2": torch.tensor([0.003]),
               "weights_proj.weight": torch.randn(heads, hidden, generator=generator).bfloat16()}
    return tensors, (wk, tensors["weights_proj.weight"]), dict(wk_scale=scale, wk_global_scale=torch.tensor(0.003))


NVFP4 = dict(hidden_size=320, head_dim=24, num_heads=8)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_nvfp4_is_kept_as_it_is(order):
    tensors, arguments, scales = nvfp4(NVFP4)
    traits = layer(**NVFP4, wk_format="nvfp4")
    made = Indexer(**traits)
    loader = Loader(made)
    for at in order:
        with pytest.raises(CheckpointError, match="has not come|unwritten"):
            loader.finish(registry)
        loader.load_weights([list(tensors.items())[at]])
    loader.finish(registry)
    assert isinstance(made.wk_weights_proj, SeparateProjection) and made.wk_weights_proj.wk.dtype is torch.uint8
    x = torch.randn(3, 320).bfloat16()
    got = made.wk_weights_proj(x)
    assert oracle.check(traits, (x, *arguments), scales, got).passed


@pytest.mark.parametrize("name, bad", [
    ("wk.weight", torch.zeros(24, 320).bfloat16()), ("wk.weight_scale", torch.ones(24, 20)),
    ("wk.weight_scale_2", torch.ones(2)), ("weights_proj.weight", torch.zeros(8, 320)),
    ("weights_proj.weight", torch.full((8, 320), float("nan")).bfloat16()),
    ("wk_weights_proj.weight", torch.zeros(32, 320).bfloat16()), ("wk.weight_scale_inv", torch.ones(24, 20)),
    ("weights_proj.weight_scale", torch.ones(8, 20)),
])
def test_what_nvfp4_refuses(name, bad):
    made = Indexer(**layer(**NVFP4, wk_format="nvfp4"))
    with pytest.raises(CheckpointError, match=f"^x: {name} .*expected"):
        Loader(made).load_weights([(name, bad)], file="x")
    assert torch.isnan(made.wk_weights_proj.weights_proj).all()


def test_modules_refuse_what_is_the_others():
    with pytest.raises(ValueError, match="use SeparateProjection"):
        FusedProjection(None, **NVFP4, wk_format="nvfp4")
    with pytest.raises(ValueError, match="use FusedProjection"):
        SeparateProjection(None, **NVFP4)


def test_prepare_takes_tensors_or_an_indexers_modules():
    traits = layer(**SIZES, wk_format="fp8_block")
    tensors, expected = checkpoint("fp8_block", prefix="")
    prepared = prepare(tensors, kernel=reference.separate(**traits), **traits)
    assert same(prepared.weight, expected)
    x = torch.randn(2, 3, HIDDEN).bfloat16()
    assert oracle.check(traits, (x, expected), {}, prepared(x)).passed
    indexer = nn.Module()
    indexer.wk = nn.Linear(HIDDEN, HEAD_DIM, bias=False, dtype=torch.bfloat16)
    indexer.weights_proj = nn.Linear(HIDDEN, HEADS, bias=False, dtype=torch.bfloat16)
    indexer.wk_norm = nn.LayerNorm(4)
    prepared = prepare(indexer, kernel=reference.separate(**traits), **layer(**SIZES))
    assert same(prepared.weight, torch.cat([indexer.wk.weight, indexer.weights_proj.weight]))
    assert same(prepared(x)[0], indexer.wk(x)) and same(prepared(x)[1], indexer.weights_proj(x))
    assert isinstance(prepare(nvfp4(NVFP4)[0], **layer(**NVFP4, wk_format="nvfp4")), SeparateProjection)


@pytest.mark.parametrize("tensors, told", [({}, "no tensors"), ({"wkv.weight": plain()}, "none of wkv.weight"),
                                           ({"wk.weight": plain(HEAD_DIM)}, "unwritten rows")])
def test_prepare_refuses_what_is_not_all_there(tensors, told):
    with pytest.raises(CheckpointError, match=told):
        prepare(tensors, **layer(**SIZES))
