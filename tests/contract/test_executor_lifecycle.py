"""How an `Executor` ends: by shutdown, collection or exit; and what it leaves behind."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest
from executor_support import (
    DEADLINE_S,
    ExecutorClass,
    Gate,
    add,
    announce_and_hold,
    double,
    hold,
    identity,
    is_alive,
    leave_mark,
    marks,
    run_script,
    wait_until,
    worker_pids,
)

REFUSAL = "cannot schedule new futures after shutdown"


# --- shutdown ----------------------------------------------------------------------------------


def test_leaving_the_context_waits_for_everything_submitted(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = [executor.submit(leave_mark, tmp_path, n) for n in range(20)]
    assert all(future.done() for future in futures)
    assert marks(tmp_path) == {str(n) for n in range(20)}
    with pytest.raises(RuntimeError, match=REFUSAL):
        executor.submit(add, 1)


def test_the_context_manager_is_the_executor_and_lets_errors_through(
    executor_implementation: ExecutorClass,
) -> None:
    executor = executor_implementation(max_workers=1)
    with pytest.raises(LookupError, match="mine"), executor as entered:
        assert entered is executor
        future = entered.submit(add, 1)
        raise LookupError("mine")
    assert future.result() == 1
    with pytest.raises(RuntimeError, match=REFUSAL):
        executor.submit(add, 1)


@pytest.mark.parametrize("used", [True, False])
def test_shutdown_can_be_repeated(executor_implementation: ExecutorClass, used: bool) -> None:
    executor = executor_implementation(max_workers=1)
    if used:
        executor.submit(add, 1)
    executor.shutdown()
    executor.shutdown(wait=False)
    executor.shutdown(cancel_futures=True)
    with pytest.raises(RuntimeError, match=REFUSAL):
        executor.submit(add, 1)


def test_shutdown_takes_wait_by_position_and_cancel_futures_by_name(
    executor_implementation: ExecutorClass,
) -> None:
    executor = executor_implementation(max_workers=1)
    with pytest.raises(TypeError):
        executor.shutdown(True, True)
    executor.shutdown(True)


def test_shutdown_without_waiting_returns_while_tasks_run_and_they_finish(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    executor = executor_implementation(max_workers=1)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        running = executor.submit(announce_and_hold, started, gate, "running")
        waiting = [executor.submit(hold, gate, n) for n in range(10)]
        started.wait()
        executor.shutdown(wait=False)
        assert not running.done()
        with pytest.raises(RuntimeError, match=REFUSAL):
            executor.submit(add, 1)
        gate.open(count=11)
        assert running.result(DEADLINE_S) == "running"
        assert [future.result(DEADLINE_S) for future in waiting] == list(range(10))


def test_shutdown_can_cancel_what_has_not_begun(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    directory = tmp_path / "marks"
    directory.mkdir()
    executor = executor_implementation(max_workers=1)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        running = executor.submit(announce_and_hold, started, gate, "running")
        waiting = {str(n): executor.submit(leave_mark, directory, n) for n in range(50)}
        started.wait()
        shutdown = threading.Thread(target=executor.shutdown, kwargs={"cancel_futures": True})
        shutdown.start()
        with pytest.raises(CancelledError):
            waiting["49"].result(DEADLINE_S)
        gate.open()
        shutdown.join(DEADLINE_S)
    assert running.result(0) == "running"
    assert all(future.done() for future in waiting.values())
    ran = {name for name, future in waiting.items() if not future.cancelled()}
    # Some were already on their way to the worker and could not be called back.
    assert len(ran) < 10
    assert marks(directory) == ran


def test_shutdown_without_waiting_can_cancel_too(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    executor = executor_implementation(max_workers=1)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "gate") as gate:
        running = executor.submit(announce_and_hold, started, gate, "running")
        waiting = [executor.submit(hold, gate, n) for n in range(50)]
        started.wait()
        executor.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(CancelledError):
            waiting[-1].result(DEADLINE_S)
        gate.open(count=51)
        assert running.result(DEADLINE_S) == "running"
        ran = [future for future in waiting if not future.cancelled()]
        assert [future.result(DEADLINE_S) for future in ran] == list(range(len(ran)))


def test_a_future_cancelled_just_before_shutdown_does_not_hold_it_up(
    executor_implementation: ExecutorClass,
) -> None:
    executor = executor_implementation(max_workers=1)
    executor.submit(int).result()
    executor.submit(int).cancel()
    shutdown = threading.Thread(target=executor.shutdown)
    shutdown.start()
    shutdown.join(DEADLINE_S)
    assert not shutdown.is_alive()


def test_submitting_while_another_thread_shuts_down_works_or_is_refused(
    executor_implementation: ExecutorClass,
) -> None:
    accepted: list[Future[int]] = []
    refusals: list[str] = []
    first_accepted = threading.Event()

    def submit_until_refused() -> None:
        try:
            for n in range(1_000_000):
                accepted.append(executor.submit(double, n))
                first_accepted.set()
        except RuntimeError as error:
            refusals.append(str(error))

    executor = executor_implementation(max_workers=2)
    thread = threading.Thread(target=submit_until_refused)
    thread.start()
    assert first_accepted.wait(DEADLINE_S)
    executor.shutdown()
    thread.join(DEADLINE_S)
    assert refusals == [REFUSAL]
    assert [future.result(DEADLINE_S) for future in accepted] == [
        2 * n for n in range(len(accepted))
    ]


# --- garbage collection ------------------------------------------------------------------------


def test_tasks_of_a_dropped_executor_finish(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with Gate(tmp_path / "gate") as gate:
        executor = executor_implementation(max_workers=1)
        futures = [executor.submit(hold, gate, n) for n in range(10)]
        del executor
        gc.collect()
        gate.open(count=10)
        assert [future.result(DEADLINE_S) for future in futures] == list(range(10))


def test_a_dropped_executor_is_collected_and_its_workers_end(
    executor_implementation: ExecutorClass,
) -> None:
    executor = executor_implementation(max_workers=2)
    executor.submit(add, 1).result()
    pids, reference = worker_pids(executor), weakref.ref(executor)
    assert pids
    del executor
    gc.collect()
    assert reference() is None
    wait_until(lambda: not any(map(is_alive, pids)))


class Token:
    """Something that a weak reference can watch."""


def test_arguments_and_results_are_let_go_of(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        token = Token()
        argument_gone = threading.Event()
        _argument = weakref.ref(token, lambda _: argument_gone.set())
        future = executor.submit(identity, token)
        result = future.result()
        del token
        assert argument_gone.wait(DEADLINE_S)

        result_gone = threading.Event()
        _result = weakref.ref(result, lambda _: result_gone.set())
        del result, future
        assert result_gone.wait(DEADLINE_S)


def test_map_lets_go_of_each_answer(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        for answer in executor.map(identity, [Token() for _ in range(5)], chunksize=5):
            reference = weakref.ref(answer)
            del answer
            assert reference() is None


def test_an_abandoned_future_still_runs(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor:
        executor.submit(leave_mark, tmp_path, "ran")
        gc.collect()
    assert marks(tmp_path) == {"ran"}


# --- what is left behind -----------------------------------------------------------------------


def test_workers_are_gone_after_shutdown(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        list(executor.map(double, range(10)))
        pids = worker_pids(executor)
        assert all(map(is_alive, pids))
    wait_until(lambda: not any(map(is_alive, pids)))


def test_executors_one_after_another_leak_no_descriptor_thread_or_process(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        import os, threading
        import psutil
        from executor_support import double, wait_until

        def count():
            me = psutil.Process()
            return me.num_fds(), threading.active_count(), len(me.children(recursive=True))

        def use_one():
            with Executor(max_workers=2) as executor:
                assert sum(executor.map(double, range(100))) == 9900

        if __name__ == "__main__":
            use_one()
            before = count()
            for _ in range(8):
                use_one()
            wait_until(lambda: all(now <= then for now, then in zip(count(), before)))
            print("level")
        """,
    )
    assert (result.stdout, result.stderr) == ("level\n", "")


