"""A whole layer: the three ops, the same as by hand, wherever the result goes and whoever the shared expert is."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from kernel_registry import moe_layer, registry  # noqa: E402
from kernel_registry.errors import InputError, RegistryError, TraitError, UnknownNameError  # noqa: E402
from kernel_registry.layer import EXPERTS, FINALIZE, TOPK, LayerTraits, read_layer  # noqa: E402
from kernel_registry.ops.moe.experts import cases  # noqa: E402
from kernel_registry.run import LAYER, run_model  # noqa: E402
from kernel_registry.traits.model_config import shipped_models  # noqa: E402

SIZES = dict(num_experts=12, topk=3, hidden_size=32, intermediate_size=24, dtype="bfloat16")
TRAITS = LayerTraits("small", dict(num_experts=12, topk=3), SIZES, 2.5)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 7


def inputs(tokens=TOKENS, seed=0, **sizes):
    """(weights and tensors of a layer, hidden_states, router_logits)."""
    (hidden, w13, w2, *_), tensors = cases.inputs({**SIZES, **sizes}, tokens, seed=seed, device=DEVICE)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 12, generator=generator).to(DEVICE)
    return dict(w13=w13, w2=w2, **tensors), hidden, logits


BIAS = torch.linspace(-0.1, 0.1, 12).to(DEVICE)


def shared_expert(x):
    return torch.tanh(x.float() * 0.5).to(x.dtype)


def made(traits=TRAITS, seed=0, **more):
    weights, hidden, logits = inputs(seed=seed)
    return moe_layer(traits, **weights, **{"correction_bias": BIAS, **more}), hidden, logits


def by_hand(hidden, logits, shared=None, tokens=None):
    """The three ops, one after the other."""
    weights, *_ = inputs()
    route = registry.dispatch(TOPK, **TRAITS.routing)
    experts = registry.dispatch(EXPERTS, **SIZES)
    topk = route(logits, BIAS, routed_scaling_factor=2.5, num_token_non_padded=tokens)
    routed = experts(hidden, weights["w13"], weights["w2"], *topk)
    if shared is None:
        return routed
    finalize = registry.dispatch(FINALIZE, num_experts=12, topk=3, hidden_size=32, reduced=True, weights_applied=True,
                                 has_shared=True)
    return finalize(routed, shared_output=shared)


def outputs(hidden):
    """Where a result may go: nowhere in particular, and outputs full of NaN."""
    fresh = torch.full_like(hidden, float("nan"))
    wide = torch.full((TOKENS, 40), float("nan"), dtype=hidden.dtype, device=DEVICE)
    apart = torch.full((32, TOKENS), float("nan"), dtype=hidden.dtype, device=DEVICE)
    return {"none": None, "fresh": fresh, "slice": wide[:, 3:35], "columns apart": apart.t(), "hidden_states": hidden}


@pytest.mark.parametrize("where", outputs(torch.zeros(TOKENS, 32)))
@pytest.mark.parametrize("shared", ["none", "called", "brought", "brought, and out itself"])
def test_it_is_the_three_ops(where, shared):
    layer, hidden, logits = made(shared_expert=shared_expert if shared == "called" else None)
    added = None if shared == "none" else shared_expert(hidden)
    expected = by_hand(hidden, logits, added)
    out = outputs(hidden)[where]
    before = hidden.clone()
    brought = dict(shared_output=added.clone()) if shared.startswith("brought") else {}
    if shared == "brought, and out itself":
        out = brought["shared_output"]
    result = layer(hidden, logits, out=out, **brought)
    assert torch.equal(result, expected) and (out is None or result is out)
    assert out is hidden or torch.equal(hidden, before)


def test_what_runs():
    """moe.finalize only where it has something to do; and the experts never see the `out` of a call that it ends."""
    for shared, ops in ((None, [TOPK, EXPERTS]), (shared_expert, [TOPK, EXPERTS, FINALIZE])):
        layer, hidden, logits = made(shared_expert=shared)
        for out in (None, torch.empty_like(hidden)):
            seen = []
            layer(hidden, logits, out=out, observe=lambda *step: seen.append(step))
            assert [op for op, *_ in seen] == ops
            last = seen[-1][2]["out"] if shared or out is not None else None
            assert (seen[1][2].get("out") is None) == (shared is not None or out is None)
            if shared:
                assert last is (seen[1][3] if out is None else out), "a third buffer"


@pytest.mark.parametrize("failing", [TOPK, EXPERTS, "shared"])
def test_an_error_leaves_no_stream_behind(failing):
    """The current stream waits for the shared expert's, which may still read what the caller writes next."""
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append((self, "waits for", other))

    class Streams:
        current_stream = staticmethod(lambda device: current)
        stream = staticmethod(lambda stream: nullcontext())

    class Output:
        def record_stream(self, stream):
            """Its memory is nobody's."""

    def shared(x):
        return fail("shared") or Output()

    def fail(step, *_):
        if step == failing:
            events.append("error")
            raise RuntimeError(step)

    current, other = Stream(), Stream()
    layer, hidden, logits = made(shared_expert=shared, shared_stream=other)
    layer._streams = Streams
    with pytest.raises(RuntimeError, match=failing):
        layer(hidden, logits, observe=fail)
    assert events == [(other, "waits for", current), "error", (current, "waits for", other)]


