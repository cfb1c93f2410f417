"""Errors of user code, made fit to travel.

What: an exception with its traceback as bytes that always load: the exception itself where that
works, else its class and state, else its text.
Who calls: the worker.
May touch: nothing.
Invariants: what is encoded has been loaded once here, so the reader's loading cannot fail.
"""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import cloudpickle

from poolray.exceptions import PoolrayError, TaskError


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


def encode_task_error(error: BaseException, name: str, pid: int) -> bytes:
    """An exception of a task, for `get`."""
    if isinstance(error, UnpicklableResult):
        error = error.error
    text = _format(error, name, pid)
    # An error that was got in the task and let out: its cause stays what it was.
    cause = error.cause if isinstance(error, TaskError) else error
    made = TaskError(function_name=name, traceback_str=text, cause=_portable(cause), pid=pid)
    frames = _traceback_dict(error)
    if frames is not None:
        made._traceback_dict = frames  # type: ignore[attr-defined]
    return _dumps(made)


def encode_dependency_error(error: object, name: str) -> bytes:
    """The error of an argument, passed on: same cause, and the text says through which task."""
    if isinstance(error, TaskError):
        cause = error.cause
        text = (
            f"At least one of the input arguments for task {name} could not be computed:\n"
            f"{error.traceback_str}"
        )
        passed = TaskError(
            function_name=error.function_name,
            traceback_str=text,
            cause=cause,
            pid=error.pid,
        )
        frames = getattr(error, "_traceback_dict", None)
        if frames is not None:
            passed._traceback_dict = frames  # type: ignore[attr-defined]
        return _dumps(passed)
    return _dumps(error)


def encode_plain(error: BaseException) -> bytes:
    """An exception of a Pool's or Executor's call: (exception, traceback text, unpicklable).

    The third element is None, or the text of what could not be pickled: then the exception is the
    pickling error.
    """
    if isinstance(error, UnpicklableResult):
        return pickle.dumps((_portable(error.error), None, error.value_repr))
    text = "".join(traceback.format_exception(type(error), error, _user_frames(error)))
    try:
        data = _dumps((error, text, None))
    except Exception as reason:
        return pickle.dumps((_portable(reason), text, repr(error)[:1000]))
    try:
        pickle.loads(data)
    except Exception as reason:
        rebuilt = _by_state(error)
        if rebuilt is not None:
            return pickle.dumps((rebuilt, text, None))
        return pickle.dumps((_portable(reason), text, repr(error)[:1000]))
    return data


def _user_frames(error: BaseException) -> Any:
    """The traceback without our own frames on top."""
    frames = error.__traceback__
    while frames is not None and "/poolray/local/worker" in frames.tb_frame.f_code.co_filename:
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


def _portable(error: BaseException) -> BaseException:
    """The exception, if it survives the journey; else what comes closest."""
    try:
        pickle.loads(_dumps(error))
    except Exception:
        rebuilt: BaseException | None = _by_state(error)
        if rebuilt is not None:
            return rebuilt
        return PoolrayError(
            f"{type(error).__module__}.{type(error).__qualname__}: {error} (the exception itself "
            "could not be pickled)"
        )
    return error


class _ByState:
    """Stands for an exception whose own pickling fails: its class, arguments and attributes."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _rebuild_by_state, (
            type(self.error),
            self.error.args,
            {k: v for k, v in vars(self.error).items() if _survives(v)},
        )


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
    stand_in = _ByState(error)
    try:
        if not isinstance(pickle.loads(_dumps(stand_in)), type(error)):
            return None
    except Exception:
        return None
    return stand_in
