"""Which machine this is: every source of the answer is a fake, and nothing that a driver does may raise."""

import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_registry.traits.detection import find, look
from kernel_registry.traits.platform import Platform, detect, detect_with_reason

UUIDS = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbbb3333-0000"]
MIG = "MIG-cccc4444-0000"


class FakeNvml:
    """NVML as ctypes gives it: functions that return a code and write through the references they are passed."""

    def __init__(self, capabilities, *, fail=(), broken_device=None, mig_parent=0):
        self.capabilities, self.fail, self.broken, self.mig_parent = capabilities, fail, broken_device, mig_parent
        self.shut = 0

    def __getattr__(self, name):
        if name in self.fail:
            return lambda *arguments: 999
        return getattr(self, "_" + name)

    def _nvmlInit_v2(self):
        return 0

    def _nvmlShutdown(self):
        self.shut += 1
        return 0

    def _nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        if index.value == self.broken:
            return 15  # GPU is lost
        handle._obj.value = 1000 + index.value
        return 0

    def _nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = self.capabilities[handle.value - 1000]
        return 0

    def _nvmlDeviceGetUUID(self, handle, buffer, size):
        buffer.value = UUIDS[handle.value - 1000].encode()
        return 0

    def _nvmlDeviceGetName(self, handle, buffer, size):
        buffer.value = f"NVIDIA {handle.value - 1000}".encode()
        return 0

    def _nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid.value.decode() != MIG:
            return 6  # not found
        handle._obj.value = 77
        return 0

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance, handle):
        assert instance.value == 77
        handle._obj.value = 1000 + self.mig_parent
        return 0


def no_nvml():
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def see(environ=None, nvml=None, modules=None, topology="/nonexistent", kfd="/nonexistent"):
    platform, reason = look(
        environ or {}, modules or {}, (lambda: nvml) if nvml is not None else no_nvml, topology, kfd
    )
    assert isinstance(platform, Platform) and reason
    return str(platform), reason


# ---- interpreter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "on", "yes", "y"])
def test_interpreter(value):
    assert see({"TRITON_INTERPRET": value}, FakeNvml([(9, 0)])) == ("interpreter", f"TRITON_INTERPRET={value}")


@pytest.mark.parametrize("value", ["0", "", "false", "off", "no", "2", " 1", "t", "enable"])
def test_no_interpreter(value):
    assert see({"TRITON_INTERPRET": value}, FakeNvml([(9, 0)]))[0] == "sm_90"


def test_values_are_those_that_triton_reads():
    libtriton = pytest.importorskip("triton._C.libtriton")
    monkeypatch = pytest.MonkeyPatch()
    try:
        for value in ["1", "true", "TRUE", "on", "yes", "y", "0", "", "false", "off", "no", "2", " 1", "t", "enable"]:
            monkeypatch.setenv("TRITON_INTERPRET", value)
            assert (see({"TRITON_INTERPRET": value})[0] == "interpreter") == bool(
                libtriton.getenv_bool("TRITON_INTERPRET", False)
            )
    finally:
        monkeypatch.undo()


# ---- torch -----------------------------------------------------------------------------------------------------------


def fake_torch(*, initialized=True, hip=None, **properties):
    asked = []  # what would initialise the device: recorded, for an exception would be taken for a failing driver

    def current_device():
        asked.append("current_device")
        return 1

    def get_device_properties(index):
        asked.append("get_device_properties")
        return types.SimpleNamespace(**properties)

    cuda = types.SimpleNamespace(
        is_initialized=lambda: initialized,
        current_device=current_device,
        get_device_properties=get_device_properties,
        asked=asked,
    )
    return {"torch": types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(hip=hip))}


def test_torch_is_asked_when_it_has_initialised_its_device():
    assert see({}, FakeNvml([(9, 0)]), fake_torch(major=10, minor=0, name="B200"))[0] == "sm_100"
    platform, reason = see({}, None, fake_torch(hip="7.0", gcnArchName="gfx942:sramecc+:xnack-"))
    assert platform == "gfx942" and "torch" in reason


