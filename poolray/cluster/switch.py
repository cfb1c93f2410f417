"""All links of one process to processes on other machines.

    send(peer, bytes) ──▶ outbox ──service──▶ PeerLink ──▶ DEALER, or our ROUTER ──▶ ~~~ TCP, CURVE
    on_message(peer, bytes) ◀── PeerLink ◀── ROUTER, DEALERs ◀── ~~~

What: sockets, one reliable link per peer, versions, questions and answers.
Who calls: the head's and the nodes' daemons, remote drivers, one thread at a time.
May touch: ZeroMQ sockets; time comes in as an argument.
Invariants: whatever a peer sends, nothing is raised: what makes no sense is counted and dropped; a
peer of another version is told so in words; no call blocks; what is sent in one turn to one peer
travels as one message, in order.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, final

import msgspec
import zmq

from poolray.cluster.auth import Credentials, Doorman, check_host, secure_client, secure_server
from poolray.node.peer_link import LinkState, PeerLink
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import Answer, FrameKind, NotUnderstood, Question
from poolray.protocol.link import LinkFrame

_logger = logging.getLogger(__name__)

#: What every message begins with: who made this, the protocol's version, what it is, and how long
#: the name of its sender is, which comes next. (One part a message: each more costs both sides.)
_HEADER = struct.Struct(">7sHBB")
_MAGIC = b"poolray"
_KINDS = {int(kind): kind for kind in FrameKind.__members__.values()}
#: A message that is larger than this travels in parts.
PART_BYTES = (4 << 20) + (64 << 10)  # a chunk of an object with what is around it is one part
#: What a socket takes at the most; a peer that sends more is cut off by ZeroMQ.
_SOCKET_BYTES_MAX = PART_BYTES + (1 << 20)
#: What the parts of a message may add up to.
_MESSAGE_BYTES_MAX = 2 << 30
_PEER_ID_BYTES_MAX = 64
#: Ids of drivers outside of the cluster begin with this. Their links may be slow: what is on its
#: way in a connection that stands is not to be sent again at once.
OUTSIDE = b"outside-"
_RESEND_OUTSIDE_S = 1.0
#: Frames under way in one socket at the most; what is beyond is lost, and sent again later.
_HIGH_WATER = 4096
#: Peers at once.
_PEERS_MAX = 100_000
#: Messages of one socket in a row, so that timers and other sockets get their turn.
_TURN = 256
#: A handshake that takes longer than this is given up, and begun again.
HANDSHAKE_MS = 3_000
#: What has come is acknowledged with the next message that goes there, after this long at the
#: latest, and at once when this much has: a frame of its own for each would double the traffic.
_ACK_AFTER_S = 0.02
_ACK_COUNT = 16
#: What a payload of the link is: a message, a part of one that goes on, several messages.
_WHOLE, _PART, _SEVERAL = b"\0", b"\1", b"\2"
#: Several messages travel together up to this size.
_SEVERAL_BYTES_MAX = 256 << 10
#: Rounds of reading and answering in one call of `service`.
_ROUNDS_MAX = 4
#: (As plain numbers: sums of the enums' members are made in Python.)
_POLLIN, _DONT_WAIT, _DONT_WAIT_MORE = (
    int(zmq.POLLIN),
    int(zmq.DONTWAIT),
    int(zmq.DONTWAIT) | int(zmq.SNDMORE),
)
_EVENTS = zmq.EVENTS


def pack(kind: FrameKind, sender: bytes, body: bytes) -> bytes:
    """A message as it travels."""
    return b"".join((_HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, len(sender)), sender, body))


def unpack(data: bytes) -> tuple[FrameKind | None, int, bytes, bytes]:
    """What kind of message this is (None: of none that is known), its version, sender and body.

    Raises
    ------
    ValueError, struct.error
        It is no message.
    """
    magic, version, number, length = _HEADER.unpack_from(data)
    start = _HEADER.size + length
    if magic != _MAGIC or length > _PEER_ID_BYTES_MAX or len(data) < start:
        raise ValueError("no message of poolray")
    return _KINDS.get(number), version, data[_HEADER.size : start], data[start:]


@final
class _Peer:
    """Another process, as far as we speak with it."""

    __slots__ = (
        "ack",
        "ack_count",
        "ack_due_s",
        "dealer",
        "heard_s",
        "is_given_up",
        "link",
        "outbox",
        "parts",
        "parts_bytes",
        "peer_id",
        "route",
    )

    def __init__(self, peer_id: bytes, link: PeerLink) -> None:
        self.peer_id = peer_id
        self.link = link
        #: Our own connection to it, if we made one …
        self.dealer: zmq.Socket[bytes] | None = None
        #: … else the way back through our ROUTER, once it has spoken.
        self.route: bytes | None = None
        #: Messages for it of this turn, which have not been given to the link.
        self.outbox: deque[bytes] = deque()
        #: Parts of a message that is not complete.
        self.parts: list[bytes] = []
        self.parts_bytes = 0
        #: An acknowledgement that waits for company, for how many messages, until when.
        self.ack: LinkFrame | None = None
        self.ack_count = 0
        self.ack_due_s = 0.0
        #: When it said something last.
        self.heard_s = float("-inf")
        #: Too much waited for it, and whoever wants to know has been told.
        self.is_given_up = False


@final
class Switch:
    """Links to peers by their ids.

    Parameters
    ----------
    own_id : bytes
        What peers know this process by.
    session : int
        Number of this life of the process; a later one has a larger number.
    credentials : Credentials or None
        Keys of the cluster; None: links are open, and stay on this machine.
    resend_after_s : float
        Pause before what was not acknowledged is sent again.
    on_message : callable
        Given a peer's id and what it sent, once and in order.
    crowd_bytes : int
        With more than this waiting for a peer, it is `crowded`; with four times as much it is given
        up.
    """

    def __init__(
        self,
        *,
        own_id: bytes,
        session: int,
        credentials: Credentials | None,
        resend_after_s: float,
        on_message: Callable[[bytes, bytes], None],
        crowd_bytes: int = 256 << 20,
    ) -> None:
        self._own_id = own_id
        self._session = session
        self._credentials = credentials
        self._resend_after_s = resend_after_s
        self._on_message = on_message
        self._crowd_bytes = crowd_bytes
        #: Peer for which too much waits -> when it acknowledged something last, or was found to be.
        #: (Of a driver outside of the cluster little waits here: see `outlet.py`.)
        self.crowded: dict[bytes, float] = {}
        #: Called with the id of a peer that was started again, and with the messages under way to
        #: it: whether these arrived nobody can tell.
        self.on_restarted: Callable[[bytes, list[bytes]], None] = _ignore
        #: Called with the id of a peer that will not speak with us, and why.
        self.on_refused: Callable[[bytes, str], None] = _ignore
        #: Called once with the id of a peer for which so much waited that its link was given up:
        #: what was under way is lost, and nothing will ever reach it again.
        self.on_given_up: Callable[[bytes], None] = _ignore
        #: Asked about a peer that goes on with a conversation that nobody here knows of (any more):
        #: why not, in words; empty: it may, and numbers begin anew.
        self.refuses: Callable[[bytes], str] = _refuse_nobody
        #: Called with the descriptor of a socket that is to be polled from now on, or no longer.
        self.on_socket: Callable[[int], None] = _ignore
        self.on_socket_closed: Callable[[int], None] = _ignore
        #: Answers questions; None: does not answer them.
        self.answer: Callable[[Question], Answer] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router: zmq.Socket[bytes] | None = None
        self._doorman: Doorman | None = None
        self._peers: dict[bytes, _Peer] = {}
        #: Sockets that peers answer us on -> the peer's id.
        self._dealers: dict[zmq.Socket[bytes], bytes] = {}
        #: Peers with something under way.
        self._timed: dict[bytes, None] = {}
        #: Peers with something in their outboxes.
        self._unsent: dict[bytes, None] = {}
        #: Sockets that may have something to read. Their descriptors tell of changes alone, and
        #: what is sent may swallow such news.
        self._due: dict[zmq.Socket[bytes], None] = {}
        self._by_descriptor: dict[int, zmq.Socket[bytes]] = {}
        #: Messages that made no sense, since the start.
        self.dropped = 0
        self._prefix = pack(FrameKind.LINK, own_id, b"")
        self._decode_frame = msgspec.msgpack.Decoder(LinkFrame).decode
        self._decode_several = msgspec.msgpack.Decoder(list[bytes]).decode
        self._decode_question = msgspec.msgpack.Decoder(Question).decode
        self._encode = msgspec.msgpack.Encoder().encode

    # ---- sockets ---------------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> int:
        """Take connections; gives the port.

        Raises
        ------
        AuthenticationError
            There is no token, and the host is not a loopback address.
        OSError
            The address is taken, or not ours.
        """
        check_host(host, self._credentials)
        router = self._context.socket(zmq.ROUTER)
        self._prepare(router)
        router.router_handover = True  # a peer that comes back by another connection is the same
        if self._credentials is not None:
            self._doorman = Doorman(self._context, self._credentials)
        secure_server(router, self._credentials)
        try:
            router.bind(f"tcp://{_bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            router.close()
            raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
        self._router = router
        self._add(router)
        if self._doorman is not None:
            self._add(self._doorman.socket)
        endpoint = router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def _add(self, socket: zmq.Socket[bytes]) -> None:
        descriptor = int(socket.fd)
        self._by_descriptor[descriptor] = socket
        self._due[socket] = None
        self.on_socket(descriptor)

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        socket.linger = 0
        socket.maxmsgsize = _SOCKET_BYTES_MAX
        socket.sndhwm = socket.rcvhwm = _HIGH_WATER
        socket.handshake_ivl = HANDSHAKE_MS
        socket.reconnect_ivl = 50
        socket.reconnect_ivl_max = 1_000
        socket.connect_timeout = HANDSHAKE_MS  # the system would wait for minutes
        # A machine that vanishes without a word is noticed by heartbeats; these notice a dead
        # connection, so that a new one is made.
        socket.heartbeat_ivl = 1_000
        socket.heartbeat_timeout = 5_000

    def connect(self, peer_id: bytes, host: str, port: int) -> None:
        """Reach a peer at this address from now on."""
        peer = self._peer(peer_id)
        if peer is None or peer.dealer is not None:
            return
        dealer = self._context.socket(zmq.DEALER)
        self._prepare(dealer)
        secure_client(dealer, self._credentials)
        dealer.connect(f"tcp://{_bracketed(host)}:{port}")
        peer.dealer = dealer
        self._dealers[dealer] = peer_id
        self._add(dealer)

    def is_reachable(self, peer_id: bytes) -> bool:
        """Whether there is a way to a peer, as far as we know."""
        peer = self._peers.get(peer_id)
        return peer is not None and (peer.dealer is not None or peer.route is not None)

    def outside(self) -> list[bytes]:
        """Ids of drivers outside of the cluster that have spoken and were not forgotten."""
        return [peer_id for peer_id in self._peers if peer_id.startswith(OUTSIDE)]

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone for good: drop what waits for it."""
        peer = self._peers.pop(peer_id, None)
        self._timed.pop(peer_id, None)
        self.crowded.pop(peer_id, None)
        if peer is not None and peer.dealer is not None:
            del self._dealers[peer.dealer]
            self._due.pop(peer.dealer, None)
            descriptor = int(peer.dealer.fd)
            self._by_descriptor.pop(descriptor, None)
            self.on_socket_closed(descriptor)
            peer.dealer.close()

    def descriptors(self) -> list[int]:
        """What to poll; `service` is due when one is readable, and after each `send`.

        They tell of changes, not of states: what has come is to be taken until there is no more.
        """
        return list(self._by_descriptor)

    def note_readable(self, descriptor: int) -> None:
        """A descriptor has news: `service` looks there."""
        socket = self._by_descriptor.get(descriptor)
        if socket is not None:
            self._due[socket] = None

    def close(self, linger_s: float = 0.0) -> None:
        """Let go of all sockets; what `service` has sent may take so long."""
        for socket in self._dealers:
            socket.close(int(linger_s * 1000))
        self._dealers.clear()
        self._peers.clear()
        self._timed.clear()
        self._due.clear()
        self._by_descriptor.clear()
        if self._router is not None:
            self._router.close(int(linger_s * 1000))
        if self._doorman is not None:
            self._doorman.close()
        self._context.term()

    def abandon(self) -> None:
        """In a forked child: all this is the parent's, threads included, which are not here."""
        self._dealers.clear()
        self._peers.clear()

    # ---- sending ---------------------------------------------------------------------------------

    def _peer(self, peer_id: bytes) -> _Peer | None:
        peer = self._peers.get(peer_id)
        if peer is None:
            if len(self._peers) >= _PEERS_MAX:
                return None
            resend_after_s = self._resend_after_s
            if OUTSIDE in (peer_id[: len(OUTSIDE)], self._own_id[: len(OUTSIDE)]):
                resend_after_s = max(resend_after_s, _RESEND_OUTSIDE_S)
            link = PeerLink(self._session, resend_after_s, 4 * self._crowd_bytes)
            peer = self._peers[peer_id] = _Peer(peer_id, link)
        return peer

    def send(self, peer_id: bytes, payload: bytes) -> None:
        """Send a message with the next `service`, reliably and in order while both live.

        Other threads may do so too; they see to it that `service` is called.
        """
        peer = self._peer(peer_id)
        if peer is not None:
            peer.outbox.append(payload)
            self._unsent[peer_id] = None

    def give_up(self, peer_id: bytes) -> None:
        """Nothing will ever reach this peer again; `on_given_up` is told with `service`."""
        peer = self._peers.get(peer_id)
        self.crowded.pop(peer_id, None)
        if peer is not None:
            peer.link.give_up()
            self._unsent[peer_id] = None

    def _send_out(self, now: float) -> None:
        """Give the links what was sent in this turn."""
        while self._unsent:
            peer_id, _ = self._unsent.popitem()
            peer = self._peers.get(peer_id)
            if peer is None:
                continue
            outbox = peer.outbox
            while outbox:
                payload = outbox.popleft()
                size = len(payload)
                if size > PART_BYTES:
                    self._send_parts(peer, payload, now)
                    continue
                several = [payload]
                while outbox and size + len(outbox[0]) <= _SEVERAL_BYTES_MAX:
                    payload = outbox.popleft()
                    size += len(payload)
                    several.append(payload)
                body = _SEVERAL + self._encode(several) if len(several) > 1 else _WHOLE + payload
                self._carry(peer, peer.link.send(body, now))
            self._timed[peer_id] = None
            if peer.link.backlog_bytes > self._crowd_bytes:
                self.crowded.setdefault(peer_id, now)
            if peer.link.state is LinkState.BROKEN and not peer.is_given_up:
                peer.is_given_up = True
                self.crowded.pop(peer_id, None)
                self.on_given_up(peer_id)

    def _send_parts(self, peer: _Peer, payload: bytes, now: float) -> None:
        view = memoryview(payload)
        for start in range(0, len(payload), PART_BYTES):
            end = start + PART_BYTES
            mark = _PART if end < len(payload) else _WHOLE
            self._carry(peer, peer.link.send(mark + view[start:end], now))

    def _carry(self, peer: _Peer, frames: list[LinkFrame]) -> None:
        for frame in frames:
            peer.ack, peer.ack_count = None, 0  # it brings along what has come until now
            self._post(peer, self._prefix + self._encode(frame))

    def _post(self, peer: _Peer, data: bytes) -> None:
        """Put a frame on the way, if there is one; else it is lost, and sent again."""
        socket = peer.dealer
        try:
            if socket is not None:
                socket.send(data, _DONT_WAIT)
            elif peer.route is not None and self._router is not None:
                socket = self._router
                socket.send(peer.route, _DONT_WAIT_MORE)
                socket.send(data, _DONT_WAIT)
        except zmq.ZMQError:
            pass  # full, or cut off just now
        if socket is not None:
            self._due[socket] = None

    # ---- receiving -------------------------------------------------------------------------------

    def service(self, now: float, everywhere: bool = True) -> bool:
        """Send what is to be sent and take what has come, as far as a turn goes.

        Parameters
        ----------
        everywhere : bool, default True
            Look at all sockets; False: at those that `note_readable` named, and those that were
            sent something.

        Returns
        -------
        bool
            True: there may be more.
        """
        if everywhere:
            self._due.update(dict.fromkeys(self._by_descriptor.values()))
        more: dict[zmq.Socket[bytes], None] = {}
        for _ in range(_ROUNDS_MAX):
            self._send_out(now)
            if not self._due:
                break
            due, self._due = self._due, {}
            for socket in due:
                if self._drain(socket, now):
                    more[socket] = None
        self._send_out(now)
        self._due.update(more)
        return bool(self._due)

    def _drain(self, socket: zmq.Socket[bytes], now: float) -> bool:
        """Take what has come on a socket; True when there may be more."""
        if self._doorman is not None and socket is self._doorman.socket:
            while self._doorman.answer():
                pass
            return False
        is_router = socket is self._router
        peer_id = None if is_router else self._dealers.get(socket)
        for _ in range(_TURN):
            # (Asking costs less than the exception of a `recv` that finds nothing.)
            if socket.closed or not int(socket.getsockopt(_EVENTS)) & _POLLIN:
                return False
            try:
                parts = socket.recv_multipart(_DONT_WAIT)
            except zmq.ZMQError:
                return False
            route = parts.pop(0) if is_router else None
            try:
                (data,) = parts
                self._take(socket, data, peer_id, route, now)
            except (msgspec.MsgspecError, ValueError, struct.error) as error:
                self.dropped += 1
                _logger.debug("a message makes no sense and is dropped: %s", error)
        return True

    def _take(
        self,
        socket: zmq.Socket[bytes],
        data: bytes,
        peer_id: bytes | None,
        route: bytes | None,
        now: float,
    ) -> None:
        kind, version, sender, body = unpack(data)
        if peer_id is not None and sender != peer_id:
            raise ValueError("a message of somebody else")
        if kind is FrameKind.REFUSAL:
            self.on_refused(sender, body.decode("utf-8", "replace")[:4096])
        elif version != PROTOCOL_VERSION:
            self._refuse(socket, route, version)
        elif kind is FrameKind.LINK:
            frame = self._decode_frame(body)
            if sender not in self._peers and frame.peer_session == self._session:
                reason = self.refuses(sender)
                if reason:
                    self._respond(socket, route, FrameKind.REFUSAL, reason.encode())
                    return
            self._on_frame(sender, route, frame, now)
        elif kind is FrameKind.QUESTION:
            self._on_question(socket, route, body)
        else:
            raise ValueError("a message of a kind that nobody sends us")

    def _refuse(self, socket: zmq.Socket[bytes], route: bytes | None, version: int) -> None:
        """A peer of another version."""
        self.dropped += 1
        reason = (
            f"it speaks version {PROTOCOL_VERSION} of the protocol, we speak version {version}: "
            "run the same version of poolray on all machines"
        )
        self._respond(socket, route, FrameKind.REFUSAL, reason.encode())

    def _respond(
        self, socket: zmq.Socket[bytes], route: bytes | None, kind: FrameKind, body: bytes
    ) -> None:
        data = pack(kind, self._own_id, body)
        try:
            socket.send_multipart([data] if route is None else [route, data], zmq.DONTWAIT)
        except zmq.ZMQError:
            pass  # it will ask again
        self._due[socket] = None

    def _on_question(self, socket: zmq.Socket[bytes], route: bytes | None, body: bytes) -> None:
        number, question = body[:8], self._decode_question(body[8:])
        answer: Answer = NotUnderstood(reason="this process answers no questions")
        if self.answer is not None:
            answer = self.answer(question)
        self._respond(socket, route, FrameKind.ANSWER, number + self._encode(answer))

    def _on_frame(self, sender: bytes, route: bytes | None, frame: LinkFrame, now: float) -> None:
        peer = self._peer(sender)
        if peer is None:
            return
        if route is not None:
            peer.route = route
        peer.heard_s = now
        before_bytes = peer.link.backlog_bytes
        arrival = peer.link.receive(frame, now)
        if sender in self.crowded and peer.link.backlog_bytes < before_bytes:
            self.crowded[sender] = now
            if peer.link.backlog_bytes <= self._crowd_bytes // 2:
                del self.crowded[sender]
        if arrival.restarted:
            peer.parts, peer.parts_bytes = [], 0
            self.on_restarted(sender, _whole(arrival.lost))
        if arrival.payloads and len(arrival.frames) == 1 and peer.ack_count < _ACK_COUNT:
            if peer.ack is None:
                peer.ack_due_s = now + _ACK_AFTER_S
            peer.ack = arrival.frames[0]
            peer.ack_count += 1
            self._timed[sender] = None
        else:
            self._carry(peer, arrival.frames)
        if peer.link.next_deadline() is not None:
            self._timed[sender] = None
        for payload in arrival.payloads:
            self._join(peer, payload)

    def _join(self, peer: _Peer, payload: bytes) -> None:
        """A message is complete with its last part."""
        mark = payload[:1]
        if mark == _SEVERAL:
            for message in self._decode_several(memoryview(payload)[1:]):
                self._hand_over(peer, message)
            return
        if mark == _PART:
            peer.parts_bytes += len(payload)
            if peer.parts_bytes > _MESSAGE_BYTES_MAX:
                peer.parts = []  # what follows makes no sense, and is dropped when it is decoded
                raise ValueError("a message without end")
            peer.parts.append(payload[1:])
            return
        message = payload[1:]
        if peer.parts:
            message = b"".join([*peer.parts, message])
            peer.parts, peer.parts_bytes = [], 0
        self._hand_over(peer, message)

    def _hand_over(self, peer: _Peer, message: bytes) -> None:
        try:
            self._on_message(peer.peer_id, message)
        except msgspec.MsgspecError as error:
            self.dropped += 1
            _logger.warning("a message of %s cannot be read: %s", peer.peer_id.hex()[:12], error)
        except Exception:
            # It can be read and makes no sense, or it has met a bug of ours: all others go on.
            self.dropped += 1
            _logger.exception("a message of %s cannot be taken", peer.peer_id.hex()[:12])

    # ---- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call `tick` at the latest; None: no need."""
        earliest: float | None = None
        for peer_id in list(self._timed):
            peer = self._peers.get(peer_id)
            deadline = peer.link.next_deadline() if peer is not None else None
            if peer is not None and peer.ack is not None:
                due = peer.ack_due_s
                deadline = due if deadline is None else min(deadline, due)
            if deadline is None:
                del self._timed[peer_id]
            elif earliest is None or deadline < earliest:
                earliest = deadline
        return earliest

    def tick(self, now: float) -> None:
        """Send again what is overdue."""
        for peer_id in list(self._timed):
            peer = self._peers.get(peer_id)
            if peer is None:
                continue
            if peer.ack is not None and peer.ack_due_s <= now:
                self._carry(peer, [peer.ack])
            self._carry(peer, peer.link.on_tick(now))

    def heard_s(self, peer_id: bytes) -> float:
        """When a peer said something last, on the caller's clock."""
        peer = self._peers.get(peer_id)
        return float("-inf") if peer is None else peer.heard_s

    def waiting(self, peer_id: bytes) -> int:
        """Messages for a peer that it has not acknowledged."""
        peer = self._peers.get(peer_id)
        return 0 if peer is None else peer.link.waiting + len(peer.outbox)


def _whole(payloads: list[bytes]) -> list[bytes]:
    """Messages of their parts; one that misses its first is left out."""
    found: list[bytes] = []
    parts: list[bytes] = []
    for payload in payloads:
        if payload[:1] == _SEVERAL:
            found.extend(msgspec.msgpack.decode(memoryview(payload)[1:], type=list[bytes]))
            continue
        parts.append(payload[1:])
        if payload[:1] == _WHOLE:
            found.append(b"".join(parts))
            parts = []
    return found


def _ignore(*_: Any) -> None:
    """Nobody wants to know."""


def _refuse_nobody(_: bytes) -> str:
    """Whoever comes may go on."""
    return ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises
    ------
    ValueError
        It is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"{address!r} is no address: write HOST:PORT, as `poolray start --head` prints it"
        )
    return host.strip("[]"), int(port)
