"""The expert kernels on a GPU: judged in every format at the sizes that take other paths, and the two ways of a product
against each other. What is tested in the interpreter is not repeated here but for what only a GPU does."""

from __future__ import annotations

import pytest
import torch
from experts_support import FORMATS, implementations, judged, layer, named

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, tiles, triton_grouped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FEW = layer(16, 4, 512, 384)
PRODUCTS = [  # that persistent.py serves, ragged in every way it may be
    layer(8, 2, 640, 384, "fp8_block"),
    layer(8, 3, 512, 128, "fp8_block", has_bias=True, activation="gelu", dtype="float16"),
    layer(5, 1, 256, 640, "fp8_block", apply_router_weight_on_input=True),
    layer(16, 8, 1152, 256, "fp8_block", expert_parallel=True, has_bias=True),
    layer(8, 2, 520, 192),
    layer(8, 2, 320, 128, has_bias=True, dtype="float16"),
    layer(16, 4, 768, 1024, expert_parallel=True),
]


@pytest.mark.parametrize("tokens", (1, 8, 33, 222, 1027))
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, tokens):
    traits = {**FEW, **layer(16, 4, 512, 384, format)}
    names = [name for name in implementations(traits, tokens) if name != "torch"]
    assert names
    for name in names:
        judged(name, traits, tokens, device="cuda")


@pytest.mark.parametrize("flavour", cases.FLAVOURS)
@pytest.mark.parametrize("format", ("none", "fp8_block", "int8"))
def test_every_kind_of_input(format, flavour):
    traits = layer(16, 4, 512, 384, format)
    for tokens in (1, 8, 600):
        for name in implementations(traits, tokens):
            if name != "torch":
                judged(name, traits, tokens, flavour=flavour, device="cuda")


def hopper(traits):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("persistent.py is for sm_90")
    return {**traits, "platform": registry.platform()}


@pytest.mark.parametrize("traits", PRODUCTS, ids=named)
@pytest.mark.parametrize("tokens", (300, 511, 1027, 4096))
def test_persistent_products_are_right(traits, tokens):
    asked = hopper(traits)
    chosen = tiles.default(asked, tokens)
    if not chosen["down"]["PERSISTENT"]:
        pytest.skip("too few rows an expert")
    for flavour in ("random", "skewed", "padded", "one_expert", "none_local", "outliers"):
        args, kwargs = cases.inputs(traits, tokens, seed=tokens, device="cuda", flavour=flavour)
        if tokens < tiles.HALF_ROWS:  # above, rows are rounded over other tiles
            plain = triton_grouped.experts(**asked, tiles=lambda n: tiles.default(asked, n, aligned=False))
            assert torch.equal(triton_grouped.experts(**asked)(*args, **kwargs), plain(*args, **kwargs)), flavour
        judged(None, traits, tokens, flavour=flavour, device="cuda", made=triton_grouped.experts(**asked))


def test_a_tile_tuned_for_more_tokens_serves_fewer():
    """Rows in 32 bits, which fewer than HALF_ROWS tokens have, take more shared memory."""
    traits = layer(8, 2, 640, 384, "fp8_block")
    asked = hopper(traits)
    kernel = triton_grouped.experts(**asked, tiles=lambda n: tiles.default(asked, 4 * n))
    judged(None, traits, 300, device="cuda", made=kernel)


def test_persistent_products_repeat_themselves():
    """Tiles go to whoever asks first: the result must not know."""
    traits = layer(32, 8, 1024, 512, "fp8_block")
    kernel = triton_grouped.experts(**hopper(traits))
    args, kwargs = cases.inputs(traits, 3000, device="cuda", flavour="skewed")
    first = kernel(*args, **kwargs)
    for _ in range(20):
        assert torch.equal(kernel(*args, **kwargs), first)


def test_persistent_products_in_a_graph():
    """The counters that hand out tiles begin anew with every replay."""
    traits = layer(32, 8, 1024, 512, "fp8_block")
    args, kwargs = cases.inputs(traits, 1500, device="cuda")
    wanted = triton_grouped.experts(**hopper(traits))(*args, **kwargs)
    kernel = triton_grouped.experts(**{**hopper(traits), "output_alias": True})
    out = torch.full_like(args[0], float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernel(*args, **kwargs, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*args, **kwargs, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)


def test_weights_that_begin_anywhere():
    """A tensor descriptor begins at a multiple of 16 bytes; weights that do not are read another way."""
    traits = layer(8, 2, 640, 384, "fp8_block")
    args, kwargs = cases.inputs(traits, 700, device="cuda")
    hidden, w13, w2, *routing = args

    def moved(weights):
        buffer = torch.empty(weights.numel() + 8, dtype=torch.uint8, device="cuda")
        buffer[8:] = weights.view(torch.uint8).flatten()
        return buffer[8:].view(weights.dtype).view(weights.shape)
    kernel = triton_grouped.experts(**hopper(traits))
    judged(None, traits, 700, device="cuda", made=lambda h, a, b, *rest, **named: kernel(h, moved(a), moved(b), *rest,
                                                                                        **named))
