"""The expression language of relations: what it computes, and that it can't do anything else."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_registry.errors import DocumentError
from kernel_registry.expressions import Expression, ExpressionError

TRAITS = {"a": 7, "b": 3, "zero": 0, "flag": True, "word": "sigmoid"}


@pytest.mark.parametrize(
    "text, value",
    [
        ("a", 7),
        ("a + b * 2", 13),
        ("(a + b) * 2", 20),
        ("a - b - 1", 3),
        ("a // b", 2),
        ("a % b", 1),
        ("-a", -7),
        ("min(a, b)", 3),
        ("max(a, b, 99)", 99),
        ("a == 7", True),
        ("a != 7", False),
        ("b < a", True),
        ("b < a < 8", True),
        ("b < a < 7", False),
        ("a >= 7 and b <= 3", True),
        ("a > 7 or b == 3", True),
        ("not flag", False),
        ("flag == true", True),
        ("flag == false", False),
        ("word == 'sigmoid'", True),
        ("word != 'softmax'", True),
        ("-(-a)", 7),
        ("  a == 7  ", True),
    ],
)
def test_values(text, value):
    assert Expression(text)(TRAITS) == value


def test_names_are_the_traits_it_reads():
    assert Expression("min(a, 3) <= b and true").names == {"a", "b"}


ADVERSARIAL = [
    "__import__('os').system('echo hi')",
    "eval('1')",
    "exec('1')",
    "open('/etc/passwd')",
    "print(1)",
    "len(word)",
    "abs(a)",
    "min.__class__",
    "a.__class__",
    "a.b",
    "().__class__.__bases__",
    "word.upper()",
    "word[0]",
    "a[0]",
    "a[:1]",
    "lambda: 1",
    "(lambda: 1)()",
    "[a]",
    "(a, b)",
    "{a}",
    "{a: b}",
    "[x for x in a]",
    "(x for x in a)",
    "{x for x in a}",
    "a if b else zero",
    "(x := 3)",
    "f'{a}'",
    "f'{a!r}'",
    "b'x'",
    "1.5",
    "1j",
    "None",
    "...",
    "a ** b",
    "2 ** 99999999",
    "a / b",
    "a << b",
    "1 << 99999999",
    "a >> 1",
    "a & b",
    "a | b",
    "a ^ b",
    "~a",
    "+a",
    "a @ b",
    "a is b",
    "a is not b",
    "a in b",
    "word in 'sigmoid'",
    "await a",
    "yield",
    "*a",
    "min(*a)",
    "min(a)",
    "min()",
    "min(a, key=b)",
    "max(a, b, default=1)",
    "import os",
    "a = 3",
    "a; b",
    "a == 1\nb == 2",
    "",
    "   ",
    "# nothing",
    "a ==",
    "== a",
    "a b",
    "(",
    ")",
    "a\0b",
    "\ud800",
]


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_anything_else_is_refused_when_it_is_read(text):
    with pytest.raises(ExpressionError):
        Expression(text)


@pytest.mark.parametrize("text", [None, 3, True, ["a"], {"a": 1}, "a + " * 200 + "a"])
def test_one_line_of_text_is_expected(text):
    with pytest.raises(ExpressionError, match="expected one line of text"):
        Expression(text)


@pytest.mark.parametrize(
    "text", ["(" * 249 + "a" + ")" * 249, "-" * 499 + "a", "not " * 124 + "a", "min(a," * 70 + "a" + ")" * 70]
)
def test_deep_nesting_is_read_or_refused_but_never_a_crash(text):
    try:
        Expression(text).holds(TRAITS)
    except ExpressionError:
        pass


@pytest.mark.parametrize(
    "text",
    [
        "a % zero == 0",
        "a // zero == 0",
        "not (a % zero == 0)",
        "word * 9999999999 == word",
        "'x' * 99999 == 'x'",
        "word % 3 == 'x'",
        "word < 3",
        "-word == 1",
        "word + word == 'x'",
        "min(word, 3) == 3",
    ],
)
def test_a_relation_without_a_value_does_not_hold(text):
    assert Expression(text).holds(TRAITS) is False


def test_and_and_or_stop_where_the_answer_is_known():
    assert Expression("zero != 0 and a % zero == 0").holds(TRAITS) is False
    assert Expression("zero == 0 or a % zero == 0").holds(TRAITS) is True


def test_nothing_is_ever_evaluated_by_python(monkeypatch):
    import builtins

    def refuse(*_, **__):
        raise AssertionError("eval, exec or compile to code was called")

    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    real = compile
    monkeypatch.setattr(
        builtins,
        "compile",
        lambda *a, **k: real(*a, **k) if ast.PyCF_ONLY_AST in (*a[3:4], k.get("flags")) else refuse(),
    )
    assert Expression("a % b == 1 and min(a, b) == 3")(TRAITS) is True


terms = st.recursive(
    st.sampled_from(["a", "b", "zero", "1", "2", "13"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
        st.builds("-{}".format, inner),
    ),
    max_leaves=8,
)
conditions = st.recursive(
    st.builds("{} {} {}".format, terms, st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), terms),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(conditions, st.integers(-5, 20), st.integers(-5, 20))
def test_it_means_what_python_means(text, a, b):
    traits = {"a": a, "b": b, "zero": 0}
    try:
        wanted = bool(eval(text, {"min": min, "max": max}, traits))
    except ZeroDivisionError:
        wanted = False
    if len(text) <= 500:
        assert Expression(text).holds(traits) is wanted


# ---- in a registry file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "relation, message",
    [
        ("size <= groups * nonsense", "reads 'nonsense', which is not a trait"),
        ("sise <= 3", "did you mean 'size'"),
        ("num_tokens <= 64", "dynamic trait 'num_tokens'"),
        ("platform == 'sm_90'", "platform"),
        ("__import__('os').system('true')", "is not allowed here"),
        (3, "expected one line of text"),
    ],
)
def test_a_relation_that_can_not_be_read_is_named_with_its_line(toy, relation, message):
    path = toy.write(
        "version: 1\nops:\n  toy.op:\n    contract: {contract}\n    implementations:\n      a:\n"
        "        target: m:f\n        when:\n          platform: any\n          relations:\n"
        f"            - size > 0\n            - {relation!r}\n"
    )
    with pytest.raises(DocumentError) as caught:
        toy.registry(path).catalog
    assert str(caught.value).startswith(f"{path}:12: ") and message in str(caught.value)


def test_a_relation_decides(toy):
    registry = toy.registry(
        {
            "a": {"relations": ["size % 3 == 0", "per_group > 4"], "groups": "any"},
            "b": {"when": {"groups": "any"}, "fallback": True},
        }
    )
    assert [registry.dispatch(toy.OP, size=s, groups=g).name for s, g in ((9, 1), (10, 1), (12, 4), (15, 3))] == [
        "a",
        "b",
        "b",
        "a",
    ]
    assert "size % 3 == 0 does not hold for size=10" in registry.explain(toy.OP, size=10).text()
