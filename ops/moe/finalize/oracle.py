"""The judge of moe.finalize: float64, numpy, sharing no code with any implementation.

A sum in float32 with one cast at the end lies between the two casts of what float64 gives, less and plus float32's own
rounding: 2^-24 of the sum of all magnitudes for each of its K + 3 operations. Rows summed in bfloat16, or cast twice,
do not stay between them.

Where every product of row and weight has an exact float32 (rows that carry their weights; weights that are powers of
two), and the scaling can't be contracted with the addition that follows it, the float32 sum in the order of the slots
has one result: there every bit is compared.
"""

from __future__ import annotations

import numpy as np
import torch

from kernel_registry.contract import Verdict

EPS, TINY = 2.0**-24, 2.0**-126


def check(traits, args, kwargs, outputs) -> Verdict:
    """Judges the output of one call of moe.finalize with these traits, args and kwargs."""
    rows, weights, ids = (*args, None, None)[:3]
    tokens, hidden, dtype = rows.shape[0], traits["hidden_size"], getattr(torch, traits.get("out_dtype", "bfloat16"))

    def wrong(detail):
        return Verdict(False, tokens, detail=detail)

    if tuple(outputs.shape) != (tokens, hidden) or outputs.dtype != dtype or outputs.device != rows.device:
        return wrong(f"the output is {list(outputs.shape)} {outputs.dtype} on {outputs.device}, expected "
                     f"[{tokens}, {hidden}] {dtype} on {rows.device}")
    out = kwargs.get("out")
    if (out is not None) != traits.get("output_alias", False):
        return wrong("`out` is given exactly when output_alias")
    if out is not None and (out.data_ptr(), out.stride()) != (outputs.data_ptr(), outputs.stride()):
        return wrong("the result was not returned in `out`")
    low, high, bits, exact = _expected(traits, rows, weights, ids, kwargs)
    got = _numpy(outputs)
    low, high, bits = (_numpy(torch.from_numpy(x.astype(np.float32)).to(dtype)) for x in (low, high, bits))
    good = ((got >= low) & (got <= high)) | (np.isnan(got) & np.isnan(low))
    for right, what in ((good, "is outside"), (~exact | (got == bits) | (np.isnan(got) & np.isnan(bits)), "is not")):
        if not right.all():
            row, column = map(int, np.argwhere(~right)[0])
            allowed = f"{low[row, column]!r} .. {high[row, column]!r}" if what == "is outside" else \
                f"{bits[row, column]!r}, the float32 sum in the order of the slots"
            return wrong(f"row {row}, column {column}: {got[row, column]!r} {what} {allowed}")
    fraction = float(exact.mean()) if exact.size else 0.0
    return Verdict(True, tokens, detail=f"{tokens} rows, {fraction:.0%} bit for bit", exact=fraction)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).cpu().numpy()


def _expected(traits, rows, weights, ids, kwargs):
    """[T, H] each: the least and the greatest result, the one in slot order, and where that is the only one."""
    rows = _numpy(rows)
    if rows.ndim == 2:
        rows = rows[:, None]
    tokens, slots, hidden = rows.shape
    factors = np.ones((tokens, slots)) if weights is None else _numpy(weights)
    counts = np.ones((tokens, slots), bool) if ids is None else \
        _local(ids.cpu().numpy().astype(np.int64), kwargs.get("expert_map"), traits["num_experts"])
    scale = float(kwargs.get("routed_scaling_factor", 1.0))
    scale32 = np.float32(scale)
    total, magnitude = np.zeros((tokens, hidden)), np.zeros((tokens, hidden))
    ordered, exact = np.zeros((tokens, hidden), np.float32), np.ones((tokens, hidden), bool)
    with np.errstate(all="ignore"):
        for slot in range(slots):
            here = counts[:, slot, None]
            product = np.where(here, rows[:, slot] * factors[:, slot, None], 0.0)
            total += product
            magnitude += np.abs(product)
            product32 = product.astype(np.float32)
            exact &= ~here | (product32 == product) | np.isnan(product)
            ordered += product32
        result, magnitude = total * float(scale32), magnitude * abs(scale)
        scaled = ordered * scale32
        shared = kwargs.get("shared_output")
        if shared is not None:
            shared = _numpy(shared)
            exact &= (scaled == ordered.astype(np.float64) * float(scale32)) | ~np.isfinite(scaled)
            result, magnitude = result + shared, magnitude + np.abs(shared)
            scaled = scaled + shared.astype(np.float32)
        slack = (slots + 3) * (EPS * magnitude + TINY)
        low = np.where(np.isfinite(result), result - slack, result)
        high = np.where(np.isfinite(result), result + slack, result)
    return low, high, scaled, exact


def _local(ids: np.ndarray, table, experts: int) -> np.ndarray:
    if table is not None:
        table = table.cpu().numpy().astype(np.int64)
        known = (ids >= 0) & (ids < len(table))
        ids = np.where(known, np.append(table, -1)[np.where(known, ids, len(table))], -1)
    return (ids >= 0) & (ids < experts)
