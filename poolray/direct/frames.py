"""What goes through a connection for direct calls: frames, in the open or sealed.

What: cuts a stream into frames of four bytes of length and that many more, both ways.
Who calls: both ends of such a connection.
May touch: sockets.
Invariants: a frame that claims to be larger than `FRAME_BYTES_MAX`, or does not open, ends the
connection.
"""

from __future__ import annotations

import mmap
import socket
from typing import final

from poolray.direct.seal import HandshakeError, Seal

#: Packets of calls hold some 100 KiB, reports a little more; an error may carry large texts.
FRAME_BYTES_MAX = 256 << 20
_READ_BYTES = 256 << 10
_LENGTH_BYTES = 4
_DONT_WAIT = socket.MSG_DONTWAIT


class ConnectionLost(Exception):
    """The other end is gone, or says what nobody can read."""


@final
class Frames:
    """One end's frames.

    Parameters
    ----------
    channel : socket
    """

    __slots__ = ("_buffer", "_channel", "_into", "_unsent", "opens", "seals")

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = b""
        #: Where the system writes. (`recv` would get memory for the most that may come, and give
        #: it back, each time: 8 µs. Private: a forked child has its own.)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._into = memoryview(mmap.mmap(-1, _READ_BYTES, flags=flags))
        #: What the system has not taken yet.
        self._unsent = b""
        #: What closes our frames, and opens those of the other end; None: they go in the open.
        self.seals: Seal | None = None
        self.opens: Seal | None = None

    def receive(self) -> bool:
        """Take in what has come, without waiting; False when there was nothing.

        Raises
        ------
        ConnectionLost
            The other end is gone.
        """
        try:
            size = self._channel.recv_into(self._into, 0, _DONT_WAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not size:
            raise ConnectionLost("the other end has closed it")
        data = self._into[:size].tobytes()
        self._buffer = self._buffer + data if self._buffer else data
        return True

    def take_exactly(self, size: int) -> bytes | None:
        """So many bytes that are no frame; None while they are not there."""
        if len(self._buffer) < size:
            return None
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def take(self) -> list[bytes]:
        """The frames that are complete.

        Raises
        ------
        ConnectionLost
            What has come is no frame, or was changed on its way.
        """
        buffer = self._buffer
        frames: list[bytes] = []
        start, end = 0, len(buffer)
        while end - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            size = int.from_bytes(buffer[start:body], "little")
            if size > FRAME_BYTES_MAX:
                raise ConnectionLost("a frame is too large to be one")
            if body + size > end:
                break
            start = body + size
            frames.append(buffer[body:start])
        if start:
            self._buffer = buffer[start:]
        if self.opens is not None and frames:
            try:
                frames = [self.opens.open(frame) for frame in frames]
            except HandshakeError as error:
                raise ConnectionLost(str(error)) from error
        return frames

    def send(self, body: bytes, flags: int = 0) -> None:
        """Send a frame, without waiting: what the other end has no room for is kept, see `push`.

        Parameters
        ----------
        flags : int
            `socket.MSG_OOB`: the other end's process gets SIGURG, over TCP.

        Raises
        ------
        ConnectionLost
            The other end is gone.
        """
        if self.seals is not None:
            body = self.seals.close(body)
        frame = len(body).to_bytes(_LENGTH_BYTES, "little") + body
        self._unsent = self._unsent + frame if self._unsent else frame
        self.push(flags)

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room."""
        return bool(self._unsent)

    def push(self, flags: int = 0) -> None:
        """Send what was kept, as far as there is room now.

        Raises
        ------
        ConnectionLost
            The other end is gone.
        """
        try:
            while self._unsent:
                sent = self._channel.send(self._unsent, flags | _DONT_WAIT)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionLost(str(error)) from error
