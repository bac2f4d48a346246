"""The judge of score_dtype="logits": the eager torch ops repeated one by one, with only the ranking done by numpy."""

from __future__ import annotations

import torch

from .oracle_numbers import Wrong, ranking


def check_bits(traits, args, kwargs, outputs) -> int:
    """score_dtype="logits": the eager sequence, op by op, on the same device. Returns the number of rows, all equal bit
    for bit; raises Wrong."""
    logits, bias = args
    tokens, experts, topk = logits.shape[0], traits["num_experts"], traits["topk"]
    shared = traits.get("num_fused_shared_experts", 0)
    groups, kept = traits.get("num_expert_group", 1), traits.get("topk_group", 1)

    def ranked(values):
        return torch.from_numpy(ranking(values.double().cpu().numpy())).to(values.device)

    scoring = traits.get("scoring", "sigmoid")
    if scoring == "sigmoid":
        scores = logits.sigmoid()
    elif scoring == "softmax":
        scores = logits.softmax(-1)
    else:
        scores = ((-logits.abs()).exp().log1p() + logits.clamp(min=0)).sqrt()
    choice = scores if bias is None else scores + bias
    if kept < groups:
        grouped = choice.reshape(tokens, groups, experts // groups)
        best = grouped.gather(2, ranked(grouped)[:, :, :1 if bias is None else 2])
        group_scores = best[:, :, 0] if bias is None else best.sum(2)
        mask = torch.ones_like(group_scores, dtype=torch.bool)
        mask.scatter_(1, ranked(group_scores)[:, :kept], False)
        choice = choice.masked_fill(mask[:, :, None].expand_as(grouped).reshape(tokens, experts), float("-inf"))
    ids = ranked(choice)[:, :topk - shared]
    weights = scores.gather(1, ids)
    weights[weights != weights] = 0
    if traits.get("renormalize", True):
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        weights[weights != weights] = 0  # float16 has no 1e-20: 0 / 0; sqrtsoftplus has inf / inf
    weights = (weights * kwargs.get("routed_scaling_factor", 1.0)).float()
    for n in range(shared):
        ids = torch.cat([ids, torch.full_like(ids[:, :1], experts + n)], 1)
        weights = torch.cat([weights, torch.full_like(weights[:, :1], kwargs.get("shared_expert_weight", 1.0))], 1)
    table = kwargs.get("expert_map")
    if table is not None:
        columns = topk if len(table) > experts else topk - shared
        ids[:, :columns] = table.long()[ids[:, :columns]]
    padded = kwargs.get("num_token_non_padded")
    if padded is not None:
        live = max(0, int(padded.reshape(-1)[0]))
        ids[live:], weights[live:] = -1, 0
    if not torch.equal(ids.to(torch.int32), outputs[1]):
        row = int((ids != outputs[1]).any(1).nonzero()[0])
        raise Wrong(f"row {row}: ids {outputs[1][row].tolist()}, eager {ids[row].tolist()}")
    differ = weights.view(torch.int32) != outputs[0].view(torch.int32)
    if differ.any():
        row = int(differ.any(1).nonzero()[0])
        raise Wrong(f"row {row}: weights {outputs[0][row].tolist()}, eager {weights[row].tolist()}")
    return tokens
