"""Published configs become routing traits; how they are found and loaded; the families that they belong to."""

import json
import os
from pathlib import Path

import pytest
from model_config_support import refused, shipped

from kernel_registry.traits import families, moe
from kernel_registry.traits.model_config import (
    ConfigError,
    ModelConfig,
    known_model_types,
    load_config,
    routing,
    shipped_models,
)
from kernel_registry.traits.trait import REQUIRED

# Written by hand from the models' own descriptions, not from the code under test.
# model: E, G, TG, K, scoring, bias, renormalize, routed_scaling_factor, shared, routed layers, dtype of the logits
TABLE = {
    "deepseek-v2": (160, 8, 3, 6, "softmax", False, False, 16.0, 2, 59, "float32"),
    "deepseek-v2-lite": (64, 1, 1, 6, "softmax", False, False, 1.0, 2, 26, "float32"),
    "deepseek-v3": (256, 8, 4, 8, "sigmoid", True, True, 2.5, 1, 58, "float32"),
    "deepseek-v3.2": (256, 8, 4, 8, "sigmoid", True, True, 2.5, 1, 58, "float32"),
    "deepseek-v4": (256, 1, 1, 6, "sqrtsoftplus", True, True, 1.5, 1, 40, "float32"),
    "ernie-4.5-21b-a3b": (64, 1, 1, 6, "softmax", True, True, 1.0, 2, 27, "float32"),
    "ernie-4.5-300b-a47b": (64, 1, 1, 8, "softmax", True, True, 1.0, 0, 51, "float32"),
    "glm-4.5": (160, 1, 1, 8, "sigmoid", True, True, 2.5, 1, 89, "float32"),
    "glm-4.5-air": (128, 1, 1, 8, "sigmoid", True, True, 1.0, 1, 45, "float32"),
    "glm-5": (256, 1, 1, 8, "sigmoid", True, True, 2.5, 1, 75, "float32"),
    "gpt-oss-120b": (128, 1, 1, 4, "softmax", False, True, 1.0, 0, 36, "bfloat16"),
    "gpt-oss-20b": (32, 1, 1, 4, "softmax", False, True, 1.0, 0, 24, "bfloat16"),
    "kimi-k2": (384, 1, 1, 8, "sigmoid", True, True, 2.827, 1, 60, "float32"),
    "kimi-k3": (896, 1, 1, 16, "sigmoid", True, True, 1.0, 2, 92, "float32"),
    "ling-1t": (256, 8, 4, 8, "sigmoid", True, True, 2.5, 1, 76, "float32"),
    "ling-mini-2.0": (256, 8, 4, 8, "sigmoid", True, True, 2.5, 1, 19, "float32"),
    "llama-4-maverick": (128, 1, 1, 1, "sigmoid", False, False, 1.0, 1, 24, "bfloat16"),
    "llama-4-scout": (16, 1, 1, 1, "sigmoid", False, False, 1.0, 1, 48, "bfloat16"),
    "minimax-m2": (256, 1, 1, 8, "sigmoid", True, True, 1.0, 0, 62, "float32"),
    "mixtral-8x7b": (8, 1, 1, 2, "softmax", False, True, 1.0, 0, 32, "bfloat16"),
    "nemotron-3-super-120b-a12b": (512, 1, 1, 22, "sigmoid", True, True, 5.0, 1, 40, "float32"),
    "qwen3-235b-a22b": (128, 1, 1, 8, "softmax", False, True, 1.0, 0, 94, "bfloat16"),
    "qwen3-30b-a3b": (128, 1, 1, 8, "softmax", False, True, 1.0, 0, 48, "bfloat16"),
    "qwen3-next-80b-a3b": (512, 1, 1, 10, "softmax", False, True, 1.0, 1, 48, "bfloat16"),
}


def test_every_shipped_model_is_in_the_table():
    assert set(shipped_models()) == set(TABLE) and len(TABLE) >= 18


@pytest.mark.parametrize("name", TABLE)
def test_routing_of_shipped_models(name):
    result = routing(name)
    t = result.traits
    assert (
        t["num_experts"],
        t["num_expert_group"],
        t["topk_group"],
        t["topk"],
        t["scoring"],
        t["has_bias"],
        t["renormalize"],
        result.arguments["routed_scaling_factor"],
        result.shared_experts,
        result.moe_layers,
        t["dtype"],
    ) == TABLE[name]
    assert t["num_fused_shared_experts"] == 0 and t["bias_dtype"] == "float32" and t["score_dtype"] == "float32"
    assert list(result.arguments) == ["routed_scaling_factor"]
    assert any("shared expert" in note for note in result.notes) == (result.shared_experts > 0)


