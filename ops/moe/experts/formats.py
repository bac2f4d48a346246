"""The number formats of moe.experts, each in a few lines of plain torch: one table of weights, one of activations.

A weight format stores numbers and scales. What differs is which weights share a scale: the rows of a block, of one row
or of the whole matrix, and the columns of a block or all of them. So a scale has the shape [E, row groups, column
groups], the groups that are always one left out, and `row_groups` and `column_groups` say which group a row or a column
belongs to. Everything else follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernel_registry.ops.moe.arguments import FLOATS


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix of an expert is stored.

    stored   torch dtype, None for the hidden states' own
    largest  the largest number that is stored; scales are made so that a group's largest weight becomes it
    rows     which rows share a scale: "block", "each", "all", or "" where there are no scales
    columns  which columns do: "block" or "all"
    packed   two columns in a byte
    """

    stored: torch.dtype | None = None
    largest: int = 0
    rows: str = ""
    columns: str = "all"
    packed: bool = False
    scale_dtypes: tuple[torch.dtype, ...] = (torch.float32,)


WEIGHTS = {
    "none": WeightFormat(),
    "fp8_block": WeightFormat(torch.float8_e4m3fn, 448, "block", "block"),
    "fp8_channel": WeightFormat(torch.float8_e4m3fn, 448, "each"),
    "fp8_tensor": WeightFormat(torch.float8_e4m3fn, 448, "all"),
    "int8_channel": WeightFormat(torch.int8, 127, "each"),
    "int8_w8a16": WeightFormat(torch.int8, 127, "each"),
    "int4_w4a16": WeightFormat(torch.uint8, 7, "each", "block", True, FLOATS),
}


@dataclass(frozen=True)
class ActFormat:
    """How the input of a multiplication is quantised. `group`: the columns that share a scale, "block" or "row"; "" for
    a scale that is given."""

    stored: torch.dtype
    largest: int
    group: str = ""


ACTIVATIONS = {
    "none": None,
    "fp8_block": ActFormat(torch.float8_e4m3fn, 448, "block"),
    "fp8_token": ActFormat(torch.float8_e4m3fn, 448, "row"),
    "fp8_tensor": ActFormat(torch.float8_e4m3fn, 448),
    "int8_token": ActFormat(torch.int8, 127, "row"),
    "int8_tensor": ActFormat(torch.int8, 127),
}


@dataclass(frozen=True)
class Matrix:
    """The matrices [rows, columns] of E experts in one format. `halves`: 2 for w13 with its gate rows before its up
    rows, where a block of rows never has both; else 1."""

    format: WeightFormat
    experts: int
    rows: int
    columns: int
    group: int
    halves: int = 1

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.experts, self.rows, self.columns // 2 if self.format.packed else self.columns

    @property
    def row_groups(self) -> int:
        half = -(-self.rows // self.halves // self.group)
        return {"block": self.halves * half, "each": self.rows, "all": 1}[self.format.rows]

    @property
    def column_groups(self) -> int:
        return -(-self.columns // self.group) if self.format.columns == "block" else 1

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """None where the format has no scales."""
        if not self.format.rows:
            return None
        shape = (self.experts, self.row_groups, self.column_groups)
        return shape if self.format.columns == "block" else shape[:2] if self.format.rows == "each" else shape[:1]

    def row_group(self, device) -> torch.Tensor:
        """[rows] the group of each row."""
        row = torch.arange(self.rows, device=device)
        if self.format.rows == "block":
            half = self.rows // self.halves
            return row // half * -(-half // self.group) + row % half // self.group
        return row if self.format.rows == "each" else torch.zeros_like(row)

    def column_group(self, device) -> torch.Tensor:
        """[columns] the group of each column."""
        column = torch.arange(self.columns, device=device)
        return column // self.group if self.format.columns == "block" else torch.zeros_like(column)

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """[..., rows, columns] float32: the stored numbers, without the scales."""
        if self.format.packed:
            stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).float() - 8
        return stored.float()

    def scale_of_weight(self, scale: torch.Tensor) -> torch.Tensor:
        """[rows, columns] or, where a row has one scale, [rows, 1] float32: the scales of one expert, spread out."""
        scale = scale.float().reshape(self.row_groups, self.column_groups)[self.row_group(scale.device)]
        return scale[:, self.column_group(scale.device)] if self.format.columns == "block" else scale

    def dequantise(self, stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """[rows, columns] float32 of one expert."""
        return self.values(stored) if scale is None else self.values(stored) * self.scale_of_weight(scale)

    def quantise(self, weight: torch.Tensor, scale_dtype=torch.float32):
        """(stored, scale) of one expert's float32 weight [rows, columns], without the dimension of experts."""
        if not self.format.rows:
            raise ValueError("a format without scales stores a weight by a cast")
        row, column = self.row_group(weight.device), self.column_group(weight.device)
        by_row = weight.new_zeros(self.row_groups, self.columns)
        by_row.scatter_reduce_(0, row[:, None].expand_as(weight), weight.abs(), "amax")
        largest = weight.new_zeros(self.row_groups, self.column_groups)
        largest.scatter_reduce_(1, column.expand_as(by_row), by_row, "amax")
        scale = _over(largest.clamp(min=1e-10), self.format.largest).to(scale_dtype)
        scale = scale.reshape(self.scale_shape[1:])
        number = weight / self.scale_of_weight(scale)
        if self.format.packed:
            nibble = (number.round().clamp(-8, 7) + 8).to(torch.uint8)
            return nibble[:, 0::2] | nibble[:, 1::2] << 4, scale
        return _stored(number, self.format.stored, self.format.largest), scale


def w13_matrix(*, num_experts, hidden_size, intermediate_size, weight_quant="none", group_size=128, activation="silu",
               **_) -> Matrix:
    """The first layer's matrices for these traits."""
    return Matrix(WEIGHTS[weight_quant], num_experts, 2 * intermediate_size, hidden_size, group_size,
                  1 if activation == "swigluoai" else 2)


def w2_matrix(*, num_experts, hidden_size, intermediate_size, weight_quant="none", group_size=128, **_) -> Matrix:
    """The second layer's matrices for these traits."""
    return Matrix(WEIGHTS[weight_quant], num_experts, hidden_size, intermediate_size, group_size)


def _over(x: torch.Tensor, number: int) -> torch.Tensor:
    """x / number to nearest even. On a GPU torch divides by a Python number by way of its reciprocal, which is not."""
    return x / torch.full_like(x, number)


def quantise_activations(x: torch.Tensor, act: ActFormat, group_size: int, given: torch.Tensor | None = None):
    """(numbers, scale), both float32, of x [T, N]: the scale is [T, 1], or [T, N] where columns differ, or [1, 1]."""
    x = x.float()
    if act.group == "block":
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group_size))
        largest = padded.abs().view(x.shape[0], padded.shape[1] // group_size, group_size).amax(-1)
        scale = _over(largest.clamp(min=1e-10), act.largest).repeat_interleave(group_size, 1)[:, :x.shape[1]]
    elif act.group == "row":
        scale = _over(x.abs().amax(1, keepdim=True).clamp(min=1e-10), act.largest)
    else:
        scale = given.reshape(1, 1)
    return _stored(x / scale, act.stored, act.largest).float(), scale


def _stored(number: torch.Tensor, dtype: torch.dtype, largest: int) -> torch.Tensor:
    """Numbers brought into a format's range and rounded, half to even."""
    number = number.clamp(-largest, largest)
    return number.round().to(torch.int8) if dtype is torch.int8 else number.to(dtype)
