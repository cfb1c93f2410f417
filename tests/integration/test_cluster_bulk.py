"""The channel for bytes of values between nodes: who is let in, what is carried, what ends it."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import pytest

import poolray
from poolray.cluster import auth, bulk_loop
from poolray.cluster import bulk as bulk_module
from poolray.cluster.bulk import Bulk
from poolray.cluster.transfer import ChunkStore
from poolray.cluster_utils import Cluster
from poolray.direct import seal
from poolray.direct.seal import HELLO_BYTES, ID_BYTES, MAGIC, Handshake, HandshakeError
from poolray.ids import NodeId, ObjectId
from poolray.node.effects import ExpectChunk, ForgetChunks, SendChunk
from poolray.objects.shared_memory import Arena, create_arena_file
from poolray.protocol.cluster import BulkMessage, BulkPort, CloseBulk, OpenBulk
from poolray.protocol.node import ChunkArrived, ChunkMissing, ChunksLost
from poolray.protocol.values import InArena, InFile
from tests.integration.support import wait_until

ARENA_BYTES = 16 << 20
CHUNK = 2 << 20
NAME = ObjectId(b"v" * 28)


class End:
    """One node's side: an arena, a channel, and a control link to the other end."""

    def __init__(self, name: bytes, folder: Path, machine: str) -> None:
        self.node_id = NodeId(name)
        self.arena = Arena(create_arena_file(ARENA_BYTES), ARENA_BYTES)
        self.outbox: list[BulkMessage] = []
        self.told: list[ChunkArrived | ChunkMissing | ChunksLost] = []
        #: Chunks that go over the control link.
        self.by_link: list[SendChunk] = []
        self.folder = folder
        self.bulk = Bulk(
            host="127.0.0.1",
            port=0,
            machine=machine,
            arena=self.arena,
            chunks=ChunkStore(self.arena, self.path_of),
            threads=2,
            host_of=lambda node_id: "127.0.0.1",
            tell=lambda node_id, message: self.outbox.append(message),
            wake=lambda: None,
        )

    def path_of(self, number: int) -> str:
        return str(self.folder / f"{self.node_id!r}-{number}")

    def turn(self, other: End) -> None:
        told, instead = self.bulk.settle()
        self.told += told
        self.by_link += instead
        self.by_link += self.bulk.tick(time.monotonic())
        while self.outbox:
            other.by_link += other.bulk.on_message(self.node_id, self.outbox.pop(0))

    def fill(self, offset: int, data: bytes) -> None:
        self.arena.write(offset, len(data))[:] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.arena.write(offset, size))

    def expect_back(self, other: End, number: int) -> None:
        """A chunk goes the other way round."""
        self.bulk.expect(ExpectChunk(other.node_id, number, 0, 0, CHUNK))

    def arrived(self) -> list[int]:
        return [message.number for message in self.told if isinstance(message, ChunkArrived)]


