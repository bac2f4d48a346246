"""Where a result goes when the caller brings `out`: decided by bytes, told by explain, the same result either way."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kernel_registry.torch_ops as torch_ops  # noqa: E402
from kernel_registry import aliasing, registry  # noqa: E402
from kernel_registry.contract import TraitSpace  # noqa: E402
from kernel_registry.errors import DocumentError, InputError, TraitError  # noqa: E402
from kernel_registry.ops.moe.finalize import cases, oracle  # noqa: E402
from kernel_registry.ops.moe.finalize.contract import Finalize  # noqa: E402

OP = "moe.finalize"
LAYER = dict(num_experts=8, topk=3, hidden_size=10, has_shared=True)


# ---- bytes -----------------------------------------------------------------------------------------------------------

def touched(tensor) -> set[int]:
    """Every address that belongs to an element, one by one."""
    found = set()
    for index in itertools.product(*map(range, tensor.shape)):
        start = tensor.data_ptr() + sum(i * s for i, s in zip(index, tensor.stride())) * tensor.element_size()
        found.update(range(start, start + tensor.element_size()))
    return found


STORAGE = torch.zeros(96, dtype=torch.uint8)


@st.composite
def views(draw):
    """Any view of STORAGE of up to three dimensions: overlapping rows, columns far apart, empty ones."""
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32]))
    whole = STORAGE.view(dtype)
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))
    reach = sum((size - 1) * step for size, step in zip(shape, strides) if size)
    if reach >= len(whole):
        strides, reach = [min(step, 2) for step in strides], 0
        reach = sum((size - 1) * step for size, step in zip(shape, strides) if size)
    return whole.as_strided(shape, strides, draw(st.integers(0, len(whole) - 1 - reach)))


@st.composite
def slices(draw):
    """Two slices of one matrix, as buffers are cut up."""
    matrix = STORAGE[:90].view(9, 10)

    def piece():
        rows, columns = (sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in (9, 10))
        return matrix[slice(*rows), slice(*columns)]
    return piece(), piece()


@settings(max_examples=600, deadline=None)
@given(views(), views())
def test_apart_is_never_said_of_what_shares_a_byte(one, other):
    first, second = touched(one), touched(other)
    if aliasing.apart(one, other):
        assert not first & second
    elif not first & second and first and second:  # it need not see that, where the two interleave
        assert max(first) > min(second) and max(second) > min(first)
    for tensor, addresses in ((one, first), (other, second)):
        start, past = aliasing.span(tensor)
        assert (start, past) == (min(addresses), max(addresses) + 1) if addresses else start == past


@settings(max_examples=400, deadline=None)
@given(slices())
def test_slices_of_a_buffer_are_told_apart_exactly(pair):
    one, other = pair
    if one.shape[0] == 1 or other.shape[0] == 1:  # a single row has no distance to the next
        return
    assert aliasing.apart(one, other) == aliasing.apart(other, one) == (not touched(one) & touched(other))


@settings(max_examples=400, deadline=None)
@given(views(), views())
def test_the_plan_is_the_bytes(out, read):
    """`plan` on any output: an error where an element stands twice, alias only where no byte is shared."""
    count = out.numel() * out.element_size()
    try:
        decision = aliasing.plan(out, {"read": read, "absent": None}, accepts=True)
    except InputError as error:
        assert "rows of out overlap" in str(error) and 0 not in out.shape
        return
    assert len(touched(out)) == count
    if decision.action == "alias":
        assert not touched(out) & touched(read) and (out.is_contiguous() or 1 in (out.stride(-1), out.shape[-1]))
    assert aliasing.plan(out, {"read": read}, accepts=False).action == "copy"


def test_an_address_in_common_is_not_the_same_tensor():
    buffer = torch.zeros(8, 8)
    inputs = buffer[:, :6]
    for out, action in ((buffer[:, :6], "alias"), (buffer[:4, :6], "copy"), (buffer[:, :4], "copy"),
                        (buffer.view(-1)[:48].view(8, 6), "copy"), (buffer.view(torch.int32)[:, :6], "copy")):
        assert out.data_ptr() == inputs.data_ptr()
        assert aliasing.plan(out, {"x": inputs}, accepts=True, in_place=("x",)).action == action
        assert "shares memory with x" in aliasing.plan(out, {"x": inputs}, accepts=True).reason


def test_other_memory_of_one_storage_is_other_memory():
    buffer = torch.zeros(8, 20)
    for out, read in ((buffer[:4], buffer[4:]), (buffer[:, :10], buffer[:, 10:]), (buffer[:, 10:], buffer[:, 2:10]),
                      (buffer[1:5, :3], buffer[:, 3:])):
        assert aliasing.plan(out, {"x": read}, accepts=True).action == "alias"
    for out, read in ((buffer[:5], buffer[4:]), (buffer[:, :10], buffer[:, 9:]), (buffer[:, 10:], buffer[3])):
        assert aliasing.plan(out, {"x": read}, accepts=True).action == "copy"


def test_the_object_around_the_memory_does_not_matter():
    x = torch.zeros(4, 4)
    for wrapped in (x[:], x.detach(), x.data, torch.from_numpy(x.numpy()), torch.nn.Parameter(x), x.view(4, 4)):
        assert wrapped is not x
        assert aliasing.plan(wrapped, {"x": x}, accepts=True).action == "copy"
        assert aliasing.plan(wrapped, {"x": x}, accepts=True, in_place=("x",)).action == "alias"


def test_columns_that_do_not_lie_side_by_side_are_copied():
    assert "side by side" in aliasing.plan(torch.zeros(4, 4).t(), {}, accepts=True).reason
    assert aliasing.plan(torch.zeros(4, 8)[:, ::2], {}, accepts=True).action == "copy"
    assert aliasing.plan(torch.zeros(4, 8)[:, :5], {}, accepts=True).action == "alias"


# ---- kernels ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def source(toy):
    """A registry of moe.finalize with an implementation that writes into `out` and one that never hears of it; what
    each was given lands in SEEN."""
    module = toy.module("""
        from kernel_registry.ops.moe.finalize.reference import finalize

        SEEN = []


        def writes(**traits):
            kernel = finalize(**traits)

            def call(*args, **kwargs):
                SEEN.append(kwargs.get("out"))
                return kernel(*args, **kwargs)
            return call


        def returns(*, output_alias, **traits):
            assert output_alias is False
            return writes(**traits)
        """.replace("\n        ", "\n"))
    box = "{platform: any, has_shared: any, reduced: any, weights_applied: any, out_dtype: any}"
    path = toy.write(f"""
