"""kernel_registry.nn: a layer module from a model's config is the three ops, whatever its formats, compiled or not."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from kernel_registry import moe_layer, registry  # noqa: E402
from kernel_registry.errors import InputError, TraitError  # noqa: E402
from kernel_registry.layer import LayerTraits, read_layer  # noqa: E402
from kernel_registry.nn import MoE  # noqa: E402
from kernel_registry.ops.moe.experts import cases  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("deepseek-v3", "glm-4.5-air", "minimax-m2", "qwen3-235b-a22b", "mixtral-8x7b", "gpt-oss-20b")
SHARED = ("deepseek-v3", "glm-4.5-air")
TOKENS = 5


def small(name: str) -> LayerTraits:
    """The model's layer with few and small experts."""
    traits = read_layer(name)
    experts = min(traits.routing["num_experts"], 16)
    sizes = dict(hidden_size=128, intermediate_size=128)
    return replace(traits, routing={**traits.routing, "num_experts": experts, "topk": min(traits.routing["topk"], 8)},
                   experts={**traits.experts, **sizes, "num_experts": experts, "topk": min(traits.routing["topk"], 8)})


def filled(traits: LayerTraits, **more) -> tuple[MoE, torch.Tensor]:
    """A module with drawn weights, and hidden states for it."""
    module = MoE(traits, device=DEVICE, **more)
    (hidden, w13, w2, *_), tensors = cases.inputs(dict(traits.experts), TOKENS, seed=0, device=DEVICE)
    drawn = {"w13": w13, "w2": w2, **{name: tensor for name, tensor in tensors.items() if tensor is not None}}
    weights = {f"experts.{name}": drawn[name] for name in module.experts}
    generator = torch.Generator().manual_seed(1)
    for name in set(module.state_dict()) - set(weights):
        shape = module.state_dict()[name].shape
        weights[name] = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 4)
    module.load_state_dict(weights)
    return module, hidden


