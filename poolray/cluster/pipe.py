"""From a socket to a file without a copy in between.

    socket ── splice: pages change hands ──▶ pipe ── splice: one copy ──▶ file

What: a pipe of the process's own that is empty between two calls.
Who calls: `cluster/bulk_loop.py`, for memory of the arena that has no pages yet.
May touch: descriptors.
Invariants: what was taken from the source is in the target when a call returns, or the call raises.
"""

from __future__ import annotations

import fcntl
import os
from typing import final

#: What it holds at once, if the system lets this user have so much.
_SIZE_BYTES = 1 << 20


@final
class Pipe:
    """Takes pages from a socket to a file, past this process: the file's copy is the only one."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _SIZE_BYTES)
        except OSError:
            pass  # this user has many already: it stays a small one

    def move(self, source: int, target: int, position: int, size: int) -> int:
        """Move what is there of so many bytes.

        Raises
        ------
        BlockingIOError
            Nothing is there.
        ConnectionAbortedError
            The target has no room: what was taken is lost.
        OSError
            The source is broken, or this system cannot read it that way (EINVAL); nothing is lost.
        """
        taken = left = os.splice(source, self._in, size, flags=os.SPLICE_F_NONBLOCK)
        try:
            while left:
                done = os.splice(self._out, target, left, offset_dst=position)
                left -= done
                position += done
        except OSError as error:
            while left:  # it is nobody's
                left -= len(os.read(self._out, left))
            raise ConnectionAbortedError(f"what has come cannot be kept: {error}") from error
        return taken

    def close(self) -> None:
        """Close both ends."""
        os.close(self._out)
        os.close(self._in)
