"""Small models of transformers from their configs, random weights, nothing downloaded."""

from __future__ import annotations

import torch
import transformers

COMMON = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
              max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=0)
GROUPED = dict(intermediate_size=48, moe_intermediate_size=24, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
               topk_group=2, first_k_dense_replace=0, n_shared_experts=1, routed_scaling_factor=2.5)
MODELS = {
    "deepseek_v3": ("DeepseekV3Config", dict(**GROUPED, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
                                             qk_rope_head_dim=8, v_head_dim=8)),
    "glm4_moe": ("Glm4MoeConfig", dict(**GROUPED, head_dim=8)),
    "minimax_m2": ("MiniMaxM2Config", dict(intermediate_size=24, num_local_experts=16, num_experts_per_tok=4,
                                           head_dim=8, rotary_dim=8)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(intermediate_size=48, moe_intermediate_size=24, num_experts=16,
                                         num_experts_per_tok=4, head_dim=8, norm_topk_prob=False)),
    "mixtral": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=8, num_experts_per_tok=2)),
    "gpt_oss": ("GptOssConfig", dict(intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, head_dim=8,
                                     layer_types=["sliding_attention", "full_attention"],
                                     rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
}
LAYERS = COMMON["num_hidden_layers"]


def config(name: str, **more):
    cls, own = MODELS[name]
    return getattr(transformers, cls)(**{**COMMON, **own, **more})


def model(name: str, dtype=torch.float32, experts: str = "eager", **more):
    """A model in eval mode whose weights, biases of experts and of routers are all drawn, the same in every call."""
    made = transformers.AutoModelForCausalLM.from_config(config(name, **more), experts_implementation=experts).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in (*made.named_parameters(), *made.named_buffers()):
        if "norm" not in key and "inv_freq" not in key:
            width = tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1.0
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 / width)
    return made.to(dtype)


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, COMMON["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
