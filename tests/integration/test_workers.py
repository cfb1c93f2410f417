"""Workers live and die: retries, replacement, initializers, a lost fork server."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

import poolray
from poolray import Executor, Pool
from poolray.exceptions import PoolrayError, TaskError, WorkerCrashedError
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    announce_and_hold,
    assert_nothing_is_left_over,
    die,
    fork_server_pids,
    is_alive,
    kill,
    leave_mark,
    marks,
    own_pid,
    remote_die,
    remote_hold,
    remote_pid,
    remote_successor,
    statistics,
    successor,
    wait_until,
    worker_pids,
)

DEATHS = ["SIGKILL", "SIGSEGV", "exit"]
START_METHODS = ["fork", "spawn"]


def die_marked(how: str, directory: Path) -> None:
    leave_mark(directory, how)
    die(how)


def die_until(attempt: int, directory: Path, how: str) -> int:
    """Answer at that attempt and not before."""
    leave_mark(directory, "tries")
    if len(marks(directory, "tries")) < attempt:
        die(how)
    return attempt


# --- death in a task -----------------------------------------------------------------------------


def assert_describes_death(
    error: WorkerCrashedError, how: str, name: str, attempts: list[int]
) -> None:
    """The error names the task, the process and how it died, in fields and in words."""
    assert len(attempts) == error.attempts == 4
    assert len(set(attempts)) == 4, "a dead worker has run again"
    assert error.pid == attempts[-1]
    if how == "exit":
        assert (error.exit_code, error.signal) == (7, None)
        assert "exited with code 7" in str(error)
    else:
        assert (error.exit_code, error.signal) == (None, getattr(signal, how))
        assert how in str(error)
    assert name in str(error)
    assert name in error.task_name
    assert str(error.pid) in str(error)
    assert "4 time" in str(error)
    assert "max_retries" in str(error)


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_pool_tries_a_call_four_times_and_says_how_its_workers_died(
    how: str, start_method: str, tmp_path: Path
) -> None:
    with Pool(2, context=multiprocessing.get_context(start_method)) as pool:
        with pytest.raises(WorkerCrashedError) as caught:
            pool.apply(die_marked, (how, tmp_path))
        assert_describes_death(caught.value, how, "die_marked", marks(tmp_path, how))
        assert pool.map(successor, range(20), chunksize=1) == list(range(1, 21))


@pytest.mark.parametrize("how", DEATHS)
def test_executor_tries_a_call_four_times_and_goes_on_with_the_others(
    how: str, tmp_path: Path
) -> None:
    with Executor(2) as executor:
        dead = executor.submit(die_marked, how, tmp_path)
        alive = [executor.submit(successor, number) for number in range(50)]
        with pytest.raises(WorkerCrashedError) as caught:
            dead.result(DEADLINE_S)
        assert isinstance(caught.value, BrokenProcessPool), "code for the standard class catches it"
        assert_describes_death(caught.value, how, "die_marked", marks(tmp_path, how))
        assert [future.result(DEADLINE_S) for future in alive] == list(range(1, 51))
        assert executor.submit(successor, 1).result(DEADLINE_S) == 2


@pytest.mark.parametrize("how", DEATHS)
def test_tasks_are_tried_four_times_and_say_how_their_workers_died(
    how: str, tmp_path: Path
) -> None:
    poolray.init(num_cpus=2)
    dead = remote_die.remote(how, tmp_path)
    dependent = remote_successor.remote(dead)
    alive = [remote_successor.remote(number) for number in range(50)]
    with pytest.raises(WorkerCrashedError) as caught:
        poolray.get(dead, timeout=DEADLINE_S)
    assert_describes_death(caught.value, how, "remote_die", marks(tmp_path, how))
    with pytest.raises(WorkerCrashedError):
        poolray.get(dependent, timeout=DEADLINE_S)
    assert poolray.get(alive, timeout=DEADLINE_S) == list(range(1, 51))
    # The error's traceback holds this test's frames, and with them the refs.
    del caught, dead, dependent, alive
    assert_nothing_is_left_over()


@pytest.mark.parametrize("max_retries", [0, 1, 2])
def test_max_retries_is_the_number_of_further_attempts(max_retries: int, tmp_path: Path) -> None:
    with Pool(1, max_retries=max_retries) as pool, pytest.raises(WorkerCrashedError) as caught:
        pool.apply(die_marked, ("SIGKILL", tmp_path))
    assert caught.value.attempts == max_retries + 1 == len(marks(tmp_path, "SIGKILL"))
    (directory := tmp_path / "task").mkdir()
    with pytest.raises(WorkerCrashedError) as caught:
        poolray.get(
            remote_die.options(max_retries=max_retries).remote("SIGKILL", directory),
            timeout=DEADLINE_S,
        )
    assert caught.value.attempts == max_retries + 1 == len(marks(directory, "SIGKILL"))


@pytest.mark.parametrize("how", DEATHS)
def test_a_call_may_succeed_at_its_last_attempt(how: str, tmp_path: Path) -> None:
    with Pool(2) as pool:
        assert pool.apply(die_until, (4, tmp_path, how)) == 4
    assert len(marks(tmp_path, "tries")) == 4


def test_calls_that_waited_behind_a_dying_one_run_exactly_once(tmp_path: Path) -> None:
    """Short calls travel in packets: those of a dead worker that had not begun are not attempts."""
    with Pool(1, max_retries=0) as pool:
        pool.map(successor, range(200))  # so short that hundreds go at once
        results = [pool.apply_async(successor, (number,)) for number in range(100)]
        dead = pool.apply_async(die_marked, ("SIGKILL", tmp_path))
        later = [pool.apply_async(mark_and_return, (tmp_path, number)) for number in range(100)]
        assert [result.get(DEADLINE_S) for result in results] == list(range(1, 101))
        with pytest.raises(WorkerCrashedError):
            dead.get(DEADLINE_S)
        assert [result.get(DEADLINE_S) for result in later] == list(range(100))
    runs = [len(marks(tmp_path, number)) for number in range(100)]
    assert runs == [1] * 100


def mark_and_return(directory: Path, number: int) -> int:
    leave_mark(directory, number)
    return number


# --- death between tasks -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_an_idle_worker_that_dies_is_replaced_and_costs_nothing(number: signal.Signals) -> None:
    with Pool(2) as pool:
        for _ in range(5):
            before = set(pool.map(own_pid, range(40), chunksize=1)) | set(worker_pids())
            victim = sorted(before)[0]
            os.kill(victim, number)
            assert pool.map(successor, range(40), chunksize=1) == list(range(1, 41))
            wait_until_replaced(victim, 2)
        assert statistics().tasks == 0


def wait_until_replaced(victim: int, count: int) -> None:
    wait_until(lambda: victim not in worker_pids() and len(worker_pids()) == count)


def test_all_workers_killed_at_once_are_replaced() -> None:
    with Pool(3) as pool:
        for _ in range(3):
            pool.map(own_pid, range(9), chunksize=1)
            for pid in worker_pids():
                kill(pid)
            assert pool.map(successor, range(100), chunksize=1) == list(range(1, 101))


def test_a_stopped_worker_that_is_killed_gives_its_calls_back(started: Gate, release: Gate) -> None:
    """SIGSTOP makes a worker that reads nothing; its death must not take the calls along."""
    with Pool(2) as pool:
        pids = [process.pid for process in pool._pool]
        os.kill(pids[0], signal.SIGSTOP)
        results = [pool.apply_async(successor, (number,)) for number in range(500)]
        os.kill(pids[0], signal.SIGKILL)
        assert [result.get(DEADLINE_S) for result in results] == list(range(1, 501))


# --- replacement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", START_METHODS)
def test_pool_replaces_workers_after_maxtasksperchild(start_method: str) -> None:
    context = multiprocessing.get_context(start_method)
    count = 6 if start_method == "spawn" else 30
    with Pool(2, maxtasksperchild=3, context=context) as pool:
        pids = pool.map(own_pid, range(count), chunksize=1)
        calls = Counter(pids)
        assert max(calls.values()) <= 3
        assert len(calls) >= count / 3
        wait_until(lambda: sum(is_alive(pid) for pid in calls) <= 2)
        assert pool.apply(successor, (1,)) == 2


def test_a_chunk_of_a_map_is_one_task_of_its_child() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        pids = pool.map(own_pid, range(60), chunksize=10)
    assert sorted(Counter(pids).values()) == [20, 20, 20]


def test_executor_replaces_workers_after_max_tasks_per_child() -> None:
    with Executor(2, max_tasks_per_child=1) as executor:
        pids = list(executor.map(own_pid, range(20)))
    assert len(set(pids)) == 20


@poolray.remote(max_calls=2)
def pid_of_two_calls() -> int:
    return os.getpid()


def test_a_task_replaces_its_worker_after_max_calls() -> None:
    poolray.init(num_cpus=1)
    pids = poolray.get([pid_of_two_calls.remote() for _ in range(10)], timeout=DEADLINE_S)
    assert max(Counter(pids).values()) <= 2
    wait_until(lambda: sum(is_alive(pid) for pid in set(pids)) <= 1)
    # Other functions do not count.
    others = poolray.get([remote_pid.remote() for _ in range(10)], timeout=DEADLINE_S)
    assert len(set(others)) == 1


# --- initializers --------------------------------------------------------------------------------


def fail_to_start(directory: Path, failures: int) -> None:
    leave_mark(directory, "starts")
    if len(marks(directory, "starts")) <= failures:
        raise LookupError("nothing to start with")


def die_at_start(directory: Path, how: str) -> None:
    leave_mark(directory, "starts")
    die(how)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_pool_says_why_its_workers_do_not_start(
    start_method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context(start_method)
    with Pool(2, fail_to_start, (tmp_path, 1000), context=context) as pool:
        for attempt in (
            lambda: pool.apply(successor, (1,)),
            lambda: pool.map(successor, range(10)),
            lambda: next(pool.imap(successor, range(10))),
            lambda: pool.apply_async(successor, (1,)).get(DEADLINE_S),
        ):
            with pytest.raises(PoolrayError, match="nothing to start with") as caught:
                attempt()
            assert isinstance(caught.value, TaskError)
            assert isinstance(caught.value, LookupError), "as a task's error is"
            assert type(caught.value.__cause__) is LookupError
    assert "LookupError: nothing to start with" in capfd.readouterr().err
    assert len(marks(tmp_path, "starts")) < 20, "it went on and on"


class Refusal(Exception):
    """Its pickle does not load: the constructor wants what `args` does not have."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}, {why}")


