"""Functions and task classes that a process has made known to its node.

What: serializes functions, sends each once per definition, lets the node forget those that nobody
uses any more; says so when one has become large by what it captures.
Who calls: `client.py`, the handles of functions and actors, Pool and Executor.
May touch: what the client's link touches.
Invariants: the node knows a function as long as a `DefinedFunction` of it lives; it hears of a
function before it hears of its classes, and of both before their first call.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
import types
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from poolray.ids import ClassId, FunctionId
from poolray.objects.serialization import Serialized, Serializer, dumps_function
from poolray.protocol.client import (
    DefineClass,
    DefineFunction,
    PutObject,
    ReleaseFunction,
    ReleaseReferences,
)
from poolray.protocol.values import FunctionDefinition, InArena, InFile, TaskClass

if TYPE_CHECKING:
    from poolray.client import Client

#: Functions that nobody uses any more and the node still knows: the next use of one is free.
_UNUSED_FUNCTIONS_MAX = 256
#: What captures variables or arguments.
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


@final
class DefinedFunction:
    """A function that the node knows for as long as this lives."""

    __slots__ = ("_dropped", "function_id")

    def __init__(self, function_id: FunctionId, dropped: deque[FunctionId]) -> None:
        self.function_id = function_id
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped.append(self.function_id)


@final
class Definitions:
    """What a client has defined."""

    def __init__(self, client: Client) -> None:
        self._client = client
        #: Guards the three fields below, and the order of what the node is told of functions.
        self._lock = threading.RLock()
        #: Functions that the node knows -> `DefinedFunction`s of them that live.
        self._functions: dict[FunctionId, int] = {}
        #: Those of them that have none, longest unused first.
        self._unused: dict[FunctionId, None] = {}
        #: Functions that the node knows -> their classes that it knows.
        self._classes: dict[FunctionId, dict[ClassId, None]] = {}
        #: Functions of `DefinedFunction`s that died; drained by the next definition.
        self._dropped: deque[FunctionId] = deque()

    def define_function(
        self, function: Callable[..., Any], name: str, shared_globals: str | None = None
    ) -> DefinedFunction:
        """Serialize a function and make it known to the node, by its content.

        Raises
        ------
        TypeError
            The function, or something that it captures, cannot be serialized.
        ValueError
            It captures more than `Config.function_max_bytes`.
        """
        try:
            blob = dumps_function(function, shared_globals)
        except Exception as error:
            raise TypeError(
                f"Could not serialize the function {name}:\n{type(error).__name__}: {error}\n"
                "Look for open files, locks, sockets or generators among what it refers to, and "
                "make them inside the function instead."
            ) from error
        return self.define_blob(blob, name)

    def define_blob(self, blob: bytes, name: str) -> DefinedFunction:
        """Make a serialized function known to the node."""
        function_id = function_id_of(blob)
        self._client.link.enter()
        try:
            with self._lock:
                self._release_unused()
                if function_id not in self._functions:
                    self._send_function(function_id, blob, name)
                    self._functions[function_id] = 0
                made = DefinedFunction(function_id, self._dropped)
                self._functions[function_id] += 1
                self._unused.pop(function_id, None)
                return made
        finally:
            self._client.link.leave()

    def hold(self, function_id: FunctionId) -> DefinedFunction:
        """Keep a defined function known."""
        with self._lock:
            made = DefinedFunction(function_id, self._dropped)
            self._functions[function_id] += 1
            self._unused.pop(function_id, None)
            return made

    def _send_function(self, function_id: FunctionId, blob: bytes, name: str) -> None:
        self._check_size(len(blob), name)
        stored: bytes | InArena | InFile = blob
        if len(blob) > self._client.config.inline_max_bytes // 2:
            object_id = self._client.next_object_id()
            stored = self._client.store(object_id, blob)
            self._client.link.send(PutObject(object_id=object_id, value=stored))
        definition = FunctionDefinition(
            function_id=function_id,
            blob=stored,
            name=name,
            sys_path=[entry for entry in sys.path if entry],
        )
        self._client.link.send(DefineFunction(definition=definition))
        if not isinstance(stored, bytes):
            self._client.link.send(
                ReleaseReferences(object_ids=[stored.object_id])
            )  # the function has it

    def _release_unused(self) -> None:
        """Let go of functions that have not been used for long; under the lock."""
        dropped, unused = self._dropped, self._unused
        while dropped:
            function_id = dropped.popleft()
            self._functions[function_id] -= 1
            if self._functions[function_id] == 0:
                unused[function_id] = None
        while len(unused) > _UNUSED_FUNCTIONS_MAX:
            function_id = next(iter(unused))
            del unused[function_id], self._functions[function_id]
            self._classes.pop(function_id, None)
            self._client.link.send(ReleaseFunction(function_id=function_id))

    def _check_size(self, size_bytes: int, name: str) -> None:
        """Say so if a function has become large by what it captures, or refuse it."""
        config = self._client.config
        if size_bytes > config.function_max_bytes:
            raise ValueError(
                f"The function {name} is too large ({size_bytes >> 20} MiB > "
                f"{config.function_max_bytes >> 20} MiB). Check that its definition does not "
                "capture a large array or other object in scope; put() the object once and pass "
                "the ref."
            )
        if size_bytes > config.function_warn_bytes:
            import warnings

            warnings.warn(
                f"The function {name} is large ({size_bytes / 2**20:.1f} MiB): it probably "
                "captures a large object. put() the object once and pass the ref.",
                stacklevel=level_of_caller(),
            )

    def check_captured(
        self,
        name: str,
        data: bytes | Serialized,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        serializer: Serializer,
    ) -> None:
        """The same for functions among the arguments of a call, which are not sent just once."""
        whole = len(data) if isinstance(data, bytes) else data.size_bytes
        if whole <= self._client.config.function_warn_bytes:
            return
        for label, value in [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]:
            if isinstance(value, _FUNCTIONS):
                part = serializer.dumps(value)
                size = len(part) if isinstance(part, bytes) else part.size_bytes
                function = getattr(value, "__qualname__", type(value).__qualname__)
                self._check_size(size, f"{function} (argument {label} of {name})")

    def define_class(self, task_class: TaskClass) -> None:
        """Make a task class of a defined function known to the node."""
        with self._lock:
            known = self._classes.setdefault(task_class.function_id, {})
            if task_class.class_id not in known:
                self._client.link.send(DefineClass(task_class=task_class))
                known[task_class.class_id] = None


def function_id_of(blob: bytes) -> FunctionId:
    """The id of a serialized function."""
    return FunctionId(hashlib.blake2b(blob, digest_size=16).digest())


def level_of_caller() -> int:
    """`stacklevel` of a warning, given where this is called, that is about the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("poolray."):
        frame, level = frame.f_back, level + 1
    return level
