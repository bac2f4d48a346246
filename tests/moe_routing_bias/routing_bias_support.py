"""A router's bias with all who hold it, biases that narrow with and without loss, and what is counted and compared."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OP, NAME = "moe.routing_bias", "e_score_correction_bias"
EXPERTS = 64
ROUTER = dict(num_experts=EXPERTS, topk=4, num_expert_group=4, topk_group=2, dtype="bfloat16")
TO_BF16 = dict(ROUTER, bias_dtype="bfloat16")


class Gate(torch.nn.Module):
    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(EXPERTS, 8), requires_grad=False)
        self.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)


class Router:
    """Not a module: holds the parameter that it was given, as the routing layers of serving engines do."""

    def __init__(self, bias):
        self.bias = bias


class Layer(torch.nn.Module):
    """One parameter with four holders, two of them under another name."""

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.gate = Gate(bias)
        self.experts = torch.nn.Module()
        self.experts.correction = self.gate.e_score_correction_bias
        self.router = Router(self.gate.e_score_correction_bias)
        self.held = {"bias": self.gate.e_score_correction_bias}

    @property
    def holders(self):
        return (self.gate.e_score_correction_bias, self.experts.correction, self.router.bias, self.held["bias"])


def exact(seed=0, shape=(EXPERTS,)) -> torch.Tensor:
    """float32 values that bfloat16 and float16 hold."""
    return torch.randint(-255, 256, shape, generator=torch.Generator().manual_seed(seed)) / 64


def band(seed=0) -> torch.Tensor:
    """As GLM-5.2's biases lie: of which bfloat16 leaves a handful."""
    return 6.817 + (7.063 - 6.817) * torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def untouched(layer, values):
    return same_bits(layer.gate.e_score_correction_bias.data, values)


class Counted(TorchDispatchMode):
    """The aten calls made inside: all of them, and the casts of tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.names, self.casts = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        self.casts += "_to_copy" in str(function) and args[0].shape == (EXPERTS,)
        return function(*args, **(kwargs or {}))
