"""Checkpoints of the projection that are made up, in each form, and what its parameters held."""

from __future__ import annotations

import torch
from indexer_support import SIZES, bits, quantised

HIDDEN, HEAD_DIM, HEADS = SIZES.values()
ROWS = HEAD_DIM + HEADS
FORMATS = [("none", None), ("fp8_block", torch.float32), ("fp8_block", torch.bfloat16),
           ("fp8_block", torch.float8_e8m0fnu), ("fp8_channel", torch.float32), ("fp8_channel", torch.float8_e8m0fnu),
           ("mxfp8", torch.uint8), ("mxfp8", torch.float8_e8m0fnu)]


def plain(rows=ROWS, seed=0, dtype=torch.bfloat16):
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint(wk_format="none", scale_dtype=torch.float32, *, prefix="layers.0.indexer.", seed=0, fused=False,
               both=False, scale_name="weight_scale_inv"):
    """(tensors by name, the fused bfloat16 weight) of one layer; `both`: weights_proj is quantised too."""
    tensors, parts = {}, []
    for number, (name, rows) in enumerate([("wk_weights_proj", ROWS)] if fused else
                                          [("wk", HEAD_DIM), ("weights_proj", HEADS)]):
        if wk_format == "none" or name == "weights_proj" and not both:
            parts.append(plain(rows, seed + 1000 * number))
            tensors[f"{prefix}{name}.weight"] = parts[-1]
        else:
            stored, scale, exact = quantised(rows, HIDDEN, wk_format, seed + 1000 * number, scale_dtype=scale_dtype)
            tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.{scale_name}"] = stored, scale
            parts.append(exact)
    return tensors, torch.cat(parts)


def untouched(parameter, before) -> bool:
    return parameter.data_ptr() == before[0] and torch.equal(bits(parameter), before[1])


def state(parameter):
    return parameter.data_ptr(), bits(parameter).clone()
