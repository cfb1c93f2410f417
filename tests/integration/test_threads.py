"""Many threads in a driver: all faces at once, forks meanwhile, ends meanwhile."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray import Executor, Pool
from poolray.cluster_utils import Cluster
from poolray.exceptions import GetTimeoutError, PoolrayError
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    ScriptResult,
    announce_and_hold,
    assert_nothing_is_left_over,
    kill,
    own_pid,
    remote_hold,
    remote_successor,
    successor,
    worker_pids,
)


def in_threads(*calls: Callable[[], object], timeout_s: float = 50.0) -> None:
    """Run calls in a thread each; raise the first exception, or that one of them hangs."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.1, deadline - time.monotonic()))
        assert not thread.is_alive(), f"a thread hangs; errors so far: {errors}"
    if errors:
        raise errors[0]


# --- all at once ---------------------------------------------------------------------------------


def use_everything(pool: Any, executor: Executor, seed: int, rounds: int) -> None:
    """A random mix of calls, every result checked."""
    choice = random.Random(seed)
    for number in range(seed * 1000, seed * 1000 + rounds):
        kind = choice.randrange(9)
        if kind == 0:
            assert pool.apply(successor, (number,)) == number + 1
        elif kind == 1:
            results = [pool.apply_async(successor, (number + i,)) for i in range(20)]
            assert [result.get(DEADLINE_S) for result in results] == list(
                range(number + 1, number + 21)
            )
        elif kind == 2:
            assert pool.map(successor, range(number, number + 30), chunksize=1)[-1] == number + 30
        elif kind == 3:
            assert sum(1 for _ in pool.imap_unordered(successor, iter(range(30)))) == 30
        elif kind == 4:
            assert executor.submit(successor, number).result(DEADLINE_S) == number + 1
        elif kind == 5:
            futures = [executor.submit(successor, number + i) for i in range(20)]
            done, rest = concurrent.futures.wait(futures, DEADLINE_S)
            assert sorted(future.result() for future in done)[-1] == number + 20
            assert not rest
        elif kind == 6:
            refs = [remote_successor.remote(number + i) for i in range(20)]
            ready, late = poolray.wait(refs, num_returns=10, timeout=DEADLINE_S)
            assert len(ready) == 10
            assert poolray.get([*ready, *late], timeout=DEADLINE_S)
        elif kind == 7:
            ref = remote_successor.remote(remote_successor.remote(number))
            assert poolray.get(ref, timeout=DEADLINE_S) == number + 2
        else:
            array = np.full(20_000, number)
            assert poolray.get(poolray.put(array)).sum() == 20_000 * number
            assert pool.apply(np.sum, (array,)) == 20_000 * number


@pytest.mark.parametrize("threads", [2, 16])
def test_threads_use_all_faces_at_once(threads: int) -> None:
    poolray.init(num_cpus=2)
    with Pool(2) as pool, Executor(2) as executor:
        rounds = 800 // threads
        in_threads(
            *(
                lambda seed=seed: use_everything(pool, executor, seed, rounds)
                for seed in range(threads)
            )
        )
        assert_nothing_is_left_over()


def test_threads_share_a_ref_and_a_result() -> None:
    """All of them wait for one value, again and again; whoever leads wakes the others."""
    poolray.init(num_cpus=2)
    with Pool(2) as pool, Executor(2) as executor:
        for number in range(100):
            ref = remote_successor.remote(number)
            result = pool.apply_async(successor, (number,))
            future = executor.submit(successor, number)
            got: list[int] = []
            in_threads(
                *[lambda ref=ref, got=got: got.append(poolray.get(ref, timeout=DEADLINE_S))] * 3,
                *[lambda result=result, got=got: got.append(result.get(DEADLINE_S))] * 3,
                *[lambda future=future, got=got: got.append(future.result(DEADLINE_S))] * 3,
            )
            assert got == [number + 1] * 9


def test_a_leader_that_leaves_hands_over(started: Gate, release: Gate) -> None:
    """The first to wait leads; its own result comes first, and the others must not stay asleep."""
    with Pool(4) as pool:
        for _ in range(200):
            results = [pool.apply_async(successor, (number,)) for number in range(4)]
            in_threads(*(lambda result=result: result.get(DEADLINE_S) for result in results))


def test_a_timeout_in_one_thread_does_not_disturb_the_others(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=2)
    held = remote_hold.remote(started, release, "late")
    started.wait()

    done = threading.Barrier(3, release.open)

    def give_up() -> None:
        for _ in range(50):
            with pytest.raises(GetTimeoutError):
                poolray.get(held, timeout=0.002)
        done.wait(DEADLINE_S)

    def go_on() -> None:
        for number in range(300):
            assert poolray.get(remote_successor.remote(number), timeout=DEADLINE_S) == number + 1
        done.wait(DEADLINE_S)

    def stay() -> None:
        assert poolray.get(held, timeout=DEADLINE_S) == "late"

    in_threads(give_up, go_on, stay, go_on)


