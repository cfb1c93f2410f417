"""What direct calls need of the loop that reads for a process.

What: puts connections among what the reactor polls, and makes threads wait for their calls.
Who calls: `direct/calls.py`; made by the runtimes of drivers.
May touch: threads, through the reactor.
Invariants: none; it keeps nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.direct.loans import Door
from poolray.local.reactor import Reactor, Waitable


@final
class CallWaiter(Waitable):
    """A thread waits for some calls."""

    __slots__ = ("ends_on_error", "remaining")

    def __init__(self) -> None:
        super().__init__()
        self.remaining = 0
        self.ends_on_error = False


@final
class DirectHost:
    """A reactor, as direct calls see it.

    Parameters
    ----------
    machine : str
        Tells this machine from others, as nodes know it.
    show_error : callable
        Takes an error that nobody has asked for.
    """

    def __init__(
        self,
        reactor: Reactor,
        machine: str,
        show_error: Callable[[bytes], None],
    ) -> None:
        self.machine = machine
        self._reactor = reactor
        self.on_sent = reactor.ensure_background
        self.read_now = reactor.pump
        self.show_error = show_error

    def watch(self, connection: Connection | Door) -> None:
        """Call its `answer` when it can be read."""
        self._reactor.watch_other(connection.channel, connection)
        self._reactor.ensure_background()

    def unwatch(self, connection: Connection | Door) -> None:
        """Do not, any more."""
        if connection.channel.fileno() >= 0:
            self._reactor.unwatch_other(connection.channel)

    def make_waiter(self) -> Any:
        """Something to wait for."""
        return CallWaiter()

    def wait(self, waiter: Any, timeout_s: float | None) -> bool:
        """Wait until it is done; False when the time is up."""
        return self._reactor.wait(waiter, timeout_s)


def sooner(timeout_s: float | None, direct: DirectCalls | None) -> float | None:
    """A time-out, or what is left until direct calls want a tick, if that is less."""
    deadline_s = None if direct is None else direct.next_deadline()
    if deadline_s is None:
        return timeout_s
    left_s = deadline_s - time.monotonic()
    return left_s if timeout_s is None else min(timeout_s, left_s)
