"""Where and when tasks run: in parallel, within the CPUs, after what they depend on, and nested."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_implementation import CPUS, gate_at, get, ray, start_runtime
from executor_support import Gate

# How long something is given to happen that must not happen.
NEVER_S = 0.3


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Gate]:
    """Through this, tasks tell the test that they run."""
    with gate_at(tmp_path / "started") as gate:
        yield gate


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Gate]:
    """This holds tasks back until the test opens it, or ends."""
    with gate_at(tmp_path / "release") as gate:
        yield gate


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def call(function: Any, *args: Any) -> Any:
    return function(*args)


@ray.remote
def announce_and_hold(started: Gate, release: Gate, value: Any = None) -> Any:
    started.open()
    release.wait()
    return value


def assert_nobody_starts(started: Gate) -> None:
    with pytest.raises(TimeoutError):
        started.wait(NEVER_S)


# --- in parallel -------------------------------------------------------------------------------


def test_as_many_tasks_run_at_once_as_there_are_cpus(started: Gate, release: Gate) -> None:
    refs = [announce_and_hold.remote(started, release, i) for i in range(CPUS + 1)]
    for _ in range(CPUS):
        started.wait()
    assert_nobody_starts(started)
    release.open()
    started.wait()
    release.open(CPUS)
    assert get(refs) == list(range(CPUS + 1))


def test_parallel_tasks_run_in_processes_of_their_own(started: Gate, release: Gate) -> None:
    @ray.remote
    def tell_pid(started: Gate, release: Gate) -> int:
        started.open()
        release.wait()
        return os.getpid()

    refs = [tell_pid.remote(started, release) for _ in range(CPUS)]
    for _ in range(CPUS):
        started.wait()
    release.open(CPUS)
    assert len({os.getpid(), *get(refs)}) == CPUS + 1


def test_a_task_of_all_cpus_runs_alone(started: Gate, release: Gate) -> None:
    everything = announce_and_hold.options(num_cpus=CPUS)
    refs = [everything.remote(started, release) for _ in range(2)]
    started.wait()
    assert_nobody_starts(started)
    release.open()
    started.wait()
    release.open()
    get(refs)


def test_tasks_that_need_no_cpu_run_beside_a_full_machine(started: Gate, release: Gate) -> None:
    everything = announce_and_hold.options(num_cpus=CPUS).remote(started, release)
    started.wait()
    assert get(echo.options(num_cpus=0).remote("beside")) == "beside"
    release.open()
    get(everything)


def test_halves_of_a_cpu_run_twice_as_many_tasks(started: Gate, release: Gate) -> None:
    half = announce_and_hold.options(num_cpus=0.5)
    refs = [half.remote(started, release) for _ in range(2 * CPUS)]
    for _ in range(2 * CPUS):
        started.wait()
    release.open(2 * CPUS)
    get(refs)


def test_a_long_task_does_not_hold_up_short_ones(started: Gate, release: Gate) -> None:
    # Also those that were sent to its worker before it was known to be long.
    short = [echo.remote(i) for i in range(50)]
    long = announce_and_hold.remote(started, release)
    short += [echo.remote(i) for i in range(50, 200)]
    assert get(short) == list(range(200))
    assert ray.wait([long], timeout=0) == ([], [long])
    release.open()
    get(long)


# --- many --------------------------------------------------------------------------------------


def test_ten_thousand_tasks() -> None:
    refs = [echo.remote(i) for i in range(10_000)]
    assert get(refs) == list(range(10_000))


def test_a_thousand_tasks_from_several_threads() -> None:
    def work(thread: int) -> int:
        return sum(get([echo.remote(thread) for _ in range(250)]))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [0, 250, 500, 750]


def test_a_task_may_submit_a_thousand() -> None:
    def submit() -> int:
        return sum(ray.get([echo.remote(i) for i in range(1_000)]))

    assert get(call.remote(submit)) == sum(range(1_000))


# --- dependencies ------------------------------------------------------------------------------


@ray.remote
def add(*numbers: int) -> int:
    return sum(numbers)


def test_a_chain_of_two_hundred() -> None:
    ref = add.remote(0)
    for _ in range(200):
        ref = add.remote(ref, 1)
    assert get(ref) == 200


def test_a_diamond() -> None:
    top = add.remote(1)
    left, right = add.remote(top, 10), add.remote(top, 100)
    assert get(add.remote(left, right, top)) == 113


def test_many_results_in_one_task_and_one_in_many() -> None:
    wide = [add.remote(i) for i in range(300)]
    total = add.remote(*wide)
    after = [add.remote(total, i) for i in range(300)]
    assert get(after) == [sum(range(300)) + i for i in range(300)]


def test_a_task_waits_for_its_arguments_without_a_cpu(started: Gate, release: Gate) -> None:
    late = announce_and_hold.remote(started, release, 1)
    dependents = [add.remote(late, i) for i in range(3 * CPUS)]
    # One CPU is left, and nobody who waits sits on it.
    assert get(add.remote(5)) == 5
    assert ray.wait(dependents, timeout=0) == ([], dependents)
    release.open()
    assert get(dependents) == [1 + i for i in range(3 * CPUS)]


def test_tasks_can_depend_on_what_was_put_and_on_what_a_task_put() -> None:
    (ref,) = get(call.remote(lambda: [ray.put(40)]))
    assert get(add.remote(ref, ray.put(2))) == 42


# --- nested ------------------------------------------------------------------------------------

everything = call.options(num_cpus=CPUS)


def test_nested_tasks_that_each_need_the_whole_machine_do_not_deadlock() -> None:
    def descend(depth: int) -> int:
        return 0 if depth == 0 else 1 + ray.get(everything.remote(descend, depth - 1))

    assert get(everything.remote(descend, 3)) == 3


def test_wait_inside_a_task_gives_the_cpus_back_too() -> None:
    def descend(depth: int) -> int:
        if depth == 0:
            return 0
        ref = everything.remote(descend, depth - 1)
        ray.wait([ref])
        return 1 + ray.get(ref, timeout=0)

    assert get(everything.remote(descend, 2)) == 2


def test_tasks_on_every_worker_may_wait_for_tasks_at_once() -> None:
    def tree(depth: int) -> int:
        if depth == 0:
            return 1
        return sum(ray.get([call.remote(tree, depth - 1) for _ in range(2)]))

    assert get([call.remote(tree, 3) for _ in range(CPUS)]) == [8] * CPUS


def test_timeouts_hold_inside_a_task(release: Gate) -> None:
    def impatient(release: Gate) -> str:
        pending = call.remote(lambda: release.wait() or "late")
        if ray.wait([pending], timeout=0.05)[0]:
            return "it did not wait"
        try:
            ray.get(pending, timeout=0.05)
        except ray.exceptions.GetTimeoutError:
            release.open()
            return ray.get(pending)
        return "no timeout"

    assert get(call.remote(impatient, release)) == "late"


def test_threads_of_a_task_may_use_the_runtime() -> None:
    def threaded() -> list[int]:
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            return list(threads.map(lambda i: ray.get(echo.remote(i)), range(9)))

    assert get(call.remote(threaded)) == list(range(9))


def test_a_task_cannot_start_a_second_runtime() -> None:
    def start() -> None:
        ray.init()

    with pytest.raises(RuntimeError, match="ignore_reinit_error"):
        get(call.remote(start))
    # The way for code that may run on either side.
    assert get(call.remote(lambda: ray.init(ignore_reinit_error=True) is not None))
    assert get(call.remote(ray.is_initialized)) is True


# --- workers -----------------------------------------------------------------------------------


def test_tasks_run_in_the_main_thread() -> None:
    assert get(call.remote(lambda: threading.current_thread() is threading.main_thread()))


def test_workers_are_in_the_drivers_directory() -> None:
    assert get(call.remote(os.getcwd)) == os.getcwd()


@pytest.mark.parametrize("max_calls", [1, 3])
def test_max_calls_replaces_the_worker(max_calls: int) -> None:
    @ray.remote(max_calls=max_calls)
    def pid() -> int:
        return os.getpid()

    calls = collections.Counter(get(pid.remote()) for _ in range(4 * max_calls))
    assert max(calls.values()) <= max_calls
    assert len(calls) >= 4


def test_workers_are_kept_without_max_calls() -> None:
    assert len(set(get([call.remote(os.getpid) for _ in range(200)]))) <= CPUS + 1


# --- where am I --------------------------------------------------------------------------------


def in_task(method: str, **options: Any) -> Any:
    def ask() -> Any:
        return getattr(ray.get_runtime_context(), method)()

    return get(call.options(**options).remote(ask))


def test_the_driver_runs_no_task() -> None:
    context = ray.get_runtime_context()
    assert context.get_task_id() is None
    assert context.get_task_name() is None
    assert context.get_task_function_name() is None
    assert context.get_actor_id() is None


def test_a_task_knows_its_id_and_name() -> None:
    ref = call.remote(lambda: ray.get_runtime_context().get_task_id())
    assert get(ref) == ref.task_id().hex()
    assert in_task("get_task_name") == "call"
    assert in_task("get_task_name", name="a name") == "a name"
    assert in_task("get_task_function_name", name="a name").endswith("call")
    assert in_task("get_actor_id") is None


@pytest.mark.parametrize("method", ["get_node_id", "get_job_id"])
def test_driver_and_task_share_node_and_job(method: str) -> None:
    id_in_hex = getattr(ray.get_runtime_context(), method)()
    assert int(id_in_hex, 16) > 0
    assert in_task(method) == id_in_hex


def test_every_worker_has_an_id() -> None:
    def who() -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_worker_id()

    ids = dict(get([call.remote(who) for _ in range(50)]))
    assert len(set(ids.values())) == len(ids)
    assert ray.get_runtime_context().get_worker_id() not in ids.values()


def test_a_task_knows_its_resources() -> None:
    assert in_task("get_assigned_resources") == {"CPU": 1.0}
    assert in_task("get_assigned_resources", num_cpus=0.5) == {"CPU": 0.5}
    assert in_task("get_assigned_resources", num_cpus=0) == {}
