"""The ends of direct connections: sending never waits for who does not read."""

from __future__ import annotations

import gc
import socket
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from poolray.direct.addresses import come_to
from poolray.direct.ends import End
from poolray.direct.frames import ConnectionLost, Frames
from poolray.ids import TaskId
from poolray.local import direct_server
from poolray.local.direct_server import DirectServer


def test_frames_that_nobody_reads_are_kept_and_arrive_later_whole_and_in_order() -> None:
    near, far = socket.socketpair()
    with near, far:
        sender, receiver = Frames(near), Frames(far)
        bodies = [bytes([number]) * 100_000 for number in range(20)]
        for body in bodies:
            sender.send(body)
        assert sender.has_unsent
        found: list[bytes] = []
        while len(found) < len(bodies):
            assert receiver.receive()
            found += receiver.take()
            sender.push()
        assert found == bodies
        assert not sender.has_unsent


class _Value:
    """A result."""


def test_results_that_a_gone_caller_has_not_fetched_are_let_go_of_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, other = socket.socketpair()
    with tasks, other:
        worker: Any = SimpleNamespace(
            tasks=tasks,
            config=SimpleNamespace(spin_s=0.0),
            setup=SimpleNamespace(machine="here", direct_host="", direct_ports=None),
        )
        server = DirectServer(worker)
        answer = server.listen("here")
        assert answer is not None
        with come_to(answer[0]):
            (door,) = server._doors
            server._let_in(door)
        ((descriptor, caller),) = server._callers.items()
        fetched, left = _Value(), _Value()
        dead = weakref.ref(left)
        server._at_hand = caller
        server.hold(TaskId(b"fetched"), fetched)
        server.hold(TaskId(b"left"), left)
        server._at_hand = None
        del left
        server._forget(descriptor, caller)
        # Only the connection may have been cut: what was asked for before comes all the same.
        assert server.give_held(TaskId(b"fetched")) is fetched
        now = direct_server.time.monotonic()
        monkeypatch.setattr(direct_server.time, "monotonic", lambda: now + 61.0)
        server._close_late()
        gc.collect()
        assert dead() is None
        assert not server._leavers


def test_a_caller_that_was_stopped_in_the_middle_of_a_packet_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_server, "_LOOK_AGAIN_MS", 1.0)
    tasks, other = socket.socketpair()
    with tasks, other:
        worker: Any = SimpleNamespace(
            tasks=tasks,
            config=SimpleNamespace(spin_s=0.0),
            setup=SimpleNamespace(machine="here", direct_host="", direct_ports=None),
            send_results=lambda: None,
        )
        server = DirectServer(worker)
        answer = server.listen("here")
        assert answer is not None
        with come_to(answer[0]) as channel:
            end = End(channel, answer[0], listens=False)
            (door,) = server._doors
            server._let_in(door)
            (caller,) = server._callers.values()
            caller.read()
            end.read()
            caller.read()
            assert caller.is_open
            channel.send((1_000).to_bytes(4, "little") + b"half of it")
            server.run_until(caller.connection_id, 1)
            assert caller.is_gone
            assert not server._callers
            with pytest.raises(ConnectionLost):
                end.read()
