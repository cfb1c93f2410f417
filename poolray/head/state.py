"""What the parts of the head machine share.

What: the members, the messages under construction, and what has to be stored before they go.
Who calls: the parts of the head machine.
May touch: nothing.
Invariants: a change is noted before the message that tells of it; `members` is written by
`head/members.py` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, final

import msgspec

from poolray.config import Config
from poolray.ids import NodeId
from poolray.protocol.directory import ActorEntry, JobRow, NodeRow
from poolray.protocol.node import HeadMessage

if TYPE_CHECKING:
    from poolray.head.members import Member


class SendNode(msgspec.Struct, frozen=True, gc=False):
    """Send a message to a node, reliably and in order."""

    node_id: NodeId
    message: HeadMessage


class Change(msgspec.Struct, frozen=True, gc=False):
    """One row of the head's storage is another now."""

    table: str
    key: bytes
    value: bytes | None  #: None: the row is gone


#: What is stored, as msgpack.
Row: TypeAlias = ActorEntry | JobRow | NodeRow | bytes

_encode = msgspec.msgpack.Encoder().encode


@final
class HeadState:
    """What a head knows and is about to say."""

    __slots__ = ("changes", "config", "effects", "members", "now")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.now = 0.0
        self.effects: list[SendNode] = []
        #: Rows to store, in order, before the effects are carried out.
        self.changes: list[Change] = []
        self.members: dict[NodeId, Member] = {}

    def send(self, node_id: NodeId, message: HeadMessage) -> None:
        """Tell a member something."""
        self.effects.append(SendNode(node_id, message))

    def store(self, table: str, key: bytes, row: Row | msgspec.Struct) -> None:
        """Keep a row across lives of the head."""
        self.changes.append(Change(table, key, _encode(row)))

    def drop(self, table: str, key: bytes) -> None:
        """A row is not needed any more."""
        self.changes.append(Change(table, key, None))
