"""What direct calls need of the process that makes them.

What: the interfaces alone; `client.py` and `local/direct_host.py` have the implementations, and of
routes `direct/route.py` and `direct/loans.py`.
Who calls: `direct/calls.py`, `direct/connection.py`.
May touch: nothing.
Invariants: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from poolray.ids import ActorId, GroupId, ObjectId, TaskIdSource
from poolray.objects.object_ref import ObjectRef, RefOwner
from poolray.protocol.client import ObjectValues, PutObject
from poolray.protocol.values import TaskClass
from poolray.protocol.worker import TasksFinished

if TYPE_CHECKING:
    from poolray.direct.connection import Connection, Waiting
    from poolray.direct.loans import Door


class Owner(RefOwner, Protocol):
    """The client of the process."""

    link: Any
    task_ids: TaskIdSource
    tasks_group: GroupId
    definitions: Any
    #: object id -> value that need not be asked for.
    prefetched: dict[ObjectId, bytes]
    #: object id -> handles here.
    counts: dict[ObjectId, int]

    def count_of(self, object_id: ObjectId) -> int:
        """The same, with handles that were made just now."""

    def inline(self, value: Any) -> bytes:
        """A small value, serialized."""

    def put_message(self, object_id: ObjectId, value: Any) -> PutObject:
        """What makes a value that of an object, as `put` would."""

    def submit(
        self,
        task_class: TaskClass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        actor_id: ActorId | None = None,
    ) -> list[ObjectRef[Any]]:
        """Make a call by way of the nodes."""

    def read_reply(
        self, reply: ObjectValues, ref: ObjectRef[Any]
    ) -> tuple[BaseException | None, Any]:
        """The error to raise for an object, or None and its value."""


class Route(Protocol):
    """How some calls go, and what becomes of them: those of one actor, or of one function."""

    #: There is no way past the nodes, or it does not pay.
    is_off: bool
    #: The last call by way of the nodes; whether it and all before it are over, as far as is known.
    last: ObjectId
    is_clear: bool
    #: Calls run side by side, in no order.
    is_together: bool
    #: A call that runs may be cancelled by force, which ends its worker.
    is_forcible: bool
    #: Results that the node was promised.
    promises: int

    @property
    def is_passable(self) -> bool:
        """Whether calls may be sent: they come after none that goes another way."""

    def usable(self) -> Connection | None:
        """The way for a call that is made now; None: by way of the nodes."""

    def on_open(self, connection: Connection) -> None:
        """A connection may be used."""

    def on_lost(self, connection: Connection) -> None:
        """Its other end is gone."""

    def on_given_back(self, connection: Connection) -> None:
        """Its worker goes; what it has not answered it has not begun."""

    def on_ended(self, calls: list[Waiting], errors: dict[int, str], report: TasksFinished) -> None:
        """Calls are over, these of them with errors."""

    def on_held(self, call: Waiting) -> None:
        """The worker keeps a result, for the nodes to bring."""

    def on_unsent(self, connection: Connection) -> None:
        """Calls wait there that may not be sent any more."""


class Waiter(Protocol):
    """What a thread waits for."""

    done: bool
    #: So many calls have to end.
    remaining: int
    #: One that has failed is enough.
    ends_on_error: bool

    def finish(self) -> None:
        """Wake who waits."""


class Host(Protocol):
    """The loop that reads for a process."""

    #: Tells this machine from others; equal to that of a node: its workers are near.
    machine: str

    def watch(self, connection: Connection | Door) -> None:
        """Call its `answer` when it can be read."""

    def unwatch(self, connection: Connection | Door) -> None:
        """Do not, any more."""

    def make_waiter(self) -> Waiter:
        """Something to wait for."""

    def wait(self, waiter: Waiter, timeout_s: float | None) -> bool:
        """Wait until it is done; False when the time is up."""

    def on_sent(self) -> None:
        """Something was sent: somebody has to read what comes."""

    def read_now(self) -> None:
        """Take in what has come."""

    def show_error(self, error: bytes) -> None:
        """Nobody has asked for what failed."""
