"""The projection's modules: which takes what, nvfp4 that is kept as it is, and what prepare takes."""

from __future__ import annotations

import itertools

import pytest
import torch
from indexer_checkpoints import HEAD_DIM, HEADS, HIDDEN, checkpoint, plain
from indexer_support import SIZES, Indexer, layer, same
from torch import nn

from kernel_registry import registry
from kernel_registry.errors import CheckpointError
from kernel_registry.ops.indexer.wk_weights_proj import oracle, reference
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection, SeparateProjection
from kernel_registry.ops.indexer.wk_weights_proj.prepare import prepare


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
