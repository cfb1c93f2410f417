"""Values between a driver outside of the cluster and its daemon, without either."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from poolray.cluster.remote_sessions import RemoteReception
from poolray.cluster.remote_values import PIECE_BYTES, Downloads, pieces_of
from poolray.cluster.storage_threads import StorageThreads
from poolray.cluster.switch import OUTSIDE
from poolray.exceptions import ObjectLostError
from poolray.ids import ObjectId
from poolray.objects.serialization import Serialized
from poolray.objects.shared_memory import Arena, create_arena_file
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.client import (
    AllocateRange,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReturnRange,
    UnpinObjects,
)
from poolray.protocol.cluster import Farewell, Hello, Welcome
from poolray.protocol.remote import EndWriting, Piece, ReadPiece, WritePiece, Written
from poolray.protocol.values import InArena, InFile

CAPACITY = 4 << 20
A, B = ObjectId(b"a" * 28), ObjectId(b"b" * 28)
DRIVER = OUTSIDE + b"one"
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(
    Welcome | Farewell | Piece | Written | RangeGranted | ObjectValues
).decode


class FakeSwitch:
    """A switch that carries nothing: what was sent stays here."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.heard: dict[bytes, float] = {DRIVER: 0.0}
        self.refuses = lambda _: ""
        self.is_full = False

    def waiting(self, _: bytes) -> int:
        return 64 if self.is_full else 0

    def send(self, _: bytes, body: bytes) -> None:
        self.sent.append(decode(body))

    def heard_s(self, peer_id: bytes) -> float:
        return self.heard.get(peer_id, float("-inf"))

    def outside(self) -> list[bytes]:
        return list(self.heard)

    def forget(self, peer_id: bytes) -> None:
        del self.heard[peer_id]


class FakeDaemon:
    """A daemon that notes what sessions tell it."""

    def __init__(self, folder: Path) -> None:
        self.arena = Arena(create_arena_file(CAPACITY), CAPACITY)
        self.folder = folder
        self.requests: list[Any] = []
        self.sessions: list[Any] = []
        self.left: list[Any] = []

    def welcome(self, session: Any, hello: Hello) -> Welcome:
        self.sessions.append(session)
        return Welcome(
            node_id=b"n",  # type: ignore[arg-type]
            job_id=b"j",
            group_id=1,  # type: ignore[arg-type]
            client_id=session.client_id,
            arena_bytes=CAPACITY,
            config={},
            labels={},
            head_address="",
            node_address="",
            session_folder="",
        )

    def on_request(self, session: Any, message: Any) -> None:
        self.requests.append(message)

    def on_left(self, session: Any) -> None:
        self.left.append(session)

    def holds_file(self, path: str) -> bool:
        return os.path.dirname(path) == str(self.folder)

    def serve_switch(self) -> None:
        """Nothing: all has been carried."""


class Scene:
    """A driver that has signed on."""

    def __init__(self, folder: Path, grace_s: float = 10.0) -> None:
        self.switch = FakeSwitch()
        self.daemon = FakeDaemon(folder)
        self.storage = StorageThreads(2, lambda: None)
        self.reception = RemoteReception(self.daemon, self.switch, grace_s, self.storage)  # type: ignore[arg-type]
        self.say(Hello(protocol_version=PROTOCOL_VERSION, pid=1, namespace="", is_remote=True))
        assert isinstance(self.heard(), Welcome)
        (self.session,) = self.daemon.sessions

    def say(self, message: Any) -> None:
        self.reception.on_message(DRIVER, encode(message))

    def heard(self) -> Any:
        return self.switch.sent.pop(0)

    def grant(self, object_id: ObjectId, size_bytes: int, **place: Any) -> None:
        self.say(AllocateRange(request_id=1, object_id=object_id, size_bytes=size_bytes))
        self.session.send(RangeGranted(request_id=1, **place))
        assert isinstance(self.heard(), RangeGranted)

    def end_writing(self, object_id: ObjectId) -> str:
        self.say(EndWriting(request_id=2, object_id=object_id))
        written = self.heard()
        assert isinstance(written, Written)
        return written.failure


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.daemon.arena.close()


# ---- the daemon's side ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, 1 << 62, (1 << 64) - 1])
def test_places_that_nobody_has_are_failures_in_words(scene: Scene, offset: int) -> None:
    place = InFile(object_id=A, path=f"{scene.daemon.folder}/x", size_bytes=99, offset=offset)
    Path(place.path).write_bytes(b"x" * 50)
    scene.say(ReadPiece(request_id=3, place=place, offset=0, size_bytes=10))
    assert "cannot be read" in scene.heard().failure


def test_a_file_that_is_not_the_nodes_never_becomes_a_value(scene: Scene) -> None:
    place = InFile(object_id=A, path="/etc/passwd", size_bytes=10)
    scene.say(PutObject(object_id=A, value=place))
    said = scene.heard()
    assert isinstance(said, Farewell)
    assert "/etc/passwd is no place" in said.reason
    assert scene.daemon.requests == []


