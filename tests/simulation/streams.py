"""Simulated generators: what yields their items, and who reads them.

What: the part of a simulated worker that runs a generator, and the part of a driver that iterates
over one, stops early or drops it.
Who calls: `SimWorker` and `Driver`.
May touch: what they give.
Invariants: a reader is given each item once and in its place, and the end after the last of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from poolray.ids import TaskId
from poolray.protocol.client import WaitObjects
from poolray.protocol.streams import (
    AwaitRoom,
    DropStream,
    ItemsTaken,
    ItemsYielded,
    OpenStream,
    TakeItems,
    Yielded,
    item_id,
)
from poolray.protocol.values import Value
from tests.simulation.jobs import INLINE_MAX_BYTES, Job

if TYPE_CHECKING:
    from tests.simulation.driver import Driver
    from tests.simulation.worker import SimWorker


def yield_items(worker: SimWorker, job: Job, task_id: TaskId, count: int) -> Generator[Any]:
    """A generator runs until it has yielded so many items; it waits for room like a real one."""
    consumed, closed = 0, False
    limit = job.options.backpressure
    for index in range(count):
        if limit and not closed and index - consumed >= limit:
            (room,) = yield from worker.request(
                AwaitRoom(request_id=0, task_id=task_id, produced=index), block=True
            )
            consumed, closed = room.consumed, room.closed
        data: Value = job.value(index + 1)
        if len(data) > INLINE_MAX_BYTES:  # type: ignore[arg-type]
            data = yield from worker.store(data)  # type: ignore[arg-type]
        items = Yielded(task_id=task_id, start=index, values=[data])
        worker.send(ItemsYielded(worker_id=worker.worker_id, items=[items]))
        yield worker.world.between(1e-7, job.duration_s)


@dataclasses.dataclass
class _Reader:
    """A stream as its driver knows it."""

    job: Job
    known: int = 0
    ended: bool = False


class Readers:
    """The streams of a driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._streams: dict[TaskId, _Reader] = {}
        #: Requests for items, and waits for the next item, that were not answered.
        self._takes: dict[int, TaskId] = {}
        self._waits: dict[int, TaskId] = {}
        #: Streams are read to their ends from now on.
        self.is_ending = False

    def open(self, job: Job, task_id: TaskId) -> None:
        """The task that is submitted next is a generator."""
        self._driver.tell(OpenStream(task_id=task_id, backpressure=job.options.backpressure))
        self._streams[task_id] = _Reader(job)
        for index in range(job.options.items + 1):
            self._driver.ledger.job_by_object[item_id(task_id, index)] = (job, index + 1)

    def act(self) -> None:
        """Read some stream on, or drop it."""
        if not self._streams:
            return
        task_id = self._driver.world.random.choice(list(self._streams))
        if self._driver.world.chance(0.15):
            reader = self._streams.pop(task_id)
            self._driver.tell(DropStream(task_id=task_id, taken=reader.known))
        else:
            self._take(task_id)

    def _take(self, task_id: TaskId) -> None:
        reader = self._streams[task_id]
        if reader.ended:
            return
        number = self._driver.next_request()
        self._takes[number] = task_id
        limit = self._driver.world.random.choice([0, 1, 2, 100])
        self._driver.tell(
            TakeItems(request_id=number, task_id=task_id, known=reader.known, limit=limit)
        )

    def on_taken(self, message: ItemsTaken) -> None:
        """Items of a stream."""
        task_id = self._takes.pop(message.request_id)
        reader = self._streams[task_id]
        objects = self._driver.node.node.state.objects
        for offset in range(message.count):
            object_id = item_id(task_id, reader.known + offset)
            self._driver.held[object_id] = None
            value = message.values[offset] if offset < len(message.values) else None
            if value is not None:
                self._driver.ledger.judge(reader.job, reader.known + offset + 1, value, False)
        reader.known += message.count
        reader.ended = message.ended
        if message.ended and reader.known < reader.job.options.items:
            last = objects.get(item_id(task_id, reader.known - 1)) if reader.known else None
            stubborn = reader.job.is_stubborn and reader.job.may_be_cancelled()
            assert stubborn or (last is not None and last.is_error), "items are missing"
        if self.is_ending and not reader.ended:
            if message.count:
                self._take(task_id)
            else:
                self._wait(task_id)

    def _wait(self, task_id: TaskId) -> None:
        number = self._driver.next_request()
        self._waits[number] = task_id
        next_id = item_id(task_id, self._streams[task_id].known)
        self._driver.tell(WaitObjects(request_id=number, object_ids=[next_id], count=1))

    def on_there(self, request_id: int) -> bool:
        """Whether this was a wait for the next item of a stream, which is read on."""
        task_id = self._waits.pop(request_id, None)
        if task_id is not None:
            self._take(task_id)
        return task_id is not None

    def read_to_the_end(self) -> None:
        """Take all that will come."""
        self.is_ending = True
        for task_id in list(self._streams):
            self._take(task_id)

    def waits(self) -> bool:
        """Whether some stream has not ended."""
        return any(not reader.ended for reader in self._streams.values())

    def describe(self) -> list[str]:
        """What it waits for."""
        return [
            f"stream {task_id!r}: job {reader.job.key!r}, {reader.known} items"
            for task_id, reader in self._streams.items()
            if not reader.ended
        ]

    def drop_all(self) -> None:
        """Let go of all of them."""
        for task_id, reader in self._streams.items():
            self._driver.tell(DropStream(task_id=task_id, taken=reader.known))
        self._streams.clear()
