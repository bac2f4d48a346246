"""Two ranks with half of the experts each: their plans compared at start-up, then one layer over both.

    python examples/expert_parallel.py

Each rank is a process with tokens of its own; what they do not have the experts for goes to the other and comes back.
The result is compared with the layer in one piece. The ranks meet through gloo, on the CPU: with NCCL, the tensors and
torch.cuda.set_device(rank) are all that is different.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kernel_registry import Registry, distributed, moe_layer
from kernel_registry.errors import RankError
from kernel_registry.layer import EXPERTS, LayerTraits

RANKS, TOKENS, COUNT, HIDDEN, INTERMEDIATE = 2, (5, 3), 8, 32, 48
TRAITS = LayerTraits("toy", dict(num_experts=COUNT, topk=2), dict(
    num_experts=COUNT, topk=2, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, dtype="float32"))
THE_LINE = "version: 1\noverrides:\n  - {op: moe.topk, use: torch}\n"


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS,
                            timeout=timedelta(minutes=5))
    torch.manual_seed(0)  # every rank draws the whole model, and keeps its part
    w13, w2 = torch.randn(COUNT, 2 * INTERMEDIATE, HIDDEN) / 8, torch.randn(COUNT, HIDDEN, INTERMEDIATE) / 8
    bias, hidden = torch.randn(COUNT) / 100, torch.randn(sum(TOKENS), HIDDEN)
    logits = hidden[:, :COUNT].contiguous()
    here = slice(rank * COUNT // RANKS, (rank + 1) * COUNT // RANKS)
    expert_map = torch.full((COUNT,), -1)
    expert_map[here] = torch.arange(COUNT // RANKS)

    registry = Registry(environment=False, platform="cpu")
    layer = moe_layer(TRAITS, w13[here], w2[here], correction_bias=bias, expert_map=expert_map,
                      group=dist.group.WORLD, registry=registry)
    distributed.agree(registry)  # raises on every rank where one would run other kernels
    mine = slice(sum(TOKENS[:rank]), sum(TOKENS[:rank + 1]))
    came = []
    result = layer(hidden[mine], logits[mine],
                   observe=lambda op, args, *_: came.append(len(args[0])) if op == EXPERTS else None)

    whole = moe_layer(TRAITS, w13, w2, correction_bias=bias, registry=Registry(environment=False, platform="cpu"))
    torch.testing.assert_close(result, whole(hidden, logits)[mine])  # but for the order of additions
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, came[0])
    if rank == 0:
        print(f"{RANKS} ranks agree")
        print(layer.output)
        print(f"{TOKENS[0]} and {TOKENS[1]} tokens, {everyone[0]} and {everyone[1]} at the experts: the layer in one "
              "piece agrees")

    if rank == 1:  # somebody edits a file on one machine only, and the engine is started again
        Path(folder, "overrides.yaml").write_text(THE_LINE)
        registry.load_overrides(Path(folder, "overrides.yaml"))
    try:
        distributed.agree(registry)
    except RankError as error:
        if rank == 0:
            print("with another override file:", error.message.splitlines()[0])
    else:
        raise AssertionError("rank 1 has another override file")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    torch.multiprocessing.spawn(rank_main, (tempfile.mkdtemp(),), nprocs=RANKS)
