"""What a test of SGLang's engine installs beside the registry: a platform on which it runs on any CPU, and witnesses.

SGLang runs on CPUs with a build of sgl_kernel that no package index has. Its platform plugins are the way around: here
every layer takes its torch code ("native"). The witnesses append a line to the file named by KR_SGLANG_TEST_TRACE, from
whatever process they are in: one for each routing of SGLang's, one for each call of the registry's kernel.
"""

import os
from pathlib import Path

ENTRY_POINTS = {
    "sglang.srt.platforms": {"torch_cpu": "kr_sglang_test:platform"},
    "sglang.srt.plugins": {"witness": "kr_sglang_test:witness"},
    "kernel_registry.plugins": {"counted": "kr_sglang_test:registry_files"},
}


def platform() -> str:
    """The platform class, by name; SGLang imports it when it is chosen (SGLANG_PLATFORM=torch_cpu)."""
    return "kr_sglang_test.platform:TorchCpu"


def witness() -> None:
    """Counts SGLang's routings, whoever computes them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.layers.moe.topk.select_experts", lambda *_, **__: trace("routing"),
                          HookType.BEFORE)


def registry_files() -> Path:
    """A moe.topk that counts its calls, for the registry's own plugin mechanism."""
    return Path(__file__).with_name("registry.yaml")


def trace(line: str) -> None:
    with open(os.environ["KR_SGLANG_TEST_TRACE"], "a") as file:
        file.write(line + "\n")
