"""The op inside torch.compile: one graph, and an override that takes effect without a new one.

    python examples/torch_op.py

torch.ops.kernel_registry.moe_topk takes the traits as arguments, reads the rest off its tensors, and dispatches inside
the op, where tracing does not look. The GPU kernel runs in Triton's interpreter here, so this needs no GPU.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

import kernel_registry.torch_ops  # noqa: E402, F401  registers the ops
from kernel_registry import registry  # noqa: E402

graphs = []


def counting(graph, inputs):
    """A torch.compile backend that runs the graph as it is, and counts."""
    graphs.append(graph)
    return graph.forward


@torch.compile(backend=counting, fullgraph=True, dynamic=True)
def router(hidden, gate, bias):
    logits = hidden @ gate.t()
    return torch.ops.kernel_registry.moe_topk(logits, bias, topk=8, num_expert_group=8, topk_group=4)


def main() -> None:
    torch.manual_seed(0)
    gate, bias = torch.randn(256, 32), torch.zeros(256)
    for tokens in (2, 3, 5):
        hidden = torch.randn(tokens, 32)
        topk_weights, topk_ids = router(hidden, gate, bias)
        eager = torch.ops.kernel_registry.moe_topk(hidden @ gate.t(), bias, topk=8, num_expert_group=8, topk_group=4)
        assert torch.equal(topk_ids, eager[1]) and torch.equal(topk_weights, eager[0])
    ran = [kernel.name for kernel in registry.kernels]
    print(f"2, 3 and 5 tokens: {len(graphs)} graph, served by {', '.join(ran)}")

    with registry.override("moe.topk", "torch"):
        weights, ids = router(hidden, gate, bias)
        ran = [kernel.name for kernel in registry.kernels]
        print(f"under an override: {len(graphs)} graph, served so far by {', '.join(ran)}")
    assert ran[0].startswith("triton_biased_grouped|.") and ran[1:] == ["torch"]  # num_tokens says which
    assert len(graphs) == 1
    assert torch.equal(ids, topk_ids) and torch.allclose(weights, topk_weights)


if __name__ == "__main__":
    main()
