"""The registry in vLLM: real engines with tiny models, and the seams one by one.

Runs where vLLM is installed, in the environment that it is in; elsewhere everything here is reported as not run. An
engine takes its time to start, so each run below serves several tests, and several models where it can.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("not run: vLLM is not installed in this environment", allow_module_level=True)

import tomllib

from vllm_engine import MOE_LAYERS, NEW_TOKENS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MODELS = tuple(MOE_LAYERS)
STOCK = tuple(name for name in MODELS if name != "minimax_m2")  # vLLM on a CPU refuses MiniMax-M2's routing
TOLERANCE = 1e-4  # of logprobs near -3 in float32; another expert or another weight moves them by 1e-2 and more


# ---- engines, each in a process of its own ---------------------------------------------------------------------------

class Engines:
    """Runs vllm_engine.py, each job once. All jobs share models and vLLM's cache of compiled models."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, {}
        (folder / "site" / "kernel_registry_tests-0.dist-info").mkdir(parents=True)
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        points = {**declared["vllm.general_plugins"], "zz_counts": "vllm_counts:plugin"}
        lines = ["[vllm.general_plugins]", *(f"{name} = {value}" for name, value in points.items())]
        where = folder / "site" / "kernel_registry_tests-0.dist-info"
        (where / "entry_points.txt").write_text("\n".join(lines))
        (where / "METADATA").write_text("Metadata-Version: 2.1\nName: kernel-registry-tests\nVersion: 0\n")

    def __call__(self, mode: str, *names: str, setting: str = "", processes: bool = False, **environment: str):
        """The results of a job, and what it logged."""
        key = (mode, names, setting, processes, *environment.items())
        if key not in self.done:
            self.done[key] = self._run(mode, names, setting, processes, environment)
        return self.done[key]

    def _run(self, mode, names, setting, processes, environment):
        calls = self.folder / f"calls_{len(self.done)}"
        calls.mkdir()
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNEL_REGISTRY_VLLM")}
        env |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, self.folder / "site"))),
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                "VLLM_MLA_DISABLE": "1", "VLLM_CACHE_ROOT": str(self.folder / "cache"), "KERNEL_CALLS": str(calls),
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)), "KERNEL_REGISTRY_VLLM": setting, **environment}
        done = subprocess.run([sys.executable, HERE / "vllm_engine.py", self.folder / "models", mode, *names], env=env,
                              capture_output=True, text=True, timeout=900, cwd=self.folder)
        log = done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert done.returncode == 0 and lines, log[-4000:]
        return json.loads(lines[0].removeprefix("RESULT ")), log


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return Engines(tmp_path_factory.mktemp("vllm"))


def assert_same(result: dict, wanted: dict) -> None:
    assert result.get("error") is None and wanted.get("error") is None
    assert result["tokens"] == wanted["tokens"]
    for row, other in zip(result["logprobs"], wanted["logprobs"], strict=True):
        assert row == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize("name", STOCK)
def test_an_eager_engine_gives_its_own_tokens(engines, name):
    stock, on = (engines("eager", *MODELS, setting=setting)[0][name] for setting in ("", "1"))
    assert_same(on, stock)
    assert stock["calls"] == {}  # without the setting nothing of the registry runs
    assert "moe.topk" not in stock["report"]


def test_minimax_m2_runs_where_stock_vllm_refuses_its_routing(engines):
    stock, on = (engines("eager", *MODELS, setting=setting)[0]["minimax_m2"] for setting in ("", "1"))
    assert stock["error"].startswith("AssertionError")
    assert_same(on, engines("reference", "minimax_m2")[0]["minimax_m2"])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_step_ran_the_registrys_kernels(engines, name):
    on = engines("eager", *MODELS, setting="1")[0][name]
    expected = MOE_LAYERS[name] * NEW_TOKENS
    assert on["calls"] == {"here": {"moe.topk torch": expected, "moe.experts torch": expected}}


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_engine_gives_its_own_tokens(engines, name):
    stock = engines("compiled", *STOCK)[0]  # first, so that its compiled models lie in the cache
    on = engines("compiled", *MODELS, setting="1")[0][name]
    assert_same(on, stock[name] if name in STOCK else engines("reference", "minimax_m2")[0][name])
    calls = on["calls"]["here"]
    assert calls["moe.topk torch"] == calls["moe.experts torch"] >= MOE_LAYERS[name] * NEW_TOKENS
    assert calls["moe.topk torch"] % MOE_LAYERS[name] == 0


