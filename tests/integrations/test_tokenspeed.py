"""tokenspeed-kernel selecting and running the registry's routers. Needs tokenspeed-kernel 0.1.4; not run without it.

The package refuses to be imported without a GPU. Without one its selection and its facades run on a faked H200 and
tensors on the CPU (tokenspeed_parts.py); with one the whole of it does, at the end.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("tokenspeed_kernel") is None:
    pytest.skip("not run: tokenspeed-kernel is not installed here", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import tokenspeed_parts  # noqa: E402
from installed import own_entry_points, pretend_installed  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import OverrideError  # noqa: E402
from kernel_registry.integrations import tokenspeed as adapter  # noqa: E402

faked = pytest.mark.skipif(torch.cuda.is_available(), reason="not run: there is a GPU, where no platform is faked")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a GPU and tokenspeed-kernel's own")
TOKENS = 5


@pytest.fixture(scope="module")
def parts():
    yield tokenspeed_parts.load()
    tokenspeed_parts.unload()


@pytest.fixture
def tokenspeed(parts, monkeypatch):
    """TokenSpeed with its own kernels and ours; tensors on the CPU count as eligible for what is not plain torch."""
    tokenspeed_parts.fake(parts.platform, "nvidia", 9, 0)
    monkeypatch.setattr(parts.sigmoid, "_gluon_eligible", lambda *_: True)
    monkeypatch.setattr(parts.softmax, "_triton_eligible", lambda *_: True)
    adapter.enable()
    yield parts
    for mode in adapter.OPERATORS:
        parts.registry.KernelRegistry.get()._unregister(f"kernel_registry_{mode}")
    adapter._report.clear()


@pytest.fixture
def routed(monkeypatch):
    """How often the adapter called the registry."""
    calls, route = [], adapter._route
    monkeypatch.setattr(adapter, "_route", lambda *a, **k: calls.append(a) or route(*a, **k))
    return calls


def inputs(experts=256, dtype=torch.float32):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(TOKENS, experts, generator=generator).to(dtype)
    return logits, torch.randn(experts, generator=generator) / 8


def same(ours, theirs, experts):
    dense = [torch.zeros(TOKENS, experts).scatter_(1, ids.long(), weights.float()) for weights, ids in (ours, theirs)]
    torch.testing.assert_close(*dense, rtol=1e-6, atol=1e-7)


def selected(parts, mode, dtype=torch.float32, **traits):
    signature = parts.signature.format_signature(router_logits=parts.signature.dense_tensor_format(dtype))
    return parts.selection.select_kernel("moe", mode, signature, traits=traits)


# ---- TokenSpeed's own facades ----------------------------------------------------------------------------------------

@faked
@pytest.mark.parametrize("experts, topk, factor, normalize", [(256, 8, 1.0, True), (384, 8, 2.827, True),
                                                              (896, 16, 2.5, True), (64, 6, 1.5, False)])
def test_the_sigmoid_facade_runs_ours(tokenspeed, routed, experts, topk, factor, normalize):
    logits, bias = inputs(experts)
    call = dict(routed_scaling_factor=factor, normalize_topk_weights=normalize)
    assert selected(tokenspeed, "sigmoid_bias_topk", tokens=TOKENS, experts=experts, topk=topk
                    ).name == "kernel_registry_sigmoid_bias_topk"
    ours = tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, topk, **call)
    assert len(routed) == 1
    same(ours, tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, topk, solution="torch", **call), experts)
    assert len(routed) == 1 and ours[1].dtype is torch.int32


@faked
@pytest.mark.parametrize("experts, topk", [(256, 8), (896, 16)])  # TokenSpeed has a mapped kernel for the second
def test_the_sigmoid_facade_with_expert_placement_runs_ours(tokenspeed, routed, experts, topk):
    logits, bias = inputs(experts)
    placement = torch.randperm(experts, generator=torch.Generator().manual_seed(1)).int()
    call = dict(logical_to_physical_map=placement, weights_dtype=torch.bfloat16)
    ours = tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, topk, **call)
    theirs = tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, topk, solution="torch", **call)
    assert len(routed) == 1 and ours[0].dtype is torch.bfloat16
    assert torch.equal(ours[1].sort(1).values, theirs[1].sort(1).values)
    dense = [torch.zeros(TOKENS, experts).scatter_(1, i.long(), w.float()) for w, i in (ours, theirs)]
    torch.testing.assert_close(*dense, rtol=2 ** -7, atol=0)  # one step of bfloat16


@faked
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_softmax_facade_runs_ours(tokenspeed, routed, renormalize, dtype):
    logits, _ = inputs(128)
    call = dict(topk_indices_dtype=dtype, renormalize=renormalize, routed_scaling_factor=1.5)
    ours = tokenspeed.softmax._moe_softmax_topk(logits, 8, **call)
    assert len(routed) == 1 and ours[1].dtype is dtype
    same(ours, tokenspeed.softmax._moe_softmax_topk(logits, 8, solution="torch", **call), 128)


# ---- operators through select_kernel ---------------------------------------------------------------------------------

@faked
@pytest.mark.parametrize("kind", ["bias", "plain"])
def test_the_sqrt_softplus_operator(tokenspeed, routed, kind):
    logits, bias = inputs()
    kernel = selected(tokenspeed, "topk", tokens=TOKENS, experts=256, top_k=6, renormalize=True, routing_kind=kind,
                      score_function="sqrt_softplus")
    call = (logits, 6, True, bias if kind == "bias" else None, None, None, False)
    ours, theirs = kernel(*call), tokenspeed.native.torch_sqrt_softplus_topk(*call)
    assert kernel.name == "kernel_registry_topk" and len(routed) == 1 and ours[2] is logits
    same(ours[:2], theirs[:2], 256)
    with pytest.raises(NotImplementedError):
        kernel(*call[:-1], True)


@faked
@pytest.mark.parametrize("experts, groups, kept", [(256, 8, 4), (160, 8, 3)])
def test_the_grouped_operator(tokenspeed, routed, experts, groups, kept):
    logits, bias = inputs(experts)
    kernel = selected(tokenspeed, "biased_grouped_topk", tokens=TOKENS, experts=experts, topk=8,
                      num_expert_group=groups, topk_group=kept)
    ours = kernel(router_logits=logits, correction_bias=bias, topk=8, num_expert_group=groups, topk_group=kept,
                  routed_scaling_factor=2.5, normalize_topk_weights=True)
    assert kernel.name == "kernel_registry_biased_grouped_topk" and len(routed) == 1
    same(ours, tokenspeed.minimax._biased_grouped_topk_reference(
        logits, logits, bias, 8, True, groups, kept, routed_scaling_factor=2.5), experts)


# ---- what stays with TokenSpeed --------------------------------------------------------------------------------------

@faked
@pytest.mark.parametrize("mode, traits", [
    ("sigmoid_bias_topk", dict(experts=256, topk=64)),
    ("sigmoid_bias_topk", dict(experts=2048, topk=8)),
    ("softmax_topk", dict(experts=2048, topk=8)),
    ("topk", dict(experts=256, top_k=6, routing_kind="hash", score_function="sqrt_softplus")),
])
def test_sizes_and_kinds_without_a_fast_kernel_stay(tokenspeed, mode, traits):
    assert not selected(tokenspeed, mode, tokens=1, **traits).name.startswith("kernel_registry")


@faked
def test_the_sizes_are_those_for_which_the_registry_says_so(tokenspeed):
    """At the edges: inside, the registry's winner on an H200 is a fast kernel; outside it is the fallback."""
    for mode in ("sigmoid_bias_topk", "softmax_topk"):
        traits = tokenspeed.registry.KernelRegistry.get().get_by_name(f"kernel_registry_{mode}").traits
        assert (min(traits["experts"]), max(traits["experts"]), max(traits["topk"])) == (2, 1024, 32)
        call = {**adapter.OPERATORS[mode].example, "platform": "sm_90"}
        for experts, topk in ((2, 1), (1024, 1), (1024, 32), (64, 32), (1025, 8), (64, 33), (1, 1)):
            winner = registry.explain("moe.topk", **{**call, "num_experts": experts, "topk": topk}).winner
            assert (winner != "torch") is (experts in traits["experts"] and topk in traits["topk"]), (experts, topk)


