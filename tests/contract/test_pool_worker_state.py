"""`worker_state=`, `worker_init=` and `worker_exit=` of pools: set up once, given to each call."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from executor_support import DEADLINE_S, kill_own_worker, leave_mark, marks
from pool_support import IMAPS, MAPS, MakePool, collect, processes_of

from poolray.exceptions import TaskError

pytestmark = pytest.mark.poolray_only


def set_up(state: Any) -> None:
    state["calls"] = 0


def count(state: Any, x: int) -> int:
    state["calls"] += 1
    return x


def calls_of(state: Any) -> int:
    calls: int = state["calls"]
    return calls


def describe(state: Any, *args: Any, **kwargs: Any) -> Any:
    return dict(state), args, kwargs


class Adder:
    """A callable with state of its own."""

    def __call__(self, state: Any, x: int) -> int:
        return int(state) + x


def closed(pool: Any) -> Any:
    pool.close()
    pool.join()
    return pool


@pytest.mark.parametrize("chunksize", [1, 5])
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_each_call_gets_the_state_of_its_worker(
    make_pool: MakePool, method: str, chunksize: int
) -> None:
    pool = make_pool(2, worker_state=True, worker_init=set_up, worker_exit=calls_of)
    assert collect(pool, method, count, range(40), chunksize=chunksize) == list(range(40))
    assert sum(closed(pool).get_exit_results()) == 40


def test_a_callable_makes_the_state_in_the_worker(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_state=os.getpid)
    assert pool.apply(lambda state: state) == processes_of(pool)[0]
    assert pool.apply(Adder(), (1,)) == processes_of(pool)[0] + 1


def test_arguments_come_after_the_state(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_state=True)
    assert pool.apply(describe, (1,), {"x": 2}) == ({}, (1,), {"x": 2})
    assert pool.starmap(describe, [(1, 2)]) == [({}, (1, 2), {})]


def test_without_a_state_init_and_exit_are_called_with_nothing(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(
        1, worker_init=functools.partial(leave_mark, tmp_path, "began"), worker_exit=os.getpid
    )
    pids = processes_of(pool)
    assert pool.map(abs, [-1]) == [1]
    assert closed(pool).get_exit_results() == pids
    assert "began" in marks(tmp_path)


def test_the_initializer_runs_before_the_state_is_made(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(
        1,
        initializer=leave_mark,
        initargs=(tmp_path, "initializer"),
        worker_state=functools.partial(marks, tmp_path),
    )
    assert "initializer" in pool.apply(lambda state: state)


def test_workers_that_are_replaced_leave_their_results(make_pool: MakePool) -> None:
    pool = make_pool(
        2, worker_state=True, worker_init=set_up, worker_exit=calls_of, maxtasksperchild=5
    )
    assert pool.map(count, range(40), chunksize=1) == list(range(40))
    results = closed(pool).get_exit_results()
    assert sum(results) == 40
    assert len(results) >= 8
    assert max(results) <= 5


def test_large_exit_results_arrive_whole(make_pool: MakePool) -> None:
    pool = make_pool(2, worker_exit=lambda: list(range(200_000)))
    pool.map(abs, range(10))
    assert closed(pool).get_exit_results() == [list(range(200_000))] * 2


def test_exit_results_that_came_so_far_can_be_read_meanwhile(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_exit=os.getpid)
    assert pool.get_exit_results() == []
    assert pool.map(abs, [1]) == [1]


def test_an_exit_function_that_raises_is_heard_of(make_pool: MakePool, capfd: Any) -> None:
    pool = make_pool(1, worker_state=True, worker_exit=lambda state: state["nothing"])
    pool.map(len, [])
    with pytest.raises(KeyError, match="nothing"):
        closed(pool).get_exit_results()
    assert "KeyError" in capfd.readouterr().err


def test_an_exit_result_that_cannot_be_pickled_is_an_error(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_exit=lambda: os.scandir("/"))
    with pytest.raises(TypeError, match="pickle"):
        closed(pool).get_exit_results()


def test_an_init_function_that_raises_fails_the_calls(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_state=True, worker_init=calls_of)
    with pytest.raises(TaskError, match="calls"):
        pool.apply_async(count, (1,)).get(DEADLINE_S)


def test_a_killed_worker_leaves_nothing_and_its_successor_has_a_new_state(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(1, worker_state=True, worker_init=set_up, worker_exit=calls_of)
    pool.map(count, range(3))
    assert pool.apply(functools.partial(kill_once, tmp_path)) == 0
    assert closed(pool).get_exit_results() == [0]


def kill_once(directory: Path, state: Any) -> int:
    if "died" not in marks(directory):
        leave_mark(directory, "died")
        kill_own_worker()
    return calls_of(state)


def test_terminate_runs_no_exit_functions(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2, worker_exit=functools.partial(leave_mark, tmp_path, "exit"))
    pool.map(abs, range(4))
    pool.terminate()
    pool.join()
    assert pool.get_exit_results() == []
    assert "exit" not in marks(tmp_path)


def test_a_worker_that_was_late_leaves_its_result(make_pool: MakePool) -> None:
    pool = make_pool(1, worker_state=True, worker_init=set_up, worker_exit=calls_of)
    pool.map(count, range(3), timeout=DEADLINE_S)
    with pytest.raises(TimeoutError):
        pool.apply(sleep_long, timeout=0.1)
    assert pool.map(count, range(2), timeout=DEADLINE_S) == [0, 1]
    assert closed(pool).get_exit_results() == [3, 2]


def sleep_long(state: Any) -> None:
    time.sleep(DEADLINE_S)


@pytest.mark.parametrize(
    "options", [{"worker_state": 3}, {"worker_init": 3}, {"worker_exit": "bye"}]
)
def test_bad_values_are_refused_at_once(make_pool: MakePool, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        make_pool(1, **options)
