"""Tasks in tasks, pools in pools: a worker is a place where all of poolray can be used."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import numpy as np
import pytest

import poolray
from poolray import Executor, Pool
from tests.integration.support import (
    DEADLINE_S,
    assert_nothing_is_left_over,
    children_of,
    die,
    kill,
    leave_mark,
    marks,
    own_pid,
    remote_successor,
    successor,
    wait_until,
    worker_pids,
)


@poolray.remote
def remote_depth(levels: int) -> list[int]:
    """A task in a task in a task: the pids on the way down."""
    if levels == 0:
        return [os.getpid()]
    return [os.getpid(), *poolray.get(remote_depth.remote(levels - 1))]


@pytest.mark.parametrize("levels", [1, 4, 12])
def test_tasks_nest_deeper_than_there_are_cpus(levels: int) -> None:
    poolray.init(num_cpus=1)
    pids = poolray.get(remote_depth.remote(levels), timeout=DEADLINE_S)
    assert len(set(pids)) == levels + 1, "a blocked worker ran something else"
    assert os.getpid() not in pids
    # Workers that waited are used again.
    again = poolray.get(remote_depth.remote(levels), timeout=DEADLINE_S)
    assert set(again) <= set(pids)
    assert_nothing_is_left_over()


@poolray.remote
def remote_fibonacci(n: int) -> int:
    if n < 2:
        return n
    return sum(poolray.get([remote_fibonacci.remote(n - 1), remote_fibonacci.remote(n - 2)]))


@pytest.mark.parametrize("num_cpus", [1, 2])
def test_a_tree_of_tasks_on_few_cpus(num_cpus: int) -> None:
    poolray.init(num_cpus=num_cpus)
    assert poolray.get(remote_fibonacci.remote(7), timeout=50) == 13
    assert_nothing_is_left_over()


@poolray.remote
def remote_wait(levels: int) -> int:
    if levels == 0:
        return 0
    ready, rest = poolray.wait([remote_wait.remote(levels - 1) for _ in range(2)], num_returns=2)
    assert not rest
    return 1 + max(poolray.get(ready))


def test_a_task_that_waits_lets_others_run() -> None:
    poolray.init(num_cpus=1)
    assert poolray.get(remote_wait.remote(3), timeout=DEADLINE_S) == 3


@poolray.remote
def remote_many(count: int) -> int:
    return sum(poolray.get([remote_successor.remote(number) for number in range(count)]))


def test_a_task_may_submit_thousands() -> None:
    poolray.init(num_cpus=2)
    expected = sum(range(1, 3001))
    got = poolray.get([remote_many.remote(3000) for _ in range(3)], timeout=DEADLINE_S)
    assert got == [expected] * 3
    assert_nothing_is_left_over()


@poolray.remote
def remote_make_ref(length: int) -> list[Any]:
    """A ref made here outlives this task: the node owns it, not the worker."""
    return [poolray.put(np.full(length, 7.0)), remote_successor.remote(length)]


@pytest.mark.parametrize("length", [10, 100_000])
def test_refs_made_in_a_worker_outlive_it(length: int) -> None:
    poolray.init(num_cpus=1)
    array_ref, number_ref = poolray.get(remote_make_ref.remote(length), timeout=DEADLINE_S)
    before = worker_pids()
    for pid in before:
        kill(pid)
    wait_until(lambda: not set(before) & set(worker_pids()))
    array = poolray.get(array_ref, timeout=DEADLINE_S)
    assert array.sum() == 7.0 * length
    assert poolray.get(number_ref, timeout=DEADLINE_S) == length + 1
    del array, array_ref, number_ref
    assert_nothing_is_left_over()


@poolray.remote
def remote_threads(count: int) -> list[int]:
    """Several threads of one task use the API at the same time."""
    results: list[int] = []

    def use(number: int) -> None:
        for step in range(20):
            results.append(poolray.get(remote_successor.remote(number * 100 + step)))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


def test_threads_of_a_task_use_the_api() -> None:
    poolray.init(num_cpus=2)
    got = poolray.get(remote_threads.remote(5), timeout=DEADLINE_S)
    assert got == sorted(n * 100 + step + 1 for n in range(5) for step in range(20))


# --- faces in workers ----------------------------------------------------------------------------


def use_pool(levels: int = 1) -> list[int]:
    """Pids of a pool in this process, and of pools in its workers."""
    with Pool(2) as pool:
        if levels > 1:
            return [os.getpid(), *pool.apply(use_pool, (levels - 1,))]
        assert pool.map(successor, range(100)) == list(range(1, 101))
        return [os.getpid(), *pool.map(own_pid, range(4), chunksize=1)]


def use_executor() -> list[int]:
    with Executor(2) as executor:
        assert list(executor.map(successor, range(50))) == list(range(1, 51))
        return [os.getpid(), executor.submit(own_pid).result()]


def use_tasks() -> list[int]:
    assert poolray.get([remote_successor.remote(i) for i in range(50)])[-1] == 50
    return [os.getpid(), poolray.get(poolray.put(1))]


def use_standard_pool() -> list[int]:
    """The standard library's own, in a worker of ours."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [os.getpid(), *pool.map(own_pid, range(4))]


