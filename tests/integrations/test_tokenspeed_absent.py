"""The adapter to TokenSpeed where TokenSpeed is not: imported without it, and an error that says what is missing."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torch")


def test_off_the_plugin_imports_no_runtime(python):
    out = python("""
import os, sys
os.environ.pop("KERNEL_REGISTRY_TOKENSPEED", None)
from kernel_registry.integrations import tokenspeed
tokenspeed.plugin()
print([name for name in sys.modules if name.startswith("tokenspeed")], "kernel_registry.torch_ops" in sys.modules)
print(tokenspeed.report())
""")
    first, second = out.splitlines()
    assert first == "[] False" and "nothing is registered" in second


@pytest.mark.skipif(importlib.util.find_spec("tokenspeed_kernel") is not None, reason="tokenspeed-kernel is here")
def test_without_the_runtime_enable_says_what_is_missing():
    from kernel_registry.integrations import tokenspeed

    with pytest.raises(ImportError, match="tokenspeed-kernel 0.1.4"):
        tokenspeed.enable()
