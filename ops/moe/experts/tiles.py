"""Launch parameters of the grouped kernels: what is chosen for a shape that nobody has tuned, and what `tune` tries.

A choice is {"BLOCK_M": rows of a block, "up": {...}, "down": {...}}, the keywords of grouped.py's kernels and of their
launch. On Hopper they follow what was measured there (docs/benchmarks.md): a tile of 16 rows with the weights as the
wide side while an expert has few rows, wide tiles fed by the tensor memory accelerator when it has many. Elsewhere they
are small enough for any GPU that is served.
"""

from __future__ import annotations

from typing import Mapping

HALF_ROWS = 512  # tokens from which on rows wait for their sum in 16 bits: before, their bytes are few


def tile(block_n: int, block_k: int, num_warps: int, num_stages: int, *, swap=False, merged=False, tail=0, passes=1,
         group_m=1, descriptor=True, persistent=False) -> dict[str, object]:
    return dict(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages, SWAP=swap, MERGED=merged,
                TAIL_M=tail, PASSES=passes, GROUP_M=group_m, DESCRIPTOR=descriptor, PERSISTENT=persistent)


def halved(traits: Mapping[str, object], num_tokens: int) -> bool:
    """Whether rows wait for their sum in 16 bits: where their bytes count and the result has fewer digits still."""
    return traits["topk"] > 1 and traits["dtype"] == "bfloat16" and num_tokens >= HALF_ROWS


def persistent(traits: Mapping[str, object], product: str) -> dict[str, object] | None:
    """The tile of persistent.py for "up" or "down", where it serves: None where it does not. Its program fills a
    multiprocessor, so there is little to choose."""
    platform, quant = traits.get("platform"), traits["weight_quant"]
    depth = traits["hidden_size" if product == "up" else "intermediate_size"]
    block_k = 128 if quant == "fp8_block" else 64
    if (platform is None or platform.kind != "cuda" or platform.arch != (9, 0) or depth % block_k
            or traits.get("activation") == "swigluoai"):
        return None
    if quant == "fp8_block" and traits["group_size"] == 128 or quant == "none" and product == "down":
        return tile(128, block_k, 4, 4, group_m=8 if product == "down" else 4, persistent=True)
    return None


