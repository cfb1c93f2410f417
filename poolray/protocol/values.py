"""How a value travels, and how a call is described: shared by every conversation.

What: `Value` (inline bytes, a place in the arena, a file), `Outcome` (value or error of one call),
`TaskClass` (what calls of one function have in common) and `TaskSpec` (one call or batch).
Who calls: clients make them, the machines pass them on, workers take them apart.
May touch: nothing.
Invariants: an inline value is plain `bytes`, so the common case costs no wrapper. Messages that
come once per task are no concern of the garbage collector (`gc=False`): they hold bytes, numbers
and lists of these, so that they cannot be part of a cycle.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Annotated, TypeAlias

import msgspec

from poolray.ids import (
    ClassId,
    FunctionId,
    GroupId,
    NodeId,
    ObjectId,
    PlacementGroupId,
    TaskId,
)

#: The concurrency group of what every actor has for its callers' sake (`poolray/direct/`).
OWN_GROUP = "__poolray__"


class CallKind(enum.IntEnum):
    """What a worker does with one payload of a call."""

    CALL = 0  #: payload is (args, kwargs); the result is the function's
    MAP = 1  #: payload is a list of items; the result is the list of f(item)
    STARMAP = 2  #: payload is a list of argument tuples; the result is the list of f(*item)
    APPLY = 3  #: payload is (function, args, kwargs): for callables with state of their own
    CREATE = 4  #: payload is (args, kwargs, `ActorSetup`): the worker becomes the actor
    METHOD = 5  #: payload is (args, kwargs) of the actor's method that the class names
    LEND = 6  #: payload says where the caller is: it sends calls itself (`local/lending.py`)


class Delivery(enum.IntEnum):
    """Where results go."""

    OBJECTS = 0  #: each return value becomes an object, owned by the node
    CALLER = 1  #: straight to the client that submitted, once; nothing is kept


class InArena(msgspec.Struct, frozen=True, array_like=True, tag=1, kw_only=True, gc=False):
    """A value in a node's arena, sealed."""

    object_id: ObjectId
    offset: int  #: bytes from the start of the arena
    size_bytes: int
    node_id: NodeId = NodeId(b"")  #: whose arena; empty: this node's


class InFile(msgspec.Struct, frozen=True, array_like=True, tag=2, kw_only=True, gc=False):
    """A value on disk: in a file of its own, or spilled to one that it shares with others."""

    object_id: ObjectId
    path: str
    size_bytes: int
    offset: int = 0  #: bytes from the start of the file
    checksum: int = 0  #: of the value's bytes, see `objects/checksums.py`


#: A serialized value: the bytes themselves when small, else where they are.
Value: TypeAlias = bytes | InArena | InFile


class Outcome(msgspec.Struct, frozen=True, array_like=True, tag=3, kw_only=True, gc=False):
    """What one call came to, when it is more than one small plain value."""

    values: list[bytes | InArena | InFile]  #: one per return value; one in all for an error
    is_error: bool = False
    retriable: bool = False  #: an error that the task's `retry_exceptions` names
    #: Objects that the values refer to, per value: they live as long as the value does.
    contained: list[list[ObjectId]] = []
    crashed: bool = False  #: an error because the worker died
    summary: str = ""  #: of an error: its class and text, for those who look on
    out_of_memory: bool = False  #: it crashed because it was ended for memory
    raised: bool = False  #: the error is the user code's own


class LabelOperator(enum.IntEnum):
    """What a label has to be."""

    IN = 0  #: one of the values
    NOT_IN = 1  #: none of the values; a node without the label will do
    EXISTS = 2
    NOT_EXISTS = 3


class LabelMatch(msgspec.Struct, frozen=True, array_like=True):
    """One condition on a label of a node."""

    key: str
    operator: LabelOperator
    values: list[str] = []


