"""Messages between a driver and the daemon on its machine: a stream, cut into frames.

What: writes and reads frames of four bytes of length and that many more.
Who calls: the driver's runtime and the daemon's sessions.
May touch: Unix sockets.
Invariants: the daemon's side never blocks: what the socket does not take waits in memory; a frame
that claims to be larger than `FRAME_BYTES_MAX` ends the conversation.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import final

from poolray.exceptions import ClusterConnectionError

FRAME_BYTES_MAX = 1 << 30
_READ_BYTES = 256 * 1024
_LENGTH_BYTES = 4


def frame(body: bytes) -> bytes:
    """A body with its length in front."""
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


@final
class FrameReader:
    """Puts frames together from what a socket gives."""

    __slots__ = ("_buffer", "_channel")

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = bytearray()

    def read(self) -> list[bytes] | None:
        """The frames that are complete now, without waiting; None: the other side is gone.

        Raises
        ------
        ClusterConnectionError
            What comes is no frame.
        """
        try:
            data = self._channel.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "little")
            if length > FRAME_BYTES_MAX:
                raise ClusterConnectionError("a frame is too large to be one")
            end = start + _LENGTH_BYTES + length
            if end > len(buffer):
                break
            frames.append(bytes(buffer[start + _LENGTH_BYTES : end]))
            start = end
        del buffer[:start]
        return frames


@final
class FrameWriter:
    """Writes frames without ever waiting."""

    __slots__ = ("_channel", "_waiting", "waiting_bytes")

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._waiting: deque[memoryview] = deque()
        self.waiting_bytes = 0

    def write(self, body: bytes) -> None:
        """Send a frame, or the part of it that the socket takes now."""
        data = memoryview(frame(body))
        if not self._waiting:
            data = data[self._send(data) :]
        if len(data):
            self._waiting.append(data)
            self.waiting_bytes += len(data)

    def flush(self) -> bool:
        """Send what waits; True when some still does."""
        while self._waiting:
            data = self._waiting.popleft()
            sent = self._send(data)
            self.waiting_bytes -= sent
            if sent < len(data):
                self._waiting.appendleft(data[sent:])
                return True
        return False

    def _send(self, data: memoryview) -> int:
        try:
            return self._channel.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # nobody reads any more: its end will be noticed by who reads
