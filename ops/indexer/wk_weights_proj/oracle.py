"""The judge of indexer.wk_weights_proj: float64, numpy, sharing no code with any implementation.

A sum of H products in float32, in any order, is off by some rounding steps of 2^-24 of the sum of all magnitudes. In
the worst case H of them; rounding errors being as good as independent, 4 sqrt(H + 1) with a probability next to one.
That is well under half a unit of bfloat16, so a sum in bfloat16, or one cast twice, is found out. Where all products
and sums are whole numbers below 2^24 (flavour "exact") every order gives the same float32: each bit is compared.
"""

from __future__ import annotations

import numpy as np
import torch

from kernel_registry.contract import Verdict


def check(traits, args, kwargs, outputs) -> Verdict:
    """Judges the outputs of one call of indexer.wk_weights_proj with these traits, args and kwargs."""
    hidden_states, weight, weights_proj = (*args, None)[:3]
    lead = tuple(hidden_states.shape[:-1])
    rows, dtype = int(np.prod(lead)), getattr(torch, traits.get("dtype", "bfloat16"))
    head_dim, hidden = traits["head_dim"], traits["hidden_size"]
    if traits.get("wk_format") == "nvfp4":
        parts = (_nvfp4(weight, kwargs["wk_scale"], kwargs["wk_global_scale"]), _numpy(weights_proj))
    else:
        parts = (_numpy(weight)[:head_dim], _numpy(weight)[head_dim:])
    x = _numpy(hidden_states).reshape(-1, hidden)
    fractions = []
    for name, got, part in zip(("k", "head_weights"), outputs, parts, strict=True):
        shape = (*lead, len(part))
        if tuple(got.shape) != shape or got.dtype != dtype or got.device != hidden_states.device:
            return Verdict(False, rows, detail=f"{name} is {list(got.shape)} {got.dtype} on {got.device}, expected "
                                               f"{list(shape)} {dtype} on {hidden_states.device}")
        with np.errstate(all="ignore"):
            exact, magnitude = x @ part.T, np.abs(x) @ np.abs(part).T
            whole = (magnitude < 2**24) & (x == np.round(x)).all(1)[:, None] & (part == np.round(part)).all(1)
            slack = np.where(whole, 0.0, 4 * np.sqrt(hidden + 1) * (2.0**-24 * magnitude + 2.0**-149))
            low, high = (_cast(np.where(np.isfinite(exact), exact + sign * slack, exact), dtype) for sign in (-1, 1))
        found = _numpy(got).reshape(rows, len(part))
        good = ((found >= low) & (found <= high)) | (np.isnan(found) & np.isnan(exact))
        if not good.all():
            row, column = map(int, np.argwhere(~good)[0])
            return Verdict(False, rows, detail=f"{name}, row {row}, column {column}: {found[row, column]!r} is outside "
                                               f"{low[row, column]!r} .. {high[row, column]!r}")
        fractions.append(whole)
    share = float(np.concatenate(fractions, 1).mean()) if rows else 0.0
    return Verdict(True, rows, detail=f"{rows} rows, {share:.0%} bit for bit", exact=share)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).cpu().numpy()


def _cast(values: np.ndarray, dtype) -> np.ndarray:
    """To float32 and then to dtype, as kernels do, in float64 again."""
    return _numpy(torch.from_numpy(values.astype(np.float32)).to(dtype))


def _nvfp4(packed, scale, global_scale) -> np.ndarray:
    codes = packed.cpu().numpy()
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(int)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    value = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    factor = _numpy(scale) * float(global_scale)
    return np.where(codes & 8, -value, value) * np.repeat(factor, 16, axis=1)
