"""Rule 8: a plugin is taken whole or not at all; a broken one is reported and takes nothing else down."""

from __future__ import annotations

import itertools
import sys
import warnings

import pytest

from kernel_registry.document import read
from kernel_registry.plugins import GROUP, plugin_sources
from kernel_registry.schema import RegistryFile, validate


class EntryPoint:
    """What importlib.metadata gives for one installed plugin."""

    def __init__(self, name, answer, value="package:function"):
        self.name, self.answer, self.value = name, answer, value

    def load(self):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return lambda: self.answer() if callable(self.answer) else self.answer


@pytest.fixture
def installed(monkeypatch):
    """Makes these entry points the installed ones."""

    def install(*entry_points):
        monkeypatch.setattr("kernel_registry.plugins._installed", lambda: list(entry_points))

    return install


def boom():
    raise RuntimeError("no driver")


def kinds(toy):
    """Every way a plugin can fail, by name."""
    return {
        "raises on import": EntryPoint("p", ImportError("no module named vendor")),
        "raises when called": EntryPoint("p", boom),
        "names a missing file": EntryPoint("p", toy.folder / "gone.yaml"),
        "names nothing": EntryPoint("p", None),
        "is no registry": EntryPoint("p", toy.write("just text\n")),
        "has an unknown key": EntryPoint("p", toy.write("version: 1\nops: {}\nplugins: []\n")),
        "collides": EntryPoint("p", toy.file({"ours": {"size": 512}}, contract=False)),
        "is ambiguous": EntryPoint("p", toy.file({"rival": {"size": {"max": 64}}}, contract=False)),
        "could never be chosen": EntryPoint(
            "p", toy.file({"late": {"when": {"size": 20}, "rank": -5}}, contract=False)
        ),
        "has an unknown trait": EntryPoint("p", toy.file({"theirs": {"sise": 8}}, contract=False)),
        "has another contract": EntryPoint(
            "p", toy.write("version: 1\nops:\n  toy.op:\n    contract: json:JSONDecoder\n")
        ),
        "has a contract that is not there": EntryPoint(
            "p", toy.write("version: 1\nops:\n  other.op:\n    contract: gone_module:C\n")
        ),
        "is half good": EntryPoint(
            "p", lambda: [toy.file({"fine": {"size": 512}}, contract=False), toy.folder / "gone.yaml"]
        ),
        "collides with itself": EntryPoint(
            "p",
            lambda: [
                toy.file({"twin": {"size": 512}}, contract=False),
                toy.file({"twin": {"size": 513}}, contract=False),
            ],
        ),
    }


OURS = {"ours": {"size": {"min": 16, "max": 100}}, "reference": {"when": {}, "fallback": True}}


def test_a_good_plugin_contributes_kernels_and_ops(toy, installed):
    more = toy.file({"theirs": {"when": {"size": 8}}}, contract=False)
    new = toy.file({"solo": {}}, op="other.op")
    installed(EntryPoint("vendor", lambda: [more, str(new)]))
    registry = toy.registry(OURS, plugins=True)
    assert registry.dispatch(toy.OP, size=8).name == "theirs" and registry.dispatch(toy.OP, size=16).name == "ours"
    assert registry.dispatch("other.op", size=8).name == "solo"
    assert registry.state.plugin_failures == ()
    assert f"{more}:" in registry.catalog.op(toy.OP).by_name["theirs"].where
    registry.load_overrides(toy.overrides({"disable": "theirs"}))
    assert registry.dispatch(toy.OP, size=8).name == "reference"


