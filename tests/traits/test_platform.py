"""Machines and patterns of machines: names, order, ranges."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_registry.traits.platform import KNOWN, Bound, Platform, PlatformError, PlatformPattern

NAMES = ("sm_80 sm_86 sm_89 sm_90 sm_100 sm_103 sm_120 gfx90a gfx942 gfx950 gfx1100 gfx1250 cpu interpreter").split()


@pytest.mark.parametrize(
    ("name", "kind", "arch"),
    [
        ("sm_90", "cuda", (9, 0)),
        ("sm_100", "cuda", (10, 0)),
        ("sm_103", "cuda", (10, 3)),
        ("sm_75", "cuda", (7, 5)),
        ("gfx942", "hip", (9, 4, 2)),
        ("gfx90a", "hip", (9, 0, 10)),
        ("gfx1100", "hip", (11, 0, 0)),
        ("gfx1250", "hip", (12, 5, 0)),
        ("cpu", "cpu", ()),
        ("interpreter", "interpreter", ()),
    ],
)
def test_names(name, kind, arch):
    platform = Platform.parse(name)
    assert platform == Platform(kind, arch) and str(platform) == name and hash(platform) == hash(Platform(kind, arch))
    assert Platform.parse(platform) is platform and pickle.loads(pickle.dumps(platform)) == platform


def test_known_in_order():
    assert [str(platform) for platform in KNOWN] == NAMES


@pytest.mark.parametrize(
    "name",
    [
        "",
        "sm90",
        "sm_9",
        "SM_90",
        "sm_09",
        "sm_9000",
        "gfx94",
        "gfx94G",
        "gfx9-4-generic",
        "cuda",
        "xpu",
        " cpu",
        "sm_90 ",
        "gfx942:sramecc+",
        None,
        90,
        (9, 0),
        b"cpu",
    ],
)
def test_no_platform(name):
    with pytest.raises(PlatformError):
        Platform.parse(name)


def test_a_compilation_target_is_no_machine():
    with pytest.raises(PlatformError, match="the machine is sm_90"):
        Platform.parse("sm_90a")
    with pytest.raises(PlatformError, match="did you mean 'gfx942'"):
        Platform.parse("gfx94")


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("cuda", ()),
        ("cuda", (9,)),
        ("cuda", (9, 10)),
        ("cuda", (0, 1)),
        ("cuda", [9, 0]),
        ("cuda", (9, True)),
        ("hip", (9, 4)),
        ("hip", (9, 4, 16)),
        ("cpu", (1,)),
        ("xpu", ()),
    ],
)
def test_no_platform_can_be_built_wrong(kind, arch):
    with pytest.raises(PlatformError):
        Platform(kind, arch)


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("cuda", "sm_80 sm_86 sm_89 sm_90 sm_100 sm_103 sm_120"),
        ("cuda>=sm_90", "sm_90 sm_100 sm_103 sm_120"),
        ("cuda>sm_90", "sm_100 sm_103 sm_120"),
        ("cuda<=sm_86", "sm_80 sm_86"),
        ("cuda<sm_86", "sm_80"),
        ("cuda==sm_90", "sm_90"),
        ("sm_90", "sm_90"),
        ("cuda>=sm_80,<sm_100", "sm_80 sm_86 sm_89 sm_90"),
        ("cuda<sm_100,>=sm_89", "sm_89 sm_90"),
        ("hip", "gfx90a gfx942 gfx950 gfx1100 gfx1250"),
        ("hip>=gfx942,<gfx1100", "gfx942 gfx950"),
        ("gfx942", "gfx942"),
        ("cpu", "cpu"),
        ("interpreter", "interpreter"),
        ("cuda >= sm_90", "sm_90 sm_100 sm_103 sm_120"),
    ],
)
def test_patterns(text, matching):
    pattern = PlatformPattern.parse(text)
    assert [str(p) for p in KNOWN if pattern.matches(p)] == matching.split()
    assert PlatformPattern.parse(str(pattern)) == pattern and PlatformPattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cuda==sm_90", "sm_90"),
        ("cuda", "cuda"),
        ("cuda>=sm_80,<sm_100", "cuda>=sm_80,<sm_100"),
        ("cuda<sm_100,>=sm_80", "cuda>=sm_80,<sm_100"),
        ("cuda>=sm_90,<=sm_90", "sm_90"),
    ],
)
def test_one_spelling(text, shown):
    assert str(PlatformPattern.parse(text)) == shown


def test_bounds():
    pattern = PlatformPattern.parse("cuda>=sm_80,<sm_100")
    assert (pattern.kind, pattern.low, pattern.high) == ("cuda", Bound((8, 0), True), Bound((10, 0), False))
    assert PlatformPattern.parse("cuda").low is None and PlatformPattern.parse("hip>=gfx90a").high is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("cuda>=gfx942", "gfx942 is an architecture of hip"),
        ("hip<sm_90", "an architecture of cuda"),
        ("cuda>sm_90,<sm_90", "nothing"),
        ("cuda>=sm_100,<=sm_90", "nothing"),
        ("cuda>sm_90,<=sm_90", "nothing"),
        ("cuda>=sm_80,>sm_90", "one lower"),
        ("cuda<sm_80,<=sm_90", "one lower"),
        ("cuda==sm_80,==sm_90", "one lower"),
        ("cuda=sm_90", "no bound"),
        ("cuda!=sm_90", "no bound"),
        ("cuda>=sm_90,", "no bound"),
        ("cuda>=", "no bound"),
        ("cuda sm_90", "no bound"),
        ("cudasm_90", "no bound"),
        ("CUDA", "did you mean 'cuda'"),
        ("sm_90a", "the machine is sm_90"),
        ("", "expected"),
        ("cpu>=sm_90", "no platform pattern"),
        (None, "not a platform pattern"),
        (["cuda"], "not a platform pattern"),
    ],
)
def test_no_pattern(text, why):
    with pytest.raises(PlatformError, match=why):
        PlatformPattern.parse(text)


ARCHS = [Platform("cuda", (major, minor)) for major in range(8, 12) for minor in range(0, 10, 3)]
BOUNDS = st.sampled_from(ARCHS).map(str)
PATTERNS = st.one_of(
    BOUNDS,
    st.sampled_from(["cuda", "cpu", "interpreter", "gfx942", "hip>=gfx90a"]),
    st.builds("cuda{}{}".format, st.sampled_from([">", ">=", "<", "<=", "=="]), BOUNDS),
    st.builds("cuda{}{},{}{}".format, st.sampled_from([">", ">="]), BOUNDS, st.sampled_from(["<", "<="]), BOUNDS),
)


def _pattern(text):
    try:
        return PlatformPattern.parse(text)
    except PlatformError:  # an empty range
        return None


@settings(max_examples=300, deadline=None)
@given(PATTERNS, PATTERNS)
def test_covers_and_meets_agree_with_the_members(one, other):
    a, b = _pattern(one), _pattern(other)
    if a is None or b is None:
        return
    machines = [*ARCHS, *KNOWN]
    shared = [p for p in machines if a.matches(p) and b.matches(p)]
    if shared:
        assert a.meets(b) and b.meets(a)
    if a.covers(b):
        assert all(a.matches(p) for p in machines if b.matches(p))
        assert a.meets(b)
    assert a.meets(b) == b.meets(a)
    if a.covers(b) and b.covers(a):
        assert a == b


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("cuda", "cuda>=sm_80"),
        ("cuda>=sm_80", "cuda>sm_80"),
        ("cuda>=sm_80", "sm_80"),
        ("cuda<=sm_90", "cuda<sm_90"),
        ("cuda>=sm_80,<sm_100", "cuda>=sm_86,<=sm_90"),
        ("hip", "gfx942"),
    ],
)
def test_covers(wide, narrow):
    wide, narrow = PlatformPattern.parse(wide), PlatformPattern.parse(narrow)
    assert wide.covers(narrow) and not narrow.covers(wide) and wide.covers(wide)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("cuda<sm_90", "cuda>=sm_90", False),
        ("cuda<=sm_90", "cuda>=sm_90", True),
        ("cuda", "hip", False),
        ("cpu", "interpreter", False),
        ("cpu", "cpu", True),
        ("cuda>=sm_100", "cuda<sm_90", False),
        ("sm_90", "cuda>=sm_80,<sm_100", True),
    ],
)
def test_meets(one, other, meet):
    assert PlatformPattern.parse(one).meets(PlatformPattern.parse(other)) is meet
