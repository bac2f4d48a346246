"""The registry's kernels in vLLM: routing and unquantised experts, in every process of an engine.

    KERNEL_REGISTRY_VLLM=1 vllm serve MODEL     # or routing, or experts, for one of the two; unset or 0: off

The package's entry point in `vllm.general_plugins` is `plugin`, which vLLM calls in each of its processes before it
builds a model. It sets two seams and touches nothing else of vLLM:

- the router factory (routing.py): a router keeps its class's EPLB mapping, capture, padding and dtypes, and only the
  routing itself is the registry's;
- `UnquantizedFusedMoEMethod.register_oot` (experts.py): experts that write into the output buffer that vLLM brings.

What the registry does not serve stays with vLLM. One log line for each outcome says so when a model is loaded, and
`report()` in the process that has the model; from outside of it:

    llm = LLM(..., worker_extension_cls="kernel_registry.integrations.vllm.Worker")
    print(llm.collective_rpc("kernel_registry_report")[0])

vLLM is imported when the plugin is switched on, not before.
"""

from __future__ import annotations

import os

from ..report import Report

SETTING = "KERNEL_REGISTRY_VLLM"
_PARTS = {"1": ("routing", "experts"), "routing": ("routing",), "experts": ("experts",), "0": (), "": ()}
_undo: dict = {}  # by part, in the order in which they were switched on


def plugin() -> None:
    """What vLLM calls in each of its processes: `enable` for what the environment says."""
    said = os.environ.get(SETTING, "")
    if said not in _PARTS:
        raise ValueError(f"{SETTING}={said!r}, expected one of {', '.join(name for name in _PARTS if name)}")
    if _PARTS[said]:
        enable(*_PARTS[said])


def enable(*parts: str) -> None:
    """Switches on what models built from now on use: "routing", "experts", or without arguments both. What is on stays
    on. Whole or not at all: on an error nothing of this call is left."""
    unknown = [part for part in parts if part not in _PARTS["1"]]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no part of it, expected {' or '.join(_PARTS['1'])}")
    wanted = [part for part in dict.fromkeys((*(parts or _PARTS["1"]), "caching")) if part not in _undo]
    if not wanted:
        return
    from ... import torch_ops  # noqa: F401  reads the registry's files, whose errors are no fault of vLLM's

    try:
        from . import caching, experts, routing
    except (ImportError, AttributeError) as error:  # another vLLM may lack a module, or a name in one
        raise ImportError(f"kernel_registry can't be switched on in this vLLM ({type(error).__name__}: {error}): it "
                          f"was tried with 0.32 and 0.33; without {SETTING} vLLM runs without it") from error
    switches = {"routing": routing.switch, "experts": experts.switch, "caching": caching.switch}
    try:
        for part in wanted:
            _undo[part] = switches[part]()
    except BaseException:
        _disable(wanted)
        raise


def disable() -> None:
    """Models built from now on are vLLM's again; those that are built stay as they are."""
    _disable([*_undo])


def _disable(parts: list[str]) -> None:
    for part in reversed(parts):
        if part in _undo:
            _undo.pop(part)()


def report() -> Report:
    """What each router and each layer's experts of this process's models run, and why, as the registry decides now."""
    from .choosing import asked

    return Report("vLLM", [module.row() for module in asked])


class Worker:
    """For vLLM's `worker_extension_cls`: methods of every worker, to be called with `collective_rpc`."""

    def kernel_registry_report(self) -> str:
        """`report()` of this worker."""
        return str(report())

    def kernel_registry_reload(self) -> str:
        """Reads the override files again in this worker, whose kernels follow; returns the report after it. A captured
        graph keeps the kernels that it was captured with."""
        from ... import registry

        registry.reload()
        return str(report())