def test_a_value_that_memory_does_not_hold_costs_its_driver_the_value_alone(scene: Scene) -> None:
    scene.grant(A, 1 << 62, offset=-1, path="file:///nowhere/value")
    scene.say(WritePiece(object_id=A, offset=0, data=b"x"))
    assert "memory" in scene.end_writing(A)


def test_what_a_driver_says_that_nobody_can_take_ends_its_session_with_words(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene.daemon, "on_request", lambda *_: 1 / 0)
    scene.switch.is_full = True  # much is under way to it: the last word goes out all the same
    scene.session.send(Written(request_id=1))
    scene.say(ReturnRange(object_id=A))
    said = scene.heard()
    assert isinstance(said, Farewell)
    assert "ZeroDivisionError" in said.reason
    assert scene.daemon.left == [scene.session]


def test_what_is_written_to_a_granted_place_is_read_back(scene: Scene, tmp_path: Path) -> None:
    data = os.urandom(3 * PIECE_BYTES + 17)
    path = str(tmp_path / "value")
    for object_id, place in ((A, {"offset": 4096}), (B, {"offset": -1, "path": path})):
        scene.grant(object_id, len(data), **place)
        for piece in pieces_of(object_id, Serialized(data, [], []), None):
            scene.say(piece)
        assert scene.end_writing(object_id) == ""
    assert bytes(scene.daemon.arena.write(4096, len(data))) == data
    assert Path(path).read_bytes() == data
    for found in (
        InArena(object_id=A, offset=4096, size_bytes=len(data)),
        InFile(object_id=B, path=path, size_bytes=len(data)),
    ):
        scene.say(ReadPiece(request_id=3, place=found, offset=100, size_bytes=1000))
        assert scene.heard().data == data[100:1100]


def test_a_driver_writes_nowhere_else(scene: Scene) -> None:
    before = bytes(scene.daemon.arena.write(0, 8192))
    scene.say(WritePiece(object_id=A, offset=0, data=b"never granted"))
    assert "granted" in scene.end_writing(A)
    for offset in (-1, 90, 1 << 40):
        scene.grant(A, 100, offset=0)
        scene.say(WritePiece(object_id=A, offset=offset, data=b"x" * 20))
        assert "outside" in scene.end_writing(A)
    scene.grant(A, 100, offset=0)
    scene.say(PutObject(object_id=A, value=InArena(object_id=A, offset=0, size_bytes=100)))
    scene.say(WritePiece(object_id=A, offset=0, data=b"stored already"))
    scene.grant(A, 100, offset=0)
    scene.say(ReturnRange(object_id=A))
    scene.say(WritePiece(object_id=A, offset=0, data=b"given back"))
    assert "granted" in scene.end_writing(A)
    assert bytes(scene.daemon.arena.write(0, 8192)) == before


