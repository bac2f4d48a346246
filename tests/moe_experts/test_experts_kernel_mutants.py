"""Bugs put into the Triton kernels by changing one place of their source, each found in one small call: by the judge,
or because an address outside of all tensors is read or written.

The kernels run in Triton's interpreter, in tiles so small that a layer has several of each kind and ragged ones. Around
every tensor lies room that is NaN, or 0 in integers, and so is what a kernel finds in its buffers.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from experts_kernel_mutants import MUTANTS
from experts_support import layer

from kernel_registry.ops.moe import experts as package
from kernel_registry.ops.moe.experts import cases, oracle
from kernel_registry.ops.moe.experts.tiles import tile
from kernel_registry.traits.platform import Platform
from tests import mutants

triton = pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = [pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="these tiles are the interpreter's"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's, of what a bug makes infinite

ROOM = 2**17  # bytes on either side of a tensor, more than any of these bugs is astray

# ---- calls: name -> (implementation, traits, tokens, flavour, tiles of the grouped kernels, or DOT) ------------------

GROUPED, FEW = "triton_grouped", "triton_few_tokens"
DOT = dict(matrix_unit=True)


def ragged(format="none", topk=2, **more) -> dict:
    """Two blocks of 32 columns and half of one, each way, and four experts."""
    sizes = dict(group_size=32) if format in ("fp8_block", "int4") else {}
    return layer(4, topk, 80, format=format, **{"intermediate_size": 48, "has_bias": True, **sizes, **more})


def few(format="none", topk=3, **more) -> dict:
    """Longer than one step along either sum; a token goes to all experts, the last among them."""
    sizes = dict(group_size=64) if format == "fp8_block" else {}
    return layer(max(2, topk), topk, 144, 144, format, **{"has_bias": True, **sizes, **more})


def tiles(up=(), down=(), block_m=16, up_n=32, down_n=64, step=64) -> dict:
    plain = dict(group_m=2, descriptor=False)
    return {"BLOCK_M": block_m, "up": tile(up_n, step, 4, 1, **{**plain, **dict(up)}),
            "down": tile(down_n, step, 4, 1, **{**plain, **dict(down)})}


SMALL = tiles()
GROUPS = tiles(down_n=32, step=32)  # a step has one scale
ON_INPUT = dict(topk=1, apply_router_weight_on_input=True)
CASES = {
    "plain": (GROUPED, ragged(), 9, "random", SMALL),
    "many rows": (GROUPED, ragged(), 40, "skewed", tiles(dict(group_m=4), dict(group_m=4))),
    "padded": (GROUPED, ragged(), 9, "padded", SMALL),
    "unused experts": (GROUPED, ragged(), 9, "unused_experts", SMALL),
    "rows of out apart": (GROUPED, ragged(output_alias=True), 9, "random", SMALL),
    "expert parallel": (GROUPED, ragged(expert_parallel=True), 24, "random", SMALL),
    "weight on input": (GROUPED, ragged(**ON_INPUT), 9, "random", SMALL),
    "swapped and merged": (GROUPED, ragged(), 9, "random", tiles(dict(swap=True, merged=True), dict(swap=True))),
    "merged": (GROUPED, ragged(), 9, "random", tiles(dict(merged=True))),
    "descriptors": (GROUPED, ragged(activation="swigluoai"), 9, "random",
                    tiles(dict(descriptor=True), dict(descriptor=True))),
    "tails": (GROUPED, ragged(), 40, "skewed", tiles(dict(tail=16), dict(tail=16), block_m=32)),
    "interleaved": (GROUPED, ragged(activation="swigluoai"), 9, "random", SMALL),
    "swiglu": (GROUPED, ragged(activation="swigluoai_packed"), 9, "large", SMALL),
    "gelu": (GROUPED, ragged(activation="gelu"), 9, "random", SMALL),
    "16-bit rows": (GROUPED, layer(4, 2, 32, 16), 512, "outliers", tiles(block_m=64, up_n=16, down_n=16)),
    "fp8 blocks": (GROUPED, ragged("fp8_block"), 9, "random", GROUPS),
    "fp8 blocks, wide": (GROUPED, ragged("fp8_block"), 9, "random", tiles(step=32)),
    "fp8 blocks, interleaved": (GROUPED, ragged("fp8_block", activation="swigluoai"), 9, "random", GROUPS),
    "fp8 blocks, two passes": (GROUPED, ragged("fp8_block"), 9, "random",
                               tiles(dict(passes=2), up_n=16, step=32)),
    "fp8 blocks, swapped": (GROUPED, ragged("fp8_block"), 9, "random",
                            tiles(dict(swap=True, merged=True), dict(swap=True), down_n=32, step=32)),
    "fp8 blocks, halfway": (GROUPED, ragged("fp8_block"), 9, "halfway", GROUPS),
    "fp8 channels": (GROUPED, ragged("fp8_channel"), 9, "random", SMALL),
    "fp8 channels, interleaved": (GROUPED, ragged("fp8_channel", activation="swigluoai"), 9, "random", SMALL),
    "fp8 tensor": (GROUPED, ragged("fp8_tensor"), 9, "random", SMALL),
    "fp8 static": (GROUPED, ragged("fp8_tensor_static"), 9, "random", SMALL),
    "int8": (GROUPED, ragged("int8"), 9, "random", SMALL),
    "int8, halfway": (GROUPED, ragged("int8"), 9, "halfway", SMALL),
    "int8 static": (GROUPED, ragged("int8_static"), 9, "random", SMALL),
    "int8 weights": (GROUPED, ragged("int8_w8a16"), 9, "random", SMALL),
    "int8 weights, weight on input": (GROUPED, ragged("int8_w8a16", **ON_INPUT), 9, "random", SMALL),
    "int4": (GROUPED, ragged("int4"), 9, "random", GROUPS),
    "int4, interleaved": (GROUPED, ragged("int4", activation="swigluoai"), 9, "random", GROUPS),
    "few": (FEW, few(), 3, "random", None),
    "few, padded": (FEW, few(), 4, "padded", None),
    "few, invalid ids": (FEW, few(), 4, "invalid_ids", None),
    "few, unused experts": (FEW, few(), 4, "unused_experts", None),
    "few, expert parallel": (FEW, few(expert_parallel=True), 8, "random", None),
    "few, rows of out apart": (FEW, few(output_alias=True), 3, "random", None),
    "few, weight on input": (FEW, few(**ON_INPUT), 3, "random", None),
    "few, interleaved": (FEW, few(activation="swigluoai"), 3, "random", None),
    "few, fp8 blocks": (FEW, few("fp8_block", 2), 2, "random", None),
    "few, fp8 blocks, interleaved": (FEW, few("fp8_block", 2, activation="swigluoai"), 2, "random", None),
    "dot": (FEW, ragged("fp8_block", intermediate_size=80), 2, "random", DOT),
    "dot, interleaved": (FEW, ragged("fp8_block", activation="swigluoai"), 2, "random", DOT),
}


def halfway(hidden: torch.Tensor, quant: str) -> torch.Tensor:
    """Hidden states that divided by their scale lie exactly between two numbers of the format."""
    if quant == "int8_channel":
        largest, between = 127.0, torch.arange(-63, 63) + 0.5
    else:
        largest = 196.0
        x = (torch.arange(128, 256) * 2.0 ** torch.arange(-7, 1)[:, None]).flatten()
        below, above = ((x * (448 / largest) * near).to(torch.float8_e4m3fn).float() for near in (0.9999, 1.0001))
        between = x[(below != above) & (x < largest)]
    drawn = between[torch.randint(len(between), hidden.shape, generator=torch.Generator().manual_seed(0))]
    drawn[:, ::16] = largest
    return drawn.to(hidden.dtype)


class Rooms:
    """Makes tensors with room around them, and notes what a kernel touches that is no tensor."""

    def __init__(self):
        self.begins, self.ends = np.empty((2, 0), dtype=np.uint64)  # the tensors' addresses
        self.astray = ""

    def empty(self, *shape, dtype=torch.float32, device="cpu", gap=0) -> torch.Tensor:
        """As torch.empty; rows lie `gap` elements apart."""
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        width = shape[-1] if shape else 1
        rows = shape.numel() // max(1, width)
        memory = torch.full((2 * ROOM + rows * (width + gap) * dtype.itemsize,),
                            255 if dtype.is_floating_point else 0, dtype=torch.uint8)  # a NaN of any format, or 0
        begin, end = np.uint64([memory.data_ptr() + ROOM, memory.data_ptr() + len(memory) - ROOM])
        place = np.searchsorted(self.begins, begin)
        self.begins, self.ends = np.insert(self.begins, place, begin), np.insert(self.ends, place, end)
        inside = memory[ROOM:-ROOM].view(dtype).view(rows, width + gap)
        return inside[:, :width] if gap else inside.view(shape)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(tensor.shape, dtype=tensor.dtype)

    def copy(self, tensor: torch.Tensor, gap: int = 0) -> torch.Tensor:
        return self.empty(tensor.shape, dtype=tensor.dtype, gap=gap).copy_(tensor)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Has every load and store of the interpreter looked at, and tensors made here while it is."""
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(builder, at, mask, *others, **more):
            self.look("read", at.data, mask.data)
            return load(builder, at, mask, *others, **more)

        def watched_store(builder, at, value, mask, *others, **more):
            self.look("written", at.data, mask.data)
            return store(builder, at, value, mask, *others, **more)

        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch, "empty_like", self.empty_like)

    def look(self, done: str, at: np.ndarray, mask: np.ndarray) -> None:
        at = at[mask]
        tensor = np.searchsorted(self.begins, at, side="right") - 1
        outside = int(((tensor < 0) | (at >= self.ends[tensor])).sum())
        if outside and not self.astray:
            self.astray = f"{outside} addresses outside of any tensor are {done}"


