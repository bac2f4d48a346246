"""Mistakes that people make in expert kernels, by name: (the kernels' file, what stands there once, what replaces it,
the case of test_experts_kernel_mutants.py that finds it)."""

from __future__ import annotations

GROUPED_PY, FEW_PY, DOT_PY = "grouped.py", "few_tokens.py", "few_tokens_dot.py"
PREPARE, ARITHMETIC = "prepare.py", "arithmetic.py"
LOCAL = "\n    local = experts < NUM_EXPERTS\n"  # by what follows it, two functions are told apart
ROUTE_WEIGHT = "widen(tl.load(topk_weights + tl.load(order + positions, mask=live, other=0), mask=live, other=1.0))"

MUTANTS = {
    # the order of operations
    "bias before dequantisation": (
        GROUPED_PY, "y += widen(tl.load(w2_bias",
        "y += whole_scale(w2_scale, expert, 0, row0, FORMAT, PER_TENSOR, HIDDEN, 1, False, BLOCK_N)[None, :]"
        " * widen(tl.load(w2_bias", "int8"),
    "first bias before dequantisation": (
        GROUPED_PY, "gate += widen(tl.load(at",
        "gate += whole_scale(w13_scale, expert, 0, row0, FORMAT, PER_TENSOR, INTERMEDIATE, 2, INTERLEAVED,"
        " BLOCK_N)[None, :] * widen(tl.load(at", "int8 weights"),
    "routing weight before the bias": (
        GROUPED_PY, "columns, mask=inside, other=0.0))[None, :]\n    routes",
        f"columns, mask=inside, other=0.0))[None, :] / {ROUTE_WEIGHT}[:, None]\n    routes", "plain"),
    "routing weight before the first bias": (
        GROUPED_PY, "at + half + step * columns, mask=inside, other=0.0))[None, :]",
        "at + half + step * columns, mask=inside, other=0.0))[None, :]"
        " / widen(tl.load(topk_weights + routes, mask=live, other=1.0))[:, None]", "int8 weights, weight on input"),
    "rows rounded before the weight": (
        GROUPED_PY, "y *= factor[:, None]", "y = widen(narrow(y, tl.bfloat16)) * factor[:, None]", "plain"),
    "rows rounded before the bias": (
        GROUPED_PY, "y += widen(tl.load(w2_bias", "y = widen(narrow(y, tl.bfloat16)) + widen(tl.load(w2_bias", "int4"),
    "rows rounded before the sum": (
        GROUPED_PY, "narrow(y, result.dtype.element_ty)", "narrow(y, tl.bfloat16)", "fp8 tensor"),
    "rounded before the activation": (
        GROUPED_PY, "return activate(gate, up,", "return activate(widen(narrow(gate, tl.bfloat16)), up,", "plain"),
    "rounded before it is quantised": (
        GROUPED_PY, "return activate(gate, up, ACTIVATION, PTX)",
        "return widen(narrow(activate(gate, up, ACTIVATION, PTX), tl.bfloat16))", "fp8 blocks"),
    # float32
    "a sum of products in float16": (
        GROUPED_PY, "first = multiply(x, w, first, FORMAT, SWAP)",
        "first = multiply(x, w, first, FORMAT, SWAP).to(tl.float16).to(tl.float32)", "plain"),
    "a sum of steps in float16": (
        GROUPED_PY, "                first += p\n", "                first += p.to(tl.float16).to(tl.float32)\n",
        "fp8 channels"),
    "a step's product in bfloat16": (
        GROUPED_PY, "first += p * along(w_scale, SWAP)",
        "first += widen(narrow(p, tl.bfloat16)) * along(w_scale, SWAP)", "int4"),
    "a sum of slots in bfloat16": (
        GROUPED_PY, "            total += widen(loaded[slot])\n",
        "            total = widen(narrow(total + widen(loaded[slot]), tl.bfloat16))\n", "fp8 static"),
    "routing weights in bfloat16": (
        GROUPED_PY, "factor = widen(tl.load(topk_weights + routes, mask=live, other=0.0))",
        "factor = widen(narrow(widen(tl.load(topk_weights + routes, mask=live, other=0.0)), tl.bfloat16))", "plain"),
    # the routing weight
    "weight twice": (GROUPED_PY, "    if not WEIGHT_ON_INPUT:", "    if True:", "weight on input"),
    "weight on the input forgotten": (GROUPED_PY, "    if WEIGHT_ON_INPUT:", "    if False:", "weight on input"),
    "weight on the gate alone": (GROUPED_PY, "up *= weight[:, None]", "up *= 1.0", "weight on input"),
    "weight of another route": (
        GROUPED_PY, "factor = widen(tl.load(topk_weights + routes", "factor = widen(tl.load(topk_weights + positions",
        "plain"),
    # masks
    "columns past H are read": (
        GROUPED_PY, "mask=a_live[:, None] & (columns < DEPTH - k)[None, :]", "mask=a_live[:, None]", "padded"),
    "weights past the last column are read": (
        GROUPED_PY, "(rows < ROWS)[:, None] & (columns < DEPTH)[None, :]", "(rows < ROWS)[:, None]", "unused experts"),
    "columns past I are stored": (
        GROUPED_PY, "there = live[:, None] & (columns < INTERMEDIATE)[None, :]", "there = live[:, None]", "plain"),
    "columns past H are stored": (GROUPED_PY, "mask=live[:, None] & inside[None, :]", "mask=live[:, None]", "plain"),
    "rows past a block are stored": (
        GROUPED_PY, "mask=live[:, None] & inside[None, :]", "mask=(rows >= 0)[:, None] & inside[None, :]", "plain"),
    "a row more than a block has": (
        GROUPED_PY, "live = rows < height\n    positions = start + rows\n    row0",
        "live = rows <= height\n    positions = start + rows\n    row0", "many rows"),
    "the last row of a block is left out": (
        GROUPED_PY, "live = rows < height\n    positions = start + rows\n    routes",
        "live = rows < height - 1\n    positions = start + rows\n    routes", "many rows"),
    "high blocks take the small tile": (
        GROUPED_PY, "if TAIL_M > 0 and height <= TAIL_M:\n        up_tile", "if TAIL_M > 0:\n        up_tile", "tails"),
    "rows past a block are stored as activations": (
        GROUPED_PY, "there = live[:, None] & (columns < INTERMEDIATE)[None, :]",
        "there = (rows >= 0)[:, None] & (columns < INTERMEDIATE)[None, :]", "plain"),
    "scales of rows past a block are stored": (
        GROUPED_PY, "num_routes + positions, scale, mask=live)", "num_routes + positions, scale)", "fp8 blocks"),
    "the second pass goes past I": (
        GROUPED_PY, "(columns < INTERMEDIATE - BLOCK_N)[None, :]", "(columns < INTERMEDIATE)[None, :]",
        "fp8 blocks, two passes"),
    "biases past the last row are read": (
        GROUPED_PY, "at + half + step * columns, mask=inside, other=0.0", "at + half + step * columns", "plain"),
    "scales past the last row are read": (
        GROUPED_PY, "rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), ROWS - 1)\n    if PER_TENSOR",
        "rows = row0 + tl.arange(0, BLOCK_N)\n    if PER_TENSOR", "int8 weights"),
    "scales of groups past the last row are read": (
        GROUPED_PY, "rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), ROWS - 1)\n    if FORMAT",
        "rows = row0 + tl.arange(0, BLOCK_N)\n    if FORMAT", "int4"),
    "scales past the last step are read": (
        GROUPED_PY, "ahead = tl.minimum(k + BLOCK_K, (DEPTH - 1) // BLOCK_K * BLOCK_K)", "ahead = k + BLOCK_K",
        "fp8 blocks"),
    "rows are summed past H": (GROUPED_PY, "mask=columns < limit", "mask=columns * 0 < limit", "plain"),
    # halves, and how they lie
    "up before gate": (GROUPED_PY, "return activate(gate, up,", "return activate(up, gate,", "gelu"),
    "both halves the gate's": (
        GROUPED_PY, "v = load_weights(weights, expert, 1, row0", "v = load_weights(weights, expert, 0, row0",
        "int8 static"),
    "both biases the gate's": (GROUPED_PY, "at + half + step * columns", "at + step * columns", "plain"),
    "both scales the gate's": (
        GROUPED_PY, "second *= whole_scale(weight_scale, expert, 1,", "second *= whole_scale(weight_scale, expert, 0,",
        "fp8 channels"),
    "a descriptor's first half twice": (
        GROUPED_PY, "weights.load([expert, half, row0, k])", "weights.load([expert, 0, row0, k])", "descriptors"),
    "halves of rows one after the other": (
        GROUPED_PY, "HALF_STRIDE: tl.constexpr = DEPTH if INTERLEAVED else ROWS * DEPTH",
        "HALF_STRIDE: tl.constexpr = ROWS * DEPTH", "interleaved"),
    "rows next to each other": (
        GROUPED_PY, "ROW_STRIDE: tl.constexpr = 2 * DEPTH if INTERLEAVED else DEPTH",
        "ROW_STRIDE: tl.constexpr = DEPTH", "interleaved"),
    "interleaved biases one after the other": (
        GROUPED_PY, "half: tl.constexpr = 1 if INTERLEAVED else INTERMEDIATE", "half: tl.constexpr = INTERMEDIATE",
        "interleaved"),
    "interleaved scales one after the other": (
        GROUPED_PY, "(HALVES * ROWS) + row)", "(HALVES * ROWS) + half * ROWS + rows)", "fp8 channels, interleaved"),
    "interleaved scales of groups one after the other": (
        GROUPED_PY, "+ row.to(tl.int64) * PER_ROW", "+ (half * ROWS + rows).to(tl.int64) * PER_ROW",
        "int4, interleaved"),
    "interleaved rows in blocks of their half": (
        GROUPED_PY, "(rows * 2 + half) // GROUP * PER_ROW", "rows // GROUP * PER_ROW", "fp8 blocks, interleaved"),
    "merged halves taken as interleaved": (
        GROUPED_PY, "tl.permute(tl.reshape(tile, [tile.shape[0], 2, BLOCK_N]), [0, 2, 1])",
        "tl.reshape(tile, [tile.shape[0], BLOCK_N, 2])", "merged"),
    "swapped halves taken as interleaved": (
        GROUPED_PY, "tl.reshape(tile, [2, BLOCK_N, tile.shape[1]]), [1, 2, 0]",
        "tl.reshape(tile, [BLOCK_N, 2, tile.shape[1]]), [0, 2, 1]", "swapped and merged"),
    # scales
    "scale of the first block of rows": (GROUPED_PY, "at + row0 // GROUP * PER_ROW", "at", "fp8 blocks"),
    "one scale for a wide tile": (
        GROUPED_PY, "return tl.load(at + rows // GROUP * PER_ROW)",
        "return tl.load(at + rows * 0 + row0 // GROUP * PER_ROW)", "fp8 blocks, wide"),
    "no scale of the ragged block of rows": (
        GROUPED_PY, "PER_HALF: tl.constexpr = (ROWS + GROUP - 1) // GROUP", "PER_HALF: tl.constexpr = ROWS // GROUP",
        "fp8 blocks"),
    "no scale of the ragged group of columns": (
        GROUPED_PY, "PER_ROW: tl.constexpr = (DEPTH + GROUP - 1) // GROUP", "PER_ROW: tl.constexpr = DEPTH // GROUP",
        "int4"),
    "weight scales one step late": (
        GROUPED_PY, "w_next = step_scale(weight_scale, expert, 0, row0, ahead",
        "w_next = step_scale(weight_scale, expert, 0, row0, k", "fp8 blocks"),
    "activation scales one step late": (
        GROUPED_PY, "(ahead // GROUP).to(tl.int64) * a_scale_stride", "(k // GROUP) * a_scale_stride",
        "fp8 blocks"),
    "the first group's scales all along": (
        GROUPED_PY, "widen(tl.load(at + k // GROUP))", "widen(tl.load(at))", "int4"),
    "activation scales laid out by token": (
        GROUPED_PY, "(ahead // GROUP).to(tl.int64) * a_scale_stride + a_scale_at",
        "ahead // GROUP + a_scale_at", "fp8 blocks, swapped"),
    "scale of a route where a token's is meant": (
        GROUPED_PY, "tokens * 0 if STATIC else tokens", "tokens * 0 if STATIC else routes", "int8"),
    "scale of a block's row": (
        GROUPED_PY, "positions * 0 if STATIC else positions", "positions * 0 if STATIC else rows", "fp8 channels"),
    "the first expert's scale": (
        GROUPED_PY, "return tl.load(scale + expert + rows * 0)", "return tl.load(scale + rows * 0)", "fp8 tensor"),
    "the activation's scale left out": (
        GROUPED_PY, "first, second = first * x_scale, second * x_scale", "first, second = first * x_scale, second",
        "fp8 static"),
    "the given scale of the activations, inverted": (
        GROUPED_PY, "quantised(y, tl.load(act_scale), FORMAT)", "quantised(y, 1.0 / tl.load(act_scale), FORMAT)",
        "int8 static"),
    "the second pass does not count in the scale": (
        GROUPED_PY, "most = tl.maximum(most, tl.max(tl.where(also, tl.abs(z), 0.0), axis=1))", "most = most * 1.0",
        "fp8 blocks, two passes"),
    "scales of tiles a token apart": (
        GROUPED_PY, "act_scale + tile.to(tl.int64) * num_routes", "act_scale + tile.to(tl.int64) * num_tokens",
        "fp8 blocks, two passes"),
    # experts, rows and tiles
    "the next expert's weights": (
        GROUPED_PY, "w2, w2_scale, expert, row0, 1,", "w2, w2_scale, (expert + 1) % 4, row0, 1,", "plain"),
    "the first expert's bias": (GROUPED_PY, "w2_bias + expert.to(tl.int64) * HIDDEN", "w2_bias", "plain"),
    "half an expert's biases": (
        GROUPED_PY, "w13_bias + expert.to(tl.int64) * (2 * INTERMEDIATE)",
        "w13_bias + expert.to(tl.int64) * INTERMEDIATE", "plain"),
    "a slot's row instead of its token's": (
        GROUPED_PY, "tokens = routes // TOPK", "tokens = routes % num_tokens", "plain"),
    "the block of the first tile": (
        GROUPED_PY, "height = tl.minimum(num_blocks - first, GROUP_M)", "height = GROUP_M", "many rows"),
    "rows left in sorted order": (
        GROUPED_PY, "result + routes.to(tl.int64)[:, None] * HIDDEN",
        "result + positions.to(tl.int64)[:, None] * HIDDEN", "plain"),
    # the sum over slots
    "the last slot is left out": (
        GROUPED_PY, "for slot in tl.static_range(TOPK):\n", "for slot in tl.static_range(TOPK - 1):\n", "plain"),
    "slots without an expert are read": (
        GROUPED_PY, "limit = tl.where(expert < NUM_EXPERTS, HIDDEN, 0)", "limit = HIDDEN + 0 * expert",
        "expert parallel"),
    "the map is not used in the sum": (
        GROUPED_PY, "local_expert(topk_ids, expert_map, map_size, route, True",
        "local_expert(topk_ids, None, 0, route, True", "expert parallel"),
    "the map is not used in the alignment": (
        PREPARE, "place_routes(program - 1, topk_ids, expert_map, map_size",
        "place_routes(program - 1, topk_ids, None, 0", "expert parallel"),
    "rows of out are as far apart as they are long": (
        GROUPED_PY, "out + token * out_stride", "out + token * HIDDEN", "rows of out apart"),
    # rows in 16 bits
    "exponent without the routing weight": (
        GROUPED_PY, "axis=1) * tl.abs(factor))", "axis=1))", "16-bit rows"),
    "exponent of the first slot": (GROUPED_PY, "* scales[slot][:, None]", "* scales[0][:, None]", "16-bit rows"),
    "exponents at sorted positions": (
        GROUPED_PY, "row_scale + routes.to(tl.int64) * TILES_N", "row_scale + positions.to(tl.int64) * TILES_N",
        "16-bit rows"),
    "exponent four too small": (ARITHMETIC, "2.0 ** 127) * 2.0 ** -14", "2.0 ** 127) * 2.0 ** -18", "16-bit rows"),
    # int4
    "nibbles swapped": (GROUPED_PY, "tl.join(low, high)", "tl.join(high, low)", "int4"),
    "a zero point of 7": (GROUPED_PY, "(w >> 4).to(tl.int8) - 8", "(w >> 4).to(tl.int8) - 7", "int4"),
    "nibbles in two's complement": (
        GROUPED_PY, "(w & 15).to(tl.int8) - 8", "((w & 15) ^ 8).to(tl.int8) - 8", "int4, interleaved"),
    # activations
    "sigmoid of the up half": (
        ARITHMETIC, "return gate * sigmoid(gate, PTX) * up", "return gate * sigmoid(up, PTX) * up",
        "fp8 blocks, swapped"),
    "gelu by a sigmoid": (
        ARITHMETIC, "return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up",
        "return gate * sigmoid(1.702 * gate, PTX) * up", "gelu"),
    "gelu by a tanh": (
        ARITHMETIC, "0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up",
        "gate * sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate), PTX) * up", "gelu"),
    "no limit of the gate": (ARITHMETIC, "gate = tl.minimum(gate, SWIGLU_LIMIT, KEPT)", "gate = gate * 1.0", "swiglu"),
    "a limit of the gate on the wrong side": (
        ARITHMETIC, "gate = tl.minimum(gate, SWIGLU_LIMIT, KEPT)", "gate = tl.maximum(gate, -SWIGLU_LIMIT)", "swiglu"),
    "a limit of the gate on both sides": (
        ARITHMETIC, "gate = tl.minimum(gate, SWIGLU_LIMIT, KEPT)",
        "gate = tl.minimum(tl.maximum(gate, -SWIGLU_LIMIT), SWIGLU_LIMIT)", "swiglu"),
    "a limit of the up half on one side": (
        ARITHMETIC, "tl.minimum(tl.maximum(up, -SWIGLU_LIMIT, KEPT), SWIGLU_LIMIT, KEPT)",
        "tl.minimum(up, SWIGLU_LIMIT)",
        "swiglu"),
    "no alpha": (ARITHMETIC, "sigmoid(gate * SWIGLU_ALPHA, PTX)", "sigmoid(gate, PTX)", "swiglu"),
    "no one added to up": (ARITHMETIC, "(up + 1.0)", "up", "interleaved"),
    # quantisation
    "division by a reciprocal": (
        ARITHMETIC, "return tl.fma(tl.fma(-quotient, y, x), reciprocal, quotient)", "return quotient",
        "fp8 blocks, halfway"),
    "a scale by a reciprocal": (
        ARITHMETIC, "tl.div_rn(tl.maximum(largest, LEAST_MOST), FP8_MOST)",
        "tl.maximum(largest, LEAST_MOST) * (1.0 / FP8_MOST)", "fp8 blocks, halfway"),
    "fp8 ties away from even": (
        ARITHMETIC, "0x7FFFF + ((bits >> 20) & 1)", "0x80000", "fp8 blocks, halfway"),
    "int8 ties away from even": (
        ARITHMETIC, "((y + 12582912.0) - 12582912.0)", "tl.floor(y + 0.5)", "int8, halfway"),
    "int8 cut off": (ARITHMETIC, "((y + 12582912.0) - 12582912.0)", "y", "int8"),
    "int8 of 128 steps": (
        ARITHMETIC, "tl.div_rn(tl.maximum(largest, LEAST_MOST, KEPT), INT8_MOST)",
        "tl.div_rn(tl.maximum(largest, LEAST_MOST, KEPT), 128.0)", "int8"),
    "fp8 past its largest": (
        ARITHMETIC, "INT8_MOST if KIND == \"int8\" else FP8_MOST", "INT8_MOST if KIND == \"int8\" else 480.0",
        "fp8 static"),
    "int8 past its largest": (
        ARITHMETIC, "INT8_MOST if KIND == \"int8\" else FP8_MOST", "1024.0 if KIND == \"int8\" else FP8_MOST",
        "int8 static"),
    "a row quantised by its largest scale": (
        PREPARE, "quantised(x, scale[:, None], KIND)", "quantised(x, tl.max(scale, axis=0), KIND)", "fp8 blocks"),
    "scales of groups a group off": (
        PREPARE, "hidden_scale + groups.to(tl.int64) * num_tokens",
        "hidden_scale + (groups + 1).to(tl.int64) % 3 * num_tokens", "fp8 blocks, interleaved"),
    "the next token counts in the last group's scale": (
        PREPARE, "row_stride + columns, mask=live, other=0.0)", "row_stride + columns)", "fp8 blocks"),
    "the next token counts in a row's scale": (
        PREPARE, "row_stride + columns, mask=live, other=0.0)", "row_stride + columns)", "fp8 channels"),
    "scales of groups past the last are stored": (
        PREPARE, "+ token, scale, mask=groups * GROUP < HIDDEN)", "+ token, scale)", "fp8 blocks"),
    "a quantised row is stored past its end": (
        PREPARE, "HIDDEN + columns, x, mask=live)", "HIDDEN + columns, x)", "fp8 channels"),
    # few tokens
    "few: a slot's row instead of its token's": (
        FEW_PY, "token = route // TOPK", "token = route % TOPK", "few"),
    "few: halves of rows one after the other": (
        FEW_PY, "HALF: tl.constexpr = HIDDEN if INTERLEAVED else INTERMEDIATE * HIDDEN",
        "HALF: tl.constexpr = INTERMEDIATE * HIDDEN", "few, interleaved"),
    "few: rows next to each other": (
        FEW_PY, "ROW: tl.constexpr = 2 * HIDDEN if INTERLEAVED else HIDDEN", "ROW: tl.constexpr = HIDDEN",
        "few, interleaved"),
    "few: up before gate": (FEW_PY, "y = activate(gate, up,", "y = activate(up, gate,", "few"),
    "few: both biases the gate's": (FEW_PY, "at + half + step * rows", "at + step * rows", "few"),
    "few: both scales the gate's": (
        FEW_PY, "HALF_ROWS * PER_ROW + k // GROUP", "k // GROUP", "few, fp8 blocks"),
    "few: no scale of the ragged block of rows": (
        FEW_PY, "HALF_ROWS: tl.constexpr = 0 if INTERLEAVED else (INTERMEDIATE + GROUP - 1) // GROUP",
        "HALF_ROWS: tl.constexpr = 0 if INTERLEAVED else INTERMEDIATE // GROUP", "few, fp8 blocks"),
    "few: interleaved rows in blocks of their half": (
        FEW_PY, "tl.program_id(1) * (2 * BLOCK_N if INTERLEAVED else BLOCK_N) // GROUP",
        "tl.program_id(1) * BLOCK_N // GROUP", "few, fp8 blocks, interleaved"),
    "few: the first step's scales all along": (
        FEW_PY, "tl.load(gate_scale + k // GROUP, mask=known", "tl.load(gate_scale, mask=known", "few, fp8 blocks"),
    "few: the first step's scales all along, second layer": (
        FEW_PY, "group = k // GROUP + tl.arange(0, GROUPS)", "group = tl.arange(0, GROUPS)", "few, fp8 blocks"),
    "few: scale of the first block of rows": (
        FEW_PY, "(tl.program_id(1) * BLOCK_N // GROUP) * PER_ROW", "0", "few, fp8 blocks"),
    "few: one scale for all groups": (
        FEW_PY, "scale = scale_of(tl.max(tl.abs(groups), axis=1), \"fp8\")",
        "scale = scale_of(tl.max(tl.abs(groups), axis=1) * 0.0 + tl.max(tl.abs(x), axis=0), \"fp8\")",
        "few, fp8 blocks"),
    "few: hidden states are not quantised": (
        FEW_PY, "x, scale = quantised_groups(x, BLOCK_K, GROUP)", "scale = 1.0", "few, fp8 blocks"),
    "few: activations are not quantised": (
        FEW_PY, "a = widen(quantised(a, scale[:, :, None], \"fp8\")) * scale[:, :, None]", "a = a * 1.0",
        "few, fp8 blocks, interleaved"),
    "few: activations are not rounded": (FEW_PY, "y = widen(narrow(y, ROUND))", "y = y * 1.0", "few"),
    "few: columns past H are read": (
        FEW_PY, "tl.load(x_at + k, mask=there, other=0.0)", "tl.load(x_at + k)", "few, padded"),
    "few: weights past the last column are read": (
        FEW_PY, "u = tl.load(gate_at + HALF + k, mask=there[None, :], other=0.0,", "u = tl.load(gate_at + HALF + k,",
        "few, unused experts"),
    "few: columns past I are read": (
        FEW_PY, "mask=local[:, None] & there[None, :], other=0.0)\n        if FORMAT",
        "mask=local[:, None], other=0.0)\n        if FORMAT", "few, padded"),
    "few: columns past H are stored": (
        FEW_PY, "narrow(total, out.dtype.element_ty), mask=inside)", "narrow(total, out.dtype.element_ty))", "few"),
    "few: columns past I are stored": (
        FEW_PY, "INTERMEDIATE + rows, y, mask=inside)", "INTERMEDIATE + rows, y)", "few"),
    "few: an id that is no expert's is read with": (
        FEW_PY, "if expert == NUM_EXPERTS:", "if expert > NUM_EXPERTS:", "few, invalid ids"),
    "few: rows past I are read": (
        FEW_PY, "read = tl.where(inside, rows, 0)", "read = rows", "few, invalid ids"),
    "few: rows past H are read": (
        FEW_PY, "local[:, None, None] & inside[None, :, None]", "local[:, None, None]", "few"),
    "few: scales past the last group are read": (
        FEW_PY, "known = columns < HIDDEN - k", "known = columns < HIDDEN", "few, fp8 blocks"),
    "few: scales past the last group are read, second layer": (
        FEW_PY, "mask=local[:, None] & (group < PER_ROW)[None, :]", "mask=local[:, None]", "few, fp8 blocks"),
    "few: slots of the next token": (
        FEW_PY, f"slots < TOPK, NUM_EXPERTS){LOCAL}    inside", f"slots < SLOTS, NUM_EXPERTS){LOCAL}    inside", "few"),
    "few: an id that is no expert's counts": (
        FEW_PY, "local = experts < NUM_EXPERTS\n    rows", "local = experts <= NUM_EXPERTS\n    rows",
        "few, invalid ids"),
    "few: the map is not used": (
        FEW_PY, "local_expert(topk_ids, expert_map, map_size, route, True",
        "local_expert(topk_ids, None, 0, route, True", "few, expert parallel"),
    "few: the map is not used in the second layer": (
        FEW_PY, f"expert_map, map_size, routes, slots < TOPK, NUM_EXPERTS){LOCAL}    rows",
        f"None, 0, routes, slots < TOPK, NUM_EXPERTS){LOCAL}    rows", "few, expert parallel"),
    "few: the next expert's weights": (
        FEW_PY, "(w2 + experts.to(tl.int64)[:, None, None]",
        "(w2 + ((experts + 1) % NUM_EXPERTS).to(tl.int64)[:, None, None]", "few"),
    "few: the first expert's bias": (
        FEW_PY, "w2_bias + experts.to(tl.int64)[:, None] * HIDDEN", "w2_bias + experts[:, None] * 0", "few"),
    "few: weight twice": (FEW_PY, "    if not WEIGHT_ON_INPUT:", "    if True:", "few, weight on input"),
    "few: weight on the input forgotten": (FEW_PY, "    if WEIGHT_ON_INPUT:", "    if False:", "few, weight on input"),
    "few: routing weight before the bias": (
        FEW_PY, "mask=local[:, None] & inside[None, :], other=0.0))",
        "mask=local[:, None] & inside[None, :], other=0.0))"
        " / widen(tl.load(topk_weights + routes, mask=local, other=1.0))[:, None]", "few"),
    "few: rows rounded before the weight": (
        FEW_PY, "y *= weights[:, None]", "y = widen(narrow(y, tl.bfloat16)) * weights[:, None]", "few"),
    "few: rows rounded before the sum": (
        FEW_PY, "tl.where(local[:, None], y, 0.0)", "tl.where(local[:, None], widen(narrow(y, tl.bfloat16)), 0.0)",
        "few, fp8 blocks"),
    "few: routing weights in bfloat16": (
        FEW_PY, "y *= weights[:, None]", "y *= widen(narrow(weights, tl.bfloat16))[:, None]", "few"),
    "few: a sum of products in float16": (
        FEW_PY, "acc += widen(w) * a[:, None, :]",
        "acc = (acc + widen(w) * a[:, None, :]).to(tl.float16).to(tl.float32)", "few"),
    "few: the last slot is left out": (
        FEW_PY, "tl.where(local[:, None], y, 0.0)", "tl.where((local & (slots < TOPK - 1))[:, None], y, 0.0)", "few"),
    "few: rows of out are as far apart as they are long": (
        FEW_PY, "out + token.to(tl.int64) * out_stride", "out + token.to(tl.int64) * HIDDEN", "few, rows of out apart"),
    # few tokens through the matrix unit
    "dot: up before gate": (DOT_PY, "index // BLOCK_N % 2", "1 - index // BLOCK_N % 2", "dot"),
    "dot: both scales the gate's": (DOT_PY, "half * (ROWS // 2) + row // GROUP", "row // GROUP", "dot"),
    "dot: interleaved rows in blocks of their half": (
        DOT_PY, "scale_row = row // GROUP", "scale_row = row // 2 // GROUP", "dot, interleaved"),
    "dot: the next part's column": (
        DOT_PY, "part[:, None] == column[None, :]", "(part[:, None] + 1) % PARTS == column[None, :]", "dot"),
    "dot: the activation's scale left out": (
        DOT_PY, "(w_scale[:, None] * x_scale[None, :])", "w_scale[:, None]", "dot"),
    "dot: the first step's scales all along": (
        DOT_PY, "tl.load(scale_at + k // GROUP, mask=part < HIDDEN - k", "tl.load(scale_at, mask=part < HIDDEN - k",
        "dot"),
    "dot: scales past the last group are read": (
        DOT_PY, "tl.load(scale_at + k // GROUP, mask=part < HIDDEN - k, other=0.0)", "tl.load(scale_at + k // GROUP)",
        "dot"),
    "dot: scale of the first block of rows": (
        DOT_PY, "row // GROUP * PER_ROW + part // GROUP)", "part // GROUP)", "dot"),
    "dot: the first slot's activations": (
        DOT_PY, "own_route = token * TOPK + own_slot", "own_route = token * TOPK + 0 * own_slot", "dot"),
    "dot: a slot's row instead of its token's": (DOT_PY, "(route // TOPK)", "(route % TOPK)", "dot"),
}
