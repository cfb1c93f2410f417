"""One actor, as the node that it lives on keeps it.

What: the record, the lanes of its calls, which calls a worker had begun when it died, and the
errors of calls that cannot be made.
Who calls: `node/actors.py` and `node/actor_calls.py`.
May touch: nothing.
Invariants: those that `Actors.check_invariants` tests.
"""

from __future__ import annotations

from collections import deque
from typing import final

from poolray.actors.call_order import CallOrder
from poolray.actors.lifecycle import ActorLife, ActorState
from poolray.exceptions import ActorDiedError, ActorUnavailableError
from poolray.ids import ClientId, GroupId, NodeId, ObjectId, TaskId
from poolray.node.workers import WorkerRecord
from poolray.protocol.actors import CreateActor
from poolray.protocol.node import WorkerLost
from poolray.protocol.state import ActorRow
from poolray.protocol.values import OWN_GROUP
from poolray.tasks.lifecycle import TaskRecord

#: Calls that wait in the queue of a worker that runs several at once, beyond those that run.
_AHEAD_MAX = 64


@final
class Lane:
    """The calls of one concurrency group of an actor."""

    __slots__ = ("concurrency", "limit", "order", "sent")

    def __init__(self, ordered: bool, concurrency: int) -> None:
        #: Those that were not sent.
        self.order: CallOrder[TaskRecord] = CallOrder(ordered)
        #: How many the worker may have, where it runs several at once: it finds the next one at
        #: hand when one has ended.
        self.concurrency = concurrency
        self.limit = concurrency + min(concurrency, _AHEAD_MAX)
        #: How many it has.
        self.sent = 0


