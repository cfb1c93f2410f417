"""Generators as programs see them: items while the task runs, errors, limits, retries, actors."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_implementation import (
    IS_REFERENCE,
    better_than_reference,
    gate_at,
    get,
    ray,
    start_runtime,
)
from executor_support import DEADLINE_S, Gate, leave_mark, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def count(n: int) -> Iterator[int]:
    yield from (i for i in range(n))


@ray.remote
def count_and_fail(n: int) -> Iterator[int]:
    for number in range(n):  # noqa: UP028 - in the reference only generators can be delegated to
        yield number
    raise KeyError(n)


@ray.remote
def count_behind(gates: list[Gate]) -> Iterator[int]:
    """Yields a number for each gate, which has to be opened first."""
    for number, gate in enumerate(gates):
        gate.wait()
        yield number


@ray.remote
def count_with_marks(directory: Path, n: int) -> Iterator[int]:
    """Yields numbers and leaves a mark for each just before."""
    for number in range(n):
        leave_mark(directory, "yielded")
        yield number
    leave_mark(directory, "ended")


def marks(directory: Path, name: str = "yielded") -> int:
    path = directory / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def values(generator: Any) -> list[Any]:
    return [get(ref) for ref in generator]


def outcomes(generator: Any) -> list[Any]:
    """Values of items, and classes of errors among them."""
    found: list[Any] = []
    for ref in generator:
        try:
            found.append(get(ref))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            found.append(type(error) if cause is None else type(cause))
    return found


def wait_for_marks(directory: Path, n: int, name: str = "yielded") -> None:
    wait_until(lambda: marks(directory, name) >= n)


# --- iteration ---------------------------------------------------------------------------------


def test_a_generator_function_streams_refs_of_its_items() -> None:
    generator = count.remote(4)
    assert isinstance(generator, ray.ObjectRefGenerator)
    refs = list(generator)
    assert all(isinstance(ref, ray.ObjectRef) for ref in refs)
    assert get(refs) == [0, 1, 2, 3]


def test_streaming_can_be_asked_for_by_name() -> None:
    assert values(count.options(num_returns="streaming").remote(3)) == [0, 1, 2]


def test_items_arrive_while_the_generator_runs(tmp_path: Path) -> None:
    with gate_at(tmp_path / "first") as first, gate_at(tmp_path / "second") as second:
        generator = count_behind.remote([first, second])
        first.open()
        assert get(next(generator)) == 0
        assert not generator.next_ready()
        second.open()
        assert get(next(generator)) == 1


def test_thousands_of_items_arrive_in_order() -> None:
    assert values(count.remote(3000)) == list(range(3000))


def test_an_exhausted_generator_stays_exhausted() -> None:
    generator = count.remote(1)
    assert values(generator) == [0]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(generator)
    assert list(generator) == []


def test_a_generator_without_items_ends_at_once() -> None:
    assert list(count.remote(0)) == []


def test_a_generator_is_its_own_iterator() -> None:
    generator = count.remote(1)
    assert iter(generator) is generator
    assert aiter(generator) is generator


def test_items_of_many_generators_do_not_mix() -> None:
    generators = [count.remote(n) for n in range(12)]
    assert [values(generator) for generator in generators] == [list(range(n)) for n in range(12)]


def test_items_are_refs_like_any_others(tmp_path: Path) -> None:
    first, second = count.remote(2)
    assert get(echo.remote(second)) == 1
    assert get(get(echo.remote([first]))[0]) == 0
    assert ray.wait([first, second], num_returns=2)[1] == []


def test_large_items_travel_whole() -> None:
    @ray.remote
    def blocks() -> Iterator[bytes]:
        for number in range(5):
            yield bytes([number]) * 300_000

    assert [(value[0], len(value)) for value in values(blocks.remote())] == [
        (number, 300_000) for number in range(5)
    ]


def test_items_may_contain_refs() -> None:
    @ray.remote
    def boxes() -> Iterator[list[Any]]:
        for number in range(50):
            box = [ray.put(number)]
            yield box
            del box

    assert [get(box[0]) for box in values(boxes.remote())] == list(range(50))


def test_fixed_returns_may_contain_refs() -> None:
    @ray.remote(num_returns=3)
    def boxes() -> Iterator[list[Any]]:
        for number in range(3):
            box = [ray.put(number)]
            yield box
            del box
            ray.get(ray.put("the next call tells what was dropped"))

    assert [get(get(ref)[0]) for ref in boxes.remote()] == [0, 1, 2]


def test_an_item_outlives_its_generator() -> None:
    generator = count.remote(3)
    first = next(generator)
    del generator
    gc.collect()
    assert get(echo.remote("something else")) == "something else"
    assert get(first) == 0


@better_than_reference("its generators are driven with send()")
def test_yield_from_takes_any_iterable() -> None:
    @ray.remote
    def chain() -> Iterator[Any]:
        yield from [1, 2]
        yield from "ab"
        yield from range(2)

    assert values(chain.remote()) == [1, 2, "a", "b", 0, 1]


def test_arguments_are_checked_and_filled_as_for_any_task() -> None:
    with pytest.raises(TypeError):
        count.remote()
    assert values(count.remote(echo.remote(2))) == [0, 1]


def test_a_task_can_iterate_over_a_generator() -> None:
    @ray.remote
    def total(n: int) -> int:
        return sum(ray.get(ref) for ref in count.remote(n))

    assert get(total.remote(200)) == sum(range(200))


def test_a_generator_can_iterate_over_another_one() -> None:
    @ray.remote
    def doubled(n: int) -> Iterator[int]:
        for ref in count.remote(n):
            yield 2 * ray.get(ref)

    assert values(doubled.remote(20)) == [2 * i for i in range(20)]


# --- what it says of itself --------------------------------------------------------------------


def test_completed_is_ready_at_the_end(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        generator = count_behind.remote([gate])
        completed = generator.completed()
        assert ray.wait([completed], timeout=0) == ([], [completed])
        gate.open()
        assert get(completed) is None
    assert values(generator) == [0]


def test_is_finished_tells_whether_items_are_left() -> None:
    generator = count.remote(2)
    get(generator.completed())
    assert not generator.is_finished()
    assert values(generator) == [0, 1]
    assert generator.is_finished()
    assert not generator.next_ready()


def test_next_ready_takes_no_item(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        generator = count_behind.remote([gate])
        assert not generator.next_ready()
        gate.open()
        wait_until(generator.next_ready)
        assert generator.next_ready()
        assert get(next(generator)) == 0


def test_next_can_give_up_after_a_time(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        generator = count_behind.remote([gate])
        assert generator._next_sync(timeout_s=0.01).is_nil()
        gate.open()
        assert get(generator._next_sync(timeout_s=DEADLINE_S)) == 0


def test_a_generator_can_be_neither_passed_nor_pickled_nor_copied() -> None:
    generator = count.remote(1)
    for attempt in (
        lambda: echo.remote(generator),
        lambda: echo.remote([generator]),
        lambda: ray.put(generator),
        lambda: pickle.dumps(generator),
        lambda: copy.copy(generator),
    ):
        with pytest.raises(TypeError, match="Serializing a ObjectRefGenerator is not allowed"):
            attempt()
    assert values(generator) == [0]


def test_what_else_python_generators_can_do_is_refused() -> None:
    generator = count.remote(1)
    for call in (lambda: generator.send(1), lambda: generator.throw(KeyError()), generator.close):
        with pytest.raises(NotImplementedError):
            call()


def test_get_takes_refs_not_generators() -> None:
    generator = count.remote(1)
    with pytest.raises(TypeError, match=r"not an ray\.ObjectRef"):
        ray.get([generator])


# --- wait --------------------------------------------------------------------------------------


def test_wait_takes_generators_beside_refs(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        slow, quick, ref = count_behind.remote([gate]), count.remote(1), echo.remote(1)
        ready, rest = ray.wait([slow, quick, ref], num_returns=2, timeout=DEADLINE_S)
        assert ready == [quick, ref]
        assert rest == [slow]
        gate.open()
        assert ray.wait([slow], timeout=DEADLINE_S) == ([slow], [])
        assert values(slow) == [0]  # waiting has taken nothing


def test_an_exhausted_generator_is_ready() -> None:
    for generator in (count.remote(0), count.remote(2)):
        list(generator)
        assert ray.wait([generator], timeout=DEADLINE_S) == ([generator], [])


def test_wait_sees_each_item_once() -> None:
    left = [count.remote(n) for n in (3, 0, 5)]
    found = []
    while left:
        ready, _ = ray.wait(left, timeout=DEADLINE_S)
        assert ready
        try:
            found.append(get(next(ready[0])))
        except StopIteration:
            left.remove(ready[0])
    assert sorted(found) == [0, 0, 1, 1, 2, 2, 3, 4]


def test_wait_wants_a_list_of_different_generators() -> None:
    generator = count.remote(1)
    with pytest.raises(TypeError, match="got a single"):
        ray.wait(generator)
    with pytest.raises(ValueError, match="unique"):
        ray.wait([generator, generator])


# --- errors ------------------------------------------------------------------------------------


def test_an_error_is_one_more_ref_and_then_the_end() -> None:
    generator = count_and_fail.remote(2)
    refs = list(generator)
    assert get(refs[:2]) == [0, 1]
    with pytest.raises(KeyError):
        get(refs[2])
    assert len(refs) == 3
    assert get(generator.completed()) is None


def test_a_generator_with_an_unread_error_is_not_finished() -> None:
    generator = count_and_fail.remote(0)
    get(generator.completed())
    assert not generator.is_finished()
    assert generator.next_ready()
    assert outcomes(generator) == [KeyError]
    assert generator.is_finished()


def test_an_item_that_cannot_be_serialized_is_the_error_at_the_end() -> None:
    @ray.remote
    def bad() -> Iterator[Any]:
        import threading

        yield 1
        yield threading.Lock()
        yield 2

    assert outcomes(bad.remote()) == [1, TypeError]


def test_a_failed_argument_is_the_generators_error() -> None:
    @ray.remote
    def fail() -> int:
        raise ValueError("no")

    assert outcomes(count.remote(fail.remote())) == [ValueError]


def test_a_worker_that_dies_is_the_error_at_the_end() -> None:
    @ray.remote(max_retries=0)
    def die() -> Iterator[int]:
        yield 1
        time.sleep(0.2)  # in the reference what was yielded just before is lost
        os._exit(1)

    generator = die.remote()
    assert outcomes(generator) == [1, ray.exceptions.WorkerCrashedError]
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        get(generator.completed())


# --- retries -----------------------------------------------------------------------------------


def test_after_a_crash_the_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    @ray.remote(max_retries=1)
    def die_once(directory: Path) -> Iterator[tuple[int, int]]:
        attempt = marks(directory, "attempt")
        leave_mark(directory, "attempt")
        for number in range(6):
            if number == 3 and attempt == 0:
                wait_for_marks(directory, 3, "taken")
                os._exit(1)
            yield attempt, number

    generator = die_once.remote(tmp_path)
    found = []
    for ref in generator:
        found.append(get(ref))
        leave_mark(tmp_path, "taken")
    assert found == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]


def test_an_error_is_tried_again_if_asked_for_and_no_item_comes_twice(tmp_path: Path) -> None:
    @ray.remote(max_retries=2, retry_exceptions=[ValueError])
    def flaky(directory: Path) -> Iterator[tuple[int, int]]:
        attempt = marks(directory, "attempt")
        leave_mark(directory, "attempt")
        for number in range(4):
            if number == 2 and attempt < 2:
                raise ValueError
            yield attempt, number

    assert values(flaky.remote(tmp_path)) == [(0, 0), (0, 1), (2, 2), (2, 3)]


def test_the_last_attempts_error_ends_the_stream() -> None:
    failing = count_and_fail.options(max_retries=1, retry_exceptions=True)
    assert outcomes(failing.remote(2)) == [0, 1, KeyError]


# --- back-pressure -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
def test_a_generator_runs_ahead_by_so_many_items(tmp_path: Path, limit: int) -> None:
    limited = count_with_marks.options(_generator_backpressure_num_objects=limit)
    generator = limited.remote(tmp_path, 8)
    for taken in range(8 - limit):
        wait_for_marks(tmp_path, taken + limit)
        assert marks(tmp_path) == taken + limit
        assert get(next(generator)) == taken
    assert values(generator) == list(range(8 - limit, 8))
    wait_for_marks(tmp_path, 1, "ended")


def test_without_a_limit_a_generator_runs_to_its_end(tmp_path: Path) -> None:
    for limit in (None, -1):
        directory = tmp_path / str(limit)
        directory.mkdir()
        unlimited = count_with_marks.options(_generator_backpressure_num_objects=limit)
        generator = unlimited.remote(directory, 50)
        get(generator.completed())
        assert marks(directory) == 50


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (1.5, TypeError), ("x", TypeError)], ids=repr
)
def test_a_bad_limit_is_refused_at_once(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="_generator_backpressure_num_objects"):
        count.options(_generator_backpressure_num_objects=limit)


@better_than_reference("its paused generators keep their CPUs", run=False)
def test_a_paused_generator_lets_others_have_its_cpu(tmp_path: Path) -> None:
    limited = count_with_marks.options(_generator_backpressure_num_objects=1)
    paused = [limited.remote(tmp_path, 3) for _ in range(2)]  # as many as there are CPUs
    wait_for_marks(tmp_path, 2)
    assert get([echo.remote(i) for i in range(4)]) == list(range(4))
    assert [values(generator) for generator in paused] == [[0, 1, 2]] * 2


def test_a_dropped_generator_does_not_hold_its_task_up(tmp_path: Path) -> None:
    generator = count_with_marks.options(_generator_backpressure_num_objects=1).remote(tmp_path, 5)
    get(next(generator))
    del generator
    gc.collect()
    wait_for_marks(tmp_path, 1, "ended")
    assert marks(tmp_path) == 5


# --- cancelling --------------------------------------------------------------------------------


@ray.remote
def endless(directory: Path) -> Iterator[int]:
    number = 0
    try:
        while True:
            yield number
            number += 1
            time.sleep(0.01)
    finally:
        leave_mark(directory, "cleaned")


def test_a_generator_can_be_cancelled(tmp_path: Path) -> None:
    generator = endless.remote(tmp_path)
    get(next(generator))
    ray.cancel(generator)
    *items, last = outcomes(generator)
    assert items == list(range(1, len(items) + 1))
    assert last is ray.exceptions.TaskCancelledError
    wait_for_marks(tmp_path, 1, "cleaned")


def test_a_paused_generator_can_be_cancelled(tmp_path: Path) -> None:
    generator = endless.options(_generator_backpressure_num_objects=1).remote(tmp_path)
    wait_until(generator.next_ready)
    ray.cancel(generator)
    assert outcomes(generator)[-1] is ray.exceptions.TaskCancelledError


def test_a_generator_can_be_cancelled_by_force(tmp_path: Path) -> None:
    generator = endless.options(max_retries=3).remote(tmp_path)
    get(next(generator))
    ray.cancel(generator, force=True)
    last = outcomes(generator)[-1]
    crashed, cancelled = ray.exceptions.WorkerCrashedError, ray.exceptions.TaskCancelledError
    assert last in (crashed, cancelled) if IS_REFERENCE else last is cancelled


def test_cancelling_an_ended_generator_changes_nothing() -> None:
    generator = count.remote(2)
    get(generator.completed())
    ray.cancel(generator)
    assert values(generator) == [0, 1]


# --- num_returns -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["streaming", "dynamic"])
def test_only_generators_stream(mode: str) -> None:
    with pytest.raises(ValueError, match="can only be used with generator functions"):
        echo.options(num_returns=mode).remote(1)
    with pytest.raises(ValueError, match="can only be used with generator functions"):
        ray.remote(num_returns=mode)(lambda: 1).remote()


def test_dynamic_gives_one_ref_of_all_the_refs() -> None:
    ref = count.options(num_returns="dynamic").remote(4)
    assert isinstance(ref, ray.ObjectRef)
    refs = get(ref)
    assert isinstance(refs, ray.DynamicObjectRefGenerator)
    assert len(refs) == 4
    assert [get(item) for item in refs] == [0, 1, 2, 3]


def test_a_dynamic_list_can_be_passed_on() -> None:
    @ray.remote
    def total(refs: Any) -> int:
        return sum(ray.get(ref) for ref in refs)

    assert get(total.remote(count.options(num_returns="dynamic").remote(5))) == 10


def test_an_error_is_the_last_of_a_dynamic_list() -> None:
    refs = get(count_and_fail.options(num_returns="dynamic").remote(2))
    assert outcomes(refs) == [0, 1, KeyError]


def test_a_fixed_number_of_returns_takes_a_generators_items() -> None:
    assert get(count.options(num_returns=3).remote(3)) == [0, 1, 2]
    assert get(count.options(num_returns=1).remote(1)) == 0


def test_missing_items_are_errors_of_the_returns_that_lack_one() -> None:
    first, second, third = count.options(num_returns=3).remote(2)
    assert get([first, second]) == [0, 1]
    with pytest.raises(ValueError, match="Task returned 2 objects, but num_returns=3"):
        get(third)


@better_than_reference("it drops them without a word")
def test_an_item_too_many_is_an_error_of_the_last_return() -> None:
    first, second = count.options(num_returns=2).remote(3)
    assert get(first) == 0
    with pytest.raises(ValueError, match="more than 2 objects"):
        get(second)


@better_than_reference("it does not even begin")
def test_a_generator_without_returns_runs_to_its_end(tmp_path: Path) -> None:
    assert count_with_marks.options(num_returns=0).remote(tmp_path, 3) is None
    deadline = time.monotonic() + (3 if IS_REFERENCE else DEADLINE_S)
    wait_until(lambda: marks(tmp_path, "ended") == 1 or time.monotonic() > deadline)
    assert marks(tmp_path) == 3


def test_returns_before_an_error_are_kept() -> None:
    first, second, third = count_and_fail.options(num_returns=3).remote(1)
    assert get(first) == 0
    for ref in (second, third):
        with pytest.raises(KeyError):
            get(ref)


@better_than_reference("it takes the coroutine for a value", always=True)
def test_an_asynchronous_generator_is_no_task() -> None:
    with pytest.raises(ValueError, match="async"):

        @ray.remote
        async def items() -> AsyncIterator[int]:
            yield 1


# --- event loops -------------------------------------------------------------------------------


def test_async_for_takes_items_without_blocking_the_loop(tmp_path: Path) -> None:
    async def main(gate: Gate) -> list[int]:
        found: list[int] = []

        async def read() -> None:
            async for ref in count_behind.remote([gate]):
                found.append(await ref)

        reading = asyncio.create_task(read())
        for _ in range(3):
            await asyncio.sleep(0.005)
        assert not found
        gate.open()
        await asyncio.wait_for(reading, DEADLINE_S)
        return found

    with gate_at(tmp_path / "gate") as gate:
        assert asyncio.run(main(gate)) == [0]


def test_several_generators_are_read_at_once_in_a_loop() -> None:
    async def read(n: int) -> list[int]:
        return [await ref async for ref in count.remote(n)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read(n) for n in (3, 0, 40)))

    assert asyncio.run(main()) == [list(range(n)) for n in (3, 0, 40)]


def test_an_await_of_the_next_item_can_be_given_up(tmp_path: Path) -> None:
    async def main(generator: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(anext(generator), 0.01)

    with gate_at(tmp_path / "gate") as gate:
        generator = count_behind.remote([gate])
        asyncio.run(main(generator))
        gate.open()
        assert values(generator) == [0]


# --- actors ------------------------------------------------------------------------------------


@ray.remote
class Source:
    def __init__(self) -> None:
        self.calls = 0

    def count(self, n: int) -> Iterator[int]:
        for number in range(n):
            self.calls += 1
            yield number

    def fail(self) -> Iterator[int]:
        yield 1
        raise KeyError

    def seen(self) -> int:
        return self.calls

    def marked(self, directory: Path, n: int) -> Iterator[int]:
        for number in range(n):
            leave_mark(directory, "yielded")
            yield number

    def endless(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1
            time.sleep(0.001)

    @ray.method(num_returns=2)
    def two(self) -> Iterator[int]:
        yield 1
        yield 2

    @ray.method(_generator_backpressure_num_objects=2)
    def limited(self, directory: Path) -> Iterator[int]:
        for number in range(6):
            leave_mark(directory, "yielded")
            yield number

    def die_once(self, directory: Path) -> Iterator[tuple[int, int]]:
        attempt = marks(directory, "attempt")
        leave_mark(directory, "attempt")
        for number in range(4):
            if number == 2 and attempt == 0:
                wait_for_marks(directory, 2, "taken")
                os._exit(1)
            yield attempt, number


def test_methods_that_are_generators_stream() -> None:
    source = Source.remote()
    assert values(source.count.remote(3)) == [0, 1, 2]
    assert outcomes(source.fail.remote()) == [1, KeyError]
    assert get(source.seen.remote()) == 3


def test_methods_take_the_same_options() -> None:
    source = Source.remote()
    assert get(source.two.remote()) == [1, 2]
    assert get(source.count.options(num_returns=2).remote(2)) == [0, 1]
    refs = get(source.count.options(num_returns="dynamic").remote(3))
    assert [get(ref) for ref in refs] == [0, 1, 2]
    with pytest.raises(ValueError, match="can only be used with generator functions"):
        source.seen.options(num_returns="streaming").remote()


def test_calls_behind_a_generator_wait_for_its_end() -> None:
    source = Source.remote()
    generator = source.count.remote(20)
    assert get(source.seen.remote()) == 20
    assert values(generator) == list(range(20))


def test_a_methods_limit_holds_it_back(tmp_path: Path) -> None:
    source = Source.remote()
    generator = source.limited.remote(tmp_path)
    wait_for_marks(tmp_path, 2)
    get(next(generator))
    wait_for_marks(tmp_path, 3)
    assert marks(tmp_path) == 3
    assert values(generator) == [1, 2, 3, 4, 5]


def test_a_limit_for_the_whole_actor_holds_all_of_its_generators_back(tmp_path: Path) -> None:
    limited = Source.options(_actor_generator_backpressure_num_objects=3, max_concurrency=3)
    source = limited.remote()
    generators = [source.marked.remote(tmp_path, 4) for _ in range(3)]
    wait_for_marks(tmp_path, 3)
    assert marks(tmp_path) == 3
    found: list[int] = []
    left = list(generators)
    while left:
        ready, _ = ray.wait(left, timeout=DEADLINE_S)
        for generator in ready:
            try:
                found.append(get(next(generator)))
            except StopIteration:
                left.remove(generator)
    assert sorted(found) == sorted([0, 1, 2, 3] * 3)


@pytest.mark.parametrize("limit", [0, -5])
def test_a_bad_limit_for_an_actor_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="_actor_generator_backpressure_num_objects"):
        Source.options(_actor_generator_backpressure_num_objects=limit).remote()


def test_a_restarted_actors_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    source = Source.options(max_restarts=1, max_task_retries=1).remote()
    found = []
    for ref in source.die_once.remote(tmp_path):
        found.append(get(ref))
        leave_mark(tmp_path, "taken")
    assert found == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_generators_of_a_threaded_actor_run_side_by_side(tmp_path: Path) -> None:
    @ray.remote(max_concurrency=2)
    class Pair:
        def items(self, mine: Gate, other: Gate) -> Iterator[int]:
            for number in range(3):
                other.open()
                mine.wait()
                yield number

    with gate_at(tmp_path / "a") as a, gate_at(tmp_path / "b") as b:
        pair = Pair.remote()
        generators = [pair.items.remote(a, b), pair.items.remote(b, a)]
        assert [values(generator) for generator in generators] == [[0, 1, 2]] * 2


@ray.remote
class AsyncSource:
    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            await asyncio.sleep(0)
            yield number

    async def when_told(self) -> AsyncIterator[str]:
        yield "waiting"
        await self.event.wait()
        yield "told"

    async def tell(self) -> None:
        self.event.set()

    async def fail(self) -> AsyncIterator[int]:
        yield 1
        raise KeyError

    def plain(self, n: int) -> Iterator[int]:
        yield from (i for i in range(n))

    @ray.method(_generator_backpressure_num_objects=1)
    async def limited(self, directory: Path) -> AsyncIterator[int]:
        for number in range(4):
            leave_mark(directory, "yielded")
            yield number


def test_asynchronous_generators_of_actors_stream() -> None:
    source = AsyncSource.remote()
    assert values(source.count.remote(5)) == [0, 1, 2, 3, 4]
    assert outcomes(source.fail.remote()) == [1, KeyError]
    assert values(source.plain.remote(3)) == [0, 1, 2]


def test_other_calls_run_between_an_asynchronous_generators_items() -> None:
    source = AsyncSource.remote()
    generator = source.when_told.remote()
    assert get(next(generator)) == "waiting"
    get(source.tell.remote())
    assert values(generator) == ["told"]


def test_a_limit_pauses_an_asynchronous_generator_and_not_its_loop(tmp_path: Path) -> None:
    source = AsyncSource.remote()
    generator = source.limited.remote(tmp_path)
    wait_for_marks(tmp_path, 1)
    get(source.tell.remote())
    assert marks(tmp_path) == 1
    assert values(generator) == [0, 1, 2, 3]


def test_an_asynchronous_generator_can_be_cancelled() -> None:
    source = AsyncSource.remote()
    generator = source.when_told.remote()
    assert get(next(generator)) == "waiting"
    ray.cancel(generator)
    assert outcomes(generator) == [ray.exceptions.TaskCancelledError]
    assert values(source.count.remote(2)) == [0, 1]


def test_a_generator_on_a_thread_is_cancelled_between_two_items(tmp_path: Path) -> None:
    source = Source.options(max_concurrency=2).remote()
    for limit in (1, -1):
        endless_items = source.endless.options(_generator_backpressure_num_objects=limit)
        generator = endless_items.remote()
        assert get(next(generator)) == 0
        ray.cancel(generator)
        assert outcomes(generator)[-1] is ray.exceptions.TaskCancelledError


def test_a_generator_of_an_actor_that_runs_one_call_at_a_time_is_cancelled_too() -> None:
    @ray.remote
    class Waiter:
        def items(self) -> Iterator[int]:
            yield 0
            while not ray.get_runtime_context().is_canceled():
                time.sleep(0.01)
            yield 1

        def ping(self) -> str:
            return "here"

    waiter = Waiter.remote()
    generator = waiter.items.remote()
    assert get(next(generator)) == 0
    ray.cancel(generator)
    assert outcomes(generator) == [ray.exceptions.TaskCancelledError]
    assert get(waiter.ping.remote()) == "here"


def test_a_killed_actors_stream_ends_with_its_death() -> None:
    source = AsyncSource.remote()
    generator = source.when_told.remote()
    assert get(next(generator)) == "waiting"
    ray.kill(source)
    assert outcomes(generator) == [ray.exceptions.ActorDiedError]


# ---- several items in one yield ------------------------------------------------------------------


def test_what_is_yielded_at_once_may_be_several_items() -> None:
    @ray.remote(num_returns="streaming", _num_objects_per_yield=2)
    def pairs() -> Iterator[Any]:
        yield 1, "one"
        yield [2, "two"]

    assert [get(ref) for ref in pairs.remote()] == [1, "one", 2, "two"]
    same = pairs.options(name="pairs", _num_objects_per_yield=2).remote()
    assert [get(ref) for ref in same] == [1, "one", 2, "two"]


@pytest.mark.parametrize("wrong", [(3,), (3, 4, 5), 3])
def test_another_number_of_items_than_promised_is_an_error_of_its_own(wrong: Any) -> None:
    @ray.remote(num_returns="streaming", _num_objects_per_yield=2, max_retries=0)
    def pairs() -> Iterator[Any]:
        yield 1, 2
        yield wrong

    refs = list(pairs.remote())
    assert [get(ref) for ref in refs[:2]] == [1, 2]
    with pytest.raises(ValueError):
        get(refs[2])


def test_the_number_of_items_in_a_yield_belongs_to_the_definition() -> None:
    @ray.remote(num_returns="streaming")
    def single() -> Iterator[int]:
        yield 1

    with pytest.raises(ValueError, match="cannot be overridden per task call"):
        single.options(_num_objects_per_yield=2).remote()
    with pytest.raises(ValueError, match="must be set to a positive integer"):
        ray.remote(_num_objects_per_yield=0)(lambda: None)


def test_a_methods_yield_may_be_several_items() -> None:
    @ray.remote
    class Pairs:
        @ray.method(_num_objects_per_yield=2)
        def plain(self, last: Any = (2, "two")) -> Iterator[Any]:
            yield 1, "one"
            yield last

        @ray.method(_num_objects_per_yield=2)
        async def in_loop(self) -> AsyncIterator[Any]:
            yield 1, "one"
            yield [2, "two"]

    pairs = Pairs.remote()
    assert [get(ref) for ref in pairs.in_loop.remote()] == [1, "one", 2, "two"]
    assert [get(ref) for ref in pairs.plain.options(name="p").remote()] == [1, "one", 2, "two"]
    *items, wrong = pairs.plain.remote(last=3)
    assert [get(ref) for ref in items] == [1, "one"]
    with pytest.raises(ValueError):
        get(wrong)


@pytest.mark.parametrize("count", [1, 2, None])
def test_the_number_of_items_in_a_methods_yield_belongs_to_the_definition(count: Any) -> None:
    source = Source.remote()
    with pytest.raises(ValueError, match="cannot be overridden per actor method call"):
        source.count.options(_num_objects_per_yield=count)
    with pytest.raises(ValueError, match="must be set to a positive integer"):
        ray.method(_num_objects_per_yield=0)(lambda self: None)


@pytest.mark.parametrize("word", ["streaming", "dynamic"])
def test_a_method_that_yields_nothing_has_nothing_to_stream(word: str) -> None:
    class Plain:
        def ping(self) -> None: ...

    with pytest.raises(ValueError, match="can only be used with generator functions"):
        ray.method(num_returns=word)(Plain.ping)
    plain = ray.remote(Plain).remote()
    with pytest.raises(ValueError, match="can only be used with generator functions"):
        plain.ping.options(num_returns=word)


def test_what_does_not_stream_yields_single_items() -> None:
    @ray.remote(num_returns="dynamic", _num_objects_per_yield=2)
    def pairs() -> Iterator[Any]:
        yield 1, 2
        yield 3, 4

    assert [get(ref) for ref in get(pairs.remote())] == [(1, 2), (3, 4)]
    assert get(pairs.options(num_returns=2).remote()) == [(1, 2), (3, 4)]
