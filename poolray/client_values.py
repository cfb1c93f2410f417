"""Values and errors as a client reads them.

What: where a value is under the name that this process knows, and errors as `get` raises them.
Who calls: `client.py`, `local/calls.py`.
May touch: files of values on disk.
Invariants: none; it keeps nothing.
"""

from __future__ import annotations

import time
from typing import Any

from poolray.exceptions import InternalError, ObjectLostError, TaskError
from poolray.ids import ObjectId
from poolray.objects.spill_files import SpillFileError, load_value
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
