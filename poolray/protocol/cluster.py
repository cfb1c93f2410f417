"""The cluster's shells among themselves: sign-on, questions, jobs, what workers print.

What: messages of drivers and their daemon, of daemons about jobs, and questions that anybody who
has the token may ask a daemon.
Who calls: `poolray/cluster/`; no machine sees one of these.
May touch: nothing.
Invariants: a question may be asked again, which changes nothing more; `Frames` keep their shape in
every version, so that two versions can tell each other that they are two.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from poolray.ids import GroupId, NodeId
from poolray.protocol.directory import NodeRow
from poolray.protocol.placement import GroupRow


class FrameKind(enum.IntEnum):
    """What a frame between machines carries."""

    LINK = 1  #: a `LinkFrame`
    REFUSAL = 2  #: words: the sender will not speak with us
    QUESTION = 3
    ANSWER = 4


# ---- driver and daemon ---------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=501, kw_only=True):
    """A driver signs on at a node's daemon."""

    protocol_version: int
    pid: int
    namespace: str
    entrypoint: str = ""
    log_to_driver: bool = True
    #: It lives on another machine, or may: values travel inside messages.
    is_remote: bool = False


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=502, kw_only=True):
    """The daemon takes it in. On the same machine the arena's descriptor comes along."""

    node_id: NodeId
    job_id: bytes
    group_id: GroupId  #: of the workers that run this job's tasks
    client_id: bytes
    arena_bytes: int
    #: Fields of the daemon's `Config` that differ from the defaults.
    config: dict[str, int | float]
    labels: dict[str, str]
    head_address: str  #: HOST:PORT
    node_address: str  #: the node's host
    session_folder: str
    direct_ports: list[int] = []  #: where workers come to drivers, and the other way; empty: any


class Farewell(msgspec.Struct, frozen=True, array_like=True, tag=503, kw_only=True):
    """This conversation is over, or was never begun: the reason in words."""

    reason: str


class Output(msgspec.Struct, frozen=True, array_like=True, tag=504, kw_only=True):
    """Text that a worker has printed, on its way to the driver of its job."""

    job_id: bytes
    stream: int  #: 1: standard output, 2: standard error
    text: str
    label: str  #: of the task or actor
    pid: int
    address: str  #: of its node


class News(msgspec.Struct, frozen=True, array_like=True, tag=507, kw_only=True):
    """What a library in a worker tells its part in the driver, on its way there."""

    job_id: bytes
    topic: str
    data: bytes
    address: str  #: of the worker's node


class UserNotice(msgspec.Struct, frozen=True, array_like=True, tag=505, kw_only=True):
    """Something that the user of a driver should know."""

    text: str
    is_warning: bool = False


class UserError(msgspec.Struct, frozen=True, array_like=True, tag=506, kw_only=True):
    """An error that nobody has looked at."""

    value: bytes


# ---- daemons about jobs --------------------------------------------------------------------------


class JobStarted(msgspec.Struct, frozen=True, array_like=True, tag=521, kw_only=True):
    """Tasks of this job will follow on this link."""

    job_id: bytes
    group_id: GroupId
    namespace: str
    log_to_driver: bool = True
    node_id: NodeId = NodeId(b"")  #: the driver's: the job ends with it


# ---- daemons about bytes of values ---------------------------------------------------------------


class OpenBulk(msgspec.Struct, frozen=True, array_like=True, tag=561, kw_only=True):
    """I shall connect to your port for values: `BulkPort` says which. Who has this link has the
    cluster's token, so this secret proves as much.
    """

    connection_id: bytes  #: never used before
    key: bytes
    machine: str  #: mine: on the same one, bytes may stay in the open


class BulkPort(msgspec.Struct, frozen=True, array_like=True, tag=562, kw_only=True):
    """Where to connect."""

    connection_id: bytes
    port: int


class CloseBulk(msgspec.Struct, frozen=True, array_like=True, tag=563, kw_only=True):
    """That connection is no more: nothing comes by it, or is to be sent by it."""

    connection_id: bytes
    #: Whoever tells this had begun to send by it: what has not come by now never will.
    is_dropped: bool = False


BulkMessage: TypeAlias = OpenBulk | BulkPort | CloseBulk
DaemonMessage: TypeAlias = JobStarted | Output | News | BulkMessage


# ---- questions -----------------------------------------------------------------------------------


class AskWho(msgspec.Struct, frozen=True, array_like=True, tag=541, kw_only=True):
    """Who is there?"""


class AskNodes(msgspec.Struct, frozen=True, array_like=True, tag=542, kw_only=True):
    """Which nodes are there, and what goes on? For the head."""


class AskDrain(msgspec.Struct, frozen=True, array_like=True, tag=543, kw_only=True):
    """Take this node out of the cluster politely. For the head; once it is told, again is no more.

    Nobody of the cluster needs to run on the machine that asks.
    """

    node_id: NodeId
    reason: str
    patience_s: float = 0.0  #: seconds that what it runs may take to end; 0: without end
    only_if_idle: bool = False


class Who(msgspec.Struct, frozen=True, array_like=True, tag=551, kw_only=True):
    """A daemon describes itself."""

    role: str  #: "head" or "node"
    pid: int
    version: str  #: of poolray
    python: str
    protocol_version: int
    session_folder: str = ""
    node_id: NodeId = NodeId(b"")  #: of a node's daemon


class Nodes(msgspec.Struct, frozen=True, array_like=True, tag=552, kw_only=True):
    """The cluster, as the head sees it."""

    nodes: list[NodeRow]
    jobs: int
    session_folder: str
    #: Placement groups with bundles that have no place; the head knows them.
    pending_groups: list[GroupRow] = []


class DrainStarted(msgspec.Struct, frozen=True, array_like=True, tag=554, kw_only=True):
    """The node has been told to leave, or why not."""

    refusal: str = ""
    #: It has been asked whether it is idle, and has not answered: ask again.
    is_pending: bool = False
    #: It has left already.
    has_left: bool = False


class NotUnderstood(msgspec.Struct, frozen=True, array_like=True, tag=553, kw_only=True):
    """This daemon does not answer such questions."""

    reason: str


Question: TypeAlias = AskWho | AskNodes | AskDrain
Answer: TypeAlias = Who | Nodes | DrainStarted | NotUnderstood
