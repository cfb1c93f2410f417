"""All links of one process to processes on other machines.

    send(peer, bytes) ──▶ PeerLink ──frames──▶ DEALER, or our ROUTER ──▶ ~~~ TCP, CURVE ~~~
    on_message(peer, bytes) ◀── PeerLink ◀── frames ◀── ROUTER, DEALERs ◀──┘

What: sockets, one reliable link per peer, versions, questions and answers.
Who calls: the head's and the nodes' daemons, remote drivers, one thread at a time.
May touch: ZeroMQ sockets; time comes in as an argument.
Invariants: whatever a peer sends, nothing is raised: what makes no sense is counted and dropped; a
peer of another version is told so in words; no call blocks.
"""

from __future__ import annotations

import logging
import struct
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

#: The first part of every message: who made this, the protocol's version, what follows.
_HEADER = struct.Struct(">7sHB")
_MAGIC = b"poolray"
HEADERS = {
    kind: _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind) for kind in FrameKind.__members__.values()
}
#: A message that is larger than this travels in parts.
PART_BYTES = (4 << 20) + (64 << 10)  # a chunk of an object with what is around it is one part
#: What a socket takes at the most; a peer that sends more is cut off by ZeroMQ.
_SOCKET_BYTES_MAX = PART_BYTES + (1 << 20)
#: What the parts of a message may add up to.
_MESSAGE_BYTES_MAX = 2 << 30
_PEER_ID_BYTES_MAX = 64
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
_WHOLE, _PART = b"\0", b"\1"


