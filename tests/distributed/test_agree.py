"""Plans are compared between real processes: equal ranks pass, another one is named with what it has otherwise."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("torch.distributed")
pytest.importorskip("triton")

from ranks_support import TIMEOUT  # noqa: E402

from kernel_registry import Registry, distributed  # noqa: E402
from kernel_registry.errors import PlanError, RankError  # noqa: E402

DEEPSEEK = dict(num_experts=256, num_expert_group=8, topk_group=4, topk=8)
LINE = "version: 1\noverrides:\n  - {op: moe.topk, use: torch, when: {num_tokens: 16}, reason: incident 42}\n"


def started(overrides=None, platform="sm_90", **registry) -> Registry:
    """A rank after model load."""
    source = Registry(platform=platform, environment=False, plugins=False, **registry)
    if overrides:
        source.load_overrides(overrides)
    source.bind("moe.topk", **DEEPSEEK)
    return source


def compared(source, group=None, **more):
    """("agreed", fingerprint) or ("differs", message, differences), and how many objects were gathered."""
    import torch.distributed as dist

    gather, gathered = dist.all_gather_object, []
    dist.all_gather_object = lambda *args, **kwargs: gathered.append(1) or gather(*args, **kwargs)
    try:
        return "agreed", distributed.agree(source, group, **more).fingerprint, len(gathered)
    except RankError as error:
        return "differs", str(error), error.differences, len(gathered)
    finally:
        dist.all_gather_object = gather


# ---- what the ranks do -----------------------------------------------------------------------------------------------

def alike(rank, device):
    return compared(started())


def one_with_an_override(rank, device, odd, file):
    return compared(started(file if rank in odd else None))


def with_files(rank, device, files):
    """Of each rank, the files in the order they are loaded."""
    source = started(platform="cpu")
    for file in files[rank]:
        source.load_overrides(file)
    return compared(source)


def one_of_another_platform(rank, device):
    return compared(started(platform="sm_100" if rank == 1 else "sm_90"))


def one_of_another_registry(rank, device, path):
    return compared(started(**({"path": path} if rank == 1 else {})))


def one_of_other_versions(rank, device):
    from kernel_registry import plan

    versions = plan.versions
    plan.versions = lambda: {**versions(), "triton": "3.0.0"} if rank == 1 else versions()
    try:
        return compared(started())
    finally:
        plan.versions = versions


def one_of_another_release(rank, device):
    """Its plans are of a version that the others can't read, and its fingerprint is another."""
    from kernel_registry import plan

    plan.VERSION, kept = (2 if rank == 0 else 1), plan.VERSION
    try:
        return compared(started())
    finally:
        plan.VERSION = kept


def one_that_can_not_freeze(rank, device, file):
    source = started(file if rank == 1 else None)
    try:
        return compared(source) + (None,)
    finally:
        source.reload()  # the error left it as it was


def in_groups(rank, device, file):
    """Ranks 0 and 1 are alike and compared, 2 and 3 are alike among themselves; nobody compares all four."""
    import torch.distributed as dist

    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    source = started(file if rank >= 2 else None)
    with pytest.raises(PlanError, match="no member of the group"):
        distributed.agree(source, groups[rank < 2])
    return compared(source, groups[rank >= 2])


def named_by_their_global_rank(rank, device, file):
    import torch.distributed as dist

    group = dist.new_group([1, 2, 3])
    return compared(started(file if rank == 3 else None), group) if rank else None


def of_a_plan_of_ones_own(rank, device, file):
    from kernel_registry.planning import freeze_model

    source = started(file if rank == 1 else None)
    return compared(source, freeze=lambda: freeze_model(source, "glm-4.5", "sm_90"))


def one_dies(rank, device):
    import os

    source = started()
    if rank == 1:
        os._exit(1)
    begun = time.monotonic()
    with pytest.raises(Exception) as caught:
        distributed.agree(source)
    return isinstance(caught.value, PlanError), time.monotonic() - begun


def one_is_late(rank, device, delay):
    if rank == 1:
        time.sleep(delay)
    return compared(started())[0]


def one_hangs(rank, device, seconds, over):
    """Rank 1 does not compare until rank 0 has given up waiting, in a group that waits for so many seconds."""
    from datetime import timedelta

    import torch.distributed as dist

    source = started()
    dist.barrier()
    group, begun = dist.new_group(timeout=timedelta(seconds=seconds)), time.monotonic()
    if rank == 1:
        while not over.exists():
            time.sleep(0.05)
        return None
    try:
        with pytest.raises(RuntimeError) as caught:
            distributed.agree(source, group)
        return str(caught.value), isinstance(caught.value, PlanError), time.monotonic() - begun
    finally:
        over.touch()


# ---- what comes of it ------------------------------------------------------------------------------------------------

@pytest.fixture
def file(tmp_path):
    path = tmp_path / "overrides.yaml"
    path.write_text(LINE)
    return path


def test_equal_ranks_pass_with_one_gather(ranks, backend, world):
    answers = ranks.run(world, alike, backend=backend)
    assert answers == [("agreed", started().freeze().fingerprint, 1)] * world


