"""What is in a packet: the calls, and what the worker has to learn before it can run them.

What: fills packets from queues, and takes calls out of packets that were not read or not begun.
Who calls: `node/dispatch.py`, which decides whose turn it is; `node/actor_calls.py` for the values
of arguments.
May touch: nothing.
Invariants: a packet's tasks are RUNNING and name the worker and the packet; `packet.calls` counts
those that are neither taken nor handed back; what a packet pins is let go with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import FunctionId, ObjectId
from poolray.node.state import NodeState
from poolray.node.workers import Packet, WorkerRecord
from poolray.protocol.values import FunctionDefinition, TaskClass, Value
from poolray.protocol.worker import ClassDefinition, TaskCall
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import RUNNING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.tasks import Tasks


#: Values of refs among the arguments of a call that go along in its packet, which has to fit what
#: the system takes at once (some 400 KiB, where nobody has allowed more).
_ARGUMENTS_BYTES_MAX = 256 << 10


@final
class News:
    """What a worker is told with a packet."""

    __slots__ = ("classes", "forget", "functions")

    def __init__(
        self,
        classes: list[ClassDefinition],
        functions: list[FunctionDefinition],
        forget: list[FunctionId],
    ) -> None:
        self.classes = classes
        self.functions = functions
        self.forget = forget


@final
class Packets:
    """What goes into packets, and comes out of them again."""

    __slots__ = ("_state", "_tasks")

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks

    def introduce(
        self, worker: WorkerRecord, packet: Packet, task_class: TaskClass
    ) -> tuple[int, News]:
        """What a worker has to learn before it can run calls of a class, and the class's index."""
        news = News([], [], [])
        index = worker.class_indexes.get(task_class.class_id)
        if index is None:
            if worker.free_indexes:
                index = worker.free_indexes.pop()
            else:
                index = worker.next_class_index
                worker.next_class_index += 1
            worker.class_indexes[task_class.class_id] = index
            packet.defines_class = True
            devices = self._state.resources.ids_of(worker.devices) if worker.devices else {}
            definition = ClassDefinition(index=index, task_class=task_class, devices=devices)
            news.classes.append(definition)
        function_id = task_class.function_id
        if function_id and function_id not in worker.functions:
            worker.functions[function_id] = None
            packet.functions = [function_id]
            news.functions.append(self._tasks.definition(function_id))
            if function_id in worker.forget:
                worker.forget.remove(function_id)
        if worker.forget:
            packet.forget, worker.forget = worker.forget, []
            news.forget.extend(packet.forget)
        return index, news

    def fill(
        self, worker: WorkerRecord, packet: Packet, queue: ClassQueue, limit: int, index: int
    ) -> list[TaskCall]:
        """Move tasks from the queue to the packet, up to the limits of calls and bytes."""
        bytes_max = self._state.config.packet_bytes_max
        worker_id, sequence = worker.worker_id, packet.sequence
        calls: list[TaskCall] = []
        while queue.queued_calls and packet.calls < limit:
            record = queue.first() if queue.removed else queue.queue[0]
            if record.attempts and calls:
                break  # it lost a worker before: it travels alone
            payloads = record.calls
            if len(payloads) == 1:
                payload = payloads[0]
                wanted, size = 1, (len(payload) + 16 if isinstance(payload, bytes) else 128)
            else:
                wanted, size = _fitting(
                    payloads, limit - packet.calls, bytes_max - packet.size_bytes
                )
            if calls and packet.size_bytes + size > bytes_max:
                break
            queue.queue.popleft()
            queue.queued_calls -= wanted
            if wanted < len(payloads):
                queue.queue.appendleft(self._tasks.cut(record, record.offset + wanted))
            record.move(RUNNING)
            record.worker_id = worker_id
            record.sequence = sequence
            record.sent_offset = record.offset
            packet.records.append(record)
            packet.bases.append(packet.calls)
            packet.calls += wanted
            packet.size_bytes += size
            if record.dependencies:
                calls.append(self.call_with_arguments(record, packet, index))
                break  # inline arguments can be large together: such a task travels last
            sent = record.calls
            if record.borrows:
                sent = self._current_payloads(sent, packet)
            calls.append(TaskCall(task_id=record.task_id, class_index=index, calls=sent))
            if record.attempts:
                break
        return calls

    def call_with_arguments(self, record: TaskRecord, packet: Packet, index: int) -> TaskCall:
        """A call as the worker reads it, with the values of refs among its arguments."""
        pins: list[ObjectId] = []
        arguments, errors = self._tasks.inputs.values_of(record, pins)
        packet.pins = (packet.pins or []) + pins
        size = sum(len(value) if isinstance(value, bytes) else 128 for value in arguments)
        fetch: list[ObjectId] = []
        if size > _ARGUMENTS_BYTES_MAX:
            # Of one that fails the error is all that it needs.
            arguments, fetch = [arguments[index] for index in errors[:1]], record.dependencies
            errors = [0] if errors else []
        packet.size_bytes += 32 * len(fetch) if fetch else size
        return TaskCall(
            task_id=record.task_id,
            class_index=index,
            calls=self._current_payloads(record.calls, packet),
            arguments=arguments,
            slots=record.slots,
            error_arguments=errors,
            fetch=fetch,
        )

    def _current_payloads(self, payloads: list[Value], packet: Packet) -> list[Value]:
        """Payloads as a worker finds them now: large ones may have moved since they were sent."""
        if all(isinstance(payload, bytes) for payload in payloads):
            return payloads
        store = self._tasks.store
        pins: list[ObjectId] = []
        found: list[Value] = []
        for payload in payloads:
            if not isinstance(payload, bytes):
                object_id = payload.object_id
                payload = store.place_of(payload)
                if not isinstance(payload, bytes):
                    store.send(object_id, payload, pins)
            found.append(payload)
        packet.pins = (packet.pins or []) + pins
        return found

    def let_go(self, packet: Packet) -> None:
        """A worker is done with a packet: it no longer looks at what that brought."""
        if packet.pins is not None:
            self._tasks.store.unpin_many(packet.pins)
        if packet.cancelled is not None:
            self._tasks.unpin_cancelled(packet)

    def unsend(self, worker: WorkerRecord, packet: Packet) -> None:
        """A packet was not read: its calls are queued again, its definitions unknown again."""
        self.uncount(worker, packet, packet.calls)
        self.let_go(packet)
        if packet.defines_class:
            worker.class_indexes.pop(packet.queue.task_class.class_id, None)
        for function_id in packet.functions or ():
            worker.functions.pop(function_id, None)
        worker.forget.extend(packet.forget or ())
        for record in reversed(packet.records):
            if is_in(record, worker, packet.sequence):
                self._tasks.requeue(record)

    def uncount(self, worker: WorkerRecord, packet: Packet, calls: int) -> None:
        """That many calls of a packet were not begun and will not be."""
        packet.calls -= calls
        worker.calls_sent -= calls
        task_class = packet.queue.task_class
        if task_class.max_calls:
            sent = worker.calls_by_class.get(task_class.class_id, 0)
            worker.calls_by_class[task_class.class_id] = max(0, sent - calls)


def is_in(record: TaskRecord, worker: WorkerRecord, sequence: int) -> bool:
    """Whether a task that was sent in a packet is there still."""
    return (
        record.state is RUNNING
        and record.worker_id == worker.worker_id
        and record.sequence == sequence
    )


def _fitting(payloads: list[Value], calls_max: int, bytes_max: int) -> tuple[int, int]:
    """How many of the first payloads fit, at least one, and their bytes."""
    size = 0
    count = 0
    for payload in payloads:
        length = len(payload) + 16 if isinstance(payload, bytes) else 128
        if count and size + length > bytes_max:
            break
        size += length
        count += 1
        if count >= calls_max:
            break
    return count, size
