"""Refs in event loops: of drivers and workers, in any thread, given up, without a thread each."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.exceptions import TaskCancelledError
from poolray.local import runtime as local_runtime
from tests.integration.support import DEADLINE_S, Gate, wait_until

AWAITS = 60


@poolray.remote
def echo(value: Any) -> Any:
    return value


@poolray.remote(num_cpus=0)
def hold(gate: Gate, value: Any = None) -> Any:
    gate.wait()
    return value


def open_requests() -> int:
    runtime = local_runtime.current()
    assert runtime is not None
    return runtime.statistics().open_requests


def thread_names() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate())


async def settle() -> None:
    """Let what was made ready run."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_many_awaits_of_a_driver_take_no_thread_each(release: Gate) -> None:
    others = set(threading.enumerate())  # what earlier tests of this process have left
    poolray.init(num_cpus=2)
    refs = [hold.remote(release, 0), *(echo.remote(n) for n in range(1, AWAITS))]

    async def main() -> list[int]:
        awaits = [asyncio.ensure_future(ref) for ref in refs]
        await settle()
        ours = sorted(thread.name for thread in set(threading.enumerate()) - others)
        release.open()
        values = await asyncio.wait_for(asyncio.gather(*awaits), DEADLINE_S)
        assert set(ours) <= {"poolray-callbacks", "poolray-reactor"}
        assert len(ours) <= 2
        return values

    assert asyncio.run(main()) == list(range(AWAITS))


def test_an_await_that_is_cancelled_is_forgotten_and_the_task_goes_on(release: Gate) -> None:
    poolray.init(num_cpus=2)
    ref = hold.remote(release, "value")

    async def main() -> None:
        awaited = asyncio.ensure_future(ref)
        await settle()
        assert open_requests() == 1
        awaited.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited
        assert open_requests() == 0
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ref, 0.01)
        assert open_requests() == 0

    asyncio.run(main())
    release.open()
    assert poolray.get(ref, timeout=DEADLINE_S) == "value"


def test_a_loop_that_ends_before_the_task_disturbs_nobody(
    release: Gate, capfd: pytest.CaptureFixture[str]
) -> None:
    poolray.init(num_cpus=2)
    ref = hold.remote(release, "value")
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(asyncio.wait([loop.create_task(as_coroutine(ref))]))
    loop.run_until_complete(settle())
    loop.close()  # with the await in it
    release.open()
    assert poolray.get(ref, timeout=DEADLINE_S) == "value"
    assert poolray.get(echo.remote(1), timeout=DEADLINE_S) == 1
    del waiting
    assert "Traceback" not in capfd.readouterr().err


async def as_coroutine(ref: Any) -> Any:
    return await ref


def test_loops_of_several_threads_await_the_same_refs(release: Gate) -> None:
    poolray.init(num_cpus=2)
    refs = [hold.remote(release, n) for n in range(4)]

    async def main() -> list[int]:
        return list(await asyncio.wait_for(asyncio.gather(*refs), DEADLINE_S))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        running = [threads.submit(asyncio.run, main()) for _ in range(4)]
        wait_until(lambda: open_requests() == 16, "all awaits")
        release.open(4)
        assert [future.result(DEADLINE_S) for future in running] == [[0, 1, 2, 3]] * 4


