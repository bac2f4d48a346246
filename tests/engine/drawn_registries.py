"""Registries, calls and override rules for hypothesis to draw, and what becomes of a call."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kernel_registry.errors import AmbiguityError, RegistryError

sizes = st.one_of(
    st.just("any"),
    st.integers(1, 12),
    st.builds(lambda a, b: {"min": min(a, b), "max": max(a, b)}, st.integers(1, 12), st.integers(1, 12)),
    st.builds(lambda a: {"min": a}, st.integers(1, 12)),
    st.builds(lambda a: {"multiple_of": a}, st.integers(2, 4)),
    st.builds(lambda a: {"not": a}, st.integers(1, 12)),
)
tokens = st.one_of(
    st.just("any"),
    st.builds(lambda a: {"max": a}, st.integers(0, 9)),
    st.builds(lambda a: {"min": a}, st.integers(1, 9)),
    st.integers(0, 5),
    st.builds(lambda a, b: {"not": {"min": min(a, b), "max": max(a, b)}}, st.integers(1, 9), st.integers(1, 9)),
)
whens = st.fixed_dictionaries(
    {},
    optional={
        "size": sizes,
        "num_tokens": tokens,
        "scoring": st.sampled_from(["any", "softmax", ["sigmoid", "softmax"], {"not": "sqrt"}]),
        "groups": st.sampled_from(["any", 1, 2, {"min": 2}]),
        "contiguous": st.sampled_from(["any", True, False]),
        "platform": st.sampled_from(["any", ["cuda>=sm_80"], ["sm_90"], ["cpu"], {"not": "cuda"}]),
        "per_group": st.sampled_from(["any", {"max": 6}, {"min": 2, "max": 4}]),
        "relations": st.sampled_from([["size % 2 == 0"], ["size > groups"]]),
    },
)
entries = st.fixed_dictionaries({"when": whens, "rank": st.integers(-1, 3)}, optional={"fallback": st.just(True)})
tables = st.lists(entries, min_size=1, max_size=5).map(lambda every: {f"k{i}": e for i, e in enumerate(every)})
calls = st.fixed_dictionaries(
    {"size": st.integers(1, 12)},
    optional={
        "num_tokens": st.integers(0, 10),
        "scoring": st.sampled_from(["sigmoid", "softmax", "sqrt"]),
        "groups": st.sampled_from([1, 2, 3]),
        "contiguous": st.booleans(),
        "platform": st.sampled_from(["sm_90", "cpu", "gfx942"]),
    },
)

slow = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def loaded(toy, implementations):
    """The registry, or None where the file as drawn is ambiguous."""
    registry = toy.registry(implementations)
    try:
        registry.catalog
        return registry
    except AmbiguityError:
        return None


def outcome(registry, op, **traits):
    try:
        return registry.dispatch(op, **traits).name
    except RegistryError as error:
        return type(error)