def default(traits: Mapping[str, object], num_tokens: int, *, aligned=True) -> dict[str, object]:
    """What is launched for these canonical traits and that many tokens. `aligned`: weights begin at a multiple of 16
    bytes, as the tensor memory accelerator wants."""
    rows = num_tokens * traits["topk"] / traits["num_experts"]  # of an expert, on average
    platform, quant, group = traits.get("platform"), traits["weight_quant"], traits["group_size"]
    if platform is not None and platform.kind == "interpreter":  # which takes as long over a small tile as over a large
        step = group if quant in ("fp8_block", "int4_w4a16") else 256
        n_up, n_down = (min(1024, 1 << max(4, (size - 1).bit_length()))
                        for size in (traits["intermediate_size"], traits["hidden_size"]))
        return {"BLOCK_M": 16 if rows <= 16 else 64, "up": tile(group if quant == "fp8_block" else n_up, step, 4, 1),
                "down": tile(n_down, step, 4, 1)}
    if platform is None or platform.kind != "cuda" or platform.arch[0] != 9:
        step = min(64, group) if quant in ("fp8_block", "int4_w4a16") else 64
        columns = group if quant == "fp8_block" else 64
        choice = dict(num_stages=2, descriptor=False)
        return {"BLOCK_M": 16 if rows <= 8 else 64,
                "up": tile(columns, step, 4 if columns <= 64 else 8, **choice),
                "down": tile(64, step, 4, **choice)}
    if quant == "fp8_block":  # a program makes whole groups of the second product's input
        if rows <= 24:
            return {"BLOCK_M": 16 if rows <= 8 else 32,
                    "up": tile(group, group, 4, 4, swap=True, merged=traits["intermediate_size"] >= 1024),
                    "down": tile(128, group, 4, 2, swap=True)}
        up, down = persistent(traits, "up"), persistent(traits, "down")
        if up and down and aligned:
            return {"BLOCK_M": 128, "up": up, "down": down}
        columns = min(64, group)
        return {"BLOCK_M": 64, "up": tile(columns, group, 4, 3, merged=True, group_m=4, passes=group // columns),
                "down": tile(128, group, 4, 3, group_m=4)}
    if quant == "int4_w4a16":
        step = min(64, group)
        return {"BLOCK_M": 16 if rows <= 16 else 64, "up": tile(64, step, 4, 3), "down": tile(64, step, 4, 3)}
    if quant != "none":
        if rows <= 24:
            return {"BLOCK_M": 16 if rows <= 8 else 32, "up": tile(64, 128, 4, 4), "down": tile(64, 128, 4, 4)}
        return {"BLOCK_M": 64, "up": tile(64, 128, 4, 3, group_m=4), "down": tile(128, 128, 4, 3, group_m=4)}
    # An expert's weights that the L2 cache can't hold are read once for many blocks of rows, not once for each.
    large = traits["hidden_size"] * traits["intermediate_size"] > 2 ** 24
    if rows <= 24:
        if large:  # which is why a popular expert's rows, of a skewed routing, are in few blocks too
            return {"BLOCK_M": 32, "up": tile(64, 128, 4, 4, swap=True), "down": tile(64, 128, 4, 4, swap=True)}
        up = tile(32, 128, 4, 4, swap=True, merged=True) if rows <= 8 else tile(64, 64, 4, 5, swap=True)
        return {"BLOCK_M": 16 if rows <= 8 else 32, "up": up, "down": tile(128, 64, 4, 5, swap=True)}
    if rows <= 48:
        return {"BLOCK_M": 64, "up": tile(64, 64, 4, 5, merged=True, group_m=4), "down": tile(128, 64, 4, 5, group_m=4)}
    tail = 64 if rows <= 384 else 0
    # Of short products beginning and end are much; of long ones the wider product of the other kernel is worth more.
    down = persistent(traits, "down") if traits["intermediate_size"] <= 1024 and aligned else None
    return {"BLOCK_M": 128, "up": tile(128, 64, 8, 4, merged=True, tail=tail, group_m=16 if large else 1),
            "down": down or tile(256, 64, 8, 4, tail=64, group_m=16 if large else 8)}


def candidates(traits: Mapping[str, object], num_tokens: int) -> list[dict[str, object]]:
    """What `kernel-registry tune` tries: each change of the default that has been the best of some shape."""
    chosen = default(traits, num_tokens)
    found = [chosen]
    if chosen["up"]["SWAP"]:
        found += [{**chosen, "BLOCK_M": rows} for rows in (16, 32, 64) if rows != chosen["BLOCK_M"]]
    for up, down in _changes(traits, chosen):
        tried = {**chosen, "up": {**chosen["up"], **up}, "down": {**chosen["down"], **down}}
        if tried not in found:
            found.append(tried)
    return found


def _changes(traits: Mapping[str, object], chosen: Mapping[str, object]):
    """Pairs of changes, of the first and of the second product's tile."""
    for group_m in (1, 2, 4, 8, 16):
        if chosen["BLOCK_M"] > 16:
            yield {"GROUP_M": group_m}, {}
            yield {}, {"GROUP_M": group_m}
    other = persistent(traits, "down")
    if chosen["BLOCK_M"] == 128 and other and not chosen["down"]["PERSISTENT"]:
        yield {}, other
    if chosen["down"]["PERSISTENT"]:
        yield {}, {"num_stages": 3}
    else:
        yield from (({}, change) for change in _of_down(chosen))
    if chosen["up"]["PERSISTENT"]:
        yield {"num_stages": 3}, {}
    else:
        yield from ((change, {}) for change in _of_up(traits, chosen))
    if traits["weight_quant"] == "none":
        yield {}, {"BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 4, "PERSISTENT": False}


def _of_down(chosen: Mapping[str, object]):
    yield from ({"num_stages": stages} for stages in (2, 3, 4, 5))
    yield from ({"num_warps": warps} for warps in (4, 8))
    yield from ({"BLOCK_N": columns} for columns in (64, 128, 256))
    if chosen["BLOCK_M"] > 64:
        yield {"TAIL_M": 64 - chosen["down"]["TAIL_M"]}


def _of_up(traits: Mapping[str, object], chosen: Mapping[str, object]):
    yield from ({"num_stages": stages} for stages in (2, 3, 4, 5))
    yield from ({"num_warps": warps} for warps in (4, 8))
    yield {"MERGED": not chosen["up"]["MERGED"]}
    if chosen["BLOCK_M"] > 64:
        yield {"TAIL_M": 64 - chosen["up"]["TAIL_M"]}
    if traits["weight_quant"] == "none":
        yield {"BLOCK_K": 128, "num_stages": 4}
        yield {"BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 5, "MERGED": False}
        yield {"BLOCK_N": 32, "BLOCK_K": 128, "num_stages": 4, "MERGED": True}
    elif traits["weight_quant"] == "fp8_block" and traits["group_size"] == 128:
        yield {"BLOCK_N": 64, "PASSES": 2, "MERGED": True, "num_stages": 6}
        yield {"BLOCK_N": 128, "PASSES": 1, "MERGED": False}