def test_a_driver_reads_nothing_but_values(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short")
    for place, offset, size in (
        (InArena(object_id=A, offset=CAPACITY - 10, size_bytes=20), 0, 20),
        (InArena(object_id=A, offset=-20, size_bytes=20), 0, 20),
        (InArena(object_id=A, offset=0, size_bytes=20), 10, 20),
        (InArena(object_id=A, offset=0, size_bytes=20), -1, 10),
        (InArena(object_id=A, offset=0, size_bytes=20), 15, -5),
        (InFile(object_id=A, path="/etc/passwd", size_bytes=20), 0, 20),
        (InFile(object_id=A, path=f"{tmp_path}/../x", size_bytes=20), 0, 20),
        (InFile(object_id=A, path=f"{tmp_path}/gone", size_bytes=20), 0, 20),
        (InFile(object_id=A, path=f"{tmp_path}/short", size_bytes=20), 0, 20),
    ):
        scene.say(ReadPiece(request_id=3, place=place, offset=offset, size_bytes=size))
        piece = scene.heard()
        assert (piece.data, bool(piece.failure)) == (b"", True), place


def test_who_is_silent_for_the_grace_period_is_dead_and_refused_from_then_on(scene: Scene) -> None:
    scene.reception.tick(9.0)
    assert not scene.daemon.left
    scene.reception.tick(11.0)
    assert scene.daemon.left == [scene.session]
    assert "10 s" in scene.switch.refuses(DRIVER)
    assert not scene.switch.refuses(b"a node")
    scene.say(ReturnRange(object_id=A))  # late
    assert not scene.daemon.requests


def test_who_says_goodbye_is_gone_at_once_and_forgotten_soon(scene: Scene) -> None:
    scene.say(Farewell(reason=""))
    assert scene.daemon.left == [scene.session]
    scene.reception.tick(1.0)
    assert scene.switch.heard
    scene.reception.tick(3.0)
    assert not scene.switch.heard


def test_who_greets_and_never_signs_on_is_forgotten(scene: Scene) -> None:
    stranger = OUTSIDE + b"stranger"
    for now in range(100):
        scene.switch.heard[DRIVER] = float(now)
        scene.switch.heard.setdefault(stranger, 0.0) if not now else None
        scene.reception.tick(float(now))
    assert list(scene.switch.heard) == [DRIVER]


def test_who_signs_on_after_it_was_looked_for_is_taken_in(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    late = OUTSIDE + b"late"
    scene.switch.heard[late] = 0.0
    scene.reception.tick(1.0)
    hello = Hello(protocol_version=PROTOCOL_VERSION, pid=1, namespace="", is_remote=True)
    scene.reception.on_message(late, encode(hello))
    assert len(scene.daemon.sessions) == 2
    scene.daemon.arena.close()


def test_what_there_is_no_room_for_waits_in_order(scene: Scene) -> None:
    scene.switch.is_full = True
    for number in range(3):
        scene.session.send(Written(request_id=number))
    assert not scene.switch.sent
    scene.switch.is_full = False
    assert scene.reception.flush()
    assert [message.request_id for message in scene.switch.sent] == [0, 1, 2]
    assert not scene.reception.flush()


def test_a_driver_of_another_version_is_told_so(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.reception.on_message(
        OUTSIDE + b"old", encode(Hello(protocol_version=0, pid=1, namespace=""))
    )
    farewell = scene.heard()
    assert isinstance(farewell, Farewell)
    assert "version" in farewell.reason
    assert len(scene.daemon.sessions) == 1
    scene.daemon.arena.close()


# ---- the driver's side ---------------------------------------------------------------------------


class Side:
    """A driver's downloads, and a node that answers what it is asked."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.answers: list[ObjectValues] = []
        self.wanted = True
        self.downloads = Downloads(lambda message: self.sent.append(message), itertools.count(100))

    def begin(self, values: list[Any], ids: list[ObjectId]) -> bool:
        reply = ObjectValues(request_id=1, values=values)
        return self.downloads.begin(reply, ids, self.answers.append)

    def answer(self, data: dict[ObjectId, bytes], failure: str = "") -> None:
        """Answer what was asked until nothing more is."""
        while asked := [m for m in self.sent if isinstance(m, ReadPiece)]:
            self.sent = [m for m in self.sent if not isinstance(m, ReadPiece)]
            assert len(asked) <= 64
            for m in asked:
                part = data[m.place.object_id][m.offset : m.offset + m.size_bytes]
                self.downloads.take(
                    Piece(
                        request_id=m.request_id,
                        offset=m.offset,
                        data=b"" if failure else part,
                        failure=failure,
                    ),
                    lambda _: self.wanted,
                )


def place(object_id: ObjectId, size_bytes: int) -> InArena:
    return InArena(object_id=object_id, offset=0, size_bytes=size_bytes)


def test_values_are_brought_by_pieces_and_let_go_of() -> None:
    side = Side()
    data = {A: os.urandom(100 * PIECE_BYTES + 5), B: os.urandom(150_000)}
    assert not side.begin([b"small"], [A])
    assert side.begin([place(A, len(data[A])), b"small", place(B, len(data[B]))], [A, A, B])
    side.answer(data)
    (answer,) = side.answers
    assert bytes(answer.values[0]) == data[A]
    assert answer.values[1] == b"small"
    assert bytes(answer.values[2]) == data[B]
    assert not answer.errors
    assert [m.object_ids for m in side.sent if isinstance(m, UnpinObjects)] == [[A], [B]]


def test_a_value_that_cannot_be_read_is_an_error() -> None:
    side = Side()
    side.begin([place(A, 200_000), b"small"], [A, B])
    side.answer({A: b""}, "its file is gone")
    (answer,) = side.answers
    assert answer.errors == [0]
    assert isinstance(pickle.loads(answer.values[0]), ObjectLostError)  # type: ignore[arg-type]


def test_a_value_that_there_is_no_memory_for_is_an_error() -> None:
    side = Side()
    side.begin([place(A, 1 << 62)], [A])
    (answer,) = side.answers
    assert isinstance(pickle.loads(answer.values[0]), MemoryError)  # type: ignore[arg-type]
    assert side.sent == [UnpinObjects(object_ids=[A])]


def test_what_nobody_waits_for_any_more_is_not_brought() -> None:
    side = Side()
    data = {A: bytes(1000 * PIECE_BYTES)}
    side.begin([place(A, len(data[A]))], [A])
    side.wanted = False
    side.answer(data)
    assert not side.answers
    assert side.sent == [UnpinObjects(object_ids=[A])]
    side.wanted = True
    side.begin([place(B, 150_000)], [B])
    side.answer({B: bytes(150_000)})
    assert len(side.answers) == 1


def test_pieces_make_up_the_value_whatever_its_buffers() -> None:
    buffers = [memoryview(os.urandom(n)) for n in (0, 1, 63, PIECE_BYTES, 3 * PIECE_BYTES + 1)]
    serialized = Serialized(b"stream" * 10, buffers, [])
    seen: list[bytes] = []
    pieces = list(pieces_of(A, serialized, seen.append))
    whole = b"".join(piece.data for piece in pieces)
    assert whole == serialized.to_bytes() == b"".join(seen)
    assert all(len(piece.data) <= PIECE_BYTES for piece in pieces)
    offsets = [piece.offset for piece in pieces]
    assert offsets == [sum(len(p.data) for p in pieces[:i]) for i in range(len(pieces))]
