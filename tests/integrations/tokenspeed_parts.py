"""tokenspeed-kernel: the whole of it on a GPU with all of its libraries, else its facade `moe_topk` with everything
that routes behind it, as it is: its registry, its selection, its kernels.

Its packages import every kernel there is, for which they need a GPU and native libraries, made for one version of
torch. Without these, two packages are empty ones with the real paths, so that modules are imported one by one, and
three modules are left out, which hold experts. Without a GPU the platform is a faked H200.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch

LIBRARIES = ("cutlass", "flashinfer", "deep_ep", "deep_gemm", "trtllm_kernel")  # what its packages can't do without
EMPTY = ("", ".ops")
LEFT_OUT = (".ops.moe.deep_gemm", ".ops.moe.flashinfer", ".ops.moe.marlin")
MODULES = dict(
    platform="platform", registry="registry", selection="selection", signature="signature", plugins="plugins",
    moe="ops.moe", sigmoid="ops.moe.sigmoid_topk", softmax="ops.moe.softmax_topk", native="ops.moe.native",
    minimax="ops.moe.triton.minimax_topk")


def load() -> SimpleNamespace:
    """The modules by the names above."""
    (root,) = importlib.util.find_spec("tokenspeed_kernel").submodule_search_locations
    whole = torch.cuda.is_available() and all(map(importlib.util.find_spec, LIBRARIES))
    for suffix in () if whole else (*EMPTY, *LEFT_OUT):
        package = ModuleType(f"tokenspeed_kernel{suffix}")
        package.__path__ = [root + suffix.replace(".", "/")]
        sys.modules[package.__name__] = package
    if not torch.cuda.is_available():
        fake(importlib.import_module("tokenspeed_kernel.platform"), "nvidia", 9, 0)
    return SimpleNamespace(**{name: importlib.import_module(f"tokenspeed_kernel.{module}")
                              for name, module in MODULES.items()})


def unload() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tokenspeed_kernel"]:
        del sys.modules[name]


def fake(platform: ModuleType, vendor: str, major: int, minor: int) -> None:
    platform.Platform.override(platform.PlatformInfo(
        vendor=vendor, arch_version=platform.ArchVersion(major, minor), device_name=f"a faked {vendor}", device_count=1,
        total_memory=1 << 37, memory_bandwidth=4800.0, sm_count=132, max_threads_per_sm=2048,
        max_shared_memory_per_sm=1 << 17))