version: 1
ops:
  moe.finalize:
    contract: kernel_registry.ops.moe.finalize.contract:Finalize
    implementations:
      writes: {{target: "{module}:writes", when: {box}, rank: 1, accepts_output_alias: true}}
      returns: {{target: "{module}:returns", when: {box}}}
""")
    made = toy.registry(path, platform="cpu")
    made.seen = __import__(module).SEEN
    return made


def call(seed=0, **other):
    return cases.inputs({**LAYER, "output_alias": True, **other}, 6, seed=seed)


@pytest.mark.parametrize("implementation", ["writes", "returns"])
def test_poison_in_out_never_shows(source, implementation):
    """`cases` fills it with NaN; the oracle wants the result in it."""
    for flavour in cases.FLAVOURS:
        traits = {**LAYER, "output_alias": True}
        args, kwargs = cases.inputs(traits, 6, flavour=flavour)
        result = source.dispatch(OP, implementation=implementation, **traits)(*args, **kwargs)
        verdict = oracle.check(traits, args, kwargs, result)
        assert result is kwargs["out"] and verdict.passed, verdict.detail


def test_who_accepts_it_gets_it_and_who_does_not_never_sees_it(source):
    for implementation, sees in (("writes", True), ("returns", False)):
        args, kwargs = call()
        source.dispatch(OP, implementation=implementation, output_alias=True, **LAYER)(*args, **kwargs)
        assert (source.seen[-1] is kwargs["out"]) == sees


@pytest.mark.parametrize("implementation", ["writes", "returns"])
@pytest.mark.parametrize("shift", [-3, 0, 1, 10, 59])
def test_an_out_that_overlaps_an_input_is_copied_into(source, implementation, shift):
    """The result is that of the inputs as they were."""
    args, kwargs = call()
    expected = source.dispatch(OP, **LAYER)(*args, shared_output=kwargs["shared_output"])
    buffer = torch.zeros(200, dtype=torch.bfloat16)
    shared = buffer[60:120].view(6, 10).copy_(kwargs["shared_output"])
    out = buffer[60 + shift:120 + shift].view(6, 10)
    kernel = source.dispatch(OP, implementation=implementation, output_alias=True, **LAYER)
    result = kernel(*args, shared_output=shared, out=out)
    assert result is out and torch.equal(out, expected)
    assert (source.seen[-1] is out) == (implementation == "writes" and shift == 0)  # itself, element by element


def test_strided_outputs(source):
    args, kwargs = call()
    expected = source.dispatch(OP, **LAYER)(*args, shared_output=kwargs["shared_output"])
    kernel = source.dispatch(OP, output_alias=True, **LAYER)
    for buffer, given_over in ((torch.zeros(6, 13)[:, 1:11], True), (torch.zeros(10, 6).t(), False),
                               (torch.zeros(6, 20)[:, ::2], False)):
        out = torch.empty_strided((6, 10), buffer.stride(), dtype=torch.bfloat16).fill_(float("nan"))
        assert kernel(*args, shared_output=kwargs["shared_output"], out=out) is out
        assert torch.equal(out, expected) and (source.seen[-1] is out) == given_over


@pytest.mark.parametrize("implementation", ["writes", "returns"])
@pytest.mark.parametrize("out", [torch.zeros(6, 9), torch.zeros(6, 10), torch.zeros(7, 10).bfloat16(),
                                 torch.zeros(1, 10).bfloat16().expand(6, 10),
                                 torch.zeros(60).bfloat16().as_strided((6, 10), (5, 1)),
                                 torch.zeros(6, 10, device="meta").bfloat16(), None],
                         ids=["columns", "dtype", "rows", "expanded", "overlapping rows", "device", "none"])
def test_an_out_that_does_not_fit_is_an_error_and_stays_as_it_is(source, implementation, out):
    args, kwargs = call()
    kernel = source.dispatch(OP, implementation=implementation, output_alias=True, **LAYER)
    with pytest.raises(InputError, match="out"):
        kernel(*args, shared_output=kwargs["shared_output"], out=out)
    assert out is None or out.is_meta or not out.any()


@pytest.mark.parametrize("implementation", ["writes", "returns"])
@pytest.mark.parametrize("name", ["out", "shared_output", "expert_output"])
def test_what_is_no_tensor_is_named(source, implementation, name):
    (rows, *others), kwargs = call()
    given = {"expert_output": rows, **kwargs, name: [1.0]}
    with pytest.raises(InputError, match=f"{name} is .*list, expected"):
        source.dispatch(OP, implementation=implementation, output_alias=True, **LAYER)(
            given.pop("expert_output"), *others, **given)


def test_the_choice_does_not_depend_on_who_can_write_into_it(source):
    """What only copies is not refused for it, and is told as what it is."""
    assert source.dispatch(OP, output_alias=True, **LAYER).name == source.dispatch(OP, **LAYER).name == "writes"
    story = source.explain(OP, output_alias=True, **LAYER)
    assert "writes   chosen, writes into out" in story.text()
    assert "returns  could serve, but goes later; copies into out" in story.text()
    assert [c.output for c in story.cases[0].candidates] == [aliasing.WRITES, aliasing.COPIES]
    assert '"output": "copies into out"' in story.json()
    with source.disable(OP, "writes"):
        told = source.explain(OP, output_alias=True, **LAYER).text()
        assert source.dispatch(OP, output_alias=True, **LAYER).name == "returns" and "chosen, copies into out" in told
    assert "into out" not in source.explain(OP, **LAYER).text()


# ---- what a file and a contract may say ------------------------------------------------------------------------------

def test_accepting_an_output_that_never_comes_is_an_error(toy):
    with pytest.raises(DocumentError, match="a accepts an output that toy.op never gets") as caught:
        toy.registry({"a": {"when": {}, "accepts_output_alias": True}}).catalog
    assert ".yaml:" in caught.value.where and "drop the line" in caught.value.hint


def test_a_variant_writes_where_its_implementation_does(toy):
    text = toy.write("""
