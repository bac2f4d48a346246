"""bench times what can run here side by side, and says what the registry's choice costs."""

import json

import pytest

from kernel_registry import Registry
from kernel_registry.bench import bench, to_json
from kernel_registry.errors import UnknownNameError
from tests.fake_op import FakeOp

IMPLEMENTATIONS = """
slow: target: PACKAGE.kernels:slow, rank: 1, when: {platform: any, groups: any}
quick: target: PACKAGE.kernels:double, when: {platform: any, groups: any}
gpu: target: PACKAGE.kernels:double, rank: 2, when: {platform: sm_90, groups: any}
torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any, groups: any, mode: any}
"""


@pytest.fixture
def op(tmp_path, monkeypatch):
    fake = FakeOp(tmp_path, monkeypatch)
    yield fake
    fake.forget()


def open_registry(op, implementations=IMPLEMENTATIONS):
    return Registry(op.registry(implementations), plugins=False, environment=False, platform="cpu")


def test_regret_and_ratio_of_a_slow_choice(op):
    rows = bench(open_registry(op), tokens=[1], seconds=0.05)
    assert {r.workload for r in rows} == {"tiny", "grouped"}
    tiny = {r.implementation: r for r in rows if r.workload == "tiny"}
    assert set(tiny) == {"slow", "quick", "torch"}  # gpu can't run here
    assert tiny["slow"].chosen and not tiny["quick"].chosen
    assert tiny["slow"].microseconds >= 2000  # it sleeps two milliseconds
    assert tiny["slow"].regret > 10 and tiny["slow"].ratio > 10
    assert tiny["quick"].regret is None and tiny["torch"].ratio == 1.0
    assert tiny["slow"].method == "perf_counter"


def test_a_choice_that_is_the_best_has_no_regret(op):
    registry = open_registry(op, IMPLEMENTATIONS.replace("kernels:slow", "kernels:double").replace(
        "quick: target: PACKAGE.kernels:double", "quick: target: PACKAGE.kernels:slow"))
    chosen, = [r for r in bench(registry, workloads=["tiny"], tokens=[1], seconds=0.05,
                                implementations=["quick", "slow"]) if r.chosen]
    assert chosen.implementation == "slow" and chosen.regret < 3 and chosen.regret >= 1.0


def test_the_chosen_one_and_the_reference_are_timed_beside_the_named_one(op):
    rows = bench(open_registry(op), implementations=["quick"], workloads=["tiny"], tokens=[1, 2], seconds=0.01)
    assert {(r.implementation, r.tokens) for r in rows} == {(n, t) for n in ("slow", "quick", "torch") for t in (1, 2)}


def test_a_kernel_that_raises_is_a_row_and_the_rest_is_timed(op):
    op.extend("cases", "\nWORKLOADS = {'big': {'size': 100}}\n")
    registry = open_registry(op, IMPLEMENTATIONS.replace("kernels:slow", "kernels:raises_above_64"))
    rows = {r.implementation: r for r in bench(registry, tokens=[1], seconds=0.01)}
    assert "shared memory exhausted" in rows["slow"].error and rows["slow"].microseconds is None
    assert rows["quick"].microseconds > 0


@pytest.mark.parametrize("wrong, said", [(dict(workloads=["tiny", "tinny"]), "did you mean 'tiny'"),
                                         (dict(implementations=["quik"]), "did you mean 'quick'"),
                                         (dict(ops=["fake.dooble"]), "did you mean 'fake.double'")])
def test_an_unknown_name_is_refused(op, wrong, said):
    with pytest.raises(UnknownNameError, match=said):
        bench(open_registry(op), tokens=[1], seconds=0.01, **wrong)


def test_a_named_one_that_does_not_serve_the_call_here_says_why(op):
    rows = bench(open_registry(op), implementations=["gpu"], workloads=["tiny"], tokens=[1], seconds=0.01)
    gpu, = [r for r in rows if r.implementation == "gpu"]
    assert len(rows) == 3 and gpu.microseconds is None and gpu.error == "platform is cpu, serves sm_90"


def test_a_workload_that_nothing_serves_is_told(op):
    op.extend("cases", "\nWORKLOADS = {'odd': {'size': 4, 'groups': 3}}\n")
    row, = bench(open_registry(op), tokens=[1], seconds=0.01)
    assert row.microseconds is None and "contradict" in row.error


def test_the_kernel_is_called_with_the_workload_s_inputs(op):
    op.extend("kernels", "\n\nCALLS = []\n\n\ndef counted(**_):\n    def kernel(rows, factor=2.0):\n"
                         "        CALLS.append((len(rows), len(rows[0])))\n        return rows\n    return kernel\n")
    bench(open_registry(op, "only: target: PACKAGE.kernels:counted, when: {platform: any}"), workloads=["tiny"],
          tokens=[3], seconds=0.001)
    import sys

    calls = sys.modules[f"{op.package}.kernels"].CALLS
    assert set(calls) == {(3, 4)} and len(calls) > 20


def test_json_says_what_it_was_measured_on(op):
    registry = open_registry(op)
    rows = bench(registry, workloads=["tiny"], tokens=[1], seconds=0.01)
    data = json.loads(to_json(registry, rows))
    assert data["platform"] == "cpu" and len(data["rows"]) == 3 and {"microseconds", "regret"} <= set(data["rows"][0])


def has_gpu():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
def test_on_a_gpu_a_captured_graph_is_timed_and_what_can_not_be_captured_is_launched():
    import torch

    from kernel_registry.bench import measure

    data = [torch.zeros(1024, device="cuda") for _ in range(8)]
    calls = {"captured": [lambda x=x: x.add_(1) for x in data],
             "synchronising": [lambda x=x: x.sum().item() for x in data]}
    times, method = measure(calls, "cuda", 0.05)
    assert method == {"captured": "cuda graph", "synchronising": "cuda events"}
    assert 0 < times["captured"] < times["synchronising"]
