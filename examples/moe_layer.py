"""A whole mixture-of-experts layer from a model's config: routing, experts, shared expert, one output.

    python examples/moe_layer.py

The layer's three kernels are bound once. It is DeepSeek-V3's, with fewer and smaller experts, of which every call is
checked here against the three ops by hand. Nothing needs a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kernel_registry import Registry, moe_layer
from kernel_registry.layer import read_layer

registry = Registry(platform="cpu")  # where the tensors are, here; without, it decides for this machine's GPU
TOKENS, EXPERTS, HIDDEN, INTERMEDIATE = 6, 32, 64, 48


def main() -> None:
    torch.manual_seed(0)
    published = read_layer("deepseek-v3")
    print(f"published: {published.experts['num_experts']} experts, weights {published.experts['weight_quant']}")
    traits = replace(published, routing={**published.routing, "num_experts": EXPERTS},
                     experts={**published.experts, "weight_quant": "none", "act_quant": "none"})
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN).bfloat16() / 8
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE).bfloat16() / 8
    gate, bias = torch.randn(EXPERTS, HIDDEN) / 8, torch.randn(EXPERTS) / 100
    up, down = torch.randn(HIDDEN, HIDDEN).bfloat16() / 8, torch.randn(HIDDEN, HIDDEN).bfloat16() / 8

    def shared_expert(x):
        return torch.nn.functional.silu(x @ up) @ down

    layer = moe_layer(traits, w13, w2, correction_bias=bias, shared_expert=shared_expert, registry=registry)
    print(layer.explain().rpartition("\n\n")[2])

    hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
    logits = hidden.float() @ gate.t()
    buffer = torch.full((TOKENS, HIDDEN + 8), float("nan")).bfloat16()  # a slice of what a runtime has allocated
    out = layer(hidden, logits, out=buffer[:, :HIDDEN])

    route = registry.dispatch("moe.topk", **traits.routing)
    experts = registry.dispatch("moe.experts", num_experts=EXPERTS, topk=8, hidden_size=HIDDEN,
                                intermediate_size=INTERMEDIATE)
    topk_weights, topk_ids = route(logits, bias, routed_scaling_factor=2.5)
    routed = experts(hidden, w13, w2, topk_weights, topk_ids)
    by_hand = (routed.float() + shared_expert(hidden).float()).bfloat16()
    assert torch.equal(out, by_hand) and buffer[:, HIDDEN:].isnan().all()
    assert torch.equal(layer(hidden.clone(), logits), by_hand)
    ran = []
    layer(hidden, logits, observe=lambda op, *_: ran.append(op))
    print(f"ran: {', '.join(ran)}")

    in_place = hidden.clone()
    layer(in_place, logits, out=in_place)  # read to the end before it is written
    assert torch.equal(in_place, by_hand)
    print("the same result in a slice of a buffer, in a new tensor, and in the hidden states' own place")


if __name__ == "__main__":
    main()
