"""Rule 4: nothing is imported before it is needed, and what can't be imported is named."""

from __future__ import annotations

import sys

import pytest

from kernel_registry.errors import TargetError, UnknownNameError
from kernel_registry.targets import is_target, source_file, source_hash

LOADED = (
    "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'triton', 'yaml', 'pydantic'}))\n"
)


@pytest.mark.parametrize(
    "code, loaded",
    [
        ("import kernel_registry", ""),
        ("from kernel_registry import registry, Registry, errors, shipped_registry; shipped_registry()", ""),
        (
            "import kernel_registry.traits.moe, kernel_registry.traits.platform as p; p.detect()",
            "",
        ),
        ("from kernel_registry import registry; registry.catalog", "pydantic yaml"),
        (
            "from kernel_registry import registry; registry.explain('moe.topk', num_experts=256, topk=8).text()",
            "pydantic yaml",
        ),
        (
            "from kernel_registry import registry as r; "
            "r.explain('moe.topk', num_experts=8, topk=2, platform='cpu').json()",
            "pydantic yaml",
        ),
        (
            "import kernel_registry as k; from kernel_registry.lint import lint_file; lint_file(k.shipped_registry())",
            "pydantic yaml",
        ),
        (
            "import kernel_registry as k; from kernel_registry import lint; lint.lint_catalog(k.registry.catalog)",
            "pydantic yaml",
        ),
        ("from kernel_registry import registry; registry.freeze(); registry.reload()", "pydantic yaml"),
        ("import kernel_registry as k; k.registry.load_tiles(k.shipped_registry().with_name('tiles.yaml'))",
         "pydantic yaml"),
        ("from kernel_registry import registry\nwith registry.override('moe.topk', 'torch'): pass", "pydantic yaml"),
    ],
)
def test_what_is_loaded_after(python, code, loaded):
    assert python(f"{code}\n{LOADED}").strip() == loaded


HEAVY = "raise RuntimeError('imported too early')\n"


@pytest.fixture
def heavy(toy):
    """A package that can't be imported, with a module in it, as a package that needs a driver is without one."""
    folder = toy.folder / "heavy_pack"
    folder.mkdir()
    (folder / "__init__.py").write_text(HEAVY)
    toy.module(HEAVY, "heavy_pack.kernel")
    return "heavy_pack.kernel:f"


def test_lint_explain_and_plans_import_no_package_of_a_target(toy, heavy):
    from kernel_registry.lint import lint_catalog
    from kernel_registry.planning import freeze_model  # noqa: F401  (imported: it must not need the target either)

    registry = toy.registry({"a": {"target": heavy, "when": {}}})
    assert not [f for f in lint_catalog(registry.catalog) if "not installed" in f.message]
    assert registry.explain(toy.OP, size=8).winner == "a"
    assert source_file(heavy) == toy.folder / "heavy_pack" / "kernel.py" and len(source_hash(heavy)) == 16
    assert "heavy_pack" not in sys.modules
    with pytest.raises(TargetError, match="RuntimeError: imported too early"):
        registry.dispatch(toy.OP, size=8)


def test_source_file_finds_what_an_import_would(toy):
    import json.decoder

    import kernel_registry.traits.moe as moe

    assert source_file("json.decoder:x").samefile(json.decoder.__file__)
    assert source_file("xml.dom.minidom:x").name == "minidom.py"  # not imported, two packages deep
    assert source_file("kernel_registry.traits.moe:x").samefile(moe.__file__)
    assert source_file("kernel_registry.ops.moe.topk.reference:topk").name == "reference.py"
    for nothing in ("gone_module:x", "json.gone:x", "json.decoder.deeper:x", "gone.deeper:x", "sys:x", "sys.deeper:x"):
        assert source_file(nothing) is None
    assert source_hash("gone_module:x") != source_hash("gone_module:y")


def test_the_form_of_a_target():
    assert all(map(is_target, ("m:f", "a.b.c:D.e", "_m:_f")))
    assert not any(map(is_target, ("m", "m:", ":f", "m:f:g", "m f:g", "m:f()", "os;x:f", None, 3, "1m:f", "m:f\n")))


def test_a_target_is_imported_exactly_when_first_bound(toy):
    first = toy.module("def f(**t):\n    return lambda x: 1\n")
    second = toy.module("def f(**t):\n    return lambda x: 2\n")
    registry = toy.registry(
        {
            "a": {"target": f"{first}:f", "when": {"size": {"max": 9}}},
            "b": {"target": f"{second}:f", "when": {"size": {"min": 10}}},
        }
    )
    registry.explain(toy.OP, size=8)
    with registry.override(toy.OP, "a"):
        pass
    assert first not in sys.modules and second not in sys.modules
    assert registry.dispatch(toy.OP, size=8)(None) == 1
    assert first in sys.modules and second not in sys.modules
    registry.dispatch(toy.OP, size=11)
    assert second in sys.modules


