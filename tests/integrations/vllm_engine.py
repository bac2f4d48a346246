"""Runs in a process of its own: python vllm_engine.py FOLDER MODE MODEL..., in the environment that has vLLM.

Writes tiny models with random weights into FOLDER where they are not there yet, generates with each through vLLM's
engine, and prints one JSON line: model -> tokens, logprobs, report. MODE: eager, compiled, or reference, which is
transformers' own eager code. Models are the names in MODELS; the prompts are token ids, so that no tokenizer is needed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

NEW_TOKENS = 6
PROMPTS = [[5, 17, 3, 99, 42], [7], [11, 60, 61, 62, 90, 91, 12, 13, 4], [100, 2, 3]]
_COMMON = dict(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=128, initializer_range=0.15, tie_word_embeddings=False, bos_token_id=0,
               eos_token_id=1, pad_token_id=None)
_GROUPED = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
                routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1, moe_intermediate_size=32,
                intermediate_size=96)
# class of the config and of the model, config; keys that real checkpoints have beside those of the config's class
MODELS = {
    "deepseek_v3": ("DeepseekV3", {**_COMMON, **_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 32,
                                   "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
                                   "v_head_dim": 32}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "glm4_moe": ("Glm4Moe", {**_COMMON, **_GROUPED, "head_dim": 32, "use_qk_norm": True}, {}),
    "minimax_m2": ("MiniMaxM2", {**_COMMON, "num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 32,
                                 "intermediate_size": 32, "rotary_dim": 16},
                   {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "rotary_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32,
                               "moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True}, {}),
}
MOE_LAYERS = {"deepseek_v3": 2, "glm4_moe": 2, "minimax_m2": 3, "qwen3_moe": 3}


def build(folder: Path, name: str) -> Path:
    """The model's folder, written on first use: the same weights each time."""
    import transformers

    where = folder / name
    if (where / "model.safetensors").is_file():
        return where
    family, keys, more = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**keys)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.rand(tensor.shape) / 4)
    model.save_pretrained(where)
    written = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**written, **more}))
    return where


def reference(where: Path) -> dict:
    """Greedy tokens and their logprobs by transformers' eager code."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    tokens, logprobs = [], []
    for prompt in PROMPTS:
        ids, rows = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            rows.append(float(row.max()))
        tokens.append(ids[len(prompt):])
        logprobs.append(rows)
    return {"tokens": tokens, "logprobs": logprobs}


def generate(where: Path, eager: bool) -> dict:
    """The same by vLLM's engine, all prompts at once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(where), dtype="float32", enforce_eager=eager, max_model_len=64, max_num_seqs=8, block_size=32,
              distributed_executor_backend="uni" if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" else None,
              skip_tokenizer_init=True, worker_extension_cls="kernel_registry.integrations.vllm.Worker")
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    done = [r.outputs[0] for r in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)]
    report = llm.collective_rpc("kernel_registry_report")[0]
    del llm
    cleanup_dist_env_and_memory()
    return {"tokens": [list(d.token_ids) for d in done], "report": report,
            "logprobs": [[next(iter(step.values())).logprob for step in d.logprobs] for d in done]}


def kernel_calls() -> dict[str, dict[str, int]]:
    """Per process: "here" or "another", what vllm_counts.py noted since the last look: "op kernel" -> calls."""
    found = {}
    for file in Path(os.environ["KERNEL_CALLS"]).iterdir():
        calls = found.setdefault("here" if file.name == str(os.getpid()) else "another", {})
        for line in file.read_text().splitlines():
            calls[line] = calls.get(line, 0) + 1
        file.unlink()
    return found


def main(folder: str, mode: str, *names: str) -> None:
    results = {}
    for name in names:
        where = build(Path(folder), name)
        try:
            results[name] = reference(where) if mode == "reference" else generate(where, mode == "eager")
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["calls"] = kernel_calls()
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