@final
class Actor:
    """One actor that lives, lived or will live on this node."""

    __slots__ = (
        "calls_by_caller",
        "cause",
        "creation",
        "death",
        "estimate_s",
        "group_id",
        "host",
        "hosted_for",
        "is_durable",
        "is_freed",
        "lane",
        "lanes",
        "life",
        "lived_at",
        "message",
        "owner",
        "packets",
        "pid",
        "pins",
        "repr_name",
        "required",
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
        #: The workers of which it has one: those of its job.
        self.group_id = GroupId(0)
        #: The worker that is its own (ALIVE).
        self.worker: WorkerRecord | None = None
        self.pid = 0
        #: The other node that it lives on (ALIVE), for which we keep what it was made with.
        self.host: NodeId | None = None
        #: The other node that it has lived on last; None: it was this one.
        self.lived_at: NodeId | None = None
        #: The other node that keeps it; None: we do.
        self.hosted_for: NodeId | None = None
        #: What it says of itself, where its class defines that.
        self.repr_name = ""
        #: Why it died (DEAD).
        self.cause = ""
        #: What it keeps for its life.
        self.required: dict[str, int] = {}
        #: The calls that belong to no concurrency group.
        self.lane = Lane(message.ordered, message.concurrency)
        #: concurrency group -> its calls; those of none under the empty name.
        self.lanes = {"": self.lane}
        for name, concurrency in message.groups.items():
            self.lanes[name] = Lane(message.ordered, concurrency)
        if not message.serial:  # what its callers ask for waits for no call that may wait for it
            self.lanes[OWN_GROUP] = Lane(message.ordered, _AHEAD_MAX)
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
        #: What it is made with need not be given to the head (any more).
        self.is_durable = False
        #: The error of calls from now on (DEAD).
        self.death = b""
        #: Seconds per call, moving average; None until a first report.
        self.estimate_s: float | None = None

    @property
    def is_serial(self) -> bool:
        """Whether its calls run one after the other."""
        return self.message.serial

    def begin(self, creation: TaskRecord | None) -> None:
        """Its constructor's call has been taken; None: and has failed already."""
        self.creation = creation
        if creation is not None:
            self.group_id = creation.class_queue.task_class.group_id

    def lane_of(self, record: TaskRecord) -> Lane:
        """Where a call belongs."""
        name = record.class_queue.task_class.concurrency_group
        return self.lanes.get(name, self.lane) if name else self.lane

    def put_back(self, records: list[TaskRecord]) -> None:
        """Calls that were sent come back before all others, in this order."""
        if len(self.lanes) == 1:
            self.lane.order.put_back(records)
            return
        for lane in self.lanes.values():
            lane.order.put_back([record for record in records if self.lane_of(record) is lane])

    def take_all(self) -> list[TaskRecord]:
        """Every call that was not sent; none is left."""
        return [record for lane in self.lanes.values() for record in lane.order.take_all()]

    def mark_sent(self, lane: Lane, record: TaskRecord) -> None:
        """The worker has a call."""
        self.sent[record.task_id] = record
        lane.sent += 1

    def unmark_sent(self, record: TaskRecord) -> None:
        """The worker has it no more, if it had it."""
        if self.sent.pop(record.task_id, None) is not None:
            self.lane_of(record).sent -= 1


_STATE_NAMES = {
    ActorState.PENDING: "PENDING_CREATION",
    ActorState.ALIVE: "ALIVE",
    ActorState.RESTARTING: "RESTARTING",
    ActorState.DEAD: "DEAD",
}
_CAUSE_CHARS_MAX = 4096


def row_of(actor: Actor) -> ActorRow:
    """What those who look on are told of an actor."""
    message, creation = actor.message, actor.creation
    state = _STATE_NAMES[actor.life.state]
    if actor.life.state is ActorState.PENDING and creation is not None and creation.missing:
        state = "DEPENDENCIES_UNREADY"
    return ActorRow(
        actor_id=message.actor_id,
        class_name=message.class_name,
        state=state,
        required=actor.required,
        name=message.name,
        namespace=message.namespace,
        pid=actor.pid,
        is_detached=message.detached,
        restarts=0 if creation is None else creation.attempts,
        death_cause=actor.cause[:_CAUSE_CHARS_MAX],
        repr_name=actor.repr_name,
        group_id=actor.group_id,
        node_id=actor.lived_at or NodeId(b""),
    )


def running_calls(actor: Actor) -> list[TaskId]:
    """Calls that its worker is at, as far as the node knows."""
    if actor.is_serial:
        for _, records in actor.packets:
            for record in records:
                if actor.sent.get(record.task_id) is record:
                    return [record.task_id]
        return []
    found: list[TaskId] = []
    free = {name: lane.concurrency for name, lane in actor.lanes.items()}
    for record in actor.sent.values():
        name = record.class_queue.task_class.concurrency_group
        name = name if name in free else ""
        if free[name]:
            free[name] -= 1
            found.append(record.task_id)
    return found


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


def died(actor: Actor, reason: str, pid: int = 0) -> ActorDiedError:
    """The error of calls of an actor that is dead; who looks on is told the reason too."""
    actor.cause = f"The actor {reason}."
    return ActorDiedError(
        actor_id=actor.message.actor_id.hex(),
        class_name=actor.message.class_name,
        reason=f"{reason}.",
        pid=pid or actor.pid,
    )


def unavailable(actor: Actor) -> ActorUnavailableError:
    """The error of a call that may not be tried again while its actor is restarted."""
    return ActorUnavailableError(
        actor_id=actor.message.actor_id.hex(),
        class_name=actor.message.class_name,
        reason=f"is unavailable: its process (pid {actor.pid}) died and it is being restarted. "
        "The call may or may not have run; call again, or allow max_task_retries=.",
    )


def unknown(record: TaskRecord) -> ActorDiedError:
    """The error of a call of an actor that nobody here has heard of."""
    return ActorDiedError(
        actor_id=record.actor_id.hex(),
        class_name=record.class_queue.task_class.name.partition(".")[0],
        reason="is not known here: it belongs to a runtime that was shut down.",
    )
