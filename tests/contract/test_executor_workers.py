"""The workers of `Executor`: how many, how started and prepared, replaced, seen, and lost."""

from __future__ import annotations

import importlib
import multiprocessing
import operator
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
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
    double,
    hold,
    is_alive,
    kill_own_worker,
    leave_mark,
    marks,
    meet,
    require_max_tasks_per_child,
    run_script,
    that_breaks,
    wait_until,
    worker_pids,
)

START_METHODS = ("fork", "spawn", "forkserver")


# --- how many ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_workers", [0, -1])
def test_fewer_workers_than_one_are_refused(
    executor_implementation: ExecutorClass, max_workers: int
) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        executor_implementation(max_workers=max_workers)


def test_a_number_of_workers_that_is_no_number_is_refused(
    executor_implementation: ExecutorClass,
) -> None:
    with pytest.raises(TypeError):
        executor_implementation(max_workers="2")


def test_the_default_number_of_workers_is_the_standard_one(
    executor_implementation: ExecutorClass,
) -> None:
    with ProcessPoolExecutor() as standard, executor_implementation() as executor:
        assert executor._max_workers == standard._max_workers
    with executor_implementation(None) as executor:
        assert executor._max_workers == standard._max_workers


def test_two_workers_run_two_tasks_at_once(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=2) as executor,
        Gate(tmp_path / "one") as one,
        Gate(tmp_path / "other") as other,
    ):
        pids = executor.submit(meet, one, other), executor.submit(meet, other, one)
        assert len({future.result() for future in pids}) == 2


def test_tasks_never_run_in_more_processes_than_asked_for(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = [executor.submit(os.getpid) for _ in range(200)]
        pids = {future.result() for future in futures}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_processes_are_listed_by_pid(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(20)}
        processes = executor._processes
        assert pids <= set(processes)
        assert len(processes) <= 2
        for pid, process in processes.items():
            assert process.pid == pid
            assert process.is_alive()
            assert process.exitcode is None
        workers = list(processes.values())
    for process in workers:
        process.join(DEADLINE_S)
        assert not process.is_alive()
        assert process.exitcode == 0


# --- start methods -----------------------------------------------------------------------------


def module_attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name, None)


