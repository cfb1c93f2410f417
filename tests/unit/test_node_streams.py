"""The node's streams, by feeding it messages: items, takers, limits, retries, ends, other nodes."""

from __future__ import annotations

import itertools

import pytest

from poolray.ids import ActorId, ClientId, ObjectId, TaskId, WorkerId, return_id
from poolray.node.effects import Interrupt, UnhandledError
from poolray.node.streams import NOTHING
from poolray.objects.serialization import deserialize
from poolray.protocol.client import AllocateRange
from poolray.protocol.node import ForwardedItems, NodeDied, StreamProgress
from poolray.protocol.streams import (
    AwaitRoom,
    DropStream,
    ItemsTaken,
    ItemsYielded,
    OpenStream,
    RoomGranted,
    StreamMode,
    TakeItems,
    Yielded,
    item_id,
)
from poolray.protocol.values import InArena, Outcome, Value
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import DRIVER, Bench
from tests.unit.test_node_peers import B, Pair

ENDED = Outcome(values=[])
LARGE = 200_000


def raised(retriable: bool = False) -> Outcome:
    """What a worker reports of a generator that raised."""
    return Outcome(values=[b"error"], is_error=True, retriable=retriable, raised=True)


class Streaming:
    """A node with a worker, the class of a generator, and short names for what is said of it."""

    def __init__(self, mode: StreamMode = StreamMode.ITEMS, **options: object) -> None:
        self.bench = Bench()
        self.bench.group()
        self.kind = self.bench.task_class("generator", stream=int(mode), **options)
        self.numbers = itertools.count(1000)
        self.next_task = itertools.count(1)

    def start(self, client: bytes = DRIVER, **opening: object) -> tuple[TaskId, WorkerId, RunTasks]:
        """A generator that a worker runs."""
        bench = self.bench
        # (The bench numbers tasks from 1.)
        task_id = TaskId(b"t%023d" % next(self.next_task))
        bench.tell(OpenStream(task_id=task_id, **opening), client)  # type: ignore[arg-type]
        assert bench.submit(self.kind, client=client) == task_id
        return task_id, *self.reads()

    def reads(self) -> tuple[WorkerId, RunTasks]:
        """The worker that has something to read reads it."""
        self.bench.start_all()
        (worker_id,) = self.bench.busy()
        return worker_id, self.bench.read(worker_id)

    def yields(
        self,
        worker_id: WorkerId,
        task_id: TaskId,
        *values: Value,
        start: int = 0,
        contained: list[list[ObjectId]] | None = None,
        is_error: bool = False,
    ) -> None:
        items = Yielded(
            task_id=task_id,
            start=start,
            values=list(values),
            contained=contained or [],
            is_error=is_error,
        )
        self.bench.tell(ItemsYielded(worker_id=worker_id, items=[items]))

    def take(
        self, task_id: TaskId, known: int = 0, limit: int = 100, client: bytes = DRIVER
    ) -> tuple[int, bool]:
        """Take what there is; gives how many, and whether that was all."""
        answer = self.take_values(task_id, known, limit, client)
        return answer.count, answer.ended

    def take_values(
        self, task_id: TaskId, known: int = 0, limit: int = 100, client: bytes = DRIVER
    ) -> ItemsTaken:
        number = next(self.numbers)
        message = TakeItems(request_id=number, task_id=task_id, known=known, limit=limit)
        self.bench.tell(message, client)
        (answer,) = self.bench._replies(ItemsTaken)
        assert answer.request_id == number
        return answer

    def await_room(self, worker_id: WorkerId, task_id: TaskId, produced: int) -> None:
        message = AwaitRoom(request_id=next(self.numbers), task_id=task_id, produced=produced)
        self.bench.tell(message, worker_id)

    def room(self) -> list[RoomGranted]:
        """Answers to workers that asked for room, since the last call."""
        return self.bench._replies(RoomGranted)

    def drop(self, task_id: TaskId, taken: int, client: bytes = DRIVER) -> None:
        self.bench.tell(DropStream(task_id=task_id, taken=taken), client)

    def value(self, object_id: ObjectId) -> tuple[bytes, bool]:
        """An object's value, and whether it is an error."""
        number = self.bench.get(object_id)
        reply = self.bench.values()[number]
        (value,) = reply.values
        assert isinstance(value, bytes)
        return value, bool(reply.errors)

    def objects(self) -> int:
        return self.bench.node.statistics().objects


