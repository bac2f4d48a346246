"""The registry's routers in SGLang, through its plugin entry point and its hooks.

    KERNEL_REGISTRY_SGLANG=1 python -m sglang.launch_server ...     # in every process, by `plugin`

    from kernel_registry.integrations import sglang
    sglang.enable()             # in this process, by hand, before a model runs
    print(sglang.report())      # which routing calls were seen, which kernel each gets and why

Hooked are the router functions that SGLang's select_experts calls (sglang_calls.py), not select_experts itself: the
remapping to physical experts, slots of shared experts on other ranks, the masking of padded rows, capture and recording
stay SGLang's. What can't be served runs SGLang's own function: the report says so, and one log line when it is first
seen. The kernels run behind torch.ops.kernel_registry, so that torch.compile traces none of the dispatch.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import sglang_calls as calls
from .report import Report, Row
from .sglang_calls import Declined
from .switch import switched_on

if TYPE_CHECKING:
    from ..planning import PlanRow

SETTING, OP = "KERNEL_REGISTRY_SGLANG", "moe.topk"
_log = logging.getLogger(__name__)


class Decision(NamedTuple):
    """What came of one kind of call: the arguments of moe_topk and what they get, or why it stays with SGLang."""

    told: str
    call: calls.Call | None
    row: PlanRow | None
    why: str = ""


_routers: dict[str, calls.Router] = {}  # the hooked functions
_decisions: dict[tuple, Decision] = {}  # by what tells calls apart; made when one is first seen
_elsewhere: dict[str, str] = {}  # routing that never comes to a hooked function, and why
_state = {"on": False, "hooked": False, "masks": None}  # masks: SGLang's own answer, see sglang_calls.read


# ---- switching -------------------------------------------------------------------------------------------------------

def plugin() -> None:
    """SGLang's entry point `sglang.srt.plugins`, called in each of its processes; SGLang applies the hooks after it."""
    if switched_on(SETTING):
        _register()


def enable() -> Report:
    """Hooks SGLang's routers in this process. A second time it changes nothing."""
    hooks = _runtime()
    _register()
    hooks.HookRegistry.apply_hooks()
    return report()


def disable() -> None:
    """From now on every call runs SGLang's own function. The hooks stay in place: SGLang has no way to take one out."""
    _state["on"] = False


def report() -> Report:
    """The kinds of routing calls seen so far in this process, with the kernel that each has now and why."""
    from importlib.metadata import version

    rows = [Row(reason, where, OP, None, reason) for where, reason in _elsewhere.items()]
    for (name, *_), decision in list(_decisions.items()):
        kernel, why = _chosen(decision)
        rows.append(Row(decision.told, name, OP, kernel, why))
    return Report(f"SGLang {version('sglang')}", rows)


def _runtime():
    try:
        from sglang.srt.plugins import hook_registry
    except ImportError as error:
        raise ImportError(f"SGLang can't be imported here ({error}): it is needed for kernel_registry's adapter to "
                          "it, which was tried with sglang 0.5.23") from error
    return hook_registry


def _register() -> None:
    """Whole or not at all: all that this SGLang may lack is looked up before the first hook is registered."""
    if _state["hooked"]:
        _state["on"] = True
        return
    from sglang.srt.layers.moe import topk as module

    if module._use_aiter:
        _stays("every router", "SGLANG_USE_AITER is on: AITER's routers fold the scaling factor in where SGLang "
                               "expects it of nobody else")
        _state.update(on=True, hooked=True)
        return
    from .. import torch_ops  # noqa: F401  registers torch.ops.kernel_registry

    hooks = _runtime()
    routers = {name: calls.Router.of(name, function) for name in calls.HOOKED
               if (function := getattr(module, name, None)) is not None}
    masks = module._fused_gate_masks_padded_rows
    _register_kernels()
    for name in calls.HOOKED:
        if name not in routers:
            _stays(name, "this SGLang has no such function")
    _routers.update(routers)
    for name in routers:
        hooks.HookRegistry.register(f"{module.__name__}.{name}", functools.partial(_route, name),
                                    hooks.HookType.AROUND)
    hooks.HookRegistry.register(f"{module.__name__}.TopK.bind_runner_backend", _look_at_load, hooks.HookType.AFTER)
    _state.update(on=True, hooked=True, masks=masks)
    _log.info("kernel_registry: hooked SGLang's %s; what each call gets is told when it is first seen",
              ", ".join(_routers))


