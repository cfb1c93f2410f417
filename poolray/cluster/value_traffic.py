"""What a node's daemon does for its machine with the bytes of values.

    machine ──SendChunk──▶ bulk channel ─ ─ where there is none: control link ──▶ another node
            ──ExpectChunk, ForgetChunks, WriteChunk, SealFile──▶ arena, files
            ──SendCreation──▶ head
    (what lies behind a URL is read on other threads first)

What: carries these effects out.
Who calls: the daemon, for effects; it passes on what the bulk channel could not send.
May touch: the arena and files through `transfer.py`, sockets through `bulk.py`.
Invariants: what is asked for is sent by exactly one way, or said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, final

import msgspec

from poolray.cluster.bulk import Bulk
from poolray.cluster.storage_threads import StorageThreads
from poolray.cluster.transfer import ChunkStore
from poolray.ids import NodeId
from poolray.node.effects import (
    ExpectChunk,
    ForgetChunks,
    SealFile,
    SendChunk,
    SendCreation,
    WriteChunk,
)
from poolray.objects.spill_urls import is_url
from poolray.protocol.directory import StoreCreation
from poolray.protocol.node import ChunkData
from poolray.protocol.values import InArena, InFile


@final
class ValueTraffic:
    """Hands for the effects that move values.

    Parameters
    ----------
    send_peer, send_head : callable
        Send a message by the control links.
    in_thread : callable
        Has a function called on a thread that may wait for disks, and its result told.
    """

    def __init__(
        self,
        *,
        bulk: Bulk,
        chunks: ChunkStore,
        send_peer: Callable[[NodeId, Any], None],
        send_head: Callable[[Any], None],
        in_thread: Callable[[Callable[[], Any]], None],
        storage: StorageThreads,
    ) -> None:
        self._bulk = bulk
        self._chunks = chunks
        self._send_peer = send_peer
        self._send_head = send_head
        self._in_thread = in_thread
        self._storage = storage
        #: Kind of effect -> what carries it out.
        self.acts: dict[type, Callable[[Any], None]] = {
            SendChunk: self._send_chunk,
            SendCreation: self._send_creation,
            ExpectChunk: bulk.expect,
            ForgetChunks: bulk.forget,
            WriteChunk: self._write_chunk,
            SealFile: self._seal_file,
        }

    def _send_chunk(self, effect: SendChunk) -> None:
        if not self._bulk.send(effect):
            self.send_by_link(effect)

    def send_by_link(self, effect: SendChunk) -> None:
        """Send a chunk, or that it cannot be read, where the bulk channel does not."""
        send = partial(self._send_data, effect)
        self.read(effect.place, effect.offset, effect.size_bytes, send)

    def read(
        self,
        place: InArena | InFile,
        offset: int,
        size_bytes: int,
        take: Callable[[memoryview | None], None],
    ) -> None:
        """Have some bytes of a value given to `take`, None when they cannot be read: at once, or
        later if they lie behind a URL.
        """
        if isinstance(place, InFile) and is_url(place.path):
            self._storage.start(partial(self._chunks.read, place, offset, size_bytes), take)
        else:
            take(self._chunks.read(place, offset, size_bytes))

    def _send_data(self, effect: SendChunk, data: memoryview | None) -> None:
        chunk = ChunkData(
            object_id=effect.object_id,
            offset=effect.offset,
            data=b"" if data is None else data,  # type: ignore[arg-type]
            missing=data is None,
            number=effect.number,
        )
        self._send_peer(effect.node_id, chunk)

    def _send_creation(self, effect: SendCreation) -> None:
        """Part by part: each may have to be read first."""
        parts = effect.creation.parts
        for index, part in enumerate(parts):
            value = part.value
            if not isinstance(value, bytes):
                go_on = partial(self._send_creation_with, effect, index)
                self.read(value, 0, value.size_bytes, go_on)
                return
        self._send_head(StoreCreation(actor_id=effect.actor_id, creation=effect.creation))

    def _send_creation_with(
        self, effect: SendCreation, index: int, data: memoryview | None
    ) -> None:
        if data is None:
            return  # the log says why
        parts = list(effect.creation.parts)
        parts[index] = msgspec.structs.replace(parts[index], value=bytes(data))
        creation = msgspec.structs.replace(effect.creation, parts=parts)
        self._send_creation(SendCreation(effect.actor_id, creation))

    def _write_chunk(self, effect: WriteChunk) -> None:
        self._chunks.write(effect.offset, effect.file_number, effect.data)

    def _seal_file(self, effect: SealFile) -> None:
        # (It reads all of the file, for its checksum.)
        seal = partial(self._chunks.seal, effect.file_number, effect.object_id, effect.size_bytes)
        self._in_thread(seal)
