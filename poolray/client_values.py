"""Values and errors as a client reads them, and large values as it writes them.

What: where a value is under the name that this process knows, and errors as `get` raises them.
Who calls: `client.py`, `local/calls.py`.
May touch: files of values on disk, the arena; the node, through the client's link.
Invariants: none; it keeps nothing.
"""

from __future__ import annotations

import time
from typing import Any

from poolray.client_link import Link
from poolray.exceptions import (
    InternalError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    TaskError,
)
from poolray.ids import ObjectId
from poolray.objects.serialization import Serialized
from poolray.objects.shared_memory import Arena
from poolray.objects.spill_files import (
    DISK_FULL_ERRORS,
    SpillFileError,
    load_value,
    write_value_file,
)
from poolray.protocol.client import ReturnRange
from poolray.protocol.values import InArena, InFile


def named(value: bytes | InArena | InFile, object_id: ObjectId) -> bytes | InArena | InFile:
    """A place under the name by which this process asked for it."""
    if isinstance(value, InArena) and value.object_id != object_id:
        return InArena(object_id=object_id, offset=value.offset, size_bytes=value.size_bytes)
    return value


def load_from_disk(place: InFile, writable: bool) -> Any:
    """A value from a file.

    Raises
    ------
    ObjectLostError
        The file is gone or damaged.
    """
    try:
        return load_value(
            place.path, place.offset, place.size_bytes, place.checksum, writable=writable
        )
    except SpillFileError as error:
        raise ObjectLostError(object_id=place.object_id.hex(), reason=error.reason) from error


def ready_to_raise(error: Any) -> BaseException:
    """An error as `get` raises it: of the cause's class too, with the remote traceback as cause."""
    if not isinstance(error, BaseException):
        return InternalError(f"a task's error is {error!r}: this is a bug in poolray")
    if isinstance(error, TaskError):
        raised = error.as_instanceof_cause()
        cause = error.cause
        frames = getattr(error, "_traceback_dict", None)
        if frames is not None:
            import tblib

            cause.__traceback__ = tblib.Traceback.from_dict(frames).as_traceback()
        raised.__cause__ = cause
        return raised
    return error


def deadline_of(timeout_s: float | None) -> float | None:
    """The moment, on `time.monotonic`'s clock, when a timeout is over."""
    return None if timeout_s is None else time.monotonic() + timeout_s


def write_value(
    link: Link, arena: Arena, object_id: ObjectId, value: Serialized
) -> InArena | InFile:
    """Write a large value to the arena, or to a file when that has no room.

    Raises
    ------
    ObjectStoreFullError
        There is room neither in the arena nor on disk (`OutOfDiskError`), or no file can be made.
    """
    size = value.size_bytes
    granted = link.allocate(object_id, size)
    if granted.refusal:
        raise OutOfDiskError(size_bytes=size, reason=granted.refusal)
    try:
        if granted.offset >= 0:
            try:
                arena.store(granted.offset, value)
            except OSError as error:
                reason = f"the system has no memory left for it ({error})"
                raise ObjectStoreFullError(size_bytes=size, reason=reason) from error
            return InArena(object_id=object_id, offset=granted.offset, size_bytes=size)
        path = granted.path
        try:
            checksum = write_value_file(path, value.write_into, size)
        except OSError as error:
            is_full = error.errno in DISK_FULL_ERRORS
            kind = OutOfDiskError if is_full else ObjectStoreFullError
            reason = f"the object store is full, and writing to {path} failed ({error})"
            raise kind(size_bytes=size, reason=reason) from error
    except BaseException:
        link.send(ReturnRange(object_id=object_id))
        raise
    return InFile(object_id=object_id, path=path, size_bytes=size, checksum=checksum)
