"""Work that is ended for memory, in real processes, by the machine's own readings or a test's."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import poolray
from poolray import Executor, Pool
from poolray.exceptions import ActorDiedError, OutOfMemoryError, PoolrayError
from poolray.local.memory_monitor import MemoryMonitor, is_supported
from poolray.util.state import list_tasks, list_workers
from tests.integration.support import (
    DEADLINE_S,
    REPOSITORY,
    Gate,
    ScriptResult,
    announce_and_hold,
    is_alive,
    leave_mark,
    marks,
    successor,
    wait_until,
)

pytestmark = pytest.mark.skipif(
    not is_supported() or sys.platform != "linux", reason="figures as Linux has them"
)

MIB = 1 << 20
QUICK = {"memory_monitor_refresh_ms": 10, "task_oom_retry_delay_base_ms": 1}


class Machine:
    """What the runtime is told of the machine's memory."""

    def __init__(self) -> None:
        self.looks = 0
        self._short = 0

    def run_short(self) -> None:
        """Of this look and the closer one that follows: one worker is ended."""
        self._short = 2

    def usage(self, _: MemoryMonitor) -> tuple[int, int]:
        self.looks += 1
        short, self._short = self._short > 0, max(0, self._short - 1)
        return (99 if short else 10), 100


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(MemoryMonitor, "usage", lambda monitor: made.usage(monitor))
    return made


def hold_and_count(started: Gate, release: Gate, directory: Path, name: str) -> str:
    """Run until released, and leave a mark for each attempt."""
    leave_mark(directory, name)
    started.open()
    release.wait()
    return name


_kept: list[bytearray] = []


