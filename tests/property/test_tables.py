"""The tables of moves, pair by pair, and sums that must come out even."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolray.config import Config
from poolray.exceptions import IllegalTransition
from poolray.ids import ClassId, ClientId, FunctionId, GroupId, TaskId, WorkerId
from poolray.node.workers import Group, WorkerRecord, WorkerState
from poolray.objects.directory import ObjectRecord, ObjectState
from poolray.protocol.values import TaskClass
from poolray.scheduling.resources import UNIT, ResourceAccount, to_fixed
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import MOVES, TaskRecord, TaskState

T, W = TaskState, WorkerState

TASK_MOVES = {
    (T.WAITING, T.QUEUED),
    (T.WAITING, T.FORWARDED),
    (T.WAITING, T.FAILED),
    (T.QUEUED, T.RUNNING),
    (T.QUEUED, T.FORWARDED),
    (T.QUEUED, T.FAILED),
    (T.RUNNING, T.SUCCEEDED),
    (T.RUNNING, T.FAILED),
    (T.RUNNING, T.QUEUED),
    (T.RUNNING, T.DELAYED),
    (T.FORWARDED, T.SUCCEEDED),
    (T.FORWARDED, T.FAILED),
    (T.FORWARDED, T.QUEUED),
    (T.FORWARDED, T.WAITING),
    (T.FORWARDED, T.DELAYED),
    (T.DELAYED, T.QUEUED),
    (T.DELAYED, T.WAITING),
    (T.DELAYED, T.FAILED),
    (T.SUCCEEDED, T.WAITING),
}

WORKER_MOVES = {
    (W.STARTING, W.IDLE),
    (W.STARTING, W.STOPPING),
    (W.IDLE, W.BUSY),
    (W.IDLE, W.STOPPING),
    (W.BUSY, W.IDLE),
    (W.BUSY, W.BLOCKED),
    (W.BUSY, W.STOPPING),
    (W.BLOCKED, W.BUSY),
    (W.BLOCKED, W.STOPPING),
    (W.BUSY, W.ACTOR),
    (W.BLOCKED, W.ACTOR),
    (W.ACTOR, W.STOPPING),
}


def task_class() -> TaskClass:
    return TaskClass(class_id=ClassId(b"c"), function_id=FunctionId(b"f"), name="f")


def make_task(calls: int = 1) -> TaskRecord:
    return TaskRecord(
        TaskId(b"t" * 24),
        TaskId(b"t" * 24),
        ClientId(b"c"),
        ClassQueue(task_class()),
        [b"%d" % index for index in range(calls)],
        0,
        0,
    )


@pytest.mark.parametrize(("before", "after"), [*itertools.product(TaskState, TaskState)])
def test_a_task_makes_the_moves_of_its_table_and_no_others(
    before: TaskState, after: TaskState
) -> None:
    task = make_task()
    task.state = before
    if (before, after) in TASK_MOVES:
        task.move(after)
        assert task.state is after
    else:
        with pytest.raises(IllegalTransition, match=before.name):
            task.move(after)
        assert task.state is before


@pytest.mark.parametrize(("before", "after"), [*itertools.product(WorkerState, WorkerState)])
def test_a_worker_makes_the_moves_of_its_table_and_no_others(
    before: WorkerState, after: WorkerState
) -> None:
    group = Group(GroupId(0), 0, False, 0, False)
    worker = WorkerRecord(WorkerId(b"w"), group, 0)
    group.starting = 1
    paths = {
        W.STARTING: [],
        W.IDLE: [W.IDLE],
        W.BUSY: [W.IDLE, W.BUSY],
        W.BLOCKED: [W.IDLE, W.BUSY, W.BLOCKED],
        W.ACTOR: [W.IDLE, W.BUSY, W.ACTOR],
        W.STOPPING: [W.STOPPING],
    }
    for state in paths[before]:
        worker.move(state)
    if (before, after) in WORKER_MOVES:
        worker.move(after)
        assert worker.state is after
    else:
        with pytest.raises(IllegalTransition, match=before.name):
            worker.move(after)
    assert (worker.worker_id in group.idle) == (worker.state is W.IDLE)
    assert group.starting == (worker.state is W.STARTING)
    assert group.leaving == (worker.state is W.STOPPING)


def test_each_task_state_has_its_row() -> None:
    assert set(MOVES) == set(TaskState)


def test_an_object_is_sealed_once_and_lost_only_when_ready() -> None:
    record = ObjectRecord()
    with pytest.raises(IllegalTransition):
        record.lose()
    record.seal(b"value", False, [])
    with pytest.raises(IllegalTransition):
        record.seal(b"value", False, [])
    record.lose()
    assert record.state is ObjectState.PENDING


@given(calls=st.integers(2, 300), cuts=st.lists(st.integers(1, 299), max_size=5))
def test_parts_of_a_task_are_all_of_it_in_order(calls: int, cuts: list[int]) -> None:
    parts = [make_task(calls)]
    for cut in sorted(set(cuts)):
        last = parts[-1]
        if last.offset < cut < calls:
            parts.append(last.cut(cut, TaskId(b"p%d" % cut)))
    together = [call for part in parts for call in part.calls]
    assert together == [b"%d" % index for index in range(calls)]
    assert [part.offset for part in parts] == [
        sum(len(earlier.calls) for earlier in parts[:index]) for index in range(len(parts))
    ]


NAMES = ["CPU", "GPU", "memory"]
demands = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 30_000), max_size=3)


@given(steps=st.lists(st.tuples(st.sampled_from(["acquire", "anyway", "release"]), demands)))
def test_resources_are_never_lost_nor_made(steps: list[tuple[str, dict[str, int]]]) -> None:
    account = ResourceAccount({"CPU": 4 * UNIT, "GPU": UNIT, "memory": 12_345})
    held: list[dict[str, int]] = []
    for action, demand in steps:
        fits = all(account.available.get(name, 0) >= amount for name, amount in demand.items())
        assert account.fits_now(demand) == fits
        assert account.fits_times(demand, 1) == fits
        if action == "acquire":
            assert account.acquire(demand) == fits
            if fits:
                held.append(demand)
        elif action == "anyway":
            account.acquire_anyway(demand)
            held.append(demand)
        elif held:
            account.release(held.pop(len(held) // 2))
        total: dict[str, int] = {}
        for part in held:
            for name, amount in part.items():
                total[name] = total.get(name, 0) + amount
        account.check_invariants(total)
        assert account.is_overdrawn({"CPU": 0}) == (account.available["CPU"] < 0)
    for demand in held:
        account.release(demand)
    assert account.available == account.total


@given(st.decimals(0, 1000, places=4))
def test_fractions_of_resources_are_exact(quantity: object) -> None:
    assert to_fixed("CPU", float(quantity)) == int(quantity * 10_000)  # type: ignore[operator,call-overload]


@pytest.mark.parametrize("quantity", [-1.0, float("nan"), float("inf"), 0.00005])
def test_impossible_quantities_are_refused(quantity: float) -> None:
    with pytest.raises(ValueError, match="CPU"):
        to_fixed("CPU", quantity)


@settings(max_examples=100)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["push", "front", "remove", "pop"]), st.integers(0, 10**6)),
        max_size=80,
    )
)
def test_a_queue_keeps_its_order_whatever_is_taken_out(steps: list[tuple[str, int]]) -> None:
    queue = ClassQueue(task_class())
    model: list[TaskRecord] = []
    for action, number in steps:
        if action == "push":
            task = make_task(1 + number % 3)
            queue.push(task)
            model.append(task)
        elif action == "front":
            task = make_task(1 + number % 3)
            queue.push_front(task)
            model.insert(0, task)
        elif not model:
            continue
        elif action == "remove":
            queue.remove(model.pop(number % len(model)))
        else:
            first = queue.first()
            assert first is model.pop(0)
            queue.queue.popleft()
            queue.queued_calls -= len(first.calls)
        queue.tasks = len(model)
        queue.check_invariants()
        assert queue.queued_calls == sum(len(task.calls) for task in model)


@given(
    estimate=st.floats(1e-7, 10.0),
    queued=st.integers(1, 10_000),
    workers=st.integers(0, 64),
)
def test_packets_are_worth_about_their_target(estimate: float, queued: int, workers: int) -> None:
    config = Config()
    queue = ClassQueue(task_class())
    queue.queued_calls = queued
    assert queue.packet_calls(config, workers) == 1, "nothing is known yet"
    queue.report(1, estimate)
    calls = queue.packet_calls(config, workers)
    assert 1 <= calls <= min(config.packet_calls_max, queued)
    assert calls == 1 or calls * estimate <= config.packet_target_s * 1.01
    assert calls == 1 or calls * 2 * max(1, workers) < queued + 2 * max(1, workers)