@pytest.mark.parametrize(
    "use",
    [
        "executor = Executor(1); print(executor.submit(abs, -1).result()); executor.shutdown()",
        "print(Executor(1).submit(abs, -1).result())",
        "executor = Executor(1); print(executor.submit(abs, -1).result())",
        "executor = Executor(1); print(1)",
        "Executor(1); print(1)",
    ],
    ids=["shut down", "dropped", "left open", "unused", "unused and dropped"],
)
def test_an_executor_ends_without_any_warning(
    executor_implementation: ExecutorClass, tmp_path: Path, use: str
) -> None:
    script = f"if __name__ == '__main__':\n    {use}\n"
    options = ("-X", "dev", "-W", "always::ResourceWarning")
    result = run_script(executor_implementation, tmp_path / "script.py", script, *options)
    assert (result.stdout, result.stderr) == ("1\n", "")
    assert result.exit_code == 0


# --- the interpreter's exit --------------------------------------------------------------------

ENDINGS: dict[str, str] = {
    "left open": "",
    "dropped": "del executor",
    "shut down without waiting": "executor.shutdown(wait=False)",
    "sys.exit": "import sys; sys.exit(0)",
    "in a thread": "threading.Thread(target=executor.shutdown).start()",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=list(ENDINGS))
def test_the_interpreter_ends_after_the_work_is_done(
    executor_implementation: ExecutorClass, tmp_path: Path, ending: str
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        f"""
        import atexit, threading
        from pathlib import Path
        from executor_support import Gate, hold, leave_mark

        if __name__ == "__main__":
            executor = Executor(max_workers=1)
            gate = Gate("gate")
            futures = [executor.submit(hold, gate)]
            futures += [executor.submit(leave_mark, Path.cwd(), n) for n in range(5)]
            futures[-1].add_done_callback(lambda future: print("last:", future.result()))
            # The work can only begin when the program has come to its end.
            threading.Timer(0.05, gate.open).start()
            {ending}
        """,
    )
    assert (result.stdout, result.stderr) == ("last: 4\n", "")
    assert result.exit_code == 0
    assert marks(tmp_path) >= {str(n) for n in range(5)}


