"""The small expression language of `relations:` and derived traits: parsed, never evaluated as Python.

    num_experts % num_expert_group == 0
    topk <= topk_group * experts_per_group

Names are traits; the rest is integers, text, true/false, + - * // % min() max(), comparisons, and/or/not, parentheses.
Python's own parser reads the text into a syntax tree; only the nodes listed here become an `Expression`, anything else
is refused when the file is loaded. A division by zero makes a relation false and a derived trait an error.
"""

from __future__ import annotations

import ast
import operator
from typing import Callable, Mapping

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
           ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
_COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
            ast.Gt: operator.gt, ast.GtE: operator.ge}
_CALLS = {"min": min, "max": max}
_WORDS = {"true": True, "false": False}
_MAX_LENGTH = 500  # a relation is a line; a longer one is a program


class ExpressionError(ValueError):
    """The text is not an expression of this language; the message says which part."""


class Expression:
    """A parsed expression: `text`, the `names` of the traits it reads, and a call on a mapping of traits."""

    __slots__ = ("text", "names", "_evaluate")

    def __init__(self, text: str):
        if not isinstance(text, str) or len(text) > _MAX_LENGTH:
            raise ExpressionError(f"expected one line of text such as 'topk <= 32', got {text!r:.60}")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ExpressionError(f"{text!r} is not an expression: {error}") from None
        names: set[str] = set()
        self.text, self._evaluate = text, _compile(tree.body, names)
        self.names = frozenset(names)

    def __call__(self, traits: Mapping[str, object]):
        return self._evaluate(traits)

    def holds(self, traits: Mapping[str, object]) -> bool:
        """Whether the relation is true; arithmetic without a result (x % 0) is not."""
        try:
            return bool(self._evaluate(traits))
        except (ZeroDivisionError, TypeError):
            return False

    def __eq__(self, other):
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self):
        return hash(self.text)

    def __repr__(self):
        return f"Expression({self.text!r})"


def _compile(node: ast.AST, names: set[str]) -> Callable[[Mapping[str, object]], object]:
    match node:
        case ast.Constant(value=bool() | int() | str() as value):
            return lambda traits: value
        case ast.Name(id=name):
            if name in _WORDS:
                value = _WORDS[name]
                return lambda traits: value
            names.add(name)
            return lambda traits: traits[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            do, a, b = _BINARY[type(op)], _compile(left, names), _compile(right, names)
            return lambda traits: _arithmetic(do, a(traits), b(traits))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            a = _compile(operand, names)
            return lambda traits: -a(traits)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            a = _compile(operand, names)
            return lambda traits: not a(traits)
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(value, names) for value in values]
            test = all if isinstance(op, ast.And) else any
            return lambda traits: test(part(traits) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARE for op in ops):
            steps = [_COMPARE[type(op)] for op in ops]
            terms = [_compile(term, names) for term in (left, *right)]

            def compare(traits):
                values = [term(traits) for term in terms]
                return all(step(a, b) for step, a, b in zip(steps, values, values[1:]))
            return compare
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS and len(args) >= 2:
            do, parts = _CALLS[name], [_compile(arg, names) for arg in args]
            return lambda traits: do(*(part(traits) for part in parts))
    raise ExpressionError(f"{ast.unparse(node)!r} is not allowed here: use traits, integers, text, + - * // %, "
                          "min, max, comparisons, and, or, not")


def _arithmetic(do, a, b):
    # Text times a number is legal Python and a way to exhaust memory; traits are numbers or words, so refuse it.
    if not isinstance(a, int) or not isinstance(b, int):
        raise TypeError("arithmetic needs integers")
    return do(a, b)
