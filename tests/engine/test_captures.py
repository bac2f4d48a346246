"""What a captured graph holds is noted while it is captured, and told once a change of files has left it behind."""

from __future__ import annotations

import sys
import threading

import pytest
from engine_support import call

from kernel_registry.errors import CaptureError, DocumentError, UnknownNameError

TWO = {"small": {"num_tokens": {"max": 15}}, "big": {"num_tokens": {"min": 16}},
       "reference": {"when": {"groups": "any"}, "fallback": True}}


@pytest.fixture
def file(toy):
    return toy.overrides(name="o.yaml")


@pytest.fixture
def registry(toy, file):
    registry = toy.registry(TWO)
    registry.load_overrides(file)
    return registry


def written(toy, registry, *lines):
    toy.overrides(*lines, name="o.yaml")
    return registry.reload()


def held(capture):
    return [(dict(one.dynamic), one.ran["implementation"]) for one in capture.calls]


def test_a_capture_holds_what_ran_for_its_calls(toy, registry):
    kernel, other = registry.bind(toy.OP, size=8), registry.bind(toy.OP, size=9)
    with registry.capture("decode, 4 tokens"):
        assert [kernel(call(4)), kernel(call(4)), kernel(x=call(16))] == ["small", "small", "big"]
    (capture,) = registry.captures
    assert capture.name == "decode, 4 tokens" and all(one.kernel is kernel for one in capture.calls)
    assert held(capture) == [({"num_tokens": 4, "contiguous": True}, "small"),
                             ({"num_tokens": 16, "contiguous": True}, "big")]
    assert not capture.outdated and str(capture) == "decode, 4 tokens holds what runs now"
    assert other(call(4)) == "small"


def test_a_line_for_one_shape_lists_the_graphs_of_that_shape(toy, registry):
    kernel = registry.bind(toy.OP, size=8)
    for tokens in (1, 4, 16):
        with registry.capture(f"decode, {tokens} tokens"):
            kernel(call(tokens))
    listed = written(toy, registry, {"use": "reference", "when": {"num_tokens": 4}, "reason": "incident 42"})
    assert [capture.name for capture in listed] == ["decode, 4 tokens"]
    assert str(listed[0]) == (
        "decode, 4 tokens still holds what ran before\n"
        "  toy.op(size=8, groups=1, scoring=sigmoid, has_bias=true, dtype=float32, platform=sm_90, per_group=8) at "
        "num_tokens=4, contiguous=true: small -> reference")
    assert kernel(call(4)) == "reference" and kernel(call(1)) == "small", "the handle follows, at that shape only"
    assert listed == tuple(c for c in registry.captures if c.outdated)

    with registry.capture("decode, 4 tokens"):  # again: the entry is replaced, and up to date
        kernel(call(4))
    assert len(registry.captures) == 3 and not any(capture.outdated for capture in registry.captures)
    assert [capture.name for capture in written(toy, registry)] == ["decode, 4 tokens"], "it holds the fallback now"


def test_reverted_nothing_is_listed(toy, registry):
    kernel = registry.bind(toy.OP, size=8)
    with registry.capture("graph"):
        kernel(call(4))
    assert written(toy, registry, {"disable": "small"})
    assert written(toy, registry) == () and not registry.captures[0].outdated


def test_whatever_changes_files_tells(toy, registry, tmp_path):
    kernel = registry.bind(toy.OP, size=8)
    plan = registry.freeze()
    with registry.capture("graph"):
        kernel(call(4))
    assert [c.name for c in registry.load_overrides(toy.overrides({"use": "reference"}))] == ["graph"]
    assert registry.load_plan(plan) == (), "the plan says what was captured"


def test_options_count_as_well_as_the_name(toy):
    module = toy.module("def make(*, rows): return lambda x: rows\n")

    def file(rows):
        return toy.file({"a": {"target": f"{module}:make", "options": {"rows": rows}}}, name="registry.yaml")

    registry = toy.registry(file(1))
    kernel = registry.bind(toy.OP, size=8)
    with registry.capture("graph"):
        assert kernel(call()) == 1
    file(2)
    (capture,) = registry.reload()
    assert str(capture).endswith('contiguous=true: {"rows": 1} -> {"rows": 2}') and kernel(call()) == 2


def test_whether_a_kernel_writes_into_out_counts_where_a_call_brings_one(toy):
    """In what was captured, it does still."""
    torch = pytest.importorskip("torch")
    module = toy.module("""
import torch
from kernel_registry.contract import OUTPUT_ALIAS, Contract
from kernel_registry.traits.trait import Trait


class Into(Contract):
    traits = (Trait(OUTPUT_ALIAS, "bool", "performance", default=False), Trait("platform", "platform", "platform"))
    read_until_end = ("x",)

    @staticmethod
    def signature(x, *, out=None):
        \"\"\"One tensor.\"\"\"


def adds(**_):
    return lambda x, out=None: torch.add(x, 1, out=out)
""")
    text = f"""
version: 1
ops:
  toy.op:
    contract: {module}:Into
    implementations:
      a: {{target: "{module}:adds", when: {{platform: any, output_alias: any}}, accepts_output_alias: true}}
"""
    file = toy.write(text)
    registry = toy.registry(file)
    kernels = {name: registry.bind(toy.OP, output_alias=into) for name, into in (("into out", True), ("fresh", False))}
    for name, kernel in kernels.items():
        with registry.capture(name):
            kernel(torch.zeros(2), **({"out": torch.empty(2)} if name == "into out" else {}))
    file.write_text(text.replace("accepts_output_alias: true", "accepts_output_alias: false"))
    (capture,) = registry.reload()
    assert capture.name == "into out" and str(capture).endswith(": writes into out -> copies into out")