# --- items -------------------------------------------------------------------------------------


def test_what_stands_for_nothing_is_none() -> None:
    assert deserialize(NOTHING) is None


def test_items_are_taken_while_the_generator_runs() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    assert it.take(task) == (0, False)
    it.yields(worker, task, b"0", b"1")
    assert it.take(task) == (2, False)
    it.yields(worker, task, b"2", start=2)
    answer = it.take_values(task, known=2)
    assert answer.values == [b"2"]
    assert it.value(item_id(task, 0)) == (b"0", False)


def test_a_taker_gets_no_more_than_it_asks_for() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    it.yields(worker, task, b"0", b"1", b"2")
    assert it.take(task, limit=2) == (2, False)
    assert it.take(task, known=2, limit=0) == (0, False)
    assert it.take(task, known=2, limit=2) == (1, False)


def test_an_answer_that_was_lost_is_given_again() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    it.yields(worker, task, b"0", b"1")
    assert it.take(task) == (2, False)
    assert it.take(task) == (2, False)


def test_who_waits_for_the_next_item_is_woken_by_it() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    first = it.bench.wait(1, item_id(task, 0))
    assert it.bench.ready_indexes() == {}
    it.yields(worker, task, b"0")
    assert it.bench.ready_indexes() == {first: [0]}
    it.take(task)
    second = it.bench.wait(1, item_id(task, 1))
    assert it.bench.ready_indexes() == {}
    it.yields(worker, task, b"1", start=1)
    assert it.bench.ready_indexes() == {second: [0]}


def test_the_end_wakes_who_waits_for_the_next_item() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    number = it.bench.wait(1, item_id(task, 0))
    it.bench.finish(worker, packet, [ENDED])
    assert it.bench.ready_indexes() == {number: [0]}
    assert it.take(task) == (0, True)
    assert it.value(return_id(task, 0)) == (NOTHING, False)


def test_the_end_is_known_with_the_last_item_only() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.yields(worker, task, b"0", b"1")
    it.bench.finish(worker, packet, [ENDED])
    assert it.take(task, limit=1) == (1, False)
    assert it.take(task, known=1) == (1, True)
    assert it.bench.ready_indexes() == {}
    number = it.bench.wait(1, item_id(task, 2))
    assert it.bench.ready_indexes() == {number: [0]}


def test_nothing_is_left_when_all_was_taken_and_dropped() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.yields(worker, task, b"0", b"1")
    it.take(task)
    it.bench.finish(worker, packet, [ENDED])
    it.bench.drop(item_id(task, 0), item_id(task, 1), return_id(task, 0))
    assert it.objects() == 1  # the end, that somebody may wait for
    it.drop(task, taken=2)
    assert it.objects() == 0
    assert it.bench.node.statistics().streams == 0


def test_items_keep_what_they_refer_to() -> None:
    it = Streaming()
    inner = ObjectId(b"i" * 28)
    it.bench.put(inner, b"inner")
    task, worker, _ = it.start()
    it.yields(worker, task, b"0", contained=[[inner]])
    it.bench.drop(inner)
    it.take(task)
    assert it.value(inner) == (b"inner", False)
    it.bench.drop(item_id(task, 0))
    assert inner not in it.bench.node.state.objects


def test_large_items_lie_in_memory_under_their_own_names() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    name = ObjectId(b"n" * 28)
    request = AllocateRange(request_id=1, object_id=name, size_bytes=LARGE)
    it.bench.tell(request, worker)
    it.yields(worker, task, InArena(object_id=name, offset=0, size_bytes=LARGE))
    answer = it.take_values(task)
    assert answer.values == [None]
    number = it.bench.get(item_id(task, 0))
    (value,) = it.bench.values()[number].values
    assert isinstance(value, InArena)
    assert value.object_id == item_id(task, 0)
    it.bench.drop(item_id(task, 0))
    it.drop(task, taken=1)
    assert it.bench.node.statistics().arena.used_bytes == 0


