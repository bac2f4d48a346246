"""What runs in a module of transformers that is switched on: forwards that pass tensors to the registry's torch ops.

A module carries its decision: CALL, the keyword arguments of the torch op, or None where it stays with transformers.
`enable(model)` sets it; a module of a model that it has not seen is decided when it first runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
from weakref import WeakSet

import torch

from .. import torch_ops  # which also registers torch.ops.kernel_registry
from ..errors import TraitError
from ..planning import PlanRow
from . import transformers_modules as modules
from .transformers_modules import Declined, Family

CALL, OWN = "_kernel_registry_call", "_kernel_registry_own"  # OWN: what transformers runs for experts
_topk, _experts = torch_ops.calling("moe.topk"), torch_ops.calling("moe.experts")
DEFAULT = "grouped_mm"  # transformers' own experts implementation, where none was in force before
_UNDECIDED = object()
decided: WeakSet = WeakSet()  # modules that were decided when they first ran
_told: set[str] = set()
log = logging.getLogger(__name__.replace("transformers_forward", "transformers"))


def router_forward(family: Family, own):
    """A forward for routers of this family, which takes and returns what `own` does."""
    def route(self, hidden_states, *bias):
        call = getattr(self, CALL, _UNDECIDED)
        if call is _UNDECIDED:
            call = _decide(self, "moe.topk", functools.partial(router_call, family=family))
        if call is None or torch.is_grad_enabled() and _records_gradients(self, hidden_states, *self.parameters()):
            return own(self, hidden_states, *bias)
        logits = family.logits(self, hidden_states)
        weights, ids = _topk(logits, family.bias(self, bias), **call)
        return logits, weights, ids.long()

    if family.takes_bias:
        def forward(self, hidden_states, e_score_correction_bias):
            return route(self, hidden_states, e_score_correction_bias)
    else:
        def forward(self, hidden_states):
            return route(self, hidden_states)
    forward.kernel_registry_own = own
    return forward


def experts_forward(interface):
    """What the interface calls instead of a module's own forward."""
    def forward(self, hidden_states, top_k_index, top_k_weights):
        call = getattr(self, CALL, _UNDECIDED)
        if call is _UNDECIDED:
            call = _decide(self, "moe.experts", experts_call)
            setattr(self, OWN, own_experts(interface, self))
        if call is None:
            return getattr(self, OWN)(self, hidden_states, top_k_index, top_k_weights)
        (w13, w2), more = modules.experts_tensors(self)
        if (torch.is_grad_enabled() and _records_gradients(self, hidden_states, top_k_weights, w13, w2, *more.values())
                or _casts(self, hidden_states, w2) or self.is_transposed and _as_stored(self, w13, w2)):
            return getattr(self, OWN)(self, hidden_states, top_k_index, top_k_weights)
        return _experts(hidden_states.contiguous(), w13, w2, top_k_weights.contiguous(), top_k_index.contiguous(),
                        **more, **call)

    forward.users = []
    return forward


def own_experts(interface, module, implementation: str = DEFAULT):
    """What transformers runs for these experts: that of its implementations, or the module's own loop for "eager"."""
    return interface.get_interface(implementation, inspect.unwrap(type(module).forward))


# ---- deciding --------------------------------------------------------------------------------------------------------

def router_call(module, family: Family) -> tuple[dict, PlanRow]:
    """The call of a router, and what it gets. Raises Declined."""
    call = modules.read_router(module, family)
    return call, _choose("moe.topk", *modules.router_example(module, family, call))


def experts_call(module) -> tuple[dict, PlanRow]:
    """The call of experts, and what it gets. Raises Declined."""
    call = modules.read_experts(module)
    if module.is_transposed and not module.down_proj.transpose(1, 2).is_contiguous():
        raise Declined("its weights are stored [E, in, out]; enable(model) gives them the kernels' memory order")
    return call, _choose("moe.experts", *modules.experts_example(module, call))


def _choose(op: str, args: tuple, kwargs: dict) -> PlanRow:
    try:
        row = torch_ops.bind(op, *args, **kwargs)
    except TraitError as error:  # fewer experts than a token has, say, on a machine that has a part of them
        raise Declined(str(error)) from error
    if row.implementation is None:
        raise Declined(row.why)
    return row


def _decide(module, op: str, read) -> dict | None:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{type(module).__name__} was not decided before torch.compile traced it: call "
                           "kernel_registry.integrations.transformers.enable(model), or the model once, before")
    try:
        call, row = read(module)
        tell(f"{type(module).__name__}: {op} -> {row.implementation}: {row.why}", logging.INFO)
    except Declined as declined:
        call = None
        tell(f"{type(module).__name__} stays with transformers: {declined}")
    setattr(module, CALL, call)
    decided.add(module)
    return call


def forget() -> list:
    """Takes the decisions back that were made when modules first ran. Returns the modules."""
    taken = list(decided)
    for module in taken:
        for name in (CALL, OWN):
            vars(module).pop(name, None)
    decided.clear()
    _told.clear()
    return taken


# ---- calls that stay with transformers -------------------------------------------------------------------------------

def _records_gradients(module, *tensors) -> bool:
    if not any(tensor.requires_grad for tensor in tensors):
        return False
    if not torch.compiler.is_compiling():
        tell(f"{type(module).__name__}: calls that record gradients run transformers' own code; torch.no_grad() or "
             "torch.inference_mode() gives them to the registry")
    return True


def _casts(module, hidden_states, weight) -> bool:
    if hidden_states.dtype == weight.dtype or weight.element_size() == 1:
        return False
    if not torch.compiler.is_compiling():
        tell(f"{type(module).__name__}: calls with {hidden_states.dtype} hidden states run transformers' own code, for "
             f"the weights are {weight.dtype}")
    return True


def _as_stored(module, *weights) -> bool:
    """Whether weights that were loaded since have the memory order that transformers stores, not the kernels'."""
    if all(weight.is_contiguous() for weight in weights):
        return False
    if not torch.compiler.is_compiling():
        tell(f"{type(module).__name__}: calls run transformers' own code, for weights stored [E, in, out] were loaded "
             "after enable(model) had given others the kernels' memory order")
    return True


def tell(line: str, level: int = logging.WARNING) -> None:
    """One log line a text, once."""
    if line not in _told:
        _told.add(line)
        log.log(level, line)
