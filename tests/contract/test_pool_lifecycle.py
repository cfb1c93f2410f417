"""A pool from its constructor to its end: arguments, states, `with`, collection, and leaks."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from executor_support import DEADLINE_S, Gate, hold, identity, leave_mark, marks, wait_until
from pool_support import (
    MakePool,
    Pool,
    PoolClass,
    all_dead,
    fail_if_odd,
    processes_of,
    square,
)

CALLS: dict[str, Callable[[Pool], Any]] = {
    "apply": lambda pool: pool.apply(square, (3,)),
    "apply_async": lambda pool: pool.apply_async(square, (3,)),
    "map": lambda pool: pool.map(square, [3]),
    "map of nothing": lambda pool: pool.map(square, []),
    "map_async": lambda pool: pool.map_async(square, [3]),
    "starmap": lambda pool: pool.starmap(square, [(3,)]),
    "starmap_async": lambda pool: pool.starmap_async(square, [(3,)]),
    "imap": lambda pool: pool.imap(square, [3]),
    "imap in chunks": lambda pool: pool.imap(square, [3], 2),
    "imap_unordered": lambda pool: pool.imap_unordered(square, [3]),
    "imap_unordered in chunks": lambda pool: pool.imap_unordered(square, [3], 2),
    "with": lambda pool: pool.__enter__(),
}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with Gate(tmp_path / "gate") as gate:
        yield gate


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 5, 60])
def test_a_pool_has_as_many_processes_as_asked_for(make_pool: MakePool, processes: int) -> None:
    pool = make_pool(processes)
    assert pool._processes == processes
    assert len(pool._pool) == processes
    assert len(set(processes_of(pool))) == processes
    assert pool.map(square, range(10)) == [x * x for x in range(10)]


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_a_pool_has_one_process_per_cpu_by_default(
    pool_implementation: PoolClass, arguments: tuple[None, ...]
) -> None:
    cpu_count = getattr(os, "process_cpu_count", os.cpu_count)()
    with pool_implementation(*arguments) as pool:
        assert pool._processes == len(pool._pool) == cpu_count
        assert pool.apply(square, (3,)) == 9
    pool.join()


@pytest.mark.parametrize("processes", [0, -1, -100])
def test_too_few_processes_are_refused(pool_implementation: PoolClass, processes: int) -> None:
    with pytest.raises(ValueError, match="Number of processes must be at least 1"):
        pool_implementation(processes)


@pytest.mark.parametrize("processes", ["2", 1.5, [1]])
def test_processes_must_be_a_whole_number(
    pool_implementation: PoolClass, processes: object
) -> None:
    with pytest.raises(TypeError):
        pool_implementation(processes)


@pytest.mark.parametrize("count", [0, -1, 0.5, 1.0, "12"])
def test_maxtasksperchild_must_be_a_positive_whole_number(
    pool_implementation: PoolClass, count: object
) -> None:
    with pytest.raises(ValueError, match="maxtasksperchild must be a positive int or None"):
        pool_implementation(2, maxtasksperchild=count)


def test_an_initializer_must_be_callable(pool_implementation: PoolClass) -> None:
    for not_callable in (1, "name", ()):
        with pytest.raises(TypeError, match="initializer must be a callable"):
            pool_implementation(2, not_callable)
        with pytest.raises(TypeError, match="initializer must be a callable"):
            pool_implementation(initializer=not_callable)


# The standard class refuses them too, but then its finalizer fails on the half-made object.
@pytest.mark.poolray_only
def test_unknown_arguments_are_refused(pool_implementation: PoolClass) -> None:
    with pytest.raises(TypeError, match="workers"):
        pool_implementation(workers=2)


def test_arguments_can_be_given_by_position(pool_implementation: PoolClass, tmp_path: Path) -> None:
    with pool_implementation(1, leave_mark, (tmp_path, "started"), 3, None) as pool:
        assert pool.apply(square, (3,)) == 9
        assert marks(tmp_path) == {"started"}
    pool.join()


def test_a_refused_pool_leaves_nothing_behind(pool_implementation: PoolClass) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = threading.active_count()
        for arguments in ((0,), (2, 5), (2, None, (), 0)):
            with pytest.raises((TypeError, ValueError)):
                pool_implementation(*arguments)
        gc.collect()
    assert threading.active_count() <= before


# --- states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ending", ["close", "terminate"])
def test_a_pool_that_was_ended_takes_no_more_calls(pool: Pool, ending: str, call: str) -> None:
    getattr(pool, ending)()
    with pytest.raises(ValueError, match=r"^Pool not running$"):
        CALLS[call](pool)
    pool.join()
    with pytest.raises(ValueError, match=r"^Pool not running$"):
        CALLS[call](pool)


def test_a_running_pool_cannot_be_joined(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"^Pool is still running$"):
        pool.join()
    assert pool.apply(square, (3,)) == 9


def test_the_state_can_be_read(make_pool: MakePool) -> None:
    pool = make_pool()
    assert pool._state == "RUN"
    pool.close()
    assert pool._state == "CLOSE"
    pool.join()
    pool.terminate()
    assert pool._state == "TERMINATE"
    pool.join()
    assert pool._state == "TERMINATE"


def test_repr_names_class_state_and_size(pool: Pool) -> None:
    name = f"{type(pool).__module__}.{type(pool).__qualname__}"
    assert repr(pool) == f"<{name} state=RUN pool_size=2>"
    pool.close()
    assert repr(pool).startswith(f"<{name} state=CLOSE pool_size=")
    pool.terminate()
    assert repr(pool).startswith(f"<{name} state=TERMINATE pool_size=")


def test_ending_twice_is_allowed_in_every_order(make_pool: MakePool) -> None:
    for calls in (
        ("close", "close", "join", "join", "close"),
        ("terminate", "terminate", "join", "join", "terminate"),
        ("close", "terminate", "join", "close", "terminate", "join"),
        ("terminate", "close", "join"),
        ("close", "join", "terminate", "join"),
    ):
        pool = make_pool(1)
        for call in calls:
            assert getattr(pool, call)() is None


def test_a_terminated_pool_stays_terminated(pool: Pool) -> None:
    pool.terminate()
    pool.close()
    assert pool._state == "TERMINATE"


def test_closing_lets_everything_submitted_finish(pool: Pool) -> None:
    results = [pool.apply_async(square, (x,)) for x in range(50)]
    several = pool.map_async(square, range(50), 1)
    pool.close()
    pool.join()
    assert [result.get(0) for result in results] == [x * x for x in range(50)]
    assert several.get(0) == [x * x for x in range(50)]


def test_join_waits_for_what_runs(pool: Pool, gate: Gate) -> None:
    result = pool.apply_async(hold, (gate, "value"))
    pool.close()
    joining = threading.Thread(target=pool.join)
    joining.start()
    joining.join(0.05)
    assert joining.is_alive()
    gate.open()
    joining.join(DEADLINE_S)
    assert not joining.is_alive()
    assert result.get(0) == "value"


@pytest.mark.parametrize("ending", ["close", "terminate"])
def test_the_processes_have_ended_after_join(pool: Pool, ending: str) -> None:
    pids = processes_of(pool)
    pool.map(square, range(10))
    assert not all_dead(pids)
    getattr(pool, ending)()
    pool.join()
    wait_until(lambda: all_dead(pids))


def test_terminate_ends_what_runs_and_drops_what_waits(
    make_pool: MakePool, gate: Gate, tmp_path: Path
) -> None:
    pool = make_pool(2)
    started = [Gate(tmp_path / "a"), Gate(tmp_path / "b")]
    (done := tmp_path / "done").mkdir()
    running = [pool.apply_async(announce_hold_and_mark, (own, gate, done)) for own in started]
    for own in started:
        own.wait()
    waiting = pool.starmap_async(leave_mark, [(done, x) for x in range(1_000)], 1)
    pids = processes_of(pool)
    pool.terminate()
    pool.join()
    wait_until(lambda: all_dead(pids))
    gate.open(2)
    assert marks(done) == set()
    for result in (*running, waiting):
        with pytest.raises(Exception):  # noqa: B017 - of the standard class only a timeout
            result.get(0.01)


def announce_hold_and_mark(started: Gate, release: Gate, directory: Path) -> None:
    started.open()
    release.wait()
    leave_mark(directory, os.getpid())


def test_terminate_does_not_wait_for_an_idle_pool(pool_implementation: PoolClass) -> None:
    for _ in range(10):
        pool = pool_implementation(2)
        pool.terminate()
        pool.join()


# --- with --------------------------------------------------------------------------------------


def test_with_gives_the_pool_and_terminates_it(pool_implementation: PoolClass, gate: Gate) -> None:
    pool = pool_implementation(2)
    pids = processes_of(pool)
    with pool as same:
        assert same is pool
        pool.apply_async(hold, (gate,))
    assert pool._state == "TERMINATE"
    pool.join()
    wait_until(lambda: all_dead(pids))


def test_with_lets_exceptions_through(pool_implementation: PoolClass) -> None:
    with pytest.raises(KeyError):
        with pool_implementation(1) as pool:
            raise KeyError
    assert pool._state == "TERMINATE"


def test_closing_inside_with_is_allowed(pool_implementation: PoolClass) -> None:
    with pool_implementation(1) as pool:
        result = pool.map_async(square, range(10))
        pool.close()
        pool.join()
    assert result.get(0) == [x * x for x in range(10)]


# --- pickling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_pool_cannot_be_pickled(pool: Pool, take: Callable[[object], object]) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes or pickled"):
        take(pool)
    assert pool._state == "RUN"


def test_a_pool_cannot_be_an_argument(pool: Pool) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes or pickled"):
        pool.apply(identity, (pool,))
    assert pool.apply(square, (3,)) == 9


# --- subclasses --------------------------------------------------------------------------------


def test_a_pool_can_be_subclassed(pool_implementation: Any) -> None:
    class CountingPool(pool_implementation):  # type: ignore[misc]
        """A pool that counts its maps."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.maps = 0

        def map(self, *args: Any, **kwargs: Any) -> Any:
            self.maps += 1
            return super().map(*args, **kwargs)

    with CountingPool(1) as pool:
        assert isinstance(pool, pool_implementation)
        assert pool.map(square, [3]) == [9]
        assert pool.maps == 1
        assert "CountingPool state=RUN pool_size=1" in repr(pool)
    pool.join()


