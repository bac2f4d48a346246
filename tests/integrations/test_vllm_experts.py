"""Experts in vLLM: which layers the registry serves; and the seams of both parts in the next version."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import vllm_parts
from vllm_parts import EXPERTS, TOPK

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


@pytest.fixture
def adapter():
    with vllm_parts.adapter_off() as package:
        yield package


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
    (dict(swiglu_limit=7.0), "swiglu_limit is given"), (dict(moe_backend="triton"), "moe_backend is triton"),
    (dict(all2all_backend="passthrough"), "parallel config"),
])
def test_experts_that_are_declined(adapter, more, reason):
    from kernel_registry.integrations.vllm.choosing import Declined
    from kernel_registry.integrations.vllm.experts import read
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    more = {key: MoEActivation(value) if key == "activation" else value for key, value in more.items()}
    if "all2all_backend" in more:
        more = dict(moe_parallel_config=replace(config().moe_parallel_config, **more))
    with pytest.raises(Declined, match=f"(?i){reason}"):
        read(config(**more))


def test_in_vllms_kernel_experts_of_other_ranks_and_skipped_rows_contribute_nothing():
    import torch
    from kernel_registry.integrations.vllm.experts import Experts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import make_unquantized_moe_kernel

    generator = torch.Generator().manual_seed(5)
    here = torch.arange(1, EXPERTS, 2)  # every second expert
    hidden, w13, w2 = (torch.randn(*shape, generator=generator) for shape in ((6, 64), (8, 64, 64), (8, 64, 32)))
    weights, ids = torch.rand(6, TOPK, generator=generator), torch.rand(6, EXPERTS, generator=generator).topk(TOPK)[1]
    ids[4] = -1
    parallel = replace(config().moe_parallel_config, use_ep=True, ep_size=2)
    kernel = make_unquantized_moe_kernel(
        FusedMoEQuantConfig.make(), config(num_local_experts=8, moe_parallel_config=parallel),
        UnquantizedMoeBackend.TRITON, Experts)
    out = kernel.apply(
        hidden, w13, w2, topk_weights=weights, topk_ids=ids.int(), activation=MoEActivation.SILU,
        global_num_experts=EXPERTS, apply_router_weight_on_input=False,
        expert_map=torch.full((EXPERTS,), -1, dtype=torch.int32).index_copy_(0, here, torch.arange(8).int()))
    expected = torch.zeros(6, 64)
    for row, slot in torch.isin(ids, here).nonzero():
        expert = ids[row, slot] // 2
        gate, up = (w13[expert] @ hidden[row]).chunk(2)
        expected[row] += weights[row, slot] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)
    assert not out[4].any() and out[0].any()


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
import test_vllm_experts as tests
from kernel_registry.integrations.vllm.experts import read
from vllm.v1.worker.workspace import init_workspace_manager
# A wheel for CUDA knows no platform here, and takes its kernels' buffers from where it does on a GPU.
Experts._supports_current_device = staticmethod(lambda: True)
torch.accelerator.empty_cache = lambda: None
init_workspace_manager(torch.device("cpu"))
assert read(tests.config())["expert_parallel"] is False
tests.test_in_vllms_kernel_experts_of_other_ranks_and_skipped_rows_contribute_nothing()
print(runtime.__version__, runtime.__file__, type(router).__name__, "UnquantizedFusedMoEMethod" in op_registry_oot)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path,
                          env={**env, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, HERE))),
                               "VLLM_NO_USAGE_STATS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    version, where, router, experts = done.stdout.split()[-4:]
    assert where.startswith(folder) and experts == "True"
    assert router in ("KernelRegistryGroupedTopKRouter", "KernelRegistryCPURouter"), version
