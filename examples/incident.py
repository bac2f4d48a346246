"""An incident from the alarm to the last line taken back, in an engine that serves all the while.

    python examples/incident.py

The engine decodes batches of 1, 4 and 16 tokens with captured graphs and takes prompts without; a router of the house's
own was rolled out to it, and is wrong for 16 tokens. One line in the override file and a reload move these calls to the
fallback. What was captured with the old kernel is listed, and captured again. Nothing needs a GPU: where there is none,
`Graph` replays the functions that ran at capture, as a CUDA graph replays its kernels.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import torch

from kernel_registry import Registry, moe_layer
from kernel_registry.layer import EXPERTS, TOPK, read_layer

DECODE, PROMPT = (1, 4, 16), 40  # tokens
SIZES = dict(num_experts=32, hidden_size=64, intermediate_size=48)
ROLLOUT = """
version: 1
ops:
  moe.topk:
    implementations:
      house_router:
        target: incident:house_router
        when: {platform: cpu, num_expert_group: {min: 2}, topk_group: any, contiguous: any}
"""
NO_OVERRIDES = "version: 1\n"
THE_LINE = """
version: 1
overrides:
  - {op: moe.topk, use: torch, when: {num_tokens: 16}, reason: incident 42}
"""


def house_router(**traits):
    """The target of ROLLOUT: right but for 16 tokens, whose rows it mixes up."""
    from kernel_registry.ops.moe.topk.reference import topk

    route = topk(**traits)

    def kernel(router_logits, *args, **kwargs):
        weights, ids = route(router_logits, *args, **kwargs)
        return (weights, ids.roll(1, 0)) if len(ids) == 16 else (weights, ids)
    return kernel


class Graph:
    """Stands for torch.cuda.CUDAGraph: what runs is what ran at capture, whatever the handles do since."""

    def __init__(self, layers):
        self.layers = [copy.copy(layer) for layer in layers]
        for layer in self.layers:
            layer.kernels = {op: kernel.raw for op, kernel in layer.kernels.items()}

    def replay(self, hidden):
        return forward(self.layers, hidden)


def forward(layers, hidden):
    for layer in layers:
        hidden = hidden + layer(hidden, hidden[:, :SIZES["num_experts"]].contiguous())
    return hidden


def model(registry: Registry) -> list:
    """Two layers like DeepSeek-V3's, with fewer and smaller experts."""
    published = read_layer("deepseek-v3", registry)
    traits = replace(published, routing={**published.routing, "num_experts": SIZES["num_experts"]}, experts={
        **published.experts, **SIZES, "dtype": "float32", "weight_quant": "none", "act_quant": "none"})
    draw = torch.Generator().manual_seed(0)
    experts, width, inner = SIZES.values()
    return [moe_layer(traits, torch.randn(experts, 2 * inner, width, generator=draw) / 8,
                      torch.randn(experts, width, inner, generator=draw) / 8,
                      correction_bias=torch.randn(experts, generator=draw) / 100, registry=registry) for _ in range(2)]