# --- collection --------------------------------------------------------------------------------


def drop(pools: list[Pool]) -> None:
    pools.clear()
    gc.collect()


def test_dropping_a_running_pool_warns_and_ends_its_processes(
    pool_implementation: PoolClass,
) -> None:
    pools = [pool_implementation(2)]
    assert pools[0].map(square, range(10)) == [x * x for x in range(10)]
    pids = processes_of(pools[0])
    text = r"^unclosed running multiprocessing pool <.* state=RUN pool_size=2>$"
    # The recorded warnings must not be kept: the pool is their source, so they keep it alive.
    with pytest.warns(ResourceWarning, match=text):
        drop(pools)
    wait_until(lambda: all_dead(pids))


@pytest.mark.parametrize("ending", ["close", "terminate"])
def test_dropping_a_pool_that_was_ended_is_silent(
    pool_implementation: PoolClass, ending: str
) -> None:
    pool = pool_implementation(1)
    pids = processes_of(pool)
    getattr(pool, ending)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = None
        gc.collect()
    wait_until(lambda: all_dead(pids))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_result_keeps_its_pool_until_it_is_ready(pool_implementation: PoolClass) -> None:
    assert pool_implementation(1).apply_async(square, (3,)).get(DEADLINE_S) == 9
    assert pool_implementation(1).map_async(square, range(5)).get(DEADLINE_S) == [0, 1, 4, 9, 16]
    assert pool_implementation(1).map(square, range(5)) == [0, 1, 4, 9, 16]
    assert list(pool_implementation(1).imap(square, range(5))) == [0, 1, 4, 9, 16]
    assert sorted(pool_implementation(1).imap_unordered(square, range(5), 2)) == [0, 1, 4, 9, 16]
    gc.collect()


