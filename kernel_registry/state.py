"""One loaded state of a registry: catalog, override layers, and the kernels dispatched from them."""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence
from weakref import WeakValueDictionary

from .bound import BoundKernel, make_call
from .catalog import Catalog, Op, build
from .contract import Request
from .document import paused_collection, read
from .errors import CaptureError, DocumentError, OverrideError, RegistryError
from .overrides import Layer, pinned, read_layer
from .plugins import PluginFailure, plugin_sources
from .schema import OverrideFile, RegistryFile, validate
from .selection import Table, table
from .tiles import Tiling, Tuned, files as tiles_files
from .traits.platform import Platform, detect

ENVIRONMENT_VARIABLE = "KERNEL_REGISTRY_OVERRIDES"
_LATEST = 1024  # kernels of calls that name a dynamic trait's value are remembered that long while nobody holds them


class State:
    """Immutable but for its memory of kernels."""

    def __init__(self, catalog: Catalog, layers: tuple[Layer, ...], platform: Platform,
                 plugin_failures: tuple[PluginFailure, ...] = (), plan=None, *, detected: bool = False,
                 tuned: Tuned | None = None):
        self.catalog, self.file_layers, self.platform = catalog, layers, platform
        self.plugin_failures, self._detected = plugin_failures, detected
        self.tuned = tuned or Tuned(catalog)
        self._plan_layer = plan.layer(catalog) if plan is not None else None
        self._kept: dict[tuple, BoundKernel] = {}  # kernels of plain dispatches live as long as the state
        self._used: WeakValueDictionary[tuple, BoundKernel] = WeakValueDictionary()  # the others, as long as used
        self._latest: deque[BoundKernel] = deque(maxlen=_LATEST)  # of those, the last to name a dynamic trait

    @classmethod
    @paused_collection()
    def load(cls, path: str | Path | None, files: Iterable[tuple[str, bool]], plan, *, plugins: bool,
             environment: bool, platform: str | Platform | None, tiles: Sequence[str] = ()) -> "State":
        """Reads, validates and orders everything, the shipped tiles excepted, which are read when a kernel first asks;
        raises before anything is kept."""
        from . import shipped_registry

        path = path or shipped_registry()
        document = read(path)
        sources = [(document, validate(RegistryFile, document).ops)]
        failures: tuple[PluginFailure, ...] = ()
        if plugins:
            sources, failures = plugin_sources(sources)
        overrides = []
        for name, allow_targets in files:
            overrides.append((f"file {name}", *_override_file(name, allow_targets)))
        named = os.environ.get(ENVIRONMENT_VARIABLE) if environment else None
        if named:
            try:
                overrides.append((f"environment {ENVIRONMENT_VARIABLE}", *_override_file(named, allow_targets=False)))
            except DocumentError as error:
                raise DocumentError(f"{error.message} (the override file that {ENVIRONMENT_VARIABLE} names)",
                                    where=error.where, hint=error.hint) from error
        sources += [(document, parsed.ops) for _, document, parsed in overrides if parsed.ops]
        catalog = build(sources)
        layers = tuple(read_layer(catalog, document, parsed.overrides, name)
                       for name, document, parsed in reversed(overrides))
        here = Platform.parse(platform) if platform is not None else detect()
        tuned = Tuned(catalog, tiles_files(path, tiles, environment))
        if tiles:  # somebody asked for this file now, and learns now what is wrong with it
            tuned.read()
        return cls(catalog, layers, here, failures, plan.checked(catalog, tuned) if plan is not None else None,
                   detected=platform is None, tuned=tuned)

    def layers(self, scope, op: Op, implementation: str | None = None) -> tuple[Layer, ...]:
        """Every layer that applies, strongest first."""
        call = (pinned(op.implementation(implementation)),) if implementation is not None else ()
        context = scope.layers if scope else ()
        model = scope.model if scope else None
        scoped = (layer.scoped(model) for layer in self.file_layers) if model is not None else ()
        plan = (self._plan_layer.scoped(model),) if self._plan_layer is not None else ()
        general = (layer.scoped(None) for layer in self.file_layers)
        return (*call, *context, *filter(None, (*plan, *scoped, *general)))

    def kernel(self, op: Op, request: Request, implementation: str | None, scope) -> BoundKernel:
        """The kernel for a canonical request, made on first use."""
        if implementation is not None:
            op.implementation(implementation)
        key = self._key(op, request, implementation, scope)
        kernel = self._kept.get(key) or self._used.get(key)
        if kernel is None:
            _refuse_capture(request)
            kernel = BoundKernel.of(request, (implementation, scope), *self._decide(op, request, implementation, scope))
            self._remember(key, kernel, op, request, scope)
        return kernel

    def _key(self, op: Op, request: Request, implementation: str | None, scope) -> tuple:
        """Same key, same object. Where the platform is detected, a call that names it is another than one that does
        not: a reload may find another platform, and only the latter follows."""
        context = (scope.layers, scope.model) if scope else ((), None)
        follows = request.detected and self._detected
        return op.name, implementation, context, tuple(request.traits.values()), request.open, follows

    def _remember(self, key: tuple, kernel: BoundKernel, op: Op, request: Request, scope) -> None:
        """For good, but for what comes anew with each context, or with each value of a dynamic trait such as
        num_tokens: a server that names it in every call must not fill the memory."""
        in_context = scope is not None and bool(scope.layers)
        if not in_context and request.open == op.space.dynamic:
            self._kept[key] = kernel
            return
        self._used[key] = kernel
        if not in_context:
            self._latest.append(kernel)

    def kernels(self) -> list[BoundKernel]:
        return [*self._kept.values(), *self._used.values()]

    def adopt(self, kernels: Iterable[BoundKernel]
              ) -> list[tuple[BoundKernel, Request, Table, Callable, Mapping[str, Tiling]]]:
        """What each of another state's kernels becomes here. Remembers them under this state's keys."""
        moves = []
        for kernel in kernels:
            implementation, scope = kernel.context
            try:
                op = self.catalog.op(kernel.op)
                given = {name: value for name, value in kernel.request.traits.items() if name in op.space.traits
                         and not (kernel.request.detected and op.space.traits[name].type == "platform")}
                request = op.space.request(given, lambda: self.platform)
                moves.append((kernel, request, *self._decide(op, request, implementation, scope)))
            except RegistryError as error:
                raise type(error)(f"{error.message} (asked for a kernel in use, {kernel!r})", where=error.where,
                                  hint=error.hint) from error
            self._remember(self._key(op, request, implementation, scope), kernel, op, request, scope)
        return moves

    def _decide(self, op: Op, request: Request, implementation: str | None, scope
                ) -> tuple[Table, Callable, Mapping[str, Tiling]]:
        layers = self.layers(scope, op, implementation)
        decided = table(op, request, layers)
        tilings = self.tilings(op, request, decided, ask_torch=True)
        return decided, make_call(op, request, decided, {}, tilings), tilings

    def tilings(self, op: Op, request: Request, decided: Table, ask_torch: bool = False) -> dict[str, Tiling]:
        """Where tiles come from, of each implementation in the table that takes any, by its name."""
        return {name: self.tuned.tiling(op, op.by_name[name], request.traits, ask_torch=ask_torch)
                for name in decided.winners() if op.by_name[name].tiles}


def _override_file(name: str, allow_targets: bool):
    document = read(name)
    parsed = validate(OverrideFile, document)
    if parsed.ops and not allow_targets:
        raise OverrideError("adds implementations, which means imports of its choosing", where=document.where(("ops",)),
                            hint="load_overrides(path, allow_targets=True), or move `ops` to a registry file")
    for index, entry in enumerate(parsed.overrides):
        if "python" in entry.when and not allow_targets:
            raise OverrideError("matches with `python`, which means an import of its choosing",
                                where=document.where(("overrides", index, "when", "python")),
                                hint="load_overrides(path, allow_targets=True), or say it with values and relations")
    return document, parsed


def _refuse_capture(request: Request) -> None:
    """A dispatch decided inside CUDA-graph capture would import, compile and allocate there: say so instead."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # absent also while torch is still being imported
    if cuda is not None and cuda.is_available() and cuda.is_current_stream_capturing():
        raise CaptureError(f"{request} was not dispatched before CUDA-graph capture began",
                           hint="dispatch or bind it once, and run it once, before capturing")
