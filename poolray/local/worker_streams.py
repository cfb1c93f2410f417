"""Generators in a worker: what they yield goes to the node while they run.

    generator ──item──▶ serialized ──▶ buffer ──ItemsYielded──▶ report channel
                                         ▲ at most about a millisecond; a thread sees to stragglers
What: advances generators of tasks, of actors' methods and asynchronous ones, sends their items,
waits where back-pressure asks for it.
Who calls: `local/worker.py` with the generator that a call returned; `local/actor_worker.py`.
May touch: sockets, one thread while a fast generator runs.
Invariants: the items of a task are sent in order, and before its result; an item that refers to
other objects is sent before its value is let go.
"""

from __future__ import annotations

import inspect
import threading
import time
from _thread import allocate_lock, start_new_thread
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, final

from poolray.ids import ObjectId, TaskId
from poolray.local import process_state
from poolray.objects.ref_list import ItemList
from poolray.objects.serialization import Serialized
from poolray.protocol.streams import (
    AwaitRoom,
    ItemsYielded,
    RoomGranted,
    StreamMode,
    Yielded,
    item_id,
)
from poolray.protocol.values import InArena, InFile, Outcome

if TYPE_CHECKING:
    from poolray.local.worker import Worker
    from poolray.local.worker_functions import Function
    from poolray.protocol.worker import TaskCall

#: Items are sent early when they add up to this much.
_FLUSH_BYTES = 64 * 1024
#: Rounds in which nothing was yielded after which the thread sleeps until something is.
_IDLE_ROUNDS = 20

#: What a generator that is over gives.
END: Any = object()
_ITEMS, _RETURNS, _DYNAMIC = StreamMode.ITEMS, StreamMode.RETURNS, StreamMode.DYNAMIC


@final
class ItemBuffer:
    """Items on their way to the node: the first leaves at once, those after it together.

    A generator cannot be asked to come back in a millisecond, so a thread sends what has been
    waiting for that long. It sleeps unless items came lately.
    """

    def __init__(self, worker: Worker, delay_s: float) -> None:
        self._worker = worker
        self._delay_s = delay_s
        self._delay_ns = int(delay_s * 1e9)
        #: Guards all fields, and sending.
        self._lock = threading.RLock()
        #: Items not sent yet, by task and in order.
        self._items: list[_Batch] = []
        self._bytes = 0
        self._sent_ns = 0
        #: A thread looks after stragglers; it waits for the bell while there are none.
        self._has_thread = False
        self._is_watching = False
        self._bell = allocate_lock()

    def add(
        self,
        task_id: TaskId,
        index: int,
        value: bytes | InArena | InFile,
        contained: list[ObjectId],
        is_error: bool = False,
    ) -> None:
        """One more item of a task, behind those before it."""
        size = len(value) if isinstance(value, bytes) else 128
        with self._lock:
            if self._bytes and self._bytes + size > _FLUSH_BYTES:
                self._send()
            batch = self._items[-1] if self._items else None
            if batch is None or batch.task_id != task_id or batch.is_error:
                batch = _Batch(task_id, index)
                self._items.append(batch)
            batch.values.append(value)
            batch.contained.append(contained)
            batch.has_inner = batch.has_inner or bool(contained)
            batch.is_error = is_error
            self._bytes += size
            if contained or time.perf_counter_ns() - self._sent_ns > self._delay_ns:
                self._send()
            elif not self._is_watching:
                self._watch()

    def flush(self) -> None:
        """Send all there is."""
        with self._lock:
            if self._items:
                self._send()

    def _send(self) -> None:
        """The caller holds the lock."""
        items = [batch.message() for batch in self._items]
        self._items = []
        self._bytes = 0
        worker = self._worker
        worker.send(worker.encode(ItemsYielded(worker_id=worker.worker_id, items=items)))
        self._sent_ns = time.perf_counter_ns()

    def _watch(self) -> None:
        """See to it that somebody sends what waits; the caller holds the lock."""
        self._is_watching = True
        if self._has_thread:
            self._bell.release()
        else:
            self._has_thread = True
            self._bell.acquire()
            start_new_thread(self._run, ())

    def _run(self) -> None:
        from poolray.local.worker import ToldToExit

        idle = 0
        while True:
            time.sleep(self._delay_s)
            with self._lock:
                if self._items:
                    idle = 0
                    if time.perf_counter_ns() - self._sent_ns > self._delay_ns:
                        try:
                            self._send()
                        except ToldToExit:
                            return  # the node is gone; the main thread will see it too
                    continue
                idle += 1
                if idle < _IDLE_ROUNDS:
                    continue
                self._is_watching = False
            idle = 0
            self._bell.acquire()


