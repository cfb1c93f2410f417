"""While too much waits for a peer nothing new is taken in; no peer is waited for without end."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from poolray.cluster.pressure import Pressure


class Node:
    """The switch and the reactor, as far as pressure sees them."""

    def __init__(self) -> None:
        self.crowded: dict[bytes, float] = {}
        self.given_up: list[bytes] = []
        self.paused = 0
        self.pressure = Pressure(self, self, list)

    def give_up(self, peer_id: bytes) -> None:
        self.given_up.append(peer_id)
        del self.crowded[peer_id]

    def pause(self, channels: Iterable[socket.socket]) -> None:
        self.paused += 1

    def resume(self) -> None:
        self.paused = 0


def test_sources_are_paused_while_a_peer_is_crowded() -> None:
    node = Node()
    node.pressure.look(1.0)
    assert not node.paused
    node.crowded[b"peer"] = 2.0
    node.pressure.look(2.0)
    assert node.pressure.is_on
    assert node.paused
    node.crowded[b"other"] = 3.0
    del node.crowded[b"peer"]
    node.pressure.look(3.0)
    assert node.paused
    node.crowded.clear()
    node.pressure.look(4.0)
    assert not node.pressure.is_on
    assert not node.paused
    assert not node.given_up


def test_a_peer_that_acknowledges_nothing_for_long_is_given_up() -> None:
    node = Node()
    node.crowded[b"peer"] = 0.0
    for now in (1.0, 59.0):
        node.pressure.look(now)
    node.crowded[b"peer"] = 59.0  # a sign of life
    node.pressure.look(100.0)
    assert not node.given_up
    node.pressure.look(120.0)
    assert node.given_up == [b"peer"]
    node.pressure.look(121.0)
    assert not node.paused
