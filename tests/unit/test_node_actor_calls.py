"""The node's actors: calls that are cancelled, groups of calls, calls that are tried again."""

from __future__ import annotations

import pytest

from poolray.ids import ClassId, FunctionId, TaskId, WorkerId
from poolray.node.effects import Interrupt, TakeBack, TerminateWorker
from poolray.protocol.actors import KillActor
from poolray.protocol.client import DefineClass
from poolray.protocol.values import CallKind, Outcome, TaskClass
from tests.unit.node_harness import DRIVER, result_of
from tests.unit.test_node_actors import ActorBench, payloads


@pytest.fixture
def bench() -> ActorBench:
    return ActorBench()


def is_cancelled(bench: ActorBench, call: TaskId) -> bool:
    return bench.error_of(call).startswith("TaskCancelledError")


def group_method(bench: ActorBench, group: str) -> ClassId:
    class_id = ClassId(b"in-%s" % group.encode())
    known = TaskClass(
        class_id=class_id,
        function_id=FunctionId(b""),
        name=f"A.{group}",
        kind=CallKind.METHOD,
        max_retries=0,
        method="m",
        concurrency_group=group,
    )
    bench.tell(DefineClass(task_class=known), DRIVER)
    return class_id


def sent(bench: ActorBench, worker_id: WorkerId) -> list[object]:
    return [payload for packet in bench.packets(worker_id) for payload in payloads(packet)]


# --- cancelled -----------------------------------------------------------------------------------


def test_a_call_that_was_not_sent_is_cancelled_here(bench: ActorBench) -> None:
    actor_id = bench.create()
    first, second = bench.call(actor_id, payload=b"1"), bench.call(actor_id, payload=b"2")
    bench.cancel(first)
    assert is_cancelled(bench, first)
    worker_id = bench.construct()
    assert payloads(bench.read(worker_id)) == [b"2"]
    assert bench.state(second) == "RUNNING"
    assert bench.take(Interrupt) == []


def test_calls_behind_a_cancelled_one_that_waited_for_an_argument_are_sent(
    bench: ActorBench,
) -> None:
    actor_id, worker_id = bench.live()
    late = bench.submit(bench.task_class())
    waiting = bench.call(actor_id, dependencies=[result_of(late)])
    bench.call(actor_id, payload=b"behind")
    bench.cancel(waiting)
    assert is_cancelled(bench, waiting)
    assert payloads(bench.read(worker_id)) == [b"behind"]


@pytest.mark.parametrize("force", [False, True])
def test_of_a_call_that_was_sent_the_worker_decides_and_packets_stay_in_order(
    bench: ActorBench, force: bool
) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id)
    packet = bench.read(worker_id)
    bench.effects.clear()
    bench.cancel(call, force=force)
    (order,) = bench.take(Interrupt)
    assert order.worker_id == worker_id
    assert order.message.task_id == call
    assert order.message.sequence == packet.sequence
    assert not order.message.force
    assert bench.take(TakeBack) == bench.take(TerminateWorker) == []
    bench.finish(worker_id, packet)
    assert bench.value_of(result_of(call)) == b"result"


def test_a_cancelled_call_is_not_tried_again_when_its_actor_is_restarted(
    bench: ActorBench,
) -> None:
    actor_id, first = bench.live(max_restarts=1)
    retried = bench.method(retries=5)
    running = bench.call(actor_id, retried, payload=b"running")
    sequence = bench.read(first).sequence
    unread = bench.call(actor_id, retried, payload=b"unread")
    other = bench.call(actor_id, retried, payload=b"other")
    bench.cancel(running)
    bench.cancel(unread)
    bench.lose(first, sequence, 0)
    assert is_cancelled(bench, running)
    assert is_cancelled(bench, unread)
    second = bench.construct()
    assert payloads(bench.read(second)) == [b"other"]
    assert bench.state(other) == "RUNNING"


def test_a_cancelled_call_is_not_tried_again_for_what_it_raises(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id, bench.method(retries=5))
    packet = bench.read(worker_id)
    bench.cancel(call)
    error = Outcome(values=[b"error"], is_error=True, retriable=True)
    bench.finish(worker_id, packet, [error])
    assert bench.error_of(call) == "error"


