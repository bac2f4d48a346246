"""The registry's kernels in Hugging Face transformers: routers, and experts through its experts interface.

    from kernel_registry.integrations.transformers import enable

    report = enable(model)      # a model in hand; print(report) says which module got which kernel and why
    report.disable()            # or `with enable(model):`

    enable()                    # models built later: their routers, and their experts where they are built with
    disable()                   # experts_implementation="kernel_registry"

Modules are read when a model is switched on, or when one first runs (transformers_modules.py). What can't be served
stays with transformers' own code: the report says so, and one log line. So do calls that record gradients, for which
kernels have none. Every dispatch is behind torch.ops.kernel_registry, so torch.compile traces none of it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import MethodType
from weakref import WeakSet

import torch

from .. import torch_ops  # noqa: F401  registers torch.ops.kernel_registry
from ..contract import Workload
from ..planning import HOST, PlanRow, parse_platform, plan_call
from ..registry import registry
from ..selection import REFUSALS
from . import transformers_modules as modules
from .report import Report, Row
from .transformers_modules import Declined, Family

NAME = "kernel_registry"  # of the experts implementation
OWN = "grouped_mm"  # transformers' default, for experts that stay with it
_CALL, _OWN, _REPORT = "_kernel_registry_call", "_kernel_registry_own", "_kernel_registry_report"
_UNDECIDED = object()
_log = logging.getLogger(__name__)
_decided: WeakSet = WeakSet()  # modules that have a _CALL without a report of their own
_classes: list[Report] = []  # the report of enable() without a model
_told: set[str] = set()


# ---- switching -------------------------------------------------------------------------------------------------------

def enable(model: torch.nn.Module | None = None, *, model_types: "list[str] | None" = None, through: str = "forward"
           ) -> Report:
    """Switches a model on, or, without one, the router classes for models built later. Returns what came of it.

    model_types  without a model: the packages of transformers.models whose routers to switch; None for all in the table
    through      "forward" sets the routers' forward; "kernels" lets Hugging Face's `kernels` package do it (kernelize)
    """
    if through not in ("forward", "kernels"):
        raise ValueError(f"through={through!r}, expected 'forward' or 'kernels'")
    holder = vars(model).get(_REPORT) if model is not None else next(iter(_classes), None)
    if holder is not None:
        return holder
    report = Report(f"transformers {_transformers().__version__}: "
                    + ("router classes" if model is None else type(model).__name__))
    try:
        if model is None:
            _classes.append(report)
            report.undo += [_forget, _classes.clear]
            _register(report)
            _switch_classes(report, model_types)
        else:
            setattr(model, _REPORT, report)
            report.undo.append(lambda: delattr(model, _REPORT))
            _switch_routers(report, model, through)
            _switch_experts(report, model)
    except BaseException:
        report.disable()
        raise
    _log.log(logging.WARNING if report.declined else logging.INFO, report.line)
    return report


def disable(model: torch.nn.Module | None = None) -> None:
    """Undoes `enable` of the same argument; nothing where there was none."""
    report = vars(model).get(_REPORT) if model is not None else next(iter(_classes), None)
    if report is not None:
        report.disable()


def _transformers():
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError("transformers is not installed here: pip install transformers") from error


def _interfaces():
    from transformers.integrations import finegrained_fp8, moe

    return moe.ALL_EXPERTS_FUNCTIONS, finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS


def _register(report: Report) -> None:
    """Puts NAME into both experts interfaces; the last to leave takes it out."""
    for interface in _interfaces():
        if NAME not in interface:
            interface.register(NAME, _experts_forward(interface))
        users = interface._global_mapping[NAME].users
        users.append(report)
        report.undo.append(functools.partial(_unregister, interface, users, report))


def _unregister(interface, users: list, report: Report) -> None:
    users[:] = [user for user in users if user is not report]
    if not users:
        del interface._global_mapping[NAME]


def _forget() -> None:
    for module in list(_decided):
        vars(module).pop(_CALL, None)
    _decided.clear()
    _told.clear()


# ---- routers ---------------------------------------------------------------------------------------------------------

def _switch_classes(report: Report, model_types) -> None:
    for name, family in modules.families().items():
        package = family.classes[name]
        if model_types is not None and package not in model_types:
            continue
        try:
            found = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
        except (ImportError, AttributeError):
            report.rows.append(Row(f"{package}.{name}", name, "moe.topk", None, "this transformers has no such class"))
            continue
        own = found.__dict__["forward"]
        report.undo.append(functools.partial(setattr, found, "forward", own))
        found.forward = _router_forward(family, own)
        report.rows.append(Row(f"{package}.{name}", name, "moe.topk", "chosen for each module when it first runs",
                               "models built from now on"))


def _switch_routers(report: Report, model, through: str) -> None:
    served = {}
    for name, module in model.named_modules():
        family = modules.family_of(module)
        if family is None and not type(module).__name__.lower().endswith("router"):
            continue
        try:
            if family is None:
                raise Declined("transformers.yaml has no row for this class")
            if "forward" in vars(module):
                raise Declined("its forward is set already, by another than the registry")
            call = modules.read_router(module, family)
            row = _choose("moe.topk", *modules.router_example(module, family, call))
        except Declined as declined:
            report.rows.append(_stays(name, module, "moe.topk", str(declined)))
            continue
        report.rows.append(_serves(name, module, row))
        served[module] = family
        setattr(module, _CALL, call)
        report.undo.append(functools.partial(delattr, module, _CALL))
    if through == "kernels":
        _kernelize(report, model, served)
        return
    for module, family in served.items():
        module.forward = MethodType(_router_forward(family, modules.own_forward(type(module))), module)
        report.undo.append(functools.partial(delattr, module, "forward"))


def _kernelize(report: Report, model, served: dict) -> None:
    """The routers' forward, set by Hugging Face's `kernels` as it sets those of the Hub."""
    import kernels

    mode, mapping = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, {}
    for cls, family in {type(module): family for module, family in served.items()}.items():
        layer = type(f"KernelRegistry{cls.__name__}", (torch.nn.Module,), {
            "forward": _router_forward(family, modules.own_forward(cls)), "can_torch_compile": True,
            "has_backward": False})
        mapping[layer.__name__] = {next(model.parameters()).device.type: {mode: _Repository(layer)}}
        had = cls.__dict__.get("kernel_layer_name", _UNDECIDED)
        kernels.replace_kernel_forward_from_hub(cls, layer.__name__)
        report.undo.append(functools.partial(setattr, cls, "kernel_layer_name", had) if had is not _UNDECIDED else
                           functools.partial(delattr, cls, "kernel_layer_name"))
    for module in model.modules():  # what kernelize sets on others too, their own forward among it, is undone
        if "forward" not in vars(module):
            report.undo.append(functools.partial(vars(module).pop, "forward", None))
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device=next(model.parameters()).device.type)


class _Repository:
    """What `kernels` loads a layer from: here, the layer itself."""

    def __init__(self, layer: type):
        self.layer = layer

    def load(self) -> type:
        return self.layer

    def __eq__(self, other):
        return isinstance(other, _Repository) and other.layer is self.layer

    def __hash__(self):
        return hash(self.layer)

    def __deepcopy__(self, memo):
        return self


def _router_forward(family: Family, own):
    """A forward for routers of this family, which takes and returns what `own` does."""
    def route(self, hidden_states, *bias):
        call = getattr(self, _CALL, _UNDECIDED)
        if call is _UNDECIDED:
            call = _decide(self, "moe.topk", functools.partial(_router_call, family))
        if call is None or _records_gradients(self, hidden_states, self.weight):
            return own(self, hidden_states, *bias)
        logits = family.logits(self, hidden_states)
        weights, ids = torch.ops.kernel_registry.moe_topk(logits, family.bias(self, bias), **call)
        return logits, weights, ids.long()

    if family.takes_bias:
        def forward(self, hidden_states, e_score_correction_bias):
            return route(self, hidden_states, e_score_correction_bias)
    else:
        def forward(self, hidden_states):
            return route(self, hidden_states)
    forward.kernel_registry_own = own
    return forward


def _router_call(family: Family, module):
    call = modules.read_router(module, family)
    return call, _choose("moe.topk", *modules.router_example(module, family, call))


# ---- experts ---------------------------------------------------------------------------------------------------------

def _switch_experts(report: Report, model) -> None:
    calls, topk = {}, _topk(model)
    for name, module in model.named_modules():
        if not modules.is_experts(module):
            if type(module).__name__.endswith("Experts"):
                report.rows.append(_stays(name, module, "moe.experts", "the experts interface does not reach it"))
            continue
        try:
            if not hasattr(model, "set_experts_implementation"):
                raise Declined(f"{type(model).__name__} is no model of transformers, whose interface could be set")
            calls[module], row = _experts_call(module, topk, lay_out=report)
        except Declined as declined:
            calls[module] = None
            report.rows.append(_stays(name, module, "moe.experts", str(declined)))
            continue
        report.rows.append(_serves(name, module, row))
    if not any(call is not None for call in calls.values()):
        return
    before = model.get_experts_implementation()
    _register(report)
    report.undo.append(functools.partial(model.set_experts_implementation, before))
    for module, call in calls.items():
        for name, value in ((_CALL, call), (_OWN, module.config._experts_implementation)):
            setattr(module, name, value)
            report.undo.append(functools.partial(delattr, module, name))
    model.set_experts_implementation(NAME)
    astray = [module for module, call in calls.items() if call and module.config._experts_implementation != NAME]
    if astray:
        raise RuntimeError(f"transformers did not switch {type(astray[0]).__name__} of {type(model).__name__} to "
                           f"experts_implementation={NAME!r}; enable the submodel that it is in")


def _experts_call(module, topk: int | None = None, *, lay_out: Report | None = None):
    call = modules.read_experts(module)
    if lay_out is not None:
        for parameter in modules.lay_out(module):
            lay_out.undo.append(functools.partial(_contiguous, parameter))
    elif module.is_transposed and not module.down_proj.transpose(1, 2).is_contiguous():
        raise Declined("its weights are stored [E, in, out]; enable(model) gives them the kernels' memory order")
    weight = module.down_proj
    dtype = weight.dtype if weight.element_size() > 1 else getattr(module.config, "dtype", None) or torch.bfloat16
    example = modules.experts_example(module, call, dtype, topk or _topk(module))
    return call, _choose("moe.experts", *example)


def _contiguous(parameter) -> None:
    parameter.data = parameter.data.contiguous()


def _topk(module) -> int:
    """How many experts a token has, by the config: for the report and the first binding; a call brings its own."""
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 1)


def _experts_forward(interface):
    """What the interface calls instead of a module's own forward."""
    def forward(self, hidden_states, top_k_index, top_k_weights):
        call = getattr(self, _CALL, _UNDECIDED)
        if call is _UNDECIDED:
            call = _decide(self, "moe.experts", _experts_call)
        if call is None or _records_gradients(self, hidden_states, self.down_proj) or \
                (self.down_proj.element_size() > 1 and hidden_states.dtype != self.down_proj.dtype):
            own = interface.get_interface(getattr(self, _OWN, OWN), type(self).forward.__wrapped__)
            return own(self, hidden_states, top_k_index, top_k_weights)
        (w13, w2), more = modules.experts_tensors(self)
        return torch.ops.kernel_registry.moe_experts(
            hidden_states.contiguous(), w13, w2, top_k_weights.contiguous(), top_k_index.contiguous(), **more, **call)

    forward.users = []
    return forward


