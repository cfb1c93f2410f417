"""How calls of one actor go, as their caller knows.

What: a record.
Who calls: `direct/calls.py`, whose lock guards it.
May touch: nothing.
Invariants: `is_clear` says that all calls by way of the nodes are over; only then are direct ones
made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import ActorId, ObjectId

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
        "is_losing",
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
        #: Calls of a lost connection are being given to the node.
        self.is_losing = False
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
