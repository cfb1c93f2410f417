"""The threads that move bytes of values between nodes.

    jobs ──▶ deque, bell ──▶ ┌──────┐ ── read, seal, send ───────────▶ Sending ~~~ TCP ~~~▶ peer
                             │ loop │
    news ◀── report() ◀───── └──────┘ ◀─ receive into the arena ◀────── Receiving ◀~~ TCP ~~ peer

What: one thread per loop, with any number of connections that never block each other.
Who calls: `cluster/bulk.py` on the daemon's thread.
May touch: sockets, threads, the arena, files, the clock.
Invariants: a connection belongs to one loop, and only its thread touches it; large copies release
the interpreter's lock; bytes that came are written only under the lock of what expects them, and
never after that was revoked; whatever comes in, a connection ends at worst.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

import msgspec

from poolray.cluster.pipe import Pipe
from poolray.cluster.transfer import ChunkStore
from poolray.direct.seal import (
    ANSWER_BYTES,
    HELLO_BYTES,
    ID_BYTES,
    MAGIC,
    PROOF_BYTES,
    RECORD_BYTES,
    TAG_BYTES,
    Handshake,
    HandshakeError,
    Seal,
)
from poolray.node.effects import SendChunk
from poolray.objects.shared_memory import CONTROL_BYTES, Arena
from poolray.protocol.values import InArena

_logger = logging.getLogger(__name__)

#: Before the bytes of a chunk: the number that it was asked for under, how many, whether they
#: could be read (else none follow).
_HEADER = struct.Struct(">QQ?")
#: Of one connection in a row, so that others get their turn.
_TURN_BYTES = 4 << 20
#: Received in one go: so much may be written after it was asked to stop, which waits for it.
_PIECE_BYTES = 1 << 20
#: A receiver sleeps until so much has come of a chunk: woken for each packet it would do little but
#: wake up (measured, one connection and four at once: 5.1 GB/s each, against 3.5 and 3.9).
_WAKE_BYTES = 512 << 10
#: A handshake takes no longer.
HANDSHAKE_S = 3.0
#: Who has not taken a byte for so long while some wait is given up.
STALL_S = 20.0
#: Connections that have not proved who they are, at the most: the oldest makes way.
_STRANGERS_MAX = 64
_LOOK_AT_CLOCK_S = 0.5
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
#: Waits for nothing but the clock (0 ends no wait: it leaves all as it is).
_NOTHING = select.EPOLLERR
#: No descriptors or no memory are left, which may pass.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_GONE = select.EPOLLHUP | select.EPOLLERR


#: In place of a socket that was given away.
_CLOSED = socket.socket()
_CLOSED.close()


class Opened(msgspec.Struct, frozen=True, gc=False):
    """Both ends have proved who they are."""

    connection_id: bytes


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A connection is no more."""

    connection_id: bytes
    reason: str


class Arrived(msgspec.Struct, frozen=True, gc=False):
    """A chunk is where it belongs, or could not be read at its source."""

    connection_id: bytes
    number: int
    is_missing: bool


News = Opened | Ended | Arrived


@final
class Expected:
    """Where a chunk belongs that was asked for."""

    __slots__ = ("file_number", "lock", "offset", "revoked", "size_bytes")

    def __init__(self, offset: int, file_number: int, size_bytes: int) -> None:
        self.offset = offset
        self.file_number = file_number
        self.size_bytes = size_bytes
        #: Held while something is written there, at most for a piece; guards `revoked`.
        self.lock = threading.Lock()
        #: The place may be another value's by now.
        self.revoked = False

    def revoke(self) -> None:
        """When this returns nothing is being written there, nor ever will be."""
        with self.lock:
            self.revoked = True