# ---- choosing --------------------------------------------------------------------------------------------------------

def _choose(op: str, args: tuple, kwargs: dict) -> PlanRow:
    """Binds the kernel of this call of a torch op, so that nothing is left to import when a model runs. Raises
    Declined where the registry has none, and what an override that can't be followed raises."""
    entry = registry.catalog.op(op)
    traits, args, _ = entry.contract.unpack(*args, **kwargs)
    where = torch_ops.place(registry, args[0])
    platform = parse_platform(registry, where.get("platform", HOST))
    row = plan_call(registry, entry, Workload(op, traits, {}, 1), platform)
    if row.implementation is None:
        raise Declined(row.why)
    registry.bind(op, **traits, **where)
    return row


def _decide(module, op: str, read) -> dict | None:
    """The call of a module that no `enable(model)` has seen, when it first runs."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{type(module).__name__} was not decided before torch.compile traced it: call "
                           "kernel_registry.integrations.transformers.enable(model), or the model once, before")
    try:
        call, row = read(module)
        _tell(f"{type(module).__name__}: {op} -> {row.implementation}: {row.why}", logging.INFO)
    except (Declined, *REFUSALS) as declined:
        call = None
        _tell(f"{type(module).__name__} stays with transformers: {declined}")
    setattr(module, _CALL, call)
    _decided.add(module)
    return call


def _records_gradients(module, *tensors) -> bool:
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return False
    if not torch.compiler.is_compiling():
        _tell(f"{type(module).__name__}: calls that record gradients run transformers' own code; torch.no_grad() or "
              "torch.inference_mode() gives them to the registry")
    return True


def _tell(line: str, level: int = logging.WARNING) -> None:
    """One log line a text, once."""
    if line not in _told:
        _told.add(line)
        _log.log(level, line)


def _serves(name: str, module, row: PlanRow) -> Row:
    return Row(name, type(module).__name__, row.op, row.implementation, row.why)


def _stays(name: str, module, op: str, why: str) -> Row:
    return Row(name, type(module).__name__, op, None, why)