def test_a_bound_table_has_imported_every_kernel_in_it(toy):
    modules = [toy.module("def f(**t):\n    return lambda x: 1\n") for _ in range(3)]
    registry = toy.registry(
        {
            "a": {"target": f"{modules[0]}:f", "when": {"num_tokens": {"max": 9}}},
            "b": {"target": f"{modules[1]}:f", "when": {"num_tokens": {"min": 10}}},
            "c": {"target": f"{modules[2]}:f", "when": {"scoring": "softmax"}},
        }
    )
    registry.bind(toy.OP, size=8)
    assert [m in sys.modules for m in modules] == [True, True, False]


@pytest.mark.parametrize(
    "source, target, message",
    [
        (None, "gone_module_x:f", "ModuleNotFoundError: No module named 'gone_module_x'"),
        ("import gone_module_y\n", "{m}:f", "ModuleNotFoundError: No module named 'gone_module_y'"),
        ("def f(:\n", "{m}:f", "SyntaxError"),
        ("raise OSError('libcuda.so.1 is missing')\n", "{m}:f", "OSError: libcuda.so.1 is missing"),
        ("x = 1\n", "{m}:f", "has no 'f'"),
        ("class C:\n    pass\n", "{m}:C.f", "has no 'C.f'"),
        ("def f(**t):\n    raise KeyError('arch')\n", "{m}:f", "can't be bound: KeyError: 'arch'"),
        ("def f(*, nonsense):\n    pass\n", "{m}:f", "can't be bound: TypeError"),
        (
            "def f(*, num_tokens):\n    pass\n",
            "{m}:f",
            "can't be bound: TypeError",
        ),  # open at bind: not there to be given
        ("def f(**t):\n    return 3\n", "{m}:f", "returned int, not a kernel"),
        ("def f(**t):\n    pass\n", "{m}:f", "returned NoneType, not a kernel"),
        ("f = 3\n", "{m}:f", "can't be bound"),
    ],
)
def test_a_target_that_can_not_be_used_is_named_with_the_error_and_the_line(toy, source, target, message):
    target = target.format(m=toy.module(source)) if source else target
    path = toy.file({"a": {"target": target, "when": {}}})
    registry = toy.registry(path)
    for _ in range(2):  # a failure is not cached as a success
        with pytest.raises(TargetError) as caught:
            registry.dispatch(toy.OP, size=8)
        assert caught.value.where == f"{path}:6" and target in str(caught.value) and message in str(caught.value)
    assert registry.kernels == ()


def test_the_original_error_is_the_cause(toy):
    module = toy.module("raise OSError('libcuda.so.1 is missing')\n")
    with pytest.raises(TargetError) as caught:
        toy.registry({"a": {"target": f"{module}:f", "when": {}}}).dispatch(toy.OP, size=8)
    assert isinstance(caught.value.__cause__, OSError) and isinstance(caught.value, ImportError)


def test_a_refused_dispatch_shows_no_error_of_the_cache_first(toy):
    with pytest.raises(UnknownNameError) as caught:
        toy.registry({"a": {}}).dispatch(toy.OP, sise=8)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_nothing_of_a_kernel_is_read_from_the_environment_or_allocated_when_it_is_called(toy, monkeypatch):
    """The bound kernel forwards in C: no Python frame of the library between the caller and the kernel."""
    import inspect

    module = toy.module("import sys\ndef f(**t):\n    return lambda x: sys._getframe(1).f_code.co_name\n")
    kernel = toy.registry({"a": {"target": f"{module}:f", "when": {}}}).dispatch(toy.OP, size=8)
    assert kernel(None) == inspect.currentframe().f_code.co_name


# ---- CUDA-graph capture ----------------------------------------------------------------------------------------------


class FakeTorch:
    """What the registry asks torch during a dispatch: is there a device, is its stream capturing."""

    def __init__(self, available=True, capturing=True):
        self.cuda = self
        self.available, self.capturing = available, capturing

    def is_available(self):
        return self.available

    def is_current_stream_capturing(self):
        return self.capturing


def test_a_dispatch_that_is_not_resolved_before_capture_is_an_error(toy, monkeypatch):
    from kernel_registry.errors import CaptureError

    registry = toy.registry({"a": {}})
    known = registry.dispatch(toy.OP, size=8)
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert registry.dispatch(toy.OP, size=8) is known
    assert registry.dispatch(toy.OP, size=8, groups=1) is known  # another spelling of a call that is resolved
    with pytest.raises(
        CaptureError, match=r"toy.op\(size=9.*was not dispatched before CUDA-graph capture began"
    ) as caught:
        registry.dispatch(toy.OP, size=9)
    assert caught.value.hint and isinstance(caught.value, RuntimeError)
    with pytest.raises(CaptureError):
        registry.bind(toy.OP, size=9)
    assert registry.explain(toy.OP, size=9).winner == "a"  # asking why is harmless
    fake.capturing = False
    kernel = registry.dispatch(toy.OP, size=9)
    fake.capturing = True
    assert registry.dispatch(toy.OP, size=9) is kernel


@pytest.mark.parametrize("torch", [FakeTorch(available=False), type("Half", (), {})()])
def test_a_torch_without_a_device_or_half_imported_does_not_matter(toy, monkeypatch, torch):
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert toy.registry({"a": {}}).dispatch(toy.OP, size=8).name == "a"
