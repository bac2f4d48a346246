"""moe.experts in four to six Triton launches: align (and quantise), first product, second product, sum over slots.

Serves every weight format and option in bfloat16 and float16. Routes are sorted by expert, so that each expert's
weights are read once for all of its rows. More than FEW_ROUTES take a launch more to be aligned, formats that quantise
whole rows of activations one for that. The kernels are in align.py, prepare.py, grouped.py and persistent.py; here is
what they are compiled with, and the buffers between them.
"""

from __future__ import annotations

import functools
from typing import Callable, Mapping, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kept_launch import Described
from . import align, grouped, prepare, tiles as launch_parameters
from .checks import make_checks
from .formats import WEIGHTS
from .launch import INTERPRETED, dependent_launch, launch_of, on_gpu, ptx

if not INTERPRETED:  # Gluon has no interpreter
    from . import persistent

FORMATS = {"none": "none", "fp8_block": "fp8_block", "fp8_channel": "fp8", "fp8_tensor": "fp8", "int8_channel": "int8",
           "int8_w8a16": "int8_w8a16", "int4_w4a16": "int4"}
FEW_ROUTES = 8192  # up to here the first launch aligns them, each of its programs reading all ids
CHUNK = 256  # routes of a program above
COLUMNS = 1024 if INTERPRETED else 256  # that a program sums; the interpreter takes as long over few as over many
REMEMBERED = 4096  # numbers of tokens whose launches are


class Size(NamedTuple):
    """What launches depend on, beside their tile."""

    tokens: int
    routes: int
    most_blocks: int
    aligned: bool  # whether w13 and w2 both begin at a multiple of 16 bytes, as a tensor descriptor wants


