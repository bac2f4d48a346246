"""What the benchmarks of transformers run: a model in DeepSeek-V3's shape, and the ways to run its experts."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some implementations would look for their kernels there

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kernel_registry.integrations.transformers import enable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS, EAGER = "registry", "eager"
SHAPE = dict(hidden_size=2048, moe_intermediate_size=1024, intermediate_size=4096, num_attention_heads=16,
             num_key_value_heads=16, q_lora_rank=768, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
             v_head_dim=64, vocab_size=4096, max_position_embeddings=4096)
TINY = dict(hidden_size=64, moe_intermediate_size=32, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=16, vocab_size=128, max_position_embeddings=256)


def make_model(experts: int, tiny: bool = False, layers: int = 4, dtype: torch.dtype = torch.bfloat16):
    """Random weights, made on the device; the router's correction bias in float32, as checkpoints have it."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **(TINY if tiny else SHAPE), num_hidden_layers=layers, n_routed_experts=experts, num_experts_per_tok=8,
        n_group=8, topk_group=4, n_shared_experts=1, first_k_dense_replace=0, routed_scaling_factor=2.5,
        bos_token_id=0, eos_token_id=None, pad_token_id=0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=EAGER).eval()
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.data = torch.randn(experts) * 0.02
    return model


@contextmanager
def builtin(name: str, model):
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(EAGER)


def contestants(model) -> dict:
    """name -> a context manager of the model: transformers' implementations, and the registry, that run here; others
    are told with the reason."""
    able = {}
    for name in (EAGER, *sorted(ALL_EXPERTS_FUNCTIONS.keys()), OURS):
        switch = enable if name == OURS else partial(builtin, name)
        try:
            with switch(model):
                model(torch.ones(2, 1, dtype=torch.int64, device=DEVICE))
            able[name] = switch
        except Exception as error:  # its kernels are to come from the hub, say
            if name in (EAGER, OURS):
                raise
            print(f"# {name} does not run here: {in_short(error)}")
    return able


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
