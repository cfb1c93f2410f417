"""The futures of `Executor`: their states, callbacks, and the standard ways to wait for them."""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
import os
import signal
import sys
import threading
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    as_completed,
    wait,
)
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path
from types import FrameType
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
    leave_mark,
    marks,
    raise_error,
    run_script,
)

# --- states ------------------------------------------------------------------------------------


def test_a_future_runs_then_is_done(executor_implementation: ExecutorClass, tmp_path: Path) -> None:
    with (
        executor_implementation(max_workers=1) as executor,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "release") as release,
    ):
        future = executor.submit(announce_and_hold, started, release, "value")
        started.wait()
        assert (future.running(), future.done(), future.cancelled()) == (True, False, False)
        assert "state=running" in repr(future)
        release.open()
        assert future.result() == "value"
        assert (future.running(), future.done(), future.cancelled()) == (False, True, False)
        assert "state=finished returned str" in repr(future)


def test_a_future_waits_while_the_workers_are_busy(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        futures = [executor.submit(hold, gate) for _ in range(50)]
        last = futures[-1]
        assert (last.running(), last.done(), last.cancelled()) == (False, False, False)
        assert "state=pending" in repr(last)
        gate.open(count=50)
        wait(futures)
        assert last.done()


def test_result_and_exception_can_be_read_again(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        good = executor.submit(double, [1])
        bad = executor.submit(raise_error, KeyError("k"))
        assert good.result() is good.result()
        assert good.exception() is None
        assert bad.exception() is bad.exception()
        for _ in range(2):
            with pytest.raises(KeyError, match="k"):
                bad.result()
        assert "state=finished raised KeyError" in repr(bad)


@pytest.mark.parametrize("timeout_s", [0, 0.02, -1])
def test_waiting_too_short_is_a_timeout_and_changes_nothing(
    executor_implementation: ExecutorClass, tmp_path: Path, timeout_s: float
) -> None:
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        future = executor.submit(hold, gate, 5)
        with pytest.raises(FuturesTimeoutError):
            future.result(timeout=timeout_s)
        with pytest.raises(FuturesTimeoutError):
            future.exception(timeout_s)
        gate.open()
        assert future.result(DEADLINE_S) == 5


def test_many_threads_can_wait_for_one_future(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    seen: list[Any] = []
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        future = executor.submit(hold, gate, ["shared"])
        threads = [
            threading.Thread(target=lambda: seen.append(future.result(DEADLINE_S)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert len(seen) == 8
    assert all(value is seen[0] for value in seen)


def test_threads_that_wait_for_different_futures_each_get_their_own(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    """Whoever waits first must not keep the answers of the others to itself."""
    answers: dict[int, int] = {}
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        held = executor.submit(hold, gate, 0)
        quick = [executor.submit(double, n) for n in range(1, 7)]

        def read(n: int, future: Future[int]) -> None:
            answers[n] = future.result(DEADLINE_S)

        first = threading.Thread(target=read, args=(0, held))
        first.start()
        others = [threading.Thread(target=read, args=(n, f)) for n, f in enumerate(quick, 1)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(DEADLINE_S)
        assert answers == {n: 2 * n for n in range(1, 7)}
        gate.open()
        first.join(DEADLINE_S)
    assert answers[0] == 0


class Interrupted(Exception):
    """Raised by the test's signal handler."""


def test_a_signal_interrupts_the_wait_for_a_result(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
            future = executor.submit(hold, gate, 5)
            with pytest.raises(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                future.result()
            gate.open()
            assert future.result(DEADLINE_S) == 5
            assert executor.submit(add, 1, 2).result(DEADLINE_S) == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --- cancelling --------------------------------------------------------------------------------


def test_a_waiting_future_can_be_cancelled_and_never_runs(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    directory = tmp_path / "marks"
    directory.mkdir()
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        held = [executor.submit(hold, gate) for _ in range(20)]
        future = executor.submit(leave_mark, directory, "ran")
        assert future.cancel()
        assert future.cancel()
        assert (future.running(), future.done(), future.cancelled()) == (False, True, True)
        assert "state=cancelled" in repr(future)
        with pytest.raises(CancelledError):
            future.result()
        with pytest.raises(CancelledError):
            future.exception()
        gate.open(count=20)
        wait(held)
    assert marks(directory) == set()


def test_a_running_or_finished_future_cannot_be_cancelled(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=1) as executor,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "release") as release,
    ):
        future = executor.submit(announce_and_hold, started, release, 5)
        started.wait()
        assert not future.cancel()
        release.open()
        assert future.result() == 5
        assert not future.cancel()
        assert not future.cancelled()


def test_cancelling_wakes_who_waits_for_the_result(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    caught: list[BaseException] = []
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        for _ in range(20):
            executor.submit(hold, gate)
        future = executor.submit(add, 1)

        def read() -> None:
            try:
                future.result(DEADLINE_S)
            except BaseException as error:  # whatever it is, the main thread looks at it
                caught.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert future.cancel()
        thread.join(DEADLINE_S)
    assert [type(error) for error in caught] == [CancelledError]


def test_cancelled_futures_count_as_completed(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        held = [executor.submit(hold, gate) for _ in range(20)]
        cancelled = [executor.submit(add, 1) for _ in range(3)]
        assert all(future.cancel() for future in cancelled)
        gate.open(count=20)
        done, not_done = wait(held + cancelled, timeout=DEADLINE_S)
        assert done == {*held, *cancelled}
        assert not not_done
        assert set(as_completed(held + cancelled, timeout=DEADLINE_S)) == done


def test_cancelling_in_a_race_with_running_leaves_each_future_in_one_state(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = {n: executor.submit(leave_mark, tmp_path, n) for n in range(300)}
        for future in reversed(futures.values()):
            future.cancel()
        wait(futures.values(), timeout=DEADLINE_S)
        ran = {str(n) for n, future in futures.items() if not future.cancelled()}
        assert all(future.result() == n for n, future in futures.items() if str(n) in ran)
    assert marks(tmp_path) == ran


# --- callbacks ---------------------------------------------------------------------------------


def test_callbacks_run_in_order_with_the_future_even_if_nobody_waits(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    calls: list[tuple[str, Any, int]] = []
    last_called = threading.Event()
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        future = executor.submit(hold, gate, 5)
        for name in "abc":
            future.add_done_callback(lambda f, name=name: calls.append((name, f, os.getpid())))
        future.add_done_callback(lambda f: last_called.set())
        gate.open()
        # Nobody asks for the result: the executor has to notice it by itself.
        assert last_called.wait(DEADLINE_S)
    assert calls == [(name, future, os.getpid()) for name in "abc"]


def test_a_callback_added_late_runs_at_once_in_the_calling_thread(
    executor_implementation: ExecutorClass,
) -> None:
    threads: list[threading.Thread] = []
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(add, 1)
        future.result()
        future.add_done_callback(lambda f: threads.append(threading.current_thread()))
        assert threads == [threading.current_thread()]


def test_a_callback_that_raises_is_logged_and_the_next_one_runs(
    executor_implementation: ExecutorClass, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called = threading.Event()
    with (
        caplog.at_level(logging.ERROR, logger="concurrent.futures"),
        executor_implementation(max_workers=1) as executor,
        Gate(tmp_path / "gate") as gate,
    ):
        future = executor.submit(hold, gate, 5)
        future.add_done_callback(operator.itemgetter("no such item"))
        future.add_done_callback(lambda f: called.set())
        gate.open()
        assert called.wait(DEADLINE_S)
        assert future.result() == 5
        assert executor.submit(add, 1, 2).result() == 3
    assert any(
        record.name == "concurrent.futures" and "exception calling callback for" in record.message
        for record in caplog.records
    )


def test_callbacks_see_the_outcome_of_failed_and_cancelled_futures(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    seen: list[Any] = []
    both_seen = threading.Barrier(2)

    def look(future: Future[Any]) -> None:
        seen.append("cancelled" if future.cancelled() else type(future.exception()))

    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        for _ in range(20):
            executor.submit(hold, gate)
        failing = executor.submit(raise_error, LookupError())
        waiting = executor.submit(add, 1)
        waiting.add_done_callback(look)
        assert waiting.cancel()
        assert seen == ["cancelled"]  # in the thread that cancels, before it goes on
        failing.add_done_callback(look)
        failing.add_done_callback(lambda f: both_seen.wait(DEADLINE_S))
        gate.open(count=20)
        both_seen.wait(DEADLINE_S)
    assert seen == ["cancelled", LookupError]


def test_a_callback_can_submit_and_a_long_chain_does_not_deepen_the_stack(
    executor_implementation: ExecutorClass,
) -> None:
    count = sys.getrecursionlimit() + 200
    finished = threading.Event()
    depths: list[int] = []

    def submit_next(future: Future[int]) -> None:
        frame, depth = sys._getframe(), 0
        while frame.f_back:
            frame, depth = frame.f_back, depth + 1
        depths.append(depth)
        if future.result() < count:
            executor.submit(add, future.result(), 1).add_done_callback(submit_next)
        else:
            finished.set()

    with executor_implementation(max_workers=2) as executor:
        executor.submit(add, 0).add_done_callback(submit_next)
        assert finished.wait(DEADLINE_S)
    assert len(depths) == count + 1
    assert max(depths) < 150


def test_a_callback_can_add_callbacks_and_read_other_futures(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    seen: list[Any] = []
    done = threading.Event()
    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        earlier = executor.submit(add, 1)
        later = executor.submit(hold, gate, 5)

        def look(future: Future[int]) -> None:
            future.add_done_callback(lambda f: seen.append(f.result() + earlier.result()))
            done.set()

        later.add_done_callback(look)
        gate.open()
        assert done.wait(DEADLINE_S)
    assert seen == [6]


def test_a_callback_can_shut_the_executor_down(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    called = threading.Event()

    def close(_: Future[Any]) -> None:
        executor.shutdown(wait=False)
        called.set()

    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        futures = [executor.submit(hold, gate, n) for n in range(5)]
        futures[0].add_done_callback(close)
        gate.open()
        assert called.wait(DEADLINE_S)
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(add, 1)
        gate.open(count=4)
        assert [future.result(DEADLINE_S) for future in futures] == [0, 1, 2, 3, 4]


# --- wait and as_completed ---------------------------------------------------------------------


def test_wait_for_the_first_answer(executor_implementation: ExecutorClass, tmp_path: Path) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        held, quick = executor.submit(hold, gate), executor.submit(add, 1)
        done, not_done = wait([held, quick], DEADLINE_S, return_when=FIRST_COMPLETED)
        assert (done, not_done) == ({quick}, {held})


def test_wait_for_the_first_error(executor_implementation: ExecutorClass, tmp_path: Path) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        held, quick = executor.submit(hold, gate), executor.submit(add, 1)
        quick.result()
        failing = executor.submit(raise_error, LookupError())
        done, not_done = wait([held, quick, failing], DEADLINE_S, return_when=FIRST_EXCEPTION)
        assert (done, not_done) == ({quick, failing}, {held})


def test_wait_for_the_first_error_waits_for_all_when_there_is_none(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = {executor.submit(add, n) for n in range(10)}
        done, not_done = wait(futures, DEADLINE_S, return_when=FIRST_EXCEPTION)
        assert (done, not_done) == (futures, set())


def test_wait_for_all_with_duplicates(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        good, bad = executor.submit(add, 1), executor.submit(raise_error, LookupError())
        done, not_done = wait([good, bad, good], return_when=ALL_COMPLETED)
        assert (done, not_done) == ({good, bad}, set())


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_wait_gives_up_at_the_timeout(
    executor_implementation: ExecutorClass, tmp_path: Path, timeout_s: float
) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        held, quick = executor.submit(hold, gate), executor.submit(add, 1)
        quick.result()
        done, not_done = wait([held, quick], timeout=timeout_s)
        assert (done, not_done) == ({quick}, {held})


def test_as_completed_yields_in_the_order_of_completion(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=2) as executor,
        Gate(tmp_path / "slow") as slow,
        Gate(tmp_path / "quick") as quick,
    ):
        futures = [executor.submit(hold, slow, "slow"), executor.submit(hold, quick, "quick")]
        completed = as_completed(futures, timeout=DEADLINE_S)
        quick.open()
        assert next(completed) is futures[1]
        slow.open()
        assert next(completed) is futures[0]
        with pytest.raises(StopIteration):
            next(completed)


def test_as_completed_tells_how_many_are_late(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with executor_implementation(max_workers=2) as executor, Gate(tmp_path / "gate") as gate:
        held, quick = executor.submit(hold, gate), executor.submit(add, 1)
        quick.result()
        completed = as_completed([held, quick, quick], timeout=0.05)
        assert next(completed) is quick
        with pytest.raises(FuturesTimeoutError, match=r"1 \(of 2\) futures unfinished"):
            next(completed)


def test_futures_of_several_executors_are_waited_for_together(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as one, executor_implementation(1) as other:
        futures = [executor.submit(add, n) for n in range(5) for executor in (one, other)]
        assert sorted(future.result() for future in as_completed(futures)) == sorted(
            [*range(5)] * 2
        )


# --- asyncio -----------------------------------------------------------------------------------


def test_futures_can_be_awaited(executor_implementation: ExecutorClass) -> None:
    async def main() -> list[Any]:
        wrapped = [asyncio.wrap_future(executor.submit(double, n)) for n in range(20)]
        return await asyncio.gather(*wrapped)

    with executor_implementation(max_workers=2) as executor:
        assert asyncio.run(main()) == list(range(0, 40, 2))


def test_an_event_loop_can_run_functions_in_the_executor(
    executor_implementation: ExecutorClass,
) -> None:
    async def main() -> tuple[int, int, str]:
        loop = asyncio.get_running_loop()
        total = await loop.run_in_executor(executor, add, 1, 2)
        partial = await loop.run_in_executor(executor, functools.partial(add, 1, b=3))
        try:
            await loop.run_in_executor(executor, raise_error, LookupError("remote"))
        except LookupError as error:
            return total, partial, str(error)
        raise AssertionError("the error did not arrive")

    with executor_implementation(max_workers=1) as executor:
        assert asyncio.run(main()) == (3, 4, "remote")


def test_the_event_loop_goes_on_while_a_task_runs(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    async def main() -> str:
        running = asyncio.wrap_future(executor.submit(hold, gate, "done"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(running), timeout=0.05)
        gate.open()
        return await asyncio.wait_for(running, DEADLINE_S)

    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        assert asyncio.run(main()) == "done"


def test_cancelling_the_awaiting_side_cancels_the_waiting_task(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    async def main() -> Future[int]:
        future = executor.submit(add, 1)
        wrapped = asyncio.wrap_future(future)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        return future

    with executor_implementation(max_workers=1) as executor, Gate(tmp_path / "gate") as gate:
        for _ in range(20):
            executor.submit(hold, gate)
        assert asyncio.run(main()).cancelled()
        gate.open(count=20)


def test_two_event_loops_in_two_threads_share_an_executor(
    executor_implementation: ExecutorClass,
) -> None:
    async def main(start: int) -> None:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, double, n) for n in range(start, start + 10)]
        answers[start] = await asyncio.gather(*calls)

    answers: dict[int, list[int]] = {}
    with executor_implementation(max_workers=2) as executor:
        threads = [threading.Thread(target=asyncio.run, args=(main(s),)) for s in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert answers == {s: list(range(2 * s, 2 * s + 20, 2)) for s in (0, 100)}


def test_an_interrupted_script_ends(executor_implementation: ExecutorClass, tmp_path: Path) -> None:
    """Ctrl-C while a result is awaited leaves a usable executor and lets the program end."""
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        import os, signal, threading
        from executor_support import Gate, hold

        if __name__ == "__main__":
            with Executor(max_workers=1) as executor, Gate("gate") as gate:
                slow = executor.submit(hold, gate, "slow")
                try:
                    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                    slow.result()
                except KeyboardInterrupt:
                    print("interrupted")
                gate.open()
                print(slow.result(), executor.submit(abs, -1).result())
        """,
    )
    assert (result.stdout, result.stderr) == ("interrupted\nslow 1\n", "")
    assert result.exit_code == 0
