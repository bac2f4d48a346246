"""tokenspeed-kernel selecting and running the registry's routers. Needs tokenspeed-kernel 0.1.4 and tokenspeed-triton;
not run without them.

What is called is TokenSpeed's own facade: on a GPU as it is there, without one on a faked H200, with tensors on the
CPU. What of the package comes along is in tokenspeed_parts.py.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("tokenspeed_kernel", "tokenspeed_triton"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"not run: {package} is not installed here", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import tokenspeed_parts  # noqa: E402
from installed import own_entry_points, pretend_installed  # noqa: E402
from kernel_registry import registry  # noqa: E402
from kernel_registry.errors import NoImplementationError, OverrideError, RegistryError  # noqa: E402
from kernel_registry.integrations import tokenspeed as adapter  # noqa: E402

GPU = torch.cuda.is_available()
faked = pytest.mark.skipif(GPU, reason="not run: there is a GPU, where no platform is faked")
on_gpu = pytest.mark.skipif(not GPU, reason="not run: needs a GPU")
DEVICE, TOKENS = "cuda" if GPU else "cpu", 5
RTOL = 4e-6 if GPU else 1e-6  # on a GPU each router is within 2e-6 of the exact weights; another expert is far off


@pytest.fixture(scope="module")
def parts():
    yield tokenspeed_parts.load()
    tokenspeed_parts.unload()


@pytest.fixture
def tokenspeed(parts, monkeypatch):
    """TokenSpeed with its own kernels and ours. Without a GPU on a faked one, with tensors on the CPU, which count as
    eligible for what is not plain torch."""
    if not GPU:
        tokenspeed_parts.fake(parts.platform, "nvidia", 9, 0)
        monkeypatch.setattr(parts.sigmoid, "_gluon_eligible", lambda *_: True)
        monkeypatch.setattr(parts.softmax, "_triton_eligible", lambda *_: True)
    adapter.enable()
    yield parts
    adapter.disable()


@pytest.fixture
def routed(monkeypatch):
    """How often the adapter called the registry."""
    calls, route = [], adapter._route
    monkeypatch.setattr(adapter, "_route", lambda *a, **k: calls.append(a) or route(*a, **k))
    return calls


def inputs(experts=256, dtype=torch.float32):
    generator = torch.Generator().manual_seed(experts)
    logits, bias = torch.randn(TOKENS, experts, generator=generator), torch.randn(experts, generator=generator) / 8
    return logits.to(DEVICE, dtype), bias.to(DEVICE)


def facade(tokenspeed, score, logits, topk, bias=None, *, factor=1.0, renormalize=True, **more):
    """TokenSpeed's moe_topk."""
    return tokenspeed.moe.moe_topk(
        logits, topk, score_function=score, selection_method="topk", renormalize=renormalize,
        routed_scaling_factor=factor, correction_bias=bias, **more)


def dense(weights, ids, experts):
    return torch.zeros(TOKENS, experts, device=DEVICE).scatter_(1, ids.long(), weights.float())


def same(ours, theirs, experts):
    torch.testing.assert_close(dense(*ours, experts), dense(*theirs, experts), rtol=RTOL, atol=1e-7)


def selected(parts, mode, dtype=torch.float32, **traits):
    signature = parts.signature.format_signature(router_logits=parts.signature.dense_tensor_format(dtype))
    return parts.selection.select_kernel("moe", mode, signature, traits=traits)


def of_ours(parts):
    return sorted(name for name in parts.registry.KernelRegistry.get()._by_name if name.startswith("kernel_registry"))


# ---- TokenSpeed's own facade -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("experts, topk, factor, normalize", [(256, 8, 1.0, True), (384, 8, 2.827, True),
                                                              (896, 16, 2.5, True), (64, 6, 1.5, False)])
def test_the_sigmoid_facade_runs_ours(tokenspeed, routed, experts, topk, factor, normalize):
    logits, bias = inputs(experts)
    call = dict(factor=factor, renormalize=normalize)
    assert selected(tokenspeed, "sigmoid_bias_topk", tokens=TOKENS, experts=experts, topk=topk
                    ).name == "kernel_registry_sigmoid_bias_topk"
    ours = facade(tokenspeed, "sigmoid", logits, topk, bias, **call)
    assert len(routed) == 1
    same(ours, facade(tokenspeed, "sigmoid", logits, topk, bias, solution="torch", **call), experts)
    assert len(routed) == 1 and ours[1].dtype is torch.int32


