"""Bytes of values between the network and where they lie: in the arena, or in files.

What: reads chunks that peers ask for, writes those that come, and ends files made of them.
Who calls: the node's daemon, for effects of its machine.
May touch: the arena, files.
Invariants: a file that could not be written is gone, and the machine is told so once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import final

from poolray.ids import ObjectId
from poolray.objects import spill_urls
from poolray.objects.checksums import checksum_of_parts
from poolray.objects.shared_memory import Arena
from poolray.objects.spill_files import SpillFileError, read_object
from poolray.objects.spill_urls import is_url
from poolray.protocol.node import FileSealed
from poolray.protocol.values import InArena, InFile

_logger = logging.getLogger(__name__)

#: Bytes of a file looked at in one go for its checksum.
_STEP_BYTES = 16 << 20


@final
class ChunkStore:
    """Where chunks come from and go to.

    Parameters
    ----------
    arena : Arena
    path_of : callable
        The path of the file of a number, in a folder that is there; raises OSError.
    """

    def __init__(self, arena: Arena, path_of: Callable[[int], str]) -> None:
        self._arena = arena
        self._path_of = path_of
        #: number -> path of a file that chunks are being written to; empty: it failed.
        self._paths: dict[int, str] = {}

    def read(self, place: InArena | InFile, offset: int, size_bytes: int) -> memoryview | None:
        """Some bytes of a value; None when they cannot be read.

        Of a place behind a URL on any thread: it may take as long as it wants.
        """
        if isinstance(place, InArena):
            return self._arena.write(place.offset + offset, size_bytes)
        try:
            if is_url(place.path):
                return self._read_elsewhere(place, offset, size_bytes)
            descriptor = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, size_bytes, place.offset + offset)
            finally:
                os.close(descriptor)
        except (OSError, MemoryError, SpillFileError) as error:
            _logger.warning("object=%s cannot be read: %s", place.object_id.hex()[:12], error)
            return None
        return memoryview(data) if len(data) == size_bytes else None

    def _read_elsewhere(self, place: InFile, offset: int, size_bytes: int) -> memoryview | None:
        if size_bytes == place.size_bytes:
            whole = memoryview(bytearray(size_bytes))
            read_object(place.path, place.offset, place.checksum, whole)
            return whole
        # (Who wants all of it in chunks would have all of it read once for each else.)
        data = spill_urls.read(place.path, place.offset + offset, size_bytes)
        return memoryview(data) if len(data) == size_bytes else None

    def write(self, offset: int, file_number: int, data: bytes | memoryview) -> None:
        """Bytes have come."""
        if not file_number:
            self._arena.put(offset, data)
            return
        path = self._paths.get(file_number)
        try:
            if path is None:
                path = self._paths[file_number] = self._path_of(file_number)
            if not path:
                return
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:  # a disk that is almost full takes a part, and says no more than that
                    count = os.pwrite(descriptor, view, offset)
                    view, offset = view[count:], offset + count
            finally:
                os.close(descriptor)
        except OSError as error:
            _logger.error("a value that comes from another node cannot be written: %s", error)
            self._give_up(file_number)

    def _give_up(self, file_number: int) -> None:
        path = self._paths.get(file_number, "")
        self._paths[file_number] = ""
        try:
            os.unlink(path)
        except OSError:
            pass  # it was never made

    def seal(self, file_number: int, object_id: ObjectId, size_bytes: int) -> FileSealed:
        """All bytes of a file have come: where it is, or that it could not be written."""
        path = self._paths.pop(file_number, "")
        place: InFile | None = None
        try:
            if path and os.path.getsize(path) == size_bytes:
                place = InFile(
                    object_id=object_id,
                    path=path,
                    size_bytes=size_bytes,
                    checksum=_checksum(path),
                )
        except OSError as error:
            _logger.error("a value that came from another node cannot be read: %s", error)
        return FileSealed(object_id=object_id, file_number=file_number, place=place)


def _checksum(path: str) -> int:
    with open(path, "rb") as file:
        return checksum_of_parts(iter(lambda: file.read(_STEP_BYTES), b""))
