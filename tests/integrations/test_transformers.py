"""Real (tiny, random) models of transformers with the registry's kernels: the same tokens, the same logits, no trace.

Run where transformers is, `nox -f tests/integrations/noxfile.py -s transformers`. Without a GPU, kernels that have a
Triton form run in Triton's interpreter.
"""

from __future__ import annotations

import inspect

import pytest
from transformers_parts import MODELS, NEW, generate, logits, state, switched_off  # noqa: F401  first: it may skip

import torch  # noqa: E402
import tiny_models as tiny  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.integrations import transformers as adapter  # noqa: E402
from kernel_registry.integrations import transformers_modules as modules  # noqa: E402


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
    as_near_as_transformers(name, "cpu")
    assert ran == {"moe.topk": 1, "moe.experts": 1}


def as_near_as_transformers(name: str, device: str) -> None:
    """Both round at the same places or at fewer; a factor of two is for what chance makes of so few numbers. One layer,
    whose routers see the same input: with another before it a rounding may choose another expert, here or there."""
    one = dict(num_hidden_layers=1, **({"layer_types": ["full_attention"]} if name == "gpt_oss" else {}))
    prompt = tiny.tokens().to(device)
    exact, model = logits(tiny.model(name, **one).to(device), prompt), tiny.model(name, torch.bfloat16, **one)
    eager = (logits(model.to(device), prompt).float() - exact).norm()
    with adapter.enable(model):
        ours = (logits(model, prompt).float() - exact).norm()
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
    as_near_as_transformers(name, "cuda")
    assert ran == {"moe.topk": 1, "moe.experts": 1}
    model, prompt = tiny.model(name, torch.bfloat16).cuda(), tiny.tokens().cuda()
    with adapter.enable(model) as report:
        assert not report.declined and not any(row.kernel == "torch" for row in report.rows)
        generate(model, prompt)
    assert ran["moe.topk"] == ran["moe.experts"] == 1 + NEW * tiny.LAYERS
