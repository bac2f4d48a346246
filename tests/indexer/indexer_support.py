"""What the indexer's tests share: traits in short, one judged call, quantised weights and models that hold indexers."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

from kernel_registry.ops.indexer.wk_weights_proj import cases, oracle, reference
from kernel_registry.ops.indexer.wk_weights_proj.module import projection

DEFAULTS = dict(dtype="bfloat16", wk_format="none", group_size=128)
HOST = dict(platform="cpu") if torch.cuda.is_available() else {}  # kernels for tensors in the host's memory
SIZES = dict(hidden_size=300, head_dim=136, num_heads=56)  # 192 rows; ragged blocks of 128 both ways


def layer(hidden_size, head_dim, num_heads, **other) -> dict:
    """A full traits dict."""
    return {**DEFAULTS, "hidden_size": hidden_size, "head_dim": head_dim, "num_heads": num_heads, **other}


def judged(module: ModuleType, traits: dict, tokens: int, *, flavour="random", seed=0, device="cpu", **options):
    """One call on generated inputs, asserted right by the oracle; its verdict."""
    args, kwargs = cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour)
    factory = module.separate if module is reference else module.fused
    verdict = oracle.check(traits, args, kwargs, factory(**traits, **options)(*args, **kwargs))
    assert verdict.passed, f"{module.__name__} {flavour} seed {seed}: {verdict.detail}"
    return verdict


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8).cpu()


def same(one, other) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def quantised(rows: int, columns: int, wk_format: str, seed: int, group: int = 128, scale_dtype=torch.float32):
    """(fp8 weight, scale, the bfloat16 weight that they stand for), the last worked out number by number."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    height, width = {"fp8_block": (group, group), "fp8_channel": (1, columns), "mxfp8": (1, 32)}[wk_format]
    shape = ((rows - 1) // height + 1, (columns - 1) // width + 1)
    if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponent = torch.randint(115, 125, shape, generator=generator, dtype=torch.uint8)
        factor = 2.0 ** (exponent.double() - 127)
        scale = exponent if scale_dtype is torch.uint8 else exponent.view(torch.float8_e8m0fnu)
    else:
        scale = (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(scale_dtype)
        factor = scale.double()
    row, column = torch.arange(rows)[:, None] // height, torch.arange(columns)[None, :] // width
    exact = weight.double() * factor[row, column]  # 4 + 24 bits at most: float64 has them all
    return weight, scale, exact.float().bfloat16()


class Indexer(nn.Module):
    """A layer's indexer: the projection beside modules with names like its own."""

    def __init__(self, **traits):
        super().__init__()
        self.wkv = nn.Linear(4, 4, bias=False)
        self.wk_norm = nn.LayerNorm(4)
        self.wk_weights_proj = projection(reference.separate(**traits), **traits)


def model(layers=(0, 1), without=(), **traits) -> nn.Module:
    """The layers `layers` of a model, as a pipeline stage has them; those in `without` have no indexer."""
    traits = {**SIZES, **traits}
    made = nn.Module()
    made.layers = nn.ModuleDict()
    for number in layers:
        made.layers[str(number)] = nn.Module()
        made.layers[str(number)].indexer = nn.Identity() if number in without else Indexer(**traits)
    return made


def weight(made: nn.Module, number: int = 0) -> nn.Parameter:
    return made.layers[str(number)].indexer.wk_weights_proj.weight