def test_wait_gives_what_came_first(release: Gate) -> None:
    poolray.init(num_cpus=2)

    async def main() -> None:
        late, early = (
            asyncio.ensure_future(as_coroutine(ref))
            for ref in (hold.remote(release), echo.remote("early"))
        )
        done, pending = await asyncio.wait(
            [late, early], timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        assert done == {early}
        assert pending == {late}
        release.open()
        await late

    asyncio.run(main())


def test_large_values_are_awaited_without_a_copy() -> None:
    poolray.init(num_cpus=2)
    array = np.arange(1_000_000)

    async def main() -> Any:
        return await echo.remote(array)

    value = asyncio.run(main())
    assert np.array_equal(value, array)
    assert not value.flags.writeable


def test_a_cancelled_task_ends_its_await() -> None:
    poolray.init(num_cpus=1)

    async def main() -> None:
        ref = echo.options(resources={"unheard of": 1}).remote(1)
        awaited = asyncio.ensure_future(ref)
        await settle()
        poolray.cancel(ref)
        with pytest.raises(TaskCancelledError):
            await asyncio.wait_for(awaited, DEADLINE_S)

    asyncio.run(main())


# --- in workers --------------------------------------------------------------------------------


def in_worker(function: Callable[..., Any], *args: Any) -> Any:
    return poolray.get(poolray.remote(function).remote(*args), timeout=DEADLINE_S)


def test_many_awaits_of_a_worker_share_one_thread(release: Gate) -> None:
    poolray.init(num_cpus=3)

    def task(gate: Gate) -> tuple[list[int], list[str]]:
        refs = [hold.remote(gate, 0), *(echo.remote(n) for n in range(1, AWAITS))]

        async def main() -> tuple[list[int], list[str]]:
            awaits = [asyncio.ensure_future(ref) for ref in refs]
            await settle()
            names = thread_names()
            gate.open()
            return list(await asyncio.gather(*awaits)), names

        return asyncio.run(main())

    values, names = in_worker(task, release)
    assert values == list(range(AWAITS))
    assert names == ["MainThread", "poolray-replies"]


def test_the_thread_goes_when_nobody_awaits_any_more() -> None:
    poolray.init(num_cpus=2)

    def task() -> list[str]:
        async def main() -> None:
            assert await echo.remote(1) == 1

        asyncio.run(main())
        asyncio.run(main())
        wait_until(lambda: threading.active_count() == 1, "the end of the thread")
        asyncio.run(main())
        return thread_names()

    assert in_worker(task) == ["MainThread", "poolray-replies"]


def test_a_worker_gets_and_awaits_at_once(release: Gate) -> None:
    poolray.init(num_cpus=2)

    def task(gate: Gate) -> list[Any]:
        held = hold.remote(gate, "held")
        future = held.future()
        values = [poolray.get(echo.remote(n)) for n in range(50)]
        ready, _ = poolray.wait([held, echo.remote(1)], num_returns=1)
        assert len(ready) == 1
        gate.open()
        return [*values, future.result(DEADLINE_S), poolray.get(held)]

    assert in_worker(task, release) == [*range(50), "held", "held"]


def test_threads_of_a_worker_get_and_await_at_once() -> None:
    poolray.init(num_cpus=2)

    def task() -> list[int]:
        async def awaits(number: int) -> int:
            return sum(await asyncio.gather(*(echo.remote(number) for _ in range(20))))

        def gets(number: int) -> int:
            return sum(poolray.get([echo.remote(number) for _ in range(20)]))

        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            running = [threads.submit(asyncio.run, awaits(n)) for n in range(3)]
            running += [threads.submit(gets, n) for n in range(3)]
            return [future.result(DEADLINE_S) for future in running]

    assert in_worker(task) == [0, 20, 40, 0, 20, 40]


def test_an_await_that_a_worker_gives_up_is_forgotten(release: Gate) -> None:
    poolray.init(num_cpus=2)

    def task(gate: Gate) -> str:
        ref = hold.remote(gate, "value")

        async def main() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ref, 0.01)

        asyncio.run(main())
        gate.open()
        return poolray.get(ref)

    assert in_worker(task, release) == "value"
    wait_until(lambda: open_requests() == 0, "forgotten requests")


def test_a_cancelled_task_is_interrupted_in_its_event_loop(release: Gate, tmp_path: Path) -> None:
    poolray.init(num_cpus=2)

    @poolray.remote
    def task(gate: Gate, directory: Path) -> None:
        async def main() -> None:
            awaited = asyncio.ensure_future(hold.remote(gate))
            await settle()
            try:
                (directory / "awaits").touch()
                await awaited
            finally:
                (directory / "cleaned up").touch()

        asyncio.run(main())

    ref = task.remote(release, tmp_path)
    wait_until((tmp_path / "awaits").exists)
    poolray.cancel(ref)
    with pytest.raises(TaskCancelledError):
        poolray.get(ref, timeout=DEADLINE_S)
    assert (tmp_path / "cleaned up").exists()
    release.open()
    assert poolray.get(echo.remote(1), timeout=DEADLINE_S) == 1
