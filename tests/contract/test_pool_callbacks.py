"""`callback` and `error_callback`: with what, when, where and in which order they are called."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from executor_support import DEADLINE_S, Gate, hold, identity
from pool_support import MakePool, Pool, Unpicklable, fail_if_odd, square


class Calls:
    """A pair of callbacks that take notes."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.errors: list[BaseException] = []

    @property
    def both(self) -> dict[str, Callable[[Any], None]]:
        return {"callback": self.values.append, "error_callback": self.errors.append}


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with Gate(tmp_path / "gate") as gate:
        yield gate


def start(pool: Pool, method: str, x: int, **callbacks: Any) -> Any:
    """One call of `fail_if_odd` through the named method."""
    items = {"apply_async": (x,), "map_async": [x], "starmap_async": [(x,)]}[method]
    return getattr(pool, method)(fail_if_odd, items, **callbacks)


ASYNCHRONOUS = ["apply_async", "map_async", "starmap_async"]


@pytest.mark.parametrize("method", ASYNCHRONOUS)
def test_a_success_calls_the_callback_with_what_get_returns(
    pool: Pool, calls: Calls, method: str
) -> None:
    result = start(pool, method, 4, **calls.both)
    assert result.get(DEADLINE_S) in (4, [4])
    assert len(calls.values) == 1
    assert calls.values[0] is result.get()
    assert calls.errors == []


@pytest.mark.parametrize("method", ASYNCHRONOUS)
def test_a_failure_calls_the_error_callback_with_what_get_raises(
    pool: Pool, calls: Calls, method: str
) -> None:
    result = start(pool, method, 3, **calls.both)
    with pytest.raises(ValueError, match="3 is odd") as caught:
        result.get(DEADLINE_S)
    assert len(calls.errors) == 1
    assert calls.errors[0] is caught.value
    assert type(calls.errors[0]) is ValueError
    assert calls.values == []


@pytest.mark.parametrize("method", ASYNCHRONOUS)
def test_one_callback_can_be_given_without_the_other(pool: Pool, calls: Calls, method: str) -> None:
    start(pool, method, 4, error_callback=calls.errors.append).wait(DEADLINE_S)
    start(pool, method, 3, callback=calls.values.append).wait(DEADLINE_S)
    assert calls.errors == calls.values == []


def test_callbacks_can_be_given_by_position(pool: Pool, calls: Calls) -> None:
    both = (calls.values.append, calls.errors.append)
    pool.apply_async(fail_if_odd, (2,), {}, *both).wait(DEADLINE_S)
    pool.map_async(fail_if_odd, [4], 1, *both).wait(DEADLINE_S)
    pool.starmap_async(fail_if_odd, [(6,)], None, *both).wait(DEADLINE_S)
    assert calls.values == [2, [4], [6]]
    pool.apply_async(fail_if_odd, (3,), {}, *both).wait(DEADLINE_S)
    pool.map_async(fail_if_odd, [5], 1, *both).wait(DEADLINE_S)
    pool.starmap_async(fail_if_odd, [(7,)], None, *both).wait(DEADLINE_S)
    assert [str(error) for error in calls.errors] == ["3 is odd", "5 is odd", "7 is odd"]


def test_a_map_calls_back_once_with_the_whole_list(pool: Pool, calls: Calls) -> None:
    pool.map_async(square, range(100), 1, **calls.both).wait(DEADLINE_S)
    assert calls.values == [[x * x for x in range(100)]]
    assert calls.errors == []


def test_a_map_with_many_failures_calls_back_once(pool: Pool, calls: Calls) -> None:
    pool.map_async(fail_if_odd, range(100), 1, **calls.both).wait(DEADLINE_S)
    assert calls.values == []
    assert len(calls.errors) == 1


def test_a_map_does_not_call_back_before_its_last_task(
    pool: Pool, calls: Calls, gate: Gate
) -> None:
    result = pool.map_async(hold, [gate], **calls.both)
    assert pool.apply(square, (3,)) == 9
    assert calls.values == []
    gate.open()
    result.wait(DEADLINE_S)
    assert calls.values == [[None]]


