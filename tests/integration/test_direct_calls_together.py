"""Calls that go straight to an actor that runs several at once: nobody sees a difference."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import poolray
from poolray.cluster_utils import Cluster
from poolray.direct.calls import DirectCalls
from poolray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    TaskCancelledError,
)
from poolray.local.direct_lines import AHEAD_MAX
from poolray.util import state
from tests.integration.direct_support import PLACES, direct_calls, open_way, runtime_at, way_to
from tests.integration.support import Gate, run_script, statistics, wait_until

Gates: TypeAlias = tuple[Gate, Gate]
#: Calls that the actors here run at once.
TOGETHER = 4


@poolray.remote(num_cpus=0)
def hold(started: Gate) -> None:
    started.open()
    signal.pause()


@poolray.remote(num_cpus=0)
def echo_late(value: Any, gate: Gate) -> Any:
    gate.wait()
    return value


@poolray.remote(max_concurrency=TOGETHER)
class Coroutines:
    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.running = self.most = self.cancelled = 0
        self.seen: list[Any] = []

    async def pid(self) -> int:
        return os.getpid()

    async def echo(self, value: Any) -> Any:
        return value

    async def note(self, value: Any) -> None:
        self.seen.append(value)

    async def all(self) -> list[Any]:
        return self.seen

    async def wait(self) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.event.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return "released"

    async def wait_with(self, value: Any) -> str:
        return await self.wait()

    async def release(self) -> None:
        self.event.set()

    async def counts(self) -> tuple[int, int, int]:
        return self.running, self.most, self.cancelled

    async def zeros(self, size: int) -> Any:
        return np.zeros(size, np.uint8)

    async def put(self, value: Any) -> list[Any]:
        return [poolray.put(value)]

    async def fail(self, text: str) -> None:
        raise ValueError(text)

    async def leave(self) -> None:
        poolray.actor.exit_actor()

    async def write(self, path: str) -> None:
        await self.event.wait()
        Path(path).write_text("written")

    async def task(self) -> tuple[str, str]:
        context = poolray.get_runtime_context()
        await asyncio.sleep(0)
        return context.get_task_id(), context.get_task_name()

    async def add_up(self, refs: list[Any]) -> int:
        return sum(await asyncio.gather(*refs))

    async def submit(self, started: Gate) -> None:
        self.child = hold.remote(started)
        await self.event.wait()

    async def child_was_cancelled(self) -> bool:
        try:
            return bool(await self.child)
        except TaskCancelledError:
            return True

    async def count_to(self, number: int) -> Any:
        for each in range(number):
            yield each

    def fork(self) -> tuple[int, int]:
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return os.getpid(), child


@poolray.remote(max_concurrency=TOGETHER)
class Threads:
    def __init__(self) -> None:
        self.event = threading.Event()
        self.lock = threading.Lock()
        self.running = self.most = self.cancelled = 0
        self.seen: list[Any] = []

    def pid(self) -> int:
        return os.getpid()

    def echo(self, value: Any) -> Any:
        return value

    def note(self, value: Any) -> None:
        self.seen.append(value)

    def all(self) -> list[Any]:
        return self.seen

    def wait(self) -> str:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        while not self.event.wait(0.001):
            if poolray.get_runtime_context().is_canceled():
                self.cancelled += 1
                break
        with self.lock:
            self.running -= 1
        return "released"

    def wait_with(self, value: Any) -> str:
        return self.wait()

    def release(self) -> None:
        self.event.set()

    def counts(self) -> tuple[int, int, int]:
        return self.running, self.most, self.cancelled

    def zeros(self, size: int) -> Any:
        return np.zeros(size, np.uint8)

    def put(self, value: Any) -> list[Any]:
        return [poolray.put(value)]

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def leave(self) -> None:
        poolray.actor.exit_actor()

    def write(self, path: str) -> None:
        self.event.wait()
        Path(path).write_text("written")

    def task(self) -> tuple[str, str]:
        context = poolray.get_runtime_context()
        return context.get_task_id(), context.get_task_name()

    def add_up(self, refs: list[Any]) -> int:
        return sum(poolray.get(refs))

    def submit(self, started: Gate) -> None:
        self.child = hold.remote(started)
        self.wait()

    def child_was_cancelled(self) -> bool:
        try:
            return bool(poolray.get(self.child, timeout=20))
        except TaskCancelledError:
            return True

    def count_to(self, number: int) -> Any:
        yield from range(number)

    def fork(self) -> tuple[int, int]:
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return os.getpid(), child


KINDS = {"coroutines": Coroutines, "threads": Threads}


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[tuple[Gate, Gate]]:
    """One that says that a call has begun, one that lets it go on."""
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "release") as release:
        yield started, release


@pytest.fixture(params=[(kind, place) for kind in KINDS for place in PLACES], ids=", ".join)
def actor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An actor that runs calls at once, whose calls go straight."""
    kind, place = request.param
    with runtime_at(place) as options:
        made = KINDS[kind].options(**options).remote()
        assert open_way(made).is_sealed == (place != "one process")
        yield made