def test_a_stream_of_somebody_else_is_over() -> None:
    it = Streaming()
    task, worker, _ = it.start()
    it.yields(worker, task, b"0")
    assert it.take(task, client=b"other") == (0, True)
    it.drop(task, taken=0, client=b"other")
    assert it.take(task) == (1, False)


# --- dropped -----------------------------------------------------------------------------------


def test_a_dropped_stream_lets_go_of_what_was_not_taken() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.yields(worker, task, b"0", b"1", b"2")
    it.take(task, limit=2)
    it.drop(task, taken=1)
    kept = set(it.bench.node.state.objects)
    assert kept == {item_id(task, 0), return_id(task, 0)}
    it.yields(worker, task, b"3", start=3)
    assert set(it.bench.node.state.objects) == kept
    it.bench.finish(worker, packet, [ENDED])
    assert it.value(return_id(task, 0)) == (NOTHING, False)


def test_the_streams_of_a_client_that_is_gone_are_dropped() -> None:
    it = Streaming()
    client = ClientId(b"some-client")
    task, worker, packet = it.start(client=client)
    it.yields(worker, task, b"0", b"1")
    it.take(task, limit=1, client=client)
    it.bench.node._tasks.drop_client(client)
    assert it.objects() == 0
    it.bench.finish(worker, packet, [ENDED])
    assert it.objects() == 0


def test_an_error_that_nobody_will_see_is_shown() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.drop(task, taken=0)
    it.bench.drop(return_id(task, 0))
    it.bench.finish(worker, packet, [raised()])
    assert [e.value for e in it.bench.take(UnhandledError)] == [b"error"]


# --- errors and retries ------------------------------------------------------------------------


def test_an_error_is_one_more_item_and_no_error_of_the_whole() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.yields(worker, task, b"0")
    it.bench.finish(worker, packet, [raised()])
    answer = it.take_values(task)
    assert (answer.count, answer.ended, answer.values) == (2, True, [b"0", None])
    assert it.value(item_id(task, 1)) == (b"error", True)
    assert it.value(return_id(task, 0)) == (NOTHING, False)


def test_a_crash_is_an_error_of_both() -> None:
    it = Streaming(max_retries=0)
    task, worker, packet = it.start()
    it.yields(worker, task, b"0")
    it.bench.lose(worker, packet.sequence)
    assert it.take(task) == (2, True)
    for object_id in (item_id(task, 1), return_id(task, 0)):
        value, is_error = it.value(object_id)
        assert is_error
        assert value.startswith(b"WorkerCrashedError")


def test_after_a_crash_items_are_stored_once() -> None:
    it = Streaming(max_retries=1)
    task, worker, packet = it.start()
    it.yields(worker, task, b"old 0", b"old 1", b"old 2")
    it.take(task, limit=2)
    it.bench.drop(item_id(task, 0))
    it.bench.lose(worker, packet.sequence)
    worker, packet = it.reads()
    it.yields(worker, task, b"new 0", b"new 1", b"new 2", b"new 3")
    it.bench.finish(worker, packet, [ENDED])
    assert it.take_values(task, known=2).values == [b"old 2", b"new 3"]
    assert item_id(task, 0) not in it.bench.node.state.objects


def test_an_error_that_is_tried_again_is_no_item() -> None:
    it = Streaming(max_retries=1, retry_exceptions=b"*")
    task, worker, packet = it.start()
    it.yields(worker, task, b"0")
    it.bench.finish(worker, packet, [raised(retriable=True)])
    assert it.take(task) == (1, False)
    worker, packet = it.reads()
    it.yields(worker, task, b"0", b"1")
    it.bench.finish(worker, packet, [raised(retriable=True)])
    assert it.take_values(task, known=1).values == [b"1", None]


def test_items_of_a_worker_that_lost_the_task_are_not_stored() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.bench.lose(worker, packet.sequence)
    it.yields(worker, task, b"late")
    assert it.take(task) == (0, False)


