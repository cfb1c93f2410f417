"""Calls whose results go straight to their caller: what Pool and Executor are made of.

What: functions made known once per group, calls collected into batches while the workers are busy,
results read and handed to receivers.
Who calls: `pool.py`, `executor.py`.
May touch: what the runtime touches.
Invariants: a call is given to exactly one batch, and its receiver gets exactly one result, unless
the group is terminated, when the face settles what is left.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, final

from poolray.client_functions import DefinedFunction, function_id_of
from poolray.client_values import ready_to_raise
from poolray.exceptions import InternalError
from poolray.ids import ClassId, FunctionId
from poolray.local.runtime import GroupHandle, LocalRuntime, Sink, group_has_ended
from poolray.objects.serialization import Serialized, deserialize
from poolray.protocol.client import DefineClass, PutObject, ReleaseReferences
from poolray.protocol.values import CallKind, Delivery, InArena, InFile, Outcome, TaskClass

#: Calls in a batch at the most: the machine cuts batches into packets, which copies what is left.
_BATCH_MAX = 512
_FUNCTIONS_MAX = 256
#: No call is waited for so long.
_FOR_EVER_S = 1e9


class Receiver(Protocol):
    """Gets the result of one call."""

    def on_result(self, result: bytes | Outcome) -> None:
        """Called once, outside of any lock, by the thread that leads."""


@final
class _Batch(Sink):
    """The receivers of a batch of calls."""

    __slots__ = ("_left", "_receivers")

    def __init__(self, receivers: list[Any]) -> None:
        self._receivers = receivers
        self._left = len(receivers)

    def deliver(self, start: int, results: list[bytes | Outcome]) -> bool:
        receivers = self._receivers
        for result in results:
            receiver = receivers[start]
            receivers[start] = None
            receiver.on_result(result)
            start += 1
        self._left -= len(results)
        return self._left == 0


@final
class _Single(Sink):
    """The receiver of one call."""

    __slots__ = ("_receiver",)

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def deliver(self, start: int, results: list[bytes | Outcome]) -> bool:
        self._receiver.on_result(results[0])
        return True


@final
class _Line:
    """Calls of one group that can still be cancelled, in the order in which they came.

    They stay here until a worker has room for them; then their receivers are asked with `begin()`
    whether they are still wanted.
    """

    __slots__ = ("__weakref__", "_group", "_runtime", "waiting")

    def __init__(self, runtime: LocalRuntime, handle: GroupHandle) -> None:
        self._runtime = runtime
        self._group = runtime.node.state.groups.get(handle.group_id)
        self.waiting: deque[tuple[CallStream, bytes, Any]] = deque()

    def add(self, stream: CallStream, payload: bytes, receiver: Receiver) -> None:
        """One more call."""
        self.waiting.append((stream, payload, receiver))
        self._runtime.open_batches[self] = None

    def flush_guarded(self) -> None:
        """Give the machine what workers have room for; the caller holds the guard."""
        waiting = self.waiting
        while waiting:
            stream = waiting[0][0]
            room = self._room(stream)
            if room <= 0:
                self._runtime.open_batches[self] = None
                return
            calls: list[bytes | InArena | InFile] = []
            receivers = []
            while waiting and waiting[0][0] is stream and len(calls) < min(_BATCH_MAX, room):
                _, payload, receiver = waiting.popleft()
                if receiver.begin():
                    calls.append(payload)
                    receivers.append(receiver)
            if calls:
                self._runtime.submit_calls_guarded(stream.task_class, calls, _Batch(receivers))

    def _room(self, stream: CallStream) -> int:
        """Calls of a function that workers can take soon: what is sent cannot be cancelled."""
        group, queue, config = self._group, stream.queue, self._runtime.config
        if group is None or self._runtime.node.state.groups.get(group.group_id) is not group:
            return _BATCH_MAX  # it has ended: the machine fails the calls
        queued = sum(other.queued_calls for other in group.ready.values())
        free = len(group.idle) + max(0, group.size - len(group.workers)) + group.starting
        estimate = queue.estimate_s
        if estimate is None or queued > queue.queued_calls or not queue.may_prefetch(config):
            return free - queued
        each = min(config.packet_calls_max, int(config.packet_target_s / estimate) or 1)
        workers = max(len(group.workers), group.size)
        return config.packets_per_worker_max * each * workers - queued

    def drain(self) -> list[Any]:
        """Receivers of the calls that wait here; they will not be sent."""
        receivers = [receiver for _, _, receiver in self.waiting]
        self.waiting.clear()
        return receivers


@final
class CallStream:
    """Calls of one function in one group.

    Parameters
    ----------
    line : _Line or None
        Where calls wait while they can be cancelled; None: they cannot be.
    definition : DefinedFunction or None
        Keeps the function known for as long as the stream lives; None: calls bring theirs.
    """

    __slots__ = (
        "__weakref__",
        "_definition",
        "_group",
        "_line",
        "_pending",
        "_runtime",
        "queue",
        "task_class",
    )

    def __init__(
        self,
        runtime: LocalRuntime,
        handle: GroupHandle,
        task_class: TaskClass,
        line: _Line | None,
        definition: DefinedFunction | None,
    ) -> None:
        self._runtime = runtime
        self._group = runtime.node.state.groups.get(handle.group_id)
        self.queue = runtime.node.state.classes[task_class.class_id]
        self._line = line
        self._definition = definition
        self.task_class = task_class
        #: (payload, receiver) of calls that the machine does not know yet.
        self._pending: deque[tuple[bytes, Any]] = deque()

    def add(self, payload: bytes, receiver: Receiver) -> None:
        """One more call: goes out at once if a worker can take it, else with those after it."""
        runtime = self._runtime
        pending = self._pending
        group, line = self._group, self._line
        if (
            group is not None
            and group.idle
            and not (pending if line is None else line.waiting)
            and self._give_to_idle(payload, receiver)
        ):
            runtime.after_submit()
            return
        if line is not None:
            line.add(self, payload, receiver)
        else:
            pending.append((payload, receiver))
            runtime.open_batches[self] = None
        if (
            group is None
            or group.idle
            or (group.hungry and not group.ready)
            or len(pending) >= _BATCH_MAX
            or len(group.workers) < group.size
            or (group.starting and line is not None)
        ):
            runtime.flush_batches()
        runtime.after_submit()

    def _give_to_idle(self, payload: bytes, receiver: Any) -> bool:
        """Send a call that no other is waiting before; False when no worker is idle any more."""
        runtime, guard = self._runtime, self._runtime.guard
        guard.enter()
        try:
            with guard.lock:
                if self._group is None or not self._group.idle:
                    return False
                if self._line is None or receiver.begin():
                    runtime.submit_calls_guarded(self.task_class, [payload], _Single(receiver))
        finally:
            guard.leave()
        return True

    def flush_guarded(self) -> None:
        """Give the machine what has been collected; the caller holds the guard."""
        pending = self._pending
        while pending:
            calls: list[bytes | InArena | InFile] = []
            receivers = []
            while pending and len(calls) < _BATCH_MAX:
                payload, receiver = pending.popleft()
                calls.append(payload)
                receivers.append(receiver)
            self._runtime.submit_calls_guarded(self.task_class, calls, _Batch(receivers))

    def add_many(self, payloads: list[bytes], receivers: list[Any]) -> None:
        """Many calls at once."""
        for start in range(0, len(payloads), _BATCH_MAX):
            self._runtime.submit_calls(
                self.task_class,
                list(payloads[start : start + _BATCH_MAX]),
                _Batch(receivers[start : start + _BATCH_MAX]),
            )
        self._runtime.after_submit()

    def add_large(self, payload: Serialized | bytes, receiver: Receiver) -> None:
        """A call whose arguments travel through the arena, or have refs in them."""
        client = self._runtime.client
        if self._line is not None and not receiver.begin():  # type: ignore[attr-defined]
            return
        refs = list(dict.fromkeys(payload.refs)) if isinstance(payload, Serialized) else []
        size = payload.size_bytes if isinstance(payload, Serialized) else len(payload)
        value: bytes | InArena | InFile
        if size <= self._runtime.config.inline_max_bytes:
            value = payload.to_bytes() if isinstance(payload, Serialized) else payload
            self._runtime.submit_calls(self.task_class, [value], _Batch([receiver]), refs)
        else:
            object_id = client.next_object_id()
            self._runtime.enter()
            try:
                value = client.store(object_id, payload)
                self._runtime.tell(PutObject(object_id=object_id, value=value))
                self._runtime.submit_calls(
                    self.task_class, [value], _Batch([receiver]), [*refs, object_id]
                )
                self._runtime.tell(ReleaseReferences(object_ids=[object_id]))
            finally:
                self._runtime.leave()
        self._runtime.after_submit()


@final
class CallGroup:
    """A group of workers together with the functions that they know.

    Parameters
    ----------
    max_retries : int
        Further attempts of a call whose worker died.
    cancellable : bool
        Calls wait until a worker has room for them; see `_Line`.
    """

    def __init__(
        self,
        runtime: LocalRuntime,
        handle: GroupHandle,
        max_retries: int,
        cancellable: bool = False,
    ) -> None:
        self.runtime = runtime
        self.handle = handle
        self._max_retries = max_retries
        self._line = _Line(runtime, handle) if cancellable else None
        self.inline_max_bytes = runtime.config.inline_max_bytes
        #: (function, kind) -> stream; functions are kept alive, so that their ids stay theirs.
        self._streams: dict[tuple[Any, CallKind], CallStream] = {}
        #: (function id, kind, limit) -> stream, also of functions that go by value.
        self._by_function_id: dict[tuple[FunctionId, CallKind, float], CallStream] = {}
        #: For callables with state of their own, which travel with each call.
        self._apply_stream: CallStream | None = None
        #: The same for calls of limited time, by their limits too.
        self._limited_streams: dict[tuple[Any, CallKind, float], CallStream] = {}
        self._limited_apply_streams: dict[float, CallStream] = {}

    def dumps(self, value: object) -> bytes | Serialized:
        """Serialize something for the group's workers."""
        return self.handle.serializer.dumps(value)

    def dumps_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | Serialized:
        """Serialize the arguments of a call for the group's workers."""
        return self.handle.serializer.dumps_call(args, kwargs)

    def stream(self, function: Callable[..., Any], kind: CallKind) -> CallStream:
        """Calls of a function.

        Raises
        ------
        TypeError, pickle.PicklingError, AttributeError
            The function cannot be serialized.
        """
        key = (function, kind)
        try:
            found = self._streams.get(key)
        except TypeError:  # a callable that cannot be hashed
            found = None
        if found is not None:
            return found
        made, by_reference = self._make_stream(function, kind, 0.0)
        if by_reference:
            # Others are written anew at each use: what they captured may change.
            if len(self._streams) >= _FUNCTIONS_MAX:
                self._streams.clear()
            self._streams[key] = made
        return made

    def limited_stream(
        self, function: Callable[..., Any], kind: CallKind, timeout_s: float
    ) -> CallStream:
        """Calls of a function that are ended when they run for longer than that."""
        key = (function, kind, timeout_s)
        try:
            found = self._limited_streams.get(key)
        except TypeError:  # a callable that cannot be hashed
            found = None
        if found is not None:
            return found
        made, by_reference = self._make_stream(function, kind, timeout_s)
        if by_reference:
            if len(self._limited_streams) >= _FUNCTIONS_MAX:
                self._limited_streams.clear()
            self._limited_streams[key] = made
        return made

    def _make_stream(
        self, function: Callable[..., Any], kind: CallKind, timeout_s: float
    ) -> tuple[CallStream, bool]:
        """The stream of a function's calls, and whether the function goes by reference."""
        data, by_reference = self.handle.serializer.dumps_function(function)
        blob = data if isinstance(data, bytes) else data.to_bytes()
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        function_id = function_id_of(blob)
        known = self._by_function_id.get((function_id, kind, timeout_s))
        if known is None:
            definition = self.runtime.client.definitions.define_blob(blob, name)
            known = self._stream_of(function_id, name, kind, definition, timeout_s)
            if len(self._by_function_id) >= _FUNCTIONS_MAX:
                self._by_function_id.clear()
            self._by_function_id[function_id, kind, timeout_s] = known
        return known, by_reference

    def apply_stream(self) -> CallStream:
        """Calls that bring their callable along."""
        if self._apply_stream is None:
            self._apply_stream = self._stream_of(FunctionId(b""), "apply", CallKind.APPLY, None)
        return self._apply_stream

    def limited_apply_stream(self, timeout_s: float) -> CallStream:
        """The same for calls that are ended when they run for longer than that."""
        made = self._limited_apply_streams.get(timeout_s)
        if made is None:
            made = self._limited_apply_streams[timeout_s] = self._stream_of(
                FunctionId(b""), "apply", CallKind.APPLY, None, timeout_s
            )
        return made

    def _stream_of(
        self,
        function_id: FunctionId,
        name: str,
        kind: CallKind,
        definition: DefinedFunction | None,
        timeout_s: float = 0.0,
    ) -> CallStream:
        group_id = self.handle.group_id
        head = b"%d %d %r " % (group_id, kind, timeout_s)
        digest = hashlib.blake2b(head + function_id + name.encode(), digest_size=16).digest()
        task_class = TaskClass(
            class_id=ClassId(digest),
            function_id=function_id,
            name=name,
            kind=kind,
            delivery=Delivery.CALLER,
            resources={},
            group_id=group_id,
            max_retries=self._max_retries,
            writable=True,
            timeout_s=timeout_s,
        )
        self.runtime.tell(DefineClass(task_class=task_class))
        try:
            return CallStream(self.runtime, self.handle, task_class, self._line, definition)
        except KeyError:  # another thread has ended the group, and with it its classes
            raise group_has_ended() from None

    def drain(self) -> list[Any]:
        """Receivers of calls that the machine does not know yet; they will not be sent."""
        with self.runtime.guard:
            return self._line.drain() if self._line is not None else []

    def submit(self, stream: CallStream, payload: bytes | Serialized, receiver: Receiver) -> None:
        """Send one call."""
        if type(payload) is bytes and len(payload) <= self.inline_max_bytes:
            stream.add(payload, receiver)
        else:
            stream.add_large(payload, receiver)

    def load(self, result: bytes | Outcome) -> tuple[bool, Any]:
        """A result: (True, value), or (False, what the worker or the node says went wrong)."""
        if isinstance(result, bytes):
            return True, deserialize(result, True)
        value = result.values[0]
        if isinstance(value, InArena | InFile):
            client = self.runtime.client
            loaded = client.load(value, True)
            if isinstance(value, InArena):
                client.forget_fresh(value.object_id)
            else:
                self.runtime.release([value.object_id])
        else:
            loaded = deserialize(value, True)
        return not result.is_error, loaded


def split_error(error: Any) -> tuple[BaseException, str | None, str | None]:
    """What `load` gives for an error: (exception, traceback text, text of what could not be
    pickled).
    """
    if isinstance(error, tuple):
        return error
    if isinstance(error, BaseException):
        return ready_to_raise(error), None, None
    return InternalError(f"a call failed with {error!r}"), None, None


def check_timeout(timeout: object) -> float:
    """The limit of a call's time, as it was given.

    Raises
    ------
    TypeError
        It is no number.
    ValueError
        It is not above 0.
    """
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if not 0 < timeout < _FOR_EVER_S:
        raise ValueError(
            f"timeout must be above 0 seconds and finite, not {timeout!r}; None is no limit"
        )
    return float(timeout)
