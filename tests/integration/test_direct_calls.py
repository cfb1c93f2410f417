"""Calls that go straight from the caller's process to the actor's: nobody sees a difference."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest

import poolray
from poolray.cluster_utils import Cluster
from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    TaskCancelledError,
)
from poolray.local import process_state
from poolray.util import state
from tests.integration.direct_support import PLACES, direct_calls, open_way, runtime_at, way_to
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    Script,
    run_script,
    statistics,
    wait_until,
)

Gates: TypeAlias = tuple[Gate, Gate]


def await_cancellation() -> None:
    """In a call: until it is told that it is cancelled."""
    deadline = time.monotonic() + DEADLINE_S
    while not poolray.get_runtime_context().is_canceled():
        assert time.monotonic() < deadline, "nobody has told this call that it is cancelled"
        time.sleep(0.001)


@poolray.remote(num_cpus=0)
def hold(started: Gate) -> None:
    started.open()
    time.sleep(60)


@poolray.remote
class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, value: Any) -> int:
        self.seen.append(value if isinstance(value, int) else len(value))
        return len(self.seen)

    def all(self) -> list[Any]:
        return self.seen

    def echo(self, value: Any) -> Any:
        return value

    def zeros(self, size: int) -> Any:
        return np.zeros(size, np.uint8)

    def put(self, value: Any) -> list[Any]:
        return [poolray.put(value)]

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def wait(self, started: Gate, release: Gate) -> str:
        started.open()
        release.wait()
        return "released"

    def nested(self, other: Any, count: int) -> list[int]:
        return poolray.get([other.note.remote(number) for number in range(count)])

    def pid(self) -> int:
        return os.getpid()

    def fork(self) -> tuple[int, int]:
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return os.getpid(), child

    def sleep(self) -> None:
        time.sleep(60)

    def leave(self) -> None:
        poolray.actor.exit_actor()

    def write(self, path: str) -> None:
        Path(path).write_text("written")

    def task_id(self) -> str:
        return poolray.get_runtime_context().get_task_id()

    def submit(self, started: Gate) -> None:
        self.child = hold.remote(started)
        started.open()
        await_cancellation()

    def child_was_cancelled(self) -> bool:
        try:
            return bool(poolray.get(self.child, timeout=20))
        except TaskCancelledError:
            return True

    def cancelled(self, started: Gate) -> None:
        started.open()
        await_cancellation()


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[tuple[Gate, Gate]]:
    """One that says that a call has begun, one that lets it go on."""
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "release") as release:
        yield started, release


@pytest.fixture(params=PLACES)
def recorder(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An actor whose calls go straight: on this machine, and over TCP to a node of a cluster."""
    with runtime_at(request.param) as options:
        actor = Recorder.options(**options).remote()
        assert open_way(actor).is_sealed == (request.param != "one process")
        yield actor


# ---- order ---------------------------------------------------------------------------------------


def test_calls_begin_in_order_whichever_way_they_go(recorder: Any) -> None:
    slow = poolray.remote(lambda: time.sleep(0.05) or 7)
    expected: list[int] = []
    refs = []
    for number in range(300):
        if number % 50 == 10:  # the value comes late
            refs.append(recorder.note.remote(slow.remote()))
            expected.append(7)
        elif number % 50 == 20:  # too large to go straight
            refs.append(recorder.note.remote(b"x" * 200_000))
            expected.append(200_000)
        elif number % 50 == 30:
            poolray.get(refs[-1])  # what follows goes straight again
            assert way_to(recorder) is not None
        else:
            refs.append(recorder.note.remote(number))
            expected.append(number)
    assert poolray.get(refs) == list(range(1, len(expected) + 1))
    assert poolray.get(recorder.all.remote()) == expected


def test_a_burst_goes_in_packets_and_comes_back_in_order(recorder: Any) -> None:
    refs = [recorder.note.remote(number) for number in range(5_000)]
    assert poolray.get(refs[4_321]) == 4_322
    assert poolray.get(refs) == list(range(1, 5_001))
    assert poolray.get(recorder.all.remote()) == list(range(5_000))


