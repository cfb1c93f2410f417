"""Tasks that are tried again after a pause.

What: a task that has cost two workers or more waits before it is tried again, longer each time, so
that one that kills every worker it gets leaves the others their share of the machine.
Who calls: `node/tasks.py` when a worker or node was lost with a task; `node/node.py` at a tick.
May touch: nothing.
Invariants: a task is in `_due` exactly while it is DELAYED.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import TaskId
from poolray.node.state import NodeState
from poolray.tasks.lifecycle import DELAYED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.dispatch import Dispatcher
    from poolray.node.tasks import Tasks


@final
class Retries:
    """The pauses of a node's tasks."""

    __slots__ = ("_due", "_state", "_tasks", "dispatcher")

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks
        self.dispatcher: Dispatcher
        #: task id -> when it is tried again.
        self._due: dict[TaskId, float] = {}

    def delay(self, record: TaskRecord) -> bool:
        """Let a task wait that has cost several workers; False when it may go at once."""
        if record.attempts < 2:
            return False
        config = self._state.config
        # (Beyond that the power of two says no more than the limit.)
        doublings = min(record.attempts - 2, 30)
        pause_s = min(config.retry_delay_s * 2.0**doublings, config.retry_delay_max_s)
        if pause_s <= 0:
            return False
        self.delay_for(record, pause_s)
        return True

    def delay_for(self, record: TaskRecord, pause_s: float) -> None:
        """Let a task wait this long before it is tried again."""
        record.move(DELAYED)
        record.worker_id = None
        record.node_id = None
        record.sent_offset = record.offset
        due_s = self._due[record.task_id] = self._state.now + pause_s
        self.dispatcher.watch_time(due_s)

    def forget(self, record: TaskRecord) -> None:
        """A task that waits will not be tried again."""
        del self._due[record.task_id]

    def on_tick(self) -> None:
        """Try those again whose pause is over."""
        now = self._state.now
        for task_id in [task_id for task_id, due_s in self._due.items() if due_s <= now]:
            # One may have ended meanwhile, with the failure of its group.
            if self._due.pop(task_id, None) is not None:
                self._tasks.try_again(self._state.tasks[task_id])
        if self._due:
            self.dispatcher.watch_time(min(self._due.values()))

    def check_invariants(self) -> None:
        """Raise AssertionError when the table does not agree with the tasks' states."""
        delayed = {i for i, record in self._state.tasks.items() if record.state is DELAYED}
        assert delayed == set(self._due), "tasks that wait for their time"
