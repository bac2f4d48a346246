"""moe.routing_bias: a real router's bias, prepared in place; and everything that would make that harmful, refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_registry import Registry, moe_router
from kernel_registry.bench import bench
from kernel_registry.errors import (
    CaptureError,
    InputError,
    NoImplementationError,
    OverrideError,
    PreparationError,
    TraitError,
)
from kernel_registry.ops.moe.routing_bias import oracle
from kernel_registry.preparation import preparation_of
from kernel_registry.verify import verify

OP, NAME = "moe.routing_bias", "e_score_correction_bias"
EXPERTS = 64
ROUTER = dict(num_experts=EXPERTS, topk=4, num_expert_group=4, topk_group=2, dtype="bfloat16")
TO_BF16 = dict(ROUTER, bias_dtype="bfloat16")


class Gate(torch.nn.Module):
    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(EXPERTS, 8), requires_grad=False)
        self.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)


class Router:
    """Not a module: holds the parameter that it was given, as the routing layers of serving engines do."""

    def __init__(self, bias):
        self.bias = bias


class Layer(torch.nn.Module):
    """One parameter with four holders, two of them under another name."""

    def __init__(self, bias: torch.Tensor):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.gate = Gate(bias)
        self.experts = torch.nn.Module()
        self.experts.correction = self.gate.e_score_correction_bias
        self.router = Router(self.gate.e_score_correction_bias)
        self.held = {"bias": self.gate.e_score_correction_bias}

    @property
    def holders(self):
        return (self.gate.e_score_correction_bias, self.experts.correction, self.router.bias, self.held["bias"])


def exact(seed=0, shape=(EXPERTS,)) -> torch.Tensor:
    """float32 values that bfloat16 and float16 hold."""
    return torch.randint(-255, 256, shape, generator=torch.Generator().manual_seed(seed)) / 64


def band(seed=0) -> torch.Tensor:
    """As GLM-5.2's biases lie: of which bfloat16 leaves a handful."""
    return 6.817 + (7.063 - 6.817) * torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def registry():
    return Registry(plugins=False, environment=False, platform="cpu")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- what it does ----------------------------------------------------------------------------------------------------

def test_the_parameter_stays_the_same_object_in_every_holder(registry):
    layer = Layer(exact())
    bias = layer.gate.e_score_correction_bias
    bias.weight_loader = loader = object()
    made = registry.prepare(OP, layer, **TO_BF16)
    assert [*made] == [f"gate.{NAME}"] and made[f"gate.{NAME}"] is bias
    assert all(holder is bias for holder in layer.holders)
    assert bias.dtype == torch.bfloat16 and type(bias) is torch.nn.Parameter and not bias.requires_grad
    assert bias.weight_loader is loader
    assert same_bits(bias.data, exact().bfloat16())
    report, = preparation_of(bias).report
    assert (report.parameter, report.before, report.after, report.tokens) == (f"gate.{NAME}", "float32", "bfloat16", 0)


def test_the_same_dtype_means_nothing_is_done(registry):
    layer = Layer(band())
    bias = layer.gate.e_score_correction_bias
    view = bias[1:]  # nobody minds: the storage stays
    pointer, version = bias.data_ptr(), bias._version
    with Counted() as counted:
        registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    assert (bias.data_ptr(), bias._version) == (pointer, version) and view.data_ptr() == pointer + 4
    assert counted.names == []
    assert str(preparation_of(bias).report[0]) == f"gate.{NAME}: float32 already, nothing done"


def test_repeating_it_changes_nothing(registry):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    bias = layer.gate.e_score_correction_bias
    pointer, bits = bias.data_ptr(), bias.data.clone()
    registry.prepare(OP, layer, **TO_BF16)
    assert bias.data_ptr() == pointer and same_bits(bias.data, bits)


def test_back_to_float32_is_exact(registry):
    bias = torch.nn.Parameter(band().bfloat16(), requires_grad=False)
    assert registry.prepare(OP, bias, **ROUTER, bias_dtype="float32") is bias
    assert same_bits(bias.data, band().bfloat16().float())


def test_float32_values_that_both_have_are_taken_and_odd_ones_stay(registry):
    values = torch.zeros(EXPERTS)
    values[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 2.0**-133])  # the last is subnormal in bfloat16
    bias = registry.prepare(OP, torch.nn.Parameter(values.clone(), requires_grad=False), **TO_BF16)
    assert same_bits(bias.data.float().nan_to_num(7.0), values.nan_to_num(7.0))


