"""What head and nodes say about nodes, jobs and actors of the whole cluster.

What: the directory's entries, the questions about them, and what the head decides when a node dies.
Who calls: the node machine, the head machine, shells that list what there is.
May touch: nothing.
Invariants: an actor's host alone says that it is alive; the head alone says that it is restarted
after a node's death, or that it is dead with a node.
"""

from __future__ import annotations

import enum

import msgspec

from poolray.ids import ActorId, NodeId, ObjectId
from poolray.protocol.actors import CreateActor
from poolray.protocol.values import FunctionDefinition, InArena, InFile, TaskClass

# ---- nodes ---------------------------------------------------------------------------------------


class NodeStatus(enum.IntEnum):
    """What the head knows of a node."""

    ALIVE = 0
    DRAINING = 1  #: it ends what it has begun and is given nothing new
    DEAD = 2


class Demand(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Calls that wait for the same resources."""

    resources: dict[str, int]  #: of one call, in units of 1/10,000
    count: int


class NodeRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A node as it is listed."""

    node_id: NodeId
    status: NodeStatus
    total: dict[str, int]
    available: dict[str, int] = {}
    labels: dict[str, str] = {}
    address: str = ""
    info: dict[str, str] = {}
    queued_tasks: int = 0
    reason: str = ""  #: why it is dead, or is being drained
    demands: list[Demand] = []  #: what waits there, by its shape


class ListNodes(msgspec.Struct, frozen=True, array_like=True, tag=315, kw_only=True):
    """Which nodes are there, and which were there? `NodesFound` tells."""

    request_id: int


class NodesFound(msgspec.Struct, frozen=True, array_like=True, tag=357, kw_only=True):
    """Nodes: living ones in the order in which they came, then dead ones."""

    request_id: int
    nodes: list[NodeRow]


class DrainNode(msgspec.Struct, frozen=True, array_like=True, tag=316, kw_only=True):
    """Take a node out of the cluster politely. `HeadReply.done` tells whether there is one."""

    request_id: int
    node_id: NodeId
    reason: str = ""
    #: Seconds that what it runs may take to end; 0: as long as it wants.
    patience_s: float = 0.0


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=361, kw_only=True):
    """End what you have begun, begin nothing new, then say `LeaveCluster`."""

    reason: str
    patience_s: float = 0.0
    #: Only if you have nothing to do; answered by `DrainAnswer`: what the head knows of you is old.
    only_if_idle: bool = False


class DrainAnswer(msgspec.Struct, frozen=True, array_like=True, tag=336, kw_only=True):
    """Whether a node that was to leave if it was idle does so."""

    node_id: NodeId
    is_idle: bool


class LeaveCluster(msgspec.Struct, frozen=True, array_like=True, tag=317, kw_only=True):
    """A node goes, having ended what it had: this is no failure."""

    node_id: NodeId
    reason: str = ""


# ---- jobs ----------------------------------------------------------------------------------------


class JobRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A job as it is listed."""

    job_id: bytes
    node_id: NodeId  #: the node that its driver speaks with
    entrypoint: str = ""
    namespace: str = ""
    is_running: bool = True
    info: dict[str, str] = {}
    #: Seconds on the head's clock, which starts anew with each life of the head.
    started_s: float = 0.0
    ended_s: float = 0.0
    reason: str = ""  #: why it ended, if its driver did not say so


class ListJobs(msgspec.Struct, frozen=True, array_like=True, tag=318, kw_only=True):
    """Which jobs run, and which have run? `JobsFound` tells."""

    request_id: int


class JobsFound(msgspec.Struct, frozen=True, array_like=True, tag=358, kw_only=True):
    """Jobs: those that run, then those that have ended."""

    request_id: int
    jobs: list[JobRow]


class JobEnded(msgspec.Struct, frozen=True, array_like=True, tag=362, kw_only=True):
    """A driver is gone: whatever is kept for its job is not needed any more."""

    job_id: bytes


# ---- actors --------------------------------------------------------------------------------------


class ActorStage(enum.IntEnum):
    """Where in its life an actor is, as the cluster sees it."""

    PENDING = 0
    ALIVE = 1
    RESTARTING = 2
    DEAD = 3


class CreationPart(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """An object that an actor is made with: large code or arguments, or what a ref stands for."""

    object_id: ObjectId
    value: bytes | InArena | InFile  #: bytes wherever it travels or is stored
    is_error: bool = False


class Creation(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """All that it takes to make an actor again on any node."""

    message: CreateActor
    task_class: TaskClass
    function: FunctionDefinition
    parts: list[CreationPart] = []


class ActorEntry(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """An actor in the cluster's directory."""

    actor_id: ActorId
    class_name: str
    name: str = ""  #: empty: it has none
    namespace: str = ""
    detached: bool = False
    max_restarts: int = 0  #: -1: no limit
    #: The node that keeps what it was made with, and makes it again.
    keeper: NodeId
    ordered: bool = True  #: calls of one caller begin in the order in which they were made
    #: The node that it lives on; empty: none yet.
    host: NodeId = NodeId(b"")
    stage: ActorStage = ActorStage.PENDING
    restarts: int = 0
    pid: int = 0
    job_id: bytes = b""
    description: bytes = b""  #: what handles are made of
    death: bytes = b""  #: the error that its calls get from now on (DEAD)
    #: Of a detached actor, for who takes it over; also from its first keeper, if it is small.
    creation: Creation | None = None


