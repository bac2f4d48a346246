"""moe.routing_bias: a router's correction bias, in the dtype that the router takes.

    (correction_bias [E] | [..., E]) -> the same tensor

The work is done once, at load: `registry.prepare("moe.routing_bias", module_or_parameter, **traits)`, with the traits
of the router that will read the bias. `bias_dtype` has no neutral value: a target that nobody named must not mean
"leave it as it is". A call then does nothing but make sure that its argument was prepared.

correction_bias       float32, bfloat16 or float16, last dimension E; a torch.nn.Parameter keeps its identity
Raises kernel_registry.errors.PreparationError for a bias that is not prepared, or prepared for another router.

docs/routing_bias.md has the rules and the reasons.
"""

from __future__ import annotations

from dataclasses import replace

from kernel_registry.contract import Contract
from kernel_registry.traits import moe
from kernel_registry.traits.trait import REQUIRED


class RoutingBias(Contract):
    """Traits and signature of moe.routing_bias: those traits of moe.topk that do not change from call to call."""

    traits = tuple(replace(trait, default=REQUIRED) if trait is moe.BIAS_DTYPE else trait for trait in moe.TOPK_TRAITS
                   if not trait.dynamic)
    relations = ("has_bias", "num_experts % num_expert_group == 0", "topk_group <= num_expert_group",
                 "topk > num_fused_shared_experts",
                 "topk - num_fused_shared_experts <= topk_group * (num_experts // num_expert_group)")
    prepared = ("correction_bias",)
    oracle = "kernel_registry.ops.moe.routing_bias.oracle:check"
    cases = "kernel_registry.ops.moe.routing_bias.cases"

    @staticmethod
    def signature(correction_bias):
        """See the module's docstring."""
