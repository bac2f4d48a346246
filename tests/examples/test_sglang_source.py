"""The account in sglang_ladder.py against SGLang's own functions, run on tensors without storage.

Needs torch, and SGLANG_SOURCE: the folder `sglang` of an unpacked sglang 0.5.23 wheel, which need not be installable
here. The functions that decide are cut out of their files and run as they stand; everything that they call is a stub
that writes its name down, and everything that they ask of the machine is answered from the point's traits.
"""

from __future__ import annotations

import ast
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from sglang_ladder import (AITER, DEFAULTS, JIT_GROUPED, K2, K3, KIMI, KIMI_BF16, LORA, MODELS, PLATFORMS, RADIX4,
                           REFUSED, TOP22, both, ladder, nested, point, sampled_points, variants)

SOURCE = os.environ.get("SGLANG_SOURCE", "")
pytestmark = pytest.mark.skipif(not SOURCE, reason="SGLANG_SOURCE names no unpacked sglang 0.5.23")

# Which leaf a call of moe_fused_gate comes from, by its line.
GATE_CALLERS = ((1986, 2020, "jit_grouped_gate"), (2079, 2103, "triton_grouped"), (2216, 2250, "triton_single_group"),
                (2251, 2273, "triton_small_single_group"))


def cut(file: str, *names: str) -> dict:
    """The functions `names` of a source file, without decorators, with its upper-case constants, in a namespace."""
    path = Path(SOURCE) / file
    tree = ast.parse(path.read_text())
    kept = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            kept.append(node)
        elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() for t in node.targets) \
                and isinstance(node.value, (ast.Constant, ast.Dict)):
            kept.append(node)
    assert {node.name for node in kept if isinstance(node, ast.FunctionDef)} == set(names), file
    for node in ast.walk(tree):  # no tensor here is on a GPU: `x.is_cuda` becomes true, as it is where this code runs
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, field, [_on_gpu(v) for v in value])
            elif isinstance(value, ast.AST):
                setattr(node, field, _on_gpu(value))
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *kept], []))
    space: dict = {}
    exec(compile(module, str(path), "exec"), space)
    return space


def _on_gpu(node):
    return ast.Constant(True) if isinstance(node, ast.Attribute) and node.attr == "is_cuda" else node