def test_the_worker_process_is_switched_on_and_what_is_declined_stays_with_vllm_and_is_told(engines, tmp_path):
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text("version: 1\noverrides: [{op: moe.experts, disable: torch, reason: a test}]\n")
    results, log = engines("eager", "qwen3_moe", setting="1", processes=True, KERNEL_REGISTRY_OVERRIDES=str(overrides))
    on = results["qwen3_moe"]
    assert_same(on, engines("eager", *MODELS)[0]["qwen3_moe"])
    (where, calls), = on["calls"].items()
    assert where == "another" and set(calls) == {"moe.topk torch"}
    steps, rest = divmod(calls["moe.topk torch"], MOE_LAYERS["qwen3_moe"])
    assert not rest and steps >= NEW_TOKENS  # prompts need not all arrive before the first step
    told = [line for line in log.splitlines() if "UnquantizedFusedMoEMethod stays with vLLM" in line]
    assert len(told) == 1 and "WARNING" in told[0] and "disable torch" in told[0]
    assert "moe.experts -> stays with the runtime" in on["report"] and "moe.topk -> torch" in on["report"]


# ---- the switch ------------------------------------------------------------------------------------------------------

@pytest.fixture
def adapter(monkeypatch):
    """The package, off before and after, with nothing remembered."""
    from kernel_registry.integrations import vllm
    from kernel_registry.integrations.vllm import choosing

    assert not vllm._undo
    monkeypatch.setattr(choosing, "_told", set())
    choosing.asked.clear()
    yield vllm
    vllm.disable()
    choosing.asked.clear()


def seams():
    from vllm import envs
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe import layer

    return layer.create_fused_moe_router, dict(op_registry_oot), set(envs.environment_variables)


@pytest.mark.parametrize("setting, changes", [("", ()), ("0", ()), ("routing", (0, 2)), ("experts", (1, 2)),
                                              ("1", (0, 1, 2))])
def test_the_setting_says_which_seams_are_taken_and_off_gives_them_back(adapter, monkeypatch, setting, changes):
    before = seams()
    monkeypatch.setenv(adapter.SETTING, setting)
    adapter.plugin()
    once = seams()
    assert tuple(i for i in range(3) if once[i] != before[i]) == changes
    adapter.plugin()  # vLLM may call it again in a process
    assert seams() == once
    adapter.disable()
    assert seams() == before


def test_a_setting_that_means_nothing_is_an_error(adapter, monkeypatch):
    monkeypatch.setenv(adapter.SETTING, "yes")
    with pytest.raises(ValueError, match="KERNEL_REGISTRY_VLLM='yes', expected one of 1, routing, experts, 0"):
        adapter.plugin()
    with pytest.raises(ValueError, match="'router' is no part of it"):
        adapter.enable("router")


def test_the_package_declares_the_plugin():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = points["kernel_registry"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_a_model_compiled_without_the_plugin_is_not_found_with_it(adapter):
    from vllm import envs

    off = envs.compile_factors()
    adapter.enable()
    make()
    served = envs.compile_factors()
    make(custom_routing_function=max)
    assert off != served != envs.compile_factors() != off
    adapter.disable()
    assert envs.compile_factors() == off


def test_another_plugins_experts_are_left_in_their_place(adapter):
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class Other(UnquantizedFusedMoEMethod):
        pass
    UnquantizedFusedMoEMethod.register_oot(Other)
    try:
        adapter.enable("experts")
        assert op_registry_oot["UnquantizedFusedMoEMethod"] is Other
        assert "Other of another plugin has its place" in str(adapter.report())
        adapter.disable()
        assert op_registry_oot["UnquantizedFusedMoEMethod"] is Other
    finally:
        del op_registry_oot["UnquantizedFusedMoEMethod"]


# ---- routing ---------------------------------------------------------------------------------------------------------

TOKENS, EXPERTS, TOPK = 6, 16, 4


def bias():
    import torch

    return torch.linspace(0, 0.5, EXPERTS)


def logits():
    import torch

    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))


def make(**more):
    """A router from the factory that vLLM's layers call."""
    from vllm.model_executor.layers.fused_moe import layer

    return layer.create_fused_moe_router(top_k=TOPK, global_num_experts=EXPERTS, **more)


def dense(weights, ids):
    """Weights by expert: what is left when order is no matter."""
    import torch

    return torch.zeros(TOKENS, EXPERTS).scatter_(1, ids.long(), weights)