def await_running(actor: Any, count: int) -> None:
    """Until so many calls of `wait` have begun."""
    wait_until(lambda: poolray.get(actor.counts.remote())[0] == count, "the calls' beginning")


# ---- side by side --------------------------------------------------------------------------------


def test_a_burst_goes_in_packets_and_every_call_gets_its_own_result(actor: Any) -> None:
    way = way_to(actor)
    refs = [actor.echo.remote(number) for number in range(5_000)]
    assert poolray.get(refs[4_321]) == 4_321
    assert poolray.get(refs) == list(range(5_000))
    assert way is way_to(actor)
    assert way._sequence < 2_500


@pytest.mark.parametrize("kind", KINDS)
def test_a_way_that_opens_in_the_middle_of_a_burst_stays_in_use(kind: str) -> None:
    poolray.init(num_cpus=2)
    actor = KINDS[kind].remote()
    refs = [actor.echo.remote(number) for number in range(50)]
    wait_until(lambda: way_to(actor) is not None, "a direct way to the actor")
    refs += [actor.echo.remote(number) for number in range(50, 500)]
    assert all(ref._id in direct_calls().unknown for ref in refs[50:])
    assert poolray.get(refs) == list(range(500))
    assert way_to(actor) is not None


def test_calls_run_beside_others_that_came_before_whichever_way(actor: Any, gates: Gates) -> None:
    late = echo_late.remote(1, gates[1])
    straight = actor.wait.remote()
    by_node = actor.wait_with.remote(poolray.put(1))
    held_back = actor.echo.remote(late)  # its argument comes later than all others are over
    await_running(actor, 2)
    assert way_to(actor) is not None
    assert poolray.get([actor.echo.remote(n) for n in range(100)]) == list(range(100))
    poolray.get(actor.release.remote())
    assert poolray.get([straight, by_node]) == ["released", "released"]
    gates[1].open()
    assert poolray.get(held_back) == 1


def test_calls_of_both_ways_count_together(actor: Any) -> None:
    put = poolray.put(1)
    refs = [actor.wait.remote(), actor.wait.remote(), actor.wait_with.remote(put)]
    await_running(actor, 3)
    refs += [actor.wait.remote(), actor.wait_with.remote(put), actor.wait.remote()]
    with pytest.raises(poolray.exceptions.GetTimeoutError):  # there is no room for it
        poolray.get(actor.echo.remote(1), timeout=0.2)
    poolray.kill(actor)
    for ref in refs:
        with pytest.raises(ActorDiedError):
            poolray.get(ref)


def test_a_caller_sends_no_more_than_an_actor_is_to_keep(actor: Any) -> None:
    poolray.get([actor.echo.remote(number) for number in range(1_000)])
    way = way_to(actor)
    running = [actor.wait.remote() for _ in range(TOGETHER - 1)]
    await_running(actor, TOGETHER - 1)
    last = actor.wait.remote()
    waiting = [actor.echo.remote(number) for number in range(4_000)]
    release = actor.release.options(name="last").remote()
    wait_until(lambda: len(way.sent) > AHEAD_MAX, "the packets that are taken")
    assert poolray.wait(waiting, timeout=0.2)[0] == []
    assert len(way.sent) < 2 * AHEAD_MAX + 2 * 256
    poolray.cancel(last)
    with pytest.raises(TaskCancelledError):
        poolray.get(last)
    assert poolray.get(waiting) == list(range(4_000))
    poolray.get(release)
    assert poolray.get(running) == ["released"] * (TOGETHER - 1)


