"""DeepSeek-V3's router on this machine: dispatch it, ask why, run it, and check it against its definition.

    python examples/quickstart.py
    TRITON_INTERPRET=1 python examples/quickstart.py      the GPU kernel, interpreted on the CPU
"""

from __future__ import annotations

import torch

from kernel_registry import registry

TOKENS = 16
E, G, KEPT, K, SCALE = 256, 8, 4, 8, 2.5  # experts, groups, groups kept, experts per token, routed_scaling_factor
TRAITS = dict(num_experts=E, num_expert_group=G, topk_group=KEPT, topk=K)


def by_definition(logits: list[float], bias: list[float]) -> list[tuple[int, float]]:
    """One token's (expert, weight) pairs, written out: Python's floats are float64."""
    score = [1 / (1 + 2.718281828459045 ** -x) for x in logits]
    choice = [s + b for s, b in zip(score, bias)]
    size = E // G
    groups = sorted(range(G), key=lambda g: -sum(sorted(choice[g * size:(g + 1) * size])[-2:]))[:KEPT]
    chosen = sorted((e for e in range(E) if e // size in groups), key=lambda e: -choice[e])[:K]
    total = sum(score[e] for e in chosen)
    return [(e, SCALE * score[e] / total) for e in chosen]


def main() -> None:
    route = registry.dispatch("moe.topk", **TRAITS)
    print(f"{registry.platform()} runs {route.name}")
    print(registry.explain("moe.topk", **TRAITS, num_tokens=TOKENS))  # without num_tokens: for every number of them

    device = "cuda" if registry.platform().kind in ("cuda", "hip") else "cpu"
    torch.manual_seed(0)
    router_logits, correction_bias = torch.randn(TOKENS, E, device=device), 0.1 * torch.randn(E, device=device)
    topk_weights, topk_ids = route(router_logits, correction_bias, routed_scaling_factor=SCALE)

    for row in range(TOKENS):
        expected = by_definition(router_logits[row].tolist(), correction_bias.tolist())
        assert topk_ids[row].tolist() == [expert for expert, _ in expected]
        assert all(abs(a - b) < 1e-5 for a, (_, b) in zip(topk_weights[row].tolist(), expected))
    first = zip(topk_ids[0].tolist(), topk_weights[0].tolist())
    print("token 0:", ", ".join(f"expert {expert} x {weight:.3f}" for expert, weight in first))
    print(f"{TOKENS} tokens agree with the definition")


if __name__ == "__main__":
    main()
