"""moe.topk on one GPU: ours through the registry, beside the routing kernels people use today and three floors.

    python benchmarks/topk.py --peers DIR --out FILE.json [--tokens 1,16,...] [--configs dsv3,...] [--dtypes float32]
    python benchmarks/topk.py --variants ...    also every implementation of the registry that serves the call
    python benchmarks/topk.py --host ...        the host time of one eager call of one token instead

Prints, per shape, microseconds per call inside a CUDA graph (16 calls over rotating inputs, median of 15 replays) of
ours and the best peer, and the rows that anyone routes wrongly. FILE.json gets a line of JSON per row, appended, so
that several runs make one set of data; benchmarks/plot_topk.py draws it and makes the tables of docs/benchmarks.md. DIR
and the peers in it are described in benchmarks/topk_peers.py.

    floor   a kernel of one warp a token that reads the row, sums it and writes K weights and ids
    empty   a kernel of one warp that writes one number: what a launch costs
    bytes   logits in, weights and ids out, at the bandwidth of a large copy on the device in the same run (computed)

A row is wrong where an id repeats or is none, where an expert was left out whose choice in float64 is higher than a
chosen one's by more than float32 can blur (ties are anyone's), or where a weight is 2% off float64's for the same ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial

import timing
import torch
import triton
import triton.language as tl
from plot_topk import best_peer, regret
from topk_peers import brief, peers, scored, versions

from kernel_registry import registry


def shape(E, K, G=1, TG=1, scale=1.0, scoring="sigmoid", bias=True, renormalize=True):
    return dict(E=E, K=K, G=G, TG=TG, scale=scale, scoring=scoring, bias=bias, renormalize=renormalize)


CONFIGS = {
    "dsv3": shape(256, 8, G=8, TG=4, scale=2.5),
    "minimax_m2": shape(256, 8),
    "glm45": shape(160, 8, scale=2.5),
    "kimi_k2": shape(384, 8, scale=2.827),
    "kimi_k3": shape(896, 16, scale=2.827),
    "qwen3_moe": shape(128, 8, scoring="softmax", bias=False),
    "qwen3_next": shape(512, 10, scoring="softmax", bias=False),
    "gpt_oss": shape(128, 4, scoring="softmax", bias=False),
    "mixtral": shape(8, 2, scoring="softmax", bias=False),
    "deepseek_v4": shape(256, 6, scale=1.5, scoring="sqrtsoftplus"),
}


@triton.jit
def _floor_kernel(x, w, i, E: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col, k = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    total = tl.sum(tl.load(x + row * E + col, mask=col < E, other=0.0).to(tl.float32), 0)
    tl.store(w + row * K + k, total + k, mask=k < K)
    tl.store(i + row * K + k, k, mask=k < K)


@triton.jit
def _empty_kernel(i):
    tl.store(i, 0)


def floors(c):
    block, block_k = triton.next_power_of_2(c["E"]), triton.next_power_of_2(c["K"])

    def floor(x, bias, w, i):
        _floor_kernel[(x.shape[0],)](x, w, i, E=c["E"], BLOCK=block, K=c["K"], BLOCK_K=block_k, num_warps=1)
        return w, i

    def empty(x, bias, w, i):
        _empty_kernel[(1,)](i, num_warps=1)
        return w, i
    return {"floor": floor, "empty": empty}


def traits(c, dtype):
    return dict(num_experts=c["E"], topk=c["K"], num_expert_group=c["G"], topk_group=c["TG"], scoring=c["scoring"],
                has_bias=c["bias"], renormalize=c["renormalize"], dtype=dtype)


def ours(c, dtype, **which):
    """The registry's kernel as a call; `which` names an implementation or dynamic traits."""
    kernel = registry.dispatch("moe.topk", **which, **traits(c, dtype))
    return lambda x, bias, w, i: kernel(x, bias, routed_scaling_factor=c["scale"])


def variants(c, dtype, tokens):
    """(the name of what the registry chooses, name -> call of every implementation that serves these calls)."""
    known = dict(num_tokens=tokens, contiguous=True)
    story = registry.explain("moe.topk", **known, **traits(c, dtype))
    names = [candidate.name for candidate in story.cases[0].candidates if candidate.serves]
    return story.winner, {name: ours(c, dtype, implementation=name, **known) for name in names}


def inputs(c, dtype, tokens, device="cuda"):
    """Different logits in turn, so that no call finds its own in the nearest cache, and outputs for who wants them."""
    torch.manual_seed(tokens)
    bias = torch.randn(c["E"], device=device) * 0.1 if c["bias"] else None
    return [(torch.randn(tokens, c["E"], device=device).to(getattr(torch, dtype)), bias,
             torch.empty(tokens, c["K"], device=device), torch.empty(tokens, c["K"], device=device, dtype=torch.int32))
            for _ in range(8 if tokens <= 4096 else 4)]


