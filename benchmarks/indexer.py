"""indexer.wk_weights_proj on one GPU: one launch beside two torch.nn.functional.linear calls.

    python benchmarks/indexer.py --out FILE.json [--tokens 1,2,...] [--shapes dsv32,glm5] [--sweep]

Microseconds per call inside a CUDA graph over 24 layers' weights in turn, so that weights come from memory and not from
the cache, as in a model; the median of 15 replays. FILE.json gets a line of JSON a row, appended.

    two      linear with wk, linear with weights_proj
    torch    torch_fused: one linear
    ours     what the registry chooses
    floor    the weights, the hidden states and the result at --bandwidth TB/s
    ratio    two over ours
    error    of ours, the largest over the largest magnitude of a float64 result
--sweep times every launch option of the Triton kernel too, and prints the best ones.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch
from timing import graph_time
from torch.nn.functional import linear

from kernel_registry import registry

OP = "indexer.wk_weights_proj"
SHAPES = {"dsv32": dict(hidden_size=7168, head_dim=128, num_heads=64),
          "glm5": dict(hidden_size=6144, head_dim=128, num_heads=32)}
LAYERS = 24  # 66 MB of weights, more than an H200's cache
SWEEP = dict(splits=(7, 14, 28), block_k=(128, 256), columns_per_program=(16, 32, 64), num_warps=(2, 4, 8),
             num_stages=(2, 3, 4))


def made(c, tokens: int, device="cuda"):
    """Hidden states, and for each layer the fused weight and copies of its two parts."""
    generator = torch.Generator(device).manual_seed(tokens)
    rows, hidden = c["head_dim"] + c["num_heads"], c["hidden_size"]
    x = torch.randn(tokens, hidden, device=device, generator=generator).bfloat16()
    fused = [(torch.randn(rows, hidden, device=device, generator=generator) * 0.02).bfloat16() for _ in range(LAYERS)]
    return x, fused, [tuple(part.clone() for part in weight.split([c["head_dim"], c["num_heads"]])) for weight in fused]


def timed(kernel, x, weights) -> float:
    return graph_time([lambda weight=weight: kernel(x, weight) for weight in weights])


def measure(name, c, tokens, args) -> dict:
    x, fused, parts = made(c, tokens)
    fused = [registry.prepare(OP, weight, **c) for weight in fused]
    ours = registry.dispatch(OP, **c, num_tokens=tokens)
    with registry.override(OP, "torch_fused"):
        torch_fused = registry.dispatch(OP, **c, num_tokens=tokens)
    exact = x.double() @ fused[0].double().t()
    error = (torch.cat(ours(x, fused[0]), -1).double() - exact).abs().max() / exact.abs().max()
    us = {"two": graph_time([lambda p=p: (linear(x, p[0]), linear(x, p[1])) for p in parts]),
          "torch": timed(torch_fused, x, fused), "ours": timed(ours, x, fused),
          "floor": 2 * (fused[0].numel() + x.numel() + tokens * len(fused[0])) / args.bandwidth / 1e6}
    row = dict(shape=name, tokens=tokens, chosen=ours.name, ratio=round(us["two"] / us["ours"], 2),
               error=float(f"{error.item():.2g}"), us={key: round(value, 2) for key, value in us.items()})
    if args.sweep:
        row["sweep"] = sweep(c, x, fused)
    return row


def sweep(c, x, fused) -> list:
    """[microseconds, options] of the 8 fastest option sets."""
    from kernel_registry.ops.indexer.wk_weights_proj.triton_fused import fused as factory

    found = []
    for values in itertools.product(*SWEEP.values()):
        options = dict(zip(SWEEP, values))
        try:
            found.append([round(timed(factory(**c, **options, platform=registry.platform()), x, fused), 2), options])
        except Exception as error:  # more registers or shared memory than there are
            print(f"# {options}: {type(error).__name__} {str(error).splitlines()[0][:100]}")
    return sorted(found, key=lambda one: one[0])[:8]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in args.shapes.split(","):
        for tokens in map(int, args.tokens.split(",")):
            row = measure(name, SHAPES[name], tokens, args)
            print(json.dumps(row), flush=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
