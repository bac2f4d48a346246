"""Real (tiny, random) models of transformers with the registry's kernels: the same tokens, the same logits, no trace.

Run where transformers is: `python -m pytest tests/integrations/test_transformers.py` in the runtime's environment.
Without a GPU, kernels that have a Triton form run in Triton's interpreter.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="not run: transformers is not installed in this environment")
sys.path.insert(0, str(Path(__file__).parent))

import tiny_models as tiny  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import OverrideError  # noqa: E402
from kernel_registry.integrations import transformers as adapter  # noqa: E402
from kernel_registry.integrations import transformers_modules as modules  # noqa: E402

MODELS = list(tiny.MODELS)
NEW = 4  # tokens generated


@pytest.fixture(autouse=True)
def switched_off():
    yield
    adapter.disable()
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch):
    """Counts the kernels of the registry that ran, by op: what `dispatch` returns, called."""
    counts: Counter = Counter()
    dispatch = registry.dispatch

    def counting(op, **traits):
        kernel = dispatch(op, **traits)

        def call(*args, **kwargs):
            counts[op] += 1
            return kernel(*args, **kwargs)
        return call

    monkeypatch.setattr(registry, "dispatch", counting)
    return counts


def generate(model, prompt, **more):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, **more)


@torch.no_grad()
def logits(model, prompt=None):
    return model(tiny.tokens() if prompt is None else prompt).logits


def state(model) -> dict:
    """Everything of a model, of its classes and of the interfaces that a switch could leave behind, by identity."""
    type(model)._can_set_experts_implementation()  # transformers keeps the answer on the class when it first asks
    found = {"model": model.config.to_dict(), "experts": model.get_experts_implementation()}
    for interface in adapter._interfaces():
        found[type(interface).__name__] = {**interface._global_mapping}, {**interface._local_mapping}
    for name, module in model.named_modules():
        found[name] = {key: id(value) for key, value in vars(module).items()}
        for cls in type(module).__mro__:
            found[f"{cls.__module__}.{cls.__qualname__}"] = {k: id(v) for k, v in vars(cls).items() if k != "__doc__"}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = tensor.shape, tensor.stride(), tensor.dtype, tensor.double().sum().item()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_generates_what_eager_does_and_leaves_no_trace(name, ran):
    model, prompt = tiny.model(name), tiny.tokens()
    before, wanted, own = state(model), generate(model, prompt), logits(model)
    report = adapter.enable(model)
    assert [row.op for row in report.rows] == ["moe.topk"] * tiny.LAYERS + ["moe.experts"] * tiny.LAYERS
    assert not report.declined and report.served == report.rows and not ran
    assert torch.equal(generate(model, prompt), wanted)
    assert ran == {"moe.topk": NEW * tiny.LAYERS, "moe.experts": NEW * tiny.LAYERS}
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    report.disable()
    assert state(model) == before
    ran.clear()
    assert torch.equal(generate(model, prompt), wanted) and not ran


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(name, ran):
    """Both round at the same places or at fewer; a factor of two is for what chance makes of so few numbers. One layer,
    whose routers see the same input: with another before it a rounding may choose another expert, here or there."""
    one = dict(num_hidden_layers=1, **({"layer_types": ["full_attention"]} if name == "gpt_oss" else {}))
    exact, model = logits(tiny.model(name, **one)), tiny.model(name, torch.bfloat16, **one)
    eager = (logits(model).float() - exact).norm()
    with adapter.enable(model):
        ours = (logits(model).float() - exact).norm()
    assert ran == {"moe.topk": 1, "moe.experts": 1}
    assert ours <= 2 * eager and eager <= 0.2 * exact.norm()


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name, ran):
    model = tiny.model(name)
    own = logits(model)
    with adapter.enable(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), own, rtol=1e-4, atol=1e-4)
        with registry.override("moe.topk", "torch"):  # inside the op, so no new graph is needed for it
            logits(compiled)
    assert ran == {"moe.topk": 2 * tiny.LAYERS, "moe.experts": 2 * tiny.LAYERS}


def test_compiles_with_inductor(ran):
    model = tiny.model("qwen3_moe")
    own = logits(model)
    with adapter.enable(model):
        torch.testing.assert_close(logits(torch.compile(model, fullgraph=True)), own, rtol=1e-4, atol=1e-4)
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS}


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2", "qwen3_moe"])
def test_continuous_batching(name, ran):
    """DeepSeek-V3 is not among these: transformers' paged cache does not take its heads, with us or without."""
    import transformers

    pytest.importorskip("psutil", reason="not run: continuous batching on a CPU asks psutil for the memory")
    model, prompt = tiny.model(name), tiny.tokens()
    wanted = generate(model, prompt)[:, prompt.shape[1]:].tolist()
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=32)
    with adapter.enable(model):
        found = model.generate_batch(inputs=prompt.tolist(), generation_config=settings, progress_bar=False,
                                     continuous_batching_config=small)
    assert [request.generated_tokens for _, request in sorted(found.items())] == wanted
    assert ran["moe.topk"] == ran["moe.experts"] >= NEW * tiny.LAYERS


