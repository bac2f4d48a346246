"""A trait makes values canonical and refuses the rest, saying trait, value and what was expected."""

import copy
import enum
import pickle

import pytest

from kernel_registry.traits import moe
from kernel_registry.traits.dtype import NAMES, dtype_name
from kernel_registry.traits.platform import Platform
from kernel_registry.traits.trait import REQUIRED, Trait, TraitValueError

INT = Trait("topk", "int", "performance", minimum=1)
BOOL = Trait("has_bias", "bool", "semantic", default=True)
STR = Trait("scoring", "str", "semantic", choices=("sigmoid", "softmax"))
WORD = Trait("tag", "str", "semantic")
DTYPE = Trait("dtype", "dtype", "semantic", default="float32")
PLATFORM = Trait("platform", "platform", "platform")


class Size(enum.IntEnum):
    EIGHT = 8


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("trait", "given", "canonical"),
    [
        (INT, 8, 8),
        (INT, 1, 1),
        (INT, Size.EIGHT, 8),
        (BOOL, True, True),
        (BOOL, False, False),
        (STR, "softmax", "softmax"),
        (WORD, "anything", "anything"),
        (DTYPE, "bf16", "bfloat16"),
        (PLATFORM, "sm_90", Platform("cuda", (9, 0))),
        (PLATFORM, Platform("cpu"), Platform("cpu")),
    ],
)
def test_canonical(trait, given, canonical):
    value = trait.parse(given)
    assert value == canonical and type(value) is type(canonical)


@pytest.mark.parametrize(
    ("trait", "given"),
    [
        (INT, True),
        (INT, 0),
        (INT, -1),
        (INT, 8.0),
        (INT, "8"),
        (INT, None),
        (BOOL, 1),
        (BOOL, 0),
        (BOOL, "true"),
        (BOOL, None),
        (STR, "tanh"),
        (STR, ""),
        (STR, None),
        (STR, 3),
        (WORD, ""),
        (WORD, ["a"]),
        (DTYPE, "float31"),
        (DTYPE, 32),
        (PLATFORM, "sm90"),
        (PLATFORM, (9, 0)),
        (INT, Unprintable()),
    ],
)
def test_refused_with_trait_value_and_expectation(trait, given):
    with pytest.raises(TraitValueError) as caught:
        trait.parse(given)
    message = str(caught.value)
    assert message.startswith(f"{trait.name}: expected {trait.expected}, got ")
    assert repr(given) in message if not isinstance(given, Unprintable) else "<Unprintable>" in message


def test_numpy_integers_are_numbers():
    numpy = pytest.importorskip("numpy")
    value = INT.parse(numpy.int64(8))
    assert value == 8 and type(value) is int
    with pytest.raises(TraitValueError):
        INT.parse(numpy.bool_(True))


def test_long_values_are_shortened():
    with pytest.raises(TraitValueError) as caught:
        INT.parse("x" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("trait", "given", "hint"),
    [
        (STR, "sigmod", "'sigmoid'"),
        (STR, "Softmax", "'softmax'"),
        (DTYPE, "float31", "'float32'"),
        (PLATFORM, "sm90", "'sm_90'"),
    ],
)
def test_suggestion(trait, given, hint):
    with pytest.raises(TraitValueError, match=f"did you mean {hint}"):
        trait.parse(given)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(name="two words", type="int", kind="semantic"),
        dict(name="x", type="float", kind="semantic"),
        dict(name="x", type="int", kind="fast"),
        dict(name="x", type="int", kind="platform"),
        dict(name="x", type="platform", kind="semantic"),
        dict(name="x", type="int", kind="semantic", choices=("a",)),
        dict(name="x", type="str", kind="semantic", minimum=1),
        dict(name="x", type="int", kind="semantic", default=0, minimum=1),
        dict(name="x", type="bool", kind="semantic", default=1),
        dict(name="x", type="dtype", kind="semantic", default="fp32"),
        dict(name="x", type="str", kind="semantic", default="b", choices=("a",)),
    ],
)
def test_a_wrong_declaration_is_refused(arguments):
    with pytest.raises(ValueError, match=arguments["name"]):
        Trait(**arguments)


