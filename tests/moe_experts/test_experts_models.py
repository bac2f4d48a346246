"""The experts of published models, read off their configs; and plan, run and verify of this op."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kernel_registry import registry
from kernel_registry.cli import main
from kernel_registry.ops.moe.experts.contract import Experts
from kernel_registry.traits.families import FamiliesError, parse
from kernel_registry.traits.model_config import ConfigError, ModelConfig, experts, load_config, routing, shipped_models

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def changed(model: str, **fields) -> ModelConfig:
    """A shipped config with some fields changed, or left out where the value is None."""
    data = {**load_config(model).data, **fields}
    return ModelConfig(model, "", {name: value for name, value in data.items() if value is not None})


@pytest.mark.parametrize("model, expected", [
    ("deepseek-v3", dict(num_experts=256, topk=8, hidden_size=7168, intermediate_size=2048, weight_quant="fp8_block",
                         act_quant="fp8_block", group_size=128, activation="silu", has_bias=False, dtype="bfloat16")),
    ("qwen3-30b-a3b", dict(num_experts=128, topk=8, hidden_size=2048, intermediate_size=768, weight_quant="none")),
    ("gpt-oss-20b", dict(num_experts=32, topk=4, hidden_size=2880, intermediate_size=2880, activation="swigluoai",
                         has_bias=True, weight_quant="none")),
    ("mixtral-8x7b", dict(num_experts=8, topk=2, hidden_size=4096, intermediate_size=14336)),
    ("minimax-m2", dict(num_experts=256, topk=8, hidden_size=3072, intermediate_size=1536, weight_quant="fp8_block")),
    ("llama-4-scout", dict(num_experts=16, topk=1, hidden_size=5120, intermediate_size=8192,
                           apply_router_weight_on_input=True))])
def test_published_models(model, expected):
    found = experts(model)
    assert {name: found.traits[name] for name in expected} == expected
    assert found.moe_layers == routing(model).moe_layers


def test_every_shipped_model_has_a_call_or_says_why_not():
    without = set()
    for model in shipped_models():
        calls = Experts.workloads(load_config(model))
        notes = [note for note in routing(model).notes if note.startswith("no moe.experts: ")]
        assert len(calls) + len(notes) == 1
        for call in calls:
            registry.dispatch("moe.experts", **call.traits)  # traits that the contract takes
        without |= set() if calls else {model}
    assert without == {"deepseek-v4", "kimi-k3", "nemotron-3-super-120b-a12b"}


@pytest.mark.parametrize("quantisation, expected", [
    (FP8, ("fp8_block", "fp8_block", 128)), ({**FP8, "weight_block_size": [64, 64]}, ("fp8_block", "fp8_block", 64)),
    ({**FP8, "modules_to_not_convert": ["lm_head", "mlp.shared_experts"]}, ("fp8_block", "fp8_block", 128))])
def test_quantisations_that_are_known(quantisation, expected):
    traits = experts(changed("qwen3-30b-a3b", quantization_config=quantisation)).traits
    assert (traits["weight_quant"], traits["act_quant"], traits["group_size"]) == expected


@pytest.mark.parametrize("quantisation", [
    {"quant_method": "mxfp4"}, {"quant_method": "compressed-tensors", "config_groups": {}}, {},
    {**FP8, "weight_block_size": [128, 64]}, {**FP8, "weight_block_size": None}, {**FP8, "activation_scheme": "static"},
    {**FP8, "weight_block_size": [True, True]}, {**FP8, "modules_to_not_convert": ["model.layers.0.mlp.experts"]}])
def test_other_quantisations_are_told_not_guessed(quantisation):
    found = experts(changed("qwen3-30b-a3b", quantization_config=quantisation))
    assert (found.traits["weight_quant"], found.traits["act_quant"]) == ("none", "none")
    assert "these are the experts in the model's dtype" in found.notes[0]
    assert not experts("qwen3-30b-a3b").notes


@pytest.mark.parametrize("model, fields, reason", [
    ("qwen3-30b-a3b", dict(hidden_act="gelu_pytorch_tanh"), "hidden_act is 'gelu_pytorch_tanh', expected one of silu"),
    ("gpt-oss-20b", dict(swiglu_limit=10.0), "swiglu_limit is 10.0"),
    ("glm-4.5", dict(swiglu_limit=10.0), "swiglu_limit is 10.0"),
    ("llama-4-scout", dict(text_config={**load_config("llama-4-scout").data["text_config"], "num_experts_per_tok": 2}),
     "text_config.num_experts_per_tok is 2")])
def test_experts_that_no_trait_describes(model, fields, reason):
    config = changed(model, **fields)
    assert experts(config) is None and Experts.workloads(config) == []
    assert any(note.startswith("no moe.experts: ") and reason in note for note in routing(config).notes)


@pytest.mark.parametrize("model, fields, message", [
    ("qwen3-30b-a3b", dict(moe_intermediate_size=None), "moe_intermediate_size: missing"),
    ("qwen3-30b-a3b", dict(hidden_size="2048"), "hidden_size: expected a whole number >= 1, got '2048'"),
    ("qwen3-30b-a3b", dict(hidden_act=3), "hidden_act: expected one of silu"),
    ("deepseek-v3", dict(quantization_config="fp8"), "quantization_config: expected an object")])
def test_fields_that_are_missing_or_wrong(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        experts(changed(model, **fields))


FAMILY = """
version: 1
families:
  one:
    model_types: [one]
    traits: {num_experts: n, topk: k, scoring: {always: softmax}, has_bias: {always: false}, renormalize: r}
    layers: {total: layers}
    experts: EXPERTS
