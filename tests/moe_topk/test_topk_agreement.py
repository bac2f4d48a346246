"""How many rows a program takes, and which implementation the registry picks at a number of tokens, changes no bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from topk_support import implementations, kernel, named, routing, row_counts, same_bits

from kernel_registry import Registry
from kernel_registry.ops.moe.topk import cases

SOFT = dict(scoring="softmax", has_bias=False)
FAMILIES = [
    routing(48, 7, 4, 2, shared=1), routing(128, 8, 8, 4), routing(24, 1, 4, 2), routing(72, 6),
    routing(40, 2, shared=1), routing(24, 16), routing(48, 3, 4, 2, scoring="sqrtsoftplus"),
    routing(48, 6, scoring="sqrtsoftplus"), routing(128, 4, **SOFT),
    routing(40, 7, 4, 2, shared=1, renormalize=False, **SOFT), routing(33, 1, has_bias=False),
]
PLAIN = ("ties", "underflow", "large", "nonfinite", "signed_zero", "tiny_scores", "random")

BIASES = ("random", "offset_bias", "ties", "masked_experts", "huge_bias", "negative_bias", "large")


def mixed(traits, tokens, seed, device):
    """One call's inputs with rows of every kind of logits, some too close to call, and a bias of one kind."""
    calls = [cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour) for flavour in PLAIN]
    logits = torch.stack([args[0] for args, _ in calls], 1).flatten(0, 1)
    kind = BIASES[seed % len(BIASES)]
    (_, bias), _ = cases.inputs(traits, 1, seed=seed, device=device, flavour=kind)
    experts, shared = traits["num_experts"], traits["num_fused_shared_experts"]
    table = torch.randperm(experts + (seed % 4 == 1) * shared, generator=torch.Generator().manual_seed(seed)).to(device)
    kwargs = dict(routed_scaling_factor=2.5, shared_expert_weight=0.75)
    if seed % 2:
        kwargs.update(expert_map=table)
    if seed % 3 == 0:
        kwargs.update(num_token_non_padded=torch.tensor(5 * tokens, device=device))
    return logits, bias, kwargs


def assert_same(got, expected, about):
    for a, b in zip(got, expected):
        assert same_bits(a, b), about


