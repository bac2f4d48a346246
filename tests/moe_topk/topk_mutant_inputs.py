"""The inputs that mutants of the Triton router are found by: name -> (traits, how the tensors are made)."""

from __future__ import annotations

import importlib
import itertools
import random

import torch
from topk_support import routing

from kernel_registry.ops.moe import topk as package
from kernel_registry.ops.moe.topk import cases, oracle

UNIT = 8 * 2.0**-23  # of the packed numbers, where fewer experts than lanes make the window its widest
NARROW, SOFT = routing(24, 4), routing(24, 4, scoring="softmax", has_bias=False)
PAIRED = routing(24, 4, rows_per_program=2)
FEW_GROUPS, SOFT_GROUPS = routing(32, 4, 4, 2), routing(32, 4, 4, 2, scoring="softmax", has_bias=False)
ROOT = routing(24, 4, scoring="sqrtsoftplus")
RAW = routing(24, 4, scoring="softmax", has_bias=False, renormalize=False, rows_per_program=2)
HALF = dict(scoring="softmax", has_bias=False, dtype="bfloat16")
LONG, LONGER = routing(160, 4), routing(306, 3, 17, 17)  # 5 and 18 experts a lane: more than a list holds; scanned


def near_choices(together, traits=NARROW, tokens=14, step=0.35):
    """Rows whose choices, from the best down, come in clusters of `together`, `step` units apart inside one and 20 from
    the next, so that some round to one number, and none to that of another cluster. Drawn for each row are the experts'
    places, and where the units begin."""
    generator = torch.Generator().manual_seed(together)
    experts = traits["num_experts"]
    place = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    units = place // together * 20.3 + place % together * step + torch.rand(tokens, 1, generator=generator)
    return -4 * UNIT * units, torch.zeros(experts)  # a sigmoid's slope at 0 is a quarter


def near_biases():
    """As near_choices(2), but it is the bias that the choices differ by."""
    return torch.zeros(2, 24), near_choices(2, tokens=1)[0][0] / 4


def near_groups(traits=FEW_GROUPS, tokens=14):
    """Rows whose groups have scores 0.7 units apart, from members that round this way and that."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((tokens, 4, 8), -2.0)
    for row in logits:
        total = torch.randperm(4, generator=generator) * 0.7
        first = 10 * torch.rand(4, generator=generator)
        row[:, 3], row[:, 5] = 4 * UNIT * first, 4 * UNIT * (total - first)
    bias = torch.zeros(32)
    bias[0] = -20  # the window is at its widest
    return logits.reshape(tokens, 32), bias


def overfull():
    """The four best experts of a row share a lane, which has five in all, whose list holds three; in many orders."""
    logits = torch.linspace(-4, -3, 160).repeat(32, 1)
    for row, order in enumerate(random.Random(0).sample([*itertools.permutations([-9, 0.5, 1.0, 1.5, 2.0])], 32)):
        logits[row, [4 * row, 4 * row + 1, 4 * row + 2, 4 * row + 3, 128 + row]] = torch.tensor(order)
    return logits, torch.zeros(160)


def overfull_half():
    return overfull()[0].bfloat16(), None


def many_digits():
    """Logits that differ in their last digits only, which an id would overwrite."""
    place = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(row)) for row in range(14)])
    return 1 + place * 2.0**-23, None


def nan_with_a_sign():
    """Rows with one NaN whose sign is set."""
    logits = torch.arange(24).repeat(14, 1).bfloat16()
    logits.view(torch.int16)[torch.arange(14), torch.arange(14)] = -1
    return logits, None


def few_finite():
    """Two numbers in the last two groups, and -inf, with a score of 0, which is more than what dropped groups have."""
    logits = torch.full((14, 32), float("-inf"))
    logits[torch.arange(14), 16 + torch.arange(14) % 8] = 1.0
    logits[torch.arange(14), 31 - torch.arange(14) % 8] = 2.0
    return logits, None


def far_groups():
    """A group of one great choice and others far below the window, and a better one of moderate choices."""
    bias = torch.full((32,), -20.0)
    bias[3], bias[16:24] = 1.0, -3.0
    return torch.zeros(2, 32), bias


def offset_groups():
    """Biases about 100, a float32 place apart: sums of two round, those of groups 0 and 1 to the same number."""
    place, bias = 2.0**-17, torch.full((32,), 99.9)
    bias[3], bias[5] = 100 + 2 * place, 100 + place
    bias[11], bias[13] = 100 + 2 * place, 100 + 2 * place
    return torch.zeros(2, 32), bias


def next_row_alike():
    """The last chosen of each even row has the choice of the first chosen of the next row, which has a lower id."""
    logits = torch.full((14, 24), -3.0)
    logits[0::2, 8:12] = torch.tensor([2.0, 1.5, 1.0, 0.5])
    logits[1::2, 4:8] = torch.tensor([0.5, 0.25, 0.0, -0.25])
    return logits, torch.zeros(24)


def near_in_odd_rows(together, step=0.35):
    """Of two rows that share a warp, only the second has choices that packing can't tell apart."""
    logits, bias = near_choices(together, step=step)
    logits[0::2] = torch.arange(24) * -0.1
    return logits, bias


def far_apart():
    """Logits of about 300 and of about -300 in turns, a few apart."""
    logits = torch.arange(24).flip(0).repeat(14, 1) * 0.5
    logits[0::2] += 300
    logits[1::2] -= 300
    return logits, None


