"""The node protocol: what a shell tells its node, nodes tell each other, and head and nodes say.

What: messages of three conversations that all end at a node.
Who calls: shells, the node machine, the head machine.
May touch: nothing.
Invariants: peers and head speak over links that deliver once and in order while both ends live
(`node/peer_link.py` makes such a link of one that loses).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.ids import (
    ActorId,
    ClassId,
    FunctionId,
    GroupId,
    NodeId,
    ObjectId,
    PlacementGroupId,
    TaskId,
    WorkerId,
)
from poolray.protocol.actors import CreateActor
from poolray.protocol.directory import (
    ActorAt,
    ActorChanged,
    ActorEntry,
    ActorFound,
    ActorsFound,
    AskCreation,
    Demand,
    Drain,
    DrainAnswer,
    DrainNode,
    DropActor,
    FindActor,
    JobEnded,
    JobsFound,
    KeepActor,
    KillActorEntry,
    KillKept,
    LeaveCluster,
    ListActorEntries,
    ListJobs,
    ListNodes,
    NodesFound,
    NodeStatus,
    RegisterActor,
    RestartActor,
    StoreCreation,
    UnwatchActor,
    WatchActor,
)
from poolray.protocol.placement import KeptBundles, PlacementHeadMessage, PlacementHeadRequest
from poolray.protocol.state import (
    ActorRow,
    Condition,
    LogRow,
    LogTextRow,
    LogWish,
    MemoryRow,
    NodeRow,
    ObjectRow,
    StateKind,
    TaskRow,
    WorkerRow,
)
from poolray.protocol.streams import Yielded
from poolray.protocol.values import (
    FunctionDefinition,
    InArena,
    InFile,
    Outcome,
    TaskClass,
    TaskSpec,
)

# ---- shell to node -------------------------------------------------------------------------------


class CreateGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Workers of one kind: a Pool's, an Executor's, or those of plain tasks."""

    group_id: GroupId
    #: Workers to keep alive; 0: as many as the resources of waiting tasks allow.
    size: int = 0
    #: Start all `size` workers now rather than as calls need them.
    start_now: bool = False
    max_tasks_per_worker: int = 0  #: calls after which a worker is replaced; 0: never
    #: A worker's death fails all tasks of the group and ends it, as the standard executor does.
    break_on_death: bool = False


class CloseGroup(msgspec.Struct, frozen=True, kw_only=True):
    """No more tasks will come: stop the workers once those in the queue are done."""

    group_id: GroupId


class TerminateGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Drop the tasks, kill the workers."""

    group_id: GroupId


class FailGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The group's fork server is gone: its tasks fail with this error."""

    group_id: GroupId
    error: bytes


class ResizeGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Keep this many workers from now on (more start at once, surplus ones end when idle)."""

    group_id: GroupId
    size: int


class PacketsTakenBack(msgspec.Struct, frozen=True, kw_only=True):
    """These packets were in the worker's queue, unread; they are not any more."""

    worker_id: WorkerId
    sequences: list[int]


