"""A network that loses, delays and repeats frames, and parts that cannot reach each other."""

from __future__ import annotations

import msgspec

from poolray.ids import NodeId
from poolray.node.peer_link import PeerLink
from poolray.protocol.link import LinkFrame
from poolray.protocol.node import HeadMessage, HeadRequest, PeerMessage
from tests.simulation.world import World

HEAD = NodeId(b"head")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PeerMessage | HeadRequest | HeadMessage).decode


class Endpoint:
    """Something with an address: a node or the head."""

    def on_network(self, sender: NodeId, message: object) -> None:
        """A message has arrived, once and in order."""
        raise NotImplementedError

    def on_restarted(self, sender: NodeId) -> None:
        """Who sends is another process than before: what was on its way is lost."""
        raise AssertionError(f"{sender!r} was never restarted")


class Network:
    """Carries messages between endpoints, over a `PeerLink` per pair and direction."""

    def __init__(self, world: World, loss: float, delay_s: float, resend_after_s: float) -> None:
        self._world = world
        self._loss = loss
        self._delay_s = delay_s
        self._resend_after_s = resend_after_s
        self._endpoints: dict[NodeId, Endpoint] = {}
        self._links: dict[tuple[NodeId, NodeId], PeerLink] = {}
        #: Lives of each endpoint so far, 1 where nothing is said.
        self._sessions: dict[NodeId, int] = {}
        self._ticking: dict[tuple[NodeId, NodeId], float] = {}
        #: Pairs that cannot hear each other.
        self._cut: dict[frozenset[NodeId], None] = {}

    def join(self, name: NodeId, endpoint: Endpoint) -> None:
        """An endpoint can be reached."""
        self._endpoints[name] = endpoint

    def leave(self, name: NodeId) -> None:
        """An endpoint is gone; what it had sent may still arrive."""
        self._endpoints.pop(name, None)
        for pair in [pair for pair in self._links if pair[0] == name]:
            del self._links[pair]

    def restart(self, name: NodeId, endpoint: Endpoint) -> None:
        """An endpoint is there again, as another process."""
        self._sessions[name] = self._sessions.get(name, 1) + 1
        self.join(name, endpoint)

    def cut(self, one: NodeId, other: NodeId) -> None:
        """From now on nothing passes between two endpoints."""
        self._cut[frozenset((one, other))] = None

    def heal(self) -> None:
        """All cuts are mended."""
        self._cut.clear()

    def endpoint(self, name: NodeId) -> Endpoint | None:
        """Who is reached by another way than a link, if it is there."""
        return self._endpoints.get(name)

    def is_cut(self, one: NodeId, other: NodeId) -> bool:
        """Whether nothing passes between two endpoints."""
        return frozenset((one, other)) in self._cut

    def loses(self) -> bool:
        """Whether the next thing that goes by another way is lost."""
        return self._world.chance(self._loss)

    def send(self, sender: NodeId, receiver: NodeId, message: object) -> None:
        """Send a message, as bytes."""
        frames = self._link(sender, receiver).send(_encode(message), self._world.now)
        self._carry(sender, receiver, frames)

    def _link(self, owner: NodeId, peer: NodeId) -> PeerLink:
        link = self._links.get((owner, peer))
        if link is None:
            session = self._sessions.get(owner, 1)
            link = self._links[owner, peer] = PeerLink(session, self._resend_after_s)
        return link

    def _carry(self, sender: NodeId, receiver: NodeId, frames: list[LinkFrame]) -> None:
        world = self._world
        for frame in frames:
            if world.chance(self._loss):
                continue
            for _ in range(2 if world.chance(self._loss / 2) else 1):
                delay_s = self._delay_s * (0.5 + world.random.random())
                world.after(delay_s, lambda frame=frame: self._arrive(sender, receiver, frame))
        self._watch(sender, receiver)

    def _arrive(self, sender: NodeId, receiver: NodeId, frame: LinkFrame) -> None:
        endpoint = self._endpoints.get(receiver)
        if endpoint is None or frozenset((sender, receiver)) in self._cut:
            return
        link = self._link(receiver, sender)
        arrival = link.receive(frame, self._world.now)
        link.check_invariants()
        if arrival.restarted:
            endpoint.on_restarted(sender)
        self._carry(receiver, sender, arrival.frames)
        for payload in arrival.payloads:
            if receiver in self._endpoints:
                endpoint.on_network(sender, _decode(payload))

    def _watch(self, owner: NodeId, peer: NodeId) -> None:
        """See to it that a link's timer is heard."""
        link = self._links.get((owner, peer))
        deadline = link.next_deadline() if link is not None else None
        if deadline is None:
            return
        planned = self._ticking.get((owner, peer))
        if planned is None or deadline < planned or planned <= self._world.now:
            self._ticking[owner, peer] = deadline
            self._world.at(deadline, lambda: self._tick(owner, peer))

    def _tick(self, owner: NodeId, peer: NodeId) -> None:
        link = self._links.get((owner, peer))
        self._ticking.pop((owner, peer), None)
        if link is not None and owner in self._endpoints:
            frames = link.on_tick(self._world.now)
            link.check_invariants()
            self._carry(owner, peer, frames)
