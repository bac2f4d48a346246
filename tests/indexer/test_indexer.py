"""indexer.wk_weights_proj: what every implementation computes, and which one the registry chooses."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from indexer_support import bits, judged, layer, same

from kernel_registry import registry
from kernel_registry.errors import InputError, TraitError
from kernel_registry.ops.indexer.wk_weights_proj import cases, oracle, reference, torch_fused

OP = "indexer.wk_weights_proj"
modules = [reference, torch_fused]
if importlib.util.find_spec("triton"):
    from kernel_registry.ops.indexer.wk_weights_proj import triton_columns, triton_fused

    modules += [triton_columns, triton_fused]
each = pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__.rpartition(".")[2])
needs_triton = pytest.mark.skipif(len(modules) < 3, reason="needs triton")
SHAPES = (layer(256, 32, 16), layer(511, 37, 11), layer(64, 16, 8, dtype="float16"), layer(1, 1, 1),
          layer(1920, 128, 64))


def factory(module):
    return module.separate if module is reference else module.fused


# ---- values ----------------------------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_every_flavour_and_shape(module, flavour, device):
    for seed, traits in enumerate(SHAPES):
        verdict = judged(module, traits, 5, flavour=flavour, seed=seed, device=device)
        assert verdict.exact == (flavour == "exact")


@each
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 128])
def test_every_number_of_tokens(module, tokens, device):
    judged(module, layer(384, 24, 8), tokens, flavour="exact", device=device)
    judged(module, layer(384, 24, 8), tokens, flavour="strided", device=device)


@each
def test_a_models_sizes(module, device):
    judged(module, layer(7168, 128, 64), 2, device=device)


@each
@pytest.mark.parametrize("shape", [(0, 256), (0, 3, 256), (2, 0, 256)])
def test_no_tokens(module, shape, device):
    traits = layer(256, 32, 16)
    (_, weight), _ = cases.inputs(traits, 1, device=device)
    k, head_weights = factory(module)(**traits)(torch.empty(shape, dtype=torch.bfloat16, device=device), weight)
    assert k.shape == (*shape[:-1], 32) and head_weights.shape == (*shape[:-1], 16)
    assert k.dtype is head_weights.dtype is torch.bfloat16


@each
def test_leading_dimensions_change_no_bit(module, device):
    traits = layer(256, 32, 16)
    (x, weight), _ = cases.inputs(traits, 12, device=device)
    kernel = factory(module)(**traits)
    for flat, deep in zip(kernel(x, weight), kernel(x.view(2, 3, 2, 256), weight)):
        assert same(flat.reshape(2, 3, 2, -1), deep)


@pytest.mark.parametrize("module", modules[1:], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_results_are_views_of_one_tensor(module, device):
    traits = layer(256, 32, 16)
    (x, weight), _ = cases.inputs(traits, 4, device=device)
    k, head_weights = factory(module)(**traits)(x, weight)
    assert k.untyped_storage().data_ptr() == head_weights.untyped_storage().data_ptr()
    assert k.stride() == head_weights.stride() == (48, 1) and head_weights.storage_offset() == 32


@each
def test_weights_that_only_one_row_differs_in(module, device):
    """A result's column depends on its own row of the weights alone."""
    traits = layer(512, 32, 16)
    (x, weight), _ = cases.inputs(traits, 9, device=device)
    kernel = factory(module)(**traits)
    before = torch.cat(kernel(x, weight), -1)
    weight = weight.clone()
    weight[31] = 0
    after = torch.cat(kernel(x, weight), -1)
    assert not after[:, 31].any()
    rest = [column for column in range(48) if column != 31]
    assert same(before[:, rest], after[:, rest])


# ---- as two projections ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU's library; on a GPU libraries sum as they choose")
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33, 128])
@pytest.mark.parametrize("sizes", [(7168, 128, 64), (2048, 128, 32), (511, 37, 11)])
def test_one_multiplication_has_the_bits_of_two(sizes, tokens):
    """bfloat16 on a CPU: its library sums a column alike, however many columns there are."""
    traits = layer(*sizes)
    (x, weight), _ = cases.inputs(traits, tokens, seed=tokens)
    for one, two in zip(torch_fused.fused(**traits)(x, weight), reference.separate(**traits)(x, weight)):
        assert same(one, two)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_where_every_order_is_exact_all_have_the_bits_of_two(module, dtype, device):
    if "triton" in module.__name__ and dtype == "float32":
        pytest.skip("the kernels take 16 bits only")
    traits = layer(2048, 128, 64, dtype=dtype)
    (x, weight), _ = cases.inputs(traits, 7, device=device, flavour="exact")
    for one, two in zip(factory(module)(**traits)(x, weight), reference.separate(**traits)(x, weight)):
        assert same(one, two)