def test_results_do_not_wait_for_a_long_call_behind_them(actor: Any) -> None:
    poolray.get([actor.echo.remote(number) for number in range(1_000)])
    waits = [actor.wait.remote() for _ in range(TOGETHER - 1)]
    await_running(actor, TOGETHER - 1)
    short = [actor.echo.remote(number) for number in range(200)]
    waits.append(actor.wait.remote())
    behind = [actor.echo.remote(number) for number in range(10)]
    assert poolray.get(short, timeout=20) == list(range(200))
    assert poolray.wait(behind, timeout=0.05)[0] == []
    poolray.cancel(waits[0])
    assert poolray.get(behind, timeout=20) == list(range(10))


# ---- values --------------------------------------------------------------------------------------


def test_large_results_and_results_with_refs_inside_come_as_well(actor: Any) -> None:
    for size in (10, 1_000_000, 10):
        assert len(poolray.get(actor.zeros.remote(size))) == size
    assert way_to(actor) is not None
    (inner,) = poolray.get(actor.put.remote("deep"))
    assert poolray.get(inner) == "deep"
    # (The next ones of these methods go by way of the node.)
    assert len(poolray.get(actor.zeros.remote(1_000_000))) == 1_000_000


def test_a_large_result_is_brought_while_other_calls_take_every_place(actor: Any) -> None:
    refs = [actor.wait.remote() for _ in range(TOGETHER - 1)]
    await_running(actor, TOGETHER - 1)
    large = actor.zeros.remote(1_000_000)
    refs.append(actor.wait.remote())
    assert len(poolray.get(large, timeout=20)) == 1_000_000
    poolray.cancel(refs.pop())
    poolray.get(actor.release.remote())
    assert poolray.get(refs) == ["released"] * (TOGETHER - 1)


