"""How the Triton implementations launch, and what they know of the machine they do it on."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton

from kernel_registry.errors import InputError

from ..kept_launch import kept_launch

INTERPRETED = triton.knobs.runtime.interpret
# One launch for the same kernel and constants, for as long as the process lives: layers alike, and numbers of tokens
# with the same tile, share what was compiled and the descriptors that were made.
launch_of = lru_cache(maxsize=None, typed=True)(kept_launch)


def dependent_launch(platform) -> bool:
    """Whether a kernel may take its places while the one before it still runs, and wait there before it reads."""
    return not INTERPRETED and platform is not None and platform.kind == "cuda" and platform.arch >= (9, 0)


def ptx(platform) -> bool:
    """Whether a kernel may hold NVIDIA's assembly."""
    return not INTERPRETED and platform is not None and platform.kind == "cuda"


def on_gpu(device: torch.device):
    """The context to launch in. Raises InputError for tensors that are not on a GPU."""
    if device.type == "cuda":
        return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    if INTERPRETED:
        return nullcontext()
    raise InputError(f"hidden_states is on {device}, this kernel runs on a GPU",
                     hint="move the tensors, or dispatch with platform='cpu'")
