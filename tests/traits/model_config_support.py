"""Configs made from shipped ones, and the refusal of one."""

import pytest

from kernel_registry.traits.model_config import ConfigError, load_config, routing


def shipped(name, **changes):
    """A shipped config with fields replaced; ... deletes one. A nested model's fields are those of its text_config."""
    data = dict(load_config(name).data)
    inner = dict(data["text_config"]) if "text_config" in data else data
    for field, value in changes.items():
        if value is ...:
            inner.pop(field)
        else:
            inner[field] = value
    return data if inner is data else {**data, "text_config": inner}


def refused(config, *words):
    with pytest.raises(ConfigError) as caught:
        routing(config)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)
