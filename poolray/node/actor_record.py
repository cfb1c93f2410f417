"""One actor, as the node that it lives on keeps it.

What: the record, and which of its calls a worker had begun when it died.
Who calls: `node/actors.py` alone.
May touch: nothing.
Invariants: those that `Actors.check_invariants` tests.
"""

from __future__ import annotations

from collections import deque
from typing import final

from poolray.actors.call_order import CallOrder
from poolray.actors.lifecycle import ActorLife
from poolray.ids import ClientId, ObjectId, TaskId
from poolray.node.workers import WorkerRecord
from poolray.protocol.actors import CreateActor
from poolray.protocol.node import WorkerLost
from poolray.tasks.lifecycle import TaskRecord


@final
class Actor:
    """One actor that lives, lived or will live on this node."""

    __slots__ = (
        "calls_by_caller",
        "creation",
        "death",
        "estimate_s",
        "is_freed",
        "life",
        "message",
        "order",
        "owner",
        "packets",
        "pid",
        "pins",
        "sent",
        "unfinished",
        "worker",
    )

    def __init__(self, message: CreateActor, owner: ClientId) -> None:
        #: How it was asked for.
        self.message = message
        self.life = ActorLife(message.actor_id, message.class_name)
        #: Who made it: its end is the actor's, unless that is detached.
        self.owner = owner
        #: The constructor's call; kept with its arguments while the actor may be restarted.
        self.creation: TaskRecord | None = None
        #: The worker that is its own (ALIVE).
        self.worker: WorkerRecord | None = None
        self.pid = 0
        #: Calls that were not sent.
        self.order: CallOrder[TaskRecord] = CallOrder(message.ordered)
        #: task id -> calls that were sent and have not ended, in the order of sending.
        self.sent: dict[TaskId, TaskRecord] = {}
        #: task id -> objects in memory that such a call brought, and its worker may look at.
        self.pins: dict[TaskId, list[ObjectId]] = {}
        #: Packets that the worker has not ended, where it runs them one after the other:
        #: (sequence number, calls as sent).
        self.packets: deque[tuple[int, list[TaskRecord]]] = deque()
        #: Calls that have not ended.
        self.unfinished = 0
        #: The same by caller, where somebody counts them.
        self.calls_by_caller: dict[ClientId, int] = {}
        #: Nobody has a handle any more.
        self.is_freed = False
        #: The error of calls from now on (DEAD).
        self.death = b""
        #: Seconds per call, moving average; None until a first report.
        self.estimate_s: float | None = None

    @property
    def is_serial(self) -> bool:
        """Whether its calls run one after the other."""
        return self.message.serial


def split_lost(actor: Actor, message: WorkerLost) -> tuple[list[TaskRecord], list[TaskRecord]]:
    """Calls that were sent to a worker that died: those that had begun, and the others."""
    if not actor.is_serial:
        return list(actor.sent.values()), []
    begun: list[TaskRecord] = []
    untouched: list[TaskRecord] = []
    for sequence, records in actor.packets:
        for index, record in enumerate(records):
            if record.task_id not in actor.sent or actor.sent[record.task_id] is not record:
                continue
            place = (sequence, index)
            (begun if place <= (message.sequence, message.index) else untouched).append(record)
    return begun, untouched


def restarts_text(restarts: int) -> str:
    """How often it was restarted, for the text of an error."""
    return f" after {restarts} restart(s)" if restarts else ""
