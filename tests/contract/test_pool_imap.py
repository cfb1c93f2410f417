"""`imap` and `imap_unordered`: order, laziness, time limits, and errors raised in their place."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from executor_support import DEADLINE_S, Gate, add, identity
from pool_support import (
    IMAPS,
    FailingSizedInput,
    Failure,
    MakePool,
    Pool,
    Unpicklable,
    collect,
    fail_if_odd,
    failing_input,
    hold_if_string,
    square,
)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with Gate(tmp_path / "gate") as gate:
        yield gate


def drain(results: Iterator[Any]) -> tuple[list[Any], list[Exception]]:
    """All values and all errors up to the end, however many errors come in between."""
    values: list[Any] = []
    errors: list[Exception] = []
    while True:
        try:
            values.append(next(results))
        except StopIteration:
            return values, errors
        except Exception as error:
            errors.append(error)


@pytest.mark.parametrize("chunksize", [1, 2, 100])
@pytest.mark.parametrize("method", IMAPS)
def test_the_result_is_an_iterator_that_ends_and_stays_ended(
    pool: Pool, method: str, chunksize: int
) -> None:
    results = getattr(pool, method)(square, range(5), chunksize)
    assert iter(results) is results
    assert sorted(results) == [0, 1, 4, 9, 16]
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(results)
    assert list(results) == []


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("method", IMAPS)
def test_an_empty_input_gives_nothing(pool: Pool, method: str, chunksize: int) -> None:
    for empty in ([], iter(()), range(0), ""):
        assert list(getattr(pool, method)(square, empty, chunksize)) == []


@pytest.mark.parametrize("method", IMAPS)
def test_arguments_can_be_named(pool: Pool, method: str) -> None:
    assert list(getattr(pool, method)(func=square, iterable=[3], chunksize=1)) == [9]


@pytest.mark.parametrize("chunksize", [1, 7, 1_000])
@pytest.mark.parametrize("method", IMAPS)
def test_many_items_come_each_once(pool: Pool, method: str, chunksize: int) -> None:
    assert collect(pool, method, abs, range(3_000), chunksize=chunksize) == list(range(3_000))


@pytest.mark.parametrize("method", IMAPS)
def test_next_is_a_method_with_a_timeout(pool: Pool, gate: Gate, method: str) -> None:
    results = getattr(pool, method)(functools.partial(hold_if_string, gate), [1, "held"])
    assert results.next() == 1
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0)
    gate.open()
    assert results.next(timeout=DEADLINE_S) == "held"
    with pytest.raises(StopIteration):
        results.next()
    with pytest.raises(StopIteration):
        results.next(timeout=0)


def test_unordered_results_come_as_they_are_ready(pool: Pool, gate: Gate) -> None:
    results = pool.imap_unordered(functools.partial(hold_if_string, gate), ["held", 1, 2, 3])
    assert sorted(results.next(DEADLINE_S) for _ in range(3)) == [1, 2, 3]
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0)
    gate.open()
    assert list(results) == ["held"]


def test_ordered_results_wait_for_their_turn(pool: Pool, gate: Gate) -> None:
    results = pool.imap(functools.partial(hold_if_string, gate), ["held", 1, 2, 3])
    # The other worker answers this after it has done 1, 2 and 3.
    assert pool.apply(square, (3,)) == 9
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.01)
    gate.open()
    assert list(results) == ["held", 1, 2, 3]


@pytest.mark.parametrize("method", IMAPS)
def test_work_starts_before_anybody_asks_for_results(
    pool: Pool, tmp_path: Path, method: str
) -> None:
    gates = [Gate(tmp_path / name) for name in "abc"]
    results = getattr(pool, method)(Gate.open, gates)
    for gate in gates:
        gate.wait()
    assert list(results) == [None] * 3


@pytest.mark.parametrize("method", IMAPS)
def test_the_input_may_depend_on_earlier_results(pool: Pool, method: str) -> None:
    """A feed that blocks until it is given more must hold up neither the call nor the results."""
    feed: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results = getattr(pool, method)(square, iter(feed.get, None))
    feed.put(2)
    for _ in range(4):
        feed.put(results.next(DEADLINE_S))
    feed.put(None)
    assert list(results) == [2**32]


@pytest.mark.parametrize("method", IMAPS)
@pytest.mark.parametrize("chunksize", [1, 3])
def test_imaps_can_be_chained(pool: Pool, make_pool: MakePool, method: str, chunksize: int) -> None:
    first = getattr(pool, method)(square, range(50), chunksize)
    second = getattr(pool, method)(functools.partial(add, 1), first, chunksize)
    third = getattr(make_pool(1), method)(functools.partial(add, 1), second, chunksize)
    assert sorted(third) == [x * x + 2 for x in range(50)]


@pytest.mark.parametrize("method", IMAPS)
def test_several_imaps_may_run_at_once(pool: Pool, method: str) -> None:
    several = [getattr(pool, method)(square, range(start, start + 20)) for start in range(5)]
    assert pool.apply(square, (3,)) == 9
    for start, results in enumerate(several):
        assert sorted(results) == [x * x for x in range(start, start + 20)]


@pytest.mark.parametrize("method", IMAPS)
def test_results_may_be_left_unread(pool: Pool, method: str) -> None:
    for _ in range(20):
        assert next(getattr(pool, method)(abs, range(100))) >= 0
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("method", IMAPS)
def test_closing_lets_the_iteration_finish(pool: Pool, method: str, chunksize: int) -> None:
    results = getattr(pool, method)(square, iter(range(20)), chunksize)
    pool.close()
    assert sorted(results) == [x * x for x in range(20)]
    pool.join()


# --- errors ------------------------------------------------------------------------------------


def test_an_error_is_raised_in_its_place_and_the_iteration_goes_on(pool: Pool) -> None:
    results = pool.imap(fail_if_odd, [0, 2, 3, 4, 5, 6])
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(ValueError, match="3 is odd"):
        next(results)
    assert next(results) == 4
    with pytest.raises(ValueError, match="5 is odd"):
        results.next(DEADLINE_S)
    assert list(results) == [6]


def test_unordered_iteration_goes_on_after_an_error(pool: Pool) -> None:
    values, errors = drain(pool.imap_unordered(fail_if_odd, range(10)))
    assert sorted(values) == [0, 2, 4, 6, 8]
    assert sorted(str(error) for error in errors) == [f"{x} is odd" for x in (1, 3, 5, 7, 9)]


def test_an_error_in_a_chunk_is_raised_after_the_chunks_before_it(pool: Pool) -> None:
    results = pool.imap(fail_if_odd, [0, 2, 4, 6, 7, 8], chunksize=2)
    assert list(itertools.islice(results, 4)) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="7 is odd"):
        next(results)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_an_input_that_raises_does_so_in_its_place(pool: Pool, count: int) -> None:
    results = pool.imap(square, failing_input(count))
    assert [next(results) for _ in range(count)] == [x * x for x in range(count)]
    with pytest.raises(Failure) as caught:
        next(results)
    assert caught.value.args == ("no more input", count)
    assert caught.value.__cause__ is None, "no worker raised it"
    assert list(results) == []
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_an_input_that_raises_ends_the_unordered_iteration(pool: Pool, count: int) -> None:
    values, errors = drain(pool.imap_unordered(square, failing_input(count)))
    assert sorted(values) == [x * x for x in range(count)]
    assert [type(error) for error in errors] == [Failure]
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize(
    ("count", "chunksize", "before"), [(3, 2, 2), (7, 2, 6), (7, 4, 4), (1, 4, 0)]
)
def test_a_chunk_that_the_input_leaves_unfinished_is_the_error(
    pool: Pool, count: int, chunksize: int, before: int
) -> None:
    results = pool.imap(square, failing_input(count), chunksize)
    assert [next(results) for _ in range(before)] == [x * x for x in range(before)]
    with pytest.raises(Failure):
        next(results)
    with pytest.raises(Failure):
        list(pool.imap_unordered(square, FailingSizedInput(count), chunksize))
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("method", IMAPS)
def test_an_unpicklable_item_fails_in_its_place(pool: Pool, method: str) -> None:
    values, errors = drain(getattr(pool, method)(identity, [0, Unpicklable(), 2, 3]))
    assert sorted(values) == [0, 2, 3]
    assert [str(error) for error in errors] == ["I cannot be pickled"]
    values, errors = drain(
        getattr(pool, method)(functools.partial(identity, Unpicklable()), [1, 2])
    )
    assert values == []
    assert [str(error) for error in errors] == ["I cannot be pickled"] * 2
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("method", IMAPS)
def test_wrong_calls_fail_when_their_results_are_read(
    pool: Pool, method: str, chunksize: int
) -> None:
    for function, items in ((square, 5), (5, [1, 2]), (functools.partial(square, 1), [1])):
        with pytest.raises(TypeError):
            next(getattr(pool, method)(function, items, chunksize))
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("chunksize", [0, -1])
@pytest.mark.parametrize("method", IMAPS)
def test_a_chunk_size_below_one_is_refused_at_the_call(
    pool: Pool, method: str, chunksize: int
) -> None:
    with pytest.raises(ValueError, match=rf"Chunksize must be 1\+, not {chunksize}"):
        getattr(pool, method)(square, [1, 2, 3], chunksize)
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("method", IMAPS)
def test_a_chunk_size_that_is_no_integer_is_refused(pool: Pool, method: str) -> None:
    with pytest.raises(TypeError):
        getattr(pool, method)(square, [1, 2, 3], chunksize="2")
    with pytest.raises((TypeError, ValueError)):
        list(getattr(pool, method)(square, [1, 2, 3], chunksize=1.5))
    assert pool.map(square, [3]) == [9]


# --- beyond the standard class -----------------------------------------------------------------


class CountedInput:
    """Numbers without end, and how many of them were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count():
            self.taken += 1
            yield number


