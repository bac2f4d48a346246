"""The kernel for few experts: it gives the router's results bit for bit, follows the rules, and compiles to what makes
it fast. Nearly all of it is compared with triton_router, which the other tests of this folder judge."""

from __future__ import annotations

import pytest
import torch
from test_topk_mutants import copied
from topk_support import judged, kernel, named, routing, same_bits

from kernel_registry.errors import InputError
from kernel_registry.ops.moe.topk import cases
from kernel_registry.traits.platform import detect
from tests import compiled

triton = pytest.importorskip("triton")

NAN, INF = float("nan"), float("inf")
SHAPES = ((8, 2), (16, 2), (5, 1), (24, 2), (32, 2))
DTYPES = ("float32", "bfloat16", "float16")
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
ROWS = 16  # a program's, the fewest that a factory takes
TOKENS = 21


def few(*shape, scoring="softmax", **other):
    return routing(*shape, scoring=scoring, **{"has_bias": False if scoring == "softmax" else True, **other})


def made(traits, rows=ROWS, **options):
    return kernel("triton_few_experts", traits, platform=detect(), rows_per_program=rows, **options)


@pytest.fixture(scope="module")
def router():
    """The router for traits, each made once."""
    found = {}

    def router(traits):
        key = tuple(sorted(traits.items()))
        if key not in found:
            found[key] = kernel("triton_router", traits, platform=detect())
        return found[key]

    return router


def difference(got, expected) -> str:
    return "" if all(map(same_bits, got, expected)) else f"{got}, the router {expected}"


# ---- the router's bits -----------------------------------------------------------------------------------------------

KINDS = [few(*shape, scoring=scoring, dtype=DTYPES[(i + j) % 3], bias_dtype=DTYPES[(i + 2 * j) % 3])
         for i, shape in enumerate(SHAPES) for j, scoring in enumerate(SCORINGS)]
KINDS += [few(8, 2, dtype=dtype) for dtype in DTYPES] + [few(16, 1, scoring="sigmoid", has_bias=False), few(2, 2)]


@pytest.mark.parametrize("traits", KINDS, ids=lambda t: f"{named(t)}-{t['dtype']}")
def test_the_routers_bits(traits, router, tiles_of, device):
    """All kinds of values, contiguous or not by turns, each after the other in one batch: rows never mix."""
    tiles_of(TOKENS)
    ours, theirs = made(traits, rows=32), router(traits)
    for i, flavour in enumerate(cases.FLAVOURS):
        layout = {"contiguous": (i + traits["num_experts"]) % 3 > 0}
        args, kwargs = cases.inputs({**traits, **layout}, TOKENS, flavour=flavour, seed=i, device=device)
        assert not (found := difference(ours(*args, **kwargs), theirs(*args, **kwargs))), f"{flavour}: {found}"


@pytest.mark.parametrize("tokens", (1, 15, 16, 17, 31, 33))
@pytest.mark.parametrize("contiguous", (True, False))
def test_about_a_programs_rows(tokens, contiguous, router, device):
    traits = few(8, 2, contiguous=contiguous)
    args, _ = cases.inputs(traits, tokens, seed=tokens, device=device)
    kwargs = dict(num_token_non_padded=torch.tensor([tokens - 1], device=device), routed_scaling_factor=2.5,
                  expert_map=torch.randperm(8).to(device))
    assert not (found := difference(made(traits)(*args, **kwargs), router(traits)(*args, **kwargs))), found


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("flavour", ("random", "ties", "nonfinite", "large"))
def test_the_oracles_verdict(scoring, flavour, device):
    traits = few(8, 2, scoring=scoring)
    judged("triton_few_experts", traits, TOKENS, flavour=flavour, device=device, made=made(traits, rows=32))


# ---- rules, worked out by hand ---------------------------------------------------------------------------------------

def test_softmax_rules(device):
    logits = torch.tensor([[1, 3, 0, 3, 3, -1, 2, 0],  # ties go to the lowest id
                           [0.0, -0.0, -1, -1, -1, -1, 0.0, -1],  # zeros of both signs are equal
                           [1, 2, 3, NAN, 5, 6, 7, 8],  # every score is NaN: the lowest ids, weights 0
                           [1, 2, 3, 4, INF, 6, 7, 8], [-INF] * 8,
                           [-INF, -INF, -INF, -INF, -INF, -INF, 4, -INF]], device=device)
    weights, ids = made(few(8, 2))(logits, None)
    assert ids.tolist() == [[1, 3], [0, 1], [0, 1], [0, 1], [0, 1], [6, 0]]
    assert weights[:5].tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0], [0, 0]]
    assert weights[5, 0] == 1 and weights[5, 1] < 1e-40


