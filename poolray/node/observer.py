"""What the node tells of itself: what is, and what was not long ago.

What: keeps a bounded history of ended tasks and dead workers, and answers questions about both and
about the living.
Who calls: `node/node.py` with questions; the tasks' and groups' sides when something ends.
May touch: nothing.
Invariants: a task's end costs one entry, and nothing is worked out before somebody asks; the
history never holds more than `Config.task_history_max` tasks, and nothing of their arguments and
results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeAlias, final

from poolray.exceptions import InternalError, PoolrayError
from poolray.ids import (
    ActorId,
    ClassId,
    ClientId,
    NodeId,
    ObjectId,
    TaskId,
    WorkerId,
    actor_of,
    is_handle,
)
from poolray.node.effects import Reply
from poolray.node.state import NodeState
from poolray.node.workers import WorkerRecord, WorkerState
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.client import NoteCalls
from poolray.protocol.node import WorkerLost
from poolray.protocol.state import (
    ActorRow,
    Condition,
    MemoryRow,
    NodeRow,
    ObjectRow,
    StateKind,
    StateRow,
    StateRows,
    TaskRow,
    WorkerRow,
)
from poolray.protocol.values import CallKind, Delivery
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.error_types import error_type_in, error_type_of
from poolray.tasks.lifecycle import DELAYED, FORWARDED, QUEUED, RUNNING, WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.cancellation import Cancellation
    from poolray.node.memory_protection import Kill
    from poolray.node.peers import Peers

#: What users know the states of living tasks as.
_STATE_NAMES = {
    WAITING: "PENDING_ARGS_AVAIL",
    QUEUED: "PENDING_NODE_ASSIGNMENT",
    DELAYED: "PENDING_NODE_ASSIGNMENT",
    FORWARDED: "SUBMITTED_TO_WORKER",
    RUNNING: "SUBMITTED_TO_WORKER",
}
#: Rows in one packet to a worker, and the bytes of their texts, at the most.
_ROWS_MAX = 128
_TEXT_BYTES_MAX = 32 * 1024
_MESSAGE_CHARS_MAX = 4096
_DEAD_WORKERS_MAX = 1000
_DEAD_ACTORS_MAX = 1000


#: The task that submitted a task, and the actor that it calls.
Family: TypeAlias = tuple[TaskId, ActorId]
#: An ended task: id, class, attempts before, error (type, message) if it failed, worker and its
#: pid, when that was reported, the nanoseconds that all tasks of the same report took together, and
#: its family if it has one. Plain tuples, for one is made for every task.
EndedTask: TypeAlias = tuple[
    TaskId,
    ClassQueue,
    int,
    tuple[str, str] | None,
    WorkerId,
    int,
    float,
    int,
    Family | None,
]
_NO_WORKER = WorkerId(b"")
_NO_TASK = TaskId(b"")
_NO_NODES: list[NodeId] = []
#: Errors of attempts that were lost.
_LOST = ("WORKER_DIED", "NODE_DIED", "OUT_OF_MEMORY")


@final
class Observer:
    """The memory of a node, and its voice."""

    __slots__ = (
        "_dead",
        "_dead_actors",
        "_state",
        "actors",
        "call_sites",
        "cancellation",
        "ended",
        "lost_since_s",
        "peers",
    )

    def __init__(self, state: NodeState) -> None:
        self._state = state
        limit = state.config.task_history_max
        #: Ended tasks, oldest first; None: they are not remembered. (The tasks' side appends.)
        self.ended: deque[EndedTask] | None = deque(maxlen=limit) if limit else None
        self._dead: deque[WorkerRow] = deque(maxlen=_DEAD_WORKERS_MAX)
        self._dead_actors: deque[ActorRow] = deque(maxlen=_DEAD_ACTORS_MAX)
        self.actors: Actors
        self.cancellation: Cancellation
        self.peers: Peers
        #: object id -> where its first ref was made.
        self.call_sites: Mapping[ObjectId, str] = {}
        #: While tasks of a lost worker are given up: when their packet was sent; else 0.
        self.lost_since_s = 0.0

    def on_noted(self, message: NoteCalls) -> None:
        """A client's calls of actors that were made past the node."""
        ended, state = self.ended, self._state
        if ended is None:
            return
        late_s = state.now - message.now_s  # between its clock and ours
        told: dict[ClassId, ClassQueue] = {}
        for task_class, name in zip(message.classes, message.function_names, strict=False):
            queue = told[task_class.class_id] = ClassQueue(task_class)
            queue.function_name = name
        for report in message.calls:
            worker_id, errors = report.worker_id, report.errors
            worker = state.workers.get(worker_id)
            pid = 0 if worker is None else worker.pid
            ended_s, elapsed_ns = late_s + report.ended_s, report.elapsed_ns
            family = (_NO_TASK, report.actor_id) if report.actor_id else None
            pairs = zip(report.task_ids, report.class_ids, strict=False)
            for index, (task_id, class_id) in enumerate(pairs):
                found = state.classes.get(class_id) or told.get(class_id)
                if found is None:
                    continue
                error = None
                if errors and index in errors:
                    error = error_type_in(errors[index]), errors[index]
                ended.append(
                    (task_id, found, 0, error, worker_id, pid, ended_s, elapsed_ns, family)
                )

    # ---- what ends -------------------------------------------------------------------------------

    def on_given_up(self, record: TaskRecord, error_type: str, message: str) -> None:
        """The node has decided that a task fails."""
        if self.ended is None or record.class_queue.task_class.delivery is not Delivery.OBJECTS:
            return
        worker = self._state.workers.get(record.worker_id) if record.worker_id else None
        # Of an attempt that was lost the task has been charged already.
        attempt = record.attempts - (1 if error_type in _LOST else 0)
        self.ended.append(
            (
                record.root_id,
                record.class_queue,
                attempt,
                (error_type, message),
                worker.worker_id if worker is not None else _NO_WORKER,
                worker.pid if worker is not None else 0,
                self._state.now,
                int((self._state.now - self.lost_since_s) * 1e9) if self.lost_since_s else 0,
                self._family(record),
            )
        )

    def on_attempt_lost(self, record: TaskRecord, message: WorkerLost, error: PoolrayError) -> None:
        """A worker died with an attempt, which the task has been charged for; it is tried again."""
        if self.ended is None or record.class_queue.task_class.delivery is not Delivery.OBJECTS:
            return
        now, since_s = self._state.now, self.lost_since_s
        self.ended.append(
            (
                record.root_id,
                record.class_queue,
                record.attempts - 1,
                (error_type_of(error), str(error)),
                message.worker_id,
                message.pid,
                now,
                int((now - since_s) * 1e9) if since_s else 0,
                self._family(record),
            )
        )

    def _family(self, record: TaskRecord) -> Family | None:
        parent = self.cancellation.parents.get(record.root_id)
        if parent is None and not record.actor_id:
            return None
        return parent or _NO_TASK, record.actor_id

    def on_actor_made(self, record: TaskRecord, worker: WorkerRecord) -> None:
        """A constructor has returned."""
        if self.ended is not None:
            self.ended.append(
                (
                    record.task_id,
                    record.class_queue,
                    record.attempts,
                    None,
                    worker.worker_id,
                    worker.pid,
                    self._state.now,
                    0,
                    self._family(record),
                )
            )

    def on_actor_died(self, row: ActorRow) -> None:
        """An actor has ended for good."""
        self._dead_actors.append(row)

    def on_worker_lost(
        self, worker: WorkerRecord, message: WorkerLost, was_told: bool, kill: Kill | None
    ) -> None:
        """A worker's process has ended."""
        self._dead.append(
            WorkerRow(
                worker_id=worker.worker_id,
                pid=message.pid,
                is_alive=False,
                started_s=worker.started_s,
                ended_s=self._state.now,
                exit_code=message.exit_code,
                signal=message.signal,
                was_told=was_told,
                out_of_memory=kill is not None,
            )
        )

    # ---- answers ---------------------------------------------------------------------------------

    def rows(self, kind: StateKind, limit: int, where: list[Condition]) -> list[StateRow]:
        """What there is to tell by these conditions; `limit` rows at the most, unless that is 0."""
        found = (row for row in self._rows(kind) if _meets(row, where))
        return list(islice(found, limit or None))

    def reply(
        self,
        client_id: ClientId,
        request_id: int,
        rows: list[StateRow],
        *,
        more: bool,
        missing: list[NodeId] = _NO_NODES,
    ) -> None:
        """Tell a client; `more` rows will follow."""
        parts = [(rows, False)] if client_id == self._state.local_client else in_parts(rows)
        for part, continues in parts:
            message = StateRows(
                request_id=request_id, rows=part, more=continues or more, missing=missing
            )
            self._state.effects.append(Reply(client_id, message))

    def _rows(self, kind: StateKind) -> Iterator[StateRow]:
        match kind:
            case StateKind.NODES:
                return self._nodes()
            case StateKind.TASKS:
                return self._tasks()
            case StateKind.WORKERS:
                return self._workers()
            case StateKind.OBJECTS:
                return self._objects()
            case StateKind.ACTORS:
                return chain(self.actors.rows(), reversed(self._dead_actors))
        raise InternalError(f"a node cannot tell of {kind}")

    def _nodes(self) -> Iterator[NodeRow]:
        state, peers = self._state, self.peers
        own = peers.own
        yield NodeRow(
            node_id=state.node_id,
            total=dict(state.resources.total),
            # Overdrawn for a moment is used up.
            available={name: max(0, free) for name, free in state.resources.available.items()},
            labels=dict(state.labels),
            address=own.address if own is not None else "",
            info=own.info if own is not None else {},
        )
        for is_alive, views in ((True, peers.views), (False, peers.gone)):
            for view in views.values():
                yield NodeRow(
                    node_id=view.node_id,
                    total=view.total,
                    available=view.available if is_alive else {},
                    labels=view.labels,
                    is_alive=is_alive,
                    address=view.address,
                    info=view.info,
                )

    # ---- tasks -----------------------------------------------------------------------------------

    def _tasks(self) -> Iterator[TaskRow]:
        """The living, then the dead, newest first."""
        running = self._running()
        for record in self._state.tasks.values():
            task_class = record.class_queue.task_class
            if (
                record.task_id == record.root_id
                and task_class.is_listed
                and task_class.delivery is Delivery.OBJECTS
            ):
                yield self._living(record, running)
        for together in self._reports():
            end_s = together[0][6]
            share_s = together[0][7] * 1e-9 / len(together)
            for task in together:
                yield _ended_row(task, end_s - share_s, end_s)
                end_s -= share_s

    def _reports(self) -> Iterator[list[EndedTask]]:
        """Ended tasks that were reported together, newest first."""
        together: list[EndedTask] = []
        for task in reversed(self.ended or ()):
            if together and task[4:8] != together[0][4:8]:
                yield together
                together = []
            if task[1].task_class.is_listed:
                together.append(task)
        if together:
            yield together

    def _living(self, record: TaskRecord, running: dict[TaskId, float]) -> TaskRow:
        queue = record.class_queue
        worker = self._state.workers.get(record.worker_id) if record.worker_id else None
        is_running = record.task_id in running
        return TaskRow(
            task_id=record.task_id,
            attempt=record.attempts,
            name=queue.task_class.name,
            function_name=queue.function_name,
            state="RUNNING" if is_running else _STATE_NAMES[record.state],
            required=queue.task_class.resources,
            worker_id=worker.worker_id if worker is not None else WorkerId(b""),
            pid=worker.pid if worker is not None else 0,
            started_s=running.get(record.task_id, 0.0),
            kind=queue.task_class.kind,
            actor_id=_actor_of(record.task_id, queue, record.actor_id),
            parent_id=self.cancellation.parents.get(record.root_id, _NO_TASK),
            group_id=queue.task_class.group_id,
        )

    def _running(self) -> dict[TaskId, float]:
        """The task that each worker is at -> when its packet was sent."""
        found: dict[TaskId, float] = {}
        for worker in self._state.workers.values():
            for packet in islice(worker.packets, 1):
                for record in packet.records:
                    if record.state is RUNNING and record.sequence == packet.sequence:
                        found[record.task_id] = packet.sent_s
                        break
        for task_id in self.actors.running():
            found[task_id] = 0.0
        return found

    # ---- workers and objects ---------------------------------------------------------------------

    def _workers(self) -> Iterator[WorkerRow]:
        yield from self._dead
        for worker in self._state.workers.values():
            if worker.state is not WorkerState.STARTING:
                yield WorkerRow(
                    worker_id=worker.worker_id,
                    pid=worker.pid,
                    is_alive=True,
                    started_s=worker.started_s,
                )

    def _objects(self) -> Iterator[ObjectRow]:
        for object_id, record in self._state.objects.items():
            if is_handle(object_id):
                continue
            yield ObjectRow(
                object_id=object_id,
                size_bytes=_size_of(record),
                is_ready=record.state is READY,
                is_error=record.is_error,
                holders=record.holders,
                in_store=record.state is READY and not isinstance(record.value, bytes),
                call_site=self.call_sites.get(object_id, ""),
            )


