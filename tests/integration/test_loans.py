"""Tasks that go straight to a worker on loan: nobody sees a difference."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.cluster_utils import Cluster
from poolray.direct.addresses import make_door
from poolray.direct.ends import End
from poolray.direct.loans import Loan, Loans
from poolray.exceptions import (
    ClusterConnectionError,
    GetTimeoutError,
    StateApiError,
    TaskCancelledError,
    WorkerCrashedError,
)
from poolray.local import process_state
from poolray.util import state
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    Script,
    is_alive,
    kill,
    leave_mark,
    marks,
    wait_until,
)


def loans() -> Loans:
    client = process_state.client()
    assert client is not None
    assert client.direct is not None
    assert client.direct.loans is not None
    return client.direct.loans


def loan_of(function: Any) -> Loan | None:
    """How calls of a function go."""
    prepared = function._prepared or function._function._prepared
    return None if prepared is None else loans()._loans.get(prepared[1].class_id)


def is_lent(function: Any) -> bool:
    """Whether the next call goes to a worker on loan, which is there."""
    loan = loan_of(function)
    return loan is not None and loan.usable() is not None


def borrow(function: Any, *args: Any) -> None:
    """Call a function until a worker is on loan for it."""

    def has_loan() -> bool:
        poolray.get(function.remote(*args))
        return is_lent(function)

    wait_until(has_loan, "a worker on loan")


def on_loan(function: Any, quick: tuple[Any, ...], *args: Any) -> Any:
    """The ref of a call that a worker on loan runs; with the arguments `quick` it is short."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        borrow(function, *quick)
        ref = function.remote(*args)
        client = process_state.client()
        assert client is not None
        assert client.direct is not None
        if ref._id in client.direct.unknown:  # (else the loan had just ended)
            return ref
        poolray.cancel(ref, force=True)
    raise AssertionError("no call goes to a worker on loan")


