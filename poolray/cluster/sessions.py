"""Drivers as their node's daemon sees them.

    driver ══Unix socket══▶ DriverSession ──ClientRequest──▶ NodeDaemon
           ◀═══ replies, what workers print ═══ DriverSession ◀──┘

What: signs drivers on, reads their requests, writes replies, notices their end.
Who calls: the node's daemon; the reactor when a socket has something.
May touch: Unix sockets.
Invariants: nothing here blocks; a driver of another user is turned away before it is read; whatever
a driver sends, only its own session ends for it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Any, Protocol, final

import msgspec

from poolray.cluster import places
from poolray.cluster.stream import FrameReader, FrameWriter, frame
from poolray.exceptions import PoolrayError
from poolray.ids import WORKER_ID_BYTES, ClientId
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.client import ClientRequest, SubmitTasks
from poolray.protocol.cluster import Farewell, Hello, Welcome

_logger = logging.getLogger(__name__)

#: What may wait for a driver that does not read: then it counts as gone.
_WAITING_BYTES_MAX = 4 << 30
#: No descriptors or no memory are left, which may pass.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: Connections taken in one go.
_TURN = 32

_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_request = msgspec.msgpack.Decoder(ClientRequest).decode


class Session(Protocol):
    """A conversation with a driver, wherever that is."""

    client_id: ClientId
    #: What it said when it signed on; None: it has not yet.
    hello: Hello | None
    job_id: bytes

    @property
    def waits(self) -> bool:
        """Whether something waits to be sent, and is to be tried again soon."""

    def send(self, message: Any) -> None:
        """Tell the driver something; never blocks."""

    def flush(self) -> bool:
        """Send what waits."""

    def dismiss(self, reason: str) -> None:
        """End the conversation, and say why."""


class Host(Protocol):
    """What sessions need of the daemon."""

    def welcome(self, session: Session, hello: Hello) -> Welcome:
        """A driver has signed on."""

    def on_request(self, session: Session, message: Any) -> None:
        """A driver wants something."""

    def on_left(self, session: Session) -> None:
        """A driver is gone."""

    def watch(self, channel: socket.socket, owner: Any) -> None:
        """Call the owner's `answer` when the channel can be read."""

    def unwatch(self, channel: socket.socket) -> None:
        """Do not, any more."""

    def arena_descriptor(self) -> int:
        """What drivers map."""


@final
class Reception:
    """Takes drivers in."""

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self.name = name
        self._listener = places.listen(name)
        self._rests = False
        host.watch(self._listener, self)

    def answer(self) -> None:
        """Somebody is at the door."""
        for _ in range(_TURN):
            try:
                channel, _ = self._listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    # It stays readable: without a pause the daemon would do nothing else.
                    _logger.error("a driver cannot be taken in: %s", error)
                    self._rests = True
                    self._host.unwatch(self._listener)
                return
            if places.check_peer(channel):
                DriverSession(self._host, channel)
            else:
                _logger.warning("a process of another user was turned away")
                channel.close()

    def tick(self) -> None:
        """Some time has passed: there may be room again."""
        if self._rests:
            self._rests = False
            self._host.watch(self._listener, self)

    def close(self) -> None:
        """Nobody comes in any more."""
        if not self._rests:
            self._host.unwatch(self._listener)
        self._rests = False
        self._listener.close()


@final
class DriverSession:
    """A conversation with one driver."""

    def __init__(self, host: Host, channel: socket.socket) -> None:
        self._host = host
        self._channel = channel
        channel.setblocking(False)
        self._reader = FrameReader(channel)
        self._writer = FrameWriter(channel)
        self.client_id = ClientId(os.urandom(WORKER_ID_BYTES))
        #: What it said when it signed on; None: it has not yet.
        self.hello: Hello | None = None
        self.job_id = b""
        self._closed = False
        host.watch(channel, self)

    @property
    def channel(self) -> socket.socket:
        """What it comes by."""
        return self._channel

    def answer(self) -> None:
        """Read what has come."""
        try:
            frames = self._reader.read()
            if frames is None:
                self.close()
                return
            submitted: SubmitTasks | None = None
            for body in frames:
                if self._closed:
                    return
                if self.hello is None:
                    self._sign_on(_decode_hello(body))
                    continue
                request = _decode_request(body)
                if type(request) is SubmitTasks:
                    # Tasks that came one by one are decided on together.
                    if submitted is None:
                        submitted = request
                    else:
                        submitted.tasks.extend(request.tasks)
                    continue
                if submitted is not None:
                    self._host.on_request(self, submitted)
                    submitted = None
                self._host.on_request(self, request)
            if submitted is not None:
                self._host.on_request(self, submitted)
        except (msgspec.MsgspecError, PoolrayError) as error:
            _logger.warning("a driver is dismissed: %s", error)
            self.dismiss(f"it was not understood: {error}")
        except Exception as error:
            # Whatever a driver says, it costs nobody else anything.
            _logger.exception("a driver is dismissed")
            self.dismiss(f"it was not understood: {error!r}")

    def _sign_on(self, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            self.dismiss(
                f"the driver speaks version {hello.protocol_version} of the protocol, the cluster "
                f"version {PROTOCOL_VERSION}: run the same version of poolray on all machines"
            )
            return
        self.hello = hello
        welcome = _encode(self._host.welcome(self, hello))
        try:
            # Small, and the first of all: the socket takes it whole.
            socket.send_fds(self._channel, [frame(welcome)], [self._host.arena_descriptor()])
        except OSError:
            self.close()

    def send(self, message: Any) -> None:
        """Tell the driver something; never blocks."""
        self._writer.write(_encode(message))
        if self._writer.waiting_bytes > _WAITING_BYTES_MAX:
            _logger.error("a driver does not read and is given up")
            self.close()

    def flush(self) -> bool:
        """Send what waits; True when some still does."""
        return self._writer.waiting_bytes > 0 and self._writer.flush()

    @property
    def waits(self) -> bool:
        """Whether something waits to be sent."""
        return self._writer.waiting_bytes > 0

    def dismiss(self, reason: str) -> None:
        """End the conversation, and say why."""
        if not self._closed:
            self._writer.write(_encode(Farewell(reason=reason)))
            self.close()

    def close(self) -> None:
        """The conversation is over, whoever has ended it."""
        if self._closed:
            return
        self._closed = True
        self._host.unwatch(self._channel)
        self._channel.close()
        if self.hello is not None:
            self._host.on_left(self)