def test_classes_for_models_built_later(ran):
    old = tiny.model("glm4_moe")
    prompt, wanted = tiny.tokens(), generate(old, tiny.tokens())
    before = state(old)
    report = adapter.enable()
    assert adapter.enable() is report and not report.declined
    later = tiny.model("glm4_moe", experts="kernel_registry")
    assert torch.equal(generate(later, prompt), wanted)
    assert ran == {"moe.topk": NEW * tiny.LAYERS, "moe.experts": NEW * tiny.LAYERS}
    adapter.disable()
    assert state(old) == before
    assert not any(name.startswith("_kernel_registry") for module in later.modules() for name in vars(module))


def test_only_the_model_types_that_are_named():
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    own = MixtralTopKRouter.forward, Qwen3MoeTopKRouter.forward
    report = adapter.enable(model_types=["mixtral"])
    assert [row.kind for row in report.rows] == ["MixtralTopKRouter"]
    assert MixtralTopKRouter.forward is not own[0] and Qwen3MoeTopKRouter.forward is own[1]
    report.disable()
    assert (MixtralTopKRouter.forward, Qwen3MoeTopKRouter.forward) == own


@pytest.mark.parametrize("name", ["minimax_m2", "deepseek_v3"])
def test_through_the_kernels_package(name, ran):
    pytest.importorskip("kernels", reason="not run: Hugging Face's kernels is not installed in this environment")
    model, prompt = tiny.model(name), tiny.tokens()
    before, wanted = state(model), generate(model, prompt)
    with adapter.enable(model, through="kernels") as report:
        assert not report.declined
        assert torch.equal(generate(model, prompt), wanted)
    assert ran == {"moe.topk": NEW * tiny.LAYERS, "moe.experts": NEW * tiny.LAYERS}
    assert state(model) == before


def test_fp8_experts_go_through_their_own_interface(ran):
    """Against the same weights in bfloat16: fp8 activations have 3 bits behind the point, so each is off by up to 6 %,
    in the root mean square by 2.6 %, and there are two of them in a row."""
    import transformers
    from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

    model = tiny.model("qwen3_moe", torch.bfloat16, hidden_size=64, moe_intermediate_size=64)
    plain = {name: module for name, module in model.named_modules() if modules.is_experts(module)}
    spared = [".*self_attn.*", "lm_head"]
    settings = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), modules_to_not_convert=spared)
    replace_with_fp8_linear(model, modules_to_not_convert=spared, quantization_config=settings)
    for name, was in plain.items():
        experts = model.get_submodule(name).to_empty(device="cpu")
        assert isinstance(experts, FP8Experts)
        for weight in ("gate_up_proj", "down_proj"):
            blocks = getattr(was, weight).float().unflatten(1, (-1, 32)).unflatten(3, (-1, 32))
            scale = blocks.abs().amax((2, 4)) / 448
            stored = (blocks / scale[:, :, None, :, None]).flatten(3).flatten(1, 2).to(torch.float8_e4m3fn)
            getattr(experts, weight).data, getattr(experts, f"{weight}_scale_inv").data = stored, scale
            back = stored.float().unflatten(1, (-1, 32)).unflatten(3, (-1, 32)) * scale[:, :, None, :, None]
            getattr(was, weight).data = back.flatten(3).flatten(1, 2).bfloat16()
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids, weights = torch.arange(9 * 4).view(9, 4) % 16, torch.full((9, 4), 0.25)
    report = adapter.enable(model)
    assert not report.declined and {row.kind for row in report.rows} == {"Qwen3MoeTopKRouter", "FP8Experts"}
    with torch.no_grad():
        found = model.model.layers[0].mlp.experts(hidden, ids, weights).float()
        was = plain["model.layers.0.mlp.experts"].float()  # below the interface, where its config leads to the registry
        wanted = inspect.unwrap(type(was).forward)(was, hidden.float(), ids, weights)
        assert (found - wanted).norm() <= 0.06 * wanted.norm()
        assert logits(model).isfinite().all()
    report.disable()
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS + 1}
    assert "kernel_registry" not in adapter._interfaces()[1]


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