class Connection(abc.ABC):
    """One connection of a loop.

    `step` is told what epoll has said, and gives what to wait for next; None ends the connection.
    """

    def __init__(self, connection_id: bytes, channel: socket.socket) -> None:
        self.connection_id = connection_id
        self.channel = channel
        channel.setblocking(False)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the system has taken to send, and cannot, ends it as soon as what waits here does: it
        # would try for a quarter of an hour. A receiver has nothing to send, and asks.
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        #: When to give up at the latest; inf: not at all.
        self.deadline_s = time.monotonic() + HANDSHAKE_S
        #: What epoll waits for.
        self.events = 0
        #: When to wait for what `start` says again; inf: no pause was made.
        self.resume_s = float("inf")

    @abc.abstractmethod
    def start(self) -> int:
        """What to wait for first."""

    @abc.abstractmethod
    def step(self, loop: Loop, events: int) -> int:
        """Do what can be done without waiting.

        Raises
        ------
        OSError, HandshakeError
            It is over.
        """

    def drop(self) -> None:  # noqa: B027 (most have nothing but the socket)
        """It is over: let go of what is not the socket."""


def _send_some(channel: socket.socket, data: memoryview) -> int:
    try:
        return channel.send(data)
    except BlockingIOError:
        return 0


@final
class Sending(Connection):
    """The end that listens: it sends what its node was asked for."""

    def __init__(
        self, connection_id: bytes, channel: socket.socket, handshake: Handshake, hello: bytes
    ) -> None:
        super().__init__(connection_id, channel)
        self._handshake = handshake
        self._proof = b""
        self._is_open = False
        self._seal: Seal | None = None
        #: Bytes that go before all others: the handshake's, a header, a sealed record.
        self._first = memoryview(handshake.answer(hello))
        self.jobs: deque[SendChunk] = deque()
        #: The file that the running job reads from, where the next byte is, how many are left.
        self._file = -1
        self._is_own_file = False
        self._offset = self._left = 0

    def start(self) -> int:
        """Answer, then wait for the proof."""
        return _READ | _WRITE

    def step(self, loop: Loop, events: int) -> int:
        if events & _READ:
            self._read(loop)
        if events & _GONE:
            raise ConnectionError("the other end has closed it")
        return self._write(loop)

    def _read(self, loop: Loop) -> None:
        wanted = 1 if self._is_open else PROOF_BYTES - len(self._proof)
        try:
            data = self.channel.recv(wanted)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("the other end has closed it")
        if self._is_open:
            raise HandshakeError("the other end says what it should not")
        self._proof += data
        if len(self._proof) == PROOF_BYTES:
            self._handshake.check(self._proof)
            self._seal = self._handshake.seal()
            self._is_open = True
            self._progress()
            loop.report(Opened(self.connection_id))

    def _progress(self) -> None:
        """It is alive: how long it may do nothing begins anew."""
        has_more = self._first or self._left or self.jobs
        self.deadline_s = time.monotonic() + STALL_S if has_more else float("inf")

    def add(self, job: SendChunk) -> int:
        """Send this too; gives what to wait for."""
        if self._is_open and not (self._first or self._left or self.jobs):
            self.deadline_s = time.monotonic() + STALL_S
        self.jobs.append(job)
        return _READ | _WRITE if self._is_open else self.events

    def _write(self, loop: Loop) -> int:
        budget = _TURN_BYTES
        while budget > 0:
            if self._first:
                sent = _send_some(self.channel, self._first)
                self._first = self._first[sent:]
            elif not self._is_open:
                return _READ
            elif self._left:
                sent = self._send_body(loop)
            elif self.jobs:
                self._begin(loop, self.jobs.popleft())
                continue
            else:
                self._progress()
                return _READ
            if not sent:
                return _READ | _WRITE
            budget -= sent
            if self._is_open:
                self._progress()
        return _READ | _WRITE

    def _begin(self, loop: Loop, job: SendChunk) -> None:
        self._close_file()
        place = job.place
        is_there = True
        if isinstance(place, InArena):
            self._file = loop.arena.descriptor
            self._offset = CONTROL_BYTES + place.offset + job.offset
        else:
            try:
                self._file = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                self._is_own_file = True
                self._offset = place.offset + job.offset
                is_there = os.fstat(self._file).st_size >= self._offset + job.size_bytes
            except OSError as error:
                _logger.warning("object=%s cannot be read: %s", place.object_id.hex()[:12], error)
                is_there = False
        self._left = job.size_bytes if is_there else 0
        header = _HEADER.pack(job.number, self._left, is_there)
        self._first = memoryview(header if self._seal is None else self._seal.close(header))

    def _send_body(self, loop: Loop) -> int:
        if self._seal is None and not self._is_own_file:
            # (`sendfile` copies once less, and is half as fast: it hands over page by page, and
            # page by page must the other end take it.)
            size = min(self._left, _PIECE_BYTES)
            start = self._offset - CONTROL_BYTES
            loop.arena.map_range(start, size)
            sent = _send_some(self.channel, loop.arena.write(start, size))
        else:
            sent = min(self._left, RECORD_BYTES)
            data = os.pread(self._file, sent, self._offset)
            if len(data) != sent:
                raise OSError("a file of values is shorter than it was")
            self._first = memoryview(data if self._seal is None else self._seal.close(data))
        self._offset += sent
        self._left -= sent
        return sent

    def _close_file(self) -> None:
        if self._is_own_file:
            os.close(self._file)
        self._file, self._is_own_file = -1, False

    def drop(self) -> None:
        self._close_file()


