"""What an implementation wants done once, at load, and how a kernel knows that it was done.

An implementation that declares `prepare: module:function` takes some of its arguments, those that the contract names in
`prepared`, only as that function leaves them. The function gets what the caller has (a module, a tensor, a mapping),
the traits that it names as keywords, and the caller's own keywords; it returns tensors or modules, one or a tuple, list
or mapping of them, or a `contract.Prepared` with a report beside them. Each is given a tag, and so are a module's own
parameters, which are what its kernel is given. A kernel compares the tag with what it was bound for and raises
PreparationError where it is another, or none: no kernel prepares in a forward pass.

A tag is an attribute of the object. It stays with a parameter through `module.to(device)`, and is gone from what
takes the parameter's place: a copy, what was saved, `load_state_dict(assign=True)`. A tensor whose dtype or shape is
not the one it was prepared with counts as not prepared. Values have no part in it: who writes raw ones into what was
prepared from such has to prepare again.

torch.compile sees the tag as a constant that it guards: a graph is traced once, and again for another tag.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable, Iterable, Mapping

from . import targets
from .contract import CAPTURED, Contract, Prepared, Request
from .errors import CaptureError, PreparationError, TargetError, UnknownNameError, suggestion
from .traits.trait import written

if TYPE_CHECKING:
    from .catalog import Implementation, Op

TAG = "_kernel_registry_preparation"


@dataclass(frozen=True)
class Preparation:
    """The tag of what was prepared: by which function, for which op, implementation and traits (those that the function
    names). `form` is the dtype and shape that a tensor has since; `report` is what the function tells of it."""

    op: str
    implementation: str
    prepare: str
    traits: Mapping[str, object]
    form: tuple = field(default=(None, None), compare=False)
    report: object = field(default=None, compare=False)

    def __str__(self):
        shown = ", ".join(f"{name}={written(value)}" for name, value in self.traits.items())
        return f"{self.op}'s {self.implementation} ({shown})"

    def __reduce__(self):
        """A deep copy and what is saved are not prepared: in the tag's place they have an empty OrderedDict, which
        torch.load takes without trusting the file."""
        return OrderedDict, ()

    def serves(self, other: "Preparation") -> bool:
        """Whether a kernel that wants `other` takes what has this tag: one function and the same traits give the same,
        whichever of its implementations asked for it."""
        return (self.op, self.prepare, self.traits) == (other.op, other.prepare, other.traits)


def preparation_of(made: object) -> Preparation | None:
    """The tag of a tensor or module that `registry.prepare` returned; None for any other, and for a tensor whose dtype
    or shape has changed since."""
    tag = getattr(made, TAG, None)
    return tag if isinstance(tag, Preparation) and tag.form == _form(made) else None


def choose(op: "Op", names: Iterable[str], request: Request) -> "Implementation | None":
    """Of the implementations that can run, one that stands for what all of them take; None where nothing is to be done.
    Raises PreparationError where they take different things, since a caller has one to give."""
    found: dict[str, Implementation] = {}
    for name in names:
        found.setdefault(op.by_name[name].prepare, op.by_name[name])
    if len(found) > 1:
        told = "; ".join(f"{i.name} takes {f'what {target} makes' if target else 'it as it is'}"
                         for target, i in found.items())
        raise PreparationError(f"{request} runs kernels that take different preparations: {told}",
                               hint="name the dynamic traits, or override to one of them")
    return next((i for target, i in found.items() if target), None)


def prepare(op: "Op", names: Iterable[str], request: Request, subject: object, keywords: Mapping[str, object]):
    """`subject` as the implementations that can run take it, tagged; as it is where they declare no preparation."""
    names = tuple(names)
    implementation = choose(op, names, request)
    if implementation is None:
        if keywords:
            first = next(iter(keywords))
            raise UnknownNameError(f"{first!r} is no trait of {op.name}, and {', '.join(names)} takes no preparation "
                                   "that could name it", hint=suggestion(first, op.space.all))
        return subject
    refuse_capture(request)
    function, traits, own = _function(implementation, request)
    strange = [name for name in keywords if name not in own]
    if strange:
        raise UnknownNameError(f"{strange[0]!r} is no trait of {op.name} and no keyword of {implementation.prepare}",
                               hint=suggestion(strange[0], {*op.space.all, *own}))
    made = function(subject, **traits, **keywords)
    made, report = made if isinstance(made, Prepared) else (made, None)
    tag = Preparation(op.name, implementation.name, implementation.prepare, traits, report=report)
    tagged = [*_leaves(made)]
    if not tagged:  # nothing that could carry a tag, so nothing that a kernel would take
        raise TargetError(f"{implementation.prepare} returned {type(made).__name__}, nothing that can be tagged",
                          where=implementation.where, hint="a preparation returns tensors or modules")
    for leaf in tagged:
        setattr(leaf, TAG, replace(tag, form=_form(leaf)))
    return made


def prepared_call(op: "Op", names: Iterable[str], request: Request, args: tuple, kwargs: Mapping[str, object]):
    """(args, kwargs) of a call with those arguments prepared that the contract says."""
    names, kwargs = tuple(names), dict(kwargs)
    if choose(op, names, request) is None:
        return args, kwargs
    args = list(args)
    for position, name in _places(op.contract):
        if position is not None and position < len(args):
            args[position] = prepare(op, names, request, args[position], {})
        elif kwargs.get(name) is not None:
            kwargs[name] = prepare(op, names, request, kwargs[name], {})
    return tuple(args), kwargs


def checking(kernel: Callable, implementation: "Implementation", request: Request, contract: type[Contract]
             ) -> Callable:
    """`kernel`, behind a look at the tags of its prepared arguments."""
    _, traits, _ = _function(implementation, request)
    wanted = Preparation(implementation.op, implementation.name, implementation.prepare, traits)
    places = _places(contract)

    def check(*args, **kwargs):
        for position, name in places:
            value = args[position] if position is not None and position < len(args) else kwargs.get(name)
            if value is None:
                continue  # whether it may be absent is the kernel's business
            tag = preparation_of(value)
            if tag is None or not tag.serves(wanted):
                raise _wrong(name, value, tag, wanted)
            if capturing():
                setattr(value, CAPTURED, True)  # from now on a preparation that would move it is refused
        return kernel(*args, **kwargs)
    return check


def capturing() -> bool:
    """Whether a CUDA graph is being captured; cheap enough to be asked in every call."""
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():  # which can't trace the question, and captures later
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: object) -> None:
    """Preparation replaces storage, which a graph that is being captured would keep the address of."""
    if capturing():
        raise CaptureError(f"{what} was to be prepared while a CUDA graph is captured",
                           hint="prepare at load, before the capture begins")


def _wrong(name: str, value: object, tag: Preparation | None, wanted: Preparation) -> PreparationError:
    stale = getattr(value, TAG, None) if tag is None else None
    if tag is not None:
        problem = f"is prepared for {tag}"
    elif isinstance(stale, Preparation):
        problem = f"was prepared as {_said(stale.form)} and is {_said(_form(value))} now"
    else:
        problem = "is not prepared"
    traits = "".join(f", {trait}={written(item)!r}" if isinstance(item, str) else f", {trait}={item!r}"
                     for trait, item in wanted.traits.items())
    return PreparationError(f"{name} {problem}, expected what registry.prepare makes for {wanted}", where=wanted.op,
                            hint=f"registry.prepare({wanted.op!r}, ...{traits}) at load, and pass what it returns")


def _said(form: tuple) -> str:
    dtype, shape = form
    return f"{[*shape]} {str(dtype).removeprefix('torch.')}" if shape is not None else "no tensor"


def _function(implementation: "Implementation", request: Request) -> tuple[Callable, dict[str, object], set[str]]:
    """(the function, the traits it is given, the further keywords it takes)."""
    function = targets.load(implementation.prepare, implementation.where)
    static = {name: value for name, value in request.traits.items() if name not in request.open}
    try:
        first, *parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TargetError(f"{implementation.prepare} is no function of what is to be prepared",
                          where=implementation.where, hint="def prepare(subject, *, trait, ...)") from error
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TargetError(f"{implementation.prepare} takes `**{parameters[-1].name}`, so that nothing says which "
                          "traits it prepares for", where=implementation.where, hint="name each trait as a keyword")
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if late := sorted(named & {*request.open}):
        raise TargetError(f"{implementation.prepare} names {', '.join(late)}, which is read off each call",
                          where=implementation.where, hint="what is done once, at load, can't depend on it")
    return function, {name: value for name, value in static.items() if name in named}, named - {*request.traits}


def _places(contract: type[Contract]) -> list[tuple[int | None, str]]:
    """Position, if it has one, and name of each prepared argument."""
    parameters = inspect.signature(contract.signature).parameters
    order = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    return [(order.index(name) if name in order else None, name) for name in contract.prepared]


def _leaves(made: object) -> Iterable[object]:
    """The tensors and modules in what a preparation made, and the modules' own parameters."""
    if isinstance(made, Mapping):
        made = list(made.values())
    if isinstance(made, (list, tuple)):
        for item in made:
            yield from _leaves(item)
        return
    if hasattr(made, "__dict__"):
        yield made
    if hasattr(made, "named_parameters"):
        yield from (parameter for _, parameter in made.named_parameters(recurse=False))


def _form(made: object) -> tuple:
    """Of a tensor; a module has none."""
    return getattr(made, "dtype", None), getattr(made, "shape", None)
