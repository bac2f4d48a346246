"""The exact rule of moe.topk on float32 choices, in numpy, for tests that want the same ids in the same order: the
Triton router's own scores, float32 sums with the bias and of a group's two largest, lowest id on ties, NaN last.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from kernel_registry.ops.moe.topk import oracle, scores, triton_router

JUDGED = 24


@triton.jit
def order_kernel(logits, out, count, SCORING: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, scores.order(x, SCORING, PTX), mask=at < count)


def choices(traits: dict, logits: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    """[T, E] float32: the bits that the router orders a row by."""
    logits = logits.contiguous()
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    block = 2**16 if triton_router.INTERPRETED else 1024
    ptx = torch.version.cuda is not None and not triton_router.INTERPRETED
    order_kernel[(-(-logits.numel() // block),)](logits, out, logits.numel(), traits["scoring"], ptx, block)
    score = out.cpu().numpy()
    if traits["scoring"] == "softmax":
        top = score.max(axis=1, keepdims=True)
        score = np.where(np.isfinite(top), score, np.float32("nan"))  # a NaN, a +inf, or nothing but -inf
    return score if bias is None else score + bias.float().cpu().numpy()


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` best along the last dimension, best first: the lowest on ties, NaN last."""
    missing = np.isnan(values)
    return np.lexsort((np.where(missing, np.float32(0), -values), missing), axis=-1)[..., :count]


def exact_ids(traits: dict, logits: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    """[T, routed]: the logical ids that the rule gives."""
    with np.errstate(all="ignore"):
        choice = choices(traits, logits, bias)
        tokens, groups, kept = len(choice), traits["num_expert_group"], traits["topk_group"]
        if kept < groups:
            grouped = choice.reshape(tokens, groups, -1)
            top = np.take_along_axis(grouped, best(grouped, 2 if traits["has_bias"] else 1), -1)
            keep = np.zeros((tokens, groups), bool)
            score = top[..., 0] + top[..., 1] if traits["has_bias"] else top[..., 0]
            np.put_along_axis(keep, best(score, kept), True, 1)
            if traits["scoring"] == "softmax":  # of a logit of -inf the score is 0: above what is dropped
                grouped = np.maximum(grouped, np.finfo(np.float32).min)
            choice = np.where(keep[:, :, None], grouped, np.float32("-inf")).reshape(choice.shape)
    return best(choice, traits["topk"] - traits["num_fused_shared_experts"])


def assert_exact(traits: dict, made, logits: torch.Tensor, bias: torch.Tensor | None, about=""):
    """One call: the ids of the exact rule in its order; and right by the oracle, which is asked for the first rows
    only, for it takes its time over rows that are too close to call."""
    outputs = made(logits, bias)
    expected = exact_ids(traits, logits, bias)
    got = outputs[1][:, :expected.shape[1]].cpu().numpy()
    wrong = (got != expected).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        with np.errstate(all="ignore"):
            choice = choices(traits, logits[row:row + 1], bias)[0]
        some = np.unique([*got[row], *expected[row]])
        raise AssertionError(f"{about}: {wrong.sum()} of {len(got)} rows; row {row} got {got[row]}, exactly "
                             f"{expected[row]}, choices {dict(zip(some.tolist(), choice[some].tolist()))}")
    with np.errstate(all="ignore"):
        verdict = oracle.check(traits, (logits[:JUDGED], bias), {}, [output[:JUDGED] for output in outputs])
    assert verdict.passed, f"{about}: {verdict.detail}"
