"""The objects that a node owns: their values, who holds them, who waits for them.

    PENDING ──seal──▶ READY          (value or error)
       ▲                │
       └──── lost ──────┘            (its node died, lineage runs again)

What: records of objects, counts of holders, and the requests that wait.
Who calls: the node machine.
May touch: nothing.
Invariants: an object is kept while `holders > 0`; each holder is a client, a task that has not
ended, or another object that contains it; a client counts once however many handles it has.
"""

from __future__ import annotations

import enum
from typing import final

from poolray.exceptions import IllegalTransition
from poolray.ids import ClientId, FunctionId, NodeId, ObjectId
from poolray.protocol.values import InArena, InFile


class ObjectState(enum.IntEnum):
    """Whether an object's value exists."""

    PENDING = 0
    READY = 1


PENDING = ObjectState.PENDING
READY = ObjectState.READY
#: Most values contain no refs; this list is shared and never changed.
_NOTHING: list[ObjectId] = []


@final
class Request:
    """A `GetObjects` or `WaitObjects` that is not answered yet."""

    __slots__ = (
        "ahead",
        "client_id",
        "count",
        "fetches",
        "has_restored",
        "is_get",
        "is_peers",
        "object_ids",
        "remaining",
        "request_id",
        "watch",
    )

    def __init__(
        self,
        client_id: ClientId,
        request_id: int,
        object_ids: list[ObjectId],
        count: int,
        is_get: bool,
    ) -> None:
        self.client_id = client_id
        self.request_id = request_id
        self.object_ids = object_ids
        #: How many more objects must become ready before it is answered.
        self.remaining = count
        #: How many ready objects a `wait` asks for.
        self.count = count
        #: How many behind those a `wait` wants looked at as well.
        self.ahead = 0
        self.is_get = is_get
        #: A `wait` for which an object on another node is ready when it has been brought here.
        self.fetches = False
        #: A peer waits, for one object: it is told by a message of its own.
        self.is_peers = False
        #: What was on disk has been asked for, once: what has gone back there meanwhile is read
        #: from the file.
        self.has_restored = False
        #: The watch that a `wait` is for, or that this is the waiter of: told of numbers there.
        self.watch: Watch | None = None


@final
class Watch:
    """A list that a client waits for again and again, while it takes refs from it."""

    __slots__ = (
        "fetches",
        "next_number",
        "object_ids",
        "ready",
        "requests",
        "waiter",
    )

    def __init__(self, client_id: ClientId, fetches: bool) -> None:
        #: An object on another node is ready when it has been brought here.
        self.fetches = fetches
        #: number -> object, of those that the client has not taken.
        self.object_ids: dict[int, ObjectId] = {}
        self.next_number = 0
        #: Heap of the numbers of ready objects, some of which may have been taken since.
        self.ready: list[int] = []
        #: request id -> `wait` that is not answered yet.
        self.requests: dict[int, Request] = {}
        #: Stands for the watch at the objects that are not ready.
        self.waiter = Request(client_id, 0, [], 0, False)
        self.waiter.watch = self
        self.waiter.fetches = fetches


@final
class ObjectRecord:
    """One object that this node owns or has a copy of."""

    __slots__ = (
        "contained",
        "dependents",
        "holders",
        "is_error",
        "seen",
        "state",
        "value",
        "waiters",
    )

    def __init__(self, holders: int = 0) -> None:
        self.state = PENDING
        self.holders = holders
        self.value: bytes | InArena | InFile = b""
        self.is_error = False
        #: Somebody got it, waited for it or passed it on: an error that dies unseen is shown.
        self.seen = False
        #: Objects that the value refers to; this one holds each of them once.
        self.contained = _NOTHING
        #: Request to count down when the object becomes ready -> how often it names the object
        #: (a watch's: the object's number there); None: none, the usual case.
        self.waiters: dict[Request, int] | None = None
        #: Ids of tasks that wait for the object; None: none.
        self.dependents: list[bytes] | None = None

    def seal(
        self, value: bytes | InArena | InFile, is_error: bool, contained: list[ObjectId]
    ) -> None:
        """The value is there."""
        if self.state is READY:
            raise IllegalTransition(what="object", state="READY", event="seal")
        self.value = value
        self.is_error = is_error
        self.contained = contained
        self.state = READY

    def lose(self) -> None:
        """The value is gone and will be made again."""
        if self.state is PENDING:
            raise IllegalTransition(what="object", state="PENDING", event="lose")
        self.state = PENDING
        self.value = b""
        self.contained = _NOTHING

    def replace(self, value: bytes | InArena | InFile, is_error: bool) -> None:
        """The value is elsewhere now, or found to be lost."""
        if self.state is PENDING:
            raise IllegalTransition(what="object", state="PENDING", event="replace")
        self.value = value
        self.is_error = is_error

    def is_here_to_stay(self) -> bool:
        """Whether a `wait` need not ask again: neither an error, which counts as seen only when
        somebody is told of it, nor what may be lost with another node.
        """
        return self.state is READY and type(self.value) is bytes and not self.is_error

    def location(self) -> NodeId | None:
        """The other node that has the value, or None when it is here."""
        value = self.value
        if type(value) is InArena and value.node_id:
            return value.node_id
        return None


@final
class ClientRecord:
    """A process that uses the API: what it holds and what it waits for."""

    __slots__ = ("functions", "held", "pins", "ranges", "requests", "viewed", "watches")

    def __init__(self) -> None:
        #: Objects that the client holds; the values mean nothing, the order is that of holding.
        self.held: dict[ObjectId, None] = {}
        #: Of these, the ones that it had no ref to, only a view of, when it began to hold them;
        #: for those who look into the node's memory.
        self.viewed: dict[ObjectId, None] = {}
        #: request id -> request not answered yet.
        self.requests: dict[int, Request] = {}
        #: number -> list that it waits for again and again.
        self.watches: dict[int, Watch] = {}
        #: object id -> offset of ranges handed out and not sealed; of a file, the number negated.
        self.ranges: dict[ObjectId, int] = {}
        #: object id -> deliveries of a value in memory whose views have not been reported dead.
        self.pins: dict[ObjectId, int] = {}
        #: Functions that it defined and may name.
        self.functions: dict[FunctionId, None] = {}
