"""`timeout=` of pools: an item that runs too long fails alone, and every other one runs once."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from executor_support import DEADLINE_S, Gate, leave_mark, wait_until
from pool_support import IMAPS, MAPS, MakePool, Pool, all_dead, current_pid, processes_of, square

from poolray.exceptions import CallTimeoutError, PoolrayError

pytestmark = pytest.mark.poolray_only

#: The item that is late: behind enough others that some travel in one packet with it.
LATE_ONE = 150
#: Long enough for what is not to be late, on a machine that is busy.
LIMIT_S = 0.4


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with Gate(tmp_path / "gate") as gate:
        yield gate


def note_run(directory: Path, x: int) -> None:
    """One file per run, with a name of its own."""
    leave_mark(directory, f"run-{x}-{os.getpid()}-{time.monotonic_ns()}")


def runs(directory: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("run-*"))


def sleep_at_late_one(directory: Path, x: int) -> int:
    note_run(directory, x)
    if x == LATE_ONE:
        time.sleep(DEADLINE_S)
    return x


def hang_at_late_one(directory: Path, x: int) -> int:
    """As code in C that does not look at signals."""
    note_run(directory, x)
    if x == LATE_ONE:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(DEADLINE_S)
    return x


def swallow_at_late_one(directory: Path, x: int) -> int:
    note_run(directory, x)
    if x == LATE_ONE:
        try:
            time.sleep(DEADLINE_S)
        except BaseException:
            return -1
    return x


def fail_late_at_late_one(directory: Path, x: int) -> int:
    note_run(directory, x)
    if x == LATE_ONE:
        try:
            time.sleep(DEADLINE_S)
        finally:
            raise ValueError("while it was interrupted")
    return x


LATE = [sleep_at_late_one, hang_at_late_one, swallow_at_late_one, fail_late_at_late_one]


def outcomes(results: Any, count: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(count):
        try:
            found.append(results.next(timeout=DEADLINE_S))
        except Exception as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("function", LATE)
def test_only_the_late_item_fails_and_every_other_one_runs_exactly_once(
    make_pool: MakePool, tmp_path: Path, function: Any
) -> None:
    pool = make_pool(2)
    results = pool.imap(functools.partial(function, tmp_path), range(200), timeout=LIMIT_S)
    expected: list[Any] = list(range(200))
    expected[LATE_ONE] = CallTimeoutError
    assert outcomes(results, 200) == expected
    assert runs(tmp_path) == list(range(200))


@pytest.mark.parametrize("chunksize", [1, 7])
@pytest.mark.parametrize("method", MAPS)
def test_a_map_runs_all_others_and_fails_with_the_late_one(
    make_pool: MakePool, tmp_path: Path, method: str, chunksize: int
) -> None:
    pool = make_pool(2)
    items: Any = range(LATE_ONE - 3, LATE_ONE + 17)
    if method.startswith("starmap"):
        items = zip(items)
    function = functools.partial(sleep_at_late_one, tmp_path)

    def run() -> Any:
        results = getattr(pool, method)(function, items, chunksize, timeout=LIMIT_S)
        return results.get(DEADLINE_S) if method.endswith("_async") else results

    with pytest.raises(TimeoutError, match="ran for longer") as caught:
        run()
    assert caught.value.timeout_s == LIMIT_S  # type: ignore[attr-defined]
    assert "time.sleep(DEADLINE_S)" in str(caught.value.__cause__)
    assert runs(tmp_path) == list(range(LATE_ONE - 3, LATE_ONE + 17))


@pytest.mark.parametrize("method", IMAPS)
def test_a_chunksize_does_not_make_neighbours_late(
    make_pool: MakePool, tmp_path: Path, method: str
) -> None:
    pool = make_pool(2)
    function = functools.partial(sleep_at_late_one, tmp_path)
    items = range(LATE_ONE - 3, LATE_ONE + 17)
    found = outcomes(getattr(pool, method)(function, items, 10, timeout=LIMIT_S), 20)
    assert found.count(CallTimeoutError) == 1
    assert {x for x in found if x is not CallTimeoutError} == {*items} - {LATE_ONE}


@pytest.mark.parametrize("call", [time.sleep, functools.partial(time.sleep)])
def test_one_call_is_limited(make_pool: MakePool, call: Any) -> None:
    pool = make_pool(1)
    with pytest.raises(TimeoutError, match=r"ran for longer than its timeout of 0\.1 s"):
        pool.apply(call, (DEADLINE_S,), timeout=0.1)
    assert pool.apply(call, (0.0,), timeout=DEADLINE_S) is None
    assert pool.apply_async(square, (3,), timeout=DEADLINE_S).get(DEADLINE_S) == 9


def test_the_time_of_an_item_begins_in_the_worker(make_pool: MakePool, gate: Gate) -> None:
    """Those that wait longer than the limit for their turn are not late."""
    pool = make_pool(1)
    held = pool.apply_async(gate.wait)
    waiting = pool.imap(square, range(3), timeout=0.05)
    pool.apply_async(time.sleep, (0.2,))
    gate.open()
    held.get(DEADLINE_S)
    assert outcomes(waiting, 3) == [0, 1, 4]


def test_the_worker_of_a_late_item_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool(1)
    before = processes_of(pool)
    with pytest.raises(TimeoutError):
        pool.apply(time.sleep, (DEADLINE_S,), timeout=0.1)
    assert pool.apply(current_pid) not in before
    wait_until(lambda: all_dead(before))


def test_a_new_worker_runs_the_initializer(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, initializer=note_run, initargs=(tmp_path, 1), maxtasksperchild=100)
    with pytest.raises(TimeoutError):
        pool.apply(time.sleep, (DEADLINE_S,), timeout=0.1)
    assert pool.apply(square, (2,), timeout=DEADLINE_S) == 4
    assert runs(tmp_path) == [1, 1]


def test_many_late_items_cost_no_retries(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2, max_retries=0)
    found = outcomes(
        pool.imap(functools.partial(time.sleep), [60, 0, 60, 0, 60, 0], timeout=0.1), 6
    )
    assert found == [CallTimeoutError, None] * 3


def test_an_items_own_errors_and_deaths_are_what_they_are(make_pool: MakePool) -> None:
    pool = make_pool(1, max_retries=0)
    with pytest.raises(ZeroDivisionError):
        pool.apply(divmod, (1, 0), timeout=DEADLINE_S)
    with pytest.raises(PoolrayError, match="exited with code 3"):
        pool.apply(os._exit, (3,), timeout=DEADLINE_S)


def test_a_pool_with_late_items_can_be_closed_and_terminated(make_pool: MakePool) -> None:
    pool = make_pool(2)
    results = pool.map_async(time.sleep, [DEADLINE_S] * 4, timeout=0.1)
    pool.close()
    pool.join()
    with pytest.raises(TimeoutError):
        results.get(0)
    other = make_pool(1)
    pending = other.map_async(time.sleep, [DEADLINE_S] * 4, timeout=DEADLINE_S)
    other.terminate()
    other.join()
    with pytest.raises(PoolrayError, match="terminated"):
        pending.get(DEADLINE_S)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_limit_is_above_zero(pool: Pool, timeout: float) -> None:
    for method in (*MAPS, *IMAPS):
        with pytest.raises(ValueError, match="timeout must be above 0"):
            getattr(pool, method)(square, [1], timeout=timeout)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        pool.apply(square, (1,), timeout=timeout)


@pytest.mark.parametrize("timeout", ["1", True, [1]])
def test_a_limit_is_a_number(pool: Pool, timeout: Any) -> None:
    with pytest.raises(TypeError, match="number of seconds"):
        pool.map(square, [1], timeout=timeout)
    with pytest.raises(TypeError, match="number of seconds"):
        pool.apply_async(square, (1,), timeout=timeout)
