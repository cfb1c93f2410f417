"""Streams against a model: in whatever order things happen, each item comes once, in its place."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from poolray.ids import ObjectId, TaskId, WorkerId, return_id
from poolray.protocol.client import AllocateRange
from poolray.protocol.node import ClusterView, NodeView
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
from tests.unit.node_harness import CPU, DRIVER, Bench
from tests.unit.test_node_peers import B, Pair

LARGE = 8_000


class StreamMachine(RuleBasedStateMachine):
    """A generator that runs here or on another node, and whoever takes its items."""

    @initialize(
        far=st.booleans(), limit=st.sampled_from([0, 1, 3]), retries=st.sampled_from([0, 1, -1])
    )
    def start(self, far: bool, limit: int, retries: int) -> None:
        options = {
            "stream": int(StreamMode.ITEMS),
            "backpressure": limit,
            "max_retries": retries,
        }
        self.pair: Pair | None = None
        if far:
            self.pair = Pair(**options)
            self.owner, self.runner = self.pair.a, self.pair.b
            kind = self.pair.kind
        else:
            self.owner = self.runner = Bench()
            self.owner.group()
            kind = self.owner.task_class("generator", **options)  # type: ignore[arg-type]
        self.numbers = itertools.count(1)
        self.limit = limit
        self.task = TaskId(b"t%023d" % 1)
        self.owner.tell(OpenStream(task_id=self.task, backpressure=limit), DRIVER)
        self.owner.submit(kind)
        #: The worker and what it reads; None: the task is not with one.
        self.worker: WorkerId | None = None
        self.packet: RunTasks | None = None
        #: Items that this attempt, and any attempt, has yielded.
        self.position = self.reached = 0
        #: Request for room that was not answered.
        self.asked = 0
        self.taken = 0
        self.has_ended = False
        self.has_error = False
        self.dropped = False
        self.read()

    # ---- the way between the nodes, and the worker -----------------------------------------------

    def carry(self) -> None:
        if self.pair is not None:
            self.pair.carry()

    def read(self) -> None:
        """A worker gets the task, if one is to run it."""
        if self.pair is not None:
            view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
            self.owner.tell(ClusterView(nodes=[view]))
        self.carry()
        self.runner.start_all()
        busy = self.runner.busy()
        self.worker = self.packet = None
        if busy:
            self.worker = busy[0]
            self.packet = self.runner.read(self.worker)
            self.position = self.asked = 0

    def settle(self) -> None:
        """The task has left its worker: it runs again, or is over."""
        self.read()
        if self.worker is None:
            self.has_ended = True

    @rule(count=st.integers(1, 4), large=st.booleans())
    @precondition(lambda self: self.worker is not None and not self.asked)
    def yields(self, count: int, large: bool) -> None:
        values: list[Value] = [b"item %d" % (self.position + i) for i in range(count)]
        if large:
            name = ObjectId(b"%028d" % next(self.numbers))
            request = AllocateRange(request_id=next(self.numbers), object_id=name, size_bytes=LARGE)
            self.runner.tell(request, self.worker or b"")
            assert self.worker is not None
            offset = self.runner.node.state.clients[self.worker].ranges[name]  # type: ignore[index]
            values[0] = InArena(object_id=name, offset=offset, size_bytes=LARGE)
        assert self.worker is not None
        items = Yielded(task_id=self.task, start=self.position, values=values)
        self.runner.tell(ItemsYielded(worker_id=self.worker, items=[items]))
        self.position += count
        self.reached = max(self.reached, self.position)
        self.carry()

    @rule()
    @precondition(lambda self: self.worker is not None and not self.asked)
    def asks_for_room(self) -> None:
        self.asked = next(self.numbers)
        message = AwaitRoom(request_id=self.asked, task_id=self.task, produced=self.position)
        self.runner.tell(message, self.worker or b"")
        self.check_room()

    def check_room(self) -> None:
        """A worker is answered when, and only when, fewer items wait than may."""
        self.carry()
        if not self.asked or self.worker is None:
            return
        answers = [a for a in self.runner._replies(RoomGranted) if a.request_id == self.asked]
        has_room = self.dropped or not self.limit or self.position - self.taken < self.limit
        assert bool(answers) == has_room
        if answers:
            self.asked = 0

    @rule()
    @precondition(lambda self: self.worker is not None and not self.asked)
    def ends(self) -> None:
        assert self.packet is not None
        assert self.worker is not None
        self.runner.finish(self.worker, self.packet, [Outcome(values=[])])
        self.carry()
        self.worker, self.has_ended = None, True

    @rule()
    @precondition(lambda self: self.worker is not None)
    def raises(self) -> None:
        assert self.packet is not None
        assert self.worker is not None
        error = Outcome(values=[b"error"], is_error=True, raised=True)
        self.runner.finish(self.worker, self.packet, [error])
        self.carry()
        self.worker, self.has_ended, self.has_error = None, True, True

    @rule()
    @precondition(lambda self: self.worker is not None)
    def crashes(self) -> None:
        assert self.packet is not None
        assert self.worker is not None
        self.runner.lose(self.worker, self.packet.sequence)
        self.carry()
        for _ in range(3):  # after some crashes it waits before it goes on
            if self.owner.node.task_state(self.task) == "DELAYED":
                self.owner.after(1000)
        self.settle()
        self.has_error = self.has_ended

    @rule()
    def time_passes(self) -> None:
        for bench in (self.owner, self.runner):
            bench.after(0.01)
        self.carry()

    # ---- whoever takes ---------------------------------------------------------------------------

    @rule(limit=st.integers(0, 5))
    @precondition(lambda self: not self.dropped)
    def takes(self, limit: int) -> None:
        message = TakeItems(
            request_id=next(self.numbers), task_id=self.task, known=self.taken, limit=limit
        )
        self.owner.tell(message, DRIVER)
        (answer,) = self.owner._replies(ItemsTaken)
        there = self.reached + self.has_error - self.taken
        assert answer.count == min(there, min(limit, 1) if self.limit else limit)
        for offset, value in enumerate(answer.values):
            place = self.taken + offset
            if value is not None:
                assert value == b"item %d" % place
            else:
                record = self.owner.node.state.objects[item_id(self.task, place)]
                assert record.is_error == (self.has_error and place == self.reached)
        self.taken += answer.count
        assert answer.ended == (self.has_ended and self.taken == self.reached + self.has_error)
        self.check_room()

    @rule()
    @precondition(lambda self: not self.dropped)
    def waits(self) -> None:
        number = self.owner.wait(1, item_id(self.task, self.taken))
        ready = self.owner.ready_indexes()
        there = self.taken < self.reached + self.has_error
        assert (number in ready) == (there or self.has_ended)

    @rule()
    @precondition(lambda self: not self.dropped)
    def drops(self) -> None:
        self.owner.tell(DropStream(task_id=self.task, taken=self.taken), DRIVER)
        self.dropped = True
        self.check_room()

    def teardown(self) -> None:
        if not hasattr(self, "task"):
            return
        if not self.dropped:
            self.drops()
        if self.worker is not None and not self.asked:
            self.ends()
        elif self.worker is not None:
            self.raises()
        taken = [item_id(self.task, index) for index in range(self.taken)]
        self.owner.drop(*taken, return_id(self.task, 0))
        self.carry()
        for bench in {self.owner, self.runner}:
            statistics = bench.node.statistics()
            assert (statistics.objects, statistics.tasks, statistics.streams) == (0, 0, 0)
            assert statistics.arena.used_bytes == 0


StreamMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStreams = StreamMachine.TestCase