@pytest.mark.parametrize("name", TABLE)
def test_traits_are_complete_and_canonical(name):
    traits = routing(name).traits
    static = [t for t in moe.TOPK_TRAITS if t.type != "platform" and not t.dynamic]
    assert list(traits) == [t.name for t in static]
    assert all(t.parse(traits[t.name]) == traits[t.name] for t in static)
    assert all(traits[t.name] is not REQUIRED for t in static)


def test_notes_say_what_traits_cannot():
    assert any("not counted" in note for note in routing("deepseek-v4").notes)
    assert any("tie" in note for note in routing("llama-4-scout").notes)
    assert routing("mixtral-8x7b").notes == ()


# ---- loading ---------------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_file_folder_name_and_object_are_the_same(tmp_path):
    data = load_config("deepseek-v3").data
    folder = tmp_path / "DeepSeek-V3"
    folder.mkdir()
    file = write(folder / "config.json", data)
    for source in (file, str(file), folder, str(folder), data, load_config(folder)):
        assert routing(source) == routing("deepseek-v3")
    assert load_config(folder) == ModelConfig("DeepSeek-V3", str(file), data)
    assert load_config(write(tmp_path / "other.json", data)).name == "other"
    assert load_config("deepseek-v3").source == "shipped:deepseek-v3" and load_config(data).name == "deepseek_v3"


def test_a_path_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "deepseek-v3", shipped("deepseek-v3", num_experts_per_tok=4))
    assert routing("deepseek-v3").traits["topk"] == 4


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "got list"),
        ("3", "got int"),
        ("null", "got NoneType"),
        ('{"n_group": 1, "n_group": 8}', "'n_group' is written twice"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, why):
    path = write(tmp_path / "config.json", content)
    refused(path, str(path), why)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00{")
    refused(path, str(path), "not JSON")


def test_missing_files(tmp_path):
    refused(tmp_path / "none.json", "none.json", "no such file")
    refused(tmp_path, "the folder has no config.json")
    refused("deepseek-v33", "did you mean 'deepseek-v3")
    refused("zzz", "shipped: deepseek-v2, ")
    refused("x" * 5000)
    refused("a\0b")
    for source in (None, 3, ""):
        with pytest.raises(ConfigError, match="expected a path"):
            load_config(source)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    path = write(tmp_path / "config.json", {})
    path.chmod(0)
    refused(path, str(path), "can't be read")


def test_a_read_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "config.json", {})
    monkeypatch.setattr(Path, "read_text", fail)
    refused(path, str(path), "can't be read: Permission denied")


def test_errors_name_the_file(tmp_path):
    path = write(tmp_path / "config.json", shipped("deepseek-v3", n_group=7))
    assert refused(path).startswith(f"{path}: n_group: ")
    assert refused(shipped("kimi-k3", topk_group=2)).startswith("kimi_k3: text_config.topk_group: ")


# ---- what may vary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "layers"),
    [
        ("deepseek-v3", dict(moe_layer_freq=2), 29),  # 4, 6, ... 60
        ("deepseek-v3", dict(moe_layer_freq=...), 58),
        ("deepseek-v3", dict(first_k_dense_replace=0), 61),
        ("deepseek-v3", dict(mlp_layer_types=["dense"] * 60 + ["sparse"]), 1),
        ("deepseek-v4", dict(num_hash_layers=0), 43),
        ("deepseek-v4", dict(mlp_layer_types=["hash_moe"] * 5 + ["moe"] * 38), 38),
        ("qwen3-30b-a3b", dict(decoder_sparse_step=2), 24),
        ("qwen3-30b-a3b", dict(mlp_only_layers=[0, 4]), 46),
        ("qwen3-30b-a3b", dict(decoder_sparse_step=2, mlp_only_layers=[0, 1]), 23),
        ("qwen3-30b-a3b", dict(mlp_only_layers=...), 48),
        ("llama-4-maverick", dict(moe_layers=[1, 3, 5]), 3),
        ("llama-4-maverick", dict(interleave_moe_layer_step=3), 16),
        ("ernie-4.5-21b-a3b", dict(moe_layer_end_index=-1), 27),
        ("ernie-4.5-21b-a3b", dict(moe_layer_end_index=10), 10),
        ("ernie-4.5-21b-a3b", dict(moe_layer_interval=2), 14),
        (
            "nemotron-3-super-120b-a12b",
            dict(hybrid_override_pattern=..., layers_block_type=["mamba"] * 80 + ["moe"] * 8),
            8,
        ),
    ],
)
def test_which_layers_route(model, changes, layers):
    assert routing(shipped(model, **changes)).moe_layers == layers


