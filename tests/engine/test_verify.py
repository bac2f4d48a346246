"""verify finds what is wrong with an implementation's declaration, and never passes what it did not run."""

import json
from collections import Counter

import pytest

from kernel_registry import Registry
from kernel_registry.errors import UnknownNameError
from kernel_registry.verify import verify
from tests.fake_op import FakeOp

GOOD = "good: target: PACKAGE.kernels:double, when: {platform: any, size: {max: 65}, groups: any, mode: any}"


@pytest.fixture
def op(tmp_path, monkeypatch):
    fake = FakeOp(tmp_path, monkeypatch)
    yield fake
    fake.forget()


def check(op, entries, /, *, platform="cpu", registry=Registry, **options):
    return verify(registry(op.registry(entries), plugins=False, environment=False, platform=platform), **options)


def outcomes(report, name=None):
    return Counter((r.where, r.outcome) for r in report.rows if name in (None, r.implementation))


def test_a_right_kernel_passes_everywhere(op):
    report = check(op, GOOD)
    found = outcomes(report)
    assert report.ok and not report.failures
    assert found["model", "passed"] == 2
    assert found["edge", "passed"] >= 5 and found["inside", "passed"] >= 5 and found["outside", "passed"] >= 1
    assert any("size=65" in r.point for r in report.rows if r.where == "edge")
    assert any("size=66" in r.point for r in report.rows if r.where == "outside")
    assert sum(r.rows for r in report.rows) > 50  # rows that the oracle judged: the calls really ran


def test_a_wrong_kernel_fails(op):
    report = check(op, "bad: target: PACKAGE.kernels:wrong, when: {platform: any}")
    assert not report.ok
    assert any("off by 0.001" in r.detail for r in report.failures)


def test_one_target_with_two_options_is_two_implementations(op):
    op.extend("kernels", "\n\ndef off(*, by=1.0):\n    return lambda rows, factor=2.0: [[x * factor + by for x in row] "
                         "for row in rows]\n")
    entry = "{}: target: PACKAGE.kernels:off, options: {{by: {}}}, numerics: same, when: {{platform: any}}, rank: {}\n"
    report = check(op, entry.format("right", 0.0, 0) + entry.format("wrong", 0.001, 1))
    assert {(r.implementation, r.where) for r in report.failures} >= {("wrong", "inside"), ("right", "numerics")}
    assert not outcomes(report, "right")["inside", "failed"] and outcomes(report, "right")["inside", "passed"]


@pytest.mark.parametrize("kernel, said", [("wrong_above_64", "off by 1"), ("raises_above_64", "memory exhausted")])
def test_a_kernel_declared_wider_than_it_serves_is_caught_at_the_edge(op, kernel, said):
    report = check(op, f"wide: target: PACKAGE.kernels:{kernel}, when: {{platform: any, size: {{max: 65}}}}")
    caught = [r for r in report.failures if r.where == "edge"]
    assert caught and all("size=65" in r.point and said in r.detail for r in caught)
    narrow = check(op, f"right: target: PACKAGE.kernels:{kernel}, when: {{platform: any, size: {{max: 64}}}}")
    assert narrow.ok


def test_an_edge_of_a_relation_is_found(op):
    report = check(op, "wide: target: PACKAGE.kernels:wrong_above_64, when: {platform: any, groups: any, "
                       "relations: ['size <= 61 + groups']}")
    assert any(r.where == "edge" for r in report.failures)


def test_a_call_outside_the_box_must_be_refused(op):
    class Lenient(Registry):
        def dispatch(self, name, /, *, implementation=None, **traits):
            return lambda rows, factor=2.0: [[x * factor for x in row] for row in rows]

    report = check(op, GOOD, registry=Lenient)
    assert {r.where for r in report.failures} == {"outside"}
    assert "yet dispatched" in report.failures[0].detail


