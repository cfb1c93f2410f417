"""Bytes of values between nodes, past the control links: a TCP connection per pair and direction.

    ExpectChunk ──▶ Bulk ── OpenBulk(id, key) over the control link ──▶ Bulk ◀── SendChunk
                     │  ◀──────────────────────────── BulkPort(port) ── │
                     └─ Receiving ◀═══ TCP: proofs, then bytes ═══ Sending
    ChunkArrived, ChunksLost ◀── settle()

What: keeps the connections, and says which chunk goes by which; everything that is decided on the
way is decided by the Node machine.
Who calls: the node's daemon, on its one thread.
May touch: sockets and threads, through its loops; the clock.
Invariants: a chunk that is expected comes, or is reported lost, or its source is dead; a connection
that ends is told of over the control link by whoever sees it first, before anything is asked for
again, so that nobody waits for what was dropped with it; where no connection can be made, chunks
come over the control link, and a warning says so.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import final

from poolray.cluster.auth import is_local
from poolray.cluster.bulk_loop import (
    Arrived,
    Door,
    Expected,
    Loop,
    News,
    Opened,
    Receiving,
    Sending,
)
from poolray.cluster.transfer import ChunkStore
from poolray.direct.seal import ID_BYTES, KEY_BYTES, Handshake
from poolray.ids import NodeId
from poolray.node.effects import ExpectChunk, ForgetChunks, SendChunk
from poolray.objects.shared_memory import Arena
from poolray.protocol.cluster import BulkMessage, BulkPort, CloseBulk, OpenBulk
from poolray.protocol.node import ChunkArrived, ChunkMissing, ChunksLost
from poolray.protocol.values import InArena

_logger = logging.getLogger(__name__)

#: A value must be so large for a connection to be made for it.
_WORTH_BYTES = 1 << 20
#: A peer that could not be reached is tried again after this long.
RETRY_S = 30.0
#: The answer to `OpenBulk`, a connection and its handshake may take so long together.
OPENING_S = 5.0


@final
class _Inbound:
    """A connection that we have asked for, to receive by."""

    __slots__ = ("connection_id", "deadline_s", "is_open", "key", "receiving")

    def __init__(self, connection_id: bytes, key: bytes, deadline_s: float) -> None:
        self.connection_id = connection_id
        self.key = key
        #: It is open by then, or given up.
        self.deadline_s = deadline_s
        #: Once it is known where to connect.
        self.receiving: Receiving | None = None
        self.is_open = False


@final
class _Outbound:
    """A connection that a peer has asked for, to send by."""

    __slots__ = ("connection_id", "deadline_s", "is_open", "waiting")

    def __init__(self, connection_id: bytes, deadline_s: float) -> None:
        self.connection_id = connection_id
        self.deadline_s = deadline_s
        self.is_open = False
        #: What is to be sent once it is open.
        self.waiting: list[SendChunk] = []


@final
class _Peer:
    """A node that we have sent something to, or have asked for something."""

    __slots__ = ("expected", "given_up", "inbound", "outbound", "retry_s")

    def __init__(self) -> None:
        #: The last connection to receive by that we took for never opened.
        self.given_up = b""
        self.inbound: _Inbound | None = None
        self.outbound: _Outbound | None = None
        #: number -> where it belongs; also known to the connection that it may come by.
        self.expected: dict[int, Expected] = {}
        #: Not before this is another connection tried.
        self.retry_s = float("-inf")


@final
class Bulk:
    """All connections for bytes of values of one node.

    Parameters
    ----------
    host : str
        The address to listen at, the node's own.
    port : int
        0: any.
    machine : str
        Tells the machine, or container, from all others.
    threads : int
        For each direction, at the most.
    host_of : callable
        The address of a node; empty: it is not known.
    tell : callable
        Sends a message to a peer over the control link, in order.
    wake : callable
        Makes the daemon call `settle` soon; called on any thread.

    Raises
    ------
    OSError
        The port is taken.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        machine: str,
        arena: Arena,
        chunks: ChunkStore,
        threads: int,
        host_of: Callable[[NodeId], str],
        tell: Callable[[NodeId, BulkMessage], None],
        wake: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._arena = arena
        self._chunks = chunks
        self._threads = threads
        self._host_of = host_of
        self._tell = tell
        self._wake = wake
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = listener.getsockname()[1]
        self._door = Door(listener)
        #: Loops that receive, and loops that send; the first of these has the door. They start
        #: with the first connection.
        self._receivers: list[Loop] = []
        self._senders: list[Loop] = []
        self._turn = 0
        self._peers: dict[NodeId, _Peer] = {}
        #: connection -> whose, and the loop that has it.
        self._owners: dict[bytes, tuple[NodeId, Loop]] = {}
        #: What loops have to tell; they append.
        self._news: deque[News] = deque()
        #: Connections of both kinds that are not open yet -> whose.
        self._opening: dict[bytes, NodeId] = {}
        #: Peers whose chunks will not come as they were expected to.
        self._lost: dict[NodeId, None] = {}

    # ---- what the machine wants ------------------------------------------------------------------

    def expect(self, effect: ExpectChunk) -> None:
        """A chunk is about to be asked for."""
        peer = self._peer(effect.node_id)
        expected = Expected(effect.offset, effect.file_number, effect.size_bytes)
        peer.expected[effect.number] = expected
        if peer.inbound is None and effect.size_bytes >= _WORTH_BYTES:
            self._open(effect.node_id, peer)
        if peer.inbound is not None and peer.inbound.receiving is not None:
            peer.inbound.receiving.expected[effect.number] = expected

    def forget(self, effect: ForgetChunks) -> None:
        """Chunks have come by another way, or are not wanted: nothing is written for them."""
        peer = self._peers.get(effect.node_id)
        if peer is None:
            return
        for number in effect.numbers:
            expected = peer.expected.pop(number, None)
            if expected is not None:
                expected.revoke()
                if peer.inbound is not None and peer.inbound.receiving is not None:
                    peer.inbound.receiving.expected.pop(number, None)

    def send(self, effect: SendChunk) -> bool:
        """Send a chunk; False: there is no connection for it, use the control link."""
        peer = self._peers.get(effect.node_id)
        outbound = None if peer is None else peer.outbound
        if outbound is None or effect.by_message or not _is_readable(effect):
            return False
        if outbound.is_open:
            self._owners[outbound.connection_id][1].send(outbound.connection_id, effect)
        else:
            outbound.waiting.append(effect)
        return True

    def _peer(self, node_id: NodeId) -> _Peer:
        return self._peers.setdefault(node_id, _Peer())

    # ---- connections -----------------------------------------------------------------------------

    def _open(self, node_id: NodeId, peer: _Peer) -> None:
        """Ask a peer to let us in."""
        now = time.monotonic()
        if now < peer.retry_s:
            return
        connection_id, key = os.urandom(ID_BYTES), os.urandom(KEY_BYTES)
        peer.inbound = _Inbound(connection_id, key, now + OPENING_S)
        self._opening[connection_id] = node_id
        self._tell(node_id, OpenBulk(connection_id=connection_id, key=key, machine=self._machine))

    def on_message(self, node_id: NodeId, message: BulkMessage) -> list[SendChunk]:
        """A peer speaks of a connection; gives chunks that go over the control link instead."""
        if isinstance(message, OpenBulk):
            return self._invite(node_id, message)
        if isinstance(message, BulkPort):
            self._connect(node_id, message)
            return []
        connection_id = message.connection_id
        if message.is_dropped:
            self._on_dropped(node_id, connection_id)
        owner = self._owners.get(connection_id)
        if owner is None or owner[0] != node_id:
            return []
        if self._sends_by(node_id, connection_id):
            # (It may have given up what it does not know to be open.)
            self._tell(node_id, CloseBulk(connection_id=connection_id, is_dropped=True))
        owner[1].close(connection_id)
        return self._on_end(node_id, connection_id, "the other end has ended it")

    def _on_dropped(self, node_id: NodeId, connection_id: bytes) -> None:
        """A source had begun to send by a connection that has ended. Our end may not know that it
        was ever open: it was given up while the last proof was on its way, or what its thread has
        to tell of it has not been heard yet.
        """
        peer = self._peers.get(node_id)
        if peer is None:
            return
        if connection_id == peer.given_up:
            self._lost[node_id] = None
        elif peer.inbound is not None and peer.inbound.connection_id == connection_id:
            peer.inbound.is_open = True

    def _sends_by(self, node_id: NodeId, connection_id: bytes) -> bool:
        """Whether chunks for a peer were given to a connection."""
        outbound = self._peers[node_id].outbound
        return outbound is not None and outbound.connection_id == connection_id and outbound.is_open

    def _invite(self, node_id: NodeId, message: OpenBulk) -> list[SendChunk]:
        """A peer will connect: get ready for it."""
        connection_id, key = message.connection_id, message.key
        if len(connection_id) != ID_BYTES or len(key) != KEY_BYTES or connection_id in self._owners:
            return []
        peer = self._peer(node_id)
        # (If there is one it has made another one, and knows best.)
        instead = [] if peer.outbound is None else self._forget_outbound(peer.outbound)
        peer.outbound = None
        try:
            loop = self._sending_loop()
        except (OSError, RuntimeError) as error:
            _logger.error("no connection for values can be served: %s", error)
            self._tell(node_id, CloseBulk(connection_id=connection_id))
            return instead
        peer.outbound = _Outbound(connection_id, time.monotonic() + OPENING_S)
        self._opening[connection_id] = node_id
        self._owners[connection_id] = node_id, loop

        def welcome(channel: socket.socket, hello: bytes) -> Sending:
            own, other = channel.getsockname()[0], channel.getpeername()[0]
            local = is_local(self._machine, message.machine, own, other)
            handshake = Handshake(connection_id, key, is_local=local)
            return Sending(connection_id, channel, handshake, hello)

        self._door.invitations[connection_id] = loop, welcome
        self._tell(node_id, BulkPort(connection_id=connection_id, port=self.port))
        return instead

    def _connect(self, node_id: NodeId, message: BulkPort) -> None:
        """A peer has said where."""
        inbound = self._peer(node_id).inbound
        host = self._host_of(node_id)
        if (
            inbound is None
            or inbound.connection_id != message.connection_id
            or inbound.receiving is not None
            or not 0 < message.port < 65536
            or not host
        ):
            return
        connection_id, key, machine = inbound.connection_id, inbound.key, self._machine

        def shake() -> Handshake:
            # (That we connect to a loopback address is not enough: the other end compares machines
            # as well, and seals unless it finds the same.)
            own, other = receiving.channel.getsockname()[0], receiving.channel.getpeername()[0]
            local = is_local(machine, machine, own, other)
            return Handshake(connection_id, key, is_local=local)

        try:
            loop = self._loop(self._receivers, "poolray-receive")
            receiving = Receiving(connection_id, (host, message.port), shake)
        except (OSError, RuntimeError) as error:  # no descriptors are left, or no threads
            self._tell(node_id, CloseBulk(connection_id=connection_id))
            self._on_end(node_id, connection_id, str(error))
            return
        receiving.expected.update(self._peer(node_id).expected)
        inbound.receiving = receiving
        self._owners[connection_id] = node_id, loop
        loop.add(receiving)

    def _loop(self, loops: list[Loop], name: str) -> Loop:
        """The loop for a new connection: a new one, as long as there may be more."""
        if len(loops) < self._threads:
            loops.append(Loop(f"{name}-{len(loops)}", self._arena, self._chunks, self._report))
            return loops[-1]
        self._turn += 1
        return loops[self._turn % len(loops)]

    def _sending_loop(self) -> Loop:
        is_first = not self._senders
        loop = self._loop(self._senders, "poolray-send")
        if is_first:
            loop.add(self._door)  # nobody was to come until now
        return loop

    def _report(self, news: News) -> None:
        """Some loop's thread has something to tell."""
        self._news.append(news)
        self._wake()

    # ---- what has happened -----------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._news or self._lost)

    def settle(self) -> tuple[list[ChunkArrived | ChunkMissing | ChunksLost], list[SendChunk]]:
        """What the machine is to be told, and chunks that go over the control link instead."""
        told: list[ChunkArrived | ChunkMissing | ChunksLost] = []
        instead: list[SendChunk] = []
        while self._news:
            news = self._news.popleft()
            owner = self._owners.get(news.connection_id)
            if owner is None:
                continue  # it was given up
            if isinstance(news, Arrived):
                self._on_arrived(owner[0], news, told)
            elif isinstance(news, Opened):
                self._on_opened(owner[0], news.connection_id)
            else:
                node_id, connection_id = owner[0], news.connection_id
                is_dropped = self._sends_by(node_id, connection_id)
                message = CloseBulk(connection_id=connection_id, is_dropped=is_dropped)
                self._tell(node_id, message)
                instead += self._on_end(node_id, connection_id, news.reason)
        for node_id in self._lost:
            peer = self._peers.get(node_id)
            if peer is not None and peer.expected:
                told.append(ChunksLost(numbers=list(peer.expected)))
                self._revoke_all(peer)
        self._lost.clear()
        return told, instead

    def _on_arrived(
        self, node_id: NodeId, news: Arrived, told: list[ChunkArrived | ChunkMissing | ChunksLost]
    ) -> None:
        peer = self._peers[node_id]
        inbound = peer.inbound
        if inbound is None or inbound.receiving is None:
            return
        inbound.receiving.expected.pop(news.number, None)
        if peer.expected.pop(news.number, None) is not None:
            kind = ChunkMissing if news.is_missing else ChunkArrived
            told.append(kind(number=news.number))

    def _on_opened(self, node_id: NodeId, connection_id: bytes) -> None:
        self._opening.pop(connection_id, None)
        peer = self._peers[node_id]
        if peer.inbound is not None and peer.inbound.connection_id == connection_id:
            peer.inbound.is_open = True
        outbound = peer.outbound
        if outbound is not None and outbound.connection_id == connection_id:
            outbound.is_open = True
            for effect in outbound.waiting:
                self._owners[connection_id][1].send(connection_id, effect)
            outbound.waiting.clear()

    def _on_end(self, node_id: NodeId, connection_id: bytes, reason: str) -> list[SendChunk]:
        """A connection is no more, whoever has ended it; gives what it was to send, if it has never
        been open: else the other end asks again for what has not come.
        """
        peer = self._peers.get(node_id)
        if peer is None:
            return []
        self._opening.pop(connection_id, None)
        self._owners.pop(connection_id, None)
        outbound, inbound = peer.outbound, peer.inbound
        if outbound is not None and outbound.connection_id == connection_id:
            peer.outbound = None
            return self._forget_outbound(outbound)  # (nothing, if it was open)
        if inbound is not None and inbound.connection_id == connection_id:
            peer.inbound = None
            if inbound.is_open:
                _logger.info("node=%s values' connection ends: %s", _short(node_id), reason)
                self._lost[node_id] = None
            else:
                peer.given_up = connection_id
                peer.retry_s = time.monotonic() + RETRY_S
                self._warn(node_id, inbound, reason)
        return []

    def _forget_outbound(self, outbound: _Outbound) -> list[SendChunk]:
        """Nothing is sent by a connection any more; gives what waited for it to open."""
        connection_id = outbound.connection_id
        self._door.invitations.pop(connection_id, None)
        self._opening.pop(connection_id, None)
        owner = self._owners.pop(connection_id, None)
        if owner is not None:
            owner[1].close(connection_id)
        return outbound.waiting

    def _revoke_all(self, peer: _Peer) -> None:
        for expected in peer.expected.values():
            expected.revoke()
        peer.expected.clear()

    def _warn(self, node_id: NodeId, inbound: _Inbound, reason: str) -> None:
        where = "has not said where"
        if inbound.receiving is not None:
            host, port = inbound.receiving.address
            where = f"at {host}:{port} cannot be reached"
        _logger.warning(
            "node=%s its port for values %s (%s): what comes from there goes over the control "
            "link, which is several times slower. Let this machine reach that port; "
            "`poolray start --object-manager-port` sets it.",
            _short(node_id),
            where,
            reason,
        )

    # ---- time, and the end -----------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call `tick` at the latest; None: no need."""
        return min((self._deadline_of(i) for i in self._opening), default=None)

    def _deadline_of(self, connection_id: bytes) -> float:
        peer = self._peers[self._opening[connection_id]]
        for end in (peer.inbound, peer.outbound):
            if end is not None and end.connection_id == connection_id:
                return end.deadline_s
        return float("-inf")

    def tick(self, now: float) -> list[SendChunk]:
        """Give up what takes too long to open; gives chunks that go over the control link."""
        instead: list[SendChunk] = []
        for connection_id, node_id in list(self._opening.items()):
            if self._deadline_of(connection_id) <= now:
                self._tell(node_id, CloseBulk(connection_id=connection_id))
                owner = self._owners.get(connection_id)
                if owner is not None:
                    owner[1].close(connection_id)
                instead += self._on_end(node_id, connection_id, "it took too long")
        return instead

    def forget_peer(self, node_id: NodeId) -> None:
        """A peer is dead: nothing comes from there or goes there."""
        peer = self._peers.pop(node_id, None)
        if peer is None:
            return
        self._lost.pop(node_id, None)
        self._revoke_all(peer)
        if peer.outbound is not None:
            self._forget_outbound(peer.outbound)
        if peer.inbound is not None:
            self._opening.pop(peer.inbound.connection_id, None)
            owner = self._owners.pop(peer.inbound.connection_id, None)
            if owner is not None:
                owner[1].close(peer.inbound.connection_id)

    def close(self) -> None:
        """End all connections and threads; nothing is written to the arena any more."""
        for loop in (*self._receivers, *self._senders):
            loop.stop()
        self._door.channel.close()

    def abandon(self) -> None:
        """In a forked child: all this is the parent's, threads included, which are not here."""
        for loop in (*self._receivers, *self._senders):
            loop.abandon()
        self._door.channel.close()


def _is_readable(effect: SendChunk) -> bool:
    """Whether a descriptor can be had of it: what was spilled to a URL is read as a whole."""
    return isinstance(effect.place, InArena) or "://" not in effect.place.path


def _short(node_id: NodeId) -> str:
    return node_id.hex()[:12]
