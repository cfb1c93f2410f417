"""Cancelling calls of actors: before they begin, while they run, and what they have submitted."""

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
from executor_support import Gate, leave_mark, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def held(gate: Gate, value: Any) -> Any:
    gate.wait(DEADLINE_S)
    return value


@ray.remote
def run_long(directory: Path) -> str:
    try:
        leave_mark(directory, "child begun")
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            time.sleep(0.01)
    except KeyboardInterrupt:
        leave_mark(directory, "child interrupted")
        raise
    return "ran to its end"


class Plain:
    def __init__(self) -> None:
        self.ran: list[str] = []

    def ping(self) -> bool:
        return ray.get_runtime_context().is_canceled()

    def until_cancelled(self, directory: Path, name: str = "begun") -> str:
        self.ran.append(name)
        leave_mark(directory, name)
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if ray.get_runtime_context().is_canceled():
                self.ran.append("cancelled")
                return "cancelled"
            time.sleep(0.01)
        return "not cancelled"

    def fail_when_cancelled(self, directory: Path) -> None:
        self.until_cancelled(directory)
        raise ValueError("no")

    def hold(self, directory: Path, gate: Gate) -> str:
        leave_mark(directory, "begun")
        gate.wait(DEADLINE_S)
        return "held"

    def run(self, name: str, *_: Any) -> str:
        self.ran.append(name)
        return name

    def names(self) -> list[str]:
        return self.ran

    def with_child(self, directory: Path) -> Any:
        return ray.get(run_long.remote(directory))

    def call(self, other: Any, directory: Path) -> Any:
        leave_mark(directory, "parent begun")
        return ray.get(other.until_cancelled.remote(directory))


class Async:
    def __init__(self) -> None:
        self.ran: list[str] = []
        self.event = asyncio.Event()

    async def wait(self, directory: Path, name: str = "begun") -> str:
        leave_mark(directory, name)
        self.ran.append(name)
        try:
            await self.event.wait()
        except asyncio.CancelledError:
            self.ran.append(f"{name} cancelled")
            raise
        return "set"

    async def fail_when_cancelled(self, directory: Path) -> str:
        try:
            return await self.wait(directory)
        except asyncio.CancelledError:
            raise ValueError("no") from None

    async def cancel_itself(self) -> None:
        raise asyncio.CancelledError

    async def set(self) -> None:
        self.event.set()

    async def is_cancelled(self) -> bool:
        return bool(ray.get_runtime_context().is_canceled())

    async def names(self) -> list[str]:
        return self.ran

    async def with_child(self, directory: Path) -> Any:
        return await run_long.remote(directory)


@pytest.fixture(params=[{}, {"max_concurrency": 2}], ids=["plain", "threads"])
def actor(request: pytest.FixtureRequest) -> Any:
    made = ray.remote(Plain).options(**request.param).remote()
    get(made.ping.remote())
    return made


@pytest.fixture
def plain() -> Any:
    return ray.remote(Plain).remote()


@pytest.fixture
def loop() -> Any:
    return ray.remote(Async).remote()


def assert_cancelled(ref: Any) -> None:
    with pytest.raises(ray.exceptions.TaskCancelledError):
        get(ref)


def begun(directory: Path, name: str = "begun") -> None:
    wait_until((directory / name).exists)


# --- calls that have not begun -----------------------------------------------------------------