def test_an_error_in_main_ends_the_program_after_its_work(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        from pathlib import Path
        from executor_support import leave_mark

        if __name__ == "__main__":
            executor = Executor(max_workers=1)
            executor.map(leave_mark, [Path.cwd()] * 5, range(5))
            raise SystemExit("something else went wrong")
        """,
    )
    assert result.exit_code == 1
    assert result.stderr == "something else went wrong\n"
    assert marks(tmp_path) >= {str(n) for n in range(5)}


@pytest.mark.parametrize("used", [True, False])
def test_submitting_when_the_interpreter_has_ended_is_refused(
    executor_implementation: ExecutorClass, tmp_path: Path, used: bool
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        f"""
        import atexit

        @atexit.register
        def submit_late():
            try:
                executor.submit(abs, -1)
            except RuntimeError as error:
                print(error)

        if __name__ == "__main__":
            executor = Executor(max_workers=1)
            if {used}:
                executor.submit(abs, -1).result()
        """,
    )
    assert result.stdout.startswith("cannot schedule new futures after")
    assert (result.stderr, result.exit_code) == ("", 0)


def test_output_of_workers_reaches_the_program(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        import functools, sys

        def complain(text):
            print(text, file=sys.stderr, flush=True)

        if __name__ == "__main__":
            with Executor(max_workers=1) as executor:
                executor.submit(functools.partial(print, flush=True), "spoken").result()
                executor.submit(complain, "complained").result()
        """,
    )
    assert result.stdout == "spoken\n"
    assert result.stderr == "complained\n"
