"""Experts spread over real processes give the whole layer's result.

What travels is checked to the bit: the layers that each hold a part of the experts, called in one process with all
tokens and added up in the order of the ranks, give the same. Against the layer in one piece, only the order of a
token's additions is another, and in 16 bits each rank's part is rounded once more: two experts a token give the same
bits in float32, more are judged by the oracle of moe.experts, which allows what float32 may do and nothing else. The
routing is what the ranks' routers give, in both.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernel_registry import Registry, distributed, moe_layer  # noqa: E402
from kernel_registry.errors import InputError, RankError, TraitError  # noqa: E402
from kernel_registry.layer import EXPERTS, FINALIZE, TOPK, LayerTraits  # noqa: E402
from kernel_registry.ops.moe.experts import cases  # noqa: E402

ALL, HIDDEN, CPU = 12, 32, torch.device("cpu")
TOKENS = (5, 0, 9, 3)  # of each rank
SPREADS = {"halves": lambda expert, world: expert * world // ALL, "in turn": lambda expert, world: expert % world,
           "uneven": lambda expert, world: min(expert // 2, world - 1)}
FORMS = {"float32": dict(dtype="float32"), "bfloat16": dict(dtype="bfloat16"),
         "fp8_block": dict(dtype="bfloat16", weight_quant="fp8_block", act_quant="fp8_block"),
         "biased": dict(dtype="float32", has_bias=True, activation="swigluoai")}


def traits_of(form, topk=3):
    sizes = dict(num_experts=ALL, topk=topk, hidden_size=HIDDEN, intermediate_size=24, **FORMS[form])
    return LayerTraits(form, dict(num_experts=ALL, topk=topk), sizes, 2.5)


def registry_of(device):
    """On the CPU the reference, whose rows do not depend on how many there are; on a GPU its kernels."""
    return Registry(platform="cpu" if device == CPU else None, plugins=False, environment=False)


def shared_expert(x):
    return torch.tanh(x.float()).to(x.dtype)


def whole(traits, device, world):
    """(hidden states, router logits) of every rank's tokens, and a layer's weights with all that belongs to them."""
    count = sum(TOKENS[:world])
    (hidden, w13, w2, *_), tensors = cases.inputs(traits.experts, count, seed=3, device=device)
    logits = torch.randn(count, ALL, generator=torch.Generator().manual_seed(3)).to(device)
    bias = torch.linspace(-0.1, 0.1, ALL).to(device)
    tensors = {name: value for name, value in tensors.items() if value is not None}
    return hidden, logits, dict(w13=w13, w2=w2, correction_bias=bias, **tensors)


def share(weights, rank, world, spread):
    """What of them is on one rank, and its expert_map."""
    device = weights["w13"].device
    here = torch.tensor([e for e in range(ALL) if SPREADS[spread](e, world) == rank], device=device)
    table = torch.full((ALL,), -1, device=device)
    table[here] = torch.arange(len(here), device=device)
    own = {name: value[here] if name != "correction_bias" else value for name, value in weights.items()}
    return dict(**own, expert_map=table)


def mine(tensor, rank):
    return tensor[sum(TOKENS[:rank]):sum(TOKENS[:rank + 1])].clone()


# ---- what the ranks do -----------------------------------------------------------------------------------------------

def layer_of(rank, device, form="float32", topk=3, spread="halves", registry=None, **more):
    import torch.distributed as dist

    world, traits = dist.get_world_size(), traits_of(form, topk)
    hidden, logits, weights = whole(traits, device, world)
    layer = moe_layer(traits, **share(weights, rank, world, spread), group=dist.group.WORLD,
                      registry=registry or registry_of(device), **more)
    return layer, mine(hidden, rank), mine(logits, rank)


def called(rank, device, form, topk, spread, shared=False, out=False):
    """The result, and how many tokens came to this rank's experts."""
    layer, hidden, logits = layer_of(rank, device, form, topk, spread, shared_expert=shared_expert if shared else None)
    seen = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN, so that reading it shows
    try:
        given = torch.full_like(hidden, float("nan")) if out else None
        result = layer(hidden, logits, out=given, observe=lambda *step: seen.append(step))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [op for op, *_ in seen] == [TOPK, EXPERTS, FINALIZE] and (given is None or result is given)
    return result.cpu(), len(seen[1][1][0])


def judged(rank, device, form):
    """Each op on what the one before it gave, by its oracle: with the kernels that this machine has."""
    from kernel_registry.targets import load

    registry = Registry(plugins=False, environment=False)
    layer, hidden, logits = layer_of(rank, device, form, registry=registry, shared_expert=shared_expert)
    verdicts = []

    def observe(op, args, kwargs, result):
        oracle = load(registry.catalog.op(op).contract.oracle, op)
        verdict = oracle(layer.requests[op] if op != FINALIZE else layer.kernels[op].traits, args, kwargs, result)
        verdicts.append((op, layer.kernels[op].name, verdict.passed, verdict.detail))
    layer(hidden, logits, observe=observe)
    return verdicts


