"""A runner of the command line, and a fake op with a registry file and a model config for it."""

import json

import pytest
from click.testing import CliRunner

from kernel_registry.cli import main
from kernel_registry.traits.platform import Platform
from tests.fake_op import FakeOp

ENTRIES = """
quick: target: PACKAGE.kernels:double, summary: the quick one, when: {platform: [cuda>=sm_80, cpu], size: {max: 64}}
torch: target: PACKAGE.kernels:reference, fallback: true, when: {platform: any, groups: any, mode: any}
"""


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("KERNEL_REGISTRY_OVERRIDES", raising=False)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="kernel-registry")
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result
    return invoke


@pytest.fixture
def op(tmp_path, monkeypatch):
    monkeypatch.setattr("kernel_registry.state.detect", lambda: Platform("cpu"))  # whatever this machine is
    fake = FakeOp(tmp_path, monkeypatch)
    fake.file = fake.registry(ENTRIES)
    fake.config = tmp_path / "config.json"
    fake.config.write_text(json.dumps({"fake_size": 16}))
    yield fake
    fake.forget()
