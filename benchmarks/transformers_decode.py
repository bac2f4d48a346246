"""Decoding with transformers: a DeepSeek-V3-shaped model of 4 layers with the registry's kernels, and without.

    python benchmarks/transformers_decode.py [--experts 64,256] [--batch 1,16,128] [--rounds 15] [--steps 8]
                                             [--context 128] [--out FILE.json] [--tiny]

Run where transformers is. Contestants are "eager", every experts implementation that this transformers has and can run
here, and "registry": routers and experts by `enable(model)`. All decode in one process, the same model from the same KV
cache with the same drawn tokens, in rounds that begin with another contestant each time, so that clocks, heat and what
else the host does are the same for all; eager, which takes longest, in every fifth. A turn begins with a step untimed.
Medians of the rounds:

    step      milliseconds of a decode step, from a synchronised device to a synchronised device: forwards of the whole
              model, as `generate` makes them
    ratio     how much faster the registry's step is than eager's and than the best other's, each round's for itself
              (best other: whose median is least)
    layer     microseconds of routing and experts (a block's gate and experts) of one layer; "called" as a model calls
              them, the host's part included, "graph" the same calls replayed from a CUDA graph, where they can be
    distance  from eager's, as a part of their norm: of what routing and experts give for the same input, 0.02 or more
              for the registry is an error; and of a token's logits, the median of all steps' tokens, 0.05 is one. (A
              rounding in one layer may choose another expert in the next, for any contestant: not for most tokens.)
    tokens    of `generate` in float32, 2 layers: the registry's are eager's, or it is an error
FILE.json gets a line of JSON a row, appended. --tiny runs all of it in small, for a test on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from functools import partial

import torch
import transformers
import triton
from timing import graph_time
from transformers_model import DEVICE, EAGER, OURS, contestants, in_short, make_model

from kernel_registry import registry
from kernel_registry.integrations.transformers import enable

EAGER_EVERY = 5  # rounds


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def decode(model, cache, tokens) -> tuple[float, torch.Tensor]:
    """(seconds of a step but the first, all logits) for tokens [steps, batch, 1] after what the cache holds."""
    logits = [model(tokens[0], past_key_values=cache, use_cache=True).logits]
    wait()
    start = time.perf_counter()
    for step in tokens[1:]:
        logits.append(model(step, past_key_values=cache, use_cache=True).logits)
    wait()
    seconds = (time.perf_counter() - start) / (len(tokens) - 1)
    cache.crop(-len(tokens))
    return seconds, torch.cat(logits)


def rounds(calls: dict, number: int) -> dict[str, dict[int, float]]:
    """What each of the calls returns, called in turn, by the number of the round."""
    found, names = {name: {} for name in calls}, list(calls)
    for i in range(number):
        for name in names[i % len(names):] + names[:i % len(names)]:
            if name != EAGER or i % EAGER_EVERY == 0:
                found[name][i] = calls[name]()
    return found


def medians(found: dict[str, dict[int, float]]) -> dict[str, float]:
    return {name: statistics.median(values.values()) for name, values in found.items()}


def distance(found: torch.Tensor, own: torch.Tensor) -> float:
    """The median of rows' distances, as a part of their norm."""
    found, own = (rows.flatten(0, -2).double() for rows in (found, own))
    return ((found - own).norm(dim=-1) / own.norm(dim=-1)).median().item()


def steps(model, able: dict, batch: int, args) -> dict:
    """Milliseconds of a step, how much faster the registry is, and the distance of logits, by contestant."""
    prompt, tokens = (torch.randint(model.config.vocab_size, size, device=DEVICE)
                      for size in ((batch, args.context), (args.steps + 1, batch, 1)))
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def run(switch):
        with switch(model):
            return decode(model, cache, tokens)

    logits = {name: run(switch)[1] for name, switch in able.items()}  # which warms up, too
    turns = rounds({name: lambda switch=switch: run(switch)[0] * 1e3 for name, switch in able.items()}, args.rounds)
    ms = medians(turns)
    best = min((name for name in ms if name not in (EAGER, OURS)), key=ms.get)
    return {"ms": ms, "rounds": turns,
            "distance of logits": {name: distance(found, logits[EAGER]) for name, found in logits.items()},
            "ratio": {name: statistics.median(theirs / turns[OURS][i] for i, theirs in turns[name].items())
                      for name in (EAGER, best)}}


def layer_calls(model, batch: int) -> list:
    """Routing and experts, of each layer in turn."""
    def call(block, hidden):
        _, weights, ids = block.gate(hidden)
        return block.experts(hidden, ids, weights)

    blocks = [layer.mlp for layer in model.model.layers]
    inputs = torch.randn(len(blocks), batch, model.config.hidden_size, device=DEVICE, dtype=model.dtype)
    return [partial(call, *given) for given in zip(blocks, inputs)] * 4


