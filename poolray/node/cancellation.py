"""Cancelling tasks that have objects for results.

      CancelTask ──▶ pending here ──▶ fails at once, never runs
                 ──▶ with an actor ──▶ order and signal to the worker
                 ──▶ with a worker ──▶ unread packets taken back; order and signal to the worker;
                 │                     by force: the worker is killed
                 └─▶ with a peer ────▶ CancelForwarded; its result tells what came of it
What: which tasks a request stops (the task and those that it submitted), and by what means.
Who calls: `node/node.py` with clients' requests, `node/peers.py` with those of owners,
`node/tasks.py` as tasks come and go.
May touch: nothing.
Invariants: a task in `stopping` is RUNNING or FORWARDED and is not tried again: when it comes back
in any way without a result, its cancellation is its result (of a call whose actor dies for good,
that death). `parents` and `_children` are inverse; both ends of each pair have not ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, final

from poolray.exceptions import TaskCancelledError
from poolray.ids import ClientId, TaskId, WorkerId, return_id
from poolray.node.effects import Interrupt, SendPeer, TakeBack, TerminateWorker
from poolray.node.packets import is_in
from poolray.node.state import NodeState
from poolray.node.workers import GroupState, WorkerRecord, WorkerState
from poolray.protocol.node import CancelForwarded
from poolray.protocol.values import CallKind, Delivery
from poolray.protocol.worker import InterruptTask
from poolray.tasks.lifecycle import FORWARDED, RUNNING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.dispatch import Dispatcher
    from poolray.node.tasks import Tasks


@final
class Cancellation:
    """The side of a node that stops tasks."""

    __slots__ = ("_children", "_kill_at", "_state", "_tasks", "dispatcher", "parents", "stopping")

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks
        self.dispatcher: Dispatcher
        #: Tasks that were asked to stop, where they are.
        self.stopping: dict[TaskId, None] = {}
        #: task id -> the task that submitted it.
        self.parents: dict[TaskId, TaskId] = {}
        #: task id -> the tasks that it submitted.
        self._children: dict[TaskId, dict[TaskId, None]] = {}
        #: Of `stopping`, those to be stopped by force -> when their workers are killed.
        self._kill_at: dict[TaskId, float] = {}

    # ---- who submitted whom ----------------------------------------------------------------------

    def adopt(self, parent: TaskId, child: TaskId) -> None:
        """A task submits another one."""
        if parent in self._state.tasks:
            self.parents[child] = parent
            self._children.setdefault(parent, {})[child] = None

    def on_end(self, task_id: TaskId) -> None:
        """A task has ended."""
        self.stopping.pop(task_id, None)
        self._kill_at.pop(task_id, None)
        for child in self._children.pop(task_id, ()):
            del self.parents[child]
        parent = self.parents.pop(task_id, None)
        if parent is not None:
            siblings = self._children[parent]
            del siblings[task_id]
            if not siblings:
                del self._children[parent]

    # ---- requests --------------------------------------------------------------------------------

    def cancel(self, task_id: TaskId, force: bool, recursive: bool) -> None:
        """Stop a task, and those that it submitted if asked to."""
        chosen = {task_id: None}
        if recursive:
            pending = [task_id]
            while pending:
                for child in self._children.get(pending.pop(), ()):
                    chosen[child] = None
                    pending.append(child)
        for chosen_id in chosen:
            record = self._state.tasks.get(chosen_id)
            if record is not None and record.class_queue.task_class.delivery is Delivery.OBJECTS:
                self._cancel(record, force, recursive)

    def on_driver_left(self, client_id: ClientId) -> None:
        """A driver is gone, and what it held is let go: tasks end of whose results nobody else has
        any, and so does what they submitted.
        """
        tasks, objects = self._state.tasks, self._state.objects
        for record in list(tasks.values()):
            known = record.class_queue.task_class
            if (
                record.client_id == client_id
                and not record.is_foreign
                and not record.actor_id
                and known.kind is not CallKind.CREATE
                and not any(
                    return_id(record.root_id, i) in objects for i in range(known.num_returns)
                )
            ):
                self.cancel(record.root_id, force=True, recursive=True)

    def abandon(self, records: list[TaskRecord]) -> None:
        """Nobody will ever ask what came of these: they end, and so does what they submitted.

        Calls that an actor runs it runs to their end.
        """
        orphans = {record.task_id: None for record in records if not record.actor_id}
        children = [child for task_id in orphans for child in self._children.get(task_id, ())]
        for child in children:
            self.cancel(child, force=True, recursive=True)
        stops = [stop for record in records for stop in self._stops(record, orphans)]
        self._tasks.cancel([TaskId(record.root_id) for record in records])
        for stop in dict.fromkeys(stops):
            if isinstance(stop, Interrupt):
                self._state.effects.append(stop)
            else:
                self._kill(self._state.workers[stop])

    def _stops(
        self, record: TaskRecord, orphans: dict[TaskId, None]
    ) -> Iterator[WorkerId | Interrupt]:
        """How to stop one that its worker may have begun: by the worker's end, if it has been sent
        nothing else, or by an order.
        """
        if record.task_id not in orphans or record.state is not RUNNING:
            return
        assert record.worker_id is not None
        worker = self._state.workers[record.worker_id]
        packet = worker.packets[0]
        if worker.group.state >= GroupState.FAILED or record.sequence != packet.sequence:
            return
        ours = [r for r in packet.records if is_in(r, worker, packet.sequence)]
        if len(worker.packets) == 1 and all(r.task_id in orphans for r in ours):
            yield worker.worker_id
        else:
            order = InterruptTask(task_id=record.task_id, sequence=packet.sequence, force=True)
            yield Interrupt(worker.worker_id, order)

    def _cancel(self, record: TaskRecord, force: bool, recursive: bool) -> None:
        for index in range(record.class_queue.task_class.num_returns):
            value = self._state.objects.get(return_id(record.root_id, index))
            if value is not None:
                value.seen = True  # an error that somebody asked for is no news to the user
        if record.state is RUNNING:
            self._stop_running(record, force)
        elif record.state is FORWARDED:
            assert record.node_id is not None
            self.stopping[record.task_id] = None
            message = CancelForwarded(task_id=record.root_id, force=force, recursive=recursive)
            self._state.effects.append(SendPeer(record.node_id, message))
        else:
            self.stopping[record.task_id] = None
            self._tasks.give_up(record, self._state.encode_error(error_of(record)))

    def _stop_running(self, record: TaskRecord, force: bool) -> None:
        """A worker has been sent the task; it may run, have ended or be unread."""
        state = self._state
        assert record.worker_id is not None
        worker = state.workers[record.worker_id]
        if worker.group.state >= GroupState.FAILED:
            return  # it is being killed
        self.stopping[record.task_id] = None
        if record.actor_id:
            # Its worker knows whether it has begun, and what that means; packets stay where they
            # are, in their order. An actor is not killed for a call.
            order = InterruptTask(task_id=record.task_id, sequence=record.sequence, force=False)
            state.effects.append(Interrupt(worker.worker_id, order))
            self._tasks.streams.let_go_on(record.task_id)  # threads cannot be interrupted
            return
        state.effects.append(TakeBack(worker.worker_id))
        if force and len(worker.packets) == 1 and worker.packets[0].calls == 1:
            # (With more than that, it may be another one that it runs.)
            self._kill(worker)
            return
        order = InterruptTask(task_id=record.task_id, sequence=record.sequence, force=force)
        state.effects.append(Interrupt(worker.worker_id, order))
        if force and record.task_id not in self._kill_at:
            # Neighbours in its packet are handed back by the worker first, if it gets to that.
            due_s = self._kill_at[record.task_id] = state.now + state.config.force_after_s
            self.dispatcher.watch_time(due_s)

    def _kill(self, worker: WorkerRecord) -> None:
        """End a worker for the task that it runs; it gets nothing more to do."""
        if worker.state is not WorkerState.STOPPING:
            worker.move(WorkerState.STOPPING)
        self._state.effects.append(TerminateWorker(worker.worker_id))

    # ---- time ------------------------------------------------------------------------------------

    def on_tick(self) -> None:
        """Kill the workers of tasks that did not stop in time."""
        if not self._kill_at:
            return
        now = self._state.now
        for task_id in [task_id for task_id, due_s in self._kill_at.items() if due_s <= now]:
            del self._kill_at[task_id]
            record = self._state.tasks[task_id]
            if record.state is RUNNING and record.worker_id is not None:
                self._kill(self._state.workers[record.worker_id])
        if self._kill_at:
            self.dispatcher.watch_time(min(self._kill_at.values()))

    # ---- checks ----------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when tables of orders and families do not agree."""
        tasks = self._state.tasks
        for task_id in self.stopping:
            assert tasks[task_id].state in (RUNNING, FORWARDED), "a stopped task goes on"
        assert all(task_id in self.stopping for task_id in self._kill_at)
        pairs = [(c, p) for p, children in self._children.items() for c in children]
        assert dict(pairs) == self.parents
        assert all(self._children.values())
        for child, parent in pairs:
            assert child in tasks
            assert parent in tasks


def error_of(record: TaskRecord) -> TaskCancelledError:
    """The result of a task that was cancelled before it had another."""
    return TaskCancelledError(
        task_id=record.root_id.hex(), task_name=record.class_queue.task_class.name
    )