class Pair:
    """A node that has values and one that wants them."""

    def __init__(self, folder: Path, machines: tuple[str, str]) -> None:
        self.source = End(b"S" * 28, folder, machines[0])
        self.target = End(b"T" * 28, folder, machines[1])
        self.data = random.Random(1).randbytes(4 * CHUNK)
        self.source.fill(0, self.data)

    def run(self, until: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, "it does not happen"
            self.target.turn(self.source)
            self.source.turn(self.target)
            time.sleep(0.0005)

    def expect(self, number: int, to: int, size: int = CHUNK, file_number: int = 0) -> None:
        effect = ExpectChunk(self.source.node_id, number, to, file_number, size)
        self.target.bulk.expect(effect)
        self.target.turn(self.source)  # what it says comes before what asks for the chunk

    def send(self, number: int, start: int, size: int = CHUNK) -> None:
        place = InArena(object_id=NAME, offset=0, size_bytes=len(self.data))
        self.send_place(number, place, start, size)

    def send_place(self, number: int, place: InArena | InFile, start: int, size: int) -> None:
        effect = SendChunk(self.target.node_id, NAME, place, start, size, number)
        if not self.source.bulk.send(effect):
            self.source.by_link.append(effect)

    def transfer(self, *numbers: int) -> None:
        """Chunks of these numbers go to where they are at the source."""
        for number in numbers:
            self.expect(number, number * CHUNK)
            self.send(number, number * CHUNK)
        self.run(lambda: set(numbers) <= set(self.target.arrived()))
        for number in numbers:
            start = number * CHUNK
            assert self.target.read(start, CHUNK) == self.data[start : start + CHUNK]

    def close(self) -> None:
        for end in (self.source, self.target):
            end.bulk.close()
            end.arena.close()


@pytest.fixture(params=["in the open", "sealed"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    machines = ("here", "here") if request.param == "in the open" else ("here", "there")
    pair = Pair(tmp_path, machines)
    yield pair
    pair.close()


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, ("here", "there"))
    yield pair
    pair.close()


# ---- what is carried -----------------------------------------------------------------------------


def test_chunks_arrive_where_they_belong(pair: Pair) -> None:
    pair.transfer(0, 1, 2)
    pair.transfer(3)
    assert pair.source.by_link == []


@pytest.mark.parametrize("is_used", [False, True], ids=["new memory", "used memory"])
def test_chunks_of_any_size_arrive_in_a_row_and_touch_nothing_else(
    pair: Pair, is_used: bool
) -> None:
    if is_used:
        pair.target.fill(0, b"." * len(pair.data))
    wake, piece = bulk_loop._WAKE_BYTES, bulk_loop._PIECE_BYTES
    sizes = [piece, 1, wake - 1, 17, wake, wake + 1, 4095, piece + 1, 4097, 3 * piece - 5]
    untouched = b"." if is_used else b"\0"
    starts = []
    start = 3
    for number, size in enumerate(sizes, 1):
        starts.append(start)
        pair.expect(number, start, size)
        pair.send(number, start, size)
        start += size + 5
    pair.run(lambda: len(pair.target.arrived()) == len(sizes))
    for start, size in zip(starts, sizes, strict=True):
        assert pair.target.read(start, size) == pair.data[start : start + size]
        assert pair.target.read(start + size, 5) == untouched * 5
    assert pair.source.by_link == []


def test_where_sockets_cannot_be_spliced_chunks_arrive_all_the_same(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "splice", refuse)
    pair.transfer(0, 1, 2)
    assert pair.target.told == [ChunkArrived(number=number) for number in (0, 1, 2)]


def test_memory_that_cannot_be_had_costs_the_connection_and_chunks_are_asked_for_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    splice, write = os.splice, os.pwritev

    def take_but_not_give(source: int, target: int, size: int, **options: Any) -> int:
        if "offset_dst" in options:
            no_room()
        return splice(source, target, size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "splice", take_but_not_give)
        patch.setattr(os, "pwritev", no_room)
        pair.expect(0, 0)
        pair.send(0, 0)
        pair.run(lambda: ChunksLost(numbers=[0]) in pair.target.told)
    assert os.pwritev is write
    pair.transfer(0, 1)  # nothing of the first one is in the way


def test_what_ends_in_the_middle_of_a_chunk_is_noticed_at_once(pair: Pair) -> None:
    pair.transfer(0)
    send = bulk_loop.Sending._send_body

    def end(self: bulk_loop.Sending, loop: bulk_loop.Loop) -> int:
        if self._left < CHUNK:
            raise ConnectionError("this end has had enough")
        self._left, left = 100, self._left
        sent = send(self, loop)
        self._left += left - 100
        return sent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_loop.Sending, "_send_body", end)
        pair.expect(1, CHUNK)
        pair.send(1, CHUNK)
        pair.run(lambda: ChunksLost(numbers=[1]) in pair.target.told, timeout_s=10)
    pair.transfer(2)


def test_chunks_may_go_to_a_file_and_come_from_one(pair: Pair, tmp_path: Path) -> None:
    spilled = tmp_path / "spilled"
    spilled.write_bytes(b"before" + pair.data)
    place = InFile(object_id=NAME, path=str(spilled), size_bytes=len(pair.data), offset=6)
    for number in (1, 2):
        pair.expect(number, (number - 1) * CHUNK, file_number=9)
        pair.send_place(number, place, (number - 1) * CHUNK, CHUNK)
    pair.run(lambda: len(pair.target.arrived()) == 2)
    assert Path(pair.target.path_of(9)).read_bytes() == pair.data[: 2 * CHUNK]


def test_a_file_that_is_gone_is_said_to_be_missing(pair: Pair, tmp_path: Path) -> None:
    gone = InFile(object_id=NAME, path=str(tmp_path / "gone"), size_bytes=CHUNK)
    pair.expect(1, 0)
    pair.send_place(1, gone, 0, CHUNK)
    pair.run(lambda: bool(pair.target.told))
    assert pair.target.told == [ChunkMissing(number=1)]
    pair.transfer(2)


def test_what_is_not_expected_any_more_is_not_written(pair: Pair) -> None:
    pair.transfer(0)
    pair.target.fill(CHUNK, b"." * CHUNK)
    pair.expect(1, CHUNK)
    pair.target.bulk.forget(ForgetChunks(pair.source.node_id, [1]))
    pair.send(1, CHUNK)
    pair.transfer(2)
    assert pair.target.read(CHUNK, CHUNK) == b"." * CHUNK
    assert 1 not in pair.target.arrived()


def test_what_is_revoked_in_the_middle_is_not_written_from_then_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.transfer(0)
    go_on = Event()
    send = bulk_loop.Sending._send_body

    def hesitate(self: bulk_loop.Sending, loop: bulk_loop.Loop) -> int:
        return send(self, loop) if self._left > CHUNK // 2 or go_on.is_set() else 0

    monkeypatch.setattr(bulk_loop.Sending, "_send_body", hesitate)
    pair.target.fill(CHUNK, b"." * CHUNK)
    pair.expect(1, CHUNK)
    pair.send(1, CHUNK)
    pair.run(lambda: pair.target.read(CHUNK + CHUNK // 4, 1000) != b"." * 1000)
    pair.target.bulk.forget(ForgetChunks(pair.source.node_id, [1]))
    pair.target.fill(CHUNK, b"." * CHUNK)  # it is another value's by now
    go_on.set()
    pair.transfer(2)
    assert pair.target.read(CHUNK, CHUNK) == b"." * CHUNK
    assert 1 not in pair.target.arrived()


def test_sealed_bytes_cannot_be_read_on_the_way(sealed: Pair, tmp_path: Path) -> None:
    secret = b"a secret that nobody hears " * 1000
    sealed.source.fill(0, secret)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard = _tap(sealed, listener)
        sealed.expect(1, 0, len(secret))
        assert not sealed.target.arrived()
        sealed.expect(2, CHUNK)  # large enough for a connection
        sealed.send(1, 0, len(secret))
        sealed.run(lambda: 1 in sealed.target.arrived())
    assert sealed.target.read(0, len(secret)) == secret
    assert len(heard) > len(secret)
    assert b"secret" not in bytes(heard)


def _tap(pair: Pair, listener: socket.socket, change: int = -1) -> bytearray:
    """Lead the next connection through here; gives what the source says, as it comes. The byte of
    that number is changed on its way.
    """
    from threading import Thread

    heard = bytearray()
    port = pair.source.bulk.port
    pair.source.bulk.port = listener.getsockname()[1]

    def carry(one: socket.socket, other: socket.socket, keep: bool) -> None:
        try:
            while data := one.recv(65536):
                if keep:
                    start = len(heard)
                    heard.extend(data)
                    if start <= change < start + len(data):
                        changed = bytearray(data)
                        changed[change - start] ^= 1
                        data = bytes(changed)
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def serve() -> None:
        inner, _ = listener.accept()
        outer = socket.create_connection(("127.0.0.1", port))
        pair.source.bulk.port = port
        threads = [
            Thread(target=carry, args=(outer, inner, True)),
            Thread(target=carry, args=(inner, outer, False)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        inner.close()
        outer.close()

    Thread(target=serve, daemon=True).start()
    return heard


@pytest.mark.parametrize("where", [0, 5, 40, 70, 100, 130, 5000])
def test_a_byte_that_is_changed_on_its_way_never_arrives(sealed: Pair, where: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _tap(sealed, listener, change=where)
        sealed.expect(1, 0)
        sealed.send(1, 0)
        # Sent again by the control link if the connection never opened, else asked for again.
        sealed.run(lambda: bool(sealed.target.told or sealed.source.by_link))
    assert sealed.target.arrived() == []


# ---- who is let in -------------------------------------------------------------------------------


def connect(pair: Pair) -> socket.socket:
    return socket.create_connection(("127.0.0.1", pair.source.bulk.port), timeout=5)


def is_sent_away(channel: socket.socket) -> bool:
    """Whether the connection ends without a word."""
    try:
        return channel.recv(1) == b""
    except ConnectionError:
        return True


def test_who_was_not_announced_is_sent_away_without_a_word(pair: Pair) -> None:
    pair.transfer(0)
    for said in (b"x", b"GET / HTTP/1.1\r\n\r\n", MAGIC + os.urandom(HELLO_BYTES - len(MAGIC))):
        with connect(pair) as channel:
            channel.sendall(said)
            assert is_sent_away(channel)
    pair.transfer(1)


def test_who_does_not_know_the_key_gets_nothing(pair: Pair) -> None:
    pair.transfer(0)
    connection_id = os.urandom(ID_BYTES)
    thief = NodeId(b"X" * 28)
    message = OpenBulk(connection_id=connection_id, key=os.urandom(32), machine="here")
    pair.source.bulk.on_message(thief, message)
    pair.source.outbox.clear()
    with connect(pair) as channel:
        handshake = Handshake(connection_id, os.urandom(32), is_local=True)
        channel.sendall(handshake.hello())
        answer = b""
        while len(answer) < seal.ANSWER_BYTES:
            answer += channel.recv(200)
        with pytest.raises(HandshakeError, match="does not know the key"):
            handshake.prove(answer)
        channel.sendall(os.urandom(seal.PROOF_BYTES))
        assert is_sent_away(channel)
    pair.transfer(1)


def test_a_handshake_that_was_heard_cannot_be_said_again(sealed: Pair) -> None:
    said: list[bytes] = []
    honest = Handshake.hello
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handshake, "hello", lambda self: said.append(honest(self)) or said[-1])
        sealed.transfer(0)
    with connect(sealed) as channel:
        channel.sendall(said[0])
        assert is_sent_away(channel)
    sealed.transfer(1)


def test_nothing_goes_in_the_open_to_another_machine() -> None:
    key, name = os.urandom(32), os.urandom(ID_BYTES)
    near, far = Handshake(name, key, is_local=True), Handshake(name, key, is_local=False)
    with pytest.raises(HandshakeError, match="in the open"):
        far.prove(near.answer(far.hello()))
    assert not auth.is_local("a", "b", "127.0.0.1", "127.0.0.1")
    assert not auth.is_local("a", "a", "127.0.0.1", "10.0.0.1")
    assert not auth.is_local("", "", "127.0.0.1", "127.0.0.1")
    assert auth.is_local("a", "a", "127.0.0.1", "::1")


def test_records_open_once_and_in_order() -> None:
    key = os.urandom(32)
    closing, opening = seal.Seal(key), seal.Seal(key)
    records = [closing.close(b"one"), closing.close(b"two")]
    assert len(set(records)) == 2
    assert opening.open(records[0]) == b"one"
    with pytest.raises(HandshakeError):
        opening.open(records[0])


# ---- what makes no sense -------------------------------------------------------------------------


def test_rubbish_at_the_port_changes_nothing(pair: Pair) -> None:
    chance = random.Random(5)
    pair.transfer(0)
    idle = [connect(pair) for _ in range(100)]  # more strangers than are waited for
    for _ in range(200):
        with connect(pair) as channel:
            said = chance.choice([b"", MAGIC, MAGIC[:3], chance.randbytes(20)])
            try:
                channel.sendall(said + chance.randbytes(chance.randrange(500)))
            except ConnectionError:
                pass  # it was sent away before it had ended
    pair.transfer(1, 2)
    for channel in idle:
        channel.close()
    strangers = pair.source.bulk._door._strangers
    assert len(strangers) <= bulk_loop._STRANGERS_MAX


def test_who_says_nothing_is_sent_away_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_loop, "HANDSHAKE_S", 0.2)
    pair.transfer(0)
    with connect(pair) as channel:
        assert is_sent_away(channel)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_source_says_beyond_reason_costs_it_the_connection(
    tmp_path: Path, seed: int
) -> None:
    """Even with the key: sizes that were not asked for, numbers that do not exist, rubbish."""
    chance = random.Random(seed)
    pair = Pair(tmp_path, ("here", "here"))
    header = bulk_loop._HEADER
    rubbish = {
        0: header.pack(1, CHUNK + 1, True),
        1: header.pack(1, 2**63, True),
        2: header.pack(77, 2**64 - 1, True) + bytes(3 << 20),
        3: header.pack(1, 5, False),
        4: header.pack(1, 0, True),
        5: chance.randbytes(header.size * 4),
    }.get(seed, chance.randbytes(chance.randrange(1, 200)))
    pair.target.fill(0, b"." * ARENA_BYTES)

    def begin(self: bulk_loop.Sending, loop: bulk_loop.Loop, job: SendChunk) -> None:
        self._first = memoryview(rubbish)
        self._left = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_loop.Sending, "_begin", begin)
        pair.expect(1, 0)
        pair.send(1, 0)
        pair.run(lambda: pair.target.bulk._peers[pair.source.node_id].inbound is not None)
        end = time.monotonic() + 0.1
        while time.monotonic() < end and not pair.target.told:
            pair.source.turn(pair.target)
            pair.target.turn(pair.source)
    assert pair.target.arrived() == []
    assert pair.target.read(CHUNK, CHUNK) == b"." * CHUNK, "what was not asked for is not written"
    # The source is cut off, and what is asked for again comes by another connection.
    for number in [n for m in pair.target.told if isinstance(m, ChunksLost) for n in m.numbers]:
        assert number == 1
        pair.transfer(3)
    pair.close()


# ---- what ends -----------------------------------------------------------------------------------


def test_chunks_of_a_connection_that_breaks_are_lost_and_come_by_the_next_one(pair: Pair) -> None:
    pair.transfer(0)
    for number in (1, 2):
        pair.expect(number, number * CHUNK)
    inbound = pair.target.bulk._peers[pair.source.node_id].inbound
    assert inbound is not None
    assert inbound.receiving is not None
    inbound.receiving.channel.shutdown(socket.SHUT_RDWR)
    pair.run(lambda: any(isinstance(m, ChunksLost) for m in pair.target.told))
    (lost,) = [m for m in pair.target.told if isinstance(m, ChunksLost)]
    assert lost.numbers == [1, 2]
    pair.run(lambda: pair.source.bulk._peers[pair.target.node_id].outbound is None)
    pair.transfer(3)


def open_at_the_source_alone(pair: Pair) -> None:
    """The source has a job for a connection that is open; the target's daemon has not heard yet
    that it is, for it does not listen to its threads.
    """
    pair.expect(1, 0)
    pair.send(1, 0)
    outbound = pair.source.bulk._peers[pair.target.node_id].outbound
    assert outbound is not None
    wait_until(lambda: pair.source.turn(pair.target) or outbound.is_open, "the last proof")


def test_what_a_source_drops_is_asked_for_again_if_nobody_has_heard_that_it_was_open(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("the other end has closed it")

    monkeypatch.setattr(bulk_loop.Sending, "_begin", fail)
    open_at_the_source_alone(pair)
    peer = pair.source.bulk._peers[pair.target.node_id]
    wait_until(lambda: pair.source.turn(pair.target) or peer.outbound is None, "its end")
    pair.run(lambda: bool(pair.target.told))
    assert pair.target.told == [ChunksLost(numbers=[1])]
    monkeypatch.undo()
    pair.transfer(2)  # by another connection, at once
    assert pair.source.by_link == []


def test_what_goes_by_a_connection_that_the_other_end_has_given_up_is_asked_for_again(
    pair: Pair,
) -> None:
    open_at_the_source_alone(pair)
    pair.target.bulk.tick(time.monotonic() + 2 * bulk_module.OPENING_S)
    pair.run(lambda: bool(pair.target.told))
    assert pair.target.told == [ChunksLost(numbers=[1])]


def test_where_no_descriptors_are_left_the_control_link_takes_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(bulk_module, "Receiving", fail)
        pair.expect(1, 0)
        pair.send(1, 0)
        pair.run(lambda: bool(pair.source.by_link))
        patch.setattr(bulk_module, "Loop", fail)
        pair.source.expect_back(pair.target, 2)
        pair.run(lambda: pair.source.bulk._peers[pair.target.node_id].inbound is None)
    assert [effect.number for effect in pair.source.by_link] == [1]


def test_a_door_that_cannot_take_anybody_in_rests_a_while(pair: Pair) -> None:
    class Exhausted:
        """A listener for which there are no descriptors, twice."""

        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.tried_s: list[float] = []
            self.fileno, self.close = real.fileno, real.close

        def accept(self) -> Any:
            if len(self.tried_s) < 2:
                self.tried_s.append(time.monotonic())
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self.real.accept()

    door = pair.source.bulk._door
    door.channel = exhausted = Exhausted(door.channel)  # type: ignore[assignment]
    pair.transfer(0)
    first_s, second_s = exhausted.tried_s
    assert second_s - first_s > bulk_loop._LOOK_AT_CLOCK_S / 2


def test_an_order_that_fails_costs_the_others_nothing(pair: Pair) -> None:
    pair.transfer(0)
    for loop in (*pair.source.bulk._senders, *pair.target.bulk._receivers):
        loop._order(lambda: 1 / 0)
    pair.transfer(1)


def test_what_the_system_cannot_send_ends_a_connection_in_time(pair: Pair) -> None:
    pair.transfer(0)
    loops = (*pair.source.bulk._senders, *pair.target.bulk._receivers)
    for connection in (c for loop in loops for c in loop._by_id.values()):
        limit_ms = connection.channel.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert limit_ms == 1000 * bulk_loop.STALL_S


def test_a_disk_that_takes_a_part_of_a_chunk_is_given_the_rest(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[: CHUNK // 3], at))
    pair.expect(1, 0, file_number=9)
    pair.send(1, 0)
    pair.run(lambda: bool(pair.target.arrived()))
    assert Path(pair.target.path_of(9)).read_bytes() == pair.data[:CHUNK]


def test_who_takes_nothing_is_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_loop, "STALL_S", 0.3)
    pair.transfer(0)
    monkeypatch.setattr(bulk_loop.Receiving, "step", lambda self, loop, events: self.events)
    for number in range(1, 30):
        pair.send(number, 0, 4 * CHUNK)
    pair.run(lambda: pair.source.bulk._peers[pair.target.node_id].outbound is None)
    monkeypatch.undo()


def test_a_port_that_cannot_be_reached_is_named_and_the_control_link_takes_over(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        pair.source.bulk.port = taken.getsockname()[1]  # where nobody listens
        pair.expect(1, 0)
        pair.send(1, 0)
        pair.run(lambda: bool(pair.source.by_link))
    assert [effect.number for effect in pair.source.by_link] == [1]
    assert pair.target.told == []
    assert "--object-manager-port" in caplog.text
    assert str(pair.source.bulk.port) in caplog.text
    pair.expect(2, 0)
    pair.send(2, 0)
    assert [effect.number for effect in pair.source.by_link] == [1, 2], "it is not tried at once"


def test_a_peer_that_does_not_answer_is_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_module, "OPENING_S", 0.1)
    pair.expect(1, 0)
    pair.source.outbox.clear()
    pair.send(1, 0)
    pair.run(lambda: bool(pair.source.by_link))
    pair.run(lambda: pair.target.bulk._peers[pair.source.node_id].inbound is None)


def test_messages_that_make_no_sense_change_nothing(pair: Pair) -> None:
    chance = random.Random(7)
    stranger = NodeId(b"Y" * 28)
    for end in (pair.source, pair.target):
        for _ in range(300):
            name = chance.choice([b"", chance.randbytes(ID_BYTES), chance.randbytes(5)])
            messages: list[BulkMessage] = [
                OpenBulk(connection_id=name, key=chance.randbytes(5), machine="x"),
                OpenBulk(connection_id=name, key=chance.randbytes(32), machine="here"),
                BulkPort(connection_id=name, port=chance.choice([0, -1, 99999, 5])),
                CloseBulk(connection_id=name),
            ]
            end.bulk.on_message(stranger, chance.choice(messages))
        end.outbox.clear()
        assert len(end.bulk._door.invitations) <= 1, "one per peer"
    pair.transfer(0, 1)


def test_a_dead_peer_is_forgotten(pair: Pair) -> None:
    pair.transfer(0)
    pair.expect(1, 0)
    pair.target.bulk.forget_peer(pair.source.node_id)
    pair.source.bulk.forget_peer(pair.target.node_id)
    for end in (pair.source, pair.target):
        assert not end.bulk._peers
        assert not end.bulk._owners
        assert not end.bulk._opening
        loops = (*end.bulk._receivers, *end.bulk._senders)
        pair.run(lambda loops=loops: not any(loop._by_id for loop in loops))  # type: ignore[misc]
    assert not any(isinstance(m, ChunksLost) for m in pair.target.told)


# ---- real daemons --------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The head's node, where the driver is, and two more."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for number in (1, 2):
            made.add_node(num_cpus=1, resources={f"node{number}": 2})
        poolray.init(address=made.address)
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


@poolray.remote(num_cpus=0)
def made_here(count: int) -> Any:
    return np.arange(count)


@poolray.remote(num_cpus=0)
def sum_of(array: Any) -> int:
    return int(array.sum())


def connections_between(cluster: Cluster) -> int:
    """TCP connections that daemons have beside their links."""
    nodes = cluster.list_all_nodes()
    known = {int(node.address.rpartition(":")[2]) for node in nodes}
    known.add(int(cluster.address.rpartition(":")[2]))
    return sum(
        connection.status == psutil.CONN_ESTABLISHED
        and not {connection.laddr.port, connection.raddr.port} & known
        for node in nodes
        for connection in psutil.Process(node.pid).net_connections("tcp")
    )


def test_large_values_go_by_connections_of_their_own(cluster: Cluster) -> None:
    count = 2_000_000
    ref = made_here.options(resources={"node1": 1}).remote(10)
    assert poolray.get(ref)[-1] == 9
    assert connections_between(cluster) == 0, "small ones are not worth it"
    ref = made_here.options(resources={"node1": 1}).remote(count)
    assert int(poolray.get(ref).sum()) == count * (count - 1) // 2
    assert connections_between(cluster) == 2, "of one connection, both ends"


def test_a_value_that_all_nodes_want_reaches_all(cluster: Cluster) -> None:
    count = 3_000_000
    ref = poolray.put(np.arange(count))
    wanted = count * (count - 1) // 2
    asked = [sum_of.options(resources={f"node{number}": 1}).remote(ref) for number in (1, 2) * 2]
    assert poolray.get(asked) == [wanted] * 4


def test_a_value_whose_node_is_killed_on_the_way_is_made_again(cluster: Cluster) -> None:
    count = 5_000_000
    node = next(iter(cluster.worker_nodes))
    kind = made_here.options(resources={"node1": 0.5}, max_retries=2)
    ref = kind.remote(count)
    poolray.wait([ref], fetch_local=False)
    heir = cluster.add_node(num_cpus=1, resources={"node1": 2})
    reader = sum_of.options(resources={"node2": 1}).remote(ref)
    node.kill()
    assert poolray.get(reader, timeout=60) == count * (count - 1) // 2
    assert heir.is_alive()


def test_values_come_from_disk_and_go_to_disk_where_memory_is_short() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 24 << 20}
    )
    try:
        cluster.add_node(num_cpus=1, resources={"node1": 20}, object_store_memory=40 << 20)
        poolray.init(address=cluster.address)
        kind = made_here.options(resources={"node1": 1})
        count = 2_000_000  # of 8 bytes: two of them fill the node, the driver's holds one
        refs = [kind.remote(count + number) for number in range(6)]
        poolray.wait(refs, num_returns=len(refs), fetch_local=False)
        for number, ref in enumerate(refs):
            array = poolray.get(ref)
            assert (array[0], array[-1], len(array)) == (0, count + number - 1, count + number)
            del array
        whole = poolray.get(kind.remote(4_000_000))  # larger than the driver's node has memory
        assert int(whole.sum()) == 4_000_000 * 3_999_999 // 2
        assert connections_between(cluster) == 2
        del whole
    finally:
        poolray.shutdown()
        cluster.shutdown()
