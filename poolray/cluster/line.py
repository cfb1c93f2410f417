"""How a driver speaks with the daemon that serves it: through a socket on the same machine.

What: the interface that `driver.py` uses, and its implementation for a daemon on this machine;
the one for drivers elsewhere is in `remote_line.py`.
Who calls: the driver's runtime.
May touch: a Unix socket, the arena.
Invariants: what is sent arrives whole, once and in order, or the line is lost and says why.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Protocol, final

import msgspec

from poolray.cluster import places
from poolray.cluster.stream import FrameReader, frame
from poolray.exceptions import ClusterConnectionError
from poolray.objects.shared_memory import Arena
from poolray.protocol.cluster import Farewell, Hello, Welcome

_encode = msgspec.msgpack.Encoder().encode
_decode_welcome = msgspec.msgpack.Decoder(Welcome | Farewell).decode

_SIGN_ON_S = 10.0
_GONE = "its daemon has ended or was killed"


class Line(Protocol):
    """A conversation with a daemon that has signed this driver on."""

    welcome: Welcome
    #: Why nothing comes any more; empty: it does.
    lost: str

    @property
    def arena(self) -> Arena | None:
        """The node's memory; None: this process is not on its machine."""

    def fileno(self) -> int:
        """What to poll: readable when `read` has something."""

    def read(self) -> list[bytes] | None:
        """What has come, without waiting; None: the line is lost."""

    def send(self, body: bytes, may_wait: bool = False) -> None:
        """Send a message.

        Parameters
        ----------
        may_wait : bool
            The caller produces much: it waits while much is on its way already.

        Raises
        ------
        OSError
            The line is lost.
        """

    def close(self) -> None:
        """The end: what was sent arrives, if that takes no longer than a moment."""

    def abandon(self) -> None:
        """In a forked child: this is the parent's."""


@final
class LocalLine:
    """A line to a daemon on this machine.

    Parameters
    ----------
    name : str
        Of the daemon's socket.

    Raises
    ------
    ClusterConnectionError
        It is not there, or will not speak with us.
    """

    def __init__(self, name: str, hello: Hello) -> None:
        self._channel, self.welcome, descriptor = sign_on(name, hello)
        self.arena = Arena(descriptor, self.welcome.arena_bytes)
        self.lost = ""
        self._reader = FrameReader(self._channel)
        #: Keeps frames of several threads apart, in the order in which they were begun.
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """What to poll."""
        return self._channel.fileno()

    def read(self) -> list[bytes] | None:
        """What has come, without waiting; None: the line is lost."""
        frames = self._reader.read()
        if frames is None:
            self.lost = self.lost or _GONE
        return frames

    def send(self, body: bytes, may_wait: bool = False) -> None:
        """Send a message."""
        try:
            with self._sending:
                # (The daemon always reads, so this waits for a moment at the most.)
                self._channel.sendall(frame(body))
        except OSError:
            self.lost = self.lost or _GONE
            raise

    def close(self) -> None:
        """The end."""
        self._channel.close()
        self.arena.close()

    def abandon(self) -> None:
        """In a forked child: this is the parent's."""
        self._channel.close()
        self.arena.forget_parent()


def sign_on(name: str, hello: Hello) -> tuple[socket.socket, Welcome, int]:
    """Begin a conversation with a daemon on this machine.

    Returns
    -------
    channel : socket
    welcome : Welcome
    descriptor : int
        Of the arena.

    Raises
    ------
    ClusterConnectionError
        It is not there, or will not speak with us.
    """
    try:
        channel = places.connect(name, _SIGN_ON_S)
    except OSError as error:
        raise ClusterConnectionError(f"The node's daemon cannot be reached: {error}.") from error
    descriptors: list[int] = []
    try:
        channel.sendall(frame(_encode(hello)))
        data, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 1)
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            more = channel.recv(1 << 20)
            if not more:
                raise ClusterConnectionError("The node's daemon does not take this driver in.")
            data += more
        welcome = _decode_welcome(data[4:])
        if isinstance(welcome, Farewell):
            raise ClusterConnectionError(f"The node's daemon refuses: {welcome.reason}.")
        channel.settimeout(None)
        return channel, welcome, descriptors[0]
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        channel.close()
        if isinstance(error, ClusterConnectionError) or not isinstance(
            error, (OSError, IndexError, msgspec.MsgspecError)
        ):
            raise
        raise ClusterConnectionError(
            f"The node's daemon does not take this driver in: {error}."
        ) from error
