"""What is done once, at load: who declares it, what is tagged, and that no kernel takes anything else."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from types import SimpleNamespace

import pytest

from kernel_registry import lint
from kernel_registry.errors import (
    CaptureError,
    DocumentError,
    PlanError,
    PreparationError,
    TargetError,
    TraitError,
    UnknownNameError,
)
from kernel_registry.plan import Plan
from kernel_registry.preparation import prepared_call, preparation_of

CONTRACT = '''
from kernel_registry.contract import Contract, Workload
from kernel_registry.traits.trait import Trait


class Scale(Contract):
    """Multiplies a number by a weight, which fast kernels take folded."""

    traits = (
        Trait("size", "int", "performance", minimum=1),
        Trait("mode", "str", "semantic", default="plain", choices=("plain", "fancy")),
        Trait("platform", "platform", "platform"),
        Trait("num_tokens", "int", "performance", minimum=0, dynamic=True),
    )
    dynamic = {"num_tokens": lambda x: x}
    prepared = ("weight", "bias")

    @staticmethod
    def workloads(config):
        return [Workload("scale", {"size": 5}, {})]

    @staticmethod
    def signature(x, weight, *, bias=None):
        """A number, a weight, perhaps a bias."""
'''
KERNELS = '''
def fast(*, size):
    return lambda x, weight, *, bias=None: (x * weight.value, bias and bias.value)


def slow(*, size):
    return lambda x, weight, *, bias=None: (x * weight.value * size, bias and bias.value)
'''
PREPARE = '''
from types import SimpleNamespace

from kernel_registry.contract import Prepared

calls = []


def fold(subject, *, size, twice=False):
    calls.append(size)
    return SimpleNamespace(value=subject.value * size * (1 + twice))


def fold_otherwise(subject, *, size):
    return SimpleNamespace(value=-subject.value * size)


def in_place(subject, *, size, mode):
    subject.value *= size
    return Prepared({"all": [subject, (SimpleNamespace(value=1),)]}, report=f"{mode}, {size}")


def nothing(subject, *, size):
    return None


def anything(subject, **traits):
    return subject


def no_subject():
    return 1


def late(subject, *, size, num_tokens=0):
    return subject


def fails(subject, *, size):
    raise RuntimeError("out of memory")
'''


@pytest.fixture
def folding(toy):
    """A Toy of the op above. `files(fast={...})` is a registry of `fast`, with that more in its entry, and `slow`."""
    toy.contract = f"{toy.module(CONTRACT)}:Scale"
    toy.kernels, toy.functions = toy.module(KERNELS), toy.module(PREPARE)

    def make(op=toy.OP, **more):
        fast = {"target": f"{toy.kernels}:fast", "prepare": f"{toy.functions}:fold",
                "when": {"platform": "any", "mode": "any"}, **more}
        slow = {"target": f"{toy.kernels}:slow", "fallback": True, "when": {"platform": "any", "mode": "any"}}
        import yaml

        path = toy.write(yaml.safe_dump({"version": 1, "ops": {op: {
            "contract": toy.contract, "implementations": {"fast": fast, "slow": slow}}}}, sort_keys=False))
        return toy.registry(path)

    toy.make = make
    return toy


def raw(value=3):
    return SimpleNamespace(value=value)


def test_what_is_prepared_is_taken_and_says_what_it_is(folding):
    registry = folding.make()
    made = registry.prepare(folding.OP, raw(), size=5)
    assert registry.bind(folding.OP, size=5)(2, made) == (30, None)
    tag = preparation_of(made)
    assert (tag.op, tag.implementation, tag.prepare, tag.traits) == \
        (folding.OP, "fast", f"{folding.functions}:fold", {"size": 5})
    assert preparation_of(raw()) is None


def test_the_function_is_imported_when_first_needed_and_called_by_prepare_only(folding):
    registry = folding.make()
    registry.explain(folding.OP, size=5)
    assert folding.functions not in sys.modules
    made = registry.prepare(folding.OP, raw(), size=5)
    kernel = registry.dispatch(folding.OP, size=5)
    for x in range(3):
        kernel(x, made)
    assert sys.modules[folding.functions].calls == [5]


@pytest.mark.parametrize("place", ["weight", "bias"])
def test_what_is_not_prepared_is_refused(folding, place):
    registry = folding.make()
    kernel = registry.bind(folding.OP, size=5)
    given = {name: registry.prepare(folding.OP, raw(), size=5) for name in ("weight", "bias")}
    assert kernel(2, **given) == kernel(2, given["weight"], bias=given["bias"]) == (30, 15)
    given[place] = raw()
    for call in (lambda: kernel(2, **given), lambda: kernel(2, given["weight"], bias=given["bias"])):
        with pytest.raises(PreparationError, match=f"{place} is not prepared.*fast.*size=5") as caught:
            call()
        assert f"registry.prepare({folding.OP!r}, ..., size=5)" in caught.value.hint


def test_what_is_prepared_for_other_traits_is_refused(folding):
    registry = folding.make()
    made = registry.prepare(folding.OP, raw(), size=5)
    with pytest.raises(PreparationError, match=r"weight is prepared for .*size=5.*expected .*size=6"):
        registry.bind(folding.OP, size=6)(2, made)
    assert registry.bind(folding.OP, size=5, mode="fancy")(2, made) == (30, None)  # `fold` does not read the mode


def test_what_is_prepared_for_another_op_or_by_another_function_is_refused(folding):
    made = folding.make().prepare(folding.OP, raw(), size=5)
    other = folding.make(prepare=f"{folding.functions}:fold_otherwise")  # of the same traits
    with pytest.raises(PreparationError, match="weight is prepared for"):
        other.bind(folding.OP, size=5)(2, made)
    elsewhere = folding.make(op="other.scale")  # with the same function
    with pytest.raises(PreparationError, match=f"is prepared for {folding.OP}'s .*, expected .* for other.scale"):
        elsewhere.bind("other.scale", size=5)(2, made)


def test_a_variant_takes_what_its_implementation_does(folding):
    registry = folding.make(variants={"many": {"when": {"num_tokens": {"min": 10}}}})
    made = registry.prepare(folding.OP, raw(), size=5)
    kernel = registry.bind(folding.OP, size=5)
    assert kernel.name == "fast.many|fast" or kernel.name == "fast|.many"
    assert kernel(2, made) == (30, None) and kernel(20, made) == (300, None)
    for x in (2, 20):
        with pytest.raises(PreparationError):
            kernel(x, raw())


def test_kernels_that_take_different_preparations_are_told(folding):
    registry = folding.make(when={"platform": "any", "mode": "any", "num_tokens": {"min": 10}})
    with pytest.raises(PreparationError, match="slow takes it as it is; fast takes what .*:fold makes"):
        registry.prepare(folding.OP, raw(), size=5)
    assert preparation_of(registry.prepare(folding.OP, raw(), size=5, num_tokens=20))
    assert preparation_of(registry.prepare(folding.OP, raw(), size=5, implementation="fast", num_tokens=10))


def test_nothing_is_done_for_one_that_declares_none(folding):
    registry = folding.make()
    subject = raw()
    assert registry.prepare(folding.OP, subject, size=5, implementation="slow") is subject
    assert vars(subject) == {"value": 3}
    assert registry.dispatch(folding.OP, size=5, implementation="slow")(2, subject) == (30, None)
    with pytest.raises(UnknownNameError, match="'twice' is no trait"):
        registry.prepare(folding.OP, subject, size=5, implementation="slow", twice=True)


def test_the_arguments_of_a_call_are_prepared_wherever_they_stand(folding):
    """Which is how verify, run and bench call."""
    registry = folding.make()
    for args, kwargs, expected in [((2, raw()), {}, (30, None)), ((2, raw()), {"bias": raw()}, (30, 15)),
                                   ((2, raw()), {"bias": None}, (30, None)),
                                   ((2,), {"weight": raw(), "bias": raw(1)}, (30, 5))]:
        for name, wanted in (("fast", expected), ("slow", (30, expected[1] and kwargs["bias"].value))):
            kernel = registry.bind(folding.OP, size=5, implementation=name)
            args_, kwargs_ = prepared_call(registry.catalog.op(folding.OP), [name], kernel.request, args, kwargs)
            assert kernel(*args_, **kwargs_) == wanted


def test_overrides_decide_what_is_prepared(folding):
    registry = folding.make()
    with registry.disable(folding.OP, "fast"):
        assert preparation_of(registry.prepare(folding.OP, raw(), size=5)) is None
    assert preparation_of(registry.prepare(folding.OP, raw(), size=5))


def test_keywords_that_are_no_traits_go_to_the_function(folding):
    registry = folding.make()
    assert registry.prepare(folding.OP, raw(), size=5, twice=True).value == 30
    with pytest.raises(UnknownNameError, match="'twise'.*\n?.*did you mean 'twice'"):
        registry.prepare(folding.OP, raw(), size=5, twise=True)
    with pytest.raises(TraitError, match="missing size"):
        registry.prepare(folding.OP, raw())
    with pytest.raises(TraitError, match="size"):
        registry.prepare(folding.OP, raw(), size=None)


def test_everything_made_is_tagged_with_the_report(folding):
    registry = folding.make(prepare=f"{folding.functions}:in_place")
    subject = raw()
    made = registry.prepare(folding.OP, subject, size=5, mode="fancy")
    first, (second,) = made["all"]
    assert first is subject and preparation_of(first).report == preparation_of(second).report == "fancy, 5"
    assert registry.bind(folding.OP, size=5, mode="fancy")(2, subject) == (30, None)
    with pytest.raises(PreparationError):
        registry.bind(folding.OP, size=5)(2, subject)


@pytest.mark.parametrize("name, match", [
    ("nothing", "returned NoneType, nothing that can be tagged"), ("anything", r"takes `\*\*traits`"),
    ("no_subject", "is no function of what is to be prepared"), ("gone", "has no 'gone'"),
    ("late", "names num_tokens, which is read off each call")])
def test_a_function_that_is_no_preparation(folding, name, match):
    with pytest.raises(TargetError, match=match):
        folding.make(prepare=f"{folding.functions}:{name}").prepare(folding.OP, raw(), size=5)


def test_what_the_function_raises_is_the_callers(folding):
    with pytest.raises(RuntimeError, match="out of memory"):
        folding.make(prepare=f"{folding.functions}:fails").prepare(folding.OP, raw(), size=5)


def test_the_declaration_is_checked(folding, toy):
    with pytest.raises(DocumentError, match="prepare"):
        folding.make(prepare="no target").catalog
    bare = toy.module(CONTRACT.replace('prepared = ("weight", "bias")', ""))
    toy.contract = f"{bare}:Scale"
    with pytest.raises(DocumentError, match=r"file_\d+.yaml:\d+: fast declares a preparation, but no argument"):
        folding.make().catalog
    toy.contract = f"{toy.module(CONTRACT.replace('bias', 'other', 1))}:Scale"
    with pytest.raises(TraitError, match="prepared names other"):
        folding.make().catalog


def test_lint_says_where_its_module_is_missing(folding):
    def told(**more):
        return [f.message for f in lint.lint_catalog(folding.make(**more).catalog) if "preparation" in f.message]

    assert told() == []
    assert told(prepare="gone_module:f") == \
        ["fast: the module of its preparation, 'gone_module:f', is not installed here"]


def test_explain_says_what_is_needed(folding):
    registry = folding.make()
    needed = f"takes what registry.prepare makes with {folding.functions}:fold"
    assert f"* fast  chosen, {needed}" in registry.explain(folding.OP, size=5).text()
    candidates = json.loads(registry.explain(folding.OP, size=5).json())["cases"][0]["candidates"]
    assert [c["prepare"] for c in candidates] == [f"{folding.functions}:fold", ""]
    assert needed not in registry.explain(folding.OP, size=5, implementation="slow").text()


def test_a_models_plan_says_it(folding):
    from kernel_registry.planning import plan_model

    registry = folding.make()
    row, = plan_model(registry, {"model_type": "toy"})
    assert row.implementation == "fast" and row.why.endswith("; prepared at load")
    with registry.disable(folding.OP, "fast"):
        row, = plan_model(registry, {"model_type": "toy"})
    assert row.implementation == "slow" and "prepared" not in row.why


def test_a_plan_says_it_and_notices_another(folding, tmp_path):
    registry = folding.make()
    registry.bind(folding.OP, size=5)
    plan = registry.freeze()
    assert plan.calls[0]["prepare"] == {"fast": f"{folding.functions}:fold"}
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    folding.make().load_plan(loaded)
    other = folding.make(prepare=f"{folding.functions}:in_place")
    with pytest.raises(PlanError, match="the preparation of fast changed"):
        other.load_plan(loaded)
    other.bind(folding.OP, size=5)
    assert any("the preparation of fast: " in line for line in plan.diff(other.freeze()))
    broken = json.loads((tmp_path / "plan.json").read_text())
    broken["calls"][0]["prepare"] = {"fast": 1}
    (tmp_path / "plan.json").write_text(json.dumps(broken))
    with pytest.raises(PlanError, match="call 0 is malformed"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_notices_other_code(folding):
    registry = folding.make()
    registry.bind(folding.OP, size=5)
    before = registry.freeze().calls[0]["sources"]["fast"]
    path = folding.folder / f"{folding.functions}.py"
    path.write_text(path.read_text() + "\n# another way\n")
    assert registry.freeze().calls[0]["sources"]["fast"] != before


def test_a_kernel_in_use_follows_a_reload_to_another_preparation(folding):
    registry = folding.make()
    kernel = registry.bind(folding.OP, size=5)
    made = registry.prepare(folding.OP, raw(), size=5)
    path = registry._path
    path.write_text(path.read_text().replace(":fold", ":in_place"))
    assert kernel(2, made) == (30, None)
    registry.reload()
    with pytest.raises(PreparationError):
        kernel(2, made)


def test_nothing_is_prepared_while_a_graph_is_captured(folding, monkeypatch):
    registry = folding.make()
    kernel = registry.bind(folding.OP, size=5)
    made = registry.prepare(folding.OP, raw(), size=5)
    monkeypatch.setattr("kernel_registry.preparation.capturing", lambda: True)
    with pytest.raises(CaptureError, match="was to be prepared while a CUDA graph is captured"):
        registry.prepare(folding.OP, raw(), size=5)
    assert kernel(2, made) == (30, None)  # running is what a capture is for


# ---- tensors and modules ---------------------------------------------------------------------------------------------

@pytest.fixture
def folded(folding):
    """(registry, kernel, a prepared Parameter)."""
    torch = pytest.importorskip("torch")
    functions = folding.module("def same(subject, *, size):\n    return subject\n")
    kernels = folding.module("def fast(*, size):\n    return lambda x, weight, *, bias=None: weight\n")
    registry = folding.make(prepare=f"{functions}:same", target=f"{kernels}:fast")
    parameter = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    return registry, registry.bind(folding.OP, size=5), registry.prepare(folding.OP, parameter, size=5)


def test_a_parameter_keeps_its_tag_through_what_happens_at_load(folded):
    import torch

    _, kernel, parameter = folded
    module = torch.nn.Module()
    module.weight = parameter
    module.to("cpu").eval().requires_grad_(False)
    module.load_state_dict({"weight": torch.zeros(5)})
    assert module.weight is parameter and kernel(1, module.weight) is parameter


def test_what_takes_a_parameters_place_has_no_tag(folded):
    import torch

    _, kernel, parameter = folded
    module = torch.nn.Module()
    module.weight = parameter
    module.load_state_dict({"weight": torch.zeros(5)}, assign=True)
    others = {"assigned": module.weight, "data": parameter.data, "view": parameter[:], "clone": parameter.clone(),
              "deepcopy": copy.deepcopy(parameter)}
    for name, other in others.items():
        with pytest.raises(PreparationError, match="weight is not prepared"):
            kernel(1, other)
            pytest.fail(name)


def test_another_dtype_or_shape_is_no_longer_what_was_prepared(folded):
    import torch

    _, kernel, parameter = folded
    module = torch.nn.Module()
    module.weight = parameter
    module.to(torch.bfloat16)
    with pytest.raises(PreparationError, match=r"was prepared as \[5\] float32 and is \[5\] bfloat16 now"):
        kernel(1, module.weight)
    parameter.data = torch.ones(6)
    with pytest.raises(PreparationError, match=r"and is \[6\] float32 now"):
        kernel(1, module.weight)


def test_a_tag_is_not_saved(folded, folding, tmp_path):
    import torch

    registry, kernel, parameter = folded
    module = registry.prepare(folding.OP, torch.nn.Module(), size=5)
    module.weight = parameter
    torch.save({"parameter": parameter, **module.state_dict()}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)  # what an attribute of a tag's class would not pass
    for made in (*loaded.values(), pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        with pytest.raises(PreparationError, match="weight is not prepared"):
            kernel(1, made)
    assert kernel(1, module) is module and kernel(1, parameter) is parameter


def test_a_module_is_tagged_too(folded, folding):
    import torch

    registry, kernel, _ = folded
    module = torch.nn.Linear(2, 2)
    module.child = torch.nn.Linear(1, 1)
    assert registry.prepare(folding.OP, module, size=5) is module
    assert kernel(1, module) is module and preparation_of(module).implementation == "fast"
    assert kernel(1, module.weight) is module.weight and kernel(1, module.bias) is module.bias
    for other in (module.child, module.child.weight):
        with pytest.raises(PreparationError, match="weight is not prepared"):
            kernel(1, other)
    assert [*module.state_dict()] == ["weight", "bias", "child.weight", "child.bias"]
