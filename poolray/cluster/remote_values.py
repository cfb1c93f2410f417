"""Values of a driver outside of the cluster: brought from the node's memory, and taken there.

    get:  ObjectValues (places) ──▶ Downloads ──ReadPiece──▶ node ──Piece──▶ memory of our own
    put:  a place is granted ──▶ upload ──WritePiece …──▶ node ──Written──▶ PutObject

What: replaces places in answers by the values' bytes, and writes values to granted places, a
bounded number of pieces at a time.
Who calls: the driver's runtime: `begin` and `take` from whoever reads the line, `upload` from
whoever stores a value.
May touch: memory.
Invariants: what a download has brought belongs to this process alone, so nothing is pinned for it
at the node any more; an answer is handed on once, when all its values are there.
"""

from __future__ import annotations

import itertools
import mmap
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import msgspec

from poolray.exceptions import ObjectLostError
from poolray.ids import ObjectId
from poolray.objects.serialization import Serialized
from poolray.protocol.client import ObjectValues, UnpinObjects
from poolray.protocol.remote import Piece, ReadPiece, WritePiece
from poolray.protocol.values import InArena, InFile

#: Bytes of a value in one message. Small ones keep a slow link's acknowledgements coming …
PIECE_BYTES = 128 * 1024
#: … and so many under way keep a fast one busy, a few milliseconds away.
_UNDER_WAY_MAX = 64
#: Values from this size on have a mapping of their own.
_MAPPED_BYTES = 1 << 20


def _memory(size_bytes: int) -> memoryview:
    """Memory of this process, which lives as long as views of it."""
    # (A bytearray is written once for nothing, but a process may have few mappings.)
    return memoryview(
        bytearray(size_bytes) if size_bytes < _MAPPED_BYTES else mmap.mmap(-1, size_bytes)
    )


class _Value(msgspec.Struct):
    """A value that is being brought."""

    answer: _Answer
    index: int  #: among those of the answer
    place: InArena | InFile
    memory: memoryview
    missing_bytes: int
    error: Exception | None = None  #: why it cannot be brought


class _Answer(msgspec.Struct):
    """An answer of which values are being brought."""

    values: list[Any]
    errors: list[int]
    object_ids: list[ObjectId]  #: as they were asked for; empty: nobody waits any more
    finish: Callable[[ObjectValues], None]
    request_id: int
    missing: int = 0  #: values


@final
class Downloads:
    """Values on their way here.

    Parameters
    ----------
    send : callable
        Tells the node something; never waits.
    numbers : iterator of int
        Of requests: no other one has these.
    """

    def __init__(self, send: Callable[[Any], None], numbers: Iterator[int]) -> None:
        self._send = send
        self._numbers = numbers
        #: number of a value -> the value.
        self._values: dict[int, _Value] = {}
        #: Pieces to be asked for: of which value, from where on.
        self._wanted: deque[tuple[int, int]] = deque()
        self._under_way = 0

    def begin(
        self,
        reply: ObjectValues,
        object_ids: list[ObjectId],
        finish: Callable[[ObjectValues], None],
    ) -> bool:
        """Bring what an answer names places of, then call `finish`; False: it names none."""
        if all(isinstance(value, bytes) for value in reply.values):
            return False
        answer = _Answer(
            list(reply.values), list(reply.errors), object_ids, finish, reply.request_id
        )
        unreadable: list[int] = []
        for index, place in enumerate(reply.values):
            if isinstance(place, bytes):
                continue
            number = next(self._numbers)
            value = _Value(answer, index, place, memoryview(b""), place.size_bytes)
            self._values[number] = value
            answer.missing += 1
            try:
                value.memory = _memory(place.size_bytes)
            except (MemoryError, OSError, ValueError, OverflowError) as error:
                value.error = MemoryError(
                    f"no memory for a value of {place.size_bytes} bytes: {error}"
                )
                unreadable.append(number)
                continue
            self._wanted.append((number, 0))
        for number in unreadable:
            self._end(number, self._values[number])
        self._ask()
        return True

    def _ask(self) -> None:
        while self._wanted and self._under_way < _UNDER_WAY_MAX:
            number, offset = self._wanted.popleft()
            value = self._values.get(number)
            if value is None:
                continue
            size = min(PIECE_BYTES, value.place.size_bytes - offset)
            self._under_way += 1
            if offset + size < value.place.size_bytes:
                self._wanted.appendleft((number, offset + size))
            self._send(
                ReadPiece(request_id=number, place=value.place, offset=offset, size_bytes=size)
            )

    def take(self, piece: Piece, is_wanted: Callable[[int], bool]) -> None:
        """A piece has come; `is_wanted` tells of a request whether anybody waits for it."""
        self._under_way -= 1
        value = self._values.get(piece.request_id)
        if value is not None:
            size = len(piece.data)
            value.memory[piece.offset : piece.offset + size] = piece.data
            value.missing_bytes -= size
            if piece.failure:
                object_id = value.answer.object_ids[value.index].hex()
                value.error = ObjectLostError(object_id=object_id, reason=piece.failure)
            if piece.failure or not value.missing_bytes:
                self._end(piece.request_id, value)
            elif not is_wanted(value.answer.request_id):
                self._give_up(value.answer)
        self._ask()

    def _end(self, number: int, value: _Value) -> None:
        """All of a value is here, or never will be."""
        del self._values[number]
        answer, index = value.answer, value.index
        self._let_go(value)
        if value.error is not None:
            answer.values[index] = pickle.dumps(value.error)
            answer.errors = sorted({*answer.errors, index})
        else:
            answer.values[index] = value.memory
        answer.missing -= 1
        if not answer.missing:
            answer.finish(
                ObjectValues(
                    request_id=answer.request_id, values=answer.values, errors=answer.errors
                )
            )

    def _give_up(self, answer: _Answer) -> None:
        """Nobody waits for an answer any more."""
        for number, value in list(self._values.items()):
            if value.answer is answer:
                del self._values[number]
                self._let_go(value)

    def _let_go(self, value: _Value) -> None:
        """The node need not keep a value in its place for us."""
        place = value.place
        if isinstance(place, InArena) and not place.node_id:
            self._send(UnpinObjects(object_ids=[value.answer.object_ids[value.index]]))


def pieces_of(
    object_id: ObjectId, serialized: Serialized, note: Callable[[bytes], object] | None
) -> Iterator[WritePiece]:
    """A value as messages that write it.

    Parameters
    ----------
    note : callable or None
        Is given all bytes in order: of what goes to a file a checksum is made.
    """
    offset = 0
    for data in _joined(_parts(serialized.pieces())):
        if note is not None:
            note(data)
        yield WritePiece(object_id=object_id, offset=offset, data=data)
        offset += len(data)


def _parts(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """What is to be written, none larger than one message."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, view.nbytes, PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def _joined(parts: Iterator[memoryview]) -> Iterator[bytes]:
    """The same in messages that are as full as they may be."""
    waiting: list[memoryview] = []
    size = 0
    for part in itertools.chain(parts, [memoryview(b"")]):
        if waiting and (size + part.nbytes > PIECE_BYTES or not part.nbytes):
            yield b"".join(waiting)
            waiting, size = [], 0
        waiting.append(part)
        size += part.nbytes
