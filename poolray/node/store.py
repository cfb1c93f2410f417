"""Where the node's large values are: in the arena or on disk, pinned or free to move.

                      ┌────────────── IN MEMORY ◀─────────── restored: somebody reads it
    AllocateRange     │ spilled: memory is short,  │                              │
      ──▶ room? ──yes─┘ nobody looks at it         ▼                              │
            │ no                               written to a file ──────────▶ ON DISK
            └─▶ wait while something is being written; else: write it to a file yourself

What: hands out ranges, counts who looks at them, picks what goes to disk (least recently used
first, several objects to a file) and what comes back, deletes files with their last object.
Who calls: `node/objects.py`, the dispatcher (pins of packets), `node/node.py` with shells' reports.
May touch: nothing.
Invariants: `check_invariants()`; a range is free only when its object is gone or on disk and nobody
looks at it or moves it; who waits for room waits for a batch that is being written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import final

from poolray.exceptions import ObjectLostError
from poolray.ids import ClientId, ObjectId
from poolray.node.effects import (
    DeleteFile,
    DeleteUnsealed,
    Reply,
    RestoreObject,
    SpillObjects,
    Warn,
)
from poolray.node.state import NodeState
from poolray.node.store_records import (
    Restoring,
    SpillBatch,
    StoreCounts,
    StoreStatistics,
    ValueFile,
)
from poolray.objects.allocator import range_bytes
from poolray.objects.directory import READY, ClientRecord, ObjectRecord
from poolray.protocol.client import AllocateRange, RangeGranted
from poolray.protocol.node import RestoreDone, RestoreFailed, SpillDone, SpillFailed
from poolray.protocol.values import InArena, InFile, Value

#: Of the arena, beyond what pressure asks for: at each crossing of the mark so much is spilled,
#: lest every further object go to a file of its own.
_STEP_SHARE = 0.1
#: The client in whose name ranges for objects of other nodes are asked for.
PULLER = ClientId(b"puller")
#: Before all times.
_NEVER_S = -1.0


@final
class Store:
    """Memory and disk of one node."""

    __slots__ = (
        "_aliases",
        "_clean",
        "_clock",
        "_counts",
        "_dirty",
        "_disk_bytes",
        "_doomed",
        "_files",
        "_has_failed",
        "_has_warned",
        "_held",
        "_high_bytes",
        "_kept",
        "_leaving",
        "_leaving_bytes",
        "_numbers",
        "_on_disk",
        "_pins",
        "_places",
        "_ranges",
        "_restores",
        "_retry_s",
        "_returning",
        "_state",
        "_step_bytes",
        "_waiting",
        "_waiting_bytes",
        "_writing",
        "attention",
        "on_granted",
        "wake",
    )

    def __init__(self, state: NodeState) -> None:
        self._state = state
        #: Tells the objects' side that a value can be read (again).
        self.wake: Callable[[ObjectRecord], None]
        #: client that is a part of this node -> who is told of places that it has asked for.
        self.on_granted: dict[ClientId, Callable[[RangeGranted], None]] = {}
        #: Something has changed that may ask for room or give it: `make_room` is due.
        self.attention = False
        capacity = state.allocator.capacity_bytes
        self._high_bytes = int(capacity * min(1.0, state.config.object_spilling_threshold))
        self._step_bytes = min(state.config.min_spilling_size_bytes, int(capacity * _STEP_SHARE))
        #: object id -> offset of its range.
        self._ranges: dict[ObjectId, int] = {}
        #: object id -> how often somebody looks at it in memory; no zeros.
        self._pins: dict[ObjectId, int] = {}
        #: Objects in memory that may go, least recently used first -> when they came here; of the
        #: clean ones a copy is on disk.
        self._clean: dict[ObjectId, int] = {}
        self._dirty: dict[ObjectId, int] = {}
        self._clock = 0
        #: object id -> where its copy on disk is; the object may be in memory as well.
        self._places: dict[ObjectId, InFile] = {}
        #: Those of them that are on disk only.
        self._on_disk: dict[ObjectId, None] = {}
        self._files: dict[str, ValueFile] = {}
        self._disk_bytes = 0
        #: batch -> what is being written; object id -> the batch it is in, unless it was freed.
        self._writing: dict[int, SpillBatch] = {}
        self._leaving: dict[ObjectId, int] = {}
        self._leaving_bytes = 0
        #: restore -> what is being read; object id -> the restore, unless it was freed.
        self._restores: dict[int, Restoring] = {}
        self._returning: dict[ObjectId, int] = {}
        self._numbers = 0
        #: Clients that wait for room, first come first served.
        self._waiting: deque[tuple[ClientId, AllocateRange]] = deque()
        self._waiting_bytes = 0
        #: Nothing is written before this time: the last attempt failed.
        self._retry_s = _NEVER_S
        #: That was a moment ago: who waits is not put off any longer.
        self._has_failed = False
        self._has_warned = False
        #: object id -> the object whose memory it shares.
        self._aliases: dict[ObjectId, ObjectId] = {}
        #: offset of a range -> how many peers read from it: until they are through, its memory is
        #: not used again, whatever becomes of the object.
        self._held: dict[int, int] = {}
        #: Those of them whose objects are gone, or elsewhere.
        self._doomed: dict[int, None] = {}
        #: Objects that stay in memory as long as they live.
        self._kept: dict[ObjectId, None] = {}
        self._counts = StoreCounts()

    # ---- ranges ----------------------------------------------------------------------------------

    def on_allocate(
        self, client_id: ClientId, client: ClientRecord, message: AllocateRange
    ) -> None:
        """A client wants to write a large value; it is told where, now or once there is room."""
        self.return_range(client, message.object_id)  # asked for and never used
        if not self._waiting:
            offset = self._state.allocator.allocate(message.size_bytes)
            if offset is not None:
                self._grant(client_id, message, offset)
                return
        self._waiting.append((client_id, message))
        self._waiting_bytes += range_bytes(message.size_bytes)
        self.attention = True

    def _grant(self, client_id: ClientId, message: AllocateRange, offset: int) -> None:
        refusal, file_number = "", 0
        limit = self._state.config.object_spilling_max_bytes
        if offset < 0 and limit and self._disk_bytes + message.size_bytes > limit:
            refusal = (
                f"the object store is full and so is its share of the disk ({self._disk_bytes} of "
                f"{limit} bytes, object_spilling_max_bytes)"
            )
        else:
            if offset < 0:
                # Not named after the object: that may be written again while this is being deleted.
                self._numbers += 1
                file_number = self._numbers
            self._state.clients[client_id].ranges[message.object_id] = (
                -file_number if offset < 0 else offset
            )
        granted = RangeGranted(
            request_id=message.request_id,
            offset=offset,
            file_number=file_number,
            refusal=refusal,
        )
        if self._state.allocator.used_bytes > self._high_bytes:
            self.attention = True
        on_granted = self.on_granted.get(client_id)
        if on_granted is not None:
            on_granted(granted)
        else:
            self._state.effects.append(Reply(client_id, granted))

    def cancel(self, client_id: ClientId, request_id: int) -> None:
        """A client no longer waits for room."""
        for item in self._waiting:
            if item[0] == client_id and item[1].request_id == request_id:
                self._waiting.remove(item)
                self._waiting_bytes -= range_bytes(item[1].size_bytes)
                self.attention = True
                return

    def return_range(self, client: ClientRecord, object_id: ObjectId) -> None:
        """A client will not write what it was granted a place for."""
        offset = client.ranges.pop(object_id, None)
        if offset is None:
            return
        if offset >= 0:
            self._free(offset)
        else:
            self._state.effects.append(DeleteUnsealed(-offset))

    def drop_client(self, client_id: ClientId, client: ClientRecord) -> None:
        """A client is gone: it waits for nothing, writes nothing, looks at nothing."""
        for item in [item for item in self._waiting if item[0] == client_id]:
            self._waiting.remove(item)
            self._waiting_bytes -= range_bytes(item[1].size_bytes)
            self.attention = True
        for object_id in list(client.ranges):
            self.return_range(client, object_id)
        pins, client.pins = client.pins, {}
        for object_id, count in pins.items():
            self.unpin(object_id, count)

    def adopt(self, object_id: ObjectId, value: InArena | InFile, writer: ClientId) -> None:
        """An object was sealed: the place that its writer was granted belongs to it now."""
        client = self._state.clients.get(writer)
        offset = None if client is None else client.ranges.pop(value.object_id, None)
        if isinstance(value, InFile):
            self._put_on_disk(object_id, value)
        elif offset is not None and offset >= 0:
            self._ranges[object_id] = offset
            self._rest(object_id)

    def next_number(self) -> int:
        """A number that no batch, file or request of `PULLER` had before."""
        self._numbers += 1
        return self._numbers

    def discard(self, value: InArena | InFile, writer: ClientId) -> None:
        """A value that was written and that nobody wants any more."""
        client = self._state.clients.get(writer)
        offset = None if client is None else client.ranges.pop(value.object_id, None)
        if isinstance(value, InFile):
            self._state.effects.append(DeleteFile(value.path))
        elif offset is not None and offset >= 0:
            self._free(offset)

    def _free(self, offset: int) -> None:
        if offset in self._held:
            self._doomed[offset] = None
            return
        self._state.allocator.free(offset)
        if self._waiting:
            self.attention = True

    def hold_range(self, offset: int) -> None:
        """A peer begins to read from a range: its memory is not used again meanwhile."""
        self._held[offset] = self._held.get(offset, 0) + 1

    def let_go_of_range(self, offset: int) -> None:
        """A peer no longer reads from a range."""
        if self._held[offset] > 1:
            self._held[offset] -= 1
            return
        del self._held[offset]
        if offset in self._doomed:
            del self._doomed[offset]
            self._free(offset)

    def forget(self, object_id: ObjectId) -> None:
        """An object was freed: its memory and its share of a file go with it."""
        if self._pins.pop(object_id, None) is not None:
            # Somebody was given it and did not hold it: nobody else knows that he had.
            for client in self._state.clients.values():
                client.pins.pop(object_id, None)
            self._kept.pop(object_id, None)
        offset = self._ranges.pop(object_id, None)
        if offset is not None:
            self._clean.pop(object_id, None)
            self._dirty.pop(object_id, None)
            if self._leaving.pop(object_id, None) is None:
                self._free(offset)  # else the batch frees it
        self._returning.pop(object_id, None)
        self._forget_place(object_id)
        original = self._aliases.pop(object_id, None)
        if original is not None:
            self.unpin(original)

    # ---- who looks -------------------------------------------------------------------------------

    def pin(self, object_id: ObjectId) -> None:
        """Somebody is about to look at an object in memory."""
        count = self._pins.get(object_id, 0)
        self._pins[object_id] = count + 1
        if count == 0:
            self._clean.pop(object_id, None)
            self._dirty.pop(object_id, None)

    def unpin(self, object_id: ObjectId, count: int = 1) -> None:
        """Somebody no longer looks."""
        pins = self._pins.get(object_id)
        if pins is None:
            return  # freed meanwhile
        if pins > count:
            self._pins[object_id] = pins - count
            return
        del self._pins[object_id]
        if object_id in self._ranges and object_id not in self._leaving:
            self._rest(object_id)

    def pin_for(self, client: ClientRecord, object_ids: Iterable[ObjectId]) -> None:
        """A client looks at these, until it says that it does not, lets go of them, or ends."""
        for object_id in object_ids:
            if object_id in self._state.objects:
                client.pins[object_id] = client.pins.get(object_id, 0) + 1
                self.pin(object_id)

    def unpin_for(self, client: ClientRecord, object_ids: Iterable[ObjectId]) -> None:
        """A view of each of these has died."""
        for object_id in object_ids:
            count = client.pins.get(object_id)
            if count is None:
                continue  # it has let go of the object meanwhile
            if count > 1:
                client.pins[object_id] = count - 1
            else:
                del client.pins[object_id]
            self.unpin(object_id)

    def unpin_all_for(self, client: ClientRecord, object_id: ObjectId) -> None:
        """A client has neither refs to an object nor views of it."""
        count = client.pins.pop(object_id, 0)
        if count:
            self.unpin(object_id, count)

    def unpin_many(self, object_ids: Sequence[ObjectId]) -> None:
        """A worker is done with a packet that brought these."""
        for object_id in object_ids:
            self.unpin(object_id)

    def deliver(self, client: ClientRecord, object_id: ObjectId, value: InArena | InFile) -> None:
        """A client is told where an object is, and will look."""
        if isinstance(value, InFile):
            self._counts.mapped_bytes += value.size_bytes
        elif not value.node_id:
            self.pin_for(client, (object_id,))

    def send(self, object_id: ObjectId, value: InArena | InFile, pins: list[ObjectId]) -> None:
        """A worker is sent a packet that names this place: `pins` goes with the packet."""
        if isinstance(value, InFile):
            self._counts.mapped_bytes += value.size_bytes
        elif not value.node_id and object_id in self._state.objects:
            self.pin(object_id)
            pins.append(object_id)

    def keep_in_memory(self, object_id: ObjectId) -> None:
        """Its place was told to somebody who may look at any time."""
        if object_id in self._state.objects and object_id not in self._kept:
            self._kept[object_id] = None
            self.pin(object_id)

    def share(self, object_id: ObjectId, original: ObjectId) -> None:
        """An object is found in another one's memory, which has to stay where it is."""
        value = self._state.objects[original].value
        if isinstance(value, InArena) and not value.node_id:
            self._aliases[object_id] = original
            self.pin(original)

    def place_of(self, value: InArena | InFile) -> Value:
        """Where the object is now that was there when a task or definition was written down."""
        record = self._state.objects.get(value.object_id)
        if record is None or record.state is not READY:
            return value
        return record.value

    def _rest(self, object_id: ObjectId) -> None:
        """Nobody looks at an object in memory (any more): it may go, after those that came here
        before it.
        """
        if object_id in self._pins:
            return
        self._clock += 1
        resting = self._clean if object_id in self._places else self._dirty
        resting[object_id] = self._clock
        if self._waiting or self._state.allocator.used_bytes > self._high_bytes:
            self.attention = True

    # ---- pressure --------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Serve who waits as far as there is room, and spill as much as the use of memory asks."""
        while True:
            self._serve()
            excess = self._state.allocator.used_bytes - self._leaving_bytes - self._high_bytes
            # What is free at once may be what somebody waits for.
            if excess <= 0 or not self._spill(max(excess, self._step_bytes)) or not self._waiting:
                break
        self.attention = self._has_failed = False

    def _serve(self) -> None:
        waiting = self._waiting
        while waiting:
            client_id, message = waiting[0]
            offset = self._find_room(message.size_bytes)
            if offset is None:
                break
            waiting.popleft()
            self._waiting_bytes -= range_bytes(message.size_bytes)
            self._grant(client_id, message, offset)

    def _find_room(self, size_bytes: int) -> int | None:
        """An offset, or -1 when there will be no room, or None while there may be some soon."""
        allocator = self._state.allocator
        capacity = allocator.capacity_bytes
        if size_bytes > capacity:
            return -1
        wanted = max(range_bytes(size_bytes), min(self._waiting_bytes, capacity))
        while True:
            offset = allocator.allocate(size_bytes)
            if offset is not None:
                return offset
            if not self._spill(wanted - self._leaving_bytes):
                return None if self._writing and not self._has_failed else -1

    def _spill(self, wanted: int) -> bool:
        """Let that many bytes go, least recently used first.

        Returns
        -------
        bool
            Whether some are free already, because their objects were on disk.
        """
        allocator = self._state.allocator
        has_freed = False
        batch = SpillBatch()
        room = self._room_on_disk()
        while wanted > 0:
            object_id = self._least_recent(with_dirty=room > 0)
            if object_id is None:
                break
            offset = self._ranges[object_id]
            size = allocator.size_of(offset)
            wanted -= size
            if object_id in self._clean:
                self._evict(object_id)
                has_freed = True
                continue
            if size > room:
                room = 0
                wanted += size
                continue
            room -= size
            del self._dirty[object_id]
            batch.objects[object_id] = offset
            batch.size_bytes += size
            if batch.size_bytes >= self._state.config.min_spilling_size_bytes:
                self._write(batch)
                batch = SpillBatch()
                room = self._room_on_disk()
        if batch.objects:
            self._write(batch)
        return has_freed

    def _least_recent(self, *, with_dirty: bool) -> ObjectId | None:
        """The object whose turn it is to leave memory."""
        clean = next(iter(self._clean), None)
        dirty = next(iter(self._dirty), None) if with_dirty else None
        if clean is None or dirty is None:
            return clean if dirty is None else dirty
        return clean if self._clean[clean] < self._dirty[dirty] else dirty

    def _room_on_disk(self) -> int:
        """Bytes that may be written now."""
        config = self._state.config
        if self._state.now <= self._retry_s or len(self._writing) >= config.max_io_workers:
            return 0
        limit = config.object_spilling_max_bytes
        if not limit:
            return 1 << 62
        room = limit - self._disk_bytes - sum(b.size_bytes for b in self._writing.values())
        return max(0, room)

    def _write(self, batch: SpillBatch) -> None:
        self._numbers += 1
        number = self._numbers
        self._writing[number] = batch
        self._leaving_bytes += batch.size_bytes
        places = []
        for object_id, offset in batch.objects.items():
            self._leaving[object_id] = number
            value = self._state.objects[object_id].value
            assert isinstance(value, InArena)
            places.append(InArena(object_id=object_id, offset=offset, size_bytes=value.size_bytes))
        self._state.effects.append(SpillObjects(number, places))

    def _evict(self, object_id: ObjectId) -> None:
        """An object that is on disk leaves memory."""
        self._clean.pop(object_id, None)
        self._state.objects[object_id].replace(self._places[object_id], self._is_error(object_id))
        self._on_disk[object_id] = None
        self._free(self._ranges.pop(object_id))

    def _is_error(self, object_id: ObjectId) -> bool:
        return self._state.objects[object_id].is_error

    # ---- what the shell reports ------------------------------------------------------------------

    def on_spill_done(self, message: SpillDone) -> None:
        """A batch is on disk: memory that nobody looks at is free."""
        batch = self._end_batch(message.batch)
        self._counts.spill_s += message.elapsed_s
        self._has_warned = False
        for (object_id, offset), place in zip(batch.objects.items(), message.places, strict=True):
            if self._leaving.get(object_id) != message.batch:  # freed meanwhile
                self._free(offset)
                continue
            del self._leaving[object_id]
            self._counts.spilled_objects += 1
            self._counts.spilled_bytes += place.size_bytes
            self._add_place(object_id, place)
            if object_id not in self._pins:
                self._evict(object_id)
        if message.places[0].path not in self._files:
            self._state.effects.append(DeleteFile(message.places[0].path))

    def on_spill_failed(self, message: SpillFailed) -> None:
        """A batch stays in memory; the disk is left alone for a while."""
        batch = self._end_batch(message.batch)
        self._counts.spill_s += message.elapsed_s
        for object_id, offset in batch.objects.items():
            if self._leaving.get(object_id) != message.batch:
                self._free(offset)
                continue
            del self._leaving[object_id]
            self._rest(object_id)
        self._retry_s = self._state.now + self._state.config.spill_retry_s
        self._has_failed = True
        if not self._has_warned:
            self._has_warned = True
            text = (
                f"Objects cannot be spilled to disk: {message.reason}. They stay in memory; when "
                "that is full too, put() and tasks with large results fail. Make room there, or "
                "choose another place with init(object_spilling_directory=...)."
            )
            self._state.effects.append(Warn(text))

    def _end_batch(self, number: int) -> SpillBatch:
        batch = self._writing.pop(number)
        self._leaving_bytes -= batch.size_bytes
        self.attention = True
        return batch

    # ---- coming back -----------------------------------------------------------------------------

    def restore(self, object_id: ObjectId, *, below_mark: bool = False) -> bool:
        """Read an object into memory again.

        Parameters
        ----------
        below_mark : bool
            Only as long as that makes nothing else leave.

        Returns
        -------
        bool
            Whether it is on its way. If not, readers map its file.
        """
        value = self._state.objects[object_id].value
        if not isinstance(value, InFile):
            return False
        if object_id in self._returning:
            return True
        allocator = self._state.allocator
        size = range_bytes(value.size_bytes)
        if self._waiting or (below_mark and allocator.used_bytes + size > self._high_bytes):
            return False
        offset = allocator.allocate(value.size_bytes)
        if offset is None:
            return False
        self._numbers += 1
        self._restores[self._numbers] = Restoring(object_id, offset)
        self._returning[object_id] = self._numbers
        self._state.effects.append(RestoreObject(self._numbers, value, offset))
        return True

    def on_restore_done(self, message: RestoreDone) -> None:
        """An object is in memory again."""
        restore = self._restores.pop(message.restore)
        object_id, offset = restore.object_id, restore.offset
        self._counts.restore_s += message.elapsed_s
        self.attention = True
        if self._returning.get(object_id) != message.restore:  # freed meanwhile
            self._free(offset)
            return
        del self._returning[object_id]
        record = self._state.objects[object_id]
        value = record.value
        assert isinstance(value, InFile)
        self._counts.restored_objects += 1
        self._counts.restored_bytes += value.size_bytes
        self._on_disk.pop(object_id, None)
        self._ranges[object_id] = offset
        place = InArena(object_id=object_id, offset=offset, size_bytes=value.size_bytes)
        record.replace(place, record.is_error)
        self._rest(object_id)
        self.wake(record)

    def on_restore_failed(self, message: RestoreFailed) -> None:
        """An object could not be read: now, or for good."""
        restore = self._restores.pop(message.restore)
        object_id = restore.object_id
        self._counts.restore_s += message.elapsed_s
        self._free(restore.offset)
        if self._returning.get(object_id) != message.restore:
            return
        del self._returning[object_id]
        record = self._state.objects[object_id]
        if message.is_lost:
            self.forget(object_id)
            error = ObjectLostError(object_id=object_id.hex(), reason=message.reason)
            record.replace(self._state.encode_error(error), True)
            record.seen = True  # it was asked for
        self.wake(record)

    # ---- files -----------------------------------------------------------------------------------

    def _put_on_disk(self, object_id: ObjectId, place: InFile) -> None:
        """An object was written to a file by its maker."""
        self._add_place(object_id, place)
        self._on_disk[object_id] = None

    def _add_place(self, object_id: ObjectId, place: InFile) -> None:
        file = self._files.get(place.path)
        if file is None:
            file = self._files[place.path] = ValueFile()
        file.objects[object_id] = None
        file.size_bytes += place.size_bytes
        self._disk_bytes += place.size_bytes
        self._places[object_id] = place

    def _forget_place(self, object_id: ObjectId) -> None:
        place = self._places.pop(object_id, None)
        if place is None:
            return
        self._on_disk.pop(object_id, None)
        file = self._files[place.path]
        del file.objects[object_id]
        if not file.objects:
            del self._files[place.path]
            self._disk_bytes -= file.size_bytes
            self._retry_s = _NEVER_S  # there is room again
            self._state.effects.append(DeleteFile(place.path))

    # ---- looking in ------------------------------------------------------------------------------

    def statistics(self) -> StoreStatistics:
        """A snapshot."""
        counts = self._counts
        return StoreStatistics(
            spilled_objects=counts.spilled_objects,
            spilled_bytes=counts.spilled_bytes,
            spill_s=counts.spill_s,
            restored_objects=counts.restored_objects,
            restored_bytes=counts.restored_bytes,
            restore_s=counts.restore_s,
            mapped_bytes=counts.mapped_bytes,
            objects_on_disk=len(self._on_disk),
            disk_bytes=self._disk_bytes,
            files=len(self._files),
            pinned_objects=len(self._pins),
            pending_allocations=len(self._waiting),
            spilling_objects=len(self._leaving),
            restoring_objects=len(self._returning),
        )

    def is_returning(self, object_id: ObjectId) -> bool:
        """Whether an object is on its way back to memory."""
        return object_id in self._returning

    def check_invariants(self, packet_pins: Iterable[ObjectId]) -> None:
        """Raise AssertionError when tables of memory, disk and pins do not agree.

        Parameters
        ----------
        packet_pins : iterable of ObjectId
            What packets that are under way have pinned.
        """
        objects = self._state.objects
        assert not self.attention, "room was not made"
        assert not self._waiting or self._writing, "a client waits for room and nothing makes any"
        if self._waiting:
            largest = self._state.allocator.statistics().largest_free_bytes
            assert largest < self._waiting[0][1].size_bytes, "a client waits although there is room"
        self._check_ranges()
        pins: dict[ObjectId, int] = {}
        for client in self._state.clients.values():
            for object_id, count in client.pins.items():
                assert count > 0
                pins[object_id] = pins.get(object_id, 0) + count
        for object_id in (*packet_pins, *self._aliases.values(), *self._kept):
            if object_id in objects:
                pins[object_id] = pins.get(object_id, 0) + 1
        assert pins == self._pins, "pins are counted wrong"
        for object_id in pins:
            assert object_id not in self._on_disk, "somebody looks at what has left memory"
        for object_id in self._ranges:
            resting = (object_id in self._clean) + (object_id in self._dirty)
            assert resting == (object_id not in self._pins and object_id not in self._leaving)
            assert isinstance(objects[object_id].value, InArena)
        for object_id in (*self._clean, *self._dirty):
            assert object_id in self._ranges
            assert (object_id in self._clean) == (object_id in self._places)
        self._check_disk()

    def _check_ranges(self) -> None:
        allocator = self._state.allocator
        assert all(object_id in self._state.objects for object_id in self._ranges), "memory leaks"
        offsets = [*self._ranges.values()]
        for client in self._state.clients.values():
            offsets.extend(offset for offset in client.ranges.values() if offset >= 0)
        for number, batch in self._writing.items():
            # By number: an object that was freed while it is written may have come again since, to
            # another range, and be leaving that in another batch; each batch frees its own.
            offsets.extend(o for i, o in batch.objects.items() if self._leaving.get(i) != number)
        offsets.extend(restore.offset for restore in self._restores.values())
        offsets.extend(self._doomed)
        assert self._held.keys() >= self._doomed.keys(), "a range is freed by nobody"
        assert len(offsets) == len(set(offsets)), "a range has two owners"
        used = sum(allocator.size_of(offset) for offset in offsets)
        assert used == allocator.used_bytes, "a range has no owner"
        allocator.check_invariants()
        assert self._leaving_bytes == sum(b.size_bytes for b in self._writing.values())
        for object_id, number in self._leaving.items():
            assert self._writing[number].objects[object_id] == self._ranges[object_id]
        for object_id, number in self._returning.items():
            assert self._restores[number].object_id == object_id

    def _check_disk(self) -> None:
        objects = self._state.objects
        assert self._disk_bytes == sum(file.size_bytes for file in self._files.values())
        assert sum(len(file.objects) for file in self._files.values()) == len(self._places)
        for object_id, place in self._places.items():
            assert object_id in objects, f"the file of {object_id.hex()} leaks"
            assert object_id in self._files[place.path].objects
            on_disk = isinstance(objects[object_id].value, InFile)
            assert on_disk == (object_id in self._on_disk)
            assert on_disk != (object_id in self._ranges)
        assert all(object_id in self._places for object_id in self._on_disk)
