"""vLLM's cache of compiled models, told about the plugin.

vLLM keeps compiled models on disk and finds them by its settings and by the sources that were traced. Neither tells a
model that was compiled without this plugin, whose graph (on a CPU, where vLLM traces the routing too) would run without
the registry's kernels. The settings that count are the entries of `vllm.envs.environment_variables`: one more of them
says what the plugin serves here.
"""

from __future__ import annotations

import functools

from vllm import envs

from . import SETTING
from .choosing import asked


def switch():
    """Adds the entry; returns the undo."""
    envs.environment_variables[SETTING] = _served
    return functools.partial(envs.environment_variables.pop, SETTING, None)


def _served() -> list[str]:
    return [f"{module.op} {module.kind} {'vLLM' if module.declined else 'registry'}" for module in asked]
