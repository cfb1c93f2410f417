"""Every error that poolray raises, in one tree.

    PoolrayError                      everything here
    ├── TaskError                     the user's own exception (also an instance of its class)
    ├── WorkerCrashedError            the worker died while it ran the task
    ├── OutOfMemoryError              memory was short, or the task used more than its memory=
    ├── TaskCancelledError            the task was cancelled
    ├── TaskUnschedulableError        no place for the task, ever
    ├── ActorUnschedulableError       no place for the actor, ever
    ├── TaskPlacementGroupRemoved     the placement group that the task is to run in is gone
    ├── ActorPlacementGroupRemoved    the same of an actor (kept for the name)
    ├── WorkerStartError              workers of a group do not start (initializer, environment)
    ├── RuntimeEnvSetupError          the environment of a task cannot be made
    ├── GetTimeoutError               also a TimeoutError
    ├── CallTimeoutError              a call ran for longer than it may; also a TimeoutError
    ├── ActorError                    an actor could not answer a call
    │   ├── ActorDiedError            it is dead, for good
    │   └── ActorUnavailableError     it is being restarted
    ├── ActorAlreadyExistsError       the name is taken; also a ValueError
    ├── PendingCallsLimitExceeded     more calls of an actor wait than its limit allows
    ├── ObjectStoreFullError          no room for a value in memory, and no way to put it on disk
    │   └── OutOfDiskError            the disk is full, or the share of it that we may use
    ├── ObjectLostError               the value is gone and cannot be made again
    │   ├── ObjectFreedError
    │   ├── OwnerDiedError
    │   ├── ObjectReconstructionFailedError
    │   └── ObjectFetchTimedOutError  kept for the name, as the next six
    ├── AsyncioActorExit
    ├── LocalRayletDiedError
    ├── PlasmaObjectNotAvailable
    ├── CrossLanguageError
    ├── UnserializableException
    ├── ActorHandleNotFoundError      also a ValueError
    ├── NodeDiedError                 the machine of a task is gone
    ├── AuthenticationError           this process and the cluster have not the same token
    ├── ClusterConnectionError        no cluster there, or it is gone; also a ConnectionError
    ├── StateApiError                 what was asked about the cluster was not answered by all nodes
    ├── NotSupportedError             an option that this version does not carry out
    └── InternalError                 a bug of ours; carries the history to report
        └── IllegalTransition         a state machine got an event that its table forbids

What: classes with fields; the message is built from the fields.
Who calls: every room raises; users catch.
May touch: nothing.
Invariants: each class pickles with its fields; `Ray…` names are aliases, so that code written for
the reference catches the same errors.
"""

from __future__ import annotations

import signal as _signal
from typing import Any

__all__ = [
    "ActorAlreadyExistsError",
    "ActorDiedError",
    "ActorError",
    "ActorHandleNotFoundError",
    "ActorPlacementGroupRemoved",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AsyncioActorExit",
    "AuthenticationError",
    "CallTimeoutError",
    "ClusterConnectionError",
    "CrossLanguageError",
    "GetTimeoutError",
    "IllegalTransition",
    "InternalError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "NotSupportedError",
    "ObjectFetchTimedOutError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectStoreFullError",
    "OutOfDiskError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceeded",
    "PlasmaObjectNotAvailable",
    "PoolrayError",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "RuntimeEnvSetupError",
    "StateApiError",
    "TaskCancelledError",
    "TaskError",
    "TaskPlacementGroupRemoved",
    "TaskUnschedulableError",
    "UnserializableException",
    "WorkerCrashedError",
    "WorkerStartError",
]


class PoolrayError(Exception):
    """Base class of all errors of poolray."""

    def __reduce__(self) -> Any:
        # Fields first, args after: subclasses take keyword arguments only, so the default
        # reduce (class called with args) would not rebuild them.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[PoolrayError], args: tuple[Any, ...], fields: dict[str, Any]) -> Any:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


