"""The loader on real safetensors files: shards as published ones are cut, and ones that are damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from indexer_checkpoints import HEAD_DIM, HIDDEN, checkpoint
from indexer_support import bits, layer, model, same, weight

from kernel_registry import registry
from kernel_registry.errors import CheckpointError
from kernel_registry.ops.indexer.wk_weights_proj import oracle
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader

save_file = pytest.importorskip("safetensors.torch").save_file
FORMATS = [("none", None), ("fp8_block", torch.float32), ("fp8_block", torch.float8_e8m0fnu),
           ("fp8_channel", torch.float32), ("mxfp8", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)]


def shards(folder, layers, count, seed=0, others=True, **form):
    """Files that hold these layers, their tensors dealt out at random beside a model's other ones; the weights."""
    tensors, expected = {}, {}
    for number in layers:
        more, expected[number] = checkpoint(prefix=f"layers.{number}.indexer.", seed=number, **form)
        tensors.update(more)
        if others:
            tensors[f"layers.{number}.indexer.wk_norm.weight"] = torch.full((4,), 3.0)
            tensors[f"layers.{number}.indexer.wkv.weight"] = torch.full((4, 4), 4.0)
            tensors[f"layers.{number}.mlp.gate.weight"] = torch.ones(3, 3)
    drawn, dealt = random.Random(seed), [{} for _ in range(count)]
    for name, tensor in tensors.items():
        drawn.choice(dealt)[name] = tensor.contiguous()
    paths = []
    for number, some in enumerate(dealt):
        paths.append(folder / f"model-{number + 1:05}-of-{count:05}.safetensors")
        save_file(some, paths[-1])
    return paths, expected


