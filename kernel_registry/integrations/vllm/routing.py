"""Routing: vLLM's routers with the registry's kernel in them.

vLLM has no registry of routers, but one factory, which all of its models go through. The factory makes its router as
ever; where the registry serves what it routes, the router gets a class of its own with `_compute_routing` replaced.
What its base classes do around that (EPLB's mapping and its counts, the capture of ids, their dtype) stays theirs.

The kernel is called behind a torch op, so that torch.compile traces none of it. The op's last argument says everything
of the call but the tensors, as text: a compiled graph that vLLM loads from its cache in another process means the same
there. Where nothing is traced, the op's function is called without the op, which takes a third of the time.
"""

from __future__ import annotations

import functools
import inspect
import json

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe import layer
from vllm.model_executor.layers.fused_moe.router import cpu_router, fused_topk_bias_router, fused_topk_router
from vllm.model_executor.layers.fused_moe.router import grouped_topk_router, router_factory

from ...registry import registry
from ...traits.dtype import dtype_name
from .choosing import Declined, choose, here, remember

OP = "moe.topk"
_READ = {"top_k", "global_num_experts", "renormalize", "use_grouped_topk", "num_expert_group", "topk_group",
         "scoring_func", "routed_scaling_factor", "e_score_correction_bias", "num_logical_experts"}
_THEIRS = {"eplb_state", "skip_padding",  # what vLLM's classes go on doing
           "shared_expert_weight", "image_sentinel_lo"}  # of things that are declined
_UNGROUPED = (fused_topk_router.FusedTopKRouter, fused_topk_bias_router.FusedTopKBiasRouter)
_ROUTERS = (cpu_router.CPURouter, grouped_topk_router.GroupedTopKRouter, *_UNGROUPED)


def switch():
    """Puts `routed` between vLLM and its factory, where layers have it and where models import it; returns the undo."""
    factories = [(module, module.create_fused_moe_router) for module in (router_factory, layer)]
    for module, factory in factories:
        module.create_fused_moe_router = functools.wraps(factory)(functools.partial(routed, factory))

    def undo():
        for module, factory in factories:
            module.create_fused_moe_router = factory
    return undo


def routed(factory, *args, **kwargs):
    """The factory's router, with the registry's kernel in it where there is one."""
    router = factory(*args, **kwargs)
    kind = type(router).__name__
    try:
        arguments = inspect.signature(factory).bind(*args, **kwargs).arguments
        traits, factor = read(type(router), arguments, inspect.signature(factory).parameters)
        # Which dtype the gate's logits will have, the factory is not told: one of these.
        calls = [{**traits, "dtype": dtype_name(d)} for d in dict.fromkeys((torch.get_default_dtype(), torch.float32))]
        for call in calls:
            choose(OP, call)
    except Declined as declined:
        remember(kind, OP, declined=str(declined))
        return router
    router.kernel_registry_bias = arguments.get("e_score_correction_bias")
    router.kernel_registry_call = json.dumps({"routed_scaling_factor": factor, **traits}, sort_keys=True)
    router.kernel_registry_skips_padding = isinstance(router, _UNGROUPED) or arguments.get("skip_padding", False)
    router.__class__ = _served(type(router))
    remember(kind, OP, calls)
    return router


def read(kind: type, arguments, parameters) -> tuple[dict[str, object], float]:
    """(traits of moe.topk without the logits' dtype, routed_scaling_factor) for the factory's arguments, which made a
    router of this class. Raises Declined."""
    if kind not in _ROUTERS:
        raise Declined("it routes otherwise than by the scores of its logits")
    absent = sorted(_READ - {*parameters})
    if absent:
        raise Declined(f"the factory, a later vLLM's or another plugin's, has no parameter {absent[0]}")
    for name, value in arguments.items():
        if name not in _READ | _THEIRS and value is not parameters[name].default and value != parameters[name].default:
            raise Declined(f"{name} is given")
    if envs.VLLM_BATCH_INVARIANT:
        raise Declined("VLLM_BATCH_INVARIANT is set, and the registry was not asked for a batch-invariant plan")
    given = {name: arguments.get(name, parameters[name].default) for name in _READ}
    experts, groups = given["num_logical_experts"] or given["global_num_experts"], 1
    bias, grouped = given["e_score_correction_bias"], given["use_grouped_topk"]
    if given["scoring_func"] == "sqrtsoftplus":
        raise Declined("scoring_func is sqrtsoftplus, whose variants are vLLM's own")
    if grouped:
        groups = given["num_expert_group"]
        if experts <= groups or experts % groups:
            raise Declined(f"{experts} experts make no {groups} groups, and vLLM routes without groups then")
    traits = dict(num_experts=experts, topk=given["top_k"], num_expert_group=groups,
                  topk_group=given["topk_group"] if grouped else 1, scoring=given["scoring_func"],
                  has_bias=bias is not None, renormalize=given["renormalize"],
                  bias_dtype="float32" if bias is None else dtype_name(bias.dtype))
    # vLLM's routers without groups and without a bias do not scale: what is said then is applied elsewhere.
    return traits, given["routed_scaling_factor"] if grouped or bias is not None else 1.0


def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
    """What a router class of vLLM calls for the routing alone."""
    route = torch.ops.kernel_registry_vllm.topk if torch.compiler.is_compiling() else topk
    weights, ids = route(router_logits, self.kernel_registry_bias, self.kernel_registry_call)
    if self.kernel_registry_skips_padding:
        padding = fused_topk_router._get_padding_mask(ids.shape[0])
        if padding is not None:
            padding = padding.unsqueeze(1)
            weights, ids = weights.masked_fill(padding, 0), ids.masked_fill(padding, -1)
    return weights, ids


@functools.lru_cache(maxsize=None)
def _served(kind: type) -> type:
    """The class with the routing replaced. In vLLM 0.33 it also says that no kernel may route for itself, past it."""
    return type(f"KernelRegistry{kind.__name__}", (kind,), {
        "__module__": __name__, "_compute_routing": _compute_routing, "supports_monolithic_kernels": False})


# ---- the torch op ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("kernel_registry_vllm", "DEF")
_kernels: dict[tuple[str, torch.dtype], tuple] = {}


def topk(router_logits, correction_bias, call: str):
    """The routing that `call` describes: moe.topk's traits and its routed_scaling_factor, as JSON."""
    try:
        kernel, factor = _kernels[call, router_logits.dtype]
    except KeyError:
        kernel, factor = _bind(call, router_logits.dtype)
    return kernel(router_logits, correction_bias, routed_scaling_factor=factor)


def _bind(call: str, dtype: torch.dtype) -> tuple:
    """The kernel, bound: it follows overrides and reloads by itself."""
    traits = json.loads(call)
    factor = traits.pop("routed_scaling_factor")
    _kernels[call, dtype] = registry.bind(OP, **traits, dtype=dtype_name(dtype), **here()), factor
    return _kernels[call, dtype]


def _fake(router_logits, correction_bias, call: str):
    shape = router_logits.shape[0], json.loads(call)["topk"]
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


_library.define("topk(Tensor router_logits, Tensor? correction_bias, str call) -> (Tensor, Tensor)",
                tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("topk", topk, "CompositeExplicitAutograd")
torch.library.register_fake("kernel_registry_vllm::topk", _fake, lib=_library)