def test_results_do_not_wait_for_a_long_call_behind_them(recorder: Any, gates: Gates) -> None:
    poolray.get([recorder.note.remote(number) for number in range(500)])  # calls are short so far
    started, release = gates
    short = [recorder.note.remote(number) for number in range(20)]
    long = recorder.wait.remote(started, release)
    behind = recorder.note.remote(1)
    try:
        assert poolray.get(short, timeout=20) == list(range(501, 521))
        started.wait()
        with pytest.raises(GetTimeoutError):
            poolray.get([long, behind], timeout=0.05)
    finally:
        release.open()
    assert poolray.get([long, behind]) == ["released", 521]


# ---- values --------------------------------------------------------------------------------------


def test_large_results_and_results_with_refs_inside_come_as_well(recorder: Any) -> None:
    for size in (10, 1_000_000, 10):
        assert way_to(recorder) is not None or open_way(recorder)
        assert len(poolray.get(recorder.zeros.remote(size))) == size
    open_way(recorder)
    (inner,) = poolray.get(recorder.put.remote("deep"))
    assert poolray.get(inner) == "deep"


def test_keyword_arguments_none_and_errors(recorder: Any) -> None:
    assert poolray.get(recorder.echo.remote(value=(1, "two"))) == (1, "two")
    assert poolray.get(recorder.echo.remote(None)) is None
    good, bad, after = recorder.note.remote(1), recorder.fail.remote("no"), recorder.note.remote(2)
    with pytest.raises(ValueError, match="no"):
        poolray.get([good, bad, after])
    assert poolray.get([good, after]) == [1, 2]
    large = recorder.fail.remote("x" * 300_000)
    with pytest.raises(ValueError, match="xxx"):
        poolray.get(large)


def test_refs_may_go_anywhere_before_their_values_are_here_and_after(
    recorder: Any, gates: Gates
) -> None:
    length = poolray.remote(lambda value, inner: (value, poolray.get(inner[0])))
    started, release = gates
    held = recorder.wait.remote(started, release)
    pending, other = recorder.note.remote(5), recorder.note.remote(6)
    first = length.remote(pending, [other])
    release.open()
    assert poolray.get(first) == (1, 2)
    assert poolray.get(length.remote(held, [pending])) == ("released", 1)
    failed = recorder.fail.remote("no")
    with pytest.raises(ValueError, match="no"):
        poolray.get(length.remote(failed, [pending]))
    assert poolray.get(recorder.echo.remote([pending, 1]))[1] == 1


def test_wait_with_direct_refs_alone_and_among_others(recorder: Any, gates: Gates) -> None:
    started, release = gates
    done, long = recorder.note.remote(1), recorder.wait.remote(started, release)
    assert poolray.wait([long, done], timeout=20) == ([done], [long])
    assert poolray.wait([long], timeout=0) == ([], [long])
    put = poolray.put(3)
    ready, rest = poolray.wait([long, done, put], num_returns=2, timeout=20)
    assert (ready, rest) == ([done, put], [long])
    assert poolray.wait([long, put], num_returns=2, timeout=0.05)[1] == [long]
    release.open()
    assert poolray.wait([long, put], num_returns=2, timeout=20)[1] == []
    assert poolray.get([long, put, done]) == ["released", 3, 1]


def test_futures_and_awaits(recorder: Any) -> None:
    async def both() -> list[Any]:
        return list(await asyncio.gather(*[recorder.note.remote(n) for n in range(5)]))

    assert recorder.echo.remote("future").future().result(20) == "future"
    assert asyncio.run(both()) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="no"):
        recorder.fail.remote("no").future().result(20)


def test_nested_calls_from_a_direct_call(recorder: Any) -> None:
    other = Recorder.remote()
    assert poolray.get(recorder.nested.remote(other, 40)) == list(range(1, 41))
    assert poolray.get([recorder.nested.remote(other, 1) for _ in range(5)]) == [
        [number] for number in range(41, 46)
    ]
    ids = poolray.get([recorder.task_id.remote() for _ in range(10)])
    assert len(set(ids)) == 10


# ---- cancelling ----------------------------------------------------------------------------------