class Blocks(NamedTuple):
    """What align.py makes, int32: order [R], blocks [3 * NB], num_blocks [1], and tickets [2], a counter at 0 for each
    product. One allocation, in which each begins at a multiple of 16 bytes."""

    order: Tensor
    blocks: Tensor
    num_blocks: Tensor
    tickets: Tensor

    @classmethod
    def empty(cls, size: Size, device: torch.device) -> "Blocks":
        sizes = [-(-elements // 4) * 4 for elements in (size.routes, 3 * size.most_blocks, 1, 2)]
        return cls(*torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes))


def grouped_parameters(tile: Mapping[str, object]) -> dict[str, object]:
    """What both kernels of grouped.py take of a tile."""
    return {name: value for name, value in tile.items() if name not in ("MERGED", "PASSES", "PERSISTENT", "DESCRIPTOR")}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def experts(*, num_experts, topk, hidden_size, intermediate_size, dtype="bfloat16", weight_quant="none",
            act_quant="none", group_size=128, activation="silu", has_bias=False, apply_router_weight_on_input=False,
            expert_parallel=False, output_alias=False, platform=None,
            tiles: Callable[[int], Mapping[str, object]] | None = None, **_):
    """A kernel with moe.experts's signature for these traits.

    tiles  launch parameters for a number of tokens, as tiles.py makes them; None: its defaults
    """
    traits = dict(num_experts=num_experts, topk=topk, hidden_size=hidden_size, intermediate_size=intermediate_size,
                  dtype=dtype, weight_quant=weight_quant, act_quant=act_quant, group_size=group_size,
                  activation=activation, has_bias=has_bias, platform=platform,
                  apply_router_weight_on_input=apply_router_weight_on_input, expert_parallel=expert_parallel)
    check = make_checks(**traits, output_alias=output_alias)
    choose = tiles or (lambda num_tokens: launch_parameters.default(traits, num_tokens))
    hidden_dtype, static = getattr(torch, dtype), act_quant.endswith("_tensor")
    kind = act_quant.partition("_")[0]
    stored = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(kind)
    by_row = act_quant.endswith("_token")
    interleaved = activation == "swigluoai"
    bins = triton.next_power_of_2(max(2, num_experts))
    dependent = dependent_launch(platform)
    pdl = {"launch_pdl": True} if dependent else {}
    packed = 2 if weight_quant == "int4_w4a16" else 1
    shared = dict(FORMAT=FORMATS[weight_quant], PER_TENSOR=weight_quant == "fp8_tensor", GROUP=group_size,
                  STATIC=static, WEIGHT_ON_INPUT=apply_router_weight_on_input, DEPENDENT=dependent, TOPK=topk,
                  HIDDEN=hidden_size, INTERMEDIATE=intermediate_size)
    may_describe = platform is not None and platform.kind in ("cuda", "interpreter")
    weight_bytes = (WEIGHTS[weight_quant].stored or hidden_dtype).itemsize

    def descriptor_maker(size: Size, tile, columns, halves):
        """What makes the descriptor that a kernel reads weights through; None where it reads them without."""
        depth = columns // packed

        def describe(weights):
            rows = weights.shape[1] // halves
            within = [2 * depth if interleaved and halves == 2 else depth, 1]
            half = depth if interleaved and halves == 2 else rows * depth
            return TensorDescriptor(weights, [num_experts, halves, rows, depth], [halves * rows * depth, half, *within],
                                    [1, halves if tile["MERGED"] else 1, tile["BLOCK_N"], tile["BLOCK_K"] // packed])

        able = tile["DESCRIPTOR"] and may_describe and size.aligned and depth * weight_bytes % 16 == 0
        return describe if able else None

    def persistent_parameters(tile):
        return dict(TOPK=topk, HIDDEN=hidden_size, INTERMEDIATE=intermediate_size, GROUP=group_size,
                    WEIGHT_ON_INPUT=apply_router_weight_on_input, DEPENDENT=dependent, num_warps=persistent.WARPS,
                    **{name: tile[name] for name in ("BLOCK_N", "BLOCK_K", "GROUP_M")}, **pdl)

    # These make functions that launch for a number of tokens, so that a call has little left to work out.

    def alignment(size: Size, block_m):
        few, chunks = size.routes <= FEW_ROUTES, -(-size.routes // CHUNK)
        step = min(4096, triton.next_power_of_2(size.routes))
        programs = 1 + num_experts if few else chunks
        grid = (programs + (0 if stored is None else size.tokens),)
        both = dict(NUM_EXPERTS=num_experts, BINS=bins, BLOCK_M=block_m, CHUNK=CHUNK, DEPENDENT=dependent, num_warps=8,
                    **pdl)
        first = launch_of(prepare.prepare, STEP=step, ROWS=min(step, 256), HIDDEN=hidden_size,
                          BLOCK=max(group_size, triton.next_power_of_2(hidden_size)), ACT_QUANT=act_quant, FEW=few,
                          GROUP=group_size, KIND=kind, **both)
        second = launch_of(align.place_chunks, ROWS=max(1, 16384 // bins), **both)

        def launch(topk_ids, expert_map, blocks: Blocks, hidden_states, x, x_scale, a13_scale):
            map_size = 0 if expert_map is None else expert_map.shape[0]
            counts = None if few else torch.empty((chunks, bins), dtype=torch.int32, device=topk_ids.device)
            first(grid, topk_ids, expert_map, map_size, blocks.order, blocks.blocks, blocks.num_blocks, counts,
                  blocks.tickets, hidden_states, hidden_size, x, None if static else x_scale, a13_scale, size.tokens,
                  size.routes, size.most_blocks, programs)
            if not few:
                second((1 + chunks,), topk_ids, expert_map, map_size, counts, blocks.order, blocks.blocks,
                       blocks.num_blocks, size.routes, chunks, size.most_blocks)
        return launch

    def first_product(size: Size, block_m, tile):
        if act_quant == "fp8_block" and tile["BLOCK_N"] * tile["PASSES"] != group_size:
            raise ValueError(f"a tile of {tile['BLOCK_N']} columns, {tile['PASSES']} times, can't be quantised in "
                             f"groups of {group_size}")
        if tile["PERSISTENT"]:
            parameters = dict(ACTIVATION=activation, STAGES=tile["num_stages"], **persistent_parameters(tile))

            def launch_persistent(x, x_scale, w13, w13_scale, w13_bias, topk_weights, blocks: Blocks, act, act_scale):
                read = persistent.describe(w13.view(-1, hidden_size), [tile["BLOCK_N"], tile["BLOCK_K"]])
                persistent.persistent_up[(multiprocessors(x.device),)](
                    x, x_scale, read, w13_scale, w13_bias, topk_weights, blocks.order, blocks.blocks,
                    blocks.num_blocks, act, act_scale, size.tokens, size.routes, size.most_blocks, blocks.tickets[:1],
                    **parameters)
            return launch_persistent
        describe = descriptor_maker(size, tile, hidden_size, 2)
        grid = (size.most_blocks * -(-intermediate_size // (tile["BLOCK_N"] * tile["PASSES"])),)
        grouped_up = launch_of(grouped.grouped_up, INTERLEAVED=interleaved, ACTIVATION=activation, BLOCK_M=block_m,
                               PTX=ptx(platform), MERGED=tile["MERGED"], PASSES=tile["PASSES"],
                               DESCRIPTOR=describe is not None, **shared, **grouped_parameters(tile), **pdl)

        def launch(x, x_scale, w13, w13_scale, w13_bias, topk_weights, blocks: Blocks, act, act_scale):
            grouped_up(grid, x, x_scale, hidden_size, Described(w13, describe) if describe else w13, w13_scale,
                       w13_bias, topk_weights, blocks.order, blocks.blocks, blocks.num_blocks, act, act_scale,
                       size.tokens, size.routes, size.most_blocks)
        return launch

    def second_product(size: Size, block_m, tile, halved):
        if tile["PERSISTENT"]:
            stages = min(tile["num_stages"], 4 if halved else 3)  # wide rows need a stage's room
            parameters = dict(SCALED=weight_quant == "fp8_block", STAGES=stages, **persistent_parameters(tile))
            block = [tile["BLOCK_N"], tile["BLOCK_K"]]

            def launch_persistent(act, act_scale, w2, w2_scale, w2_bias, topk_weights, blocks: Blocks, rows, row_scale):
                read = persistent.describe(w2.view(-1, intermediate_size), block)
                persistent.persistent_down[(multiprocessors(act.device),)](
                    act, persistent.describe(act, [64, tile["BLOCK_K"]]), act_scale, read, w2_scale, w2_bias,
                    topk_weights, blocks.order, blocks.blocks, blocks.num_blocks, rows, row_scale, size.routes,
                    size.most_blocks, blocks.tickets[1:2], **parameters)
            return launch_persistent
        describe = descriptor_maker(size, tile, intermediate_size, 1)
        grid = (size.most_blocks * -(-hidden_size // tile["BLOCK_N"]),)
        grouped_down = launch_of(grouped.grouped_down, BLOCK_M=block_m, DESCRIPTOR=describe is not None, **shared,
                                 **grouped_parameters(tile), **pdl)

        def launch(act, act_scale, w2, w2_scale, w2_bias, topk_weights, blocks: Blocks, rows, row_scale):
            grouped_down(grid, act, act_scale, Described(w2, describe) if describe else w2, w2_scale, w2_bias,
                         topk_weights, blocks.order, blocks.blocks, blocks.num_blocks, rows, row_scale, size.routes,
                         size.most_blocks)
        return launch

    def summing(size: Size, columns):
        """`columns`: how many of a row have a scale together; 0 where rows have none."""
        tile = columns or COLUMNS
        span = max(1, min(1024, triton.next_power_of_2(hidden_size)) // tile) if columns else 1
        grid = (size.tokens, -(-hidden_size // (tile * span)))
        sum_slots = launch_of(grouped.sum_slots, TOPK=topk, HIDDEN=hidden_size, NUM_EXPERTS=num_experts, TILES=span,
                              TILE=tile, DEPENDENT=dependent, num_warps=max(1, span * tile // 256), **pdl)

        def launch(rows, row_scale, topk_ids, expert_map, out):
            sum_slots(grid, rows, row_scale, topk_ids, expert_map, 0 if expert_map is None else expert_map.shape[0],
                      out, out.stride(0))
        return launch

    if by_row:
        quantise_rows = launch_of(prepare.quantise_rows, COLUMNS=intermediate_size,
                                  BLOCK=triton.next_power_of_2(intermediate_size), KIND=kind, DEPENDENT=dependent,
                                  **pdl)

    @functools.lru_cache(REMEMBERED)
    def layer(tokens: int, aligned: bool):
        """The kernel for this number of tokens, of 1 or more, without its checks."""
        chosen = choose(tokens)
        if (chosen["up"]["PERSISTENT"] or chosen["down"]["PERSISTENT"]) and not aligned:
            chosen = launch_parameters.default(traits, tokens, aligned=False)
        block_m, routes = chosen["BLOCK_M"], tokens * topk
        size = Size(tokens, routes, min(routes, num_experts + routes // block_m), aligned)
        halved = launch_parameters.halved(traits, tokens)
        columns = chosen["down"]["BLOCK_N"] * (2 if chosen["down"]["PERSISTENT"] else 1)  # of a second product's tile
        align_routes = alignment(size, block_m)
        up = first_product(size, block_m, chosen["up"])
        down = second_product(size, block_m, chosen["down"], halved)
        sum_up = summing(size, columns if halved else 0)

        def unchecked(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale,
                      w13_bias, w2_bias, expert_map, out):
            def empty(*shape, dtype=torch.float32):
                return torch.empty(shape, dtype=dtype, device=hidden_states.device)

            blocks, x, x_scale, act_scale = Blocks.empty(size, hidden_states.device), hidden_states, a13_scale, a2_scale
            if stored is not None:
                x = empty(tokens, hidden_size, dtype=stored)
                if not static:
                    x_scale = empty(1 if by_row else -(-hidden_size // group_size), tokens)
            align_routes(topk_ids, expert_map, blocks, hidden_states, x, x_scale, a13_scale)

            act = empty(routes, intermediate_size, dtype=torch.float32 if by_row else stored or hidden_dtype)
            if act_quant == "fp8_block":
                act_scale = empty(-(-intermediate_size // group_size), routes)
            up(x, x_scale, w13, w13_scale, w13_bias, topk_weights, blocks, act, act_scale)
            if by_row:
                wide, act, act_scale = act, empty(routes, intermediate_size, dtype=stored), empty(routes)
                quantise_rows((routes,), wide, act, act_scale, routes)

            rows = empty(routes, hidden_size, dtype=torch.float16 if halved else torch.float32)
            row_scale = empty(routes, -(-hidden_size // columns)) if halved else None
            down(act, act_scale, w2, w2_scale, w2_bias, topk_weights, blocks, rows, row_scale)
            sum_up(rows, row_scale, topk_ids, expert_map, out)
        return unchecked

    def kernel(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
               a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None):
        tensors = (hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale, w13_bias,
                   w2_bias, expert_map)
        tokens = check(*tensors, out)
        if out is None:
            out = torch.empty((tokens, hidden_size), dtype=hidden_dtype, device=hidden_states.device)
        if tokens:
            with on_gpu(hidden_states.device):
                layer(tokens, (w13.data_ptr() | w2.data_ptr()) % 16 == 0)(*tensors, out)
        return out

    return kernel