@pytest.mark.parametrize("experts, topk", [(256, 8), (896, 16)])  # TokenSpeed has a mapped kernel for the second
def test_the_sigmoid_facade_with_expert_placement_runs_ours(tokenspeed, routed, experts, topk):
    logits, bias = inputs(experts)
    placement = torch.randperm(experts, generator=torch.Generator().manual_seed(1)).int().to(DEVICE)
    call = dict(logical_to_physical_map=placement, topk_weights_dtype=torch.bfloat16)
    ours = facade(tokenspeed, "sigmoid", logits, topk, bias, **call)
    theirs = facade(tokenspeed, "sigmoid", logits, topk, bias, solution="torch", **call)
    assert len(routed) == 1 and ours[0].dtype is torch.bfloat16
    assert torch.equal(ours[1].sort(1).values, theirs[1].sort(1).values)
    torch.testing.assert_close(dense(*ours, experts), dense(*theirs, experts), rtol=2 ** -7, atol=0)  # a bfloat16 step


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_softmax_facade_runs_ours(tokenspeed, routed, renormalize, dtype):
    logits, _ = inputs(128)
    call = dict(topk_indices_dtype=dtype, renormalize=renormalize, factor=1.5)
    ours = facade(tokenspeed, "softmax", logits, 8, **call)
    assert len(routed) == 1 and ours[1].dtype is dtype
    same(ours, facade(tokenspeed, "softmax", logits, 8, solution="torch", **call), 128)


@pytest.mark.parametrize("biased", [True, False])
def test_the_sqrt_softplus_facade_runs_ours(tokenspeed, routed, biased):
    logits, bias = inputs()
    call = dict(bias=bias if biased else None, factor=1.5)
    ours = facade(tokenspeed, "sqrt_softplus", logits, 6, **call)
    assert len(routed) == 1
    same(ours, facade(tokenspeed, "sqrt_softplus", logits, 6, solution="torch", **call), 256)


