"""`map`, `starmap` and their asynchronous forms: inputs of every kind, chunks, order and errors."""

from __future__ import annotations

import array
import collections
import functools
import itertools
import multiprocessing
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from executor_support import DEADLINE_S, Gate, add, capture, identity, leave_mark, marks
from pool_support import (
    IMAPS,
    MAPS,
    FailingSizedInput,
    Failure,
    MakePool,
    Pool,
    Unpicklable,
    collect,
    current_pid,
    fail_if_odd,
    failing_input,
    mark_then_fail_if_odd,
    square,
)


class OldSequence:
    """Iterable through `__getitem__` alone, as sequences were before there were iterators."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if index >= 5:
            raise IndexError(index)
        return index


class OnlyIterable:
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


INPUTS: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2, 3, 4],
    "tuple": lambda: (0, 1, 2, 3, 4),
    "range": lambda: range(5),
    "generator": lambda: (x for x in range(5)),
    "iterator": lambda: iter([0, 1, 2, 3, 4]),
    "chain": lambda: itertools.chain([0, 1], [2, 3, 4]),
    "bytes": lambda: bytes(range(5)),
    "dict": lambda: dict.fromkeys(range(5)),
    "dict values": lambda: dict(enumerate(range(5))).values(),
    "deque": lambda: collections.deque(range(5)),
    "array": lambda: array.array("i", range(5)),
    "numpy array": lambda: numpy.arange(5),
    "old sequence": OldSequence,
    "only iterable": OnlyIterable,
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_every_kind_of_iterable_is_mapped(pool: Pool, method: str, kind: str) -> None:
    assert collect(pool, method, square, INPUTS[kind]()) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_sets_and_strings_are_mapped(pool: Pool, method: str) -> None:
    assert sorted(collect(pool, method, square, {2, 3, 4})) == [4, 9, 16]
    assert collect(pool, method, str.upper, "abc") == ["A", "B", "C"]


@pytest.mark.parametrize("chunksize", [1, 2, 3, 7, 20, 21, 10**9])
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_the_chunk_size_does_not_change_the_results(
    pool: Pool, method: str, chunksize: int
) -> None:
    expected = [x * x for x in range(20)]
    assert collect(pool, method, square, range(20), chunksize=chunksize) == expected
    assert collect(pool, method, square, iter(range(20)), chunksize=chunksize) == expected


@pytest.mark.parametrize("chunksize", [None, 1, 4])
@pytest.mark.parametrize("method", MAPS)
def test_an_empty_input_gives_an_empty_list(pool: Pool, method: str, chunksize: int | None) -> None:
    for empty in ([], (), iter(()), range(0), "", {}):
        assert collect(pool, method, square, empty, chunksize=chunksize) == []
    result = pool.map_async(square, [])
    result.wait(DEADLINE_S)
    assert result.ready()
    assert result.successful()


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 65, 1_000, 20_000])
def test_default_chunks_cover_every_length(pool: Pool, method: str, count: int) -> None:
    assert collect(pool, method, abs, range(count)) == list(range(count))


def test_map_and_starmap_return_lists(pool: Pool) -> None:
    assert type(pool.map(square, (1, 2))) is list
    assert type(pool.starmap(add, ((1, 2), (3, 4)))) is list


def test_starmap_unpacks_each_item(pool: Pool) -> None:
    items = [(), (1,), [1, 2], "ab", range(3), {"k": 1}]
    expected = [((), {}), ((1,), {}), ((1, 2), {}), (("a", "b"), {}), ((0, 1, 2), {}), (("k",), {})]
    assert pool.starmap(capture, items) == expected
    assert pool.starmap(capture, items, chunksize=4) == expected
    assert pool.starmap_async(capture, items, 1).get(DEADLINE_S) == expected
    assert pool.starmap(pow, zip(range(10), range(10))) == [x**x for x in range(10)]


def test_map_does_not_unpack(pool: Pool) -> None:
    assert pool.map(capture, [(1, 2), [3]]) == [(((1, 2),), {}), (([3],), {})]


def test_arguments_can_be_named(pool: Pool) -> None:
    assert pool.map(func=square, iterable=[3], chunksize=1) == [9]
    assert pool.starmap(func=add, iterable=[(1, 2)], chunksize=1) == [3]
    options = {"chunksize": 1, "callback": None, "error_callback": None}
    assert pool.map_async(func=square, iterable=[3], **options).get(DEADLINE_S) == [9]
    assert pool.starmap_async(func=add, iterable=[(1, 2)], **options).get(DEADLINE_S) == [3]


def meet_the_next(gates: list[Gate], index: int) -> int:
    """Every call but the last ends after the one behind it."""
    if index + 1 < len(gates):
        gates[index + 1].wait()
    gates[index].open()
    return index


@pytest.mark.parametrize("method", [*MAPS, "imap"])
def test_results_come_in_the_order_of_the_input(
    make_pool: MakePool, tmp_path: Path, method: str
) -> None:
    with make_pool(4) as pool:
        gates = [Gate(tmp_path / str(index)) for index in range(4)]
        task = functools.partial(meet_the_next, gates)
        assert collect(pool, method, task, range(4), chunksize=1) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", MAPS)
def test_a_chunk_runs_in_one_process(pool: Pool, method: str) -> None:
    pids = collect(pool, method, current_pid, range(40), chunksize=10)
    assert all(len(set(pids[start : start + 10])) == 1 for start in range(0, 40, 10))
    assert set(pids) <= {process.pid for process in pool._pool}


def test_an_iterator_is_read_before_map_async_returns(pool: Pool) -> None:
    items = iter(range(100))
    result = pool.map_async(square, items)
    assert list(items) == []
    assert result.get(DEADLINE_S) == [x * x for x in range(100)]


@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
@pytest.mark.parametrize("chunksize", [1, 3])
def test_large_items_travel_both_ways(pool: Pool, method: str, chunksize: int) -> None:
    items = [bytes([number]) * 300_000 for number in range(10)]
    assert collect(pool, method, identity, items, chunksize=chunksize) == items


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MAPS)
def test_an_error_of_a_task_is_the_error_of_the_map(pool: Pool, method: str) -> None:
    with pytest.raises(ValueError, match="3 is odd"):
        collect(pool, method, fail_if_odd, [0, 2, 3, 4], chunksize=1)
    assert pool.map(fail_if_odd, [0, 2]) == [0, 2]


@pytest.mark.parametrize("chunksize", [None, 1, 2, 100])
def test_one_worker_reports_the_first_error_of_the_input(
    make_pool: MakePool, chunksize: int | None
) -> None:
    result = make_pool(1).map_async(fail_if_odd, [0, 2, 5, 3, 4, 1], chunksize)
    with pytest.raises(ValueError, match="5 is odd"):
        result.get(DEADLINE_S)
    assert result.ready()
    assert not result.successful()


@pytest.mark.parametrize("method", MAPS)
def test_all_chunks_run_even_when_one_fails(pool: Pool, tmp_path: Path, method: str) -> None:
    task = functools.partial(mark_then_fail_if_odd, tmp_path)
    with pytest.raises(ValueError, match="is odd"):
        collect(pool, method, task, range(20), chunksize=1)
    assert marks(tmp_path) == {str(x) for x in range(20)}


def test_a_failed_map_is_ready_only_when_every_chunk_has_ended(pool: Pool, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        task = functools.partial(wait_if_even, gate)
        result = pool.map_async(task, [1, 0], chunksize=1)
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(0.1)
        assert not result.ready()
        gate.open()
        with pytest.raises(ValueError, match="1 is odd"):
            result.get(DEADLINE_S)


def wait_if_even(gate: Gate, x: int) -> int:
    if x % 2 == 0:
        gate.wait()
    return fail_if_odd(x)


@pytest.mark.parametrize("method", MAPS)
def test_a_wrong_call_in_a_map_fails_in_the_result(pool: Pool, method: str) -> None:
    with pytest.raises(TypeError):
        collect(pool, method, operator.add, [1, 2])
    with pytest.raises(TypeError):
        collect(pool, method, 5, [1, 2])
    with pytest.raises(TypeError):
        pool.starmap(add, [(1, 2), 3])
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("method", MAPS)
def test_what_cannot_be_iterated_is_refused_at_the_call(pool: Pool, method: str) -> None:
    for not_iterable in (5, None, square):
        with pytest.raises(TypeError):
            getattr(pool, method)(square, not_iterable)
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("method", MAPS)
def test_an_iterator_that_raises_does_so_in_the_call(pool: Pool, method: str, count: int) -> None:
    with pytest.raises(Failure) as caught:
        getattr(pool, method)(square, failing_input(count))
    assert caught.value.args == ("no more input", count)
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("chunksize", [None, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_sized_iterable_that_raises_does_so_in_the_result(
    pool: Pool, count: int, chunksize: int | None
) -> None:
    result = pool.map_async(square, FailingSizedInput(count), chunksize)
    with pytest.raises(Failure) as caught:
        result.get(DEADLINE_S)
    assert caught.value.args == ("no more input", count)
    assert not result.successful()
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("method", MAPS)
def test_an_unpicklable_item_fails_the_map_and_the_pool_goes_on(
    pool: Pool, method: str, position: int
) -> None:
    items: list[Any] = [0, 1, 2, 3, 4]
    items[position] = Unpicklable()
    with pytest.raises(Failure, match="I cannot be pickled"):
        collect(pool, method, identity, items, chunksize=1)
    with pytest.raises(Failure, match="I cannot be pickled"):
        collect(pool, method, functools.partial(identity, Unpicklable()), [1, 2])
    assert pool.map(square, [3]) == [9]


def test_the_items_beside_an_unpicklable_one_are_computed(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="I cannot be pickled"):
        pool.starmap(leave_mark, [(tmp_path, 0), (tmp_path, Unpicklable()), (tmp_path, 2)], 1)
    assert marks(tmp_path) == {"0", "2"}


@pytest.mark.parametrize("method", MAPS)
def test_a_chunk_size_that_is_no_number_is_refused_at_the_call(pool: Pool, method: str) -> None:
    with pytest.raises(TypeError):
        getattr(pool, method)(square, [1, 2, 3], chunksize="2")
    assert pool.map(square, [3]) == [9]


# The standard map returns a list of None for 0 and -1, and never returns for 1.5.
@pytest.mark.poolray_only
@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("chunksize", [0, -1, 1.5])
def test_a_chunk_size_that_makes_no_chunks_is_refused(
    pool: Pool, method: str, chunksize: float
) -> None:
    with pytest.raises((TypeError, ValueError)):
        collect(pool, method, square, [1, 2, 3], chunksize=chunksize)
    assert pool.map(square, [3]) == [9]


def raise_stop_iteration_at_2(x: int) -> int:
    if x == 2:
        raise StopIteration
    return x


# The standard map takes it for the end of the chunk, and answers with too few items.
@pytest.mark.poolray_only
@pytest.mark.parametrize("chunksize", [None, 1, 5])
def test_a_task_that_raises_stop_iteration_does_not_shorten_the_answer(
    pool: Pool, chunksize: int | None
) -> None:
    with pytest.raises((StopIteration, RuntimeError)):
        pool.map(raise_stop_iteration_at_2, range(5), chunksize)