# The standard pool reads its whole input at once, whatever its size.
@pytest.mark.poolray_only
@pytest.mark.parametrize("chunksize", [1, 10])
@pytest.mark.parametrize("method", IMAPS)
def test_an_endless_input_is_read_only_a_little_ahead(
    pool: Pool, method: str, chunksize: int
) -> None:
    numbers = CountedInput()
    results = getattr(pool, method)(abs, numbers, chunksize)
    read = [next(results) for _ in range(1_000)]
    # Other work goes through, and the input does not run away meanwhile.
    assert pool.map(square, range(1_000)) == [x * x for x in range(1_000)]
    assert 1_000 <= numbers.taken <= 20_000
    assert len(set(read)) == 1_000
    if method == "imap":
        assert read == list(range(1_000))


@pytest.mark.poolray_only
def test_an_endless_input_does_not_keep_the_pool_from_ending(pool: Pool) -> None:
    assert next(pool.imap(abs, itertools.count())) == 0
    pool.terminate()
    pool.join()


# The standard pool leaves an iteration over a terminated pool waiting for ever.
@pytest.mark.poolray_only
@pytest.mark.parametrize("method", IMAPS)
def test_terminating_the_pool_ends_the_iteration_with_an_error(
    pool: Pool, gate: Gate, method: str
) -> None:
    results = getattr(pool, method)(functools.partial(hold_if_string, gate), ["held"] * 4)
    pool.terminate()
    with pytest.raises(Exception) as caught:
        results.next(DEADLINE_S)
    assert not isinstance(caught.value, (multiprocessing.TimeoutError, StopIteration))
