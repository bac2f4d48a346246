"""Every form that a tile of the grouped kernels can have, also those that nothing chooses on this machine."""

from __future__ import annotations

import pytest
import torch
from experts_support import judged, layer, named

from kernel_registry import registry
from kernel_registry.ops.moe.experts import cases, tiles

pytest.importorskip("triton")
from kernel_registry.ops.moe.experts import triton_grouped  # noqa: E402

FORMS = {
    "plain": {},
    "weights as rows": dict(swap=True),
    "both halves in one": dict(merged=True),
    "both halves in one, as rows": dict(swap=True, merged=True),
    "two passes": dict(passes=2),
    "two passes, both halves in one": dict(passes=2, merged=True),
    "a smaller tile for the rest": dict(tail=16),
    "four blocks together": dict(group_m=4),
}
LAYERS = (layer(3, 2, 144, 96), layer(3, 2, 96, 96, "fp8_block", group_size=32, activation="swigluoai"),
          layer(3, 2, 144, 80, "fp8_block", group_size=32, has_bias=True), layer(3, 2, 96, 64, "fp8_channel"),
          layer(3, 2, 80, 48, "int8_static"), layer(3, 2, 96, 48, "int8_w8a16", activation="swigluoai"),
          layer(3, 2, 96, 80, "int4", group_size=32))


def formed(traits, tokens, *, passes=1, tail=0, **form):
    """A grouped kernel whose two products have this form, with tiles far smaller than the layer."""
    stepped = traits["weight_quant"] in ("fp8_block", "int4_w4a16")
    step = traits["group_size"] if stepped else 32
    chosen = {"BLOCK_M": 32 if tail else 16,
              "up": tiles.tile(32 // passes, step, 4, 1, passes=passes, tail=tail, **form),
              "down": tiles.tile(64, step, 4, 1, tail=tail, **{**form, "merged": False})}
    return triton_grouped.experts(**traits, platform=registry.platform(), tiles=lambda num_tokens: chosen)


SERVED = [(traits, form) for traits in LAYERS for form in FORMS
          if traits["weight_quant"] == "fp8_block" or "passes" not in FORMS[form]]  # only groups are made in passes


@pytest.mark.parametrize("descriptor", [True, False], ids=["described", "addressed"])
@pytest.mark.parametrize("traits,form", SERVED, ids=[f"{named(traits)}-{form}" for traits, form in SERVED])
def test_forms(traits, form, descriptor, device):
    judged("triton_grouped", traits, 33, device=device, flavour="skewed",
           made=formed(traits, 33, **FORMS[form], descriptor=descriptor))


@pytest.mark.skipif(not triton_grouped.INTERPRETED, reason="a GPU's addresses are not seen")
@pytest.mark.parametrize("form", [form for form in FORMS if "passes" in form])
def test_a_pass_past_the_last_row_reads_no_weights(form, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    traits = layer(2, 2, 64, 48, "fp8_block", group_size=32)
    (hidden, w13, *others), kwargs = cases.inputs(traits, 5)
    buffer = torch.zeros(2 * w13.numel(), dtype=w13.dtype)
    inside = buffer[:w13.numel()].view(w13.shape).copy_(w13)
    first, end = (buffer.data_ptr() + at for at in (w13.numel(), buffer.numel()))
    original, reads = InterpreterBuilder.create_masked_load, []

    def watched(self, at, mask, *rest, **more):
        reads.append(bool(((at.data >= first) & (at.data < end) & mask.data).any()))
        return original(self, at, mask, *rest, **more)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    formed(traits, 5, **FORMS[form], descriptor=False)(hidden, inside, *others, **kwargs)
    assert reads and not any(reads)


@pytest.mark.parametrize("traits,tokens,flavour", [
    (layer(5, 4, 80, 16, expert_parallel=True), 1027, "padded"),  # more routes than one launch aligns
    (layer(9, 2, 144, 16), 512, "random"),  # rows wait for their sum in 16 bits
    (layer(9, 2, 144, 16, dtype="float16"), 512, "random")], ids=["aligned in two", "halved", "float16"])
def test_many_tokens(traits, tokens, flavour, device):
    made = triton_grouped.experts(**traits, platform=registry.platform())
    judged("triton_grouped", traits, tokens, device=device, flavour=flavour, made=made)