def test_the_death_of_the_actor_is_the_error_of_a_cancelled_call_too(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id)
    bench.read(worker_id)
    bench.cancel(call)
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    assert bench.error_of(call).startswith("ActorDiedError")


def test_calls_that_a_task_has_made_are_cancelled_with_it(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    parent = bench.submit(bench.task_class())
    bench.start_all()
    call = bench.call(actor_id, parent=parent)
    bench.read(worker_id)
    bench.effects.clear()
    bench.cancel(parent)
    assert call in [order.message.task_id for order in bench.take(Interrupt)]


# --- groups --------------------------------------------------------------------------------------


def test_each_group_has_its_own_room_at_the_worker(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(
        ordered=False, serial=False, concurrency=1, groups={"io": 2, "compute": 1}
    )
    io, compute = group_method(bench, "io"), group_method(bench, "compute")
    calls = [bench.call(actor_id, io, payload=b"io") for _ in range(9)]
    for _ in range(9):
        bench.call(actor_id, compute, payload=b"compute")
        bench.call(actor_id, payload=b"other")
    there = sent(bench, worker_id)
    assert [there.count(name) for name in (b"io", b"compute", b"other")] == [4, 2, 2]
    bench.report(worker_id, calls[0], 0, [b"r"], ended=0)
    assert sent(bench, worker_id) == [b"io"]


def test_a_cancelled_call_makes_room_in_its_group(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(ordered=False, serial=False, concurrency=1, groups={"io": 1})
    io = group_method(bench, "io")
    calls = [bench.call(actor_id, io, payload=b"%d" % i) for i in range(4)]
    assert sent(bench, worker_id) == [b"0", b"1"]
    bench.cancel(calls[2])
    bench.report(worker_id, calls[0], 0, [b"r"], ended=0)
    assert sent(bench, worker_id) == [b"3"]


def test_a_restart_repeats_the_calls_of_all_groups(bench: ActorBench) -> None:
    actor_id, first = bench.live(
        ordered=False, serial=False, concurrency=1, groups={"io": 1}, max_restarts=1
    )
    io = group_method(bench, "io")
    refused = [bench.call(actor_id, io) for _ in range(3)]
    repeated = [bench.call(actor_id, bench.method(retries=1), payload=b"again") for _ in range(3)]
    bench.lose(first)
    assert all(bench.error_of(call).startswith("ActorUnavailableError") for call in refused)
    second = bench.construct()
    assert sent(bench, second) == [b"again", b"again"]
    assert [bench.state(call) for call in repeated] == ["RUNNING", "RUNNING", "QUEUED"]


# --- order across attempts -----------------------------------------------------------------------


def test_nothing_is_sent_behind_a_call_whose_errors_are_tried_again(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    class_id = ClassId(b"raising")
    known = TaskClass(
        class_id=class_id,
        function_id=FunctionId(b""),
        name="A.raising",
        kind=CallKind.METHOD,
        max_retries=1,
        retry_exceptions=b"*",
        method="raising",
    )
    bench.tell(DefineClass(task_class=known), DRIVER)
    for _ in range(3):  # short calls travel together
        bench.call(actor_id)
        bench.finish(worker_id, bench.read(worker_id), elapsed_s=1e-6)
    bench.call(actor_id, payload=b"0")
    bench.call(actor_id, class_id, payload=b"1")
    for number in (2, 3, 4):
        bench.call(actor_id, payload=b"%d" % number)
    ran: list[object] = []
    failed = False
    while bench.busy():
        packet = bench.read(worker_id)
        ran += payloads(packet)
        results: list[object] = [b"result"] * len(packet.tasks)
        if b"1" in payloads(packet) and not failed:
            failed = True
            assert payloads(packet)[-1] == b"1"
            results[-1] = Outcome(values=[b"error"], is_error=True, retriable=True)
        bench.finish(worker_id, packet, results, elapsed_s=1e-6)
    assert ran == [b"0", b"1", b"1", b"2", b"3", b"4"]