def padded(rank, device):
    layer, hidden, logits = layer_of(rank, device)
    live = torch.tensor([min(2, len(hidden))], device=device)
    hidden[int(live):] = float("nan")
    return layer(hidden, logits, num_token_non_padded=live).cpu()


def refused(rank, device, tables):
    import torch.distributed as dist

    traits = traits_of("float32")
    *_, weights = whole(traits, device, dist.get_world_size())
    own = {**share(weights, rank, dist.get_world_size(), "halves"), "expert_map": tables[rank]}
    with pytest.raises(TraitError) as caught:
        moe_layer(traits, **own, group=dist.group.WORLD, registry=registry_of(device))
    return str(caught.value)


def refused_inputs(rank, device):
    """Nothing is sent for a call that can't be right: no rank is left waiting."""
    layer, hidden, logits = layer_of(rank, device)
    for wrong in (hidden[:, :-1], hidden.double(), torch.cat([hidden, hidden[:1] if len(hidden) else hidden.new_zeros(
            1, HIDDEN)])):
        with pytest.raises(InputError, match="hidden_states is"):
            layer(wrong, logits)
    return layer(hidden, logits).cpu()


def one_refuses(rank, device):
    """Rank 1 has a call of its own that can't be right, in each way in which it can be noticed; then all call again."""
    def shared(hidden):
        return shared_expert(hidden) if broken is not shared else 1 / 0
    layer, hidden, logits = layer_of(rank, device, shared_expert=shared)
    told = []
    for broken, wrong in (("hidden states", (hidden[:, :-1], logits)), ("logits", (hidden, logits.double())),
                          (shared, (hidden, logits))):
        if rank != 1:
            broken, wrong = None, (hidden, logits)
        with pytest.raises(Exception) as caught:
            layer(*wrong)
        told.append((type(caught.value).__name__, str(caught.value)))
    broken = None
    return told, layer(hidden, logits).cpu()


def one_can_not_make_it(rank, device, missing):
    import torch.distributed as dist

    traits = traits_of("float32")
    *_, weights = whole(traits, device, dist.get_world_size())
    own = share(weights, rank, dist.get_world_size(), "halves")
    if rank == 1:
        del own[missing]
    with pytest.raises((TraitError, RankError)) as caught:
        moe_layer(traits, **own, group=dist.group.WORLD, registry=registry_of(device))
    return type(caught.value), caught.value.message


def in_a_group_of_others(rank, device):
    """Rank 1 is alone in its group; rank 0 has been given the same one."""
    import torch.distributed as dist

    group, traits = dist.new_group([1]), traits_of("float32")
    *_, weights = whole(traits, device, 2)
    own = share(weights, 0, 1, "halves")
    if rank == 1:
        return moe_layer(traits, **own, group=group, registry=registry_of(device)).output
    with pytest.raises(TraitError) as caught:
        moe_layer(traits, **own, group=group, registry=registry_of(device))
    return caught.value.message


def of_two_models(rank, device):
    with pytest.raises(TraitError) as caught:
        layer_of(rank, device, topk=3 + rank)
    return str(caught.value)


def of_two_routers(rank, device):
    """Rank 1's router has an expert more, and the rank has it."""
    import torch.distributed as dist

    traits = traits_of("float32")
    *_, weights = whole(traits, device, 2)
    own = share(weights, rank, 2, "halves")
    if rank == 1:
        for name in ("w13", "w2", "correction_bias"):
            own[name] = torch.cat([own[name], own[name][-1:]])
        own["expert_map"] = torch.cat([own["expert_map"], own["expert_map"].max()[None] + 1])
        traits = replace(traits, routing={**traits.routing, "num_experts": ALL + 1})
    with pytest.raises(TraitError) as caught:
        moe_layer(traits, **own, group=dist.group.WORLD, registry=registry_of(device))
    return str(caught.value)


def without_a_map(rank, device):
    import torch.distributed as dist

    traits = traits_of("float32")
    *_, weights = whole(traits, device, dist.get_world_size())
    with pytest.raises(TraitError, match="needs an expert_map"):
        moe_layer(traits, **weights, group=dist.group.WORLD, registry=registry_of(device))


