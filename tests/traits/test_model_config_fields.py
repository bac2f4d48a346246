"""A missing, wrong or contradictory field of a config is an error that names it."""

import pytest
from model_config_support import refused, shipped

from kernel_registry.traits.model_config import known_model_types

REQUIRED_FIELDS = [
    (
        "deepseek-v3",
        "n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor n_shared_experts "
        "num_hidden_layers first_k_dense_replace",
    ),
    (
        "deepseek-v2",
        "n_routed_experts num_experts_per_tok n_group topk_group topk_method routed_scaling_factor n_shared_experts",
    ),
    (
        "deepseek-v4",
        "n_routed_experts num_experts_per_tok norm_topk_prob routed_scaling_factor num_hash_layers n_shared_experts",
    ),
    (
        "kimi-k3",
        "num_experts num_experts_per_token num_expert_group topk_group moe_renormalize routed_scaling_factor "
        "num_shared_experts",
    ),
    (
        "qwen3-30b-a3b",
        "num_experts num_experts_per_tok norm_topk_prob decoder_sparse_step torch_dtype num_hidden_layers",
    ),
    ("mixtral-8x7b", "num_local_experts num_experts_per_tok torch_dtype"),
    ("gpt-oss-20b", "num_local_experts num_experts_per_tok"),
    ("ernie-4.5-21b-a3b", "moe_num_experts moe_k moe_num_shared_experts moe_layer_start_index"),
    ("minimax-m2", "num_local_experts num_experts_per_tok num_hidden_layers"),
    ("llama-4-scout", "num_local_experts num_experts_per_tok interleave_moe_layer_step"),
    ("nemotron-3-super-120b-a12b", "n_routed_experts hybrid_override_pattern norm_topk_prob routed_scaling_factor"),
    (
        "ling-mini-2.0",
        "num_experts n_group topk_group score_function norm_topk_prob num_shared_experts routed_scaling_factor",
    ),
    ("glm-4.5", "n_routed_experts n_group topk_group norm_topk_prob first_k_dense_replace"),
]
CASES = [(model, field) for model, fields in REQUIRED_FIELDS for field in fields.split()]


@pytest.mark.parametrize(("model", "field"), CASES)
def test_a_missing_or_null_field_is_named(model, field):
    refused(shipped(model, **{field: ...}), f"{field}: missing; expected")
    refused(shipped(model, **{field: None}), f"{field}: null; expected")


@pytest.mark.parametrize(("model", "field"), CASES)
def test_a_field_of_the_wrong_type_is_named(model, field):
    for wrong in ({"a": 1}, ["x"], -3.5):
        refused(shipped(model, **{field: wrong}), f"{field}: ", repr(wrong) if not isinstance(wrong, list) else "")


NUMBERS = [
    (m, f)
    for m, f in CASES
    if f
    not in (
        "norm_topk_prob",
        "moe_renormalize",
        "topk_method",
        "torch_dtype",
        "score_function",
        "hybrid_override_pattern",
    )
]