def test_the_shared_expert_reads_what_the_caller_gave():
    """Also where `out` is hidden_states: it is called before the first op, and nothing is written until the last."""
    order, values = [], []
    layer, hidden, logits = made(shared_expert=lambda x: order.append("shared") or values.append(x.clone()) or x * 0)
    before = hidden.clone()

    def observe(op, args, kwargs, result):
        order.append(op)
        assert op == FINALIZE or torch.equal(hidden, before)

    layer(hidden, logits, out=hidden, observe=observe)
    assert order == ["shared", TOPK, EXPERTS, FINALIZE] and torch.equal(values[0], before)


def test_a_brought_shared_output_goes_before_the_layers_own():
    layer, hidden, logits = made(shared_expert=lambda x: pytest.fail("called"))
    assert torch.equal(layer(hidden, logits, shared_output=hidden * 2), by_hand(hidden, logits, hidden * 2))


@pytest.mark.parametrize("shared", [None, shared_expert])
def test_no_tokens(shared):
    layer, *_ = made(shared_expert=shared)
    _, hidden, logits = inputs(0)
    for out in (None, torch.empty_like(hidden)):
        assert layer(hidden, logits, out=out).shape == (0, 32)


def test_padding():
    layer, hidden, logits = made()
    live = torch.tensor([4], device=DEVICE)
    result = layer(hidden, logits, num_token_non_padded=live, out=torch.full_like(hidden, float("nan")))
    assert torch.equal(result, by_hand(hidden, logits, tokens=live)) and not result[4:].any() and result[:4].any()


def test_two_machines_with_half_of_the_experts_each():
    whole = LayerTraits("whole", TRAITS.routing, {**SIZES, "dtype": "float32"}, 2.5)
    weights, hidden, logits = inputs(dtype="float32")
    expected = moe_layer(whole, **weights, correction_bias=BIAS)(hidden, logits)
    parts = []
    for here in (range(5), range(5, 12)):
        table = torch.full((12,), -1, device=DEVICE)
        table[list(here)] = torch.arange(len(here), device=DEVICE)
        own = {name: weights[name][here.start:here.stop].contiguous() for name in ("w13", "w2")}
        layer = moe_layer(whole, **own, expert_map=table, correction_bias=BIAS)
        assert layer.kernels[EXPERTS].traits["num_experts"] == len(here)
        parts.append(layer(hidden, logits))
    torch.testing.assert_close(sum(parts), expected)


# ---- what is told ----------------------------------------------------------------------------------------------------

@pytest.fixture
def copying(toy):
    """The shipped implementations of routing and finalize, and experts that return their result."""
    import yaml

    from kernel_registry import shipped_registry

    data = yaml.safe_load(shipped_registry().read_text())
    for name, entry in list(data["ops"][EXPERTS]["implementations"].items()):
        if name != "torch":
            del data["ops"][EXPERTS]["implementations"][name]
        entry.pop("accepts_output_alias", None)
    return toy.registry(toy.write(yaml.safe_dump(data, sort_keys=False)), platform=registry.platform())


def test_explain_tells_the_three_choices_and_where_the_result_goes(copying):
    layer, *_ = made(shared_expert=shared_expert)
    text = layer.explain()
    for op in (TOPK, EXPERTS, FINALIZE):
        assert f"\n{op}(" in text and f"-> {layer.kernels[op].name.split('|')[0]}" in text
    assert f"moe.finalize does not run; with `out`, {layer.kernels[EXPERTS].name} writes into out\n" in text
    assert "the shared expert: before the experts" in text
    assert "with `out`, torch copies into out: a copy follows" in made(registry=copying)[0].explain()


def test_experts_that_return_their_result_are_copied_only_where_nothing_follows(copying):
    for shared, into in ((None, True), (shared_expert, False)):
        layer, hidden, logits = made(shared_expert=shared, registry=copying)
        out, seen = torch.full_like(hidden, float("nan")), []
        layer(hidden, logits, out=out, observe=lambda *step: seen.append(step))
        assert torch.equal(out, by_hand(hidden, logits, shared and shared(hidden)))
        assert (seen[1][2].get("out") is out) == into


def test_explain_tells_what_was_decided_when_the_layer_was_made():
    with registry.override(FINALIZE, "torch"):
        layer, *_ = made()
    assert layer.kernels[FINALIZE].name == "torch"
    mine = "registry.override('moe.finalize', 'torch')"
    assert mine in layer.explain() and mine not in made()[0].explain()


