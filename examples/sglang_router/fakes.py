"""Stand-ins for SGLang's kernels: each target is a factory, as in a real registry, whose kernel returns its name."""

from __future__ import annotations


def _fake(name: str):
    def factory(**_traits):
        def kernel(*_args, **_kwargs):
            return name
        return kernel
    factory.__name__ = factory.__qualname__ = name
    return factory


jit_grouped_gate = _fake("jit_grouped_gate")
flashinfer_deepseek = _fake("flashinfer_deepseek")
triton_grouped = _fake("triton_grouped")
radix4_hip = _fake("radix4_hip")
aiter = _fake("aiter")
musa_fused_gate = _fake("musa_fused_gate")
kimi_k2_gate = _fake("kimi_k2_gate")
route_quant_fused = _fake("route_quant_fused")
triton_single_group = _fake("triton_single_group")
triton_small_single_group = _fake("triton_small_single_group")
xpu_topk_sigmoid = _fake("xpu_topk_sigmoid")
xpu_fused_gate = _fake("xpu_fused_gate")
torch_compiled = _fake("torch_compiled")

sm120_top22 = _fake("sm120_top22")
route_radix = _fake("route_radix")
triton_router = _fake("triton_router")
