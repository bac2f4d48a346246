"""kernel_registry: which kernel serves which call, declared in one file.

    from kernel_registry import registry
    route = registry.dispatch("moe.topk", num_experts=256, num_expert_group=8, topk_group=4, topk=8)
    topk_weights, topk_ids = route(router_logits, correction_bias)

Importing this loads neither torch, triton, pydantic nor yaml: `registry` reads registry.yaml when it is first asked.
"""

from __future__ import annotations

from pathlib import Path as _Path

_package = _Path(__file__).parent
_checkout: _Path | None = None  # set in a source checkout and in a plain editable install, where ops/ lies beside us
if not (_package / "ops").is_dir() and (_package.parent / "registry.yaml").is_file():
    _checkout = _package.parent
    __path__.append(str(_checkout))  # kernel_registry.ops is ../ops, kernel_registry.traits is ../traits

from . import errors  # noqa: E402
from .layer import moe_layer  # noqa: E402
from .registry import Registry, registry  # noqa: E402
from .router import moe_router  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Registry", "errors", "moe_layer", "moe_router", "registry", "shipped_registry", "__version__"]


def shipped_registry() -> _Path:
    """The path of the registry.yaml this package came with, in a checkout, an editable install or a wheel."""
    return (_checkout or _package / "defaults") / "registry.yaml"