def test_an_error_that_is_no_refusal_fails_outside_too(op):
    class Broken(Registry):
        def dispatch(self, name, /, *, implementation=None, **traits):
            if traits["size"] > 65:
                raise KeyError("size")
            return super().dispatch(name, implementation=implementation, **traits)

    report = check(op, GOOD, registry=Broken)
    assert report.failures and all(r.where == "outside" and "KeyError" in r.detail for r in report.failures)


def test_what_this_machine_can_not_run_is_not_run(op):
    report = check(op, GOOD + "\ngpu: target: PACKAGE.kernels:wrong, rank: 1, when: {platform: [sm_90, interpreter]}")
    row, = [r for r in report.rows if r.implementation == "gpu"]
    assert row.outcome == "not run" and "this machine is cpu" in row.detail and "TRITON_INTERPRET=1" in row.detail
    assert report.ok
    alone = check(op, GOOD + "\ngpu: target: PACKAGE.kernels:double, rank: 1, when: {platform: sm_90}",
                  implementations=["gpu"])
    assert not alone.ok and not alone.failures


def test_an_implementation_for_the_cpu_runs_on_a_machine_with_more(op):
    report = check(op, "c: target: PACKAGE.kernels:double, when: {platform: cpu}", platform="interpreter")
    assert report.ok and all("platform=cpu" in r.point for r in report.rows if r.where == "model")


def test_an_op_without_an_oracle_is_not_run(op):
    op.extend("contract", "\n\nclass Unjudged(Double):\n    oracle = ''\n")
    registry = Registry(op.registry(GOOD, "contract:Unjudged"), plugins=False, environment=False, platform="cpu")
    row, = verify(registry).rows
    assert row.outcome == "not run" and "no oracle" in row.detail


@pytest.mark.parametrize("module, text, target", [
    ("oracle", "\n\ndef kernel(**_):\n    return lambda rows, factor=2.0: rows\n", "oracle:kernel"),
    ("kernels", "\n\nfrom PACKAGE.oracle import check\n", "kernels:double"),
    ("oracle", "\n\nfrom PACKAGE.kernels import double\n", "kernels:double"),
    ("oracle", "\n\nfrom PACKAGE import kernels\n", "kernels:double"),
])
def test_a_kernel_is_never_compared_with_itself(op, module, text, target):
    op.extend(module, text)
    report = check(op, f"same: target: PACKAGE.{target}, when: {{platform: any}}")
    row, = report.rows
    assert row.outcome == "failed" and ("same code" in row.detail or "share code" in row.detail)


def test_a_re_export_is_the_same_object(op):
    op.extend("oracle", "\n\ndef kernel(**_):\n    return lambda rows, factor=2.0: rows\n")
    op.write("alias", "from PACKAGE.oracle import kernel\n")
    row, = check(op, "same: target: PACKAGE.alias:kernel, when: {platform: any}").rows
    assert row.outcome == "failed" and "same code" in row.detail


NUMERICS = """
a: target: PACKAGE.kernels:double, numerics: exact, rank: 1, when: {platform: any}
b: target: PACKAGE.kernels:%s, numerics: exact, when: {platform: any}
"""


def test_implementations_that_claim_bit_identity_are_compared_bit_for_bit(op):
    same = check(op, NUMERICS % "reference")
    assert same.ok and outcomes(same)["numerics", "passed"] > 10
    off = check(op, NUMERICS % "last_bit")
    assert {r.where for r in off.failures} == {"numerics"}  # the oracle's tolerance lets it pass everywhere else
    assert "numerics 'exact'" in off.failures[0].detail


def test_a_partner_that_can_not_run_here_leaves_the_claim_not_run(op):
    report = check(op, NUMERICS.replace("b: target", "c: target: PACKAGE.kernels:double, numerics: exact, rank: 2, "
                                        "when: {platform: sm_90}\nb: target") % "reference")
    row, = [r for r in report.rows if r.implementation == "c" and r.where == "numerics"]
    assert row.outcome == "not run" and "sm_90" in row.detail