def engine(rank, device, file):
    """Load, compare, forward; with `file` on the last rank only."""
    import torch.distributed as dist

    registry = registry_of(device)
    if file and rank == dist.get_world_size() - 1:
        registry.load_overrides(file)
    layer, hidden, logits = layer_of(rank, device, registry=registry)
    try:
        distributed.agree(registry)
    except RankError as error:
        return error.differences
    return layer.explain(), layer(hidden, logits).cpu()


# ---- what comes of it ------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have: the CPU's matrix product rounds otherwise with another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_ranks(function, world, *tensors):
    """What a function gives for the tokens of each rank, together: torch's sigmoid and tanh on the CPU may round one
    element otherwise where there are more around it, so routing and shared expert get what they get on the ranks."""
    answers = [function(*(mine(tensor, rank) for tensor in tensors)) for rank in range(world)]
    return torch.cat(answers) if torch.is_tensor(answers[0]) else tuple(map(torch.cat, zip(*answers)))


def routed(form, topk, world, device):
    """Traits, hidden states of all ranks, the weights, and what the routers of the ranks choose."""
    traits = traits_of(form, topk)
    hidden, logits, weights = whole(traits, device, world)
    route = registry_of(device).dispatch(TOPK, **traits.routing)
    chosen = by_ranks(lambda rows: route(rows, weights["correction_bias"], routed_scaling_factor=2.5), world, logits)
    return traits, hidden, weights, chosen


def in_one_piece(form, topk, world, device=CPU):
    """(result, args, kwargs) of the whole layer's experts."""
    traits, hidden, weights, chosen = routed(form, topk, world, device)
    layer = moe_layer(traits, **weights, registry=registry_of(device))
    args = hidden, layer.w13, layer.w2, *chosen
    return layer.kernels[EXPERTS](*args, **layer.tensors), args, layer.tensors