@pytest.mark.parametrize("change,error,message", [
    (dict(correction_bias=None), TraitError, "correction_bias is missing, the router has has_bias=True"),
    (dict(w13_scales=1), UnknownNameError, "moe_layer got 'w13_scales'"),
    (dict(traits=LayerTraits("s", dict(num_experts=12, topk=3, has_bias=False), SIZES)), TraitError,
     "correction_bias is given"),
])
def test_refused(change, error, message):
    with pytest.raises(error, match=message):
        made(**change)


@pytest.mark.parametrize("given,error", [
    (dict(w13=10), "w13 has 10 experts, the router chooses among 12"),  # tokens of the other two would get zeros
    (dict(w13=10, expert_map=11), "expert_map has 11 entries, the router chooses among 12"),
])
def test_experts_that_the_router_can_choose_and_nobody_has_are_refused(given, error):
    weights, *_ = inputs()
    tensors = {name: weights[name][:given["w13"]].contiguous() for name in ("w13", "w2")}
    if "expert_map" in given:
        tensors["expert_map"] = torch.arange(given["expert_map"], device=DEVICE) % given["w13"]
    with pytest.raises(TraitError, match=error):
        moe_layer(TRAITS, **tensors, correction_bias=BIAS)


def test_a_map_to_rows_that_are_not_here_is_refused():
    """Kernels would skip such an expert, as one that another machine has."""
    weights, *_ = inputs()
    half = {name: weights[name][6:].contiguous() for name in ("w13", "w2")}
    table = torch.tensor([-1] * 6 + [*range(6, 12)], dtype=torch.int32, device=DEVICE)  # the router's numbers
    with pytest.raises(TraitError, match="expert_map names row 11 of w13, which has 6"):
        moe_layer(TRAITS, **half, correction_bias=BIAS, expert_map=table)


def test_it_is_shown_in_a_line_without_its_weights():
    layer, *_ = made()
    assert repr(layer).startswith(f"<MoELayer {TRAITS.name}, {TOPK}: {layer.kernels[TOPK].name}, ")
    assert len(repr(layer)) < 300 and "tensor" not in repr(layer)


def test_wrong_tensors_are_the_ops_own_errors():
    layer, hidden, logits = made()
    for wrong, about in ((dict(hidden_states=hidden.half(), router_logits=logits), "hidden_states"),
                         (dict(hidden_states=hidden, router_logits=logits[:, 1:]), "router_logits"),
                         (dict(hidden_states=hidden, router_logits=logits, out=hidden[1:]), "out"),
                         (dict(hidden_states=hidden, router_logits=logits, shared_output=hidden[1:]), "shared_output")):
        with pytest.raises(InputError, match=about):
            layer(**wrong)


# ---- configs ---------------------------------------------------------------------------------------------------------

OTHERS = {"deepseek-v4", "kimi-k3", "nemotron-3-super-120b-a12b"}  # experts that moe.experts does not compute


@pytest.mark.parametrize("model", shipped_models())
def test_the_layer_of_a_shipped_config(model):
    if model in OTHERS:
        with pytest.raises(TraitError, match="moe.experts computes no layer of this model"):
            read_layer(model)
        return
    layer = read_layer(model)
    assert all(layer.routing[name] == layer.experts[name] for name in ("num_experts", "topk"))
    assert layer.experts["hidden_size"] >= 2048 and layer.routed_scaling_factor > 0


@pytest.mark.parametrize("model", ["deepseek-v3", "gpt-oss-20b", "llama-4-scout"])
def test_run_executes_the_whole_layer(model):
    rows = [row for row in run_model(registry, model, tokens=[5]) if row.op == LAYER]
    (row,) = rows
    assert row.verdict == "passed" and row.rows == 5, row.detail
    assert row.implementation.count(" + ") == (1 if model == "gpt-oss-20b" else 2)
    assert ("num_experts" in row.reduced) == (DEVICE == "cpu")


def test_run_finds_a_layer_that_is_wrong(toy, monkeypatch):
    """Experts that are right alone, and wrong where they are told to write into `out`."""
    from kernel_registry.ops.moe.experts import reference

    original = reference.experts

    def wrong(**traits):
        kernel = original(**traits)
        return lambda *args, out=None, **kwargs: kernel(*args, **kwargs, out=out) if out is None else \
            kernel(*args, **kwargs, out=out).mul_(1.05)

    monkeypatch.setattr(reference, "experts", wrong)
    fresh = type(registry)(plugins=False, environment=False, platform="cpu")
    rows = {row.op: row for row in run_model(fresh, "mixtral-8x7b", tokens=[5])}
    assert rows[EXPERTS].verdict == "passed" and rows[LAYER].verdict == "failed"
    assert rows[LAYER].detail.startswith("moe.experts: ")


def test_a_registry_without_these_ops_has_no_layer(toy):
    other = toy.registry({"a": {}})
    assert run_model(other, "mixtral-8x7b", tokens=[1]) == []
    with pytest.raises(RegistryError):
        moe_layer("mixtral-8x7b", None, None, registry=other)
