"""Functions and task classes: who may still name them, and when they are forgotten.

What: keeps definitions while a client that made them is there, or a task that needs them is.
Who calls: `node/node.py` with clients' definitions, `node/tasks.py` when a class's last task ends.
May touch: nothing.
Invariants: a class is kept while somebody may name it or it has tasks; a function, and the object
that its code is in, while a client holds it or a class that is kept names it; workers are told
what to forget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import ClientId, FunctionId, GroupId, ObjectId
from poolray.node.placement import find_obstacle, may_roam
from poolray.node.state import NodeState
from poolray.objects.directory import ClientRecord
from poolray.protocol.values import FunctionDefinition, TaskClass
from poolray.tasks.class_queue import ClassQueue

if TYPE_CHECKING:
    from poolray.node.bundles import Bundles
    from poolray.node.objects import Objects


@final
class Functions:
    """Definitions of functions, and of the classes of tasks that call them."""

    __slots__ = ("_holders", "_state", "bundles", "objects")

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self.objects: Objects
        self.bundles: Bundles
        #: function id -> clients that defined it and have not released it.
        self._holders: dict[FunctionId, int] = {}

    def define(self, client: ClientRecord, definition: FunctionDefinition) -> None:
        """A client will name this function."""
        function_id = definition.function_id
        if function_id not in self._state.functions:
            self._state.functions[function_id] = definition
            for queue in self._state.classes.values():  # of a peer's tasks classes come first
                if queue.task_class.function_id == function_id:
                    queue.function_name = definition.name
            if not isinstance(definition.blob, bytes):
                self.objects.hold(definition.blob.object_id)
        if function_id not in client.functions:
            client.functions[function_id] = None
            self._holders[function_id] = self._holders.get(function_id, 0) + 1

    def define_class(self, task_class: TaskClass) -> None:
        """A client will name this class."""
        known = self._state.classes.get(task_class.class_id)
        if known is None:
            state = self._state
            obstacle = None
            if task_class.placement is None or not task_class.placement.group:
                obstacle = find_obstacle(
                    task_class, state.node_id, state.labels, state.resources, state.has_head
                )
            queue = ClassQueue(task_class, obstacle)
            queue.roams = may_roam(task_class, state.node_id)
            queue.uses_devices = any(
                amount and name in state.resources.pools
                for name, amount in task_class.resources.items()
            )
            definition = state.functions.get(task_class.function_id)
            if definition is not None:
                queue.function_name = definition.name
            state.classes[task_class.class_id] = queue
            if task_class.placement is not None and task_class.placement.group:
                self.bundles.adopt(queue)
        else:
            known.released = False

    def release(self, client: ClientRecord, function_id: FunctionId) -> None:
        """A client will not name this function again."""
        if function_id not in client.functions:
            return
        del client.functions[function_id]
        self._holders[function_id] -= 1
        if self._holders[function_id] == 0:
            del self._holders[function_id]
        for queue in list(self._state.classes.values()):
            if queue.task_class.function_id == function_id and not self._may_be_named(queue):
                self._release_class(queue)
        self._forget_if_unused(function_id)

    def drop_client(self, client_id: ClientId) -> None:
        """A client is gone."""
        client = self._state.clients.get(client_id)
        if client is not None:
            for function_id in list(client.functions):
                self.release(client, function_id)

    def release_classes(self, group_id: GroupId) -> None:
        """A group has ended, and with it the use of its classes."""
        for queue in list(self._state.classes.values()):
            if queue.task_class.group_id == group_id and not self._may_be_named(queue):
                self._release_class(queue)

    def _may_be_named(self, queue: ClassQueue) -> bool:
        """Whether a task of a class may come, be it too late for its group."""
        state = self._state
        function_id = queue.task_class.function_id
        holders = self._holders.get(function_id, 0)
        if queue.task_class.group_id not in state.groups:
            # Our own process has ended the group and names it no more. Workers of other groups
            # and other nodes do not know: their tasks are refused by name.
            local = state.clients.get(state.local_client)
            holders -= local is not None and function_id in local.functions
        return holders > 0

    def _release_class(self, queue: ClassQueue) -> None:
        queue.released = True
        if not queue.tasks:
            self.forget_class(queue)

    def forget_class(self, queue: ClassQueue) -> None:
        """A class was released, and its last task has ended."""
        class_id = queue.task_class.class_id
        self._state.classes.pop(class_id, None)
        if queue.task_class.placement is not None:
            self.bundles.forget(queue)
        for worker in self._state.workers.values():
            worker.class_indexes.pop(class_id, None)
            worker.calls_by_class.pop(class_id, None)
        if queue.task_class.function_id:
            self._forget_if_unused(queue.task_class.function_id)

    def _forget_if_unused(self, function_id: FunctionId) -> None:
        if function_id in self._holders or any(
            queue.task_class.function_id == function_id for queue in self._state.classes.values()
        ):
            return
        definition = self._state.functions.pop(function_id, None)
        if definition is None:
            return
        if not isinstance(definition.blob, bytes):
            self.objects.release_all([definition.blob.object_id])
        for worker in self._state.workers.values():
            if worker.functions.pop(function_id, 0) is None:
                worker.forget.append(function_id)

    def blobs(self) -> list[ObjectId]:
        """Objects that hold the code of large functions; each function holds its own once."""
        definitions = self._state.functions.values()
        return [d.blob.object_id for d in definitions if not isinstance(d.blob, bytes)]

    def check_invariants(self) -> None:
        """Raise AssertionError when a definition is missing, or kept for nobody."""
        state = self._state
        held: dict[FunctionId, int] = {}
        for client in state.clients.values():
            for function_id in client.functions:
                held[function_id] = held.get(function_id, 0) + 1
        assert held == self._holders
        assert all(function_id in state.functions for function_id in held)
        for queue in state.classes.values():
            assert not queue.released or queue.tasks, f"class {queue.task_class.name} leaks"
        named = {queue.task_class.function_id for queue in state.classes.values()}
        for function_id, definition in state.functions.items():
            assert function_id in held or function_id in named, f"{definition.name} leaks"
