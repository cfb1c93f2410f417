"""Workers that are killed: calls are tried again, or fail with an error that says what happened.

The standard pool starts another worker but loses the call, whose result never comes.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_support import DEADLINE_S, Gate, kill_own_worker, leave_mark, marks, wait_until
from pool_support import (
    IMAPS,
    MAPS,
    MakePool,
    Pool,
    all_dead,
    collect,
    current_pid,
    die_once,
    processes_of,
    square,
)

pytestmark = pytest.mark.poolray_only


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with Gate(tmp_path / "gate") as gate:
        yield gate


def die_once_if_multiple_of_5(directory: Path, x: int) -> int:
    return x if x % 5 else die_once(directory, x)


def announce_and_wait_for_death(started: Gate, directory: Path, x: int) -> int:
    """At the first attempt at 0, say so and wait; all else goes through."""
    if x == 0 and "0" not in marks(directory):
        leave_mark(directory, 0)
        leave_mark(directory, f"pid-{os.getpid()}")
        started.open()
        signal.pause()
    return x


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_a_map_survives_workers_that_die(
    pool: Pool, tmp_path: Path, method: str, chunksize: int
) -> None:
    task = functools.partial(die_once_if_multiple_of_5, tmp_path)
    assert collect(pool, method, task, range(20), chunksize=chunksize) == list(range(20))


def test_single_calls_survive_workers_that_die(pool: Pool, tmp_path: Path) -> None:
    assert pool.apply(die_once, (tmp_path, 100)) == 100
    results = [pool.apply_async(die_once_if_multiple_of_5, (tmp_path, x)) for x in range(10)]
    assert [result.get(DEADLINE_S) for result in results] == list(range(10))


@pytest.mark.parametrize("chunksize", [1, 5])
def test_a_map_survives_the_death_of_a_worker_from_outside(
    pool: Pool, gate: Gate, tmp_path: Path, chunksize: int
) -> None:
    (directory := tmp_path / "marks").mkdir()
    task = functools.partial(announce_and_wait_for_death, gate, directory)
    result = pool.map_async(task, range(20), chunksize)
    gate.wait()
    (pid,) = (int(mark[4:]) for mark in marks(directory) if mark.startswith("pid-"))
    os.kill(pid, signal.SIGKILL)
    assert result.get(DEADLINE_S) == list(range(20))


def test_a_call_whose_worker_always_dies_fails_and_says_why(pool: Pool) -> None:
    errors: list[BaseException] = []
    result = pool.apply_async(kill_own_worker, error_callback=errors.append)
    with pytest.raises(Exception, match="kill_own_worker") as caught:
        result.get(DEADLINE_S)
    assert type(caught.value).__name__ == "WorkerCrashedError"
    assert "SIGKILL" in str(caught.value) or "signal 9" in str(caught.value)
    assert errors == [caught.value]
    assert pool.map(square, [3]) == [9]


def die_if_2(x: int) -> int:
    return kill_own_worker() if x == 2 else x


def test_only_the_call_that_kills_its_worker_fails(pool: Pool) -> None:
    results = pool.imap(die_if_2, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(Exception, match="die_if_2"):
        next(results)
    assert list(results) == [3, 4]


def test_a_map_with_a_call_that_kills_its_worker_fails_and_the_pool_goes_on(pool: Pool) -> None:
    result = pool.map_async(die_if_2, range(5), 1)
    with pytest.raises(Exception, match="die_if_2"):
        result.get(DEADLINE_S)
    assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_idle_workers_that_die_are_replaced(
    make_pool: MakePool, signal_number: signal.Signals
) -> None:
    pool = make_pool(2)
    assert pool.map(square, range(10)) == [x * x for x in range(10)]
    before = processes_of(pool)
    for pid in before:
        os.kill(pid, signal_number)
    wait_until(lambda: all_dead(before))
    assert pool.map(square, range(10)) == [x * x for x in range(10)]
    wait_until(lambda: [process.is_alive() for process in pool._pool] == [True, True])
    assert not set(before) & set(processes_of(pool))


def test_replacements_are_initialized(make_pool: MakePool, tmp_path: Path) -> None:
    (ran := tmp_path / "ran").mkdir()
    pool = make_pool(1, leave_mark, (ran, "initializer"))
    assert pool.apply(die_once, (tmp_path, 1)) == 1
    assert (ran / "initializer").read_text().count("\n") == 2
    assert pool.apply(current_pid) == processes_of(pool)[0]


def test_closing_and_joining_waits_for_calls_that_are_tried_again(
    pool: Pool, tmp_path: Path
) -> None:
    task = functools.partial(die_once_if_multiple_of_5, tmp_path)
    result = pool.map_async(task, range(20), 1)
    pool.close()
    pool.join()
    assert result.get(0) == list(range(20))