def keep(size_bytes: int) -> int:
    """Use memory beyond the call's end; gives the worker's pid."""
    _kept.append(bytearray(os.urandom(1024)) * (size_bytes // 1024))
    return os.getpid()


def nap(seconds: float) -> None:
    time.sleep(seconds)


def eat(size_bytes: int) -> int:
    """Use memory for good, bit by bit."""
    eaten = []
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if len(eaten) * MIB < size_bytes:
            eaten.append(bytearray(os.urandom(1024)) * 1024)
        else:
            time.sleep(0.01)
    return len(eaten)


# ---- limits of tasks: real memory ----------------------------------------------------------------


def test_a_task_that_uses_more_than_it_asked_for_is_ended() -> None:
    poolray.init(num_cpus=2, memory_limit_slack_bytes=0, **QUICK)
    task = poolray.remote(eat).options(memory=100 * MIB, name="eater")
    with pytest.raises(OutOfMemoryError, match="asked for memory=104857600") as caught:
        poolray.get(task.remote(500 * MIB), timeout=DEADLINE_S)
    error = caught.value
    assert error.worker_bytes > 100 * MIB
    assert (error.task_name, error.attempts) == ("eater", 1)
    assert poolray.get(poolray.remote(successor).remote(1), timeout=DEADLINE_S) == 2
    (row,) = list_tasks(filters=[("name", "=", "eater")])
    assert (row.state, row.error_type) == ("FAILED", "OUT_OF_MEMORY")
    (dead,) = list_workers(filters=[("pid", "=", error.pid)])
    assert dead.exit_type == "NODE_OUT_OF_MEMORY"


def test_what_a_fork_shares_with_its_driver_is_not_held_against_it() -> None:
    ballast = bytearray(os.urandom(1024)) * (200 * 1024)
    poolray.init(num_cpus=1, memory_limit_slack_bytes=32 * MIB, **QUICK)
    task = poolray.remote(nap).options(memory=50 * MIB)
    with _count_looks() as seen:
        poolray.get(task.remote(0.3), timeout=DEADLINE_S)
    assert seen
    assert max(seen) < 82 * MIB
    assert len(ballast) == 200 * MIB


@contextlib.contextmanager
def _count_looks() -> Iterator[list[int]]:
    seen: list[int] = []
    measure = MemoryMonitor.measure

    def note(monitor: MemoryMonitor, *args: Any) -> Any:
        report = measure(monitor, *args)
        seen.extend(size for _, size in report.workers)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryMonitor, "measure", note)
        yield seen


def test_an_actor_that_uses_more_than_it_asked_for_is_ended() -> None:
    poolray.init(num_cpus=2, memory_limit_slack_bytes=0, **QUICK)

    class Eater:
        def eat(self, size_bytes: int) -> int:
            return eat(size_bytes)

    actor = poolray.remote(Eater).options(memory=100 * MIB).remote()
    with pytest.raises(OutOfMemoryError, match="asked for memory="):
        poolray.get(actor.eat.remote(500 * MIB), timeout=DEADLINE_S)
    with pytest.raises(ActorDiedError, match="more than the memory=104857600"):
        poolray.get(actor.eat.remote(0), timeout=DEADLINE_S)


# ---- the machine runs short ----------------------------------------------------------------------


def test_the_task_that_began_last_is_ended_and_tried_again(
    machine: Machine, started: Gate, release: Gate, tmp_path: Path, capfd: Any
) -> None:
    poolray.init(num_cpus=2, **QUICK)
    hold = poolray.remote(hold_and_count)
    first = hold.remote(started, release, tmp_path, "first")
    started.wait()
    second = hold.options(name="second").remote(started, release, tmp_path, "second")
    started.wait()
    machine.run_short()
    started.wait()  # the second attempt
    release.open(2)
    assert poolray.get([first, second], timeout=DEADLINE_S) == ["first", "second"]
    assert len(marks(tmp_path, "first")) == 1
    assert len(marks(tmp_path, "second")) == 2
    assert "The worker of second (pid" in capfd.readouterr().err


def test_an_idle_worker_that_keeps_memory_goes_before_a_task(
    machine: Machine, started: Gate, release: Gate
) -> None:
    poolray.init(num_cpus=2, **QUICK)
    ref = poolray.remote(announce_and_hold).remote(started, release, "done")
    started.wait()
    pid = poolray.get(poolray.remote(keep).remote(100 * MIB), timeout=DEADLINE_S)
    machine.run_short()
    wait_until(lambda: not is_alive(pid), "the end of the idle worker")
    release.open()
    assert poolray.get(ref, timeout=DEADLINE_S) == "done"


def test_work_that_is_alone_fails_with_what_used_most(
    machine: Machine, started: Gate, release: Gate
) -> None:
    poolray.init(num_cpus=1, **QUICK)
    ref = poolray.remote(announce_and_hold).options(name="lonely").remote(started, release)
    started.wait()
    machine.run_short()
    with pytest.raises(OutOfMemoryError) as caught:
        poolray.get(ref, timeout=DEADLINE_S)
    error = caught.value
    assert (error.used_bytes, error.total_bytes) == (99, 100)
    assert error.processes
    names = {pid: name for pid, _, name in error.processes}
    assert names.get(error.pid, "poolray worker: lonely") == "poolray worker: lonely"
    assert "What used most:" in str(error)


def test_a_call_of_a_pool_is_ended_and_its_neighbours_go_on(
    machine: Machine, started: Gate, release: Gate
) -> None:
    with Pool(2) as pool:
        held = pool.apply_async(announce_and_hold, (started, release))
        started.wait()
        machine.run_short()
        with pytest.raises(OutOfMemoryError):
            held.get(DEADLINE_S)
        assert pool.map(successor, range(5)) == [1, 2, 3, 4, 5]


def test_a_future_of_an_executor_says_so_and_is_a_broken_pools(
    machine: Machine, started: Gate, release: Gate
) -> None:
    with Executor(2) as executor:
        future = executor.submit(announce_and_hold, started, release)
        started.wait()
        machine.run_short()
        error = future.exception(DEADLINE_S)
        assert isinstance(error, OutOfMemoryError)
        assert isinstance(error, BrokenProcessPool)
        assert executor.submit(successor, 1).result(DEADLINE_S) == 2


def test_an_executor_that_breaks_is_told_why(
    machine: Machine, started: Gate, release: Gate
) -> None:
    with Executor(2, break_on_worker_death=True) as executor:
        future = executor.submit(announce_and_hold, started, release)
        started.wait()
        machine.run_short()
        error = future.exception(DEADLINE_S)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error.__cause__, PoolrayError)
        assert "memory_usage_threshold" in str(error.__cause__)


