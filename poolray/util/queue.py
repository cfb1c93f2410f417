"""`Queue`: a first-in, first-out queue that tasks, actors and the driver share.

What: a handle to an actor in which the items are; it may go anywhere that handles may.
Who calls: user code.
May touch: the public API only.
Invariants: a batch goes in or out as a whole or not at all; what waits, waits in the actor's event
loop, so a queue of thousands of waiting callers takes one process and no thread.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable, Mapping
from typing import Any, final

from poolray.actor import ActorHandle, kill
from poolray.api import cancel, get, remote, wait

__all__ = ["Empty", "Full", "Queue"]

#: Callers that may wait at once. One more than may wait would block the very call that ends a wait.
_WAITERS_MAX = 1_000_000
#: Who gives up a `get` waits so long at the most for that to have its effect.
_GIVE_UP_S = 1.0


@final
class Empty(queue.Empty):
    """There is no item, or there are not enough for the batch."""


@final
class Full(queue.Full):
    """There is no room for an item, or for all of a batch."""


class Queue:
    """A queue that any process of the job may use.

    Parameters
    ----------
    maxsize : int, default 0
        Items that it holds at the most; 0: any number.
    actor_options : dict, optional
        Options of the actor that holds the items, as for `ActorClass.options`: resources, a name…

    Notes
    -----
    A ref that is put at the top is replaced by its value, as in every call of an actor; a ref
    inside of another object stays one. No order is promised among several producers that wait for
    room, or among several consumers that wait for items.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.queue import Empty, Queue
    >>> queue = Queue(maxsize=100)
    >>> @poolray.remote
    ... def produce(queue: Queue, count: int) -> None:
    ...     for number in range(count):
    ...         queue.put(number)
    >>> ref = produce.remote(queue, 3)
    >>> [queue.get(timeout=10) for _ in range(3)]
    [0, 1, 2]
    >>> try:
    ...     queue.get_nowait()
    ... except Empty:
    ...     print("empty")
    empty
    >>> queue.shutdown()
    """

    def __init__(self, maxsize: int = 0, actor_options: Mapping[str, Any] | None = None) -> None:
        options = {"max_concurrency": _WAITERS_MAX, **(actor_options or {})}
        self.maxsize = maxsize
        #: The actor; None after `shutdown`.
        self.actor: ActorHandle[Any] | None = (
            remote(_QueueActor).options(**options).remote(self.maxsize)
        )

    @property
    def _live(self) -> ActorHandle[Any]:
        if self.actor is None:
            raise RuntimeError("This queue has been shut down: make a new Queue.")
        return self.actor

    # ---- size ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The same as `size()`."""
        return self.size()

    def size(self) -> int:
        """How many items there are."""
        return get(self._live.qsize.remote())

    def qsize(self) -> int:
        """The same as `size()`."""
        return self.size()

    def empty(self) -> bool:
        """Whether there are no items."""
        return get(self._live.empty.remote())

    def full(self) -> bool:
        """Whether there is no room."""
        return get(self._live.full.remote())

    # ---- items -----------------------------------------------------------------------------------

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an item, when there is room.

        Parameters
        ----------
        block : bool, default True
            Whether to wait for room.
        timeout : float, seconds, optional
            How long; None: for ever.

        Raises
        ------
        Full
            There is no room, and there was none until the time was up.
        ValueError
            The timeout is negative.
        ActorDiedError
            The queue was shut down by somebody, or its process has died.
        """
        call = self._put_call(item, block, timeout)
        try:
            get(call)
        except KeyboardInterrupt:
            cancel(call)
            raise
        except (queue.Full, asyncio.QueueFull):
            raise Full from None

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """`put`, for coroutines: the event loop goes on meanwhile."""
        call = self._put_call(item, block, timeout)
        try:
            await call
        except asyncio.CancelledError:
            cancel(call)
            raise
        except (queue.Full, asyncio.QueueFull):
            raise Full from None

    def _put_call(self, item: Any, block: bool, timeout: float | None) -> Any:
        if not block:
            return self._live.put_nowait.remote(item)
        _check_timeout(timeout)
        return self._live.put.remote(item, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Remove the oldest item and return it, when there is one.

        Parameters
        ----------
        block : bool, default True
            Whether to wait for an item.
        timeout : float, seconds, optional
            How long; None: for ever.

        Raises
        ------
        Empty
            There is none, and there was none until the time was up.
        ValueError
            The timeout is negative.
        ActorDiedError
            The queue was shut down by somebody, or its process has died.
        """
        call = self._get_call(block, timeout)
        try:
            return get(call)
        except KeyboardInterrupt:
            self._give_up(call)
            raise
        except (queue.Empty, asyncio.QueueEmpty):
            raise Empty from None

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """`get`, for coroutines: the event loop goes on meanwhile."""
        call = self._get_call(block, timeout)
        try:
            return await call
        except asyncio.CancelledError:
            self._give_up(call)
            raise
        except (queue.Empty, asyncio.QueueEmpty):
            raise Empty from None

    def _get_call(self, block: bool, timeout: float | None) -> Any:
        if not block:
            return self._live.get_nowait.remote()
        _check_timeout(timeout)
        return self._live.get.remote(timeout)

    def _give_up(self, call: Any) -> None:
        """Nobody waits for an item any more: the call must not take one for itself."""
        cancel(call)
        # The order to stop may cross with a put of this process, so wait for its end: milliseconds.
        ready, _ = wait([call], timeout=_GIVE_UP_S)
        if not ready:
            return
        try:
            item = get(call)
        except Exception:
            return  # it was stopped before it had one
        self._live.put_back.remote(item)

    def put_nowait(self, item: Any) -> None:
        """`put(item, block=False)`.

        Raises
        ------
        Full
            There is no room.
        """
        self.put(item, block=False)

    def get_nowait(self) -> Any:
        """`get(block=False)`.

        Raises
        ------
        Empty
            There is no item.
        """
        return self.get(block=False)

    # ---- batches ---------------------------------------------------------------------------------

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Add all items, in order, or none.

        Raises
        ------
        Full
            There is no room for all of them.
        TypeError
            That is nothing to iterate over.

        Examples
        --------
        >>> from poolray.util.queue import Queue
        >>> queue = Queue()
        >>> queue.put_nowait_batch(range(5))
        >>> queue.get_nowait_batch(3), queue.size()
        ([0, 1, 2], 2)
        """
        if not isinstance(items, Iterable):
            raise TypeError("Argument 'items' must be an Iterable")
        try:
            get(self._live.put_nowait_batch.remote(list(items)))
        except queue.Full as error:
            raise Full(*_text_of(error)) from None

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Remove so many of the oldest items and return them, in order, or none at all.

        Raises
        ------
        Empty
            There are not enough.
        TypeError, ValueError
            `num_items` is no number, or negative.
        """
        if not isinstance(num_items, int):
            raise TypeError("Argument 'num_items' must be an int")
        if num_items < 0:
            raise ValueError("'num_items' must be nonnegative")
        try:
            return get(self._live.get_nowait_batch.remote(num_items))
        except queue.Empty as error:
            raise Empty(*_text_of(error)) from None

    # ---- end -------------------------------------------------------------------------------------

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the queue's actor; what is in the queue is lost.

        Parameters
        ----------
        force : bool, default False
            At once; else after the calls that it has been sent.
        grace_period_s : float, seconds, default 5
            How long to wait for that, before it is ended by force all the same.
        """
        actor, self.actor = self.actor, None
        if actor is None:
            return
        if not force:
            ready, _ = wait([actor.__ray_terminate__.remote()], timeout=grace_period_s)
            if ready:
                return
        kill(actor, no_restart=True)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")


def _text_of(error: BaseException) -> tuple[Any, ...]:
    """Arguments of the exception as the actor raised it."""
    return getattr(error, "cause", error).args


@final
class _Returned:
    """An item that had left, and goes back to where it was."""

    def __init__(self, item: Any) -> None:
        self.item = item


@final
class _Items(asyncio.Queue[Any]):
    """A queue to which an item can be returned, whether there is room or not."""

    _has_room = False

    def put_back(self, item: Any) -> None:
        self._has_room = True
        try:
            self.put_nowait(_Returned(item))
        finally:
            self._has_room = False

    def full(self) -> bool:
        return not self._has_room and super().full()

    def _put(self, item: Any) -> None:
        if isinstance(item, _Returned):
            self._queue.appendleft(item.item)  # type: ignore[attr-defined]
        else:
            super()._put(item)


class _QueueActor:
    """Where the items are."""

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self.queue = _Items(self.maxsize)

    def qsize(self) -> int:
        return self.queue.qsize()

    def empty(self) -> bool:
        return self.queue.empty()

    def full(self) -> bool:
        return self.queue.full()

    async def put(self, item: Any, timeout: float | None = None) -> None:
        if timeout is None:
            await self.queue.put(item)
            return
        try:
            await asyncio.wait_for(self.queue.put(item), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Full from None

    async def get(self, timeout: float | None = None) -> Any:
        if timeout is None or not self.queue.empty():
            return await self.queue.get()
        try:
            return await asyncio.wait_for(self.queue.get(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Empty from None

    def put_back(self, item: Any) -> None:
        self.queue.put_back(item)

    def put_nowait(self, item: Any) -> None:
        try:
            self.queue.put_nowait(item)
        except asyncio.QueueFull:
            raise Full from None

    def get_nowait(self) -> Any:
        try:
            return self.queue.get_nowait()
        except asyncio.QueueEmpty:
            raise Empty from None

    def put_nowait_batch(self, items: list[Any]) -> None:
        size = self.queue.qsize()
        if self.maxsize > 0 and len(items) + size > self.maxsize:
            raise Full(
                f"Cannot add {len(items)} items to queue of size {size} and maxsize {self.maxsize}."
            )
        for item in items:
            self.queue.put_nowait(item)

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        size = self.queue.qsize()
        if num_items > size:
            raise Empty(f"Cannot get {num_items} items from queue of size {size}.")
        return [self.queue.get_nowait() for _ in range(num_items)]
