"""Drivers outside of the cluster as the daemon that serves them sees them.

    driver ══TCP, CURVE══▶ Switch ──▶ RemoteReception ──▶ RemoteSession ──▶ NodeDaemon
           ◀══ replies, pieces of values, output ══ Outlet ◀── RemoteSession ◀──┘

What: the same as `sessions.py`, over a link that may be cut: who is not heard from for the grace
period counts as dead. Values are read from where they lie, and written there, piece by piece.
Who calls: the node's daemon; its switch, when something has come.
May touch: the arena, files; threads, for storage that is no folder of this machine.
Invariants: a driver writes only to what was granted to it and not yet sealed; it reads only what
lies in this node's arena or folders; a driver that was given up is told so when it comes back.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol, final

import msgspec

from poolray.cluster.outlet import Outlet
from poolray.cluster.sessions import Session
from poolray.cluster.storage_threads import StorageThreads
from poolray.cluster.switch import OUTSIDE, Switch
from poolray.ids import WORKER_ID_BYTES, ClientId, ObjectId
from poolray.objects import spill_urls
from poolray.objects.serialization import Serialized
from poolray.objects.shared_memory import Arena
from poolray.objects.spill_files import DISK_FULL_ERRORS
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    ClientRequest,
    PutObject,
    RangeGranted,
    ReturnRange,
)
from poolray.protocol.cluster import Farewell, Hello, Welcome
from poolray.protocol.remote import EndWriting, Piece, ReadPiece, StillThere, WritePiece, Written
from poolray.protocol.values import InArena, InFile

_logger = logging.getLogger(__name__)

#: What may wait for a driver that is away: then it counts as gone.
_WAITING_BYTES_MAX = 4 << 30
#: A driver that has said goodbye may hear that it was heard for this long.
_FAREWELL_S = 2.0
#: How often it is looked for drivers that are silent.
_LOOK_S = 0.25
#: Who has greeted us signs on within this long.
_SIGN_ON_S = 60.0
#: The largest piece that is read in one go.
_PIECE_BYTES_MAX = 4 << 20

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(
    ClientRequest | Hello | Farewell | StillThere | ReadPiece | WritePiece | EndWriting
).decode


class Host(Protocol):
    """What these sessions need of the daemon."""

    arena: Arena

    def welcome(self, session: Session, hello: Hello) -> Welcome:
        """A driver has signed on."""

    def on_request(self, session: Session, message: Any) -> None:
        """A driver wants something."""

    def on_left(self, session: Session) -> None:
        """A driver is gone."""

    def holds_file(self, path: str) -> bool:
        """Whether a file is one of this node's values."""

    def serve_switch(self) -> None:
        """The switch was given something to send."""


@final
class RemoteReception:
    """All drivers outside of the cluster that this node serves."""

    def __init__(self, host: Host, switch: Switch, grace_s: float, storage: StorageThreads) -> None:
        self._host = host
        self._storage = storage
        self._switch = switch
        self._grace_s = grace_s
        self._sessions: dict[bytes, RemoteSession] = {}
        #: Peers whose session is over -> when they are forgotten …
        self._leaving: dict[bytes, float] = {}
        #: … and such that have greeted us and not signed on.
        self._strangers: dict[bytes, float] = {}
        self._next_look_s = 0.0
        switch.refuses = self._refuse

    def _refuse(self, peer_id: bytes) -> str:
        if not peer_id.startswith(OUTSIDE):
            return ""
        return (
            f"its node's daemon does not know it any more: it had not heard from it for "
            f"{self._grace_s:g} s (client_reconnect_grace_period_s) and let go of what it held"
        )

    def on_message(self, peer_id: bytes, body: bytes) -> None:
        """A driver says something."""
        message = _decode(body)
        session = self._sessions.get(peer_id)
        if type(message) is Hello:
            if session is None and peer_id not in self._leaving:
                self._sign_on(peer_id, message)
        elif session is not None:
            session.take(message)

    def _sign_on(self, peer_id: bytes, hello: Hello) -> None:
        session = RemoteSession(self, self._host, Outlet(self._switch, peer_id), peer_id)
        self._sessions[peer_id] = session
        self._strangers.pop(peer_id, None)
        if hello.protocol_version != PROTOCOL_VERSION:
            session.dismiss(
                f"the driver speaks version {hello.protocol_version} of the protocol, the cluster "
                f"version {PROTOCOL_VERSION}: run the same version of poolray on all machines"
            )
            return
        session.hello = hello
        session.send(self._host.welcome(session, hello))

    def flush(self) -> bool:
        """After the switch was served: send what there is room for now; True: it is due again."""
        moved = False
        for session in list(self._sessions.values()):
            moved = session.flush() or moved
        return moved

    def on_restarted(self, peer_id: bytes) -> None:
        """A driver's process is another one than it was: its ids are its own, so this is a fraud or
        a fault.
        """
        session = self._sessions.get(peer_id)
        if session is not None:
            session.close()

    def tick(self, now: float) -> None:
        """Give up who has been silent for the grace period."""
        if now < self._next_look_s:
            return
        self._next_look_s = now + _LOOK_S
        for peer_id in self._switch.outside():
            session = self._sessions.get(peer_id)
            silence_s = now - self._switch.heard_s(peer_id)
            if session is not None and silence_s > self._grace_s:
                _logger.warning("job=%s: its driver is silent: dead", session.job_id.hex())
                session.close()
                self._forget(peer_id)
            elif session is None:
                due = self._leaving.get(peer_id)
                if due is None:
                    due = self._strangers.setdefault(peer_id, now + _SIGN_ON_S)
                if due <= now:
                    self._forget(peer_id)

    def _forget(self, peer_id: bytes) -> None:
        self._leaving.pop(peer_id, None)
        self._strangers.pop(peer_id, None)
        self._switch.forget(peer_id)

    def send_later(self, session: RemoteSession, make: Callable[[], Any]) -> None:
        """Send a driver what a thread makes meanwhile."""
        self._storage.start(make, session.send)

    def on_closed(self, peer_id: bytes) -> None:
        """A session is over."""
        del self._sessions[peer_id]
        heard = self._switch.heard_s(peer_id)
        self._leaving[peer_id] = heard + _FAREWELL_S