def test_torch_is_left_alone_before_that():
    modules = fake_torch(initialized=False, major=10, minor=0, name="B200")
    assert see({}, FakeNvml([(9, 0)]), modules)[0] == "sm_90" and modules["torch"].cuda.asked == []
    assert see({}, FakeNvml([(9, 0)]), {"torch": types.SimpleNamespace()})[0] == "sm_90"  # half imported


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "sm_90"),
        ("0", "sm_90"),
        ("1", "sm_100"),
        ("1,0", "sm_100"),
        (" 1 , 0", "sm_100"),
        ("2", "sm_120"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("-1,0", "cpu"),
        (",0", "cpu"),
        ("none", "cpu"),
        ("NoDevFiles", "cpu"),
        ("3", "cpu"),
        ("0x1", "cpu"),
        (UUIDS[1], "sm_100"),
        ("GPU-bbbb2", "sm_100"),
        ("gpu-AAAA", "sm_90"),
        ("GPU-bbbb", "cpu"),
        ("GPU-", "cpu"),
        ("GPU-ffff", "cpu"),
        (MIG, "sm_100"),
        (f"MIG-{UUIDS[2]}/3/0", "sm_120"),
        ("MIG-unknown", "cpu"),
    ],
)
def test_cuda_visible_devices(visible, expected):
    nvml = FakeNvml([(9, 0), (10, 0), (12, 0)], mig_parent=1)
    platform, reason = see({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, nvml)
    assert platform == expected
    assert visible is None or expected != "cpu" or visible in reason or "failed" in reason


@pytest.mark.parametrize(
    "visible, name", [(None, "NVIDIA 0"), ("2,0", "NVIDIA 2"), (MIG, ""), (f"MIG-{UUIDS[2]}/3/0", "")]
)
def test_the_name_of_the_device(visible, name):
    """A part of a GPU has a name of its own, which the driver's name of the whole is not."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    nvml = FakeNvml([(9, 0), (10, 0), (12, 0)], mig_parent=1)
    assert find(environ, {}, lambda: nvml)[0].name == name


def test_a_name_that_can_not_be_read_hides_nothing():
    nvml = FakeNvml([(9, 0)], fail=("nvmlDeviceGetName",))
    assert find({}, {}, lambda: nvml)[0][1:] == (Platform.parse("sm_90"), "")


def test_names_without_a_driver():
    assert find({"TRITON_INTERPRET": "1"}, {}, no_nvml)[0].name == "interpreter"
    assert find({}, {}, no_nvml, "/nonexistent", "/nonexistent")[0].name == "cpu"
    modules = fake_torch(major=9, minor=0, name="NVIDIA H200")
    assert find({}, modules, lambda: FakeNvml([(9, 0)]))[0].name == "NVIDIA H200"


def test_nvml_is_shut_down_whatever_happens():
    for nvml in (FakeNvml([(9, 0)]), FakeNvml([(9, 0)], fail=("nvmlDeviceGetCount_v2",)), FakeNvml([])):
        see({}, nvml)
        assert nvml.shut == 1


def test_nvml_is_not_loaded_when_every_gpu_is_hidden():
    loads = []
    look({"CUDA_VISIBLE_DEVICES": ""}, {}, lambda: loads.append(1) or FakeNvml([(9, 0)]), *["/nonexistent"] * 2)
    assert loads == []


def test_no_driver():
    assert see()[0] == "cpu" and "no NVIDIA driver" in see()[1]


@pytest.mark.parametrize(
    "function",
    [
        "nvmlInit_v2",
        "nvmlDeviceGetCount_v2",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetUUID",
    ],
)
def test_nvml_that_fails_midway(function):
    platform, reason = see({}, FakeNvml([(9, 0)], fail=(function,)))
    assert platform == "cpu" and ("failed with code 999" in reason or "could not read" in reason)


def test_a_lost_gpu_keeps_its_index():
    nvml = FakeNvml([(9, 0), (10, 0)], broken_device=0)
    assert see({}, nvml)[0] == "cpu"
    assert see({"CUDA_VISIBLE_DEVICES": "1"}, nvml)[0] == "sm_100"


def test_no_gpu_behind_the_driver():
    assert see({}, FakeNvml([])) == ("cpu", "NVML lists no device; no AMD GPU (no amdgpu driver)")


def test_an_impossible_capability_is_a_cpu():
    assert see({}, FakeNvml([(-1, 5000)]))[0] == "cpu"


# ---- AMD -------------------------------------------------------------------------------------------------------------


def kfd(folder, *versions):
    """A topology folder with one node per gfx_target_version, and a device file that may be opened."""
    nodes = folder / "nodes"
    for index, version in enumerate(versions):
        (nodes / str(index)).mkdir(parents=True)
        unique = 0 if version == 0 else 0xABC0 + index
        (nodes / str(index) / "properties").write_text(
            f"cpu_cores_count {64 if version == 0 else 0}\nunique_id {unique}\ngfx_target_version {version}\n"
        )
    (folder / "kfd").write_text("")
    return {"topology": nodes, "kfd": folder / "kfd"}


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (90402, "gfx942"),
        (90010, "gfx90a"),
        (90500, "gfx950"),
        (110000, "gfx1100"),
        (120500, "gfx1250"),
        (90006, "gfx906"),
    ],
)
def test_gfx_target_version(tmp_path, version, name):
    platform, reason = see({}, None, **kfd(tmp_path, 0, 0, version))
    assert platform == name and "amdgpu" in reason


def test_cpu_nodes_only(tmp_path):
    assert see({}, None, **kfd(tmp_path, 0, 0))[0] == "cpu"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "gfx942"),
        ({"HIP_VISIBLE_DEVICES": "1"}, "gfx90a"),
        ({"ROCR_VISIBLE_DEVICES": "1"}, "gfx90a"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "gfx90a"),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "gfx942"),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "1"}, "gfx942"),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, "cpu"),
        ({"HIP_VISIBLE_DEVICES": ""}, "cpu"),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"HIP_VISIBLE_DEVICES": "7"}, "cpu"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000abc2"}, "gfx90a"),
    ],
)
def test_visible_devices_of_amd(tmp_path, environ, name):
    assert see(environ, None, **kfd(tmp_path, 0, 90402, 90010))[0] == name


def test_nodes_are_numbers_in_order(tmp_path):
    world = kfd(tmp_path, *[0] * 2, 90402, *[0] * 7, 110000)  # nodes 2 and 10: "10" sorts before "2" as text
    assert see({}, None, **world)[0] == "gfx942"


def test_a_gpu_that_this_container_was_not_lent(tmp_path):
    world = kfd(tmp_path, 0, 90402)
    platform, reason = see({}, None, topology=world["topology"], kfd=tmp_path / "absent")
    assert platform == "cpu" and "may not open" in reason


def test_an_unreadable_node_is_left_out(tmp_path):
    world = kfd(tmp_path, 0, 90402, 90010)
    (world["topology"] / "1" / "properties").unlink()
    assert see({}, None, **world)[0] == "gfx90a"


def test_nvidia_goes_before_amd(tmp_path):
    world = kfd(tmp_path, 90402)
    assert see({}, FakeNvml([(9, 0)]), **world)[0] == "sm_90"
    assert see({"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "0"}, FakeNvml([(9, 0)]), **world)[0] == "gfx942"


# ---- never raises ----------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20) | st.sampled_from(["0", "1", "-1", "GPU-", "MIG-", "MIG-GPU-/", "9" * 5000, "٣", "\0"])


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)


@settings(max_examples=150, deadline=None)
@given(
    environ=st.dictionaries(
        st.sampled_from(["TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"]),
        TEXT,
    ),
    capabilities=st.lists(st.tuples(st.integers(-5, 200), st.integers(-5, 200)), max_size=3),
    fail=st.sets(st.sampled_from([n[1:] for n in vars(FakeNvml) if n.startswith("_nvml") and "Shutdown" not in n])),
    torch=st.sampled_from([None, Hostile(), types.SimpleNamespace(cuda=Hostile()), 3]),
)
def test_never_raises(environ, capabilities, fail, torch):
    see(environ, FakeNvml(capabilities, fail=fail), {"torch": torch})


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.sampled_from(
        [
            b"gfx_target_version",
            b"gfx_target_version x\n",
            b"gfx_target_version -1",
            b"gfx_target_version 99999999",
            b"gfx_target_version 9040200",
        ]
    )
)
def test_never_raises_on_odd_topology(tmp_path_factory, content):
    world = kfd(tmp_path_factory.mktemp("kfd"), 0)
    (world["topology"] / "0" / "properties").write_bytes(content)
    assert see({}, None, **world)[0] == "cpu"


def test_hostile_library():
    assert see({}, Hostile())[0] == "cpu"


def test_this_machine(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    platform, reason = detect_with_reason()
    assert detect() == platform and Platform.parse(str(platform)) == platform and reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert str(detect()) == "interpreter"


def test_detection_loads_neither_torch_nor_triton():
    code = (
        "import sys; from kernel_registry.traits.platform import detect; detect(); "
        "print([m for m in ('torch', 'triton', 'pydantic', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
