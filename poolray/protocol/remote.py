"""A driver outside of the cluster and the daemon that serves it: values, and being there.

What: what such a driver says beyond the client protocol, for it has no memory in common with the
node: values go to and fro in pieces.
Who calls: `cluster/remote_values.py` sends requests, `cluster/remote_sessions.py` answers; no
machine sees one of these.
May touch: nothing.
Invariants: a piece names its place in the value, and the value by a number that the driver gave.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.ids import ObjectId
from poolray.protocol.values import InArena, InFile


class StillThere(msgspec.Struct, frozen=True, array_like=True, tag=561, kw_only=True):
    """Nothing was heard for a while: that this arrives is all that it says."""


class ReadPiece(msgspec.Struct, frozen=True, array_like=True, tag=562, kw_only=True):
    """Send a piece of a value whose place the node has told."""

    request_id: int
    place: InArena | InFile
    offset: int  #: bytes from the start of the value
    size_bytes: int


class WritePiece(msgspec.Struct, frozen=True, array_like=True, tag=563, kw_only=True):
    """A piece of the value that a place was granted for."""

    object_id: ObjectId
    offset: int  #: bytes from the start of the value
    data: bytes


class EndWriting(msgspec.Struct, frozen=True, array_like=True, tag=564, kw_only=True):
    """All pieces were sent; answered once they are where they belong."""

    request_id: int
    object_id: ObjectId


class Piece(msgspec.Struct, frozen=True, array_like=True, tag=571, kw_only=True):
    """The answer to `ReadPiece`."""

    request_id: int
    offset: int
    data: bytes
    failure: str = ""  #: why there is none, in words


class Written(msgspec.Struct, frozen=True, array_like=True, tag=572, kw_only=True):
    """The answer to `EndWriting`."""

    request_id: int
    failure: str = ""  #: why the value is not there, in words
    is_disk_full: bool = False


RemoteRequest: TypeAlias = StillThere | ReadPiece | WritePiece | EndWriting
RemoteReply: TypeAlias = Piece | Written