def in_parts(form, topk, world, spread, shared=False):
    """[T, ranks, H]: what each rank's experts give for all tokens; and their sum with the shared output."""
    traits, hidden, weights, chosen = routed(form, topk, world, CPU)
    registry, parts, dtype = registry_of(CPU), [], traits.experts["dtype"]
    for rank in range(world):
        layer = moe_layer(traits, **share(weights, rank, world, spread), registry=registry)
        parts.append(layer.kernels[EXPERTS](hidden, layer.w13, layer.w2, *chosen, **layer.tensors))
    finalize = registry.dispatch(FINALIZE, num_experts=world, topk=world, hidden_size=HIDDEN, dtype=dtype,
                                 out_dtype=dtype, weights_applied=True, has_shared=shared)
    parts = torch.stack(parts, dim=1)
    return parts, finalize(parts, shared_output=by_ranks(shared_expert, world, hidden) if shared else None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("world", [2, 4])
def test_what_travels_arrives(ranks, world, spread, form):
    """To the bit what the parts give in one process; and each token is sent to a rank once, however many of its
    experts are there."""
    answers = ranks.run(world, called, form, 3, spread, True)
    result, came = torch.cat([result for result, _ in answers]), [count for _, count in answers]
    parts, expected = in_parts(form, 3, world, spread, shared=True)
    assert torch.equal(result, expected)
    *_, (_, ids) = routed(form, 3, world, CPU)
    owner = torch.tensor([SPREADS[spread](e, world) for e in range(ALL)])[ids.long()]
    assert came == [int((owner == rank).any(1).sum()) for rank in range(world)]
    assert sum(came) < owner.numel(), "no token has two experts on one rank: sent once says nothing here"


@pytest.mark.parametrize("out", [False, True])
def test_two_experts_a_token_give_the_same_bits(ranks, backend, world, out):
    """A sum of two numbers is the same in either order."""
    answers = ranks.run(world, called, "float32", 2, "in turn", False, out, backend=backend)
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    assert torch.equal(torch.cat([result for result, _ in answers]), in_one_piece("float32", 2, world, device)[0].cpu())


@pytest.mark.parametrize("form", ["float32", "biased"])
def test_more_experts_a_token_are_the_whole_layers_within_what_float32_allows(ranks, backend, world, form):
    from kernel_registry.ops.moe.experts.oracle import check

    answers = ranks.run(world, called, form, 8, "in turn", backend=backend)
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    result = torch.cat([result for result, _ in answers]).to(device)
    single, args, kwargs = in_one_piece(form, 8, world, device)
    for output in (single, result):
        verdict = check(traits_of(form, 8).experts, args, kwargs, output)
        assert verdict.passed and not verdict.undecided, verdict.detail
    wrong = check(traits_of(form, 8).experts, args, kwargs, result.roll(1, 0))  # a token's result in another's place
    assert not wrong.passed


@pytest.mark.parametrize("form", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("world", [2, 4])
def test_in_16_bits_each_ranks_part_is_rounded_once(ranks, world, form):
    result = torch.cat([result for result, _ in ranks.run(world, called, form, 8, "in turn")]).double()
    single = in_one_piece(form, 8, world)[0].double()
    parts, _ = in_parts(form, 8, world, "in turn")
    half = 2.0**-8  # of a bfloat16's last bit, relative to the number
    allowed = half * (parts.double().abs().sum(1) + single.abs() + result.abs()) * (1 + 2 * half)
    assert ((result - single).abs() <= allowed).all() and not torch.equal(result, single)


@pytest.mark.parametrize("form", ["bfloat16", "fp8_block"])
def test_each_op_is_right_on_what_it_was_given(ranks, backend, world, form):
    """With the kernels of this machine, in Triton's interpreter where there is no GPU."""
    for verdicts in ranks.run(world, judged, form, backend=backend):
        assert [op for op, *_ in verdicts] == [TOPK, EXPERTS, FINALIZE]
        assert all(passed for *_, passed, _ in verdicts), verdicts
        on_host = backend == "gloo" and torch.cuda.is_available()  # the host of a GPU machine has no kernel but torch
        assert on_host or all("triton" in name for _, name, *_ in verdicts)


def test_padding_is_not_sent(ranks):
    answers = ranks.run(4, padded)
    hidden, logits, weights = whole(traits_of("float32"), CPU, 4)
    layer = moe_layer(traits_of("float32"), **weights, registry=registry_of(CPU))
    for rank, result in enumerate(answers):
        live = torch.tensor([min(2, TOKENS[rank])])
        expected = layer(mine(hidden, rank), mine(logits, rank), num_token_non_padded=live)
        assert not result[live:].any() and torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_an_expert_on_no_rank_or_on_two_is_refused_on_every_rank(ranks):
    lower = torch.tensor([0, 1, 2, 3, 4, 5] + [-1] * 6)
    upper = torch.tensor([-1] * 6 + [0, 1, 2, 3, 4, 5])
    gap, twice = upper.clone(), upper.clone()
    gap[7], twice[5] = -1, 0
    for message in ranks.run(2, refused, (lower, gap)):
        assert "expert 7 is on no rank of the group" in message
    for message in ranks.run(2, refused, (lower, twice)):
        assert "expert 5 is on ranks [0, 1] of the group" in message
    ranks.run(2, without_a_map)
    for message in ranks.run(2, of_two_models):
        assert "rank 1 of the group has topk=4, rank 0 has 3" in message
    for message in ranks.run(2, of_two_routers):
        assert "rank 1 of the group has num_experts=13, rank 0 has 12" in message


def test_a_call_that_can_not_be_right_is_refused_before_anything_is_sent(ranks):
    answers = ranks.run(2, refused_inputs)
    assert torch.equal(torch.cat(answers), in_parts("float32", 3, 2, "halves")[1])


def test_ranks_do_not_wait_for_one_that_has_refused_its_call(ranks):
    """They raise as well, and the group is as good as before."""
    (others, first), (own, second), (third, last) = ranks.run(3, one_refuses)
    assert [kind for kind, _ in own] == ["InputError", "InputError", "ZeroDivisionError"]
    for told in (others, third):
        assert [kind for kind, _ in told] == ["RankError"] * 3
        assert all(text.startswith("ranks [1] of the group could not route their tokens") for _, text in told)
    assert torch.equal(torch.cat([first, second, last]), in_parts("float32", 3, 3, "halves", shared=True)[1])


@pytest.mark.parametrize("missing", ["correction_bias", "expert_map"])
def test_a_rank_that_can_not_make_its_layer_tells_its_peers_why(ranks, missing):
    (kind, message), (own, told) = ranks.run(2, one_can_not_make_it, missing)
    assert kind is RankError and own is TraitError
    assert message.startswith("rank 1 of the group can't make the layer: TraitError: float32: ") and told in message


def test_a_rank_outside_of_the_group_is_told(ranks):
    outside, inside = ranks.run(2, in_a_group_of_others)
    assert "no member of the group" in outside and inside.startswith("over 1 ranks\n")


def test_an_engine_compares_before_its_first_forward(ranks, tmp_path):
    answers = ranks.run(2, engine, None)
    assert all("over 2 ranks\n  moe.experts runs on the tokens that arrive" in told for told, _ in answers)
    assert torch.equal(torch.cat([result for _, result in answers]), in_parts("float32", 3, 2, "halves")[1])
    file = tmp_path / "overrides.yaml"
    file.write_text("version: 1\noverrides:\n  - {op: moe.experts, use: torch, when: {expert_parallel: true}}\n")
    for differences in ranks.run(2, engine, file):
        assert list(differences) == [1] and differences[1][0].startswith("~ moe.experts(")
