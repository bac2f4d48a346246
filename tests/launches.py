"""How much moe.experts and a whole layer launch on a GPU, and two counts: on a GPU, and without one."""

from __future__ import annotations

from contextlib import contextmanager

TOPK = FINALIZE = 1
FEW_TOKENS = 2  # first layer, second layer
GROUPED = 4  # alignment (beside it hidden states are quantised), first product, second product, sum over slots
BY_ROW = 1  # more, where activations are quantised by their whole rows
MANY = 1  # more, where there are more routes than one launch aligns
MOST_ROUTES = 8192


def of_experts(traits, tokens: int) -> int:
    """Launches of one call of moe.experts, in bfloat16, by the Triton implementation that the registry picks."""
    quant, act = (traits.get(name, "none") for name in ("weight_quant", "act_quant"))
    if tokens == 1 and (quant == "none" or quant == "fp8_block" and traits["intermediate_size"] <= 2048):
        return FEW_TOKENS
    return GROUPED + BY_ROW * act.endswith("_token") + MANY * (tokens * traits["topk"] > MOST_ROUTES)


def on_device(call) -> list[str]:
    """Names of the kernels and copies that a call runs on the GPU, when it has run before."""
    import torch

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@contextmanager
def counted(monkeypatch):
    """A list of what is launched inside, by name: calls of Triton kernels, which are noted instead of interpreted, and
    operations of torch that do more than allocate or view. On a GPU each is one launch, or, of torch's, one or more."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor

    found: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if not op.is_view and "empty" not in op.__name__:
                found.append(str(op))
            return op(*args, **(kwargs or {}))

    with monkeypatch.context() as patch, Noting():
        patch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: found.append(self.fn.__name__))
        yield found