def test_a_cancelled_generator_ends_with_an_error_that_is_no_news() -> None:
    it = Streaming()
    task, worker, packet = it.start()
    it.yields(worker, task, b"0")
    it.bench.cancel(task)
    assert it.bench.take(Interrupt)
    it.bench.finish(worker, packet, [Outcome(values=[b"cancelled"], is_error=True)])
    assert it.take(task) == (2, True)
    it.bench.drop(item_id(task, 0), item_id(task, 1), return_id(task, 0))
    it.drop(task, taken=2)
    assert it.objects() == 0
    assert not it.bench.take(UnhandledError)


def test_a_generator_that_is_cancelled_before_it_began_has_its_error_only() -> None:
    it = Streaming()
    argument = it.bench.submit(it.bench.task_class("argument"))
    task = TaskId(b"t%023d" % 2)
    it.bench.tell(OpenStream(task_id=task), DRIVER)
    it.bench.submit(it.kind, dependencies=[return_id(argument, 0)])
    assert it.take(task) == (0, False)
    it.bench.cancel(task)
    assert it.take(task) == (1, True)
    assert it.value(item_id(task, 0))[1]


# --- other modes -------------------------------------------------------------------------------


def test_the_value_of_a_dynamic_generator_keeps_its_items() -> None:
    it = Streaming(StreamMode.DYNAMIC)
    task, worker, packet = it.start()
    it.yields(worker, task, b"0", b"1")
    ids = [item_id(task, 0), item_id(task, 1)]
    it.bench.finish(worker, packet, [Outcome(values=[b"list"], contained=[ids])])
    assert it.value(return_id(task, 0)) == (b"list", False)
    assert it.value(ids[1]) == (b"1", False)
    it.bench.drop(return_id(task, 0))
    assert it.objects() == 0


def test_items_of_a_dynamic_generator_that_fails_are_let_go() -> None:
    it = Streaming(StreamMode.DYNAMIC, max_retries=0)
    task, worker, packet = it.start()
    it.yields(worker, task, b"0", b"1")
    it.bench.lose(worker, packet.sequence)
    assert it.value(return_id(task, 0))[1]
    assert it.objects() == 1


def test_fixed_returns_are_there_as_they_are_yielded() -> None:
    it = Streaming(StreamMode.RETURNS, num_returns=3)
    bench = it.bench
    task = bench.submit(it.kind)
    worker, packet = it.reads()
    it.yields(worker, task, b"0", b"1")
    assert it.value(return_id(task, 1)) == (b"1", False)
    bench.finish(worker, packet, [raised()])
    assert it.value(return_id(task, 0)) == (b"0", False)
    assert it.value(return_id(task, 2)) == (b"error", True)


# --- back-pressure -----------------------------------------------------------------------------


def test_a_generator_goes_on_when_an_item_is_taken() -> None:
    it = Streaming(backpressure=2)
    task, worker, _ = it.start(backpressure=2)
    it.yields(worker, task, b"0")
    it.await_room(worker, task, 1)
    assert [answer.consumed for answer in it.room()] == [0]
    it.yields(worker, task, b"1", start=1)
    it.await_room(worker, task, 2)
    assert it.room() == []
    assert it.take(task) == (1, False)  # of limited streams one at a time
    assert [answer.consumed for answer in it.room()] == [1]


def test_a_dropped_stream_lets_its_generator_go_on() -> None:
    it = Streaming(backpressure=1)
    task, worker, _ = it.start(backpressure=1)
    it.yields(worker, task, b"0")
    it.await_room(worker, task, 1)
    it.drop(task, taken=0)
    assert [answer.closed for answer in it.room()] == [True]
    it.await_room(worker, task, 1)
    assert [answer.closed for answer in it.room()] == [True]


def test_a_new_attempt_may_run_up_to_what_was_taken() -> None:
    it = Streaming(backpressure=1, max_retries=1)
    task, worker, packet = it.start(backpressure=1)
    it.yields(worker, task, b"0")
    it.take(task)
    it.yields(worker, task, b"1", start=1)
    it.await_room(worker, task, 2)
    it.bench.lose(worker, packet.sequence)
    assert it.room() == []
    worker, _ = it.reads()
    it.yields(worker, task, b"0")
    it.await_room(worker, task, 1)
    assert len(it.room()) == 1
    it.yields(worker, task, b"1", start=1)
    it.await_room(worker, task, 2)
    assert it.room() == []


