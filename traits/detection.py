"""Finding out which machine this is, without importing torch or triton and without initialising CUDA or HIP (a process
that has done so can't fork), and without ever raising: what can't be read is reported in words, and the answer is cpu.

Asked in this order:

1. TRITON_INTERPRET, as Triton reads it: the interpreter.
2. torch, only if it is imported and has already initialised its device: the current device.
3. NVIDIA: the driver's management library (NVML), with CUDA_VISIBLE_DEVICES.
4. AMD: the kernel driver's topology files, with ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES.

NVML counts devices in PCI order; CUDA does too only under CUDA_DEVICE_ORDER=PCI_BUS_ID. On a machine with different
GPUs, set that, or name the device by its UUID, or give the registry its platform.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Callable, Mapping, NamedTuple

from .platform import Platform

_NO_DEVICES = ("", "-1", "none", "void", "nodevfiles")
_TRUE = ("1", "true", "yes", "on", "y")  # as triton.knobs reads an environment switch


class Gpu(NamedTuple):
    """A device as its driver lists it; `platform` is None for one that is present but could not be read. `name` is what
    torch calls it, "" where only torch could tell."""

    uuid: str
    platform: Platform | None
    name: str = ""


def look(*world, **more) -> tuple[Platform, str]:
    """The platform and the reason in words. The arguments are those of `find`."""
    found, reason = find(*world, **more)
    return found.platform, reason


def find(environ: Mapping[str, str] | None = None, modules: Mapping[str, object] | None = None,
         load_nvml: Callable[[], object] | None = None,
         topology: str | os.PathLike = "/sys/class/kfd/kfd/topology/nodes",
         kfd: str | os.PathLike = "/dev/kfd") -> tuple[Gpu, str]:
    """The device and the reason in words. The arguments are the world, for tests: the environment, the imported
    modules, what loads NVML (a ctypes library; OSError when there is none), AMD's topology folder and device file."""
    environ = os.environ if environ is None else environ
    modules = sys.modules if modules is None else modules
    reasons = []
    for step in (lambda: _interpreter(environ), lambda: _torch(modules),
                 lambda: _nvidia(environ, load_nvml or _load_nvml), lambda: _amd(environ, Path(topology), kfd)):
        try:
            found, reason = step()
        except Exception as error:  # a driver may fail in any way, and a machine that can't be read is a cpu
            found, reason = None, f"{type(error).__name__}: {error}"
        if found is not None:
            return found, reason
        if reason:
            reasons.append(reason)
    return Gpu("", Platform("cpu"), "cpu"), "; ".join(reasons) or "no GPU was found"


def _interpreter(environ) -> tuple[Gpu | None, str]:
    value = environ.get("TRITON_INTERPRET", "")
    if value.lower() in _TRUE:
        return Gpu("", Platform("interpreter"), "interpreter"), f"TRITON_INTERPRET={value}"
    return None, ""


