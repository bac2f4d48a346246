"""tokenspeed-kernel on a machine without a GPU: its registry, its selection and its routing facades, on a faked H200.

Its packages import every kernel there is, for which they need a GPU. Here they are empty packages with the real paths,
so that the modules in question are imported one by one, as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

PACKAGES = ("", ".ops", ".ops.moe", ".ops.moe.triton", ".ops.moe.gluon")
MODULES = dict(
    platform="platform", registry="registry", selection="selection", signature="signature", plugins="plugins",
    sigmoid="ops.moe.sigmoid_topk", softmax="ops.moe.softmax_topk", native="ops.moe.native",
    minimax="ops.moe.triton.minimax_topk", kimi="ops.moe.triton.kimi3_sigmoid_topk",
    softplus="ops.moe.triton.sqrt_softplus_topk")


def load() -> SimpleNamespace:
    """The modules by the names above, on a faked H200."""
    (root,) = importlib.util.find_spec("tokenspeed_kernel").submodule_search_locations
    for suffix in PACKAGES:
        package = ModuleType(f"tokenspeed_kernel{suffix}")
        package.__path__ = [root + suffix.replace(".", "/")]
        sys.modules[package.__name__] = package
    platform = importlib.import_module("tokenspeed_kernel.platform")
    fake(platform, "nvidia", 9, 0)
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
