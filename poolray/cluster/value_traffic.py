"""What a node's daemon does for its machine with the bytes of values.

    machine ──SendChunk──▶ bulk channel ─ ─ where there is none: control link ──▶ another node
            ──ExpectChunk, ForgetChunks, WriteChunk, SealFile──▶ arena, files
            ──SendCreation──▶ head

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
from poolray.protocol.directory import StoreCreation
from poolray.protocol.node import ChunkData


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
    ) -> None:
        self._bulk = bulk
        self._chunks = chunks
        self._send_peer = send_peer
        self._send_head = send_head
        self._in_thread = in_thread
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
        data = self._chunks.read(effect.place, effect.offset, effect.size_bytes)
        chunk = ChunkData(
            object_id=effect.object_id,
            offset=effect.offset,
            data=b"" if data is None else data,  # type: ignore[arg-type]
            missing=data is None,
            number=effect.number,
        )
        self._send_peer(effect.node_id, chunk)

    def _send_creation(self, effect: SendCreation) -> None:
        parts = []
        for part in effect.creation.parts:
            value = part.value
            if not isinstance(value, bytes):
                data = self._chunks.read(value, 0, value.size_bytes)
                if data is None:
                    return  # the log says why
                value = bytes(data)
            parts.append(msgspec.structs.replace(part, value=value))
        creation = msgspec.structs.replace(effect.creation, parts=parts)
        self._send_head(StoreCreation(actor_id=effect.actor_id, creation=creation))

    def _write_chunk(self, effect: WriteChunk) -> None:
        self._chunks.write(effect.offset, effect.file_number, effect.data)

    def _seal_file(self, effect: SealFile) -> None:
        # (It reads all of the file, for its checksum.)
        seal = partial(self._chunks.seal, effect.file_number, effect.object_id, effect.size_bytes)
        self._in_thread(seal)