@pytest.mark.parametrize("method", START_METHODS)
def test_every_start_method_gives_the_same_answers(
    executor_implementation: ExecutorClass, method: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context(method)
    with executor_implementation(2, context, leave_mark, (tmp_path, "prepared")) as executor:
        assert list(executor.map(add, range(10), [5] * 10)) == list(range(5, 15))
        assert executor.submit(os.getpid).result() != os.getpid()
        assert type(executor.submit(operator.floordiv, 1, 0).exception()) is ZeroDivisionError
    assert marks(tmp_path) == {"prepared"}


@pytest.mark.parametrize("method", START_METHODS)
def test_only_forked_workers_inherit_what_the_program_has_set(
    executor_implementation: ExecutorClass, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "set_by_the_test", "inherited", raising=False)
    context = multiprocessing.get_context(method)
    with executor_implementation(max_workers=1, mp_context=context) as executor:
        found = executor.submit(module_attribute, "operator", "set_by_the_test").result()
    assert found == ("inherited" if method == "fork" else None)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_start_method_set_for_the_program_is_used(
    executor_implementation: ExecutorClass, tmp_path: Path, method: str
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        f"""
        import multiprocessing
        setting = "at import"

        def read_setting():
            return setting

        if __name__ == "__main__":
            multiprocessing.set_start_method("{method}")
            setting = "later"
            with Executor(max_workers=1) as executor:
                print(executor.submit(read_setting).result())
        """,
    )
    assert result.stderr == ""
    assert result.stdout == ("later\n" if method == "fork" else "at import\n")


# --- initializers ------------------------------------------------------------------------------

_prepared: list[Any] = []


def prepare(directory: Path, *values: Any) -> None:
    leave_mark(directory, os.getpid())
    _prepared.extend(values)


def what_was_prepared() -> list[Any]:
    return _prepared


def prepared_and_meet(mine: Gate, theirs: Gate) -> tuple[int, list[Any]]:
    return meet(mine, theirs), _prepared


def wait_and_fail(gate: Gate) -> NoReturn:
    gate.wait()
    raise LookupError("the initializer fails")


def wait_and_exit(gate: Gate) -> NoReturn:
    gate.wait()
    os._exit(3)


def test_the_initializer_runs_once_in_each_worker(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    directory = tmp_path / "marks"
    directory.mkdir()
    with (
        executor_implementation(2, initializer=prepare, initargs=(directory, 1, 2)) as executor,
        Gate(tmp_path / "one") as one,
        Gate(tmp_path / "other") as other,
    ):
        futures = [
            executor.submit(prepared_and_meet, one, other),
            executor.submit(prepared_and_meet, other, one),
        ]
        seen = dict(future.result() for future in futures)
        assert list(executor.map(double, range(20))) == list(range(0, 40, 2))
    assert list(seen.values()) == [[1, 2], [1, 2]]
    assert marks(directory) == {str(pid) for pid in seen}
    assert all(len((directory / name).read_text().split()) == 1 for name in marks(directory))
    assert _prepared == []


def test_each_executor_has_its_own_initializer(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(1, initializer=prepare, initargs=(tmp_path, "a")) as first,
        executor_implementation(1, initializer=prepare, initargs=(tmp_path, "b")) as second,
        executor_implementation(1) as plain,
    ):
        assert first.submit(what_was_prepared).result() == ["a"]
        assert second.submit(what_was_prepared).result() == ["b"]
        assert plain.submit(what_was_prepared).result() == []


def test_an_initializer_that_cannot_be_called_is_refused(
    executor_implementation: ExecutorClass,
) -> None:
    with pytest.raises(TypeError, match="initializer must be a callable"):
        executor_implementation(max_workers=1, initializer="prepare")


def test_an_initializer_of_main_sets_globals_for_functions_of_main(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        scale = 1

        def set_scale(value):
            global scale
            scale = value

        def scaled(x):
            return scale * x

        if __name__ == "__main__":
            with Executor(max_workers=2, initializer=set_scale, initargs=(10,)) as executor:
                print(list(executor.map(scaled, range(4))), scale)
        """,
    )
    assert (result.stdout, result.stderr) == ("[0, 10, 20, 30] 1\n", "")


@pytest.mark.parametrize("fail", [wait_and_fail, wait_and_exit])
def test_a_failed_initializer_breaks_the_executor(
    executor_implementation: ExecutorClass, tmp_path: Path, fail: Any
) -> None:
    with Gate(tmp_path / "gate") as gate:
        executor = executor_implementation(max_workers=1, initializer=fail, initargs=(gate,))
        futures = [executor.submit(add, n) for n in range(5)]
        # As many as there could be attempts at it, should the executor try again.
        gate.open(count=20)
        for future in futures:
            with pytest.raises(BrokenProcessPool):
                future.result(DEADLINE_S)
        with pytest.raises(BrokenProcessPool):
            executor.submit(add, 1)
        with pytest.raises(BrokenExecutor):
            executor.map(add, [1])
        executor.shutdown()


_primitives: dict[str, Any] = {}


def keep_primitives(lock: Any, queue: Any, event: Any, total: Any) -> None:
    _primitives.update(lock=lock, queue=queue, event=event, total=total)


def use_primitives(n: int) -> None:
    assert _primitives["event"].wait(DEADLINE_S)
    with _primitives["lock"]:
        _primitives["total"].value += n
    _primitives["queue"].put(n)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_primitives_of_multiprocessing_pass_through_the_initializer(
    executor_implementation: ExecutorClass, method: str
) -> None:
    context = multiprocessing.get_context(method)
    lock, queue, event = context.Lock(), context.Queue(), context.Event()
    total = context.Value("i", 0, lock=False)
    with executor_implementation(
        2, context, keep_primitives, (lock, queue, event, total)
    ) as executor:
        futures = [executor.submit(use_primitives, n) for n in range(10)]
        event.set()
        wait(futures)
        assert [future.exception() for future in futures] == [None] * 10
        assert sorted(queue.get(timeout=DEADLINE_S) for _ in range(10)) == list(range(10))
    assert total.value == 45


def move_item(source: Any, target: Any) -> None:
    target.put(source.get(timeout=DEADLINE_S))


def test_proxies_of_a_manager_pass_as_arguments(executor_implementation: ExecutorClass) -> None:
    with multiprocessing.Manager() as manager, executor_implementation(1) as executor:
        source, target = manager.Queue(), manager.Queue()
        future = executor.submit(move_item, source, target)
        source.put("item")
        assert target.get(timeout=DEADLINE_S) == "item"
        assert future.result(DEADLINE_S) is None


# --- replacement after a number of tasks -------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "max_tasks_per_child must be >= 1"),
        (-1, ValueError, "max_tasks_per_child must be >= 1"),
        ("3", TypeError, "max_tasks_per_child must be an integer"),
        (2.0, TypeError, "max_tasks_per_child must be an integer"),
    ],
)
def test_a_bad_max_tasks_per_child_is_refused(
    executor_implementation: ExecutorClass, value: Any, error: type[Exception], text: str
) -> None:
    require_max_tasks_per_child(executor_implementation)
    with pytest.raises(error, match=text):
        executor_implementation(1, max_tasks_per_child=value)


def test_max_tasks_per_child_is_given_by_name(executor_implementation: ExecutorClass) -> None:
    require_max_tasks_per_child(executor_implementation)
    with pytest.raises(TypeError):
        executor_implementation(1, None, None, (), 3)


@pytest.mark.parametrize("method", [None, "spawn"])
def test_a_worker_is_replaced_after_its_number_of_tasks(
    executor_implementation: ExecutorClass, tmp_path: Path, method: str | None
) -> None:
    require_max_tasks_per_child(executor_implementation)
    context = multiprocessing.get_context(method) if method else None
    with executor_implementation(
        1, context, leave_mark, (tmp_path, "prepared"), max_tasks_per_child=2
    ) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(6)]
    assert pids[0::2] == pids[1::2]
    assert len(set(pids)) == 3
    wait_until(lambda: not any(map(is_alive, pids)))
    prepared = (tmp_path / "prepared").read_text().split()
    assert {str(pid) for pid in pids} <= set(prepared)


def test_failing_tasks_count_towards_the_replacement_too(
    executor_implementation: ExecutorClass,
) -> None:
    require_max_tasks_per_child(executor_implementation)
    with executor_implementation(1, max_tasks_per_child=2) as executor:
        first = executor.submit(os.getpid).result()
        assert executor.submit(operator.floordiv, 1, 0).exception() is not None
        assert executor.submit(os.getpid).result() != first


def test_shutdown_waits_for_tasks_that_later_workers_will_run(
    executor_implementation: ExecutorClass,
) -> None:
    require_max_tasks_per_child(executor_implementation)
    executor = executor_implementation(2, max_tasks_per_child=1)
    futures = [executor.submit(double, n) for n in range(6)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == list(range(0, 12, 2))


# --- an executor that a lost worker breaks -----------------------------------------------------


def assert_broken(executor: Executor) -> None:
    with pytest.raises(BrokenProcessPool):
        executor.submit(add, 1)
    with pytest.raises(BrokenProcessPool):
        executor.map(add, [1])


def kill_one_worker(executor: Executor) -> None:
    executor._processes[worker_pids(executor)[0]].kill()


def test_the_death_of_a_worker_fails_what_runs_and_what_waits(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        executor = that_breaks(executor_implementation, max_workers=1)
        finished = executor.submit(add, 1)
        finished.result()
        running = executor.submit(announce_and_hold, started, gate)
        waiting = [executor.submit(hold, gate) for _ in range(20)]
        started.wait()
        kill_one_worker(executor)
        for future in [running, *waiting]:
            with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
                future.result(DEADLINE_S)
        assert finished.result() == 1
        assert_broken(executor)
        executor.shutdown()


def test_the_death_of_one_worker_ends_the_others(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with Gate(tmp_path / "one") as one, Gate(tmp_path / "other") as other:
        executor = that_breaks(executor_implementation, max_workers=2)
        wait([executor.submit(meet, one, other), executor.submit(meet, other, one)])
        pids = worker_pids(executor)
        assert len(pids) == 2
        assert isinstance(executor.submit(kill_own_worker).exception(), BrokenProcessPool)
        wait_until(lambda: not any(map(is_alive, pids)))
        executor.shutdown()


def end_with_code(code: int) -> NoReturn:
    os._exit(code)


def end_by_signal(number: int) -> NoReturn:
    os.kill(os.getpid(), number)
    raise AssertionError("the signal was ignored")


@pytest.mark.parametrize(
    ("end", "argument"),
    [
        (end_by_signal, signal.SIGKILL),
        (end_by_signal, signal.SIGTERM),
        (end_with_code, 0),
        (end_with_code, 3),
    ],
)
def test_however_the_worker_ends_the_executor_breaks(
    executor_implementation: ExecutorClass, end: Any, argument: int
) -> None:
    executor = that_breaks(executor_implementation, max_workers=1)
    with pytest.raises(BrokenProcessPool):
        executor.submit(end, argument).result(DEADLINE_S)
    assert_broken(executor)
    executor.shutdown()


def test_a_broken_executor_ends_its_maps_and_calls_back(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    seen: list[type[BaseException]] = []
    called = threading.Event()

    def look(future: Future[Any]) -> None:
        seen.append(type(future.exception()))
        called.set()

    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        executor = that_breaks(executor_implementation, max_workers=1)
        executor.submit(announce_and_hold, started, gate).add_done_callback(look)
        answers = executor.map(double, range(10), chunksize=2)
        started.wait()
        kill_one_worker(executor)
        assert called.wait(DEADLINE_S)
        with pytest.raises(BrokenProcessPool):
            next(answers)
        executor.shutdown()
    assert len(seen) == 1
    assert issubclass(seen[0], BrokenProcessPool)


@pytest.mark.parametrize("cancel_futures", [False, True])
def test_a_worker_lost_during_shutdown_does_not_hang_it(
    executor_implementation: ExecutorClass, tmp_path: Path, cancel_futures: bool
) -> None:
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        executor = that_breaks(executor_implementation, max_workers=1)
        future = executor.submit(announce_and_hold, started, gate)
        started.wait()
        process = executor._processes[worker_pids(executor)[0]]
        shutdown = threading.Thread(
            target=executor.shutdown, kwargs={"cancel_futures": cancel_futures}
        )
        shutdown.start()
        process.kill()
        shutdown.join(DEADLINE_S)
        assert not shutdown.is_alive()
        assert isinstance(future.exception(0), BrokenProcessPool)
