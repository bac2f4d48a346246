"""What the vLLM adapter costs on a CPU: a layer's routing through it, and a decode step of an engine with and without.

    python benchmarks/vllm_adapter.py [--out FILE.json] [--rounds 60] [--tokens 4]

Run in the environment that has vLLM. Prints, and appends to FILE.json as a line:

    direct, eager, compiled   microseconds of a call: the bound kernel itself; vLLM's router with the adapter in it, as
                              an eager model calls it; the torch op, as a compiled model calls it. Once for the kernel
                              that the registry chooses here and once for one that does nothing, where the noise of a
                              kernel does not hide the difference. Each the least of the rounds, which alternate
    added                     eager - direct and compiled - direct with the kernel that does nothing
    step                      milliseconds of a decode step, by KERNEL_REGISTRY_VLLM: off, routing and 1 (routing and
                              experts); engines with a model of 8 MoE layers, eager and compiled, each in a process of
                              its own, the median of 3 times 48 tokens
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CALLS = 300  # of a round
LAYERS, BATCH, STEPS = 8, 4, 48
ROUTER = dict(top_k=8, global_num_experts=64, use_grouped_topk=True, num_expert_group=8, topk_group=4,
              scoring_func="sigmoid", routed_scaling_factor=2.5)
SETTINGS = ("0", "routing", "1")


def seconds(call) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def least(calls: dict, rounds: int) -> dict[str, float]:
    """Microseconds of each: the least of the rounds."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: round(min(values) * 1e6, 2) for name, values in times.items()}


def routing(rounds: int, tokens: int) -> dict:
    from kernel_registry.integrations.vllm import enable, routing
    from vllm.model_executor.layers.fused_moe import layer

    enable("routing")
    bias, logits = torch.zeros(64), torch.randn(tokens, 64)
    router = layer.create_fused_moe_router(**ROUTER, e_score_correction_bias=bias)
    key = router.kernel_registry_call, logits.dtype
    routing.topk(logits, bias, key[0])
    kernel, factor = routing._kernels[key]
    result = kernel(logits, bias, routed_scaling_factor=factor)

    def nothing(router_logits, correction_bias, *, routed_scaling_factor):
        return result

    found = {}
    for name, one in (("registry", kernel), ("nothing", nothing)):
        routing._kernels[key] = one, factor
        op = torch.ops.kernel_registry_vllm.topk.default
        found[name] = {"kernel": getattr(one, "name", name), **least({
            "direct": lambda: one(logits, bias, routed_scaling_factor=factor),
            "eager": lambda: router._compute_routing(None, logits, None),
            "compiled": lambda: op(logits, bias, key[0]),
        }, rounds)}
    empty = found["nothing"]
    found["added"] = {how: round(empty[how] - empty["direct"], 2) for how in ("eager", "compiled")}
    return found


def write_model(folder: str) -> None:
    import transformers

    torch.manual_seed(0)
    transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, n_routed_experts=64, num_experts_per_tok=8,
        n_group=8, topk_group=4, first_k_dense_replace=0, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=None)).save_pretrained(folder)


def engine(folder: str, eager: bool) -> float:
    """Milliseconds of a decode step: what 48 further tokens take."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", enforce_eager=eager, max_model_len=128, max_num_seqs=BATCH, block_size=32,
              skip_tokenizer_init=True, distributed_executor_backend="uni")

    def run(tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [5 + i, 9, 2]} for i in range(BATCH)]
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start
    run(4)
    return statistics.median((run(STEPS + 1) - run(1)) / STEPS * 1e3 for _ in range(3))


def steps() -> dict:
    """By eager or compiled and by setting, each in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/model")
        site = Path(folder, "site", "kernel_registry_bench-0.dist-info")
        site.mkdir(parents=True)  # the entry point, where the package is not installed
        site.joinpath("entry_points.txt").write_text(
            "[vllm.general_plugins]\nkernel_registry = kernel_registry.integrations.vllm:plugin\n")
        site.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: kernel-registry-bench\nVersion: 0\n")
        for how in ("eager", "compiled"):
            for setting in SETTINGS:
                env = {**os.environ, "KERNEL_REGISTRY_VLLM": setting, "VLLM_CPU_KVCACHE_SPACE": "1",
                       "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                       "VLLM_CACHE_ROOT": f"{folder}/cache",
                       "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), str(site.parent)))}
                done = subprocess.run([sys.executable, __file__, "--engine", f"{folder}/model", how], env=env,
                                      capture_output=True, text=True, check=True)
                found.setdefault(how, {})[setting] = float(done.stdout.rpartition("STEP")[2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=BATCH)
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        print("STEP", round(engine(given.engine[0], given.engine[1] == "eager"), 3))
        return
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = routing(given.rounds, given.tokens)
    found |= {"step": steps(), "vllm": importlib.metadata.version("vllm-cpu"), "torch": torch.__version__}
    print(json.dumps(found, indent=1))
    if given.out:
        with open(given.out, "a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
