"""The registry's routers in tokenspeed-kernel, through its plugin entry point and its own kernel registry.

    KERNEL_REGISTRY_TOKENSPEED=1    # and the host calls tokenspeed_kernel.plugins.discover_plugins()

    from kernel_registry.integrations import tokenspeed
    tokenspeed.enable()             # in this process, by hand
    print(tokenspeed.report())      # what is registered for which calls, and what stays with TokenSpeed and why

TokenSpeed selects by platform, formats and traits, then by priority; plugins have a band of their own above its
kernels. So what is registered is what decides: the traits for which this registry has a fast kernel on this platform,
read off its boxes. Everything else TokenSpeed selects as before. Which kernel of the registry then runs is decided at
the call, behind torch.ops.kernel_registry, so that override files and reloads hold.

tokenspeed-kernel 0.1.4 routes in groups nowhere: `moe.biased_grouped_topk` is an operator that this adapter adds, for
hosts that call `select_kernel("moe", "biased_grouped_topk", ...)`.
"""

from __future__ import annotations

import logging
from typing import Callable, Mapping, NamedTuple

import torch

from ..errors import NoImplementationError
from .report import Report, Row
from .switch import switched_on

SETTING, OP = "KERNEL_REGISTRY_TOKENSPEED", "moe.topk"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIMIT = 4096  # of the sizes that boxes are asked for
_log = logging.getLogger(__name__)
_report: list[Report] = []  # of the registration in this process


# ---- TokenSpeed's operators, in its kernels' signatures --------------------------------------------------------------

def sigmoid_bias_topk(*, router_logits, correction_bias, topk, routed_scaling_factor, normalize_topk_weights,
                      weights_dtype=torch.float32, logical_to_physical_map=None):
    weights, ids = _route(router_logits, correction_bias, topk, 1, 1, 0, "sigmoid", normalize_topk_weights,
                          routed_scaling_factor=routed_scaling_factor, expert_map=logical_to_physical_map)
    return weights.to(weights_dtype), ids


def biased_grouped_topk(*, router_logits, correction_bias, topk, num_expert_group, topk_group, routed_scaling_factor,
                        normalize_topk_weights, weights_dtype=torch.float32):
    """The adapter's own operator: as sigmoid_bias_topk, with the two numbers of groups."""
    weights, ids = _route(router_logits, correction_bias, topk, num_expert_group, topk_group, 0, "sigmoid",
                          normalize_topk_weights, routed_scaling_factor=routed_scaling_factor)
    return weights.to(weights_dtype), ids


def softmax_topk(*, router_logits, topk, topk_indices_dtype, renormalize, routed_scaling_factor, enable_pdl=False):
    weights, ids = _route(router_logits, None, topk, 1, 1, 0, "softmax", renormalize,
                          routed_scaling_factor=routed_scaling_factor)
    return weights, ids.to(topk_indices_dtype)


def sqrt_softplus_topk(router_logits, top_k, renormalize, correction_bias, hash_indices_table, input_ids, need_scores):
    """TokenSpeed's operator `topk`. The traits keep hash routing away, its facade a bias for each token; the facade
    asks for no scores, and takes what comes third as unused then."""
    if need_scores:
        raise NoImplementationError(
            "need_scores=True asks for the scores of all experts, which no router of kernel_registry returns",
            where="moe.topk", hint="need_scores=False was expected, as moe_topk passes it; a caller that needs the "
                                   "scores selects TokenSpeed's kernel: solution='triton'")
    weights, ids = _route(router_logits, correction_bias, top_k, 1, 1, 0, "sqrtsoftplus", renormalize)
    return weights, ids, router_logits


def _route(*args, **kwargs):
    return torch.ops.kernel_registry.moe_topk(*args[:8], "float32", **kwargs)


class Operator(NamedTuple):
    """An operator of TokenSpeed's family `moe`: the function, a call of it as traits of moe.topk, and the traits that
    TokenSpeed selects by: sizes, by TokenSpeed's name and ours, and others with the values that are served."""

    function: Callable
    example: Mapping[str, object]
    sizes: Mapping[str, str] = {"experts": "num_experts", "topk": "topk"}
    others: Mapping[str, frozenset] = {}


_SIGMOID = dict(num_experts=64, topk=1, scoring="sigmoid", has_bias=True)
OPERATORS = {
    "sigmoid_bias_topk": Operator(sigmoid_bias_topk, _SIGMOID),
    "sigmoid_bias_topk_mapped": Operator(sigmoid_bias_topk, _SIGMOID),
    "biased_grouped_topk": Operator(
        biased_grouped_topk, {**_SIGMOID, "num_expert_group": 8, "topk_group": 4},
        {"experts": "num_experts", "topk": "topk", "num_expert_group": "num_expert_group"}),
    "softmax_topk": Operator(softmax_topk, dict(num_experts=64, topk=1, scoring="softmax", has_bias=False)),
    "topk": Operator(
        sqrt_softplus_topk, {**_SIGMOID, "scoring": "sqrtsoftplus"}, {"experts": "num_experts", "top_k": "topk"},
        {"routing_kind": frozenset({"bias", "plain"}), "score_function": frozenset({"sqrt_softplus"})}),
}


