"""Bugs put in by changing one line: ten classic ones into each implementation, and those that the Triton router's fast
way invites. The numerics suite must find the ten; each of the others is found by one call that is named beside it.

A row in doubt is decided exactly, so a change that only makes more doubt costs time and no result: HARMLESS lists those
that were looked at, and why nothing can find them.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import pytest
import torch
from topk_mutant_inputs import NAMED, failure
from topk_support import numerics_failure

from kernel_registry.ops.moe import topk as package
from tests import mutants

FACTORY, ROUTER, PACKED, GROUPS = "triton_router.py", "router_kernel.py", "packed.py", "groups.py"
EXACT, SCORES, LANES, NETWORKS, REFERENCE = "exact.py", "scores.py", "lanes.py", "networks.py", "reference.py"

# ---- the ten: bug -> implementation -> (file, the line's part, what replaces it) -------------------------------------

GROUPED, SINGLE, PLAIN = "triton_router, groups", "triton_router, one group", "reference"
SERVES = {GROUPED: ("triton_router", True), SINGLE: ("triton_router", False), PLAIN: ("reference", None)}


def both(*change):
    return {GROUPED: change, SINGLE: change}


TEN = {
    "second largest of a group must be another value": {
        GROUPED: (GROUPS, "score = score + (second >> BITS)",
                  "score = score + tl.where((first >> BITS) == (second >> BITS), -8388608, second >> BITS)"),
        PLAIN: (REFERENCE, "best = torch.gather(choice, -1, _rank(choice)[..., :2 if has_bias else 1])",
                "best = torch.stack([choice.amax(-1), choice.masked_fill(choice == choice.amax(-1, True), -1e9)"
                ".amax(-1)], -1)")},
    "dropped groups are filled with 0": {
        GROUPED: (EXACT, "masked = tl.where(ids[i] == NO_ID, REMOVED, DROPPED)",
                  "masked = tl.where(ids[i] == NO_ID, REMOVED, 0)"),
        PLAIN: (REFERENCE, '~keep.repeat_interleave(group_size, dim=1), float("-inf"))',
                "~keep.repeat_interleave(group_size, dim=1), 0.0)")},
    "weights from the biased choice": {
        **both(ROUTER, "weight = tl.where(routed, scores.weight(x, top, SCORING), 0.0)",
               "weight = tl.where(routed, scores.weight(x, top, SCORING) + (tl.load(bias + chosen, mask=routed,"
               " other=0.0) if HAS_BIAS else 0.0), 0.0)"),
        PLAIN: (REFERENCE, "weights = torch.gather(score, 1, ids)", "weights = torch.gather(choice, 1, ids)")},
    "no epsilon in the renormalisation": {
        **both(ROUTER, "weight = weight / (segment_sums(weight, SLOTS, ROWS) + 1e-20)",
               "weight = weight / segment_sums(weight, SLOTS, ROWS)"),
        PLAIN: (REFERENCE, "weights = weights / (total + 1e-20)", "weights = weights / total")},
    "sigmoid by tanh": {
        **both(SCORES, "score = 1.0 / (1.0 + accurate_exp(-x))",
               "score = 0.5 * ((1.0 - accurate_exp(-x)) / (1.0 + accurate_exp(-x))) + 0.5"),
        PLAIN: (REFERENCE, "return torch.sigmoid(x)", "return 0.5 * torch.tanh(0.5 * x) + 0.5")},
    "bias rounded to bfloat16": {
        **both(LANES, 'tl.load(bias + expert, mask=exists, other=float("-inf")).to(tl.float32),)',
               'tl.load(bias + expert, mask=exists, other=float("-inf")).to(tl.bfloat16).to(tl.float32),)'),
        PLAIN: (REFERENCE, "choice = score + correction_bias.float()",
                "choice = score + correction_bias.bfloat16().float()")},
    "ties to the highest id": {
        **both(EXACT, "winner = tl.min(tl.where(keys[0] == best, ids[0], NO_ID), axis=1)[:, None]",
               "winner = tl.max(tl.where(keys[0] == best, ids[0], -1), axis=1)[:, None]"),
        PLAIN: (REFERENCE, "ids = _rank(choice)[:, :routed]",
                "ids = num_experts - 1 - _rank(choice.flip(-1))[:, :routed]")},
    "NaN like an expert already taken": {
        **both(EXACT, "NAN_KEY = tl.constexpr(-2147483647)", "NAN_KEY = tl.constexpr(-2147483648)"),
        PLAIN: (REFERENCE, "ids = _rank(choice)[:, :routed]",
                "ids = _rank(choice)[:, :routed] * ~choice.gather(1, _rank(choice)[:, :routed]).isnan()")},
    "one slot too few": {
        **both(ROUTER, "routed = (slot < ROUTED) & (tile_of_lane < TILES) & live",
               "routed = (slot < ROUTED - 1) & (tile_of_lane < TILES) & live"),
        PLAIN: (REFERENCE, "ids = _rank(choice)[:, :routed]", "ids = _rank(choice)[:, 1:routed + 1]")},
    "the scaling factor is forgotten": {
        **both(ROUTER, "weight = weight * routed_scaling_factor", "weight = weight * 1.0"),
        PLAIN: (REFERENCE, "weights = (weights * routed_scaling_factor).float()", "weights = weights.float()")},
}

# ---- the fast way's own: bug -> (file, the line's part, what replaces it, the NAMED inputs that find it) -------------

MUTANTS = {
    # packing
    "ids not turned over": (PACKED, "| (~ids[i] & MASK),)", "| (ids[i] & MASK),)", "random"),
    "ids of eight bits": (PACKED, "return max(8, (num_experts - 1).bit_length())", "return 8", "many experts"),
    "the top of the window overflows": (PACKED, "BELOW_ONE: tl.constexpr = 1.0 - POWER / 4194304",
                                        "BELOW_ONE: tl.constexpr = 1.0", "many experts, softmax"),
    "no clamping": (PACKED, "inside = tl.where(inside > 0.0, tl.minimum(inside, 1.0), 0.0)",
                    "inside = inside * 1.0", "large", "interpreter"),
    "no clamping, on NVIDIA": (PACKED, "fma.rn.sat.f32", "fma.rn.f32", "large", "cuda"),
    "no clamping above": (PACKED, "inside = tl.where(inside > 0.0, tl.minimum(inside, 1.0), 0.0)",
                          "inside = tl.where(inside > 0.0, inside, 0.0)", "above the window", "interpreter"),
    "NaN at the top of the window": (PACKED, "inside = tl.where(inside > 0.0, tl.minimum(inside, 1.0), 0.0)",
                                     "inside = tl.where(inside < 1.0, tl.maximum(inside, 0.0), 1.0)",
                                     "not finite", "interpreter"),
    "the window too low for groups": (PACKED, '"sigmoid": 1.0, "sqrtsoftplus": 7', '"sigmoid": 0.5, "sqrtsoftplus": 7',
                                      "a group near the window's top"),
    # lists
    "a needed exchange left out": (NETWORKS, "needed |= {i, j}", "needed |= {i}", "many experts"),
    "a list's overflow is not seen": (PACKED, "((tl.maximum(lists[0], rest) | MASK) >= last)",
                                      "((lists[0] | MASK) >= last)", "an overfull lane"),
    "not the best that did not fit": (PACKED, "min(len(choices), DEPTH + 1))", "min(len(choices), DEPTH))",
                                      "an overfull lane"),
    "dropped groups above the window": (PACKED, "kept = kept + (tl.where(keep, lists[place], EMPTY),)",
                                        "kept = kept + (tl.where(keep, lists[place], 0),)", "random, groups"),
    "dropped groups stay": (PACKED, "kept = kept + (tl.where(keep, lists[place], EMPTY),)",
                            "kept = kept + (lists[place],)", "random, groups"),
    # doubt and repair
    "a tie at the boundary is no doubt": (PACKED, "((tl.maximum(lists[0], rest) | MASK) >= last)",
                                          "(tl.maximum(lists[0], rest) >= last)", "a pair at the end"),
    "neighbours are never tied": (PACKED, "following = tl.gather(chosen, tl.minimum(lane + 1, LANES - 1), 1)",
                                  "following = ~chosen", "pairs"),
    "rows are tied to each other": (PACKED, "((((chosen ^ following) >> BITS) == 0) & (lane % SLOTS < COUNT - 1))",
                                    "((((chosen ^ following) >> BITS) == 0) & (lane < LANES - 1))",
                                    "alike in the next row"),
    "ties alone are not repaired": (ROUTER, "doubts = tl.reduce(doubts | (tied << TILES), 1, either)[:, None]",
                                    "doubts = tl.reduce(doubts, 1, either)[:, None]", "pairs"),
    "repair never swaps": (PACKED, "return tl.where(swap, other_id, ids), tied & tied_before",
                           "return ids, tied & tied_before", "pairs"),
    "repair always swaps": (PACKED, "return tl.where(swap, other_id, ids), tied & tied_before",
                            "return tl.where((tied | tied_before) > 0, other_id, ids), tied & tied_before", "pairs"),
    "repair swaps only one of two": (PACKED, "| ((tied_before > 0) & (other_goes_first == 0))", "", "pairs"),
    "repair puts the higher id first": (PACKED, "((other_key == keys) & (other_id < ids))",
                                        "((other_key == keys) & (other_id > ids))", "two equal"),
    "repair without the bias": (ROUTER, "choice = choice + tl.load(bias + chosen, mask=found, other=0.0)",
                                "choice = choice + tl.zeros_like(choice)", "pairs by bias"),
    "a last chosen below the window is no doubt": (PACKED, " | (last <= below_window(BITS))", "",
                                                   "NaN in a full group"),
    "three in a row are no doubt": (PACKED, "return tl.where(swap, other_id, ids), tied & tied_before",
                                    "return tl.where(swap, other_id, ids), tied & 0", "triples"),
    # several rows a warp
    "doubt of every row told of the first": (ROUTER, "tl.where(doubt, 1 << tile, 0)", "tl.where(doubt, 1, 0)",
                                             "a pair at the end of odd rows"),
    "three in a row told of the first row": (ROUTER, "tl.reduce(between << tile_of_lane, 1, either)",
                                             "tl.reduce(between, 1, either)", "triples in odd rows"),
    "the exact way overwrites the other row": (ROUTER, "this = again & (tile_of_lane == which)", "this = again",
                                               "a pair at the end of odd rows"),
    "the exact way reads the first row": (ROUTER, "logits, bias, first + which, valid, row_stride",
                                          "logits, bias, first, valid, row_stride", "a pair at the end of odd rows"),
    "every tile is the first row": (ROUTER, "scale, offset, chosen, first + tile, valid, row_stride,",
                                    "scale, offset, chosen, first, valid, row_stride,", "random, two rows a warp"),
    "tiles share their lanes": (PACKED, "lane == TILE * SLOTS + taken", "lane % SLOTS == taken",
                                "random, two rows a warp"),
    "sums over the whole warp": (ROUTER, "total = tl.sum(tl.reshape(x, shape), axis=2)",
                                 "total = tl.broadcast_to(tl.sum(x, axis=1)[:, None], [ROWS, LANES // SLOTS])",
                                 "random, two rows a warp"),
    "the largest logit of the whole warp": (ROUTER, "top = tl.max(tl.reshape(x, shape), axis=2)",
                                            "top = tl.broadcast_to(tl.max(x, axis=1)[:, None], [ROWS, LANES // SLOTS])",
                                            "far apart"),
    "totals of the first row": (ROUTER, "total = lanes.exp_sum(logits, tile_top, first + tile, first + tile < valid,",
                                "total = lanes.exp_sum(logits, tile_top, first, first + tile < valid,",
                                "random, softmax not renormalised"),
    # groups
    "lists of one": (FACTORY, "least=2 if summed else 1", "least=1", "one of groups"),
    "group scores without a margin": (GROUPS, "(last - following <= margin(offset) * (MASK + 1))",
                                      "(last - following <= 0)", "near groups"),
    "a margin that does not grow": (GROUPS, "tl.minimum(tl.abs(offset), 8388608.0)", "tl.minimum(tl.abs(offset), 0.0)",
                                    "sums that round"),
    "a second choice below the window is no doubt": (GROUPS, "<= packed.below_window(BITS)) & (group < GROUPS)",
                                                     "<= packed.below_window(BITS)) & (group < 0)", "far groups"),
    "a score above the window is no doubt": (GROUPS, 'if SCORING == "sqrtsoftplus":', 'if SCORING == "none":',
                                             "a group above the window"),
    "groups without a bias by two choices": (
        ROUTER, "groups.keep_fast(lists, offset, SCORING, GROUPS, TOPK_GROUP, GROUP_LANES, ROWS, HAS_BIAS, BITS,",
        "groups.keep_fast(lists, offset, SCORING, GROUPS, TOPK_GROUP, GROUP_LANES, ROWS, True, BITS,",
        "random, softmax groups"),
    "one group too many": (GROUPS, "for _ in tl.static_range(TOPK_GROUP - 1):", "for _ in tl.static_range(TOPK_GROUP):",
                           "random, groups"),
    "ties to the highest group": (GROUPS, "winner = tl.min(tl.where(score == best, group, lanes.NO_ID), axis=1)",
                                  "winner = tl.max(tl.where(score == best, group, -1), axis=1)", "ties, groups"),
    "a group's second largest must be another value, exactly": (
        GROUPS, "first = exact.ordered_key(exact.key_value(first) + exact.key_value(second))",
        "first = exact.ordered_key(exact.key_value(first) + tl.where(first == second, -9.0, exact.key_value(second)))",
        "ties, groups"),
    # the exact way
    "equal experts of a lane in the wrong order": (
        EXACT, "swap = (keys[B] > keys[A]) | ((keys[B] == keys[A]) & (ids[B] < ids[A]))",
        "swap = (keys[B] > keys[A]) | ((keys[B] == keys[A]) & (ids[B] > ids[A]))", "two experts a lane"),
    "lists cut one round early": (EXACT, "return min(length, count - taken)",
                                  "return max(1, min(length, count - taken - 1))", "two experts a lane"),
    "a scan from the front": (EXACT, "place = tl.where(keys[len(keys) - 1 - i] == best, len(keys) - 1 - i, place)",
                              "place = tl.where(keys[i] == best, i, place)", "scanned"),
    "scanned experts stay": (EXACT, "left = left + (tl.where(place == i, REMOVED, keys[i]),)",
                             "left = left + (keys[i],)", "scanned"),
    # softmax
    "a NaN row keeps its window": (PACKED, "tl.maximum(top, choices[i], propagate_nan=tl.PropagateNan.ALL)",
                                   "tl.maximum(top, choices[i])", "not finite, softmax"),
    "a row whose lane begins with NaN keeps its window": (
        PACKED, "key = tl.where(top == top, exact.ordered_key(top), exact.INF_KEY)", "key = exact.ordered_key(top)",
        "not finite, softmax"),
    "a row with NaN has scores": (EXACT, "top = tl.max(tl.where(void, INF_KEY, top), axis=1)[:, None]",
                                  "top = tl.max(top, axis=1)[:, None]", "not finite, softmax"),
    "a row of +inf has scores": (EXACT, "void = (top == INF_KEY) | (top == NEG_INF_KEY)", "void = top == NEG_INF_KEY",
                                 "not finite, softmax"),
    "a row of -inf has scores": (EXACT, "void = (top == INF_KEY) | (top == NEG_INF_KEY)", "void = top == INF_KEY",
                                 "not finite, softmax groups"),
    "a row without scores has weights": (ROUTER, "routed = routed & (void == 0)", "routed = routed & (void == void)",
                                         "not finite, softmax"),
    "a logit of -0.0 is below +0.0": (SCORES, "return x + 0.0  # -0.0", "return x  # -0.0", "signed zeros, softmax"),
    # logits of 16 bits that fit whole
    "negative logits upside down": (PACKED, "return bits ^ ((bits >> 31) & (0x7FFFFFFF >> BITS << BITS))",
                                    "return bits", "random, negative, bfloat16 softmax"),
    "a whole list's overflow is not seen": (PACKED, "doubt = (rest > last) | ", "doubt = ",
                                            "an overfull lane, bfloat16 softmax"),
    "a list's last is not emptied": (PACKED, "popped = popped + (tl.where(won, EMPTY, lists[place]),)",
                                     "popped = popped + (lists[place],)", "random, negative, bfloat16 softmax"),
    "a row with NaN is no doubt": (PACKED, " | (first >= exact.INF_KEY)", "", "not finite, bfloat16 softmax"),
    "a row of -inf is no doubt": (PACKED, " | (last <= exact.NEG_INF_KEY)", "", "not finite, bfloat16 softmax groups"),
    "a logit of -inf ranks with what is dropped": (
        EXACT, 'DROPPED: tl.constexpr = DROPPED_LOGIT_KEY if SCORING == "softmax" else NEG_INF_KEY',
        "DROPPED: tl.constexpr = NEG_INF_KEY", "few finite, softmax groups"),
    "a NaN with a sign is below all": (PACKED, "bits = tl.where(choice == choice, bits, exact.INF_KEY)", "pass",
                                       "NaN with a sign, bfloat16 softmax", "interpreter"),
    "rounded though there is a bias or more digits": (
        PACKED, 'return scoring == "softmax" and not has_bias and logit_bits == 16', 'return scoring == "softmax"',
        "random, softmax, many digits"),
    # scores
    "a digit of the polynomial": (SCORES, "+ 0.106036607", "+ 0.106063607", "random, sqrtsoftplus"),
    "a small score loses its digits": (
        SCORES, "return tl.where(x > 0, tl.sqrt(x + e * p), half_exp * tl.sqrt(p))",
        "return tl.sqrt(tl.maximum(x, 0.0) + tl.log(1.0 + e))", "tiny scores, sqrtsoftplus"),
    "half of ln(2)": (SCORES, "+ n * 2.12194440e-4", "+ 0.0", "tiny scores"),
    "exp without its ends": (SCORES, "x = tl.minimum(tl.maximum(x, -104.0), 104.0)", "x = x + 0.0", "not finite"),
    "NaN is a weight": (SCORES, "return tl.where(x == x, score, 0.0)", "return score", "not finite"),
    "inf over inf is a weight": (ROUTER, "weight = tl.where(weight == weight, weight, 0.0)", "weight = weight",
                                 "not finite, sqrtsoftplus"),
}

# bug that is none -> (file, the line's part, what replaces it, why no result differs)
HARMLESS = {
    "packed ties to the highest group": (
        GROUPS, "* (MASK + 1)) | (MASK - group)", "* (MASK + 1)) | group",
        "equal scores are within the margin: a doubt"),
    "padded rows may be in doubt": (
        ROUTER, "return chosen, (doubt | unclear) & live[:, None]", "return chosen, doubt | unclear",
        "they are decided again, for nothing"),
    "what did not fit in dropped groups counts as left out": (
        PACKED, "return kept, tl.where(keep, rest, EMPTY)", "return kept, rest", "more doubt"),
    "the first lane is its own neighbour": (
        PACKED, "tied_before = tl.where(lane > 0, tl.gather(tied, before, 1), 0)",
        "tied_before = tl.gather(tied, before, 1)",
        "where that swaps wrongly the lane is tied to both sides, so the row is decided again"),
    "a tie is a doubt of the first row": (
        ROUTER, "doubts | (tied << TILES), 1, either", "doubts | tied, 1, either", "more doubt"),
    "an infinite largest logit is no NaN": (
        SCORES, "x = x - top  # NaN", "x = x + 0.0  # NaN", "rows whose largest is an infinity have no scores: void"),
    "short lists are scanned": (
        EXACT, "LONGEST_SORTED = tl.constexpr(16)", "LONGEST_SORTED = tl.constexpr(1)", "the same by another way"),
    "lists of two": (
        PACKED, "if overfull(depth) < rare)", "if overfull(depth) < 0.2)", "more lists overflow, which is seen"),
    "16-bit logits are rounded as others are": (
        PACKED, "not has_bias and logit_bits == 16", "False", "more doubt"),
    "twice the window": (
        PACKED, '"sigmoid": 8.0, "sqrtsoftplus": 16.0, "softmax": 16.0',
        '"sigmoid": 16.0, "sqrtsoftplus": 32.0, "softmax": 32.0',
        "coarser numbers, more doubt"),
}
HARMLESS_ON = ("pairs", "triples in odd rows", "an overfull lane", "not finite", "not finite, groups",
               "not finite, softmax", "random, negative, bfloat16 softmax", "not finite, bfloat16 softmax")


@contextmanager
def copied(implementation, file="", line="", changed=""):
    """An implementation's module in a private copy of the op's package with one line changed."""
    assert "\n" not in line + changed
    with mutants.copied(file and f"moe/topk/{file}", line, changed) as load:
        yield load(f"moe.topk.{implementation}")


@pytest.mark.parametrize("implementation", SERVES)
def test_the_copy_as_it_is_passes(implementation, device):
    name, grouped = SERVES[implementation]
    with copied(name) as module:
        assert numerics_failure(module, grouped=grouped, device=device) == ""


@pytest.mark.parametrize("line", ["no such line", "import"])
def test_a_place_that_is_not_there_once_is_an_error(line):
    with pytest.raises(AssertionError, match="needs it once"), copied("reference", REFERENCE, line, "pass"):
        pass


@pytest.mark.parametrize("bug,implementation", [(bug, i) for bug, served in TEN.items() for i in served])
def test_the_suite_kills(bug, implementation, device):
    name, grouped = SERVES[implementation]
    with copied(name, *TEN[bug][implementation]) as module:
        found = numerics_failure(module, grouped=grouped, device=device)
    print(f"{bug} in {implementation}: {found}")
    assert found


def test_there_are_ten():
    assert len(TEN) == 10
    assert all(PLAIN in served and GROUPED in served for served in TEN.values())
    assert sum(SINGLE in served for served in TEN.values()) == 8  # two of the bugs need groups


@pytest.mark.parametrize("inputs", NAMED)
def test_the_router_as_it_is_passes(inputs, device):
    assert failure(importlib.import_module(f"{package.__name__}.triton_router"), inputs, device) == ""


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(bug, device):
    file, line, changed, inputs, *only = MUTANTS[bug]
    if only and only != ["cuda" if device == "cuda" and torch.version.cuda else "interpreter"]:
        pytest.skip(f"a line that runs with {only[0]} only")
    with copied("triton_router", file, line, changed) as module:
        found = failure(module, inputs, device)
    print(f"{bug}, by {inputs}: {found}")
    assert found


def test_every_input_finds_something():
    assert {name for _, _, _, name, *_ in MUTANTS.values()} | {*HARMLESS_ON} == set(NAMED)


@pytest.mark.parametrize("bug", HARMLESS)
def test_harmless(bug, device):
    file, line, changed, why = HARMLESS[bug]
    with copied("triton_router", file, line, changed) as module:
        for inputs in HARMLESS_ON:
            assert failure(module, inputs, device) == "", f"{inputs}; no result was to differ, because: {why}"
