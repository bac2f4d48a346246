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

import contextlib
import functools
import importlib
import inspect
import logging
from types import MethodType
from weakref import WeakSet

import torch

from ..planning import PlanRow
from . import transformers_modules as modules
from .report import Report, Row
from .transformers_forward import (CALL, DEFAULT, OWN, decided, experts_call, experts_forward, forget, log,
                                   own_experts, router_call, router_forward)
from .transformers_modules import Declined

NAME = "kernel_registry"  # of the experts implementation
_REPORT = "_kernel_registry_report"  # attribute of a model that is switched on
_classes: list[Report] = []  # the report of enable() without a model
_switched: WeakSet = WeakSet()  # modules that an enabled model has


# ---- switching -------------------------------------------------------------------------------------------------------

def enable(model: torch.nn.Module | None = None, *, model_types: "list[str] | None" = None, through: str = "forward"
           ) -> Report:
    """Switches a model on, or, without one, the router classes for models built later. Returns what came of it.

    model_types  without a model: the packages of transformers.models whose routers to switch; None for all in the table
    through      "forward" sets the routers' forward; "kernels" lets Hugging Face's `kernels` package do it (kernelize)
    """
    if through not in ("forward", "kernels"):
        raise ValueError(f"through={through!r}, expected 'forward' or 'kernels'")
    model = _uncompiled(model)
    holder = _report_of(model)
    if holder is not None:
        return holder
    if model is not None and (found := next((name for name, module in model.named_modules() if module in _switched),
                                            None)):
        raise ValueError(f"{found} is switched on already, with another model that it is a part of or that is a part "
                         f"of this {type(model).__name__}: disable that one first")
    report = Report(f"transformers {_transformers().__version__}: "
                    + ("router classes" if model is None else type(model).__name__))
    try:
        if model is None:
            _classes.append(report)
            report.undo += [_forget, _classes.clear]
            _register(report)
            _switch_classes(report, model_types)
        else:
            _put(report, model, _REPORT, report)
            _switch_routers(report, model, through)
            _switch_experts(report, model)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            report.disable()
        raise
    log.log(logging.WARNING if report.declined else logging.INFO, report.line)
    return report


def disable(model: torch.nn.Module | None = None) -> None:
    """Undoes `enable` of the same argument; nothing where there was none."""
    report = _report_of(_uncompiled(model))
    if report is not None:
        report.disable()


def _uncompiled(model):
    """The model below torch.compile, whose wrapper passes attributes on in part."""
    return getattr(model, "_orig_mod", model)


def _report_of(model) -> Report | None:
    return vars(model).get(_REPORT) if model is not None else next(iter(_classes), None)


def _put(report: Report, module, name: str, value) -> None:
    """Sets an attribute of the module for as long as the report lasts."""
    own = vars(module)
    report.undo.append(functools.partial(setattr, module, name, own[name]) if name in own else
                       functools.partial(_drop, module, name))
    setattr(module, name, value)


def _drop(module, name: str) -> None:
    vars(module).pop(name, None)


def _take(report: Report, module, **attributes) -> None:
    """Gives the module its decision, which from now on is the report's alone."""
    decided.discard(module)
    _switched.add(module)
    report.undo.append(functools.partial(_leave, module))
    for name, value in attributes.items():
        _drop(module, name)
        _put(report, module, name, value)


def _leave(module) -> None:
    _switched.discard(module)
    if _classes:
        decided.add(module)  # for it will be, when it runs again


def _transformers():
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError("transformers is not installed here: pip install transformers") from error


def _interfaces():
    from transformers.integrations import finegrained_fp8, moe

    return moe.ALL_EXPERTS_FUNCTIONS, finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS


def _register(report: Report) -> None:
    """Puts NAME into both experts interfaces."""
    report.undo += [_User(interface) for interface in _interfaces()]


def _forget() -> None:
    """Takes the decisions back that were made when modules first ran; those built for NAME run DEFAULT."""
    for module in forget():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == NAME and NAME not in _interface_of(module):
            config._experts_implementation = DEFAULT


