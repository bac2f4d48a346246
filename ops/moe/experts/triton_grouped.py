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

from . import align, grouped, prepare, tiles as launch_parameters
from .checks import make_checks
from .launch import INTERPRETED, dependent_launch, on_gpu, ptx

if not INTERPRETED:  # Gluon has no interpreter
    from . import persistent

FORMATS = {"none": "none", "fp8_block": "fp8_block", "fp8_channel": "fp8", "fp8_tensor": "fp8", "int8_channel": "int8",
           "int8_w8a16": "int8_w8a16", "int4_w4a16": "int4"}
FEW_ROUTES = 8192  # up to here the first launch aligns them, each of its programs reading all ids
CHUNK = 256  # routes of a program above
COLUMNS = 1024 if INTERPRETED else 256  # that a program sums; the interpreter takes as long over few as over many


class Blocks(NamedTuple):
    """What align.py makes: order [R], blocks [3, NB], num_blocks [1], and a counter at 0 for each product."""

    order: Tensor
    blocks: Tensor
    num_blocks: Tensor
    tickets: Tensor


def grouped_parameters(tile: Mapping[str, object]) -> dict[str, object]:
    """What both kernels of grouped.py take of a tile."""
    return {name: value for name, value in tile.items() if name not in ("MERGED", "PASSES", "PERSISTENT")}


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
    acts = dict(GROUP=group_size, KIND=kind, DEPENDENT=dependent)
    may_describe = platform is not None and platform.kind in ("cuda", "interpreter")

    def weights_for(tensor, tile, columns, halves):
        """What a kernel reads `tensor` through, and whether that is a descriptor."""
        depth, rows = columns // packed, tensor.shape[1] // halves
        if not (tile["DESCRIPTOR"] and may_describe and depth * tensor.element_size() % 16 == 0
                and tensor.data_ptr() % 16 == 0):
            return tensor, False
        within = [2 * depth if interleaved and halves == 2 else depth, 1]
        half = depth if interleaved and halves == 2 else rows * depth
        return TensorDescriptor(tensor, [num_experts, halves, rows, depth], [halves * rows * depth, half, *within],
                                [1, 2 if tile["MERGED"] else 1, tile["BLOCK_N"], tile["BLOCK_K"] // packed]), True

    def persistent_parameters(tile):
        return dict(TOPK=topk, HIDDEN=hidden_size, INTERMEDIATE=intermediate_size, GROUP=group_size,
                    WEIGHT_ON_INPUT=apply_router_weight_on_input, DEPENDENT=dependent, num_warps=persistent.WARPS,
                    **{name: tile[name] for name in ("BLOCK_N", "BLOCK_K", "GROUP_M")}, **pdl)

    def first_product(tile, block_m, x, x_scale, w13, w13_scale, w13_bias, topk_weights, run: Blocks, act, act_scale):
        tokens, routes, most = x.shape[0], act.shape[0], run.blocks.shape[1]
        if tile["PERSISTENT"]:
            read = persistent.describe(w13.view(-1, hidden_size), [tile["BLOCK_N"], tile["BLOCK_K"]])
            persistent.persistent_up[(multiprocessors(x.device),)](
                x, x_scale, read, w13_scale, w13_bias, topk_weights, run.order, run.blocks, run.num_blocks, act,
                act_scale, tokens, routes, most, run.tickets[:1], ACTIVATION=activation, STAGES=tile["num_stages"],
                **persistent_parameters(tile))
            return
        read, described = weights_for(w13, tile, hidden_size, 2)
        grouped.grouped_up[(most * -(-intermediate_size // (tile["BLOCK_N"] * tile["PASSES"])),)](
            x, x_scale, hidden_size, read, w13_scale, w13_bias, topk_weights, run.order, run.blocks, run.num_blocks,
            act, act_scale, tokens, routes, most, INTERLEAVED=interleaved, ACTIVATION=activation, BLOCK_M=block_m,
            PTX=ptx(platform), **shared, **{**grouped_parameters(tile), "MERGED": tile["MERGED"],
                                            "PASSES": tile["PASSES"], "DESCRIPTOR": described}, **pdl)

    def second_product(tile, block_m, act, act_scale, w2, w2_scale, w2_bias, topk_weights, run: Blocks, rows,
                       row_scale):
        routes, most = act.shape[0], run.blocks.shape[1]
        if tile["PERSISTENT"]:
            stages = min(tile["num_stages"], 4 if rows.element_size() == 2 else 3)  # wide rows need a stage's room
            read = persistent.describe(w2.view(-1, intermediate_size), [tile["BLOCK_N"], tile["BLOCK_K"]])
            persistent.persistent_down[(multiprocessors(act.device),)](
                act, persistent.describe(act, [64, tile["BLOCK_K"]]), act_scale, read, w2_scale, w2_bias, topk_weights,
                run.order, run.blocks, run.num_blocks, rows, row_scale, routes, most, run.tickets[1:],
                SCALED=weight_quant == "fp8_block", STAGES=stages, **persistent_parameters(tile))
            return
        read, described = weights_for(w2, tile, intermediate_size, 1)
        grouped.grouped_down[(most * -(-hidden_size // tile["BLOCK_N"]),)](
            act, act_scale, read, w2_scale, w2_bias, topk_weights, run.order, run.blocks, run.num_blocks, rows,
            row_scale, routes, most, BLOCK_M=block_m, **shared, **{**grouped_parameters(tile), "DESCRIPTOR": described},
            **pdl)

    def kernel(hidden_states, w13, w2, topk_weights, topk_ids, *, w13_scale=None, w2_scale=None, a13_scale=None,
               a2_scale=None, w13_bias=None, w2_bias=None, expert_map=None, out=None):
        tokens = check(hidden_states, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, a13_scale, a2_scale,
                       w13_bias, w2_bias, expert_map, out)
        device = hidden_states.device
        if out is None:
            out = torch.empty((tokens, hidden_size), dtype=hidden_dtype, device=device)
        if tokens == 0:
            return out
        chosen = choose(tokens)
        if (chosen["up"]["PERSISTENT"] or chosen["down"]["PERSISTENT"]) and (w13.data_ptr() | w2.data_ptr()) % 16:
            chosen = launch_parameters.default(traits, tokens, aligned=False)
        block_m, up, down = chosen["BLOCK_M"], chosen["up"], chosen["down"]
        routes = tokens * topk
        most = min(routes, num_experts + routes // block_m)
        few = routes <= FEW_ROUTES
        chunks = -(-routes // CHUNK)
        map_size = 0 if expert_map is None else expert_map.shape[0]

        def empty(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device=device)

        run = Blocks(empty(routes), empty(3, most), empty(1), empty(2))
        counts = None if few else empty(chunks, bins)
        x, x_scale = hidden_states, a13_scale
        if stored is not None:
            x = empty(tokens, hidden_size, dtype=stored)
            if not static:
                x_scale = empty(1 if by_row else -(-hidden_size // group_size), tokens, dtype=torch.float32)
        step = min(4096, triton.next_power_of_2(routes))
        aligning = 1 + num_experts if few else chunks
        with on_gpu(device):
            prepare.prepare[(aligning + (0 if stored is None else tokens),)](
                topk_ids, expert_map, map_size, run.order, run.blocks, run.num_blocks, counts, run.tickets,
                hidden_states, hidden_size, x, None if static else x_scale, a13_scale, tokens, routes, most, aligning,
                NUM_EXPERTS=num_experts, BINS=bins, BLOCK_M=block_m, STEP=step, ROWS=min(step, 256), CHUNK=CHUNK,
                HIDDEN=hidden_size, BLOCK=max(group_size, triton.next_power_of_2(hidden_size)), ACT_QUANT=act_quant,
                FEW=few, **acts, num_warps=8, **pdl)
            if not few:
                align.place_chunks[(1 + chunks,)](
                    topk_ids, expert_map, map_size, counts, run.order, run.blocks, run.num_blocks, routes, chunks, most,
                    NUM_EXPERTS=num_experts, BINS=bins, BLOCK_M=block_m, CHUNK=CHUNK, ROWS=max(1, 16384 // bins),
                    DEPENDENT=dependent, num_warps=8, **pdl)

            act_dtype = torch.float32 if by_row else stored or hidden_dtype
            act, act_scale = empty(routes, intermediate_size, dtype=act_dtype), a2_scale
            if act_quant == "fp8_block":
                if up["BLOCK_N"] * up["PASSES"] != group_size:
                    raise ValueError(f"a tile of {up['BLOCK_N']} columns, {up['PASSES']} times, can't be quantised in "
                                     f"groups of {group_size}")
                act_scale = empty(-(-intermediate_size // group_size), routes, dtype=torch.float32)
            first_product(up, block_m, x, x_scale, w13, w13_scale, w13_bias, topk_weights, run, act, act_scale)
            if by_row:
                rows, act = act, empty(routes, intermediate_size, dtype=stored)
                act_scale = empty(routes, dtype=torch.float32)
                prepare.quantise_rows[(routes,)](
                    rows, act, act_scale, routes, COLUMNS=intermediate_size,
                    BLOCK=triton.next_power_of_2(intermediate_size), KIND=kind, DEPENDENT=dependent, **pdl)

            halved = launch_parameters.halved(traits, tokens)
            columns = down["BLOCK_N"] * (2 if down["PERSISTENT"] else 1)  # that one tile of the second product makes
            rows = empty(routes, hidden_size, dtype=torch.float16 if halved else torch.float32)
            row_scale = empty(routes, -(-hidden_size // columns), dtype=torch.float32) if halved else None
            second_product(down, block_m, act, act_scale, w2, w2_scale, w2_bias, topk_weights, run, rows, row_scale)
            tile = columns if halved else COLUMNS
            span = max(1, min(1024, triton.next_power_of_2(hidden_size)) // tile) if halved else 1
            grouped.sum_slots[(tokens, -(-hidden_size // (tile * span)))](
                rows, row_scale, topk_ids, expert_map, map_size, out, out.stride(0), TOPK=topk, HIDDEN=hidden_size,
                NUM_EXPERTS=num_experts, TILES=span, TILE=tile, DEPENDENT=dependent,
                num_warps=max(1, span * tile // 256), **pdl)
        return out

    return kernel