def called(model, able: dict, batch: int, args) -> dict:
    """Microseconds of a layer as a model calls it, and the distance of its output, by contestant."""
    calls, output = layer_calls(model, batch), {}

    def run(name, switch):
        with switch(model):
            output[name] = calls[0]()
            wait()
            start = time.perf_counter()
            for call in calls:
                call()
            wait()
            return (time.perf_counter() - start) / len(calls) * 1e6

    found = medians(rounds({name: partial(run, name, switch) for name, switch in able.items()}, args.rounds))
    return {"called": found,
            "distance of output": {name: distance(of, output[EAGER]) for name, of in output.items()}}


def in_a_graph(model, able: dict, batch: int) -> dict:
    """The same from a CUDA graph, of those that one can hold: not of eager, which asks the device what was chosen."""
    found, calls = {}, layer_calls(model, batch)
    for name, switch in able.items():
        try:
            if name != EAGER and DEVICE == "cuda":
                with switch(model):
                    found[name] = graph_time(calls)
        except Exception as error:
            print(f"# {name} can't be captured: {in_short(error)}")
    return found


def kernels(experts: int, batch: int) -> str:
    """What serves a batch: asked with the traits of the calls that this process made."""
    found = {}
    for kernel in registry.kernels:
        named = registry.catalog.op(kernel.op).space.traits
        traits = {name: value for name, value in kernel.traits.items() if name in named and name != "platform"}
        if traits["num_experts"] == experts and traits["dtype"] == {"moe.topk": "float32"}.get(kernel.op, "bfloat16"):
            found[kernel.op] = registry.explain(kernel.op, **traits, num_tokens=batch).winner
    return ", ".join(found[op] for op in sorted(found, reverse=True))


def same_tokens(tiny: bool, experts: int) -> bool:
    """Whether generate gives eager's tokens with the registry, in float32."""
    model = make_model(experts, tiny, layers=2, dtype=torch.float32)
    prompt = torch.randint(1, model.config.vocab_size, (2, 8), device=DEVICE)
    generate = partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16,
                       do_sample=False)
    wanted = generate()
    with enable(model):
        return torch.equal(generate(), wanted)


def table(title: str, heads, rows) -> None:
    print(f"\n{title}\n")
    for row in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
                                for cell in row) + " |", flush=True)


def tables(found: list[dict]) -> None:
    names = list(found[0]["ms"])
    table("milliseconds of a decode step", ["experts", "batch", *names, "eager / registry", "best other / registry",
                                            "kernels"],
          [[row["experts"], row["batch"], *row["ms"].values(), *row["ratio"].values(), row["kernels"]]
           for row in found])
    table("microseconds of routing and experts, a layer", ["experts", "batch", "", *names], [
        [row["experts"], row["batch"], how, *(row[how].get(name) for name in names)]
        for row in found for how in ("called", "graph") if row[how]])
    table("distance from eager's", ["experts", "batch", "of", *names], [
        [row["experts"], row["batch"], of, *row[f"distance of {of}"].values()]
        for row in found for of in ("output", "logits")])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="64,256")
    parser.add_argument("--batch", default="1,16,128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--out")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.experts, args.batch, args.rounds, args.steps, args.context = "16", "1,3", 2, 2, 8
    numbers, batches = ([int(n) for n in text.split(",")] for text in (args.experts, args.batch))
    where = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
             **{module.__name__: module.__version__ for module in (transformers, torch, triton)}}
    print(f"# {where}", flush=True)
    found, models = [], {}
    for experts in numbers:
        model = make_model(experts, args.tiny)
        models[experts] = model, contestants(model)
        with enable(model) as report:
            print(report, flush=True)
        for batch in batches:
            found.append({"experts": experts, "batch": batch, **steps(*models[experts], batch, args),
                          **called(*models[experts], batch, args), "kernels": kernels(experts, batch)})
            print(f"# {experts} experts, batch {batch}: {found[-1]['ms']}", flush=True)
    same = same_tokens(args.tiny, numbers[0])
    for row in found:  # last: a capture that fails may leave something behind
        row["graph"] = in_a_graph(*models[row["experts"]], row["batch"])
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({**where, **row}) + "\n")
    tables(found)
    print(f"\ntokens in float32: {'the same' if same else 'others'}")
    if not same or not all(row["distance of output"][OURS] < 0.02 and row["distance of logits"][OURS] < 0.05
                           for row in found):
        raise SystemExit("the registry's results are not eager's")


if __name__ == "__main__":
    main()
