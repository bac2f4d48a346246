"""What verify, bench and run share: an op's inputs and judge, where an implementation can run, and running one call.

The contract names both. `cases` is a module with `inputs(traits, num_tokens, *, seed, device, flavour)`, which returns
(args, kwargs), FLAVOURS (names of kinds of values, the first being plain random ones) and WORKLOADS (name -> traits).
Where rows of a call never mix it also has `prefix(args, kwargs, outputs, n)`: all three for its first n rows alone.
Where real sizes are more than a CPU can make and multiply it has `reduced(traits)`: the traits of a small call that is
as difficult. What is run on a CPU is that.
`oracle` is a function `check(traits, args, kwargs, outputs)` whose verdict has passed (None for an input that it can't
judge), rows, undecided, detail, and max_weight_error where it has one.
"""

from __future__ import annotations

import importlib
import struct
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Mapping

from . import targets
from .bound import BoundKernel
from .catalog import Implementation, Op
from .errors import RegistryError, TargetError
from .preparation import prepared_call
from .traits.platform import Platform


@dataclass(frozen=True)
class Harness:
    """`inputs`, `flavours`, `workloads`, `check`, `prefix` and `reduced`, None where there is none, of one op."""

    op: Op
    inputs: Callable
    flavours: tuple[str, ...]
    workloads: Mapping[str, Mapping[str, object]]
    check: Callable
    prefix: Callable | None
    reduced: Callable | None = None

    def affordable(self, traits: Mapping[str, object], device: str) -> dict[str, object]:
        """`traits` as they are run on `device`: on a CPU at reduced sizes, where the op has such."""
        return dict(self.reduced(traits) if self.reduced and device == "cpu" else traits)

    def judge(self, kernel: Callable, traits: Mapping[str, object], *, tokens: int, seed: int, flavour: str,
              device: str, arguments: Mapping[str, object] | None = None):
        """Runs one call on fresh inputs; (verdict, call). `arguments` replace keyword arguments of the inputs."""
        call = self.call(kernel, traits, tokens, seed, flavour, device, arguments)
        with quiet():
            return self.check(dict(traits), *call), call

    def call(self, kernel: Callable, traits: Mapping[str, object], tokens: int, seed: int, flavour: str, device: str,
             arguments: Mapping[str, object] | None = None) -> tuple:
        """One call on fresh inputs, as (args, kwargs, outputs). What the kernel takes prepared is made of a second set
        of the same inputs: a preparation may change what it is given, and the judge sees what that was."""
        def fresh():
            args, kwargs = self.inputs(dict(traits), tokens, seed=seed, device=device, flavour=flavour)
            return args, {**kwargs, **(arguments or {})}

        with quiet():
            args, kwargs = fresh()
            if self.op.contract.prepared and isinstance(kernel, BoundKernel):
                given = prepared_call(self.op, kernel.table.winners(), kernel.request, *fresh())
                return args, kwargs, kernel(*given[0], **given[1])
            return args, kwargs, kernel(*args, **kwargs)


@contextmanager
def quiet():
    """Without what an array library warns of when it meets infinities."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about infinities put there on purpose
        yield


def harness(op: Op) -> Harness:
    """The harness of `op`. Raises TargetError when its contract names no cases or oracle, or one can't be imported."""
    contract = op.contract
    if not contract.cases or not contract.oracle:
        raise TargetError("the contract names no " + ("cases" if not contract.cases else "oracle"), where=op.name,
                          hint="without inputs and a judge nothing can be verified, benchmarked or run")
    try:
        cases = importlib.import_module(contract.cases)
    except Exception as error:  # an import can fail in any way
        lacks_torch = isinstance(error, ModuleNotFoundError) and error.name in ("torch", "triton")
        raise TargetError(f"cases {contract.cases!r} can't be imported: {type(error).__name__}: {error}", where=op.name,
                          hint="running kernels needs torch: pip install 'kernel-registry[kernels]'" if lacks_torch else
                          f"try `python -c 'import {contract.cases}'`") from error
    return Harness(op, cases.inputs, tuple(cases.FLAVOURS), dict(cases.WORKLOADS),
                   targets.load(contract.oracle, op.name), getattr(cases, "prefix", None),
                   getattr(cases, "reduced", None))


def call_traits(op: Op, traits: Mapping[str, object], tokens: int) -> dict[str, object]:
    """`traits` of one call of `tokens` rows, with no dynamic trait left open, so that the choice has one name."""
    closed = {name: op.space.traits[name].default for name in op.space.dynamic if name not in traits}
    return {**closed, **traits, **({"num_tokens": tokens} if "num_tokens" in op.space.traits else {})}


def home(here: Platform, implementation: Implementation) -> Platform | None:
    """The platform on which this machine can run `implementation`: `here`, else its CPU, else None."""
    patterns = implementation.box.sets.get("platform")
    for platform in dict.fromkeys((here, Platform("cpu"))):
        if patterns is None or patterns.admits(platform):
            return platform
    return None


def why_not_here(here: Platform, implementation: Implementation) -> str:
    """The reason for which `home` is None, in words."""
    patterns = implementation.box.sets["platform"]
    hint = "; TRITON_INTERPRET=1 would run it on the CPU" if patterns.admits(Platform("interpreter")) else ""
    return f"serves {patterns}, this machine is {here}{hint}"


def device_of(platform: Platform) -> str:
    """torch's name of the device."""
    return "cuda" if platform.kind in ("cuda", "hip") else "cpu"


def judges_itself(op: Op, implementation: Implementation) -> str:
    """Why comparing `implementation` with the op's oracle would compare a thing with itself; "" when it would not.

    Looks at the two targets, at the objects behind them (a re-export is the same object) and at what either module
    imports from the other: an oracle that calls the kernel, or a kernel that calls the oracle, proves nothing.
    """
    oracle, target = op.contract.oracle, implementation.target
    judge, kernel = targets.load(oracle, op.name), targets.load(target, implementation.where)
    judge_module, kernel_module = (getattr(o, "__module__", None) or text.partition(":")[0]
                                   for o, text in ((judge, oracle), (kernel, target)))
    if judge is kernel or judge_module == kernel_module:
        return f"the oracle {oracle} and the target {target} are the same code"
    for borrower, lender in ((judge_module, kernel_module), (kernel_module, judge_module)):
        for name, value in vars(sys.modules.get(borrower, object)).items():
            if value is sys.modules.get(lender) or (callable(value) and getattr(value, "__module__", None) == lender):
                return f"{borrower} uses {name} of {lender}: the judge and the judged share code"
    return ""


def bits(value: object) -> object:
    """`value` in a form that is equal exactly when every bit is: -0.0 differs from 0.0, a NaN equals the same NaN."""
    if isinstance(value, (tuple, list)):
        return tuple(map(bits, value))
    if isinstance(value, float):
        return struct.pack("<d", value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), bytes(flat.view(torch.uint8).tolist())
    return value


def told(error: BaseException) -> str:
    """An error in one line: its type, unless it is the registry's own, and its first line."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, RegistryError) else f"{type(error).__name__}: {first}"
