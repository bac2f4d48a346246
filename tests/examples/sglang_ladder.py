"""SGLang 0.5.23's router ladder in our words, and points to compare it on.

`ladder` and `nested` say as plain conditions in their order what `biased_grouped_topk_gpu` (srt/layers/moe/topk.py,
lines 1964-2354) and `moe_fused_gate` decide. They share nothing with examples/sglang_router/registry.yaml but names.
"""

from __future__ import annotations

import itertools
import random
from functools import lru_cache
from pathlib import Path

from kernel_registry import Registry
from kernel_registry.traits.platform import Platform

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sglang_router"
ROUTER, GATE = "sglang.biased_grouped_topk", "sglang.moe_fused_gate"

# ---- the switches ----------------------------------------------------------------------------------------------------

AITER = "SGLANG_USE_AITER"
RADIX4 = "SGLANG_K3_RADIX4_TOPK"
JIT_GROUPED = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK"
LORA = "SGLANG_EXPERIMENTAL_LORA_OPTI"
KIMI = "SGLANG_OPT_USE_JIT_KERNEL_KIMI_GATE"
KIMI_BF16 = "SGLANG_OPT_KIMI_GATE_BF16_INPUT"
TOP22 = "SGLANG_OPT_SM120_MTP_ROUTER_TOP22"  # not in the ladder: read by the nested moe_fused_gate
DEFAULTS = {AITER: False, RADIX4: False, JIT_GROUPED: False, LORA: False, KIMI: False, KIMI_BF16: True, TOP22: False}

# ---- the ladder, in our words ----------------------------------------------------------------------------------------

REFUSED = "AssertionError"


def ladder(t: dict, env: dict) -> str:
    """The leaf that `biased_grouped_topk_gpu` reaches, or REFUSED where it stops itself."""
    vendor = t["accelerator"] if t["accelerator"] != "none" else t["platform"].kind
    experts, groups, kept = t["num_experts"], t["num_expert_group"], t["topk_group"]
    slots, shared = t["topk"], t["num_fused_shared_experts"]
    one_bias = not t["bias_per_token"]

    # lines 1986-2019
    if env[JIT_GROUPED] and one_bias and (vendor == "hip" or (vendor == "cuda" and groups >= 2)):
        return "jit_grouped_gate"

    # 2021-2102: NVIDIA, FlashInfer first, then every grouped call
    if vendor == "cuda" and one_bias:
        routed = slots - shared
        if groups > 1:
            fits = experts // groups <= 32 and (experts // groups) * kept <= 128
        else:
            fits = experts <= 384
        if (t["has_flashinfer"] and t["renormalize"] and fits and bin(experts).count("1") == 1 and routed <= 8
                and kept <= groups and kept * groups >= routed):
            return "flashinfer_deepseek"
        if groups > 1:
            return "triton_grouped"

    # 2104-2150: AMD with AITER; nothing below is reached any more
    if vendor == "hip" and env[AITER]:
        if t["apply_routed_scaling_factor_on_output"]:
            return REFUSED
        k3 = experts == 896 and slots == 16 and groups == 1 and kept == 1
        available = str(t["platform"]) in ("gfx942", "gfx950") and t["jit_builds"]
        if (env[RADIX4] and k3 and available and t["num_tokens"] <= 1024 and t["dtype"] != "float16"
                and t["logits_layout"] != "transposed"):
            return "radix4_hip"
        return "aiter"

    # 2151-2166
    if vendor == "musa":
        if experts // groups <= 32 or (groups == 1 and experts in (160, 256, 384)):
            return "musa_fused_gate"
        return "torch_compiled"

    # 2167-2272: what is left for NVIDIA
    if vendor == "cuda" and groups == 1 and kept == 1:
        if one_bias and (experts == 384 or 512 < experts <= 1024 or (slots > 8 and experts <= 1024)):
            if env[LORA] and env[KIMI] and env[KIMI_BF16]:
                return "kimi_k2_gate"
            if (t["staged_hidden_size"] == 3584 and 1 <= t["num_tokens"] <= 64 and experts == 896 and slots == 16
                    and shared == 0 and t["jit_builds"] and unit_rows_by_4(t, cast=t["dtype"] == "float16")):
                return "route_quant_fused"
            return "triton_single_group"
        if shared == 0 and experts <= 512 and slots <= 32:
            return "triton_small_single_group"

    # 2274-2341
    if vendor == "xpu":
        if groups == 1 and kept == 1 and shared == 0 and experts <= 256 and slots <= 8:
            return "xpu_topk_sigmoid"
        if experts // groups <= 32 and bin(experts).count("1") == 1:
            return "xpu_fused_gate"

    return "torch_compiled"  # 2342-2354


def unit_rows_by_4(t: dict, cast: bool) -> bool:
    """Whether rows are unit-strided and start on a multiple of 4 elements, after a cast when there is one: a cast of
    rows out of a wider tensor packs them, but torch takes a lone row for dense and keeps its stride; a transposed
    tensor stays transposed."""
    if t["logits_layout"] == "transposed":
        return False
    return t["num_experts"] % 4 == 0 if cast and t["num_tokens"] >= 2 else t["logits_layout"] == "aligned_rows"