def test_a_worker_whose_task_has_ended_waits_for_nobody() -> None:
    it = Streaming(backpressure=1)
    task, worker, _ = it.start(backpressure=1)
    it.yields(worker, task, b"0")
    it.await_room(worker, task, 1)
    it.bench.node._tasks.cancel([task])
    it.bench.node.check_invariants()
    it.bench.effects.extend(it.bench.node.state.effects)
    assert [answer.closed for answer in it.room()] == [True]


def test_streams_of_an_actor_share_their_limit() -> None:
    it = Streaming(actor_backpressure=2, cpus=0)
    share = {"actor_id": ActorId(b"a" * 16), "actor_backpressure": 2}
    started = []
    for _ in range(3):
        task, worker, packet = it.start(**share)
        started.append((task, worker, packet))
    for task, worker, _ in started:
        it.await_room(worker, task, 0)
    assert len(it.room()) == 2  # each has room for one item, the third waits
    for task, worker, _ in started[:2]:
        it.yields(worker, task, b"0")
    assert it.room() == []
    assert it.take(started[0][0]) == (1, False)
    assert len(it.room()) == 1
    it.drop(started[1][0], taken=0)
    task, worker, packet = started[2]
    it.bench.finish(worker, packet, [ENDED])
    it.await_room(started[0][1], started[0][0], 1)
    assert len(it.room()) == 1


# --- other nodes -------------------------------------------------------------------------------


class Forwarded:
    """A generator that A owns and B runs."""

    def __init__(
        self, *, backpressure: int = 0, actor_backpressure: int = 0, **options: object
    ) -> None:
        limits = {"backpressure": backpressure, "actor_backpressure": actor_backpressure}
        self.pair = pair = Pair(stream=int(StreamMode.ITEMS), **limits, **options)
        self.task = TaskId(b"t%023d" % 1)
        opening = OpenStream(task_id=self.task, actor_id=ActorId(b"a" * 16), **limits)
        pair.a.tell(opening, DRIVER)
        assert pair.a.submit(pair.kind) == self.task
        self.worker, self.packet = self.reads()
        self.numbers = itertools.count(1)

    def reads(self) -> tuple[WorkerId, RunTasks]:
        self.pair.carry()
        self.pair.b.start_all()
        (worker_id,) = self.pair.b.busy()
        return worker_id, self.pair.b.read(worker_id)

    def yields(self, *values: Value, start: int = 0) -> None:
        items = Yielded(task_id=self.task, start=start, values=list(values))
        self.pair.b.tell(ItemsYielded(worker_id=self.worker, items=[items]))
        self.pair.carry()

    def take(self, known: int = 0) -> ItemsTaken:
        message = TakeItems(request_id=next(self.numbers), task_id=self.task, known=known, limit=10)
        self.pair.a.tell(message, DRIVER)
        self.pair.carry()
        (reply,) = self.pair.a._replies(ItemsTaken)
        return reply

    def room(self) -> list[RoomGranted]:
        return self.pair.b._replies(RoomGranted)

    def large(self, name: bytes) -> InArena:
        """A value that the worker has written to B's arena."""
        object_id = ObjectId(name * 28)
        message = AllocateRange(request_id=1, object_id=object_id, size_bytes=LARGE)
        self.pair.b.tell(message, self.worker)
        return InArena(object_id=object_id, offset=0, size_bytes=LARGE)


def test_items_of_a_forwarded_generator_come_to_its_owner() -> None:
    it = Forwarded()
    it.yields(b"0", b"1")
    assert it.take().values == [b"0", b"1"]
    it.pair.b.finish(it.worker, it.packet, [ENDED])
    it.pair.carry()
    assert it.take(known=2).ended


