"""The settings that switch adapters on in runtimes that load plugins by themselves: KERNEL_REGISTRY_SGLANG=1 and so on.

Such a runtime calls every installed plugin, in each of its processes. Installing the package must not change what a
server runs, so an adapter does nothing unless its setting says so.
"""

from __future__ import annotations

import os


def switched_on(variable: str) -> bool:
    """Whether the environment sets it to 1. Raises ValueError for what is neither 1 nor 0 nor unset."""
    said = os.environ.get(variable, "")
    if said not in ("", "0", "1"):
        raise ValueError(f"{variable}={said!r}, expected 1 (on) or 0 (off)")
    return said == "1"
