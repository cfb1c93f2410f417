"""`ObjectRefGenerator`: what a user holds of the items that a generator yields somewhere else.

What: an iterator, for loops of both kinds, over refs of items.
Who calls: users iterate; `remote_function.py` and `actor.py` make it.
May touch: the node, through the process's client; the caller's event loop.
Invariants: each item is given once and in order; asking whether there is one consumes none. The
finalizer notes what was not taken and returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, final

from poolray.ids import OBJECT_ID_BYTES, ActorId, ObjectId, TaskId, task_of
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.protocol.streams import ItemsTaken, OpenStream, StreamMode, TakeItems, item_id

if TYPE_CHECKING:
    from poolray.client import Client
    from poolray.protocol.values import TaskClass

T = TypeVar("T")

__all__ = ["ObjectRefGenerator"]

#: Items that a generator's handle takes at once.
_BATCH = 128


@final
class ObjectRefGenerator(
    Generator["ObjectRef[T]", None, None], AsyncGenerator["ObjectRef[T]", None]
):
    """An iterator over refs of what a remote generator yields, while it runs.

    `next()` waits for the next item and gives its ref; in an event loop, `async for` does the same
    without blocking the loop. If the generator raises, the ref after its last item is the error's:
    `get` raises it. `wait` takes generators beside refs: one is ready when `next()` would not wait.

    Notes
    -----
    Items that were not taken are let go when the generator is. The task runs on to its end (what
    it yields then is not kept); `cancel(generator)` stops it. A generator belongs to the process
    that made the call: it can be neither passed to tasks nor pickled, the refs it gives can.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... def countdown(n: int):
    ...     while n:
    ...         yield n
    ...         n -= 1
    >>> [poolray.get(ref) for ref in countdown.remote(3)]
    [3, 2, 1]
    """

    __slots__ = (
        "__weakref__",
        "_client",
        "_generator_ref",
        "_given",
        "_has_ended",
        "_lock",
        "_taken",
        "_task_id",
    )

    #: The client that made the call.
    _client: Client
    #: Object 0 of the task: there when the generator has ended.
    _generator_ref: ObjectRef[Any]
    _task_id: TaskId
    #: Guards the fields below.
    _lock: threading.Lock
    #: Items that refs were made of.
    _taken: int
    #: Items that the node gave this process.
    _given: int
    _has_ended: bool  #: there will be no others than those

    def __new__(cls, *_: Any) -> ObjectRefGenerator[T]:
        raise TypeError(
            "ObjectRefGenerator cannot be constructed: it comes from .remote() of a generator "
            "function or method"
        )

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def _id(self) -> ObjectId:
        """The object that is there as soon as `next()` does not wait."""
        return item_id(self._task_id, self._taken)

    def _take(self) -> ObjectRef[T] | None:
        """The next item, if it has come.

        Raises
        ------
        StopIteration
            There are no others.
        """
        with self._lock:
            if self._taken == self._given:
                self._ask(_BATCH)
                if self._taken == self._given:
                    if self._has_ended:
                        raise StopIteration
                    return None
            index = self._taken
            self._taken += 1
            return self._client.own(item_id(self._task_id, index))

    def _ask(self, limit: int) -> None:
        """Hear what has come, and take some of it; under the lock."""
        if self._has_ended:
            return
        client = self._client
        if client.ended:
            raise ValueError(
                f"ObjectRefGenerator({self._task_id.hex()}) {client.ended}, so there are no items "
                "to be had: call its function again."
            )
        client.sync_references()
        given = self._given
        answer: ItemsTaken = client.link.ask(
            lambda number: TakeItems(
                request_id=number, task_id=self._task_id, known=given, limit=limit
            )
        )
        for offset, value in enumerate(answer.values):
            if value is not None:
                client.prefetched[item_id(self._task_id, given + offset)] = value
        self._given = given + answer.count
        self._has_ended = answer.ended

    # ---- iteration -------------------------------------------------------------------------------

    def __iter__(self) -> ObjectRefGenerator[T]:
        return self

    def __next__(self) -> ObjectRef[T]:
        return self._next_sync()

    def _next_sync(self, timeout_s: float | None = None) -> ObjectRef[T]:
        """The next item; a nil ref when the time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            ref = self._take()
            if ref is not None:
                return ref
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._client.link.wait([self._id], 1, left):
                return make_ref(_NIL, self._client)

    def __aiter__(self) -> ObjectRefGenerator[T]:
        return self

    async def __anext__(self) -> ObjectRef[T]:
        return await self._next_async()

    async def _next_async(self, timeout_s: float | None = None) -> ObjectRef[T]:
        """The same in an event loop."""
        import asyncio

        while True:
            try:
                ref = self._take()
            except StopIteration:
                raise StopAsyncIteration from None
            if ref is not None:
                return ref
            try:
                await asyncio.wait_for(self._arrival(), timeout_s)
            except (asyncio.TimeoutError, TimeoutError):
                return make_ref(_NIL, self._client)

    async def _arrival(self) -> None:
        """Until there is an item, or the end."""
        import asyncio

        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def note() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def tell_loop() -> None:
            try:
                loop.call_soon_threadsafe(note)
            except RuntimeError:
                pass  # the loop was closed: nobody waits any more

        forget = self._client.link.when_there(self._id, tell_loop)
        try:
            await arrived
        finally:
            if not arrived.done() or arrived.cancelled():
                forget()

    # ---- questions -------------------------------------------------------------------------------

    def completed(self) -> ObjectRef[Any]:
        """A ref that is ready when the generator has ended.

        Returns
        -------
        ObjectRef
            Its value is None, also if the generator raised (the last item tells); `get` raises if
            the task was cancelled or lost its worker.
        """
        return self._generator_ref

    def next_ready(self) -> bool:
        """Whether `next()` would give a ref without waiting."""
        return not self.is_finished() and bool(self._client.link.wait([self._id], 1, 0))

    def is_finished(self) -> bool:
        """Whether all items have been taken and there will be no others."""
        with self._lock:
            if self._taken == self._given:
                self._ask(0)
            return self._has_ended and self._taken == self._given

    # ---- what generators can do and this one cannot ----------------------------------------------

    def send(self, value: Any) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.send` is not supported.")

    def throw(self, *args: Any) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.throw` is not supported.")

    def close(self) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.close` is not supported.")

    async def asend(self, value: Any) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.asend` is not supported.")

    async def athrow(self, *args: Any) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.athrow` is not supported.")

    async def aclose(self) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("`gen.aclose` is not supported.")

    # ---- as an object ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._task_id.hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "You cannot return or pass a generator to other task. Serializing a "
            "ObjectRefGenerator is not allowed."
        )

    def __del__(self) -> None:
        client = self._client
        client.dropped_streams.append((self._task_id, self._taken, self._given))
        if client.ring_for_streams is not None:
            client.ring_for_streams()


_NIL = ObjectId(bytes(OBJECT_ID_BYTES))
_new = object.__new__


def make_generator(ref: ObjectRef[Any], client: Client) -> ObjectRefGenerator[Any]:
    """A handle to the stream of the task that `ref` is the first object of."""
    made: ObjectRefGenerator[Any] = _new(ObjectRefGenerator)
    made._client = client
    made._generator_ref = ref
    made._task_id = task_of(ref._id)
    made._lock = threading.Lock()
    made._taken = 0
    made._given = 0
    made._has_ended = False
    return made


#: Its name in parts of the reference.
StreamingObjectRefGenerator = ObjectRefGenerator


# ---- calls ---------------------------------------------------------------------------------------


def stream_mode(generates: bool, num_returns: int | str | None) -> StreamMode:
    """What becomes of what a function yields, if it is a generator's."""
    if num_returns == "dynamic":
        return StreamMode.DYNAMIC
    if num_returns == "streaming" or (generates and num_returns is None):
        return StreamMode.ITEMS
    return StreamMode.RETURNS if generates else StreamMode.NONE


def check_mode(generates: bool, num_returns: int | str | None, backpressure: int | None) -> None:
    """Refuse options that only generators have, and those that do not go together.

    Raises
    ------
    ValueError
        The function is no generator's; a limit where nobody takes items.
    """
    check_generates(generates, num_returns)
    if num_returns == "dynamic" and backpressure is not None and backpressure > 0:
        raise ValueError(
            "_generator_backpressure_num_objects cannot be used with num_returns='dynamic': nobody "
            "takes its items before it has ended. Use num_returns='streaming'."
        )


def check_generates(generates: bool, num_returns: int | str | None) -> None:
    """Refuse a word for what becomes of what is yielded where nothing is.

    Raises
    ------
    ValueError
        The function is no generator's.
    """
    if isinstance(num_returns, str) and not generates:
        raise ValueError(
            f"num_returns='{num_returns}' can only be used with generator functions (functions "
            "that use 'yield'). The decorated function is not a generator function."
        )


def check_backpressure(value: int) -> None:
    """Refuse a limit of no items.

    Raises
    ------
    ValueError
        It is 0.
    """
    if value == 0:
        raise ValueError(
            "_generator_backpressure_num_objects=0 is not allowed. Use a value > 0. If the value "
            "is equal to 1, the behavior is identical to Python generator (generator 1 object "
            "whenever `next` is called). Use -1 to disable this feature. "
        )


def check_per_yield(defined: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse another number of items per `yield` than the function was defined with.

    Raises
    ------
    ValueError
        It is another one, or None.
    """
    name = "_num_objects_per_yield"
    if name in given and given[name] != (defined.get(name) or 1):
        raise ValueError(
            f"{name} cannot be overridden per task call. Use @ray.remote({name}=...) instead."
        )


def submit_stream(
    client: Client,
    task_class: TaskClass,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    actor_id: ActorId | None = None,
) -> ObjectRefGenerator[Any] | ObjectRef[Any]:
    """Call a generator; gives its handle, or (DYNAMIC) the ref of the list of its items."""
    opening = OpenStream(
        task_id=TaskId(b""),
        backpressure=task_class.backpressure,
        actor_id=actor_id or ActorId(b""),
        actor_backpressure=task_class.actor_backpressure,
    )
    ref = client.submit(task_class, args, kwargs, actor_id, opening)[0]
    if task_class.stream == StreamMode.DYNAMIC:
        return ref
    return make_generator(ref, client)
