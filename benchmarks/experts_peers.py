"""vLLM's Triton experts (`fused_experts`) as a call that benchmarks/experts.py can time.

DIR holds what its published wheel for CUDA 13 and CPython 3.12 has, for a machine that has no vLLM installed:
    vllm_py.zip               the wheel's .py and .json files (tuned tiles among them)
    vllm_moe_C.so.xz          vllm/_moe_C_stable_libtorch.abi3.so, compressed
    vllm_C.so                 vllm/_C_stable_libtorch.abi3.so, or give its place with --vllm-c
The packages that vLLM imports on the way and this path never calls are stood in for by empty ones.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import lzma
import os
import sys
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

UNCALLED = set("""aiohttp blake3 compressed_tensors cpuinfo cv2 depyf diskcache flashinfer gguf ijson lark llguidance
mcp mistral_common model_hosting_container_standards opentelemetry outlines outlines_core partial_json_parser
prometheus_client prometheus_fastapi_instrumentator pydantic_settings ray runai_model_streamer setproctitle tensorizer
uvicorn watchfiles xgrammar""".split())
ABSENT = ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface", "vllm.vllm_flash_attn.layers",
          "vllm.vllm_flash_attn.layers.rotary")


class _Empty(types.ModuleType):
    """A module whose every name is a mock."""

    __path__, __version__ = (), "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in UNCALLED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def vllm_experts(folder: str, compiled: str | None, scratch: str):
    """call(hidden_states, layer, topk_weights, topk_ids) for the layers of benchmarks/experts.py. Unpacks in `scratch`;
    raises what an import raises where something is missing."""
    root = Path(scratch, "vllm_python")
    with zipfile.ZipFile(Path(folder, "vllm_py.zip")) as archive:
        archive.extractall(root)
    with lzma.open(Path(folder, "vllm_moe_C.so.xz")) as packed:
        (root / "vllm/_moe_C_stable_libtorch.abi3.so").write_bytes(packed.read())
    library = root / "vllm/_C_stable_libtorch.abi3.so"
    if not library.exists():
        library.symlink_to(Path(compiled or Path(folder, "vllm_C.so")).resolve())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    import transformers  # noqa: F401  before the stand-ins: it asks which optional packages there are

    sys.meta_path.append(_Finder())
    sys.modules.update({name: _Empty(name) for name in ABSENT})
    sys.path.insert(0, str(root))
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.config import biased_moe_quant_config, fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    set_current_vllm_config(VllmConfig()).__enter__()
    configs = {}

    def call(hidden_states, layer, topk_weights, topk_ids):
        if id(layer) not in configs:
            configs[id(layer)] = \
                fp8_w8a8_moe_quant_config(w1_scale=layer["w13_scale"], w2_scale=layer["w2_scale"],
                                          block_shape=[128, 128]) if "w13_scale" in layer else \
                biased_moe_quant_config(w1_bias=layer["w13_bias"], w2_bias=layer["w2_bias"]) if "w13_bias" in layer \
                else None
        return fused_experts(hidden_states, layer["w13"], layer["w2"], topk_weights, topk_ids,
                             quant_config=configs[id(layer)])

    return call