def test_an_override_is_followed_and_told():
    model = tiny.model("qwen3_moe")
    with registry.override("moe.topk", "torch"), adapter.enable(model) as report:
        told = {(row.kernel, row.why) for row in report.rows if row.op == "moe.topk"}
    assert len(told) == 1 and told.pop()[0] == "torch"
    assert "override" in report.rows[0].why and "override" in str(report)


def test_an_override_that_can_not_be_followed_is_an_error_and_changes_nothing():
    model = tiny.model("qwen3_moe")
    before = state(model)
    with registry.override("moe.experts", "triton_grouped"), pytest.raises(OverrideError, match="dtype is float32"):
        adapter.enable(model)
    assert state(model) == before


def test_gpt_oss_weights_change_their_order_in_memory_only():
    model = tiny.model("gpt_oss")
    weight = model.model.layers[0].mlp.experts.down_proj
    was = weight.detach().clone()
    with adapter.enable(model):
        assert torch.equal(weight, was) and weight.transpose(1, 2).is_contiguous()
    assert torch.equal(weight, was) and weight.is_contiguous()


def test_weights_that_were_loaded_in_their_own_order_are_transformers_own(ran, caplog):
    model = tiny.model("gpt_oss")
    own, stored = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapter.enable(model):
        model.load_state_dict(stored, assign=True)
        torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran["moe.experts"] == 0 and "stored [E, in, out] were loaded after" in caplog.text


def test_a_deep_copy_is_switched_on_and_is_switched_off_by_itself(ran):
    model = tiny.model("gpt_oss")
    before, own = state(model), logits(model)
    adapter.enable(model)
    other = copy.deepcopy(model)
    for switched_off_first, still_on in ((other, model), (model, None)):
        adapter.disable(switched_off_first)
        ran.clear()
        torch.testing.assert_close(logits(switched_off_first), own, rtol=1e-4, atol=1e-4)
        assert not ran
        if still_on is not None:
            torch.testing.assert_close(logits(still_on), own, rtol=1e-4, atol=1e-4)
            assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS}
    assert state(model) == before and other.model.layers[0].mlp.experts.down_proj.is_contiguous()
    assert not any(name.startswith("_kernel_registry") or name == "forward" for module in other.modules()
                   for name in vars(module))


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_a_model_built_later_and_then_enabled_itself(model_first, runs, ran):
    """Whichever is switched off first, the other goes on, and then the model runs what transformers runs."""
    reports = [adapter.enable()]
    model = tiny.model("glm4_moe", experts="kernel_registry")
    if runs:
        logits(model)
    reports.append(adapter.enable(model))
    own = logits(model)
    torch.testing.assert_close(model(tiny.tokens()).logits, own, rtol=1e-4, atol=1e-4)  # records gradients
    first, second = reversed(reports) if model_first else reports
    first.disable()
    ran.clear()
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS}
    second.disable()
    ran.clear()
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert not ran and "kernel_registry" not in adapter._interfaces()[0]
    assert not any(name.startswith("_kernel_registry") or name == "forward" for module in model.modules()
                   for name in vars(module))


def test_a_model_below_torch_compile_is_the_model():
    model = tiny.model("qwen3_moe")
    compiled = torch.compile(model, backend="eager")
    report = adapter.enable(compiled)
    assert not report.declined and adapter.enable(compiled) is adapter.enable(model) is report
    adapter.disable(compiled)
    assert adapter._REPORT not in vars(model) and adapter._REPORT not in vars(compiled)


def test_routers_below_accelerates_hooks_are_served(ran):
    """As a model has them that is spread over devices: they move tensors, and then call the forward that they keep."""
    hooks = pytest.importorskip("accelerate.hooks", reason="not run: accelerate is not installed in this environment")
    model = tiny.model("qwen3_moe")
    own = logits(model)
    for layer in model.model.layers:
        for module in (layer.mlp.gate, layer.mlp.experts):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    before = state(model)
    with adapter.enable(model) as report:
        assert not report.declined
        torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert ran == {"moe.topk": tiny.LAYERS, "moe.experts": tiny.LAYERS} and state(model) == before


@pytest.mark.parametrize("part_first", [False, True])
def test_a_part_of_a_model_that_is_switched_on_is_refused(part_first):
    model = tiny.model("qwen3_moe")
    before = state(model.model), state(model)
    first, second = (model.model, model) if part_first else (model, model.model)
    adapter.enable(first)
    within = state(model)
    with pytest.raises(ValueError, match="mlp.experts is switched on already"):
        adapter.enable(second)
    assert state(model) == within
    adapter.disable(first)
    assert (state(model.model), state(model)) == before