class _Grant(msgspec.Struct):
    """A place that a driver may write to."""

    size_bytes: int
    offset: int  #: in the arena; -1: in a file
    path: str = ""
    descriptor: int = -1  #: of that file, once it was opened
    #: What was written, for a file on other storage, which is written at once.
    whole: bytearray | None = None
    error: OSError | None = None  #: the first one


@final
class RemoteSession:
    """A conversation with one driver outside of the cluster."""

    def __init__(
        self, reception: RemoteReception, host: Host, outlet: Outlet, peer_id: bytes
    ) -> None:
        self._reception = reception
        self._host = host
        self._outlet = outlet
        self._peer_id = peer_id
        self.client_id = ClientId(os.urandom(WORKER_ID_BYTES))
        self.hello: Hello | None = None
        self.job_id = b""
        self._closed = False
        #: request id -> object and size, of places that were asked for.
        self._asked: dict[int, tuple[ObjectId, int]] = {}
        self._granted: dict[ObjectId, _Grant] = {}

    # ---- what it says ----------------------------------------------------------------------------

    def take(self, message: Any) -> None:
        """The driver says something."""
        kind = type(message)
        if self._closed or kind is StillThere:
            return
        if kind is Farewell:
            self.close()
        elif kind is ReadPiece:
            self._read(message)
        elif kind is WritePiece:
            self._write(message)
        elif kind is EndWriting:
            self._end_writing(message)
        else:
            try:
                self._look_at(message)
                self._host.on_request(self, message)
            except Exception as error:
                # Whatever a driver says, it costs nobody else anything.
                _logger.warning("a driver is dismissed: %s", error, exc_info=True)
                self.dismiss(f"it was not understood: {error!r}")

    def _look_at(self, message: Any) -> None:
        """What concerns places for values."""
        kind = type(message)
        place = message.value if kind is PutObject else None
        if type(place) is InFile and not self._host.holds_file(place.path):
            # (Once nobody needs the object the node would delete it, whatever it is.)
            raise PermissionError(f"{place.path} is no place for a value")
        if kind is AllocateRange:
            self._asked[message.request_id] = (message.object_id, message.size_bytes)
        elif kind is CancelRequest:
            self._asked.pop(message.request_id, None)
        elif kind is ReturnRange or kind is PutObject:
            # (Written or given up: from here on the place is the object's, or anybody's.)
            self._close_file(self._granted.pop(message.object_id, None))

    # ---- values ----------------------------------------------------------------------------------

    def _read(self, message: ReadPiece) -> None:
        place, offset, size = message.place, message.offset, message.size_bytes
        data: bytes | memoryview = b""
        failure = ""
        if not 0 <= offset <= offset + size <= place.size_bytes or size > _PIECE_BYTES_MAX:
            failure = "the piece that was asked for is none of it"
        elif isinstance(place, InArena):
            arena = self._host.arena
            if place.offset >= 0 and place.offset + place.size_bytes <= arena.capacity_bytes:
                data = arena.write(place.offset + offset, size)
            else:
                failure = "it does not lie in the memory of this node"
        elif not self._host.holds_file(place.path):
            failure = f"{place.path} is no value of this node"
        elif spill_urls.is_url(place.path):
            self._reception.send_later(self, lambda: _piece_of_file(place, message))
            return
        else:
            self.send(_piece_of_file(place, message))
            return
        self.send(
            Piece(request_id=message.request_id, offset=offset, data=data, failure=failure)  # type: ignore[arg-type]
        )

    def _write(self, message: WritePiece) -> None:
        grant = self._granted.get(message.object_id)
        data, offset = message.data, message.offset
        if grant is None or grant.error is not None:
            return  # it was given back, or failed: `EndWriting` is told
        if not 0 <= offset <= offset + len(data) <= grant.size_bytes:
            grant.error = OSError(errno.EINVAL, "a piece lies outside of its value")
            return
        try:
            if grant.offset >= 0:
                self._host.arena.store(grant.offset + offset, Serialized(data, [], []))
            else:
                self._write_file(grant, data, offset)
        except OSError as error:
            grant.error = error
        except MemoryError:
            reason = f"no memory for a value of {grant.size_bytes} bytes"
            grant.error = OSError(errno.ENOMEM, reason)

    def _write_file(self, grant: _Grant, data: bytes, offset: int) -> None:
        if spill_urls.is_url(grant.path):
            if grant.whole is None:
                grant.whole = bytearray(grant.size_bytes)
            grant.whole[offset : offset + len(data)] = data
            return
        if grant.descriptor < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            grant.descriptor = os.open(grant.path, flags, 0o600)
            os.posix_fallocate(grant.descriptor, 0, grant.size_bytes)
        view = memoryview(data)
        while view:
            count = os.pwrite(grant.descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _end_writing(self, message: EndWriting) -> None:
        grant = self._granted.pop(message.object_id, None)
        self._close_file(grant)
        if grant is None:
            missing = OSError(errno.ENOENT, "no place was granted for it")
            self.send(_written(message, missing))
        elif grant.whole is not None and grant.error is None:
            path, whole = grant.path, grant.whole
            self._reception.send_later(
                self, lambda: _written(message, _write_elsewhere(path, whole))
            )
        else:
            self.send(_written(message, grant.error))

    def _close_file(self, grant: _Grant | None) -> None:
        if grant is not None and grant.descriptor >= 0:
            os.close(grant.descriptor)
            grant.descriptor = -1

    # ---- what it is told -------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Tell the driver something; never blocks."""
        if self._closed:
            return
        if type(message) is RangeGranted:
            asked = self._asked.pop(message.request_id, None)
            if asked is not None and not message.refusal:
                object_id, size = asked
                self._granted[object_id] = _Grant(size, message.offset, message.path)
        self._outlet.put(_encode(message))
        if self._outlet.flush():
            self._host.serve_switch()
        if self._outlet.waiting_bytes > _WAITING_BYTES_MAX:
            _logger.error("a driver does not read and is given up")
            self.close()

    def flush(self) -> bool:
        """Send what there is room for now; True when that was something."""
        return self._outlet.flush()

    @property
    def waits(self) -> bool:
        """Nobody has to look after what waits: what its driver acknowledges makes room."""
        return False

    def dismiss(self, reason: str) -> None:
        """End the conversation, and say why."""
        if not self._closed:
            self._outlet.end(_encode(Farewell(reason=reason)))
            self._host.serve_switch()
            self.close()

    def close(self) -> None:
        """The conversation is over, whoever has ended it."""
        if self._closed:
            return
        self._closed = True
        for grant in self._granted.values():
            self._close_file(grant)
        self._granted.clear()
        self._reception.on_closed(self._peer_id)
        if self.hello is not None:
            self._host.on_left(self)


def _written(message: EndWriting, error: OSError | None) -> Written:
    return Written(
        request_id=message.request_id,
        failure="" if error is None else str(error),
        is_disk_full=error is not None and error.errno in DISK_FULL_ERRORS,
    )


def _piece_of_file(place: InFile, message: ReadPiece) -> Piece:
    failure = ""
    try:
        data = _read_file(place.path, place.offset + message.offset, message.size_bytes)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        # (Places are as the driver names them: numbers may be any.)
        data, failure = b"", f"its file {place.path} cannot be read: {error}"
    return Piece(request_id=message.request_id, offset=message.offset, data=data, failure=failure)


def _read_file(path: str, offset: int, size_bytes: int) -> bytes:
    if spill_urls.is_url(path):
        data = spill_urls.read(path, offset, size_bytes)
    else:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, size_bytes, offset)
        finally:
            os.close(descriptor)
    if len(data) != size_bytes:
        raise OSError(errno.EIO, "it ends too early")
    return data


def _write_elsewhere(url: str, whole: bytearray) -> OSError | None:
    """Write a value to storage that is no folder of this machine; gives the error."""

    def write(target: memoryview) -> None:
        target[:] = whole

    try:
        spill_urls.write_value(url, write, len(whole))
    except OSError as error:
        return error
    return None