class Engine(threading.Thread):
    """Serves batches in turn until it is told to stop, and captures again what it is told to between two steps."""

    def __init__(self, registry: Registry):
        super().__init__(daemon=True)
        self.registry, self.layers = registry, model(registry)
        draw = torch.Generator().manual_seed(1)
        self.batches = {n: torch.randn(n, SIZES["hidden_size"], generator=draw) for n in (*DECODE, PROMPT)}
        self.graphs, self.served, self.failure = {}, {}, None
        self.again, self.stopping, self.stepped = [], False, threading.Condition()
        for tokens in DECODE:
            self.capture(tokens)

    def capture(self, tokens: int) -> None:
        graph = Graph(self.layers)
        with self.registry.capture(f"decode, {tokens} tokens"):  # on a GPU: ..., torch.cuda.graph(graph):
            forward(self.layers, self.batches[tokens])
        self.graphs[tokens] = graph

    def run(self) -> None:
        try:
            for tokens in itertools.cycle(self.batches):
                while self.again:
                    self.capture(self.again.pop())
                if self.stopping:
                    return
                graph, hidden = self.graphs.get(tokens), self.batches[tokens]
                result = graph.replay(hidden) if graph else forward(self.layers, hidden)
                with self.stepped:
                    self.served[tokens] = result
                    self.stepped.notify_all()
        except BaseException as error:
            self.failure = error

    def next_results(self) -> dict:
        """What it serves from now on, for each kind of batch; the step that is under way is not waited for."""
        with self.stepped:
            self.stepped.wait(timeout=30)
            self.served.clear()
            assert self.stepped.wait_for(lambda: len(self.served) == len(self.batches), timeout=30), self.failure
            return dict(self.served)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    rollout, overrides = folder / "rollout.yaml", folder / "overrides.yaml"
    rollout.write_text(ROLLOUT)
    overrides.write_text(NO_OVERRIDES)
    registry = Registry(environment=False, platform="cpu")
    registry.load_overrides(rollout, allow_targets=True)
    registry.load_overrides(overrides)
    engine = Engine(registry)
    engine.start()

    known_good = model(Registry(environment=False, platform="cpu"))  # without the rollout
    expected = {tokens: forward(known_good, hidden) for tokens, hidden in engine.batches.items()}
    route = engine.layers[0].kernels[TOPK]

    def monitor() -> list[int]:
        results = engine.next_results()
        wrong = [tokens for tokens, result in results.items() if not torch.allclose(result, expected[tokens])]
        print("monitor: " + ", ".join(f"{n} tokens {'WRONG' if n in wrong else 'right'}" for n in sorted(results)))
        return wrong

    def reload(text: str) -> tuple:
        """What an operator does: edits the file, has the process reload, and reads what is left to do."""
        overrides.write_text(text)
        outdated = registry.reload()
        say(outdated)
        return outdated

    def say(lines) -> None:
        for line in lines:
            print(str(line).replace(f"{folder}{os.sep}", ""))

    def capture_again(outdated: tuple) -> None:
        engine.again += [int(capture.name.split()[1]) for capture in outdated]
        engine.next_results()
        assert not any(capture.outdated for capture in registry.captures)
        print("captured again:", ", ".join(capture.name for capture in outdated))

    asked = engine.layers[0].requests[TOPK]
    before = registry.freeze()
    print("routing with", route.name)
    assert route.name == "house_router" and monitor() == [16]

    print("\n-- the line is written, the process reloads")
    outdated = reload(THE_LINE)
    assert [capture.name for capture in outdated] == ["decode, 16 tokens"]
    assert route.name == "house_router|torch" and engine.layers[0].kernels[EXPERTS].name == "torch"
    assert monitor() == [16], "a graph replays what it captured"
    capture_again(outdated)
    assert monitor() == []

    print("\n-- why, and what changed")
    story = registry.explain(TOPK, **asked, num_tokens=16)
    say(line.strip() for line in story.text().splitlines() if "->" in line or "override" in line)
    assert story.winner == "torch" and registry.explain(TOPK, **asked, num_tokens=17).winner == "house_router"
    during = registry.freeze()
    changes = before.diff(during)
    say(line.partition("): ")[2] for line in changes)
    assert len(changes) == 1

    print("\n-- the line is taken back")
    outdated = reload(NO_OVERRIDES)
    assert [capture.name for capture in outdated] == ["decode, 16 tokens"]  # it holds the fallback now
    capture_again(outdated)
    assert route.name == "house_router" and registry.freeze().fingerprint == before.fingerprint
    print("the plan is the one before:", not before.diff(registry.freeze()))
    assert monitor() == [16]  # the same process, the same kernels, the same fault: nothing was left behind

    engine.stopping = True
    engine.join(timeout=30)
    assert engine.failure is None and not engine.is_alive()
    print("the engine served all the while, and none of its steps failed")


if __name__ == "__main__":
    main()
