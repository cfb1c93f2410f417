"""Actors that run several calls at once: on threads, and in an event loop."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from core_implementation import DEADLINE_S, gate_at, get, ray, start_runtime
from executor_support import Gate


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def identity(value: Any) -> Any:
    return value


@ray.remote
def held(gate: Gate, value: Any) -> Any:
    gate.wait(DEADLINE_S)
    return value


@ray.remote
class Threaded:
    def __init__(self) -> None:
        self.here = threading.Barrier(2)
        self.lock = threading.Lock()
        self.running = self.most = 0

    def meet(self) -> int:
        """Returns once another call is here too."""
        self.here.wait(DEADLINE_S)
        return threading.get_ident()

    def wait_for(self, name: str) -> str:
        self.event = threading.Event()
        assert self.event.wait(DEADLINE_S)
        return name

    def let_go(self) -> None:
        self.event.set()

    def count(self) -> int:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        threading.Event().wait(0.02)
        with self.lock:
            self.running -= 1
        return self.most

    def task_id(self) -> Any:
        return ray.get_runtime_context().get_task_id()

    def nested(self, n: int) -> int:
        return ray.get(identity.remote(n))

    def fail(self) -> None:
        raise ValueError("no")

    def leave(self) -> None:
        ray.actor.exit_actor()


@ray.remote
class Async:
    def __init__(self) -> None:
        self.loop = asyncio.get_event_loop()
        self.event = asyncio.Event()
        self.running = self.most = 0

    async def wait(self) -> str:
        await self.event.wait()
        return "here"

    async def set(self) -> None:
        self.event.set()

    async def count(self) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.02)
        self.running -= 1
        return self.most

    async def get(self, refs: list[Any]) -> Any:
        return await refs[0]

    async def gather(self, refs: list[Any]) -> Any:
        return await asyncio.gather(*refs)

    async def is_own_loop(self) -> bool:
        return asyncio.get_running_loop() is self.loop

    def plain(self) -> bool:
        return asyncio.get_running_loop() is not None

    async def fail(self) -> None:
        raise ValueError("no")

    async def leave(self) -> None:
        ray.actor.exit_actor()

    async def task_id(self) -> Any:
        await asyncio.sleep(0.001)
        return ray.get_runtime_context().get_task_id()


# --- threads -------------------------------------------------------------------------------------


def test_calls_run_at_once_on_threads() -> None:
    actor = Threaded.options(max_concurrency=2).remote()
    assert len(set(get([actor.meet.remote(), actor.meet.remote()]))) == 2


def test_no_more_calls_run_at_once_than_allowed() -> None:
    actor = Threaded.options(max_concurrency=3).remote()
    assert max(get([actor.count.remote() for _ in range(30)])) <= 3


def test_threads_wait_for_refs_and_see_their_own_task() -> None:
    actor = Threaded.options(max_concurrency=4).remote()
    assert get([actor.nested.remote(n) for n in range(12)]) == list(range(12))
    refs = [actor.task_id.remote() for _ in range(8)]
    assert get(refs) == [ref.task_id().hex() for ref in refs]


def test_an_error_on_a_thread_is_the_calls() -> None:
    actor = Threaded.options(max_concurrency=2).remote()
    with pytest.raises(ValueError, match="no"):
        get(actor.fail.remote())
    assert get(actor.nested.remote(1)) == 1


def test_a_thread_ends_the_actor() -> None:
    actor = Threaded.options(max_concurrency=2, max_restarts=1).remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.leave.remote())
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.nested.remote(1))


def test_a_late_argument_holds_no_call_of_a_threaded_actor_back(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        actor = Threaded.options(max_concurrency=2).remote()
        late = actor.nested.remote(held.remote(gate, 1))
        assert get(actor.nested.remote(2)) == 2
        gate.open()
        assert get(late) == 1


# --- an event loop -------------------------------------------------------------------------------


def test_coroutine_methods_wait_for_each_other() -> None:
    actor = Async.remote()
    waiting = [actor.wait.remote() for _ in range(50)]
    get(actor.set.remote())
    assert get(waiting) == ["here"] * 50


def test_a_thousand_coroutines_run_at_once_by_default() -> None:
    actor = Async.remote()
    assert max(get([actor.count.remote() for _ in range(200)])) > 50


@pytest.mark.parametrize("limit", [1, 4])
def test_no_more_coroutines_run_at_once_than_allowed(limit: int) -> None:
    actor = Async.options(max_concurrency=limit).remote()
    assert max(get([actor.count.remote() for _ in range(12)])) <= limit


def test_awaiting_a_ref_does_not_stop_the_loop(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        actor = Async.remote()
        waiting = actor.get.remote([held.remote(gate, "late")])
        assert get(actor.get.remote([identity.remote(1)])) == 1
        gate.open()
        assert get(waiting) == "late"


def test_refs_are_gathered() -> None:
    actor = Async.remote()
    refs = [identity.remote(n) for n in range(20)]
    assert get(actor.gather.remote(refs)) == list(range(20))


def test_a_ref_that_failed_raises_where_it_is_awaited() -> None:
    actor = Async.remote()
    with pytest.raises(ValueError, match="no"):
        get(actor.get.remote([actor.fail.remote()]))


def test_all_of_the_actor_runs_in_one_loop() -> None:
    actor = Async.remote()
    assert get([actor.is_own_loop.remote(), actor.plain.remote()]) == [True, True]


def test_coroutines_see_their_own_task() -> None:
    actor = Async.remote()
    refs = [actor.task_id.remote() for _ in range(8)]
    assert get(refs) == [ref.task_id().hex() for ref in refs]


def test_a_coroutine_ends_the_actor() -> None:
    actor = Async.remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.leave.remote())


def test_a_late_argument_holds_no_coroutine_back(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        actor = Async.remote()
        late = actor.gather.remote(held.remote(gate, []))
        assert get(actor.get.remote([identity.remote(2)])) == 2
        gate.open()
        assert get(late) == []