class WorkerLost(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's process has ended; its queue has been taken back already."""

    worker_id: WorkerId
    pid: int
    exit_code: int | None
    signal: int | None
    #: The packet and the call in it that the worker began last (0, 0 when none).
    sequence: int
    index: int
    #: It died with the process that it was forked from: it is not its own fault.
    with_server: bool = False


class CallProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker runs at this moment, as `LookAtCall` asked."""

    worker_id: WorkerId
    #: The packet and the call in it that the worker began last.
    sequence: int
    index: int
    running_s: float  #: since when; below 0: it is between two calls


class ClientLeft(msgspec.Struct, frozen=True, kw_only=True):
    """A client is gone: let go of all it held."""

    client_id: bytes


class SpillDone(msgspec.Struct, frozen=True, kw_only=True):
    """A batch of values is on disk."""

    batch: int
    places: list[InFile]  #: in the order of the `SpillObjects`, all in one file
    elapsed_s: float


class SpillFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A batch could not be written; nothing of it is left on disk."""

    batch: int
    reason: str
    elapsed_s: float


class RestoreDone(msgspec.Struct, frozen=True, kw_only=True):
    """A value is back in memory."""

    restore: int
    elapsed_s: float


class RestoreFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A value could not be read."""

    restore: int
    reason: str
    is_lost: bool  #: the file is gone or damaged; False: another try may succeed
    elapsed_s: float


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """A process that uses much memory."""

    pid: int
    used_bytes: int  #: that nobody shares with it
    name: str


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """How much memory of the machine, or of the container, is in use."""

    used_bytes: int
    total_bytes: int
    #: What workers that were asked for use by themselves; those that are gone are left out.
    workers: list[tuple[WorkerId, int]] = []
    is_detailed: bool = False  #: it was asked for in detail
    processes: list[ProcessMemory] = []  #: the largest, largest first


class HeadBack(msgspec.Struct, frozen=True):
    """The link to the head is new: what was on its way there may be lost, and the head may be
    another one that knows only what was stored.
    """


class ChunkArrived(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that `ExpectChunk` told of have come past the links, and are where they belong."""

    number: int


class ChunkMissing(msgspec.Struct, frozen=True, kw_only=True):
    """The source of a chunk that was expected could not read it."""

    number: int


class ChunksLost(msgspec.Struct, frozen=True, kw_only=True):
    """What they were to come by has ended: these chunks will not come unless asked for again."""

    numbers: list[int]


class FileSealed(msgspec.Struct, frozen=True, kw_only=True):
    """A value that came from another node is in a file of its own."""

    object_id: ObjectId
    file_number: int
    place: InFile | None  #: None: it could not be written, and is deleted


class LogsSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a `LookIntoLogs`."""

    number: int
    rows: list[LogRow | LogTextRow]


class Tick(msgspec.Struct, frozen=True):
    """Time has passed: `next_deadline` said when to say so."""


# ---- node to node --------------------------------------------------------------------------------


class Lent(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """An object that the receiver may name from now on, once more than before: the sender keeps it
    until that many `PeerReleases` say that it is not needed.
    """

    object_id: ObjectId
    #: Small: the bytes; large: where they are. None: not there yet, `ObjectReady` will come.
    value: bytes | InArena | None = None
    is_error: bool = False
    #: Objects that the value refers to; each of them is lent as well, earlier in the same message.
    contained: list[ObjectId] = []


class ForwardedTask(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A task with all that another node needs to run it."""

    spec: TaskSpec
    attempts: int
    #: Dependencies, refs inside the payload, and what their values refer to.
    lent: list[Lent] = []
    actor_id: ActorId = ActorId(b"")  #: whose method it calls; empty: no actor's
    creation: CreateActor | None = None  #: of a constructor's call: host the actor for me


class ForwardTasks(msgspec.Struct, frozen=True, array_like=True, tag=201, kw_only=True):
    """Run these for me."""

    tasks: list[ForwardedTask]
    classes: list[TaskClass]
    functions: list[FunctionDefinition]


class ForwardedResult(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What came of one forwarded task."""

    task_id: TaskId
    result: bytes | Outcome
    #: It could not begin there (an argument was lost on the way): its owner decides again.
    returned: bool = False
    #: What the values refer to.
    lent: list[Lent] = []
    estimate_s: float = 0.0  #: how long calls of its class take here; 0: that is not known


class ForwardedResults(msgspec.Struct, frozen=True, array_like=True, tag=202, kw_only=True):
    """Results of forwarded tasks. The owner now holds what they name in the sender's arena."""

    results: list[ForwardedResult]


class PullChunk(msgspec.Struct, frozen=True, array_like=True, tag=203, kw_only=True):
    """Send me these bytes of an object. Who asks for some keeps it until `PullEnded`."""

    object_id: ObjectId  #: under your name for it
    offset: int  #: bytes from the start of the value
    size_bytes: int
    #: The request's own number, which its answer bears; the asking node never uses it again.
    number: int = 0
    by_message: bool = False  #: as `ChunkData` in any case: there is no place to write it to


class ChunkData(msgspec.Struct, frozen=True, array_like=True, tag=204, kw_only=True):
    """Bytes of an object; with `missing`, it is not there any more.

    `data` is never looked at by a machine: a shell may send it as a frame of its own and put any
    buffer here, which comes back to it in `WriteChunk`. Where shells have a faster way for bytes,
    `ChunkArrived` takes the place of this message.
    """

    object_id: ObjectId
    offset: int
    data: bytes = b""
    missing: bool = False
    number: int = 0  #: of the `PullChunk` that this answers


class PullEnded(msgspec.Struct, frozen=True, array_like=True, tag=207, kw_only=True):
    """No more bytes of this object are wanted now."""

    object_id: ObjectId
    #: The whole object is here now: others may be sent to us for it.
    is_copied: bool = False


class ReturnTasks(msgspec.Struct, frozen=True, array_like=True, tag=234, kw_only=True):
    """Give me back what you have of this class and have not begun."""

    class_id: ClassId


class AwaitObject(msgspec.Struct, frozen=True, array_like=True, tag=208, kw_only=True):
    """What you lent me is not where you said any more: tell me where it is, when it is."""

    object_id: ObjectId
    lost_at: NodeId


class ObjectReady(msgspec.Struct, frozen=True, array_like=True, tag=209, kw_only=True):
    """Something that was lent before it was there is there now."""

    object: Lent  #: it was lent before, and is not once more
    lent: list[Lent] = []  #: what the value refers to


class AskSource(msgspec.Struct, frozen=True, array_like=True, tag=210, kw_only=True):
    """I want the bytes of what you lent me: from whom? `UseSource` tells, when it is my turn."""

    object_id: ObjectId


class UseSource(msgspec.Struct, frozen=True, array_like=True, tag=211, kw_only=True):
    """Pull an object from this node, under this name."""

    object_id: ObjectId
    node_id: NodeId
    name: ObjectId
    #: Nodes that have all of it as well, under `object_id`: parts may come from these.
    more: list[NodeId] = []


class SourceDone(msgspec.Struct, frozen=True, array_like=True, tag=212, kw_only=True):
    """I am done with the source that you gave me for an object."""

    object_id: ObjectId
    node_id: NodeId
    is_copied: bool  #: I have all of it and serve others; else it was not there


class TakeObjects(msgspec.Struct, frozen=True, array_like=True, tag=233, kw_only=True):
    """I am about to leave: fetch what I keep for you."""

    object_ids: list[ObjectId]  #: under my names for them


class EndHosted(msgspec.Struct, frozen=True, array_like=True, tag=213, kw_only=True):
    """An actor that you host for me is not needed any more."""

    actor_id: ActorId
    reason: str = ""  #: kill it, for this reason; empty: it ends when its calls are over
    may_restart: bool = False  #: its end is to be told as a crash


class HostedEnded(msgspec.Struct, frozen=True, array_like=True, tag=214, kw_only=True):
    """An actor that I hosted for you has ended."""

    actor_id: ActorId
    error: bytes
    may_restart: bool  #: it crashed; False: it was ended on purpose


class AskHandle(msgspec.Struct, frozen=True, array_like=True, tag=215, kw_only=True):
    """Somebody here wants a handle to an actor that you keep."""

    actor_id: ActorId
    #: What the asker knows it as, for who does not know it (yet).
    name: str = ""
    namespace: str = ""


class HandleLent(msgspec.Struct, frozen=True, array_like=True, tag=216, kw_only=True):
    """A handle that was asked for; empty when the actor is dead."""

    actor_id: ActorId
    lent: list[Lent]
    description: bytes = b""  #: what handles are made of


class PeerReleases(msgspec.Struct, frozen=True, array_like=True, tag=205, kw_only=True):
    """I no longer need these objects, which you lent me as often as they are named here."""

    object_ids: list[ObjectId]


class CancelForwarded(msgspec.Struct, frozen=True, array_like=True, tag=206, kw_only=True):
    """Stop a task that I gave you; its result says what came of that."""

    task_id: TaskId
    force: bool
    recursive: bool


class ForwardedItems(msgspec.Struct, frozen=True, array_like=True, tag=231, kw_only=True):
    """Items of a forwarded task. The owner now holds what they name in the sender's arena."""

    items: Yielded
    lent: list[Lent] = []  #: what the values refer to


class StreamProgress(msgspec.Struct, frozen=True, array_like=True, tag=232, kw_only=True):
    """Owner to the node that runs its generator: how many items have been taken."""

    task_id: TaskId
    consumed: int
    closed: bool = False  #: nobody will take any


class PeerQuery(msgspec.Struct, frozen=True, array_like=True, tag=217, kw_only=True):
    """Tell a client of mine of these; answered with one or more `PeerRows`."""

    request_id: int
    kind: StateKind
    limit: int = 0  #: rows at the most; 0: all
    where: list[Condition] = []
    log: LogWish = LogWish()


class PeerRows(msgspec.Struct, frozen=True, array_like=True, tag=218, kw_only=True):
    """The rows, or a part of them; `more` is true for all but the last."""

    request_id: int
    now_s: float  #: on the clock that the rows' times are of
    rows: list[
        TaskRow | WorkerRow | ObjectRow | NodeRow | ActorRow | LogRow | LogTextRow | MemoryRow
    ]
    more: bool = False


PeerMessage: TypeAlias = (
    ForwardTasks
    | ForwardedResults
    | PullChunk
    | ChunkData
    | PullEnded
    | PeerReleases
    | CancelForwarded
    | ReturnTasks
    | AwaitObject
    | ObjectReady
    | AskSource
    | UseSource
    | SourceDone
    | ForwardedItems
    | StreamProgress
    | TakeObjects
    | EndHosted
    | HostedEnded
    | AskHandle
    | HandleLent
    | PeerQuery
    | PeerRows
)


# ---- node to head --------------------------------------------------------------------------------


class RegisterNode(msgspec.Struct, frozen=True, array_like=True, tag=301, kw_only=True):
    """A node joins the cluster, or is back after its link to the head was new: also a head that was
    started again learns from this what the node has.
    """

    node_id: NodeId
    total: dict[str, int]
    labels: dict[str, str] = {}
    protocol_version: int = 1
    address: str = ""  #: where other nodes reach it
    #: For those who look on (host name, IP address, pid, …): opaque to the machines.
    info: dict[str, str] = {}
    actors: list[ActorEntry] = []  #: those that it keeps or hosts
    watched: list[ActorId] = []  #: actors whose place it wants to know
    peers: list[NodeId] = []  #: nodes that it takes for living
    dead_actors: list[ActorId] = []  #: of those that it kept, the last that died
    #: It lives in one process with the head, which hears of it when it is asked something.
    is_alone: bool = False
    bundles: list[KeptBundles] = []  #: those of placement groups that it has set aside or open
    watched_groups: list[PlacementGroupId] = []  #: placement groups of which it wants to hear


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=302, kw_only=True):
    """A node lives, and this much of it is free."""

    node_id: NodeId
    available: dict[str, int]
    queued_tasks: int
    demands: list[Demand] = []  #: what waits, by its shape: those of which most wait


class HeadPutFunction(msgspec.Struct, frozen=True, array_like=True, tag=303, kw_only=True):
    """Keep a function for every node to look up."""

    definition: FunctionDefinition


class HeadGetFunction(msgspec.Struct, frozen=True, array_like=True, tag=304, kw_only=True):
    """Which function has this id?"""

    function_id: FunctionId


class KeyValuePut(msgspec.Struct, frozen=True, array_like=True, tag=305, kw_only=True):
    """Store a value under a key."""

    request_id: int
    namespace: str
    key: bytes
    value: bytes
    overwrite: bool = True


class KeyValueGet(msgspec.Struct, frozen=True, array_like=True, tag=306, kw_only=True):
    """Ask for the value of a key."""

    request_id: int
    namespace: str
    key: bytes


class KeyValueDelete(msgspec.Struct, frozen=True, array_like=True, tag=307, kw_only=True):
    """Remove a key, or all keys that begin with it."""

    request_id: int
    namespace: str
    key: bytes
    by_prefix: bool = False


class KeyValueList(msgspec.Struct, frozen=True, array_like=True, tag=308, kw_only=True):
    """Ask for the keys that begin so."""

    request_id: int
    namespace: str
    prefix: bytes


class RegisterJob(msgspec.Struct, frozen=True, array_like=True, tag=309, kw_only=True):
    """A driver has come."""

    job_id: bytes
    node_id: NodeId
    entrypoint: str = ""
    namespace: str = ""
    info: dict[str, str] = {}


class FinishJob(msgspec.Struct, frozen=True, array_like=True, tag=310, kw_only=True):
    """A driver has gone."""

    job_id: bytes
    reason: str = ""  #: if it did not say goodbye: how it ended


class KeyValueExists(msgspec.Struct, frozen=True, array_like=True, tag=325, kw_only=True):
    """Is there such a key? `HeadReply.done` tells."""

    request_id: int
    namespace: str
    key: bytes


class ListNames(msgspec.Struct, frozen=True, array_like=True, tag=314, kw_only=True):
    """Which names are taken? `NamesFound` tells."""

    request_id: int
    namespace: str | None = None  #: None: those of all namespaces


HeadRequest: TypeAlias = (
    RegisterNode
    | Heartbeat
    | HeadPutFunction
    | HeadGetFunction
    | KeyValuePut
    | KeyValueGet
    | KeyValueDelete
    | KeyValueList
    | RegisterJob
    | FinishJob
    | ListNames
    | ListNodes
    | DrainNode
    | DrainAnswer
    | LeaveCluster
    | ListJobs
    | RegisterActor
    | ActorChanged
    | FindActor
    | WatchActor
    | UnwatchActor
    | KillActorEntry
    | ListActorEntries
    | StoreCreation
    | KeyValueExists
    | PlacementHeadRequest
)


# ---- head to node --------------------------------------------------------------------------------


class NodeView(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One node as the head sees it."""

    node_id: NodeId
    total: dict[str, int]
    available: dict[str, int]
    queued_tasks: int
    labels: dict[str, str] = {}
    address: str = ""
    info: dict[str, str] = {}
    status: NodeStatus = NodeStatus.ALIVE


class ClusterView(msgspec.Struct, frozen=True, array_like=True, tag=351, kw_only=True):
    """Nodes that joined or changed since the last view."""

    nodes: list[NodeView]


class NodeDied(msgspec.Struct, frozen=True, array_like=True, tag=352, kw_only=True):
    """A node is dead, for good: it would have to join again under a new id."""

    node_id: NodeId
    reason: str = ""


class FunctionFound(msgspec.Struct, frozen=True, array_like=True, tag=353, kw_only=True):
    """The function asked for, or None."""

    function_id: FunctionId
    definition: FunctionDefinition | None


class HeadReply(msgspec.Struct, frozen=True, array_like=True, tag=354, kw_only=True):
    """The answer to a numbered request.

    `found` is the value, the keys or None; `done` tells whether the request changed something;
    `count` is the number of keys that were removed, or that a put has found.
    """

    request_id: int
    done: bool
    found: bytes | list[bytes] | None = None
    count: int = 0


class NamesFound(msgspec.Struct, frozen=True, array_like=True, tag=356, kw_only=True):
    """Names that are taken, with their namespaces."""

    request_id: int
    names: list[tuple[str, str]]  #: (namespace, name) pairs, in the order in which they were taken


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=355, kw_only=True):
    """The node may not join: the reason in words."""

    reason: str
    #: It was a member and was given up: whatever it runs has been given to others.
    is_dead: bool = False


HeadMessage: TypeAlias = (
    ClusterView
    | NodeDied
    | FunctionFound
    | HeadReply
    | NamesFound
    | Refused
    | NodesFound
    | JobsFound
    | JobEnded
    | ActorFound
    | ActorAt
    | ActorsFound
    | Drain
    | RestartActor
    | KeepActor
    | AskCreation
    | KillKept
    | DropActor
    | PlacementHeadMessage
)
