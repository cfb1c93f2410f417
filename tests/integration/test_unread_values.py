"""Values that arrive when nobody waits any more: the node is told that nobody looks at them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
import numpy as np
import pytest

import poolray
from poolray.exceptions import InternalError
from poolray.ids import ClientId, ObjectId, WorkerId
from poolray.local import runtime as local_runtime
from poolray.local.worker_client import WorkerLink
from poolray.protocol.client import CancelRequest, GetObjects, ObjectValues
from poolray.protocol.values import InArena
from poolray.protocol.worker import ClientMessage, FromWorkers
from tests.integration.support import DEADLINE_S, Gate, wait_until

#: Bytes of a value that lies in shared memory.
LARGE = 1 << 20


def pins_of_driver() -> dict[ObjectId, int]:
    """What the node believes that this process looks at."""
    runtime = local_runtime.current()
    assert runtime is not None
    runtime.client.sync_references()
    with runtime.guard:
        return dict(runtime.node.state.clients[ClientId(b"driver")].pins)


class Unreadable:
    """Cannot be unpickled."""

    def __init__(self) -> None:
        self.large = np.zeros(LARGE, np.uint8)

    def __setstate__(self, _: Any) -> None:
        raise RuntimeError("cannot be read")


class Interrupting:
    """Ctrl-C comes while it is being unpickled."""

    def __reduce__(self) -> Any:
        return _interrupt, ()


def _interrupt() -> None:
    raise KeyboardInterrupt


# ---- drivers -------------------------------------------------------------------------------------


def test_a_get_that_fails_at_one_value_lets_go_of_the_others() -> None:
    poolray.init(num_cpus=1)
    refs = [poolray.put(np.zeros(LARGE, np.uint8)) for _ in range(3)]
    with pytest.raises(InternalError, match="cannot be read"):
        poolray.get([refs[0], poolray.put(Unreadable()), *refs[1:]])
    assert not pins_of_driver()


def test_a_get_that_is_interrupted_at_one_value_lets_go_of_the_others() -> None:
    poolray.init(num_cpus=1)
    refs = [poolray.put(np.zeros(LARGE, np.uint8)) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        poolray.get([poolray.put(Interrupting()), *refs])
    assert not pins_of_driver()
    assert poolray.get(refs[0]).size == LARGE


def test_an_await_that_is_cancelled_as_its_value_comes_lets_go_of_it() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(np.zeros(LARGE, np.uint8))

    async def main(steps: int) -> bool:
        awaited = asyncio.ensure_future(ref)
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = awaited.done()
        awaited.cancel()
        try:
            await awaited
        except asyncio.CancelledError:
            return False
        return was_done

    outcomes = []
    for steps in range(6):  # before, at and after the moment
        outcomes.append(asyncio.run(main(steps)))
        assert not pins_of_driver(), f"cancelled after {steps} steps"
    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_a_value_for_a_loop_that_was_closed_is_let_go(release: Gate) -> None:
    poolray.init(num_cpus=1)

    @poolray.remote
    def large(gate: Gate) -> Any:
        gate.wait()
        return np.zeros(LARGE, np.uint8)

    ref = large.remote(release)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        return asyncio.ensure_future(ref)

    waiting = loop.run_until_complete(begin())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    release.open()
    poolray.wait([ref], timeout=DEADLINE_S)
    wait_until(lambda: not pins_of_driver(), "the end of the pin")
    del waiting


# ---- workers -------------------------------------------------------------------------------------


class Node:
    """The other end of a worker's link."""

    def __init__(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reports, reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends = (self._control, control, self._reports, reports)
        self._decode = msgspec.msgpack.Decoder(FromWorkers).decode
        self.link = WorkerLink(
            WorkerId(b"w" * 28), control, reports, 0.0, lambda: None, lambda _: None
        )
        self.let_go: list[ObjectId] = []
        self.link.let_go = self.let_go.append
        self.link.sleep = self._interrupt  # type: ignore[method-assign]

    def _interrupt(self, *_: Any) -> Any:
        raise KeyboardInterrupt

    def interrupted_get(self, *object_ids: ObjectId) -> int:
        """A task asks for values and is interrupted while it waits; the number of the request."""
        with pytest.raises(KeyboardInterrupt):
            self.link.get(list(object_ids), None)
        asked, cancelled = self.heard(GetObjects), self.heard(CancelRequest)
        assert asked.request_id == cancelled.request_id
        return int(asked.request_id)

    def heard(self, kind: type) -> Any:
        """The next request of a kind."""
        while True:
            message = self._decode(self._reports.recv(1 << 16))
            if isinstance(message, ClientMessage) and isinstance(message.message, kind):
                return message.message

    def answer(self, request_id: int, *values: Any, more: bool = False) -> None:
        reply = ObjectValues(request_id=request_id, values=list(values), more=more)
        self._control.send(msgspec.msgpack.encode(reply))
        self.link.receive_all()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        self.link._bell.close()


@pytest.fixture
def node() -> Any:
    made = Node()
    yield made
    made.close()


def place(name: bytes, **more: Any) -> InArena:
    return InArena(object_id=ObjectId(name), offset=0, size_bytes=LARGE, **more)


A, B, C = (ObjectId(name) for name in (b"a", b"b", b"c"))


def test_values_that_come_after_an_interrupt_are_let_go(node: Node) -> None:
    request = node.interrupted_get(A, B, C)
    node.answer(request, place(b"a"), b"small", place(b"another name of c"))
    assert node.let_go == [A, C]
    node.answer(request, place(b"a"))  # nobody asked
    assert node.let_go == [A, C]


def test_so_are_those_that_come_in_parts(node: Node) -> None:
    request = node.interrupted_get(A, B, C)
    node.answer(request, place(b"a"), more=True)
    node.answer(request, b"small", place(b"c"))
    assert node.let_go == [A, C]


def test_those_of_other_nodes_were_never_looked_at(node: Node) -> None:
    request = node.interrupted_get(A)
    node.answer(request, place(b"a", node_id=b"n" * 28))
    assert node.let_go == []


def test_a_request_that_was_forgotten_in_time_leaves_nothing_behind(node: Node) -> None:
    request = node.interrupted_get(A, B)
    node.answer(request)  # with nothing
    assert node.let_go == []
    assert not node.link._abandoned


def test_a_task_that_is_cancelled_while_it_gets_leaves_nothing_pinned(release: Gate) -> None:
    poolray.init(num_cpus=2)

    @poolray.remote
    def read(refs: list[Any], gate: Gate) -> None:
        while True:
            poolray.get(refs)

    refs = [poolray.put(np.zeros(LARGE, np.uint8)) for _ in range(4)]
    for _ in range(5):
        reading = read.remote(refs, release)
        poolray.wait([reading], timeout=0.05)
        poolray.cancel(reading)
        poolray.wait([reading], timeout=DEADLINE_S)
    runtime = local_runtime.current()
    assert runtime is not None

    def pins() -> list[dict[ObjectId, int]]:
        with runtime.guard:
            return [dict(client.pins) for client in runtime.node.state.clients.values()]

    # What a worker has noted travels with its next report.
    poolray.get([poolray.remote(pause).remote() for _ in range(4)], timeout=DEADLINE_S)
    wait_until(lambda: not any(pins()), f"the end of pins {pins()}", timeout_s=5)


def pause() -> None:
    import time

    time.sleep(0.05)
