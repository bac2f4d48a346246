"""registry.prepare for indexer.wk_weights_proj: what it takes, and that kernels take nothing else."""

from __future__ import annotations

import pytest
import torch
from indexer_support import HOST, SIZES, layer, model, quantised, same
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError, PreparationError
from kernel_registry.ops.indexer.wk_weights_proj import cases
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection, SeparateProjection, projection
from kernel_registry.preparation import preparation_of

OP = "indexer.wk_weights_proj"
TRAITS = layer(256, 32, 16)


@pytest.fixture
def bound():
    return registry.bind(OP, **TRAITS, **HOST)


def calls(tokens=5, **traits):
    (x, *weights), kwargs = cases.inputs({**TRAITS, **traits}, tokens)
    return x, weights, kwargs


def test_a_weight_is_refused_until_it_is_prepared(bound):
    x, (weight,), _ = calls()
    with pytest.raises(PreparationError, match="weight is not prepared.*wk_weights_proj"):
        bound(x, weight)
    prepared = registry.prepare(OP, weight, **TRAITS)
    assert prepared is weight
    k, head_weights = bound(x, prepared)
    assert k.shape == (5, 32) and head_weights.shape == (5, 16)
    with pytest.raises(PreparationError, match="is not prepared"):
        bound(x, weight.clone())


def test_another_layers_preparation_is_none(bound):
    """As many rows, split elsewhere: the shapes alone would let it pass."""
    x, (weight,), _ = calls()
    registry.prepare(OP, weight, **{**TRAITS, "head_dim": 16, "num_heads": 32})
    with pytest.raises(PreparationError, match="is prepared for .*head_dim=16, num_heads=32"):
        bound(x, weight)


@pytest.mark.parametrize("wrong", [torch.zeros(47, 256, dtype=torch.bfloat16), torch.zeros(48, 256)])
def test_a_tensor_that_is_no_fused_weight(wrong):
    with pytest.raises(CheckpointError, match=r"weight is \[4[78], 256\].*expected \[48, 256\] bfloat16"):
        registry.prepare(OP, wrong, **TRAITS)
    assert preparation_of(wrong) is None


def test_an_indexers_modules_become_a_projection(bound):
    indexer = nn.Module()
    indexer.wk = nn.Linear(256, 32, bias=False, dtype=torch.bfloat16)
    indexer.weights_proj = nn.Linear(256, 16, bias=False, dtype=torch.bfloat16)
    made = registry.prepare(OP, indexer, kernel=bound, **TRAITS)
    assert isinstance(made, FusedProjection)
    assert preparation_of(made) and preparation_of(made.weight) and preparation_of(indexer.wk.weight) is None
    x, _, _ = calls()
    assert same(torch.cat(made(x), -1), torch.cat(bound(x, registry.prepare(OP, torch.cat(
        [indexer.wk.weight, indexer.weights_proj.weight]).detach(), **TRAITS)), -1))


def test_finish_prepares_what_was_loaded_and_a_reload_keeps_it():
    traits = {**SIZES, "wk_format": "fp8_block"}
    made = model(layers=(0, 1), **traits)
    for number in (0, 1):
        made.layers[str(number)].indexer.wk_weights_proj.kernel = registry.bind(OP, **traits, **HOST)
    x = torch.randn(3, SIZES["hidden_size"]).bfloat16()
    own = made.layers["1"].indexer.wk_weights_proj
    loader = Loader(made)
    for seed in (0, 1):
        weight, scale, plain = quantised(SIZES["head_dim"], SIZES["hidden_size"], "fp8_block", seed)
        heads = torch.randn(SIZES["num_heads"], SIZES["hidden_size"]).bfloat16()
        for number in (0, 1):
            name = f"layers.{number}.indexer"
            loader.load_weights([(f"{name}.wk.weight", weight), (f"{name}.weights_proj.weight", heads)])
            if seed == 0 and number == 0:
                with pytest.raises(PreparationError, match="is not prepared"):
                    own(x)
            loader.load_weights([(f"{name}.wk.weight_scale_inv", scale)])
        if seed == 0:
            loader.finish(registry)
        assert same(own.weight, torch.cat([plain, heads]))
        assert own(x)[0].shape == (3, SIZES["head_dim"])
    loader.finish(registry)


def test_a_projection_that_is_not_filled_or_another():
    made = projection(None, **TRAITS)
    with pytest.raises(CheckpointError, match="unwritten rows of weight .wk.weight.: 0..31"):
        registry.prepare(OP, made, **TRAITS)
    assert preparation_of(made) is None and preparation_of(made.weight) is None
    with pytest.raises(CheckpointError, match="made with other traits: head_dim=32 for 16, num_heads=16 for 32"):
        registry.prepare(OP, made, **{**TRAITS, "head_dim": 16, "num_heads": 32})


def test_a_model_that_holds_filled_projections():
    """No copies beside them: the model's own are prepared, and an indexer's one by its name in it."""
    made = model(layers=(0, 1), without=(), **SIZES)
    own = {f"layers.{n}.indexer.wk_weights_proj": made.layers[str(n)].indexer.wk_weights_proj for n in (0, 1)}
    with pytest.raises(CheckpointError, match="layers.1.indexer.wk_weights_proj: unwritten"):
        registry.prepare(OP, made, **layer(**SIZES))
    with torch.no_grad():
        for projection_ in own.values():
            projection_.weight.fill_(1)
    with pytest.raises(CheckpointError, match="layers.0.indexer.wk_weights_proj was made with other traits: hidden"):
        registry.prepare(OP, made, **{**layer(**SIZES), "hidden_size": 1024})
    assert not any(preparation_of(projection_.weight) for projection_ in own.values())
    assert registry.prepare(OP, made, **layer(**SIZES)) == own
    assert all(preparation_of(projection_.weight) for projection_ in own.values())


def test_a_weight_that_was_not_written():
    weight = torch.zeros(48, 256, dtype=torch.bfloat16)
    weight[47, 3] = float("nan")
    with pytest.raises(CheckpointError, match="weight has NaN: a row that no checkpoint wrote"):
        registry.prepare(OP, weight, **TRAITS)
    assert preparation_of(weight) is None


def test_nvfp4_keeps_two_and_is_checked_as_well():
    traits = {**TRAITS, "wk_format": "nvfp4"}
    kernel = registry.bind(OP, **traits, **HOST)
    x, (wk, weights_proj), kwargs = calls(wk_format="nvfp4")
    with pytest.raises(PreparationError):
        kernel(x, wk, weights_proj, **kwargs)
    made = registry.prepare(OP, {"wk.weight": wk, "wk.weight_scale": kwargs["wk_scale"],
                                 "wk.weight_scale_2": kwargs["wk_global_scale"],
                                 "weights_proj.weight": weights_proj}, kernel=kernel, **traits)
    assert isinstance(made, SeparateProjection)
    expected = kernel(x, registry.prepare(OP, wk, **traits), weights_proj, **kwargs)
    assert all(map(same, made(x), expected))


def test_plans_and_explanations_say_so():
    assert "prepare:prepare" in str(registry.explain(OP, **TRAITS, num_tokens=1, platform="sm_90"))
