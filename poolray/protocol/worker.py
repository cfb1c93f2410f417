"""The worker protocol: a node and one of its workers.

Two channels lead to a worker. Its *task queue* carries `RunTasks` and `StopWorker` and nothing
else, so that the node can take unread packets back; its *control channel* carries replies. One
channel, shared by a fork server and all its workers, leads back: each message names its worker,
and because the fork server reports an exit on the same channel, nothing that a worker said before
it died is ever read after the report of its death.

What: the messages of both directions.
Who calls: the node machine, `local/worker.py`, `local/fork_server.py`.
May touch: nothing.
Invariants: every message fits one `SOCK_SEQPACKET` packet (see `Config.packet_bytes_max`).
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from poolray.ids import ActorId, FunctionId, GroupId, ObjectId, TaskId, WorkerId
from poolray.protocol.actors import ActorReply, ActorRequest, CallCount, NamedActors
from poolray.protocol.client import (
    AddReferences,
    AllocateRange,
    CancelRequest,
    CancelTask,
    DefineClass,
    DefineFunction,
    GetObjects,
    NoteCalls,
    NoteCallSite,
    ObjectValues,
    PinObjects,
    PutObject,
    RangeGranted,
    ReleaseFunction,
    ReleaseReferences,
    ReturnRange,
    SubmitTasks,
    UnpinObjects,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.inquiry import AskHead, AskHeadPart, HeadAnswer
from poolray.protocol.placement import PlacementGroupReply, PlacementRequest
from poolray.protocol.state import QueryState, StateRows
from poolray.protocol.streams import ItemsYielded, StreamReply, StreamRequest
from poolray.protocol.values import FunctionDefinition, InArena, InFile, Outcome, TaskClass


class TaskCall(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """One task in a packet: its calls from `start` on."""

    task_id: TaskId
    class_index: int  #: into the worker's table of classes, as `ClassDefinition.index` filled it
    calls: list[bytes | InArena | InFile]
    arguments: list[bytes | InArena | InFile] = []  #: values of the dependencies
    slots: list[int | str] = []
    error_arguments: list[int] = []  #: which arguments are errors (they fail the task)
    #: Instead of `arguments`, where these are too much for a packet: the worker asks for them.
    fetch: list[ObjectId] = []


class ClassDefinition(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Tells a worker of a task class before its first call."""

    index: int
    task_class: TaskClass
    #: Resource name -> ids of the devices that the worker is to use for its calls from now on.
    devices: dict[str, list[str]] = {}


class RunTasks(msgspec.Struct, frozen=True, array_like=True, tag=1, kw_only=True, gc=False):
    """Node to worker, task queue: run these in order."""

    sequence: int  #: counts packets to this worker, from 1
    tasks: list[TaskCall]
    classes: list[ClassDefinition] = []
    functions: list[FunctionDefinition] = []
    forget: list[FunctionId] = []  #: definitions that will not be used again
    attempt: int = 0  #: of a constructor: how often it was tried before