@lru_cache(maxsize=None)
def inputs(case: str):
    """(args, kwargs) of a case."""
    _, traits, tokens, flavour, _ = CASES[case]
    own = {"halfway": lambda hidden: halfway(hidden, traits["weight_quant"]), "large": lambda hidden: 8 * hidden}
    (hidden, *args), kwargs = cases.inputs(traits, tokens, flavour="random" if flavour in own else flavour)
    return (own.get(flavour, torch.Tensor.clone)(hidden), *args), kwargs


def failure(module, case: str, monkeypatch) -> str:
    """What is wrong with the result of a case by an implementation's module; "" if it is right."""
    _, traits, _, _, chosen = CASES[case]
    args, kwargs = inputs(case)
    rooms = Rooms()
    args = tuple(map(rooms.copy, args))
    kwargs = {name: rooms.copy(tensor, gap=16 if name == "out" else 0) for name, tensor in kwargs.items()}
    with monkeypatch.context() as patch:
        options = DOT if chosen is DOT else dict(tiles=lambda tokens: chosen)
        kernel = module.experts(**traits, platform=Platform.parse("interpreter"), **options)
        rooms.watch(patch)
        result = kernel(*args, **kwargs)
    verdict = oracle.check(traits, args, kwargs, result)
    return rooms.astray if verdict.passed else verdict.detail


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_as_they_are_pass(case, monkeypatch):
    assert failure(importlib.import_module(f"{package.__name__}.{CASES[case][0]}"), case, monkeypatch) == ""


@pytest.mark.parametrize("bug", MUTANTS)
def test_killed(bug, monkeypatch):
    file, place, changed, case = MUTANTS[bug]
    with mutants.copied(f"moe/experts/{file}", place, changed) as load:
        found = failure(load(f"moe.experts.{CASES[case][0]}"), case, monkeypatch)
    print(f"{bug}, by {case}: {found}")
    assert found


def test_every_case_finds_something():
    assert {case for *_, case in MUTANTS.values()} == set(CASES)