def test_a_bias_of_two_routers(registry):
    layer = Layer(exact(shape=(2, EXPERTS)))
    registry.prepare(OP, layer, **TO_BF16)
    assert same_bits(layer.gate.e_score_correction_bias.data, exact(shape=(2, EXPERTS)).bfloat16())


def test_a_buffer_is_found_too(registry):
    module = torch.nn.Module()
    module.register_buffer(NAME, exact())
    buffer = module.e_score_correction_bias
    registry.prepare(OP, module, **TO_BF16)
    assert module.e_score_correction_bias is buffer and buffer.dtype == torch.bfloat16


def test_every_layer_of_a_model_and_only_what_has_the_name(registry):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Layer(exact(seed)) for seed in range(3))
    model.not_e_score_correction_bias = torch.nn.Parameter(exact())
    made = registry.prepare(OP, model, **TO_BF16)
    assert [*made] == [f"layers.{n}.gate.{NAME}" for n in range(3)]
    assert model.not_e_score_correction_bias.dtype == torch.float32
    only = registry.prepare(OP, model, **ROUTER, bias_dtype="float32", name=f"1.gate.{NAME}")
    assert [*only] == [f"layers.1.gate.{NAME}"]
    assert [layer.gate.e_score_correction_bias.dtype for layer in model.layers] == \
        [torch.bfloat16, torch.float32, torch.bfloat16]


def test_another_name(registry):
    layer = Layer(exact())
    made = registry.prepare(OP, layer, **TO_BF16, name="correction")
    assert [*made] == ["experts.correction"] and layer.gate.e_score_correction_bias.dtype == torch.bfloat16


# ---- what it refuses -------------------------------------------------------------------------------------------------

def untouched(layer, values):
    return same_bits(layer.gate.e_score_correction_bias.data, values)


def test_a_missing_target_is_an_error(registry):
    layer = Layer(exact())
    with pytest.raises(TraitError, match="missing bias_dtype"):
        registry.prepare(OP, layer, **ROUTER)
    with pytest.raises(TraitError, match="bias_dtype: expected a dtype"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype=None)
    with pytest.raises(NoImplementationError, match="bias_dtype is int32"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype="int32")
    assert untouched(layer, exact())


def test_a_call_without_a_bias_or_with_no_bias_is_an_error(registry):
    take = registry.bind(OP, **TO_BF16)
    with pytest.raises(InputError, match=rf"correction_bias is None, expected \[\.\.\., {EXPERTS}\] bfloat16"):
        take(None)
    for wrong in (3, torch.zeros(EXPERTS + 1, dtype=torch.bfloat16), exact().bfloat16()):
        with pytest.raises(PreparationError, match="correction_bias is not prepared"):
            take(wrong)


def test_a_module_without_the_parameter_is_an_error(registry):
    layer = Layer(exact())
    with pytest.raises(PreparationError, match=f"Layer has no parameter and no buffer called wrong.*\n.*gate.{NAME}"):
        registry.prepare(OP, layer, **TO_BF16, name="wrong")
    with pytest.raises(PreparationError, match="Linear has no parameter"):
        registry.prepare(OP, torch.nn.Linear(2, 2, bias=False), **TO_BF16)
    with pytest.raises(PreparationError, match="a NoneType was to be prepared"):
        registry.prepare(OP, None, **TO_BF16)


@pytest.mark.parametrize("bias", [torch.zeros(EXPERTS + 1), torch.zeros(EXPERTS, dtype=torch.int32), torch.tensor(1.0)])
def test_what_is_no_bias_of_these_experts(registry, bias):
    with pytest.raises(PreparationError, match=rf"correction_bias is \[.*\] .*, expected \[{EXPERTS}\] of floating"):
        registry.prepare(OP, bias, **TO_BF16)


def test_narrowing_that_changes_a_value_is_refused_with_the_counts(registry):
    layer = Layer(band())
    before, after = band().unique().numel(), band().bfloat16().unique().numel()
    assert before > 60 and after < 12
    pattern = rf"gate.{NAME} would go from float32 to bfloat16, .* of {before} distinct ones {after} would be left"
    with pytest.raises(PreparationError, match=pattern) as caught:
        registry.prepare(OP, layer, **TO_BF16)
    assert "bias_dtype=float32" in caught.value.hint and "narrow=True" in caught.value.hint
    assert untouched(layer, band()) and preparation_of(layer.gate.e_score_correction_bias) is None


