"""Files with what the workers of a cluster's node write, as workers and the daemon handle them.

    <session folder>/logs/worker-<worker id>-<job id>-<pid>.out   sys.stdout, and descriptor 1
                                                         ….err   sys.stderr, and descriptor 2

    [000000008388672 bytes of earlier output are gone]    once it was too long: the older half
    line that is left                                     makes room for this
    …

What: names, appends, cuts.
Who calls: a worker's streams; the daemon's `worker_logs.py`.
May touch: these files.
Invariants: all who write append, and a cut leaves the file in its place: programs that a task has
started have it open. A *place* counts all bytes that were ever written, which the first line tells
of, so that a cut changes none.
"""

from __future__ import annotations

import fcntl
import os
import re
from typing import final

_GONE = re.compile(rb"\[(\d{15}) bytes of earlier output are gone\]\n")
_GONE_BYTES = len(b"[000000000000000 bytes of earlier output are gone]\n")
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def log_name(worker_id: bytes, job_id: bytes, pid: int, suffix: str) -> str:
    """The name of a worker's file; `suffix` is "out" or "err"."""
    return f"worker-{worker_id.hex()}-{job_id.hex()}-{pid}.{suffix}"


def shift_of(descriptor: int) -> tuple[int, int]:
    """Where a file's text begins, and what to add to an offset in the file to make it a place."""
    match = _GONE.match(os.pread(descriptor, _GONE_BYTES, 0))
    return (0, 0) if match is None else (_GONE_BYTES, int(match[1]) - _GONE_BYTES)


def cut(path: str, max_bytes: int) -> None:
    """Leave half of what a file may have, from a whole line on, unless it has no more than that.

    (What a program writes in these microseconds may be lost.)

    Raises
    ------
    OSError
        The file is gone, or cannot be written to.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the daemon and the worker may both find it long
        size = os.fstat(descriptor).st_size
        if size <= max_bytes:
            return
        _, shift = shift_of(descriptor)
        keep = max_bytes // 2
        tail = os.pread(descriptor, keep, size - keep)
        tail = tail[_start_of_text(tail) :]
        gone = size - len(tail) + shift
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"[%015d bytes of earlier output are gone]\n%b" % (gone, tail))
    finally:
        os.close(descriptor)


def _start_of_text(data: bytes) -> int:
    """Where the first whole line begins; where none does, the first whole character."""
    start = data.find(b"\n") + 1
    if not start:
        while start < len(data) and data[start] & 0xC0 == 0x80:
            start += 1
    return start


@final
class LogFile:
    """A worker's own file.

    Parameters
    ----------
    max_bytes : int
        A longer one is cut.

    Raises
    ------
    OSError
        It cannot be made.
    """

    __slots__ = ("_descriptor", "_max_bytes", "_offset", "_path", "_shift")

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._descriptor = os.open(path, _APPEND, 0o600)
        #: Behind what we have written last; and what makes it a place.
        self._offset = self._shift = 0

    def stand_in_for(self, descriptor: int) -> None:
        """What is written to this descriptor goes here as well."""
        os.dup2(self._descriptor, descriptor)

    def write(self, data: bytes) -> int:
        """Append; gives the place behind it, 0 where it could not be written."""
        try:
            count = os.write(self._descriptor, data)
            offset = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if offset != self._offset + count:
                self._look()  # others have written here, or cut it
            self._offset = offset
            place = offset + self._shift
            if offset > self._max_bytes:
                cut(self._path, self._max_bytes)
        except OSError:
            return 0  # the disk is full, or somebody cleaned up: the driver sees it all the same
        return place

    def stray_end(self) -> int:
        """The place behind what others have written since we wrote last; 0: nothing."""
        try:
            offset = os.lseek(self._descriptor, 0, os.SEEK_END)
            if offset == self._offset:
                return 0
            self._look()
        except OSError:
            return 0
        self._offset = offset
        return offset + self._shift

    def _look(self) -> None:
        reader = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _, self._shift = shift_of(reader)
        finally:
            os.close(reader)
