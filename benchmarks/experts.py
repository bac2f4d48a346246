"""moe.experts on one GPU: ours through the registry, beside vLLM's Triton fused_experts and a floor.

    python benchmarks/experts.py --out FILE.json [--vllm DIR] [--shapes dsv3,...] [--tokens 1,8,...] [--routing uniform]
    python benchmarks/experts.py --formats ...    the other formats instead, beside the 16-bit kernel of the same shape

Microseconds per call inside a CUDA graph over several inputs and routings, so that weights come from memory: 8 up to 32
tokens, 3 above; the median of 9 replays. FILE.json gets a line of JSON a row, appended.

    floor    the longer of: the weights of the experts really chosen, input and output at --bandwidth TB/s; and the
             operations at --tflops (twice that where weights and activations have 8 bits)
    routing  uniform: a softmax of normal logits; zipf: the same with the experts' popularity falling as 1 / rank
    error    relative root mean square error against float64, and over it that of float32 arithmetic with one cast for
             each multiplication's result (up to 128 tokens; activations quantised as the format says in both)
DIR is described in benchmarks/experts_peers.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial

import torch
from experts_peers import vllm_experts
from timing import graph_time

from kernel_registry import registry
from kernel_registry.ops.moe.experts import oracle
from kernel_registry.ops.moe.experts.formats import WEIGHTS, w2_matrix, w13_matrix


def shape(experts, topk, hidden, intermediate, weight_quant="none", act_quant="none", bias=False, activation="silu"):
    return dict(num_experts=experts, topk=topk, hidden_size=hidden, intermediate_size=intermediate,
                weight_quant=weight_quant, act_quant=act_quant, has_bias=bias, activation=activation)


SHAPES = {
    "dsv3": shape(256, 8, 7168, 256, "fp8_block", "fp8_block"),  # DeepSeek-V3, an eighth of each expert
    "qwen3": shape(128, 8, 2048, 768),  # Qwen3-30B-A3B
    "gptoss": shape(32, 4, 2880, 2880, bias=True),  # gpt-oss-20b's sizes and biases, in bfloat16 and with silu
    "mixtral": shape(8, 2, 4096, 14336),
    "minimax": shape(256, 8, 3072, 1536, "fp8_block", "fp8_block"),  # MiniMax-M2
}
FORMATS = {
    "16 bits": {}, "fp8_channel": dict(weight_quant="fp8_channel", act_quant="fp8_token"),
    "fp8_tensor": dict(weight_quant="fp8_tensor", act_quant="fp8_tensor"),
    "int8": dict(weight_quant="int8_channel", act_quant="int8_token"), "int8_w8a16": dict(weight_quant="int8_w8a16"),
    "int4_w4a16": dict(weight_quant="int4_w4a16"), "swigluoai": dict(activation="swigluoai", has_bias=True),
}


def make_layer(c) -> dict[str, torch.Tensor]:
    """Weights, scales and biases by the names that the kernels take them under."""
    format, layer = WEIGHTS[c["weight_quant"]], {}
    for name, matrix in (("w13", w13_matrix(**c)), ("w2", w2_matrix(**c))):
        weight = torch.empty(matrix.stored_shape, device="cuda", dtype=torch.bfloat16).normal_()
        if format.stored is None:
            layer[name] = weight * 0.05
        elif format.packed:
            layer[name] = torch.randint(0, 256, weight.shape, device="cuda", dtype=torch.uint8)
        else:
            layer[name] = (weight * 30).clamp(-127, 127).to(format.stored)
        if matrix.scale_shape:
            layer[name + "_scale"] = (torch.rand(matrix.scale_shape, device="cuda") + 1) * (0.02 if format.packed else
                                                                                            0.001)
    if c["act_quant"].endswith("_tensor"):
        layer["a13_scale"], layer["a2_scale"] = (torch.full((1,), v, device="cuda") for v in (0.01, 0.02))
    if c["has_bias"]:
        for name, rows in (("w13_bias", 2 * c["intermediate_size"]), ("w2_bias", c["hidden_size"])):
            layer[name] = torch.randn(c["num_experts"], rows, device="cuda", dtype=torch.bfloat16)
    return layer


def draw(c, tokens: int, seed: int, routing: str):
    """(hidden_states, topk_weights, topk_ids)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(tokens, c["num_experts"], device="cuda", generator=generator)
    if routing == "zipf":
        rank = torch.randperm(c["num_experts"], device="cuda", generator=generator) + 1
        logits -= rank.float().log()
    hidden = torch.randn(tokens, c["hidden_size"], device="cuda", dtype=torch.bfloat16, generator=generator)
    weights, ids = logits.softmax(-1).topk(c["topk"], -1)
    return hidden, weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)


