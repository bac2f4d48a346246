"""What is wrong with an implementation, or with a loader, in words; "" for nothing. Quick, as each mutant runs it."""

from __future__ import annotations

import torch
from indexer_support import SIZES, layer, quantised, same
from torch import nn

from kernel_registry.errors import CheckpointError
from kernel_registry.ops.indexer.wk_weights_proj import cases, oracle

CALLS = [(layer(511, 37, 11), 5, "exact", {}), (layer(511, 37, 11), 5, "strided", {}),
         (layer(640, 32, 16), 33, "random", dict(splits=3, block_k=128)), (layer(256, 32, 16), 17, "transposed", {})]


def numerics(module, device="cpu") -> str:
    """Of a module with `fused`, or with `separate`, which serves nvfp4 too."""
    reference = hasattr(module, "separate")
    factory = module.separate if reference else module.fused
    calls = [*CALLS, (layer(256, 32, 16, wk_format="nvfp4"), 6, "random", {})] if reference else CALLS
    counters = []
    if hasattr(module, "Arrivals"):
        take = module.Arrivals.take
        module.Arrivals.take = lambda *a: counters.append(take(*a)) or counters[-1]
    for seed, (traits, tokens, flavour, options) in enumerate(calls):
        args, kwargs = cases.inputs(traits, tokens, seed=seed, device=device, flavour=flavour)
        results = factory(**traits, **options)(*args, **kwargs)
        verdict = oracle.check(traits, args, kwargs, results)
        if not verdict.passed:
            return f"{flavour}: {verdict.detail}"
        if not reference and results[0].untyped_storage().data_ptr() != results[1].untyped_storage().data_ptr():
            return "the results are no views of one tensor"
        if any(count.any() for count in counters):
            return "the counters are not zero after the launch"
    return ""


class Loading:
    """A model of two layers made of a package's own modules, and its loader."""

    def __init__(self, package, **traits):
        traits = layer(**SIZES, **traits)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"indexer": nn.ModuleDict({"wk_weights_proj": package.module.projection(None, **traits)})})
            for _ in range(2))
        self.loader = package.loader.Loader(self.model)

    def weight(self, number):
        return self.model.layers[number]["indexer"]["wk_weights_proj"].weight

    def refuses(self, weights, told) -> bool:
        """Whether it does, and leaves the weights as they were."""
        before = [self.weight(number).detach().clone() for number in range(2)]
        try:
            self.loader.load_weights(weights)
        except CheckpointError as error:
            return told in str(error) and all(same(self.weight(n), before[n]) for n in range(2))
        return False

    def missing(self) -> str:
        try:
            self.loader.check()
        except CheckpointError as error:
            return str(error)
        return ""


def tensors(number: int, wk_format: str, scale_dtype=torch.float32):
    """(a layer's tensors by name, the fused weight)."""
    stored, scale, wk = quantised(SIZES["head_dim"], SIZES["hidden_size"], wk_format, number, scale_dtype=scale_dtype)
    heads = torch.randn(SIZES["num_heads"], SIZES["hidden_size"]).bfloat16()
    name = f"layers.{number}.indexer"
    return {f"{name}.wk.weight": stored, f"{name}.wk.weight_scale_inv": scale,
            f"{name}.weights_proj.weight": heads}, torch.cat([wk, heads])


def loading(package) -> str:
    """Of a package with `module` and `loader`."""
    for wk_format, dtype in (("fp8_block", torch.float32), ("fp8_channel", torch.float32), ("mxfp8", torch.uint8)):
        made, both, expected = Loading(package, wk_format=wk_format), {}, []
        for number in (1, 0):
            some, fused = tensors(number, wk_format, dtype)
            both, expected = {**both, **some}, [fused, *expected]
        both["layers.0.indexer.wkv.weight"] = both["layers.2.indexer.wk.weight"] = torch.ones(2)
        for name, tensor in reversed(both.items()):  # a reader with one buffer for them all
            buffer = tensor.clone()
            made.loader.load_weights([(name, buffer)])
            buffer.view(torch.uint8).zero_()
        if made.missing() or not all(same(made.weight(number), expected[number]) for number in range(2)):
            return f"{wk_format} is loaded as something else"
    first, weight = (dict(list(both.items())[3:6]), "layers.0.indexer.wk.weight")
    if not made.refuses([(weight, first[weight])], "comes twice"):
        return "a tensor comes twice"
    made = Loading(package, wk_format=wk_format)
    if not made.refuses([*first.items(), ("layers.1.indexer.wk.weight", torch.ones(3))], "expected [136, 300]"):
        return "a bad tensor behind a good layer"
    heads = "layers.0.indexer.weights_proj.weight"
    if not made.refuses([(heads, torch.full_like(first[heads], float("inf")))], "not finite"):
        return "infinite values"
    if not made.refuses([(heads, first[heads].float() + 2.0**-20)], "values change"):
        return "values that are rounded"
    if "unwritten rows of weight (weights_proj.weight): 136..191" not in made.missing():
        return "nothing is missing when nothing has come"
    made.loader.load_weights([(heads, first[heads])])
    if not made.weight(0).isnan().all():
        return "half a layer is written"
    made.loader.load_weights([(weight, first[weight])])
    if "has come without its scale" not in made.missing():
        return "a weight without its scale"
    if not made.refuses([("layers.0.indexer.wk_weights_proj.weight", torch.ones(192, 300))], "has rows that came as"):
        return "both forms of a layer"
    empty_like = torch.empty_like
    try:  # as memory is that held another model's weights
        torch.empty_like = lambda *args, **kwargs: empty_like(*args, **kwargs).zero_()
        made.model.to("meta").to_empty(device="cpu")
    finally:
        torch.empty_like = empty_like
    return "" if made.weight(0).isnan().all() else "memory of to_empty"
