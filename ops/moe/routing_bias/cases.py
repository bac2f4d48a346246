"""Inputs of moe.routing_bias for tests, verify and bench: biases that the target dtype holds exactly, since others are
refused. Everything is drawn on the CPU from the seed."""

from __future__ import annotations

import torch

FLAVOURS = (
    "random",  # a float32 parameter of multiples of 1/64 below 4, which each of the dtypes holds
    "stored",  # already of the dtype that is wanted: any values
    "two_rows",  # [2, E]: a router for each of two modalities in one parameter
)
WORKLOADS = {
    "deepseek-v3": {"num_experts": 256, "topk": 8, "num_expert_group": 8, "topk_group": 4, "bias_dtype": "float32"},
    "deepseek-v3-bf16": {"num_experts": 256, "topk": 8, "num_expert_group": 8, "topk_group": 4, "dtype": "bfloat16",
                         "bias_dtype": "bfloat16"},
    "glm-4.5": {"num_experts": 160, "topk": 8, "bias_dtype": "float32"},
    "kimi-k2": {"num_experts": 384, "topk": 8, "bias_dtype": "float16"},
}


def inputs(traits, num_tokens, *, seed, device, flavour):
    """One call, as (args, kwargs): a bias as a checkpoint gives it."""
    draw = torch.Generator().manual_seed(seed)
    shape = (2, traits["num_experts"]) if flavour == "two_rows" else (traits["num_experts"],)
    if flavour == "stored":
        values = torch.randn(shape, generator=draw).to(getattr(torch, traits["bias_dtype"]))
    else:
        values = torch.randint(-255, 256, shape, generator=draw) / 64
    return (torch.nn.Parameter(values.to(device), requires_grad=False),), {}
