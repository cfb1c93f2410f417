"""Doors for direct calls: who gets in, and by which ports."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from poolray.direct.addresses import Offer, come_to, make_door, settle_in
from poolray.direct.ends import End
from poolray.direct.frames import FRAME_BYTES_MAX, ConnectionLost
from poolray.direct.seal import HandshakeError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names without files are Linux's")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def connected(is_near: bool) -> tuple[socket.socket, socket.socket, Offer]:
    made = make_door(is_near, "127.0.0.1")
    assert made is not None
    door, offer = made
    with door:
        caller = come_to(offer)
        listener, _ = door.accept()
    settle_in(caller)
    settle_in(listener)
    return caller, listener, offer


@pytest.fixture(params=[True, False], ids=["near", "far"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Both ends of an open connection."""
    caller, listener, offer = connected(request.param)
    with caller, listener:
        ours, theirs = End(caller, offer, listens=False), End(listener, offer, listens=True)
        settle(theirs)
        settle(ours)
        settle(theirs)
        assert ours.is_open
        assert theirs.is_open
        yield ours, theirs


def settle(end: End) -> list[bytes]:
    """Wait for something, and read it."""
    end.channel.settimeout(10)
    end.channel.recv(1, socket.MSG_PEEK)
    return end.read()


def test_doors_open_at_the_ports_that_are_allowed_and_free() -> None:
    ports = [free_port(), free_port()]
    first, second = make_door(False, "127.0.0.1", ports), make_door(False, "127.0.0.1", ports)
    assert first is not None
    assert second is not None
    with first[0], second[0]:
        assert sorted([first[1][2], second[1][2]]) == sorted(ports)
        assert make_door(False, "127.0.0.1", ports) is None


def test_a_node_without_an_address_has_no_doors_for_others() -> None:
    assert make_door(False, "") is None


def test_frames_arrive_whole_and_are_sealed_over_the_network(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    assert ours.is_sealed == theirs.is_sealed == ours.is_far
    for body in (b"", b"x", bytes(100_000)):
        ours.send(body)
        theirs.send(body[::-1])
    found: list[bytes] = []
    while len(found) < 3:
        found += settle(theirs)
    assert found == [b"", b"x", bytes(100_000)]


@pytest.mark.parametrize("is_near", [True, False])
def test_who_does_not_know_the_key_gets_no_further(is_near: bool) -> None:
    caller, listener, offer = connected(is_near)
    forged: Offer = (*offer[:4], bytes(32))
    with caller, listener:
        ours, theirs = End(caller, forged, listens=False), End(listener, offer, listens=True)
        assert settle(theirs) == []
        with pytest.raises(HandshakeError):
            settle(ours)
        assert not theirs.is_open


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n" * 8, bytes(200)])
def test_a_stranger_is_not_listened_to(said: bytes) -> None:
    caller, listener, offer = connected(False)
    with caller, listener:
        theirs = End(listener, offer, listens=True)
        caller.sendall(said)
        with pytest.raises(HandshakeError):
            settle(theirs)


def test_a_changed_or_endless_frame_ends_the_connection(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    bad = (FRAME_BYTES_MAX + 1).to_bytes(4, "little")
    if ours.is_sealed:
        bad = (32).to_bytes(4, "little") + bytes(32)
    ours.channel.sendall(bad)
    with pytest.raises(ConnectionLost):
        settle(theirs)


def test_the_end_of_the_other_side_is_noticed(ends: tuple[End, End]) -> None:
    ours, theirs = ends
    ours.channel.close()
    with pytest.raises(ConnectionLost):
        theirs.read()
