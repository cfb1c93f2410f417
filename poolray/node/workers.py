"""Workers and groups as the node sees them.

    STARTING ──ready──▶ IDLE ──packet──▶ BUSY ──blocked──▶ BLOCKED
        │                ▲ │              │ ▲                │
        │                │ │              │ └───unblocked────┘
        │                └─┼──all done────┘ └──▶ ACTOR (of its own, for life)
        └──────────────────┴──▶ STOPPING ──▶ (exit reported: the record is dropped)

What: records of workers, their packets on the way, and the groups they belong to.
Who calls: `node/node.py` alone.
May touch: nothing.
Invariants: a worker is in its group's `idle` exactly when IDLE, in its group's and its class's
`hungry` only when BUSY with room for another packet, in its group's `stocked` exactly when it has
packets to spare; it holds a lease exactly while it runs something and is not blocked.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import final

from poolray.exceptions import IllegalTransition
from poolray.ids import ClassId, ClientId, FunctionId, GroupId, ObjectId, WorkerId
from poolray.scheduling.resources import Devices
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import TaskRecord


class WorkerState(enum.IntEnum):
    """What a worker is doing."""

    STARTING = 0  #: asked for; it has not said hello
    IDLE = 1
    BUSY = 2  #: has packets
    BLOCKED = 3  #: its task waits in `get` or `wait`
    ACTOR = 5  #: an actor lives in it, whose calls it runs and no others
    STOPPING = 4  #: gets no more packets; it finishes what it has (also waits in it) and exits


# Names of the module are found faster than members of an enum, and these are on every task's path.
_STARTING, _IDLE, _BUSY, _STOPPING, _ACTOR = (
    WorkerState.STARTING,
    WorkerState.IDLE,
    WorkerState.BUSY,
    WorkerState.STOPPING,
    WorkerState.ACTOR,
)

_WORKER_MOVES: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset({WorkerState.IDLE, WorkerState.STOPPING}),
    WorkerState.IDLE: frozenset({WorkerState.BUSY, WorkerState.STOPPING}),
    WorkerState.BUSY: frozenset(
        {WorkerState.IDLE, WorkerState.BLOCKED, WorkerState.ACTOR, WorkerState.STOPPING}
    ),
    WorkerState.BLOCKED: frozenset({WorkerState.BUSY, WorkerState.ACTOR, WorkerState.STOPPING}),
    WorkerState.ACTOR: frozenset({WorkerState.STOPPING}),
    WorkerState.STOPPING: frozenset(),
}


@final
class Packet:
    """Calls on their way to a worker, or being run by it."""

    __slots__ = (
        "bases",
        "calls",
        "cancelled",
        "defines_class",
        "forget",
        "functions",
        "pins",
        "queue",
        "records",
        "sent_s",
        "sequence",
        "size_bytes",
    )

    def __init__(self, sequence: int, queue: ClassQueue, sent_s: float) -> None:
        self.sequence = sequence
        self.sent_s = sent_s
        #: The class of all its calls.
        self.queue = queue
        #: Tasks in the order in which they run.
        self.records: list[TaskRecord] = []
        #: For each record, the index in the packet of its first call as it was sent.
        self.bases: list[int] = []
        #: Calls in it, less those handed back.
        self.calls = 0
        self.size_bytes = 0
        #: What travels with it and did not arrive if it is taken back: the class, functions, and
        #: functions to forget.
        self.defines_class = False
        self.functions: list[FunctionId] | None = None
        self.forget: list[FunctionId] | None = None
        #: Tasks that were cancelled after they were sent: the worker may read their arguments, so
        #: they hold them until it is done with the packet. None: none, the usual case.
        self.cancelled: list[TaskRecord] | None = None
        #: Objects in memory that the worker is told to look at; None: none, the usual case.
        self.pins: list[ObjectId] | None = None


@final
class WorkerRecord:
    """One worker process."""

    __slots__ = (
        "calls_by_class",
        "calls_sent",
        "class_indexes",
        "client_id",
        "deadline_s",
        "devices",
        "forget",
        "free_indexes",
        "functions",
        "group",
        "is_actor",
        "keeps",
        "lease",
        "next_class_index",
        "nudged_sequence",
        "packets",
        "pid",
        "runs",
        "sequence",
        "slot",
        "started_s",
        "state",
        "worker_id",
    )

    def __init__(self, worker_id: WorkerId, group: Group, slot: int) -> None:
        self.worker_id = worker_id
        #: The same as a client: what user code in it holds and waits for.
        self.client_id = ClientId(worker_id)
        self.group = group
        #: Index of its progress word on the control page.
        self.slot = slot
        self.state = WorkerState.STARTING
        self.pid = 0
        #: STARTING: when to give it up. IDLE: since when. BUSY: when to wonder why it is silent.
        self.deadline_s = 0.0
        #: An actor lives in it, or did until it was told to stop.
        self.is_actor = False
        self.packets: deque[Packet] = deque()
        self.sequence = 0  # of the last packet sent
        self.nudged_sequence = 0  # of the last packet that it was asked to hand back from
        self.calls_sent = 0  # and neither taken nor handed back
        #: The same for classes with a limit of calls.
        self.calls_by_class: dict[ClassId, int] = {}
        #: The class whose calls it runs; None when it has none.
        self.runs: ClassQueue | None = None
        #: The class whose resources it holds: `runs`, or None while its task is blocked.
        self.lease: ClassQueue | None = None
        #: The class of which it keeps what is not lent while its task is blocked.
        self.keeps: ClassQueue | None = None
        #: The devices of its lease; it keeps them while its task is blocked.
        self.devices: Devices = {}
        #: When it was asked for.
        self.started_s = 0.0
        #: class id -> the index under which the worker knows it.
        self.class_indexes: dict[ClassId, int] = {}
        self.next_class_index = 0
        #: Indexes below that which mean nothing any more.
        self.free_indexes: list[int] = []
        #: Functions whose definitions were sent.
        self.functions: dict[FunctionId, None] = {}
        #: Functions to forget, which the next packet will tell it.
        self.forget: list[FunctionId] = []

    def suits(self, queue: ClassQueue) -> bool:
        """Whether it may run calls of a class: those that use devices and others never share a
        worker, so that none sees devices that are not its own.
        """
        if queue.uses_devices:
            return self.sequence == 0 or self.worker_id in self.group.device_workers
        return self.worker_id not in self.group.device_workers

    def move(self, state: WorkerState) -> None:
        """Go to another state, keeping the group's tables right.

        Raises
        ------
        IllegalTransition
            The table does not allow it: a bug in the machine.
        """
        before = self.state
        if state not in _WORKER_MOVES[before]:
            raise IllegalTransition(
                what=f"worker {self.worker_id.hex()}",
                state=before.name,
                event=f"move to {state.name}",
            )
        group = self.group
        if before is _BUSY:
            if self.runs is not None:
                self.runs.hungry.pop(self.worker_id, None)
                group.hungry.pop(self.worker_id, None)
        elif before is _IDLE:
            del group.idle[self.worker_id]
        elif before is _STARTING:
            group.starting -= 1
        if state is _IDLE:
            group.idle[self.worker_id] = self
        elif state is _STOPPING:
            group.leaving += 1
        elif state is _ACTOR:
            self.is_actor = True
            group.actors += 1
        self.state = state


class GroupState(enum.IntEnum):
    """What a group of workers is for, still."""

    OPEN = 0
    CLOSING = 1  #: no new tasks; workers stop when the queue is empty
    FAILED = 2  #: its workers do not start, or one died that may not: tasks fail at once
    ENDED = 3  #: no tasks; workers are being killed


@final
class Group:
    """Workers that may run the same tasks: a Pool's, an Executor's, or those of plain tasks."""

    __slots__ = (
        "actors",
        "break_on_death",
        "device_workers",
        "error",
        "group_id",
        "hungry",
        "idle",
        "leaving",
        "max_tasks_per_worker",
        "ready",
        "size",
        "start_again_s",
        "start_failures",
        "start_now",
        "starting",
        "state",
        "stocked",
        "unfinished",
        "workers",
    )

    def __init__(
        self,
        group_id: GroupId,
        size: int,
        start_now: bool,
        max_tasks_per_worker: int,
        break_on_death: bool,
    ) -> None:
        self.group_id = group_id
        self.state = GroupState.OPEN
        #: Workers to keep; 0: as many as resources allow.
        self.size = size
        self.start_now = start_now
        self.max_tasks_per_worker = max_tasks_per_worker
        self.break_on_death = break_on_death
        #: What its tasks fail with once it is FAILED.
        self.error = b""
        self.workers: dict[WorkerId, WorkerRecord] = {}
        #: Idle ones; the last is the one that was used last and is most likely awake.
        self.idle: dict[WorkerId, WorkerRecord] = {}
        #: Busy ones that have room for another packet of the class that they run.
        self.hungry: dict[WorkerId, WorkerRecord] = {}
        #: Ones that have more than one packet, so that an idle one could be given some of it.
        self.stocked: dict[WorkerId, WorkerRecord] = {}
        #: Workers that actors live in.
        self.actors = 0
        #: Workers that have had devices, which their libraries may keep in use: they serve no
        #: calls without.
        self.device_workers: dict[WorkerId, None] = {}
        self.starting = 0
        self.leaving = 0  # STOPPING
        #: Deaths in a row of workers that never became ready.
        self.start_failures = 0
        #: No worker is started before this.
        self.start_again_s = 0.0
        #: class id -> queue that is not empty; the first is served next.
        self.ready: dict[ClassId, ClassQueue] = {}
        #: Tasks that have not ended.
        self.unfinished = 0