@faked
def test_a_platform_without_fast_kernels_is_told(parts, caplog):
    tokenspeed_parts.fake(parts.platform, "nvidia", 7, 5)
    with caplog.at_level(logging.WARNING, "kernel_registry"):
        report = adapter.enable()
    assert {row.kind for row in report.declined} == {f"moe.{mode}" for mode in adapter.OPERATORS}
    assert "no fast kernel serves it on sm_75" in caplog.text
    assert not [name for name in parts.registry.KernelRegistry.get()._by_name if name.startswith("kernel_registry")]


# ---- choosing by either registry -------------------------------------------------------------------------------------

@faked
def test_the_registrys_overrides_hold(tokenspeed):
    logits, bias = inputs()
    with registry.override("moe.topk", "triton_unbiased"), pytest.raises(OverrideError):
        tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, 8)
    tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, 8)
    assert any(row.kind == "call" and "scoring=sigmoid" in row.module for row in adapter.report().rows)


@faked
def test_tokenspeeds_overrides_hold(tokenspeed, routed):
    logits, bias = inputs()
    with tokenspeed.selection.kernel_override("moe", "sigmoid_bias_topk", "torch_sigmoid_bias_topk"):
        tokenspeed.sigmoid._moe_sigmoid_bias_topk(logits, bias, 8)
    assert not routed


