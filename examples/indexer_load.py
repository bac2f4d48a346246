"""A sparse-attention indexer's fused projection, from safetensors shards to the forward pass.

    python examples/indexer_load.py

Two layers of a DeepSeek-V3.2 with few columns: wk in fp8 with a scale for each 128 x 128 block, weights_proj in
bfloat16, each layer in both shards. A third layer is on another machine. Needs safetensors, and no GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kernel_registry import Registry
from kernel_registry.errors import CheckpointError
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection

registry = Registry(platform="cpu")  # where the tensors are, here; without, it decides for this machine's GPU
OP = "indexer.wk_weights_proj"
TRAITS = dict(hidden_size=320, head_dim=128, num_heads=64, wk_format="fp8_block")


class Indexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wk_weights_proj = FusedProjection(registry.bind(OP, **TRAITS), **TRAITS)


def write_shards(folder: Path) -> list[Path]:
    shards = {"model-00001.safetensors": {}, "model-00002.safetensors": {}}
    first, second = shards.values()
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.indexer"
        second[f"{name}.wk.weight"] = torch.randn(128, 320).to(torch.float8_e4m3fn)
        first[f"{name}.wk.weight_scale_inv"] = torch.rand(1, 3) / 50
        first[f"{name}.weights_proj.weight"] = (torch.randn(64, 320) / 50).bfloat16()
        first[f"{name}.k_norm.weight"] = torch.ones(128)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    return [folder / name for name in shards]


def main() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleDict({
        layer: nn.ModuleDict({"self_attn": nn.ModuleDict({"indexer": Indexer()})}) for layer in "01"})})})
    loader = Loader(model)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder))
        taken = loader.load_files(shards[:1])
        try:
            loader.finish(registry)
        except CheckpointError as error:
            print(str(error).splitlines()[1].strip().replace(folder, "FOLDER"))
        taken |= loader.load_files(shards[1:])
    loader.finish(registry)
    print(f"{len(taken)} tensors taken; the third layer's and k_norm's are left to others")

    projection = model["model"]["layers"]["0"]["self_attn"]["indexer"].wk_weights_proj
    hidden_states = torch.randn(2, 5, 320).bfloat16()
    k, head_weights = projection(hidden_states)
    assert k.untyped_storage().data_ptr() == head_weights.untyped_storage().data_ptr()
    print(f"k {list(k.shape)}, weights {list(head_weights.shape)}: two views of one result")
    for wk_format in ("fp8_block", "nvfp4"):
        chosen = registry.explain(OP, **{**TRAITS, "wk_format": wk_format}).winner
        print(f"wk in {wk_format}: {chosen}")


if __name__ == "__main__":
    main()
