"""moe.topk on one GPU: ours through the registry, beside the routing kernels people use today and a floor.

    python benchmarks/topk.py [--peers DIR] [--tokens 1,16,...] [--configs dsv3,...] [--out FILE.json]

Prints, per shape, microseconds per call inside a CUDA graph (16 calls over rotating inputs, median of 15 replays), the
ratio best-peer / ours, and how many rows' expert sets differ from a float64 result. `floor` is a kernel of one warp a
token that reads the row, sums it and writes K weights and ids.

DIR holds the peers, taken from their published wheels; one that is absent there is left out:
    dsv3_fused_routing.so   FlashInfer 0.7.2.post1's fused_topk_deepseek, built from the wheel's sources (needs tvm_ffi)
    sglang/                 the sglang.kernels package of SGLang 0.5.23
    vllm_moe_C.so.xz        vllm/_moe_C_stable_libtorch.abi3.so of vLLM 0.33.0, compressed
    tokenspeed_kernel/      ops/moe/triton/minimax_topk.py of tokenspeed-kernel 0.1.4 as minimax_topk.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
import triton
import triton.language as tl

from kernel_registry import registry

CONFIGS = {
    "dsv3": dict(E=256, G=8, TG=4, K=8, scale=2.5),
    "minimax_m2": dict(E=256, G=1, TG=1, K=8, scale=1.0),
    "glm45": dict(E=160, G=1, TG=1, K=8, scale=2.5),
    "kimi_k2": dict(E=384, G=1, TG=1, K=8, scale=2.827),
    "kimi_k3": dict(E=896, G=1, TG=1, K=16, scale=2.827),
}


@triton.jit
def _floor_kernel(x, w, i, E: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr):
    row, col, k = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, K)
    total = tl.sum(tl.load(x + row * E + col, mask=col < E, other=0.0).to(tl.float32), 0)
    tl.store(w + row * K + k, total + k)
    tl.store(i + row * K + k, k)


def floor(c):
    def call(x, bias, w, i):
        _floor_kernel[(x.shape[0],)](x, w, i, E=c["E"], BLOCK=triton.next_power_of_2(c["E"]), K=c["K"], num_warps=1)
        return w, i
    return call


def peers(c, folder):
    """name -> call(x, bias, w, i) for every peer that loads."""
    found = {}
    sys.path.insert(0, folder)

    def attempt(name, build):
        try:
            found[name] = build()
        except Exception as error:  # a peer that is absent here is a row that is absent
            print(f"# {name} absent: {str(error)[:100]}")

    def flashinfer(pdl):
        import tvm_ffi
        module = tvm_ffi.load_module(os.path.join(folder, "dsv3_fused_routing.so"))

        def call(x, bias, w, i):
            # Its contract: weights and bias in the dtype of the logits.
            out = w if x.dtype == torch.float32 else w.to(x.dtype)
            module.NoAuxTc(x, bias.to(x.dtype), c["G"], c["TG"], c["K"], c["scale"], out, i, pdl, None)
            return out, i
        return call

    def sglang():
        from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate
        return lambda x, bias, w, i: moe_fused_gate(
            x, bias, c["K"], renormalize=True, routed_scaling_factor=c["scale"],
            apply_routed_scaling_factor_on_output=True, num_expert_group=c["G"], topk_group=c["TG"])

    def vllm():
        library = os.path.join(tempfile.gettempdir(), "vllm_moe_C.so")
        if not os.path.exists(library):
            with open(library, "wb") as f:
                subprocess.run(["xz", "-dc", os.path.join(folder, "vllm_moe_C.so.xz")], stdout=f, check=True)
        torch.ops.load_library(library)
        return lambda x, bias, w, i: torch.ops._moe_C.grouped_topk(
            x, c["G"], c["TG"], c["K"], True, c["scale"], bias, 1)

    def tokenspeed():
        from tokenspeed_kernel.minimax_topk import minimax_biased_grouped_topk
        if c["G"] != 1:
            raise ValueError("serves one group only")
        return lambda x, bias, w, i: minimax_biased_grouped_topk(
            x, x, bias, topk=c["K"], renormalize=True, num_expert_group=1, topk_group=1,
            routed_scaling_factor=c["scale"])

    attempt("flashinfer", lambda: flashinfer(False))
    attempt("flashinfer_pdl", lambda: flashinfer(True))
    attempt("sglang", sglang)
    attempt("vllm", vllm)
    attempt("tokenspeed_minimax", tokenspeed)
    return found


def ours(c, dtype):
    kernel = registry.dispatch("moe.topk", num_experts=c["E"], num_expert_group=c["G"], topk_group=c["TG"], topk=c["K"],
                               num_fused_shared_experts=0, dtype=dtype)

    def call(x, bias, w, i):
        return kernel(x, bias, routed_scaling_factor=c["scale"])
    call.label = kernel.name
    return call


def float64_sets(x, bias, c):
    choice = torch.sigmoid(x.double()) + bias.double()
    if c["G"] > 1:
        group = choice.view(len(x), c["G"], -1).topk(2, -1)[0].sum(-1)
        keep = torch.zeros_like(group).scatter_(1, group.topk(c["TG"], -1)[1], 1).bool()
        choice = choice.masked_fill(~keep.repeat_interleave(c["E"] // c["G"], 1), float("-inf"))
    return choice.topk(c["K"], -1)[1].sort(-1)[0]


def graph_time(call, sets, calls=16, replays=15):
    """Median microseconds per call, `calls` calls over rotating inputs captured in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for s in sets:
            call(*s)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for j in range(calls):
            call(*sets[j % len(sets)])
    times = []
    for _ in range(replays + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls * 1e3)
    return statistics.median(times[3:])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peers", default="peers", help="the folder with the peers")
    ap.add_argument("--tokens", default="1,16,64,256,1024,4096,16384")
    ap.add_argument("--configs", default=",".join(CONFIGS))
    ap.add_argument("--dtypes", default="float32,bfloat16")
    ap.add_argument("--out")
    args = ap.parse_args()
    print(f"# torch {torch.__version__}, triton {triton.__version__}, {torch.cuda.get_device_name()}")
    rows = []
    for name in args.configs.split(","):
        c = CONFIGS[name]
        for dtype in args.dtypes.split(","):
            calls = {"floor": floor(c), **peers(c, os.path.abspath(args.peers))}
            calls["ours"] = ours(c, dtype)
            for tokens in map(int, args.tokens.split(",")):
                torch.manual_seed(tokens)
                bias = torch.randn(c["E"], device="cuda") * 0.1
                sets = [(torch.randn(tokens, c["E"], device="cuda").to(getattr(torch, dtype)), bias,
                         torch.empty(tokens, c["K"], device="cuda"),
                         torch.empty(tokens, c["K"], device="cuda", dtype=torch.int32))
                        for _ in range(8 if tokens <= 4096 else 4)]
                gold = float64_sets(sets[0][0], bias, c)
                row = {"config": name, "dtype": dtype, "tokens": tokens, "us": {}, "wrong_rows": {}}
                for label, call in calls.items():
                    try:
                        ids = call(*sets[0])[1]
                        wrong = int((ids.long().sort(-1)[0] != gold).any(-1).sum())
                        row["us"][label] = round(graph_time(call, sets), 2)
                        if wrong and label != "floor":
                            row["wrong_rows"][label] = wrong
                    except Exception as error:
                        row["us"][label] = None
                        print(f"# {name} {dtype} {tokens} {label}: {str(error).splitlines()[0][:100]}")
                timed = {k: v for k, v in row["us"].items() if v and k not in ("floor", "ours")}
                if timed and row["us"].get("ours"):
                    row["best_peer_over_ours"] = round(min(timed.values()) / row["us"]["ours"], 2)
                    row["ours_over_floor"] = round(row["us"]["ours"] / row["us"]["floor"], 2)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