version: 1
ops:
  moe.finalize:
    contract: kernel_registry.ops.moe.finalize.contract:Finalize
    implementations:
      a:
        target: "{targets}:a"
        accepts_output_alias: true
        when: {platform: any}
        variants: {many: {when: {num_tokens: {min: 9}}}}
""")
    assert toy.registry(text).catalog.op(OP).by_name["a.many"].accepts_output_alias


@pytest.mark.parametrize("change,message", [
    (dict(traits=[t for t in Finalize.traits if t.name != "output_alias"]), "there is no trait output_alias"),
    (dict(read_until_end=()), "in read_until_end, names of arguments"),
    (dict(read_until_end=("rows",)), "there is no rows"),
    (dict(in_place=("out",)), "in_place names what"),
    (dict(signature=staticmethod(lambda expert_output, topk_weights, topk_ids, shared_output, expert_map: 0)),
     "there is no out"),
])
def test_a_contract_says_all_about_out_or_nothing(change, message):
    with pytest.raises(TraitError, match=message):
        TraitSpace(OP, type("Changed", (Finalize,), change))


def test_every_shipped_contract_names_its_tensors():
    """What a kernel can read while it writes: every argument of the signature that may be a tensor."""
    for op in registry.catalog.ops.values():
        if op.contract.read_until_end:
            tensors = {a.name for a in getattr(torch.ops.kernel_registry, torch_ops.op_name(op.name)).default._schema
                       .arguments if "Tensor" in str(a.type)}
            assert {*op.contract.read_until_end} == tensors


# ---- the torch op that changes `out` ---------------------------------------------------------------------------------

FUNCTIONAL, MUTATING = torch.ops.kernel_registry.moe_finalize, torch.ops.kernel_registry.moe_finalize_out


def rows_and(seed=0):
    args, kwargs = call(seed)
    return args, kwargs["shared_output"], kwargs["out"]


def test_it_writes_and_returns_nothing():
    args, shared, out = rows_and()
    assert MUTATING(out, *args, 8, shared, 2.5) is None
    assert torch.equal(out, FUNCTIONAL(*args, 8, shared, 2.5))


def test_the_functional_form_returns_no_input():
    rows = torch.randn(4, 8)
    result = FUNCTIONAL(rows, None, None, 8)
    assert torch.equal(result, rows) and result.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
    out = rows.view(4, 8)
    MUTATING(out, rows, None, None, 8)  # nothing to do, and nothing returned


def test_compiled_with_a_mutated_output():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def layer(rows, weights, ids, shared, out):
        MUTATING(out, rows * 1.0, weights, ids, 8, shared + 0.0, 2.5)
        return out * 2

    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for seed in (1, 2):
        args, shared, out = rows_and(seed)
        twice = compiled(*args, shared, out)
        expected = FUNCTIONAL(*args, 8, shared, 2.5)
        assert torch.equal(out, expected) and torch.equal(twice, expected * 2)
    assert graphs.frame_count <= 2  # a float argument makes torch build its first graph twice


def test_compiled_into_a_slice_of_a_buffer():
    torch._dynamo.reset()

    def layer(rows, weights, ids, shared, buffer):
        MUTATING(buffer[:, 2:12], rows, weights, ids, 8, shared)
        return buffer + 0

    args, shared, out = rows_and()
    buffer = torch.full((6, 16), 7.0, dtype=torch.bfloat16)
    result = torch.compile(layer, backend="aot_eager", fullgraph=True)(*args, shared, buffer)
    expected = torch.full_like(buffer, 7)
    expected[:, 2:12] = FUNCTIONAL(*args, 8, shared)
    assert torch.equal(buffer, expected) and torch.equal(result, expected)


def test_torchs_own_checks_of_the_op():
    args, shared, out = rows_and()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(MUTATING.default, (out, *args, 8, shared, 2.5), test_utils=utils)
    torch.library.opcheck(FUNCTIONAL.default, (torch.randn(4, 8), None, None, 8), test_utils=utils)


def test_experts_write_into_an_output_under_torch_compile():
    from kernel_registry.ops.moe.experts import cases as experts

    torch._dynamo.reset()
    sizes = dict(num_experts=4, topk=2, hidden_size=16, intermediate_size=8, dtype="bfloat16")
    (hidden, *rest), _ = experts.inputs(sizes, 5)

    def layer(hidden, buffer, *rest):
        torch.ops.kernel_registry.moe_experts_out(buffer[:, 4:], hidden * 1.0, *rest)
        return buffer * 2

    buffer = torch.zeros(5, 20, dtype=torch.bfloat16)
    twice = torch.compile(layer, backend="aot_eager", fullgraph=True)(hidden, buffer, *rest)
    assert torch.equal(buffer[:, 4:], torch.ops.kernel_registry.moe_experts(hidden, *rest))
    assert torch.equal(twice, buffer * 2) and not buffer[:, :4].any()