@final
class _Peer:
    """Another process, as far as we speak with it."""

    __slots__ = (
        "ack",
        "ack_count",
        "ack_due_s",
        "dealer",
        "heard_s",
        "link",
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
        #: Parts of a message that is not complete.
        self.parts: list[bytes] = []
        self.parts_bytes = 0
        #: An acknowledgement that waits for company, for how many messages, until when.
        self.ack: LinkFrame | None = None
        self.ack_count = 0
        self.ack_due_s = 0.0
        #: When it said something last.
        self.heard_s = float("-inf")


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
    """

    def __init__(
        self,
        *,
        own_id: bytes,
        session: int,
        credentials: Credentials | None,
        resend_after_s: float,
        on_message: Callable[[bytes, bytes], None],
    ) -> None:
        self._own_id = own_id
        self._session = session
        self._credentials = credentials
        self._resend_after_s = resend_after_s
        self._on_message = on_message
        #: Called with the id of a peer that was started again, and with the messages under way to
        #: it: whether these arrived nobody can tell.
        self.on_restarted: Callable[[bytes, list[bytes]], None] = _ignore
        #: Called with the id of a peer that will not speak with us, and why.
        self.on_refused: Callable[[bytes, str], None] = _ignore
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
        #: Messages that made no sense, since the start.
        self.dropped = 0
        self._decode_frame = msgspec.msgpack.Decoder(LinkFrame).decode
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
        self.on_socket(int(router.fd))
        if self._doorman is not None:
            self.on_socket(int(self._doorman.socket.fd))
        endpoint = router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        socket.linger = 0
        socket.maxmsgsize = _SOCKET_BYTES_MAX
        socket.sndhwm = socket.rcvhwm = _HIGH_WATER
        socket.handshake_ivl = HANDSHAKE_MS
        socket.reconnect_ivl = 50
        socket.reconnect_ivl_max = 1_000
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
        self.on_socket(int(dealer.fd))

    def is_reachable(self, peer_id: bytes) -> bool:
        """Whether there is a way to a peer, as far as we know."""
        peer = self._peers.get(peer_id)
        return peer is not None and (peer.dealer is not None or peer.route is not None)

    def is_given_up(self, peer_id: bytes) -> bool:
        """Whether so much waited for a peer that it counts as out of reach."""
        peer = self._peers.get(peer_id)
        return peer is not None and peer.link.state is LinkState.BROKEN

    def forget(self, peer_id: bytes) -> None:
        """A peer is gone for good: drop what waits for it."""
        peer = self._peers.pop(peer_id, None)
        self._timed.pop(peer_id, None)
        if peer is not None and peer.dealer is not None:
            del self._dealers[peer.dealer]
            self.on_socket_closed(int(peer.dealer.fd))
            peer.dealer.close()

    def descriptors(self) -> list[int]:
        """What to poll; `service` is due when one is readable, and after each `send`.

        They tell of changes, not of states: what has come is to be taken until there is no more.
        """
        found = [socket.fd for socket in self._dealers]
        if self._router is not None:
            found.append(self._router.fd)
        if self._doorman is not None:
            found.append(self._doorman.socket.fd)
        return [int(descriptor) for descriptor in found]

    def close(self, linger_s: float = 0.0) -> None:
        """Let go of all sockets; what is under way may take so long."""
        for socket in self._dealers:
            socket.close(int(linger_s * 1000))
        self._dealers.clear()
        self._peers.clear()
        self._timed.clear()
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
            peer = self._peers[peer_id] = _Peer(
                peer_id, PeerLink(self._session, self._resend_after_s)
            )
        return peer

    def send(self, peer_id: bytes, payload: bytes, now: float) -> None:
        """Send a message, reliably and in order while both live."""
        peer = self._peer(peer_id)
        if peer is None:
            return
        link = peer.link
        if len(payload) <= PART_BYTES:
            self._carry(peer, link.send(_WHOLE + payload, now))
        else:
            view = memoryview(payload)
            for start in range(0, len(payload), PART_BYTES):
                end = start + PART_BYTES
                mark = _PART if end < len(payload) else _WHOLE
                self._carry(peer, link.send(mark + view[start:end], now))
        self._timed[peer_id] = None

    def _carry(self, peer: _Peer, frames: list[LinkFrame]) -> None:
        for frame in frames:
            peer.ack, peer.ack_count = None, 0  # it brings along what has come until now
            self._post(peer, FrameKind.LINK, self._encode(frame))

    def _post(self, peer: _Peer, kind: FrameKind, body: bytes) -> None:
        """Put a frame on the way, if there is one; else it is lost, and sent again."""
        parts = [HEADERS[kind], self._own_id, body]
        try:
            if peer.dealer is not None:
                peer.dealer.send_multipart(parts, zmq.DONTWAIT)
            elif peer.route is not None and self._router is not None:
                self._router.send_multipart([peer.route, *parts], zmq.DONTWAIT)
        except zmq.ZMQError:
            pass  # full, or cut off just now

    # ---- receiving -------------------------------------------------------------------------------

    def service(self, now: float) -> bool:
        """Take what has come, as far as a turn goes; True: there may be more."""
        more = False
        if self._doorman is not None:
            while self._doorman.answer():
                pass
        if self._router is not None:
            more = self._drain(self._router, None, now)
        for dealer, peer_id in list(self._dealers.items()):
            more = self._drain(dealer, peer_id, now) or more
        return more

    def _drain(self, socket: zmq.Socket[bytes], peer_id: bytes | None, now: float) -> bool:
        for _ in range(_TURN):
            try:
                parts = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.ZMQError:
                return False  # nothing more; or the socket was closed by what came last
            route = parts.pop(0) if peer_id is None else None
            try:
                self._take(socket, parts, peer_id, route, now)
            except (msgspec.MsgspecError, ValueError, struct.error) as error:
                self.dropped += 1
                _logger.debug("a message makes no sense and is dropped: %s", error)
        return True

    def _take(
        self,
        socket: zmq.Socket[bytes],
        parts: list[bytes],
        peer_id: bytes | None,
        route: bytes | None,
        now: float,
    ) -> None:
        header, sender, body = parts
        magic, version, number = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError("no message of poolray")
        if len(sender) > _PEER_ID_BYTES_MAX or (peer_id is not None and sender != peer_id):
            raise ValueError("a message of somebody else")
        kind = FrameKind(number) if number in HEADERS else None
        if kind is FrameKind.REFUSAL:
            self.on_refused(sender, body.decode("utf-8", "replace")[:4096])
        elif version != PROTOCOL_VERSION:
            self._refuse(socket, route, version)
        elif kind is FrameKind.QUESTION:
            self._on_question(socket, route, body)
        elif kind is FrameKind.LINK:
            self._on_frame(sender, route, self._decode_frame(body), now)
        else:
            raise ValueError(f"a message of kind {number}")

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
        parts = [HEADERS[kind], self._own_id, body]
        try:
            socket.send_multipart([route, *parts] if route is not None else parts, zmq.DONTWAIT)
        except zmq.ZMQError:
            pass  # it will ask again

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
        arrival = peer.link.receive(frame, now)
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
        if payload[:1] == _PART:
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
        try:
            self._on_message(peer.peer_id, message)
        except msgspec.MsgspecError as error:
            self.dropped += 1
            _logger.warning("a message of %s cannot be read: %s", peer.peer_id.hex()[:12], error)

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
        return 0 if peer is None else peer.link.waiting


def _whole(payloads: list[bytes]) -> list[bytes]:
    """Messages of their parts; one that misses its first is left out."""
    found: list[bytes] = []
    parts: list[bytes] = []
    for payload in payloads:
        parts.append(payload[1:])
        if payload[:1] == _WHOLE:
            found.append(b"".join(parts))
            parts = []
    return found


def _ignore(*_: Any) -> None:
    """Nobody wants to know."""


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
