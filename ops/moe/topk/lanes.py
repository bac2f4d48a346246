"""The layout of the Triton router: which lane has which experts of a row, and loading them.

A tile is [ROWS, 32]: a token a row, 32 lanes, laid out so that a row never leaves its warp. A lane owns a few experts,
held as tuples of [ROWS, 32] tensors. Lanes are shared out evenly among the expert groups: lane // GROUP_LANES is a
lane's group. Neighbouring experts of a lane are loaded together, in vectors as wide as the row allows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import scores

LANES = tl.constexpr(32)
NO_ID = tl.constexpr(2147483647)  # of a place in a lane's list that has no expert


@triton.constexpr_function
def chunks(count, lanes, widest):
    """Splits `count` neighbouring experts over `lanes` lanes: (offset, width) of loads in which each lane takes `width`
    neighbours, widest first, so that most bytes move in wide vectors. The last chunk may be partly empty."""
    found, offset, width = [], 0, widest
    while width:
        while count - offset >= lanes * width:
            found.append((offset, width))
            offset += lanes * width
        width >>= 1
    if offset < count:
        found.append((offset, 1))
    return tuple(found)


@triton.jit
def unstack(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, 32, WIDTH] -> tuple of WIDTH tensors [ROWS, 32], in order."""
    if WIDTH == 1:
        return (tl.reshape(x, [ROWS, LANES]),)
    elif WIDTH == 2:
        a, b = tl.split(x)
        return (a, b)
    elif WIDTH == 4:
        even, odd = tl.split(tl.reshape(x, [ROWS, LANES, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a, b, c, d)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, LANES, 4, 2]))
        e = unstack(even, ROWS, 4)
        o = unstack(odd, ROWS, 4)
        return (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3])


@triton.jit
def chunk_experts(OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  GROUP_LANES: tl.constexpr):
    """Ids of the WIDTH neighbouring experts that each lane has in a chunk, [1, 32, WIDTH], and which of them exist."""
    lane = tl.arange(0, LANES)[None, :, None]
    within = OFFSET + (lane % GROUP_LANES) * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return (lane // GROUP_LANES) * GROUP_SIZE + within, (within < GROUP_SIZE) & (lane < GROUPS * GROUP_LANES)


@triton.constexpr_function
def chunk_start(parts, part):
    """Where in a lane's list the experts of a chunk begin."""
    return sum(width for _, width in parts[:part])


@triton.jit
def id_at(place, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, WIDEST: tl.constexpr):
    """The id of the expert at a place in each lane's list; NO_ID at a negative place."""
    lane = tl.arange(0, LANES)[None, :]
    parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
    found = tl.full(place.shape, NO_ID, tl.int32)
    for part in tl.static_range(len(parts)):
        within = parts[part][0] + (lane % GROUP_LANES) * parts[part][1] + place - chunk_start(parts, part)
        found = tl.where(place >= chunk_start(parts, part), (lane // GROUP_LANES) * GROUP_SIZE + within, found)
    return found


@triton.jit
def load_bias(bias, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, WIDEST: tl.constexpr):
    """The bias in the layout of load_choices, a tuple of [1, 32, width] float32: the same for every row. None: none."""
    found = ()
    if bias is not None:
        parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
        for part in tl.static_range(len(parts)):
            expert, exists = chunk_experts(parts[part][0], parts[part][1], GROUPS, GROUP_SIZE, GROUP_LANES)
            found = found + (tl.load(bias + expert, mask=exists, other=float("-inf")).to(tl.float32),)
    return found


@triton.jit
def load_logits(logits, expert, exists, rows, live, row_stride, column_stride, PARTIAL: tl.constexpr,
                MASK_ROWS: tl.constexpr):
    """Logits of the given experts [1, 32, width] of the rows, float32; -inf where there is no expert or no live row."""
    place = logits + rows[:, None, None] * row_stride + expert.to(tl.int64) * column_stride
    if PARTIAL:
        x = tl.load(place, mask=exists & live[:, None, None], other=float("-inf"))
    elif MASK_ROWS:
        x = tl.load(place, mask=live[:, None, None], other=float("-inf"))
    else:
        x = tl.load(place)
    return x.to(tl.float32)


@triton.jit
def load_chunk(logits, biases, rows, live, row_stride, column_stride, PART: tl.constexpr, OFFSET: tl.constexpr,
               WIDTH: tl.constexpr, SCORING: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
               GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr, PTX: tl.constexpr):
    """One chunk of load_choices: WIDTH neighbouring experts of each lane."""
    PARTIAL: tl.constexpr = OFFSET + GROUP_LANES * WIDTH > GROUP_SIZE or GROUPS * GROUP_LANES < LANES
    expert, exists = chunk_experts(OFFSET, WIDTH, GROUPS, GROUP_SIZE, GROUP_LANES)
    x = load_logits(logits, expert, exists, rows, live, row_stride, column_stride, PARTIAL, MASK_ROWS)
    choice = scores.order(x, SCORING, PTX)
    if len(biases) > 0:
        choice = choice + biases[PART]
    if PARTIAL:
        choice = tl.where(exists, choice, float("-inf"))
        expert = tl.where(exists, expert, NO_ID)
    return unstack(choice, ROWS, WIDTH), unstack(tl.broadcast_to(expert, [ROWS, LANES, WIDTH]), ROWS, WIDTH)


@triton.jit
def load_choices(logits, biases, rows, live, row_stride, column_stride, SCORING: tl.constexpr, GROUPS: tl.constexpr,
                 GROUP_SIZE: tl.constexpr, GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr,
                 MASK_ROWS: tl.constexpr, PTX: tl.constexpr):
    """Every lane's experts: what they are chosen by, float32, and their ids, tuples of [ROWS, 32].

    Ids ascend within a lane. A place without an expert has the choice -inf and the id NO_ID, and comes last.
    `biases` is what load_bias returned.
    """
    choices = ()
    ids = ()
    parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
    for part in tl.static_range(len(parts)):
        more_choices, more_ids = load_chunk(logits, biases, rows, live, row_stride, column_stride, part, parts[part][0],
                                            parts[part][1], SCORING, GROUPS, GROUP_SIZE, GROUP_LANES, ROWS, MASK_ROWS,
                                            PTX)
        choices = choices + more_choices
        ids = ids + more_ids
    return choices, ids


@triton.jit
def exp_sum(logits, top, rows, live, row_stride, column_stride, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
            GROUP_LANES: tl.constexpr, ROWS: tl.constexpr, WIDEST: tl.constexpr):
    """The sum of exp(logit - top) over all experts of each row, [ROWS, 1]; `top` is [ROWS, 1]."""
    total = tl.zeros([ROWS, LANES], tl.float32)
    parts: tl.constexpr = chunks(GROUP_SIZE, GROUP_LANES, WIDEST)
    for part in tl.static_range(len(parts)):
        expert, exists = chunk_experts(parts[part][0], parts[part][1], GROUPS, GROUP_SIZE, GROUP_LANES)
        x = load_logits(logits, expert, exists, rows, live, row_stride, column_stride, True, True)
        total += tl.sum(scores.accurate_exp(x - top[:, :, None]), axis=2)
    return tl.sum(total, axis=1)[:, None]