class StopWorker(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Node to worker, task queue: finish what was read, then exit."""


ToWorkerQueue: TypeAlias = RunTasks | StopWorker


class InterruptTask(msgspec.Struct, frozen=True, array_like=True, tag=3, kw_only=True):
    """Node to worker, control channel, followed by a signal: stop this task if it runs.

    It is for one packet: a task that is tried again is not meant.
    """

    task_id: TaskId
    sequence: int  #: of the packet that the task was sent in
    force: bool  #: end the process instead of raising KeyboardInterrupt
    #: Of the call in the packet that is out of time, whatever its task; -1: a task is meant.
    index: int = -1
    #: From a direct caller: what the call has submitted is to be stopped as well.
    recursive: bool = False


class WorkerReady(msgspec.Struct, frozen=True, array_like=True, tag=10, kw_only=True):
    """Worker to node: the initializer has run, packets are welcome."""

    worker_id: WorkerId
    pid: int


class WorkerFailed(msgspec.Struct, frozen=True, array_like=True, tag=11, kw_only=True):
    """Worker to node: the initializer raised; the worker exits."""

    worker_id: WorkerId
    error: bytes  #: the pickled exception
    reason: str


class TaskResult(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Results of consecutive calls of one task."""

    task_id: TaskId
    start: int  #: index of the first call in the task as it was sent
    results: list[bytes | Outcome]
    done: bool = True  #: False: the task's later calls are still to come


class TasksFinished(msgspec.Struct, frozen=True, array_like=True, tag=12, kw_only=True, gc=False):
    """Worker to node: results, in order of execution."""

    worker_id: WorkerId
    results: list[TaskResult]
    elapsed_ns: int  #: run time of the calls in `results`
    #: Packets ended so far: the worker wants more when this equals the last one sent.
    sequence: int
    #: Objects from arguments that the worker goes on holding (views or refs that outlive the task).
    kept: list[ObjectId] = []
    released: list[ObjectId] = []
    viewed: list[ObjectId] = []  #: of `kept`, those that it has no ref to, only views of
    #: As in `PinObjects` and `UnpinObjects`.
    pinned: list[ObjectId] = []
    unpinned: list[ObjectId] = []


class LoanEnded(msgspec.Struct, frozen=True, array_like=True, tag=28, kw_only=True):
    """Worker on loan to the driver that it works for: it goes, and what it has not reported it has
    not begun.
    """


class TasksHandedBack(msgspec.Struct, frozen=True, array_like=True, tag=13, kw_only=True):
    """Worker to node: these were read but not begun and will not be."""

    worker_id: WorkerId
    #: (task, first call not begun) pairs.
    tasks: list[tuple[TaskId, int]]


class WorkerBlocked(msgspec.Struct, frozen=True, array_like=True, tag=14, kw_only=True):
    """Worker to node: the running task waits in `get` or `wait`; its CPUs are free meanwhile."""

    worker_id: WorkerId


class WorkerUnblocked(msgspec.Struct, frozen=True, array_like=True, tag=15, kw_only=True):
    """Worker to node: the running task goes on."""

    worker_id: WorkerId


class WorkerStopping(msgspec.Struct, frozen=True, array_like=True, tag=16, kw_only=True):
    """Worker to node: it has run the number of tasks it was made for and exits."""

    worker_id: WorkerId


class WorkerExited(msgspec.Struct, frozen=True, array_like=True, tag=17, kw_only=True):
    """Fork server to node: a worker process has ended."""

    worker_id: WorkerId
    pid: int
    exit_code: int | None = None
    signal: int | None = None


class WorkerStarted(msgspec.Struct, frozen=True, array_like=True, tag=18, kw_only=True):
    """Fork server to shell: the process is there (it may still run its initializer)."""

    worker_id: WorkerId
    pid: int


class WorkerOutput(msgspec.Struct, frozen=True, array_like=True, tag=19, kw_only=True):
    """Worker to shell: text for the driver's `sys.stdout` (1) or `sys.stderr` (2)."""

    stream: int
    text: str
    #: The system's number of the thread that wrote it.
    source: int
    #: The rest follows: one write arrives whole, not mixed with what others print.
    unfinished: bool = False
    # In a cluster, where whoever shows it knows nothing of the worker:
    label: str = ""  #: of the task or actor
    pid: int = 0
    job_id: bytes = b""
    worker_id: WorkerId = WorkerId(b"")
    task_id: TaskId = TaskId(b"")  #: that ran when it was written
    #: The place behind it in the worker's own file (0: it has none), and how much was written.
    log_end: int = 0
    log_bytes: int = 0


class NoteTopic(enum.IntEnum):
    """What a note is about."""

    SLOW_CALL = 0  #: pickled (nanoseconds, arguments as text) of one of the slowest calls
    EXIT_RESULT = 1  #: serialized: what the function at a worker's end has returned
    EXIT_ERROR = 2  #: serialized as the error of a call: what it raised


class WorkerNote(msgspec.Struct, frozen=True, array_like=True, tag=30, kw_only=True):
    """Worker to shell: something that is no result of a call, for the owner of the group."""

    worker_id: WorkerId
    topic: NoteTopic
    data: bytes
    #: The rest follows.
    unfinished: bool = False


class WorkerNews(msgspec.Struct, frozen=True, array_like=True, tag=26, kw_only=True):
    """Worker to driver: news of a library in the worker, for its part in the driver."""

    topic: str
    data: bytes


class ForkServerReady(msgspec.Struct, frozen=True, array_like=True, tag=20, kw_only=True):
    """Fork server to shell: it serves; sent once by a spawned one, with what `__main__` offers."""

    pid: int
    main_names: list[str] = []


class ForkServerFailed(msgspec.Struct, frozen=True, array_like=True, tag=21, kw_only=True):
    """Fork server to shell: it could not prepare (a spawned one importing `__main__`)."""

    reason: str


class ClientMessage(msgspec.Struct, frozen=True, array_like=True, tag=22, kw_only=True, gc=False):
    """A worker speaking as a client: what it says to its node while user code runs."""

    worker_id: WorkerId
    message: (
        SubmitTasks
        | DefineClass
        | DefineFunction
        | ReleaseFunction
        | PutObject
        | GetObjects
        | WaitObjects
        | CancelRequest
        | CancelTask
        | AddReferences
        | ReleaseReferences
        | AllocateRange
        | NoteCallSite
        | NoteCalls
        | ReturnRange
        | PinObjects
        | UnpinObjects
        | ActorRequest
        | QueryState
        | PlacementRequest
        | StreamRequest
        | AskHead
        | AskHeadPart
    )


class ActorStarted(msgspec.Struct, frozen=True, array_like=True, tag=24, kw_only=True):
    """Worker to node: the constructor has returned, or raised: then the worker exits."""

    worker_id: WorkerId
    error: bytes = b""  #: an `ActorDiedError`; empty when the actor lives
    repr_name: str = ""  #: what the actor says of itself, where its class defines that


class ActorExiting(msgspec.Struct, frozen=True, array_like=True, tag=25, kw_only=True):
    """Worker to node: the actor ends itself, for good; the process exits."""

    worker_id: WorkerId
    actor_id: ActorId
    reason: str


FromWorkers: TypeAlias = (
    WorkerReady
    | WorkerFailed
    | TasksFinished
    | TasksHandedBack
    | WorkerBlocked
    | WorkerUnblocked
    | WorkerStopping
    | WorkerExited
    | WorkerStarted
    | WorkerOutput
    | WorkerNote
    | WorkerNews
    | ForkServerReady
    | ForkServerFailed
    | ClientMessage
    | ActorStarted
    | ActorExiting
    | ItemsYielded
)

ToWorkerControl: TypeAlias = (
    ObjectValues
    | WaitReply
    | RangeGranted
    | ActorReply
    | NamedActors
    | CallCount
    | StateRows
    | PlacementGroupReply
    | HeadAnswer
    | InterruptTask
    | StreamReply
)


class ForkWorker(msgspec.Struct, frozen=True, array_like=True, tag=40, kw_only=True):
    """Shell to fork server, with two descriptors attached (task queue, control channel)."""

    worker_id: WorkerId
    group_id: GroupId
    slot: int  #: index of the worker's progress word on the control page


class StopForkServer(msgspec.Struct, frozen=True, array_like=True, tag=41):
    """Shell to fork server: kill what is left and exit."""


class KillWorker(msgspec.Struct, frozen=True, array_like=True, tag=42, kw_only=True):
    """Shell to fork server: SIGKILL this worker, if it is still the same process."""

    worker_id: WorkerId


ToForkServer: TypeAlias = ForkWorker | StopForkServer | KillWorker
