"""SGLang 0.5.23's router ladder against examples/sglang_router: leaf by leaf, switch by switch, and point by point.

`sglang_ladder` says in plain conditions what SGLang decides; test_sglang_source.py holds that account against SGLang's
own functions, where its source is at hand.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from sglang_ladder import (AITER, DEFAULTS, DTYPES, EDGES, EXAMPLE, GATE, JIT_GROUPED, K2, K3, KIMI, KIMI_BF16, LORA,
                           MINIMAX, MODELS, PLATFORMS, RADIX4, REFUSED, ROUTER, TOKENS, TOP22, V3, call_points, ladder,
                           neighbour_points, nested, point, sampled_points, shape_points, space, variants)

from examples.sglang_router.contract import passed_on
from kernel_registry import Registry, errors
from kernel_registry.lint import lint_file
from kernel_registry.selection import decide

ROOT = Path(__file__).resolve().parents[2]

# ---- the switches as override lines ----------------------------------------------------------------------------------

LINES_FOR = {AITER: True, RADIX4: True, JIT_GROUPED: True, LORA: False, KIMI: True, KIMI_BF16: False, TOP22: True}
ORDER = (AITER, RADIX4, KIMI, JIT_GROUPED, KIMI_BF16, LORA, TOP22)  # load order: a later file is stronger


def environment(**given) -> tuple[tuple[str, bool], ...]:
    return tuple({**DEFAULTS, **given}.items())


def lines(env: dict[str, bool]) -> list[Path]:
    """The override files that say what an environment says, weakest first."""
    files = []
    for name in ORDER:
        if env[name] != LINES_FOR[name]:
            continue
        if name == RADIX4 and not env[AITER]:
            continue  # read inside the AITER branch only: without AITER the switch is silently ignored there
        files.append(EXAMPLE / "switches" / f"{name}.yaml")
    return files


@lru_cache(maxsize=None)
def registry_for(env=environment()) -> Registry:
    registry = Registry(EXAMPLE / "registry.yaml", plugins=False, environment=False, platform="cpu")
    for file in lines(dict(env)):
        registry.load_overrides(file)
    return registry


# ---- every choice the registry makes ---------------------------------------------------------------------------------

def leaf_of(implementation) -> str:
    """The leaf an implementation stands for: two entries with one target are one leaf."""
    return implementation.target.partition(":")[2]


class Chooser:
    """Leaf and nested kernel as the registry decides them: the one evaluator behind dispatch, explain and plan."""

    def __init__(self, env: dict):
        self.env = env
        registry = registry_for(tuple(env.items()))
        self.ops = {op: registry.catalog.op(op) for op in (ROUTER, GATE)}
        self.layers = {op: registry.state.layers(None, self.ops[op]) for op in self.ops}
        self.inner = {}

    def __call__(self, traits: dict) -> tuple[str, str | None]:
        try:
            leaf = leaf_of(decide(self.ops[ROUTER], traits, self.layers[ROUTER]).implementation)
        except errors.OverrideError:
            return REFUSED, None
        call = passed_on(leaf, traits, aiter=self.env[AITER] and traits["platform"].kind == "hip")
        if call is None:
            return leaf, None
        key = tuple(call.values())
        if key not in self.inner:
            request = self.ops[GATE].space.request(call, lambda: None)
            self.inner[key] = decide(self.ops[GATE], request.traits, self.layers[GATE]).implementation.name
        return leaf, self.inner[key]


def compare(points, env: dict) -> int:
    """How many points there were; fails at the first on which registry and ladder differ."""
    choose, count = Chooser(env), 0
    for traits in points:
        count += 1
        leaf = ladder(traits, env)
        expected = (leaf, nested(leaf, traits, env))
        got = choose(traits)
        if got != expected:
            on = [name for name, value in env.items() if value]
            shown = {k: str(v) for k, v in traits.items()}
            pytest.fail(f"SGLang takes {expected}, the registry {got}, for {shown} with {on}")
    return count


# ---- each leaf -------------------------------------------------------------------------------------------------------

LEAVES = [
    # leaf, nested kernel, platform, shape, further traits, switches
    ("jit_grouped_gate", "triton_router", "sm_90", V3, {}, {JIT_GROUPED: True}),
    ("jit_grouped_gate", "triton_router", "gfx942", MINIMAX, {}, {JIT_GROUPED: True}),
    ("jit_grouped_gate", "triton_router", "gfx950", V3, {}, {JIT_GROUPED: True, AITER: True}),
    ("jit_grouped_gate", "route_radix", "gfx950", K3, {}, {JIT_GROUPED: True, AITER: True, RADIX4: True}),
    ("flashinfer_deepseek", None, "sm_80", V3, {}, {}),
    ("flashinfer_deepseek", None, "sm_100", MODELS["deepseek-v3 fused"], {"dtype": "bfloat16"}, {}),
    ("triton_grouped", "triton_router", "sm_90", V3, {"has_flashinfer": False}, {}),
    ("triton_grouped", "triton_router", "sm_90", V3, {"renormalize": False}, {}),
    ("triton_grouped", "triton_router", "sm_100", MODELS["12 groups"], {}, {}),
    ("radix4_hip", None, "gfx942", K3, {"dtype": "bfloat16"}, {AITER: True, RADIX4: True}),
    ("radix4_hip", None, "gfx950", K3, {"num_tokens": 1024}, {AITER: True, RADIX4: True}),
    ("aiter", None, "gfx950", K3, {"num_tokens": 1025}, {AITER: True, RADIX4: True}),
    ("aiter", None, "gfx90a", K3, {}, {AITER: True, RADIX4: True}),
    ("aiter", None, "gfx942", V3, {}, {AITER: True}),
    ("musa_fused_gate", None, ("cpu", "musa"), V3, {}, {}),
    ("musa_fused_gate", None, ("cpu", "musa"), K2, {}, {}),
    ("kimi_k2_gate", None, "sm_90", K2, {"dtype": "bfloat16"}, {LORA: True, KIMI: True}),
    ("flashinfer_deepseek", None, "sm_90", (256, 1, 1, 9, 8), {}, {LORA: True, KIMI: True}),
    ("route_quant_fused", None, "sm_100", K3, {"dtype": "bfloat16", "staged_hidden_size": 3584, "num_tokens": 64}, {}),
    ("route_quant_fused", None, "sm_90", K3, {"dtype": "float16", "staged_hidden_size": 3584, "num_tokens": 2,
                                              "logits_layout": "odd_rows"}, {}),
    ("triton_single_group", "triton_router", "sm_90", K2, {}, {}),
    ("triton_single_group", "route_radix", "sm_90", K3, {"dtype": "bfloat16"}, {}),
    ("triton_single_group", "route_radix", "sm_100", K3, {"staged_hidden_size": 3584, "num_tokens": 65}, {}),
    ("triton_single_group", "triton_router", "sm_90", MODELS["glm-4.5 fused"], {}, {}),
    ("triton_single_group", "sm120_top22", "sm_120", MODELS["nemotron"], {"num_tokens": 16}, {TOP22: True}),
    ("triton_single_group", "triton_router", "sm_120", MODELS["nemotron"], {"num_tokens": 17}, {TOP22: True}),
    ("triton_small_single_group", "triton_router", "sm_90", MINIMAX, {}, {}),
    ("xpu_topk_sigmoid", None, ("cpu", "xpu"), MINIMAX, {}, {}),
    ("xpu_topk_sigmoid", None, ("cpu", "xpu"), MINIMAX, {"num_tokens": 0}, {}),
    ("xpu_fused_gate", None, ("cpu", "xpu"), V3, {}, {}),
    ("torch_compiled", None, "cpu", V3, {}, {}),
    ("torch_compiled", None, "gfx942", V3, {}, {}),
    ("torch_compiled", None, ("cpu", "xpu"), K2, {}, {}),
    ("torch_compiled", None, "sm_90", V3, {"bias_per_token": True}, {}),
    ("torch_compiled", None, "sm_100", (1025, 1, 1, 8, 0), {}, {}),
    ("torch_compiled", None, "sm_90", (256, 1, 1, 8, 1), {}, {}),
]


@pytest.mark.parametrize("leaf, kernel, platform, shape, traits, switches", LEAVES)
def test_each_leaf_is_reached_by_what_reaches_it_there(leaf, kernel, platform, shape, traits, switches):
    platform = platform if isinstance(platform, tuple) else (platform, "none")
    env = {**DEFAULTS, **switches}
    registry = registry_for(environment(**switches))
    call = point(shape, platform, **traits)
    assert ladder(call, env) == leaf and nested(leaf, call, env) == kernel  # what this file says SGLang does

    given = {name: call[name] for name in space(ROUTER).traits}
    route = registry.dispatch(ROUTER, **given)
    assert route.name == registry.explain(ROUTER, **given).winner
    assert route(None, None) == leaf  # the fake kernel ran, and says which leaf it is
    inner = passed_on(leaf, call, aiter=env[AITER] and call["platform"].kind == "hip")
    assert (inner is None) == (kernel is None)
    if inner is not None:
        gate = registry.dispatch(GATE, **inner)
        assert gate.name == kernel == registry.explain(GATE, **inner).winner
        assert gate(None, None) == kernel


def test_every_implementation_is_a_leaf_that_is_reached():
    declared = {op: set(map(leaf_of, registry_for().catalog.op(op).implementations)) for op in (ROUTER, GATE)}
    assert len(declared[ROUTER]) == 13 and len(declared[GATE]) == 3
    assert declared[ROUTER] == {case[0] for case in LEAVES}
    assert declared[GATE] == {case[1] for case in LEAVES} - {None}
    given = [{name: point(case[3], case[2] if isinstance(case[2], tuple) else (case[2], "none"), **case[4])[name]
              for name in space(ROUTER).traits} for case in LEAVES]
    won = {registry_for(environment(**case[5])).explain(ROUTER, **traits).winner for case, traits in zip(LEAVES, given)}
    assert won == set(registry_for().catalog.op(ROUTER).by_name)


# ---- every point -----------------------------------------------------------------------------------------------------

def test_every_shape_agrees():
    assert compare(shape_points(), DEFAULTS) > 200_000


@pytest.mark.parametrize("env", [DEFAULTS, {**DEFAULTS, AITER: True, RADIX4: True}, {**DEFAULTS, JIT_GROUPED: True}],
                         ids=["defaults", "aiter+radix4", "jit grouped"])
def test_every_call_of_kimi_k3_agrees(env):
    assert compare(call_points([K3]), env) > 80_000


@pytest.mark.parametrize("env", [{**DEFAULTS, TOP22: True}, {**DEFAULTS, AITER: True, RADIX4: True}],
                         ids=["top22", "aiter+radix4"])
def test_every_call_beside_a_special_shape_agrees(env):
    assert compare(neighbour_points(), env) > 40_000


def test_every_state_of_the_environment_agrees():
    """All 128 states of the seven switches, on points drawn from the product of every trait."""
    total = 0
    for index, values in enumerate(itertools.product((False, True), repeat=len(DEFAULTS))):
        total += compare(sampled_points(400, seed=index), dict(zip(DEFAULTS, values)))
    assert total == 128 * 400


@pytest.mark.parametrize("switches", [{}, {AITER: True, RADIX4: True}, {TOP22: True}], ids="+".join)
@pytest.mark.parametrize("op, name", [(ROUTER, "kimi-k3"), (GATE, "nemotron")])
def test_bound_at_load_it_chooses_per_call_what_the_ladder_chooses(op, name, switches):
    env, registry = {**DEFAULTS, **switches}, registry_for(environment(**switches))
    for platform in PLATFORMS:
        call = point(MODELS[name], platform, staged_hidden_size=3584)
        leaf = ladder(call, env)
        inner = passed_on(leaf, call)
        if op == GATE and inner is None:
            continue
        given = call if op == ROUTER else inner
        static = {n: v for n, v in given.items() if n in space(op).traits and n != "num_tokens"}
        kernel = registry.bind(op, **static)
        for tokens in TOKENS:
            row = {**call, "num_tokens": tokens}
            expected = ladder(row, env) if op == ROUTER else nested(leaf, row, env)
            assert kernel(SimpleNamespace(shape=(tokens, 896)), None) == expected, (platform, tokens)


# ---- each switch -----------------------------------------------------------------------------------------------------

NEEDS = {RADIX4: {AITER: True}, KIMI: {LORA: True}, LORA: {KIMI: True}, KIMI_BF16: {LORA: True, KIMI: True}}
TAKES_OVER = {AITER: {"aiter", REFUSED}, RADIX4: {"radix4_hip"}, JIT_GROUPED: {"jit_grouped_gate"},
              KIMI: {"kimi_k2_gate"}, LORA: {"kimi_k2_gate"}, KIMI_BF16: {"kimi_k2_gate"}, TOP22: {"sm120_top22"}}


@lru_cache(maxsize=1)
def switch_points() -> tuple[dict, ...]:
    focused = [variant for name in ("kimi-k3", "kimi-k2", "nemotron", "deepseek-v3") for platform in PLATFORMS
               for variant in variants(point(MODELS[name], platform), dtype=DTYPES, num_tokens=(1, 16, 1024, 1025),
                                       apply_routed_scaling_factor_on_output=(False, True))]
    return (*focused, *sampled_points(3000, seed=7))


@pytest.mark.parametrize("switch", DEFAULTS)
def test_a_line_changes_exactly_what_its_switch_changes(switch):
    off = {**DEFAULTS, **NEEDS.get(switch, {}), switch: False}
    on = {**off, switch: True}
    changed_there, changed_here = {}, {}
    choose_off, choose_on = Chooser(off), Chooser(on)
    for index, traits in enumerate(switch_points()):
        before, after = ladder(traits, off), ladder(traits, on)
        there = (before, nested(before, traits, off)), (after, nested(after, traits, on))
        here = choose_off(traits), choose_on(traits)
        if there[0] != there[1]:
            changed_there[index] = there
        if here[0] != here[1]:
            changed_here[index] = here
    assert changed_here == changed_there and changed_there
    assert {leaf if kernel is None or switch != TOP22 else kernel
            for _, (leaf, kernel) in changed_here.values()} <= TAKES_OVER[switch]


@pytest.mark.parametrize("switch", DEFAULTS)
def test_a_switch_is_one_line(switch):
    document = yaml.safe_load((EXAMPLE / "switches" / f"{switch}.yaml").read_text())
    assert set(document) == {"version", "overrides"} and len(document["overrides"]) == 1
    assert document["overrides"][0]["reason"] == f"{switch}={int(LINES_FOR[switch])}"


def test_every_switch_file_is_tested():
    assert {file.stem for file in (EXAMPLE / "switches").glob("*.yaml")} == set(DEFAULTS)


def test_what_the_ladder_asserts_is_an_error_here_too():
    """AITER refuses to scale on output; the strict line says so at dispatch, not in the forward pass."""
    registry = registry_for(environment(**{AITER: True}))
    with pytest.raises(errors.OverrideError, match="apply_routed_scaling_factor_on_output"):
        registry.dispatch(ROUTER, num_experts=256, num_expert_group=8, topk_group=4, topk=8, platform="gfx942",
                          apply_routed_scaling_factor_on_output=True)


def test_a_scoring_function_is_refused_rather_than_ignored():
    """The ladder takes no scoring function and computes sigmoid for every model; here the trait is unknown."""
    with pytest.raises(errors.UnknownNameError, match="scoring"):
        registry_for().dispatch(ROUTER, num_experts=256, topk=8, scoring="softmax", platform="sm_90")


@pytest.mark.parametrize("traits", [{"scoring": "softmax"}, {"scoring": "sqrtsoftplus"}, {"plain": False}])
@pytest.mark.parametrize("shape, tokens", [((896, 16), 1), ((512, 22), 2)])
def test_only_plain_sigmoid_calls_of_the_gate_take_a_special_kernel(shape, tokens, traits):
    """What no leaf of the ladder passes on, but other callers of moe_fused_gate do."""
    registry = registry_for(environment(**{TOP22: True}))
    call = {"num_experts": shape[0], "topk": shape[1], "num_tokens": tokens, "platform": "sm_120"}
    assert registry.dispatch(GATE, **call).name != "triton_router"
    assert registry.dispatch(GATE, **call, **traits).name == "triton_router"


# ---- order -----------------------------------------------------------------------------------------------------------

ORDER_DEPENDENT = {  # pairs of leaves that both could serve some call, where only the ladder's order decides
    ("flashinfer_deepseek", "triton_grouped"),
    ("flashinfer_deepseek", "triton_single_group"),
    ("flashinfer_deepseek", "triton_small_single_group"),
    ("route_quant_fused", "triton_single_group"),
    ("triton_single_group", "triton_small_single_group"),
    ("xpu_topk_sigmoid", "xpu_fused_gate"),
}


def test_the_order_dependent_pairs_are_these():
    op = registry_for().catalog.op(ROUTER)
    leaves = [i for i in op.implementations if i.rank > 0]
    seen = set()
    platforms = (("sm_90", "none"), ("cpu", "xpu"), ("cpu", "musa"))
    shapes = (point(shape, platform) for shape in EDGES for platform in platforms)
    for traits in itertools.chain(shapes, [point(K3, staged_hidden_size=3584)]):
        able = [leaf_of(i) for i in leaves if i.box.admits(traits)]
        seen |= set(itertools.combinations(able, 2))
    assert seen == ORDER_DEPENDENT


@pytest.mark.parametrize("first, second", sorted(ORDER_DEPENDENT - {("route_quant_fused", "triton_single_group")}))
def test_without_a_rank_the_loader_names_the_pair(tmp_path, first, second):
    document = yaml.safe_load((EXAMPLE / "registry.yaml").read_text())
    entries = document["ops"][ROUTER]["implementations"]
    document["ops"] = {ROUTER: {"contract": document["ops"][ROUTER]["contract"],
                                "implementations": {name: {**entries[name], "rank": 0} for name in (first, second)}}}
    file = tmp_path / "registry.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(errors.AmbiguityError, match=f"(?s)(?=.*{first})(?=.*{second})"):
        Registry(file, plugins=False, environment=False).catalog


# ---- lint ------------------------------------------------------------------------------------------------------------

def test_lint_finds_it_unambiguous_and_no_call_unserved():
    findings = lint_file(EXAMPLE / "registry.yaml")
    # What it may say: that a fallback with a relation makes totality too large to prove. The comparison above is wider.
    assert [str(f) for f in findings if f.level == "error" or "too many combinations" not in f.message] == []


def test_lint_names_a_call_that_nothing_serves(tmp_path):
    document = yaml.safe_load((EXAMPLE / "registry.yaml").read_text())
    del document["ops"][ROUTER]["implementations"]["torch_compiled"]
    file = tmp_path / "registry.yaml"
    file.write_text(yaml.safe_dump(document))
    assert any(f"{ROUTER}: nothing serves" in finding.message for finding in lint_file(file))


# ---- the example as a whole ------------------------------------------------------------------------------------------

def test_the_layouts_after_a_cast_are_torchs():
    """`passed_on` and `nested` claim what a cast to float32 does to strides; torch decides."""
    torch = pytest.importorskip("torch")
    wide = torch.empty(8, 898, dtype=torch.float16)
    assert wide[:, :896].stride() == (898, 1) and wide[:, :896].to(torch.float32).stride() == (896, 1)
    assert torch.empty(896, 8, dtype=torch.float16).t().to(torch.float32).stride() == (1, 8)
    assert wide[:1, :896].to(torch.float32).stride() == (898, 1)  # a lone row is dense in torch's eyes
    assert wide[:, :896].to(torch.float16).stride() == (898, 1)  # no cast, no copy


def test_the_example_imports_and_decides_without_torch():
    code = ("import sys; from kernel_registry import Registry; "
            f"r = Registry({str(EXAMPLE / 'registry.yaml')!r}, plugins=False, environment=False); "
            f"assert r.dispatch({ROUTER!r}, num_experts=256, topk=8, platform='sm_90')(None, None); "
            "assert not {'torch', 'triton', 'sglang'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
