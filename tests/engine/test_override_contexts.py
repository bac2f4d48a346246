"""Rule 5: overrides in contexts, across threads and asyncio tasks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading

import pytest
from engine_support import call
from override_support import EVERY


def test_contexts_nest_and_the_innermost_match_decides(toy):
    registry = toy.registry(EVERY)
    outside = registry.dispatch(toy.OP, size=8)
    with registry.override(toy.OP, "file1"):
        with registry.override(toy.OP, "file2", groups=2):
            assert registry.dispatch(toy.OP, size=8, groups=2).name == "file2"
            assert registry.dispatch(toy.OP, size=8).name == "file1"
            inner = registry.dispatch(toy.OP, size=8)
            assert registry.dispatch(toy.OP, size=8) is inner
        assert registry.dispatch(toy.OP, size=8, groups=2).name == "file1"
    assert registry.dispatch(toy.OP, size=8) is outside


def test_a_context_is_left_after_an_error(toy):
    registry = toy.registry(EVERY)
    with pytest.raises(KeyError), registry.override(toy.OP, "call"):
        raise KeyError
    assert registry.dispatch(toy.OP, size=8).name == "shipped"


def test_kernels_bound_before_a_context_stay_as_they_are(toy):
    registry = toy.registry(EVERY)
    kernel = registry.dispatch(toy.OP, size=8)
    with registry.override(toy.OP, "call"):
        assert kernel(call()) == "shipped"
        inside = registry.dispatch(toy.OP, size=8)
    assert inside(call()) == "call" and inside.name == "call"


def test_a_context_of_one_registry_is_none_of_another(toy):
    one, two = toy.registry(EVERY), toy.registry(EVERY)
    with one.override(toy.OP, "call"):
        assert two.dispatch(toy.OP, size=8).name == "shipped"


def test_threads_see_only_their_own_context(toy):
    registry = toy.registry(EVERY)
    names = ("file1", "file2", "environment", "context", None)
    start, wrong = threading.Barrier(len(names)), []

    def work(name):
        start.wait()
        for size in range(1, 200):
            if name is None:
                found = registry.dispatch(toy.OP, size=size).name
            else:
                with registry.override(toy.OP, name):
                    found = registry.dispatch(toy.OP, size=size).name
            if found != (name or "shipped"):
                wrong.append((name, found))

    with registry.override(toy.OP, "call"):  # the parent's context does not leak into a new thread either
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_one_override_object_in_several_threads_and_nested_in_itself(toy):
    registry = toy.registry(EVERY)
    shared = registry.override(toy.OP, "call")
    inside, leave, failed = threading.Barrier(2), threading.Event(), []

    def other():
        try:
            with shared:
                inside.wait()
                leave.wait()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    with shared, shared:
        inside.wait()
    leave.set()
    thread.join()
    assert not failed and registry.dispatch(toy.OP, size=8).name == "shipped"


def test_tasks_see_only_their_own_context(toy):
    registry = toy.registry(EVERY)

    async def work(name):
        with registry.override(toy.OP, name):
            for size in range(1, 30):
                await asyncio.sleep(0)
                assert registry.dispatch(toy.OP, size=size).name == name

    async def main():
        with registry.override(toy.OP, "model"):
            tasks = [asyncio.create_task(work(name)) for name in ("file1", "file2", "call")]
            inherited = asyncio.create_task(asyncio.sleep(0, registry.dispatch(toy.OP, size=8).name))
            for _ in range(20):
                await asyncio.sleep(0)
                assert registry.dispatch(toy.OP, size=8).name == "model"
            await asyncio.gather(*tasks)
            assert await inherited == "model"
        assert registry.dispatch(toy.OP, size=8).name == "shipped"

    asyncio.run(main())


def test_a_copied_context_carries_the_override(toy):
    registry = toy.registry(EVERY)
    with registry.override(toy.OP, "call"):
        copied = contextvars.copy_context()
    assert copied.run(lambda: registry.dispatch(toy.OP, size=8).name) == "call"


def test_kernels_of_a_context_are_forgotten_when_nobody_holds_them(toy):
    registry = toy.registry(EVERY)
    for size in range(1, 20):
        with registry.override(toy.OP, "call"):
            registry.dispatch(toy.OP, size=size)
    gc.collect()
    assert not registry.kernels
