"""What only a GPU can show: experts that begin past 2^31 elements of their weights are read where they are."""

from __future__ import annotations

import pytest
import torch
from experts_support import layer

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, oracle, tiles
from kernel_registry.traits.platform import Platform

pytest.importorskip("triton")
from kernel_registry.ops.moe.experts import triton_few_tokens, triton_grouped  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EXPERTS = 130
PLACES = (0, 1, EXPERTS - 2, EXPERTS - 1)  # of the experts that are used
SIZES = dict(hidden_size=8192, intermediate_size=2048)  # w2's expert 128 begins at 2^31, w13's expert 64
ROOM = 24 * 2**30


def spread_out(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of EXPERTS experts that has those of `tensor` in their places, and anything in between."""
    result = torch.empty(EXPERTS, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    for place, expert in zip(PLACES, tensor):
        result[place].copy_(expert)
    return result


def kernels(traits, tokens: int):
    """(name, a kernel of these traits, the kernel of as many experts as spread_out has), launched alike."""
    here = registry.platform()
    made = {"few tokens": (triton_few_tokens, {})} if tokens == 1 else {}
    if tokens == 1 and traits["weight_quant"] == "fp8_block":
        made["few tokens, matrix unit"] = triton_few_tokens, dict(matrix_unit=True)
    for name, platform in (("grouped", here), ("grouped, without descriptors", Platform.parse("sm_80"))):
        chosen = tiles.default({**traits, "platform": platform}, tokens)
        made[name] = triton_grouped, dict(tiles=lambda _, chosen=chosen: chosen)
    for name, (module, more) in made.items():
        near, far = ({**traits, "num_experts": experts, "platform": here} for experts in (len(PLACES), EXPERTS))
        yield name, module.experts(**near, **more), module.experts(**far, **more)


@pytest.mark.parametrize("tokens", (1, 600))
@pytest.mark.parametrize("format", ("none", "fp8_block"))
def test_weights_past_two_to_the_31(format, tokens, device):
    """The same bits as of the layer that has the used experts alone, which the oracle judges; every token goes to all
    of them."""
    if torch.cuda.mem_get_info()[0] < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of the GPU's memory")
    if format == "fp8_block" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    traits = layer(len(PLACES), len(PLACES), format=format, **SIZES)
    (hidden, w13, w2, weights, ids), kwargs = cases.inputs(traits, tokens, device=device)
    large13, large2 = spread_out(w13), spread_out(w2)
    assert min(large13.numel(), large2.numel()) > 2**31
    large = {name: spread_out(tensor) for name, tensor in kwargs.items()}
    far = torch.tensor(PLACES, dtype=ids.dtype, device=device)[ids.long()]
    for name, near_kernel, far_kernel in kernels(traits, tokens):
        expected = near_kernel(hidden, w13, w2, weights, ids, **kwargs)
        verdict = oracle.check(traits, (hidden, w13, w2, weights, ids), kwargs, expected)
        assert verdict.passed, f"{name}: {verdict.detail}"
        assert torch.equal(far_kernel(hidden, large13, large2, weights, far, **large), expected), name
