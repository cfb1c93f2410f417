"""Bytes of objects on their way between nodes.

    wanted ──▶ ASKING ──UseSource──▶ ROOM ──granted──▶ MOVING ──all chunks──▶ here
                 │ (small ones, and      │ (memory is      ▲ │
                 │  our own: at once)    │  short: waits)  │ └─ PullChunk ▶ source ▶ ChunkData
                 ▼                       ▼                 └─────────────────────────┘
              made again where the value is gone; from another source when this one dies

What: pulls values by chunks with a bounded window, into ranges that the store grants, a bounded
number of bytes at a time; serves chunks to others; as the keeper of a large object, tells each who
wants it from whom to pull, a few per source: whoever has all of it serves the next.
Who calls: `node/objects.py` and `node/tasks.py` for what they need, `node/peers.py` with messages.
May touch: nothing.
Invariants: a pull has a range exactly while it is MOVING (or a file, or nothing when it is small);
what is being served is pinned; no source serves more than `transfer_fanout` at once by our word.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, final

from poolray.ids import NodeId, ObjectId
from poolray.node.effects import SealFile, SendChunk, SendPeer, WriteChunk
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.node.store import PULLER, Store
from poolray.objects.directory import READY
from poolray.protocol.client import AllocateRange, RangeGranted
from poolray.protocol.node import (
    AskSource,
    ChunkData,
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
_GONE = "its node no longer has it"


class PullState(enum.IntEnum):
    """How far a pull has come."""

    ASKING = 0  #: its keeper has not said from whom
    ROOM = 1  #: it waits for its turn, or for a range
    MOVING = 2
    SEALING = 3  #: the shell ends its file


@final
class _Pull:
    """One object on its way here."""

    __slots__ = (
        "admitted",
        "asked",
        "data",
        "file_number",
        "name",
        "next_offset",
        "object_id",
        "offset",
        "outstanding",
        "received_bytes",
        "request_id",
        "size_bytes",
        "source",
        "state",
    )

    def __init__(self, object_id: ObjectId, value: InArena) -> None:
        self.object_id = object_id
        self.source = value.node_id
        #: What the source calls it.
        self.name = value.object_id
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
        #: start -> size of chunks that were asked for and have not come.
        self.outstanding: dict[int, int] = {}
        self.received_bytes = 0
        #: Its bytes count as on their way.
        self.admitted = False


@final
class Sources:
    """Who has a large object of ours, and who wants it."""

    __slots__ = ("copies", "given", "waiting")

    def __init__(self) -> None:
        #: Nodes that have all of it, beside the place that its record names.
        self.copies: dict[NodeId, None] = {}
        #: who pulls -> from whom.
        self.given: dict[NodeId, NodeId] = {}
        #: Who waits for a source to be free.
        self.waiting: deque[NodeId] = deque()

    def forget(self, node_id: NodeId) -> None:
        """A node has no copy, and wants none."""
        self.copies.pop(node_id, None)
        self.given.pop(node_id, None)
        if node_id in self.waiting:
            self.waiting.remove(node_id)


@final
class Transfers:
    """The objects that come and go."""

    __slots__ = (
        "_by_source",
        "_moving_bytes",
        "_objects",
        "_pulls",
        "_requests",
        "_serving",
        "_sources",
        "_state",
        "_store",
        "_turn",
        "borrowing",
        "tasks",
    )

    def __init__(self, state: NodeState, store: Store, objects: Objects) -> None:
        self._state = state
        self._store = store
        self._objects = objects
        self.borrowing: Borrowing
        self.tasks: Tasks
        self._pulls: dict[ObjectId, _Pull] = {}
        #: (source, its name) -> objects here that are pulled from there; the first of them moves.
        self._by_source: dict[tuple[NodeId, ObjectId], dict[ObjectId, None]] = {}
        #: Pulls that wait for others to end.
        self._turn: deque[ObjectId] = deque()
        self._moving_bytes = 0
        #: request for a range -> the object it is for.
        self._requests: dict[int, ObjectId] = {}
        #: peer -> objects in our arena that it pulls, each pinned once.
        self._serving: dict[NodeId, dict[ObjectId, None]] = {}
        #: Objects that we keep and others pull.
        self._sources: dict[ObjectId, Sources] = {}
        store.on_granted[PULLER] = self._on_granted
        objects.sourced, objects.on_sourced = self._sources, self._assign
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
            and value.size_bytes > self._state.config.transfer_chunk_bytes
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
        self._begin(pull)

    def _done_with(
        self, keeper: NodeId, object_id: ObjectId, source: NodeId, *, is_copied: bool
    ) -> None:
        done = SourceDone(object_id=object_id, node_id=source, is_copied=is_copied)
        self._send(keeper, done)

    def _begin(self, pull: _Pull) -> None:
        """The source is known: find room."""
        pull.state = PullState.ROOM
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
        config = self._state.config
        while (
            pull.next_offset < pull.size_bytes
            and len(pull.outstanding) < config.transfer_window_chunks
        ):
            size = min(config.transfer_chunk_bytes, pull.size_bytes - pull.next_offset)
            pull.outstanding[pull.next_offset] = size
            message = PullChunk(object_id=pull.name, offset=pull.next_offset, size_bytes=size)
            self._send(pull.source, message)
            pull.next_offset += size

    def on_chunk(self, node_id: NodeId, message: ChunkData) -> None:
        """Bytes of something that we pull."""
        same = self._by_source.get((node_id, message.object_id))
        if not same:
            return
        pull = self._pulls[next(iter(same))]
        if message.missing:
            self._on_missing(node_id, message.object_id)
            return
        if pull.outstanding.get(message.offset) != len(message.data):
            return  # not what was asked for
        del pull.outstanding[message.offset]
        pull.received_bytes += len(message.data)
        if pull.offset >= 0:
            offset = pull.offset + message.offset
            self._state.effects.append(WriteChunk(offset, 0, message.data))
        elif pull.file_number:
            effect = WriteChunk(message.offset, pull.file_number, message.data)
            self._state.effects.append(effect)
        else:
            # Only small values, and values where neither memory nor disk has room, come here.
            pull.data = _placed(pull.data, message.offset, bytes(message.data))
        self._ask_chunks(pull)
        if pull.received_bytes == pull.size_bytes:
            self._complete(pull)

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
            self._on_missing(pull.source, pull.name)
        else:
            self._arrive(pull, message.place)

    def _arrive(self, pull: _Pull, value: bytes | InArena | InFile) -> None:
        same = list(self._by_source[pull.source, pull.name])
        record = self._state.objects[pull.object_id]
        if not isinstance(value, bytes):
            self._store.adopt(pull.object_id, value, PULLER)
        pull.offset, pull.file_number = -1, 0  # it is the object's now
        record.value = value
        for other in same:
            self._end(self._pulls[other], is_copied=True)
        self._send(pull.source, PullEnded(object_id=pull.name))
        self._objects.wake(record)
        self._objects.on_local(pull.object_id)
        for other in same[1:]:
            self._share(other, pull.object_id)
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
        keeper = pull.asked
        if keeper is not None and keeper not in self.borrowing.dead:
            original = self._objects.originals.get(pull.object_id)
            name = pull.object_id if original is None else original[1]
            if pull.state is not PullState.ASKING:
                self._done_with(keeper, name, pull.source, is_copied=is_copied)
        if pull.state is PullState.ASKING:
            return
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
        self._end(pull, is_copied=False)
        if is_moving and same[0] == object_id and pull.source not in self.borrowing.dead:
            self._send(pull.source, PullEnded(object_id=pull.name))
        if same and same[0] == object_id and len(same) > 1:
            # The others were to come with it: they begin anew.
            for other in same[1:]:
                self._end(self._pulls[other], is_copied=False)
            self.restart(same[1:])
        self._admit()

    def _on_missing(self, node_id: NodeId, name: ObjectId) -> None:
        """A source does not have what it was said to have."""
        for object_id in list(self._by_source.get((node_id, name), ())):
            if object_id not in self._pulls:
                continue
            is_keepers = self._pulls[object_id].asked == node_id
            self.stop(object_id)
            record = self._state.objects.get(object_id)
            if record is None or record.state is not READY:
                continue
            if is_keepers or record.location() == node_id:
                self.tasks.lineage.on_object_lost(object_id, record, _GONE)
            elif record.location() is not None and object_id not in self._pulls:
                self.pull(object_id)

    # ---- serving ---------------------------------------------------------------------------------

    def on_pull_chunk(self, node_id: NodeId, message: PullChunk) -> None:
        """A peer wants bytes of an object."""
        object_id, start, size = message.object_id, message.offset, message.size_bytes
        record = self._state.objects.get(object_id)
        if record is None or record.state is not READY or record.location() is not None:
            self._miss(node_id, message)
            return
        value = record.value
        total = len(value) if isinstance(value, bytes) else value.size_bytes
        if not (start >= 0 and size > 0 and start + size <= total):
            self._miss(node_id, message)  # it is an error now, that says that the value is lost
        elif isinstance(value, bytes):
            data = value[start : start + size]
            self._send(node_id, ChunkData(object_id=object_id, offset=start, data=data))
        else:
            if isinstance(value, InArena):
                serving = self._serving.setdefault(node_id, {})
                if object_id not in serving:
                    serving[object_id] = None
                    self._store.pin(object_id)
            self._state.effects.append(SendChunk(node_id, object_id, value, start, size))

    def _miss(self, node_id: NodeId, message: PullChunk) -> None:
        reply = ChunkData(object_id=message.object_id, offset=message.offset, missing=True)
        self._send(node_id, reply)

    def on_pull_ended(self, node_id: NodeId, message: PullEnded) -> None:
        """A peer has what it wanted of an object."""
        self._stop_serving(node_id, message.object_id)

    def _stop_serving(self, node_id: NodeId, object_id: ObjectId) -> None:
        serving = self._serving.get(node_id)
        if serving is not None and object_id in serving:
            del serving[object_id]
            if not serving:
                del self._serving[node_id]
            self._store.unpin(object_id)

    def pins(self) -> list[ObjectId]:
        """Objects in memory that are being sent."""
        return [object_id for serving in self._serving.values() for object_id in serving]

    # ---- who pulls from whom ---------------------------------------------------------------------

    def on_ask(self, node_id: NodeId, message: AskSource) -> None:
        """A peer wants the bytes of a large object of ours."""
        if message.object_id not in self._state.objects:
            return  # it has given it back, as we shall hear
        sources = self._sources.setdefault(message.object_id, Sources())
        sources.forget(node_id)
        sources.waiting.append(node_id)
        self._assign(message.object_id)

    def on_source_done(self, node_id: NodeId, message: SourceDone) -> None:
        """A peer is done with a source that it was given."""
        sources = self._sources.get(message.object_id)
        if sources is None:
            return
        if sources.given.get(node_id) == message.node_id:
            del sources.given[node_id]
        if message.is_copied:
            sources.copies[node_id] = None
        else:
            sources.copies.pop(message.node_id, None)
        self._assign(message.object_id)

    def _assign(self, object_id: ObjectId) -> None:
        """Give sources to those who wait, as far as there are free ones."""
        sources = self._sources[object_id]
        record = self._state.objects[object_id]
        if record.state is not READY:
            return  # it was lost: who wants it will ask again
        value = record.value
        location = record.location() or self._state.node_id
        name = value.object_id if isinstance(value, InArena) and value.node_id else object_id
        while sources.waiting:
            loads = dict.fromkeys((location, *sources.copies), 0)
            for source in sources.given.values():
                if source in loads:
                    loads[source] += 1
            puller = sources.waiting[0]
            loads.pop(puller, None)
            best = min(loads, key=loads.__getitem__, default=None)
            if best is None or loads[best] >= self._state.config.transfer_fanout:
                return
            sources.waiting.popleft()
            sources.given[puller] = best
            where = name if best == location else object_id
            self._send(puller, UseSource(object_id=object_id, node_id=best, name=where))

    def copy_of(self, object_id: ObjectId, not_at: NodeId | None) -> NodeId | None:
        """A node that has told us of a copy, which is not counted on again."""
        sources = self._sources.get(object_id)
        while sources is not None and sources.copies:
            node_id = next(reversed(sources.copies))
            del sources.copies[node_id]
            if node_id != not_at and node_id not in self.borrowing.dead:
                return node_id
        return None

    # ---- what ends -------------------------------------------------------------------------------

    def on_forgotten(self, object_id: ObjectId) -> None:
        """An object was freed here."""
        self.stop(object_id)
        self._sources.pop(object_id, None)
        for node_id in [n for n, serving in self._serving.items() if object_id in serving]:
            serving = self._serving[node_id]
            del serving[object_id]
            if not serving:
                del self._serving[node_id]

    def on_given_back(self, node_id: NodeId, object_ids: list[ObjectId]) -> None:
        """A peer does not need these any more."""
        for object_id in object_ids:
            self._stop_serving(node_id, object_id)
            sources = self._sources.get(object_id)
            if sources is not None:
                sources.forget(node_id)
                if object_id in self._state.objects:
                    self._assign(object_id)

    def on_node_died(self, node_id: NodeId) -> list[ObjectId]:
        """A peer is dead: what comes from there comes from elsewhere, or not at all.

        Returns
        -------
        list of ObjectId
            For `restart`, once it is known which of them have another place.
        """
        for object_id in list(self._serving.get(node_id, ())):
            self._stop_serving(node_id, object_id)
        again = [
            pull.object_id
            for pull in self._pulls.values()
            if pull.asked == node_id or (pull.source == node_id and pull.state)
        ]
        for object_id in again:
            self.stop(object_id)
        for object_id, sources in list(self._sources.items()):
            sources.forget(node_id)
            for puller in [p for p, source in sources.given.items() if source == node_id]:
                del sources.given[puller]  # it asks again
            if object_id in self._state.objects:
                self._assign(object_id)
        return again

    # ---- looking in ------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when pulls, ranges and sources do not agree."""
        moving = 0
        placed: dict[ObjectId, None] = {}
        for object_id, pull in self._pulls.items():
            record = self._state.objects[object_id]
            assert record.state is READY, "what is not there is pulled"
            assert record.location() is not None, "what is here is pulled"
            if pull.state is PullState.ASKING:
                assert pull.asked not in self.borrowing.dead
                continue
            assert pull.source not in self.borrowing.dead
            same = self._by_source[pull.source, pull.name]
            placed[object_id] = None
            assert not pull.admitted or next(iter(same)) == object_id
            moving += pull.admitted * pull.size_bytes
            assert len(pull.outstanding) <= self._state.config.transfer_window_chunks
        assert moving == self._moving_bytes
        assert {o: None for same in self._by_source.values() for o in same} == placed
        assert not self._turn or self._moving_bytes, "a pull waits for nobody"
        for sources in self._sources.values():
            assert not sources.given.keys() & set(sources.waiting)
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
