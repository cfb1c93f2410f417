"""What poolray's `Executor` adds to the standard one.

Functions of every kind, workers that may die without breaking the executor, and bad tasks that fail
alone. The standard class refuses, breaks or hangs in these cases.
"""

from __future__ import annotations

import inspect
import itertools
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import pytest
from executor_support import (
    DEADLINE_S,
    ExecutorClass,
    Gate,
    add,
    announce_and_hold,
    announce_pid_and_hold,
    causes,
    double,
    forking,
    hold,
    identity,
    is_alive,
    kill_own_worker,
    leave_mark,
    marks,
    run_script,
    wait_until,
    worker_pids,
)

pytestmark = pytest.mark.poolray_only


def told_by(error: BaseException | None) -> str:
    """All that the error tells, its causes included."""
    return "\n".join(str(part) for part in causes(error))


# --- functions of every kind -------------------------------------------------------------------


def test_lambdas_and_closures_can_be_submitted(executor_implementation: ExecutorClass) -> None:
    offset = [10]

    def shift(x: int) -> int:
        return x + offset[0]

    with executor_implementation(max_workers=2) as executor:
        assert executor.submit(lambda: 5).result() == 5
        assert executor.submit(shift, 1).result() == 11
        assert list(executor.map(lambda x: x * x, range(10), chunksize=3)) == [
            n * n for n in range(10)
        ]
        assert executor.submit(lambda f, x: f(f(x)), shift, 1).result() == 21


def test_local_classes_travel_both_ways(executor_implementation: ExecutorClass) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    with executor_implementation(max_workers=1) as executor:
        point = executor.submit(lambda p: Point(p.x + 1), Point(1)).result()
    assert isinstance(point, Point)
    assert point.x == 2


def test_functions_can_be_results_and_errors_can_be_local(
    executor_implementation: ExecutorClass,
) -> None:
    class LocalError(Exception):
        pass

    def fail() -> NoReturn:
        raise LocalError("from far away")

    with executor_implementation(max_workers=1) as executor:
        multiply = executor.submit(lambda n: lambda x: x * n, 3).result()
        assert multiply(5) == 15
        with pytest.raises(LocalError, match="from far away"):
            executor.submit(fail).result()