class TaskError(PoolrayError):
    """An exception that user code raised in a task.

    What `get` raises is an instance of this class and, wherever Python allows it, also of the
    class of the original exception, so both `except TaskError` and `except ValueError` catch it.

    Attributes
    ----------
    function_name : str
        The name of the task that failed.
    traceback_str : str
        The traceback in the worker, formatted.
    cause : BaseException
        The original exception; where it could not travel, a `PoolrayError` with its text.
    pid : int
        The worker's process id.
    """

    def __init__(
        self, function_name: str, traceback_str: str, cause: BaseException, *, pid: int = 0
    ) -> None:
        super().__init__(traceback_str)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.pid = pid

    def __str__(self) -> str:
        return self.traceback_str

    def as_instanceof_cause(self) -> TaskError:
        """This error as an instance of the cause's class too, where such a class can be made."""
        cause_class = type(self.cause)
        if issubclass(TaskError, cause_class):
            return self
        try:
            made: TaskError = _dual_class(cause_class)(self)
        except Exception:
            # Layout conflicts, final classes, hostile metaclasses: the plain error says it all.
            return self
        return made


_dual_classes: dict[type[BaseException], type[TaskError]] = {}


def _dual_class(cause_class: type[BaseException]) -> Any:
    """The class that is both `TaskError` and `cause_class`; made once per class."""
    made = _dual_classes.get(cause_class)
    if made is None:
        made = type(
            f"TaskError({cause_class.__name__})",
            (_DualTaskError, cause_class),
            {"__module__": "poolray.exceptions", "__qualname__": "TaskError"},
        )
        if len(_dual_classes) < 1024:  # exception classes are few; a program that makes them
            _dual_classes[cause_class] = made  # without end must not leak through us
    return made


#: Of `type.__flags__`: a class made by a class statement.
_HEAP_TYPE = 1 << 9


class _DualTaskError(TaskError):
    """Behaves as its cause (attributes, equality of args) and as a `TaskError`."""

    def __init__(self, error: TaskError) -> None:
        # The cause's own __init__ is not called: its signature is unknown and it has run already.
        self.function_name = error.function_name
        self.traceback_str = error.traceback_str
        self.cause = error.cause
        self.pid = error.pid
        self.args = error.cause.args
        for name, value in vars(error.cause).items():
            self.__dict__.setdefault(name, value)

    def __new__(cls, error: TaskError) -> Any:
        cause: Any = error.cause
        # A group's constructor insists on its two arguments, whatever a subclass keeps in `args`.
        args = (cause.message, cause.exceptions) if hasattr(cause, "exceptions") else cause.args
        for base in type(cause).__mro__:
            # Constructors in Python are the user's: theirs has run already. Of those in C only
            # the one that made the memory layout is allowed.
            if not base.__flags__ & _HEAP_TYPE:
                try:
                    return base.__new__(cls, *args)
                except TypeError:
                    continue
        raise TypeError(f"no constructor of {type(cause)!r} makes an instance of {cls!r}")

    def __getattr__(self, name: str) -> Any:
        if name in ("cause", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.cause, name)

    def __str__(self) -> str:
        return self.traceback_str

    def __reduce__(self) -> Any:
        return _rebuild_dual, (self.function_name, self.traceback_str, self.cause, self.pid)


def _rebuild_dual(
    function_name: str, traceback_str: str, cause: BaseException, pid: int
) -> TaskError:
    return TaskError(
        function_name=function_name, traceback_str=traceback_str, cause=cause, pid=pid
    ).as_instanceof_cause()


class WorkerCrashedError(PoolrayError):
    """The worker that ran a task died: a signal, the OOM killer, `os._exit`.

    Attributes
    ----------
    task_name, task_id : str
        The task that ran, and its id in hex.
    pid : int
        The worker's process id.
    exit_code, signal : int or None
        How it ended; one of them is None.
    attempts : int
        How often the task was tried.
    """

    def __init__(
        self,
        message: str = "",
        *,
        task_name: str = "",
        task_id: str = "",
        pid: int = 0,
        exit_code: int | None = None,
        signal: int | None = None,
        attempts: int = 0,
    ) -> None:
        self.task_name = task_name
        self.task_id = task_id
        self.pid = pid
        self.exit_code = exit_code
        self.signal = signal
        self.attempts = attempts
        if message or not task_id:
            super().__init__(message or "The worker that ran a task died unexpectedly.")
            return
        super().__init__(
            f"Task {task_name} ({task_id[:12]}) lost its worker: pid {pid} "
            f"{describe_exit(exit_code, signal)}. It was tried {attempts} time(s). "
            + _CRASH_ADVICE.get(signal, "Look at the worker's output for the reason")
            + "; allow more attempts with max_retries=."
        )


_CRASH_ADVICE: dict[int | None, str] = {
    9: "It was killed from outside, probably because the machine was out of memory: "
    "run fewer at once or reserve more per task",
    11: "Native code crashed: set faulthandler.enable() in the task to see where",
}