class Source:
    """SGLang's ladder and gate for one state of the environment."""

    def __init__(self, env: dict, monkeypatch):
        import torch
        import torch.nn.functional as F

        self.torch, self.env, self.calls, self.t = torch, env, [], None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: self.t["platform"].arch[:2])
        switch = lambda name: SimpleNamespace(get=lambda: env[name])  # noqa: E731
        envs = SimpleNamespace(**{name: switch(name) for name in (RADIX4, JIT_GROUPED, LORA, TOP22)})
        for name in (KIMI, KIMI_BF16):
            monkeypatch.setenv(name, str(int(env[name])))
        radix = SimpleNamespace(**cut("kernels/ops/moe/moe_route_radix.py", "covered") | {"torch": torch},
                                route_radix=self.stub("route_radix"))
        radix.covered.__globals__["torch"] = torch
        radix4 = SimpleNamespace(
            **cut("kernels/ops/moe/moe_route_radix4.py", "covered"), route_radix4=self.stub("radix4_hip"),
            available=lambda: self.t["jit_builds"] and str(self.t["platform"]) in ("gfx942", "gfx950"))
        radix4.covered.__globals__["torch"] = torch
        fused = SimpleNamespace(**cut("kernels/ops/moe/moe_route_quant_fused.py", "covered"),
                                available=lambda: self.t["jit_builds"],
                                route_quant_fused=lambda *a, **k: (*self.stub("route_quant_fused")(), None, None, None))
        fused.covered.__globals__.update(torch=torch, moe_route_radix=radix)
        self.handoff = cut("srt/layers/moe/route_quant_handoff.py", "try_route_quant_fused")
        self.handoff.update(_handoff=SimpleNamespace())
        self.gate = cut("kernels/ops/moe/moe_fused_gate.py", "moe_fused_gate")
        launch = type("Launch", (), {"__getitem__": lambda _, grid: self.stub("triton_router")})()
        self.gate.update(torch=torch, moe_route_radix=radix, _topk_gate_small_m=self.stub("sm120_top22"),
                         _router_triton_kernel=launch, is_arch_support_pdl=lambda: False,
                         _dummy_i32=lambda device: None,
                         _SCORING_FUNC_MAP={"sigmoid": 0, "sqrtsoftplus": 1, "softmax": 2},
                         triton=SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
                                                cdiv=lambda a, b: -(-a // b)))
        lora = ModuleType("environ")
        self.modules(monkeypatch, {"sglang.srt.environ": {"envs": envs}})
        exec((Path(SOURCE) / "srt/lora/trtllm_lora_temp/environ.py").read_text(), lora.__dict__)
        self.modules(monkeypatch, {
            "sglang.kernels.ops.moe": {"moe_route_radix4": radix4, "moe_route_quant_fused": fused},
            "sglang.kernels.ops.moe.moe_fused_gate": {"moe_fused_gate": self.moe_fused_gate},
            "sglang.srt.lora.trtllm_lora_temp.environ": {"lora_envs": lora.lora_envs},
            "sglang.kernels.ops.lora.moe.trtllm_lora_temp.kimi_k2_moe_fused_gate":
                {"kimi_k2_moe_fused_gate": self.stub("kimi_k2_gate")},
            "sglang.srt.layers.moe": {"route_quant_handoff": SimpleNamespace(**self.handoff)},
            "sgl_kernel": {"moe_fused_gate": self.stub("xpu_fused_gate")}})
        self.router = cut("srt/layers/moe/topk.py", "biased_grouped_topk_gpu", "is_power_of_two")
        self.router.update(torch=torch, F=F, math=math, envs=envs, _SGLANG_EXPERIMENTAL_LORA_OPTI=env[LORA],
                           moe_fused_gate=self.stub("musa_fused_gate"), topk_sigmoid=self.stub("xpu_topk_sigmoid"),
                           biased_grouped_topk_impl=self.stub("torch_compiled"),
                           aiter_biased_grouped_topk=self.stub("aiter"), fused_shared_expert_weight=lambda **_: 1.0)

    def stub(self, name: str):
        def called(*_args, **_kwargs):
            self.calls.append(name)
            return None, None
        return called

    @staticmethod
    def modules(monkeypatch, contents: dict) -> None:
        for name, attributes in contents.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                if path not in sys.modules:
                    monkeypatch.setitem(sys.modules, path, ModuleType(path))
                    sys.modules[path].__path__ = []
            for attribute, value in attributes.items():
                setattr(sys.modules[name], attribute, value)

    def moe_fused_gate(self, *args, **kwargs):
        line = sys._getframe(1).f_lineno
        leaf, = (leaf for first, last, leaf in GATE_CALLERS if first <= line <= last)
        self.calls.append(leaf)
        before = len(self.calls)
        try:
            self.gate["moe_fused_gate"](*args, **kwargs)
        except AssertionError:  # the gate refuses its arguments before it chooses; the leaf was chosen all the same
            pass
        if len(self.calls) == before:  # an empty batch, or refused
            self.calls.append("triton_router")
        return None, None

    def __call__(self, t: dict) -> tuple[str, str | None]:
        torch, tokens, experts = self.torch, t["num_tokens"], t["num_experts"]
        self.t, self.calls[:] = t, []
        vendor = t["accelerator"] if t["accelerator"] != "none" else t["platform"].kind
        self.router.update({f"_is_{name}": vendor == name for name in ("cuda", "hip", "xpu", "musa")},
                           _use_aiter=self.env[AITER] and vendor == "hip",
                           fused_topk_deepseek=self.stub("flashinfer_deepseek") if t["has_flashinfer"] else None)
        row = -(-experts // 4) * 4
        strides = {"aligned_rows": (row, 1), "odd_rows": (row + 1, 1),
                   "transposed": (1, max(tokens, 2))}[t["logits_layout"]]
        logits = torch.empty_strided((tokens, experts), strides, dtype=getattr(torch, t["dtype"]), device="meta")
        bias = torch.empty((tokens, experts) if t["bias_per_token"] else (experts,), device="meta")
        hidden = t["staged_hidden_size"]
        staged = torch.empty((tokens, hidden), dtype=torch.bfloat16, device="meta") if hidden else None
        self.handoff["_handoff"].request_x = staged
        try:
            self.router["biased_grouped_topk_gpu"](
                hidden_states=logits, gating_output=logits, correction_bias=bias, topk=t["topk"],
                renormalize=t["renormalize"], num_expert_group=t["num_expert_group"],
                topk_group=t["topk_group"], num_fused_shared_experts=t["num_fused_shared_experts"],
                routed_scaling_factor=2.5,
                apply_routed_scaling_factor_on_output=t["apply_routed_scaling_factor_on_output"])
        except AssertionError:
            return REFUSED, None
        if not self.calls:
            return "xpu_topk_sigmoid", None  # an empty batch: returned without a launch
        return (*self.calls, None)[:2]


def cases():
    """Points of all kinds, and around Kimi-K3 and Nemotron every combination."""
    yield from sampled_points(6000, seed=3)
    for shape in (K3, K2, MODELS["nemotron"]):
        for platform in PLATFORMS:
            yield from variants(point(shape, platform), **both("jit_builds"), dtype=("float32", "bfloat16", "float16"),
                                logits_layout=("aligned_rows", "odd_rows", "transposed"), staged_hidden_size=(0, 3584),
                                num_tokens=(0, 2, 17, 65, 1025))


STATES = [{}, {AITER: True}, {AITER: True, RADIX4: True}, {RADIX4: True}, {JIT_GROUPED: True}, {LORA: True},
          {KIMI: True}, {LORA: True, KIMI: True}, {LORA: True, KIMI: True, KIMI_BF16: False}, {TOP22: True},
          {AITER: True, RADIX4: True, JIT_GROUPED: True, LORA: True, KIMI: True, TOP22: True}]


@pytest.mark.parametrize("state", STATES, ids=lambda state: "+".join(state) or "defaults")
def test_the_transcription_is_what_the_source_does(state, monkeypatch):
    pytest.importorskip("torch")
    env = {**DEFAULTS, **state}
    source = Source(env, monkeypatch)
    for traits in cases():
        leaf = ladder(traits, env)
        assert source(traits) == (leaf, nested(leaf, traits, env)), {k: str(v) for k, v in traits.items()}