def floor(c, inputs, bandwidth: float, tflops: float) -> float:
    """Microseconds."""
    size = {"none": 2.0, "int4_w4a16": 0.5}.get(c["weight_quant"], 1.0)
    rate = tflops * (1 if c["act_quant"] == "none" else 2)
    experts = statistics.mean(len(ids.unique()) for *_, ids in inputs)
    tokens, products = len(inputs[0][0]), 3 * c["hidden_size"] * c["intermediate_size"]
    return max((experts * products * size + 4 * tokens * c["hidden_size"]) / bandwidth,
               2 * tokens * c["topk"] * products / rate) / 1e6


def measure(c, layer, calls, tokens: int, args) -> dict:
    inputs = [draw(c, tokens, seed, args.routing) for seed in range(8 if tokens <= 32 else 3)]
    row = dict(tokens=tokens, routing=args.routing, floor=round(floor(c, inputs, args.bandwidth, args.tflops), 1),
               us={}, error={})
    if tokens <= 128:
        hidden, weights, ids = inputs[0]
        exact, rounded, _ = oracle.evaluate(c, (hidden, layer["w13"], layer["w2"], weights, ids), layer)
        least = (rounded.bfloat16().double() - exact).norm()
    for name, call in calls.items():
        try:
            if tokens <= 128:
                error = (call(*inputs[0]).double() - exact).norm()
                row["error"][name] = [float(f"{(error / exact.norm()).item():.3g}"), round((error / least).item(), 3)]
            row["us"][name] = round(graph_time([partial(call, *given) for given in inputs], replays=9, dropped=2), 1)
        except Exception as error:  # a peer that can't is a row without its time
            print(f"# {name}, {tokens} tokens: {type(error).__name__} {str(error).splitlines()[0][:120]}")
    return row


def beside(peer, layer, hidden, weights, ids):
    return peer(hidden, layer, weights, ids)


def ours(c, layer):
    kernel = registry.bind("moe.experts", **c)
    tensors = {name: tensor for name, tensor in layer.items() if name not in ("w13", "w2")}
    return lambda hidden, weights, ids: kernel(hidden, layer["w13"], layer["w2"], weights, ids, **tensors)


def rows(args):
    peer = vllm_experts(args.vllm, args.vllm_c, tempfile.mkdtemp()) if args.vllm else None
    for name in args.shapes.split(","):
        for format, change in (FORMATS if args.formats else {"": {}}).items():
            c = {**SHAPES[name], **change}
            layer = make_layer(c)
            calls = {"ours": ours(c, layer)}
            if peer and not args.formats:
                calls["vllm"] = partial(beside, peer, layer)
            for tokens in map(int, args.tokens.split(",")):
                yield {"shape": name, "format": format, **measure(c, layer, calls, tokens, args)}
            del layer, calls
            torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--vllm", metavar="DIR")
    parser.add_argument("--vllm-c", metavar="FILE")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,128,1024,4096")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf"))
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of a large copy on the device")
    parser.add_argument("--tflops", type=float, default=788.0, help="of a large bfloat16 product on the device")
    args = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {registry.platform()}")
    with open(args.out, "a") as out:
        for row in rows(args):
            out.write(json.dumps(row) + "\n")
            out.flush()
            us = row["us"]
            ratio = f"  {us['vllm'] / us['ours']:5.2f}" if {"vllm", "ours"} <= us.keys() else ""
            print(f"{row['shape']:8} {row['format']:11} {row['routing']:7} {row['tokens']:5}  floor {row['floor']:7}"
                  f"  {us}{ratio}  {row['error']}", flush=True)


if __name__ == "__main__":
    main()
