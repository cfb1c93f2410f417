"""Threads that wait for storage elsewhere, so that the daemon's own never does.

    start(make, take) ──▶ thread: make() ──▶ done, wake ──▶ settle: take(what was made)

What: calls one function on some thread, and another with its result on the daemon's.
Who calls: whoever in a daemon reads or writes what lies behind a URL.
May touch: threads.
Invariants: what is begun is handed over once, on the thread that calls `settle`; nobody waits for a
thread, at the end neither: storage may hang for good.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, final

_logger = logging.getLogger(__name__)


@final
class StorageThreads:
    """Some threads for calls that may take as long as they want.

    Parameters
    ----------
    threads_max : int
        What is more waits for one of them.
    wake : callable
        Makes the daemon call `settle` soon; called on any thread.
    """

    def __init__(self, threads_max: int, wake: Callable[[], None]) -> None:
        self._threads_max = threads_max
        self._wake = wake
        #: What to make, and who takes it; None: nothing more comes.
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads = 0
        #: What was begun and not handed over.
        self._under_way = 0
        #: Who takes a result, and the result; threads append.
        self._done: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._stopped = False

    def start(self, make: Callable[[], Any], take: Callable[[Any], None]) -> None:
        """Call `make` on a thread, then `take` with what it gave on this one.

        What `make` raises is a bug: it is logged, and `take` is given None.
        """
        if self._stopped:
            return
        self._under_way += 1
        self._jobs.put((make, take))
        if self._threads < min(self._under_way, self._threads_max):
            self._threads += 1
            # (A thread of an executor is waited for when the process ends, whatever it does.)
            name = f"poolray-storage-{self._threads}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopped:
            make, take = job
            made: Any = None
            try:
                made = make()
            except Exception:
                _logger.exception("storage elsewhere cannot be used")
            self._done.append((take, made))
            del job, make, take, made
            self._wake()

    @property
    def has_news(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._done)

    def settle(self) -> None:
        """Hand over what threads have made."""
        while self._done:
            take, made = self._done.popleft()
            self._under_way -= 1
            take(made)

    def stop(self) -> None:
        """Nothing more is handed over; a thread that waits for storage is left to itself."""
        self._stopped = True
        self._done.clear()
        for _ in range(self._threads):
            self._jobs.put(None)
