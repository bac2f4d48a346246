"""Load-time preparation of a DeepSeek-V3.2-sized model on one GPU: biases and indexers of 61 layers, from files.

    python benchmarks/preparation.py --out FILE.json [--layers 61] [--folder DIR]

Writes the tensors to safetensors files in DIR (a temporary folder by default): wk [128, 7168] in fp8 with a scale for
each 128 x 128 block, weights_proj [64, 7168] in bfloat16, a correction bias [256] in float32. Then, on a fresh model
each time, the median of 5 rounds, in seconds. FILE.json gets the line that is printed, appended.

    reading      every tensor read from the files, and no more
    indexers     Loader.load_files and finish, reading included
    widened      biases from bfloat16 to float32, one registry.prepare for the model; nothing changes value
    narrowed     float32 to bfloat16 with narrow=True, with the report of how many tokens change experts
    preparation  indexers - reading + the slower of the two biases' ways
    extra        bytes on the GPU at the peak of loading, above the model's own, beside those of one layer's projection
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kernel_registry import registry
from kernel_registry.ops.indexer.wk_weights_proj.loader import Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection

OP = "indexer.wk_weights_proj"
INDEXER = dict(hidden_size=7168, head_dim=128, num_heads=64, wk_format="fp8_block")
ROUTER = dict(num_experts=256, topk=8, num_expert_group=8, topk_group=4, dtype="bfloat16")
ROUNDS = 5


def model(layers: int, bias_dtype: torch.dtype, device: str) -> nn.Module:
    made = nn.Module()
    made.layers = nn.ModuleList(nn.Module() for _ in range(layers))
    kernel = registry.bind(OP, **INDEXER)
    for number, layer in enumerate(made.layers):
        layer.indexer, layer.gate = nn.Module(), nn.Module()
        layer.indexer.wk_weights_proj = FusedProjection(kernel, **INDEXER, device=device)
        bias = 6.8 + 0.25 * torch.rand(ROUTER["num_experts"], generator=torch.Generator().manual_seed(number))
        layer.gate.e_score_correction_bias = nn.Parameter(bias.to(device, bias_dtype), requires_grad=False)
    return made


def write(folder: Path, layers: int) -> list[Path]:
    """Four files, a layer's tensors in one of them."""
    generator, shards = torch.Generator().manual_seed(0), [{} for _ in range(4)]
    hidden, rows, heads = INDEXER["hidden_size"], INDEXER["head_dim"], INDEXER["num_heads"]
    for number in range(layers):
        name, shard = f"layers.{number}.indexer", shards[number * len(shards) // layers]
        shard[f"{name}.wk.weight"] = torch.randn(rows, hidden, generator=generator).to(torch.float8_e4m3fn)
        shard[f"{name}.wk.weight_scale_inv"] = torch.rand(rows // 128, hidden // 128, generator=generator) / 50
        shard[f"{name}.weights_proj.weight"] = (torch.randn(heads, hidden, generator=generator) / 50).bfloat16()
    paths = [folder / f"model-{number}.safetensors" for number in range(len(shards))]
    for path, shard in zip(paths, shards):
        save_file(shard, path)
    return paths


def read(paths: list[Path]) -> None:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                file.get_tensor(name).clone()  # a tensor of a mapped file is read when it is copied


def load(made: nn.Module, paths: list[Path]) -> None:
    loader = Loader(made)
    loader.load_files(paths)
    loader.finish(registry)


def timed(call, make) -> float:
    """The median of seconds of `call` on what `make` gives."""
    times = []
    for _ in range(ROUNDS):
        given = make()
        gc.collect()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(given)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 3)


def peak(layers: int, paths: list[Path]) -> int:
    made = model(layers, torch.float32, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load(made, paths)
    return torch.cuda.max_memory_allocated() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = write(Path(folder), args.layers)
        read(paths)
        row = {
            "reading": timed(read, lambda: paths),
            "indexers": timed(lambda made: load(made, paths), lambda: model(args.layers, torch.float32, "cuda")),
            "widened": timed(lambda made: registry.prepare("moe.routing_bias", made, bias_dtype="float32", **ROUTER),
                             lambda: model(args.layers, torch.bfloat16, "cuda")),
            "narrowed": timed(lambda made: registry.prepare("moe.routing_bias", made, bias_dtype="bfloat16",
                                                            narrow=True, **ROUTER),
                              lambda: model(args.layers, torch.float32, "cuda")),
        }
        row["preparation"] = round(row["indexers"] - row["reading"] + max(row["widened"], row["narrowed"]), 3)
        row["extra"], row["layer"] = peak(args.layers, paths), 2 * (128 + 64) * 7168
    row.update(layers=args.layers, gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    print(json.dumps(row))
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
