"""Launch parameters: what is chosen and tried fits the kernels, for every format, size and platform that is served."""

from __future__ import annotations

import pytest
from experts_support import FORMATS, layer

from kernel_registry.ops.moe.experts import tiles
from kernel_registry.traits.platform import Platform

PLATFORMS = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
TOKENS = (1, 8, 33, 100, 300, 1000, 5000)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_choice_fits(format, platform):
    groups = (32, 64, 128) if format in ("fp8_block", "int4") else (128,)
    for group in groups:
        traits = {**layer(16, 4, 512, 384, format, group_size=group), "platform": Platform.parse(platform)}
        for tokens in TOKENS:
            chosen, *tried = tiles.candidates(traits, tokens)
            assert chosen == tiles.default(traits, tokens)
            for tile in (chosen, *tried):
                assert tile.keys() == {"BLOCK_M", "up", "down"} and tile["up"].keys() == tile["down"].keys()
                for product in (tile["up"], tile["down"]):
                    assert product["TAIL_M"] < tile["BLOCK_M"]
                    if format in ("fp8_block", "int4"):
                        assert group % product["BLOCK_K"] == 0, "a step along K has one scale"
                if format == "fp8_block":
                    assert tile["up"]["BLOCK_N"] * tile["up"]["PASSES"] == group, "what is quantised together"


def test_tried_tiles_differ():
    traits = {**layer(128, 8, 2048, 768), "platform": Platform.parse("sm_90")}
    for tokens in TOKENS:
        tried = tiles.candidates(traits, tokens)
        assert len(tried) > 8 and all(a != b for i, a in enumerate(tried) for b in tried[:i])