def test_one_changed_value_is_enough_and_no_layer_is_changed_before_all_may_be(registry):
    odd = exact(1)
    odd[-1] = 1 + 2**-9
    model = torch.nn.ModuleList([Layer(exact()), Layer(odd.clone())])
    with pytest.raises(PreparationError, match=f"1.gate.{NAME} would go"):
        registry.prepare(OP, model, **TO_BF16)
    assert untouched(model[0], exact()) and untouched(model[1], odd)
    overflow = torch.nn.Parameter(torch.full((EXPERTS,), 65_536.0))
    with pytest.raises(PreparationError, match="of 1 distinct ones 1 would be left"):
        registry.prepare(OP, overflow, **ROUTER, bias_dtype="float16")


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_narrowing_by_name_says_how_many_tokens_change_experts(registry, scoring):
    layer = Layer(band())
    registry.prepare(OP, layer, **TO_BF16, scoring=scoring, narrow=True)
    bias = layer.gate.e_score_correction_bias
    assert same_bits(bias.data, band().bfloat16())  # to the nearest, ties to even
    report, = preparation_of(bias).report
    assert report.distinct_before == band().unique().numel() and report.distinct_after == bias.unique().numel()
    route = registry.dispatch("moe.topk", **{**ROUTER, "dtype": "float32"}, bias_dtype="float32",
                              implementation="torch", scoring=scoring)
    logits = torch.randn(1024, EXPERTS, generator=torch.Generator().manual_seed(0))
    sets = [{tuple(sorted(row)) for row in [ids]} for ids in route(logits, band())[1].tolist()]
    others = [{tuple(sorted(row)) for row in [ids]} for ids in route(logits, bias.data.float())[1].tolist()]
    assert report.tokens == 1024 and report.changed_tokens == sum(a != b for a, b in zip(sets, others)) > 100
    assert f"{report.changed_tokens} of 1024 random tokens change experts" in str(report)


def test_the_probe_routes_tokens_of_their_own_with_each_row(registry):
    both, one = (torch.nn.Parameter(values, requires_grad=False) for values in (torch.stack([band(), exact()]), band()))
    registry.prepare(OP, both, **TO_BF16, narrow=True)
    registry.prepare(OP, one, **TO_BF16, narrow=True)
    (of_both,), (of_one,) = preparation_of(both).report, preparation_of(one).report
    assert (of_both.tokens, of_one.tokens) == (2048, 1024)
    assert of_both.changed_tokens == of_one.changed_tokens > 0, "the second row's values are all kept"


def test_the_probe_leaves_shared_experts_out(registry):
    bias = torch.nn.Parameter(band(), requires_grad=False)
    registry.prepare(OP, bias, **{**TO_BF16, "topk": 5, "num_fused_shared_experts": 1}, narrow=True)
    other = torch.nn.Parameter(band(), requires_grad=False)
    registry.prepare(OP, other, **TO_BF16, narrow=True)
    assert preparation_of(bias).report[0].changed_tokens == preparation_of(other).report[0].changed_tokens


@pytest.mark.parametrize("hold, name", [
    (lambda layer, view: setattr(layer, "row", view), "row is a view"),
    (lambda layer, view: setattr(layer.experts, "row", view), "experts.row is a view"),
    (lambda layer, view: setattr(layer.experts, "rows", [None, view]), r"experts.rows\[1\] is a view"),
    (lambda layer, view: setattr(layer, "rows", {"text": view}), r"rows\['text'\] is a view"),
    (lambda layer, view: layer.register_buffer("kept", view), "kept is a view"),
    (lambda layer, view: setattr(layer.router, "row", view), "Router.row is a view"),
    (lambda layer, view: setattr(layer, "tied", torch.nn.Parameter(view, requires_grad=False)), "tied is a view"),
])
@pytest.mark.parametrize("take", [lambda bias: bias[1], lambda bias: bias.data, lambda bias: bias.view(-1).detach()],
                         ids=["row", "data", "flat"])
def test_views_that_would_be_left_behind_are_named(registry, hold, name, take):
    values = exact(shape=(2, EXPERTS))
    layer = Layer(values.clone())
    hold(layer, take(layer.gate.e_score_correction_bias))
    with pytest.raises(PreparationError, match=f"{name} of gate.{NAME}"):
        registry.prepare(OP, layer, **TO_BF16)
    assert untouched(layer, values)