class _User:
    """One that needs NAME in an interface, until it is called. The last to leave takes it out, for which interfaces
    have no method. A copy, which a deep copy of a model has in its report, is a user of its own."""

    def __init__(self, interface):
        self.interface = interface
        if NAME not in interface:
            interface.register(NAME, experts_forward(interface))
        self.users = interface._global_mapping[NAME].users
        self.users.append(self)

    def __call__(self) -> None:
        self.users[:] = [user for user in self.users if user is not self]
        if not self.users:
            del self.interface._global_mapping[NAME]

    def __deepcopy__(self, memo) -> "_User":
        return _User(self.interface)


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
        found.forward = router_forward(family, own)
        report.rows.append(Row(f"{package}.{name}", name, "moe.topk", "chosen when a module first runs",
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
            place = _place(module) if through == "forward" else "forward"
            if getattr(module, place) != MethodType(type(module).forward, module):
                raise Declined("its forward is set already, by another than the registry")
            call, row = router_call(module, family)
        except Declined as declined:
            report.rows.append(_stays(name, module, "moe.topk", str(declined)))
            continue
        report.rows.append(_serves(name, module, row))
        served[module] = family
        _take(report, module, **{CALL: call})
    if through == "kernels":
        _kernelize(report, model, served)
        return
    for module, family in served.items():
        ours = MethodType(router_forward(family, modules.own_forward(type(module))), module)
        place = _place(module)
        report.undo.append(functools.partial(_own_again, module, ours, getattr(module, place)))
        setattr(module, place, ours)


def _place(module) -> str:
    """The attribute with what a module runs: hooks of accelerate, which take a forward's place, keep it in another."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def _own_again(module, ours, own) -> None:
    """Puts its own forward where ours is by now: hooks that came or went since have moved it."""
    if vars(module).get("_old_forward") == ours:
        module._old_forward = own
    if vars(module).get("forward") == ours:
        _drop(module, "forward")


def _kernelize(report: Report, model, served: dict) -> None:
    """The routers' forward, set by Hugging Face's `kernels` as it sets those of the Hub."""
    import kernels

    mode, mapping = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, {}
    for cls, family in {type(module): family for module, family in served.items()}.items():
        layer = type(f"KernelRegistry{cls.__name__}", (torch.nn.Module,), {
            "forward": router_forward(family, modules.own_forward(cls)), "can_torch_compile": True,
            "has_backward": False})
        mapping[layer.__name__] = {next(model.parameters()).device.type: {mode: _Repository(layer)}}
        before = dict(vars(cls))
        kernels.replace_kernel_forward_from_hub(cls, layer.__name__)
        for name in [name for name, value in vars(cls).items() if before.get(name) is not value]:
            report.undo.append(functools.partial(setattr, cls, name, before[name]) if name in before else
                               functools.partial(delattr, cls, name))
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


# ---- experts ---------------------------------------------------------------------------------------------------------

def _switch_experts(report: Report, model) -> None:
    calls = {}
    for name, module in model.named_modules():
        if not modules.is_experts(module):
            if type(module).__name__.endswith("Experts"):
                report.rows.append(_stays(name, module, "moe.experts", "the experts interface does not reach it"))
            continue
        try:
            if not hasattr(model, "set_experts_implementation"):
                raise Declined(f"{type(model).__name__} is no model of transformers, whose interface could be set")
            modules.read_experts(module)  # before anything of it is changed
            for parameter in modules.lay_out(module):
                report.undo.append(functools.partial(_contiguous, parameter))
            calls[module], row = experts_call(module)
        except Declined as declined:
            calls[module] = None
            report.rows.append(_stays(name, module, "moe.experts", str(declined)))
            continue
        report.rows.append(_serves(name, module, row))
    if not any(call is not None for call in calls.values()):
        return
    before = model.get_experts_implementation()
    if NAME in before.values() and NAME in _interfaces()[0] and not _classes:
        raise ValueError(f"the config of this {type(model).__name__} is also that of another model that is switched "
                         "on: give each its own")
    report.undo.append(functools.partial(_without_name, model))
    _register(report)
    report.undo.append(functools.partial(model.set_experts_implementation, before))
    for module, call in calls.items():
        said = module.config._experts_implementation
        own = own_experts(_interface_of(module), module, DEFAULT if said == NAME else said)
        _take(report, module, **{CALL: call, OWN: own})
    model.set_experts_implementation(NAME)
    astray = [module for module, call in calls.items() if call and module.config._experts_implementation != NAME]
    if astray:
        raise RuntimeError(f"transformers did not switch {type(astray[0]).__name__} of {type(model).__name__} to "
                           f"experts_implementation={NAME!r}; enable the submodel that it is in")


def _interface_of(module):
    """Which of the two interfaces dispatches this module: it is in the decorator's closure of its forward."""
    cells = inspect.getclosurevars(type(module).forward).nonlocals
    return cells.get("experts_interface", _interfaces()[0])


def _without_name(model) -> None:
    """A model built for NAME runs what transformers runs where nothing is said, once nobody else knows NAME."""
    said = model.get_experts_implementation()
    if NAME in said.values() and NAME not in _interfaces()[0]:
        model.set_experts_implementation({key: DEFAULT if value == NAME else value for key, value in said.items()})


def _contiguous(parameter) -> None:
    parameter.data = parameter.data.contiguous()


def _serves(name: str, module, row: PlanRow) -> Row:
    return Row(name, type(module).__name__, row.op, row.implementation, row.why)


def _stays(name: str, module, op: str, why: str) -> Row:
    return Row(name, type(module).__name__, op, None, why)
