"""moe.experts in plain torch: what every trait combination means, and the fallback that serves all of them.

Runs on any device, expert by expert, over those that some token has chosen; finding them out synchronises with the
device, so it can't be captured in a graph. Everything is float32: in each multiplication, in this order, accumulate,
dequantise, add the bias, multiply by the routing weight; then the sum over a token's slots in the order of the slots,
and one cast at the end. A scale that varies along the sum is inside of it.
"""

from __future__ import annotations

import torch

from .checks import make_checks
from .formats import ACTIVATIONS, Matrix, quantise_activations, w2_matrix, w13_matrix

_LIMIT, _ALPHA = 7.0, 1.702  # of gpt-oss's swiglu


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """[T, K] int64: each slot's row of w13, or -1 where no expert here serves it."""
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.long()[ids.clamp(0, expert_map.shape[0] - 1)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def activate(h: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2I] -> [N, I] float32."""
    if activation == "swigluoai":
        gate, up = h[:, 0::2], h[:, 1::2]
    else:
        gate, up = h.chunk(2, dim=1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(gate) * up
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return (up + 1) * gate * torch.sigmoid(_ALPHA * gate)


def _multiply(x: torch.Tensor, x_scale: torch.Tensor | None, stored: torch.Tensor, scale: torch.Tensor | None,
              matrix: Matrix) -> torch.Tensor:
    """[N, columns] times one expert's matrix: [N, rows] float32, dequantised."""
    weight = matrix.values(stored)
    if scale is None:
        return x @ weight.T
    scale = matrix.scale_of_weight(scale)
    if scale.shape[1] == 1 and (x_scale is None or x_scale.shape[1] == 1):  # constant along the sum: after it
        y = x @ weight.T
        return (y if x_scale is None else y * x_scale) * scale.T
    return (x if x_scale is None else x * x_scale) @ (weight * scale).T


def experts(*, num_experts, topk, hidden_size, intermediate_size, dtype="bfloat16", weight_quant="none",
            act_quant="none", group_size=128, activation="silu", has_bias=False, apply_router_weight_on_input=False,
            expert_parallel=False, output_alias=False, **_):
    """A kernel with moe.experts's signature for these traits."""
    sizes = dict(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size,
                 weight_quant=weight_quant, group_size=group_size, activation=activation)
    check = make_checks(**sizes, topk=topk, dtype=dtype, act_quant=act_quant, has_bias=has_bias,
                        expert_parallel=expert_parallel, output_alias=output_alias)
    first, second, act = w13_matrix(**sizes), w2_matrix(**sizes), ACTIVATIONS[act_quant]

    def operand(x: torch.Tensor, given: torch.Tensor | None):
        """What is multiplied, and its scale: quantised, or rounded once to the hidden states' dtype."""
        if act is None:
            return x.to(getattr(torch, dtype)).float(), None
        return quantise_activations(x, act, group_size, given)

    def reference(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
                  a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None):
        tokens = check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale,
                       w13_bias, w2_bias, expert_map, out)
        ids = local_ids(topk_ids, expert_map, num_experts).flatten()
        slots = torch.argsort(ids, stable=True)  # those without an expert here first, then expert by expert
        counts = torch.bincount(ids + 1, minlength=num_experts + 1).tolist()
        x, x_scale = operand(hidden_states, a13_scale)
        weights = topk_weights.float().flatten()
        rows = torch.zeros(tokens * topk, hidden_size, dtype=torch.float32, device=hidden_states.device)
        for expert, chosen in enumerate(slots.split(counts), start=-1):
            if expert < 0 or not len(chosen):
                continue
            token, weight = chosen // topk, weights[chosen, None]
            scale = x_scale if x_scale is None or x_scale.shape[0] == 1 else x_scale[token]
            h = _multiply(x[token], scale, w13[expert], None if w13_scale is None else w13_scale[expert], first)
            if has_bias:
                h = h + w13_bias[expert].float()
            if apply_router_weight_on_input:
                h = h * weight
            a, scale = operand(activate(h, activation), a2_scale)
            y = _multiply(a, scale, w2[expert], None if w2_scale is None else w2_scale[expert], second)
            if has_bias:
                y = y + w2_bias[expert].float()
            rows[chosen] = y if apply_router_weight_on_input else y * weight
        rows = rows.view(tokens, topk, hidden_size)
        total = rows[:, 0]
        for slot in range(1, topk):
            total = total + rows[:, slot]
        return total.to(hidden_states.dtype) if out is None else out.copy_(total)  # the cast is the copy

    return reference