def describe_exit(exit_code: int | None, signal: int | None) -> str:
    """How a process ended, in words."""
    if signal is not None:
        try:
            name = _signal.Signals(signal).name
        except ValueError:
            name = "unknown signal"
        return f"was killed by signal {signal} ({name})"
    return f"exited with code {exit_code}"


def describe_size(size_bytes: int) -> str:
    """A number of bytes, in words."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


class OutOfMemoryError(PoolrayError):
    """The task was ended because memory was short, or because it used more than its `memory=`.

    Attributes
    ----------
    task_name, task_id, node_id : str
        The task and the node that it ran on; ids in hex.
    pid : int
        Its worker's process id.
    worker_bytes : int
        What the worker used by itself.
    limit_bytes : int
        The task's `memory=`, if that was exceeded; 0: the machine was short of memory.
    used_bytes, total_bytes : int
        What was in use of the machine's memory, or of its container's.
    threshold : float
        The share of it beyond which work is ended.
    attempts : int
        How often the task was tried.
    processes : tuple of (int, int, str)
        The processes that used most: pid, bytes, name.
    """

    def __init__(
        self,
        message: str = "",
        *,
        task_name: str = "",
        task_id: str = "",
        node_id: str = "",
        pid: int = 0,
        worker_bytes: int = 0,
        used_bytes: int = 0,
        total_bytes: int = 0,
        threshold: float = 0.0,
        attempts: int = 0,
        limit_bytes: int = 0,
        processes: tuple[tuple[int, int, str], ...] = (),
    ) -> None:
        self.task_name = task_name
        self.task_id = task_id
        self.node_id = node_id
        self.pid = pid
        self.worker_bytes = worker_bytes
        self.used_bytes = used_bytes
        self.total_bytes = total_bytes
        self.threshold = threshold
        self.attempts = attempts
        self.limit_bytes = limit_bytes
        self.processes = processes
        if message or not task_id:
            super().__init__(message or "A task was ended because memory was short.")
        else:
            super().__init__(self._limit_text() if limit_bytes else self._shortage_text())

    @property
    def message(self) -> str:
        """The message, under the reference's name."""
        return str(self)

    def _limit_text(self) -> str:
        return (
            f"Task {self.task_name} ({self.task_id[:12]}) was ended for using too much memory: its "
            f"worker, pid {self.pid} on node {self.node_id[:12]}, used "
            f"{describe_size(self.worker_bytes)}, and it had asked for memory={self.limit_bytes} "
            f"({describe_size(self.limit_bytes)}). Ask for more, or let memory= be for scheduling "
            "only with POOLRAY_enforce_memory_limits=0."
        )

    def _shortage_text(self) -> str:
        lines = [
            f"Task {self.task_name} ({self.task_id[:12]}) was ended because memory was short: its "
            f"worker, pid {self.pid} on node {self.node_id[:12]}, used "
            f"{describe_size(self.worker_bytes)}, and {describe_size(self.used_bytes)} of "
            f"{describe_size(self.total_bytes)} were in use "
            f"({self.used_bytes / max(1, self.total_bytes):.1%}; memory_usage_threshold is "
            f"{self.threshold:g}). It was tried {self.attempts} time(s)."
        ]
        if self.processes:
            lines.append("What used most:")
            lines.extend(
                f"  pid {pid:<8} {describe_size(used):>10}  {name}"
                for pid, used, name in self.processes
            )
        lines.append(
            "Run fewer tasks at once (num_cpus=, memory=), or give them less to do; "
            "POOLRAY_memory_usage_threshold moves the mark, POOLRAY_memory_monitor_refresh_ms=0 "
            "switches this protection off."
        )
        return "\n".join(lines)


class TaskCancelledError(PoolrayError):
    """The task was cancelled before it had a result.

    Attributes
    ----------
    task_id, task_name : str
        The task, its id in hex.
    reason : str
        More than that somebody asked for it, if there is more: where it was interrupted, or that
        its workers were terminated.
    """

    def __init__(self, *, task_id: str = "", reason: str = "", task_name: str = "") -> None:
        self.task_id = task_id
        self.task_name = task_name
        self.reason = reason
        named = f"{task_name} ({task_id[:12]})" if task_name else task_id[:12]
        super().__init__(f"Task {named} was cancelled{': ' + reason if reason else ''}.")


class TaskUnschedulableError(PoolrayError):
    """No node can ever run the task."""


class ActorUnschedulableError(PoolrayError):
    """No node can ever run the actor."""


