"""Concurrency groups of actors, and what runs where."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from core_implementation import (
    DEADLINE_S,
    better_than_reference,
    gate_at,
    get,
    ray,
    start_runtime,
)
from executor_support import Gate


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


class Groups:
    """Two calls at once in `io`, one in `compute`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}

    def _count(self, group: str) -> None:
        with self.lock:
            self.running[group] = self.running.get(group, 0) + 1
            self.most[group] = max(self.most.get(group, 0), self.running[group])
        time.sleep(0.02)
        with self.lock:
            self.running[group] -= 1

    @ray.method(concurrency_group="io")
    def read(self) -> None:
        self._count("io")

    @ray.method(concurrency_group="compute")
    def compute(self) -> None:
        self._count("compute")

    def other(self) -> None:
        self._count("default")

    @ray.method(concurrency_group="io")
    def wait(self, gate: Gate) -> str:
        gate.wait(DEADLINE_S)
        return "waited"

    def wait_outside(self, gate: Gate) -> str:
        gate.wait(DEADLINE_S)
        return "waited"

    @ray.method(concurrency_group="compute")
    def peak(self) -> dict[str, int]:
        return self.most


class AsyncGroups:
    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}

    async def _count(self, group: str) -> None:
        self.running[group] = self.running.get(group, 0) + 1
        self.most[group] = max(self.most.get(group, 0), self.running[group])
        await asyncio.sleep(0.02)
        self.running[group] -= 1

    @ray.method(concurrency_group="io")
    async def read(self) -> None:
        await self._count("io")

    async def other(self) -> None:
        await self._count("default")

    @ray.method(concurrency_group="io")
    def block(self, gate: Gate) -> str:
        gate.wait(DEADLINE_S)  # a plain method holds its loop up
        return "blocked"

    async def peak(self) -> dict[str, int]:
        return self.most

    def sync(self) -> str:
        return "sync"


GROUPS = {"io": 2, "compute": 1}


def made(**options: Any) -> Any:
    actor = ray.remote(concurrency_groups=GROUPS)(Groups)
    return (actor.options(**options) if options else actor).remote()


def most_at_once(
    actor: Any, methods: list[Any], times: int, wanted: dict[str, int]
) -> dict[str, int]:
    """How many calls ran at once, per group; tries until it was as many as wanted, for a loaded
    machine may not get as far in one go.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        get([method.remote() for _ in range(times) for method in methods])
        found: dict[str, int] = get(actor.peak.remote())
        is_enough = all(found[group] >= count for group, count in wanted.items())
        if is_enough or time.monotonic() > deadline:
            return found


def test_each_group_runs_as_many_calls_as_it_says_and_the_others_one() -> None:
    actor = made()
    methods = [actor.read, actor.compute, actor.other]
    assert most_at_once(actor, methods, 6, {"io": 2}) == {"io": 2, "compute": 1, "default": 1}


def test_max_concurrency_is_for_calls_of_no_group() -> None:
    actor = made(max_concurrency=3)
    methods = [actor.other, actor.other, actor.other, actor.compute]
    assert most_at_once(actor, methods, 3, {"default": 3}) == {"default": 3, "compute": 1}


def test_a_group_that_is_full_holds_no_other_back(tmp_path: Path) -> None:
    actor = made()
    with gate_at(tmp_path / "gate") as gate:
        full = [actor.wait.remote(gate) for _ in range(300)]
        get([actor.other.remote(), actor.compute.remote()])
        gate.open(300)
        assert get(full) == ["waited"] * 300


def test_a_call_may_name_another_group(tmp_path: Path) -> None:
    actor = made()
    with gate_at(tmp_path / "gate") as gate:
        held = actor.wait_outside.options(concurrency_group="io").remote(gate)
        get(actor.other.remote())  # what it would wait behind
        gate.open()
        assert get(held) == "waited"


@better_than_reference("the actor crashes", run=False)
def test_a_call_in_a_group_that_is_not_there_is_refused_at_once() -> None:
    actor = made()
    with pytest.raises(ValueError, match=r"Groups\.other .*'nope'"):
        actor.other.options(concurrency_group="nope").remote()


@better_than_reference("an AssertionError without a text")
def test_an_actor_without_the_groups_of_its_methods_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"Groups\.\w+ .*'(io|compute)'"):
        ray.remote(Groups).remote()


def test_groups_belong_to_the_class() -> None:
    with pytest.raises(ValueError, match=r"not supported in '\.options\(\)'"):
        ray.remote(Groups).options(concurrency_groups=GROUPS).remote()


@better_than_reference("it fails later, or never")
@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ({"io": 0}, ValueError),
        ({"io": -1}, ValueError),
        ({"": 1}, ValueError),
        ({"io": "2"}, TypeError),
        ({"io": True}, TypeError),
        ({1: 2}, TypeError),
        (["io"], TypeError),
    ],
)
def test_bad_groups_are_refused_at_once(groups: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ray.remote(concurrency_groups=groups)(Groups)


def test_groups_that_are_neither_a_dictionary_nor_a_list_are_refused() -> None:
    with pytest.raises(TypeError):
        ray.remote(concurrency_groups="io")(Groups)


def test_coroutines_have_groups_too() -> None:
    actor = ray.remote(concurrency_groups={"io": 2})(AsyncGroups).remote()
    wanted = {"io": 2, "default": 8}
    assert most_at_once(actor, [actor.read, actor.other], 8, wanted) == wanted


def test_a_group_that_blocks_its_loop_holds_no_other_back(tmp_path: Path) -> None:
    actor = ray.remote(concurrency_groups={"io": 2})(AsyncGroups).remote()
    with gate_at(tmp_path / "gate") as gate:
        blocked = actor.block.remote(gate)
        get(actor.other.remote())
        gate.open()
        assert get(blocked) == "blocked"


def test_methods_that_are_no_coroutines_run_beside_those_that_are() -> None:
    actor = ray.remote(concurrency_groups={"io": 2})(AsyncGroups).remote()
    assert get([actor.sync.remote(), actor.other.remote()]) == ["sync", None]


def test_calls_of_groups_can_be_cancelled(tmp_path: Path) -> None:
    actor = made()
    with gate_at(tmp_path / "gate") as gate:
        running = [actor.wait.remote(gate) for _ in range(2)]
        waiting = actor.wait.remote(gate)
        ray.cancel(waiting)
        with pytest.raises(ray.exceptions.TaskCancelledError):
            get(waiting)
        gate.open(2)
        assert get(running) == ["waited"] * 2


class Loops:
    @ray.method(concurrency_group="io")
    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def ping(self) -> str:
        return "here"


def test_coroutines_of_groups_can_be_cancelled() -> None:
    actor = ray.remote(concurrency_groups={"io": 2})(Loops).remote()
    refs = [actor.wait.remote() for _ in range(6)]
    assert get(actor.ping.remote()) == "here"
    for ref in refs:
        ray.cancel(ref)
    for ref in refs:
        with pytest.raises(ray.exceptions.TaskCancelledError):
            get(ref)
    assert get(actor.ping.remote()) == "here"
