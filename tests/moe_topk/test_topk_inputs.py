"""Tensors that contradict the dispatched traits get an error that says what was given and what was expected."""

from __future__ import annotations

import pytest
import torch
from topk_support import implementations, kernel, routing

from kernel_registry.errors import InputError

BAD = {
    "rank": (dict(logits=torch.zeros(2, 3, 64)), r"router_logits is \[2, 3, 64\].*expected \[tokens, 64\] float32"),
    "one dimension": (dict(logits=torch.zeros(64)), r"router_logits is \[64\]"),
    "experts": (dict(logits=torch.zeros(3, 65)), r"router_logits is \[3, 65\].*expected \[tokens, 64\]"),
    "dtype": (dict(logits=torch.zeros(3, 64, dtype=torch.bfloat16)), r"bfloat16.*expected \[tokens, 64\] float32"),
    "no tensor": (dict(logits=[[0.0] * 64]), r"router_logits is list"),
    "no bias": (dict(bias=None), r"correction_bias is None.*has_bias=True"),
    "bias length": (dict(bias=torch.zeros(63)), r"correction_bias is \[63\].*expected \[64\] float32"),
    "bias rank": (dict(bias=torch.zeros(1, 64)), r"correction_bias is \[1, 64\]"),
    "bias dtype": (dict(bias=torch.zeros(64, dtype=torch.float16)),
                   r"correction_bias is .*float16.*expected .*float32"),
    "bias device": (dict(bias=torch.zeros(64, device="meta")), r"correction_bias is .*meta"),
    "map length": (dict(expert_map=torch.arange(63)), r"expert_map is \[63\].*expected \[64\] or \[65\]"),
    "map dtype": (dict(expert_map=torch.zeros(64)), r"expert_map is .*float32.*int32 or int64"),
    "map device": (dict(expert_map=torch.arange(64, device="meta")), r"expert_map is .*meta"),
    "padding as a number": (dict(num_token_non_padded=3), r"num_token_non_padded is int"),
    "padding dtype": (dict(num_token_non_padded=torch.tensor(3.0)), r"num_token_non_padded is .*float32"),
    "padding size": (dict(num_token_non_padded=torch.tensor([3, 4])), r"num_token_non_padded is \[2\]"),
}


def placed(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


@pytest.mark.parametrize("traits", [routing(64, 7, 8, 4, shared=1), routing(64, 7, shared=1)],
                         ids=["grouped", "single"])
@pytest.mark.parametrize("about", BAD)
def test_refused(traits, about, device):
    changed, message = BAD[about]
    given = {"logits": torch.zeros(3, 64), "bias": torch.zeros(64), **changed}
    given = {key: placed(value, device) for key, value in given.items()}
    for name in implementations(traits):
        with pytest.raises(InputError, match=message):
            kernel(name, traits)(given.pop("logits"), given.pop("bias"), **given)
        given = {"logits": torch.zeros(3, 64), "bias": torch.zeros(64), **changed}
        given = {key: placed(value, device) for key, value in given.items()}


def test_a_bias_that_was_not_announced(device):
    logits, bias = torch.zeros(1, 64, device=device), torch.zeros(64, device=device)
    traits = routing(64, 4, has_bias=False)
    for name in implementations(traits):
        with pytest.raises(InputError, match="has_bias=False"):
            kernel(name, traits)(logits, bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that the tensors are not on")
@pytest.mark.parametrize("traits", [routing(64, 6, 8, 4), routing(64, 6)], ids=["grouped", "single"])
def test_tensors_that_are_not_on_the_gpu(traits):
    with pytest.raises(InputError, match="runs on a GPU"):
        kernel(implementations(traits)[1], traits)(torch.zeros(1, 64), torch.zeros(64))
