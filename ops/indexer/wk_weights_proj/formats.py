"""What quantised weights of a checkpoint are, and their exact values.

The shape of a block is declared by the format, never worked out from the shapes of weight and scale: a weight of 192
rows with 2 scales has blocks of 128 rows, the second of them ragged, and not of 96.
"""

from __future__ import annotations

import torch

from kernel_registry.errors import InputError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def block_shape(wk_format: str, group_size: int = 128) -> tuple[int, int] | None:
    """Rows and columns that share a scale in an fp8 weight, 0 columns for all of a row's; None without fp8."""
    return {"none": None, "nvfp4": None, "fp8_block": (group_size, group_size), "fp8_channel": (1, 0),
            "mxfp8": (1, 32)}[wk_format]


def scale_shapes(shape, block: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes that the scales of a weight of this shape may have."""
    (rows, columns), (height, width) = shape, block
    if width == 0:
        return [(rows,), (rows, 1)]
    return [(-(-rows // height), -(-columns // width))]


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first: int = 0,
                   count: int | None = None) -> torch.Tensor:
    """float32: each number times its block's scale, of `count` rows from `first` on. Bytes are e8m0: 2^(byte - 127)."""
    if tuple(scale.shape) not in scale_shapes(weight.shape, block):
        raise InputError(f"scale is {list(scale.shape)}, expected {scale_shapes(weight.shape, block)}")
    if scale.dtype is torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    (rows, columns), (height, width) = weight.shape, block
    width = width or columns
    rows = torch.arange(rows, device=scale.device)[first:None if count is None else first + count] // height
    factors = scale.float().reshape(scale.shape[0], -1)[rows].to(weight.device)
    values = weight[first:first + len(rows)].float()
    blocks, ragged = divmod(columns, width)
    values[:, :blocks * width].unflatten(1, (blocks, width)).mul_(factors[:, :blocks, None])
    if ragged:
        values[:, blocks * width:].mul_(factors[:, blocks:])
    return values


def dequantize_nvfp4(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns] of uint8 [rows, columns / 2] and scales [rows, columns / 16]."""
    values = torch.tensor(E2M1 + tuple(-x for x in E2M1), device=packed.device)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return values[codes.long()] * (scale.float() * global_scale.float()).repeat_interleave(16, 1)
