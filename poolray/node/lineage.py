"""Lineage: the ended tasks whose results can be made again.

What: keeps a task as long as a result of it lives on another node only, and decides what becomes of
an object that is lost: another copy, another run of its task, or an error.
Who calls: `node/tasks.py` as tasks end; `node/peers.py`, `node/transfers.py` and
`node/borrowing.py` when a value is not where it was; `node/actors.py` for constructors.
May touch: nothing.
Invariants: a task in `tasks` has SUCCEEDED, is not in `state.tasks`, and holds its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.exceptions import ObjectLostError, ObjectReconstructionFailedError
from poolray.ids import ClientId, ObjectId, TaskId, return_id, task_of
from poolray.node.state import NodeState
from poolray.objects.directory import ObjectRecord
from poolray.tasks.lifecycle import WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.tasks import Tasks


@final
class Lineage:
    """Ended tasks of a node that may have to run again."""

    __slots__ = ("_state", "_tasks", "tasks")

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks
        #: Ended tasks whose results live elsewhere only: they can be made again.
        self.tasks: dict[TaskId, TaskRecord] = {}

    def on_object_lost(self, object_id: ObjectId, record: ObjectRecord, reason: str) -> None:
        """A value is not where it was: find a copy, make it again, or say that it is lost."""
        if self._tasks.peers.find_again(object_id, record):
            return
        self._tasks.objects.lose(object_id, record)
        if object_id not in self._state.objects:
            return
        task_id = task_of(object_id)
        maker = self.tasks.pop(task_id, None)
        running = self._state.tasks.get(task_id) if maker is None else None
        if running is not None:
            # Lost together with another return value, for which it runs again already.
            self._tasks.streams.note_lost(object_id, running)
            return
        if (
            maker is not None
            and self._tasks.may_retry(maker)
            and self._tasks.usable_group(maker) is not None
        ):
            self._tasks.streams.note_lost(object_id, maker)
            self.run_again(maker)
            return
        error: ObjectLostError = ObjectLostError(object_id=object_id.hex(), reason=reason)
        if maker is not None:
            error = ObjectReconstructionFailedError(
                object_id=object_id.hex(),
                reason=f"{reason}, and its task was tried {maker.attempts + 1} time(s)",
            )
            self.drop(maker)
        encoded = self._state.encode_error(error)
        self._tasks.objects.seal(object_id, record, encoded, True, [], ClientId(b""))

    def run_again(self, maker: TaskRecord) -> None:
        """An ended task makes its objects once more."""
        maker.attempts += 1
        self._state.tasks[maker.task_id] = maker
        group = self._state.groups.get(maker.class_queue.task_class.group_id)
        if group is not None:
            group.unfinished += 1
        maker.move(WAITING)
        maker.node_id = None
        self._tasks.inputs.wait(maker)
        if maker.actor_id:
            self._tasks.actors.calls.enter_again(maker)
        elif maker.missing == 0 and maker.state is WAITING:
            self._tasks.enqueue(maker, front=True)

    def on_object_local(self, object_id: ObjectId) -> None:
        """An object that was elsewhere, or was held by somebody, is not any more."""
        maker = self.tasks.get(task_of(object_id)) if self.tasks else None
        if maker is None:
            return
        for index in range(maker.class_queue.task_class.num_returns):
            record = self._state.objects.get(return_id(maker.root_id, index))
            if record is not None and record.location() is not None:
                return
        if self._tasks.streams.is_remote(maker.root_id):
            return
        del self.tasks[maker.root_id]
        self.drop(maker)

    def drop(self, maker: TaskRecord) -> None:
        """What a task made can no longer be lost, or can no longer be made again."""
        self._tasks.streams.forget_remote(maker.root_id)
        self._tasks.inputs.unpin(maker)
        queue = maker.class_queue
        queue.tasks -= 1
        if queue.released and not queue.tasks:
            self._tasks.functions.forget_class(queue)