def test_a_view_that_no_module_holds_is_found(registry):
    bias = torch.nn.Parameter(exact(), requires_grad=False)
    elsewhere = {"row": bias[3:]}
    with pytest.raises(PreparationError, match="'row' in a dict is a view of correction_bias"):
        registry.prepare(OP, bias, **TO_BF16)
    elsewhere.clear()
    registry.prepare(OP, bias, **TO_BF16)
    assert bias.dtype == torch.bfloat16


def test_the_tensor_of_which_the_bias_is_a_part_is_found(registry):
    layer = Layer(exact())
    layer.fused = torch.zeros(4, EXPERTS)
    layer.gate.e_score_correction_bias.data = layer.fused[2]
    with pytest.raises(PreparationError, match="fused is a view"):
        registry.prepare(OP, layer, **TO_BF16)


def test_garbage_is_nobodys_view(registry):
    layer = Layer(exact())
    cycle = {"row": layer.gate.e_score_correction_bias[1:]}
    cycle["self"] = cycle
    del cycle
    registry.prepare(OP, layer, **TO_BF16)
    assert layer.gate.e_score_correction_bias.dtype == torch.bfloat16


def test_refused_once_a_captured_graph_has_read_it(registry, monkeypatch):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    take, bias = registry.bind(OP, **TO_BF16), layer.gate.e_score_correction_bias
    pointer = bias.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr("kernel_registry.preparation.capturing", lambda: True)
        take(bias)
        with pytest.raises(CaptureError, match="while a CUDA graph is captured"):
            registry.prepare(OP, layer, **TO_BF16)
    with pytest.raises(CaptureError, match=f"gate.{NAME} was read by a captured CUDA graph"):
        registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    registry.prepare(OP, layer, **TO_BF16)  # nothing moves
    assert bias.data_ptr() == pointer and take(bias) is bias


# ---- loading ---------------------------------------------------------------------------------------------------------

def write_torch(path, tensors):
    torch.save(tensors, path)


def read_torch(path):
    return torch.load(path, weights_only=True)


def write_safetensors(path, tensors):
    pytest.importorskip("safetensors.torch").save_file(tensors, path)


def read_safetensors(path):
    return pytest.importorskip("safetensors.torch").load_file(path)


@pytest.fixture(params=["safetensors", "torch"])
def checkpoint(request, tmp_path):
    """Writes a bias as a checkpoint of one layer; returns how to read it."""
    write, read = {"safetensors": (write_safetensors, read_safetensors), "torch": (write_torch, read_torch)
                   }[request.param]

    def make(values, name="shard"):
        write(tmp_path / name, {f"gate.{NAME}": values, "gate.weight": torch.ones(EXPERTS, 8)})
        return lambda: read(tmp_path / name)
    return make