def _register_kernels() -> None:
    """The ops of the registry in sglang.kernels, as PLUGIN kernels: `get_kernel("moe.topk")`. An op that SGLang has
    itself is left alone: a second backend would make it ambiguous for callers that name none."""
    from sglang.kernels.registry import register_kernel, registry as inventory
    from sglang.kernels.spec import KernelBackend, KernelSpec

    from ..registry import registry
    from ..torch_ops import op_name

    for op, entry in registry.catalog.ops.items():
        if entry.contract.schema and not inventory.has(op):
            register_kernel(KernelSpec(op=op, backend=KernelBackend.PLUGIN,
                                       target=f"kernel_registry.torch_ops:torch.ops.kernel_registry.{op_name(op)}"))


# ---- a call ----------------------------------------------------------------------------------------------------------

def _route(name: str, original, *args, **kwargs):
    """Around a router function: the registry's kernel, or the function itself."""
    if not _state["on"]:
        return original(*args, **kwargs)
    logits, bias, padding, settings = _routers[name].read(args, kwargs)
    call = _decide(name, logits.shape[-1], logits.dtype, logits.device.type,
                   None if bias is None else (bias.dtype, bias.dim()), settings)
    if call is None:
        return original(*args, **kwargs)
    return torch.ops.kernel_registry.moe_topk(
        logits, bias, call.topk, call.num_expert_group, call.topk_group, call.num_fused_shared_experts, call.scoring,
        call.renormalize, "float32", call.routed_scaling_factor, call.shared_expert_weight,
        padding if call.masks_padding else None)


@torch.compiler.assume_constant_result  # traced code asks once, outside of the trace, and touches none of this
def _decide(name: str, num_experts: int, dtype: torch.dtype, device: str, bias: tuple | None, settings: tuple
            ) -> calls.Call | None:
    """What moe_topk is called with, None for a call that stays with SGLang. Decided when a kind is first seen."""
    key = (name, num_experts, dtype, device, bias, settings)
    decision = _decisions.get(key)
    if decision is None:
        decision = _decisions[key] = _first_sight(name, num_experts, dtype, device, bias, dict(settings))
    return decision.call


def _first_sight(name, num_experts, dtype, device, bias, settings) -> Decision:
    from ..errors import TraitError
    from ..torch_ops import bind

    told = ", ".join(f"{n}={v}" for n, v in {"num_experts": num_experts, **settings}.items() if v is not None)
    try:
        if device not in ("cpu", "cuda"):
            raise Declined(f"the registry has no kernels for {device}")
        call = calls.read(name, bias, settings, _state["masks"])
        logits = torch.empty((0, num_experts), dtype=dtype, device=device)
        row = bind(OP, logits, None if bias is None else logits.new_empty(num_experts, dtype=bias[0]),
                   **call.arguments())
        if row.implementation is None or device == "cuda" and not row.fast and not row.overridden:
            raise Declined(row.why)  # on a GPU SGLang's own kernel is faster than a fallback
    except (Declined, TraitError) as declined:
        _log.warning("kernel_registry: %s(%s) stays with SGLang: %s", name, told, declined)
        return Decision(told, None, None, str(declined))
    _log.info("kernel_registry: %s(%s) runs %s: %s", name, told, row.implementation, row.why)
    return Decision(told, call, row)


def _chosen(decision: Decision) -> tuple[str | None, str]:
    """The kernel that a kind of call has at this moment, and why."""
    if decision.row is None:
        return None, decision.why
    from ..planning import parse_platform, plan_call
    from ..registry import registry

    platform = parse_platform(registry, decision.row.platform)
    row = plan_call(registry, registry.catalog.op(OP), decision.row.workload, platform)
    return row.implementation, row.why


# ---- what never comes to a router function ---------------------------------------------------------------------------

def _look_at_load(_, topk, *__, **___) -> None:
    """After a layer's TopK knows its runner: tells of routing that select_experts does not do, or leaves to a model."""
    config = topk.topk_config
    if config.custom_routing_function is not None:
        function = config.custom_routing_function
        _stays(f"{getattr(function, '__qualname__', function)}", "the model routes by a function of its own")
    elif config.output_format is not None and config.output_format.name != "STANDARD":
        _stays(f"TopK with output format {config.output_format.name}",
               "the MoE runner routes by itself; another runner (--moe-runner-backend) takes what a router gives")


def _stays(where: str, why: str) -> None:
    if where not in _elsewhere:
        _elsewhere[where] = why
        _log.warning("kernel_registry: %s stays with SGLang: %s", where, why)