def test_results_come_while_no_thread_waits() -> None:
    """Callbacks and `ready()` need nobody who blocks: the background thread leads."""
    with Pool(2) as pool, Executor(2) as executor:
        seen: list[int] = []
        done = threading.Event()

        def count(value: int) -> None:
            seen.append(value)
            if len(seen) == 200:
                done.set()

        for number in range(100):
            pool.apply_async(successor, (number,), callback=count)
            executor.submit(successor, number).add_done_callback(lambda f: count(f.result()))
        assert done.wait(DEADLINE_S)
        assert sorted(seen) == sorted([*range(1, 101)] * 2)


def test_callbacks_may_use_the_pool_they_belong_to() -> None:
    with Pool(2) as pool:
        got: list[int] = []
        done = threading.Event()

        def call_again(value: int) -> None:
            got.append(pool.apply(successor, (value,)))
            if len(got) == 50:
                done.set()

        for number in range(50):
            pool.apply_async(successor, (number,), callback=call_again)
        assert done.wait(DEADLINE_S)
        assert sorted(got) == list(range(2, 52))


# --- ends ----------------------------------------------------------------------------------------


def test_terminate_wakes_everyone_who_waits(started: Gate, release: Gate) -> None:
    for _ in range(10):
        pool = Pool(2)
        iterator = pool.imap(successor, blocking_input(started, release))
        waits: list[Callable[[], object]] = [
            lambda pool=pool: pool.apply(announce_and_hold, (started, release)),
            lambda pool=pool: pool.map(successor, [*range(1000), None]),
            lambda pool=pool: pool.apply_async(announce_and_hold, (started, release)).get(),
            lambda iterator=iterator: list(iterator),
        ]

        def expect_error(wait: Callable[[], object]) -> None:
            with pytest.raises((PoolrayError, TypeError, ValueError)):
                wait()

        def end(pool: Any = pool) -> None:
            started.wait()
            started.wait()
            pool.terminate()
            pool.join()

        in_threads(*(lambda wait=wait: expect_error(wait) for wait in waits), end)


def blocking_input(started: Gate, release: Gate) -> Iterator[int]:
    yield from range(10)
    yield release.wait()  # type: ignore[misc]


def test_shutdown_wakes_everyone_who_waits(started: Gate, release: Gate) -> None:
    for _ in range(5):
        poolray.init(num_cpus=2)
        pool, executor = Pool(1), Executor(1)
        ref = remote_hold.remote(started, release)
        future = executor.submit(announce_and_hold, started, release)

        def expect_error(wait: Callable[[], object]) -> None:
            with pytest.raises(Exception):  # noqa: B017 - each face has its own
                wait()

        def end() -> None:
            for _ in range(3):
                started.wait()
            poolray.shutdown()

        in_threads(
            lambda ref=ref: expect_error(lambda: poolray.get(ref)),
            lambda pool=pool: expect_error(
                lambda: pool.apply(announce_and_hold, (started, release))
            ),
            lambda future=future: expect_error(future.result),
            end,
        )


def test_a_runtime_may_live_in_another_thread_than_the_main_one() -> None:
    def live() -> None:
        poolray.init(num_cpus=2)
        with Pool(2) as pool, Executor(2) as executor:
            use_everything(pool, executor, 1, 50)
        poolray.shutdown()

    in_threads(live)
    in_threads(live)
    poolray.init(num_cpus=1)
    assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2


