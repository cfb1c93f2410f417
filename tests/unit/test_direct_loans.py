"""Workers on loan, both ends: who does not come, or does not go, is not waited for for ever."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from poolray.direct.addresses import Offer, come_to
from poolray.direct.connection import Connection
from poolray.direct.ends import End
from poolray.direct.loans import Door
from poolray.local import lending
from poolray.local.direct_server import Caller
from poolray.local.lending import Former, lend
from poolray.protocol.client import ObjectValues
from poolray.protocol.worker import RunTasks
from tests.unit.direct_bench import DirectBench

OVER = ObjectValues(request_id=0, values=[b""])


def test_who_does_not_say_who_it_is_is_let_go_of_with_the_loan() -> None:
    bench = DirectBench()
    bench.ask()
    _, (_, offers) = bench.own[-1]
    with come_to(offers[0]) as stranger:
        door = next(door for door in bench.watched if type(door) is Door)
        door.answer()
        assert [type(each) for each in bench.watched] == [Connection]
        bench.answers[0](OVER)
        assert not bench.watched
        assert not bench.direct._connections
        assert stranger.recv(1) == b""
    assert bench.kinds() == ["SubmitTasks"]  # the call that was to bring a worker


@pytest.fixture
def parts() -> Iterator[tuple[Any, Former, End, socket.socket]]:
    """A worker whose loan has ended, the way to its driver, the driver's end, the node's."""
    offer: Offer = ("pair", "", 0, os.urandom(32), os.urandom(32))
    tasks, node = socket.socketpair()
    near, far = socket.socketpair()
    with tasks, node, near, far:
        caller = Caller(near, offer, listens=False)
        end = End(far, offer, listens=True)
        end.read()
        caller.read()
        end.read()
        assert caller.is_open
        worker = SimpleNamespace(tasks=tasks, former=Former(caller))
        yield worker, worker.former, end, node


def test_a_worker_waits_for_its_driver_to_leave_while_its_node_wants_nothing(parts: Any) -> None:
    worker, former, end, node = parts
    node.send(b"a packet")
    former.wait(worker)
    assert worker.former is former
    worker.tasks.recv(100)
    end.send(
        msgspec.msgpack.encode(RunTasks(sequence=1, tasks=[]))
    )  # what the driver sent before it has heard of the end
    end.channel.close()
    former.wait(worker)
    assert worker.former is None
    assert former._caller.channel.fileno() == -1


def test_a_driver_that_does_not_leave_is_left_after_a_while(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, former, _, node = parts
    node.send(b"a packet")
    now = lending.time.monotonic()
    monkeypatch.setattr(lending.time, "monotonic", lambda: now + lending.CONNECT_S + 1)
    former.wait(worker)
    assert worker.former is None
    assert former._caller.channel.fileno() == -1


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_worker_keeps_no_way_to_a_driver_that_does_not_let_it_in(
    monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    monkeypatch.setattr(lending, "_PROOF_S", 0.001)
    bench = DirectBench()
    bench.ask()
    _, arguments = bench.own[-1]
    worker: Any = SimpleNamespace(
        former=None,
        lending=None,
        nudges=0,
        setup=SimpleNamespace(machine="here"),
        config=SimpleNamespace(spin_s=0.0),
        functions=SimpleNamespace(classes={}),
        enter_user_code=lambda: None,
        prepare_to_block=lambda: None,
        leave_user_code=lambda asked: None,
    )
    door = next(door for door in bench.watched if type(door) is Door)
    if is_stopped:
        assert lend(worker, arguments) == (False, True)
        assert worker.former is None
        return
    accepted: list[socket.socket] = []
    thread = threading.Thread(target=lambda: accepted.append(door.channel.accept()[0]))
    thread.start()
    assert lend(worker, arguments) == (False, True)
    thread.join()
    with accepted[0] as channel:
        while channel.recv(1000):  # what it says first, and its end
            pass
    assert worker.former is None
