"""What a worker has to call: task classes by index, functions by id.

What: learns what comes with packets, and loads a function at its first call.
Who calls: `local/worker.py` and what runs an actor's calls.
May touch: `sys.path`, as definitions ask for; the accelerators that a worker was given.
Invariants: a class stays until the node says that nobody will call its function any more.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, final

from poolray.exceptions import PoolrayError
from poolray.ids import FunctionId
from poolray.local import process_state
from poolray.objects.serialization import Serializer
from poolray.protocol.values import CallKind, Delivery, FunctionDefinition, TaskClass
from poolray.protocol.worker import RunTasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolray.local.worker import Worker

_CALL = CallKind.CALL
_CALLER = Delivery.CALLER


@final
class Function:
    """A task class as the worker knows it."""

    __slots__ = (
        "call",
        "count",
        "for_caller",
        "kind",
        "name",
        "retry_exceptions",
        "serializer",
        "task_class",
    )

    def __init__(self, task_class: TaskClass, serializer: Serializer, name: str) -> None:
        #: Module and name of what it calls.
        self.name = name
        self.task_class = task_class
        self.kind = _CALL if task_class.kind is CallKind.METHOD else task_class.kind
        #: Its results go straight to the caller, and are no objects.
        self.for_caller = task_class.delivery is _CALLER
        #: Return values; negative: what it returns is a generator.
        self.count = -1 if task_class.stream else task_class.num_returns
        #: For its results.
        self.serializer = serializer
        #: None: not loaded yet.
        self.call: Callable[..., Any] | None = None
        #: None: not loaded yet.
        self.retry_exceptions: tuple[type[BaseException], ...] | None = None


@final
class Functions:
    """The task classes and functions that a worker knows."""

    __slots__ = ("_definitions", "_loaded", "_worker", "classes")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        #: Index of a task class -> what to call.
        self.classes: dict[int, Function] = {}
        #: Functions as defined; loaded at their first call.
        self._definitions: dict[FunctionId, FunctionDefinition] = {}
        self._loaded: dict[FunctionId, Callable[..., Any]] = {}

    def read(self, message: RunTasks) -> None:
        """Learn what comes with a packet."""
        if message.forget:
            self._forget(message.forget)
        for definition in message.functions:
            self._definitions[definition.function_id] = definition
            self._loaded.pop(definition.function_id, None)
        for known in message.classes:
            serializer = self._worker.client.serializer_for(known.task_class.delivery)
            self.classes[known.index] = Function(
                known.task_class, serializer, self._name_of(known.task_class)
            )
            if known.devices:
                process_state.use_devices(known.devices, self._worker.accelerators)

    def _name_of(self, task_class: TaskClass) -> str:
        if task_class.method:
            return f"{self._worker.actor_class_name}.{task_class.method}"
        definition = self._definitions.get(task_class.function_id)
        return definition.name if definition is not None else ""

    def _forget(self, function_ids: list[FunctionId]) -> None:
        """Nobody will call these any more."""
        for function_id in function_ids:
            self._definitions.pop(function_id, None)
            self._loaded.pop(function_id, None)
        gone = set(function_ids)
        for index, known in list(self.classes.items()):
            if known.task_class.function_id in gone:
                del self.classes[index]

    def load(self, function: Function) -> Callable[..., Any]:
        """What to call for a class of tasks, or of an actor's methods."""
        function_id = function.task_class.function_id
        if not function_id:
            if self._worker.bind_method is not None and function.task_class.method:
                function.call = self._worker.bind_method(function.task_class.method)
                return function.call
            return _no_function
        loaded = self._loaded.get(function_id)
        if loaded is None:
            definition = self._definitions[function_id]
            for entry in definition.sys_path:
                if entry not in sys.path:
                    sys.path.append(entry)
            loaded = self._loaded[function_id] = self._worker.load(definition.blob, False)
        function.call = self.dress(loaded, function.task_class)
        return function.call

    def dress(self, call: Callable[..., Any], task_class: TaskClass) -> Callable[..., Any]:
        """A callable with what its calls want around it; usually as it is."""
        if self._worker.extras is not None:
            call = self._worker.extras.dress(call)
        if not task_class.timeout_s:
            return call
        from poolray.local.worker_extras import LimitedCall

        return LimitedCall(call, self._worker)


def _no_function(*args: Any) -> None:
    raise PoolrayError("a call without a function was sent: this is a bug in poolray")
