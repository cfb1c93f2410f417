"""Tasks whose worker or node was lost while they had them.

What: decides of each call that had begun whether it is tried again, and with which error it fails.
Who calls: `node/dispatch.py` when a worker died, `node/peers.py` when a node died or gave a task
back.
May touch: nothing.
Invariants: a call that had begun has used up an attempt, one that had not has not; each call that
had begun goes on alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.exceptions import CallTimeoutError, NodeDiedError, PoolrayError, WorkerCrashedError
from poolray.ids import NodeId
from poolray.node.cancellation import error_of
from poolray.node.state import NodeState
from poolray.protocol.node import WorkerLost
from poolray.protocol.values import CallKind
from poolray.tasks.lifecycle import TaskRecord

if TYPE_CHECKING:
    from poolray.node.tasks import Tasks

_CREATE = CallKind.CREATE


@final
class Losses:
    """What becomes of a node's tasks when those who run them die."""

    __slots__ = ("_state", "_tasks")

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks

    def on_lost_with_worker(
        self,
        record: TaskRecord,
        begun: int,
        message: WorkerLost,
        late: CallTimeoutError | None = None,
    ) -> None:
        """The worker that had a task died; the caller dispatches afterwards.

        Parameters
        ----------
        begun : int
            How many of the record's calls had begun (the results of all but the last of them are
            lost with the worker, so they count as tried); the others were never touched.
        late : CallTimeoutError, optional
            The error of the last one that had begun: its worker was killed because of it.
        """
        if self._tasks.is_stopping(record):
            self._tasks.fail(record, error_of(record))
            return
        group = self._state.groups[record.class_queue.task_class.group_id]
        kill = self._tasks.protection.kills.get(message.worker_id)
        again: list[TaskRecord] = []
        for left in range(begun - 1, -1, -1):
            # Each call that had begun goes on alone: the one that kills must not take the
            # attempts of its neighbours.
            rest = self._tasks.cut(record, record.offset + 1) if len(record.calls) > 1 else None
            may_retry = not group.break_on_death and (
                self._tasks.may_retry(record)
                if kill is None
                else self._tasks.protection.may_retry(record, kill)
            )
            record.attempts += 1
            if late is not None and not left:
                self._tasks.fail(record, late)
            elif may_retry and not record.is_foreign:
                error = self._crash_error(record, message)
                self._tasks.observer.on_attempt_lost(record, message, error)
                if kill is not None:
                    self._tasks.protection.delay(record)
                elif not self._tasks.retries.delay(record):
                    again.append(record)
            else:
                # Of another node's task the owner decides, who has counted all attempts.
                is_open = record.is_foreign and (kill is None or may_retry)
                self._tasks.fail(record, self._crash_error(record, message), crashed=is_open)
            if rest is None:
                break
            record = rest
        else:
            again.append(record)
        for record in reversed(again):
            self._tasks.requeue(record)

    def _crash_error(self, record: TaskRecord, message: WorkerLost) -> PoolrayError:
        if record.class_queue.task_class.kind is _CREATE:
            return self._tasks.actors.creation_error(record, message)
        kill = self._tasks.protection.kills.get(message.worker_id)
        if kill is not None:
            return self._tasks.protection.error(record, message, kill)
        return WorkerCrashedError(
            task_name=record.class_queue.task_class.name,
            task_id=record.root_id.hex(),
            pid=message.pid,
            exit_code=message.exit_code,
            signal=message.signal,
            attempts=record.attempts,
        )

    def on_lost_with_node(self, record: TaskRecord, node_id: NodeId) -> None:
        """The node that a task was forwarded to died: it counts as tried."""
        if record.is_elsewhere and not self._tasks.is_stopping(record):
            self._tasks.actors.elsewhere.on_host_died(record)
            return
        if self._tasks.is_stopping(record):
            self._tasks.fail(record, error_of(record))
            return
        may_retry = self._tasks.may_retry(record)
        record.attempts += 1
        if may_retry:
            if not self._tasks.retries.delay(record):
                self._tasks.try_again(record)
            return
        if record.class_queue.task_class.kind is _CREATE:
            self._tasks.fail(record, self._tasks.actors.hosting.died_with(record, node_id))
            return
        self._tasks.fail(
            record,
            NodeDiedError(
                task_name=record.class_queue.task_class.name,
                task_id=record.root_id.hex(),
                node_id=node_id.hex(),
                attempts=record.attempts,
            ),
        )

    def on_returned(self, record: TaskRecord) -> None:
        """The node that a task was forwarded to could not begin it."""
        if record.is_elsewhere and not self._tasks.is_stopping(record):
            self._tasks.actors.elsewhere.try_again(record, returned=True)
        else:
            self._tasks.try_again(record)