def _torch(modules) -> tuple[Gpu | None, str]:
    cuda = getattr(modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None, ""
    properties = cuda.get_device_properties(cuda.current_device())
    if getattr(modules["torch"].version, "hip", None):
        name = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
        return Gpu("", Platform.parse(name), getattr(properties, "name", "")), f"torch's current device is {name}"
    platform = Platform("cuda", (int(properties.major), int(properties.minor)))
    return Gpu("", platform, properties.name), f"torch's current device is {properties.name}"


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------

def _load_nvml():
    import ctypes

    return ctypes.CDLL("libnvidia-ml.so.1")


def _nvidia(environ, load_nvml) -> tuple[Gpu | None, str]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and _first(visible) in _NO_DEVICES:
        return None, f"CUDA_VISIBLE_DEVICES={visible!r} hides every NVIDIA GPU"
    try:
        library = load_nvml()
    except OSError:
        return None, "no NVIDIA driver (NVML is not installed)"
    _call(library, "nvmlInit_v2")
    try:
        return _choose(_nvml_devices(library), visible, "CUDA_VISIBLE_DEVICES", "NVML",
                       lambda uuid: _nvml_parent(library, uuid))
    finally:
        library.nvmlShutdown()


def _nvml_devices(library) -> list[Gpu]:
    import ctypes

    count = ctypes.c_uint()
    _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        try:
            handle = ctypes.c_void_p()
            _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            gpus.append(_nvml_device(library, handle))
        except NvmlError:  # one device that fell off the bus keeps its index and hides none of the others
            gpus.append(Gpu("", None))
    return gpus


def _nvml_device(library, handle) -> Gpu:
    import ctypes

    major, minor = ctypes.c_int(), ctypes.c_int()
    uuid, name = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    _call(library, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    _call(library, "nvmlDeviceGetUUID", handle, uuid, ctypes.c_uint(96))
    try:
        _call(library, "nvmlDeviceGetName", handle, name, ctypes.c_uint(96))
    except (NvmlError, AttributeError):  # the architecture is what matters
        pass
    return Gpu(uuid.value.decode("ascii", "replace"), Platform("cuda", (major.value, minor.value)),
               name.value.decode("ascii", "replace"))


def _nvml_parent(library, mig_uuid: str) -> Gpu:
    """The GPU that a MIG instance ("MIG-<uuid>") is a part of."""
    import ctypes

    instance, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _call(library, "nvmlDeviceGetHandleByUUID", ctypes.c_char_p(mig_uuid.encode()), ctypes.byref(instance))
    _call(library, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", instance, ctypes.byref(handle))
    return _nvml_device(library, handle)


class NvmlError(Exception):
    """An NVML function that returned something other than success."""


def _call(library, function: str, *arguments) -> None:
    code = getattr(library, function)(*arguments)
    if code != 0:
        raise NvmlError(f"{function} failed with code {code}")


# ---- AMD -------------------------------------------------------------------------------------------------------------

def _amd(environ, topology: Path, kfd) -> tuple[Gpu | None, str]:
    gpus = _kfd_devices(topology)
    if not gpus:
        return None, "no AMD GPU" + ("" if topology.is_dir() else " (no amdgpu driver)")
    if not os.access(kfd, os.R_OK | os.W_OK):  # in a container /sys shows the host's devices, whether lent or not
        return None, f"{len(gpus)} AMD GPU in {topology}, but this process may not open {kfd}"
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    for variable in ("ROCR_VISIBLE_DEVICES", hip):  # HIP counts within what ROCR leaves
        visible = environ.get(variable)
        if visible is not None and _first(visible) in _NO_DEVICES:
            return None, f"{variable}={visible!r} hides every AMD GPU"
    first_of_rocr = environ.get("ROCR_VISIBLE_DEVICES")
    if first_of_rocr is None:
        return _choose(gpus, environ.get(hip), hip, "the amdgpu driver")
    entries = [entry.strip() for entry in first_of_rocr.split(",")]
    left = [gpu for gpu in (_pick(gpus, entry) for entry in entries) if gpu is not None]
    return _choose(left, environ.get(hip), hip, "the amdgpu driver, with ROCR_VISIBLE_DEVICES")


def _kfd_devices(topology: Path) -> list[Gpu]:
    """The GPUs in the kernel driver's topology, in its order. A CPU node has gfx_target_version 0."""
    nodes = sorted((n for n in topology.glob("*") if n.name.isdigit()), key=lambda n: int(n.name))
    gpus = []
    for node in nodes:
        try:
            lines = (node / "properties").read_text(errors="replace").splitlines()
        except OSError:  # a device that this container was not lent
            continue
        properties = {words[0]: words[1] for words in map(str.split, lines) if len(words) == 2}
        version, unique = properties.get("gfx_target_version", "0"), properties.get("unique_id", "")
        if version.isdecimal() and int(version) > 0:
            number = int(version)  # 90402 = gfx 9.4.2
            uuid = f"GPU-{int(unique):016x}" if unique.isdecimal() else ""
            gpus.append(Gpu(uuid, Platform("hip", (number // 10000, number // 100 % 100, number % 100))))
    return gpus


# ---- which of the devices --------------------------------------------------------------------------------------------

def _choose(gpus: list[Gpu], visible: str | None, variable: str, source: str,
            parent: Callable[[str], Gpu] | None = None) -> tuple[Gpu | None, str]:
    """The first device that `visible`, the value of `variable`, lets a process see."""
    if not gpus:
        return None, f"{source} lists no device"
    entry = "0" if visible is None else _first(visible)
    gpu = _pick(gpus, entry, parent)
    if gpu is None:
        return None, f"{variable}={visible!r} names none of the {len(gpus)} devices of {source}"
    if gpu.platform is None:
        return None, f"{source} could not read device {entry}"
    if entry.startswith("MIG-"):
        gpu = gpu._replace(name="")  # torch calls the instance otherwise than the GPU that it is a part of
    return gpu, f"{source}: device {entry}" + (f" of {len(gpus)}" if len(gpus) > 1 else "") + (
        f" ({variable}={visible})" if visible is not None else "")


def _pick(gpus: list[Gpu], entry: str, parent: Callable[[str], Gpu] | None = None) -> Gpu | None:
    """The device that one entry of a *_VISIBLE_DEVICES list names: an index, a UUID or its start, a MIG instance."""
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-GPU-"):  # the old form: MIG-GPU-<uuid>/<gpu instance>/<compute instance>
        entry = entry[len("MIG-"):].partition("/")[0]
    elif entry.startswith("MIG-"):
        return parent(entry) if parent else None
    found = [gpu for gpu in gpus if len(entry) > len("GPU-") and gpu.uuid.lower().startswith(entry.lower())]
    return found[0] if len(found) == 1 else None


def _first(visible: str) -> str:
    """The first entry of a *_VISIBLE_DEVICES list; those after it do not matter here."""
    entry = visible.partition(",")[0].strip()
    return entry.lower() if entry.lower() in _NO_DEVICES else entry
