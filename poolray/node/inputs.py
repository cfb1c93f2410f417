"""What tasks need before they can run: their arguments.

What: holds a task's dependencies and borrowed refs as long as it may run, counts those that are not
here, and has them fetched from other nodes and from disk.
Who calls: `node/tasks.py` as tasks come, are tried again and end; `node/objects.py` with each
object that comes; `node/dispatch.py` for the values that travel with a call.
May touch: nothing.
Invariants: a task that WAITS has `missing` entries in `dependents` of its dependencies; what it
holds it holds once (`owner_pins`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import ObjectId, TaskId
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.values import InFile, TaskSpec, Value
from poolray.tasks.lifecycle import WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.tasks import Tasks


@final
class Inputs:
    """The arguments of a node's tasks."""

    __slots__ = ("_state", "_store", "_tasks")

    def __init__(self, state: NodeState, store: Store, tasks: Tasks) -> None:
        self._state = state
        self._store = store
        self._tasks = tasks

    def take(self, record: TaskRecord, spec: TaskSpec) -> None:
        """A task keeps its arguments, and waits for those that are not here."""
        record.dependencies = spec.dependencies
        record.slots = spec.slots
        record.borrows = spec.borrows
        self.pin(record)
        for object_id in spec.dependencies:
            self._state.objects[object_id].seen = True  # an error among them is this task's now
        self.wait(record)

    def pin(self, record: TaskRecord) -> None:
        if not record.owner_pins and (record.dependencies or record.borrows):
            record.owner_pins = True
            for object_id in record.dependencies:
                self._tasks.objects.hold(object_id)
            for object_id in record.borrows:
                self._tasks.objects.hold(object_id)

    def unpin(self, record: TaskRecord) -> None:
        """A task does not need its arguments any more."""
        if record.owner_pins:
            record.owner_pins = False
            self._tasks.objects.release_all(record.dependencies)
            self._tasks.objects.release_all(record.borrows)

    def wait(self, record: TaskRecord) -> None:
        """Count the dependencies that are not here, and be told of each that comes.

        A task whose arguments all exist, most of their bytes on another node, is given to that.
        """
        record.missing = 0
        if record.state is WAITING and not record.is_foreign and self._follow_arguments(record):
            return
        for object_id in self._needed(record) if record.is_foreign else record.dependencies:
            target = self._state.objects[object_id]
            location = target.location() if target.state is READY else None
            if target.state is READY and location is None:
                continue
            self._wait_for(record, target)
            if location is not None:
                self._tasks.objects.pull(object_id)
        if not record.missing and not record.has_restored:
            self._restore_dependencies(record)

    def _follow_arguments(self, record: TaskRecord) -> bool:
        """Whether a task went where its arguments are."""
        objects = self._state.objects
        if (
            record.actor_id
            or not self._tasks.peers.views
            or self._tasks.usable_group(record) is None
        ):
            return False
        targets = [objects[object_id] for object_id in record.dependencies]
        return (
            all(target.state is READY for target in targets)
            and any(target.location() is not None for target in targets)
            and self._tasks.peers.follow_arguments(record)
        )

    def _needed(self, record: TaskRecord) -> list[ObjectId]:
        """What a task of another node needs here: also its payload and its function, if large."""
        behind = [call.object_id for call in record.calls if not isinstance(call, bytes)]
        definition = self._state.functions.get(record.class_queue.task_class.function_id)
        if definition is not None and not isinstance(definition.blob, bytes):
            behind.append(definition.blob.object_id)
        return [*record.dependencies, *(o for o in behind if o in self._state.objects)]

    def _wait_for(self, record: TaskRecord, target: ObjectRecord) -> None:
        record.missing += 1
        if target.dependents is None:
            target.dependents = [record.task_id]
        else:
            target.dependents.append(record.task_id)

    def _restore_dependencies(self, record: TaskRecord) -> None:
        """Bring back from disk what fits without making something else leave. The worker maps the
        rest from its files, and what has left again when the task's turn comes.
        """
        for object_id in record.dependencies:
            target = self._state.objects[object_id]
            if type(target.value) is InFile and self._store.restore(object_id, below_mark=True):
                record.has_restored = True
                self._wait_for(record, target)

    def on_dependency_ready(self, task_id: TaskId) -> None:
        """One dependency of a waiting task is here, or known to be elsewhere."""
        record = self._state.tasks.get(task_id)
        if record is None or record.state is not WAITING:
            return
        record.missing -= 1
        if record.missing <= 0:
            # Ready may mean on another node, and what was ready may have been lost since.
            self.wait(record)
            if record.missing == 0 and record.state is WAITING:
                self._tasks.enqueue(record)

    def values_of(self, record: TaskRecord, pins: list[ObjectId]) -> tuple[list[Value], list[int]]:
        """Values of a task's dependencies, and which of them are errors.

        What of them is in memory is pinned, and named in `pins`.
        """
        values: list[Value] = []
        errors: list[int] = []
        for index, object_id in enumerate(record.dependencies):
            target = self._state.objects[object_id]
            value = target.value
            values.append(value)
            if not isinstance(value, bytes):
                self._store.send(object_id, value, pins)
            if target.is_error:
                errors.append(index)
        return values, errors
