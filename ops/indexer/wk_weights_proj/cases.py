"""Inputs of indexer.wk_weights_proj for tests, verify and bench, drawn on the CPU: the same numbers for each device.

`inputs` makes one call; FLAVOURS names the kinds of values, the first being what a model gives; WORKLOADS the layers of
published models.
"""

from __future__ import annotations

import torch

FLAVOURS = (
    "random",  # normal hidden states, small weights
    "exact",  # small whole numbers: every order of a sum gives the same bits
    "three_dimensions",  # [batch, sequence, H]
    "strided",  # hidden states that are a slice of a padded buffer, the padding NaN
    "transposed",  # hidden states whose columns are far apart
    "nonfinite",  # NaN and infinities in some hidden states
)


def _layer(hidden, head_dim, heads, **other):
    return {"hidden_size": hidden, "head_dim": head_dim, "num_heads": heads, **other}


WORKLOADS = {
    "deepseek-v3.2": _layer(7168, 128, 64, wk_format="fp8_block"),
    "glm-5": _layer(6144, 128, 32),
    "deepseek-v3.2-nvfp4": _layer(7168, 128, 64, wk_format="nvfp4"),
}


def inputs(traits, num_tokens: int, *, seed: int = 0, device="cpu", flavour: str = "random"):
    """(args, kwargs) of one call with these traits (canonical values; absent ones have their defaults)."""
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour {flavour!r} is not one of {', '.join(FLAVOURS)}")
    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim, heads = traits["hidden_size"], traits["head_dim"], traits["num_heads"]
    dtype = getattr(torch, traits.get("dtype", "bfloat16"))

    def draw(rows):
        if flavour == "exact":
            return torch.randint(-3, 4, (rows, hidden), generator=generator).float()
        return torch.randn(rows, hidden, generator=generator)

    x = draw(num_tokens)
    if flavour == "nonfinite":
        odd = torch.tensor([float("nan"), float("inf"), float("-inf")])
        where = torch.randint(0, 4 * hidden, x.shape, generator=generator) == 0
        x = torch.where(where, odd[torch.randint(0, 3, x.shape, generator=generator)], x)
    x = x.to(dtype).to(device)
    if flavour == "three_dimensions":
        batch = 2 if num_tokens % 2 == 0 else 1
        x = x.view(batch, num_tokens // batch, hidden)
    elif flavour == "strided":
        wide = torch.full((num_tokens, hidden + 5), float("nan"), dtype=dtype, device=device)
        wide[:, 2:-3] = x
        x = wide[:, 2:-3]
    elif flavour == "transposed":
        x = x.t().contiguous().t()
    small = 1.0 if flavour == "exact" else 0.02
    if traits.get("wk_format") != "nvfp4":
        return (x, (draw(head_dim + heads) * small).to(dtype).to(device)), {}
    packed = torch.randint(0, 256, (head_dim, hidden // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 9, (head_dim, hidden // 16), generator=generator).float()
    if flavour == "exact":
        scale = scale * 2  # halves become whole
    kwargs = {"wk_scale": scale.to(torch.float8_e4m3fn).to(device),
              "wk_global_scale": torch.tensor(1.0 if flavour == "exact" else 0.00123, device=device)}
    return (x, packed.to(device), (draw(heads) * small).to(dtype).to(device)), kwargs


def prefix(args, kwargs, outputs, count: int):
    """The call of the first `count` tokens alone, (args, kwargs, outputs): tokens never mix."""
    first, *rest = args
    return ((first.reshape(-1, first.shape[-1])[:count], *rest), kwargs,
            tuple(out.reshape(-1, out.shape[-1])[:count] for out in outputs))