def test_the_call_of_an_actor_says_so(machine: Machine, started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=2, **QUICK)

    class Holder:
        def hold(self, started: Gate, release: Gate) -> None:
            announce_and_hold(started, release)

    actor = poolray.remote(Holder).remote()
    ref = actor.hold.remote(started, release)
    started.wait()
    machine.run_short()
    with pytest.raises(OutOfMemoryError):
        poolray.get(ref, timeout=DEADLINE_S)


# ---- looking costs nothing when nothing runs -----------------------------------------------------


def test_nobody_looks_while_nothing_runs(machine: Machine) -> None:
    poolray.init(num_cpus=2, **QUICK)
    actor = poolray.remote(Echo).remote()
    assert poolray.get([poolray.remote(successor).remote(1), actor.echo.remote(2)]) == [2, 2]
    time.sleep(0.1)  # the background thread goes to sleep
    looks, cpu_s = machine.looks, time.process_time()
    time.sleep(0.5)
    assert machine.looks == looks
    assert time.process_time() - cpu_s < 0.02


class Echo:
    def echo(self, value: int) -> int:
        return value


def test_work_goes_on_where_memory_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[int] = []

    def refuse(_: MemoryMonitor) -> tuple[int, int]:
        looked.append(1)
        raise KeyError("MemAvailable")

    monkeypatch.setattr(MemoryMonitor, "usage", refuse)
    poolray.init(num_cpus=1, **QUICK)
    poolray.get([poolray.remote(nap).remote(0.1) for _ in range(2)], timeout=DEADLINE_S)
    assert len(looked) > 1
    assert [record.message for record in caplog.records] == ["memory cannot be measured"]


def test_it_can_be_switched_off(machine: Machine, started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1, _system_config={"memory_monitor_refresh_ms": 0})
    ref = poolray.remote(announce_and_hold).remote(started, release, "done")
    started.wait()
    machine.run_short()
    time.sleep(0.3)
    assert machine.looks == 0
    release.open()
    assert poolray.get(ref, timeout=DEADLINE_S) == "done"


def test_a_stream_of_short_calls_does_not_hide_a_task_that_eats(machine: Machine) -> None:
    poolray.init(num_cpus=2, memory_limit_slack_bytes=0, **QUICK)
    eater = poolray.remote(eat).options(memory=50 * MIB, max_retries=0).remote(200 * MIB)
    short = poolray.remote(successor)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:  # whoever leads here is never at rest
        refs = [short.remote(n) for n in range(500)]
        poolray.get(refs)
        if poolray.wait([eater], timeout=0)[0]:
            break
    with pytest.raises(OutOfMemoryError):
        poolray.get(eater, timeout=0)


# ---- in a container ------------------------------------------------------------------------------


@pytest.fixture
def small_box(tmp_path: Path) -> Iterator[Path]:
    """A control group with room for 400 MiB."""
    name = f"poolray-test-{os.getpid()}-{tmp_path.name}"
    places = [
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ]
    for base, limit in places:
        folder = base / name
        try:
            if not (base / "cgroup.procs").exists():
                continue
            folder.mkdir()
            (folder / limit).write_text(str(400 * MIB))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        yield folder
        wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), "its processes")
        folder.rmdir()
        return
    pytest.skip("no control group can be made here")


def test_a_container_is_kept_from_running_out_of_memory(
    small_box: Path, script: Callable[..., ScriptResult]
) -> None:
    result = script(
        textwrap.dedent(
            f"""
            import os, sys, time
            open({str(small_box / "cgroup.procs")!r}, "w").write(str(os.getpid()))
            sys.path.insert(0, {str(REPOSITORY)!r})
            import poolray
            from tests.integration.test_memory_protection import eat

            poolray.init(num_cpus=2, memory_usage_threshold=0.7, memory_monitor_refresh_ms=20,
                         object_store_memory=64 << 20)
            try:
                poolray.get(poolray.remote(eat).remote(380 << 20), timeout=60)
            except poolray.exceptions.OutOfMemoryError as error:
                assert error.total_bytes == 400 << 20, error
                assert error.used_bytes > 280 << 20, error
                print("ended in time")
            """
        )
    )
    assert result.stdout.strip().endswith("ended in time"), result
