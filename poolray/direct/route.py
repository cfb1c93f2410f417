"""How calls of one actor go, as their caller knows.

What: a record; which calls may go straight at all; what those get whose way was cut.
Who calls: `direct/calls.py`, whose lock guards it.
May touch: nothing.
Invariants: `is_clear` says that all calls by way of the nodes are over; only then are direct ones
made, where calls have an order.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, final

from poolray.exceptions import ActorUnavailableError
from poolray.ids import ActorId, ObjectId
from poolray.protocol.values import CallKind, TaskClass
from poolray.protocol.worker import TasksFinished

if TYPE_CHECKING:
    from poolray.direct.calls import DirectCalls
    from poolray.direct.connection import Connection, Waiting


@final
class ActorRoute:
    """How calls of one actor go: a `Route`, whose news are for `DirectCalls`."""

    __slots__ = (
        "actor_id",
        "calls",
        "connection",
        "direct",
        "is_asking",
        "is_clear",
        "is_giving",
        "is_mixed",
        "is_off",
        "is_together",
        "last",
        "making",
        "promises",
        "unread",
    )

    #: (As the caller has been told.)
    is_forcible = False

    def __init__(self, actor_id: ActorId, direct: DirectCalls) -> None:
        self.actor_id = actor_id
        self.direct = direct
        #: Calls that went by way of the nodes, of this life of the actor.
        self.calls = 0
        #: The last one's result; all before it are over when that has a value.
        self.last = ObjectId(b"")
        self.is_clear = True
        #: Threads that make a call by way of the nodes right now, and whether there were two at a
        #: time since there was none: which of their calls came last nobody here knows.
        self.making = 0
        self.is_mixed = False
        #: The worker has been asked for a way in, which is not open yet.
        self.is_asking = False
        #: Calls that were not sent are being given to the node.
        self.is_giving = False
        #: There is none, or it does not pay.
        self.is_off = False
        #: The actor runs calls side by side, in no order: those that go straight wait for none.
        self.is_together = False
        self.connection: Connection | None = None
        #: Results that the node was promised.
        self.promises = 0
        #: Calls since somebody looked what has come.
        self.unread = 0

    def usable(self) -> Connection | None:
        """The way for a call that is made now; None: by way of the nodes."""
        return None if self.is_off or not self.is_passable else self.connection

    @property
    def is_passable(self) -> bool:
        """Whether straight calls may be sent: they come after none that goes another way."""
        return self.is_clear or self.is_together

    def on_open(self, connection: Connection) -> None:
        """A connection may be used."""
        self.direct.open_route(self, connection)

    def on_lost(self, connection: Connection) -> None:
        """The actor has ended, or its way to us."""
        self.direct.lose_route(self, connection)

    def on_given_back(self, connection: Connection) -> None:
        """Not what an actor's worker says."""
        self.on_lost(connection)

    def on_ended(self, calls: list[Waiting], errors: dict[int, str], report: TasksFinished) -> None:
        """Calls are over: whoever lists tasks is to know."""
        self.direct.notes.add(self.actor_id, calls, errors, report)

    def on_held(self, call: Waiting) -> None:
        """A result is large, or has refs inside."""
        self.direct.fetch_held(self, call)

    def on_unsent(self, connection: Connection) -> None:
        """Another thread's call goes by way of the nodes."""
        self.direct.give_unsent(self, connection)


def may_go_straight(task_class: TaskClass) -> bool:
    """Whether the nodes have nothing to decide about calls of a class but where they go."""
    return (
        task_class.kind is CallKind.METHOD
        and task_class.num_returns == 1
        and task_class.max_retries == 0
        and not task_class.retry_exceptions
        and not task_class.stream
        and not task_class.timeout_s
        and not task_class.method.startswith("__")
    )


def unavailable(actor_id: ActorId, name: str) -> bytes:
    """The error of a call that may have run, of an actor that goes on."""
    error = ActorUnavailableError(
        actor_id=actor_id.hex(),
        class_name=name.partition(".")[0],
        reason="is unavailable: its process died, or the way to it was cut. The call may or may "
        "not have run; call again, or allow max_task_retries=.",
    )
    return pickle.dumps(error)