def _meets(row: StateRow, where: list[Condition]) -> bool:
    return all((_text_of(row, each.field) == each.value.lower()) is each.equal for each in where)


def _text_of(row: StateRow, field: str) -> str:
    found = getattr(row, field, "")
    if isinstance(found, CallKind):
        return found.name.lower()
    return found.hex() if isinstance(found, bytes) else str(found).lower()


def in_parts(rows: list[StateRow]) -> Iterator[tuple[list[StateRow], bool]]:
    """Rows that fit one packet each, for such are limited; and whether there are more."""
    start = 0
    while True:
        stop, size = start, 0
        while stop < len(rows) and stop - start < _ROWS_MAX and size < _TEXT_BYTES_MAX:
            size += _text_size(rows[stop])
            stop += 1
        yield rows[start:stop], stop < len(rows)
        if stop >= len(rows):
            return
        start = stop


def _ended_row(task: EndedTask, started_s: float, ended_s: float) -> TaskRow:
    task_id, queue, attempt, error, worker_id, pid, _, _, family = task
    error_type, message = error or ("", "")
    parent_id, actor_id = family or (_NO_TASK, ActorId(b""))
    return TaskRow(
        task_id=task_id,
        attempt=attempt,
        name=queue.task_class.name,
        function_name=queue.function_name,
        state="FAILED" if error is not None else "FINISHED",
        required=queue.task_class.resources,
        worker_id=worker_id,
        pid=pid,
        started_s=started_s,
        ended_s=ended_s,
        error_type=error_type,
        error_message=message[:_MESSAGE_CHARS_MAX],
        kind=queue.task_class.kind,
        actor_id=_actor_of(task_id, queue, actor_id),
        parent_id=parent_id,
        group_id=queue.task_class.group_id,
    )


def _actor_of(task_id: TaskId, queue: ClassQueue, called: ActorId) -> ActorId:
    """The actor that a task calls or makes; empty for all others."""
    return actor_of(task_id) if queue.task_class.kind is CallKind.CREATE else called


def _text_size(row: StateRow) -> int:
    """Characters of those texts in a row that may be long."""
    if isinstance(row, TaskRow):
        return len(row.error_message)
    if isinstance(row, MemoryRow):
        return _TEXT_BYTES_MAX
    return len(row.death_cause) + len(row.repr_name) if isinstance(row, ActorRow) else 0


def _size_of(record: ObjectRecord) -> int:
    if record.state is not READY:
        return -1
    value = record.value
    return len(value) if isinstance(value, bytes) else value.size_bytes