def by_copy(layer, tensors):
    """As the loaders of serving engines do it."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


def by_state_dict(layer, tensors):
    layer.load_state_dict(tensors, strict=False)


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_before_or_after_loading_gives_the_same_bits(registry, checkpoint, load):
    read = checkpoint(exact(3))
    first, last = Layer(torch.zeros(EXPERTS)), Layer(torch.zeros(EXPERTS))
    registry.prepare(OP, first, **TO_BF16)
    load(first, read())
    load(last, read())
    registry.prepare(OP, last, **TO_BF16)
    a, b = first.gate.e_score_correction_bias, last.gate.e_score_correction_bias
    assert same_bits(a.data, b.data) and same_bits(a.data, exact(3).bfloat16())
    take = registry.bind(OP, **TO_BF16)
    assert take(a) is a and take(b) is b


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_narrowed_before_or_after_loading_gives_the_same_bits(registry, checkpoint, load):
    read = checkpoint(band(3))
    first, last = Layer(torch.zeros(EXPERTS)), Layer(torch.zeros(EXPERTS))
    registry.prepare(OP, first, **TO_BF16, narrow=True)
    load(first, read())
    load(last, read())
    registry.prepare(OP, last, **TO_BF16, narrow=True)
    assert same_bits(first.gate.e_score_correction_bias.data, last.gate.e_score_correction_bias.data)


@pytest.mark.parametrize("load", [by_copy, by_state_dict])
def test_a_reload_keeps_object_storage_dtype_and_tag(registry, checkpoint, load):
    layer, take = Layer(exact()), registry.bind(OP, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16)
    bias = layer.gate.e_score_correction_bias
    pointer = bias.data_ptr()
    load(layer, checkpoint(exact(7))())
    assert layer.gate.e_score_correction_bias is bias is take(bias) and bias.data_ptr() == pointer
    assert same_bits(bias.data, exact(7).bfloat16())


def test_a_later_load_that_would_round_is_refused_too(registry, checkpoint):
    layer, read = Layer(torch.zeros(EXPERTS)), checkpoint(band())
    registry.prepare(OP, layer, **TO_BF16)
    for _ in range(2):
        with pytest.raises(PreparationError, match=f"gate.{NAME} would go from float32 to bfloat16, which changes"):
            by_state_dict(layer, read())
        assert not layer.gate.e_score_correction_bias.any()
        registry.prepare(OP, layer, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16, narrow=True)
    by_state_dict(layer, read())
    assert same_bits(layer.gate.e_score_correction_bias.data, band().bfloat16())
    copied = copy.deepcopy(layer)  # the guard is no obstacle to copying
    by_state_dict(copied, checkpoint(exact(), "other")())


def test_a_parameter_that_was_made_in_the_narrow_dtype_is_guarded(registry, checkpoint):
    layer = Layer(torch.zeros(EXPERTS, dtype=torch.bfloat16))
    registry.prepare(OP, layer, **TO_BF16)
    with pytest.raises(PreparationError, match="would go from float32 to bfloat16"):
        by_state_dict(layer, checkpoint(band())())


def test_a_parameter_on_the_meta_device(registry):
    with torch.device("meta"):
        layer = Layer(torch.empty(EXPERTS))
    bias = layer.gate.e_score_correction_bias
    with pytest.raises(PreparationError, match="before its values are there"):
        registry.prepare(OP, layer, **TO_BF16)
    registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")
    registry.prepare(OP, layer, **TO_BF16, narrow=True)
    assert layer.gate.e_score_correction_bias is bias and bias.is_meta and bias.dtype == torch.bfloat16
    registry.prepare(OP, layer, **ROUTER, bias_dtype="float32")  # wider: needs no values
    assert bias.dtype == torch.float32


def test_another_parameter_in_its_place_has_to_be_prepared(registry, checkpoint):
    layer, take = Layer(exact()), registry.bind(OP, **TO_BF16)
    registry.prepare(OP, layer, **TO_BF16)
    layer.load_state_dict(checkpoint(band())(), strict=False, assign=True)
    assert untouched(layer, band())
    with pytest.raises(PreparationError, match="correction_bias is not prepared"):
        take(layer.gate.e_score_correction_bias)


# ---- the forward pass ------------------------------------------------------------------------------------------------

class Counted(TorchDispatchMode):
    """The aten calls made inside: all of them, and the casts of tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.names, self.casts = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        self.casts += "_to_copy" in str(function) and args[0].shape == (EXPERTS,)
        return function(*args, **(kwargs or {}))


def test_a_forward_pass_makes_no_call_for_the_bias(registry):
    layer = Layer(exact())
    registry.prepare(OP, layer, **TO_BF16)
    take, bias = registry.bind(OP, **TO_BF16), layer.gate.e_score_correction_bias
    with Counted() as counted:
        for _ in range(3):
            assert take(bias) is bias
    assert counted.names == []


def test_a_float32_bias_and_bfloat16_logits_are_routed_as_they_are():
    """On the GPU by kernels that cast in registers, on the CPU by the reference: with no cast of the bias."""
    layer = Layer(band())
    bias, pointer = layer.gate.e_score_correction_bias, layer.gate.e_score_correction_bias.data_ptr()
    for platform in ("cpu", "interpreter", "sm_90", "gfx942"):
        registry = Registry(plugins=False, environment=False, platform=platform)
        route = moe_router(bias, registry=registry, **ROUTER)
        assert route.traits["bias_dtype"] == "float32" and route.traits["dtype"] == "bfloat16"
        assert route.name.startswith("torch" if platform == "cpu" else "triton_biased_grouped")
        assert bias.data_ptr() == pointer and same_bits(bias.data, band())
    route = moe_router(bias, registry=Registry(plugins=False, environment=False, platform="cpu"), **ROUTER)
    logits = torch.randn(5, EXPERTS).bfloat16()
    with Counted() as counted:
        route(logits, bias)
    assert counted.names and counted.casts == 0
    with Counted() as counted:  # what is saved: the same with a cast in every call
        route(logits, bias.data.to(torch.bfloat16).to(torch.float32))
    assert counted.casts == 2