@pytest.mark.parametrize(("model", "field"), NUMBERS)
def test_a_negative_number_or_a_boolean_is_named(model, field):
    refused(shipped(model, **{field: -1}), f"{field}: expected", "got -1")
    refused(shipped(model, **{field: True}), f"{field}: expected", "got True")
    refused(shipped(model, **{field: "8"}), f"{field}: expected", "got '8'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_experts_per_tok=257), ("num_experts_per_tok: 257", "n_routed_experts, which is 256")),
        (dict(n_group=7), ("n_group: 7 groups do not divide n_routed_experts, which is 256",)),
        (dict(topk_group=9), ("topk_group: 9 kept groups exceed n_group, which is 8",)),
        (dict(n_group=64, topk_group=1), ("topk_group: 1 kept groups of 4 experts", "num_experts_per_tok, which is 8")),
        (
            dict(scoring_func="softmax"),
            ("scoring_func: 'softmax' contradicts model_type 'deepseek_v3', which has 'sigmoid'",),
        ),
        (dict(scoring_func="tanh"), ("scoring_func: expected one of sigmoid",)),
        (dict(topk_method="greedy"), ("topk_method: 'greedy' contradicts model_type 'deepseek_v3'", "'noaux_tc'")),
        (dict(topk_method=["noaux_tc"]), ("topk_method: ",)),
        (dict(norm_topk_prob=1), ("norm_topk_prob: expected true or false, got 1",)),
        (dict(norm_topk_prob="true"), ("norm_topk_prob: expected true or false",)),
        (dict(routed_scaling_factor=0), ("routed_scaling_factor: expected a number above 0",)),
        (dict(routed_scaling_factor=float("inf")), ("routed_scaling_factor: ",)),
        (dict(routed_scaling_factor=float("nan")), ("routed_scaling_factor: ",)),
        (dict(n_routed_experts=0), ("n_routed_experts: expected a whole number >= 1, got 0",)),
        (dict(num_local_experts=128), ("num_local_experts: 128 contradicts n_routed_experts, which is 256",)),
        (dict(first_k_dense_replace=61), ("first_k_dense_replace: none of the 61 layers routes", "dense model")),
        (dict(moe_layer_freq=0), ("moe_layer_freq: expected a whole number >= 1",)),
        (
            dict(mlp_layer_types=["dense"] * 3),
            ("mlp_layer_types: expected one entry for each of the 61 layers, got 3",),
        ),
        (dict(mlp_layer_types=5), ("mlp_layer_types: ",)),
    ],
)
def test_contradictions_of_deepseek_v3(changes, words):
    refused(shipped("deepseek-v3", **changes), *words)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("deepseek-v2", dict(topk_method="greedy"), ("n_group: 8 contradicts",)),
        ("deepseek-v2", dict(topk_method="noaux_tc"), ("topk_method: expected one of greedy, group_limited_greedy",)),
        ("deepseek-v2", dict(scoring_func="sigmoid"), ("scoring_func: 'sigmoid' contradicts", "'softmax'")),
        ("deepseek-v2", dict(norm_topk_prob=True), ("norm_topk_prob: True contradicts",)),
        ("deepseek-v2-lite", dict(n_group=8), ("n_group: 8 contradicts",)),
        ("deepseek-v4", dict(scoring_func="sigmoid"), ("scoring_func: 'sigmoid' contradicts", "'sqrtsoftplus'")),
        ("minimax-m2", dict(scoring_func="softmax"), ("scoring_func: ",)),
        ("minimax-m2", dict(use_routing_bias=False), ("use_routing_bias: False contradicts",)),
        ("ling-mini-2.0", dict(score_function="softmax"), ("score_function: 'softmax' contradicts",)),
        (
            "ling-mini-2.0",
            dict(moe_router_enable_expert_bias=False),
            ("moe_router_enable_expert_bias: False contradicts",),
        ),
        ("kimi-k3", dict(moe_router_activation_func="softmax"), ("text_config.moe_router_activation_func: ",)),
        (
            "kimi-k3",
            dict(num_experts_per_tok=8),
            ("text_config.num_experts_per_tok: 8 contradicts num_experts_per_token",),
        ),
        ("mixtral-8x7b", dict(num_experts_per_tok=9), ("num_experts_per_tok: 9", "num_local_experts, which is 8")),
        ("mixtral-8x7b", dict(torch_dtype="float31"), ("torch_dtype: expected a dtype",)),
        ("mixtral-8x7b", dict(dtype="float16"), ("dtype: 'float16' contradicts torch_dtype",)),
        (
            "nemotron-3-super-120b-a12b",
            dict(hybrid_override_pattern="ME"),
            ("hybrid_override_pattern: expected one entry", "got 2"),
        ),
        ("nemotron-3-super-120b-a12b", dict(hybrid_override_pattern="M" * 88), ("none of the 88 layers routes",)),
        ("qwen3-30b-a3b", dict(mlp_only_layers=[48]), ("mlp_only_layers: expected a list of layer indices below 48",)),
        ("qwen3-30b-a3b", dict(mlp_only_layers="none"), ("mlp_only_layers: ",)),
        ("llama-4-scout", dict(moe_layers=[48]), ("text_config.moe_layers: ",)),
    ],
)
def test_contradictions_of_others(model, changes, words):
    refused(shipped(model, **changes), *words)


def test_unknown_and_dense_models():
    refused({}, "model_type: missing", "deepseek_v3")
    refused({"model_type": None}, "model_type: missing")
    refused({"model_type": 3}, "model_type: expected text, got 3")
    dense = refused({"model_type": "llama", "hidden_size": 4096}, "model_type: 'llama'", "dense model")
    assert all(known in dense for known in known_model_types())
    unknown = refused({"model_type": "qwen4_moe", "num_experts": 8}, "did you mean 'qwen3_moe'")
    assert "dense" not in unknown
    refused(
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        "text_config.model_type: 'llama'",
        "dense model",
    )
    refused({"model_type": "llama4", "text_config": {}}, "text_config.model_type: missing")