# --- many pools, many threads ------------------------------------------------------------------


def usage() -> tuple[int, int, int]:
    """Open files, child processes and threads of this process."""
    gc.collect()
    me = psutil.Process()
    return me.num_fds(), len(me.children(recursive=True)), threading.active_count()


def test_pools_in_sequence_leak_nothing(pool_implementation: PoolClass) -> None:
    def use_a_pool() -> None:
        with pool_implementation(2) as pool:
            assert pool.map(square, range(10)) == [x * x for x in range(10)]
            assert list(pool.imap(square, range(3))) == [0, 1, 4]
            assert pool.apply(bytes, (200_000,)) == bytes(200_000)
            with pytest.raises(ValueError, match="3 is odd"):
                pool.apply(fail_if_odd, (3,))
        pool.join()

    for _ in range(3):  # what is made once and kept is no leak
        use_a_pool()
    before = usage()
    for _ in range(10):
        use_a_pool()
    wait_until(lambda: all(now <= then for now, then in zip(usage(), before)))


def test_several_pools_work_at_once(make_pool: MakePool) -> None:
    pools = [make_pool(processes) for processes in (1, 2, 1)]
    results = [pool.map_async(square, range(100), 3) for pool in pools for _ in range(3)]
    assert all(result.get(DEADLINE_S) == [x * x for x in range(100)] for result in results)
    pids = [processes_of(pool) for pool in pools]
    assert len({pid for some in pids for pid in some}) == 4
    pools[0].terminate()
    pools[0].join()
    assert pools[1].apply(square, (3,)) == pools[2].apply(square, (3,)) == 9


def test_many_threads_may_share_a_pool(pool: Pool) -> None:
    everybody = threading.Barrier(6)

    def work(number: int) -> bool:
        everybody.wait(DEADLINE_S)
        items = range(number, number + 100)
        expected = [x * x for x in items]
        return (
            pool.map(square, items) == expected
            and list(pool.imap(square, items)) == expected
            and sorted(pool.imap_unordered(square, items)) == expected
            and [pool.apply(square, (x,)) for x in items] == expected
            and [r.get(DEADLINE_S) for r in [pool.apply_async(square, (x,)) for x in items]]
            == expected
        )

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))


def test_a_pool_may_be_made_used_and_ended_in_different_threads(
    pool_implementation: PoolClass,
) -> None:
    with ThreadPoolExecutor(1) as thread:
        pool = thread.submit(pool_implementation, 2).result(DEADLINE_S)
        assert pool.map(square, range(10)) == [x * x for x in range(10)]
        assert thread.submit(pool.map, square, range(10)).result(DEADLINE_S) == [
            x * x for x in range(10)
        ]
        pool.close()
        thread.submit(pool.join).result(DEADLINE_S)


def test_a_pool_outlives_the_thread_that_made_it(pool_implementation: PoolClass) -> None:
    made: list[Pool] = []
    thread = threading.Thread(target=lambda: made.append(pool_implementation(2)))
    thread.start()
    thread.join()
    with made[0] as pool:
        for _ in range(20):
            assert pool.map(square, range(10)) == [x * x for x in range(10)]
    pool.join()