def refuse(what: str, why: str) -> None:
    raise Refusal(what, why)


def test_an_initializer_s_error_that_pickle_cannot_load_arrives_all_the_same() -> None:
    with Pool(1, refuse, ("no database", "no network")) as pool:
        with pytest.raises(Refusal, match="no database, no network") as caught:
            pool.apply(successor, (1,))
        assert isinstance(caught.value, TaskError)


def test_executor_is_broken_when_its_workers_do_not_start(tmp_path: Path) -> None:
    with Executor(2, initializer=fail_to_start, initargs=(tmp_path, 1000)) as executor:
        futures = [executor.submit(successor, number) for number in range(5)]
        for future in futures:
            with pytest.raises(BrokenExecutor):
                future.result(DEADLINE_S)
        with pytest.raises(BrokenExecutor):
            executor.submit(successor, 1).result(DEADLINE_S)


def test_an_initializer_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    with Pool(1, fail_to_start, (tmp_path, 1)) as pool:
        assert pool.map(successor, range(10)) == list(range(1, 11))


@pytest.mark.parametrize("how", DEATHS)
def test_an_initializer_that_kills_its_worker_is_an_error_not_a_hang(
    how: str, tmp_path: Path
) -> None:
    with Pool(2, die_at_start, (tmp_path, how)) as pool:
        with pytest.raises(PoolrayError) as caught:
            pool.apply_async(successor, (1,)).get(DEADLINE_S)
        assert ("code 7" if how == "exit" else how) in str(caught.value)
    assert len(marks(tmp_path, "starts")) < 20