def wrong_rows(weights, ids, x, bias, c) -> int:
    """Rows that differ from float64 by more than float32 explains; see the module's docstring."""
    scores, choice = scored(x.double(), bias, c)
    best = choice.topk(c["K"], -1)[0]
    blur = 4 * 2.0**-24 * best.abs().amax(-1).clamp(min=1)
    ids = ids.long()
    inside = ids.clamp(0, c["E"] - 1)
    order = ids.sort(-1)[0]
    wrong = (ids != inside).any(-1) | (order[:, 1:] == order[:, :-1]).any(-1)
    wrong |= choice.gather(1, inside).amin(-1) < best[:, -1] - blur
    right = scores.gather(1, inside)
    right = right / right.sum(-1, keepdim=True) * c["scale"]
    wrong |= ~((weights.double() - right).abs() <= 0.02 * right).all(-1)  # so that NaN is wrong
    return int(wrong.sum())


def graph_time(call, sets, calls=16) -> float:
    """Median microseconds per call, `calls` calls over rotating inputs captured in one CUDA graph."""
    return timing.graph_time([partial(call, *sets[j % len(sets)]) for j in range(calls)])


def host_time(call, sets, calls=50, rounds=40):
    """Median microseconds until an eager call returns; few enough between synchronisations that no queue fills."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(*sets[0])
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[3:])


def copy_bandwidth(gib=4, copies=5):
    """Bytes read and written per second by a copy too large for any cache; not in a graph, where the copy engines do
    it, slower than a kernel."""
    source = torch.randint(0, 256, (gib << 30,), dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    times = []
    for _ in range(copies + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        to.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2 * source.numel() / statistics.median(times[1:])


def measure(c, calls, sets, clock, where) -> tuple[dict, dict]:
    """(microseconds by name, None for what failed; wrong rows by name, where there are any)."""
    microseconds, wrong = {}, {}
    for name, call in calls.items():
        try:
            found = call(*sets[0])
            bad = 0 if name in ("floor", "empty") else wrong_rows(*found, *sets[0][:2], c)
            microseconds[name] = round(clock(call, sets), 2)
            if bad:
                wrong[name] = bad
        except Exception as error:  # one that refuses the shape is a gap, and the rest are still measured
            microseconds[name] = None
            print(f"# {where} {name}: {brief(error)}")
    return microseconds, wrong


def told(row) -> str:
    """A row for the eye."""
    us, peer = row["us"], best_peer(row)
    parts = [f"{row['config']:<12} {row['dtype']:<8} {row['tokens']:>6}", f"ours {us.get('ours')}"]
    if us.get("ours") and peer:
        parts.append(f"{peer} {us[peer]} ({us[peer] / us['ours']:.2f})")
    if us.get("ours") and us.get("floor"):
        parts.append(f"floor {us['floor']} ({us['ours'] / us['floor']:.2f})")
    if regret(row):
        parts.append(f"regret {regret(row):.2f} of {row['chosen']}")
    return "  ".join(parts) + (f"  WRONG {row['wrong_rows']}" if row["wrong_rows"] else "")


def rows_of(name, dtype, args, origin, clock, device="cuda"):
    """The rows of one shape and dtype, one by one."""
    c = CONFIGS[name]
    outside = peers(c, os.path.abspath(args.peers), args.skip.split(","))
    for tokens in [1] if args.host else map(int, args.tokens.split(",")):
        where, sets = f"{name} {dtype} {tokens}", inputs(c, dtype, tokens, device)
        us, wrong = measure(c, {**floors(c), "ours": ours(c, dtype), **outside}, sets, clock, where)
        if origin.get("copy_bytes_per_s") and not args.host:
            moved = tokens * (c["E"] * sets[0][0].element_size() + c["K"] * 8)
            us["bytes"] = round(moved / origin["copy_bytes_per_s"] * 1e6, 3)
        chosen, able = variants(c, dtype, tokens)
        row = {"kind": "host" if args.host else "graph", "config": name, "dtype": dtype, "tokens": tokens,
               "shape": c, "us": us, "chosen": chosen, "wrong_rows": wrong}
        if args.variants:
            row["variants"], bad = measure(c, able, sets, clock, where)
            wrong.update(bad)
        yield row | origin


def parser():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peers", default=".peers", help="the folder with the peers")
    ap.add_argument("--skip", default="", help="names of peers to leave out")
    ap.add_argument("--tokens", default="1,16,64,256,1024,4096,16384")
    ap.add_argument("--configs", default=",".join(CONFIGS))
    ap.add_argument("--dtypes", default="float32,bfloat16")
    ap.add_argument("--variants", action="store_true", help="also every implementation of the registry that serves")
    ap.add_argument("--host", action="store_true", help="host time of one eager call of one token")
    ap.add_argument("--out", help="the file to append rows to, one line of JSON each")
    return ap


def main():
    args = parser().parse_args()
    origin = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
              "triton": triton.__version__, "peers": versions(args.peers), "copy_bytes_per_s": copy_bandwidth()}
    print("# " + json.dumps(origin), flush=True)
    for name in args.configs.split(","):
        for dtype in args.dtypes.split(","):
            for row in rows_of(name, dtype, args, origin, host_time if args.host else graph_time):
                print(told(row), flush=True)
                if args.out:
                    with open(args.out, "a") as out:  # per row: a run that is cut short keeps what it has
                        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
