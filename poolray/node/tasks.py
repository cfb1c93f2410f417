"""The node's tasks: submission, dependencies, results, retries, failures.

What: takes tasks in, decides when they may run, what becomes of what workers and peers report, and
whether a failure is final.
Who calls: `node/node.py`; the dispatcher asks it for the next step of a task.
May touch: nothing.
Invariants: a task that has not ended is in `state.tasks`; it holds its dependencies and borrowed
refs until then, longer while it is lineage (a result of it lives in another node's arena only) or
while a worker may still read them. Who owns a task alone decides whether it is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, final

import msgspec

from poolray.exceptions import (
    InternalError,
    PoolrayError,
    TaskCancelledError,
)
from poolray.ids import (
    ClientId,
    FunctionId,
    GroupId,
    NodeId,
    TaskId,
    WorkerId,
    return_id,
)
from poolray.node.cancellation import error_of
from poolray.node.effects import Reply, UnhandledError
from poolray.node.functions import Functions
from poolray.node.inputs import Inputs
from poolray.node.lineage import Lineage
from poolray.node.losses import Losses
from poolray.node.objects import Objects
from poolray.node.observer import Family, Observer
from poolray.node.placement import unschedulable
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.node.workers import Group, GroupState, Packet, WorkerRecord
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.client import CallResults
from poolray.protocol.values import (
    CallKind,
    Delivery,
    FunctionDefinition,
    InArena,
    Outcome,
    TaskSpec,
    Value,
)
from poolray.protocol.worker import TasksFinished
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.error_types import OTHER_ERROR, error_type_in, error_type_of
from poolray.tasks.lifecycle import (
    DELAYED,
    FAILED,
    FORWARDED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    WAITING,
    TaskRecord,
)

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.cancellation import Cancellation
    from poolray.node.dispatch import Dispatcher
    from poolray.node.groups import Groups
    from poolray.node.memory_protection import MemoryProtection
    from poolray.node.peers import Peers
    from poolray.node.retries import Retries
    from poolray.node.streams import Streams

_CALLER = Delivery.CALLER
_CREATE = CallKind.CREATE
_NO_TASK = TaskId(b"")
_OPEN = GroupState.OPEN
_FAILED_GROUP = GroupState.FAILED


def _error_of(result: bytes | Outcome) -> tuple[str, str] | None:
    """What those who look on are told of a failed call."""
    if isinstance(result, bytes) or not result.is_error:
        return None
    return error_type_in(result.summary), result.summary


@final
class Tasks:
    """The task side of a node."""

    __slots__ = (
        "_parts",
        "_state",
        "actors",
        "cancellation",
        "dispatcher",
        "functions",
        "groups",
        "inputs",
        "lineage",
        "losses",
        "objects",
        "observer",
        "peers",
        "protection",
        "retries",
        "store",
        "streams",
    )

    def __init__(
        self, state: NodeState, store: Store, functions: Functions, observer: Observer
    ) -> None:
        self._state = state
        self.store = store
        self.functions = functions
        self.observer = observer
        self.objects: Objects
        self.actors: Actors
        self.dispatcher: Dispatcher
        self.groups: Groups
        self.peers: Peers
        self.cancellation: Cancellation
        self.retries: Retries
        self.protection: MemoryProtection
        self.streams: Streams
        self.inputs = Inputs(state, store, self)
        self.lineage = Lineage(state, self)
        self.losses = Losses(state, self)
        #: task id -> ids of the parts split off it that have not ended.
        self._parts: dict[TaskId, dict[TaskId, None]] = {}

    # ---- submission ------------------------------------------------------------------------------

    def submit(self, client_id: ClientId, specs: list[TaskSpec]) -> None:
        """A client's tasks: record them, and queue those that are ready."""
        state = self._state
        tasks, groups = state.tasks, state.groups
        objects = self.objects
        records, promised = state.objects, objects.promised
        client = state.clients.get(client_id) or objects.client(client_id)
        touched: Group | None = None
        refused: TaskSpec | None = None
        for spec in specs:
            class_id = spec.class_id
            task_id = spec.task_id
            queue = state.classes.get(class_id)
            if queue is None or not spec.calls:
                refused = spec
                continue
            task_class = queue.task_class
            record = TaskRecord(task_id, task_id, client_id, queue, spec.calls, 0, 0)
            tasks[task_id] = record
            queue.tasks += 1
            group = groups.get(task_class.group_id)
            if group is not None:
                group.unfinished += 1
            if task_class.delivery is not _CALLER:
                for index in range(task_class.num_returns):
                    object_id = return_id(task_id, index)
                    if promised and promised.pop(object_id, None) is not None:
                        continue  # others were told of it already, and wait
                    records[object_id] = ObjectRecord(1)
                    client.held[object_id] = None
            if spec.dependencies or spec.borrows:
                self.inputs.take(record, spec)
            if spec.parent:
                self.cancellation.adopt(spec.parent, task_id)
            if group is None or group.state >= _FAILED_GROUP:
                self.fail_encoded(record, self._no_group_error(record, group))
            elif record.missing == 0 and record.state is WAITING:
                record.move(QUEUED)
                waits_behind_others = queue.stuck and queue.queued_calls > 0
                queue.push(record)
                group.ready[class_id] = queue
                if waits_behind_others:
                    continue
                if touched is not group and touched is not None:
                    self.dispatcher.dispatch(touched)
                touched = group
        if touched is not None:
            self.dispatcher.dispatch(touched)
        if refused is not None:
            known = refused.class_id in state.classes
            reason = "it has no calls" if known else "its class was never defined, or released"
            raise InternalError(f"task {refused.task_id.hex()} cannot be taken: {reason}")

    def submit_foreign(self, client_id: ClientId, spec: TaskSpec, attempts: int) -> Group | None:
        """A task that another node owns: its result goes there, no object is made here.

        Returns
        -------
        Group or None
            What the caller is to dispatch.
        """
        record = self.record_foreign(client_id, spec, attempts)
        queue = record.class_queue
        group = self._state.groups.get(queue.task_class.group_id)
        definition = self._state.functions.get(queue.task_class.function_id)
        if (
            spec.dependencies
            or spec.borrows
            or not isinstance(spec.calls[0], bytes)
            or (definition is not None and not isinstance(definition.blob, bytes))
        ):
            self.inputs.take(record, spec)
        if group is None or group.state >= _FAILED_GROUP:
            self.fail_encoded(record, self._no_group_error(record, group))
        elif record.missing == 0:
            record.move(QUEUED)
            queue.push(record)
            group.ready[queue.task_class.class_id] = queue
            return group
        return None

    def record_foreign(self, client_id: ClientId, spec: TaskSpec, attempts: int) -> TaskRecord:
        """The record of a task that another node owns."""
        queue = self._state.classes[spec.class_id]
        record = TaskRecord(spec.task_id, spec.task_id, client_id, queue, spec.calls, 0, attempts)
        record.is_foreign = True
        self._state.tasks[spec.task_id] = record
        queue.tasks += 1
        group = self._state.groups.get(queue.task_class.group_id)
        if group is not None:
            group.unfinished += 1
        return record

    def definition(self, function_id: FunctionId) -> FunctionDefinition:
        """A function as a worker finds it now and later: its code may have come from elsewhere."""
        definition = self._state.functions[function_id]
        blob = definition.blob
        if not isinstance(blob, InArena) or not blob.node_id:
            return definition
        place = self.store.place_of(blob)
        if isinstance(place, InArena):
            self.store.keep_in_memory(blob.object_id)
        found = msgspec.structs.replace(definition, blob=place)
        self._state.functions[function_id] = found
        if isinstance(place, bytes):
            self.objects.release_all([blob.object_id])
        return found

    def enqueue(self, record: TaskRecord, front: bool = False) -> None:
        """A task may run: queue it and see whether a worker is free for it."""
        if record.actor_id:
            self.actors.calls.on_ready(record)
            return
        group = self.usable_group(record)
        if group is None:
            known = self._state.groups.get(record.class_queue.task_class.group_id)
            self.fail_encoded(record, self._no_group_error(record, known))
            return
        if front:
            self.requeue(record)
        else:
            record.move(QUEUED)
            record.class_queue.push(record)
            group.ready[record.class_queue.task_class.class_id] = record.class_queue
        self.dispatcher.dispatch(group)

    def usable_group(self, record: TaskRecord) -> Group | None:
        """The workers that may run a task; None when they are gone, or do not start."""
        group = self._state.groups.get(record.class_queue.task_class.group_id)
        return group if group is not None and group.state < _FAILED_GROUP else None

    def requeue(self, record: TaskRecord) -> None:
        """A task that was sent comes back before the others; the caller dispatches afterwards."""
        if self.is_stopping(record):
            self.fail(record, error_of(record))
            return
        task_class = record.class_queue.task_class
        record.move(QUEUED)
        record.worker_id = None
        record.node_id = None
        record.sent_offset = record.offset
        record.class_queue.push_front(record)
        group = self._state.groups[task_class.group_id]
        group.ready[task_class.class_id] = record.class_queue

    def cut(self, record: TaskRecord, stop: int) -> TaskRecord:
        """Split a task: it keeps its calls before `stop` (counted in the root task).

        Returns
        -------
        TaskRecord
            The rest, a task of its own in the same state.
        """
        # Unique: parts that live at one time are disjoint, and each was made at its first call.
        rest = record.cut(stop, TaskId(record.root_id + stop.to_bytes(4, "little")))
        self._state.tasks[rest.task_id] = rest
        self._parts.setdefault(record.root_id, {})[rest.task_id] = None
        record.class_queue.tasks += 1
        if record.owner_pins:
            self.inputs.pin(rest)
        group = self._state.groups.get(record.class_queue.task_class.group_id)
        if group is not None:
            group.unfinished += 1
        return rest

    # ---- results ---------------------------------------------------------------------------------

    def on_finished(self, worker: WorkerRecord, message: TasksFinished) -> int:
        """A worker's results; gives the number of calls that they end."""
        tasks = self._state.tasks
        worker_id = worker.worker_id
        calls = 0
        ended, parents = self.observer.ended, self.cancellation.parents
        now, pid = self._state.now, worker.pid
        for report in message.results:
            results = report.results
            calls += len(results)
            record = tasks.get(report.task_id)
            if record is None or record.worker_id != worker_id:
                # Cancelled meanwhile: nobody wants it.
                for result in results:
                    self.discard(result, worker.client_id)
            elif record.class_queue.task_class.delivery is _CALLER:
                self._deliver(record, record.sent_offset + report.start, results, worker)
            elif results:
                result = results[0]
                family: Family | None = None
                if parents or record.actor_id:
                    family = parents.get(record.root_id, _NO_TASK), record.actor_id
                self.finish(record, result, worker.client_id)
                # (A task that is tried again has been charged for this attempt.)
                is_over = type(result) is bytes or record.state >= SUCCEEDED
                if ended is not None and (is_over or result.is_error):  # type: ignore[union-attr]
                    ended.append(
                        (
                            record.root_id,
                            record.class_queue,
                            record.attempts - (not is_over),
                            None if type(result) is bytes else _error_of(result),
                            worker_id,
                            pid,
                            now,
                            message.elapsed_ns,
                            family,
                        )
                    )
        return calls

    def _deliver(
        self,
        record: TaskRecord,
        start: int,
        results: list[bytes | Outcome],
        worker: WorkerRecord,
    ) -> None:
        """Results of a batch go to the caller; with the last of its calls the task is over."""
        if not results:
            return
        for result in results:
            if not isinstance(result, bytes):
                for value in result.values:
                    self.objects.deliver_result(record.client_id, value, worker.client_id)
        reply = CallResults(task_id=record.root_id, start=start, results=results)
        self._state.effects.append(Reply(record.client_id, reply))
        # Counted, not told: what a worker calls the end of a task may be the end of its share.
        if len(results) >= len(record.calls):
            record.move(SUCCEEDED)
            self.end(record)
        else:
            record.calls = record.calls[len(results) :]
            record.offset += len(results)

    def discard(self, result: bytes | Outcome, writer: ClientId) -> None:
        """Nobody wants the results of a call."""
        if not isinstance(result, bytes):
            for value in result.values:
                self.objects.discard(value, writer)

    def finish(self, record: TaskRecord, result: bytes | Outcome, writer: ClientId) -> None:
        """The one call of a task with objects for results has run, here or elsewhere."""
        if record.class_queue.task_class.kind is _CREATE:
            self.actors.hosting.on_created(record, result, writer)
            return
        if isinstance(result, bytes):
            record.move(SUCCEEDED)
            if record.is_foreign:
                self.peers.send_result(record, result, writer)
            else:
                self.objects.seal_small(return_id(record.root_id, 0), result)
            self.end(record)
            return
        if record.is_foreign:
            record.move(FAILED if result.is_error else SUCCEEDED)
            self.peers.send_result(record, result, writer)
        elif result.crashed and self.is_stopping(record):
            # It was lost without a result on another node, before the order to stop reached it.
            self.fail(record, error_of(record))
            return
        elif result.is_error and result.retriable and self._may_retry_after(record, result):
            self.discard(result, writer)
            record.attempts += 1
            # (What an actor is called in order is not put off alone.)
            if result.out_of_memory and not record.actor_id:
                self.protection.delay(record)
            elif not result.crashed or record.actor_id or not self.retries.delay(record):
                self.try_again(record)
            return
        elif self.streams.must_run_again(record, result):
            record.attempts += 1
            self.try_again(record)
            return
        else:
            record.move(FAILED if result.is_error else SUCCEEDED)
            self._store(record, result, writer)
        self.end(record)

    def _store(self, record: TaskRecord, result: Outcome, writer: ClientId) -> None:
        """Seal each return value that somebody holds."""
        if record.class_queue.task_class.stream:
            # (One that failed is not made again, nor what it had yielded.)
            if self.streams.on_result(record, result, writer) and record.state is SUCCEEDED:
                self.lineage.tasks[record.root_id] = record
            else:
                self.streams.forget_remote(record.root_id)
            return
        if result.is_error:
            self.store_error(record, result.values[0], writer)
            return
        remote = False
        for index in range(record.class_queue.task_class.num_returns):
            object_id = return_id(record.root_id, index)
            value = result.values[index]
            inner = result.contained[index] if index < len(result.contained) else []
            target = self._state.objects.get(object_id)
            if target is None or target.state is READY:
                self.objects.discard(value, writer)
                continue
            self.objects.seal(object_id, target, value, False, inner, writer)
            remote = remote or target.location() is not None
        if remote:
            self.lineage.tasks[record.root_id] = record

    def store_error(self, record: TaskRecord, error: Value, writer: ClientId) -> None:
        """One error stands for all return values."""
        count = record.class_queue.task_class.num_returns
        ids = [return_id(record.root_id, index) for index in range(count)]
        objects = self._state.objects
        wanted = [i for i in ids if i in objects and objects[i].state is not READY]
        if not wanted:
            # (A large one is freed before it could be shown.)
            known = any(i in objects for i in ids)
            if isinstance(error, bytes) and not known and not self.is_stopping(record):
                self._state.effects.append(UnhandledError(error))
            self.objects.discard(error, writer)
        elif isinstance(error, bytes):
            for object_id in wanted:
                target = objects.get(object_id)  # waking those who wait may let go of others
                if target is not None:
                    self.objects.seal(object_id, target, error, True, [], writer)
        else:
            # Its memory belongs to the first, which the others keep.
            first = wanted[0]
            self.objects.hold(first)
            self.objects.seal(first, objects[first], error, True, [], writer)
            for object_id in wanted[1:]:
                target = objects.get(object_id)
                if target is not None:
                    self.objects.seal_alias(object_id, target, error, first)
            self.objects.release_all([first])

    def end(self, record: TaskRecord) -> None:
        """A task is over: let go of what it held."""
        del self._state.tasks[record.task_id]
        queue = record.class_queue
        if self._parts and record.root_id in self._parts:
            self._end_part(record)
        cancellation = self.cancellation
        if cancellation.parents or cancellation.stopping:
            cancellation.on_end(record.task_id)
        lineage = self.lineage.tasks
        if not lineage or lineage.get(record.root_id) is not record:
            if record.owner_pins:
                self.inputs.unpin(record)
            queue.tasks -= 1
            if queue.released and not queue.tasks:
                self.functions.forget_class(queue)
        group = self._state.groups.get(queue.task_class.group_id)
        if group is not None:
            group.unfinished -= 1
            if group.unfinished == 0 and group.state is not _OPEN:
                self.groups.on_group_empty(group)
        if record.actor_id:
            self.actors.calls.on_ended(record)

    def _end_part(self, record: TaskRecord) -> None:
        parts = self._parts[record.root_id]
        parts.pop(record.task_id, None)
        if not parts:
            del self._parts[record.root_id]

    # ---- failures --------------------------------------------------------------------------------

    def may_retry(self, record: TaskRecord) -> bool:
        """Whether one more attempt is allowed."""
        limit = record.class_queue.task_class.max_retries
        # Attempts that were ended for memory have a budget of their own.
        charged = record.attempts - self.protection.spent.get(record.task_id, 0)
        return (limit < 0 or charged < limit) and not self.is_stopping(record)

    def _may_retry_after(self, record: TaskRecord, result: Outcome) -> bool:
        """The same after this result, which another node may have given."""
        if result.out_of_memory and not record.actor_id:
            return self.protection.has_budget(record)
        return self.may_retry(record)

    def is_stopping(self, record: TaskRecord) -> bool:
        """Whether a task was cancelled while a worker or another node had it."""
        stopping = self.cancellation.stopping
        return bool(stopping) and record.task_id in stopping

    def try_again(self, record: TaskRecord) -> None:
        """A task that ran here or elsewhere runs again, once its arguments are here."""
        if self.is_stopping(record):
            self.fail(record, error_of(record))
            return
        if record.actor_id:
            self.actors.calls.try_again(record)
            return
        if record.dependencies:
            record.has_restored = True  # what has left memory meanwhile is mapped from its file
            self.inputs.wait(record)
            if record.missing:
                record.move(WAITING)
                record.node_id = None
                return
        self.enqueue(record, front=True)

    def fail(self, record: TaskRecord, error: PoolrayError, crashed: bool = False) -> None:
        """A task is given up here: its error becomes its result (if it crashed, its owner on
        another node may try it again).
        """
        error_type = error_type_of(error)
        self._fail(record, self._state.encode_error(error), crashed, error_type, str(error))

    def fail_encoded(
        self,
        record: TaskRecord,
        error: bytes,
        error_type: str = OTHER_ERROR,
        message: str = "its workers cannot run it",
    ) -> None:
        """The same, for an error that is serialized already; who looks on is told the rest."""
        self._fail(record, error, False, error_type, message)

    def _fail(
        self, record: TaskRecord, error: bytes, crashed: bool, error_type: str, message: str
    ) -> None:
        self.observer.on_given_up(record, error_type, message)
        outcome = Outcome(
            values=[error],
            is_error=True,
            retriable=crashed,
            crashed=crashed,
            out_of_memory=crashed and error_type == "OUT_OF_MEMORY",
        )
        record.move(FAILED)
        if record.class_queue.task_class.kind is _CREATE:
            self.actors.on_creation_failed(record, error)
            if record.is_foreign:
                self.peers.send_result(record, outcome, record.client_id)
        elif record.class_queue.task_class.delivery is _CALLER:
            reply = CallResults(
                task_id=record.root_id, start=record.offset, results=[outcome] * len(record.calls)
            )
            self._state.effects.append(Reply(record.client_id, reply))
        elif record.is_foreign:
            self.peers.send_result(record, outcome, record.client_id)
        else:
            self._store(record, outcome, record.client_id)
        self.end(record)

    def give_up(self, record: TaskRecord, error: bytes) -> None:
        """A task fails wherever it is, and whatever becomes of the call that runs."""
        self._withdraw(record)
        self.fail_encoded(record, error)

    def give_up_unschedulable(self, queue: ClassQueue, reason: str) -> None:
        """No node may ever run the calls of a class: those that are queued fail."""
        error = unschedulable(queue.task_class, reason)
        for record in [record for record in queue.queue if record not in queue.removed]:
            if self._state.tasks.get(record.task_id) is record:  # a failure may end others
                self._withdraw(record)
                self.fail(record, error)

    def cancel(self, task_ids: Iterable[TaskId], reason: str = "") -> None:
        """Drop tasks with all their parts, without asking whoever runs them.

        What has not begun never runs. To their caller nothing of them is delivered any more;
        return values that are objects become errors.
        """
        tasks = self._state.tasks
        touched: dict[TaskId, None] = {}
        for root_id in dict.fromkeys(task_ids):
            touched[root_id] = None
            touched.update(self._parts.get(root_id, {}))
        sent: dict[WorkerId, list[int]] = {}
        for task_id in touched:
            record = tasks.get(task_id)
            if record is None:
                continue
            if record.state is RUNNING and record.worker_id is not None and not record.actor_id:
                sent.setdefault(record.worker_id, []).append(record.sequence)
            self._withdraw(record)
            record.move(FAILED)
            if record.is_foreign:
                self.streams.forget_source(record.task_id)
            elif record.class_queue.task_class.delivery is not _CALLER:
                error = TaskCancelledError(
                    task_id=record.root_id.hex(),
                    task_name=record.class_queue.task_class.name,
                    reason=reason,
                )
                self.observer.on_given_up(record, error_type_of(error), str(error))
                encoded = self._state.encode_error(error)
                if record.class_queue.task_class.kind is _CREATE:
                    self.actors.on_creation_failed(record, encoded)
                else:
                    outcome = Outcome(values=[encoded], is_error=True)
                    self._store(record, outcome, record.client_id)
            self.end(record)
        for worker_id, sequences in sent.items():
            self.dispatcher.on_cancelled(worker_id, sequences)

    def _withdraw(self, record: TaskRecord) -> None:
        """Take a task from where it is, before it ends."""
        if record.actor_id:
            self.actors.calls.withdraw(record)
        elif record.state is QUEUED:
            queue = record.class_queue
            queue.remove(record)
            if not queue.queued_calls:
                queue.clear()
                group = self._state.groups[queue.task_class.group_id]
                group.ready.pop(queue.task_class.class_id, None)
        elif record.state is DELAYED:
            self.retries.forget(record)
        elif record.state is RUNNING and record.owner_pins:
            # The worker may be reading its arguments: they stay until it is done with the packet.
            assert record.worker_id is not None
            for packet in self._state.workers[record.worker_id].packets:
                if packet.sequence == record.sequence:
                    packet.cancelled = packet.cancelled or []
                    packet.cancelled.append(record)
                    record.owner_pins = False

    def unpin_cancelled(self, packet: Packet) -> None:
        """A worker is done with a packet of which tasks were cancelled."""
        records, packet.cancelled = packet.cancelled or [], None
        for record in records:
            self.objects.release_all(record.dependencies)
            self.objects.release_all(record.borrows)

    def _no_group_error(self, record: TaskRecord, group: Group | None) -> bytes:
        if group is not None and group.state is _FAILED_GROUP:
            return group.error
        return self._state.encode_error(
            PoolrayError(
                f"Task {record.class_queue.task_class.name} ({record.task_id.hex()[:12]}) was "
                "submitted to workers that have been shut down: make a new Pool or Executor, or "
                "call init() again."
            )
        )

    # ---- clients and groups that leave -----------------------------------------------------------

    def drop_client(self, client_id: ClientId) -> None:
        """A client is gone: all it held is let go, functions included."""
        self.functions.drop_client(client_id)
        self.streams.drop_client(client_id)
        self.objects.drop_client(client_id)

    def release_classes_of(self, group_id: GroupId) -> None:
        """A group has ended: nobody will name its classes again."""
        self.functions.release_classes(group_id)

    def give_back(self, record: TaskRecord) -> None:
        """Another node's task cannot run here: its owner decides again."""
        self.peers.send_back(record)
        record.move(FAILED)
        self.end(record)

    def return_unbegun(self, record: TaskRecord) -> None:
        """Another node's task that has not begun here goes back to it."""
        self._withdraw(record)
        if record.class_queue.task_class.kind is _CREATE:
            self.actors.hosting.forget_unborn(record)
        self.give_back(record)

    # ---- what others need to know ----------------------------------------------------------------

    def forward(self, record: TaskRecord, node_id: NodeId) -> None:
        """A queued task goes to another node."""
        record.move(FORWARDED)
        record.node_id = node_id

    def check_invariants(self) -> None:
        """Raise AssertionError when records of tasks, parts, lineage and classes do not agree."""
        state = self._state
        counts = dict.fromkeys(state.classes, 0)
        for task_id, record in state.tasks.items():
            assert task_id == record.task_id
            assert record.calls, "a task without calls has not ended"
            assert record.state <= DELAYED, f"a task that {record.state.name} is kept"
            assert (record.state is RUNNING) == (record.worker_id is not None)
            assert (record.state is FORWARDED) == (record.node_id is not None)
            assert (record.missing > 0) == (record.state is WAITING)
            if task_id != record.root_id:
                assert task_id in self._parts[record.root_id]
            counts[record.class_queue.task_class.class_id] += 1
        for record in self.actors.kept_creations():
            assert record.task_id not in state.tasks
            counts[record.class_queue.task_class.class_id] += 1
        for root_id, record in self.lineage.tasks.items():
            assert record.state is SUCCEEDED, "lineage that runs"
            assert root_id not in state.tasks
            counts[record.class_queue.task_class.class_id] += 1
        for parts in self._parts.values():
            assert parts
            assert all(task_id in state.tasks for task_id in parts)
        for class_id, queue in state.classes.items():
            assert queue.tasks == counts[class_id], (
                f"{queue.task_class.name} counts its tasks wrong"
            )