class Shared(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x.float()).to(x.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_moe_layer_with_its_own_gate(name):
    traits = small(name)
    module, hidden = filled(traits, shared_expert=Shared() if name in SHARED else None)
    kept = dict(module.experts)
    layer = moe_layer(traits, kept.pop("w13"), kept.pop("w2"), correction_bias=module.correction_bias,
                      shared_expert=module.shared_expert, **kept)
    logits = torch.nn.functional.linear(hidden.to(module.gate.dtype), module.gate)
    wanted = layer(hidden, logits)
    assert torch.equal(module(hidden), wanted) and wanted.float().norm() > 0
    assert torch.equal(module(hidden.view(1, TOKENS, -1)), wanted.view(1, TOKENS, -1))
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_shared_output_may_be_passed_and_padding_gets_nothing_routed():
    module, hidden = filled(small("deepseek-v3"))
    shared, tokens = torch.ones_like(hidden), torch.tensor([2], device=DEVICE)
    routed = module(hidden)
    found = module(hidden, shared_output=shared, num_token_non_padded=tokens)
    assert torch.equal(found[2:], shared[2:])
    assert torch.equal(found[:2], (routed[:2].float() + 1).to(hidden.dtype))


def test_the_gates_bias_moves_the_logits():
    module, hidden = filled(small("gpt-oss-20b"), gate_bias=True)
    assert module.gate_bias.abs().min() > 0
    torch.testing.assert_close(module.logits(hidden), hidden @ module.gate.t() + module.gate_bias, rtol=2e-2, atol=2e-2)


def test_halves_of_the_experts_add_up():
    traits = small("qwen3-235b-a22b")
    traits = replace(traits, experts={**traits.experts, "dtype": "float32"}, routing={**traits.routing,
                                                                                    "dtype": "float32"})
    whole, hidden = filled(traits)
    total = torch.zeros_like(hidden)
    for rank in (0, 1):
        table = torch.full((16,), -1, dtype=torch.int32, device=DEVICE)
        table[8 * rank:8 * rank + 8] = torch.arange(8, dtype=torch.int32, device=DEVICE)
        part = MoE(traits, expert_map=table, device=DEVICE)
        assert part.experts["w13"].shape[0] == 8
        own = {name: tensor[8 * rank:8 * rank + 8] if name.startswith("experts.") else tensor
               for name, tensor in whole.state_dict().items()}
        part.load_state_dict(own)
        total += part(hidden)
    torch.testing.assert_close(total, whole(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ("deepseek-v3", "gpt-oss-20b"))
def test_one_graph_that_follows_overrides(name):
    module, hidden = filled(small(name), shared_expert=Shared() if name in SHARED else None)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert torch.equal(compiled(hidden), module(hidden))
    with registry.override("moe.experts", "torch"):
        torch.testing.assert_close(compiled(hidden), module(hidden))
        before = {kernel.name for kernel in registry.kernels if kernel.op == "moe.experts"}
    assert len(graphs) == 1 and "torch" in before


def test_it_tells_what_runs():
    module, _ = filled(small("deepseek-v3"), shared_expert=Shared())
    rows = module.bind()
    assert [row.op for row in rows] == ["moe.topk", "moe.experts", "moe.finalize"]
    assert all(row.implementation for row in rows)
    assert module.explain().splitlines()[0] == "deepseek-v3: one layer"
    assert [row.implementation in line for row, line in zip(rows, module.explain().splitlines()[1:])] == [True] * 3
    with registry.override("moe.topk", "torch"):
        assert "moe.topk -> torch: override" in module.explain()


def test_a_config_object_of_transformers_is_a_config():
    class Config:
        def to_dict(self):
            return dict(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
                        hidden_size=32, moe_intermediate_size=16, hidden_act="silu", dtype="float32",
                        num_hidden_layers=1, decoder_sparse_step=1)

    module = MoE(Config())
    assert module.gate.shape == (8, 32) and module.experts["w13"].shape == (8, 32, 32)
    assert module.experts["w2"].dtype is torch.float32 and module.correction_bias is None


def test_contradictions_are_told():
    traits = small("deepseek-v3")
    with pytest.raises(TraitError, match="expert_map has the shape"):
        MoE(traits, expert_map=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TraitError, match="fused shared expert"):
        MoE(replace(traits, routing={**traits.routing, "topk": 9, "num_fused_shared_experts": 1}))
    with pytest.raises(TraitError, match="expert_map names row 15 of w13, which would have 8"):
        MoE(traits, expert_map=torch.tensor([-1] * 8 + [*range(8, 16)]))


def test_inputs_that_do_not_fit_are_told_before_they_are_cut_into_rows():
    module, hidden = filled(small("qwen3-235b-a22b"))
    with pytest.raises(InputError, match=r"hidden_states is \[2, 256\], expected \[..., 128\]"):
        module(hidden[:4].view(2, 256))  # as many elements as two rows of twice the width
    with pytest.raises(InputError, match=r"shared_output is \[10, 64\], expected \[..., 128\]"):
        module(hidden, shared_output=hidden.view(2 * TOKENS, 64))
    with pytest.raises(InputError, match=r"hidden_states is torch.float32, expected torch.bfloat16\n.*cast it"):
        module(hidden.float())
    module.to(torch.float16)
    assert module(hidden.half()).dtype is module.dtype is torch.float16 and "dtype=torch.float16" in str(module)


def test_a_map_of_experts_outlives_empty_weights():
    """As large models are loaded: made without memory, given some, and filled. Nothing would fill the map."""
    table = torch.tensor([-1] * 8 + [*range(8)], dtype=torch.int32)
    module = MoE(small("qwen3-235b-a22b"), expert_map=table, device="meta")
    assert module.expert_map.is_meta
    outer = torch.nn.Sequential(module).to_empty(device=DEVICE)
    assert module.expert_map.device == module.gate.device and torch.equal(module.expert_map.cpu(), table)
    assert "expert_map" not in "".join(outer.state_dict())
    module.expert_map = table.flip(0).to(DEVICE)  # an engine has moved experts since
    assert torch.equal(outer.half().to_empty(device=DEVICE)[0].expert_map.cpu(), table.flip(0))
