"""Every op of the shipped registry as `torch.ops.kernel_registry.<op>`; importing this module registers them.

    import kernel_registry.torch_ops
    route = torch.ops.kernel_registry.moe_topk
    topk_weights, topk_ids = route(router_logits, bias, topk=8, num_expert_group=8, topk_group=4)

An op whose kernels take `out` has a form for that too, which returns nothing and declares what it changes:

    torch.ops.kernel_registry.moe_finalize_out(out, expert_output, topk_weights, topk_ids, num_experts)

`out` goes first: as a keyword torch.compile takes none that is a slice of a larger buffer.
The op is opaque to torch.compile: the dispatch happens inside it, behind tracing, so that no state of the registry is
ever touched by traced code, and an override or a reload takes effect without a recompile. `torch.library.Library` and
not `custom_op`, which costs three times as much per call.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from .contract import Contract
from .errors import NoImplementationError
from .registry import Registry, registry

if TYPE_CHECKING:
    from .planning import PlanRow

_library = torch.library.Library("kernel_registry", "DEF")


def op_name(op: str) -> str:
    """The torch name of an op: "moe.topk" is torch.ops.kernel_registry.moe_topk."""
    return op.replace(".", "_")


def register(source: Registry, op: str, library: torch.library.Library = _library) -> None:
    """Defines the torch op of `op`, its one implementation (dispatch, then call) and its fake; and, where the contract
    has a `schema_out`, the same under the name with `_out`, which writes into an argument instead of returning."""
    contract = source.catalog.op(op).contract
    name = op_name(op)
    call = _dispatching(source, op, contract)
    forms = [(name, contract.schema, _functional(call) if contract.schema_out else call, contract.fake)]
    if contract.schema_out:
        forms.append((f"{name}_out", contract.schema_out, _mutating(call), lambda *_, **__: None))
    for form, schema, function, fake in forms:
        library.define(form + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(form, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{form}", fake, lib=library)


def _dispatching(source: Registry, op: str, contract: type[Contract]):
    def call(*arguments, **keywords):
        traits, args, kwargs = contract.unpack(*arguments, **keywords)
        return source.dispatch(op, **traits, **place(source, args[0]))(*args, **kwargs)
    return call


def place(source: Registry, tensor: torch.Tensor) -> dict[str, str]:
    """The platform trait of a call with this tensor: none but for one on the host of a GPU machine."""
    return {"platform": "cpu"} if tensor.device.type == "cpu" and source.platform().kind in ("cuda", "hip") else {}


def calling(op: str, source: Registry = registry, library: torch.library.Library = _library):
    """A function like the torch op of `op`, which goes through torch only where torch looks on: the dispatcher takes as
    long as everything else that a call costs the host."""
    through = getattr(getattr(torch.ops, library.ns), op_name(op)).default
    past = _dispatching(source, op, source.catalog.op(op).contract)

    def call(*arguments, **keywords):
        return (through if _looked_at(arguments, keywords) else past)(*arguments, **keywords)
    return call


def _looked_at(arguments: tuple, keywords: dict) -> bool:
    """Whether the op of this call is traced, timed or taken by somebody else: a compiler, torch.jit, a mode (fake
    tensors, make_fx, counters of operations), a transform (vmap), a profiler, a subclass, autograd."""
    return (torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd._profiler_enabled()
            or type(arguments[0]) is not torch.Tensor or torch.is_grad_enabled() and any(
                isinstance(given, torch.Tensor) and given.requires_grad for given in (*arguments, *keywords.values())))


def _functional(call):
    """`call`, but that a result which is an input's storage is copied: torch lets no op return one undeclared."""
    def functional(*arguments, **keywords):
        result = call(*arguments, **keywords)
        storage = result.untyped_storage().data_ptr()
        inputs = (a for a in (*arguments, *keywords.values()) if isinstance(a, torch.Tensor))
        return result.clone() if any(a.untyped_storage().data_ptr() == storage for a in inputs) else result
    return functional


def _mutating(call):
    """`call` with an `out` before all others, which returns nothing: the schema says that `out` changes."""
    def mutating(out, *arguments, **keywords):
        call(*arguments, out=out, **keywords)
    return mutating


def bind(op: str, *arguments, source: Registry = registry, **keywords) -> "PlanRow":
    """Binds the kernel that this call of the torch op of `op` will get, whatever its number of tokens (none, say), so
    that nothing is left to import when it comes. Returns what it is and why; `implementation` is None where nothing
    serves the call. Raises what an override or a plan that can't be followed raises."""
    from .contract import Workload
    from .planning import HOST, parse_platform, plan_call

    entry = source.catalog.op(op)
    traits, args, _ = entry.contract.unpack(*arguments, **keywords)
    where = place(source, args[0])
    row = plan_call(source, entry, Workload(op, traits, {}), parse_platform(source, where.get("platform", HOST)))
    with suppress(NoImplementationError):  # the row tells why
        source.bind(op, **traits, **where)
    return row


for _op, _entry in registry.catalog.ops.items():
    if _entry.contract.schema:
        register(registry, _op)