def test_what_is_asked_for_by_way_of_the_node_waits_for_no_calls_there(
    actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    fetch = DirectCalls.fetch_held
    monkeypatch.setattr(DirectCalls, "fetch_held", lambda self, *found: held.append(found))
    large = actor.zeros.remote(1_000_000)
    wait_until(lambda: bool(held), "the word of a large result")
    put = poolray.put(1)
    refs = [actor.wait_with.remote(put) for _ in range(10 * TOGETHER)]  # more than the node sends
    calls = direct_calls()
    link = calls._client.link
    link.enter()
    try:
        fetch(calls, *held[0])
    finally:
        link.leave()
    assert len(poolray.get(large, timeout=20)) == 1_000_000
    for ref in refs:
        poolray.cancel(ref)


def test_errors_small_and_large(actor: Any) -> None:
    good, bad, after = actor.echo.remote(1), actor.fail.remote("no"), actor.echo.remote(None)
    with pytest.raises(ValueError, match="no"):
        poolray.get([good, bad, after])
    assert poolray.get([good, after]) == [1, None]
    with pytest.raises(ValueError, match="xxx"):
        poolray.get(actor.fail.remote("x" * 300_000))


def test_refs_go_anywhere_before_their_values_are_here(actor: Any) -> None:
    pair = poolray.remote(lambda value, inner: (value, poolray.get(inner[0])))
    held, other = actor.wait.remote(), actor.echo.remote(2)
    found = pair.remote(held, [other])
    assert poolray.wait([held], timeout=0) == ([], [held])
    poolray.get(actor.release.remote())
    assert poolray.get(found, timeout=20) == ("released", 2)
    assert poolray.get(actor.add_up.remote([actor.echo.remote(n) for n in range(5)])) == 10


def test_awaits_in_the_driver(actor: Any) -> None:
    async def all_of_them() -> list[Any]:
        return list(await asyncio.gather(*[actor.echo.remote(n) for n in range(5)]))

    assert asyncio.run(all_of_them()) == [0, 1, 2, 3, 4]


def test_every_call_has_its_own_context(actor: Any) -> None:
    found = poolray.get([actor.task.remote() for _ in range(50)])
    assert len({task_id for task_id, _ in found}) == 50
    assert {name.partition(".")[2] for _, name in found} == {"task"}
    ref = actor.task.remote()
    assert poolray.get(ref)[0] == ref.task_id().hex()


# ---- cancelling ----------------------------------------------------------------------------------


def test_calls_that_wait_for_a_place_are_cancelled_and_never_run(actor: Any) -> None:
    running = [actor.wait.remote() for _ in range(TOGETHER - 1)]
    await_running(actor, TOGETHER - 1)
    last = actor.wait.remote()
    poolray.wait([actor.echo.remote(1)], timeout=0.05)
    waiting = [actor.note.remote(number) for number in range(3_000)]
    # The first are in the actor, the last have not been sent.
    for index in (0, 1, 2_999):
        poolray.cancel(waiting[index])
        with pytest.raises(TaskCancelledError):
            poolray.get(waiting[index])
    poolray.cancel(last)
    with pytest.raises(TaskCancelledError):
        poolray.get(last)
    poolray.get(waiting[2:-1])
    assert sorted(poolray.get(actor.all.remote())) == list(range(2, 2_999))
    poolray.get(actor.release.remote())
    assert poolray.get(running) == ["released"] * (TOGETHER - 1)


def test_a_call_that_runs_is_cancelled(actor: Any) -> None:
    refs = [actor.wait.remote() for _ in range(2)]
    await_running(actor, 2)
    poolray.cancel(refs[0])
    with pytest.raises(TaskCancelledError):
        poolray.get(refs[0])
    assert poolray.get(actor.counts.remote()) == (1, 2, 1)
    poolray.cancel(refs[0])  # it is over
    poolray.get(actor.release.remote())
    assert poolray.get(refs[1]) == "released"


def test_what_a_call_has_submitted_is_cancelled_with_it(actor: Any, gates: Gates) -> None:
    started, _ = gates
    other, parent = actor.wait.remote(), actor.submit.remote(started)
    started.wait()
    poolray.cancel(parent)
    with pytest.raises(TaskCancelledError):
        poolray.get(parent)
    assert poolray.get(actor.child_was_cancelled.remote(), timeout=20)
    poolray.get(actor.release.remote())
    assert poolray.get(other) == "released"


def test_cancelling_hundreds_of_calls_does_not_wait_for_a_worker_that_does_not_read(
    actor: Any,
) -> None:
    poolray.get([actor.echo.remote(number) for number in range(1_000)])
    pid = poolray.get(actor.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        refs = [actor.echo.remote(number) for number in range(2_000)]

        def cancel() -> None:
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
    assert poolray.get(actor.echo.remote(1)) == 1


# ---- ends ----------------------------------------------------------------------------------------


def test_no_call_reaches_an_actor_after_its_kill(actor: Any) -> None:
    poolray.kill(actor)
    with pytest.raises(ActorDiedError):
        poolray.get(actor.echo.remote(1))


def test_a_crash_ends_what_runs_and_what_waits_and_says_why(actor: Any) -> None:
    pid = poolray.get(actor.pid.remote())
    refs = [actor.wait.remote() for _ in range(TOGETHER - 1)]
    await_running(actor, TOGETHER - 1)
    refs += [actor.wait.remote() for _ in range(1_000)]
    os.kill(pid, signal.SIGKILL)
    for ref in refs[:10] + refs[-10:]:
        with pytest.raises(ActorDiedError):
            poolray.get(ref, timeout=20)
    with pytest.raises(ActorDiedError):
        poolray.get(actor.echo.remote(1))


def test_a_process_that_an_actor_has_forked_does_not_hide_its_death(actor: Any) -> None:
    pid, child = poolray.get(actor.fork.remote())
    try:
        running = actor.wait.remote()
        assert poolray.get(actor.echo.remote(1)) == 1
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorDiedError):
            poolray.get(running, timeout=20)
    finally:
        os.kill(child, signal.SIGKILL)


def test_exit_actor_ends_the_calls_that_run_and_keeps_results_of_those_that_have(
    actor: Any,
) -> None:
    running = actor.wait.remote()
    await_running(actor, 1)
    ended = [actor.echo.remote(number) for number in range(20)]
    if "Threads" in repr(actor):  # one of them may leave while others are still at these
        assert len(poolray.wait(ended, num_returns=len(ended), timeout=20)[0]) == len(ended)
    leaving = actor.leave.remote()
    for ref in (running, leaving):
        with pytest.raises(ActorDiedError, match="exit_actor"):
            poolray.get(ref, timeout=20)
    assert poolray.get(ended) == list(range(20))


def test_calls_that_were_under_way_when_the_way_was_cut_fail_and_later_ones_run(
    actor: Any,
) -> None:
    refs = [actor.wait.remote() for _ in range(2)]
    await_running(actor, 2)
    way = way_to(actor)
    assert way is not None
    way.channel.shutdown(socket.SHUT_RDWR)
    for ref in refs:
        with pytest.raises(ActorUnavailableError):
            poolray.get(ref, timeout=20)
    assert poolray.get(actor.echo.remote(1)) == 1
    assert open_way(actor) is not way
    poolray.get(actor.release.remote())
    assert poolray.get([actor.echo.remote(number) for number in range(500)]) == list(range(500))


@pytest.mark.parametrize("kind", KINDS)
def test_an_actor_that_is_made_again_gets_a_way_of_its_own(kind: str) -> None:
    poolray.init(num_cpus=2)
    actor = KINDS[kind].options(max_restarts=1).remote()
    old = open_way(actor)
    pid = poolray.get(actor.pid.remote())
    running = actor.wait.remote()
    await_running(actor, 1)
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
    assert poolray.get(actor.echo.remote(1)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_a_handle_that_died_still_run_and_then_all_is_let_go_of(
    kind: str, tmp_path: Path
) -> None:
    poolray.init(num_cpus=2)
    before = len(os.listdir("/proc/self/fd"))
    actor = KINDS[kind].remote()
    open_way(actor)
    actor.write.remote(str(tmp_path / "file"))
    actor.release.remote()
    del actor
    gc.collect()
    wait_until((tmp_path / "file").exists, "the call that waited")
    wait_until(lambda: statistics().actors == 0, "the end of the actor")
    calls = direct_calls()
    calls._client.sync_references()  # type: ignore[attr-defined]
    assert not calls.routes
    assert not calls.unknown
    assert not calls.pending
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 8, "closed descriptors")


# ---- callers -------------------------------------------------------------------------------------


def test_two_drivers_call_different_methods_and_neither_holds_the_other_up(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        other = f"""
            import os, signal, poolray
            poolray.init(address={cluster.address!r}, namespace="here")
            actor = poolray.get_actor("both")
            for number in range(200):
                assert poolray.get(actor.double.remote(number)) == 2 * number
            refs = [actor.text.remote("x" * 10_000) for _ in range(20_000)]
            print(os.getpid(), flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)  # what comes for it is not read
        """

        class Both:
            async def pid(self) -> int:
                return os.getpid()

            async def double(self, value: int) -> int:
                return 2 * value

            async def text(self, value: str) -> str:
                return value

        poolray.init(address=cluster.address, namespace="here")
        actor = poolray.remote(Both).options(name="both").remote()
        open_way(actor)
        token = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
        found: list[Any] = []

        def run_other() -> None:
            found.append(run_script(tmp_path / "script.py", other, environment=token))

        thread = threading.Thread(target=run_other)
        thread.start()
        names = [poolray.get(actor.text.remote("a")) for _ in range(500)]
        assert set(names) == {"a"}
        assert way_to(actor) is not None
        pids = stopped_children()
        assert poolray.get([actor.double.remote(n) for n in range(500)]) == list(range(0, 1000, 2))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        thread.join(30)
        assert poolray.get([actor.double.remote(n) for n in range(500)]) == list(range(0, 1000, 2))
    finally:
        poolray.shutdown()
        cluster.shutdown()


def stopped_children() -> list[int]:
    """Processes of this one that are stopped, once there are any."""
    import psutil

    def stopped() -> list[int]:
        children = psutil.Process().children(recursive=True)
        return [each.pid for each in children if each.status() == psutil.STATUS_STOPPED]

    wait_until(lambda: bool(stopped()), "the other driver's stop")
    return stopped()


# ---- the rest ------------------------------------------------------------------------------------


def test_generators_stay_with_the_node(actor: Any) -> None:
    found = [poolray.get(ref) for ref in actor.count_to.options(num_returns="streaming").remote(5)]
    assert found == [0, 1, 2, 3, 4]
    assert way_to(actor) is not None


def test_ended_calls_are_listed_with_their_errors(actor: Any) -> None:
    poolray.get([actor.note.remote(number) for number in range(30)])
    with pytest.raises(ValueError, match="no"):
        poolray.get(actor.fail.remote("no"))

    def rows(name: str) -> list[Any]:
        listed = state.list_tasks(limit=1000)
        return [row for row in listed if row.name.partition(".")[2] == name]

    wait_until(lambda: len(rows("note")) == 30 and len(rows("fail")) == 1, "the calls' rows")
    assert {row.state for row in rows("note")} == {"FINISHED"}
    assert rows("fail")[0].state == "FAILED"
    assert rows("note")[0].actor_id == actor._actor_id.hex()


def test_groups_have_their_own_limits_whichever_way_calls_come() -> None:
    class Groups:
        def __init__(self) -> None:
            self.names: list[str] = []

        async def pid(self) -> int:
            return os.getpid()

        @poolray.method(concurrency_group="io")
        async def wait(self, gate: Gate) -> str:
            self.names.append(threading.current_thread().name)
            await asyncio.to_thread(gate.wait)
            return threading.current_thread().name

        async def begun(self) -> int:
            return len(self.names)

    poolray.init(num_cpus=2)
    groups: Any = poolray.remote(concurrency_groups={"io": 2})(Groups)
    actor = groups.remote()
    open_way(actor)
    with Gate(Path(os.environ.get("TMPDIR", "/tmp")) / f"gate-{os.getpid()}") as gate:
        refs = [actor.wait.remote(gate) for _ in range(4)]
        assert all(ref._id in direct_calls().pending for ref in refs)
        wait_until(lambda: poolray.get(actor.begun.remote()) == 2, "the beginning of two")
        assert poolray.get([actor.begun.remote() for _ in range(300)]) == [2] * 300
        for _ in range(4):
            gate.open()
        assert set(poolray.get(refs)) == {"poolray-actor-io"}


@pytest.mark.parametrize("kind", ["coroutines", "threads"])
def test_calls_of_one_group_do_not_wait_for_many_of_another(kind: str) -> None:
    class Waits:
        def __init__(self) -> None:
            self.event = threading.Event()

        def pid(self) -> int:
            return os.getpid()

        @poolray.method(concurrency_group="work")
        def wait(self) -> None:
            self.event.wait()

        @poolray.method(concurrency_group="orders")
        def begin(self) -> bool:
            return self.event.is_set()

        @poolray.method(concurrency_group="orders")
        def release(self) -> None:
            self.event.set()

    class WaitsInLoops(Waits):
        @poolray.method(concurrency_group="work")
        async def wait(self) -> None:  # type: ignore[override]
            await asyncio.to_thread(self.event.wait)

    poolray.init(num_cpus=2)
    groups = poolray.remote(concurrency_groups={"work": 1, "orders": 1})
    actor: Any = groups(Waits if kind == "threads" else WaitsInLoops).remote()
    open_way(actor)
    waiting = [actor.wait.remote() for _ in range(4 * AHEAD_MAX)]
    for _ in range(10):
        assert poolray.get(actor.begin.remote(), timeout=20) is False
    actor.release.remote()
    assert poolray.get(waiting, timeout=20) == [None] * len(waiting)
