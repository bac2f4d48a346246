"""A router's correction bias, brought to the dtype that the router reads, once, when the model is loaded.

    python examples/routing_bias.py

Two biases: one that bfloat16 holds, and one as GLM-5.2's, of which bfloat16 would leave a handful of values. The
second stays float32, and goes to a router that takes it as it is. Nothing needs a GPU.
"""

from __future__ import annotations

import torch

from kernel_registry import Registry, errors, moe_router
from kernel_registry.preparation import preparation_of

registry = Registry(platform="cpu")  # where the tensors are, here; without, it decides for this machine's GPU
EXPERTS = 256
ROUTER = dict(num_experts=EXPERTS, topk=8, dtype="bfloat16")


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e_score_correction_bias = torch.nn.Parameter(torch.empty(EXPERTS), requires_grad=False)


def loaded(values: torch.Tensor) -> Gate:
    gate = Gate()
    gate.load_state_dict({"e_score_correction_bias": values})
    return gate


def main() -> None:
    torch.manual_seed(0)
    coarse = loaded(torch.randint(-128, 128, (EXPERTS,)) / 64)
    bias = coarse.e_score_correction_bias
    registry.prepare("moe.routing_bias", coarse, bias_dtype="bfloat16", **ROUTER)
    take = registry.bind("moe.routing_bias", bias_dtype="bfloat16", **ROUTER)
    assert coarse.e_score_correction_bias is bias is take(bias) and bias.dtype == torch.bfloat16
    print(*preparation_of(bias).report)

    fine = loaded(6.817 + 0.246 * torch.rand(EXPERTS))
    bias = fine.e_score_correction_bias
    try:
        take(bias)
    except errors.PreparationError as error:
        print(f"refused: {error.message.partition(',')[0]}")
    try:
        registry.prepare("moe.routing_bias", fine, bias_dtype="bfloat16", **ROUTER)
    except errors.PreparationError as error:
        print(f"refused: {error.message}")

    pointer = bias.data_ptr()
    route = moe_router(bias, registry=registry, **ROUTER)  # finds one that takes float32 beside bfloat16 logits
    assert bias.dtype == torch.float32 and bias.data_ptr() == pointer
    print(f"routed as it is: {route.traits['dtype']} logits, {route.traits['bias_dtype']} bias")
    weights, ids = route(torch.randn(4, EXPERTS).bfloat16(), bias)
    print(f"{tuple(ids.shape)} experts chosen")


if __name__ == "__main__":
    main()