def test_a_replaced_worker_is_initialized_as_well(tmp_path: Path) -> None:
    with Pool(1, leave_mark, (tmp_path, "starts")) as pool:
        for _ in range(4):
            os.kill(pool.apply(own_pid), signal.SIGKILL)
        assert pool.apply(successor, (1,)) == 2
        current = pool.apply(own_pid)
    assert marks(tmp_path, "starts")[-1] == current
    assert len(marks(tmp_path, "starts")) == 5


# --- a lost fork server --------------------------------------------------------------------------


def test_a_pool_whose_fork_server_is_killed_fails_and_the_next_one_works(
    started: Gate, release: Gate
) -> None:
    pool = Pool(2)
    held = [pool.apply_async(announce_and_hold, (started, release)) for _ in range(2)]
    queued = pool.map_async(successor, range(100), chunksize=1)
    iterator = pool.imap(successor, range(100))
    started.wait()
    started.wait()
    workers = worker_pids()
    (server,) = fork_server_pids()
    os.kill(server, signal.SIGKILL)
    for result in (*held, queued):
        with pytest.raises(PoolrayError, match="fork server"):
            result.get(DEADLINE_S)
    with pytest.raises(PoolrayError, match="fork server"):
        next(iterator)
    wait_until(lambda: not any(map(is_alive, workers)), "the workers' end", 2)
    with pytest.raises((PoolrayError, ValueError)):
        pool.apply(successor, (1,))
    with Pool(2) as another:
        assert another.map(successor, range(100)) == list(range(1, 101))
    pool.terminate()
    pool.join()