def test_a_comparison_that_decides_too_little_fails(op):
    op.extend("oracle", "\n\nUNDECIDED = 1\n")
    report = check(op, GOOD)
    row, = report.failures
    assert row.where == "all" and "34 of 34 rows" in row.detail


def test_model_workloads_get_plain_values_and_other_points_every_flavour(op):
    rows = check(op, GOOD).rows
    assert all("(random, " in r.point for r in rows if r.where == "model")
    assert {"random", "zeros"} == {r.point.rpartition("(")[2].partition(",")[0] for r in rows if r.where == "edge"}
    few = check(op, "few: target: PACKAGE.kernels:double, when: {platform: any, num_tokens: {max: 8}}")
    assert few.ok and any("num_tokens=1," not in r.point and r.where == "model" for r in few.rows)


def test_what_the_oracle_can_not_judge_is_not_run(op):
    op.extend("oracle", "\n\njudged = check\n\n\ndef check(traits, args, kwargs, outputs):\n"
                        "    verdict = judged(traits, args, kwargs, outputs)\n"
                        "    return Verdict(None, 0, 0, 'too many') if traits['size'] == 65 else verdict\n")
    report = check(op, GOOD)
    rows = [r for r in report.rows if "size=65" in r.point]
    assert report.ok and rows and all(r.outcome == "not run" and "can't judge it: too many" in r.detail for r in rows)


def test_the_budget_bounds_the_run_and_is_reported(op):
    report = check(op, GOOD, budget=6)
    ran = [r for r in report.rows if r.where in ("model", "edge", "inside")]
    assert len(ran) == 6 and report.budget == 6
    assert any("of" in note and "edges" in note for note in report.notes)


