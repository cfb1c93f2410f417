"""Threads, forks, loops and nesting around a runtime, and many runtimes one after another."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import poolray
from poolray import Executor, Pool
from tests.integration.support import DEADLINE_S, script_environment


def square(x: int) -> int:
    return x * x


def test_many_threads_use_one_pool_executor_and_runtime_at_once() -> None:
    poolray.init(num_cpus=2)
    task: Any = poolray.remote(square)
    errors: list[BaseException] = []

    def use(pool: Any, executor: Executor, start: int) -> None:
        try:
            for x in range(start, start + 60):
                assert pool.apply(square, (x,)) == x * x
                assert executor.submit(square, x).result(30) == x * x
                assert poolray.get(task.remote(x), timeout=30) == x * x
                ready, rest = poolray.wait([task.remote(x), task.remote(x + 1)], num_returns=2)
                assert (len(ready), rest) == (2, [])
        except BaseException as error:  # shown in the main thread
            errors.append(error)

    with Pool(2) as pool, Executor(2) as executor:
        threads = [threading.Thread(target=use, args=(pool, executor, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_pools_can_be_made_while_threads_hold_locks_and_print() -> None:
    stop = threading.Event()
    logger = logging.getLogger("poolray.tests.noise")
    lock = threading.Lock()

    def make_noise() -> None:
        while not stop.is_set():
            with lock:
                logger.debug("noise %s", [bytearray(1000) for _ in range(20)])

    threads = [threading.Thread(target=make_noise) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            with Pool(2) as pool:
                assert pool.map(square, range(20), 1) == [x * x for x in range(20)]
                assert pool.apply(log_something, (1,)) == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def log_something(x: int) -> int:
    logging.getLogger("poolray.tests.noise").debug("in a worker %s", x)
    return x


def nested(depth: int) -> int:
    if depth == 0:
        return 1
    child: Any = poolray.remote(nested)
    return 1 + sum(poolray.get([child.remote(depth - 1)]))


def test_tasks_nest_on_one_cpu() -> None:
    poolray.init(num_cpus=1)
    task: Any = poolray.remote(nested)
    assert poolray.get(task.remote(5), timeout=50) == 6


def use_faces_in_a_worker(x: int) -> list[int]:
    with Pool(2) as pool, Executor(1) as executor:
        return [*pool.map(square, range(x)), executor.submit(square, x).result(30)]


def test_workers_may_have_pools_and_executors_and_tasks_of_their_own() -> None:
    poolray.init(num_cpus=2)
    task: Any = poolray.remote(use_faces_in_a_worker)
    expected = [0, 1, 4, 9]
    assert poolray.get(task.remote(3), timeout=50) == expected
    with Pool(2) as pool, Executor(1) as executor:
        assert pool.map(use_faces_in_a_worker, [3, 3], 1) == [expected, expected]
        assert executor.submit(use_faces_in_a_worker, 3).result(50) == expected
        assert pool.apply(nested, (2,)) == 3


def in_a_child(queue: Any) -> None:
    with Pool(1) as pool:
        queue.put(pool.map(square, range(3)))


def test_a_forked_child_starts_afresh_and_leaves_its_parent_alone() -> None:
    with Pool(2) as pool:
        assert pool.apply(square, (2,)) == 4
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=in_a_child, args=(queue,))
        child.start()
        assert queue.get(timeout=30) == [0, 1, 4]
        child.join(30)
        queue.close()
        queue.join_thread()
        pid = os.fork()
        if pid == 0:  # the child does nothing at all with the runtime
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert pool.map(square, range(100), 1) == [x * x for x in range(100)]


def test_refs_and_futures_can_be_awaited() -> None:
    poolray.init(num_cpus=2)
    task: Any = poolray.remote(square)

    async def main() -> None:
        assert await task.remote(3) == 9
        assert await asyncio.gather(*(task.remote(x) for x in range(50))) == [
            x * x for x in range(50)
        ]
        loop = asyncio.get_running_loop()
        with Executor(2) as executor:
            jobs = [loop.run_in_executor(executor, square, x) for x in range(20)]
            assert await asyncio.wait_for(asyncio.gather(*jobs), 30) == [x * x for x in range(20)]

    asyncio.run(main())


def repeat(times: int, once: Callable[[], None]) -> None:
    for _ in range(times):
        once()


def test_runtimes_come_and_go_without_a_trace() -> None:
    def once() -> None:
        poolray.init(num_cpus=1)
        task: Any = poolray.remote(square)
        assert poolray.get([task.remote(x) for x in range(5)]) == [0, 1, 4, 9, 16]
        with Pool(1) as pool:
            assert pool.apply(square, (3,)) == 9
        poolray.shutdown()

    repeat(5, once)  # lazy imports and caches fill up
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    repeat(30, once)
    gc.collect()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 20_000


def test_dropped_values_give_their_memory_back() -> None:
    import numpy

    poolray.init(num_cpus=1, object_store_memory=64 << 20)
    for number in range(20):  # more than four times what the store has room for
        ref = poolray.put(numpy.full(2 << 20, number, dtype=numpy.float64))
        assert poolray.get(ref)[-1] == number
        del ref
    with Pool(1) as pool:
        for number in range(20):
            assert pool.apply(numpy.full, (1 << 20, float(number)))[0] == number


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("given", ["on standard input", "with -c"])
def test_a_program_without_a_file_works_with_every_start_method(
    given: str, start_method: str, tmp_path: Path
) -> None:
    """There is no `__main__` to import in a fresh interpreter: what it defines goes by value."""
    program = textwrap.dedent(
        f"""
        import multiprocessing
        import poolray
        from poolray import Executor, Pool

        offset = 1

        class Thing:
            def __init__(self, value):
                self.value = value

        def setup(value):
            global offset
            offset = value

        def shifted(x):
            return x + offset

        if __name__ == "__main__":
            context = multiprocessing.get_context({start_method!r})
            with Pool(2, context=context) as pool:
                print(pool.map(shifted, range(3)), pool.apply(Thing, (3,)).value)
            with Pool(2, setup, (10,), context=context) as pool:
                print(pool.map(shifted, range(3)), pool.map(lambda x: x * offset, [1]))
            with Executor(2, context, setup, (20,)) as executor:
                things = executor.map(Thing, range(3))
                print(list(executor.map(shifted, range(3))), [thing.value for thing in things])
            print(poolray.get(poolray.remote(shifted).remote(1)))
        """
    )
    options = ["-"] if given == "on standard input" else ["-c", program]
    done = subprocess.run(
        [sys.executable, *options],
        input=program,
        capture_output=True,
        text=True,
        env=script_environment(tmp_path),
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "[1, 2, 3] 3",
        "[10, 11, 12] [10]",
        "[20, 21, 22] [0, 1, 2]",
        "2",
    ], done
