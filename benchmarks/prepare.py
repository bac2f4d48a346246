"""What load-time preparation of DeepSeek-V3.2 costs: the biases of 58 routers and the indexers of 61 layers.

    python benchmarks/prepare.py [--device cuda] [--format fp8_block|none] [--runs 3]

Shards with the indexers' tensors (fp8 with a scale for each 128 x 128 block, or bfloat16) are written to a temporary
folder and stay in the system's cache. A line of JSON a run, in seconds:

    read      every tensor of the shards, once, by safetensors alone
    load      Loader.load_files and finish(): reading, dequantisation, rows, the proof that none is missing, the tags
    biases    registry.prepare of moe.routing_bias for the whole model
    extra     bytes at the most beside the model, over those of one layer's fused weight; on CUDA only
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kernel_registry import registry
from kernel_registry.ops.indexer.wk_weights_proj.loader import OP, Loader
from kernel_registry.ops.indexer.wk_weights_proj.module import FusedProjection

LAYERS, DENSE, SHARDS, EXPERTS = 61, 3, 8, 256
SIZES = dict(hidden_size=7168, head_dim=128, num_heads=64)
ROUTER = dict(num_experts=EXPERTS, topk=8, num_expert_group=8, topk_group=4, dtype="bfloat16", bias_dtype="float32")


def write(folder: Path, wk_format: str) -> list[Path]:
    shards = [{} for _ in range(SHARDS)]
    for layer in range(LAYERS):
        name, own = f"layers.{layer}.indexer", shards[layer * SHARDS // LAYERS]
        wk = torch.randn(SIZES["head_dim"], SIZES["hidden_size"])
        if wk_format == "fp8_block":
            own[f"{name}.wk.weight"] = wk.to(torch.float8_e4m3fn)
            own[f"{name}.wk.weight_scale_inv"] = torch.rand(1, SIZES["hidden_size"] // 128) / 50
        else:
            own[f"{name}.wk.weight"] = wk.bfloat16()
        own[f"{name}.weights_proj.weight"] = torch.randn(SIZES["num_heads"], SIZES["hidden_size"]).bfloat16()
    paths = [folder / f"model-{number:05}.safetensors" for number in range(SHARDS)]
    for path, tensors in zip(paths, shards):
        save_file(tensors, path)
    return paths


def made(traits, device) -> nn.Module:
    kernel, model = registry.bind(OP, **traits), nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(LAYERS))
    for number, layer in enumerate(model.layers):
        layer.indexer = nn.Module()
        layer.indexer.wk_weights_proj = FusedProjection(kernel, **traits, device=device)
        if number >= DENSE:
            layer.gate = nn.Module()
            layer.gate.e_score_correction_bias = nn.Parameter(torch.randn(EXPERTS, device=device), requires_grad=False)
    return model


def clock(what, device) -> float:
    begin = time.perf_counter()
    what()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - begin, 3)


def read(paths) -> int:
    total = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).view(torch.uint8).sum().item() for name in file.keys())
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--format", default="fp8_block", choices=("fp8_block", "none"))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    traits = dict(**SIZES, wk_format=args.format)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), args.format)
        for _ in range(args.runs):
            model = made(traits, args.device)
            loader = Loader(model)
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            row = dict(device=args.device, format=args.format, read=clock(lambda: read(paths), "cpu"),
                       load=clock(lambda: (loader.load_files(paths), loader.finish(registry)), args.device),
                       biases=clock(lambda: registry.prepare("moe.routing_bias", model, **ROUTER), args.device))
            if args.device == "cuda":
                row["extra"] = round((torch.cuda.max_memory_allocated() - before) /
                                     model.layers[0].indexer.wk_weights_proj.weight.nbytes, 2)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