class RegisterActor(msgspec.Struct, frozen=True, array_like=True, tag=319, kw_only=True):
    """There is a new actor. With a name, `ActorFound` tells who has that name now."""

    request_id: int  #: 0: nobody waits for an answer
    entry: ActorEntry


class StoreCreation(msgspec.Struct, frozen=True, array_like=True, tag=311, kw_only=True):
    """What a detached actor is made with, where that is more than fits its entry."""

    actor_id: ActorId
    creation: Creation


class AskCreation(msgspec.Struct, frozen=True, array_like=True, tag=368, kw_only=True):
    """What is that detached actor of yours made with? `StoreCreation` tells, if you have it."""

    actor_id: ActorId


class ActorChanged(msgspec.Struct, frozen=True, array_like=True, tag=320, kw_only=True):
    """An actor is at another point of its life. A dead one's name is free."""

    actor_id: ActorId
    stage: ActorStage
    host: NodeId = NodeId(b"")
    pid: int = 0
    restarts: int = 0
    death: bytes = b""


class FindActor(msgspec.Struct, frozen=True, array_like=True, tag=321, kw_only=True):
    """Which actor has this name? `ActorFound` tells."""

    request_id: int
    namespace: str
    name: str


class ActorFound(msgspec.Struct, frozen=True, array_like=True, tag=359, kw_only=True):
    """The actor that has a name, or None."""

    request_id: int
    entry: ActorEntry | None


class WatchActor(msgspec.Struct, frozen=True, array_like=True, tag=322, kw_only=True):
    """Tell me where an actor is, now and whenever that changes (`ActorAt`)."""

    actor_id: ActorId
    #: Who named it to me: should that node die before the actor is known here, nobody will.
    named_by: NodeId = NodeId(b"")


class UnwatchActor(msgspec.Struct, frozen=True, array_like=True, tag=323, kw_only=True):
    """Where an actor is does not matter to me any more."""

    actor_id: ActorId


class ActorAt(msgspec.Struct, frozen=True, array_like=True, tag=360, kw_only=True):
    """Where an actor is."""

    actor_id: ActorId
    stage: ActorStage
    host: NodeId = NodeId(b"")
    death: bytes = b""
    #: Why it is dead, where the head found so: the error is made by who needs it.
    reason: str = ""
    class_name: str = ""
    ordered: bool = True


class KillActorEntry(msgspec.Struct, frozen=True, array_like=True, tag=326, kw_only=True):
    """End an actor by force, wherever it is."""

    actor_id: ActorId
    no_restart: bool = True


class KillKept(msgspec.Struct, frozen=True, array_like=True, tag=367, kw_only=True):
    """Somebody wants an actor killed that you keep."""

    actor_id: ActorId
    no_restart: bool


class RestartActor(msgspec.Struct, frozen=True, array_like=True, tag=363, kw_only=True):
    """The node that an actor lived on is dead: make it again."""

    actor_id: ActorId
    restarts: int  #: how often that has been done by now, this time included


class KeepActor(msgspec.Struct, frozen=True, array_like=True, tag=364, kw_only=True):
    """The node that kept a detached actor is dead: you keep it from now on.

    It lives on, if it lives on you; else make it again.
    """

    entry: ActorEntry


class DropActor(msgspec.Struct, frozen=True, array_like=True, tag=365, kw_only=True):
    """An actor that you host has lost its owner: it ends."""

    actor_id: ActorId
    reason: str


class ListActorEntries(msgspec.Struct, frozen=True, array_like=True, tag=324, kw_only=True):
    """Which actors are there, and which were there? `ActorsFound` tells."""

    request_id: int


class ActorsFound(msgspec.Struct, frozen=True, array_like=True, tag=366, kw_only=True):
    """Actors, without what it takes to make them."""

    request_id: int
    actors: list[ActorEntry]