def test_an_unpicklable_call_is_an_error_to_call_back_with(pool: Pool, calls: Calls) -> None:
    pool.apply_async(identity, (Unpicklable(),), **calls.both).wait(DEADLINE_S)
    pool.map_async(identity, [Unpicklable()], **calls.both).wait(DEADLINE_S)
    assert [str(error) for error in calls.errors] == ["I cannot be pickled"] * 2
    assert calls.values == []


def test_a_callback_runs_when_nobody_waits_for_the_result(pool: Pool) -> None:
    called = threading.Event()
    failed = threading.Event()
    pool.apply_async(square, (3,), callback=lambda _: called.set())
    pool.apply_async(fail_if_odd, (3,), error_callback=lambda _: failed.set())
    assert called.wait(DEADLINE_S)
    assert failed.wait(DEADLINE_S)


def test_a_callback_runs_in_this_process_and_before_the_result_is_ready(pool: Pool) -> None:
    seen: list[tuple[int, bool]] = []
    submitted = threading.Event()

    def take_note(_: object) -> None:
        submitted.wait(DEADLINE_S)
        seen.append((os.getpid(), result.ready()))

    result = pool.apply_async(square, (3,), callback=take_note)
    submitted.set()
    result.wait(DEADLINE_S)
    assert seen == [(os.getpid(), False)]
    assert result.ready()


def test_every_callback_has_run_once_its_result_is_ready(pool: Pool, calls: Calls) -> None:
    results = [pool.apply_async(fail_if_odd, (x,), **calls.both) for x in range(200)]
    for result in results:
        result.wait(DEADLINE_S)
    assert sorted(calls.values) == list(range(0, 200, 2))
    assert sorted(str(error) for error in calls.errors) == sorted(
        f"{x} is odd" for x in range(1, 200, 2)
    )


def test_callbacks_come_in_the_order_of_completion(make_pool: MakePool, calls: Calls) -> None:
    pool = make_pool(1)
    results = [pool.apply_async(square, (x,), **calls.both) for x in range(200)]
    results[-1].wait(DEADLINE_S)
    assert calls.values == [x * x for x in range(200)]


def test_callbacks_never_run_at_the_same_time(pool: Pool) -> None:
    running = threading.Lock()
    overlaps: list[int] = []

    def take_note(value: int) -> None:
        if not running.acquire(blocking=False):
            overlaps.append(value)
            return
        sum(range(1_000))  # long enough for another thread to be switched to
        running.release()

    for _ in range(3):
        results = [pool.apply_async(square, (x,), callback=take_note) for x in range(200)]
        threads = [threading.Thread(target=result.wait) for result in results[::20]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        results[-1].get(DEADLINE_S)
    assert overlaps == []


def test_a_callback_may_submit_the_next_call(pool: Pool) -> None:
    done = threading.Event()
    values: list[int] = []

    def go_on(value: int) -> None:
        values.append(value)
        if value < 2**20:
            pool.apply_async(sum, ([value, value],), callback=go_on)
        else:
            done.set()

    pool.apply_async(identity, (1,), callback=go_on)
    assert done.wait(DEADLINE_S)
    assert values == [2**n for n in range(21)]


def test_a_callback_may_close_the_pool(pool: Pool) -> None:
    pool.apply_async(square, (3,), callback=lambda _: pool.close()).wait(DEADLINE_S)
    with pytest.raises(ValueError, match="Pool not running"):
        pool.apply(square, (3,))
    pool.join()


def test_closing_and_joining_waits_for_the_callbacks(make_pool: MakePool, calls: Calls) -> None:
    pool = make_pool(2)
    for x in range(100):
        pool.apply_async(square, (x,), **calls.both)
    pool.close()
    pool.join()
    assert sorted(calls.values) == [x * x for x in range(100)]


# In the standard pool it ends the thread that reads the results, and every later `get` hangs.
@pytest.mark.poolray_only
@pytest.mark.parametrize("method", ASYNCHRONOUS)
# Where the exception is shown is open: a log, the thread's exception hook.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_spoils_neither_its_result_nor_the_pool(
    pool: Pool, method: str
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a failing callback")

    assert start(pool, method, 4, callback=fail).get(DEADLINE_S) in (4, [4])
    with pytest.raises(ValueError, match="3 is odd"):
        start(pool, method, 3, error_callback=fail).get(DEADLINE_S)
    assert pool.map(square, [3]) == [9]