@each
def test_within_one_unit_of_two_projections(module, device):
    """Whatever the order of the sums: 999 of 1000 results are two linear calls' or the bfloat16 next to them."""
    traits = layer(1024, 128, 64)
    (x, weight), _ = cases.inputs(traits, 33, seed=4, device=device)
    for one, part in zip(factory(module)(**traits)(x, weight), weight.split([128, 64])):
        two = torch.nn.functional.linear(x, part)
        steps = [bits(tensor).view(torch.int16).int() for tensor in (one, two)]
        steps = [torch.where(step < 0, -(step & 0x7FFF), step) for step in steps]  # in the order of the numbers
        assert ((steps[0] - steps[1]).abs() <= 1).float().mean() >= 0.999


@needs_triton
@pytest.mark.parametrize("module", modules[2:], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_kernels_columns_do_not_depend_on_each_other(module, device):
    """Fused or on each matrix alone, whatever the values and the tokens beside: the same kernel gives the same bits."""
    traits = layer(1000, 40, 24)
    (x, weight), _ = cases.inputs(traits, 19, device=device)
    k, head_weights = module.fused(**traits)(x, weight)
    padded = torch.cat([weight[:40], torch.zeros_like(weight[:1])])
    assert same(k, module.fused(**layer(1000, 40, 1))(x, padded)[0])
    padded = torch.cat([torch.zeros_like(weight[:1]), weight[40:]])
    assert same(head_weights, module.fused(**layer(1000, 1, 24))(x, padded)[1])
    assert same(torch.cat(module.fused(**traits)(x[7:8], weight), -1), torch.cat([k, head_weights], -1)[7:8])


@needs_triton
@pytest.mark.parametrize("options", [{}, dict(columns_per_program=16), dict(columns_per_program=64)])
def test_tiles_and_tokens_change_no_bit(options, device):
    traits = layer(900, 40, 24)
    (x, weight), _ = cases.inputs(traits, 70, device=device)
    expected = torch.cat(triton_fused.fused(**traits)(x, weight), -1)
    made = triton_fused.fused(**traits, **options)
    for count in (70, 33, 1):
        assert same(torch.cat(made(x[:count], weight), -1), expected[:count])


@needs_triton
@pytest.mark.parametrize("splits", [1, 3, 8, 100])
def test_any_number_of_pieces(splits, device):
    judged(triton_fused, layer(1000, 20, 12), 3, device=device, splits=splits)
    judged(triton_fused, layer(1000, 20, 12), 3, flavour="exact", device=device, splits=splits)


@needs_triton
def test_the_counters_are_zero_again(device, monkeypatch):
    seen = []
    original = triton_fused.Arrivals.take
    monkeypatch.setattr(triton_fused.Arrivals, "take", lambda *a: seen.append(original(*a)) or seen[-1])
    judged(triton_fused, layer(1000, 20, 12), 40, device=device)
    assert seen[0].numel() == 8 and not seen[0].any()


@needs_triton
def test_options_that_are_refused():
    for options in (dict(columns_per_program=8), dict(columns_per_program=24), dict(block_k=100), dict(splits=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            triton_fused.fused(**layer(256, 32, 16), **options)


# ---- nvfp4 -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flavour", cases.FLAVOURS)
def test_nvfp4_is_two_multiplications(flavour, device):
    traits = layer(256, 32, 16, wk_format="nvfp4")
    assert judged(reference, traits, 6, flavour=flavour, device=device).exact == (flavour == "exact")
    (x, *weights), kwargs = cases.inputs(traits, 6, device=device)
    with torch.profiler.profile() as profile:
        reference.separate(**traits)(x, *weights, **kwargs)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::linear") == 2


def test_the_registry_chooses():
    sizes = dict(hidden_size=7168, head_dim=128, num_heads=64, platform="sm_90")

    def chosen(**other):
        return registry.explain(OP, **{**sizes, **other}).winner

    for wk_format in ("none", "fp8_block", "fp8_channel", "mxfp8"):
        assert chosen(wk_format=wk_format, num_tokens=1) == "triton_columns.one"
    assert chosen(num_tokens=4) == "triton_columns"
    assert chosen(num_tokens=5) == chosen(num_tokens=16) == "triton_fused"
    assert chosen(num_tokens=17) == "triton_fused_wide"
    assert chosen(num_tokens=128) == "triton_fused_wide"
    assert chosen(num_tokens=129) == "torch_fused"
    assert chosen(num_tokens=1, dtype="float32") == "torch_fused"
    assert chosen(num_tokens=1, platform="cpu") == "torch_fused"
    for tokens in (1, 1000):
        assert chosen(num_tokens=tokens, wk_format="nvfp4") == "torch_separate"
    assert "wk_format" in str(registry.explain(OP, **sizes, num_tokens=1, wk_format="nvfp4"))
    with pytest.raises(TraitError, match="hidden_size % 16"):
        registry.dispatch(OP, **{**sizes, "hidden_size": 100}, wk_format="nvfp4")


def test_bound_to_no_number_of_tokens():
    traits = dict(hidden_size=64, head_dim=16, num_heads=8, platform="cpu")
    bound = registry.bind(OP, **traits)
    (x, weight), _ = cases.inputs(traits, 200)
    registry.prepare(OP, weight, **traits)
    assert oracle.check(traits, (x, weight), {}, bound(x, weight)).passed
    assert bound(x.view(2, 100, 64), weight)[0].shape == (2, 100, 16)


# ---- what is refused -------------------------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("change, expected", [
    (dict(x=torch.zeros(3, 255, dtype=torch.bfloat16)), r"hidden_states is \[3, 255\]"),
    (dict(x=torch.zeros(256, dtype=torch.bfloat16)), r"hidden_states is \[256\]"),
    (dict(x=torch.zeros(3, 256)), "float32 on cpu, expected"),
    (dict(weight=torch.zeros(47, 256, dtype=torch.bfloat16)), r"weight is \[47, 256\]"),
    (dict(weight=torch.zeros(256, 48, dtype=torch.bfloat16).t()), "weight is strided"),
    (dict(weight=None), "weight is None"),
    (dict(weights_proj=torch.zeros(16, 256, dtype=torch.bfloat16)), "weights_proj is given"),
    (dict(wk_scale=torch.zeros(1)), "wk_scale is given"),
])
def test_tensors_that_contradict_the_traits(module, change, expected):
    traits = layer(256, 32, 16)
    (x, weight), _ = cases.inputs(traits, 3)
    call = {"x": x, "weight": weight, "weights_proj": None, "wk_scale": None, **change}
    with pytest.raises(InputError, match=expected):
        factory(module)(**traits)(call["x"], call["weight"], call["weights_proj"], wk_scale=call["wk_scale"])


@needs_triton
def test_too_many_tokens_for_the_kernel(device):
    traits = layer(64, 16, 8)
    (x, weight), _ = cases.inputs(traits, 129, device=device)
    with pytest.raises(InputError, match="129 tokens, this kernel takes up to 128"):
        triton_fused.fused(**traits)(x, weight)


# ---- the judge -------------------------------------------------------------------------------------------------------

def test_the_judge_finds_what_is_wrong():
    traits = layer(2048, 32, 16)
    args, kwargs = cases.inputs(traits, 16, seed=3)
    x, weight = args
    exact = x.float() @ weight.float().t()

    def verdict(result, traits=traits):
        return oracle.check(traits, args, kwargs, (result[:, :32], result[:, 32:])).passed

    assert verdict(exact.bfloat16())
    halves = (x[:, :1024].float() @ weight[:, :1024].float().t()).bfloat16() + \
        (x[:, 1024:].float() @ weight[:, 1024:].float().t()).bfloat16()
    assert not verdict(halves)  # cast twice
    assert not verdict(torch.roll(exact, 1, 1).bfloat16())  # the split a column off
    assert not verdict((exact - x[:, -1:].float() * weight[:, -1].float()).bfloat16())  # the last product forgotten
    assert not verdict(exact)  # in float32
    cut = (bits(exact).view(torch.int32) & -65536).view(torch.float32)
    assert not verdict(cut.view(16, 48).bfloat16())  # cut off, not rounded
