"""Every option set of the Triton kernels, timed at every shape: where the boxes in registry.yaml come from. Most begin
between two of the token counts, where the better option set changes.

    python benchmarks/topk_options.py [--configs dsv3,...] [--tokens 1,...] [--dtypes float32,...] [--out FILE.json]

Prints, per shape, a table of microseconds per call inside a CUDA graph, token counts across and option sets down, and
marks the best of each column. An option set whose results differ in any bit from those of the first is named. The
kernels are compiled first, in as many processes as there are cores, which takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from topk import CONFIGS as COMPARED
from topk import graph_time, inputs, shape, traits

from kernel_registry import registry
from kernel_registry.ops.moe.topk import triton_few_experts, triton_router

CONFIGS = COMPARED | {  # and shapes that no peer is timed at
    "nemotron3": shape(512, 22, scale=5.0),
    "deepseek_v2": shape(160, 6, G=8, TG=3, scoring="softmax", bias=False, renormalize=False),
    "llama4": shape(128, 1, bias=False, renormalize=False),
    "bailing": shape(512, 8, G=8, TG=4),
    "glm53": shape(288, 8),
}


def option_sets(c):
    """name -> (factory, options), every one that a shape has room for."""
    found = {}
    if c["E"] <= 32 and c["K"] <= 2 and c["G"] == 1 and c["renormalize"] and not c["bias"]:
        for rows in (16, 32, 64, 128, 256):
            for dependent in (False, "early"):
                found[f"few experts, {rows} a program" + (f", {dependent}" if dependent else "")] = (
                    triton_few_experts.topk, dict(rows_per_program=rows, dependent_launch=dependent))
    for rows in (1, 2, 4, 8):
        if rows * triton.next_power_of_2(c["K"]) > 32:
            continue
        for dependent in (None, "late", "early"):
            for registers in (None, 64, 80) if c["E"] > 512 else (None,):
                parts = [f"{rows} a warp", dependent, registers and f"{registers} registers"]
                name = ", ".join(part for part in parts if part)
                found[name] = triton_router.topk, dict(rows_per_program=rows, dependent_launch=dependent,
                                                       max_registers=registers)
    return found


def router(c, dtype, made):
    factory, options = made
    kernel = factory(platform=registry.platform(), **traits(c, dtype), **options)
    return lambda x, bias, w, i: kernel(x, bias, routed_scaling_factor=c["scale"])


def compile_one(job):
    """In a process of its own: leaves the compiled kernel in Triton's cache on disk."""
    config, dtype, name = job
    router(CONFIGS[config], dtype, option_sets(CONFIGS[config])[name])(*inputs(CONFIGS[config], dtype, 5)[0])
    torch.cuda.synchronize()


def same(a, b):
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--configs", default=",".join(CONFIGS))
    ap.add_argument("--dtypes", default="float32,bfloat16")
    ap.add_argument("--tokens", default="1,64,256,512,768,1024,1536,2048,3072,4096,8192,16384")
    ap.add_argument("--out", help="the file to append rows to, one line of JSON each")
    args = ap.parse_args()
    jobs = [(config, dtype, name) for config in args.configs.split(",") for dtype in args.dtypes.split(",")
            for name in option_sets(CONFIGS[config])]
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
    print(f"# {len(jobs)} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    tokens = [int(n) for n in args.tokens.split(",")]
    for config in args.configs.split(","):
        for dtype in args.dtypes.split(","):
            calls = {name: router(CONFIGS[config], dtype, o) for name, o in option_sets(CONFIGS[config]).items()}
            times = {name: [] for name in calls}
            for count in tokens:
                sets = inputs(CONFIGS[config], dtype, count)
                expected = next(iter(calls.values()))(*sets[0])
                for name, call in calls.items():
                    if not same(call(*sets[0]), expected):
                        print(f"# {config} {dtype} {count} {name}: OTHER BITS")
                    times[name].append(graph_time(call, sets))
            print(f"\n{config} {dtype:<30}" + "".join(f"{n:>8}" for n in tokens))
            for name, row in times.items():
                marks = ["*" if t == min(other[i] for other in times.values()) else " " for i, t in enumerate(row)]
                print(f"{name:<37}" + "".join(f"{t:>7.2f}{mark}" for t, mark in zip(row, marks)), flush=True)
            if args.out:
                with open(args.out, "a") as out:
                    out.write(json.dumps({"config": config, "dtype": dtype, "tokens": tokens, "us": times}) + "\n")


if __name__ == "__main__":
    main()
