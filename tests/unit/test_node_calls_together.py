"""The node: calls and tasks that it is told of together, and whether they would only wait."""

from __future__ import annotations

import pytest

from poolray.exceptions import InternalError
from poolray.ids import ActorId, ClassId, ObjectId, TaskId
from poolray.node.effects import Reply
from poolray.protocol.actors import CallActor, CallActors, KillActor
from poolray.protocol.client import AllocateRange, RangeGranted, WaitObjects, WaitReply
from poolray.protocol.values import InArena, TaskSpec
from tests.unit.node_harness import DRIVER, result_of
from tests.unit.test_node_actors import ActorBench, payloads


@pytest.fixture
def bench() -> ActorBench:
    return ActorBench()


def a_call(
    bench: ActorBench, actor_id: ActorId, payload: bytes, class_id: ClassId | None = None
) -> CallActor:
    task_id = TaskId(b"together" + payload.rjust(16, b"."))
    spec = TaskSpec(task_id=task_id, class_id=class_id or bench.method(), calls=[payload])
    return CallActor(actor_id=actor_id, task=spec)


def test_calls_that_come_together_travel_together_and_in_order(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    bench.call(actor_id, payload=b"0")
    bench.finish(worker_id, bench.read(worker_id))  # now it is known that calls are short
    calls = [a_call(bench, actor_id, b"%d" % n) for n in range(1, 6)]
    bench.tell(CallActors(calls=calls), DRIVER)
    (packet,) = bench.packets(worker_id)
    assert payloads(packet) == [b"1", b"2", b"3", b"4", b"5"]


def test_calls_of_two_actors_that_come_together_reach_both(bench: ActorBench) -> None:
    one, its_worker = bench.live()
    other, its_other_worker = bench.live()
    names = [(one, b"a"), (other, b"b"), (one, b"c"), (other, b"d")]
    bench.tell(CallActors(calls=[a_call(bench, a, p) for a, p in names]), DRIVER)
    first = [p for packet in bench.packets(its_worker) for p in payloads(packet)]
    second = [p for packet in bench.packets(its_other_worker) for p in payloads(packet)]
    assert (first, second) == ([b"a", b"c"], [b"b", b"d"])


def test_calls_before_one_that_makes_no_sense_are_made(bench: ActorBench) -> None:
    actor_id, _ = bench.live()
    calls = [a_call(bench, actor_id, b"1"), a_call(bench, actor_id, b"2", ClassId(b"unknown"))]
    with pytest.raises(InternalError, match="its class is unknown"):
        bench.tell(CallActors(calls=calls), DRIVER)
    assert bench.state(calls[0].task.task_id) == "RUNNING"
    assert bench.state(calls[1].task.task_id) is None


def test_a_call_would_only_wait_where_its_worker_has_all_packets_it_may_have(
    bench: ActorBench,
) -> None:
    actor_id, worker_id = bench.live()
    would_queue = bench.node.would_queue
    assert not would_queue(a_call(bench, actor_id, b"1"))
    bench.call(actor_id)
    bench.call(actor_id)
    assert would_queue(a_call(bench, actor_id, b"1"))
    bench.finish(worker_id, bench.read(worker_id))
    assert not would_queue(a_call(bench, actor_id, b"1"))
    assert not would_queue(a_call(bench, ActorId(b"nobody knows it."), b"1"))


# --- what follows on what a `wait` finds ---------------------------------------------------------


def wait_ahead(bench: ActorBench, count: int, ahead: int, *object_ids: ObjectId) -> WaitReply:
    message = WaitObjects(request_id=77, object_ids=list(object_ids), count=count, ahead=ahead)
    effects = bench.tell(message, DRIVER)
    (reply,) = [e.message for e in effects if isinstance(e, Reply)]
    assert isinstance(reply, WaitReply)
    return reply


def test_a_wait_tells_of_values_behind_those_that_it_was_for(bench: ActorBench) -> None:
    names = [ObjectId(b"object %d" % n) for n in range(5)]
    for name in names:
        bench.put(name, b"value")
    assert wait_ahead(bench, 1, 3, *names) == WaitReply(request_id=77, ready=[0], ahead=[1, 2, 3])
    assert wait_ahead(bench, 2, 9, *names).ahead == [2, 3, 4]
    assert wait_ahead(bench, 1, 0, *names).ahead == []


def test_a_wait_does_not_tell_ahead_of_what_is_pending_failed_or_large(bench: ActorBench) -> None:
    first, large, value = (ObjectId(name) for name in (b"first", b"large", b"value"))
    for name in (first, value):
        bench.put(name, b"value")
    bench.tell(AllocateRange(request_id=1, object_id=large, size_bytes=4096), DRIVER)
    (granted,) = [e.message for e in bench.take(Reply) if isinstance(e.message, RangeGranted)]
    bench.put(large, InArena(object_id=large, offset=granted.offset, size_bytes=4096))
    actor_id, _ = bench.live()
    failed = bench.call(actor_id, payload=b"fails")
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    pending = bench.call(bench.create())
    names = (first, large, result_of(failed), result_of(pending), value)
    assert wait_ahead(bench, 1, 9, *names).ahead == [4]
