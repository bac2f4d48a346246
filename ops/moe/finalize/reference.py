"""moe.finalize in plain torch: what every trait combination means, and the fallback that serves all of them."""

from __future__ import annotations

import torch

from .checks import make_checks, make_finished


def finalize(*, num_experts, topk, hidden_size, dtype="bfloat16", out_dtype="bfloat16", reduced=False,
             weights_applied=False, has_shared=False, expert_parallel=False, output_alias=False, **_):
    """A kernel with moe.finalize's signature for these traits."""
    check = make_checks(topk=topk, hidden_size=hidden_size, dtype=dtype, out_dtype=out_dtype, reduced=reduced,
                        weights_applied=weights_applied, has_shared=has_shared, expert_parallel=expert_parallel,
                        output_alias=output_alias)
    finished = make_finished(dtype=dtype, out_dtype=out_dtype, reduced=reduced, has_shared=has_shared)

    def local(topk_ids, expert_map):
        """[T, K] whether a slot's expert is here."""
        if expert_map is not None:
            size = expert_map.shape[0]
            known = (topk_ids >= 0) & (topk_ids < size)
            padded = torch.cat([expert_map, expert_map.new_full((1,), -1)])  # of a map without entries too
            topk_ids = padded[torch.where(known, topk_ids, size).long()]
        return (topk_ids >= 0) & (topk_ids < num_experts)

    def slot_sum(rows, weights, here):
        total = torch.zeros(rows.shape[0], hidden_size, device=rows.device)
        for slot in range(topk):  # one after the other: torch.sum promises no order
            row = rows[:, slot].float()
            if weights is not None:
                row = row * weights[:, slot, None].float()
            total = total + (row if here is None else torch.where(here[:, slot, None], row, 0.0))
        return total

    def reference(expert_output, topk_weights=None, topk_ids=None, *, shared_output=None, routed_scaling_factor=1.0,
                  expert_map=None, out=None):
        check(expert_output, topk_weights, topk_ids, shared_output, expert_map, out)
        if finished(expert_output, routed_scaling_factor, out):
            return expert_output if out is None else out
        if reduced:
            total = expert_output.float()
        else:
            total = slot_sum(expert_output, topk_weights, None if topk_ids is None else local(topk_ids, expert_map))
        total = total * routed_scaling_factor
        if has_shared:
            total = total + shared_output.float()
        return total.to(getattr(torch, out_dtype)) if out is None else out.copy_(total)

    return reference