def test_a_seed_fixes_the_points(op):
    first, again, other = (check(op, GOOD, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert {r.point for r in first.rows if r.where == "inside"} != {r.point for r in other.rows if r.where == "inside"}


def test_an_edge_that_no_legal_call_has_is_noted(op):
    report = check(op, "odd: target: PACKAGE.kernels:double, when: {platform: any, size: {max: 7}, groups: [1, 5000]}")
    assert any("groups 5000" in note for note in report.notes)


def test_a_box_without_a_legal_call_fails(op):
    report = check(op, "none: target: PACKAGE.kernels:double, when: {platform: any, size: 3, groups: 2}")
    row, = report.rows
    assert row.outcome == "failed" and "no legal call" in row.detail


def test_a_call_too_large_for_this_machine_is_not_run(op):
    report = check(op, "big: target: PACKAGE.kernels:double, when: {platform: any, size: {max: 4}, "
                       "num_tokens: {min: 1, max: 5000000}}")
    rows = [r for r in report.rows if "num_tokens=5000000" in r.point]
    assert rows and all(r.outcome == "not run" and "too many" in r.detail for r in rows)


def test_a_target_that_can_not_be_imported_fails_alone(op):
    report = check(op, GOOD + "\nlost: target: PACKAGE.missing:kernel, rank: 1, when: {platform: any}")
    assert {r.implementation for r in report.failures} == {"lost"}
    assert "can't be imported" in report.failures[0].detail and outcomes(report, "good")["model", "passed"] == 2


def test_only_what_is_named_is_verified(op):
    both = GOOD + "\nother: target: PACKAGE.kernels:double, rank: 1, when: {platform: any}"
    assert {r.implementation for r in check(op, both, implementations=["other"], budget=6).rows} == {"other"}
    with pytest.raises(UnknownNameError, match="did you mean 'other'"):
        check(op, both, implementations=["othr"])
    with pytest.raises(UnknownNameError, match="fake.double"):
        check(op, both, ops=["fake.dooble"])


def test_json_holds_every_row(op):
    report = check(op, GOOD, budget=6)
    data = json.loads(report.json())
    assert len(data["rows"]) == len(report.rows) and data["ok"] is True and data["platform"] == "cpu"


def test_edges_are_met_in_calls_that_have_tokens(op):
    rows = [r for r in check(op, GOOD, budget=200).rows if r.where == "edge"]
    assert all("num_tokens=0" not in r.point or r.point.startswith("num_tokens") for r in rows) and len(rows) > 15


def test_models_that_make_one_call_share_a_point(op):
    op.extend("cases", "\nWORKLOADS = {'a': {'size': 4}, 'b': {'size': 4}, 'c': {'size': 8}, 'other': {'size': 99}}\n")
    points = [r.point for r in check(op, GOOD, budget=9).rows if r.where == "model"]
    assert [p.partition(":")[0] for p in points] == ["a, b", "c"]  # other is outside the box


# ---- boxes that differ by the number of tokens -----------------------------------------------------------------------

MANY = "many: target: PACKAGE.kernels:{}, when: {{platform: any, groups: any, num_tokens: {{min: {}}}}}"


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine on which more than 100 tokens take long, and more than 2000 too long."""
    monkeypatch.setattr("kernel_registry.verify._TOKENS_CAP", {"cpu": 100})
    monkeypatch.setattr("kernel_registry.verify._TOKENS_MOST", {"cpu": 2000})


def test_one_that_serves_many_tokens_only_is_run_at_a_few_small_points(op, slow_machine):
    report = check(op, MANY.format("double", 500))
    ran = [r for r in report.rows if r.where in ("model", "edge", "inside") and r.outcome == "passed"]
    assert report.ok and {r.where for r in ran} == {"model", "edge", "inside"} and len(ran) == 3
    assert all("num_tokens=500 " in r.point for r in ran) and sum(r.rows for r in ran) == 1500
    assert ran[0].point.startswith("tiny: size=4,")  # the smaller of the two models
    rest = [r for r in report.rows if r.outcome == "not run"]
    assert rest and all("too many for the cpu" in r.detail for r in rest)
    assert {r.where for r in check(op, MANY.format("wrong", 500)).failures} == {"model", "edge", "inside"}


@pytest.mark.parametrize("least, ran", [(666, 3), (667, 2), (1000, 2), (1001, 1), (2000, 1)])
def test_the_few_points_of_a_machine_have_so_many_tokens_in_all(op, slow_machine, least, ran):
    report = check(op, MANY.format("double", least))
    rows = [r for r in report.rows if r.where in ("model", "edge", "inside") and r.outcome == "passed"]
    assert report.ok and {r.where for r in rows} == {*("edge", "inside", "model")[:ran]} and len(rows) == ran
    assert all(r.rows == least for r in rows)


def test_refusals_alone_do_not_make_an_implementation_pass(op, slow_machine):
    report = check(op, MANY.format("wrong", 2001))
    assert outcomes(report)["outside", "passed"] and not report.failures
    assert report.results == {("fake.double", "many"): "not run"} and not report.ok
    assert not json.loads(report.json())["ok"] and '"result": "not run"' in report.json()


def test_model_workloads_have_as_many_tokens_as_the_box_asks_for(op):
    report = check(op, MANY.format("double", 7000))
    assert outcomes(report)["model", "passed"] == 2 and report.ok
    assert all("num_tokens=7000 " in r.point for r in report.rows if r.where == "model")


PREFIX = """

def prefix(args, kwargs, outputs, count):
    return (args[0][:count],), kwargs, outputs[:count]
"""
FEW_AND_MANY = """
few: target: PACKAGE.kernels:double, numerics: exact, rank: 1, when: {platform: any, num_tokens: {max: 64}}
many: target: PACKAGE.kernels:%s, numerics: exact, when: {platform: any, num_tokens: {min: 500}}
"""


@pytest.mark.parametrize("cap", [100, 20_000])
def test_those_that_share_no_number_of_tokens_are_compared_on_the_rows_that_both_have(op, monkeypatch, cap):
    monkeypatch.setattr("kernel_registry.verify._TOKENS_CAP", {"cpu": cap})
    op.extend("cases", PREFIX)
    report = check(op, FEW_AND_MANY % "reference")
    rows = [r for r in report.rows if r.where == "numerics"]
    assert report.ok and rows and {r.outcome for r in rows} == {"passed"}
    assert any("few on the first 64 of 500 tokens" in r.point for r in rows)
    assert any("few on the first 33 of 500 tokens" in r.point for r in rows) == (cap > 500)
    off = check(op, FEW_AND_MANY % "last_bit")
    assert {r.where for r in off.failures} == {"numerics"} and {r.implementation for r in off.failures} == {"many"}
    alone = check(op, FEW_AND_MANY % "last_bit", implementations=["few"])  # whose partner has run nothing by then
    assert {(r.where, r.implementation) for r in alone.failures} == {("numerics", "few")}


def test_one_that_computes_otherwise_when_there_are_few_rows_is_caught_by_the_rows_it_begins_with(op):
    op.extend("cases", PREFIX)
    op.extend("kernels", "\n\ndef by_rows(**_):\n    return lambda rows, factor=2.0: [[x * factor * (1 + 2**-52 * "
                         "(len(rows) < 65)) for x in row] for row in rows]\n")
    report = check(op, (FEW_AND_MANY % "reference").replace("kernels:double", "kernels:by_rows"))
    assert {r.where for r in report.failures} == {"numerics"}


def test_a_python_check_of_the_other_is_asked_whatever_the_number_of_tokens(op):
    op.extend("cases", PREFIX)
    op.write("checks", "def small(traits):\n    return 'too wide' if traits['size'] > 16 else None\n")
    checked = FEW_AND_MANY.replace("{min: 500}}", "{min: 500}, python: [PACKAGE.checks:small]}")
    assert check(op, checked % "reference").ok


def test_without_a_prefix_such_a_claim_is_not_run(op):
    rows = [r for r in check(op, FEW_AND_MANY % "last_bit").rows if r.where == "numerics"]
    assert rows and {r.outcome for r in rows} == {"not run"} and "no `prefix`" in rows[0].detail


THREE = """
a: target: PACKAGE.kernels:double, numerics: exact, rank: 2, when: {platform: any}
b: target: PACKAGE.kernels:double, numerics: exact, rank: 1, when: {platform: any, mode: fancy}
c: target: PACKAGE.kernels:last_bit, numerics: exact, when: {platform: any, mode: [fancy]}
"""


def test_every_two_of_a_tag_are_compared_and_not_those_that_share_no_call(op):
    report = check(op, THREE)
    rows = [r for r in report.rows if r.where == "numerics"]
    assert {r.implementation for r in rows} == {"c"} and "failed" in {r.outcome for r in rows}
    assert all(r.point.startswith("bit for bit with b: ") for r in rows)  # a serves another mode
    named = [r for r in check(op, THREE, implementations=["b"]).rows if r.where == "numerics"]
    assert named and all(r.implementation == "b" and "bit for bit with c: " in r.point for r in named)
    assert not [r for r in check(op, THREE, implementations=["a"]).rows if r.where == "numerics"]


VARIANTS = ("a: target: PACKAGE.kernels:double, numerics: exact, when: {platform: any}, variants: "
            "{x: {when: {size: {max: 64}, num_tokens: {min: 2}}}, y: {when: {size: {max: 64}, num_tokens: {min: 4}}}}")


def test_variants_are_compared_with_their_implementation_and_not_with_each_other(op):
    def compared(**options):
        rows = [r for r in check(op, VARIANTS, budget=9, **options).rows if r.where == "numerics"]
        assert {r.outcome for r in rows} == {"passed"}
        return {(r.implementation, r.point.partition(":")[0].removeprefix("bit for bit with ")) for r in rows}

    assert compared() == {("a", "a.x"), ("a", "a.y")}
    assert compared(implementations=["a.x", "a.y"]) == {("a.x", "a"), ("a.y", "a")}
