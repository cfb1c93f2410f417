"""The selector of an actor's event loop: polls for a moment before it sleeps.

What: spares an actor that is called one call at a time the time that a sleeping core takes to wake.
Who calls: `local/actor_loops.py`.
May touch: what a selector touches, the clock.
Invariants: it polls only while recent waits were short, and while no other thread of the process
could use the interpreter.
"""

from __future__ import annotations

import os
import select
import selectors
import threading
import time
from typing import final

from poolray.local.channel import Spinner

_YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))


@final
class SpinningSelector(selectors.DefaultSelector):
    """The system's best selector, with a moment of polling.

    Parameters
    ----------
    spin_s : float, seconds
        How long to poll at the most; 0: not at all.
    """

    def __init__(self, spin_s: float) -> None:
        super().__init__()
        self._spinner = Spinner(spin_s)
        #: Whether who uses the loop waits for it.
        self.may_poll = True
        #: Finds the selector's own descriptor readable: costs a tenth of asking it.
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        self._poll = poller.poll

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, as `selectors.BaseSelector.select`."""
        if timeout is not None and timeout <= 0:  # (most rounds find nothing: asked for less)
            return super().select(timeout) if self._poll(0) else []
        if not self.may_poll:
            return super().select(timeout)
        if threading.active_count() > 1:
            return super().select(timeout)
        poll, spinner = self._poll, self._spinner
        started_s = time.perf_counter()
        if not poll(0):
            limit_s = spinner.limit_s()
            end_s = started_s + (limit_s if timeout is None else min(limit_s, timeout))
            while time.perf_counter() < end_s:
                _YIELD()
                if poll(0):
                    break
            else:
                if timeout is not None:
                    timeout = max(0.0, timeout - (time.perf_counter() - started_s))
        found = super().select(timeout)
        spinner.note(time.perf_counter() - started_s)
        return found


def can_spin() -> bool:
    """Whether this system's selector has a descriptor that can be polled."""
    return hasattr(selectors.DefaultSelector, "fileno")