@pytest.mark.parametrize("fused, both", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("wk_format, scale_dtype", FORMATS)
def test_shards_in_any_order(wk_format, scale_dtype, fused, both, tmp_path):
    form = dict(wk_format=wk_format, scale_dtype=scale_dtype, fused=fused, both=both)
    paths, expected = shards(tmp_path, range(4), 5, **form)
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        made = model((0, 1, 3), (), wk_format=wk_format)  # a stage without layer 2
        loader = Loader(made)
        taken = loader.load_files(paths[:2]) | loader.load_files(paths[2:])
        loader.finish(registry)
        assert not any(".wkv" in name or ".2." in name or "norm" in name for name in taken)
        for number in (0, 1, 3):
            assert same(weight(made, number), expected[number])


def test_what_was_loaded_runs(tmp_path):
    paths, expected = shards(tmp_path, [0], 2, wk_format="fp8_block")
    made = model((0,), wk_format="fp8_block")
    loader = Loader(made)
    loader.load_files(paths)
    loader.finish(registry)
    x = torch.randn(2, 5, HIDDEN).bfloat16()
    got = made.layers["0"].indexer.wk_weights_proj(x)
    assert oracle.check(layer(HIDDEN, HEAD_DIM, 56), (x, expected[0]), {}, got).passed


@pytest.mark.parametrize("kind", [str, Path])
def test_one_file_needs_no_list(kind, tmp_path):
    (path,), expected = shards(tmp_path, [0], 1)
    made = model((0,))
    assert Loader(made).load_files(kind(path)) and same(weight(made, 0), expected[0])
    with pytest.raises(CheckpointError, match="^nothing.safetensors: no safetensors file"):
        Loader(model((0,))).load_files(kind("nothing.safetensors"))


def test_a_bad_shard_is_named(tmp_path):
    paths, expected = shards(tmp_path, [0], 1, others=False)
    bad = tmp_path / "bad.safetensors"
    save_file({"layers.0.indexer.wk.weight": torch.ones(HEAD_DIM, HIDDEN - 1)}, bad)
    made = model((0,))
    loader = Loader(made)
    before = bits(weight(made)).clone()
    with pytest.raises(CheckpointError) as error:
        loader.load_files([bad])
    assert str(error.value).startswith(f"{bad}: layers.0.indexer.wk.weight is [136, 299] float32, expected [136, 300]")
    assert torch.equal(bits(weight(made)), before)
    loader.load_files(paths)
    again = tmp_path / "again.safetensors"
    save_file({"layers.0.indexer.wk.weight": torch.ones(HEAD_DIM, HIDDEN)}, again)
    with pytest.raises(CheckpointError) as error:
        loader.load_files([again])
    assert str(error.value).startswith(f"{again}: layers.0.indexer.wk.weight comes twice, first as "
                                       f"layers.0.indexer.wk.weight of {paths[0]}")
    loader.finish(registry)
    assert same(weight(made), expected[0])


BAD = {  # what a shard's last layer has -> (tensor's name, the tensor, what the message says)
    "shape": ("layers.1.indexer.wk.weight", torch.ones(HEAD_DIM, HIDDEN - 1), "is [136, 299] float32, expected [136, "),
    "dtype": ("layers.1.indexer.wk.weight", torch.ones(HEAD_DIM, HIDDEN, dtype=torch.int16), "is [136, 300] int16, "),
    "unknown dtype": ("layers.1.indexer.wk.weight", torch.ones(2, dtype=torch.complex64), "is [2] C64, expected "),
    "name": ("layers.1.indexer.wk.bias", torch.ones(HEAD_DIM), "is no parameter of this projection, expected "),
    "duplicate": ("layers.0.indexer.wk.weight", torch.ones(HEAD_DIM, HIDDEN), "comes twice, first as layers.0."),
    "both forms": ("layers.0.indexer.wk_weights_proj.weight", torch.ones(192, HIDDEN), "has rows that came as "),
    "scale": ("layers.1.indexer.wk.weight_scale", torch.ones(2, 3), "no scale with wk_format='none'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("reload", [False, True])
def test_a_bad_shard_changes_no_layer_and_can_be_mended(case, reload, tmp_path):
    """The file behind it, and the layers before it in the same file, are as good as never seen."""
    name, bad, told = BAD[case]
    made = model((0, 1))
    loader = Loader(made)
    if reload:
        loader.load_weights([pair for number in (0, 1) for pair in
                             checkpoint(prefix=f"layers.{number}.indexer.", seed=90 + number)[0].items()])
        loader.finish(registry)
    good, expected = tmp_path / "good.safetensors", {}
    tensors = {}
    for number in (0, 1):
        more, expected[number] = checkpoint(prefix=f"layers.{number}.indexer.", seed=number)
        tensors.update(more)
    last = {key: tensors.pop(key) for key in [*tensors] if key.startswith("layers.1.indexer.wk.")}
    save_file(tensors, good)
    second = tmp_path / "second.safetensors"
    save_file({**last, name: bad}, second)
    before = [bits(weight(made, number)).clone() for number in (0, 1)]
    with pytest.raises(CheckpointError) as error:
        loader.load_files([good, second])
    assert str(error.value).startswith(f"{second}: {name} ") and told in str(error.value)
    assert all(torch.equal(bits(weight(made, number)), before[number]) for number in (0, 1))
    save_file(last, second)
    loader.load_files([good, second])
    loader.finish(registry)
    assert all(same(weight(made, number), expected[number]) for number in (0, 1))


@pytest.mark.parametrize("damage", ["cut", "no header", "missing"])
def test_files_that_are_none(damage, tmp_path):
    (path,), _ = shards(tmp_path, [0], 1)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:len(data) // 2] if damage == "cut" else b"nothing of the sort")
    made = model((0,))
    with pytest.raises(CheckpointError) as error:
        Loader(made).load_files([path])
    assert str(path) in str(error.value)
    assert torch.isnan(weight(made)).all()


def test_only_what_is_its_own_is_read(tmp_path, monkeypatch):
    import safetensors

    paths, _ = shards(tmp_path, [0, 1], 2)
    read, original = [], safetensors.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *exc):
            return self.file.__exit__(*exc)

        def keys(self):
            return self.inside.keys()

        def get_slice(self, name):  # of which only the header is asked
            return self.inside.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.inside.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    Loader(model((1,))).load_files(paths)
    assert sorted(read) == ["layers.1.indexer.weights_proj.weight", "layers.1.indexer.wk.weight"]
