"""moe.finalize: what the experts computed for a token's slots, put together into the layer's output.

    (expert_output [T, K, H] | [T, H], topk_weights [T, K] | None = None, topk_ids [T, K] | None = None, *,
     shared_output=None [T, H], routed_scaling_factor=1.0, expert_map=None, out=None) -> [T, H] in out_dtype

    y = cast(routed_scaling_factor * sum over slots k, in order, of weight_k * row_k + shared_output), all in float32

expert_output         float32, bfloat16 or float16; any strides; T may be 0. [T, H] exactly when `reduced`: the experts
                      have weighted and summed already
topk_weights          float32, bfloat16 or float16; None exactly when the rows carry their weights (`weights_applied`)
topk_ids              int32 or int64; None where every slot counts, and when `reduced`. A slot whose id, after the map,
                      is not in [0, num_experts) contributes nothing, and neither its row nor its weight is read. A
                      token without any other slot gets the shared output, or zeros
shared_output         of any of the three dtypes; given exactly when has_shared
routed_scaling_factor multiplies the routed sum, not the shared output
expert_map            int32 or int64 [experts of all ranks], their ids to local ones or -1; ids outside it are not
                      local; given exactly when expert_parallel
out                   out_dtype [T, H]; given exactly when output_alias: the result is written there, and `out` is
                      returned. Rows may be strided. Its contents are never read
Raises kernel_registry.errors.InputError for tensors that contradict the dispatched traits.

Where nothing is left to do (reduced, no shared output, factor 1, dtype and out_dtype the same, no other `out`) no
kernel runs, and the result is expert_output itself. docs/moe_finalize.md has the reasons.
"""

from __future__ import annotations

from kernel_registry.contract import Contract, Workload
from kernel_registry.traits import finalize


class Finalize(Contract):
    """Traits, signature and readers of moe.finalize."""

    traits = finalize.FINALIZE_TRAITS
    relations = ("weights_applied or not reduced", "not (reduced and expert_parallel)")
    dynamic = {"num_tokens": lambda expert_output: expert_output.shape[0]}
    schema = (
        "(Tensor expert_output, Tensor? topk_weights, Tensor? topk_ids, int num_experts, Tensor? shared_output=None, "
        "float routed_scaling_factor=1.0, Tensor? expert_map=None, ScalarType? out_dtype=None) -> Tensor"
    )
    schema_out = "(Tensor(a!) out, " + schema[1:].replace(", ScalarType? out_dtype=None) -> Tensor", ") -> ()")
    read_until_end = ("expert_output", "topk_weights", "topk_ids", "shared_output", "expert_map")
    in_place = ("expert_output", "shared_output")
    oracle = "kernel_registry.ops.moe.finalize.oracle:check"
    cases = "kernel_registry.ops.moe.finalize.cases"

    @staticmethod
    def signature(expert_output, topk_weights=None, topk_ids=None, *, shared_output=None, routed_scaling_factor=1.0,
                  expert_map=None, out=None):
        """See the module's docstring."""

    @staticmethod
    def unpack(expert_output, topk_weights, topk_ids, num_experts, shared_output=None, routed_scaling_factor=1.0,
               expert_map=None, out_dtype=None, *, out=None):
        """One call of the torch op, see `schema`, as (traits, args, kwargs) of a dispatch and of the kernel."""
        reduced = expert_output.dim() == 2
        if out is not None:
            out_dtype = out.dtype
        traits = dict(
            num_experts=num_experts, topk=1 if reduced else expert_output.shape[1], hidden_size=expert_output.shape[-1],
            dtype=expert_output.dtype, out_dtype=out_dtype or expert_output.dtype, reduced=reduced,
            weights_applied=topk_weights is None, has_shared=shared_output is not None,
            expert_parallel=expert_map is not None, output_alias=out is not None)
        return traits, (expert_output, topk_weights, topk_ids), dict(
            shared_output=shared_output, routed_scaling_factor=routed_scaling_factor, expert_map=expert_map, out=out)

    @staticmethod
    def fake(expert_output, topk_weights, topk_ids, num_experts, shared_output=None, routed_scaling_factor=1.0,
             expert_map=None, out_dtype=None):
        """The output of the torch op without data: shape, dtype and device only."""
        return expert_output.new_empty((expert_output.shape[0], expert_output.shape[-1]),
                                       dtype=out_dtype or expert_output.dtype)

    @staticmethod
    def workloads(config) -> list[Workload]:
        """What is left to do after the experts of a model, which weight and sum themselves: its shared experts' output
        is added. Nothing where there are none."""
        from kernel_registry.traits.model_config import experts, routing

        found = experts(config)
        if found is None or not routing(config).shared_experts:
            return []
        traits = {name: found.traits[name] for name in ("num_experts", "topk", "hidden_size", "dtype")}
        traits.update(out_dtype=traits["dtype"], reduced=True, weights_applied=True, has_shared=True)
        return [Workload("shared output", traits, {"routed_scaling_factor": 1.0}, found.moe_layers)]