def nested(leaf: str, t: dict, env: dict) -> str | None:
    """The kernel behind a leaf that calls `moe_fused_gate`; None for the others."""
    if leaf not in ("jit_grouped_gate", "triton_grouped", "triton_single_group", "triton_small_single_group"):
        return None
    shared = t["num_fused_shared_experts"]
    slots = t["topk"]
    if leaf == "jit_grouped_gate" and env[AITER] and t["platform"].kind == "hip":
        slots += shared
    cast = {"triton_grouped": t["dtype"] != "float32", "triton_single_group": t["dtype"] == "float16"}.get(leaf, False)
    dtype = "float32" if cast else t["dtype"]
    if shared or t["num_expert_group"] > 1:
        return "triton_router"
    if (env[TOP22] and str(t["platform"]) == "sm_120" and 2 <= t["num_tokens"] <= 16 and t["num_experts"] == 512
            and slots == 22 and dtype == "float32" and t["logits_layout"] != "transposed"):
        return "sm120_top22"
    if t["num_experts"] == 896 and slots == 16 and dtype != "float16" and unit_rows_by_4(t, cast):
        return "route_radix"
    return "triton_router"


# ---- points ----------------------------------------------------------------------------------------------------------

PLATFORMS = tuple((Platform.parse(name), "none") for name in
                  ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "cpu")) \
    + ((Platform.parse("cpu"), "xpu"), (Platform.parse("cpu"), "musa"))
FLAGS = ("renormalize", "apply_routed_scaling_factor_on_output", "bias_per_token", "has_flashinfer", "jit_builds")
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("aligned_rows", "odd_rows", "transposed")
TOKENS = (0, 1, 2, 3, 16, 17, 64, 65, 1024, 1025)  # both sides of every bound on num_tokens
MODELS = {  # num_experts, num_expert_group, topk_group, topk, num_fused_shared_experts
    "deepseek-v3": (256, 8, 4, 8, 0), "deepseek-v3 fused": (256, 8, 4, 9, 1), "kimi-k2": (384, 1, 1, 8, 0),
    "kimi-k2 fused": (384, 1, 1, 9, 1), "kimi-k3": (896, 1, 1, 16, 0), "minimax-m2": (256, 1, 1, 8, 0),
    "glm-4.5": (160, 1, 1, 8, 0), "glm-4.5 fused": (160, 1, 1, 9, 1), "glm-4.5-air": (128, 1, 1, 8, 0),
    "nemotron": (512, 1, 1, 22, 0), "ernie-4.5": (64, 1, 1, 6, 0), "12 groups": (288, 12, 6, 8, 0),
}
V3, K2, K3, MINIMAX = (MODELS[name] for name in ("deepseek-v3", "kimi-k2", "kimi-k3", "minimax-m2"))


def point(shape, platform=("sm_90", "none"), **traits) -> dict:
    """Canonical traits of one call."""
    experts, groups, kept, slots, shared = shape
    where, accelerator = platform
    given = {"num_tokens": 1, "num_experts": experts, "num_expert_group": groups, "topk_group": kept, "topk": slots,
             "num_fused_shared_experts": shared, "platform": where, "accelerator": accelerator, **traits}
    return space(ROUTER).request(given, lambda: None).traits


@lru_cache(maxsize=None)
def space(op: str):
    return Registry(EXAMPLE / "registry.yaml", plugins=False, environment=False).catalog.op(op).space


def variants(base: dict, **values):
    """Every combination of `values` (name -> tuple) put into `base`."""
    for combination in itertools.product(*values.values()):
        yield {**base, **dict(zip(values, combination))}


def both(*names: str) -> dict:
    return dict.fromkeys(names, (True, False))


def grid(experts, groups, kept, slots, shared):
    legal = itertools.product(experts, groups, kept, slots, shared)
    return [s for s in legal if s[0] % s[1] == 0 and s[3] > s[4]]  # whole groups, and at least one routed slot


EDGES = grid((8, 64, 96, 128, 160, 256, 257, 288, 384, 385, 512, 513, 896, 1024, 1025), (1, 2, 8, 16), (1, 4, 8),
             (1, 2, 8, 9, 16, 22, 32, 33), (0, 1, 2)) + [(256, 1, 1, 9, 8)]


def shape_points():
    """Both sides of every bound on a shape, on every platform, under every flag that a shape can meet."""
    for shape, platform in itertools.product(EDGES, PLATFORMS):
        yield from variants(point(shape, platform), **both("renormalize", "bias_per_token", "has_flashinfer"))


def call_points(shapes, tokens=TOKENS):
    """Everything that is not a shape, on a few shapes: the whole product."""
    for shape, platform in itertools.product(shapes, PLATFORMS):
        yield from variants(point(shape, platform), **both(*FLAGS), dtype=DTYPES, logits_layout=LAYOUTS,
                            staged_hidden_size=(0, 3584, 4096), num_tokens=tokens)


def neighbours():
    """Kimi-K3 and Nemotron 512/22, which have kernels of their own, and shapes that miss one of their conditions."""
    for experts, slots in ((896, 16), (512, 22)):
        shapes = [(experts + e, 1, 1, slots + s, 0) for e, s in itertools.product((-4, 0, 4), (-1, 0, 1))]
        yield from (*shapes, (experts, 1, 1, slots, 1), (experts, 2, 1, slots, 0), (experts, 1, 2, slots, 0))


def neighbour_points():
    for shape, platform in itertools.product(neighbours(), PLATFORMS):
        yield from variants(point(shape, platform), dtype=DTYPES, logits_layout=LAYOUTS, staged_hidden_size=(0, 3584),
                            num_tokens=TOKENS)


def sampled_points(count: int, seed: int):
    """Points drawn from the product of everything."""
    choose = random.Random(seed).choice
    shapes = EDGES + list(MODELS.values()) * 40 + [MODELS["kimi-k3"], MODELS["nemotron"]] * 200
    for _ in range(count):
        yield point(choose(shapes), choose(PLATFORMS), dtype=choose(DTYPES), logits_layout=choose(LAYOUTS),
                    staged_hidden_size=choose((0, 3584, 4096)), num_tokens=choose(TOKENS),
                    **{flag: choose((True, False)) for flag in FLAGS})