@final
class _Batch:
    """Consecutive items of one task."""

    __slots__ = ("contained", "has_inner", "is_error", "start", "task_id", "values")

    def __init__(self, task_id: TaskId, start: int) -> None:
        self.task_id = task_id
        self.start = start
        self.values: list[bytes | InArena | InFile] = []
        self.contained: list[list[ObjectId]] = []
        self.has_inner = False
        self.is_error = False

    def message(self) -> Yielded:
        return Yielded(
            task_id=self.task_id,
            start=self.start,
            values=self.values,
            contained=self.contained if self.has_inner else [],
            is_error=self.is_error,
        )


@final
class _Source:
    """One generator that runs: what it has yielded, and whether it may go on."""

    __slots__ = (
        "_asks",
        "_consumed",
        "_limit",
        "closed",
        "kept",
        "last",
        "mode",
        "per_yield",
        "produced",
        "returns",
        "task",
    )

    def __init__(self, task: TaskCall, function: Function) -> None:
        task_class = function.task_class
        self.task = task
        self.mode = task_class.stream
        #: Items in what it yields at once.
        #: Items in what is yielded at once; as in the reference only of what streams.
        self.per_yield = task_class.per_yield if self.mode == _ITEMS else 1
        #: Return values that it has to make (RETURNS).
        self.returns = task_class.num_returns
        #: Items that it has yielded.
        self.produced = 0
        #: The last return value, held back until the generator has ended (RETURNS).
        self.last: tuple[bytes | InArena | InFile, list[ObjectId]] | None = None
        #: Its value: what it refers to is held until it is sent.
        self.kept: Any = None
        self._consumed = 0
        self._limit = task_class.backpressure
        #: It shares a limit with others: only the node knows whether there is room.
        self._asks = task_class.actor_backpressure > 0
        #: Nobody wants its items any more.
        self.closed = False

    def must_ask(self) -> bool:
        """Whether the node has to be asked before it goes on."""
        return not self.closed and (self._asks or 0 < self._limit <= self.produced - self._consumed)

    def on_room(self, answer: RoomGranted) -> None:
        self._consumed = answer.consumed
        self.closed = answer.closed


