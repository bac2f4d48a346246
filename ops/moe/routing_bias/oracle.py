"""The judge of moe.routing_bias: the dtype that was asked for, and every value as the checkpoint had it."""

from __future__ import annotations

import numpy as np
import torch

from kernel_registry.contract import Verdict


def check(traits, args, kwargs, outputs) -> Verdict:
    """Judges one call: `args` has the bias before it was prepared."""
    bias, = args
    rows = bias.numel() // traits["num_experts"]
    wanted = getattr(torch, traits["bias_dtype"])
    if outputs.dtype != wanted or outputs.shape != bias.shape or outputs.device != bias.device:
        return Verdict(False, rows, detail=f"the bias is {list(outputs.shape)} {outputs.dtype} on {outputs.device}, "
                       f"expected {list(bias.shape)} {wanted} on {bias.device}")
    before, after = (x.detach().double().cpu().numpy() for x in (bias, outputs))
    same = (before == after) & (np.signbit(before) == np.signbit(after)) | np.isnan(before) & np.isnan(after)
    if same.all():
        return Verdict(True, rows)
    place = tuple(map(int, np.argwhere(~same)[0]))
    return Verdict(False, rows, detail=f"the bias at {place} is {after[place]!r}, was {before[place]!r}")