@pytest.mark.parametrize("score, mode, size", [("sigmoid", "sigmoid_bias_topk", "topk"),
                                               ("softmax", "softmax_topk", "topk"), ("sqrt_softplus", "topk", "top_k")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ours_goes_before_a_fast_kernel_of_theirs_and_off_theirs_runs(tokenspeed, routed, score, mode, size, dtype):
    logits, bias = inputs(dtype=dtype)
    call = dict(experts=256, tokens=TOKENS, **{size: 6}, **(
        dict(renormalize=True, routing_kind="bias", score_function=score) if mode == "topk" else {}))
    assert selected(tokenspeed, mode, dtype, **call).name == f"kernel_registry_{mode}"
    facade(tokenspeed, score, logits, 6, None if score == "softmax" else bias)
    assert len(routed) == 1
    adapter.disable()
    assert selected(tokenspeed, mode, dtype, **call).name.startswith(("triton_", "gluon_", "cuda_"))
    if GPU:  # theirs has no interpreter
        facade(tokenspeed, score, logits, 6, None if score == "softmax" else bias)
    assert len(routed) == 1 and not of_ours(tokenspeed)


@on_gpu
def test_what_runs_on_a_gpu_are_triton_kernels_on_the_platform_that_is_there(tokenspeed):
    here = tokenspeed.platform.current_platform()
    assert here.device_name == torch.cuda.get_device_name()
    logits, bias = inputs()
    for score in ("sigmoid", "softmax", "sqrt_softplus"):
        facade(tokenspeed, score, logits, 6, None if score == "softmax" else bias)
    ran = [kernel for kernel in registry.kernels if kernel.op == "moe.topk"]
    assert ran and not [kernel for kernel in ran if "triton" not in kernel.name]


@on_gpu
def test_the_facade_in_a_captured_graph(tokenspeed, routed):
    logits, bias = inputs()
    facade(tokenspeed, "sigmoid", logits, 8, bias)  # what it runs is decided before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = facade(tokenspeed, "sigmoid", logits, 8, bias)
    logits.copy_(logits.flip(0))
    graph.replay()
    assert len(routed) == 2
    same(ours, facade(tokenspeed, "sigmoid", logits, 8, bias, solution="torch"), 256)


# ---- operators through select_kernel ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bias", "plain"])
def test_the_sqrt_softplus_operator_gives_no_scores(tokenspeed, routed, kind):
    logits, bias = inputs()
    kernel = selected(tokenspeed, "topk", tokens=TOKENS, experts=256, top_k=6, renormalize=True, routing_kind=kind,
                      score_function="sqrt_softplus")
    call = (logits, 6, True, bias if kind == "bias" else None, None, None)
    ours, theirs = kernel(*call, False), tokenspeed.native.torch_sqrt_softplus_topk(*call, False)
    assert kernel.name == "kernel_registry_topk" and len(routed) == 1 and ours[2] is logits
    same(ours[:2], theirs[:2], 256)
    with pytest.raises(NoImplementationError, match="need_scores=False was expected.*solution='triton'") as error:
        kernel(*call, True)
    assert isinstance(error.value, RegistryError) and len(routed) == 1


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

@pytest.mark.parametrize("mode, traits", [
    ("sigmoid_bias_topk", dict(experts=256, topk=64)),
    ("sigmoid_bias_topk", dict(experts=2048, topk=8)),
    ("softmax_topk", dict(experts=2048, topk=8)),
    ("topk", dict(experts=256, top_k=6, routing_kind="hash", score_function="sqrt_softplus")),
])
def test_sizes_and_kinds_without_a_fast_kernel_stay(tokenspeed, mode, traits):
    assert not selected(tokenspeed, mode, tokens=1, **traits).name.startswith("kernel_registry")


def test_the_sizes_are_those_for_which_the_registry_says_so(tokenspeed):
    """At the edges: inside, the registry's winner on this platform is a fast kernel; outside it is the fallback."""
    for mode in ("sigmoid_bias_topk", "softmax_topk"):
        traits = tokenspeed.registry.KernelRegistry.get().get_by_name(f"kernel_registry_{mode}").traits
        assert (min(traits["experts"]), max(traits["experts"]), max(traits["topk"])) == (2, 1024, 32)
        call = {**adapter.OPERATORS[mode].example, "platform": str(adapter._platform())}
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
    assert not of_ours(parts)
    adapter.disable()


# ---- choosing by either registry -------------------------------------------------------------------------------------

def test_the_registrys_overrides_hold(tokenspeed):
    logits, bias = inputs()
    with registry.override("moe.topk", "triton_unbiased"), pytest.raises(OverrideError):
        facade(tokenspeed, "sigmoid", logits, 8, bias)
    facade(tokenspeed, "sigmoid", logits, 8, bias)
    assert any(row.kind == "call" and "scoring=sigmoid" in row.module for row in adapter.report().rows)


def test_tokenspeeds_overrides_hold(tokenspeed, routed):
    logits, bias = inputs()
    with tokenspeed.selection.kernel_override("moe", "sigmoid_bias_topk", "torch_sigmoid_bias_topk"):
        facade(tokenspeed, "sigmoid", logits, 8, bias)
    assert not routed


def test_installed_it_is_on_by_one_setting(parts, tmp_path, monkeypatch):
    if not GPU:
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
        adapter.disable()
        parts.plugins.reset_plugins()


def test_what_fails_on_the_way_registers_nothing(parts, monkeypatch):
    if not GPU:
        tokenspeed_parts.fake(parts.platform, "nvidia", 9, 0)
    register = parts.registry.KernelRegistry.register

    def refuses_the_third(self, spec, function):
        if len(of_ours(parts)) == 2:
            raise ValueError("a later TokenSpeed's rule")
        register(self, spec, function)
    with monkeypatch.context() as patch:
        patch.setattr(parts.registry.KernelRegistry, "register", refuses_the_third)
        with pytest.raises(ValueError, match="a later"):
            adapter.enable()
    assert not of_ours(parts) and "nothing is registered" in str(adapter.report())


def test_on_twice_is_on_once_and_off_leaves_nothing(tokenspeed):
    once = of_ours(tokenspeed)
    adapter.enable()
    assert of_ours(tokenspeed) == once == sorted(f"kernel_registry_{mode}" for mode in adapter.OPERATORS)
    adapter.disable()
    assert not of_ours(tokenspeed) and "nothing is registered" in str(adapter.report())
    adapter.disable()
