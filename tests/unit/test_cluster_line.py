"""A driver that signs on at a daemon on its machine and is not taken in."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec
import pytest

from poolray.cluster import places
from poolray.cluster.line import sign_on
from poolray.cluster.stream import frame
from poolray.exceptions import ClusterConnectionError
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import Farewell, Hello

HELLO = Hello(protocol_version=PROTOCOL_VERSION, pid=1, namespace="")
Answer = Callable[[socket.socket], object]


def with_descriptor(body: bytes) -> Answer:
    """A daemon that hands over a descriptor with what it says."""

    def answer(daemon: socket.socket) -> None:
        descriptor = os.memfd_create("arena")
        socket.send_fds(daemon, [frame(body)], [descriptor])
        os.close(descriptor)

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (with_descriptor(b"\xc1"), "does not take this driver in: "),
        (with_descriptor(msgspec.msgpack.encode(Farewell(reason="full"))), "^.* refuses: full.$"),
        (lambda daemon: daemon.sendall(frame(b"")), "does not take this driver in"),
        (lambda daemon: daemon.close(), "does not take this driver in"),
    ],
)
def test_who_is_not_taken_in_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, reason: str
) -> None:
    own, daemon = socket.socketpair()
    monkeypatch.setattr(places, "connect", lambda *_: own)
    with daemon:
        before = len(os.listdir("/proc/self/fd"))
        answer(daemon)
        with pytest.raises(ClusterConnectionError, match=reason) as caught:
            sign_on("name", HELLO)
        assert str(caught.value).count("The node's daemon") == 1
        assert own.fileno() == -1
        is_closed = daemon.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) == before - 1 - is_closed