@pytest.mark.parametrize(
    "kind",
    [
        "raises on import",
        "raises when called",
        "names a missing file",
        "names nothing",
        "is no registry",
        "has an unknown key",
        "collides",
        "is ambiguous",
        "could never be chosen",
        "has an unknown trait",
        "has another contract",
        "has a contract that is not there",
        "is half good",
        "collides with itself",
    ],
)
def test_a_broken_plugin_is_reported_left_out_whole_and_the_rest_works(toy, installed, kind):
    broken = kinds(toy)[kind]
    good = EntryPoint("q", toy.file({"theirs": {"size": 8}}, contract=False))
    installed(good, broken)
    registry = toy.registry(OURS, plugins=True)
    with pytest.warns(RuntimeWarning, match="kernel_registry plugin 'p' is left out"):
        registry.catalog
    (failure,) = registry.state.plugin_failures
    assert failure.name == "p" and failure.error
    assert set(registry.catalog.op(toy.OP).by_name) == {"ours", "reference", "theirs"} and set(
        registry.catalog.ops
    ) == {toy.OP}
    assert registry.dispatch(toy.OP, size=8).name == "theirs" and registry.dispatch(toy.OP, size=16).name == "ours"


def test_every_kind_of_failure_is_tested(toy):
    (mark,) = test_a_broken_plugin_is_reported_left_out_whole_and_the_rest_works.pytestmark
    assert set(mark.args[1]) == set(kinds(toy))


def test_the_error_of_a_plugin_says_file_and_line(toy, installed):
    path = toy.file({"theirs": {"sise": 8}}, contract=False)
    installed(EntryPoint("vendor", path))
    registry = toy.registry(OURS, plugins=True)
    with pytest.warns(RuntimeWarning):
        (failure,) = registry.state.plugin_failures
    assert failure.error.startswith("UnknownNameError: ") and f"{path}:" in failure.error and "'size'" in failure.error


def test_the_order_in_which_plugins_are_found_decides_nothing(toy):
    ours = toy.file(OURS)
    document = read(ours)
    own = [(document, validate(RegistryFile, document).ops)]
    paths = [
        toy.file({"same": {"size": 8}}, contract=False),
        toy.file({"same": {"size": 9}}, contract=False),
        toy.file({"third": {"size": 10}}, contract=False),
    ]
    points = [EntryPoint("b", paths[0], "b:f"), EntryPoint("b", paths[1], "a:f"), EntryPoint("a", paths[2])]
    outcomes = set()
    for order in itertools.permutations(points):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sources, failures = plugin_sources(own, order)
        outcomes.add((tuple(d.source for d, _ in sources), tuple(f.name for f in failures)))
    assert outcomes == {((str(ours), str(paths[2]), str(paths[1])), ("b",))}


def test_plugins_are_left_alone_where_they_are_not_wanted(toy, installed):
    installed(EntryPoint("vendor", AssertionError("loaded")))
    registry = toy.registry(OURS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.dispatch(toy.OP, size=8).name == "reference" and registry.state.plugin_failures == ()


def test_reload_asks_the_plugins_again(toy, installed):
    installed(EntryPoint("vendor", boom))
    registry = toy.registry(OURS, plugins=True)
    with pytest.warns(RuntimeWarning):
        kernel = registry.dispatch(toy.OP, size=8)
    installed(EntryPoint("vendor", toy.file({"theirs": {"size": 8}}, contract=False)))
    registry.reload()
    assert registry.state.plugin_failures == () and kernel.name == "theirs"


def test_a_distribution_that_is_really_installed(toy, python):
    """Metadata on disk as pip writes it, found by importlib.metadata in a fresh process."""
    site = toy.folder
    ours = toy.file(OURS)
    theirs = toy.file({"theirs": {"size": 8}}, contract=False)
    (site / "vendor_kernels.py").write_text(f"def registry_files():\n    return {str(theirs)!r}\n")
    (site / "broken_kernels.py").write_text("raise OSError('no driver')\n")
    for name in ("vendor", "broken"):
        info = site / f"{name}_kernels-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-kernels\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}_kernels:registry_files\n")
    out = python(
        "import sys, warnings; warnings.simplefilter('ignore')\nfrom kernel_registry import Registry\n"
        "r = Registry(sys.argv[1], environment=False, platform='cpu')\n"
        "print('vendor_kernels' in sys.modules, *(r.dispatch('toy.op', size=s).name for s in (8, 16)))\n"
        "print(*((f.name, f.error) for f in r.state.plugin_failures))\n",
        str(ours),
    )
    assert out == "False theirs ours\n('broken', 'OSError: no driver')\n"
    assert "vendor_kernels" not in sys.modules
