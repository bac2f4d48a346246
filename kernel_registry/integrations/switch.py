"""The one setting that switches adapters on in runtimes that load plugins by themselves.

    KERNEL_REGISTRY_RUNTIMES=sglang             # or sglang,tokenspeed

Such a runtime calls every installed plugin, in each of its processes. Installing the package must not change what a
server runs, so an adapter does nothing unless its runtime is named here.
"""

from __future__ import annotations

import os

from ..errors import UnknownNameError, suggestion

VARIABLE = "KERNEL_REGISTRY_RUNTIMES"
RUNTIMES = ("sglang", "tokenspeed", "vllm")


def switched_on(runtime: str) -> bool:
    """Whether the setting names this runtime. Raises UnknownNameError where it names something else."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in named:
        if name not in RUNTIMES:
            raise UnknownNameError(f"{VARIABLE} names {name!r}", hint=suggestion(name, RUNTIMES))
    return runtime in named