def test_calls_that_wait_are_cancelled_and_never_run(recorder: Any, gates: Gates) -> None:
    poolray.get([recorder.note.remote(number) for number in range(300)])
    started, release = gates
    long = recorder.wait.remote(started, release)
    started.wait()
    waiting = [recorder.note.remote(-number) for number in range(100)]
    for ref in (waiting[0], waiting[1], waiting[99]):
        poolray.cancel(ref)
    release.open()
    assert poolray.get(long) == "released"
    for index, ref in enumerate(waiting):
        if index in (0, 1, 99):
            with pytest.raises(TaskCancelledError):
                poolray.get(ref)
        else:
            poolray.get(ref)
    seen = poolray.get(recorder.all.remote())
    assert seen[300:] == [-number for number in range(100) if number not in (0, 1, 99)]


def test_a_call_that_runs_learns_that_it_is_cancelled(recorder: Any, gates: Gates) -> None:
    started, _ = gates
    running = recorder.cancelled.remote(started)
    started.wait()
    poolray.cancel(running)
    with pytest.raises(TaskCancelledError):
        poolray.get(running)
    assert poolray.get(recorder.echo.remote(1)) == 1


def test_what_a_call_has_submitted_is_cancelled_with_it(recorder: Any, gates: Gates) -> None:
    started, _ = gates
    parent = recorder.submit.remote(started)
    started.wait()
    started.wait()
    poolray.cancel(parent)
    with pytest.raises(TaskCancelledError):
        poolray.get(parent)
    assert poolray.get(recorder.child_was_cancelled.remote())


def test_cancelling_hundreds_of_calls_does_not_wait_for_a_worker_that_does_not_read(
    recorder: Any,
) -> None:
    poolray.get([recorder.note.remote(number) for number in range(1_000)])
    pid = poolray.get(recorder.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        refs = [recorder.note.remote(number) for number in range(2_000)]

        def cancel() -> None:
            for _ in range(3):
                for ref in refs:
                    poolray.cancel(ref)

        thread = threading.Thread(target=cancel)
        thread.start()
        thread.join(30)
        waits = thread.is_alive()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not waits
    ended = 0
    for ref in refs:
        try:
            poolray.get(ref, timeout=20)
        except TaskCancelledError:
            ended += 1
    assert ended >= 1_000
    assert poolray.get(recorder.echo.remote(1)) == 1


def test_ctrl_c_between_the_making_of_a_call_and_its_sending_leaves_nothing_waiting(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants_flush = Connection.wants_flush

    def strike(self: Connection) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wants_flush(self)  # (who reads may send something just then)

    pending = direct_calls().pending
    for follow in (lambda: recorder.echo.remote(b"x" * 100_000), lambda: None):
        open_way(recorder)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "wants_flush", strike)
            with pytest.raises(KeyboardInterrupt):
                recorder.note.remote(1)
        other = follow()  # by way of the node, behind the call that was not sent
        if other is not None:
            assert len(poolray.get(other, timeout=20)) == 100_000
        wait_until(lambda: not pending, "the end of the call")
    assert poolray.get(recorder.all.remote()) == [1, 1]


# ---- ends ----------------------------------------------------------------------------------------


def test_no_call_reaches_an_actor_after_its_kill(recorder: Any) -> None:
    poolray.kill(recorder)
    with pytest.raises(ActorDiedError):
        poolray.get(recorder.echo.remote(1))


def test_a_crash_ends_what_may_have_run_and_says_why(recorder: Any, gates: Gates) -> None:
    started, release = gates
    pid = poolray.get(recorder.pid.remote())
    running = recorder.wait.remote(started, release)
    behind = [recorder.note.remote(number) for number in range(10)]
    started.wait()
    os.kill(pid, signal.SIGKILL)
    for ref in (running, *behind):
        with pytest.raises(ActorDiedError):
            poolray.get(ref, timeout=20)
    with pytest.raises(ActorDiedError):
        poolray.get(recorder.note.remote(1))


def test_a_process_that_an_actor_has_forked_does_not_hide_its_death(recorder: Any) -> None:
    pid, child = poolray.get(recorder.fork.remote())
    try:
        running = recorder.sleep.remote()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorDiedError):
            poolray.get(running, timeout=20)
    finally:
        os.kill(child, signal.SIGKILL)


