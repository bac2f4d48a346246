"""Tensors that share a parameter's storage, found wherever they are, and named.

Giving a parameter another dtype gives it another storage. A view that somebody took before, such as `bias[0]`, keeps
the old one: it would go on to have the old dtype, and miss every later load.
"""

from __future__ import annotations

import gc
from types import CellType, FrameType

import torch


def views(parameters, root) -> list[str]:
    """What else shares storage with any of `parameters` (name -> tensor), each as "NAME is a view of PARAMETER".
    `root` is the module by whose paths those that its modules hold are named, or None."""
    frozen, others = gc.get_freeze_count(), len(gc.get_objects())
    gc.unfreeze()  # servers freeze for shorter collections, and what is frozen is in no list of the collector
    try:
        return _views(parameters, root)
    finally:
        if frozen > others:  # a server's; Python itself has some hundred of its own frozen from 3.12 on
            gc.freeze()


def _views(parameters, root) -> list[str]:
    found = _sharing(parameters)
    if found:  # what only a cycle of garbage holds is nobody's
        found.clear()
        gc.collect()
        found = _sharing(parameters)
    places = {}
    for path, module in (root.named_modules() if isinstance(root, torch.nn.Module) else ()):
        prefix = f"{path}." if path else ""
        places |= {id(holder): prefix for holder in (module, vars(module), module._parameters, module._buffers)}
    told = []
    for view, name in found:  # no generator, which would be a holder of the view
        told.append(f"{_name(view, found, places)} is a view of {name}")
    return sorted(told)


def _sharing(parameters) -> list[tuple[torch.Tensor, str]]:
    owners = {}  # storage -> the parameter that is first to have it: a second one is a view of it like any other
    for name, parameter in parameters.items():
        owners.setdefault(_storage(parameter), (parameter, name))
    everything = gc.get_objects()
    kinds = {kind for kind in {*map(type, everything)} if issubclass(kind, torch.Tensor)}  # asked once of each type:
    tensors = [item for item in everything if type(item) in kinds]  # there may be millions of objects
    del everything
    pairs = ((item, owners.get(_storage(item))) for item in tensors)
    return [(item, owner[1]) for item, owner in pairs if owner and item is not owner[0]]


def _storage(tensor) -> int | None:
    """Which storage a tensor has; also on the meta device, where all addresses are 0. None for one without, which a
    bias is not."""
    try:
        return tensor.untyped_storage()._cdata
    except Exception:  # sparse ones, lazy ones, and whatever else somebody's subclass raises: they have none to share
        return None


def _name(view, found, places) -> str:
    """Where `view` is held: a path under the root, an attribute, a variable of a function, or what it looks like."""
    ours = {id(found), *(id(pair) for pair in found)}
    names = []
    for holder in gc.get_referrers(view):
        if id(holder) in ours or isinstance(holder, CellType) or (  # a cell has no name, and this function has some
                isinstance(holder, FrameType) and holder.f_code.co_filename == __file__):
            continue
        if isinstance(holder, FrameType):
            key = next((k for k, v in holder.f_locals.items() if v is view), None)
            names.append((2, f"the variable {key} of {holder.f_code.co_name}" if key else ""))
            continue
        if isinstance(holder, (list, tuple)):
            place = next(i for i, v in enumerate(holder) if v is view)
            names += [(1, f"{path}[{place}]") for path in _paths(holder, places)]
            names.append((3, f"item {place} of a {type(holder).__name__}"))
            continue
        items = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        key = next((k for k, v in items.items() if v is view), None)
        if key is None:
            names.append((3, f"what a {type(holder).__name__} holds"))
            continue
        if id(holder) in places:
            names.append((0, f"{places[id(holder)]}{key}"))
        elif isinstance(holder, dict):
            names += [(1, f"{path}[{key!r}]") for path in _paths(holder, places)] or [(2, f"{key!r} in a dict")]
            owners = (o for o in gc.get_referrers(holder) if getattr(o, "__dict__", None) is holder)
            names += [(1, f"{getattr(owner, '__name__', type(owner).__name__)}.{key}") for owner in owners]
        else:
            names.append((1, f"{type(holder).__name__}.{key}"))
    best = min((name for name in names if name[1]), default=(4, f"a tensor {list(view.shape)} {view.dtype}"))
    return best[1]


def _paths(container, places) -> list[str]:
    """The paths under which modules of the root hold a list, tuple or dict."""
    out = []
    for holder in gc.get_referrers(container):
        if id(holder) in places:
            items = holder if isinstance(holder, dict) else vars(holder)
            out += [f"{places[id(holder)]}{key}" for key, value in items.items() if value is container]
    return out
