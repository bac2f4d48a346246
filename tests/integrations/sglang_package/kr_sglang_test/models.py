"""Tiny models with random weights. Arguments: a row of MODELS and the folder to save it in."""

import sys

_SIZES = dict(vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
              num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
              pad_token_id=1)
MODELS = {  # (class, config beside the sizes, MoE layers)
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=64, decoder_sparse_step=1, mlp_only_layers=[]), 3),
    "glm4_moe": ("Glm4Moe", dict(n_routed_experts=64, n_shared_experts=1, n_group=8, topk_group=4,
                                 first_k_dense_replace=1, routed_scaling_factor=2.5, use_qk_norm=True), 2),
}

if __name__ == "__main__":
    import torch
    import transformers

    name, config, _ = MODELS[sys.argv[1]]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**_SIZES, **config))
    for key, tensor in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.1)
        elif key.endswith("gate.weight"):
            tensor.normal_(std=0.5)  # scores far apart: one ulp must not choose another expert
        elif ".experts." in key or key == "lm_head.weight":
            tensor.normal_(std=0.3)  # of weight in the result, which must depend on the routing and on few near-ties
    model.save_pretrained(sys.argv[2])