NARROW = """
version: 1
ops:
  moe.topk:
    implementations:
      narrow:
        target: kernel_registry.ops.moe.topk.reference:topk
        rank: 1
        when: {platform: any, dtype: any, bias_dtype: bfloat16, num_expert_group: any, topk_group: any, contiguous: any}
"""


@pytest.fixture
def narrow(tmp_path):
    """A registry with one router more, which goes first where the bias is bfloat16 and takes no other."""
    path = tmp_path / "narrow.yaml"
    path.write_text("version: 1\nops:" + NARROW.partition("ops:")[2])
    registry = Registry(plugins=False, environment=False, platform="cpu")
    registry.load_overrides(path, allow_targets=True)
    return registry


def test_a_router_of_one_dtype_does_not_decide_while_another_takes_the_bias_as_it_is(narrow):
    layer = Layer(exact())
    route = moe_router(layer.gate.e_score_correction_bias, registry=narrow, **ROUTER)
    assert route.name == "torch" and untouched(layer, exact())
    assert preparation_of(layer.gate.e_score_correction_bias) is None


@pytest.mark.parametrize("bias", [exact().double(), exact()[::2].repeat_interleave(2)])
def test_a_bias_that_is_taken_as_it_is_needs_nothing_of_moe_routing_bias(registry, bias):
    """Nor that its dtype be one that a bias can be given."""
    with registry.disable(OP, "in_place"):
        route = moe_router(bias, registry=registry, **ROUTER)
    assert route.traits["bias_dtype"] == str(bias.dtype).removeprefix("torch.")
    assert route(torch.randn(5, EXPERTS).bfloat16(), bias)[1].shape == (5, 4)


def test_a_router_that_was_asked_for_gets_the_dtype_that_it_declares(narrow):
    layer = Layer(exact())
    bias = layer.gate.e_score_correction_bias
    route = moe_router(bias, registry=narrow, implementation="narrow", **ROUTER)
    assert route.name == "narrow" and bias.dtype == torch.bfloat16
    assert narrow.bind(OP, **TO_BF16)(bias) is bias
    weights, ids = route(torch.randn(5, EXPERTS).bfloat16(), bias)
    assert weights.shape == ids.shape == (5, 4)
    with pytest.raises(PreparationError, match="would go from float32 to bfloat16"):
        moe_router(Layer(band()).gate.e_score_correction_bias, registry=narrow, implementation="narrow", **ROUTER)
    wide = Layer(band()).gate.e_score_correction_bias
    moe_router(wide, registry=narrow, implementation="narrow", narrow=True, **ROUTER)
    assert wide.dtype == torch.bfloat16


def test_what_no_router_serves_is_told_for_the_bias_as_it_is(narrow):
    bias = Layer(exact()).gate.e_score_correction_bias
    with pytest.raises(OverrideError, match="bias_dtype is float32, serves bfloat16"):
        moe_router(bias, registry=narrow, implementation="narrow", **ROUTER, scoring="softmax")
    with pytest.raises(TraitError, match="bias_dtype follows from the bias"):
        moe_router(bias, registry=narrow, **TO_BF16)
    with pytest.raises(TraitError, match="got no bias\n.*has_bias=False"):
        moe_router(None, registry=narrow, **ROUTER)


def test_it_verifies(registry):
    report = verify(registry, ops=[OP], budget=24)
    assert report.ok and {row.outcome for row in report.rows} == {"passed"}


def test_it_is_benchmarked(registry):
    row, = bench(registry, ops=[OP], workloads=["deepseek-v3-bf16"], tokens=[1], seconds=0.01)
    assert row.implementation == "in_place" and row.chosen and row.microseconds and not row.error


@pytest.mark.parametrize("wrong", [
    lambda bias: bias, lambda bias: bias.to(torch.float16), lambda bias: bias.bfloat16()[None],
    lambda bias: (bias + 1 / 64).bfloat16(), lambda bias: torch.where(bias == 0, -0.0, bias).bfloat16()])
def test_the_judge_sees_what_is_wrong(wrong):
    traits = dict(TO_BF16)
    values = exact()
    values[5] = 0.0
    assert oracle.check(traits, (values,), {}, values.bfloat16()).passed
    assert not oracle.check(traits, (values,), {}, wrong(values)).passed