def test_required_is_one_object():
    assert copy.deepcopy(REQUIRED) is REQUIRED and pickle.loads(pickle.dumps(REQUIRED)) is REQUIRED
    assert repr(REQUIRED) == "REQUIRED" and INT.default is REQUIRED
    assert pickle.loads(pickle.dumps(STR)) == STR and hash(STR) == hash(copy.copy(STR))


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float32", "float32"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("torch.float32", "float32"),
        ("bf16", "bfloat16"),
        ("BFloat16", "bfloat16"),
        ("half", "float16"),
        ("torch.half", "float16"),
        ("double", "float64"),
        (" int8 ", "int8"),
        ("fp8_e4m3fn", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e5m2"),
        ("long", "int64"),
    ],
)
def test_dtype_names_and_aliases(given, name):
    assert dtype_name(given) == name and dtype_name(name) == name and name in NAMES


@pytest.mark.parametrize(
    "given", ["", "float31", "torch", "torch.torch.float32", None, 32, float, object(), ["float32"]]
)
def test_no_dtype(given):
    with pytest.raises(ValueError):
        dtype_name(given)


@pytest.mark.parametrize("given", ["fp8", "fp8_e4m3"])
def test_an_fp8_that_is_two_formats(given):
    with pytest.raises(ValueError, match="float8_e4m3fn or float8_e4m3fnuz"):
        dtype_name(given)


def test_dtype_objects_of_torch():
    torch = pytest.importorskip("torch")
    for name in ("float32", "bfloat16", "half", "float8_e4m3fn", "int8", "double"):
        assert dtype_name(getattr(torch, name)) == dtype_name(name)
    with pytest.raises(ValueError, match="Tensor is not a dtype"):
        dtype_name(torch.zeros(1))
    unknown = [str(d) for d in vars(torch).values() if isinstance(d, torch.dtype) and not _known(d)]
    assert all(
        n.startswith(("torch.q", "torch.bits", "torch.uint", "torch.int", "torch.complex32")) for n in unknown
    ), unknown


def _known(dtype):
    try:
        return bool(dtype_name(dtype))
    except ValueError:
        return False


def test_dtype_objects_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert dtype_name(numpy.dtype("float16")) == "float16"


# ---- the traits of moe.topk ------------------------------------------------------------------------------------------


def test_traits_of_topk():
    declared = [(t.name, t.type, t.kind, t.default, t.minimum, t.dynamic) for t in moe.TOPK_TRAITS]
    assert declared == [
        ("num_experts", "int", "performance", REQUIRED, 1, False),
        ("topk", "int", "performance", REQUIRED, 1, False),
        ("num_expert_group", "int", "semantic", 1, 1, False),
        ("topk_group", "int", "semantic", 1, 1, False),
        ("num_fused_shared_experts", "int", "semantic", 0, 0, False),
        ("scoring", "str", "semantic", "sigmoid", None, False),
        ("has_bias", "bool", "semantic", True, None, False),
        ("renormalize", "bool", "semantic", True, None, False),
        ("dtype", "dtype", "semantic", "float32", None, False),
        ("bias_dtype", "dtype", "semantic", "float32", None, False),
        ("score_dtype", "str", "semantic", "float32", None, False),
        ("platform", "platform", "platform", REQUIRED, None, False),
        ("num_tokens", "int", "performance", REQUIRED, 0, True),
        ("contiguous", "bool", "layout", True, None, True),
    ]
    assert moe.SCORING.choices == ("sigmoid", "softmax", "sqrtsoftplus") and moe.SCORE_DTYPE.choices == (
        "float32",
        "logits",
    )
    assert all(trait.doc for trait in moe.TOPK_TRAITS)
