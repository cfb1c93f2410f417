"""Bytes of objects on their way between nodes.

    wanted ──▶ ASKING ──UseSource──▶ ROOM ──granted──▶ MOVING ──all chunks──▶ here
                 │ (small ones, and      │ (memory is      ▲ │
                 │  our own: at once)    │  short: waits)  │ └─ PullChunk ▶ sources ▶ ChunkData, or
                 ▼                       ▼                 └───────── ChunkArrived ◀──────┘ past it
              made again where the value is gone; from another source when the last one dies

What: pulls values by chunks, with a bounded window per source, into ranges that the store grants, a
bounded number of bytes at a time; serves chunks to others, also of what is only partly here.
Who calls: `node/objects.py` and `node/tasks.py` for what they need, `node/peers.py` with messages.
May touch: nothing.
Invariants: a pull has a range exactly while it is MOVING (or a file, or nothing when it is small);
nothing is written to a range after it was given back; the memory of what is being served is not
used for anything else until whoever pulls it says that it is done, or is dead.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, final

from poolray.ids import NodeId, ObjectId
from poolray.node.effects import (
    ExpectChunk,
    ForgetChunks,
    SealFile,
    SendChunk,
    SendPeer,
    WriteChunk,
)
from poolray.node.objects import Objects
from poolray.node.sourcing import Sourcing
from poolray.node.state import NodeState
from poolray.node.store import PULLER, Store
from poolray.objects.directory import READY
from poolray.protocol.client import AllocateRange, RangeGranted
from poolray.protocol.node import (
    AskSource,
    ChunkArrived,
    ChunkData,
    ChunkMissing,
    ChunksLost,
    FileSealed,
    PeerMessage,
    PullChunk,
    PullEnded,
    SourceDone,
    UseSource,
)
from poolray.protocol.values import InArena, InFile

if TYPE_CHECKING:
    from poolray.node.borrowing import Borrowing
    from poolray.node.tasks import Tasks

#: Of the arena, so much may be on its way here at once (one object may be larger).
_MOVING_SHARE = 0.25
#: Up to this a value comes from where it is known to be: to ask for a better source, and to wait
#: for it, costs more than it saves.
_UNASKED_BYTES = 4 << 20
_GONE = "its node no longer has it"


class PullState(enum.IntEnum):
    """How far a pull has come."""

    ASKING = 0  #: its keeper has not said from whom
    ROOM = 1  #: it waits for its turn, or for a range
    MOVING = 2
    SEALING = 3  #: the shell ends its file


@final
class _Chunk:
    """Some bytes that were asked for and have not come."""

    __slots__ = ("node_id", "offset", "size_bytes")

    def __init__(self, node_id: NodeId, offset: int, size_bytes: int) -> None:
        self.node_id = node_id
        #: From the start of the value.
        self.offset = offset
        self.size_bytes = size_bytes


@final
class _Pull:
    """One object on its way here."""

    __slots__ = (
        "admitted",
        "again",
        "arrived",
        "asked",
        "data",
        "file_number",
        "followers",
        "name",
        "next_offset",
        "object_id",
        "offset",
        "outstanding",
        "received_bytes",
        "request_id",
        "size_bytes",
        "source",
        "sources",
        "state",
    )

    def __init__(self, object_id: ObjectId, value: InArena) -> None:
        self.object_id = object_id
        #: The first source: with the name it is the place that others of our objects may share.
        self.source = value.node_id
        #: What the source calls it.
        self.name = value.object_id
        #: Living sources -> what each calls it.
        self.sources: dict[NodeId, ObjectId] = {}
        self.size_bytes = value.size_bytes
        self.state = PullState.ASKING
        #: The keeper that has given us the source, and is told when we are done with it.
        self.asked: NodeId | None = None
        #: Number of the request for a range (ROOM), 0: it waits for its turn.
        self.request_id = 0
        #: Where in the arena it goes (MOVING); -1: to the file of that number, or to `data`.
        self.offset = -1
        self.file_number = 0
        self.data = b""
        #: Start of the first chunk that was not asked for.
        self.next_offset = 0
        #: Starts of chunks that are to be asked for again: who was asked did not send them.
        self.again: deque[int] = deque()
        #: number of a request -> the chunk that was asked for and has not come.
        self.outstanding: dict[int, _Chunk] = {}
        #: Starts of chunks that are here.
        self.arrived: dict[int, None] = {}
        self.received_bytes = 0
        #: Its bytes count as on their way.
        self.admitted = False
        #: Peers that want parts of it, which are passed on as they come.
        self.followers: list[tuple[NodeId, PullChunk]] = []


@final
class Transfers:
    """The objects that come and go."""

    __slots__ = (
        "_by_source",
        "_chunks",
        "_moving_bytes",
        "_objects",
        "_pulls",
        "_requests",
        "_serving",
        "_state",
        "_store",
        "_turn",
        "borrowing",
        "sourcing",
        "tasks",
    )

    def __init__(
        self, state: NodeState, store: Store, objects: Objects, dead: dict[NodeId, None]
    ) -> None:
        self._state = state
        self._store = store
        self._objects = objects
        self.borrowing: Borrowing
        self.tasks: Tasks
        self.sourcing = Sourcing(state)
        self._pulls: dict[ObjectId, _Pull] = {}
        #: number of a request for a chunk -> whose.
        self._chunks: dict[int, _Pull] = {}
        #: (source, its name) -> objects here that are pulled from there; the first of them moves.
        self._by_source: dict[tuple[NodeId, ObjectId], dict[ObjectId, None]] = {}
        #: Pulls that wait for others to end.
        self._turn: deque[ObjectId] = deque()
        self._moving_bytes = 0
        #: request for a range -> the object it is for.
        self._requests: dict[int, ObjectId] = {}
        #: peer -> objects that it pulls from our arena -> ranges that it reads from, each held
        #: once -> whether the object is pinned for that (not while it is on its way here itself).
        self._serving: dict[NodeId, dict[ObjectId, dict[int, bool]]] = {}
        store.on_granted[PULLER] = self._on_granted
        objects.sourced = self.sourcing.share(dead)
        objects.on_sourced = self.sourcing.assign
        objects.pull, objects.on_lost = self.pull, self.stop

    def _send(self, node_id: NodeId, message: PeerMessage) -> None:
        self._state.effects.append(SendPeer(node_id, message))

    # ---- pulling ---------------------------------------------------------------------------------

    def pull(self, object_id: ObjectId) -> None:
        """Fetch an object whose value is on another node; once."""
        record = self._state.objects[object_id]
        value = record.value
        if object_id in self._pulls or not isinstance(value, InArena):
            return
        for inner in record.contained:
            # An error that stands for this one too comes first: its memory is this one's as well,
            # and of the two only this one keeps the other.
            if self._state.objects[inner].value == value:
                self.pull(inner)
        pull = self._pulls[object_id] = _Pull(object_id, value)
        keeper = self._objects.originals.get(object_id)
        if (
            object_id in self.borrowing.borrowed
            and keeper is not None
            and value.size_bytes > min(_UNASKED_BYTES, self._state.config.transfer_chunk_bytes)
        ):
            pull.asked = keeper[0]
            self._send(keeper[0], AskSource(object_id=keeper[1]))
        else:
            self._begin(pull)

    def on_use_source(self, node_id: NodeId, message: UseSource) -> None:
        """The keeper of an object says from whom to pull it."""
        pull = self._pulls.get(message.object_id)
        if pull is None or pull.state is not PullState.ASKING or pull.asked != node_id:
            self._done_with(node_id, message.object_id, message.node_id, is_copied=False)
            return
        if message.node_id in self.borrowing.dead:
            self._done_with(node_id, message.object_id, message.node_id, is_copied=False)
            self._send(node_id, AskSource(object_id=message.object_id))
            return
        pull.source, pull.name = message.node_id, message.name
        for more in message.more:
            if more not in self.borrowing.dead and more != self._state.node_id:
                pull.sources[more] = message.object_id
        self._begin(pull)

    def _done_with(
        self, keeper: NodeId, object_id: ObjectId, source: NodeId, *, is_copied: bool
    ) -> None:
        done = SourceDone(object_id=object_id, node_id=source, is_copied=is_copied)
        self._send(keeper, done)

    def _begin(self, pull: _Pull) -> None:
        """The source is known: find room."""
        pull.state = PullState.ROOM
        pull.sources = {pull.source: pull.name, **pull.sources}
        place = (pull.source, pull.name)
        same = self._by_source.setdefault(place, {})
        same[pull.object_id] = None
        if len(same) == 1:  # (else it comes with the first of them)
            self._turn.append(pull.object_id)
            self._admit()

    def _admit(self) -> None:
        """Let pulls begin, as many as memory is to take at once."""
        limit = self._state.allocator.capacity_bytes * _MOVING_SHARE
        while self._turn:
            pull = self._pulls[self._turn[0]]
            if self._moving_bytes and self._moving_bytes + pull.size_bytes > limit:
                return
            self._turn.popleft()
            pull.admitted = True
            self._moving_bytes += pull.size_bytes
            if pull.size_bytes <= self._state.config.inline_max_bytes:
                self._move(pull)
                continue
            # (Numbers are never used again: an answer may come late.)
            pull.request_id = number = self._store.next_number()
            self._requests[number] = pull.object_id
            message = AllocateRange(
                request_id=number, object_id=pull.object_id, size_bytes=pull.size_bytes
            )
            self._store.on_allocate(PULLER, self._objects.client(PULLER), message)

    def _on_granted(self, granted: RangeGranted) -> None:
        """The store has found a place, in memory or on disk, or has none at all."""
        object_id = self._requests.pop(granted.request_id)
        pull = self._pulls[object_id]
        pull.request_id = 0
        if granted.refusal:  # as long as there is no room at all, the node's own memory holds it
            self._move(pull)
            return
        pull.offset, pull.file_number = granted.offset, granted.file_number
        self._move(pull)

    def _move(self, pull: _Pull) -> None:
        pull.state = PullState.MOVING
        self._ask_chunks(pull)

    def _ask_chunks(self, pull: _Pull) -> None:
        """Ask each source for more, as far as its window goes; the first to answer gets most."""
        config = self._state.config
        loads = dict.fromkeys(pull.sources, 0)
        for chunk in pull.outstanding.values():
            loads[chunk.node_id] += 1
        while pull.again or pull.next_offset < pull.size_bytes:
            source = min(loads, key=loads.__getitem__)
            if loads[source] >= config.transfer_window_chunks:
                return
            loads[source] += 1
            start = pull.again.popleft() if pull.again else pull.next_offset
            size = min(config.transfer_chunk_bytes, pull.size_bytes - start)
            pull.next_offset = max(pull.next_offset, start + size)
            self._ask_chunk(pull, source, start, size)

    def _ask_chunk(self, pull: _Pull, source: NodeId, start: int, size: int) -> None:
        number = self._store.next_number()
        pull.outstanding[number] = _Chunk(source, start, size)
        self._chunks[number] = pull
        has_place = pull.offset >= 0 or pull.file_number > 0
        if has_place:
            offset = max(0, pull.offset) + start
            expected = ExpectChunk(source, number, offset, pull.file_number, size)
            self._state.effects.append(expected)
        message = PullChunk(
            object_id=pull.sources[source],
            offset=start,
            size_bytes=size,
            number=number,
            by_message=not has_place,
        )
        self._send(source, message)

    def on_chunk(self, node_id: NodeId, message: ChunkData) -> None:
        """Bytes of something that we pull."""
        pull = self._chunks.get(message.number)
        if pull is None:
            return  # not what was asked for, or not any more
        chunk = pull.outstanding[message.number]
        if chunk.node_id != node_id:
            return
        if message.missing:
            self._lose_source(pull, node_id)
            return
        if chunk.size_bytes != len(message.data):
            return
        effects = self._state.effects
        if pull.offset >= 0 or pull.file_number:
            effects.append(ForgetChunks(node_id, [message.number]))
            offset = max(0, pull.offset) + chunk.offset
            effects.append(WriteChunk(offset, pull.file_number, message.data))
        else:
            # Only small values, and values where neither memory nor disk has room, come here.
            pull.data = _placed(pull.data, chunk.offset, bytes(message.data))
        self._advance(pull, message.number)

    def on_chunk_arrived(self, message: ChunkArrived) -> None:
        """Bytes have come past the links, and were written."""
        pull = self._chunks.get(message.number)
        if pull is not None:
            self._advance(pull, message.number)

    def on_chunk_missing(self, message: ChunkMissing) -> None:
        """A source cannot read what it was said to have."""
        pull = self._chunks.get(message.number)
        if pull is not None:
            self._lose_source(pull, pull.outstanding[message.number].node_id)

    def on_chunks_lost(self, message: ChunksLost) -> None:
        """What chunks were to come by has ended: they are asked for again."""
        pulls: dict[ObjectId, _Pull] = {}
        for number in message.numbers:
            pull = self._chunks.pop(number, None)
            if pull is not None:
                pull.again.append(pull.outstanding.pop(number).offset)
                pulls[pull.object_id] = pull
        for pull in pulls.values():
            self._ask_chunks(pull)

    def _advance(self, pull: _Pull, number: int) -> None:
        """A chunk is here."""
        del self._chunks[number]
        chunk = pull.outstanding.pop(number)
        pull.arrived[chunk.offset] = None
        pull.received_bytes += chunk.size_bytes
        self._ask_chunks(pull)
        if pull.received_bytes == pull.size_bytes:
            self._complete(pull)
        elif pull.followers:
            self._pass_on(pull)

    def _complete(self, pull: _Pull) -> None:
        """All of it is here."""
        if pull.file_number:
            pull.state = PullState.SEALING
            effect = SealFile(pull.file_number, pull.object_id, pull.size_bytes)
            self._state.effects.append(effect)
            return
        value: bytes | InArena = pull.data
        if pull.offset >= 0:
            value = InArena(
                object_id=pull.object_id, offset=pull.offset, size_bytes=pull.size_bytes
            )
        self._arrive(pull, value)

    def on_file_sealed(self, message: FileSealed) -> None:
        """A pulled value is in a file."""
        pull = self._pulls.get(message.object_id)
        if pull is None or pull.file_number != message.file_number:
            return  # it was freed meanwhile, and its file deleted
        if message.place is None:
            self._fail(pull)
        else:
            self._arrive(pull, message.place)

    def _arrive(self, pull: _Pull, value: bytes | InArena | InFile) -> None:
        same = list(self._by_source[pull.source, pull.name])
        followers = [item for other in same for item in self._take_followers(self._pulls[other])]
        record = self._state.objects[pull.object_id]
        if not isinstance(value, bytes):
            self._store.adopt(pull.object_id, value, PULLER)
        if isinstance(value, InArena):
            self._pin_for_followers(pull.object_id, value.offset)
        pull.offset, pull.file_number = -1, 0  # it is the object's now
        record.value = value
        sources = pull.sources
        for other in same:
            self._end(self._pulls[other], is_copied=True)
        for source, name in sources.items():
            self._send(source, PullEnded(object_id=name))
        self._objects.wake(record)
        self._objects.on_local(pull.object_id)
        for other in same[1:]:
            self._share(other, pull.object_id)
        for node_id, message in followers:
            self.on_pull_chunk(node_id, message)
        self._admit()

    def _share(self, object_id: ObjectId, first: ObjectId) -> None:
        """An object is the same as another one that has come."""
        record = self._state.objects.get(object_id)
        original = self._state.objects.get(first)
        if record is None or record.state is not READY or record.location() is None:
            return
        if original is None or original.location() is not None:
            self.pull(object_id)  # that one went at once
            return
        self.stop(object_id)  # it was asked for anew meanwhile
        self._objects.hold(first)
        record.contained = [*record.contained, first]
        record.value = original.value
        self._store.share(object_id, first)
        self._objects.wake(record)
        self._objects.on_local(object_id)

    def _end(self, pull: _Pull, *, is_copied: bool) -> None:
        """A pull is over, whatever came of it; who gave us the source is told."""
        del self._pulls[pull.object_id]
        for node_id, message in self._take_followers(pull):
            self._miss(node_id, message)
        keeper = pull.asked
        if keeper is not None and keeper not in self.borrowing.dead:
            original = self._objects.originals.get(pull.object_id)
            name = pull.object_id if original is None else original[1]
            if pull.state is not PullState.ASKING:
                self._done_with(keeper, name, pull.source, is_copied=is_copied)
        if pull.state is PullState.ASKING:
            return
        self._forget_chunks(pull, list(pull.outstanding))
        place = (pull.source, pull.name)
        same = self._by_source[place]
        del same[pull.object_id]
        if not same:
            del self._by_source[place]
        if pull.admitted:
            self._moving_bytes -= pull.size_bytes
            self._drop_room(pull)
        elif pull.object_id in self._turn:
            self._turn.remove(pull.object_id)

    def _forget_chunks(self, pull: _Pull, numbers: list[int]) -> None:
        """Chunks are not waited for any more: nothing may be written to where they belong."""
        by_source: dict[NodeId, list[int]] = {}
        for number in numbers:
            del self._chunks[number]
            by_source.setdefault(pull.outstanding.pop(number).node_id, []).append(number)
        if pull.offset >= 0 or pull.file_number:
            for source, some in by_source.items():
                self._state.effects.append(ForgetChunks(source, some))

    def _drop_room(self, pull: _Pull) -> None:
        """What was granted, or asked for, is not needed."""
        if pull.request_id:
            del self._requests[pull.request_id]
            self._store.cancel(PULLER, pull.request_id)
            pull.request_id = 0
        elif pull.offset >= 0 or pull.file_number:
            self._store.return_range(self._objects.client(PULLER), pull.object_id)

    def restart(self, object_ids: list[ObjectId]) -> None:
        """Pulls that were given up begin again, if they are still of use."""
        for object_id in object_ids:
            record = self._state.objects.get(object_id)
            if record is not None and record.state is READY and record.location() is not None:
                self.pull(object_id)

    def stop(self, object_id: ObjectId) -> None:
        """An object was freed, or its bytes are not where they were."""
        pull = self._pulls.get(object_id)
        if pull is None:
            return
        place = (pull.source, pull.name)
        same = list(self._by_source.get(place, ()))
        is_moving = pull.state is PullState.MOVING
        sources = pull.sources
        self._end(pull, is_copied=False)
        if is_moving and same[0] == object_id:
            for source, name in sources.items():
                if source not in self.borrowing.dead:
                    self._send(source, PullEnded(object_id=name))
        if same and same[0] == object_id and len(same) > 1:
            # The others were to come with it: they begin anew.
            for other in same[1:]:
                self._end(self._pulls[other], is_copied=False)
            self.restart(same[1:])
        self._admit()

    def _lose_source(self, pull: _Pull, node_id: NodeId) -> None:
        """A source of a pull will send no more: others do what it has left, if there are any."""
        if len(pull.sources) == 1:
            self._fail(pull)
            return
        name = pull.sources.pop(node_id)
        left = [number for number, c in pull.outstanding.items() if c.node_id == node_id]
        pull.again.extend(pull.outstanding[number].offset for number in left)
        self._forget_chunks(pull, left)
        if node_id not in self.borrowing.dead:
            self._send(node_id, PullEnded(object_id=name))
        if pull.state is PullState.MOVING:
            self._ask_chunks(pull)

    def _fail(self, pull: _Pull) -> None:
        """No source has what it was said to have."""
        for object_id in list(self._by_source[pull.source, pull.name]):
            failed = self._pulls.get(object_id)
            if failed is None:
                continue
            source = failed.source
            is_keepers = failed.asked == source
            self.stop(object_id)
            record = self._state.objects.get(object_id)
            if record is None or record.state is not READY:
                continue
            if is_keepers or record.location() == source:
                self.tasks.lineage.on_object_lost(object_id, record, _GONE)
            elif record.location() is not None and object_id not in self._pulls:
                self.pull(object_id)

    # ---- serving ---------------------------------------------------------------------------------

    def on_pull_chunk(self, node_id: NodeId, message: PullChunk) -> None:
        """A peer wants bytes of an object."""
        object_id, start, size = message.object_id, message.offset, message.size_bytes
        record = self._state.objects.get(object_id)
        if record is None or record.state is not READY:
            self._miss(node_id, message)
            return
        if record.location() is not None:
            self._follow(node_id, message)
            return
        value = record.value
        total = len(value) if isinstance(value, bytes) else value.size_bytes
        if not (start >= 0 and size > 0 and start + size <= total):
            self._miss(node_id, message)  # it is an error now, that says that the value is lost
        elif isinstance(value, bytes):
            data = value[start : start + size]
            reply = ChunkData(object_id=object_id, offset=start, data=data, number=message.number)
            self._send(node_id, reply)
        else:
            if isinstance(value, InArena):
                self._hold(node_id, object_id, value.offset, is_pinned=True)
            self._send_chunk(node_id, message, value)

    def _send_chunk(self, node_id: NodeId, message: PullChunk, place: InArena | InFile) -> None:
        effect = SendChunk(
            node_id,
            message.object_id,
            place,
            message.offset,
            message.size_bytes,
            message.number,
            message.by_message,
        )
        self._state.effects.append(effect)

    def _miss(self, node_id: NodeId, message: PullChunk) -> None:
        reply = ChunkData(
            object_id=message.object_id,
            offset=message.offset,
            missing=True,
            number=message.number,
        )
        self._send(node_id, reply)

    def _hold(self, node_id: NodeId, object_id: ObjectId, offset: int, *, is_pinned: bool) -> None:
        """A peer reads from a range: it is not used for anything else until the peer is done."""
        ranges = self._serving.setdefault(node_id, {}).setdefault(object_id, {})
        if offset not in ranges:
            ranges[offset] = is_pinned
            self._store.hold_range(offset)
            if is_pinned:
                self._store.pin(object_id)

    def on_pull_ended(self, node_id: NodeId, message: PullEnded) -> None:
        """A peer has what it wanted of an object."""
        pull = self._pulls.get(message.object_id)
        if pull is not None:
            pull.followers = [item for item in pull.followers if item[0] != node_id]
        self._stop_serving(node_id, message.object_id)

    def _stop_serving(self, node_id: NodeId, object_id: ObjectId) -> None:
        serving = self._serving.get(node_id)
        if serving is None or object_id not in serving:
            return
        for offset, is_pinned in serving.pop(object_id).items():
            self._store.let_go_of_range(offset)
            if is_pinned:
                self._store.unpin(object_id)
        if not serving:
            del self._serving[node_id]

    def pins(self) -> list[ObjectId]:
        """Objects in memory that are being sent."""
        return [
            object_id
            for serving in self._serving.values()
            for object_id, ranges in serving.items()
            for is_pinned in ranges.values()
            if is_pinned
        ]

    # ---- passing on what is on its way here ------------------------------------------------------

    def _follow(self, node_id: NodeId, message: PullChunk) -> None:
        """A peer wants a part of something that is not all here: it gets it when it has come."""
        pull = self._pulls.get(message.object_id)
        if pull is None or node_id in pull.sources:
            self._miss(node_id, message)
            return
        pull.followers.append((node_id, message))
        self._pass_on(pull)

    def _take_followers(self, pull: _Pull) -> list[tuple[NodeId, PullChunk]]:
        followers, pull.followers = pull.followers, []
        return followers

    def _pass_on(self, pull: _Pull) -> None:
        """Send on what has come of what peers have asked for."""
        if pull.offset < 0 or pull.state is not PullState.MOVING:
            return  # all of it is sent once it is here
        for node_id, message in self._take_followers(pull):
            start, end = message.offset, message.offset + message.size_bytes
            if not 0 <= start < end <= pull.size_bytes:
                self._miss(node_id, message)
            elif self._has_part(pull, start, end):
                self._hold(node_id, pull.object_id, pull.offset, is_pinned=False)
                place = InArena(
                    object_id=pull.object_id, offset=pull.offset, size_bytes=pull.size_bytes
                )
                self._send_chunk(node_id, message, place)
            else:
                pull.followers.append((node_id, message))

    def _has_part(self, pull: _Pull, start: int, end: int) -> bool:
        chunk_bytes = self._state.config.transfer_chunk_bytes
        first = start // chunk_bytes * chunk_bytes
        return all(offset in pull.arrived for offset in range(first, end, chunk_bytes))

    def _pin_for_followers(self, object_id: ObjectId, offset: int) -> None:
        """What was passed on while it came is all here: it stays in memory while it is sent."""
        for serving in self._serving.values():
            ranges = serving.get(object_id)
            if ranges is not None and offset in ranges and not ranges[offset]:
                ranges[offset] = True
                self._store.pin(object_id)

    # ---- what ends -------------------------------------------------------------------------------

    def on_forgotten(self, object_id: ObjectId) -> None:
        """An object was freed here: nobody is pinned by it, but who reads may still read."""
        self.stop(object_id)
        self.sourcing.on_forgotten(object_id)
        for serving in self._serving.values():
            ranges = serving.get(object_id)
            if ranges is not None:
                serving[object_id] = dict.fromkeys(ranges, False)

    def on_given_back(self, node_id: NodeId, object_ids: list[ObjectId]) -> None:
        """A peer does not need these any more."""
        for object_id in object_ids:
            self._stop_serving(node_id, object_id)
            self.sourcing.on_given_back(node_id, object_id)

    def on_node_died(self, node_id: NodeId) -> list[ObjectId]:
        """A peer is dead: what comes from there comes from elsewhere, or not at all.

        Returns
        -------
        list of ObjectId
            For `restart`, once it is known which of them have another place.
        """
        for object_id in list(self._serving.get(node_id, ())):
            self._stop_serving(node_id, object_id)
        again = []
        for pull in list(self._pulls.values()):
            pull.followers = [item for item in pull.followers if item[0] != node_id]
            if pull.asked == node_id:
                again.append(pull.object_id)
            elif node_id in pull.sources:
                if len(pull.sources) == 1:
                    again.append(pull.object_id)
                else:
                    self._lose_source(pull, node_id)
        for object_id in again:
            self.stop(object_id)
        self.sourcing.on_node_died(node_id)
        return again

    # ---- looking in ------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when pulls, ranges and sources do not agree."""
        moving = 0
        placed: dict[ObjectId, None] = {}
        config = self._state.config
        for object_id, pull in self._pulls.items():
            record = self._state.objects[object_id]
            assert record.state is READY, "what is not there is pulled"
            assert record.location() is not None, "what is here is pulled"
            if pull.state is PullState.ASKING:
                assert pull.asked not in self.borrowing.dead
                continue
            assert pull.sources, "it comes from nowhere"
            assert not pull.sources.keys() & self.borrowing.dead.keys()
            same = self._by_source[pull.source, pull.name]
            placed[object_id] = None
            assert not pull.admitted or next(iter(same)) == object_id
            moving += pull.admitted * pull.size_bytes
            window = config.transfer_window_chunks * len(pull.sources)
            assert len(pull.outstanding) <= window
            assert all(self._chunks[number] is pull for number in pull.outstanding)
        assert sum(len(pull.outstanding) for pull in self._pulls.values()) == len(self._chunks)
        assert moving == self._moving_bytes
        assert {o: None for same in self._by_source.values() for o in same} == placed
        assert not self._turn or self._moving_bytes, "a pull waits for nobody"
        self.sourcing.check_invariants()
        client = self._state.clients.get(PULLER)
        held = {p.object_id for p in self._pulls.values() if p.offset >= 0 or p.file_number}
        assert set(() if client is None else client.ranges) == held


def _placed(data: bytes, offset: int, part: bytes) -> bytes:
    """A value that is put together in order or out of order."""
    if offset == len(data):
        return data + part
    grown = bytearray(data.ljust(offset + len(part), b"\0"))
    grown[offset : offset + len(part)] = part
    return bytes(grown)
