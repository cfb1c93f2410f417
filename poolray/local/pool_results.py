"""Results of a Pool: what `apply_async`, `map_async` and `imap` give.

What: outcomes of calls, kept until they are taken; callbacks; iteration in order or as they come.
Who calls: `pool.py` makes them, users hold them.
May touch: nothing by itself.
Invariants: a result is set exactly once; callbacks have run before a waiter goes on.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import threading
import time
import types
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, final

from poolray.local.calls import CallGroup, split_error
from poolray.local.feed import Feed
from poolray.local.reactor import Waitable
from poolray.local.runtime import LocalRuntime
from poolray.protocol.values import Outcome

if TYPE_CHECKING:
    from poolray.local.progress import ProgressBar

R = TypeVar("R")


class ResultOwner(Protocol):
    """What results need of their pool."""

    _cache: dict[int, Any]
    _group: CallGroup
    _runtime: LocalRuntime

    def _wait(self, waited: Waitable, timeout: float | None) -> None: ...

    def _on_idle(self) -> None: ...

    def _abandon(self, result: Any) -> None: ...


def exception_of(error: Any) -> BaseException:
    """The exception to raise for a failed call, with the remote traceback as its cause."""
    exception, text, unpicklable = split_error(error)
    if unpicklable is not None:
        made = multiprocessing.pool.MaybeEncodingError(exception, "")  # type: ignore[attr-defined]
        made.value = unpicklable
        made.args = (made.exc, made.value)
        exception = made
    elif text is not None:
        exception.__cause__ = multiprocessing.pool.RemoteTraceback(  # type: ignore[attr-defined]
            f'\n"""\n{text}"""'
        )
    return exception


class ApplyResult(Waitable, Generic[R]):
    """The result of `apply_async`, to come.

    Notes
    -----
    As in the standard library `AsyncResult` is another name of this class.
    """

    __slots__ = (
        "_callback",
        "_error_callback",
        "_pool",
        "_success",
        "_value",
    )

    def __init__(
        self,
        pool: ResultOwner,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self.done = False  # as `Waitable.__init__`, whose call is a part of the cost of a call
        self.sleepers = None
        self._pool = pool
        self._callback = callback
        self._error_callback = error_callback
        self._success = False
        self._value: Any = None

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self.done

    def successful(self) -> bool:
        """Whether it ended without an exception.

        Raises
        ------
        ValueError
            It has not ended.
        """
        if not self.done:
            raise ValueError(f"{self!r} not ready")
        return self._success

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for `timeout` seconds."""
        if not self.done:
            self._pool._wait(self, timeout)

    def get(self, timeout: float | None = None) -> R:
        """The value of the call.

        Parameters
        ----------
        timeout : float, seconds, optional
            None waits for ever.

        Raises
        ------
        multiprocessing.TimeoutError
            The time is up.
        Exception
            What the call raised, with the remote traceback as its cause.
        """
        if not self.done:
            self._pool._wait(self, timeout)
            if not self.done:
                raise multiprocessing.TimeoutError
        if self._success:
            value: R = self._value
            return value
        try:
            raise self._value
        finally:
            self = None  # type: ignore[assignment] # no cycle through the traceback

    def on_result(self, result: bytes | Outcome) -> None:
        """The call has ended."""
        try:
            success, value = self._pool._group.load(result)
        except Exception as error:  # the value does not load here
            success, value = False, error
        if not success:
            value = exception_of(value)
        self._set(success, value)

    def _set(self, success: bool, value: Any) -> None:
        """Keep the outcome, run the callback, wake who waits."""
        if self.done or self._pool._cache.pop(id(self), None) is None:
            return
        self._success = success
        self._value = value
        callback = self._callback if success else self._error_callback
        if callback is None:
            self.finish()
            self._pool._on_idle()
        else:
            self._callback = self._error_callback = None
            self._pool._runtime.callbacks.run(lambda: self._call_back(callback, value))

    def _call_back(self, callback: Callable[[Any], object], value: Any) -> None:
        # The standard Pool loses its result thread when a callback raises; the exception is shown,
        # and the result arrives all the same.
        try:
            callback(value)
        finally:
            self.finish()
            self._pool._runtime.reactor.wake()
            self._pool._on_idle()

    __class_getitem__: Any = classmethod(types.GenericAlias)


AsyncResult = ApplyResult