@final
class Receiving(Connection):
    """The end that connects: it receives what its node has asked for."""

    def __init__(
        self, connection_id: bytes, address: tuple[str, int], connect: Callable[[], Handshake]
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        channel = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        super().__init__(connection_id, channel)
        self.address = address
        #: Makes the handshake, once the socket has addresses.
        self._connect = connect
        self._handshake: Handshake | None = None
        self._answer = b""
        self._is_open = False
        self._seal: Seal | None = None
        self._out = memoryview(b"")
        #: number -> where it belongs; the daemon's thread adds and removes.
        self.expected: dict[int, Expected] = {}
        self._header = b""
        #: The chunk that is coming: its number, where it belongs (None: nowhere any more), where
        #: in it the next byte is, how many are left.
        self._number = 0
        self._target: Expected | None = None
        self._offset = self._left = 0
        #: There was less than was asked for: the rest is still to come.
        self._is_drained = False
        #: epoll says that there is something to read from so many bytes on.
        self._wake_bytes = 1
        #: A sealed record of which so much is here.
        self._record = bytearray()
        self._record_bytes = 0
        self._scratch: memoryview | None = None

    def start(self) -> int:
        error = self.channel.connect_ex(self.address)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        return _WRITE

    def step(self, loop: Loop, events: int) -> int:
        if self._handshake is None:
            error = self.channel.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            self._handshake = self._connect()
            self._out = memoryview(self._handshake.hello())
        if self._out:
            self._out = self._out[_send_some(self.channel, self._out) :]
        if events & (_READ | _GONE):
            if self._is_open:
                self._read(loop)
            else:
                self._read_answer(loop, self._handshake)
        return _READ | _WRITE if self._out else _READ

    def _read_answer(self, loop: Loop, handshake: Handshake) -> None:
        self._answer += self._receive(ANSWER_BYTES - len(self._answer))
        if len(self._answer) == ANSWER_BYTES:
            self._out = memoryview(handshake.prove(self._answer))
            self._out = self._out[_send_some(self.channel, self._out) :]
            self._seal = handshake.seal()
            self._is_open = True
            self.deadline_s = float("inf")
            loop.report(Opened(self.connection_id))

    def _receive(self, size: int) -> bytes:
        try:
            data = self.channel.recv(size)
        except BlockingIOError:
            self._is_drained = True
            return b""
        if not data:
            raise ConnectionError("the other end has closed it")
        self._is_drained = len(data) < size
        return data

    def _read(self, loop: Loop) -> None:
        budget = _TURN_BYTES
        self._is_drained = False
        while budget > 0 and not self._is_drained:
            budget -= self._read_open(loop) if self._seal is None else self._read_sealed(loop)
        if self._seal is not None:
            self._sleep_until(self._record_size() - self._record_bytes)
        else:
            self._sleep_until(self._left or _HEADER.size - len(self._header))

    def _sleep_until(self, size: int) -> None:
        """Have epoll tell of this connection when so many bytes are there, or a fair part of them.

        It tells of the other end's leaving all the same.
        """
        size = min(size, _WAKE_BYTES)
        if size != self._wake_bytes:
            self._wake_bytes = size
            self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    # ---- in the open -----------------------------------------------------------------------------

    def _read_open(self, loop: Loop) -> int:
        if not self._left:
            data = self._receive(_HEADER.size - len(self._header))
            self._header += data
            if len(self._header) == _HEADER.size:
                self._begin(loop, self._header)
                self._header = b""
            return len(data)
        size = min(self._left, _PIECE_BYTES)
        target = self._target
        if target is None or target.file_number:
            taken = self._receive_into(self._scratch_of(size))
            if taken and target is not None:
                self._write(loop, self._scratch_of(taken))
        else:
            with target.lock:
                if target.revoked:
                    self._target = None
                    return self._read_open(loop)
                taken = self._receive_into_arena(loop, target.offset + self._offset, size)
        if taken:
            self._advance(loop, taken)
        return taken

    def _receive_into_arena(self, loop: Loop, start: int, size: int) -> int:
        arena = loop.arena
        if loop.pipe is not None and not arena.has_pages(start, size):
            return self._receive_past(loop, loop.pipe, start, size)
        arena.map_range(start, size)  # (they would be mapped one by one else: half as fast)
        return self._receive_into(arena.write(start, size))

    def _receive_past(self, loop: Loop, pipe: Pipe, start: int, size: int) -> int:
        """Have the kernel make new pages of what has come: it need not clear them first."""
        source, target = self.channel.fileno(), loop.arena.descriptor
        try:
            taken = pipe.move(source, target, CONTROL_BYTES + start, size)
        except BlockingIOError:
            self._is_drained = True
            return 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            loop.pipe = None
            pipe.close()
            return self._receive_into_arena(loop, start, size)
        if not taken:
            raise ConnectionError("the other end has closed it")
        self._is_drained = taken < size
        return taken

    def _receive_into(self, view: memoryview) -> int:
        try:
            taken = self.channel.recv_into(view)
        except BlockingIOError:
            self._is_drained = True
            return 0
        if not taken:
            raise ConnectionError("the other end has closed it")
        self._is_drained = taken < len(view)
        return taken

    def _scratch_of(self, size: int) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_PIECE_BYTES))
        return self._scratch[:size]

    # ---- sealed ----------------------------------------------------------------------------------

    def _record_size(self) -> int:
        return (min(self._left, RECORD_BYTES) if self._left else _HEADER.size) + TAG_BYTES

    def _read_sealed(self, loop: Loop) -> int:
        size = self._record_size()
        if len(self._record) < size:
            self._record = bytearray(max(size, RECORD_BYTES + TAG_BYTES))
        with memoryview(self._record) as view:
            taken = self._receive_into(view[self._record_bytes : size])
            self._record_bytes += taken
            if self._record_bytes < size:
                return taken
            assert self._seal is not None
            data = self._seal.open(view[:size])
        self._record_bytes = 0
        if self._left:
            self._write(loop, memoryview(data))
            self._advance(loop, len(data))
        else:
            self._begin(loop, data)
        return taken

    # ---- chunks ----------------------------------------------------------------------------------

    def _begin(self, loop: Loop, header: bytes) -> None:
        number, size, is_there = _HEADER.unpack(header)
        target = self.expected.get(number)
        if target is not None and is_there and size != target.size_bytes:
            raise HandshakeError(f"{size} bytes came where {target.size_bytes} were asked for")
        if not is_there:
            if size:
                raise HandshakeError("bytes came of what cannot be read")
            loop.report(Arrived(self.connection_id, number, True))
            return
        self._number, self._target, self._offset, self._left = number, target, 0, size

    def _write(self, loop: Loop, data: memoryview) -> None:
        """Put bytes where they belong, if they still belong there."""
        target = self._target
        if target is None:
            return
        with target.lock:
            if target.revoked:
                self._target = None
                return
            loop.chunks.write(target.offset + self._offset, target.file_number, data)

    def _advance(self, loop: Loop, taken: int) -> None:
        self._offset += taken
        self._left -= taken
        if not self._left:
            if self._target is not None:
                loop.report(Arrived(self.connection_id, self._number, False))
            self._target = None


