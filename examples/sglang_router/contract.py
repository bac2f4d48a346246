"""The two ops of the example, as contracts: what SGLang 0.5.23's router ladder looks at when it chooses.

`BiasedGroupedTopk` is the ladder itself (`biased_grouped_topk_gpu` in srt/layers/moe/topk.py); `MoeFusedGate` is the
second choice that four of its leaves run into when they call `moe_fused_gate`. A trait is here if, and only if, one of
the two reads it. Environment switches are no traits: they are override lines, in switches/.

Not traits because the ladder never looks at them: the scoring function (it is sigmoid whatever the model says) and the
routed scaling factor's value. Importing this loads neither torch nor SGLang.
"""

from __future__ import annotations

from kernel_registry.contract import Contract
from kernel_registry.traits.trait import Trait

_DTYPES = "dtype of the router logits: float32, bfloat16 or float16"
_LAYOUT = Trait(
    "logits_layout", "str", "layout", default="aligned_rows", choices=("aligned_rows", "odd_rows", "transposed"),
    doc="aligned_rows: unit stride along experts and a row stride that is a multiple of 4 elements; odd_rows: unit "
        "stride along experts, any other row stride; transposed: no unit stride along experts")
_NUM_TOKENS = Trait("num_tokens", "int", "performance", default=1, minimum=0, dynamic=True, doc="rows of the logits, T")
_PLATFORM = Trait("platform", "platform", "platform", doc="NVIDIA, AMD or CPU")


def _shape(name: str, default: int | None = None, minimum: int = 1, doc: str = "") -> Trait:
    if default is None:
        return Trait(name, "int", "performance", minimum=minimum, doc=doc)
    return Trait(name, "int", "semantic", default=default, minimum=minimum, doc=doc)


def _flag(name: str, kind: str, default: bool, doc: str) -> Trait:
    return Trait(name, "bool", kind, default=default, doc=doc)


def _rows(router_logits, *_args, **_kwargs) -> int:
    return router_logits.shape[0]


class BiasedGroupedTopk(Contract):
    """Sigmoid top-k with a correction bias, grouped or not: `(router_logits [T, E], correction_bias [E] or [T, E]) ->
    (topk_weights [T, K] float32, topk_ids [T, K] int32)`."""

    traits = (
        _shape("num_experts", doc="E, routed experts"),
        _shape("topk", doc="K, the output's width, fused shared experts included"),
        _shape("num_expert_group", 1, doc="G; 1 = ungrouped"),
        _shape("topk_group", 1, doc="groups kept per token"),
        _shape("num_fused_shared_experts", 0, minimum=0, doc="shared experts that take the last slots"),
        _flag("renormalize", "semantic", True, "divide the routed weights by their sum"),
        _flag("apply_routed_scaling_factor_on_output", "semantic", False, "the router multiplies by the factor itself"),
        _flag("bias_per_token", "semantic", False, "the correction bias is [T, E] rather than [E]"),
        Trait("dtype", "dtype", "semantic", default="float32", doc=_DTYPES),
        _LAYOUT,
        Trait("staged_hidden_size", "int", "performance", default=0, minimum=0,
              doc="width of the activations that the model staged for fused quantisation; 0 when it staged none, or "
                  "none that are bfloat16 or float32 rows on 32-byte boundaries"),
        _flag("has_flashinfer", "performance", True, "FlashInfer's DeepSeek router could be imported in this build"),
        _flag("jit_builds", "performance", True, "the optional just-in-time kernels compile on this machine"),
        Trait("accelerator", "str", "semantic", default="none", choices=("none", "xpu", "musa"),
              doc="a device whose vendor the platform trait has no name for; the platform is then its host's, cpu"),
        _PLATFORM,
        _NUM_TOKENS,
    )
    derived = {"experts_per_group": "num_experts // num_expert_group", "topk_routed": "topk - num_fused_shared_experts"}
    relations = ("num_experts % num_expert_group == 0", "topk > num_fused_shared_experts")
    dynamic = {"num_tokens": _rows}

    @staticmethod
    def signature(router_logits, correction_bias):
        """(topk_weights [T, K] float32, topk_ids [T, K] int32)"""


class MoeFusedGate(Contract):
    """The choice inside `moe_fused_gate`, with the arguments that the ladder's leaves pass on (a float32 bias [E])."""

    traits = (
        _shape("num_experts"),
        _shape("topk"),
        _shape("num_expert_group", 1),
        _shape("num_fused_shared_experts", 0, minimum=0),
        Trait("scoring", "str", "semantic", default="sigmoid", choices=("sigmoid", "softmax", "sqrtsoftplus")),
        _flag("plain", "semantic", True, "no softcap, packed output, padding scalar, second bias or epsilon"),
        Trait("dtype", "dtype", "semantic", default="float32", doc=_DTYPES),
        _LAYOUT,
        _PLATFORM,
        _NUM_TOKENS,
    )
    relations = ("num_experts % num_expert_group == 0", "topk > num_fused_shared_experts")
    dynamic = {"num_tokens": _rows}

    @staticmethod
    def signature(router_logits, correction_bias):
        """(topk_weights [T, K] float32, topk_ids [T, K] int32)"""


def not_single_group_on_cuda(traits) -> str | None:
    """What the opt-in Triton router leaves alone: ungrouped routing on CUDA. An "or" between platform and group count,
    which `when` can't say (its lines are an "and", and relations don't read platforms)."""
    if traits["platform"].kind == "cuda" and traits["num_expert_group"] == 1:
        return "on cuda it serves grouped routing only (num_expert_group is 1, serves >= 2); on hip it serves any"
    return None


CALLS_MOE_FUSED_GATE = ("jit_grouped_gate", "triton_grouped", "triton_single_group", "triton_small_single_group")


def passed_on(leaf: str, traits, *, aiter: bool = False) -> dict[str, object] | None:
    """The traits with which `leaf` calls `moe_fused_gate`; None for a leaf that does not.

    `traits` are those of the outer call, all given; `aiter` is whether SGLANG_USE_AITER is on, which widens the
    opt-in router's output by the shared slots. A leaf that casts the logits to float32 may change their layout: the
    copy keeps a transposed tensor transposed and packs the rows of a slice, but a single row keeps its stride.
    """
    if leaf not in CALLS_MOE_FUSED_GATE:
        return None
    names = ("num_experts", "topk", "num_expert_group", "num_fused_shared_experts", "dtype", "logits_layout",
             "platform", "num_tokens")
    inner = {name: traits[name] for name in names}
    keeps = ("float32", "bfloat16") if leaf == "triton_single_group" else ("float32",)
    if leaf in ("triton_grouped", "triton_single_group") and inner["dtype"] not in keeps:
        inner["dtype"] = "float32"
        if inner["logits_layout"] != "transposed" and inner["num_tokens"] > 1:
            inner["logits_layout"] = "aligned_rows" if inner["num_experts"] % 4 == 0 else "odd_rows"
    if leaf == "jit_grouped_gate" and aiter:
        inner["topk"] += inner["num_fused_shared_experts"]
    return inner