def test_an_executor_whose_fork_server_is_killed_is_broken_and_the_next_one_works(
    started: Gate, release: Gate
) -> None:
    with Executor(1) as executor:
        held = executor.submit(announce_and_hold, started, release)
        queued = [executor.submit(successor, number) for number in range(100)]
        started.wait()
        (server,) = fork_server_pids()
        os.kill(server, signal.SIGKILL)
        for future in (held, *queued):
            with pytest.raises(BrokenExecutor):
                future.result(DEADLINE_S)
        with pytest.raises(BrokenExecutor):
            executor.submit(successor, 1).result(DEADLINE_S)
    with Executor(2) as another:
        assert list(another.map(successor, range(100))) == list(range(1, 101))


def test_tasks_whose_fork_server_is_killed_fail_and_a_new_runtime_works(
    started: Gate, release: Gate
) -> None:
    poolray.init(num_cpus=1)
    held = remote_hold.remote(started, release)
    queued = [remote_successor.remote(number) for number in range(100)]
    started.wait()
    (server,) = fork_server_pids()
    os.kill(server, signal.SIGKILL)
    for ref in (held, *queued):
        with pytest.raises(PoolrayError, match="fork server"):
            poolray.get(ref, timeout=DEADLINE_S)
    with pytest.raises(PoolrayError, match="fork server"):
        poolray.get(remote_successor.remote(1), timeout=DEADLINE_S)
    with Pool(1) as pool:
        assert pool.apply(successor, (1,)) == 2
    poolray.shutdown()
    poolray.init(num_cpus=1)
    assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2


def test_a_fork_server_that_is_killed_is_reaped_although_nobody_calls() -> None:
    """Programs that end wait for their children; a notebook's kernel does so for half a minute."""
    with Pool(1) as pool:
        assert pool.apply(successor, (1,)) == 2
        server = psutil.Process(fork_server_pids()[0])
        server.terminate()
        wait_until(lambda: not server.is_running(), "the end of the fork server")


def test_an_idle_fork_server_that_is_killed_does_not_spin_or_hang() -> None:
    with Pool(1) as pool, Executor(1) as executor:
        assert pool.apply(successor, (1,)) == 2
        assert executor.submit(successor, 1).result(DEADLINE_S) == 2
        worker = pool.apply(own_pid)
        os.kill(fork_server_pids()[0], signal.SIGKILL)
        wait_until(lambda: not is_alive(worker), "the worker's end", 2)
        with pytest.raises((PoolrayError, ValueError)):
            pool.apply_async(successor, (1,)).get(DEADLINE_S)
        used = _cpu_time_s()
        assert executor.submit(wait_for_parent, 0.5).result(DEADLINE_S) is None
        assert _cpu_time_s() - used < 0.3, "the dead server's channel keeps a thread busy"


def wait_for_parent(duration_s: float) -> None:
    """A call that takes a while: the driver has nothing to do meanwhile."""
    import select

    select.select([], [], [], duration_s)


def _cpu_time_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


# --- limits of the machine -----------------------------------------------------------------------


def test_workers_that_cannot_be_forked_are_an_error_not_a_hang(script: Any) -> None:
    """Out of descriptors: the pool says so, and what runs goes on."""
    result = script(
        """
        import resource

        with Pool(1) as pool:
            print(pool.apply(successor, (1,)))
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, used + 3))
            try:
                many = Pool(8)
                many.apply_async(successor, (1,)).get(20)
            except (OSError, poolray.exceptions.PoolrayError) as error:
                print("refused", flush=True)
            print(pool.apply(successor, (2,)), flush=True)
            os._exit(0)
        """
    )
    assert result.lines()[0] == "2", result
    assert result.lines()[-1] == "3", result
