"""How calls of one actor go, as their caller knows.

What: a record; and which calls may go straight at all.
Who calls: `direct/calls.py`, whose lock guards it.
May touch: nothing.
Invariants: `is_clear` says that all calls by way of the nodes are over; only then are direct ones
made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import ActorId, ObjectId
from poolray.protocol.values import CallKind, TaskClass

if TYPE_CHECKING:
    from poolray.direct.connection import Connection


@final
class Route:
    """How calls of one actor go."""

    __slots__ = (
        "actor_id",
        "calls",
        "connection",
        "is_asking",
        "is_clear",
        "is_giving",
        "is_off",
        "last",
        "promises",
        "unread",
    )

    def __init__(self, actor_id: ActorId) -> None:
        self.actor_id = actor_id
        #: Calls that went by way of the nodes, of this life of the actor.
        self.calls = 0
        #: The last one's result; all before it are over when that has a value.
        self.last = ObjectId(b"")
        self.is_clear = True
        #: The worker has been asked for a way in, which is not open yet.
        self.is_asking = False
        #: Calls that were not sent are being given to the node.
        self.is_giving = False
        #: There is none, or it does not pay.
        self.is_off = False
        self.connection: Connection | None = None
        #: Results that the node was promised.
        self.promises = 0
        #: Calls since somebody looked what has come.
        self.unread = 0

    def usable(self) -> Connection | None:
        """The way for a call that is made now; None: by way of the nodes."""
        return self.connection if self.is_clear and not self.is_off else None


def may_go_straight(task_class: TaskClass) -> bool:
    """Whether the nodes have nothing to decide about calls of a class but where they go."""
    return (
        task_class.kind is CallKind.METHOD
        and task_class.num_returns == 1
        and task_class.max_retries == 0
        and not task_class.retry_exceptions
        and not task_class.stream
        and not task_class.concurrency_group
        and not task_class.timeout_s
        and not task_class.method.startswith("__")
    )