def test_exit_actor_ends_the_call_that_runs_and_those_behind(recorder: Any) -> None:
    leaving, behind = recorder.leave.remote(), recorder.note.remote(1)
    for ref in (leaving, behind):
        with pytest.raises(ActorDiedError, match="exit_actor"):
            poolray.get(ref, timeout=20)


def test_an_actor_that_is_made_again_gets_a_way_of_its_own(gates: Gates) -> None:
    poolray.init(num_cpus=2)
    actor = Recorder.options(max_restarts=1).remote()
    old = open_way(actor)
    started, release = gates
    pid = poolray.get(actor.pid.remote())
    running = actor.wait.remote(started, release)
    started.wait()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((ActorUnavailableError, ActorDiedError)):
        poolray.get(running, timeout=20)

    def is_back() -> bool:
        try:
            return poolray.get(actor.pid.remote()) != pid
        except ActorUnavailableError:
            return False

    wait_until(is_back, "the actor")
    assert open_way(actor) is not old
    assert poolray.get(actor.note.remote(1)) == 1


def test_calls_keep_their_order_when_the_way_to_the_actor_is_cut(
    recorder: Any, monkeypatch: pytest.MonkeyPatch, gates: Gates
) -> None:
    decide = DirectCalls._decide_lost

    def decide_late(self: DirectCalls, *arguments: Any) -> None:
        time.sleep(0.3)  # the main thread makes calls meanwhile
        decide(self, *arguments)

    monkeypatch.setattr(DirectCalls, "_decide_lost", decide_late)
    started, release = gates
    way = way_to(recorder)
    assert way is not None
    running = recorder.wait.remote(started, release)
    started.wait()
    refs = [recorder.note.remote(number) for number in range(300)]
    way.channel.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: way_to(recorder) is None, "the loss of the way")
    refs += [recorder.note.remote(number) for number in range(300, 310)]
    release.open()
    with pytest.raises(ActorUnavailableError):
        poolray.get(running, timeout=20)
    for ref in refs[:-10]:
        with contextlib.suppress(ActorUnavailableError):
            poolray.get(ref, timeout=20)
    poolray.get(refs[-10:], timeout=20)
    seen = poolray.get(recorder.all.remote())
    assert seen == sorted(seen)
    assert seen[-200:] == list(range(110, 310))


