"""What the projection's loader finds missing, and everything that it must refuse."""

from __future__ import annotations

import pytest
import torch
from indexer_checkpoints import HEAD_DIM, HEADS, HIDDEN, checkpoint, plain, state, untouched
from indexer_support import SIZES, layer, model, same, weight
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection

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