def test_sigmoid_rules(device):
    """NaN goes after -INF, has the weight 0, and of several the lowest id goes first."""
    logits = torch.tensor([[NAN] * 6 + [0, NAN], [NAN] * 8, [NAN, -INF, NAN, NAN, NAN, NAN, -INF, NAN],
                           [0, 0, 0, 0, 0, 0, 0, INF]], device=device)
    weights, ids = made(few(8, 2, scoring="sigmoid", has_bias=False))(logits, None)
    assert ids.tolist() == [[6, 0], [0, 1], [1, 6], [7, 0]]
    assert weights[:2].tolist() == [[1, 0], [0, 0]]
    torch.testing.assert_close(weights[3].cpu(), torch.tensor([2 / 3, 1 / 3]))


def test_padding_and_map(device):
    """Nothing of a padded row shows, and mapped ids are the map's."""
    logits = torch.tensor([[0.0, 1, 2, 3, 4]] * 3, device=device)
    logits[1:] = NAN
    table = torch.tensor([50, 40, 30, 20, 10], device=device)
    weights, ids = made(few(5, 2))(logits, None, num_token_non_padded=torch.tensor([1], device=device),
                                   expert_map=table, routed_scaling_factor=2.0)
    assert ids.tolist() == [[10, 20], [-1, -1], [-1, -1]]
    assert weights[1:].eq(0).all() and abs(weights[0].sum().item() - 2) < 1e-6