def test_a_rank_with_another_override_file_is_named_on_every_rank(ranks, file, backend, world):
    odd = 1 if world == 2 else 2
    answers = ranks.run(world, one_with_an_override, (odd,), file, backend=backend)
    assert len({(kind, message) for kind, message, *_ in answers}) == 1  # the same words everywhere
    kind, message, differences, gathered = answers[0]
    assert kind == "differs" and list(differences) == [odd] and gathered == 2
    others = "rank 0" if world == 2 else "ranks 0, 1, 3"
    assert message.startswith(f"rank {odd} differs from {others}\n    ~ moe.topk(")
    assert list(differences[odd][:-1]) == started().freeze().diff(started(file).freeze())
    assert "torch when {num_tokens: {min: 16, max: 16}} (override)" in differences[odd][0]
    assert differences[odd][-1] == f"+ use torch: file {file}, {file}:3 (incident 42)"


def test_ranks_that_differ_alike_are_told_together(ranks, file):
    _, message, differences, _ = ranks.run(4, one_with_an_override, (1, 3), file)[2]
    assert list(differences) == [1, 3] and differences[1] == differences[3]
    assert message.startswith("ranks 1, 3 differ from ranks 0, 2\n") and message.count(" ~ ") == 1
    _, message, differences, _ = ranks.run(4, one_with_an_override, (0, 1, 3), file)[2]
    assert list(differences) == [2], "what most ranks have is what was meant"
    assert differences[2][-1].startswith("- use torch: file")


def test_a_line_that_changes_nothing_yet_is_a_difference(ranks, tmp_path):
    """It may decide what is bound later. Where the same line stands is none."""
    idle, same, other = (tmp_path / name for name in ("idle.yaml", "same.yaml", "other.yaml"))
    line = "version: 1\noverrides:\n  - {op: moe.topk, disable: triton_unbiased, reason: %s}\n"
    idle.write_text(line % "incident 43")
    same.write_text(line % "the same in other words")
    other.write_text("version: 1\noverrides:\n  - {op: moe.topk, use: torch}\n")
    for _, message, differences, _ in ranks.run(2, with_files, ((), (idle,))):
        assert differences == {1: (f"+ disable triton_unbiased: file {idle}, {idle}:3 (incident 43)",)}
    assert [kind for kind, *_ in ranks.run(2, with_files, ((same,), (idle,)))] == ["agreed"] * 2
    for _, message, differences, _ in ranks.run(2, with_files, ((idle, other), (other, idle))):
        assert differences == {1: ("the same lines of override files, of another strength",)}


def test_another_platform_registry_or_version(ranks, tmp_path):
    from kernel_registry import shipped_registry

    (_, message, differences, _), _ = ranks.run(2, one_of_another_platform)
    assert differences[1][0] == "device: sm_90 -> sm_100" and "rank 1 differs from rank 0\n" in message

    text = shipped_registry().read_text()
    path = tmp_path / "registry.yaml"
    path.write_text(text.replace("rows_per_program: 2}", "rows_per_program: 4}"))
    assert path.read_text() != text
    (_, _, differences, _), _ = ranks.run(2, one_of_another_registry, path)
    assert any("option rows_per_program of triton_biased_grouped.pairs: 2 -> 4" in line for line in differences[1])

    (_, _, differences, _), _ = ranks.run(2, one_of_other_versions)
    assert len(differences[1]) == 1 and differences[1][0].startswith("triton: ") and "-> 3.0.0" in differences[1][0]


def test_a_release_whose_plans_can_not_be_read_is_still_named(ranks):
    answers = ranks.run(3, one_of_another_release)
    for kind, _, differences, _ in answers:
        assert kind == "differs" and list(differences) == [0]
        assert "is not a plan of version" in differences[0][0]


def test_a_rank_that_can_not_freeze_tells_its_peers_why(ranks, tmp_path):
    unused = tmp_path / "unused.yaml"
    unused.write_text("version: 1\noverrides:\n  - {op: moe.topk, use: torch, when: {num_experts: 7}}\n")
    for kind, message, differences, gathered, _ in ranks.run(2, one_that_can_not_freeze, unused):
        assert kind == "differs" and list(differences) == [1] and gathered == 1
        assert message.startswith("rank 1 can't be compared\n    has no plan: OverrideError: overrides that no ")
        assert str(unused) in message


def test_groups_are_compared_for_themselves(ranks, file):
    answers = ranks.run(4, in_groups, file)
    assert [kind for kind, *_ in answers] == ["agreed"] * 4
    prints = [fingerprint for _, fingerprint, _ in answers]
    assert prints[0] == prints[1] != prints[2] == prints[3]


def test_a_rank_of_a_group_is_named_as_torch_numbers_it(ranks, file):
    _, message, differences, _ = ranks.run(4, named_by_their_global_rank, file)[1]
    assert list(differences) == [3] and "rank 3 differs from ranks 1, 2\n" in message


def test_a_plan_of_ones_own(ranks, file):
    answers = ranks.run(2, of_a_plan_of_ones_own, file)
    assert all(list(differences) == [1] and "num_experts=160" in message for _, message, differences, _ in answers)


def test_a_dead_rank_is_torchs_to_tell(ranks):
    named, took = ranks.run(2, one_dies, dying=(1,))[0]
    assert not named and took < TIMEOUT


def test_a_late_rank_is_waited_for_and_a_stuck_one_as_long_as_the_group_waits(ranks, tmp_path):
    assert ranks.run(2, one_is_late, 1.0) == ["agreed", "agreed"]
    (message, named, took), _ = ranks.run(2, one_hangs, 4, tmp_path / "over")
    assert "imed out" in message and not named, "torch's own error"
    assert 3 < took < TIMEOUT, "at the timeout of the group, which is not that of all groups"


def test_without_a_process_group_torch_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group"):
        distributed.agree(started())
