"""The adapter where its runtime is not: imported without it, and an error that says what to install."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torch")


def test_importing_the_adapter_imports_no_runtime(python):
    out = python("""
import sys
import kernel_registry.integrations.transformers
print("transformers" in sys.modules)
""")
    assert out.strip() == "False"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed here")
def test_enabling_it_says_what_is_missing():
    from kernel_registry.integrations.transformers import enable

    with pytest.raises(ImportError, match="pip install transformers"):
        enable()
