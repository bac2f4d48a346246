"""torch.compile over a kernel that looks at tags: one graph without anything in it, and no way around the look."""

from __future__ import annotations

import pytest
import torch

from kernel_registry import Registry
from kernel_registry.errors import PreparationError

OP, NAME = "moe.routing_bias", "e_score_correction_bias"
ROUTER = dict(num_experts=64, topk=4, num_expert_group=4, topk_group=2, dtype="bfloat16", bias_dtype="bfloat16")


class Gate(torch.nn.Module):
    """A router as a model has it. `take` makes sure that its bias was prepared."""

    def __init__(self, registry):
        super().__init__()
        self.take, self.route = registry.bind(OP, **ROUTER), registry.bind("moe.topk", **ROUTER)
        self.e_score_correction_bias = torch.nn.Parameter(torch.arange(64.0), requires_grad=False)

    def forward(self, logits):
        return self.route(logits, self.take(self.e_score_correction_bias))


@pytest.fixture
def gate():
    torch.compiler.reset()
    registry = Registry(plugins=False, environment=False, platform="cpu")
    module = Gate(registry)
    module.prepare = lambda **more: registry.prepare(OP, module, **{**ROUTER, **more})
    return module


@pytest.fixture
def logits():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_graph_with_the_same_results(gate, logits):
    gate.prepare()
    graphs = []

    def counting(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    assert same(torch.compile(gate, backend=counting, fullgraph=True)(logits), gate(logits))
    assert len(graphs) == 1
    take, bias, graphs[:] = gate.take, gate.e_score_correction_bias, []
    assert torch.compile(lambda x: x + take(bias), backend=counting, fullgraph=True)(torch.zeros(64)).shape == (64,)
    assert len(graphs) == 1 and len(graphs[0]) == 1, "the addition alone"


def test_a_reload_in_place_needs_no_other_graph(gate, logits):
    gate.prepare()
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    before = compiled(logits)
    with torch.compiler.set_stance("fail_on_recompile"):
        gate.load_state_dict({NAME: torch.arange(64.0).flip(0)})
        assert same(compiled(logits), gate(logits)) and not same(compiled(logits), before)


@pytest.mark.parametrize("change", [
    lambda gate: gate.prepare(topk=2),
    lambda gate: setattr(gate, NAME, torch.nn.Parameter(gate.e_score_correction_bias.data, requires_grad=False)),
    lambda gate: gate.to(torch.float32),
], ids=["another tag", "another object", "another dtype"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_no_longer_prepared_is_refused_after_compiling_too(gate, logits, change, whole):
    gate.prepare()
    compiled = torch.compile(gate, backend="eager", fullgraph=whole)
    assert same(compiled(logits), gate(logits))
    change(gate)
    if whole:  # the compiler can't trace a raise, and says where it is
        with pytest.raises(torch._dynamo.exc.Unsupported, match="preparation.py"):
            compiled(logits)
    else:
        with pytest.raises(PreparationError, match="registry.prepare"):
            compiled(logits)


def test_whether_a_graph_is_captured_is_not_asked_in_traced_code(gate, logits, monkeypatch):
    """Where CUDA runs, the question is a call that no graph can hold."""
    gate.prepare()
    expected = gate(logits)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert same(torch.compile(gate, backend="eager", fullgraph=True)(logits), expected)