def test_two_models_with_one_config_are_refused():
    model = tiny.model("qwen3_moe")
    other = type(model)(model.config)
    before = state(other)
    with adapter.enable(model):
        with pytest.raises(ValueError, match="is also that of another model"):
            adapter.enable(other)
    assert state(other) == before


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


def test_the_logits_of_routers_are_recorded_as_ever(ran):
    model, prompt = tiny.model("qwen3_moe"), tiny.tokens()
    with torch.no_grad():
        own = model(prompt, output_router_logits=True)
        with adapter.enable(model):
            found = model(prompt, output_router_logits=True)
    assert len(found.router_logits) == tiny.LAYERS and ran["moe.topk"] == tiny.LAYERS
    torch.testing.assert_close(found.router_logits, own.router_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.aux_loss, own.aux_loss, rtol=1e-4, atol=1e-4)


def test_a_profile_shows_the_ops(ran):
    model = tiny.model("qwen3_moe")
    with adapter.enable(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(model)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["kernel_registry::moe_topk"] == calls["kernel_registry::moe_experts"] == tiny.LAYERS


def test_compiled_before_anything_was_decided_is_an_error_that_says_what_to_do():
    adapter.enable()
    model = tiny.model("qwen3_moe", experts="kernel_registry")
    with pytest.raises(Exception, match="was not decided before torch.compile traced it"):
        logits(torch.compile(model, backend="eager", fullgraph=True))


def test_enabling_twice_is_once_and_a_failure_changes_nothing(monkeypatch):
    model = tiny.model("qwen3_moe")
    before = state(model)
    assert adapter.enable(model) is adapter.enable(model)
    adapter.disable(model)
    adapter.disable(model)
    assert state(model) == before
    monkeypatch.setattr(type(model), "set_experts_implementation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.enable(model)
    monkeypatch.undo()
    assert state(model) == before


def test_hidden_states_of_another_dtype_than_the_weights_are_transformers_own(ran, caplog):
    """Under autocast, say, whose products take both to one dtype."""
    model = tiny.model("mixtral")
    with adapter.enable(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module = model.model.layers[0].mlp.experts.bfloat16()
        found = module(torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2).bfloat16())
    assert found.dtype is torch.float32 and not ran and "float32 hidden states run transformers' own" in caplog.text


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_module_from_the_models_config_is_the_models_layer(name, ran):
    """kernel_registry.nn with the weights of the block that it stands for."""
    from kernel_registry.nn import MoE

    model = tiny.model(name)
    block = model.model.layers[1].mlp
    router, experts = getattr(block, "gate", None) or block.router, block.experts
    config = {**model.config.to_dict(), "dtype": "float32"}
    layer = MoE(config, shared_expert=getattr(block, "shared_experts", None), gate_bias=name == "gpt_oss")
    weights = {"gate": router.weight, "gate_bias": getattr(router, "bias", None),
               "correction_bias": getattr(router, "e_score_correction_bias",
                                          getattr(block, "e_score_correction_bias", None))}
    for ours, theirs in (("w13", "gate_up_proj"), ("w2", "down_proj")):
        weight = getattr(experts, theirs)
        weights[f"experts.{ours}"] = weight.transpose(1, 2) if experts.is_transposed else weight
        weights[f"experts.{ours}_bias"] = getattr(experts, f"{theirs}_bias", None)
    loaded = layer.load_state_dict({key: tensor for key, tensor in weights.items() if tensor is not None}, strict=False)
    assert not loaded.unexpected_keys and all(key.startswith("shared_expert.") for key in loaded.missing_keys)
    hidden = torch.randn(2, 5, tiny.COMMON["hidden_size"], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = block(hidden)
        found = layer(hidden)
    torch.testing.assert_close(found, wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-4, atol=1e-5)
    assert ran["moe.topk"] == ran["moe.experts"] == 1


@pytest.mark.parametrize("name", sorted(modules.families()))
def test_every_row_of_the_table_is_the_class_it_names(name):
    import importlib

    package = modules.families()[name].classes[name]
    assert hasattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: there is no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name, ran):
    model, prompt = tiny.model(name, torch.bfloat16).cuda(), tiny.tokens().cuda()
    own = logits(model, prompt).float()
    with adapter.enable(model) as report:
        assert not report.declined and not any(row.kernel == "torch" for row in report.rows)
        found = logits(model, prompt).float()
        generate(model, prompt)
    assert ran["moe.topk"] == ran["moe.experts"] == (1 + NEW) * tiny.LAYERS
    assert (found - own).norm() <= 0.1 * own.norm()
