"""What the transformers adapter costs the host: a layer's router and experts through it, and their kernels directly.

    python benchmarks/transformers_adapter.py [--out FILE.json] [--rounds 600] [--tokens 1]

Run where transformers is, on a CPU. The registry's kernels are replaced by some that do nothing, so that what is left
is everybody's Python. Prints, and appends to FILE.json as a line, microseconds, the least of rounds that alternate:

    direct    what can't be left out: the bound kernel with its arguments at hand; of a router also the product of the
              gate, and its ids as transformers has them, in int64
    through   the module's forward, as a model calls it
    op        the same with torch's dispatcher between, as where a profiler or a compiler looks on
    nothing   for experts: an experts implementation that returns what it is given, so transformers' own part
    added     through - direct, and for experts - nothing
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers_model import builtin, make_model

from kernel_registry import registry, torch_ops
from kernel_registry.integrations.transformers import enable


CALLS = 30  # of a round: so few that some rounds are disturbed by nothing else


def least(calls: dict, rounds: int) -> dict[str, float]:
    """Microseconds of each: the least of the rounds."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: round(min(values) * 1e6, 2) for name, values in times.items()}


def kernel_of(op: str, result):
    """The one kernel of the op that is bound, which from now on does nothing."""
    kernel, = (kernel for kernel in registry.kernels if kernel.op == op)
    kernel.run(lambda *arguments, **keywords: result)
    return kernel


def measure(rounds: int, tokens: int) -> dict:
    model = make_model(64, tiny=True)
    block = model.model.layers[0].mlp
    gate, experts = block.gate, block.experts
    hidden, weight, bias = torch.randn(tokens, 64).bfloat16(), gate.weight, gate.e_score_correction_bias
    w13, w2 = experts.gate_up_proj, experts.down_proj
    ALL_EXPERTS_FUNCTIONS.register("nothing", lambda module, hidden_states, *_: hidden_states)
    with builtin("nothing", model):
        nothing = least({"nothing": lambda: experts.forward(hidden, None, None)}, rounds)["nothing"]
    with enable(model):
        logits, weights, ids = gate(hidden)
        result = experts(hidden, ids, weights)
        topk, grouped = kernel_of("moe.topk", (weights, ids.int())), kernel_of("moe.experts", result)

        def direct():
            logits = torch.nn.functional.linear(hidden.float(), weight.float())
            weights, ids = topk(logits, bias, routed_scaling_factor=2.5)
            return logits, weights, ids.long()

        calls = {"router": {"direct": direct, "through": lambda: gate.forward(hidden)},
                 "experts": {"direct": lambda: grouped(hidden, w13, w2, weights, ids),
                             "through": lambda: experts.forward(hidden, ids, weights)}}
        found = {name: least(ways, rounds) for name, ways in calls.items()}
        looked_at, torch_ops._looked_at = torch_ops._looked_at, lambda *_: True
        for name, ways in calls.items():
            found[name]["op"] = least({"op": ways["through"]}, rounds)["op"]
        torch_ops._looked_at = looked_at
    found["experts"]["nothing"] = nothing
    for row in found.values():
        row["added"] = round(row["through"] - row["direct"] - row.get("nothing", 0), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(given.rounds, given.tokens)
    found |= {module.__name__: module.__version__ for module in (transformers, torch)}
    print(json.dumps(found, indent=1))
    if given.out:
        with open(given.out, "a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