class Placement(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Where calls may run, beyond what resources say."""

    node_id: NodeId = NodeId(b"")  #: this node; empty: any
    #: Without `node_id`, or where that can never run them, any node will do.
    is_soft: bool = False
    #: Sets of conditions on labels, best first; a node that meets all of one set will do. Empty:
    #: every node.
    labels: list[list[LabelMatch]] = []
    #: Conditions that the node should meet beyond that, if one does.
    wishes: list[LabelMatch] = []
    spread: bool = False  #: nodes take turns
    group: PlacementGroupId = PlacementGroupId(b"")  #: in a bundle of this placement group
    bundle: int = -1  #: which one; -1: any
    captures: bool = False  #: tasks that the calls submit run in the group too


#: A node makes a record of each return of a call at once: what is more would hold up all others.
NUM_RETURNS_MAX = 1_000_000


class TaskClass(msgspec.Struct, frozen=True, array_like=True, tag=4, kw_only=True):
    """What all calls of one function with the same options have in common: a scheduling class."""

    class_id: ClassId
    function_id: FunctionId
    name: str
    kind: CallKind = CallKind.CALL
    delivery: Delivery = Delivery.OBJECTS
    num_returns: Annotated[int, msgspec.Meta(ge=0, le=NUM_RETURNS_MAX)] = 1
    #: Resource name -> demand of one running call, in units of 1/10,000.
    resources: dict[str, int] = {}
    group_id: GroupId = GroupId(0)
    max_retries: int = 3  #: further attempts after a worker's or node's death; -1: no limit
    #: Pickled tuple of exception classes to retry; b"*" for all, b"" for none.
    retry_exceptions: bytes = b""
    max_calls: int = 0  #: calls of this function after which its worker is replaced; 0: never
    #: Parent processes' arrays may be written to by the call (Pool and Executor promise it).
    writable: bool = False
    method: str = ""  #: what `CallKind.METHOD` calls; empty for all other kinds
    placement: Placement | None = None  #: None: wherever the resources are
    is_listed: bool = True  #: whether its tasks appear in listings of what goes on
    #: What a node has, beyond `resources`, that a call may be placed on: it is not taken.
    placed_with: dict[str, int] = {}
    concurrency_group: str = ""  #: of an actor, where its calls run; empty: the default one
    timeout_s: float = 0.0  #: how long a call may run; 0: without end
    stream: int = 0  #: a `StreamMode`: what becomes of what a generator yields
    backpressure: int = 0  #: items that may wait to be taken before it goes on; 0: any number
    actor_backpressure: int = 0  #: the same for all streams of the actor together
    per_yield: int = 1  #: items in what a generator yields at once


def identified(made: TaskClass) -> TaskClass:
    """The class under its id, a hash of all that it says: whoever makes it makes the same."""
    digest = hashlib.blake2b(msgspec.msgpack.encode(made), digest_size=16).digest()
    return msgspec.structs.replace(made, class_id=ClassId(digest))


class TaskSpec(msgspec.Struct, frozen=True, array_like=True, tag=5, kw_only=True, gc=False):
    """One task: a call, or a batch of calls of one class that may be split between workers."""

    task_id: TaskId
    class_id: ClassId
    calls: list[bytes | InArena | InFile]  #: one payload per call
    #: Objects that must be ready first; their values travel to the worker, in this order.
    dependencies: list[ObjectId] = []
    #: Where each dependency goes: a position, or the name of a keyword argument.
    slots: list[int | str] = []
    borrows: list[ObjectId] = []  #: refs inside the payload: kept alive until the task ends
    parent: TaskId = TaskId(b"")  #: the task that submits it; empty for a driver's


class FunctionDefinition(msgspec.Struct, frozen=True, array_like=True, tag=6, kw_only=True):
    """A function's serialized form under its content hash."""

    function_id: FunctionId
    blob: bytes | InArena | InFile
    name: str
    #: Entries of `sys.path` that the worker may lack, in order.
    sys_path: list[str] = []
