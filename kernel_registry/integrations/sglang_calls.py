"""Calls of SGLang's router functions, read as calls of moe.topk.

The functions of srt/layers/moe/topk.py share their parameters' names but not their order, their defaults nor what they
do with them. Order and defaults are read off the functions; what is left is here. Nothing imports SGLang.
"""

from __future__ import annotations

import inspect
from typing import Callable, Mapping, NamedTuple

# The functions that select_experts calls. Those at the end are hooked to be told of: they serve calls that have no
# traits (a bias for each token, raw logits as weights), and calls that one of the others has declined.
HOOKED = ("biased_grouped_topk", "grouped_topk", "fused_topk_native", "fused_topk", "biased_topk_jit_kernel_impl",
          "biased_grouped_topk_impl", "fused_topk_softmax_torch_raw_logits")

_WRITES_SHARED_SLOT = ("biased_grouped_topk", "biased_grouped_topk_impl", "grouped_topk", "biased_topk_jit_kernel_impl")
_TENSORS = ("gating_output", "correction_bias", "num_token_non_padded")
_NOT_ASKED = ("hidden_states", "expert_location_dispatch_info", "compiled")  # SGLang's own, before or after routing
_READ = ("topk", "renormalize", "num_expert_group", "topk_group", "scoring_func", "num_fused_shared_experts",
         "routed_scaling_factor", "apply_routed_scaling_factor_on_output")
_PLAIN = (bool, int, float, str, type(None))


class Declined(Exception):
    """A call that the registry does not serve; the message is the reason."""


class Call(NamedTuple):
    """Arguments of moe_topk beside the tensors."""

    topk: int
    num_expert_group: int
    topk_group: int
    num_fused_shared_experts: int
    scoring: str
    renormalize: bool
    routed_scaling_factor: float
    shared_expert_weight: float
    masks_padding: bool

    def arguments(self) -> dict:
        arguments = self._asdict()
        del arguments["masks_padding"]
        return arguments


class Router(NamedTuple):
    """A router function's parameters, as this SGLang has them."""

    names: tuple[str, ...]
    defaults: Mapping[str, object]

    @classmethod
    def of(cls, name: str, function: Callable) -> "Router":
        parameters = inspect.signature(function).parameters.values()
        return cls(tuple(p.name for p in parameters),
                   {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty})

    def read(self, args: tuple, kwargs: Mapping) -> tuple:
        """(logits, bias, padding, settings) of a call. The settings are what it has besides, as a key: (name, value)
        pairs, where a value that is no plain one is its type's name."""
        given = {**self.defaults, **dict(zip(self.names, args)), **kwargs}
        tensors = [given.pop(name, None) for name in _TENSORS]
        settings = tuple([(name, value if isinstance(value, _PLAIN) else type(value).__name__)
                          for name, value in given.items() if name not in _NOT_ASKED])
        return *tensors, settings


def read(name: str, bias: tuple | None, settings: Mapping, masks: Callable[[str], bool]) -> Call:
    """A call of the function `name` as one of moe_topk; `bias` is (dtype, dimensions). Raises Declined.

    masks  SGLang's own answer to whether the GPU router masks padded rows for a scoring, instead of SGLang after it
    """
    unknown = [n for n, value in settings.items() if n not in _READ and value]
    if unknown:
        raise Declined(f"{unknown[0]}={settings[unknown[0]]} has no trait")
    if name == "fused_topk_softmax_torch_raw_logits":
        raise Declined("its weights are made of the raw logits, which no scoring gives")
    if bias is not None and bias[1] != 1:
        raise Declined(f"a correction bias of {bias[1]} dimensions has no trait: moe.topk takes one for all tokens")
    scoring, shared = settings.get("scoring_func", "sigmoid"), settings.get("num_fused_shared_experts", 0)
    factor, scaled = settings.get("routed_scaling_factor"), bool(settings.get("apply_routed_scaling_factor_on_output"))
    if name == "fused_topk" and scoring == "softmax" and (bias is not None or scaled):
        raise Declined("SGLang's kernel leaves a correction bias and a scaling factor out where the scoring is softmax")
    if shared > 1:
        raise Declined(f"{shared} fused shared experts: SGLang's routers do not agree on their slots")
    if shared and name not in _WRITES_SHARED_SLOT:
        raise Declined("this router of SGLang's has no slot for a fused shared expert")
    if shared and not factor:
        raise Declined("a fused shared expert without a routed_scaling_factor has another weight in each of SGLang's "
                       "routers")
    return Call(
        topk=settings["topk"], num_expert_group=settings.get("num_expert_group") or 1,
        topk_group=settings.get("topk_group") or 1, num_fused_shared_experts=shared, scoring=scoring,
        renormalize=bool(settings["renormalize"]),
        routed_scaling_factor=float(factor) if scaled and factor is not None else 1.0,
        # a factor that is not applied here is applied to the whole output later, the shared expert's slot included
        shared_expert_weight=1.0 if scaled or not factor else 1.0 / factor,
        masks_padding=name == "biased_topk_jit_kernel_impl" and masks(scoring))
