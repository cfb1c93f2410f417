"""Input of a Pool's maps: chunks on their way to the workers, a window of them at a time.

What: reads, serializes and sends chunks as far ahead as the window allows.
Who calls: `pool.py` and the iterators of `local/pool_results.py`.
May touch: threads, for inputs that may block.
Invariants: each chunk is told to its owner exactly once; what is open never exceeds the window by
more than one chunk.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, final

from poolray.local.calls import CallGroup, CallStream
from poolray.local.runtime import LocalRuntime
from poolray.objects.serialization import Serialized
from poolray.protocol.values import Outcome

#: Iterables that cannot block or run user code when they are advanced: any thread may do it.
PASSIVE = (list, tuple, range, str, bytes, bytearray, dict, set, frozenset, deque)


#: The state of a pool that was terminated.
TERMINATED = "TERMINATE"


class FeedOwner(Protocol):
    """What a feed needs of its pool."""

    _group: CallGroup
    _runtime: LocalRuntime
    _processes: int
    _state: str


class Feed:
    """Sends chunks of an input to the workers, a window of them at a time.

    A window bounds memory: results that nobody has taken count as well. Passive inputs (lists,
    ranges) are advanced by whichever thread delivers results; generators, which may block or run
    for long, by a thread of their own.
    """

    def __init__(
        self,
        pool: FeedOwner,
        stream: CallStream,
        chunks: Iterator[list[Any]],
        passive: bool,
        chunksize: int = 1,
        failure: BaseException | None = None,
    ) -> None:
        self._pool = pool
        #: Why no chunk can be sent (the function does not pickle): each fails with it.
        self._failure = failure
        self._group = pool._group
        self._stream = stream
        self._chunks = chunks
        self._passive = passive
        config = pool._runtime.config
        self._window_calls = max(2 * pool._processes, config.imap_window_items // chunksize)
        self._window_bytes = config.imap_window_bytes
        #: Guards the fields below, and the input.
        self._lock = threading.Lock()
        self._next = 0
        self._open_calls = 0
        self._open_bytes = 0
        #: Chunk index -> bytes of its arguments, while it counts.
        self._sizes: dict[int, int] = {}
        self._exhausted = False
        self._room = threading.Event()
        self._thread: threading.Thread | None = None

    # What the owner of the results is told; set by it.
    on_chunk: Callable[[int, bool, Any], None]
    on_exhausted: Callable[[int], None] = staticmethod(lambda count: None)

    def start(self) -> None:
        """Send a first window."""
        if self._passive:
            self.fill()
            return
        self._thread = threading.Thread(target=self._run, name="poolray-feeder", daemon=True)
        self._thread.start()

    def consumed(self, index: int) -> None:
        """The result of a chunk has been taken (or needs no room)."""
        with self._lock:
            self._open_calls -= 1
            self._open_bytes -= self._sizes.pop(index, 0)
        if self._exhausted:
            return
        # Refilled by halves: a batch costs the same for one chunk as for hundreds.
        if self._open_calls * 2 > self._window_calls or self._open_bytes * 2 > self._window_bytes:
            return
        if self._passive:
            self.fill()
        else:
            self._room.set()

    def detach(self) -> None:
        """All results have come. The owner and this object know each other: without an end to
        that, arrays among the results would keep their shared memory until a garbage collection.
        """
        self.on_chunk = _ignore
        self.on_exhausted = _ignore

    def stop(self) -> None:
        """Read no more."""
        self._exhausted = True
        self._room.set()

    def lift_window(self) -> None:
        """Read on to the end, whether results are taken or not."""
        self._window_calls = self._window_bytes = 1 << 62
        if self._passive:
            self.fill()
        else:
            self._room.set()

    def fill(self) -> None:
        """Send chunks while the window has room."""
        guard = self._pool._runtime.guard
        while not self._exhausted and self._has_room():
            guard.enter()  # what has been read and numbered must be sent
            try:
                if not self._lock.acquire(False):
                    return  # another thread is at it
                try:
                    payloads, indexes = self._read_some()
                finally:
                    self._lock.release()
                self._send(payloads, indexes)
            finally:
                guard.leave()

    def _has_room(self) -> bool:
        return self._open_calls < self._window_calls and self._open_bytes < self._window_bytes

    def _read_some(self) -> tuple[list[bytes | Serialized | BaseException], list[int]]:
        """Read and serialize up to a batch of chunks; the caller holds the lock."""
        payloads: list[bytes | Serialized | BaseException] = []
        indexes: list[int] = []
        while self._has_room() and len(payloads) < _FEED_BATCH:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                self._end()
                break
            except BaseException as error:
                # The input itself failed: its error takes the place of the next item, and what
                # was read before is worked off.
                payloads.append(error)
                self._take_index(indexes, 0)
                self._end()
                break
            if self._take(chunk, payloads, indexes) > _FEED_BYTES:
                break
        return payloads, indexes

    def _take(
        self,
        chunk: list[Any],
        payloads: list[bytes | Serialized | BaseException],
        indexes: list[int],
    ) -> int:
        """Serialize a chunk and give it its number; gives its bytes."""
        size = 0
        data: bytes | Serialized | BaseException
        try:
            if self._failure is not None:
                raise self._failure
            data = self._group.dumps(chunk)
        except BaseException as error:
            data = error
        else:
            size = len(data) if isinstance(data, bytes) else data.size_bytes
        payloads.append(data)
        self._take_index(indexes, size)
        return size

    def _take_index(self, indexes: list[int], size: int) -> None:
        index = self._next
        self._next += 1
        self._open_calls += 1
        self._open_bytes += size
        if size:
            self._sizes[index] = size
        indexes.append(index)

    def _end(self) -> None:
        self._exhausted = True
        self.on_exhausted(self._next)

    def _send(self, payloads: list[bytes | Serialized | BaseException], indexes: list[int]) -> None:
        inline_max = self._pool._runtime.config.inline_max_bytes
        plain: list[bytes] = []
        receivers: list[Any] = []
        for payload, index in zip(payloads, indexes, strict=True):
            if isinstance(payload, bytes) and len(payload) <= inline_max:
                plain.append(payload)
                receivers.append(_ChunkReceiver(self, index))
            elif isinstance(payload, BaseException):
                self.on_chunk(index, False, payload)
            else:
                self._send_large(payload, index)
        if plain:
            self._stream.add_many(plain, receivers)

    def _send_large(self, payload: bytes | Serialized, index: int) -> None:
        try:
            self._stream.add_large(payload, _ChunkReceiver(self, index))
        except Exception as error:  # no room anywhere: the chunk fails, the others go on
            self.on_chunk(index, False, error)

    def _run(self) -> None:
        """The thread of an input that may block."""
        while not self._exhausted and self._pool._state != TERMINATED:
            if self._has_room():
                self._feed_one()
                continue
            self._room.clear()
            if not self._has_room():
                self._room.wait(1.0)
        self._chunks = iter(())

    def _feed_one(self) -> None:
        """Read one chunk, without the lock: reading may block while results are consumed."""
        try:
            chunk = next(self._chunks)
        except StopIteration:
            with self._lock:
                self._end()
            return
        except BaseException as raised:
            with self._lock:
                index = self._next
                self._take_index([], 0)
                self._end()
            self.on_chunk(index, False, raised)
            return
        payloads: list[bytes | Serialized | BaseException] = []
        indexes: list[int] = []
        with self._lock:
            self._take(chunk, payloads, indexes)
        payload, index = payloads[0], indexes[0]
        if isinstance(payload, bytes) and len(payload) <= self._group.inline_max_bytes:
            self._stream.add(payload, _ChunkReceiver(self, index))
        else:
            self._send(payloads, indexes)


def _ignore(*_: object) -> None:
    """Nobody listens any more."""


_FEED_BATCH = 512
_FEED_BYTES = 1 << 20


@final
class _ChunkReceiver:
    """Takes the result of one chunk."""

    __slots__ = ("_feed", "_index")

    def __init__(self, feed: Feed, index: int) -> None:
        self._feed = feed
        self._index = index

    def on_result(self, result: bytes | Outcome) -> None:
        feed = self._feed
        try:
            success, value = feed._group.load(result)
        except Exception as error:
            success, value = False, error
        feed.on_chunk(self._index, success, value)


def chunks_of(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` consecutive items."""
    if isinstance(items, (list, tuple)):
        if size == 1:
            return map(_single, items)
        return (list(items[start : start + size]) for start in range(0, len(items), size))
    if size == 1:
        return map(_single, items)
    return _chunks_of_iterator(iter(items), size)


def _chunks_of_iterator(iterator: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _single(item: Any) -> list[Any]:
    return [item]