def test_calls_that_a_stopped_caller_has_not_sent_keep_nobody_waiting(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        poolray.init(address=cluster.address, namespace="tests")
        actor = Recorder.options(name="recorder").remote()
        poolray.get(actor.pid.remote())
        body = f"""
            from tests.integration.direct_support import open_way
            poolray.init(address={cluster.address!r}, namespace="tests", log_to_driver=False)
            actor = poolray.get_actor("recorder")
            way = open_way(actor)
            started, release = (Gate(os.path.abspath(name)) for name in ("started", "release"))
            with started, release:
                running = actor.wait.remote(started, release)
                started.wait()
                refs = [actor.note.remote(number) for number in range(300)]
                assert way.outbox
                refs.append(actor.note.remote(b"x" * 200_000))  # by way of the nodes
                refs += [actor.note.remote(number) for number in range(300, 310)]
                os.kill(os.getpid(), signal.SIGSTOP)
                assert poolray.get(running, timeout=20) == "released"
                assert poolray.get(refs, timeout=20) == list(range(1, 312))
            assert poolray.get(actor.all.remote()) == [*range(300), 200_000, *range(300, 310)]
            open_way(actor)
            print("in order")
        """
        environment = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
        with (
            Gate(tmp_path / "release") as release,
            Script(tmp_path / "script.py", body, environment=environment) as script,
        ):
            caller = psutil.Process(script.pid)
            wait_until(lambda: caller.status() == psutil.STATUS_STOPPED, "the caller is stopped")
            release.open()
            assert poolray.get(actor.echo.remote(7), timeout=20) == 7
            script.signal(signal.SIGCONT)
            assert script.finish().lines() == ["in order"]
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_calls_of_several_threads_keep_their_order_whichever_way_they_go(recorder: Any) -> None:
    failures: list[BaseException] = []

    def call(first: int) -> None:
        try:
            for number in range(first, first + 2_000):
                recorder.note.remote(number)
                if number % 40 == 0:
                    poolray.get(recorder.echo.remote(b"x" * 40_000))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(first * 10_000,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    seen = poolray.get(recorder.all.remote(), timeout=20)
    assert len(seen) == 6_000
    for first in range(3):
        own = [number for number in seen if number // 10_000 == first]
        assert own == sorted(own)


def test_of_two_calls_made_at_once_neither_is_taken_for_the_last(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"x" * 40_000
    was_sent, goes_on = threading.Event(), threading.Event()
    after_other_call = DirectCalls.after_other_call
    refs: list[Any] = []

    def linger(direct: DirectCalls, *args: Any) -> None:
        if threading.current_thread() is other:
            was_sent.set()
            goes_on.wait()
        after_other_call(direct, *args)

    monkeypatch.setattr(DirectCalls, "after_other_call", linger)
    other = threading.Thread(target=lambda: refs.append(recorder.echo.remote(large)))
    other.start()
    was_sent.wait()
    second = recorder.note.remote(large)
    goes_on.set()
    other.join()
    poolray.get(refs)
    assert way_to(recorder) is None  # the second one may wait still
    third = recorder.note.remote(3)
    assert poolray.get([third, second]) == [2, 1]
    assert way_to(recorder) is not None


def test_wait_does_not_take_calls_for_ended_that_were_given_to_the_node_meanwhile(
    recorder: Any, gates: Gates
) -> None:
    started, release = gates
    running = recorder.wait.remote(started, release)
    started.wait()
    refs = [recorder.note.remote(number) for number in range(300)]
    other = threading.Thread(target=lambda: recorder.note.remote(b"x" * 200_000))
    way = way_to(recorder)
    assert way is not None
    timer = threading.Timer(0.1, other.start)  # while the others are waited for
    timer.start()
    ready, _ = poolray.wait(refs, num_returns=300, timeout=1.0)
    assert not ready
    assert not way.outbox
    release.open()
    assert poolray.get([running, *refs], timeout=20) == ["released", *range(1, 301)]
    other.join()


def test_calls_go_on_when_another_thread_closes_the_way_behind_them(
    recorder: Any, gates: Gates
) -> None:
    started, release = gates
    way = way_to(recorder)
    assert way is not None
    recorder.wait.remote(started, release)
    started.wait()
    refs = [recorder.note.remote(number) for number in range(300)]
    assert way.outbox
    client = process_state.client()
    assert client is not None
    assert client.direct is not None
    # (As when that thread has looked for calls under way just before the first of these was made.)
    route = client.direct.begin_other_call(recorder._actor_id)
    client.direct.after_other_call(route, poolray.put("unread")._id)
    refs.append(recorder.wait.remote(started, release))
    release.open()
    started.wait()
    ready, unready = poolray.wait(refs, num_returns=len(refs), timeout=0.5)
    assert (len(ready), unready) == (300, refs[-1:])
    release.open()
    assert poolray.get(refs, timeout=20) == [*range(1, 301), "released"]


def test_calls_of_a_handle_that_died_still_run(recorder: Any, tmp_path: Path, gates: Gates) -> None:
    actor = Recorder.remote()
    open_way(actor)
    started, release = gates
    actor.wait.remote(started, release)
    actor.write.remote(str(tmp_path / "file"))
    del actor
    gc.collect()
    started.wait()
    release.open()
    wait_until((tmp_path / "file").exists, "the call behind")


def test_actors_without_handles_end_and_take_their_connections_along() -> None:
    poolray.init(num_cpus=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        actor = Recorder.remote()
        open_way(actor)
        del actor
        gc.collect()
    wait_until(lambda: statistics().actors == 0, "the end of the actors")
    calls = direct_calls()
    calls._client.sync_references()  # type: ignore[attr-defined]
    assert not calls.routes
    assert not calls.unknown
    assert not calls.pending
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 8, "closed descriptors")


def test_a_killed_driver_leaves_a_detached_actor_unharmed(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        script = f"""
            import os, signal, poolray
            poolray.init(address={cluster.address!r}, namespace="here")

            @poolray.remote
            class Counter:
                def __init__(self):
                    self.value = 0
                def add(self):
                    self.value += 1
                    return self.value

            counter = Counter.options(name="counter", lifetime="detached").remote()
            for _ in range(200):
                poolray.get(counter.add.remote())
            refs = [counter.add.remote() for _ in range(100)]
            poolray.get(refs)
            os.kill(os.getpid(), signal.SIGKILL)
        """
        token = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
        run_script(tmp_path / "script.py", script, environment=token)
        poolray.init(address=cluster.address, namespace="here")
        counter = poolray.get_actor("counter")
        assert poolray.get([counter.add.remote() for _ in range(100)])[-1] == 400
        assert [poolray.get(counter.add.remote()) for _ in range(50)][-1] == 450
    finally:
        poolray.shutdown()
        cluster.shutdown()


# ---- looking on ----------------------------------------------------------------------------------


def test_direct_calls_are_listed_with_their_errors_and_drawn(recorder: Any) -> None:
    poolray.get([recorder.note.remote(number) for number in range(30)])
    with pytest.raises(ValueError, match="no"):
        poolray.get(recorder.fail.remote("no"))

    def rows(name: str) -> list[Any]:
        return [row for row in state.list_tasks(limit=1000) if row.name == f"Recorder.{name}"]

    wait_until(lambda: len(rows("note")) == 30 and len(rows("fail")) == 1, "the calls' rows")
    assert {row.state for row in rows("note")} == {"FINISHED"}
    assert rows("fail")[0].state == "FAILED"
    assert rows("note")[0].actor_id == recorder._actor_id.hex()
    events = [event for event in poolray.timeline() if event["name"] == "Recorder.note"]
    assert len(events) == 30


def test_an_error_that_nobody_has_read_is_shown(tmp_path: Path) -> None:
    found = run_script(
        tmp_path / "script.py",
        """
        import poolray
        poolray.init(num_cpus=2)

        @poolray.remote
        class Failing:
            def ping(self):
                return 1
            def fail(self):
                raise ValueError("nobody looked")

        actor = Failing.remote()
        for _ in range(100):
            poolray.get(actor.ping.remote())
        actor.fail.remote()
        poolray.get(actor.ping.remote())
        """,
    )
    assert "nobody looked" in found.stderr


def test_our_own_calls_that_fail_with_an_actor_are_not_shown(tmp_path: Path) -> None:
    found = run_script(
        tmp_path / "script.py",
        """
        import os, signal, time, poolray
        from poolray.exceptions import ActorDiedError
        poolray.init(num_cpus=2)

        @poolray.remote
        class Sleeper:
            def pid(self):
                return os.getpid()
            def sleep(self, seconds):
                time.sleep(seconds)

        actor = Sleeper.remote()
        for _ in range(60):
            pid = poolray.get(actor.pid.remote())
        refs = [actor.sleep.remote(60), actor.pid.remote(), actor.sleep.remote(poolray.put(1))]
        os.kill(pid, signal.SIGKILL)
        for ref in refs:
            try:
                poolray.get(ref)
            except ActorDiedError:
                pass
        """,
    )
    assert "Unhandled" not in found.stderr


def test_actors_on_other_nodes_of_this_machine_are_called_over_a_socket_of_its_own() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={"far": 1})
        poolray.init(address=cluster.address)
        actor = Recorder.options(resources={"far": 0.1}).remote()
        assert not open_way(actor).is_sealed
        assert poolray.get([actor.note.remote(n) for n in range(100)]) == list(range(1, 101))
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLRAY_direct_calls_after", "0")
    poolray.init(num_cpus=2)
    actor = Recorder.remote()
    assert [poolray.get(actor.note.remote(n)) for n in range(50)] == list(range(1, 51))
    client = process_state.client()
    assert client is not None
    assert client.direct is None
