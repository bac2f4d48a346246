"""Every error the engine raises, in one place.

A message says where (file and line, when there is one), what was expected, and what to do about it. All derive from
`RegistryError`, so a serving engine can catch the lot; the ones that are also `ValueError` or `RuntimeError` say so.
"""

from __future__ import annotations

from typing import Iterable, Mapping, Sequence


class RegistryError(Exception):
    """Base of all. `where` is "file:line" or a description of the call; `hint` is what to do next."""

    def __init__(self, message: str, *, where: object = None, hint: str = ""):
        self.message, self.where, self.hint = message, where, hint
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text}\n  hint: {hint}" if hint else text)


class DocumentError(RegistryError, ValueError):
    """A file that can't be read, is not YAML, or does not have the shape of a registry or override file."""


class UnknownNameError(RegistryError, ValueError):
    """An op, trait, implementation, platform or key that nothing declares."""


class TraitError(RegistryError, ValueError):
    """A trait that is missing, has a value of the wrong type, or contradicts another."""


class AmbiguityError(RegistryError):
    """Two implementations, or two override rules, would serve the same call and nothing says which goes first."""


class OverrideError(RegistryError):
    """An override that matches nothing, can't serve what it matches, or is used by nothing at freeze."""


class NoImplementationError(RegistryError, LookupError):
    """No implementation serves these traits; the message carries every reason."""


class TargetError(RegistryError, ImportError):
    """A `module:attribute` that can't be imported, with the original error."""


class CaptureError(RegistryError, RuntimeError):
    """A dispatch was not resolved before CUDA-graph capture began."""


class PlanError(RegistryError):
    """A plan that can't be written, does not fit this registry, or is not batch invariant where that was asked."""


class RankError(PlanError):
    """Ranks that would run different kernels, or that failed where others wait for them. `differences` has, by rank,
    what it has otherwise than most others, or what was wrong."""

    def __init__(self, message: str, *, differences: Mapping[int, Sequence[str]], **more):
        super().__init__(message, **more)
        self.differences = differences


class InputError(RegistryError, ValueError):
    """Tensors that contradict the traits a kernel was dispatched for: rank, shape, dtype, device, presence."""


class PreparationError(RegistryError, ValueError):
    """What a kernel takes prepared is not, or is prepared for another; or a preparation that would do harm."""


class CheckpointError(RegistryError, ValueError):
    """A checkpoint's tensor that can't be what its name says, or tensors that are missing when loading ends."""


def suggestion(name: object, known: Iterable[object]) -> str:
    """A hint for a misspelt `name`: the closest of `known`, or all of them when nothing is close."""
    from difflib import get_close_matches

    names = sorted(str(k) for k in known)
    close = get_close_matches(str(name), names, n=2, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"known: {shown}" if names else "none is registered"
