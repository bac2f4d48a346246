"""moe.experts: each token through its experts' two layers, weighted and summed.

    (hidden_states [T, H], w13 [E, 2I, H], w2 [E, H, I], topk_weights [T, K], topk_ids [T, K], *, w13_scale=None,
     w2_scale=None, a13_scale=None, a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None) -> [T, H]

hidden_states  float32, bfloat16 or float16 (trait dtype); T may be 0; the result has this dtype
w13            gate and up rows of each expert's first layer: the first I rows are the gate's, the last I the up's; with
               activation=swigluoai they alternate, gate first. In the format of weight_quant (formats.py):
                 none          the hidden states' dtype
                 fp8_*         float8_e4m3fn
                 int8_*        int8
                 int4_w4a16    uint8 [E, 2I, H/2]: column 2j in the low nibble of byte j, 2j + 1 in the high one,
                               value = nibble - 8
w2             each expert's second layer, in the same format ([E, H, I/2] for int4_w4a16)
topk_weights   float32, bfloat16 or float16, taken to float32 once
topk_ids       int32 or int64: an expert's row of w13, or, with expert_parallel, an index into expert_map. An id outside
               of these, -1 for example, contributes nothing and nothing is read with it; its weight and, where all
               of a token's are such, its hidden states may be NaN. A token without an expert here gets zeros
w13_scale      one factor for many weights, none for weight_quant=none; g = group_size:
                 fp8_block     float32 [E, 2 ceil(I/g), ceil(H/g)]: squares of g x g that start anew at the up rows;
                               with activation=swigluoai [E, ceil(2I/g), ceil(H/g)]
                 *_channel, int8_w8a16    float32 [E, 2I]
                 fp8_tensor    float32 [E]
                 int4_w4a16    float32, bfloat16 or float16 [E, 2I, ceil(H/g)]
w2_scale       the same for w2: [E, ceil(H/g), ceil(I/g)], [E, H], [E], [E, H, ceil(I/g)]
a13_scale      float32 [1] or scalar, given exactly with act_quant=*_tensor: scale of the hidden states
a2_scale       the same, of the second layer's input
w13_bias       float32, bfloat16 or float16 [E, 2I], rows as w13's; given exactly with has_bias
w2_bias        the same, [E, H]
expert_map     int32 or int64 [experts of all machines] -> row of w13, or -1; given exactly with expert_parallel
out            [T, H] like the result, given exactly with output_alias: the result is written there, and `out` is
               returned. Rows may lie apart; a kernel is never given one that shares memory with an input
Rows are summed over slots in float32, in an order that is the same in each call, and cast once. Those of a bfloat16
layer with 512 tokens or more may wait for that in 11 bits and a power of two for each row and tile; all others wait in
float32.
All tensors but `out` are contiguous; all are on the device of hidden_states. Slots count one by one, equal ids too.
Raises kernel_registry.errors.InputError for tensors that contradict the dispatched traits.

The meaning, step by step, is in docs/moe_experts.md. Sources: the order of operations is vLLM's pull request 31962; the
formats are those of published checkpoints; docs/moe_experts.md gives the reason for each choice.
"""

from __future__ import annotations

from kernel_registry.contract import Contract, Workload
from kernel_registry.traits import experts