def test_a_graph_that_was_freed_is_forgotten(toy, registry):
    kernel = registry.bind(toy.OP, size=8)
    for name in ("decode, 4 tokens", "decode, 5 tokens"):
        with registry.capture(name):
            kernel(call(4))
    registry.forget_capture("decode, 4 tokens")
    assert [capture.name for capture in written(toy, registry, {"disable": "small"})] == ["decode, 5 tokens"]
    with pytest.raises(UnknownNameError, match="captured as 'decode, 6 tokens'\n.*did you mean 'decode, 5 tokens'"):
        registry.forget_capture("decode, 6 tokens")


def test_a_tile_counts_at_the_numbers_of_tokens_that_it_serves(tiled):
    from tiled_toy import call, open_registry, row, tiles_file

    registry = open_registry(tiled, row({1: 7}))
    kernel = registry.bind(tiled.OP, size=8)
    for tokens in (1, 64):
        with registry.capture(f"{tokens} tokens"):
            kernel(call(tokens))
    tiles_file(tiled, row({1: 8}))
    assert [capture.name for capture in registry.reload()] == ["1 tokens"]
    assert '"M": 7' in str(registry.captures[0]) and '"M": 8' in str(registry.captures[0])


def test_the_handles_are_as_before(toy, registry):
    kernel, pinned = registry.bind(toy.OP, size=8), registry.dispatch(toy.OP, size=8, num_tokens=3)
    before = [kernel.raw, pinned.raw]
    with registry.capture("graph"):
        assert kernel.raw is not before[0] and pinned(call(3)) == "small"
    assert [kernel.raw, pinned.raw] == before
    assert held(registry.captures[0]) == [({"contiguous": True}, "small")]  # its num_tokens is one of its traits
    with pytest.raises(ZeroDivisionError), registry.capture("broken"):
        kernel(call(1 // 0))
    assert [kernel.raw, pinned.raw] == before and [c.name for c in registry.captures] == ["graph"]


def test_another_threads_calls_are_not_in_the_graph(toy, registry):
    kernel, seen = registry.bind(toy.OP, size=8), []
    with registry.capture("graph"):
        kernel(call(4))
        other = threading.Thread(target=lambda: seen.append(kernel(call(16))))
        other.start()
        other.join()
    assert seen == ["big"] and [name for _, name in held(registry.captures[0])] == ["small"]


def test_a_reload_waits_until_the_capture_is_done(toy, registry, file):
    kernel, order = registry.bind(toy.OP, size=8), []
    with registry.capture("graph"):
        toy.overrides({"disable": "small"}, name="o.yaml")
        reloading = threading.Thread(target=lambda: order.append([str(c.name) for c in registry.reload()]))
        reloading.start()
        reloading.join(0.2)
        assert reloading.is_alive() and kernel(call(4)) == "small"
    reloading.join()
    assert order == [["graph"]] and kernel(call(4)) == "reference"


def test_what_can_not_be_noted_is_refused(toy, registry):
    kernel = registry.bind(toy.OP, size=8)
    with pytest.raises(CaptureError, match="was dispatched for the first time"), registry.capture("late"):
        registry.bind(toy.OP, size=9)(call(4))
    with pytest.raises(CaptureError, match="inside another"), registry.capture("outer"):
        with registry.capture("inner"):
            kernel(call(4))
    with pytest.raises(CaptureError, match="can't be read again while"), registry.capture("outer"):
        registry.reload()
    assert registry.captures == () and kernel(call(4)) == "small"
    with registry.capture("good"):
        kernel(call(4))
    assert len(registry.captures) == 1


def test_a_refused_file_lists_nothing(toy, registry, file):
    kernel = registry.bind(toy.OP, size=8)
    with registry.capture("graph"):
        kernel(call(4))
    file.write_text("version: 2\n")
    with pytest.raises(DocumentError):
        registry.reload()
    assert not registry.captures[0].outdated


def test_the_first_thing_that_a_registry_does_may_be_a_capture(toy):
    registry = toy.registry(TWO)
    with registry.capture("nothing of ours"):
        pass
    assert held(registry.captures[0]) == []


def test_a_graph_on_a_gpu_replays_what_it_holds_until_it_is_captured_again(toy):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    toy.module("import torch\n"
               "def plus(n): return lambda **_: lambda x: x.data.add_(n)\n"
               "one, two = plus(1), plus(2)\n", name="adders")
    file = toy.overrides(name="o.yaml")
    registry = toy.registry({"one": {"target": "adders:one"}, "two": {"target": "adders:two", "fallback": True}})
    registry.load_overrides(file)
    kernel, x = registry.bind(toy.OP, size=8), call(4)
    x.data = torch.zeros(1, device="cuda")

    def captured():
        graph = torch.cuda.CUDAGraph()
        with registry.capture("decode"), torch.cuda.graph(graph):
            kernel(x)
        return graph

    def replayed(graph):
        x.data.zero_()
        graph.replay()
        return x.data.item()
    graph = captured()
    (capture,) = written(toy, registry, {"use": "two", "when": {"num_tokens": 4}})
    assert capture.name == "decode" and replayed(graph) == 1
    assert replayed(captured()) == 2 and not registry.captures[0].outdated
    assert "adders" in sys.modules
