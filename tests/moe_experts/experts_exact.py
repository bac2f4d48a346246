"""Calls whose every sum is exact in float32, so that what is left of a result is the order of operations.

Activations, weights and scales are whole numbers and powers of two, whichever order they are summed in. Biases and
routing weights are any float32, so `(acc * s + b) * w` has two roundings and another order has others: each element has
one right number, bit for bit. (acc * s is exact, hence a fused multiply-add gives the same.)

second_layer  looks at the second multiplication: gates of 128, where silu is the identity, make a known input.
first_layer   looks at the first, through gates of 24 and more, and a second layer that hands on what it gets. Not for
              quantised activations, which round that.
"""

from __future__ import annotations

import torch

from kernel_registry.ops.moe.experts.formats import ACTIVATIONS, w2_matrix, w13_matrix

GATE = 128.0


def _numbers(generator, low, high, *shape):
    return torch.randint(low, high + 1, shape, generator=generator).float()


def _matrices(traits, values: torch.Tensor, matrix, generator, exponents):
    """(stored, scale, the numbers they stand for [E, rows, columns]) of whole numbers with random scales of 2^n."""
    scale = None
    real = values
    if matrix.scale_shape is not None:
        scale = 2.0 ** _numbers(generator, *exponents, *matrix.scale_shape)
        real = torch.stack([values[e] * matrix.scale_of_weight(scale[e]) for e in range(matrix.experts)])
    if matrix.format.packed:
        nibble = (values + 8).to(torch.uint8)
        return nibble[..., 0::2] | nibble[..., 1::2] << 4, scale, real
    return values.to(matrix.format.stored or getattr(torch, traits["dtype"])), scale, real


def _call(traits, hidden, w13, w13_scale, w2, w2_scale, weights, ids, b13, b2, given):
    """(args, kwargs) of a call; a13_scale and a2_scale are `given`, for formats that take them."""
    kwargs = {name: tensor for name, tensor in (("w13_scale", w13_scale), ("w2_scale", w2_scale))
              if tensor is not None}
    act = ACTIVATIONS[traits["act_quant"]]
    if act is not None and not act.group:
        kwargs |= {"a13_scale": torch.tensor([given[0]]), "a2_scale": torch.tensor(given[1])}
    if traits["has_bias"]:
        kwargs |= {"w13_bias": b13, "w2_bias": b2}
    return (hidden.to(getattr(torch, traits["dtype"])), w13, w2, weights, ids), kwargs


def second_layer(traits, tokens: int, seed: int = 0):
    """(args, kwargs, the one right result) of a top-1 call with silu."""
    experts, hidden_size, size = (traits[n] for n in ("num_experts", "hidden_size", "intermediate_size"))
    assert traits["topk"] == 1 and traits["activation"] == "silu" and not traits["apply_router_weight_on_input"]
    generator = torch.Generator().manual_seed(seed)
    act = ACTIVATIONS[traits["act_quant"]]
    # weights of 0 leave the bias, whatever the hidden states are
    first = w13_matrix(**traits)
    w13, s13, _ = _matrices(traits, torch.zeros(first.experts, first.rows, first.columns), first, generator, (0, 0))
    most = 7.0 if act is None or act.largest == 448 else 127.0
    up = _numbers(generator, -int(most), int(most), experts, size)
    up[:, ::traits["group_size"]] = most  # in each group of columns: 128 * most makes a scale of 2^n
    bias13, a = torch.cat([torch.full((experts, size), GATE), up], dim=1), GATE * up
    second = w2_matrix(**traits)
    largest = {0: 63, 448: 15, 127: 127, 7: 7}[second.format.largest]
    w2, s2, real = _matrices(traits, _numbers(generator, -largest, largest, experts, hidden_size, size), second,
                             generator, (-4, 0))
    ids = torch.randint(experts, (tokens, 1), generator=generator, dtype=torch.int32)
    b2 = torch.randn(experts, hidden_size, generator=generator) * 777
    weights = torch.randn(tokens, 1, generator=generator) / 2000  # float16 can hold the result
    given = (1.0, GATE * most / act.largest) if act is not None else None
    chosen = ids[:, 0].long()
    total = torch.einsum("ni,nhi->nh", a[chosen].double(), real[chosen].double())
    assert (total.abs() * 16 < 2**31).all() and torch.equal(total.float().double(), total)
    right = (total.float() + b2[chosen]) * weights
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    args, kwargs = _call(traits, hidden, w13, s13, w2, s2, weights, ids, bias13, b2, given)
    return args, kwargs, right.to(args[0].dtype)


def first_layer(traits, tokens: int, seed: int = 0):
    """(args, kwargs, the one right result) of a top-1 call with silu and activations that are not quantised."""
    experts, hidden_size, size = (traits[n] for n in ("num_experts", "hidden_size", "intermediate_size"))
    assert traits["topk"] == 1 and traits["activation"] == "silu" and traits["act_quant"] == "none"
    assert hidden_size >= size
    generator = torch.Generator().manual_seed(seed)
    hidden = _numbers(generator, -3, 3, tokens, hidden_size)
    first, second = w13_matrix(**traits), w2_matrix(**traits)
    w13, s13, real = _matrices(traits, _numbers(generator, -2, 2, experts, 2 * size, hidden_size), first, generator,
                               (-4, 0))
    w2, s2, _ = _matrices(traits, torch.eye(hidden_size, size).expand(experts, -1, -1).contiguous(), second, generator,
                          (0, 0))
    ids = torch.randint(experts, (tokens, 1), generator=generator, dtype=torch.int32)
    b13 = torch.randn(experts, 2 * size, generator=generator) * 20
    chosen = ids[:, 0].long()
    total = torch.einsum("nh,nrh->nr", hidden.double(), real[chosen].double())
    assert torch.equal(total.float().double(), total)
    weights = 0.5 + torch.rand(tokens, 1, generator=generator)
    # gates are far from where silu is not the identity
    b13[:, :size] = 48 + b13[:, :size].abs() - total[:, :size].min().float()
    h = total.float() + b13[chosen]
    if traits["apply_router_weight_on_input"]:
        h = h * weights
    gate, up = h.chunk(2, dim=1)
    assert (gate > 20).all()
    dtype = getattr(torch, traits["dtype"])
    y = torch.zeros(tokens, hidden_size)
    y[:, :size] = (gate * up).to(dtype).float()
    if not traits["apply_router_weight_on_input"]:
        y = y * weights
    args, kwargs = _call(traits, hidden, w13, s13, w2, s2, weights, ids, b13, torch.zeros(experts, hidden_size), None)
    return args, kwargs, y.to(dtype)