@pytest.fixture(params=["near", "far, sealed"])
def far(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Options of tasks that run on the other node of a cluster of two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=2, resources={"far": 2})
        poolray.init(address=cluster.address)
        if request.param != "near":
            loans()._reads.machine = "another machine"
        yield {"resources": {"far": 0.1}}
    finally:
        poolray.shutdown()
        cluster.shutdown()


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """A cluster of one node with one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        poolray.init(address=cluster.address)
        yield
    finally:
        poolray.shutdown()
        cluster.shutdown()


def echo(value: Any = None, name: str = "") -> Any:
    return (value, name) if name else value


# ---- values --------------------------------------------------------------------------------------


def test_calls_go_straight_and_give_what_they_give(far: dict[str, Any]) -> None:
    function = poolray.remote(**far)(echo)
    borrow(function)
    assert [poolray.get(function.remote(number)) for number in range(2_000)] == list(range(2_000))
    loan = loan_of(function)
    assert loan is not None
    assert poolray.get(function.remote(1, name="one")) == (1, "one")
    assert poolray.get(function.remote(None)) is None
    assert poolray.get(function.remote(name="x", value=[1, {"two": 2}])) == ([1, {"two": 2}], "x")


def test_a_loan_ends_with_its_use(far: dict[str, Any]) -> None:
    total = poolray.cluster_resources()
    function = poolray.remote(**far)(echo)
    borrow(function)
    wait_until(lambda: poolray.available_resources() == total, "resources given back")
    wait_until(lambda: not is_lent(function), "the end of the loan")
    assert poolray.get(function.remote(5)) == 5


def sockets_of(pid: int) -> int:
    """How many sockets a process has."""
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count


def test_the_way_to_the_driver_ends_with_the_loan(far: dict[str, Any]) -> None:
    function = poolray.remote(**far)(lambda: (os.getpid(), sockets_of(os.getpid())))
    pid, count = poolray.get(on_loan(function, ()))
    wait_until(lambda: sockets_of(pid) == count - 1, "the end of the way")


def test_errors_are_those_of_the_function(far: dict[str, Any]) -> None:
    def check(number: int) -> int:
        if number < 0:
            raise ValueError(f"{number} is negative", "x" * -number)
        return number

    function = poolray.remote(**far)(check)
    for size in (1, 200_000):
        ref = on_loan(function, (1,), -size)
        with pytest.raises(ValueError, match="is negative") as raised:
            poolray.get(ref)
        assert "check()" in str(raised.value)
    assert poolray.get(function.remote(3)) == 3


def test_large_results_and_results_with_refs_inside_come_as_well(far: dict[str, Any]) -> None:
    zeros = poolray.remote(**far)(lambda size: np.zeros(size, np.uint8))
    large = on_loan(zeros, (1,), 3_000_000)
    assert poolray.wait([large], timeout=20) == ([large], [])
    assert poolray.get(large).sum() == 0
    assert len(poolray.get(zeros.remote(3_000_001))) == 3_000_001
    wrap = poolray.remote(**far)(lambda value: [poolray.put(value)] if value else None)
    ref = on_loan(wrap, (0,), "deep")
    length = poolray.remote(lambda inner: len(poolray.get(inner[0])))
    assert poolray.get(length.remote(ref)) == 4
    (inner,) = poolray.get(ref)
    assert poolray.get(inner) == "deep"
    del ref
    assert poolray.get(inner) == "deep"


def test_refs_go_anywhere_before_their_values_are_here_and_after(
    far: dict[str, Any], tmp_path: Path
) -> None:
    def hold(started: Gate | None, release: Gate | None) -> int:
        if started is not None and release is not None:
            started.open()
            release.wait()
        return 7

    function, plus = poolray.remote(**far)(hold), poolray.remote(lambda x, y: x + y)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "release") as release:
        running = on_loan(function, (None, None), started, release)
        started.wait()
        added = plus.remote(running, 1)
        assert poolray.wait([running], timeout=0.05) == ([], [running])
        with pytest.raises(GetTimeoutError):
            poolray.get(running, timeout=0.05)
        release.open()
        assert poolray.get(added) == 8
        assert poolray.get(running) == 7
    done = on_loan(function, (None, None), None, None)

    async def awaited() -> int:
        return int(await done)

    assert asyncio.run(awaited()) == 7
    assert poolray.get(plus.remote(done, done)) == 14


# ---- others --------------------------------------------------------------------------------------


def test_nothing_waits_behind_a_call_on_loan(far: dict[str, Any], tmp_path: Path) -> None:
    """The second call runs beside the first, which waits for it."""

    def meet(mine: Gate | None, other: Gate | None) -> None:
        if mine is not None and other is not None:
            mine.open()
            other.wait()

    function = poolray.remote(**far)(meet)
    with Gate(tmp_path / "one") as one, Gate(tmp_path / "two") as two:
        first = on_loan(function, (None, None), one, two)
        poolray.get([first, function.remote(two, one)], timeout=DEADLINE_S)


def test_a_call_that_waits_for_another_one_gives_its_cpu(one_cpu: None) -> None:
    inner = poolray.remote(lambda x: x + 1)
    outer = poolray.remote(lambda x: poolray.get(inner.remote(x)))
    borrow(outer, 1)
    assert [poolray.get(outer.remote(n), timeout=DEADLINE_S) for n in range(100)] == list(
        range(1, 101)
    )


def test_others_get_their_turn(one_cpu: None) -> None:
    """There is one CPU, and it is never idle."""
    function, other = poolray.remote(echo), poolray.remote(lambda x: 2 * x)
    borrow(function)
    ends = threading.Event()
    served: list[int] = []

    def call() -> None:
        while not ends.is_set():
            served.append(poolray.get(function.remote(1)))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for number in range(5):
            assert poolray.get(other.remote(number), timeout=DEADLINE_S) == 2 * number
        actor = poolray.remote(num_cpus=1)(type("Actor", (), {"f": lambda self: 5})).remote()
        assert poolray.get(actor.f.remote(), timeout=DEADLINE_S) == 5
    finally:
        del actor
        ends.set()
        thread.join()
    assert served


def test_threads_call_at_once(far: dict[str, Any]) -> None:
    function = poolray.remote(**far)(echo)
    found: dict[int, list[int]] = {}

    def call(thread: int) -> None:
        found[thread] = [poolray.get(function.remote((thread, n)))[1] for n in range(300)]

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {thread: list(range(300)) for thread in range(4)}


def test_several_functions_at_once(far: dict[str, Any]) -> None:
    functions = [poolray.remote(**far)(lambda x, k=k: k * x) for k in range(4)]
    for number in range(200):
        for k, function in enumerate(functions):
            assert poolray.get(function.remote(number)) == k * number


# ---- who looks on --------------------------------------------------------------------------------


def test_calls_know_who_they_are_and_are_listed(far: dict[str, Any]) -> None:
    def tell(stop: bool = False) -> tuple[str, str, dict[str, float], str]:
        if stop:
            raise RuntimeError("listed")
        context = poolray.get_runtime_context()
        resources = context.get_assigned_resources()
        return context.get_task_id(), context.get_node_id(), resources, context.get_task_name()

    function = poolray.remote(**far)(tell)
    borrow(function)
    known: dict[str, None] = {}
    for _ in range(50):
        ref = on_loan(function, (), False)
        task_id, node_id, resources, name = poolray.get(ref)
        assert task_id == ref.task_id().hex()
        known[task_id] = None
        assert node_id != poolray.get_runtime_context().get_node_id()
        assert (resources, name) == ({"CPU": 1.0, "far": 0.1}, "tell")
    failed = on_loan(function, (), True)
    with pytest.raises(RuntimeError):
        poolray.get(failed)

    def rows() -> dict[str, Any]:
        found = state.list_tasks(filters=[("name", "=", "tell")], limit=10_000, detail=True)
        return {row.task_id: row for row in found}

    wait_until(lambda: known.keys() | {failed.task_id().hex()} <= rows().keys(), "all in a list")
    listed = rows()
    assert {listed[task_id].node_id for task_id in known} == {node_id}
    assert {listed[task_id].state for task_id in known} == {"FINISHED"}
    row = listed[failed.task_id().hex()]
    assert (row.state, row.error_type, row.type) == (
        "FAILED",
        "TASK_EXECUTION_EXCEPTION",
        "NORMAL_TASK",
    )
    assert not state.list_tasks(filters=[("name", "!=", "tell")])


def test_what_a_call_prints_is_found_by_its_id(far: dict[str, Any]) -> None:
    function = poolray.remote(**far)(lambda number: print(f"this is {number}"))
    refs = [on_loan(function, (-1,), number) for number in range(3)]
    poolray.get(refs)

    def text_of(ref: Any) -> str:
        try:
            return "".join(state.get_log(task_id=ref.task_id().hex()))
        except StateApiError:
            return ""

    for number, ref in enumerate(refs):
        wait_until(lambda ref=ref: bool(text_of(ref)), "what a task has printed")
        assert text_of(ref) == f"this is {number}\n"


# ---- cancelling ----------------------------------------------------------------------------------


def test_a_call_that_runs_is_cancelled(far: dict[str, Any], tmp_path: Path) -> None:
    function = poolray.remote(**far)(sleep_after)
    with Gate(tmp_path / "started") as started:
        ref = on_loan(function, (None,), started)
        started.wait()
        poolray.cancel(ref)
        with pytest.raises(TaskCancelledError):
            poolray.get(ref, timeout=DEADLINE_S)
    assert poolray.get(function.remote(None)) == 0
    borrow(function, None)


@pytest.mark.parametrize("force", [False, True])
def test_an_order_that_is_signalled_before_it_can_be_read_is_found(
    far: dict[str, Any], tmp_path: Path, force: bool
) -> None:
    """As the system signals urgent data."""

    def look_away(started: Gate | None) -> None:
        if started is None:
            return
        read = End.read

        def find_nothing(self: End, all_of_it: bool = False) -> list[bytes]:
            End.read = read  # type: ignore[method-assign]
            return []

        if loans_are_far:
            End.read = find_nothing  # type: ignore[method-assign]
        started.open()
        time.sleep(60)

    loans_are_far = loans()._reads.machine == "another machine"
    function = poolray.remote(**far)(look_away)
    with Gate(tmp_path / "started") as started:
        ref = on_loan(function, (None,), started)
        started.wait()
        poolray.cancel(ref, force=force)
        with pytest.raises(TaskCancelledError):
            poolray.get(ref, timeout=DEADLINE_S)
    borrow(function, None)


def test_a_call_is_cancelled_by_force(far: dict[str, Any], tmp_path: Path) -> None:
    def ignore(folder: Path | None) -> None:
        if folder is None:
            return
        leave_mark(folder, "begun")
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    function = poolray.remote(**far)(ignore)
    ref = on_loan(function, (None,), tmp_path)
    wait_until(lambda: len(marks(tmp_path, "begun")) == 1, "the call has begun")
    (pid,) = marks(tmp_path, "begun")
    poolray.cancel(ref, force=True)
    with pytest.raises(TaskCancelledError):
        poolray.get(ref, timeout=DEADLINE_S)
    wait_until(lambda: not is_alive(pid), "the end of the process")
    borrow(function, None)
    assert marks(tmp_path, "begun") == [pid]


def test_a_call_that_was_cancelled_is_not_tried_again(far: dict[str, Any], tmp_path: Path) -> None:
    """Its worker dies of the order."""

    def die_of_it(folder: Path | None) -> str:
        if folder is not None:
            leave_mark(folder, "begun")
            if len(marks(folder, "begun")) == 1:
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    os._exit(1)
        return "done"

    function = poolray.remote(**far)(die_of_it)
    ref = on_loan(function, (None,), tmp_path)
    wait_until(lambda: len(marks(tmp_path, "begun")) == 1, "the call has begun")
    poolray.cancel(ref)
    with pytest.raises(TaskCancelledError):
        poolray.get(ref, timeout=DEADLINE_S)
    assert poolray.get(function.remote(None)) == "done"
    assert len(marks(tmp_path, "begun")) == 1


def test_what_a_call_has_submitted_is_cancelled_with_it(
    far: dict[str, Any], tmp_path: Path
) -> None:
    child = poolray.remote(num_cpus=0)(sleep_after)

    def submit(started: Gate | None) -> None:
        if started is not None:
            poolray.get(child.remote(started))

    function = poolray.remote(**far)(submit)
    with Gate(tmp_path / "started") as started:
        ref = on_loan(function, (None,), started)
        started.wait()
        (pid,) = {
            row.worker_pid for row in state.list_tasks(filters=[("name", "=", "sleep_after")])
        }
        poolray.cancel(ref, recursive=True)
        with pytest.raises(TaskCancelledError):
            poolray.get(ref, timeout=DEADLINE_S)

    def child_has_failed() -> bool:
        rows = state.list_tasks(filters=[("name", "=", "sleep_after")])
        return [row.state for row in rows] == ["FAILED"]

    assert pid
    wait_until(child_has_failed, "the end of the child")


def sleep_after(started: Gate | None) -> int:
    if started is not None:
        started.open()
        time.sleep(60)
    return 0


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_call_whose_worker_dies_is_tried_again(
    far: dict[str, Any], tmp_path: Path, deaths: int
) -> None:
    def die_first(folder: Path | None) -> str:
        if folder is not None:
            leave_mark(folder, "run")
            if len(marks(folder, "run")) <= deaths:
                os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    function = poolray.remote(max_retries=1, **far)(die_first)
    ref = on_loan(function, (None,), tmp_path)
    if deaths == 1:
        assert poolray.get(ref, timeout=DEADLINE_S) == "done"
    else:
        with pytest.raises(WorkerCrashedError):
            poolray.get(ref, timeout=DEADLINE_S)
    assert len(marks(tmp_path, "run")) == 2
    assert poolray.get(function.remote(None)) == "done"


def test_a_worker_that_dies_is_missed_though_its_forked_child_lives(
    far: dict[str, Any], tmp_path: Path
) -> None:
    def fork_and_die(folder: Path | None) -> str:
        if folder is not None and not marks(folder, "child"):
            if os.fork() == 0:
                leave_mark(folder, "child")
                while True:
                    signal.pause()
            while not marks(folder, "child"):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    function = poolray.remote(**far)(fork_and_die)
    try:
        ref = on_loan(function, (None,), tmp_path)
        assert poolray.get(ref, timeout=DEADLINE_S) == "done"
        assert [is_alive(pid) for pid in marks(tmp_path, "child")] == [True]
    finally:
        for pid in marks(tmp_path, "child"):
            kill(pid)


def test_a_stopped_driver_whose_worker_could_not_tell_it_all_goes_on(tmp_path: Path) -> None:
    """What a worker on loan has to say is more than its channel takes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    body = f"""
        from tests.integration.test_loans import on_loan

        def fail(started, release):
            if started is not None:
                started.open()
                release.wait()
                raise ValueError("x" * 2_000_000)

        poolray.init(address={cluster.address!r})
        gates = Gate({str(tmp_path / "started")!r}), Gate({str(tmp_path / "release")!r})
        ref = on_loan(poolray.remote(fail), (None, None), *gates)
        try:
            poolray.get(ref, timeout=DEADLINE_S)
        except ValueError as error:
            print("failed", len(str(error)) > 2_000_000)
        poolray.shutdown()
    """
    try:
        poolray.init(address=cluster.address)
        total = poolray.cluster_resources()
        environment = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
        with (
            Gate(tmp_path / "started") as started,
            Gate(tmp_path / "release") as release,
            Script(tmp_path / "driver.py", body, environment=environment) as driver,
        ):
            started.wait()
            os.kill(driver.pid, signal.SIGSTOP)
            release.open(count=2)
            wait_until(lambda: poolray.available_resources() == total, "the end of the loan")
            os.kill(driver.pid, signal.SIGCONT)
            result = driver.finish()
        assert result.lines() == ["failed True"]
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_a_worker_that_finds_no_way_once_is_not_the_end_of_loans(
    far: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, other = poolray.remote(**far)(echo), poolray.remote(**far)(lambda x: x)
    borrow(function)
    tried: list[str] = []

    def lead_astray(*args: Any) -> Any:
        gone, door = make_door(*args), make_door(*args)
        assert gone is not None
        assert door is not None
        gone[0].close()
        tried.append("a door")
        return door[0], gone[1]

    monkeypatch.setattr("poolray.direct.loans.make_door", lead_astray)

    def has_tried() -> bool:
        assert poolray.get(other.remote(1), timeout=DEADLINE_S) == 1
        return bool(tried)

    wait_until(has_tried, "a loan asked for in vain")
    monkeypatch.undo()
    borrow(function)


def test_a_promised_result_comes_from_another_attempt(far: dict[str, Any], tmp_path: Path) -> None:
    def die_first(started: Gate | None, release: Gate | None, folder: Path | None) -> int:
        if started is not None and release is not None and folder is not None:
            leave_mark(folder, "run")
            started.open()
            release.wait()
            if len(marks(folder, "run")) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return 20

    function, plus = poolray.remote(**far)(die_first), poolray.remote(lambda x: x + 1)
    with Gate(tmp_path / "started") as started, Gate(tmp_path / "release") as release:
        ref = on_loan(function, (None, None, None), started, release, tmp_path)
        added = plus.remote(ref)
        started.wait()
        release.open(2)
        assert poolray.get(added, timeout=DEADLINE_S) == 21
    assert poolray.get(ref) == 20


def test_calls_go_on_when_workers_are_killed_again_and_again(far: dict[str, Any]) -> None:
    function = poolray.remote(max_retries=-1, **far)(lambda x: (x, os.getpid()))
    ends = threading.Event()
    pids: list[int] = []

    def kill() -> None:
        while not ends.wait(0.05):
            if pids:
                try:
                    os.kill(pids[-1], signal.SIGKILL)
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        deadline = time.monotonic() + 3
        number = 0
        while time.monotonic() < deadline:
            value, pid = poolray.get(function.remote(number), timeout=DEADLINE_S)
            assert value == number
            pids.append(pid)
            number += 1
    finally:
        ends.set()
        thread.join()
    assert len(set(pids)) > 5


def test_a_dead_node_takes_its_loans_along() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        poolray.init(address=cluster.address)
        where = poolray.remote(lambda: poolray.get_runtime_context().get_node_id())
        borrow(where)
        first = poolray.get(where.remote())
        cluster.remove_node(
            next(node for node in nodes if node.node_id == first), allow_graceful=False
        )

        def is_elsewhere() -> bool:  # (its processes may take a moment to die)
            return bool(poolray.get(where.remote(), timeout=DEADLINE_S) != first)

        wait_until(is_elsewhere, "calls on the other node")
        assert first not in {poolray.get(where.remote()) for _ in range(50)}
        borrow(where)
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_calls_that_run_fail_with_the_drivers_own_node(tmp_path: Path) -> None:
    """Of an actor, of a worker on loan, and one whose result others wait for."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        poolray.init(address=cluster.address)
        sleep = poolray.remote(sleep_after)
        actor = poolray.remote(num_cpus=1)(type("Actor", (), {"sleep": staticmethod(sleep_after)}))
        handle = actor.remote()
        for _ in range(50):
            poolray.get(handle.sleep.remote(None))
        with Gate(tmp_path / "started") as started:
            running = [on_loan(sleep, (None,), started), handle.sleep.remote(started)]
            for _ in running:
                started.wait()
            poolray.remote(lambda x: x).remote(running[1])
            cluster.head_node.kill()
            for ref in running:
                with pytest.raises(ClusterConnectionError):
                    poolray.get(ref, timeout=DEADLINE_S)
            with pytest.raises(ClusterConnectionError):
                poolray.get(handle.sleep.remote(None), timeout=DEADLINE_S)
            with pytest.raises(ClusterConnectionError):
                poolray.get(sleep.remote(None), timeout=DEADLINE_S)
    finally:
        poolray.shutdown()
        cluster.shutdown()
