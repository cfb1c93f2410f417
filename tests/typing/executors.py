"""`Executor`, as the standard library's stubs have it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from concurrent.futures import Future

from typing_extensions import assert_type

from poolray import Executor


def times(a: int, b: int = 2) -> int:
    return a * b


def making() -> None:
    Executor()
    Executor(2, initializer=print, initargs=("a",), max_tasks_per_child=10)
    Executor(max_workers=2, mp_context=None, max_retries=0, break_on_worker_death=True)
    with Executor(2) as executor:
        assert_type(executor, Executor)
    executor.shutdown(wait=False, cancel_futures=True)


def calls(executor: Executor) -> None:
    assert_type(executor.submit(times, 2), Future[int])
    assert_type(executor.submit(times, a=2, b=3).result(timeout=1), int)
    assert_type(executor.map(times, [1, 2], [3, 4], timeout=1.5, chunksize=2), Iterator[int])
    assert_type(list(executor.map(str, range(3))), list[str])


async def its_futures_are_the_standard_ones(executor: Executor) -> None:
    futures = [executor.submit(times, n) for n in range(3)]
    for done in concurrent.futures.as_completed(futures):
        assert_type(done.result(), int)
    assert_type(await asyncio.wrap_future(futures[0]), int)
    loop = asyncio.get_running_loop()
    assert_type(await loop.run_in_executor(executor, times, 2), int)


def wrong_calls(executor: Executor) -> None:
    Executor("2")  # type: ignore[arg-type]
    Executor(2, max_task_per_child=1)  # type: ignore[call-arg]
    executor.submit(3)  # type: ignore[arg-type]
    executor.submit(times)  # type: ignore[call-arg]
    executor.submit(times, "2")  # type: ignore[arg-type]
    executor.submit(times, 2, 3, 4)  # type: ignore[call-arg]
    executor.submit(times, 2, c=3)  # type: ignore[call-arg]
    executor.map(times, 3)  # type: ignore[arg-type]
    executor.shutdown(False, True)  # type: ignore[call-arg]


def wrong_results(executor: Executor) -> None:
    a: Future[str] = executor.submit(times, 2)  # type: ignore[arg-type]
    b: list[int] = executor.map(times, [1])  # type: ignore[assignment]
