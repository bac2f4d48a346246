"""What two ranks chose, compared: freeze, fingerprint, diff, and a plan that pins the choices of a fresh process.

    python examples/freeze_and_compare.py

In a serving engine each rank calls kernel_registry.distributed.agree() after it has bound its ops: it gathers the
fingerprints, and raises with the difference where there is one. Here both ranks are registries of one process, and the
platform is Triton's interpreter, so this needs neither a GPU nor a second process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from kernel_registry import Registry  # noqa: E402
from kernel_registry.errors import PlanError  # noqa: E402
from kernel_registry.plan import Plan  # noqa: E402

DEEPSEEK = dict(num_experts=256, num_expert_group=8, topk_group=4, topk=8)
DRAFT = dict(num_experts=64, topk=6)


def start_rank(overrides: Path | None = None) -> tuple[Registry, Plan]:
    """What a rank does at start-up: load, bind every op of the model, freeze."""
    registry = Registry()
    if overrides is not None:
        registry.load_overrides(overrides)
    for traits in (DEEPSEEK, DRAFT):
        registry.bind("moe.topk", **traits)
    return registry, registry.freeze()


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    _, plan_0 = start_rank()
    _, plan_1 = start_rank()
    assert plan_0.fingerprint == plan_1.fingerprint
    print("rank 0 and rank 1 agree:", plan_0.fingerprint[:16])

    file = folder / "overrides.yaml"
    file.write_text("version: 1\noverrides:\n  - {op: moe.topk, use: torch, when: {num_expert_group: {min: 2}}}\n")
    _, plan_2 = start_rank(file)
    assert plan_0.fingerprint != plan_2.fingerprint
    print("rank 2 has an override file that the others lack:")
    for line in plan_0.diff(plan_2):
        print("  " + line)

    plan_0.save(folder / "plan.json")
    registry = Registry()
    registry.load_plan(folder / "plan.json")  # raises PlanError if a kernel's source has changed since
    route = registry.bind("moe.topk", **DEEPSEEK)
    print("from the plan:", route.name)
    assert route.name.startswith("triton_biased_grouped|.")  # which variant, a call's num_tokens says
    try:
        registry.bind("moe.topk", num_experts=32, topk=2)
    except PlanError as error:
        print("not in the plan:", error.message)
    else:
        raise AssertionError("a strict plan serves only what it holds")
    assert registry.freeze().fingerprint != plan_0.fingerprint  # the draft model's call was not made here
    registry.bind("moe.topk", **DRAFT)
    assert registry.freeze().fingerprint == plan_0.fingerprint


if __name__ == "__main__":
    main()
