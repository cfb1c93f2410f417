"""A small event loop: what the main thread of an actor on threads waits in.

    sockets, signals, other threads ──▶ poll ──▶ calls, one after the other

What: calls when something can be read or written, when time has passed, when another thread asks.
Who calls: `local/actor_threads.py`; `local/direct_lines.py`, which takes it or asyncio's, whose
import costs more than making an actor.
May touch: descriptors, the clock, where Python notes signals.
Invariants: all is called on one thread; nothing that another thread asks for is lost while it goes
to sleep.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, final

from poolray.local.channel import Spinner

_READ, _WRITE = select.POLLIN, select.POLLOUT
_Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]


class _HasDescriptor(Protocol):
    def fileno(self) -> int:
        """Its descriptor."""


@final
class PollLoop:
    """A loop, with the names that asyncio has for the same.

    Parameters
    ----------
    spin_s : float, seconds
        How long to poll before sleeping, at the most.
    on_signal : callable
        Called after a signal; the process's other handlers have run.
    """

    def __init__(self, spin_s: float, on_signal: Callable[[], None]) -> None:
        self._poller = select.poll()
        self._spinner = Spinner(spin_s)
        self._on_signal = on_signal
        #: descriptor -> what to call when it can be read, or written.
        self._readers: dict[int, _Call] = {}
        self._writers: dict[int, _Call] = {}
        self._soon: deque[_Call] = deque()
        #: When, a number that tells equal times apart, what to call.
        self._timers: list[tuple[float, int, _Call]] = []
        self._numbers = itertools.count()
        self._is_stopped = False
        #: Whether the interpreter is not needed by others: only then the loop polls.
        self.may_poll: Callable[[], bool] = bool
        # A signal that comes just before we sleep must wake us too: it writes to a pipe.
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller.register(self._woken, _READ)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    # ---- what to wait for ------------------------------------------------------------------------

    def add_reader(self, source: _HasDescriptor, call: Callable[..., Any], *args: Any) -> None:
        """Call when there is something to read, as long as there is."""
        self._readers[source.fileno()] = call, args
        self._register(source.fileno())

    def remove_reader(self, source: _HasDescriptor) -> None:
        """Do not, any more."""
        self._readers.pop(source.fileno(), None)
        self._register(source.fileno())

    def add_writer(self, source: _HasDescriptor, call: Callable[..., Any], *args: Any) -> None:
        """Call when there is room to write."""
        self._writers[source.fileno()] = call, args
        self._register(source.fileno())

    def remove_writer(self, source: _HasDescriptor) -> None:
        """Do not, any more."""
        self._writers.pop(source.fileno(), None)
        self._register(source.fileno())

    def _register(self, descriptor: int) -> None:
        wanted = _READ * (descriptor in self._readers) | _WRITE * (descriptor in self._writers)
        if wanted:
            self._poller.register(descriptor, wanted)
            return
        try:
            self._poller.unregister(descriptor)
        except KeyError:
            pass  # neither was asked for

    def call_soon(self, call: Callable[..., Any], *args: Any) -> None:
        """Call in the next round."""
        self._soon.append((call, args))

    def call_soon_threadsafe(self, call: Callable[..., Any], *args: Any) -> None:
        """The same from another thread."""
        self._soon.append((call, args))
        try:
            os.write(self._waker, b"\0")
        except BlockingIOError:
            pass  # it is full of reasons to wake up

    def call_later(self, delay_s: float, call: Callable[..., Any], *args: Any) -> None:
        """Call when so much time has passed."""
        timer = time.monotonic() + delay_s, next(self._numbers), (call, args)
        heapq.heappush(self._timers, timer)

    def stop(self) -> None:
        """Return from `run_forever` after this round."""
        self._is_stopped = True

    # ---- the loop --------------------------------------------------------------------------------

    def run_forever(self) -> None:
        """Wait and call, until stopped."""
        while not self._is_stopped:
            for descriptor, events in self._wait():
                if descriptor == self._woken:
                    if os.read(self._woken, 4096).strip(b"\0"):
                        self._on_signal()
                    continue
                for mask, calls in ((~_WRITE, self._readers), (_WRITE, self._writers)):
                    found = calls.get(descriptor) if events & mask else None
                    if found is not None:
                        found[0](*found[1])
            for _ in range(len(self._soon)):
                call, args = self._soon.popleft()
                call(*args)
            while self._timers and self._timers[0][0] <= time.monotonic():
                call, args = heapq.heappop(self._timers)[2]
                call(*args)
            # What was called with must not live on while we wait.
            found, args = None, ()

    def _wait(self) -> list[tuple[int, int]]:
        if self._soon:
            return self._poller.poll(0)
        left_ms = None
        if self._timers:
            left_ms = max(0.0, self._timers[0][0] - time.monotonic()) * 1000.0
        return self._spinner.wait(self._poller.poll, left_ms, self.may_poll())