class Experts(Contract):
    """Traits, signature and readers of moe.experts."""

    traits = experts.EXPERTS_TRAITS
    relations = (
        # which formats go together: quantised activations have weights of their own kind, all else stays as it is
        "(weight_quant == 'fp8_block') == (act_quant == 'fp8_block')",
        "(weight_quant == 'fp8_channel' or weight_quant == 'fp8_tensor')"
        " == (act_quant == 'fp8_token' or act_quant == 'fp8_tensor')",
        "(weight_quant == 'int8_channel') == (act_quant == 'int8_token' or act_quant == 'int8_tensor')",
        "group_size == 128 or weight_quant == 'fp8_block' or weight_quant == 'int4_w4a16'",
        "weight_quant != 'int4_w4a16' or hidden_size % 2 == 0 and intermediate_size % 2 == 0",
        "dtype == 'float32' or dtype == 'bfloat16' or dtype == 'float16'",
        "not apply_router_weight_on_input or topk == 1",
        "expert_parallel or topk <= num_experts",
    )
    dynamic = {"num_tokens": lambda hidden_states: hidden_states.shape[0]}
    schema = (
        "(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, *, "
        "Tensor? w13_scale=None, Tensor? w2_scale=None, Tensor? a13_scale=None, Tensor? a2_scale=None, "
        "Tensor? w13_bias=None, Tensor? w2_bias=None, Tensor? expert_map=None, str weight_quant='none', "
        "str act_quant='none', int group_size=128, str activation='silu', "
        "bool apply_router_weight_on_input=False) -> Tensor"
    )
    schema_out = "(Tensor(a!) out, " + schema[1:].replace(" -> Tensor", " -> ()")
    read_until_end = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "w13_scale", "w2_scale", "a13_scale",
                      "a2_scale", "w13_bias", "w2_bias", "expert_map")
    oracle = "kernel_registry.ops.moe.experts.oracle:check"
    cases = "kernel_registry.ops.moe.experts.cases"

    @staticmethod
    def signature(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
                  a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None):
        """See the module's docstring."""

    @staticmethod
    def unpack(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
               a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, weight_quant="none", act_quant="none",
               group_size=128, activation="silu", apply_router_weight_on_input=False, out=None):
        """One call of the torch op, see `schema`, as (traits, args, kwargs) of a dispatch and of the kernel."""
        traits = dict(
            num_experts=w13.shape[0], topk=topk_ids.shape[-1], hidden_size=hidden_states.shape[-1],
            intermediate_size=w13.shape[1] // 2, dtype=hidden_states.dtype, weight_quant=weight_quant,
            act_quant=act_quant, group_size=group_size, activation=activation, has_bias=w13_bias is not None,
            apply_router_weight_on_input=apply_router_weight_on_input, expert_parallel=expert_map is not None,
            output_alias=out is not None)
        return traits, (hidden_states, w13, w2, topk_weights, topk_ids), dict(
            w13_scale=w13_scale, w2_scale=w2_scale, a13_scale=a13_scale, a2_scale=a2_scale, w13_bias=w13_bias,
            w2_bias=w2_bias, expert_map=expert_map, out=out)

    @staticmethod
    def fake(hidden_states, *_, **__):
        """The torch op's output without data: always a fresh tensor, never an input under another name."""
        return hidden_states.new_empty(hidden_states.shape)

    @staticmethod
    def parameters(traits) -> dict[str, tuple[tuple[int, ...], str]]:
        """Weights, scales and biases of these traits."""
        from kernel_registry.traits.dtype import dtype_name

        from .formats import ACTIVATIONS, WEIGHTS, w2_matrix, w13_matrix

        weights, act = WEIGHTS[traits["weight_quant"]], ACTIVATIONS[traits["act_quant"]]
        found = {}
        for name, matrix in (("w13", w13_matrix(**traits)), ("w2", w2_matrix(**traits))):
            stored = matrix.stored_shape
            found[name] = stored, dtype_name(weights.stored) if weights.stored else traits["dtype"]
            if weights.rows:
                found[f"{name}_scale"] = matrix.scale_shape, dtype_name(weights.scale_dtypes[0])
            if act is not None and not act.group:
                found["a13_scale" if name == "w13" else "a2_scale"] = (1,), "float32"
            if traits["has_bias"]:
                found[f"{name}_bias"] = stored[:2], traits["dtype"]
        return found

    @staticmethod
    def workloads(config) -> list[Workload]:
        """The routed experts of every MoE layer of a model, whole, read off its Hugging Face config."""
        from kernel_registry.traits.model_config import experts as experts_of

        found = experts_of(config)
        return [] if found is None else [Workload("experts", found.traits, {}, found.moe_layers, found.notes)]
