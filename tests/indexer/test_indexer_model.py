"""A whole model of 61 layers, from its files to the forward pass, and what loading it needs beside the model."""

from __future__ import annotations

import pytest
import torch
from indexer_support import HOST, SIZES, layer, model, quantised, same, weight
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError, PreparationError
from kernel_registry.ops.indexer.wk_weights_proj import cases, oracle
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection
from kernel_registry.preparation import preparation_of

OP = "indexer.wk_weights_proj"
LAYERS = range(61)
TRAITS = layer(**SIZES, wk_format="fp8_block")


def tensors(number: int, sizes=SIZES):
    """(a layer's tensors by name, its fused weight)."""
    stored, scale, plain = quantised(sizes["head_dim"], sizes["hidden_size"], "fp8_block", number)
    heads = torch.randn(sizes["num_heads"], sizes["hidden_size"],
                        generator=torch.Generator().manual_seed(number)).bfloat16()
    name = f"layers.{number}.indexer"
    return {f"{name}.wk.weight": stored, f"{name}.wk.weight_scale_inv": scale,
            f"{name}.weights_proj.weight": heads}, torch.cat([plain, heads])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(shards, the weights): 61 layers in 7 files, scales and weights in different ones."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder, dealt, expected = tmp_path_factory.mktemp("shards"), [{} for _ in range(7)], {}
    for number in LAYERS:
        some, expected[number] = tensors(number)
        for at, (name, tensor) in enumerate(some.items()):
            dealt[(number + 3 * at) % 7][name] = tensor
        dealt[number % 7][f"layers.{number}.mlp.gate.weight"] = torch.ones(3, 3)
    for number, some in enumerate(dealt):
        save_file(some, folder / f"model-{number + 1:05}-of-00007.safetensors")
    return sorted(folder.iterdir()), expected


def bound(made, layers) -> nn.Module:
    for number in layers:
        made.layers[str(number)].indexer.wk_weights_proj.kernel = registry.bind(OP, **TRAITS, **HOST)
    return made


@pytest.mark.parametrize("stage, without", [(LAYERS, ()), (range(30), (1, 2)), (range(30, 61), range(31, 61, 2))])
def test_from_files_to_the_forward_pass(stage, without, checkpoint):
    """The model, and its two pipeline stages, in which some layers have no indexer."""
    files, expected = checkpoint
    here = [number for number in stage if number not in without]
    made = bound(model(stage, without, **TRAITS), here)
    x = torch.randn(2, 3, SIZES["hidden_size"]).bfloat16()
    loader = Loader(made)
    for file in files:
        with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
            loader.finish(registry)
        loader.load_files([file])
    with pytest.raises(PreparationError, match="weight is not prepared"):
        made.layers[str(here[0])].indexer.wk_weights_proj(x)
    loader.finish(registry)
    for number in here:
        assert same(weight(made, number), expected[number]) and preparation_of(weight(made, number))
    for number in (here[0], here[-1]):
        got = made.layers[str(number)].indexer.wk_weights_proj(x)
        verdict = oracle.check(TRAITS, (x, expected[number]), {}, got)
        assert verdict.passed, verdict.detail


def test_without_files_by_prepare_of_each_layer(checkpoint):
    _, expected = checkpoint
    kernel = registry.bind(OP, **TRAITS, **HOST)
    x, _ = cases.inputs(TRAITS, 2)[0]
    for number in LAYERS:
        prefix = f"layers.{number}.indexer."
        made = registry.prepare(OP, {name.removeprefix(prefix): tensor for name, tensor in tensors(number)[0].items()},
                                kernel=kernel, **TRAITS)
        assert same(made.weight, expected[number]) and preparation_of(made.weight)
        if number % 30 == 0:
            assert oracle.check(TRAITS, (x, expected[number]), {}, made(x)).passed


@pytest.mark.parametrize("first, layers", [(0, 61), (1, 8), (2, 8)])
def test_beside_the_model_there_is_never_more_than_a_layer(first, layers):
    """DeepSeek-V3.2's sizes in layer order, each layer's tensors in three orders: the most bytes of tensors at a time
    that are not the model's own nor the reader's, counted by torch's profiler."""
    sizes = dict(hidden_size=7168, head_dim=128, num_heads=64)
    traits = layer(**sizes, wk_format="fp8_block")
    made = nn.ModuleList(FusedProjection(None, **traits) for _ in range(layers))
    one = [*tensors(0, sizes)[0].items()]
    one = one[first:] + one[:first]
    holder = nn.Module()
    holder.layers = nn.ModuleList(nn.ModuleDict({"indexer": nn.ModuleDict({"wk_weights_proj": m})}) for m in made)
    loader = Loader(holder)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        for number in range(layers):
            loader.load_weights((name.replace("layers.0.", f"layers.{number}."), tensor) for name, tensor in one)
        loader.finish(registry)
    live, most = 0, 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    print(f"{most} bytes, a layer has {made[0].weight.nbytes}")
    assert live == 0 and made[0].weight.nbytes // 4 < most <= made[0].weight.nbytes