# ---- switching -------------------------------------------------------------------------------------------------------

def plugin() -> None:
    """TokenSpeed's entry point `tokenspeed_kernel.plugins`."""
    if switched_on(SETTING):
        enable()


def enable() -> Report:
    """Registers the routers with TokenSpeed in this process. A second time it replaces them by themselves. Whole or not
    at all: everything is decided before the first is registered."""
    try:
        from tokenspeed_kernel.registry import Priority, register_kernel
        from tokenspeed_kernel.signature import format_signatures
    except ImportError as error:
        raise ImportError(f"tokenspeed-kernel can't be imported here ({error}): it is needed for kernel_registry's "
                          "adapter to it, which was tried with tokenspeed-kernel 0.1.4") from error
    from .. import torch_ops  # noqa: F401  registers torch.ops.kernel_registry

    platform, rows, registrations = _platform(), [], []
    for mode, operator in OPERATORS.items():
        kernels = _fast(operator, platform)
        if not kernels:
            rows.append(Row("every call", f"moe.{mode}", OP, None, f"no fast kernel serves it on {platform}"))
            continue
        sizes = {theirs: _values(ours, kernels) for theirs, ours in operator.sizes.items()}
        registrations.append((operator.function, register_kernel(
            "moe", mode, name=_name(mode), solution="kernel_registry",
            signatures=format_signatures("router_logits", "dense", _DTYPES), traits={**sizes, **operator.others},
            priority=Priority.PLUGIN)))
        told = ", ".join(f"{name} {min(values)}..{max(values)}" for name, values in sizes.items())
        rows.append(Row(told, f"moe.{mode}", OP, ", ".join(kernel.name for kernel in kernels),
                        f"the fast kernels on {platform}; other sizes stay with TokenSpeed"))
    made = Report(f"tokenspeed-kernel {_version()} on {platform}", rows)
    disable()
    _report.append(made)
    try:
        for function, register in registrations:
            register(function)
    except BaseException:
        disable()
        raise
    _log.log(logging.WARNING if made.declined else logging.INFO, "kernel_registry: %s", made.line)
    return report()


def disable() -> None:
    """Takes the routers out of TokenSpeed's registry; what they served, TokenSpeed selects as before."""
    if _report:
        from tokenspeed_kernel.registry import KernelRegistry

        for mode in OPERATORS:  # by the method that TokenSpeed's own `register` replaces a kernel with
            KernelRegistry.get()._unregister(_name(mode))
        _report.clear()


def report() -> Report:
    """What is registered with TokenSpeed, what stays with it, and every call of moe.topk in this process so far."""
    if not _report:
        return Report("tokenspeed-kernel: nothing is registered; "
                      f"{SETTING}=1 and discover_plugins(), or enable(), registers", [])
    from ..registry import registry

    calls = [Row(str(kernel.request), "call", OP, kernel.name, "as it is bound now; `explain` tells why")
             for kernel in registry.kernels if kernel.op == OP]
    return Report(_report[0].title, [*_report[0].rows, *calls])


def _name(mode: str) -> str:
    return f"kernel_registry_{mode}"


def _fast(operator: Operator, platform) -> list:
    """The registry's implementations for this operator on the platform, whatever the sizes; without the fallback, which
    would serve calls for which TokenSpeed has fast kernels of its own."""
    from ..registry import registry

    owner = registry.catalog.op(OP)
    calls = [owner.space.request({**operator.example, "dtype": dtype}, lambda: platform).traits for dtype in _DTYPES]
    sized = ("num_experts", "topk", *owner.contract.derived)
    return [i for i in owner.implementations if not i.fallback and not i.variant_of
            and all(i.box.admits({**call, "num_tokens": 1, "contiguous": True}, but_for=sized) for call in calls)]


def _values(size: str, kernels: list) -> frozenset:
    """The values of a size that one of the kernels admits. TokenSpeed takes sets, one for each size, so a corner that
    none admits may be among them: there the registry's fallback runs."""
    return frozenset(value for value in range(1, _LIMIT + 1)
                     if any(size not in k.box.sets or k.box.sets[size].admits(value) for k in kernels))


def _platform():
    """TokenSpeed's platform, by the registry's name for it."""
    from tokenspeed_kernel.platform import current_platform

    from ..registry import registry
    from ..traits.platform import Platform

    here = current_platform()
    return Platform.parse(f"sm_{here.arch_version.major}{here.arch_version.minor}") if here.is_nvidia else \
        registry.platform()


def _version() -> str:
    from importlib.metadata import version

    return version("tokenspeed-kernel")
