"""The life of a task: its states, the moves between them, and its record.

    submitted ──▶ WAITING ──▶ QUEUED ──▶ RUNNING ──▶ SUCCEEDED
                     │          │ ▲  ◀──    │  └───▶ FAILED
                     │          ▼ │         │
                     │       FORWARDED ─────┤   (runs on another node)
                     │          │           ▼
                     │          │        DELAYED ──▶ QUEUED   (killed workers: a pause first)
                     └──────────┴───────────┴──▶ FAILED

What: the table of moves and `TaskRecord`, the only place where a task's state is kept.
Who calls: the node machine, through `move`.
May touch: nothing.
Invariants: `MOVES` lists every move there is; a record's state is written by `move` alone.
"""

from __future__ import annotations

import enum
from typing import final

from poolray.exceptions import IllegalTransition
from poolray.ids import ActorId, ClientId, NodeId, ObjectId, TaskId, WorkerId
from poolray.protocol.values import InArena, InFile
from poolray.tasks.class_queue import ClassQueue


class TaskState(enum.IntEnum):
    """Where a task is in its life."""

    WAITING = 0  #: some dependency is not ready
    QUEUED = 1  #: ready to run, in the queue of its class
    RUNNING = 2  #: in a packet that was sent to a worker
    FORWARDED = 3  #: given to another node
    DELAYED = 4  #: it is tried again when a pause is over
    SUCCEEDED = 5  #: its results are stored or delivered
    FAILED = 6  #: its error is stored or delivered


WAITING = TaskState.WAITING
QUEUED = TaskState.QUEUED
RUNNING = TaskState.RUNNING
FORWARDED = TaskState.FORWARDED
DELAYED = TaskState.DELAYED
SUCCEEDED = TaskState.SUCCEEDED
FAILED = TaskState.FAILED

#: state -> states that may follow it.
MOVES: dict[TaskState, frozenset[TaskState]] = {
    # Ready; given to the node that has its arguments; a dependency failed or it was cancelled.
    WAITING: frozenset({QUEUED, FORWARDED, FAILED}),
    # Sent; given away; cancelled, or its workers cannot start.
    QUEUED: frozenset({RUNNING, FORWARDED, FAILED}),
    # Done; failed for good; to be tried again, at once or later, handed back or taken back.
    RUNNING: frozenset({SUCCEEDED, FAILED, QUEUED, DELAYED}),
    # Done there; failed there; its node died or gave it back: it is tried again, at once or when
    # the arguments that were lost with the node are there again.
    FORWARDED: frozenset({SUCCEEDED, FAILED, QUEUED, WAITING, DELAYED}),
    # Its time has come (are its arguments still there?); cancelled, or its workers are gone.
    DELAYED: frozenset({QUEUED, WAITING, FAILED}),
    # Its result was lost with a node and is made again.
    SUCCEEDED: frozenset({WAITING}),
    FAILED: frozenset(),
}


#: Most tasks name no objects; these lists are shared and never changed.
_NOTHING: list[ObjectId] = []
_NO_SLOTS: list[int | str] = []
_NO_ACTOR = ActorId(b"")


@final
class TaskRecord:
    """One task, or a part of one that was split, as the node keeps it."""

    __slots__ = (
        "actor_id",
        "attempts",
        "borrows",
        "calls",
        "class_queue",
        "client_id",
        "dependencies",
        "has_restored",
        "is_elsewhere",
        "is_foreign",
        "missing",
        "node_id",
        "offset",
        "owner_pins",
        "root_id",
        "sent_offset",
        "sequence",
        "slots",
        "state",
        "task_id",
        "worker_id",
    )

    def __init__(
        self,
        task_id: TaskId,
        root_id: TaskId,
        client_id: ClientId,
        class_queue: ClassQueue,
        calls: list[bytes | InArena | InFile],
        offset: int,
        attempts: int,
    ) -> None:
        self.task_id = task_id
        #: The task that the client submitted; of a part, the whole.
        self.root_id = root_id
        self.client_id = client_id
        self.class_queue = class_queue
        #: Payloads of the calls that have no result yet.
        self.calls = calls
        #: Index of `calls[0]` in the root task.
        self.offset = offset
        #: Index in the root task of the first call as it was sent: workers count from there.
        self.sent_offset = offset
        #: Attempts that have been charged: a worker or node died while it ran.
        self.attempts = attempts
        self.state = WAITING
        #: The actor that it calls; empty for all but calls of actors.
        self.actor_id = _NO_ACTOR
        #: It belongs to another node, which is to be told what came of it.
        self.is_foreign = False
        #: It calls an actor that lives on another node, or of which it is not known where.
        self.is_elsewhere = False
        #: Dependencies that are not ready yet.
        self.missing = 0
        #: Dependencies that were on disk have been asked for, once.
        self.has_restored = False
        self.dependencies: list[ObjectId] = _NOTHING
        self.slots: list[int | str] = _NO_SLOTS
        self.borrows: list[ObjectId] = _NOTHING
        #: The worker that has it and the packet it is in (RUNNING).
        self.worker_id: WorkerId | None = None
        self.sequence = 0
        #: The node that has it (FORWARDED).
        self.node_id: NodeId | None = None
        #: Whether the record holds its references (dependencies and borrows) at the moment.
        self.owner_pins = False

    def move(self, state: TaskState) -> None:
        """Go to another state.

        Raises
        ------
        IllegalTransition
            `MOVES` does not allow it: a bug in the machine.
        """
        if state not in MOVES[self.state]:
            raise IllegalTransition(
                what=f"task {self.class_queue.task_class.name} ({self.task_id.hex()})",
                state=self.state.name,
                event=f"move to {state.name}",
            )
        self.state = state

    def cut(self, stop: int, task_id: TaskId) -> TaskRecord:
        """Keep the calls before `stop` (counted in the root task); a new record gets the rest."""
        kept = stop - self.offset
        rest = TaskRecord(
            task_id,
            self.root_id,
            self.client_id,
            self.class_queue,
            self.calls[kept:],
            stop,
            self.attempts,
        )
        rest.state = self.state
        rest.worker_id = self.worker_id
        rest.sequence = self.sequence
        rest.dependencies = self.dependencies
        rest.slots = self.slots
        rest.borrows = self.borrows
        self.calls = self.calls[:kept]
        return rest
