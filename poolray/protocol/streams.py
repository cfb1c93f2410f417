"""Streams in the protocols: the items of a generator, from its worker to whoever iterates.

What: what a client asks of a stream, what workers say of generators, and what nodes tell each other
of the generators of forwarded tasks.
Who calls: `generators.py` and `local/worker_streams.py` send requests, the node machine answers.
May touch: nothing.
Invariants: an item's object follows from its task and its place (`item_id`), so nobody asks for
names; the items of one attempt come in order and before its result.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from poolray.ids import ActorId, ObjectId, TaskId, WorkerId, return_id
from poolray.protocol.values import InArena, InFile


class StreamMode(enum.IntEnum):
    """What becomes of what a generator yields."""

    NONE = 0  #: it is no generator
    ITEMS = 1  #: a client iterates over the items; object 0 is there when there are no more
    DYNAMIC = 2  #: object 0 is a list of the items, of which nobody knows before
    RETURNS = 3  #: the items are the return values


def item_id(task_id: TaskId, index: int) -> ObjectId:
    """The object that the `index`-th item of a stream is (0-based)."""
    return return_id(task_id, index + 1)


class OpenStream(msgspec.Struct, frozen=True, array_like=True, tag=131, kw_only=True):
    """The task that follows is a generator; the client will iterate over its items."""

    task_id: TaskId
    backpressure: int = 0  #: items that may wait to be taken; 0: any number
    actor_id: ActorId = ActorId(b"")  #: whose method it is; empty: a function
    actor_backpressure: int = 0  #: items of all streams of the actor that may wait; 0: any number


class TakeItems(msgspec.Struct, frozen=True, array_like=True, tag=132, kw_only=True):
    """Give me what has come. The client holds one reference to each item from now on."""

    request_id: int
    task_id: TaskId
    known: int  #: items that the client has been given
    limit: int  #: further ones that it takes at the most


class DropStream(msgspec.Struct, frozen=True, array_like=True, tag=133, kw_only=True):
    """Nobody will take items of this stream any more."""

    task_id: TaskId
    taken: int  #: items that the client made refs of; others that it was given are let go


class AwaitRoom(msgspec.Struct, frozen=True, array_like=True, tag=134, kw_only=True):
    """A worker, before a generator goes on: answered when fewer items wait than may."""

    request_id: int
    task_id: TaskId
    produced: int  #: items that this attempt has yielded


class ItemsTaken(msgspec.Struct, frozen=True, array_like=True, tag=191, kw_only=True):
    """The answer to `TakeItems`."""

    request_id: int
    count: int
    ended: bool  #: there will be no others
    #: Values of the first of them, as far as they are small and no errors; None: ask for it.
    values: list[bytes | None] = []


class RoomGranted(msgspec.Struct, frozen=True, array_like=True, tag=192, kw_only=True):
    """The answer to `AwaitRoom`."""

    request_id: int
    consumed: int  #: items that have been taken
    closed: bool = False  #: nobody will take any: go on, and keep what is yielded


class Yielded(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Consecutive items of one generator."""

    task_id: TaskId
    start: int  #: place of the first
    values: list[bytes | InArena | InFile]
    #: Objects that the values refer to, per value, as far as there are some.
    contained: list[list[ObjectId]] = []
    is_error: bool = False  #: the last of them is an error


class ItemsYielded(msgspec.Struct, frozen=True, array_like=True, tag=27, kw_only=True):
    """Worker to node: what generators have yielded, in order."""

    worker_id: WorkerId
    items: list[Yielded]


StreamRequest: TypeAlias = OpenStream | TakeItems | DropStream | AwaitRoom
StreamReply: TypeAlias = ItemsTaken | RoomGranted
