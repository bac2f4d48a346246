"""What the checks of arguments share: which dtypes are taken alike, and the words for an argument that is refused."""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def names(dtypes) -> str:
    """In words: "float32 or bfloat16"."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def refuse(name: str, got: object, expected: str):
    """Raises the InputError for an argument that is not as expected."""
    if isinstance(got, torch.Tensor):
        strided = "strided " if "contiguous" in expected and not got.is_contiguous() else ""
        got = f"{strided}{list(got.shape)} {names([got.dtype])} on {got.device}"
    else:
        got = "None" if got is None else type(got).__name__
    raise InputError(f"{name} is {got}, expected {expected}",
                     hint="dispatch again with the traits of these tensors, or pass the tensors dispatched for")
