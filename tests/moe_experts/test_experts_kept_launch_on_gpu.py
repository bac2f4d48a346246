"""The experts' second calls on a GPU, which Triton is not asked for: as the first, right, and in a graph."""

from __future__ import annotations

import pytest
import torch
from experts_support import implementations, kernel, layer

from kernel_registry.ops.moe.experts import cases, oracle

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
formats = pytest.mark.parametrize("format", ("none", "fp8_block", "int8_w8a16"))
every_size = pytest.mark.parametrize("tokens", (1, 8, 40, 600))


@pytest.fixture
def asked(monkeypatch):
    """Names of the kernels that Triton was asked to launch, but for persistent.py's, which it always is."""
    names, own_run = [], triton.JITFunction.run

    def run(self, *arguments, **parameters):
        if not self.__name__.startswith("persistent"):
            names.append(self.__name__)
        return own_run(self, *arguments, **parameters)

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return names


def kernels(traits, tokens):
    found = {name: kernel(name, traits, tokens) for name in implementations(traits, tokens) if name != "torch"}
    assert found
    return found


def moved(args, offset=0):
    """The arguments with weights at another address, `offset` bytes from an aligned one."""
    def copied(tensor):
        memory = torch.empty(offset + tensor.nbytes, dtype=torch.uint8, device=tensor.device)
        return memory[offset:].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    hidden, w13, w2, *routing = args
    return hidden, copied(w13), copied(w2), *routing


@every_size
@formats
def test_second_calls_do_not_ask_triton_and_repeat_the_first(format, tokens, asked):
    traits = layer(16, 4, 512, 384, format)
    args, kwargs = cases.inputs(traits, tokens, device="cuda")
    layouts = {"as made": args, "elsewhere": moved(args), "at no multiple of 16": moved(args, 8), "last": moved(args)}
    for name, made in kernels(traits, tokens).items():
        first = {}
        for repeat in range(2):  # the second time all the kinds are kept, so one kept for another would be found
            for layout in (*layouts, "as made"):
                asked.clear()
                result = made(*layouts[layout], **kwargs)
                assert asked == [] or repeat == 0, name
                verdict = oracle.check(traits, args, kwargs, result)
                assert verdict.passed, f"{name} {layout}: {verdict.detail}"
                assert torch.equal(result, first.setdefault(layout, result)), f"{name} {layout}"


@every_size
@formats
def test_a_smaller_layer_whose_weights_begin_where_a_larger_ones_do(format, tokens):
    """And whose launches are the same, by their constants."""
    larger = cases.inputs(layer(16, 4, 512, 384, format), tokens, device="cuda")
    for experts in (8, 16, 8, 16):
        traits = layer(experts, 4, 512, 384, format)
        (hidden, _, _, *routing), _ = cases.inputs(traits, tokens, device="cuda")
        args = hidden, larger[0][1][:experts], larger[0][2][:experts], *routing
        kwargs = {name: scale[:experts] for name, scale in larger[1].items()}
        for name, made in kernels(traits, tokens).items():
            for _ in range(2):
                verdict = oracle.check(traits, args, kwargs, made(*args, **kwargs))
                assert verdict.passed, f"{name} of {experts} experts: {verdict.detail}"


@every_size
@formats
def test_a_second_call_in_a_graph(format, tokens, asked):
    traits = layer(16, 4, 512, 384, format, output_alias=True)
    args, kwargs = cases.inputs(traits, tokens, device="cuda")
    hidden, others = args[0], cases.inputs(traits, tokens, seed=1, device="cuda")[0][0]
    for name, made in kernels(traits, tokens).items():
        out = kwargs["out"]
        wanted = [made(x, *args[1:], **kwargs).clone() for x in (others, hidden)]
        torch.cuda.synchronize()
        asked.clear()
        graph, x = torch.cuda.CUDAGraph(), hidden.clone()
        with torch.cuda.graph(graph):
            made(x, *args[1:], **kwargs)
        assert asked == [], name
        for values, expected in zip((others, hidden, others), (*wanted, wanted[0])):
            x.copy_(values)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected), name
