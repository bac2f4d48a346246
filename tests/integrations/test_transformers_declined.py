"""What stays with transformers' own code, is told, and gives what it gives without the registry."""

from __future__ import annotations

import logging

import pytest
from transformers_parts import logits, state, switched_off  # noqa: F401  first: it may skip

import torch  # noqa: E402
import tiny_models as tiny  # noqa: E402
from kernel_registry.integrations import transformers as adapter  # noqa: E402
from kernel_registry.integrations import transformers_modules as modules  # noqa: E402


def test_a_gate_that_the_registry_has_not_stays_with_transformers(ran, caplog):
    model = tiny.model("mixtral", hidden_act="gelu_pytorch_tanh")
    wanted = logits(model)
    with caplog.at_level(logging.INFO, logger=adapter.__name__), adapter.enable(model) as report:
        assert torch.equal(logits(model), wanted) or torch.allclose(logits(model), wanted, atol=1e-5)
        assert model.config._experts_implementation == "eager"
    assert [row.op for row in report.served] == ["moe.topk"] * tiny.LAYERS
    assert {row.why for row in report.declined} == {"its gate is none of silu, gelu, swigluoai, swigluoai_packed"}
    assert [record.message for record in caplog.records] == [report.line]
    assert "MixtralExperts: its gate is none of" in report.line and caplog.records[0].levelname == "WARNING"
    assert ran["moe.experts"] == 0 and ran["moe.topk"] > 0


def test_the_exact_gelu_is_served():
    with adapter.enable(tiny.model("mixtral", hidden_act="gelu")) as report:
        assert not report.declined


def test_a_router_that_routes_otherwise_stays_with_transformers(ran):
    """A subclass, or a later version, whose forward is no longer what the table says."""
    model = tiny.model("deepseek_v3")
    gate = model.model.layers[0].mlp.gate

    class Biased(type(gate)):
        def forward(self, hidden_states):
            scores, weights, ids = super().forward(hidden_states)
            return scores, weights * 2, ids

    gate.__class__ = Biased
    wanted = logits(model)
    with adapter.enable(model) as report:
        assert [(row.module, row.why) for row in report.declined] == [
            ("model.layers.0.mlp.gate", "its forward routes otherwise than the table says")]
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert ran["moe.topk"] == tiny.LAYERS - 1


@pytest.mark.parametrize("name, flag, value, why", [
    ("qwen3_moe", "has_post_expert_norm", True, "has_post_expert_norm has no trait"),
    ("gpt_oss", "limit", 5.0, "its gate is none of silu, gelu, swigluoai, swigluoai_packed"),
])
def test_experts_that_say_something_else_are_not_served(name, flag, value, why):
    """One layer's: the other is served, and this one runs what transformers runs."""
    model = tiny.model(name)
    setattr(model.model.layers[1].mlp.experts, flag, value)
    wanted = logits(model)
    with adapter.enable(model) as report:
        assert [(row.module, row.why) for row in report.declined] == [("model.layers.1.mlp.experts", why)]
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_a_router_whose_forward_somebody_has_set_keeps_it(ran):
    model = tiny.model("qwen3_moe")
    gate = model.model.layers[0].mlp.gate
    theirs = gate.forward
    gate.forward = lambda hidden_states: theirs(hidden_states)
    before = state(model)
    with adapter.enable(model) as report:
        assert [(row.module, row.why) for row in report.declined] == [
            ("model.layers.0.mlp.gate", "its forward is set already, by another than the registry")]
        logits(model)
    assert ran["moe.topk"] == tiny.LAYERS - 1 and state(model) == before


class Fp8:
    """What fp8 experts of transformers say of their weights."""

    block_size, activation_scheme, intermediate = (32, 32), "dynamic", 64

    def __init__(self, **more):
        vars(self).update(more)
        self.gate_up_proj = torch.zeros(2, 2 * self.intermediate, 64).to(torch.float8_e4m3fn)
        self.down_proj = torch.zeros(2, 64, self.intermediate).to(torch.float8_e4m3fn)
        self.gate_up_proj_scale_inv = torch.ones(2, 4, 2).to(more.get("scale", torch.float32))


@pytest.mark.parametrize("more, why", [
    (dict(block_size=(32, 64)), "square blocks"), (dict(block_size=None), "square blocks"),
    (dict(activation_scheme="static"), "given scales"), (dict(scale=torch.float8_e8m0fnu), "its scales are"),
    (dict(intermediate=80), "a block of 32 rows has some of the gate"),
])
def test_fp8_that_moe_experts_has_not(more, why):
    assert modules._quantisation(Fp8()) == dict(weight_quant="fp8_block", act_quant="fp8_block", group_size=32)
    with pytest.raises(modules.Declined, match=why):
        modules._quantisation(Fp8(**more))


def test_gradients_are_transformers_own(ran, caplog):
    model, prompt = tiny.model("qwen3_moe"), tiny.tokens()
    model(prompt, labels=prompt).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with adapter.enable(model):
        model(prompt, labels=prompt).loss.backward()
        assert not ran and "calls that record gradients" in caplog.text
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_training_the_routers_alone_is_transformers_own(ran):
    """What the experts of the first layer get records gradients by its weights alone."""
    model, prompt = tiny.model("qwen3_moe"), tiny.tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gate." in name)
    model(prompt, labels=prompt).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    with adapter.enable(model):
        model(prompt, labels=prompt).loss.backward()
    assert not ran and len(wanted) == tiny.LAYERS
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_weights_that_were_loaded_in_their_own_order_are_transformers_own(ran, caplog):
    model = tiny.model("gpt_oss")
    own, stored = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapter.enable(model):
        model.load_state_dict(stored, assign=True)
        torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran["moe.experts"] == 0 and "stored [E, in, out] were loaded after" in caplog.text


def test_fewer_experts_here_than_a_token_has_stay_with_transformers(ran):
    """A part of the experts, as expert parallelism has them; with more, an id past them contributes nothing."""
    model = tiny.model("qwen3_moe", experts="grouped_mm")
    for layer, local in zip(model.model.layers, (2, 8)):
        experts = layer.mlp.experts
        experts.num_experts, experts._is_expert_parallel = local, True
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:local].detach()))
    experts = model.model.layers[1].mlp.experts
    ids = torch.tensor([[0, 8, 3, 7], [8, 8, 8, 8], [5, 6, 2, 8]])
    given = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)), ids, torch.rand(3, 4) * (ids < 8)
    with torch.no_grad():
        wanted = experts(given[0], ids.clone(), given[2])
        with adapter.enable(model) as report:
            torch.testing.assert_close(experts(*given), wanted, rtol=1e-4, atol=1e-5)
    (row,) = report.declined
    assert row.module == "model.layers.0.mlp.experts" and "topk <= num_experts does not hold" in row.why
    assert ran == {"moe.experts": 1}


def test_hidden_states_of_another_dtype_than_the_weights_are_transformers_own(ran, caplog):
    """Under autocast, say, whose products take both to one dtype."""
    model = tiny.model("mixtral")
    with adapter.enable(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module = model.model.layers[0].mlp.experts.bfloat16()
        found = module(torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2).bfloat16())
    assert found.dtype is torch.float32 and not ran and "float32 hidden states run transformers' own" in caplog.text
