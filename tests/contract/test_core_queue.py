"""`util.queue.Queue`: one queue for tasks, actors and the driver."""

from __future__ import annotations

import asyncio
import queue as standard
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    better_than_reference,
    get,
    ray,
    start_runtime,
)

module: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.queue")
Queue, Empty, Full = module.Queue, module.Empty, module.Full


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@pytest.fixture
def make_queue() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        made.append(Queue(*args, **options))
        return made[-1]

    yield make
    for queue in made:
        queue.shutdown(force=True)


@ray.remote
def put_all(queue: Any, items: list[Any]) -> None:
    for item in items:
        queue.put(item)


@ray.remote
def take(queue: Any, count: int) -> list[Any]:
    return [queue.get() for _ in range(count)]


def test_errors_are_those_of_the_standard_library() -> None:
    assert issubclass(Empty, standard.Empty)
    assert issubclass(Full, standard.Full)


def test_items_come_out_in_the_order_in_which_they_went_in(make_queue: Any) -> None:
    queue = make_queue()
    for item in range(5):
        queue.put(item)
    assert (len(queue), queue.size(), queue.qsize(), queue.empty()) == (5, 5, 5, False)
    assert [queue.get() for _ in range(5)] == list(range(5))
    assert queue.empty()


def test_a_full_queue_refuses_at_once_or_after_a_while(make_queue: Any) -> None:
    queue = make_queue(maxsize=1)
    assert not queue.full()
    queue.put_nowait("a")
    assert queue.full()
    with pytest.raises(Full):
        queue.put_nowait("b")
    with pytest.raises(Full):
        queue.put("b", block=False)
    with pytest.raises(Full):
        queue.put("b", timeout=0.01)
    assert queue.get() == "a"
    assert queue.empty()


def test_an_empty_queue_refuses_at_once_or_after_a_while(make_queue: Any) -> None:
    queue = make_queue()
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(block=False)
    with pytest.raises(Empty):
        queue.get(timeout=0.01)


def test_a_timeout_of_zero_does_not_hang(make_queue: Any) -> None:
    queue = make_queue(maxsize=1)
    with pytest.raises(Empty):
        queue.get(timeout=0)
    queue.put(1)
    with pytest.raises(Full):
        queue.put(2, timeout=0)


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_negative_timeout_is_refused(make_queue: Any, call: str) -> None:
    queue = make_queue()
    with pytest.raises(ValueError, match="non-negative"):
        getattr(queue, call)(*(["x"] if call == "put" else []), timeout=-1)


def test_a_consumer_waits_for_a_producer(make_queue: Any) -> None:
    queue = make_queue()
    taken = take.remote(queue, 3)
    get(put_all.remote(queue, ["a", "b", "c"]))
    assert get(taken) == ["a", "b", "c"]


def test_a_producer_waits_for_room(make_queue: Any) -> None:
    queue = make_queue(maxsize=1)
    done = put_all.remote(queue, list(range(4)))
    assert [queue.get(timeout=30) for _ in range(4)] == [0, 1, 2, 3]
    get(done)


def test_many_producers_and_consumers_lose_and_double_nothing(make_queue: Any) -> None:
    queue = make_queue(maxsize=3)
    consumer = take.remote(queue, 40)
    producers = [put_all.remote(queue, list(range(20 * n, 20 * n + 20))) for n in range(2)]
    assert sorted(get(consumer)) == list(range(40))
    get(producers)


def test_batches_go_in_and_out_in_order(make_queue: Any) -> None:
    queue = make_queue()
    queue.put_nowait_batch([1, 2, 3])
    queue.put_nowait_batch(())
    assert queue.get_nowait_batch(2) == [1, 2]
    assert queue.get_nowait_batch(0) == []
    assert queue.get_nowait_batch(1) == [3]


def test_a_batch_that_does_not_fit_leaves_the_queue_as_it_was(make_queue: Any) -> None:
    queue = make_queue(maxsize=3)
    queue.put_nowait_batch([1, 2])
    with pytest.raises(Full, match="Cannot add 2 items to queue of size 2 and maxsize 3"):
        queue.put_nowait_batch([3, 4])
    assert queue.qsize() == 2
    with pytest.raises(Empty, match="Cannot get 3 items from queue of size 2"):
        queue.get_nowait_batch(3)
    assert queue.get_nowait_batch(2) == [1, 2]


@better_than_reference("it cannot send a generator")
def test_a_batch_may_be_any_iterable(make_queue: Any) -> None:
    queue = make_queue()
    queue.put_nowait_batch(n * n for n in range(3))
    assert queue.get_nowait_batch(3) == [0, 1, 4]


