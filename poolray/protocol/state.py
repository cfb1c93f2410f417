"""The state protocol: what a node tells of its tasks, workers, objects and itself.

What: the question, the rows of the answer, and the answer.
Who calls: clients ask (for `poolray.util.state`, `timeline`, `nodes`), the node machine answers.
May touch: nothing.
Invariants: times are seconds on the monotonic clock of the node's machine; amounts are in units of
1/10,000; a row is a copy: what becomes of its subject changes nothing in it.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from poolray.ids import ActorId, GroupId, NodeId, ObjectId, TaskId, WorkerId
from poolray.protocol.memory import MemoryTable
from poolray.protocol.values import CallKind


class StateKind(enum.IntEnum):
    """What may be asked for."""

    NODES = 0
    TASKS = 1
    WORKERS = 2
    OBJECTS = 3
    ACTORS = 8
    LOGS = 9  #: files of logs
    LOG_TEXT = 10  #: a part of one of them
    MEMORY = 11  #: objects with who holds them, and the store


class Condition(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a row is asked for by: an id in hexadecimal digits, or a text, in any case."""

    field: str
    equal: bool  #: whether it is to be that value, or another
    value: str


class LogWish(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Which files of logs (LOGS), or which part of which (LOG_TEXT)."""

    pattern: str = "*"  #: LOGS: names that match it, as in a shell
    name: str = ""  #: LOG_TEXT: of the file, without a folder
    start: int = 0  #: bytes of its text from the beginning; below 0: from its end
    size_bytes: int = 0  #: at the most; a node gives less, if it likes
    #: Only what this attempt of this task has written: `start` counts from that.
    task_id: TaskId = TaskId(b"")
    attempt: int = 0


class QueryState(msgspec.Struct, frozen=True, array_like=True, tag=118, kw_only=True):
    """Client to node: tell of these. Answered with one or more `StateRows`."""

    request_id: int
    kind: StateKind
    #: Of all nodes that are alive, not of this one alone: for as long as `timeout_s`.
    everywhere: bool = False
    timeout_s: float = 30.0  #: of who is asked through this one
    limit: int = 0  #: rows of each node at the most; 0: all
    where: list[Condition] = []  #: all of them hold for the rows that are told
    of_node: NodeId = NodeId(b"")  #: of this node alone; empty: of the one that is asked
    log: LogWish = LogWish()


class TaskRow(msgspec.Struct, frozen=True, array_like=True, tag=1, kw_only=True):
    """One task that has not ended, or one that ended not long ago."""

    task_id: TaskId
    attempt: int
    name: str
    function_name: str
    state: str
    required: dict[str, int]
    worker_id: WorkerId = WorkerId(b"")
    pid: int = 0
    #: When it was sent to its worker, or began there; 0: not yet.
    started_s: float = 0.0
    ended_s: float = 0.0
    error_type: str = ""
    error_message: str = ""
    kind: CallKind = CallKind.CALL
    actor_id: ActorId = ActorId(b"")  #: of the actor that it calls or makes
    parent_id: TaskId = TaskId(b"")  #: the task that submitted it; empty for a driver's
    group_id: GroupId = GroupId(0)  #: its workers: of which job it is
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


class WorkerRow(msgspec.Struct, frozen=True, array_like=True, tag=2, kw_only=True):
    """One worker, alive or dead for not long."""

    worker_id: WorkerId
    pid: int
    is_alive: bool
    started_s: float
    ended_s: float = 0.0
    exit_code: int | None = None
    signal: int | None = None
    was_told: bool = False  #: its end had been asked for
    out_of_memory: bool = False  #: it was ended because memory was short
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


class ObjectRow(msgspec.Struct, frozen=True, array_like=True, tag=3, kw_only=True):
    """One object."""

    object_id: ObjectId
    size_bytes: int  #: as serialized; -1: not there yet
    is_ready: bool
    is_error: bool
    holders: int  #: processes, tasks and objects that hold it
    in_store: bool  #: in shared memory, not inside its messages
    call_site: str = ""  #: where its first ref was made, if that is recorded
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


class NodeRow(msgspec.Struct, frozen=True, array_like=True, tag=4, kw_only=True):
    """A node: first the one that answers, then the others that it knows."""

    node_id: NodeId
    total: dict[str, int]
    available: dict[str, int]
    labels: dict[str, str]
    is_alive: bool = True
    address: str = ""  #: HOST:PORT where other nodes reach it; empty without a cluster
    info: dict[str, str] = {}  #: what its daemon says of itself


class ActorRow(msgspec.Struct, frozen=True, array_like=True, tag=8, kw_only=True):
    """One actor, alive or dead for not long."""

    actor_id: ActorId
    class_name: str
    state: str
    required: dict[str, int]
    name: str = ""
    namespace: str = ""
    pid: int = 0  #: 0: not created yet
    is_detached: bool = False
    restarts: int = 0
    death_cause: str = ""
    repr_name: str = ""  #: what it says of itself, where its class defines that
    group_id: GroupId = GroupId(0)  #: its workers: of which job it is
    #: The node that it lives on; empty: the one that tells of it.
    node_id: NodeId = NodeId(b"")


class LogRow(msgspec.Struct, frozen=True, array_like=True, tag=9, kw_only=True):
    """A file of logs, those that were written to last at the end."""

    name: str
    size_bytes: int
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


class LogTextRow(msgspec.Struct, frozen=True, array_like=True, tag=10, kw_only=True):
    """A part of a file of logs. Places count bytes from the beginning of what was ever written:
    what comes first is gone after a while.
    """

    name: str
    data: bytes
    start: int  #: of these bytes
    first: int  #: place of the first byte that is there …
    end: int  #: … and behind the last one
    is_closed: bool = False  #: who wrote it has ended: nothing will be added
    refusal: str = ""  #: why there is nothing to read, in words
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


class MemoryRow(msgspec.Struct, frozen=True, array_like=True, tag=11, kw_only=True):
    """A node's memory, or a part of it: some of its objects, and all else as in each part."""

    table: MemoryTable
    node_id: NodeId = NodeId(b"")  #: the node that tells of it; empty: the one that was asked


StateRow: TypeAlias = (
    TaskRow | WorkerRow | ObjectRow | NodeRow | ActorRow | LogRow | LogTextRow | MemoryRow
)


class StateRows(msgspec.Struct, frozen=True, array_like=True, tag=160, kw_only=True):
    """Node to client: the rows, or a part of them; `more` is true for all but the last."""

    request_id: int
    rows: list[
        TaskRow | WorkerRow | ObjectRow | NodeRow | ActorRow | LogRow | LogTextRow | MemoryRow
    ]
    more: bool = False
    #: In the last part: nodes that were asked as well and have not answered in time, or died.
    missing: list[NodeId] = []
