"""Errors of user code, made fit to travel.

What: an exception with its traceback as bytes that always load: the exception itself where that
works, else its class and state, else its text.
Who calls: the worker.
May touch: nothing.
Invariants: what is encoded has been loaded once here, so the reader's loading cannot fail.
"""

from __future__ import annotations

import builtins
import os
import pickle
import traceback
from typing import Any

import cloudpickle

from poolray.exceptions import ActorDiedError, CallTimeoutError, PoolrayError, TaskError
from poolray.protocol.actors import ActorSetup

#: A report of a death must fit one packet of the report channel.
_DEATH_BYTES_MAX = 64 * 1024

_OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class UnpicklableResult(Exception):
    """A call returned something that cannot be serialized.

    Attributes
    ----------
    error : BaseException
        What the serializer raised.
    value_repr : str
        The value, as text.
    """

    def __init__(self, error: BaseException, value_repr: str) -> None:
        super().__init__(error, value_repr)
        self.error = error
        self.value_repr = value_repr


class OutOfTime(KeyboardInterrupt):
    """A call has run for longer than it may: raised in it, wherever it is."""

    def __init__(self, name: str, timeout_s: float) -> None:
        super().__init__(name, timeout_s)
        self.name = name
        self.timeout_s = timeout_s


class DependencyFailed(Exception):
    """An argument of the call is the error of another task."""

    def __init__(self, error: object) -> None:
        self.error = error


def encode_task_error(error: BaseException, name: str, pid: int) -> bytes:
    """An exception of a task, for `get`."""
    if isinstance(error, UnpicklableResult):
        error = error.error
    text = _format(error, name, pid)
    # An error that was got in the task and let out: its cause stays what it was.
    cause = error.cause if isinstance(error, TaskError) else error
    made = TaskError(function_name=name, traceback_str=text, cause=_portable(cause), pid=pid)
    made.cause = _with_chain(cause, made.cause)
    frames = _traceback_dict(error)
    if frames is not None:
        made._traceback_dict = frames  # type: ignore[attr-defined]
    return _dumps(made)


def encode_constructor_error(error: BaseException, setup: ActorSetup, pid: int) -> bytes:
    """The death of an actor whose constructor raised, for its callers."""
    name = f"{setup.class_name}.__init__"
    if isinstance(error, DependencyFailed):
        encoded = encode_dependency_error(error.error, name)
    else:
        encoded = encode_task_error(error, name, pid)
    cause = pickle.loads(encoded)
    text = "The actor died because of an error raised in its creation task, "
    died = ActorDiedError(
        actor_id=setup.actor_id.hex(),
        class_name=setup.class_name,
        reason=f"died: its constructor raised\n{text}{cause}",
        pid=pid,
        cause=cause if isinstance(cause, TaskError) else None,
    )
    data = _dumps(died)
    if len(data) > _DEATH_BYTES_MAX:
        short = f"died: its constructor raised\n{text}{str(cause)[:1000]}"
        died = ActorDiedError(
            actor_id=setup.actor_id.hex(), class_name=setup.class_name, reason=short, pid=pid
        )
        data = _dumps(died)
    return data


def encode_dependency_error(error: object, name: str) -> bytes:
    """The error of an argument, passed on: same cause, and the text says through which task."""
    intro = f"At least one of the input arguments for task {name} could not be computed:\n"
    if isinstance(error, PoolrayError) and not isinstance(error, TaskError):
        kind = type(error)
        text = f"{intro}{kind.__module__}.{kind.__qualname__}: {error}"
        wrapped = TaskError(function_name=name, traceback_str=text, cause=error, pid=os.getpid())
        return _dumps(wrapped)
    if isinstance(error, TaskError):
        cause = error.cause
        text = f"{intro}{error.traceback_str}"
        passed = TaskError(
            function_name=error.function_name,
            traceback_str=text,
            cause=cause,
            pid=error.pid,
        )
        passed.cause = _with_chain(cause, cause)
        frames = getattr(error, "_traceback_dict", None)
        if frames is not None:
            passed._traceback_dict = frames  # type: ignore[attr-defined]
        return _dumps(passed)
    return _dumps(error)


def describe_interrupt(error: KeyboardInterrupt) -> str:
    """Where a task was when it was interrupted."""
    stack = traceback.extract_tb(_user_frames(error))
    while stack and stack[-1].filename.startswith(_OUR_FOLDER):
        stack.pop()  # the signal handler, and where user code waits
    return "it was interrupted here:\n" + "".join(traceback.format_list(stack)).rstrip("\n")


def encode_plain(error: BaseException) -> bytes:
    """An exception of a Pool's or Executor's call: (exception, traceback text, unpicklable).

    The third element is None, or the text of what could not be pickled: then the exception is the
    pickling error.
    """
    if isinstance(error, UnpicklableResult):
        return pickle.dumps((_portable(error.error), None, error.value_repr))
    if isinstance(error, OutOfTime):
        late = CallTimeoutError(task_name=error.name, timeout_s=error.timeout_s, pid=os.getpid())
        return pickle.dumps((late, describe_interrupt(error), None))
    text = "".join(traceback.format_exception(type(error), error, _user_frames(error)))
    try:
        data = _dumps((error, text, None))
    except Exception as reason:
        return pickle.dumps((_portable(reason), text, _safe_repr(error)))
    travelling: Any = error
    try:
        pickle.loads(data)
    except Exception as reason:
        travelling = _by_state(error)
        if travelling is None:
            return pickle.dumps((_portable(reason), text, _safe_repr(error)))
    chained = _with_chain(error, travelling, cause_as_context=True)
    return data if chained is error else _dumps((chained, text, None))