def test_what_is_no_batch_is_refused(make_queue: Any) -> None:
    queue = make_queue()
    with pytest.raises(TypeError, match="Iterable"):
        queue.put_nowait_batch(3)
    with pytest.raises(TypeError, match="int"):
        queue.get_nowait_batch("3")
    with pytest.raises(ValueError, match="nonnegative"):
        queue.get_nowait_batch(-1)


def test_coroutines_put_and_get(make_queue: Any) -> None:
    queue = make_queue(maxsize=1)

    async def both() -> tuple[list[Any], list[Any]]:
        async def produce() -> list[Any]:
            return [await queue.put_async(n) for n in range(3)]

        async def consume() -> list[Any]:
            return [await queue.get_async() for _ in range(3)]

        made, taken = await asyncio.gather(produce(), consume())
        return made, taken

    assert asyncio.run(both())[1] == [0, 1, 2]


def test_coroutines_are_told_of_full_and_empty_queues(make_queue: Any) -> None:
    queue = make_queue(maxsize=1)

    async def check() -> None:
        with pytest.raises(Empty):
            await queue.get_async(block=False)
        with pytest.raises(Empty):
            await queue.get_async(timeout=0.01)
        with pytest.raises(ValueError, match="non-negative"):
            await queue.get_async(timeout=-1)
        await queue.put_async(1)
        with pytest.raises(Full):
            await queue.put_async(2, block=False)
        with pytest.raises(Full):
            await queue.put_async(2, timeout=0.01)

    asyncio.run(check())


@better_than_reference("the call that was given up takes the item", always=False)
def test_a_get_that_is_given_up_takes_no_item(make_queue: Any) -> None:
    queue = make_queue()

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.get_async(), 0.02)

    for item in range(10):
        asyncio.run(give_up())
        queue.put(item)
        assert queue.get(timeout=30) == item


@pytest.mark.skipif(IS_REFERENCE, reason="its items do not come back")
def test_an_item_that_nobody_waited_for_goes_back_to_its_place(make_queue: Any) -> None:
    queue = make_queue(maxsize=2)
    queue.put_nowait_batch(["first", "second"])
    taken = queue.actor.get.remote()
    get(taken)
    queue.put("third")
    queue._give_up(taken)  # too late to stop it
    assert [queue.get(timeout=30) for _ in range(3)] == ["first", "second", "third"]


def test_options_of_its_actor(make_queue: Any) -> None:
    queue = make_queue(actor_options={"name": "the-queue", "num_cpus": 1})
    queue.put(1)
    assert ray.get_actor("the-queue") == queue.actor
    with pytest.raises(ValueError, match="Invalid option"):
        make_queue(actor_options={"no_such_option": 1})


def test_a_queue_that_was_shut_down_is_of_no_use_to_anybody(make_queue: Any) -> None:
    queue = make_queue()
    queue.put(1)
    taken = take.remote(queue, 2)
    queue.shutdown(force=True)
    with pytest.raises(ray.exceptions.RayError):
        get(taken)
    assert queue.actor is None
    queue.shutdown()


@better_than_reference("the call that ends the actor may overtake others", always=False)
def test_a_gentle_shutdown_lets_calls_end_first(make_queue: Any) -> None:
    queue = make_queue()
    pending = queue.actor.put.remote(1)
    queue.shutdown()
    get(pending)
    assert queue.actor is None


@pytest.mark.skipif(IS_REFERENCE, reason="AttributeError: 'NoneType' object …")
def test_a_queue_that_was_shut_down_says_so(make_queue: Any) -> None:
    queue = make_queue()
    queue.shutdown(force=True)
    with pytest.raises(RuntimeError, match="shut down"):
        queue.put(1)


@pytest.mark.skipif(IS_REFERENCE, reason="an actor of its takes 1000 calls at once")
def test_more_callers_may_wait_than_an_actor_takes_calls_by_default(make_queue: Any) -> None:
    queue = make_queue()
    waiting = [queue.actor.get.remote() for _ in range(1100)]
    queue.put_nowait_batch(range(1100))
    assert sorted(get(waiting)) == list(range(1100))


def test_a_queue_holds_arrays_and_handles(make_queue: Any) -> None:
    numpy = pytest.importorskip("numpy")
    queue, inner = make_queue(), make_queue()
    queue.put(numpy.arange(100_000))
    queue.put(inner)
    assert queue.get().sum() == 99_999 * 50_000
    same = queue.get()
    same.put("through")
    assert inner.get() == "through"