USES = [use_pool, use_executor, use_tasks, use_standard_pool]


@pytest.mark.parametrize("use", USES)
def test_everything_works_in_a_pools_worker(use: Any) -> None:
    if use is use_standard_pool:
        pytest.skip("a pool's workers are daemons, as in the standard library: no children there")
    with Pool(2) as pool:
        for result in [pool.apply_async(use) for _ in range(3)]:
            assert result.get(DEADLINE_S)[0] != os.getpid()


@pytest.mark.parametrize("use", USES)
def test_everything_works_in_an_executors_worker(use: Any) -> None:
    with Executor(2) as executor:
        for future in [executor.submit(use) for _ in range(3)]:
            assert future.result(DEADLINE_S)[0] != os.getpid()


@pytest.mark.parametrize("use", USES)
def test_everything_works_in_a_task(use: Any) -> None:
    poolray.init(num_cpus=2)
    refs = [poolray.remote(use).remote() for _ in range(3)]
    for pids in poolray.get(refs, timeout=DEADLINE_S):
        assert pids[0] != os.getpid()
    del refs
    assert_nothing_is_left_over()


def test_pools_nest_three_deep() -> None:
    pids = use_pool(3)
    assert pids[0] == os.getpid()
    assert len(set(pids[:3])) == 3


def test_a_nested_pool_ends_with_its_worker() -> None:
    """A worker that is killed takes the processes of its own pool along."""
    with Executor(1) as executor:
        executor.submit(open_and_keep_pool).result(DEADLINE_S)
        worker = executor.submit(own_pid).result(DEADLINE_S)
        # The map may have ended before its second worker was forked.
        wait_until(lambda: len(children_of(worker)) == 3, "a fork server and two workers")
        family = children_of(worker)
        kill(worker)
        wait_until(lambda: not any(child.is_running() for child in family), "their end", 2)
        assert executor.submit(successor, 1).result(DEADLINE_S) == 2


_kept: list[Any] = []


def open_and_keep_pool() -> None:
    _kept.append(Pool(2))
    _kept[0].map(successor, range(10))


def test_a_worker_that_keeps_a_pool_open_still_ends(tmp_path: Any) -> None:
    """Polite ends run what a program's end runs: the kept pool is shut down there."""
    with Executor(1) as executor:
        executor.submit(open_and_keep_pool).result(DEADLINE_S)
        family = children_of(executor.submit(own_pid).result(DEADLINE_S))
    wait_until(lambda: not any(child.is_running() for child in family), "their end", 2)


@poolray.remote
def remote_die_below(directory: Any, levels: int) -> int:
    """The innermost task kills its worker twice before it answers."""
    if levels:
        return poolray.get(remote_die_below.remote(directory, levels - 1)) + 1
    leave_mark(directory, "tries")
    if len(marks(directory, "tries")) < 3:
        die("SIGKILL")
    return 0


def test_a_nested_task_is_retried_without_its_parents(tmp_path: Any) -> None:
    poolray.init(num_cpus=1)
    assert poolray.get(remote_die_below.remote(tmp_path, 3), timeout=DEADLINE_S) == 3
    assert len(marks(tmp_path, "tries")) == 3


@poolray.remote
def remote_parent_that_dies(directory: Any) -> int:
    """Children of an attempt that died are nobody's any more: nothing of them may stay."""
    leave_mark(directory, "parent")
    refs = [remote_successor.remote(number) for number in range(20)]
    if len(marks(directory, "parent")) < 3:
        die("SIGKILL")
    return sum(poolray.get(refs))


def test_what_a_dead_attempt_had_submitted_leaves_nothing(tmp_path: Any) -> None:
    poolray.init(num_cpus=2)
    assert poolray.get(remote_parent_that_dies.remote(tmp_path), timeout=DEADLINE_S) == 210
    assert_nothing_is_left_over()
