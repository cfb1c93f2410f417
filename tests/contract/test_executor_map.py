"""`Executor.map`: the built-in `map`, with tasks submitted at once and answers in order."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures import wait
from pathlib import Path

import pytest
from executor_support import (
    DEADLINE_S,
    ExecutorClass,
    Gate,
    add,
    announce_and_hold,
    double,
    hold,
    identity,
    leave_mark,
    marks,
    wait_until,
)

# --- the answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 3, 10, 39, 40, 41, 1000])
def test_map_answers_as_the_builtin_for_every_chunksize(
    executor_implementation: ExecutorClass, chunksize: int
) -> None:
    with executor_implementation(max_workers=2) as executor:
        answers = list(executor.map(pow, range(40), range(40), chunksize=chunksize))
    assert answers == list(map(pow, range(40), range(40)))


def test_map_stops_with_the_shortest_iterable(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        assert list(executor.map(add, itertools.count(), [10, 20, 30])) == [10, 21, 32]
        assert list(executor.map(add, itertools.count(), [10, 20, 30], chunksize=2)) == [10, 21, 32]


def test_map_of_nothing_is_empty(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert list(executor.map(add, [])) == []
        assert list(executor.map(add, [], chunksize=5)) == []
        assert list(executor.map(add)) == []


def test_map_keeps_the_order_when_later_tasks_end_first(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=2) as executor,
        Gate(tmp_path / "first") as first,
        Gate(tmp_path / "second") as second,
    ):
        # The first task ends only once the second one runs, so the second is never the later one.
        answers = executor.map(open_and_wait, [second, first], [first, second], ["a", "b"])
        assert list(answers) == ["a", "b"]


def open_and_wait(theirs: Gate, mine: Gate, value: str) -> str:
    theirs.open()
    mine.wait()
    return value


def test_map_of_thousands_of_items(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        assert list(executor.map(double, range(3000))) == list(range(0, 6000, 2))
        answers = executor.map(double, range(50_000), chunksize=500)
        assert sum(answers) == sum(range(0, 100_000, 2))


def test_several_maps_can_be_consumed_in_turns(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        pairs = zip(executor.map(double, range(20)), executor.map(add, range(20), [1] * 20))
        assert list(pairs) == [(2 * n, n + 1) for n in range(20)]


def test_map_answers_with_an_iterator(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        answers = executor.map(double, [1, 2])
        assert iter(answers) is answers
        assert next(answers) == 2
        assert next(answers) == 4
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(answers)


# --- what is done when -------------------------------------------------------------------------


def test_map_runs_everything_even_if_nobody_looks_at_the_answers(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor:
        executor.map(leave_mark, [tmp_path] * 10, range(10))
    assert marks(tmp_path) == {str(n) for n in range(10)}


def test_map_reads_its_input_at_the_call(executor_implementation: ExecutorClass) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(5):
            read.append(n)
            yield n

    with executor_implementation(max_workers=1) as executor:
        answers = executor.map(double, numbers())
        assert read == [0, 1, 2, 3, 4]
        assert list(answers) == [0, 2, 4, 6, 8]


def test_an_error_in_the_input_is_raised_by_the_call(
    executor_implementation: ExecutorClass,
) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise LookupError("no more numbers")

    with executor_implementation(max_workers=1) as executor:
        with pytest.raises(LookupError, match="no more numbers"):
            executor.map(double, numbers())
        with pytest.raises(TypeError):
            executor.map(double, 5)
        assert executor.submit(double, 2).result() == 4


@pytest.mark.parametrize("chunksize", [0, -1])
def test_a_chunksize_under_one_is_refused_by_the_call(
    executor_implementation: ExecutorClass, chunksize: int
) -> None:
    with executor_implementation(max_workers=1) as executor:
        with pytest.raises(ValueError, match="chunksize must be >= 1"):
            executor.map(double, [1], chunksize=chunksize)


# --- errors, timeouts, consumers that leave ----------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 2])
def test_an_error_comes_in_its_place_and_ends_the_iteration(
    executor_implementation: ExecutorClass, chunksize: int
) -> None:
    with executor_implementation(max_workers=2) as executor:
        answers = executor.map(divmod, [4, 4, 4, 4, 4], [1, 2, 0, 1, 2], chunksize=chunksize)
        assert next(answers) == (4, 0)
        assert next(answers) == (2, 0)
        with pytest.raises(ZeroDivisionError) as caught:
            next(answers)
        assert "ZeroDivisionError" in str(caught.value.__cause__)
        with pytest.raises(StopIteration):
            next(answers)


def test_an_error_takes_the_rest_of_its_chunk_along(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        answers = executor.map(divmod, [4, 4, 4, 4], [1, 2, 0, 1], chunksize=4)
        with pytest.raises(ZeroDivisionError):
            next(answers)


def test_an_item_that_cannot_be_pickled_fails_in_its_place(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        answers = executor.map(identity, [1, threading.Lock(), 3])
        assert next(answers) == 1
        with pytest.raises(TypeError, match="cannot pickle"):
            next(answers)


def test_a_timeout_is_raised_for_the_first_late_answer(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        answers = executor.map(wait_if_given, [gate], timeout=0.05)
        with pytest.raises(FuturesTimeoutError):
            next(answers)
        with pytest.raises(StopIteration):
            next(answers)


def test_answers_before_the_late_one_are_delivered(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        wait([executor.submit(add, 1)])
        answers = executor.map(wait_if_given, [None, None, gate], timeout=1.0)
        assert next(answers) is None
        assert next(answers) is None
        with pytest.raises(FuturesTimeoutError):
            next(answers)


def wait_if_given(gate: Gate | None) -> None:
    if gate is not None:
        gate.wait()


def test_the_timeout_counts_from_the_call_and_spares_answers_that_are_there(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor:
        answers = executor.map(leave_mark, [tmp_path] * 3, range(3), timeout=0)
        wait_until(lambda: len(marks(tmp_path)) == 3)
        wait([executor.submit(add, 1)])
        assert list(answers) == [0, 1, 2]


@pytest.mark.parametrize("how", ["close", "drop", "timeout"])
def test_the_rest_is_cancelled_when_the_consumer_leaves(
    executor_implementation: ExecutorClass, tmp_path: Path, how: str
) -> None:
    directory, count = tmp_path / "marks", 100
    directory.mkdir()
    with (
        executor_implementation(max_workers=1) as executor,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "gate") as gate,
    ):
        wait([executor.submit(add, 1)])
        timeout = 0.5 if how == "timeout" else None
        answers = executor.map(
            pass_hold_or_mark,
            [started] * count,
            [gate] * count,
            [directory] * count,
            range(count),
            timeout=timeout,
        )
        assert next(answers) == 0
        started.wait()
        if how == "close":
            answers.close()
        elif how == "timeout":
            with pytest.raises(FuturesTimeoutError):
                next(answers)
        del answers
    # How many were already on their way to the worker is the implementation's affair.
    assert "0" in marks(directory)
    assert str(count - 1) not in marks(directory)


def pass_hold_or_mark(started: Gate, gate: Gate, directory: Path, n: int) -> int:
    """The second task holds up the single worker."""
    if n == 1:
        announce_and_hold(started, gate)
    leave_mark(directory, n)
    return n


def test_a_failed_map_cancels_what_has_not_begun(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    directory, count = tmp_path / "marks", 100
    directory.mkdir()
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        answers = executor.map(fail_hold_or_mark, [gate] * count, [directory] * count, range(count))
        with pytest.raises(LookupError):
            next(answers)
    assert str(count - 1) not in marks(directory)


def fail_hold_or_mark(gate: Gate, directory: Path, n: int) -> None:
    if n == 0:
        raise LookupError("the first one fails")
    if n == 1:
        gate.wait()
    leave_mark(directory, n)


# --- life cycle --------------------------------------------------------------------------------


def test_map_after_shutdown_is_refused(executor_implementation: ExecutorClass) -> None:
    executor = executor_implementation(max_workers=1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(double, [1, 2])


def test_answers_can_be_read_after_shutdown(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        answers = executor.map(double, range(10))
    assert list(answers) == list(range(0, 20, 2))


def test_answers_can_be_read_in_another_thread(executor_implementation: ExecutorClass) -> None:
    found: list[int] = []
    with executor_implementation(max_workers=2) as executor:
        answers = executor.map(double, range(10))
        thread = threading.Thread(target=found.extend, args=(answers,))
        thread.start()
        thread.join(DEADLINE_S)
    assert found == list(range(0, 20, 2))


def test_answers_of_a_map_whose_executor_was_dropped(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with Gate(tmp_path / "gate") as gate:
        answers = executor_implementation(max_workers=1).map(hold, [gate] * 3, range(3))
        gate.open(count=3)
        assert list(answers) == [0, 1, 2]