def test_threads_that_start_the_runtime_at_once_get_the_same_one() -> None:
    for _ in range(20):
        barrier = threading.Barrier(4)

        def use(number: int, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(DEADLINE_S)
            assert poolray.get(remote_successor.remote(number), timeout=DEADLINE_S) == number + 1
            with Pool(1) as pool:
                assert pool.apply(successor, (number,)) == number + 1

        in_threads(*(lambda number=number: use(number) for number in range(4)))
        poolray.shutdown()


def test_workers_die_while_threads_wait() -> None:
    poolray.init(num_cpus=2)
    stop = threading.Event()

    rounds = itertools.count()
    progress = [0]

    def kill_now_and_then() -> None:
        # By what was done since, not by time: workers that are killed while they start, again and
        # again, rightly end their group.
        choice, killed_at = random.Random(3), 0
        while not stop.wait(0.01):
            pids = worker_pids()
            if pids and progress[0] >= killed_at + 24:
                killed_at = progress[0]
                kill(choice.choice(pids))

    with Pool(2, max_retries=-1) as pool, Executor(2, max_retries=-1) as executor:
        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        forever = remote_successor.options(max_retries=-1)

        def use(seed: int) -> None:
            for number in range(150):
                assert pool.apply(successor, (number,)) == number + 1
                assert executor.submit(successor, number).result(DEADLINE_S) == number + 1
                assert poolray.get(forever.remote(number), timeout=DEADLINE_S) == number + 1
                progress[0] = next(rounds)

        try:
            in_threads(*(lambda seed=seed: use(seed) for seed in range(4)))
        finally:
            stop.set()
            killer.join()
        assert_nothing_is_left_over()


# --- forks of a driver with threads --------------------------------------------------------------


@contextmanager
def noise(count: int) -> Iterator[None]:
    """Threads that hold all kinds of locks most of the time: ours, the interpreter's, malloc's."""
    stop = threading.Event()
    logger = logging.getLogger("poolray.tests.noise")
    handler = logging.StreamHandler(open(os.devnull, "w"))  # noqa: SIM115 - closed below
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    lock = threading.RLock()
    sink = open(os.devnull, "w")  # noqa: SIM115 - closed below

    def hammer(number: int) -> None:
        import importlib
        import json

        while not stop.is_set():
            with lock:
                logger.debug("noise %s", number)
            print("noise", number, file=sink)
            bytes(random.randrange(100_000))
            np.ones(random.randrange(10_000)).sum()
            importlib.reload(json)
            concurrent.futures.Future().set_result(None)
            threading.Thread(target=successor, args=(1,)).start()

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        logger.removeHandler(handler)
        handler.stream.close()
        sink.close()


def work_with_locks(number: int) -> int:
    """Use in a worker what threads of the driver held when it was forked."""
    logging.getLogger("poolray.tests.noise").debug("worker %s", number)
    logging.getLogger("poolray.tests.worker").warning("worker %s", number)
    print("worker", number)
    thread = threading.Thread(target=successor, args=(1,))
    thread.start()
    thread.join()
    import importlib
    import json

    importlib.reload(json)
    return int(np.ones(10_000).sum()) + number


def test_twenty_pools_are_forked_off_a_driver_full_of_busy_threads() -> None:
    with noise(3):
        for number in range(20):
            with Pool(2) as pool:
                assert pool.map(work_with_locks, range(8), chunksize=1)[-1] == 10_007
                kill(pool.apply(own_pid))  # its replacement is forked meanwhile as well
                assert pool.apply(work_with_locks, (number,)) == 10_000 + number


def test_executors_and_tasks_start_in_a_driver_full_of_busy_threads() -> None:
    with noise(3):
        for number in range(8):
            poolray.init(num_cpus=2)
            work: Any = poolray.remote(work_with_locks)
            assert poolray.get(work.remote(number), timeout=DEADLINE_S) == 10_000 + number
            with Executor(2) as executor:
                assert list(executor.map(work_with_locks, range(4)))[-1] == 10_003
            poolray.shutdown()


def test_a_thread_that_prints_while_workers_are_forked_prints_once(
    script: Callable[..., ScriptResult], tmp_path: Path
) -> None:
    """What a buffer holds at a fork must not be written by both processes."""
    result = script(
        """
        def chatter(stop):
            number = 0
            while not stop.is_set():
                print("line", number)
                number += 1
            print("total", number)

        if __name__ == "__main__":
            stop = threading.Event()
            thread = threading.Thread(target=chatter, args=(stop,))
            thread.start()
            for _ in range(10):
                with Pool(2) as pool:
                    assert pool.map(successor, range(10), chunksize=1)[-1] == 10
            stop.set()
            thread.join()
        """
    )
    *lines, total = result.lines()
    assert lines == [f"line {number}" for number in range(int(total.split()[1]))]


def test_signals_of_the_program_are_handled_while_threads_work() -> None:
    """A timer's signal interrupts system calls all over; none of it may surface."""
    hits = 0

    def on_alarm(number: int, frame: Any) -> None:
        nonlocal hits
        hits += 1

    before = signal.signal(signal.SIGUSR2, on_alarm)
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.001):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        poolray.init(num_cpus=2)
        with Pool(2) as pool, Executor(2) as executor:
            use_everything(pool, executor, 5, 150)
    finally:
        stop.set()
        sender.join()
        signal.signal(signal.SIGUSR2, before)
    assert hits > 10


class Holder:
    """Holds a CPU."""

    def is_there(self) -> bool:
        return True


@pytest.mark.parametrize("where", ["one process", "cluster"])
def test_a_handle_that_dies_while_another_thread_waits_is_told(where: str) -> None:
    """The task waits for the CPU of the actor."""
    cluster = None
    if where == "cluster":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        poolray.init(**({"address": cluster.address} if cluster else {"num_cpus": 1}))
        for _ in range(3):
            actor = poolray.remote(num_cpus=1)(Holder).remote()
            assert poolray.get(actor.is_there.remote())
            found: list[int] = []
            ref = remote_successor.remote(1)
            waiting = threading.Thread(target=lambda ref=ref, f=found: f.append(poolray.get(ref)))
            waiting.start()
            assert not poolray.wait([ref], timeout=0.1)[0]  # (the thread sleeps by then)
            del actor
            waiting.join(DEADLINE_S)
            assert found == [2]
    finally:
        poolray.shutdown()
        if cluster is not None:
            cluster.shutdown()
