"""What the tests of transformers share: what a switch could leave behind, and that each test ends switched off.

Importing it reports the importing tests as not run where transformers is not installed.
"""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="not run: transformers is not installed in this environment")

import tiny_models as tiny  # noqa: E402
from kernel_registry.integrations import transformers as adapter  # noqa: E402

MODELS = list(tiny.MODELS)
NEW = 4  # tokens generated


@pytest.fixture(autouse=True)
def switched_off():
    yield
    adapter.disable()
    torch._dynamo.reset()


def generate(model, prompt, **more):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, **more)


@torch.no_grad()
def logits(model, prompt=None):
    return model(tiny.tokens() if prompt is None else prompt).logits


def state(model) -> dict:
    """Everything of a model, of its classes and of the interfaces that a switch could leave behind, by identity."""
    type(model)._can_set_experts_implementation()  # transformers keeps the answer on the class when it first asks
    found = {"model": model.config.to_dict(), "experts": model.get_experts_implementation()}
    for interface in adapter._interfaces():
        found[type(interface).__name__] = {**interface._global_mapping}, {**interface._local_mapping}
    for name, module in model.named_modules():
        found[name] = {key: id(value) for key, value in vars(module).items()}
        for cls in type(module).__mro__:
            found[f"{cls.__module__}.{cls.__qualname__}"] = {k: id(v) for k, v in vars(cls).items() if k != "__doc__"}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = tensor.shape, tensor.stride(), tensor.dtype, tensor.double().sum().item()
    return found