"""
WHOLE = "{hidden_size: h, intermediate_size: i, dtype: {always: bfloat16}, activation: {always: silu}}"


@pytest.mark.parametrize("body, message", [
    ("{traits: {hidden_size: h}}", "one: experts: traits: intermediate_size is missing"),
    (f"{{traits: {WHOLE[:-1]}, activatoin: a}}}}", "'activatoin' is no trait of moe.experts; did you mean"),
    (f"{{traits: {WHOLE.replace('silu', 'relu2')}}}", "one: experts: traits: activation: expected one of silu"),
    ("{must: {}}", "one: experts: traits is missing"), ("[a]", "one: experts: expected a mapping"),
    (f"{{traits: {WHOLE}, must: {{a: 1}}}}", "one: experts: must: a: expected a list")])
def test_the_data_is_checked(body, message):
    assert parse(FAMILY.replace("EXPERTS", f"{{traits: {WHOLE}}}"))["one"].experts.must == {}
    with pytest.raises(FamiliesError, match=message):
        parse(FAMILY.replace("EXPERTS", body))


def test_a_family_that_says_nothing_about_its_experts():
    family = parse(FAMILY.replace("    experts: EXPERTS\n", ""))["one"]
    assert family.experts == "nothing is known about them"


# ---- through the command line ----------------------------------------------------------------------------------------

def typed(*arguments: str):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_plan_shows_both_ops():
    output = typed("plan", "deepseek-v3", "--platform", "sm_90")
    assert "moe.topk in 58 layers: num_experts=256" in output
    assert "moe.experts in 58 layers: num_experts=256, topk=8, hidden_size=7168, intermediate_size=2048" in output
    assert "weight_quant=fp8_block" in output
    assert "no moe.experts: its experts have no gate" in typed("plan", "nemotron-3-super-120b-a12b")


@pytest.mark.parametrize("model", ("deepseek-v3", "gpt-oss-20b", "llama-4-scout"))
def test_run_says_what_it_reduced_on_a_cpu(model):
    if registry.platform().kind in ("cuda", "hip"):
        pytest.skip("real sizes fit here")
    output = typed("run", model, "--tokens", "3")
    told = " ".join(output.split())
    assert "moe.experts 3 " in told and "passed 0 of 3" in told and "failed" not in told
    assert "reduced: moe.experts was run with num_experts=" in output and "reduced: moe.topk" not in output


@pytest.mark.parametrize("name", [i.name for i in registry.catalog.op("moe.experts").implementations])
def test_verify_passes(name, tmp_path):
    report = tmp_path / "report.json"
    output = typed("verify", "--op", "moe.experts", "--implementation", name, "--budget", "24", "--json", str(report))
    assert " 0 failed, " in output
    told = json.loads(report.read_text())
    assert {(r["implementation"], r["result"]) for r in told["results"]} == {(name, "passed")}
    rows = [row for row in told["rows"] if row["where"] == "model"]
    if registry.platform().kind not in ("cuda", "hip"):
        assert rows and all(row["point"].partition(":")[0].endswith(", reduced") for row in rows)


def test_bench_names_what_it_reduced(tmp_path):
    if registry.platform().kind in ("cuda", "hip"):
        pytest.skip("real sizes fit here")
    report = tmp_path / "bench.json"
    typed("bench", "--op", "moe.experts", "--workload", "mixtral-8x7b", "--implementation", "torch", "--tokens", "1",
          "--seconds", "0.01", "--json", str(report))
    rows = json.loads(report.read_text())["rows"]
    assert {row["workload"] for row in rows} == {"mixtral-8x7b (reduced)"}
    assert all(row["microseconds"] > 0 for row in rows if row["implementation"] == "torch")
