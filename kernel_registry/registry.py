"""The registry: what users hold. Loads what exists, dispatches, explains, overrides, reloads, freezes.

Everything that can change (catalog, override layers, caches) hangs off one immutable-by-convention `State`. A change
builds a new state, decides anew for every live kernel, and only then swaps: if anything fails, nothing has changed.
A cached dispatch reads one ContextVar and one dict.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Mapping

if TYPE_CHECKING:  # the modules behind these names are imported on first use: importing the package stays cheap
    from pathlib import Path

    from .bound import BoundKernel
    from .captures import Capture
    from .catalog import Catalog
    from .explain import Explanation
    from .plan import Plan
    from .state import State
    from .traits.platform import Platform

_FAST_CACHE_LIMIT = 4096  # spellings of calls remembered; a caller that varies a trait per call can't grow it for ever


class Scope:
    """What the current context adds: override layers (innermost first), the active model, and its own cache."""

    __slots__ = ("layers", "model", "cache", "state", "outer")

    def __init__(self, layers: tuple = (), model: str | None = None, outer: "Scope | None" = None):
        self.layers, self.model, self.outer, self.cache, self.state = layers, model, outer, {}, None


class Registry:
    """Ops and implementations of one registry file, its plugins and its overrides.

    path        the registry file; None for the one shipped with the package
    plugins     whether installed plugins contribute (entry-point group kernel_registry.plugins)
    environment whether KERNEL_REGISTRY_OVERRIDES and KERNEL_REGISTRY_TILES name a further override and tiles file
    platform    the platform to decide for when a call names none; None to detect this machine's
    """

    def __init__(self, path: "str | Path | None" = None, *, plugins: bool = True, environment: bool = True,
                 platform: "str | Platform | None" = None):
        self._path, self._plugins, self._environment, self._given_platform = path, plugins, environment, platform
        self._files: tuple = ()
        self._tiles: tuple = ()
        self._plan: "Plan | None" = None
        self._captures: "dict[str, Capture]" = {}
        self._capturing = False
        self._lock = threading.RLock()
        self._scope: ContextVar[Scope | None] = ContextVar("kernel_registry_scope", default=None)
        self._state: "State | None" = None
        self._cache: dict = {}

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def dispatch(self, op: str, /, *, implementation: str | None = None, **traits) -> "BoundKernel":
        """The kernel that serves `op` for these traits, bound to them. Same traits, same object.

        Absent traits take their neutral value, an absent platform is this machine's, and absent dynamic traits
        (num_tokens, contiguous) are read off each call. `implementation` is the strictest override: that one, none
        of its variants, or an error.
        """
        scope = self._scope.get()
        cache = self._cache if scope is None else self._scoped_cache(scope)
        values = traits.values()
        try:  # types are part of the key because 1 == True == 1.0, and a wrong type must not hide behind a right one
            return cache[(op, implementation, *traits, *values, *map(type, values))]  # the parentheses are for 3.10
        except (KeyError, TypeError):
            pass
        return self._resolve(op, implementation, traits, scope)  # out here, so that its errors do not follow a KeyError

    def bind(self, op: str, /, *, implementation: str | None = None, **static_traits) -> "BoundKernel":
        """`dispatch` for model load: takes static traits only and leaves every dynamic one to a table made now."""
        from .errors import TraitError

        space = self.catalog.op(op).space
        given = [name for name in static_traits if name in space.dynamic]
        if given:
            raise TraitError(f"bind leaves {', '.join(given)} to the call", where=op, hint="drop it, or use dispatch")
        return self.dispatch(op, implementation=implementation, **static_traits)

    def prepare(self, op: str, subject: object, /, *, implementation: str | None = None, **traits):
        """`subject` (a module, a tensor, a mapping: what the op says) as the implementation that `dispatch` chooses for
        these traits takes it: made once, at load, and tagged. Keywords that are no traits go to the preparation.

        Returned as it is where the implementation declares no preparation. Kernels raise PreparationError for what has
        no tag, or that of another preparation."""
        from . import preparation

        owner = self.catalog.op(op)
        own = {name: traits.pop(name) for name in [*traits] if name not in owner.space.all}
        kernel = self.dispatch(op, implementation=implementation, **traits)
        return preparation.prepare(owner, kernel.table.winners(), kernel.request, subject, own)

    def explain(self, op: str, /, *, implementation: str | None = None, **traits) -> "Explanation":
        """The same selection, told: every candidate with every failing predicate, near misses, and what decided."""
        from .explain import explain

        state, scope = self.state, self._scope.get()
        owner = state.catalog.op(op)
        request = owner.space.request(traits, self.platform)
        return explain(owner, request, state.layers(scope, owner, implementation), state.tuned)

    def platform(self) -> "Platform":
        """The platform of calls that name none: the one given to the constructor, else this machine's."""
        return self.state.platform

    # ---- changing the choice -----------------------------------------------------------------------------------------

    def override(self, op: str, implementation: str, /, *, prefer: bool = False, **match) -> "Override":
        """`with registry.override(op, implementation, **match):` dispatches made inside use that implementation, for
        calls that `match` (values or the mappings of YAML: num_tokens={"max": 64}), or a variant of it where that goes
        first. Strict unless `prefer`. Right in threads and asyncio. Kernels bound before stay as they are."""
        return Override(self, "prefer" if prefer else "use", op, implementation, match)

    def disable(self, op: str, implementation: str, /, **match) -> "Override":
        """`with registry.disable(op, implementation, **match):` dispatches made inside never choose it, nor one
        of its variants."""
        return Override(self, "disable", op, implementation, match)

    def model(self, name: str) -> "Override":
        """`with registry.model("draft"):` also applies the override lines that say `model: draft`."""
        return Override(self, "model", "", name, {})

    def load_overrides(self, path: "str | Path", *, allow_targets: bool = False) -> "tuple[Capture, ...]":
        """Adds an override file, stronger than those loaded before. Kernels bound earlier follow; the captured graphs
        that can't are returned. Whole or not at all.

        A file may add implementations (arbitrary imports) only with `allow_targets=True`."""
        with self._lock:
            return self._swap(files=(*self._files, (str(path), allow_targets)))

    def load_tiles(self, path: "str | Path") -> "tuple[Capture, ...]":
        """Adds a tiles file, stronger than those loaded before and than the one beside the registry file. Kernels bound
        earlier follow; the captured graphs that can't are returned. Whole or not at all."""
        with self._lock:
            return self._swap(tiles=(*self._tiles, str(path)))

    def reload(self) -> "tuple[Capture, ...]":
        """Reads every file again and detects the platform again; kernels bound earlier follow; the captured graphs that
        can't are returned. Whole or not at all."""
        with self._lock:
            return self._swap()

    # ---- captured graphs ---------------------------------------------------------------------------------------------

    @contextmanager
    def capture(self, name: str):
        """`with registry.capture("decode, 16 tokens"), torch.cuda.graph(graph):` notes which kernels the graph holds,
        in the place of what was captured under that name before. Only a whole capture is noted."""
        from .captures import Capture, noted
        from .errors import CaptureError

        with self._lock:
            if self._capturing:
                raise CaptureError(f"{name!r} is captured inside another capture", hint="capture one after the other")
            state, self._capturing = self.state, True
            try:
                with noted(state) as calls:
                    yield
            finally:
                self._capturing = False
            self._captures[name] = Capture(name, tuple(calls.values()))

    def forget_capture(self, name: str) -> None:
        """For a graph that was freed: nothing is left that could replay what it held."""
        from .errors import UnknownNameError, suggestion

        if self._captures.pop(name, None) is None:
            raise UnknownNameError(f"nothing was captured as {name!r}", hint=suggestion(name, self._captures))

    @property
    def captures(self) -> "tuple[Capture, ...]":
        """What every graph that was captured under `capture` holds; `.outdated` tells what would run otherwise now."""
        return tuple(self._captures.values())

    # ---- freezing ----------------------------------------------------------------------------------------------------

    def freeze(self, *, batch_invariant: bool = False) -> "Plan":
        """Everything dispatched so far as a plan: canonical, diffable, loadable, with a fingerprint.

        Raises OverrideError for an override that no dispatched call matched and, with `batch_invariant`, PlanError
        where the choice, or a kernel's tile, depends on a dynamic trait and the kernels are not declared to agree bit
        for bit."""
        from .plan import freeze

        return freeze(self.state, batch_invariant=batch_invariant)

    def load_plan(self, plan: "Plan | str | Path", *, strict: bool = True) -> "tuple[Capture, ...]":
        """From now on, choices are the plan's. Raises PlanError, changing nothing, when an implementation is gone, its
        source changed, or it can't serve what the plan says. `strict`: a call that the plan does not hold raises.
        Returns the captured graphs that hold something else."""
        from dataclasses import replace

        from .plan import Plan

        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        with self._lock:
            return self._swap(plan=replace(plan, strict=strict))

    # ---- looking -----------------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> "Catalog":
        """Every op and implementation."""
        return self.state.catalog

    @property
    def state(self) -> "State":
        """The loaded state; reads the files on first use."""
        if self._state is None:
            with self._lock:
                if self._state is None:
                    self._swap()
        return self._state

    @property
    def kernels(self) -> "tuple[BoundKernel, ...]":
        """Every live kernel dispatched so far; of those that name a dynamic trait's value, the latest."""
        return tuple(self.state.kernels())

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _scoped_cache(self, scope: Scope) -> dict:
        if scope.state is not self._state:  # the scope outlived a reload
            scope.cache, scope.state = {}, self.state
        return scope.cache

    def _resolve(self, op: str, implementation: str | None, traits: Mapping[str, object],
                 scope: Scope | None) -> "BoundKernel":
        """The slow path: decide, import, bind, remember."""
        with self._lock:
            state = self.state
            owner = state.catalog.op(op)
            kernel = state.kernel(owner, owner.space.request(traits, self.platform), implementation, scope)
            cache = self._cache if scope is None else self._scoped_cache(scope)
            if len(cache) >= _FAST_CACHE_LIMIT:
                cache.clear()  # the state remembers kernels by their canonical traits: same traits, same object, still
            cache[(op, implementation, *traits, *traits.values(), *map(type, traits.values()))] = kernel
            return kernel

    def _swap(self, files: tuple | None = None, plan: "Plan | None" = None, tiles: tuple | None = None
              ) -> "tuple[Capture, ...]":
        """Builds a new state, moves every live kernel over, then replaces the old state; on any error, nothing."""
        from .errors import CaptureError
        from .state import State

        if self._capturing:
            raise CaptureError("files can't be read again while a capture is noted", hint="reload after the capture")

        files, plan = self._files if files is None else files, plan or self._plan
        tiles = self._tiles if tiles is None else tiles
        fresh = State.load(self._path, files, plan, plugins=self._plugins, environment=self._environment,
                           platform=self._given_platform, tiles=tiles)
        moves = fresh.adopt(self._state.kernels()) if self._state is not None else []
        for kernel, *choice in moves:
            kernel.set(*choice)
        self._files, self._tiles, self._plan, self._state, self._cache = files, tiles, plan, fresh, {}
        return tuple(capture for capture in self.captures if capture.outdated)


