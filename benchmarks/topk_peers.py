"""The routing kernels that people use today, as calls that benchmarks/topk.py can time.

DIR holds them, taken from their published wheels; one that is absent there is left out of the rows:
    dsv3_fused_routing.so   FlashInfer's fused_topk_deepseek, built from the wheel's sources (needs tvm_ffi). FlashInfer
                            has no other router for Hopper: its softmax and sqrtsoftplus ones are for later GPUs
    sglang/                 the sglang.kernels package: moe_fused_gate, which SGLang's select_experts calls for every
                            ungrouped shape here; and the CUDA kernels topk_softmax and topk_sigmoid that it replaced
    vllm_moe_C.so.xz        vllm/_moe_C_stable_libtorch.abi3.so, compressed: grouped_topk, topk_softmax, topk_sigmoid
                            and topk_softplus_sqrt
    vllm/                   its dsv4_topk.py, which it takes for DeepSeek-V4's float32 logits
    tokenspeed_kernel/      minimax_topk.py, softmax_topk.py, sqrt_softplus_topk.py and the routing.so of its wheel
    triton_kernels/         the package that vLLM and SGLang route gpt-oss with. It returns int16 ids and weights in the
                            dtype of the logits, and writes the bit matrix that its grouped GEMM wants besides
    versions.json           {"sglang": "0.5.23", ...}: copied into every row

Where a peer takes outputs it gets ready ones: no allocation is counted against it that it does not make itself.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from pathlib import Path

import torch


def versions(folder: str) -> dict[str, str]:
    """What the folder says it holds; nothing where it says nothing."""
    path = Path(folder, "versions.json")
    return json.loads(path.read_text()) if path.exists() else {}


def brief(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:100]


def scored(x, bias, c):
    """(scores, what the experts are chosen by) in the dtype of x: the definition, in torch."""
    if c["scoring"] == "softmax":
        scores, choice = x.softmax(-1), x  # softmax keeps the order of the logits
    else:
        scores = x.sigmoid() if c["scoring"] == "sigmoid" else torch.nn.functional.softplus(x).sqrt()
        choice = scores
    if bias is not None:
        choice = choice + bias.to(x.dtype)
    if c["G"] > 1:
        group = choice.view(len(x), c["G"], -1).topk(2, -1)[0].sum(-1)
        keep = torch.zeros_like(group).scatter_(1, group.topk(c["TG"], -1)[1], 1).bool()
        choice = choice.masked_fill(~keep.repeat_interleave(c["E"] // c["G"], 1), float("-inf"))
    return scores, choice


def _torch(c):
    """The last resort, as model code spells it: one launch per step."""
    def call(x, bias, w, i):
        if c["scoring"] == "softmax" and bias is None:  # renormalised softmax is the softmax of the chosen logits
            values, ids = x.float().topk(c["K"], -1)
            return values.softmax(-1) * c["scale"], ids
        scores, choice = scored(x.float(), bias, c)
        ids = choice.topk(c["K"], -1)[1]
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * c["scale"], ids
    return call


def _flashinfer(c, folder, pdl):
    import tvm_ffi
    module = tvm_ffi.load_module(str(folder / "dsv3_fused_routing.so"))

    def call(x, bias, w, i):
        out = w if x.dtype == torch.float32 else w.to(x.dtype)  # its contract: weights and bias in the logits' dtype
        module.NoAuxTc(x, bias.to(x.dtype), c["G"], c["TG"], c["K"], c["scale"], out, i, pdl, None)
        return out, i
    return call


def _sglang(c):
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate
    return lambda x, bias, w, i: moe_fused_gate(
        x, bias, c["K"], scoring_func=c["scoring"], renormalize=True, routed_scaling_factor=c["scale"],
        apply_routed_scaling_factor_on_output=True, num_expert_group=c["G"], topk_group=c["TG"])


def _sglang_cuda(c):
    if c["scoring"] == "softmax":
        from sglang.kernels.ops.moe.moe_topk_softmax import topk_softmax

        def call(x, bias, w, i):
            topk_softmax(w, i, x, True, 0.0, bias)
            return w, i
    else:
        from sglang.kernels.ops.moe.moe_topk_sigmoid import topk_sigmoid

        def call(x, bias, w, i):
            topk_sigmoid(w, i, x, True, bias, c["scale"])
            return w, i
    return call


def _vllm(c, folder, op):
    packed = folder / "vllm_moe_C.so.xz"
    library = Path(tempfile.gettempdir(), f"vllm_moe_C_{packed.stat().st_size}.so")
    if not library.exists():
        library.write_bytes(lzma.decompress(packed.read_bytes()))
    torch.ops.load_library(str(library))
    kernel = getattr(torch.ops._moe_C, op)
    if op == "grouped_topk":
        return lambda x, bias, w, i: kernel(x, c["G"], c["TG"], c["K"], True, c["scale"], bias, 1)
    tail = {"topk_softmax": lambda bias: (bias, None),
            "topk_sigmoid": lambda bias: (bias, c["scale"], None),
            "topk_softplus_sqrt": lambda bias: (c["scale"], bias, None, None, None)}[op]

    def call(x, bias, w, i):
        kernel(w, i, torch.empty_like(i), x, True, *tail(bias))  # the third is a buffer that vLLM makes per call, too
        return w, i
    return call


def _vllm_triton(c):
    from vllm.dsv4_topk import can_use_dsv4_topk, dsv4_topk

    def call(x, bias, w, i):
        if not can_use_dsv4_topk(x, bias, c["K"], True, torch.int32):
            raise ValueError("serves float32 logits only")
        return dsv4_topk(x, bias, torch.int32, c["scale"])
    return call


def _tokenspeed(c):
    from tokenspeed_kernel.minimax_topk import minimax_biased_grouped_topk
    return lambda x, bias, w, i: minimax_biased_grouped_topk(
        x, x, bias, topk=c["K"], renormalize=True, num_expert_group=1, topk_group=1, routed_scaling_factor=c["scale"])


def _tokenspeed_softmax(c, pdl):
    from tokenspeed_kernel.softmax_topk import triton_softmax_topk
    return lambda x, bias, w, i: triton_softmax_topk(
        router_logits=x, topk=c["K"], topk_indices_dtype=torch.int32, renormalize=True,
        routed_scaling_factor=c["scale"], enable_pdl=pdl)


def _tokenspeed_sqrtsoftplus(c, folder):
    import tvm_ffi
    kernel = tvm_ffi.load_module(str(folder / "tokenspeed_kernel" / "routing.so")).softplus_sqrt_topk_flash

    def call(x, bias, w, i):
        kernel(x.float(), bias, i, w, True, c["scale"])  # it takes float32 logits; its caller casts
        return w, i
    return call


def _tokenspeed_sqrtsoftplus_triton(c):
    from tokenspeed_kernel.sqrt_softplus_topk import triton_sqrt_softplus_topk

    def call(x, bias, w, i):
        weights, ids, _ = triton_sqrt_softplus_topk(x, c["K"], True, bias, None, None, False)
        return weights if c["scale"] == 1.0 else weights * c["scale"], ids  # it has no scale; its caller multiplies
    return call


def _triton_kernels(c):
    from triton_kernels.topk import topk
    return lambda x, bias, w, i: topk(x, c["K"], apply_softmax=True)[:2]


def builders(c, folder: Path) -> dict:
    """name -> what makes its call, for every peer that serves such a shape."""
    found = {"torch": lambda: _torch(c), "sglang": lambda: _sglang(c)}
    if c["scoring"] == "sigmoid":
        found |= {"flashinfer": lambda: _flashinfer(c, folder, False),
                  "flashinfer_pdl": lambda: _flashinfer(c, folder, True),
                  "vllm": lambda: _vllm(c, folder, "grouped_topk")}
        if c["G"] == 1:
            found |= {"vllm_sigmoid": lambda: _vllm(c, folder, "topk_sigmoid"),
                      "sglang_cuda": lambda: _sglang_cuda(c), "tokenspeed": lambda: _tokenspeed(c)}
    elif c["scoring"] == "softmax":
        found |= {"sglang_cuda": lambda: _sglang_cuda(c), "vllm": lambda: _vllm(c, folder, "topk_softmax"),
                  "tokenspeed": lambda: _tokenspeed_softmax(c, False),
                  "tokenspeed_pdl": lambda: _tokenspeed_softmax(c, True)}
        if c["K"] & (c["K"] - 1) == 0:  # its top-k is a power of two
            found["triton_kernels"] = lambda: _triton_kernels(c)
    else:
        found |= {"vllm": lambda: _vllm(c, folder, "topk_softplus_sqrt"), "vllm_triton": lambda: _vllm_triton(c),
                  "tokenspeed": lambda: _tokenspeed_sqrtsoftplus(c, folder),
                  "tokenspeed_triton": lambda: _tokenspeed_sqrtsoftplus_triton(c)}
    return found


def peers(c, folder: str, skip=()) -> dict:
    """name -> call(x, bias, w, i) -> (weights, ids) for every peer that serves such a shape and loads."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = {}
    for name, build in builders(c, Path(folder)).items():
        if name in skip:
            continue
        try:
            found[name] = build()
        except Exception as error:  # a peer that is absent here is a time that is absent
            print(f"# {name} absent: {brief(error)}")
    return found
