"""Everything at once: tiny calls, some that sleep, and workers killed meanwhile.

POOLRAY_STRESS_CALLS sets the number of calls (20,000 in CI; 200,000 is the size of the promise).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

import poolray
from poolray import Executor, Pool
from tests.integration.support import children_of, wait_until

CALLS = int(os.environ.get("POOLRAY_STRESS_CALLS", "20000"))
SEED = int(os.environ.get("POOLRAY_STRESS_SEED", "7"))

pytestmark = pytest.mark.timeout(max(120, CALLS // 250))


def work(x: int) -> int:
    if x % 1_000 == 999:
        time.sleep(0.05)
    return x * x


def fork_servers_and_workers() -> tuple[list[int], list[int]]:
    me = os.getpid()
    family = {}
    for child in children_of(me):
        with suppress(psutil.NoSuchProcess):
            family[child.pid] = child.ppid()
    servers = [pid for pid, parent in family.items() if parent == me]
    return servers, [pid for pid, parent in family.items() if parent in servers]


@contextmanager
def killer(every_s: float) -> Iterator[list[int]]:
    """Kill a random worker now and then, until the block ends."""
    stop = threading.Event()
    killed: list[int] = []
    choice = random.Random(SEED)

    def run() -> None:
        while not stop.wait(every_s):
            _, workers = fork_servers_and_workers()
            if workers:
                victim = choice.choice(sorted(workers))
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.append(victim)

    thread = threading.Thread(target=run, name="killer")
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def pool_way(count: int) -> None:
    with Pool(2, max_retries=-1) as pool:
        assert pool.map(work, range(count), chunksize=1) == [x * x for x in range(count)]
        assert list(pool.imap(work, range(count))) == [x * x for x in range(count)]
        results = [pool.apply_async(work, (x,)) for x in range(count)]
        assert [result.get() for result in results] == [x * x for x in range(count)]


def executor_way(count: int) -> None:
    with Executor(2, max_retries=-1) as executor:
        futures = [executor.submit(work, x) for x in range(count)]
        assert [future.result() for future in futures] == [x * x for x in range(count)]


def task_way(count: int) -> None:
    poolray.init(num_cpus=2, ignore_reinit_error=True)
    task: Any = poolray.remote(work).options(max_retries=-1)
    refs = [task.remote(x) for x in range(count)]
    assert poolray.get(refs) == [x * x for x in range(count)]


@pytest.mark.parametrize(("way", "calls_each"), [(pool_way, 3), (executor_way, 1), (task_way, 1)])
def test_every_result_is_right_while_workers_are_killed(way: Any, calls_each: int) -> None:
    # A killed call starts over, so calls must be shorter than the pause between two kills.
    with killer(every_s=0.15) as killed:
        while True:  # a fast machine is through before the first kill
            way(CALLS // 5 // calls_each if calls_each > 1 else CALLS // 5)
            if len(killed) >= 3:
                break
    assert_nothing_is_held()


def test_faces_work_side_by_side_while_workers_are_killed() -> None:
    errors: list[BaseException] = []

    def run(way: Any, count: int) -> None:
        try:
            way(count)
        except BaseException as error:  # shown in the main thread
            errors.append(error)

    ways = [(pool_way, CALLS // 30), (executor_way, CALLS // 10), (task_way, CALLS // 10)]
    threads = [threading.Thread(target=run, args=pair) for pair in ways]
    with killer(every_s=0.2):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert_nothing_is_held()


def assert_nothing_is_held() -> None:
    """Counted in the machine: no task, no object, no range of the arena, no request."""
    runtime = poolray.local.runtime.current()
    assert runtime is not None

    def is_clean() -> bool:
        runtime.client.sync_references()
        now = runtime.statistics()
        return (now.tasks, now.queued_calls, now.objects, now.open_requests) == (0, 0, 0, 0) and (
            now.arena.used_bytes == 0
        )

    wait_until(is_clean, "the machine to be empty", 10)
    with runtime.guard:
        runtime.node.check_invariants()