class Override:
    """A context manager over the registry's ContextVar. The rule is checked when it is made, not when it is entered."""

    def __init__(self, registry: Registry, action: str, op: str, implementation: str, match: Mapping[str, object]):
        self._registry, self._layer, self._model, self._entered = registry, None, None, True
        if action == "model":
            self._model = implementation
        else:
            from .overrides import Layer, make_rule

            where = f"registry.{'disable' if action == 'disable' else 'override'}({op!r}, {implementation!r})"
            rule = make_rule(registry.catalog, action, op, implementation, match, where=where, layer="context")
            self._layer = Layer("context", {op: (rule,)})
        self._entered = False  # only now: one that could not be made needs no warning that it was not entered

    def __enter__(self) -> Registry:
        outer = self._registry._scope.get()
        layers = outer.layers if outer else ()
        model = self._model or (outer.model if outer else None)
        # What to go back to is kept in the context, not here: several threads may be inside one Override.
        self._registry._scope.set(Scope((self._layer, *layers) if self._layer else layers, model, outer))
        self._entered = True
        return self._registry

    def __exit__(self, *exc) -> None:
        self._registry._scope.set(self._registry._scope.get().outer)

    def __del__(self):
        if not getattr(self, "_entered", True):
            import warnings

            warnings.warn("an override that is not entered with `with` has no effect", RuntimeWarning, stacklevel=2)


registry = Registry()