def _is_ours(path: str) -> bool:
    return "/poolray/local/worker" in path or "/poolray/local/actor_worker" in path


def _user_frames(error: BaseException) -> Any:
    """The traceback without our own frames on top."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames if frames is not None else error.__traceback__


def _format(error: BaseException, name: str, pid: int) -> str:
    body = "".join(traceback.format_exception(type(error), error, _user_frames(error)))
    return f"ray::{name}() (pid={pid})\n{body}".rstrip("\n")


def _traceback_dict(error: BaseException) -> Any:
    frames = _user_frames(error)
    if frames is None:
        return None
    import tblib

    try:
        return tblib.Traceback(frames).to_dict()
    except Exception:
        # The text is there all the same; frames are a comfort for debuggers.
        return None


def _dumps(value: object) -> bytes:
    try:
        return pickle.dumps(value, 5)
    except Exception:
        return bytes(cloudpickle.dumps(value, 5))


def _portable(error: BaseException) -> Any:
    """The exception, if it survives the journey; else what comes closest."""
    try:
        pickle.loads(_dumps(error))
    except Exception:
        rebuilt = _by_state(error)
        if rebuilt is not None:
            return rebuilt
        return PoolrayError(
            f"{type(error).__module__}.{type(error).__qualname__}: {_safe_str(error)} (the "
            "exception itself could not be pickled)"
        )
    return error


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as reason:
        return f"<its text cannot be made: {type(reason).__name__}>"


def _safe_repr(value: object) -> str:
    try:
        return repr(value)[:1000]
    except Exception as reason:
        return f"<{type(value).__qualname__}, whose repr raises {type(reason).__name__}>"


class _ByState:
    """Stands for an exception whose own pickling fails: its class, arguments and attributes.

    Arguments that cannot travel are replaced by their text, attributes that cannot are left out,
    and members of a group go the same way as the group.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error
        members = getattr(error, "exceptions", None)
        if _is_group(error) and members is not None:
            self.args: tuple[Any, ...] = (error.message, [_portable(m) for m in members])  # type: ignore[attr-defined]
        else:
            self.args = tuple(a if _survives(a) else _safe_repr(a) for a in error.args)
        self.state = {k: v for k, v in vars(error).items() if _survives(v)}

    def __reduce__(self) -> Any:
        return _rebuild_by_state, (type(self.error), self.args, self.state)


def _is_group(error: BaseException) -> bool:
    kind = getattr(builtins, "BaseExceptionGroup", None)  # from Python 3.11 on
    return kind is not None and isinstance(error, kind)


def _rebuild_by_state(
    cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def _survives(value: object) -> bool:
    try:
        pickle.loads(_dumps(value))
    except Exception:
        return False
    return True


def _by_state(error: BaseException) -> Any:
    """A stand-in that rebuilds the exception without calling its constructor, or None."""
    try:
        stand_in = _ByState(error)
        if not isinstance(pickle.loads(_dumps(stand_in)), type(error)):
            return None
    except Exception:
        return None
    return stand_in


# ---- causes and contexts -------------------------------------------------------------------------

#: Exceptions of one chain that travel; errors of retries in a loop can be chained without end.
_CHAIN_MAX = 64


class _Chained:
    """Stands for an exception with the exceptions that it was raised from, or while handling.

    pickle leaves `__cause__` and `__context__` out.
    """

    def __init__(self, portable: list[Any], links: list[tuple[int, int, int, bool]]) -> None:
        self.portable = portable
        self.links = links

    def __reduce__(self) -> Any:
        return _rebuild_chain, (self.portable, self.links)


def _rebuild_chain(
    errors: list[BaseException], links: list[tuple[int, int, int, bool]]
) -> BaseException:
    for index, cause, context, suppress in links:
        error = errors[index]
        if cause >= 0:
            error.__cause__ = errors[cause]
        if context >= 0:
            error.__context__ = errors[context]
        error.__suppress_context__ = suppress
    return errors[0]


def _is_linked(error: BaseException) -> bool:
    return (
        error.__cause__ is not None or error.__context__ is not None or error.__suppress_context__
    )


def _with_chain(error: BaseException, portable: Any, cause_as_context: bool = False) -> Any:
    """What travels for an exception and for all that it is chained to.

    Parameters
    ----------
    error : BaseException
        The exception as it was raised.
    portable : BaseException or a stand-in
        What travels for the exception alone; returned as it is when there is no chain.
    cause_as_context : bool
        The reader will put another cause in the place of the first exception's: keep it as context.
    """
    if not (_is_linked(error) or _is_group(error)):
        return portable
    errors, stand_ins = [error], [portable]
    known = {id(error): 0}

    def index_of(other: BaseException | None) -> int:
        if other is None:
            return -1
        if id(other) not in known:
            if len(errors) >= _CHAIN_MAX:
                return -1
            known[id(other)] = len(errors)
            errors.append(other)
            stand_ins.append(_portable(other))
        return known[id(other)]

    links = []
    for position, current in enumerate(errors):  # which grows meanwhile
        cause, context = index_of(current.__cause__), index_of(current.__context__)
        if position == 0 and cause_as_context and cause >= 0:
            cause, context = -1, cause
        links.append((position, cause, context, current.__suppress_context__))
        if _is_group(current):
            for member in current.exceptions:  # type: ignore[attr-defined]
                index_of(member)
    if not any(map(_is_linked, errors)):
        return portable
    chained = _Chained(stand_ins, links)
    # Each part survives alone; if they do not together, the first one must arrive all the same.
    return chained if _survives(chained) else portable
