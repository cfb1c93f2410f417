"""The calls of a node's actors: taken in, put in order, sent in packets, counted out.

    CallActor ──▶ `CallOrder` of its lane ──packets──▶ the actor's worker ──TasksFinished──▶ objects

What: which call of which actor goes to its worker when, and with which others.
Who calls: `node/actors.py` with requests and when an actor comes alive; `node/tasks.py` when a call
is ready, tried again or over; `node/dispatch.py` with reports.
May touch: nothing.
Invariants: a call of an actor that lives here is in its `CallOrder` or in `sent` until it ends; a
packet to an actor whose calls run one after the other holds about `packet_target_s` of work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.actors.lifecycle import ALIVE, DEAD, RESTARTING
from poolray.exceptions import InternalError
from poolray.ids import ActorId, ClientId, handle_of, return_id
from poolray.node.actor_record import Actor, Lane, unavailable, unknown
from poolray.node.effects import SendWorker
from poolray.node.state import NodeState
from poolray.node.tasks import Tasks
from poolray.node.workers import Packet, WorkerRecord
from poolray.objects.directory import ObjectRecord
from poolray.protocol.actors import CallActor
from poolray.protocol.worker import ClassDefinition, RunTasks, TaskCall, TasksFinished
from poolray.tasks.error_types import ACTOR_DIED
from poolray.tasks.lifecycle import QUEUED, RUNNING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.dispatch import Dispatcher
    from poolray.node.objects import Objects

#: Weight of a new report in the estimate of a call's run time.
_NEW_WEIGHT = 0.4


@final
class ActorCalls:
    """The calls of a node's actors."""

    __slots__ = ("_actors", "_dispatcher", "_objects", "_state", "_tasks")

    def __init__(
        self,
        state: NodeState,
        objects: Objects,
        tasks: Tasks,
        dispatcher: Dispatcher,
        actors: Actors,
    ) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._actors = actors

    def on_calls(self, client_id: ClientId, messages: list[CallActor]) -> None:
        """Calls of a client, in the order in which it made them."""
        state = self._state
        tasks, objects, classes = state.tasks, state.objects, state.classes
        held = (state.clients.get(client_id) or self._objects.client(client_id)).held
        promised = self._objects.promised
        touched: dict[ActorId, Actor] = {}
        for message in messages:
            spec = message.task
            task_id = spec.task_id
            queue = classes.get(spec.class_id)
            if queue is None:
                self._feed_all(touched)
                text = f"call {task_id.hex()} cannot be taken: its class is unknown"
                raise InternalError(text)
            record = TaskRecord(task_id, task_id, client_id, queue, spec.calls, 0, 0)
            record.actor_id = message.actor_id
            tasks[task_id] = record
            queue.tasks += 1
            task_class = queue.task_class
            group = state.groups.get(task_class.group_id)
            if group is not None:
                group.unfinished += 1
            for index in range(task_class.num_returns):
                object_id = return_id(task_id, index)
                if promised and promised.pop(object_id, None) is not None and object_id in objects:
                    continue  # others were told of it already, and wait
                objects[object_id] = ObjectRecord(1)
                held[object_id] = None
            if spec.dependencies or spec.borrows:
                self._tasks.inputs.take(record, spec)
            if spec.parent:
                self._tasks.cancellation.adopt(spec.parent, task_id)
            actor = touched.get(message.actor_id)
            if actor is not None:  # where it is has not changed since the call before
                self._enter(actor, record)
                continue
            actor = self._admit(record)
            if actor is not None:
                touched[record.actor_id] = actor
        self._feed_all(touched)

    def _feed_all(self, actors: dict[ActorId, Actor]) -> None:
        for actor in actors.values():
            self.feed(actor)

    def enter_again(self, record: TaskRecord) -> None:
        """A call that is in no order: to the actor itself, or to where it may be."""
        actor = self._admit(record)
        if actor is not None:
            self.feed(actor)

    def _admit(self, record: TaskRecord) -> Actor | None:
        """The same; gives the actor if its worker may have room for the call."""
        actor_id = record.actor_id
        actor, remote = self._actors.actors.get(actor_id), self._actors.elsewhere.find(actor_id)
        if (
            actor is not None
            and self.is_here(actor_id)
            # (Calls that were made before have to go first.)
            and not (remote is not None and remote.unfinished)
        ):
            return actor if self._enter(actor, record) else None
        if handle_of(actor_id) in self._objects.handles:
            self._actors.elsewhere.enter(record)
        else:
            self._tasks.fail(record, unknown(record))
        return None

    def is_full(self, actor_id: ActorId) -> bool:
        """Whether one more call of an actor would have to wait for a report of its worker."""
        actor = self._actors.actors.get(actor_id)
        if actor is None or actor.worker is None:
            return False
        if actor.message.serial:
            return len(actor.packets) >= self._state.config.packets_per_worker_max
        return not actor.message.groups and actor.lane.sent >= actor.lane.limit

    def is_here(self, actor_id: ActorId) -> bool:
        """Whether calls of an actor may be made to it directly."""
        actor = self._actors.actors.get(actor_id)
        return (
            actor is not None
            and actor.host is None
            and (actor.hosted_for is None or actor.life.state is ALIVE)
        )

    def enter_here(self, record: TaskRecord) -> None:
        """A call of an actor that is here."""
        self.enter(self._actors.actors[record.actor_id], record)

    def enter(self, actor: Actor, record: TaskRecord) -> None:
        """A call of an actor that lives here, will, or did."""
        if self._enter(actor, record):
            self.feed(actor)

    def _enter(self, actor: Actor, record: TaskRecord) -> bool:
        """The same; whether the actor is to be fed."""
        client_id, queue = record.client_id, record.class_queue
        actor.unfinished += 1
        if actor.message.counted:
            actor.calls_by_caller[client_id] = actor.calls_by_caller.get(client_id, 0) + 1
        if actor.life.state is DEAD:
            self._tasks.fail_encoded(record, actor.death, ACTOR_DIED, actor.cause)
        elif actor.life.state is RESTARTING and not queue.task_class.max_retries:
            self._tasks.fail(record, unavailable(actor))
        else:
            waits = record.missing > 0
            if not waits and record.state is not QUEUED:
                record.move(QUEUED)
            order = actor.lane_of(record).order
            order.add(client_id, record, waits)
            return bool(order.ready) and actor.worker is not None
        return False

    def on_ready(self, record: TaskRecord) -> None:
        """The arguments of a call are here."""
        if record.is_elsewhere:
            self._actors.elsewhere.on_ready(record)
            return
        actor = self._actors.actors[record.actor_id]
        record.move(QUEUED)
        actor.lane_of(record).order.on_ready(record.client_id, record)
        if actor.life.state is RESTARTING:
            self.refuse_ready(actor)
        self.feed(actor)

    def try_again(self, record: TaskRecord) -> None:
        """A call raised and is tried once more, before all others."""
        if record.is_elsewhere:
            self._actors.elsewhere.try_again(record, returned=False)
            return
        actor = self._actors.actors[record.actor_id]
        self.unsend(actor, record)
        actor.put_back([record])

    def unsend(self, actor: Actor, record: TaskRecord) -> None:
        """A call that was sent is the order's again."""
        actor.unmark_sent(record)
        self._unpin(actor, record)
        record.move(QUEUED)
        record.worker_id = None

    def refuse_ready(self, actor: Actor) -> None:
        """Calls that could go to an actor that is being restarted, and may not be tried again."""
        for lane in actor.lanes.values():
            ready = lane.order.ready
            for record in [r for r in ready if not r.class_queue.task_class.max_retries]:
                ready.remove(record)
                self._tasks.fail(record, unavailable(actor))

    def withdraw(self, record: TaskRecord) -> None:
        """A call that has not been sent is not wanted any more; the caller ends it."""
        if record.is_elsewhere:
            self._actors.elsewhere.withdraw(record)
            return
        actor = self._actors.actors.get(record.actor_id)
        if actor is not None and record.state is not RUNNING:
            actor.lane_of(record).order.remove(record.client_id, record)
            if actor.life.state is RESTARTING:
                self.refuse_ready(actor)
            self.feed(actor)  # calls that waited behind it

    def on_ended(self, record: TaskRecord) -> None:
        """A call is over."""
        if record.is_elsewhere:
            self._actors.elsewhere.on_ended(record)
            return
        actor = self._actors.actors.get(record.actor_id)
        if actor is None:
            return
        self._count_out(actor, record)
        if actor.is_freed:
            self._actors.after_call(actor)

    def leave(self, actor: Actor, record: TaskRecord) -> None:
        """A call goes to where the actor is now, or may be."""
        self._count_out(actor, record)
        if record.state is RUNNING:
            record.move(QUEUED)
            record.worker_id = None

    def _count_out(self, actor: Actor, record: TaskRecord) -> None:
        actor.unmark_sent(record)
        if actor.pins:
            self._unpin(actor, record)
        actor.unfinished -= 1
        if actor.message.counted:
            left = actor.calls_by_caller.get(record.client_id, 0) - 1
            if left > 0:
                actor.calls_by_caller[record.client_id] = left
            else:
                actor.calls_by_caller.pop(record.client_id, None)

    # ---- packets ---------------------------------------------------------------------------------

    def feed(self, actor: Actor) -> None:
        """Send what the worker has room for."""
        worker = actor.worker
        if worker is None:
            return
        if not actor.is_serial:
            for lane in actor.lanes.values():
                while lane.order.ready and lane.sent < lane.limit:
                    self._send_packet(actor, worker, lane, lane.limit - lane.sent)
            return
        lane, packets = actor.lane, actor.packets
        packets_max = self._state.config.packets_per_worker_max
        while (
            lane.order.ready
            and len(packets) < packets_max
            and not (packets and _may_come_back(packets[-1][1][-1]))
        ):
            self._send_packet(actor, worker, lane, self._calls_allowed(actor))

    def _calls_allowed(self, actor: Actor) -> int:
        """How many calls the next packet may hold: about `packet_target_s` of work."""
        config, estimate = self._state.config, actor.estimate_s
        if estimate is None:
            return 1
        if estimate * config.packet_calls_max <= config.packet_target_s:
            return config.packet_calls_max
        return max(1, int(config.packet_target_s / estimate))

    def _send_packet(self, actor: Actor, worker: WorkerRecord, lane: Lane, limit: int) -> None:
        ready, config = lane.order.ready, self._state.config
        limit = min(limit, config.packet_calls_max)
        worker.sequence = sequence = worker.sequence + 1
        calls: list[TaskCall] = []
        records: list[TaskRecord] = []
        classes: list[ClassDefinition] = []
        size = 0
        while ready and len(calls) < limit:
            record = ready[0]
            call, bytes_ = self._call_of(actor, worker, record, classes)
            if calls and size + bytes_ > config.packet_bytes_max:
                self._unpin(actor, record)
                break
            ready.popleft()
            size += bytes_
            record.move(RUNNING)
            record.worker_id = worker.worker_id
            record.sequence = sequence
            actor.mark_sent(lane, record)
            records.append(record)
            calls.append(call)
            if actor.is_serial and _may_come_back(record):
                break  # what is behind it would run before its next attempt
        if actor.is_serial:
            actor.packets.append((sequence, records))
            self._watch(actor, worker, records)
        forget, worker.forget = worker.forget, []
        message = RunTasks(sequence=sequence, tasks=calls, classes=classes, forget=forget)
        self._state.effects.append(SendWorker(worker.worker_id, message))

    def _call_of(
        self,
        actor: Actor,
        worker: WorkerRecord,
        record: TaskRecord,
        classes: list[ClassDefinition],
    ) -> tuple[TaskCall, int]:
        """A call as the worker reads it, and its bytes."""
        task_class = record.class_queue.task_class
        index = worker.class_indexes.get(task_class.class_id)
        if index is None:
            index = worker.class_indexes[task_class.class_id] = worker.next_class_index
            worker.next_class_index += 1
            classes.append(ClassDefinition(index=index, task_class=task_class))
        payload = record.calls[0]
        size = len(payload) + 64 if isinstance(payload, bytes) else 128
        if not record.dependencies and isinstance(payload, bytes):
            call = TaskCall(task_id=record.task_id, class_index=index, calls=record.calls)
            return call, size
        packet = Packet(0, record.class_queue, self._state.now)
        call = self._dispatcher.packets.call_with_arguments(record, packet, index)
        if packet.pins:
            actor.pins[record.task_id] = packet.pins
        return call, size + packet.size_bytes

    def _unpin(self, actor: Actor, record: TaskRecord) -> None:
        """A worker does not look at what a call brought any more."""
        pins = actor.pins.pop(record.task_id, None) if actor.pins else None
        if pins:
            self._tasks.store.unpin_many(pins)

    def on_reported(self, worker: WorkerRecord, message: TasksFinished, calls: int) -> None:
        """An actor's worker has sent results, which have been dealt with."""
        actor = self._actors.by_worker.get(worker.worker_id)
        if actor is None:
            return
        packets = actor.packets
        if packets and packets[0][0] <= message.sequence:
            while packets and packets[0][0] <= message.sequence:
                packets.popleft()
            if packets:  # its time begins now
                self._watch(actor, worker, packets[0][1])
        if calls and message.elapsed_ns:
            new, old = message.elapsed_ns * 1e-9 / calls, actor.estimate_s
            actor.estimate_s = new if old is None else old + _NEW_WEIGHT * (new - old)
        self.feed(actor)

    def _watch(self, actor: Actor, worker: WorkerRecord, records: list[TaskRecord]) -> None:
        """Wonder about a packet of several calls when it takes longer than such calls do."""
        if len(records) > 1:
            estimate_s = actor.estimate_s or 0.0
            patience_s = self._state.config.nudge_after_s + 2.0 * estimate_s * len(records)
            self._dispatcher.watch(worker, self._state.now + patience_s)

    def may_nudge(self, worker: WorkerRecord) -> bool:
        """Whether results may wait behind a long call of the packet that a worker runs."""
        actor = self._actors.by_worker.get(worker.worker_id)
        if actor is None or not actor.packets:
            return False
        sequence, records = actor.packets[0]
        return len(records) > 1 and worker.nudged_sequence != sequence

    def nudged(self, worker: WorkerRecord) -> None:
        """A worker was signalled to send the results it has."""
        worker.nudged_sequence = self._actors.by_worker[worker.worker_id].packets[0][0]


def _may_come_back(record: TaskRecord) -> bool:
    """Whether what a call raises may be tried again."""
    return bool(record.class_queue.task_class.retry_exceptions)