def test_options_and_inputs():
    for wrong in (dict(rows_per_program=24), dict(rows_per_program=8), dict(dependent_launch="late")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kernel("triton_few_experts", few(8, 2), **wrong)
    with pytest.raises(InputError, match=r"router_logits is \[3, 7\]"):
        made(few(8, 2))(torch.zeros(3, 7), None)
    assert [part.shape for part in made(few(8, 2))(torch.zeros(0, 8), None)] == [(0, 2), (0, 2)]


# ---- mutants: the line's part, what replaces it, and what finds it: a kind of values, traits -------------------------

KERNEL, FACTORY = "few_experts_kernel.py", "triton_few_experts.py"
SIGMOID, SOFT = few(16, 2, scoring="sigmoid"), few(8, 2)
MUTANTS = {
    "a tie of a pair": ("swap = keys[1] > keys[0]", "swap = keys[1] >= keys[0]", "constant", SIGMOID),
    "a tie of halves": ("other_key0 > key0, True)", "other_key0 >= key0, True)", "ties", SIGMOID),
    "a tie of threads": ("((other_key0 == key0) & (other_id0 < id0))", "(id0 != id0)", "ties", SIGMOID),
    "a tie of seconds": ("((other_key == second_key) & (other_id < second_id))", "(id0 != id0)", "ties", SIGMOID),
    "the winner stays": ("other_key = tl.where(ahead, other_key1, other_key0)", "other_key = other_key0", "random",
                         SIGMOID),
    "rows with NaN as others": ("key = tl.where(choice == choice, key, INF_KEY)", "key = key", "nonfinite", SOFT),
    "rows with +inf as others": ("chosen = tl.where(void, lane, chosen)", "chosen = chosen", "nonfinite", SOFT),
    "weights of void rows": ("routed = routed & (void == 0)", "top = top * 0", "nonfinite", SOFT),
    "places without experts": ("key = tl.where(exists, key, REMOVED)", "key = key", "negative_bias",
                               few(5, 2, scoring="sigmoid")),
    "ids of padded rows": ("tl.where(live, chosen, -1)", "chosen", "padded", SOFT),
    "infinities' quotient": ("weight = tl.where(weight == weight, weight, 0.0)", "weight = weight", "nonfinite",
                             few(8, 2, scoring="sqrtsoftplus")),
    "a strided row as dense": ("launch = dense if (row_stride, column_stride) == (num_experts, 1) else strided",
                               "launch = dense", "random", few(8, 2, contiguous=False)),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(bug, router, device):
    line, changed, flavour, traits = MUTANTS[bug]
    file = FACTORY if line.startswith("launch") else KERNEL
    args, kwargs = cases.inputs(traits, TOKENS, flavour=flavour, device=device)
    expected = router(traits)(*args, **kwargs)
    options = dict(platform=detect(), rows_per_program=32)
    assert not difference(kernel("triton_few_experts", traits, **options)(*args, **kwargs), expected)
    with copied("triton_few_experts", file, line, changed) as module:
        assert difference(module.topk(**traits, **options)(*args, **kwargs), expected)


# ---- what the compiler makes of it -----------------------------------------------------------------------------------

CODE = '''
from kernel_registry.ops.moe.topk import triton_few_experts
from kernel_registry.traits.platform import Platform
from tests.compiled import asked, build, tell

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
target, arch, boxes = asked()
seen = []
triton_few_experts.kept_launch = lambda *of: seen.append(of)  # what the factory would launch, without launching
triton_few_experts.torch.version.cuda = "13.0" if target.backend == "cuda" else None
for traits, launch in boxes:
    triton_few_experts.topk(**traits, platform=Platform.parse(arch), dependent_launch=launch)
    for kernel, constants, options in seen[-2:]:
        types = dict(logits="*" + SHORT[traits["dtype"]], weights_out="*fp32", ids_out="*i32", num_tokens="i32",
                     num_valid="*i32", expert_map="*i64", row_stride="i32", column_stride="i32",
                     routed_scaling_factor="fp32", shared_expert_weight="fp32")
        absent = {} if traits["has_bias"] else {"bias": None}
        if traits["has_bias"]:
            types["bias"] = "*" + SHORT[traits["bias_dtype"]]
        aligned = {"weights_out", "ids_out", *(["logits"] if constants["DENSE"] else [])}
        result = build(kernel, types, {**constants, **absent}, aligned, target, options)
        ptx = result.asm.get("ptx", "")
        tell(dict(
            dense=constants["DENSE"], shared=result.metadata.shared, barrier="bar.sync" in ptx,
            shuffles=ptx.count("shfl.sync"), vectors=[ptx.count(f"ld.global.v{width}.b32") for width in (4, 2)],
            places=[ptx.find(word) for word in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global",
                                                "st.global")]))
'''


@pytest.mark.parametrize("arch", compiled.EVERYWHERE)
def test_compiles(arch, python, tmp_path):
    """A row stays in its few threads (no barrier, no shared memory, five shuffles where two threads share a row), and
    contiguous logits come in vectors of 16 bytes, or of 8 where that is half a row."""
    boxes = [(few(8, 2), "early" if arch in ("sm_90", "sm_100") else False), (few(8, 2, dtype="bfloat16"), False),
             (few(24, 2, scoring="sqrtsoftplus", dtype="float16"), False)]
    done = compiled.results(python, tmp_path, CODE, arch, boxes)
    assert len(done) == 2 * len(boxes)
    for (traits, launch), got in zip([box for box in boxes for _ in range(2)], done):
        print(f"{arch} {named(traits)}: {got}")
        assert got["shared"] == 0 and not got["barrier"], named(traits)
        if not arch.startswith("sm"):
            continue
        if traits["num_experts"] == 8:
            assert got["shuffles"] == 5
            wide = traits["dtype"] == "float32"
            assert got["vectors"] == ([wide, not wide] if got["dense"] else [0, 0])
        waits, starts, reads, writes = got["places"]
        assert 0 < waits < starts < reads < writes if launch else waits == starts == -1 < reads < writes


# ---- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("rows,launch", [(64, "early"), (256, False)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_many_rows(scoring, rows, launch, router):
    for shape in SHAPES:
        for dtype in DTYPES:
            traits = few(*shape, scoring=scoring, dtype=dtype)
            args, kwargs = cases.inputs(traits, 10001, seed=1, device="cuda")
            got = made(traits, rows, dependent_launch=launch)(*args, **kwargs)
            assert all(map(same_bits, got, router(traits)(*args, **kwargs))), f"{named(traits)} {dtype}"


@on_gpu
@pytest.mark.parametrize("launch", (False, "early"))
def test_a_graph_and_one_launch(launch, router):
    traits = few(8, 2, dtype="bfloat16")
    route = made(traits, 128, dependent_launch=launch)
    (logits, _), _ = cases.inputs(traits, 5000, device="cuda")
    live = torch.tensor([5000], device="cuda")
    route(logits, None, num_token_non_padded=live)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(logits, None, num_token_non_padded=live)
    for count in (5000, 0, 4097):
        logits.copy_(torch.randn_like(logits))
        live.fill_(count)
        graph.replay()
        assert all(map(same_bits, got, router(traits)(logits, None, num_token_non_padded=live)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        route(logits, None, num_token_non_padded=live)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "few_experts_kernel" in launched[0], launched