@final
class MapResult(ApplyResult[list[Any]]):
    """The result of `map_async` and its kin, to come."""

    __slots__ = ("_chunksize", "_left")

    def __init__(
        self,
        pool: ResultOwner,
        chunksize: int,
        length: int,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        super().__init__(pool, callback, error_callback)
        self._success = True
        self._value = [None] * length
        self._chunksize = chunksize
        self._left = -(-length // chunksize) if chunksize > 0 else 0
        if self._left == 0:
            if callback is not None and chunksize > 0:
                pool._runtime.callbacks.run(lambda: self._call_back(callback, self._value))
            else:
                self.finish()

    def on_chunk(self, index: int, success: bool, value: Any) -> None:
        """The outcome of one chunk; the first failure is the map's."""
        if success:
            if self._success:
                start = index * self._chunksize
                self._value[start : start + self._chunksize] = value
        elif self._success:
            self._success = False
            self._value = exception_of(value)
        self._left -= 1
        if self._left == 0:
            self._set(self._success, self._value)


class IMapIterator(Generic[R]):
    """Results of `imap`, in the order of the input.

    Examples
    --------
    >>> from poolray import Pool
    >>> with Pool(2) as pool:
    ...     list(pool.imap(abs, [-1, -2]))
    [1, 2]
    """

    _ordered = True

    def __init__(
        self,
        pool: ResultOwner,
        feed: Feed,
        unpack: bool,
        bar: ProgressBar | None = None,
        chunksize: int = 1,
        items: int | None = None,
    ) -> None:
        self._pool = pool
        self._feed = feed
        #: Whether a chunk's values are handed out one by one.
        self._unpack = unpack
        self._lock = threading.Lock()
        #: Outcomes that can be handed out, in order: (chunk index or -1, success, value).
        self._items: deque[tuple[int, bool, Any]] = deque()
        #: Chunk index -> outcome that came before its turn.
        self._early: dict[int, tuple[bool, Any]] = {}
        self._next_index = 0
        self._taken = 0
        self._length: int | None = None
        self._arrived = 0
        self._waiter: Waitable | None = None
        self._stopped: BaseException | None = None
        feed.on_chunk = self._on_chunk
        feed.on_exhausted = self._on_exhausted
        if bar is not None:
            feed.on_chunk = bar.watching(self._on_chunk, chunksize, items)
            feed.on_exhausted = bar.expecting(self._on_exhausted, chunksize)
        pool._cache[id(self)] = self
        try:
            feed.start()
        except BaseException:
            feed.stop()
            pool._abandon(self)
            raise

    def __iter__(self) -> IMapIterator[R]:
        return self

    def next(self, timeout: float | None = None) -> R:
        """The next result.

        Raises
        ------
        multiprocessing.TimeoutError
            None came within `timeout` seconds.
        StopIteration
            There is none left.
        Exception
            What the call raised; the iteration can go on after it.
        """
        item = self._pop(timeout)
        index, success, value = item
        if index >= 0:
            self._feed.consumed(index)
        if success:
            result: R = value
            return result
        raise exception_of(value)

    __next__ = next

    def _pop(self, timeout: float | None) -> tuple[int, bool, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return self._items.popleft()
            except IndexError:
                pass
            with self._lock:
                if self._items:
                    continue
                if self._length is not None and self._arrived >= self._length:
                    raise StopIteration
                if self._stopped is not None:
                    raise self._stopped
                waiter = self._waiter = Waitable()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise multiprocessing.TimeoutError
            self._pool._wait(waiter, left)
            late = deadline is not None and time.monotonic() >= deadline
            if late and not waiter.done and not self._items:
                raise multiprocessing.TimeoutError

    def lift_window(self) -> None:
        """The pool is being joined: read and run the whole input, keep all results."""
        self._feed.lift_window()

    def _on_chunk(self, index: int, success: bool, value: Any) -> None:
        with self._lock:
            if self._ordered:
                self._early[index] = (success, value)
                while self._next_index in self._early:
                    self._append(self._next_index, *self._early.pop(self._next_index))
                    self._next_index += 1
            else:
                self._append(index, success, value)
            self._wake()
            complete = self._length is not None and self._arrived >= self._length
        if complete:
            self._complete()

    def _complete(self) -> None:
        """All results have come, though not all have been taken."""
        self._feed.detach()
        self._pool._cache.pop(id(self), None)
        self._pool._on_idle()

    def _append(self, index: int, success: bool, value: Any) -> None:
        self._arrived += 1
        if not success or not self._unpack:
            self._items.append((index, success, value[0] if success else value))
            return
        last = len(value) - 1
        for position, item in enumerate(value):
            self._items.append((index if position == last else -1, True, item))

    def _on_exhausted(self, count: int) -> None:
        with self._lock:
            self._length = count
            self._wake()
            complete = self._arrived >= count
        if complete:
            self._complete()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and (
            self._items or (self._length is not None and self._arrived >= self._length)
        ):
            self._waiter = None
            waiter.finish()
            self._pool._runtime.reactor.wake_if_other()

    def _set(self, success: bool, value: Any) -> None:
        """The pool has ended: what has come can be taken, then this error is raised."""
        with self._lock:
            self._stopped = value
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.finish()
            self._pool._runtime.reactor.wake()

    __class_getitem__: Any = classmethod(types.GenericAlias)


@final
class IMapUnorderedIterator(IMapIterator[R]):
    """Results of `imap_unordered`, as they come."""

    _ordered = False
