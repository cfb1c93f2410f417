"""`util.ActorPool`: calls spread over actors, in order or as they come."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    better_than_reference,
    gate_at,
    ray,
    start_runtime,
)
from executor_support import Gate

ActorPool: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.actor_pool").ActorPool


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
class Worker:
    def double(self, value: int) -> int:
        return 2 * value

    def fail(self, value: int) -> int:
        raise KeyError(value)

    def wait_at(self, gate: Gate, value: int) -> int:
        gate.wait()
        return value

    def open(self, gate: Gate, value: int) -> int:
        gate.open()
        return value

    @ray.method(num_returns=2)
    def both(self, value: int) -> tuple[int, int]:
        return value, -value

    def pid(self) -> int:
        return os.getpid()


def double(actor: Any, value: int) -> Any:
    return actor.double.remote(value)


@pytest.fixture
def make_pool() -> Iterator[Callable[[int], Any]]:
    actors: list[Any] = []

    def make(size: int) -> Any:
        made = [Worker.remote() for _ in range(size)]
        actors.extend(made)
        return ActorPool(made)

    yield make
    for actor in actors:
        ray.kill(actor)


def test_it_is_a_name_of_util() -> None:
    assert ray.util.ActorPool is ActorPool


def test_map_gives_results_in_the_order_of_the_values(make_pool: Any) -> None:
    pool = make_pool(2)
    assert list(pool.map(double, range(20))) == [2 * n for n in range(20)]
    assert not pool.has_next()
    assert pool.has_free()


def test_map_unordered_gives_all_results(make_pool: Any) -> None:
    pool = make_pool(2)
    assert sorted(pool.map_unordered(double, range(20))) == [2 * n for n in range(20)]


def test_a_slow_call_does_not_hold_back_those_after_it_when_any_order_will_do(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool(2)
    with gate_at(tmp_path / "gate") as gate:
        pool.submit(lambda actor, value: actor.wait_at.remote(gate, value), -1)
        for value in range(5):
            pool.submit(double, value)
        assert sorted(pool.get_next_unordered() for _ in range(5)) == [0, 2, 4, 6, 8]
        gate.open()
        assert pool.get_next_unordered() == -1
    assert not pool.has_next()


@better_than_reference("its other actors do nothing meanwhile", run=False)
def test_calls_behind_a_slow_one_run_while_its_result_is_waited_for(
    make_pool: Any, tmp_path: Path
) -> None:
    pool = make_pool(2)
    with gate_at(tmp_path / "gate") as gate:
        pool.submit(lambda actor, value: actor.wait_at.remote(gate, value), -1)
        for value in range(4):
            pool.submit(double, value)

        # The last call opens the gate that the first one waits at.
        pool.submit(lambda actor, value: actor.open.remote(gate, value), 8)
        assert [pool.get_next() for _ in range(6)] == [-1, 0, 2, 4, 6, 8]


def test_submit_and_get_next_keep_the_order(make_pool: Any) -> None:
    pool = make_pool(1)
    assert not pool.has_next()
    assert pool.has_free()
    for value in range(3):
        pool.submit(double, value)
    assert pool.has_next()
    assert not pool.has_free()
    assert [pool.get_next() for _ in range(3)] == [0, 2, 4]


def test_an_empty_pool_has_no_next_result(make_pool: Any) -> None:
    pool = make_pool(1)
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_a_late_result_is_a_timeout_and_comes_later(make_pool: Any, tmp_path: Path) -> None:
    pool = make_pool(1)
    with gate_at(tmp_path / "gate") as gate:
        pool.submit(lambda actor, value: actor.wait_at.remote(gate, value), 1)
        with pytest.raises(TimeoutError):
            pool.get_next(timeout=0.01)
        with pytest.raises(TimeoutError):
            pool.get_next_unordered(timeout=0.01)
        gate.open()
        assert pool.get_next(timeout=30) == 1


def test_a_late_result_can_be_given_up(make_pool: Any, tmp_path: Path) -> None:
    pool = make_pool(1)
    with gate_at(tmp_path / "gate") as gate:
        pool.submit(lambda actor, value: actor.wait_at.remote(gate, value), 1)
        pool.submit(double, 2)
        with pytest.raises(TimeoutError, match="has been ignored"):
            pool.get_next(timeout=0.01, ignore_if_timedout=True)
        gate.open()
        assert pool.get_next() == 4
    assert not pool.has_next()


def test_get_next_after_get_next_unordered_is_refused(make_pool: Any, tmp_path: Path) -> None:
    pool = make_pool(2)
    with gate_at(tmp_path / "gate") as gate:
        pool.submit(lambda actor, value: actor.wait_at.remote(gate, value), 1)
        pool.submit(double, 2)
        assert pool.get_next_unordered() == 4
        with pytest.raises(ValueError, match="not allowed to call get_next"):
            pool.get_next()
        gate.open()
        assert pool.get_next_unordered() == 1


def test_an_error_of_a_call_is_raised_and_the_rest_goes_on(make_pool: Any) -> None:
    pool = make_pool(1)
    pool.submit(lambda actor, value: actor.fail.remote(value), 7)
    pool.submit(double, 2)
    with pytest.raises(KeyError):
        pool.get_next()
    assert pool.get_next() == 4
    assert pool.has_free()


def test_several_return_values_are_one_result(make_pool: Any) -> None:
    pool = make_pool(2)
    results = list(pool.map(lambda actor, value: actor.both.remote(value), [1, 2, 3]))
    assert results == [[1, -1], [2, -2], [3, -3]]


@better_than_reference("it waits for a list of refs as if it were one")
def test_several_return_values_may_come_in_any_order(make_pool: Any) -> None:
    pool = make_pool(2)
    both = pool.map_unordered(lambda actor, value: actor.both.remote(value), [1, 2, 3])
    assert sorted(both) == [[1, -1], [2, -2], [3, -3]]


def test_map_forgets_what_was_submitted_before(make_pool: Any) -> None:
    pool = make_pool(2)
    for value in range(100, 110):
        pool.submit(double, value)
    assert list(pool.map(double, [1, 2, 3])) == [2, 4, 6]


@better_than_reference("map raises the error of a call that nobody asks for any more")
def test_map_forgets_errors_too(make_pool: Any) -> None:
    pool = make_pool(1)
    failed = []

    def fail(actor: Any, value: int) -> Any:
        failed.append(actor.fail.remote(value))
        return failed[-1]

    pool.submit(fail, 7)
    ray.wait(failed)
    assert list(pool.map(double, [1, 2])) == [2, 4]


def test_members_come_and_go(make_pool: Any) -> None:
    pool = make_pool(1)
    actor = pool.pop_idle()
    assert actor is not None
    assert pool.pop_idle() is None
    assert not pool.has_free()
    pool.submit(double, 4)
    pool.push(actor)
    assert pool.get_next() == 8
    with pytest.raises(ValueError, match="already belongs"):
        pool.push(actor)


def test_a_busy_member_cannot_be_pushed_again(make_pool: Any) -> None:
    pool = make_pool(1)
    actor = pool.pop_idle()
    pool.push(actor)
    pool.submit(double, 4)
    with pytest.raises(ValueError, match="already belongs"):
        pool.push(actor)
    assert pool.pop_idle() is None


def test_a_dead_actor_leaves_the_pool_and_the_others_go_on(make_pool: Any) -> None:
    pool = make_pool(2)
    victim = pool.pop_idle()
    pid = ray.get(victim.pid.remote())
    pool.push(victim)
    os.kill(pid, signal.SIGKILL)
    for value in range(6):
        pool.submit(double, value)
    seen, deaths = [], 0
    while pool.has_next():
        try:
            seen.append(pool.get_next_unordered(timeout=30))
        except ray.exceptions.ActorDiedError:
            deaths += 1
    assert deaths == 1
    assert len(seen) == 5


@better_than_reference("it takes the actor for dead")
def test_an_actor_that_only_tells_of_a_dead_one_stays_in_the_pool(make_pool: Any) -> None:
    other = Worker.remote()
    ray.kill(other)

    def call_the_dead(actor: Any, handle: Any) -> Any:
        return actor.__ray_call__.remote(lambda _: ray.get(handle.pid.remote()))

    pool = make_pool(1)
    pool.submit(call_the_dead, other)
    pool.submit(double, 4)
    with pytest.raises(ray.exceptions.RayError):
        pool.get_next()
    assert pool.get_next() == 8


@better_than_reference("it says that there is nothing more to come")
def test_calls_that_wait_for_dead_actors_are_told_of(make_pool: Any) -> None:
    pool = make_pool(1)
    pool.submit(lambda actor, _: actor.__ray_terminate__.remote(), None)
    pool.submit(double, 1)
    with pytest.raises(ray.exceptions.ActorDiedError):
        pool.get_next()
    assert pool.has_next()
    with pytest.raises(RuntimeError, match="push"):
        pool.get_next()
    pool.push(Worker.remote())
    assert pool.get_next() == 2


@better_than_reference("the actor is lost to the pool")
def test_a_function_that_raises_costs_no_actor(make_pool: Any) -> None:
    pool = make_pool(1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda actor, value: 1 // 0, 1)
    assert pool.has_free()


@pytest.mark.skipif(IS_REFERENCE, reason="it fails when the result is taken")
def test_a_function_that_returns_no_ref_is_refused_at_once(make_pool: Any) -> None:
    pool = make_pool(1)
    with pytest.raises(TypeError, match="must return the ref"):
        pool.submit(lambda actor, value: value, 1)
    assert pool.has_free()


@pytest.mark.parametrize("method", ["get_next", "get_next_unordered"])
def test_a_negative_timeout_is_refused_and_takes_nothing(make_pool: Any, method: str) -> None:
    pool = make_pool(1)
    pool.submit(double, 1)
    with pytest.raises(ValueError, match="must be nonnegative"):
        getattr(pool, method)(timeout=-1)
    assert getattr(pool, method)(timeout=30) == 2