@final
class _Stranger(Connection):
    """Somebody has connected and has not said which connection this is."""

    def __init__(self, channel: socket.socket, door: Door) -> None:
        super().__init__(b"", channel)
        self._door = door
        self._hello = b""

    def start(self) -> int:
        return _READ

    def step(self, loop: Loop, events: int) -> int:
        try:
            data = self.channel.recv(HELLO_BYTES - len(self._hello))
        except BlockingIOError:
            return _READ
        if not data:
            raise ConnectionError("it has left")
        self._hello += data
        if not MAGIC.startswith(self._hello[: len(MAGIC)]):
            raise HandshakeError("it does not speak as we do")
        if len(self._hello) < HELLO_BYTES:
            return _READ
        start = len(MAGIC)
        known = self._door.invitations.pop(self._hello[start : start + ID_BYTES], None)
        if known is None:
            raise HandshakeError("nobody has told us of it")
        target, make = known
        loop.hand_over(self, target, make(self.channel, self._hello))
        return 0


@final
class Door(Connection):
    """The listening socket."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(b"", channel)
        self.deadline_s = float("inf")
        #: id of a connection that will come -> the loop it is for, and what makes it of a socket
        #: and what was said first; used once. The daemon's thread adds and removes.
        self.invitations: dict[bytes, tuple[Loop, Callable[[socket.socket, bytes], Sending]]] = {}
        self._strangers: dict[_Stranger, None] = {}

    def start(self) -> int:
        return _READ

    def step(self, loop: Loop, events: int) -> int:
        try:
            channel, _ = self.channel.accept()
        except BlockingIOError:
            return _READ
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # The listener stays readable: without a pause this thread would do nothing else.
                _logger.error("a connection for values cannot be taken: %s", error)
                self.resume_s = time.monotonic() + _LOOK_AT_CLOCK_S
                return _NOTHING
            return _READ  # it has left already
        self._strangers = {s: None for s in self._strangers if s.channel.fileno() >= 0}
        while len(self._strangers) >= _STRANGERS_MAX:
            loop.end(next(iter(self._strangers)), "too many do not say who they are")
            del self._strangers[next(iter(self._strangers))]
        stranger = _Stranger(channel, self)
        self._strangers[stranger] = None
        loop.take(stranger)
        return _READ


@final
class Loop:
    """A thread with connections.

    Parameters
    ----------
    report : callable
        Takes `News`, on the loop's thread; must not block.
    """

    def __init__(
        self, name: str, arena: Arena, chunks: ChunkStore, report: Callable[[News], None]
    ) -> None:
        self.arena = arena
        self.chunks = chunks
        self.report = report
        self._poller = select.epoll()
        #: None: this system cannot read a socket that way.
        self.pipe: Pipe | None = Pipe()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._bell, _READ)
        #: What other threads want done, in order.
        self._orders: deque[Callable[[], Any]] = deque()
        self._by_descriptor: dict[int, Connection] = {}
        self._by_id: dict[bytes, Connection] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # ---- from other threads ----------------------------------------------------------------------

    def _order(self, order: Callable[[], Any]) -> None:
        self._orders.append(order)
        os.eventfd_write(self._bell, 1)

    def add(self, connection: Connection) -> None:
        """Serve a connection from now on."""
        self._order(lambda: self.take(connection))

    def send(self, connection_id: bytes, job: SendChunk) -> None:
        """Send a chunk, if the connection is still there."""
        self._order(lambda: self._add_job(connection_id, job))

    def close(self, connection_id: bytes) -> None:
        """End a connection, which is reported."""
        self._order(lambda: self._close(connection_id))

    def stop(self) -> None:
        """End all connections and the thread."""
        self._stopped = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        self.abandon()

    def abandon(self) -> None:
        """Let go of descriptors: after the thread's end, or in a forked child, where it is not."""
        for connection in list(self._by_descriptor.values()):
            connection.drop()
            connection.channel.close()
        self._by_descriptor.clear()
        self._by_id.clear()
        self._poller.close()
        if self.pipe is not None:
            self.pipe.close()
        os.close(self._bell)

    # ---- on the loop's thread --------------------------------------------------------------------

    def take(self, connection: Connection) -> None:
        """Begin with a connection."""
        try:
            connection.events = connection.start()
            self._poller.register(connection.channel, connection.events)
        except (OSError, ValueError) as error:  # (a name that can be no host's is a ValueError)
            connection.channel.close()
            self._tell_end(connection, str(error))
            return
        self._by_descriptor[connection.channel.fileno()] = connection
        if connection.connection_id:
            self._by_id[connection.connection_id] = connection

    def hand_over(self, old: Connection, target: Loop, new: Connection) -> None:
        """A connection turns out to be another one, of the same socket, and some loop's."""
        descriptor = old.channel.fileno()
        self._poller.unregister(descriptor)
        del self._by_descriptor[descriptor]
        old.channel = _CLOSED  # it is the other one's
        if target is self:
            self.take(new)
        else:
            target.add(new)

    def end(self, connection: Connection, reason: str) -> None:
        """Close a connection, and say so."""
        descriptor = connection.channel.fileno()
        if descriptor < 0:
            return
        if self._by_descriptor.get(descriptor) is connection:
            del self._by_descriptor[descriptor]
            self._poller.unregister(descriptor)
        self._by_id.pop(connection.connection_id, None)
        connection.drop()
        connection.channel.close()
        self._tell_end(connection, reason)

    def _tell_end(self, connection: Connection, reason: str) -> None:
        if connection.connection_id:
            self.report(Ended(connection.connection_id, reason))
        else:
            _logger.debug("somebody at the port for values is sent away: %s", reason)

    def _add_job(self, connection_id: bytes, job: SendChunk) -> None:
        connection = self._by_id.get(connection_id)
        if isinstance(connection, Sending):
            self._wait_for(connection, connection.add(job))

    def _close(self, connection_id: bytes) -> None:
        connection = self._by_id.get(connection_id)
        if connection is not None:
            self.end(connection, "it is not needed")

    def _wait_for(self, connection: Connection, events: int) -> None:
        if events != connection.events:
            connection.events = events
            self._poller.modify(connection.channel, events)

    def _run(self) -> None:
        look_s = 0.0
        while not self._stopped:
            timeout = self._timeout()
            for descriptor, events in self._poller.poll(timeout):
                if descriptor == self._bell:
                    os.eventfd_read(self._bell)
                    continue
                connection = self._by_descriptor.get(descriptor)
                if connection is not None:
                    self._step(connection, events)
            while self._orders and not self._stopped:
                self._obey(self._orders.popleft())
            now = time.monotonic()
            if now >= look_s:
                look_s = now + _LOOK_AT_CLOCK_S
                for connection in list(self._by_descriptor.values()):
                    if connection.deadline_s <= now:
                        self.end(connection, "the other end is silent")
                    elif connection.resume_s <= now:
                        connection.resume_s = float("inf")
                        self._wait_for(connection, _READ)

    def _obey(self, order: Callable[[], Any]) -> None:
        try:
            order()
        except Exception:  # a bug of ours: what it concerns is noticed as silent, the rest goes on
            _logger.exception("an order about a connection for values fails")

    def _timeout(self) -> float | None:
        if self._orders:
            return 0.0
        some = any(
            min(c.deadline_s, c.resume_s) != float("inf") for c in self._by_descriptor.values()
        )
        return _LOOK_AT_CLOCK_S if some else None

    def _step(self, connection: Connection, events: int) -> None:
        try:
            wanted = connection.step(self, events)
        except (OSError, HandshakeError) as error:
            self.end(connection, str(error))
        except Exception:
            # A bug of ours costs this connection: the others, and the thread, go on.
            _logger.exception("a connection for values ends")
            self.end(connection, "an internal error")
        else:
            if wanted:
                self._wait_for(connection, wanted)
