"""Results of an actor's calls that end in any order, on their way to the node.

What: one message for all results that are there when it is sent; the result of a call that was
cancelled before it began.
Who calls: what runs the calls of actors that run several at once, from any thread.
May touch: the report channel.
Invariants: one thread sends at a time, and sends what others have added meanwhile.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from poolray.exceptions import TaskCancelledError
from poolray.ids import TaskId
from poolray.local import worker_process
from poolray.protocol.values import Outcome
from poolray.protocol.worker import TaskCall, TaskResult, TasksFinished

if TYPE_CHECKING:
    from poolray.local.worker import Worker

#: Results of several calls go in one message up to about this size.
_REPORT_BYTES = 64 * 1024


@final
class Reports:
    """What an actor's calls came to.

    Parameters
    ----------
    post : callable or None
        Sends results to whoever made the calls; None: the node did.
    """

    def __init__(
        self, worker: Worker, post: Callable[[list[TaskResult]], None] | None = None
    ) -> None:
        self._worker = worker
        self._post = post or self._tell_node
        #: Guards the fields below.
        self._lock = threading.Lock()
        self._results: deque[tuple[TaskResult, int]] = deque()
        self._sending = False

    def add(self, task: TaskCall, outcome: bytes | Outcome) -> None:
        """A call is over; its result is sent with the next message."""
        result = TaskResult(task_id=task.task_id, start=0, results=[outcome])
        if type(outcome) is bytes:
            size = len(outcome)
        else:
            values = outcome.values  # type: ignore[union-attr]
            size = sum(len(value) if isinstance(value, bytes) else 128 for value in values)
        # (Without the lock: whoever sends looks for more under it before it stops.)
        self._results.append((result, size))

    def send(self) -> None:
        """Send what there is, unless another thread is at it: it will send ours too."""
        with self._lock:
            if self._sending:
                return
            self._sending = True
        while True:
            with self._lock:
                batch = self._take()
                if not batch:
                    self._sending = False
                    return
            self._post(batch)

    def _tell_node(self, batch: list[TaskResult]) -> None:
        worker = self._worker
        pinned, unpinned = worker.client.take_view_changes()
        kept, released = worker.client.take_reference_changes()
        worker_process.flush_output()
        message = TasksFinished(
            worker_id=worker.worker_id,
            results=batch,
            elapsed_ns=0,
            sequence=0,
            kept=kept,
            released=released,
            viewed=worker.client.viewed_only(kept) if kept else kept,
            pinned=pinned,
            unpinned=unpinned,
        )
        worker.send(worker.encode(message))

    def _take(self) -> list[TaskResult]:
        """Results that fit one message; the caller holds the lock."""
        batch: list[TaskResult] = []
        size = 0
        while self._results and (not batch or size + self._results[0][1] <= _REPORT_BYTES):
            result, result_bytes = self._results.popleft()
            batch.append(result)
            size += result_bytes
        return batch


def cancelled_outcome(task_id: TaskId, name: str) -> Outcome:
    """What the caller gets for a call that was cancelled."""
    error = TaskCancelledError(task_id=task_id.hex(), task_name=name)
    return Outcome(
        values=[pickle.dumps(error)], is_error=True, summary=f"TaskCancelledError: {error}"
    )
