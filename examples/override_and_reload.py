"""An incident: a kernel is suspected in production. One line in a file takes it out, without a restart.

    python examples/override_and_reload.py

The engine loads a model's router once and keeps the handle; whoever is on call edits the override file and has the
process reload. The kernel has variants that serve calls of many tokens, with other options: its name takes them out
too. The GPU kernel runs in Triton's interpreter here, so this needs no GPU.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

from kernel_registry import Registry  # noqa: E402
from kernel_registry.errors import RegistryError  # noqa: E402

TRAITS = dict(num_experts=256, num_expert_group=8, topk_group=4, topk=8)
NO_OVERRIDES = "version: 1\n"
THE_LINE = """
version: 1
overrides:
  - {op: moe.topk, disable: triton_biased_grouped, reason: incident 42}
"""
MISSPELT = THE_LINE.replace("grouped,", "gruoped,")


def main() -> None:
    file = Path(tempfile.mkdtemp()) / "overrides.yaml"
    file.write_text(NO_OVERRIDES)
    registry = Registry()
    registry.load_overrides(file)  # or: KERNEL_REGISTRY_OVERRIDES=overrides.yaml in the environment

    route = registry.bind("moe.topk", **TRAITS)  # at model load; the engine keeps this handle
    logits, bias = torch.randn(2, 256), torch.zeros(256)
    before, name = route(logits, bias), route.name
    print("serving with", name)
    assert name.startswith("triton_biased_grouped|.")  # which variant, a call's num_tokens says

    file.write_text(MISSPELT)
    try:
        registry.reload()
    except RegistryError as error:  # a refused file changes nothing
        print("refused:", str(error).replace(str(file.parent) + os.sep, ""))
    assert route.name == name

    file.write_text(THE_LINE)
    registry.reload()
    print("serving with", route.name)  # the handle that the engine holds follows
    assert route.name == "torch"
    after = route(logits, bias)
    assert torch.equal(before[1], after[1]) and torch.allclose(before[0], after[0])

    for line in registry.explain("moe.topk", **TRAITS).text().replace(str(file.parent) + os.sep, "").splitlines():
        if "override" in line or "incident" in line:
            print(line.strip())

    file.write_text(NO_OVERRIDES)
    registry.reload()
    print("serving with", route.name)
    assert route.name == name


if __name__ == "__main__":
    main()
