"""Arrays and other large values: right, writable and independent on both sides."""

from __future__ import annotations

import array
import functools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from executor_support import DEADLINE_S, identity
from pool_support import IMAPS, MAPS, Pool, collect

Array = numpy.ndarray[Any, Any]

# Below and above the size from which values travel through shared memory.
COUNTS = [0, 1, 1_000, 50_000, 1_000_000]


def make_array(count: int, start: int = 0) -> Array:
    return numpy.arange(start, start + count, dtype=numpy.float64)


def add_one_in_place(numbers: Array) -> Array:
    numbers += 1
    return numbers


def sum_and_spoil(numbers: Array) -> float:
    total = float(numbers.sum())
    numbers[:] = -1
    return total


@pytest.mark.parametrize("count", COUNTS)
def test_a_returned_array_is_right_and_writable(pool: Pool, count: int) -> None:
    numbers = pool.apply(make_array, (count,))
    assert numpy.array_equal(numbers, make_array(count))
    assert numbers.flags.writeable
    numbers += 1
    assert numpy.array_equal(numbers, make_array(count, start=1))


@pytest.mark.parametrize("method", [*MAPS, "imap"])
@pytest.mark.parametrize("chunksize", [1, 3])
def test_arrays_returned_by_a_map_are_right_and_writable(
    pool: Pool, method: str, chunksize: int
) -> None:
    for number, numbers in enumerate(
        collect(pool, method, functools.partial(make_array, 50_000), range(6), chunksize=chunksize)
    ):
        numbers -= number
        assert numpy.array_equal(numbers, make_array(50_000))


def test_unordered_arrays_are_writable(pool: Pool) -> None:
    for numbers in pool.imap_unordered(make_array, [50_000] * 6):
        numbers += 1
        assert numpy.array_equal(numbers, make_array(50_000, start=1))


@pytest.mark.parametrize("count", COUNTS)
def test_a_task_may_write_to_its_argument(pool: Pool, count: int) -> None:
    numbers = make_array(count)
    result = pool.apply(add_one_in_place, (numbers,))
    assert numpy.array_equal(result, make_array(count, start=1))
    assert numpy.array_equal(numbers, make_array(count)), "the caller's array stays as it was"


@pytest.mark.parametrize("count", [1_000, 50_000])
@pytest.mark.parametrize("method", [*MAPS, "imap"])
def test_tasks_that_get_the_same_array_do_not_see_each_other(
    pool: Pool, method: str, count: int
) -> None:
    numbers = make_array(count)
    expected = float(numbers.sum())
    assert collect(pool, method, sum_and_spoil, [numbers] * 8, chunksize=1) == [expected] * 8
    assert numpy.array_equal(numbers, make_array(count))


def test_what_is_done_to_one_result_is_not_seen_in_another(pool: Pool) -> None:
    numbers = make_array(50_000)
    first, second = pool.map(identity, [numbers, numbers], 1)
    first[:] = -1
    assert numpy.array_equal(second, make_array(50_000))
    assert numpy.array_equal(numbers, make_array(50_000))


def test_a_result_can_be_written_to_and_sent_on(pool: Pool) -> None:
    numbers = make_array(50_000)
    for _ in range(5):
        numbers = pool.apply(add_one_in_place, (numbers,))
        numbers += 1
    assert numpy.array_equal(numbers, make_array(50_000, start=10))


def test_results_outlive_the_pool(pool: Pool) -> None:
    several = pool.map(make_array, [50_000] * 4)
    outstanding = pool.map_async(make_array, [50_000] * 4)
    pool.close()
    pool.join()
    for numbers in [*several, *outstanding.get(DEADLINE_S)]:
        numbers += 1
        assert numpy.array_equal(numbers, make_array(50_000, start=1))


KINDS: dict[str, Callable[[], Array]] = {
    "fortran order": lambda: numpy.asfortranarray(make_array(60_000).reshape(200, 300)),
    "strided": lambda: make_array(120_000)[::2],
    "transposed": lambda: make_array(60_000).reshape(200, 300).T,
    "reversed": lambda: make_array(60_000)[::-1],
    "broadcast": lambda: numpy.broadcast_to(make_array(300), (200, 300)),
    "structured": lambda: numpy.zeros(20_000, dtype=[("a", "i4"), ("b", "f8")]),
    "objects": lambda: numpy.array([{"a": 1}, None, "text"] * 10_000, dtype=object),
    "strings": lambda: numpy.array(["text", "longer text"] * 10_000),
    "times": lambda: numpy.arange("2024-01", "2025-01", dtype="datetime64[m]"),
    "booleans": lambda: make_array(300_000) % 2 == 0,
    "no dimension": lambda: numpy.array(1.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_kind_travel_both_ways(pool: Pool, kind: str) -> None:
    sent = KINDS[kind]()
    received = pool.apply(identity, (sent,))
    assert type(received) is numpy.ndarray
    assert received.dtype == sent.dtype
    assert received.shape == sent.shape
    assert numpy.array_equal(received, sent)
    assert received.flags.writeable


def test_arrays_inside_other_values_are_writable(pool: Pool) -> None:
    value = pool.apply(identity, ({"several": [make_array(50_000), make_array(10)], "n": 1},))
    for numbers in value["several"]:
        numbers += 1
        assert numpy.array_equal(numbers, make_array(len(numbers), start=1))


@pytest.mark.parametrize("make", [bytearray, lambda n: array.array("d", bytes(8 * n))])
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_large_buffers_keep_their_type_and_can_be_changed(
    pool: Pool, method: str, make: Callable[[int], Any]
) -> None:
    sent = make(50_000)
    received = collect(pool, method, identity, [sent])[0]
    assert type(received) is type(sent)
    assert received == sent
    received[0] = 1
    received.append(2)
    assert len(received) == len(sent) + 1
    assert sent[0] == 0
