"""Every op of the shipped registry as `torch.ops.kernel_registry.<op>`; importing this module registers them.

    import kernel_registry.torch_ops
    route = torch.ops.kernel_registry.moe_topk
    topk_weights, topk_ids = route(router_logits, bias, topk=8, num_expert_group=8, topk_group=4)

The op is opaque to torch.compile: the dispatch happens inside it, behind tracing, so that no state of the registry is
ever touched by traced code, and an override or a reload takes effect without a recompile. `torch.library.Library` and
not `custom_op`, which costs three times as much per call.
"""

from __future__ import annotations

import torch

from .contract import Contract
from .registry import Registry, registry

_library = torch.library.Library("kernel_registry", "DEF")


def op_name(op: str) -> str:
    """The torch name of an op: "moe.topk" is torch.ops.kernel_registry.moe_topk."""
    return op.replace(".", "_")


def register(source: Registry, op: str, library: torch.library.Library = _library) -> None:
    """Defines the torch op of `op`, its one implementation (dispatch, then call) and its fake."""
    contract = source.catalog.op(op).contract
    name = op_name(op)
    library.define(name + contract.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _dispatching(source, op, contract), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", contract.fake, lib=library)


def _dispatching(source: Registry, op: str, contract: type[Contract]):
    def call(*arguments, **keywords):
        traits, args, kwargs = contract.unpack(*arguments, **keywords)
        if args[0].device.type == "cpu" and source.platform().kind in ("cuda", "hip"):
            traits["platform"] = "cpu"  # a tensor on the host of a GPU machine
        return source.dispatch(op, **traits)(*args, **kwargs)
    return call


for _op, _entry in registry.catalog.ops.items():
    if _entry.contract.schema:
        register(registry, _op)