@pytest.mark.parametrize("traits", FAMILIES, ids=named)
def test_rows_a_program(traits, device, tiles_of):
    """Every rows_per_program gives the bits of one row a program: all kinds of values, map, padding, shared slots."""
    more = row_counts(traits)[1:]
    for seed in range(len(BIASES)):
        logits, bias, kwargs = mixed(traits, 6, seed, device)
        tiles_of(len(logits))
        expected = kernel("triton_router", traits)(logits, bias, **kwargs)
        rows = more[seed % len(more)]
        tiles_of(-(-len(logits) // rows))
        got = kernel("triton_router", traits, rows_per_program=rows)(logits, bias, **kwargs)
        assert_same(got, expected, f"{rows} rows a program, seed {seed}")


@pytest.mark.parametrize("tile, traits", [
    (16, routing(16, 3, 4, 2)), (2, routing(24, 1)), (16, routing(24, 4, **SOFT)), (4, routing(24, 9, shared=1))],
    ids=lambda x: named(x) if isinstance(x, dict) else str(x))
def test_odd_numbers_of_tokens(traits, tile, device, tiles_of):
    """Programs, tiles and rows that are left empty, by any number of tokens."""
    if tile != 16:  # which is what the interpreter gets anyhow
        tiles_of(tile)
    most = row_counts(traits)[-1]
    made = {rows: kernel("triton_router", traits, rows_per_program=rows) for rows in row_counts(traits)}
    (logits, bias), kwargs = cases.inputs(traits, most * tile + 1, device=device)
    expected = made[1](logits, bias, **kwargs)
    for rows, route in made.items():
        step = rows * tile
        for tokens in {step - 1, step, step + 1, *((1, 2, 3, 5) if rows == most else ())}:
            got = route(logits[:tokens], bias, **kwargs)
            assert_same(got, [e[:tokens] for e in expected], f"{rows} rows a program, {tokens} tokens")
        live = max(1, step - 1)
        weights, ids = route(logits[:step + 1], bias, **kwargs, num_token_non_padded=torch.tensor(live, device=device))
        assert_same((weights[:live], ids[:live]), [e[:live] for e in expected], f"{rows} rows a program, {live} live")
        assert (ids[live:] == -1).all() and (weights[live:] == 0).all()


@pytest.mark.parametrize("rows", [0, 3, 32, 64, "2"])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="rows_per_program"):
        kernel("triton_router", routing(64, 8), rows_per_program=rows)
    with pytest.raises(ValueError, match="rows_per_program=8 does not fit topk=5"):
        kernel("triton_router", routing(64, 5), rows_per_program=8)


# ---- through the registry: wherever the choice depends on the number of tokens ---------------------------------------

OP = "moe.topk"
SERVED = [routing(16, 2, 4, 2), routing(16, 3), routing(24, 12, 2, 2), routing(24, 12), routing(24, 18),
          routing(260, 2, 4, 2), routing(322, 2, dtype="bfloat16"), routing(8, 2, scoring="sqrtsoftplus"),
          routing(12, 2, 3, 2, renormalize=False, **SOFT), routing(8, 3, **SOFT),
          routing(24, 12, **SOFT), routing(34, 2, has_bias=False), routing(34, 5, **SOFT), routing(258, 2, **SOFT)]


@pytest.fixture(scope="module")
def registry(device):
    return Registry(plugins=False, environment=False, platform=None if device == "cuda" else "interpreter")


def routers(registry):
    return [i for i in registry.catalog.op(OP).implementations if i.target.split(":")[0].endswith("triton_router")]


def switch_points(registry, traits):
    """Where the table of these traits is cut by num_tokens."""
    bound = registry.bind(OP, **traits)
    table = bound.table
    while table.trait not in (None, "num_tokens"):
        table = table.branches[-1]
    return bound, table.bounds if table.trait else ()


def test_every_router_of_the_registry_says_that_it_agrees(registry):
    assert routers(registry)
    assert {i.numerics for i in routers(registry)} == {"triton_router"}


def test_every_router_of_the_registry_is_reached(registry):
    """The calls tried below are served by all of them, and the support's list of implementations says so too."""
    reached = set()
    for traits in SERVED:
        reached.update(registry.bind(OP, **traits).table.winners())
        assert implementations(traits) == ["reference", "triton_router"]
    assert {i.name for i in routers(registry)} <= reached


@pytest.mark.parametrize("traits", SERVED, ids=named)
def test_a_switch_changes_no_row(registry, traits, device, tiles_of):
    """One token before, at and after each point: every row as in the others, and as in small calls."""
    tiles_of(256)
    registry.reload()  # kernels made before this test have other tiles
    bound, points = switch_points(registry, traits)
    assert points or traits["topk"] > 16, "no switch: nothing is tested"
    for point in points:
        before, after = (registry.dispatch(OP, num_tokens=n, **traits).name for n in (point - 1, point))
        assert before != after
        (logits, bias), kwargs = cases.inputs(traits, point + 1, seed=point, device=device)
        logits[::5] = logits[::5].round()  # ties
        logits[7::50] = float("nan")
        outputs = {n: bound(logits[:n], bias, **kwargs) for n in (point - 1, point, point + 1)}
        for n, (weights, ids) in outputs.items():
            assert_same((weights[:point - 1], ids[:point - 1]), outputs[point - 1], f"{n} tokens, {before} to {after}")
        for some in (slice(0, 33), slice(point - 40, point + 1), slice(point // 2, point // 2 + 1)):
            assert_same(bound(logits[some], bias, **kwargs), [o[some] for o in outputs[point + 1]], f"{after}, {some}")


@pytest.mark.parametrize("traits", SERVED, ids=named)
def test_any_two_that_serve_a_call_agree(registry, traits, device, tiles_of):
    """Each pair of one numerics tag, whatever the number of tokens: the same bits for the same rows."""
    tiles_of(64)
    registry.reload()
    largest = max((*switch_points(registry, traits)[1], 1))
    logits, bias, kwargs = mixed(traits, 9, 3, device)
    request = registry.catalog.op(OP).space.request({**traits, "num_tokens": largest}, registry.platform)
    serving = [i for i in registry.catalog.op(OP).implementations if i.numerics and i.box.admits(request.traits)]
    assert serving
    outputs = {i.name: (i.numerics, registry.dispatch(OP, implementation=i.name, num_tokens=largest, **traits)
                        (logits, bias, **kwargs)) for i in serving}
    for (one, (tag, a)), (other, (its, b)) in itertools.combinations(outputs.items(), 2):
        if tag == its:
            assert_same(a, b, f"{one} and {other}")