GROUPED = dict(use_grouped_topk=True, num_expert_group=4, topk_group=2)
ROUTINGS = {
    "softmax": {},
    "softmax, as it is": dict(renormalize=False),
    "a factor that vLLM applies elsewhere": dict(routed_scaling_factor=2.5),
    "softmax in groups": dict(GROUPED, renormalize=False, routed_scaling_factor=2.5),
    "sigmoid in groups": dict(GROUPED, scoring_func="sigmoid", bias=True, routed_scaling_factor=2.5),
    "one group": dict(use_grouped_topk=True, num_expert_group=1, topk_group=1, scoring_func="sigmoid", bias=True),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_registrys_routing_is_that_of_vllms_own_router(adapter, name):
    import torch

    more = dict(ROUTINGS[name])
    if more.pop("bias", False):
        more["e_score_correction_bias"] = bias()
    own = make(**more).select_experts(None, logits())
    adapter.enable("routing")
    router = make(**more)
    weights, ids = router.select_experts(None, logits(), torch.int64)
    assert type(router).__name__ == "KernelRegistryCPURouter" and isinstance(router, type(router).__mro__[1])
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.allclose(dense(weights, ids), dense(*own), rtol=1e-5, atol=1e-7)
    assert [row.kernel is not None for row in adapter.report().rows] == [True]


@pytest.mark.parametrize("more, reason", [
    (dict(custom_routing_function=max), "custom_routing_function is given"),
    (dict(zero_expert_type="identity", num_logical_experts=12, bias=True), "routes otherwise than by the scores"),
    (dict(hash_indices_table="table"), "hash_indices_table is given"),
    (dict(bias_vl="bias", bias=True, scoring_func="sigmoid"), "bias_vl is given"),
    (dict(num_fused_shared_experts=1), "num_fused_shared_experts is given"),
    (dict(scoring_func="sqrtsoftplus", bias=True), "scoring_func is sqrtsoftplus"),
    (dict(use_grouped_topk=True, num_expert_group=5, topk_group=1), "16 experts make no 5 groups"),
    (dict(use_grouped_topk=True, num_expert_group=16, topk_group=16), "16 experts make no 16 groups"),
])
def test_what_is_declined_gets_vllms_own_router_and_one_line(adapter, caplog, monkeypatch, more, reason):
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    more = {key: bias() if key in ("bias", "bias_vl") else value for key, value in more.items()}
    more = {"e_score_correction_bias" if key == "bias" else key: value for key, value in more.items()}
    adapter.enable("routing")
    routers = [make(**more), make(**more)]
    assert not any(type(router).__name__.startswith("KernelRegistry") for router in routers)
    rows = adapter.report().rows
    assert len(rows) == 2 and all(row.kernel is None and reason in row.why for row in rows)
    lines = [record.message for record in caplog.records if "stays with vLLM" in record.message]
    assert len(lines) == 1 and reason in lines[0]


def test_an_argument_of_a_later_vllm_is_declined_where_it_is_used(adapter):
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    def later(top_k, global_num_experts, scale_of_the_moon=1.0, use_grouped_topk=False, num_expert_group=None,
              topk_group=None, renormalize=True, scoring_func="softmax", routed_scaling_factor=1.0,
              e_score_correction_bias=None, num_logical_experts=None):
        return create_fused_moe_router(top_k, global_num_experts)
    assert type(routed(later, TOPK, EXPERTS)).__name__ == "KernelRegistryCPURouter"
    assert type(routed(later, TOPK, EXPERTS, 2.0)).__name__ == "CPURouter"
    assert "scale_of_the_moon is given" in adapter.report().declined[0].why


def test_batch_invariance_is_declined(adapter, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    adapter.enable("routing")
    assert type(make()).__name__ == "CPURouter"


def grouped_router(**more):
    """vLLM's router of GPUs, made here: its factory would look at the platform."""
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router, router_factory

    @functools.wraps(router_factory.create_fused_moe_router)
    def factory(*, use_grouped_topk, **arguments):
        return grouped_topk_router.GroupedTopKRouter(**arguments)
    return routed(factory, top_k=TOPK, global_num_experts=EXPERTS, scoring_func="sigmoid",
                  e_score_correction_bias=bias(), **GROUPED, **more)


def test_eplb_and_the_capture_of_ids_stay_vllms(adapter, monkeypatch):
    import torch
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", lambda topk_ids, **_: topk_ids + 100)
    state, captured = EplbLayerState(), []
    for name in ("expert_load_view", "logical_to_physical_map", "logical_replica_count", "should_record_tensor"):
        setattr(state, name, torch.zeros(1))
    state.num_unpadded_tokens_tensors = [None]
    plain, router = grouped_router(), grouped_router(eplb_state=state)
    router.set_capture_fn(lambda ids: captured.append(ids.clone()))
    weights, ids = router.select_experts(None, logits())
    assert type(router).__name__ == "KernelRegistryGroupedTopKRouter"
    assert torch.equal(captured[0], plain.select_experts(None, logits())[1])
    assert torch.equal(ids, captured[0] + 100)


@pytest.fixture
def padding(monkeypatch):
    """A forward context with these rows as padding: more than there are tokens, as vLLM has it."""
    import torch
    from types import SimpleNamespace
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router

    rows = torch.tensor([False, True, False, False, True, False, True, True])
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "1")
    monkeypatch.setattr(fused_topk_router, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(fused_topk_router, "get_forward_context", lambda: SimpleNamespace(is_padding=rows))
    return rows[:TOKENS]


def assert_skipped(router, skipped) -> None:
    import torch

    weights, ids = router.select_experts(None, logits())
    assert torch.equal((ids == -1).all(1), skipped) and torch.equal((weights == 0).all(1), skipped)
    assert torch.equal((ids == -1).any(1), skipped) and torch.equal((weights == 0).any(1), skipped)


@pytest.mark.parametrize("skip_padding", [False, True])
def test_rows_of_padding_are_skipped_where_vllm_is_told_to(adapter, padding, skip_padding):
    assert_skipped(grouped_router(skip_padding=skip_padding), padding & skip_padding)


def test_routers_without_groups_skip_padding_as_vllms_do(adapter, padding, monkeypatch):
    from kernel_registry.integrations.vllm.routing import routed
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router, router_factory

    @functools.wraps(router_factory.create_fused_moe_router)
    def factory(**arguments):
        return fused_topk_router.FusedTopKRouter(**arguments)
    router = routed(factory, top_k=TOPK, global_num_experts=EXPERTS)
    assert_skipped(router, padding)
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    assert_skipped(router, padding & False)


def test_the_torch_op_is_what_torch_asks_of_one(adapter):
    import torch

    adapter.enable("routing")
    router = make(**GROUPED, scoring_func="sigmoid", e_score_correction_bias=bias())
    arguments = (logits(), router.kernel_registry_bias, router.kernel_registry_call)
    torch.library.opcheck(torch.ops.kernel_registry_vllm.topk.default, arguments)
    compiled = torch.compile(router.select_experts, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(None, logits()), router.select_experts(None, logits())))


def test_on_a_gpu_a_fallback_is_declined_unless_it_was_asked_for(adapter, monkeypatch):
    from kernel_registry import Registry
    from kernel_registry.integrations.vllm import choosing, routing

    gpu = Registry(plugins=False, environment=False, platform="sm_90")
    for module in (choosing, routing):
        monkeypatch.setattr(module, "registry", gpu)
        monkeypatch.setattr(module, "here", dict)
    adapter.enable("routing")
    more = dict(scoring_func="softmax", e_score_correction_bias=bias())  # for which there is no fast kernel
    assert type(make(**more)).__name__ == "CPURouter"
    assert "no fast kernel" in adapter.report().declined[0].why
    assert type(make()).__name__ == "KernelRegistryCPURouter"
    with gpu.override("moe.topk", "torch"):
        assert type(make(**more)).__name__ == "KernelRegistryCPURouter"


def test_an_override_that_cannot_be_followed_is_an_error(adapter):
    from kernel_registry.errors import OverrideError
    from kernel_registry.integrations.vllm import routing

    adapter.enable("routing")
    with routing.registry.override("moe.topk", "triton_biased_grouped"), pytest.raises(OverrideError):
        make()


def test_a_router_follows_an_override_that_comes_later(adapter, tmp_path):
    from kernel_registry.integrations.vllm import routing

    adapter.enable("routing")
    router = make(scoring_func="softmax")
    router.select_experts(None, logits())
    kernel, _ = routing._kernels[router.kernel_registry_call, logits().dtype]
    file = tmp_path / "overrides.yaml"
    file.write_text("version: 1\noverrides: [{op: moe.topk, use: torch, when: {scoring: softmax, has_bias: false}}]\n")
    reg = routing.registry
    files = reg._files
    try:
        reg.load_overrides(file)
        assert kernel.name == "torch" and "override" in str(adapter.report())
    finally:
        with reg._lock:
            reg._swap(files=files)


# ---- experts ---------------------------------------------------------------------------------------------------------

def config(**more):
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    return FusedMoEConfig(**{**dict(
        num_experts=EXPERTS, experts_per_token=TOPK, hidden_dim=64, intermediate_size=32, num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS, activation=MoEActivation.SILU, device="cpu", in_dtype=torch.float32,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel()), **more})


def test_the_traits_of_experts_are_those_of_the_layers_config(adapter):
    from kernel_registry.integrations.vllm.experts import read

    assert read(config(has_bias=True)) == dict(
        num_experts=EXPERTS, topk=TOPK, hidden_size=64, intermediate_size=32, dtype="float32", activation="silu",
        has_bias=True, expert_parallel=False, output_alias=True)


@pytest.mark.parametrize("more, reason", [
    (dict(activation="swigluoai"), "swigluoai"), (dict(activation="gelu_tanh"), "gelu_tanh"),
    (dict(is_lora_enabled=True), "LoRA"), (dict(experts_per_token=1), "one expert for a token"),
    (dict(swiglu_limit=7.0), "swiglu_limit is given"),
])
def test_experts_that_are_declined(adapter, more, reason):
    from kernel_registry.integrations.vllm.choosing import Declined
    from kernel_registry.integrations.vllm.experts import read
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    more = {key: MoEActivation(value) if key == "activation" else value for key, value in more.items()}
    with pytest.raises(Declined, match=f"(?i){reason}"):
        read(config(**more))


def test_activations_mean_the_same_on_both_sides():
    import torch
    from kernel_registry.integrations.vllm.experts import _ACTIVATIONS

    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    gate, up = rows.chunk(2, dim=-1)
    theirs = {"silu": torch.nn.functional.silu(gate) * up, "gelu": torch.nn.functional.gelu(gate) * up}
    for activation, ours in _ACTIVATIONS.items():
        assert activation.value == ours
        from kernel_registry.ops.moe.experts import reference

        assert torch.allclose(reference.activate(rows, ours), theirs[ours], atol=1e-6)


# ---- the next version ------------------------------------------------------------------------------------------------

def test_the_seams_are_there_in_the_next_vllm(tmp_path):
    """KERNEL_REGISTRY_NEXT_VLLM names a folder with the unpacked wheel of a later vLLM, whose Python is looked at with
    the dependencies of the installed one."""
    folder = os.environ.get("KERNEL_REGISTRY_NEXT_VLLM")
    if not folder:
        pytest.skip("not run: KERNEL_REGISTRY_NEXT_VLLM names no folder with an unpacked wheel of a later vLLM")
    code = """
import inspect
import torch
from kernel_registry.integrations import vllm
vllm.enable()
import vllm as runtime
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import layer, modular_kernel
from kernel_registry.integrations.vllm.experts import Experts
assert not Experts.__abstractmethods__
for name in ("apply", "workspace_shapes"):
    ours, theirs = (list(inspect.signature(getattr(c, name)).parameters)
                    for c in (Experts, modular_kernel.FusedMoEExpertsModular))
    assert ours == theirs, (ours, theirs)
bias = torch.linspace(0, 0.5, 16)
router = layer.create_fused_moe_router(
    top_k=4, global_num_experts=16, use_grouped_topk=True, num_expert_group=4, topk_group=2, scoring_func="sigmoid",
    e_score_correction_bias=bias, routed_scaling_factor=2.5, eplb_state=None, renormalize=True)
assert router.supports_monolithic_kernels is False
weights, ids = router.select_experts(torch.zeros(3, 8), torch.randn(3, 16))
assert ids.shape == (3, 4) and torch.allclose(weights.sum(1), torch.full((3,), 2.5))
print(runtime.__version__, runtime.__file__, type(router).__name__, "UnquantizedFusedMoEMethod" in op_registry_oot)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                          env={**env, "PYTHONPATH": os.pathsep.join((folder, str(ROOT))), "VLLM_NO_USAGE_STATS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    version, where, router, experts = done.stdout.split()[-4:]
    assert where.startswith(folder) and experts == "True"
    assert router in ("KernelRegistryGroupedTopKRouter", "KernelRegistryCPURouter"), version