class TaskPlacementGroupRemoved(PoolrayError):
    """The placement group in which the task was to run has been removed."""


class ActorPlacementGroupRemoved(PoolrayError):
    """The placement group in which an actor was to live has been removed.

    Programs catch it by this name; here such an actor raises `ActorUnschedulableError` if it was
    never made, and `ActorDiedError` if it was.
    """


class WorkerStartError(PoolrayError):
    """The workers of a group do not start.

    Attributes
    ----------
    reason : str
        What the worker said last: the initializer's traceback, or how the process ended.
    """

    def __init__(self, *, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Workers could not be started: {reason}")


class RuntimeEnvSetupError(PoolrayError):
    """The runtime environment of a task could not be made."""


class GetTimeoutError(PoolrayError, TimeoutError):
    """`get` had a timeout and not every object was ready in time."""


class CallTimeoutError(PoolrayError, TimeoutError):
    """A call ran for longer than the `timeout` that it was given, and was ended.

    Attributes
    ----------
    task_name : str
        The function.
    timeout_s : float
        How long it may run.
    pid : int
        The worker's process, which was replaced; 0: not known, on a cluster.
    """

    def __init__(self, *, task_name: str, timeout_s: float, pid: int) -> None:
        self.task_name = task_name
        self.timeout_s = timeout_s
        self.pid = pid
        super().__init__(
            f"A call of {task_name} ran for longer than its timeout of {timeout_s:g} s and was "
            f"ended; its worker{f' (pid {pid})' if pid else ''} was replaced. Give it more time "
            "with timeout=."
        )


class ActorError(PoolrayError):
    """An actor could not answer a call: it is dead, or being restarted.

    Attributes
    ----------
    actor_id : str
        The actor's id in hex.
    class_name : str
        The actor's class.
    reason : str
        What happened to it.
    """

    def __init__(
        self, actor_id: str = "", error_msg: str = "", *, class_name: str = "", reason: str = ""
    ) -> None:
        self.actor_id = actor_id
        self.class_name = class_name
        self.reason = reason
        if error_msg or not reason:
            super().__init__(error_msg or f"{self._what} failed before it had finished a call.")
        else:
            super().__init__(f"{self._what} {class_name} ({actor_id}) {reason}")

    #: How the message begins.
    _what = "The actor"

    @property
    def error_msg(self) -> str:
        """The message, under the reference's name."""
        return str(self)

    @property
    def actor_init_failed(self) -> bool:
        """Whether the actor's constructor raised."""
        return False


class ActorDiedError(ActorError):
    """The actor is dead and will not come back; the call was not carried out, or not to its end.

    Attributes
    ----------
    pid : int
        The process that it lived in last; 0 if it never had one.
    cause : TaskError or None
        What the constructor raised, if that is why.
    """

    def __init__(
        self,
        cause: TaskError | None = None,
        *,
        actor_id: str = "",
        class_name: str = "",
        reason: str = "",
        pid: int = 0,
    ) -> None:
        super().__init__(actor_id=actor_id, class_name=class_name, reason=reason)
        self.pid = pid
        self.cause = cause

    @property
    def actor_init_failed(self) -> bool:
        """Whether the actor's constructor raised."""
        return self.cause is not None


class ActorUnavailableError(ActorError):
    """The actor is being restarted; the call may have been carried out or not. Later calls of the
    actor may succeed.
    """

    def __init__(
        self, error_message: str = "", actor_id: str = "", *, class_name: str = "", reason: str = ""
    ) -> None:
        super().__init__(actor_id, error_message, class_name=class_name, reason=reason)


class ActorAlreadyExistsError(PoolrayError, ValueError):
    """The name is that of another actor that lives in the namespace.

    Attributes
    ----------
    name, namespace : str
    """

    def __init__(self, error_message: str = "", *, name: str = "", namespace: str = "") -> None:
        self.name = name
        self.namespace = namespace
        super().__init__(
            error_message
            or f"The name {name} (namespace={namespace}) is already taken. Use a different name, "
            f"get the existing actor with get_actor({name!r}, namespace={namespace!r}), or create "
            "it with get_if_exists=True."
        )


class PendingCallsLimitExceeded(PoolrayError):
    """A call was refused: as many calls as `max_pending_calls` allows wait for their results."""


class ObjectStoreFullError(PoolrayError):
    """There is no room for a value.

    Attributes
    ----------
    size_bytes : int
        Size of the value.
    reason : str
        What was tried and failed.
    """

    def __init__(self, message: str = "", *, size_bytes: int = 0, reason: str = "") -> None:
        self.size_bytes = size_bytes
        self.reason = reason
        what = f"an object of {size_bytes} bytes: {reason}" if reason else "an object"
        super().__init__(
            message
            or f"No room for {what}. Drop refs and arrays that are "
            "not needed any more, give the runtime more memory with init(object_store_memory=...) "
            "or another disk with init(object_spilling_directory=...)."
        )


class OutOfDiskError(ObjectStoreFullError):
    """Memory is full, and so is the disk, or the part of it that the runtime may use."""


class ObjectLostError(PoolrayError):
    """An object's value is gone and cannot be made again.

    Attributes
    ----------
    object_id : str
        The object's id in hex.
    reason : str
        What happened to it.
    """

    def __init__(
        self,
        object_ref_hex: str = "",
        owner_address: bytes | None = None,
        call_site: str = "",
        *,
        object_id: str = "",
        reason: str = "",
    ) -> None:
        self.object_id = object_id or object_ref_hex
        self.owner_address = owner_address
        self.call_site = call_site
        self.reason = reason
        super().__init__(f"Object {self.object_id} is lost{': ' + reason if reason else ''}")


class ObjectFreedError(ObjectLostError):
    """The object was freed while somebody still asked for it."""


class OwnerDiedError(ObjectLostError):
    """The node that owned the object died."""


class ObjectReconstructionFailedError(ObjectLostError):
    """Running the object's lineage again did not bring it back."""


class NodeDiedError(PoolrayError):
    """The node that ran a task died.

    Attributes
    ----------
    task_name, task_id, node_id : str
        Which task, and which node it ran on; ids in hex.
    attempts : int
        How often the task was tried.
    """

    def __init__(
        self,
        message: str = "",
        *,
        task_name: str = "",
        task_id: str = "",
        node_id: str = "",
        attempts: int = 0,
    ) -> None:
        self.task_name = task_name
        self.task_id = task_id
        self.node_id = node_id
        self.attempts = attempts
        if message or not task_id:
            super().__init__(message or "The node that ran a task died.")
            return
        super().__init__(
            f"Task {task_name} ({task_id[:12]}) lost its node {node_id[:12]} after {attempts} "
            "attempt(s); allow more attempts with max_retries=."
        )


class AuthenticationError(PoolrayError):
    """A process and the cluster that it speaks to have not the same token."""


class ClusterConnectionError(PoolrayError, ConnectionError):
    """There is no cluster at an address, or it has gone."""


class NotSupportedError(PoolrayError, ValueError):
    """An option that this version does not carry out; it is refused rather than ignored."""


class StateApiError(PoolrayError):
    """What was asked about the cluster's state was not answered, or not by all nodes."""


class InternalError(PoolrayError):
    """An invariant of poolray is broken: please report it with this message."""


class IllegalTransition(InternalError):
    """A state machine was asked for a move that its table does not have."""

    def __init__(self, *, what: str, state: str, event: str, history: tuple[str, ...] = ()) -> None:
        self.what = what
        self.state = state
        self.event = event
        self.history = history
        super().__init__(
            f"{what} in state {state} cannot take {event}. Recent history: "
            f"{' → '.join(history) or 'none'}. This is a bug in poolray: please report it."
        )


# What programs for the reference may name in an `except`, and what cannot happen here: nothing of
# the runtime raises these.


class AsyncioActorExit(PoolrayError):
    """`exit_actor()` in an asyncio actor; here it ends the actor without an exception."""


class LocalRayletDiedError(PoolrayError):
    """The node's daemon died; here `ClusterConnectionError` or `NodeDiedError` says so."""


class ObjectFetchTimedOutError(ObjectLostError):
    """An object could not be fetched in time; here it is fetched, or lost with its node."""


class PlasmaObjectNotAvailable(PoolrayError):
    """An object is not in the store; here it is waited for."""


class CrossLanguageError(PoolrayError):
    """A task in another language failed; there are none."""


class UnserializableException(PoolrayError):
    """An exception could not be rebuilt; here it arrives as `TaskError`, with its text."""


class ActorHandleNotFoundError(PoolrayError, ValueError):
    """A handle is of another cluster's actor; here its calls raise `ActorDiedError`."""


# The reference's names, so that `except ray.exceptions.RayTaskError` keeps working.
RayError = PoolrayError
RayTaskError = TaskError
RayActorError = ActorError
RaySystemError = InternalError