def test_fields_that_a_config_may_leave_out():
    """A config written by transformers drops what its class does not have."""
    bare = shipped("deepseek-v3", scoring_func=..., topk_method=..., moe_layer_freq=...)
    assert routing(bare) == routing("deepseek-v3")
    assert routing(shipped("deepseek-v2", scoring_func=None)) == routing("deepseek-v2")
    assert routing(shipped("gpt-oss-20b", dtype="float16")).traits["dtype"] == "float16"
    assert routing(shipped("mixtral-8x7b", torch_dtype=..., dtype="float16")).traits["dtype"] == "float16"


def test_the_dtype_may_stand_outside_the_text_model():
    config = shipped("llama-4-scout", torch_dtype=...)
    assert routing(config).traits["dtype"] == "bfloat16"
    assert routing({**config, "torch_dtype": "float16"}).traits["dtype"] == "float16"
    assert routing({**shipped("llama-4-scout"), "torch_dtype": "float16"}).traits["dtype"] == "bfloat16"


# ---- families.yaml ---------------------------------------------------------------------------------------------------

FAMILY = """\
version: 1
families:
  one:
    model_types: [one]
    traits:
      num_experts: experts
      topk: {from: k}
      scoring: {always: softmax}
      has_bias: {always: false}
      renormalize: {from: norm, default: true}
    layers: {total: depth}
"""


def test_a_small_family_reads():
    family = families.parse(FAMILY)["one"]
    assert family.traits["num_experts"].fields == ("experts",) and family.traits["renormalize"].default is True


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("version: 1", "version: 2", "version: expected 1"),
        ("version: 1\n", "", "version is missing"),
        ("version: 1", "version: 1\nfamilys: {}", "unknown key 'familys'; did you mean 'families'"),
        (
            "    layers: {total: depth}",
            "    layers: {total: depth}\n    note: x",
            "one: unknown key 'note'; did you mean 'notes'",
        ),
        ("    layers: {total: depth}", "", "layers is missing"),
        ("      topk: {from: k}\n", "", "traits: topk is missing"),
        ("topk:", "top_k:", "'top_k' is no trait of moe.topk; did you mean 'topk'"),
        ("{always: softmax}", "{always: tanh}", "scoring: expected one of sigmoid, softmax"),
        ("default: true", "default: 1", "renormalize: expected true or false"),
        ("{from: k}", "{form: k}", "unknown key 'form'; did you mean 'from'"),
        ("{from: k}", "{default: 3}", "expected 'from'"),
        ("{from: k}", "{from: k, always: 1, default: 2}", "exclude each other"),
        ("{from: k}", "{from: 3}", "expected a list"),
        ("{from: k}", "{from: [3]}", "expected text"),
        ("{from: k}", "[k]", "expected a mapping"),
        ("[one]", "one", "expected a list"),
        ("{total: depth}", "{total: depth, step: 2}", "layers: unknown key 'step'"),
        ("{total: depth}", "{first: 1}", "total is missing"),
        ("{total: depth}", "{total: depth, offset: a}", "offset: expected a whole number"),
        ("      topk: {from: k}", "      topk: {from: k}\n      topk: {from: j}", "'topk' is written twice"),
        ("    layers:", "    variants: {field: f, cases: {a: {topkk: k}}}\n    layers:", "'topkk' is no trait"),
        ("    layers:", "    must: {f: a}\n    layers:", "must: f: expected a list"),
        ("  one:\n    model_types: [one]", "  one:\n    model_types: [one, one]", "belongs to one"),
        ("version: 1", "version: [", "not YAML"),
        ("families:", "families: 3\nx:", "unknown key 'x'"),
    ],
)
def test_a_wrong_families_file_is_refused(old, new, why):
    assert old in FAMILY
    with pytest.raises(families.FamiliesError) as caught:
        families.parse(FAMILY.replace(old, new, 1))
    assert why in str(caught.value)


def test_every_family_can_serve_some_config():
    """A family that no shipped config uses is still complete: it reads a config made of its own fields."""
    made = {
        "glm4_moe_lite": "glm-4.5",
        "dots1": "glm-4.5",
        "kimi_k2": "kimi-k2",
        "bailing_moe_v2": "ling-mini-2.0",
        "mimo_v2_flash": "glm-4.5",
    }
    used = {load_config(n).data.get("text_config", load_config(n).data)["model_type"] for n in shipped_models()}
    assert used | set(made) == set(known_model_types())
    for model_type, like in made.items():
        config = shipped(like, model_type=model_type)
        if model_type == "mimo_v2_flash":
            config |= {"routed_scaling_factor": None, "n_shared_experts": None, "moe_layer_freq": [0] + [1] * 91}
            assert routing(config).moe_layers == 91 and routing(config).arguments == {"routed_scaling_factor": 1.0}
        assert routing(config).traits["scoring"] == "sigmoid"
