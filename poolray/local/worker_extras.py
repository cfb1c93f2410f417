"""What is put around the calls of a worker when somebody asked for it.

What: the limit of a call's time; a state of the worker that its calls are given, with functions
that set it up and wind it up; how long calls take.
Who calls: the worker, as it starts, when it loads a function, and before it leaves.
May touch: the clock, the worker's words on the control page.
Invariants: a worker without extras never imports this. User code may be interrupted in the frames
of the wrappers as in `Worker._run_call`.
"""

from __future__ import annotations

import functools
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from poolray.local import worker_errors
from poolray.local.fork_server import WorkerExtras
from poolray.local.interruptible import OPEN_CODE
from poolray.objects.shared_memory import (
    CALL_BEGAN,
    CALLS_DONE,
    EXIT_NS,
    PROCESS_BEGAN,
    WORKER_READY,
    WORKING_NS,
)
from poolray.protocol.values import Delivery
from poolray.protocol.worker import NoteTopic, WorkerNote

if TYPE_CHECKING:
    from poolray.local.worker import Worker

#: Slow calls that a worker tells of.
SLOWEST_MAX = 5
_ARGUMENTS_CHARS_MAX = 200
#: Bytes in a note: it must fit any channel.
_NOTE_PART = 60 * 1024


@final
class LimitedCall:
    """Calls of a function whose time is limited: says when each begins, for others to watch."""

    __slots__ = ("_call", "_word", "_words", "_worker")

    def __init__(self, call: Callable[..., Any], worker: Worker) -> None:
        self._call = call
        self._worker = worker
        self._words, first = worker.words
        self._word = first + CALL_BEGAN

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        worker = self._worker
        worker.send_results()  # neighbours that have ended must not be lost with a call that hangs
        self._words[self._word] = time.monotonic_ns()
        try:
            return self._call(*args, **kwargs)
        finally:
            self._words[self._word] = 0
            if worker.late is not None:
                raise worker.late  # whatever the function has made of it


@final
class MeasuredCall:
    """Calls of a function whose times are noted."""

    __slots__ = ("_call", "_extras")

    def __init__(self, call: Callable[..., Any], extras: Extras) -> None:
        self._call = call
        self._extras = extras

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        began_ns = time.perf_counter_ns()
        try:
            return self._call(*args, **kwargs)
        finally:
            self._extras.note_call(time.perf_counter_ns() - began_ns, args, kwargs)


OPEN_CODE.update((LimitedCall.__call__.__code__, MeasuredCall.__call__.__code__))


@final
class Extras:
    """The extras of one worker."""

    def __init__(self, worker: Worker, wanted: WorkerExtras) -> None:
        self._worker = worker
        self._wanted = wanted
        #: What each call is given before its own arguments: the state, if there is one.
        self._given: tuple[Any, ...] = ()
        self._words, self._first = worker.words
        self._words[self._first + PROCESS_BEGAN] = time.monotonic_ns()
        #: (nanoseconds, arguments) of the calls that took longest, the longest first.
        self._slowest: list[tuple[int, str]] = []
        #: One that took no longer is not told of.
        self._ordinary_ns = -1

    def prepare(self) -> None:
        """Set the state up; raises what the user's functions raise."""
        wanted = self._wanted
        if wanted.make_state is not None:
            self._given = (wanted.make_state(),)
        if wanted.init is not None:
            wanted.init(*self._given)
        self._words[self._first + WORKER_READY] = time.monotonic_ns()

    def dress(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A callable as its calls are to run."""
        if self._given:
            call = functools.partial(call, *self._given)
        return MeasuredCall(call, self) if self._wanted.measures else call

    # ---- times -----------------------------------------------------------------------------------

    def note_call(self, taken_ns: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call has ended."""
        words, first = self._words, self._first
        words[first + CALLS_DONE] += 1
        words[first + WORKING_NS] += taken_ns
        if taken_ns > self._ordinary_ns:
            self._note_slow(taken_ns, args, kwargs)

    def _note_slow(self, taken_ns: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slow = (taken_ns, describe_arguments(args, kwargs))
        slowest = self._slowest
        slowest.append(slow)
        slowest.sort(key=lambda other: -other[0])
        if len(slowest) >= SLOWEST_MAX:
            del slowest[SLOWEST_MAX:]
            self._ordinary_ns = slowest[-1][0]
        self._send(NoteTopic.SLOW_CALL, pickle.dumps(slow))

    # ---- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """The worker leaves politely: wind its state up, and send what that gives."""
        wind_up = self._wanted.exit
        if wind_up is None:
            return
        began_ns = time.monotonic_ns()
        topic = NoteTopic.EXIT_RESULT
        try:
            result = wind_up(*self._given)
            data = self._worker.client.serializer_for(Delivery.CALLER).dumps(result)
            payload = data if isinstance(data, bytes) else data.to_bytes()
        except BaseException as error:
            sys.stderr.write(traceback.format_exc())
            topic, payload = NoteTopic.EXIT_ERROR, worker_errors.encode_plain(error)
        self._words[self._first + EXIT_NS] = time.monotonic_ns() - began_ns
        self._send(topic, payload)

    def _send(self, topic: NoteTopic, payload: bytes) -> None:
        worker = self._worker
        for start in range(0, max(1, len(payload)), _NOTE_PART):
            end = start + _NOTE_PART
            note = WorkerNote(
                worker_id=worker.worker_id,
                topic=topic,
                data=payload[start:end],
                unfinished=end < len(payload),
            )
            worker.send(worker.encode(note))


def describe_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The arguments of a call as text, not too long."""
    try:
        parts = [repr(arg) for arg in args]
        parts += [f"{name}={arg!r}" for name, arg in kwargs.items()]
        text = ", ".join(parts)
    except Exception as error:  # the user's `__repr__`: the call itself is well
        text = f"(their repr fails: {type(error).__name__})"
    if len(text) > _ARGUMENTS_CHARS_MAX:
        text = text[: _ARGUMENTS_CHARS_MAX - 1] + "…"
    return text


__all__ = ["SLOWEST_MAX", "Extras", "LimitedCall", "MeasuredCall", "describe_arguments"]