def test_a_forwarded_generator_waits_for_its_owner() -> None:
    it = Forwarded(backpressure=1)
    it.yields(b"0")
    it.pair.b.tell(AwaitRoom(request_id=9, task_id=it.task, produced=1), it.worker)
    it.pair.carry()
    assert it.room() == []
    it.take()
    assert [answer.consumed for answer in it.room()] == [1]
    it.yields(b"1", start=1)
    it.pair.b.tell(AwaitRoom(request_id=10, task_id=it.task, produced=2), it.worker)
    it.pair.a.tell(DropStream(task_id=it.task, taken=1), DRIVER)
    it.pair.carry()
    assert [answer.closed for answer in it.room()] == [True]


def test_large_items_stay_where_they_were_made_until_they_are_dropped() -> None:
    it = Forwarded()
    it.yields(it.large(b"x"))
    answer = it.take()
    assert (answer.count, answer.values) == (1, [None])
    record = it.pair.a.node.state.objects[item_id(it.task, 0)]
    assert record.location() == B
    it.pair.b.finish(it.worker, it.packet, [ENDED])
    it.pair.carry()
    it.pair.a.drop(item_id(it.task, 0))
    it.pair.carry()
    assert it.pair.b.node.statistics().arena.used_bytes == 0
    assert not it.pair.a.node._streams._remote


def test_items_that_were_lost_with_their_node_are_made_again() -> None:
    it = Forwarded()
    it.yields(it.large(b"x"), b"1", it.large(b"y"))
    it.take()
    it.pair.b.finish(it.worker, it.packet, [ENDED])
    it.pair.carry()
    a = it.pair.a
    a.node.state.resources.total["CPU"] = 0
    a.tell(NodeDied(node_id=B), b"")
    assert a.node.task_state(it.task) is not None  # it runs again, somewhere
    objects = a.node.state.objects
    assert objects[item_id(it.task, 0)].state.name == "PENDING"
    assert objects[item_id(it.task, 1)].state.name == "READY"


def test_a_forwarded_generator_that_crashes_goes_on_elsewhere() -> None:
    it = Forwarded(max_retries=2)
    it.yields(b"old 0", b"old 1")
    it.pair.b.lose(it.worker, it.packet.sequence)
    it.worker, it.packet = it.reads()
    it.yields(b"new 0", b"new 1", b"new 2")
    it.pair.b.finish(it.worker, it.packet, [ENDED])
    it.pair.carry()
    answer = it.take()
    assert answer.values == [b"old 0", b"old 1", b"new 2"]
    assert answer.ended


def test_what_a_node_says_of_a_generator_that_it_does_not_have_is_not_heard() -> None:
    it = Forwarded()
    stale = Yielded(task_id=it.task, start=0, values=[b"stale"])
    it.pair.a.tell(ForwardedItems(items=stale), b"C" * 28)
    assert it.take().count == 0
    it.pair.b.tell(StreamProgress(task_id=it.task, consumed=5), b"C" * 28)
    assert not it.pair.b.node._streams._progress


@pytest.mark.parametrize("ends", ["finish", "crash"])
def test_nothing_is_left_of_a_forwarded_generator(ends: str) -> None:
    it = Forwarded(backpressure=1, max_retries=0)
    it.yields(b"0")
    it.pair.b.tell(AwaitRoom(request_id=9, task_id=it.task, produced=1), it.worker)
    it.take()
    if ends == "finish":
        it.pair.b.finish(it.worker, it.packet, [ENDED])
    else:
        it.pair.b.lose(it.worker, it.packet.sequence)
    it.pair.carry()
    it.pair.a.tell(DropStream(task_id=it.task, taken=1), DRIVER)
    it.pair.a.drop(item_id(it.task, 0), return_id(it.task, 0))
    it.pair.carry()
    for bench in (it.pair.a, it.pair.b):
        statistics = bench.node.statistics()
        assert (statistics.objects, statistics.tasks, statistics.streams) == (0, 0, 0)


def test_a_limit_of_the_whole_actor_holds_where_it_lives_elsewhere() -> None:
    it = Forwarded(actor_backpressure=1)
    it.yields(b"0")
    it.pair.b.tell(AwaitRoom(request_id=9, task_id=it.task, produced=1), it.worker)
    it.pair.carry()
    assert it.room() == []
    it.take()
    assert len(it.room()) == 1
