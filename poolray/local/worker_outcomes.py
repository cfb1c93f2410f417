"""What becomes of a call's results and errors on their way to the node.

What: serializes them, each return value on its own; large ones go to the arena.
Who calls: `local/worker.py` and what runs an actor's calls.
May touch: the arena, through the worker's client.
Invariants: none; it keeps nothing.
"""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any, final

from poolray.exceptions import TaskCancelledError
from poolray.ids import ObjectId, return_id
from poolray.local.worker_errors import DependencyFailed
from poolray.local.worker_functions import Function
from poolray.objects.serialization import Serialized
from poolray.protocol.values import InArena, InFile, Outcome
from poolray.protocol.worker import TaskCall

if TYPE_CHECKING:
    from poolray.local.worker import Worker

#: What those who look on are told of an error.
_SUMMARY_CHARS_MAX = 2000
#: Most values refer to no others; this list is shared and never changed.
_NO_IDS: list[ObjectId] = []


@final
class Outcomes:
    """Makes outcomes of what calls return and raise."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def returned(self, result: Any, task: TaskCall, function: Function) -> Outcome | bytes:
        """A task's return values, serialized each on its own."""
        serializer = function.serializer
        count = function.count
        if count == 1:
            data = serializer.dumps_flat(result)
            limit, inner = self._worker.config.inline_max_bytes, _NO_IDS
            if isinstance(data, Serialized):
                inner = data.refs
                if not inner and data.size_bytes <= limit:
                    data = data.to_bytes()
            if type(data) is bytes and len(data) <= limit:
                self._worker.buffered_bytes += len(data)
                return data
            if (held := self._worker.hold_for_caller(result, task)) is not None:
                return held
            return Outcome(values=[self.place(data, task, 0)], contained=[inner])
        if count == 0:
            return b""
        if count < 0:
            return self._worker.streams.run(result, task, function)
        if not hasattr(result, "__len__"):
            result = list(result)
        if len(result) != count:
            raise ValueError(f"Task returned {len(result)} objects, but num_returns={count}.")
        placed: list[bytes | InArena | InFile] = []
        contained: list[list[ObjectId]] = []
        for index, value in enumerate(list(result)):
            data = serializer.dumps_flat(value)
            placed.append(self.place(data, task, index))
            contained.append(data.refs if isinstance(data, Serialized) else [])
        return Outcome(values=placed, contained=contained)

    def place(
        self, data: bytes | Serialized, task: TaskCall, index: int
    ) -> bytes | InArena | InFile:
        """A serialized value where its reader will find it: inline, in the arena, in a file."""
        size = len(data) if isinstance(data, bytes) else data.size_bytes
        if size <= self._worker.config.inline_max_bytes:
            self._worker.buffered_bytes += size
            return data if isinstance(data, bytes) else data.to_bytes()
        object_id = (
            self._worker.client.next_object_id()
            if len(task.task_id) != 24 or len(task.calls) > 1
            else return_id(task.task_id, index)
        )
        return self._worker.client.store(object_id, data)

    def raised(self, error: BaseException, task: TaskCall, function: Function) -> Outcome:
        """What the caller gets for an exception."""
        from poolray.local import worker_errors

        task_class = function.task_class
        summary = _summary(error)
        if isinstance(error, DependencyFailed):
            encoded = worker_errors.encode_dependency_error(error.error, task_class.name)
            return Outcome(values=[encoded], is_error=True, summary=_summary(error.error))
        if function.for_caller:
            encoded = worker_errors.encode_plain(error)
        elif isinstance(error, KeyboardInterrupt):
            cancelled = TaskCancelledError(
                task_id=task.task_id.hex(),
                task_name=task_class.name,
                reason=worker_errors.describe_interrupt(error),
            )
            encoded = pickle.dumps(cancelled)
            summary = _summary(cancelled)
        else:
            encoded = worker_errors.encode_task_error(error, task_class.name, os.getpid())
        retriable = self._is_retriable(error, function)
        value: bytes | InArena | InFile = encoded
        is_large = len(encoded) > self._worker.config.inline_max_bytes
        if is_large and not self._worker.has_caller(task):
            value = self._worker.client.store(self._worker.client.next_object_id(), encoded)
        return Outcome(
            values=[value],
            is_error=True,
            retriable=retriable,
            summary=summary,
            raised=not isinstance(error, KeyboardInterrupt),
        )

    def _is_retriable(self, error: BaseException, function: Function) -> bool:
        names = function.task_class.retry_exceptions
        # (The first is a cancellation, the second the worker's end.)
        if not names or isinstance(error, (KeyboardInterrupt, SystemExit)):
            return False
        if names == b"*":
            return True
        if function.retry_exceptions is None:
            function.retry_exceptions = tuple(pickle.loads(names))
        return isinstance(error, function.retry_exceptions)


def _summary(error: object) -> str:
    """An error's class and text, if it can say them."""
    try:
        return f"{type(error).__name__}: {error}"[:_SUMMARY_CHARS_MAX]
    except Exception:
        return type(error).__name__  # its own text fails