def test_a_closure_is_captured_when_it_is_submitted(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    value = "at submission"
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        executor.submit(hold, gate)
        future = executor.submit(lambda: value)
        value = "later"
        gate.open()
        assert future.result() == "at submission"


def test_an_initializer_can_be_a_closure(executor_implementation: ExecutorClass) -> None:
    settings = {"scale": 3}

    def prepare() -> None:
        os.environ["SCALE_OF_THE_TEST"] = str(settings["scale"])

    with executor_implementation(max_workers=1, initializer=prepare) as executor:
        assert executor.submit(os.getenv, "SCALE_OF_THE_TEST").result() == "3"
    assert "SCALE_OF_THE_TEST" not in os.environ


def test_functions_defined_after_the_workers_started_run(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        if __name__ == "__main__":
            with Executor(max_workers=1) as executor:
                executor.submit(abs, -1).result()

                class Point:
                    def __init__(self, x):
                        self.x = x

                def shift(point):
                    return Point(point.x + by)

                by = 10
                moved = executor.submit(shift, Point(1)).result()
                print(moved.x, type(moved) is Point)
        """,
    )
    assert (result.stdout, result.stderr) == ("11 True\n", "")


# --- workers may die ---------------------------------------------------------------------------


def die_at_first(marker: Path, value: Any) -> Any:
    """Kill the worker in the first attempt, answer in the second."""
    if not marker.exists():
        marker.touch()
        kill_own_worker()
    return value


def test_a_task_that_loses_its_worker_is_tried_again(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(die_at_first, tmp_path / "marker", "value").result() == "value"
        assert executor.submit(add, 1, 2).result() == 3


def test_a_worker_that_is_killed_from_outside_costs_nothing_but_the_attempt(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    with (
        executor_implementation(max_workers=2) as executor,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "gate") as gate,
    ):
        future = executor.submit(announce_pid_and_hold, pid_file, started, gate)
        others = [executor.submit(double, n) for n in range(100)]
        started.wait()
        killed = int(pid_file.read_text())
        os.kill(killed, signal.SIGKILL)
        started.wait()
        assert int(pid_file.read_text()) != killed
        gate.open()
        assert future.result(DEADLINE_S) != killed
        assert [other.result() for other in others] == list(range(0, 200, 2))
        assert killed not in worker_pids(executor)


def test_a_lost_worker_is_noticed_while_nobody_waits(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    called = threading.Event()
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(die_at_first, tmp_path / "marker", 5)
        future.add_done_callback(lambda _: called.set())
        assert called.wait(DEADLINE_S)
        assert future.result(0) == 5


def test_a_worker_that_dies_idle_is_replaced(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        pid = executor.submit(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        assert executor.submit(os.getpid).result(DEADLINE_S) != pid


def note_attempt_and_die(attempts: Path) -> NoReturn:
    leave_mark(attempts, "attempt")
    kill_own_worker()


def test_a_task_that_always_kills_its_worker_fails_after_its_attempts(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor:
        before = [executor.submit(double, n) for n in range(20)]
        deadly = executor.submit(note_attempt_and_die, tmp_path)
        after = [executor.submit(double, n) for n in range(20)]
        error = deadly.exception(DEADLINE_S)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error, BrokenExecutor)
        assert [future.result(DEADLINE_S) for future in before + after] == [*range(0, 40, 2)] * 2
        assert executor.submit(add, 1, 2).result() == 3
    pids = (tmp_path / "attempt").read_text().split()
    assert len(pids) == len(set(pids)) == 4
    assert "note_attempt_and_die" in str(error)
    assert pids[-1] in str(error)
    assert "signal 9" in str(error)


def test_an_exit_code_is_told_like_a_signal(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(os._exit, 77).exception(DEADLINE_S)
        assert isinstance(error, BrokenProcessPool)
        assert "77" in str(error)
        assert executor.submit(add, 1, 2).result() == 3


def test_a_map_survives_the_death_of_its_workers(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor:
        answers = executor.map(
            lambda n: die_at_first(tmp_path / str(n), n) if n % 10 == 0 else n,
            range(50),
            chunksize=4,
        )
        assert list(answers) == list(range(50))


def test_a_replaced_worker_is_initialized_again(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(1, None, leave_mark, (tmp_path, "prepared")) as executor:
        assert executor.submit(die_at_first, tmp_path / "marker", 5).result() == 5
    assert len(set((tmp_path / "prepared").read_text().split())) == 2


def test_the_death_of_a_worker_leaves_other_executors_alone(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=1) as quiet,
        executor_implementation(max_workers=1) as deadly,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "gate") as gate,
    ):
        held = quiet.submit(announce_and_hold, started, gate, os.getpid())
        started.wait()
        assert isinstance(deadly.submit(kill_own_worker).exception(DEADLINE_S), BrokenProcessPool)
        gate.open()
        assert held.result(DEADLINE_S) == os.getpid()


def test_a_cancelled_task_is_not_tried_again(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    directory = tmp_path / "marks"
    directory.mkdir()
    with (
        executor_implementation(max_workers=1) as executor,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "gate") as gate,
    ):
        running = executor.submit(announce_and_hold, started, gate)
        waiting = [executor.submit(leave_mark, directory, n) for n in range(50)]
        started.wait()
        cancelled = {str(n) for n, future in enumerate(waiting) if future.cancel()}
        assert len(cancelled) >= 40
        os.kill(worker_pids(executor)[0], signal.SIGKILL)
        started.wait()
        gate.open(count=2)
        assert not wait([running, *waiting], DEADLINE_S).not_done
    assert marks(directory) == {str(n) for n in range(50)} - cancelled


def test_breaking_is_asked_for_by_name_and_off_by_default(
    executor_implementation: ExecutorClass,
) -> None:
    parameter = inspect.signature(executor_implementation).parameters["break_on_worker_death"]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default is False


# --- bad tasks fail alone ----------------------------------------------------------------------


class TwoPartError(Exception):
    """Cannot be rebuilt by pickle: `args` holds one value, the constructor wants two."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


class RefusesUnpickling:
    """Travels well and raises on arrival."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return refuse, ()


class KillsOnArrival:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return kill_own_worker, ()


def refuse() -> NoReturn:
    raise LookupError("refused on arrival")


def raise_two_part_error() -> NoReturn:
    raise TwoPartError("a leak", "the cellar")


def raise_error_with_lock() -> NoReturn:
    error = ValueError("the text of the error")
    error.lock = threading.Lock()
    raise error


def make(factory: Callable[[], Any]) -> Any:
    return factory()


def test_an_error_that_cannot_be_rebuilt_arrives_with_its_text(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(raise_two_part_error).exception(DEADLINE_S)
        assert "TwoPartError" in told_by(error)
        assert "a leak in the cellar" in told_by(error)
        assert "raise_two_part_error" in told_by(error)
        assert not isinstance(error, BrokenExecutor)
        assert executor.submit(add, 1, 2).result() == 3


def test_an_error_that_cannot_be_pickled_arrives_with_its_text(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(raise_error_with_lock).exception(DEADLINE_S)
        assert "ValueError" in told_by(error)
        assert "the text of the error" in told_by(error)
        assert "raise_error_with_lock" in told_by(error)


def test_an_argument_that_cannot_be_unpickled_fails_its_task_alone(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(identity, RefusesUnpickling()).exception(DEADLINE_S)
        assert "refused on arrival" in told_by(error)
        assert not isinstance(error, BrokenExecutor)
        assert executor.submit(add, 1, 2).result() == 3


def test_a_result_that_cannot_be_unpickled_fails_its_future_alone(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(make, RefusesUnpickling).exception(DEADLINE_S)
        assert "refused on arrival" in told_by(error)
        assert not isinstance(error, BrokenExecutor)
        assert executor.submit(add, 1, 2).result() == 3


def test_an_argument_that_kills_the_worker_on_arrival_fails_its_task_alone(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        deadly = executor.submit(identity, KillsOnArrival())
        others = [executor.submit(double, n) for n in range(20)]
        assert isinstance(deadly.exception(DEADLINE_S), BrokenProcessPool)
        assert [future.result() for future in others] == list(range(0, 40, 2))


def test_an_item_that_cannot_be_pickled_leaves_the_other_items_of_a_map(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        futures = [executor.submit(identity, item) for item in (1, threading.Lock(), 3)]
        assert futures[0].result() == 1
        assert isinstance(futures[1].exception(), TypeError)
        assert futures[2].result() == 3


# --- waiting and workers -----------------------------------------------------------------------


def test_waiters_see_what_shutdown_has_cancelled(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    """The standard executor cancels without telling `wait`, which then waits for ever."""
    executor = executor_implementation(max_workers=1)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        running = executor.submit(announce_and_hold, started, gate)
        waiting = [executor.submit(add, n) for n in range(50)]
        started.wait()
        executor.shutdown(wait=False, cancel_futures=True)
        gate.open()
        done, not_done = wait([running, *waiting], DEADLINE_S)
    assert not not_done
    assert waiting[-1] in done
    assert waiting[-1].cancelled()


def test_several_threads_can_shut_down_at_once(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    """In the standard executor each of them closes the same descriptor, whosever it is by then."""
    executor = executor_implementation(max_workers=1)
    with Gate(tmp_path / "gate") as gate:
        future = executor.submit(hold, gate, 5)
        threads = [threading.Thread(target=executor.shutdown) for _ in range(4)]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
        assert future.result(0) == 5


def test_forked_workers_can_be_replaced_after_a_number_of_tasks(
    executor_implementation: ExecutorClass,
) -> None:
    """The standard executor refuses: it would fork beside its own threads."""
    inherited = "value of this process"
    with forking(executor_implementation, 1, max_tasks_per_child=3) as executor:
        futures = [executor.submit(lambda: (inherited, os.getpid())) for _ in range(30)]
        values = [future.result(DEADLINE_S) for future in futures]
    assert {value for value, _ in values} == {inherited}
    runs = [(pid, len(list(run))) for pid, run in itertools.groupby(pid for _, pid in values)]
    assert [length for _, length in runs] == [3] * 10
    assert len({pid for pid, _ in runs}) == 10