@faked
def test_installed_it_is_on_by_one_setting(parts, tmp_path, monkeypatch):
    tokenspeed_parts.fake(parts.platform, "nvidia", 9, 0)
    pretend_installed(tmp_path, "kernel-registry", own_entry_points())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(adapter.SETTING, raising=False)
    names = [f"kernel_registry_{mode}" for mode in adapter.OPERATORS]
    (off,) = parts.plugins.discover_plugins(force=True)
    assert (off.name, off.num_kernels) == ("kernel_registry", 0) and "nothing is registered" in str(adapter.report())
    monkeypatch.setenv(adapter.SETTING, "1")
    try:
        (on,) = parts.plugins.discover_plugins(force=True)
        assert sorted(on.kernel_names) == sorted(names)
    finally:
        for name in names:
            parts.registry.KernelRegistry.get()._unregister(name)
        adapter._report.clear()
        parts.plugins.reset_plugins()


# ---- the whole package, on a GPU -------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("experts, topk, score, factor", [(256, 8, "sigmoid", 2.5), (896, 16, "sigmoid", 2.827),
                                                          (128, 8, "softmax", 1.0), (256, 6, "sqrt_softplus", 1.5)])
def test_the_facade_on_a_gpu_runs_ours(routed, experts, topk, score, factor):
    tokenspeed_kernel = pytest.importorskip("tokenspeed_kernel", reason="not run: it can't be imported here")
    from tokenspeed_kernel.registry import KernelRegistry

    logits, bias = (tensor.cuda() for tensor in inputs(experts))
    call = dict(router_logits=logits, top_k=topk, score_function=score, selection_method="topk", renormalize=True,
                routed_scaling_factor=factor, correction_bias=None if score == "softmax" else bias)
    adapter.enable()
    try:
        ours = tokenspeed_kernel.moe_topk(**call)
        assert len(routed) == 1
        theirs = tokenspeed_kernel.moe_topk(**call, solution="torch")
        assert len(routed) == 1
        same([tensor.cpu() for tensor in ours], [tensor.cpu() for tensor in theirs], experts)
        assert "torch" not in {row.kernel for row in adapter.report().rows if row.kind == "call"}
    finally:
        for mode in adapter.OPERATORS:
            KernelRegistry.get()._unregister(f"kernel_registry_{mode}")
        adapter._report.clear()