@final
class WorkerStreams:
    """The generators of a worker."""

    def __init__(self, worker: Worker, delay_s: float) -> None:
        self._worker = worker
        self._buffer = ItemBuffer(worker, delay_s)

    def run(self, generator: Any, task: TaskCall, function: Function) -> Outcome:
        """Advance a generator to its end, on the thread of its call.

        Raises
        ------
        BaseException
            What it raised, or what an item's serialization did; all items before have been sent.
        """
        worker = self._worker
        is_main = worker.runs_on_this_thread()
        if is_main:
            worker.flush_before_stream()
        source = _Source(task, function)
        items = iter(generator)
        try:
            while True:
                if source.must_ask():
                    self._buffer.flush()
                    source.on_room(self._await_room(source, is_main))
                if self._is_cancelled(is_main):
                    return self._stop(source, items, function)
                value = worker.advance(items) if is_main else next(items, END)
                if self._is_cancelled(is_main):
                    return self._stop(source, items, function)
                if value is END:
                    return self._end(source, function)
                if source.per_yield == 1:
                    self._take(source, value, function)
                else:
                    self._take_group(source, value, function)
                value = None
        except BaseException as error:
            worker.leave_user_code(is_main)
            _close(items)
            return self._give_up(source, error, function)

    async def run_async(self, generator: Any, task: TaskCall, function: Function) -> Outcome:
        """The same in an actor's event loop, for both kinds of generators."""
        import asyncio

        source = _Source(task, function)
        is_async = isinstance(generator, AsyncIterator)
        items: Any = generator if is_async else iter(generator)
        try:
            while True:
                if source.must_ask():
                    self._buffer.flush()
                    source.on_room(await self._room_in_loop(source))
                if is_async:
                    value = await anext(items, END)
                else:
                    value = next(items, END)
                    await asyncio.sleep(0)  # others have their turn
                if value is END:
                    return self._end(source, function)
                if source.per_yield == 1:
                    self._take(source, value, function)
                else:
                    self._take_group(source, value, function)
                value = None
        except BaseException as error:
            if inspect.isasyncgen(items):
                await items.aclose()
            else:
                _close(items)
            return self._give_up(source, error, function)

    # ---- steps -----------------------------------------------------------------------------------

    def _await_room(self, source: _Source, is_main: bool) -> RoomGranted:
        worker = self._worker
        if is_main:
            worker.enter_user_code()  # a task that waits may be interrupted
        answer = worker.client.link.await_room(source.task.task_id, source.produced)
        worker.leave_user_code(is_main)
        return answer

    async def _room_in_loop(self, source: _Source) -> RoomGranted:
        import asyncio

        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[Any] = loop.create_future()

        def note(answer: Any) -> None:
            if not arrival.done():
                arrival.set_result(answer)

        def tell_loop(parts: list[Any]) -> None:
            loop.call_soon_threadsafe(note, parts[0])

        forget = self._worker.client.link.when_answered(
            lambda number: AwaitRoom(
                request_id=number, task_id=source.task.task_id, produced=source.produced
            ),
            tell_loop,
        )
        try:
            answer: RoomGranted = await arrival
        finally:
            if not arrival.done() or arrival.cancelled():
                forget()
        return answer

    def _is_cancelled(self, is_main: bool) -> bool:
        """Calls of actors are not interrupted, and look between two items."""
        if is_main:
            return self._worker.is_call_cancelled
        return process_state.is_current_task_cancelled()

    def _stop(self, source: _Source, items: Any, function: Function) -> Outcome:
        """The call was cancelled: what it has not given yet, it gives no more."""
        from poolray.local.actor_reports import cancelled_outcome

        _close(items)
        self._buffer.flush()
        return cancelled_outcome(source.task.task_id, function.task_class.name)

    def _take_group(self, source: _Source, values: Any, function: Function) -> None:
        """The same for what is several items."""
        count = source.per_yield
        if not isinstance(values, (tuple, list)) or len(values) != count:
            found = f"{len(values)} of them" if isinstance(values, (tuple, list)) else repr(values)
            raise ValueError(
                f"{function.task_class.name} was defined with _num_objects_per_yield={count}: it "
                f"has to yield tuples or lists of {count} objects, not {found[:200]}"
            )
        for value in values:
            self._take(source, value, function)

    def _take(self, source: _Source, value: Any, function: Function) -> None:
        """Serialize an item and send it, with others or alone."""
        index = source.produced
        if source.mode == _RETURNS and not source.returns:
            return  # it is run for what it does
        if source.mode == _RETURNS and index >= source.returns:
            raise ValueError(
                f"Task yielded more than {source.returns} objects, but "
                f"num_returns={source.returns}."
            )
        source.produced = index + 1
        if source.closed:
            return
        place, contained = self._place(function.serializer.dumps_flat(value))
        if source.mode == _RETURNS and index == source.returns - 1:
            source.last = (place, contained)  # it is an error if one more comes
            source.kept = value
        else:
            self._buffer.add(source.task.task_id, index, place, contained)

    def _place(self, data: bytes | Serialized) -> tuple[bytes | InArena | InFile, list[ObjectId]]:
        """Where the reader of an item finds it, and what it refers to.

        A large item is written under a name of its own: an earlier attempt may have yielded it.
        """
        size = len(data) if isinstance(data, bytes) else data.size_bytes
        contained = [] if isinstance(data, bytes) else data.refs
        client = self._worker.client
        if size > self._worker.inline_max_bytes:
            return client.store(client.next_object_id(), data), contained
        return (data if isinstance(data, bytes) else data.to_bytes()), contained

    def _end(self, source: _Source, function: Function) -> Outcome:
        """The generator is over: what stands for it as a whole."""
        task_id = source.task.task_id
        if source.mode == _RETURNS:
            if source.produced < source.returns:
                raise ValueError(
                    f"Task returned {source.produced} objects, but num_returns={source.returns}."
                )
            if source.last is not None:
                self._buffer.add(task_id, source.returns - 1, *source.last)
        self._buffer.flush()
        if source.mode != _DYNAMIC:
            return Outcome(values=[])
        ids = [item_id(task_id, index) for index in range(source.produced)]
        place, contained = self._place(function.serializer.dumps_flat(ItemList(ids)))
        return Outcome(values=[place], contained=[contained])

    def _give_up(self, source: _Source, error: BaseException, function: Function) -> Outcome:
        """It raised; of a list of items the error is the last, if nothing is tried again."""
        worker = self._worker
        if source.mode == _DYNAMIC and isinstance(error, Exception):
            outcome = worker.outcomes.raised(error, source.task, function)
            if not outcome.retriable:
                index = source.produced
                source.produced += 1
                self._buffer.add(source.task.task_id, index, outcome.values[0], [], is_error=True)
                return self._end(source, function)
        self._buffer.flush()
        raise error


def _close(generator: Any) -> None:
    """Let a generator that will not be advanced any more clean up."""
    close = getattr(generator, "close", None)
    if close is not None:
        close()