def one_great_choice(great, small, moderate, others):
    """One group's best two choices come from the logits `great` and `small`, another's both from `moderate`."""
    logits = torch.full((2, 32), float(others))
    logits[:, 9], logits[:, 12], logits[:, 17], logits[:, 22] = great, small, moderate, moderate
    return logits, torch.zeros(32)


def above_the_window():
    """Scores far above what the window holds: up to 60, of sqrtsoftplus."""
    return 60 + 4000 * torch.rand(14, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(24)


def nan_in_a_full_group():
    """As many are chosen as the kept group has experts, but one of those is NaN: some expert dropped goes before it."""
    logits = torch.full((2, 288), -1.0)
    logits[:, 90:99] = torch.arange(9) * 0.1
    logits[:, 93] = float("nan")
    return logits, torch.zeros(288)


def flavour(name, traits, tokens=14, seed=0):
    return traits, lambda: cases.inputs(traits, tokens, seed=seed or len(name), flavour=name)[0]


NAMED = {
    "pairs": (NARROW, lambda: near_choices(2)),
    "a pair at the end": (routing(24, 5), lambda: near_choices(2)),
    "pairs by bias": (NARROW, near_biases),
    "two equal": (NARROW, lambda: near_choices(2, step=0.0)),
    "triples": (routing(24, 6), lambda: near_choices(3, step=0.22)),
    "a pair at the end of odd rows": (routing(24, 5, rows_per_program=2), lambda: near_in_odd_rows(2)),
    "triples in odd rows": (routing(24, 6, rows_per_program=2), lambda: near_in_odd_rows(3, step=0.22)),
    "alike in the next row": (PAIRED, next_row_alike),
    "near groups": (FEW_GROUPS, near_groups),
    "far groups": (routing(32, 1, 4, 1), far_groups),
    "sums that round": (routing(32, 2, 4, 1), offset_groups),
    "an overfull lane": (LONG, overfull),
    "far apart": (routing(24, 4, scoring="softmax", has_bias=False, rows_per_program=2), far_apart),
    "above the window": (ROOT, above_the_window),
    "a group above the window": (routing(32, 2, 4, 1, scoring="sqrtsoftplus"),
                                 lambda: one_great_choice(400, -5, 25, -5)),
    "a group near the window's top": (routing(32, 2, 4, 1), lambda: one_great_choice(5, -0.85, 0.49, -6)),
    "NaN in a full group": (routing(288, 9, 32, 1), nan_in_a_full_group),
    "two experts a lane": flavour("constant", routing(64, 4)),
    "many experts": flavour("random", routing(288, 8), tokens=8),
    "many experts, softmax": flavour("random", routing(288, 4, scoring="softmax", has_bias=False), tokens=4),
    "scanned": flavour("constant", LONGER, tokens=2),
    "random": flavour("random", NARROW),
    "random, two rows a warp": flavour("random", PAIRED),
    "one of groups": flavour("random", routing(64, 1, 8, 1), tokens=32),
    "random, groups": flavour("random", FEW_GROUPS),
    "random, softmax groups": flavour("random", SOFT_GROUPS),
    "random, softmax not renormalised": flavour("random", RAW),
    "random, sqrtsoftplus": flavour("random", ROOT),
    "large": flavour("large", NARROW),
    "tiny scores": flavour("tiny_scores", NARROW),
    "ties, groups": flavour("ties", FEW_GROUPS),
    "signed zeros, softmax": flavour("signed_zero", SOFT),
    "not finite": flavour("nonfinite", NARROW),
    "tiny scores, sqrtsoftplus": flavour("tiny_scores", ROOT),
    "not finite, groups": flavour("nonfinite", FEW_GROUPS),
    "not finite, softmax": flavour("nonfinite", routing(40, 6, scoring="softmax", has_bias=False), tokens=21),
    "not finite, softmax groups": flavour("nonfinite", SOFT_GROUPS, tokens=21),
    "not finite, sqrtsoftplus": flavour("nonfinite", ROOT, tokens=21),
    "random, negative, bfloat16 softmax": flavour("tiny_scores", routing(24, 4, **HALF)),
    "an overfull lane, bfloat16 softmax": (routing(160, 4, **HALF), overfull_half),
    "few finite, softmax groups": (SOFT_GROUPS, few_finite),
    "not finite, bfloat16 softmax groups": flavour("nonfinite", routing(32, 4, 4, 2, **HALF), tokens=21),
    "not finite, bfloat16 softmax": flavour("nonfinite", routing(40, 6, **HALF), tokens=21),
    "NaN with a sign, bfloat16 softmax": (routing(24, 4, **HALF), nan_with_a_sign),
    "random, softmax, many digits": (SOFT, many_digits),
}


def failure(module, name, device) -> str:
    """What the oracle says of a module's result for NAMED inputs, or where it is another than the reference's."""
    traits, make = NAMED[name]
    args = tuple(a if a is None else a.to(device) for a in make())
    outputs = module.topk(**traits)(*args)
    verdict = oracle.check(traits, args, {}, outputs)
    if not verdict.passed:
        return verdict.detail
    if name in ("sums that round", "alike in the next row"):  # where every score is exact in any float32
        expected = package_reference(**traits)(*args)[1]
        if not torch.equal(outputs[1], expected):
            return f"chose {outputs[1].tolist()}, the reference {expected.tolist()}"
    return ""


def package_reference(**traits):
    return importlib.import_module(f"{package.__name__}.reference").topk(**traits)