@better_than_reference("it runs all the same when the actor has been sent it", always=False)
def test_a_call_behind_the_running_one_never_runs(plain: Any, tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        running = plain.hold.remote(tmp_path, gate)
        begun(tmp_path)
        refs = [plain.run.remote(str(number)) for number in range(5)]
        for number in (0, 3):
            ray.cancel(refs[number])
            assert_cancelled(refs[number])  # while the first call still runs
        gate.open()
        assert get(running) == "held"
        assert get([refs[number] for number in (1, 2, 4)]) == ["1", "2", "4"]
        assert get(plain.names.remote()) == ["1", "2", "4"]


def test_a_call_that_waits_for_a_thread_never_runs(tmp_path: Path) -> None:
    actor = ray.remote(Plain).options(max_concurrency=2).remote()
    with gate_at(tmp_path / "gate") as gate:
        running = [actor.hold.remote(tmp_path, gate) for _ in range(2)]
        begun(tmp_path)
        waiting = actor.run.remote("waiting")
        wait_until(lambda: len((tmp_path / "begun").read_text().splitlines()) == 2)
        ray.cancel(waiting)
        assert_cancelled(waiting)
        gate.open(2)
        assert get(running) == ["held"] * 2
        assert get(actor.names.remote()) == []


def test_a_call_that_waits_for_a_place_in_the_loop_never_runs(tmp_path: Path) -> None:
    actor = ray.remote(Async).options(max_concurrency=2).remote()
    running = [actor.wait.remote(tmp_path, name) for name in ("a", "b")]
    begun(tmp_path, "a")
    begun(tmp_path, "b")
    third = actor.wait.remote(tmp_path, "c")
    ray.cancel(third)
    assert_cancelled(third)
    ray.cancel(running[0])  # makes room
    assert_cancelled(running[0])
    get(actor.set.remote())
    assert get(running[1]) == "set"
    assert get(actor.names.remote()) == ["a", "b", "a cancelled"]


@better_than_reference("the driver may be aborted", run=False)
def test_a_call_that_waits_for_an_argument_never_runs_and_lets_go_of_those_behind_it(
    plain: Any, tmp_path: Path
) -> None:
    with gate_at(tmp_path / "gate") as gate:
        late = held.remote(gate, 1)
        waiting = plain.run.remote("waiting", late)
        behind = plain.run.remote("behind")
        ray.cancel(waiting)
        assert_cancelled(waiting)
        assert get(behind) == "behind"
        gate.open()
        assert get(late) == 1
        assert get(plain.names.remote()) == ["behind"]


def test_a_call_before_the_constructor_has_returned_never_runs(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:

        @ray.remote
        class Slow:
            def __init__(self) -> None:
                self.ran: list[str] = []
                gate.wait(DEADLINE_S)

            def run(self, name: str) -> None:
                self.ran.append(name)

            def names(self) -> list[str]:
                return self.ran

        actor = Slow.remote()
        refs = [actor.run.remote(name) for name in "abc"]
        ray.cancel(refs[1])
        assert_cancelled(refs[1])
        gate.open()
        assert get(actor.names.remote()) == ["a", "c"]


# --- calls that run ----------------------------------------------------------------------------


def test_a_running_method_may_ask_and_is_not_interrupted(actor: Any, tmp_path: Path) -> None:
    ref = actor.until_cancelled.remote(tmp_path)
    begun(tmp_path)
    ray.cancel(ref)
    assert_cancelled(ref)  # whatever it returns
    assert get(actor.names.remote()) == ["begun", "cancelled"]
    assert get(actor.ping.remote()) is False  # the next call was not cancelled


def test_what_a_cancelled_method_raises_is_its_error(actor: Any, tmp_path: Path) -> None:
    ref = actor.fail_when_cancelled.remote(tmp_path)
    begun(tmp_path)
    ray.cancel(ref)
    with pytest.raises(ValueError, match="no"):
        get(ref)


def test_others_on_threads_go_on(tmp_path: Path) -> None:
    actor = ray.remote(Plain).options(max_concurrency=2).remote()
    with gate_at(tmp_path / "gate") as gate:
        other = actor.hold.remote(tmp_path, gate)
        begun(tmp_path)
        ref = actor.until_cancelled.remote(tmp_path, "second")
        begun(tmp_path, "second")
        ray.cancel(ref)
        assert_cancelled(ref)
        gate.open()
        assert get(other) == "held"


def test_a_coroutine_is_cancelled_where_it_waits_and_others_go_on(
    loop: Any, tmp_path: Path
) -> None:
    refs = [loop.wait.remote(tmp_path, name) for name in ("a", "b")]
    begun(tmp_path, "a")
    begun(tmp_path, "b")
    ray.cancel(refs[0])
    assert_cancelled(refs[0])
    get(loop.set.remote())
    assert get(refs[1]) == "set"
    assert get(loop.names.remote()) == ["a", "b", "a cancelled"]


@better_than_reference("it is reported as cancelled")
def test_what_a_cancelled_coroutine_raises_is_its_error(loop: Any, tmp_path: Path) -> None:
    ref = loop.fail_when_cancelled.remote(tmp_path)
    begun(tmp_path)
    ray.cancel(ref)
    with pytest.raises(ValueError, match="no"):
        get(ref)


def test_whether_it_was_cancelled_a_coroutine_learns_from_asyncio_alone(loop: Any) -> None:
    with pytest.raises(RuntimeError, match="async"):
        get(loop.is_cancelled.remote())


def test_an_actor_that_waits_for_a_child_is_cancelled_with_it(plain: Any, tmp_path: Path) -> None:
    ref = plain.with_child.remote(tmp_path)
    begun(tmp_path, "child begun")
    ray.cancel(ref)
    assert_cancelled(ref)
    begun(tmp_path, "child interrupted")


def test_a_coroutine_that_waits_for_a_child_is_cancelled_with_it(loop: Any, tmp_path: Path) -> None:
    ref = loop.with_child.remote(tmp_path)
    begun(tmp_path, "child begun")
    ray.cancel(ref)
    assert_cancelled(ref)
    begun(tmp_path, "child interrupted")


def test_calls_of_other_actors_are_children_too(plain: Any, tmp_path: Path) -> None:
    other = ray.remote(Plain).remote()
    ref = plain.call.remote(other, tmp_path)
    begun(tmp_path)
    ray.cancel(ref)
    assert_cancelled(ref)
    assert get(other.names.remote()) == ["begun", "cancelled"]


@ray.remote
def call_and_wait(actor: Any, directory: Path) -> Any:
    return ray.get(actor.until_cancelled.remote(directory))


def test_a_task_that_is_killed_does_not_take_the_actor_that_it_called_along(
    plain: Any, tmp_path: Path
) -> None:
    ref = call_and_wait.remote(plain, tmp_path)
    begun(tmp_path)
    ray.cancel(ref, force=True)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        get(ref)
    assert get(plain.names.remote()) == ["begun", "cancelled"]


# --- what cannot be cancelled ------------------------------------------------------------------


def test_an_actor_is_not_killed_for_a_call(plain: Any) -> None:
    ref = plain.ping.remote()
    with pytest.raises(ValueError, match="force=True is not supported for actor tasks"):
        ray.cancel(ref, force=True)
    assert get(ref) is False


def test_a_call_that_has_ended_stays_as_it_is(actor: Any) -> None:
    ref = actor.run.remote("done")
    assert get(ref) == "done"
    ray.cancel(ref)
    assert get(ref) == "done"


@better_than_reference("some calls run all the same", always=False)
def test_cancelling_short_calls_at_any_moment_harms_no_other(actor: Any) -> None:
    refs = {str(number): actor.run.remote(str(number)) for number in range(400)}
    cancelled = list(refs)[::3]

    def cancel(names: list[str]) -> None:
        for name in names:
            ray.cancel(refs[name])

    threads = [threading.Thread(target=cancel, args=(cancelled[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = {}
    for name, ref in refs.items():
        try:
            outcomes[name] = get(ref)
        except ray.exceptions.TaskCancelledError:
            assert name in cancelled
    ran = get(actor.names.remote())
    assert len(ran) == len(set(ran))
    # One that was cancelled as it ran has run, but gives no result.
    assert set(outcomes) <= set(ran)
    assert set(ran) - set(outcomes) <= set(cancelled)
