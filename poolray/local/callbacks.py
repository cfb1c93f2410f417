"""The thread that runs users' callbacks.

What: one queue, one thread, in order.
Who calls: results of Pool and Executor that have callbacks.
May touch: threads.
Invariants: callbacks never overlap; one that raises is shown and does not stop those after it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import final


@final
class CallbackThread:
    """Runs users' callbacks in order, in one thread, as `multiprocessing` does.

    A thread of its own: a callback may block on a lock that a thread waiting in `get` holds.
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], object]] = deque()
        self._ready = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, call: Callable[[], object]) -> None:
        """Run this after those before it."""
        self._queue.append(call)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._loop, name="poolray-callbacks", daemon=True
                    )
                    self._thread.start()
        self._ready.release()

    def _loop(self) -> None:
        while True:
            self._ready.acquire()
            if self._stopped and not self._queue:
                return
            call = self._queue.popleft()
            try:
                call()
            except BaseException:
                import traceback

                traceback.print_exc()
            del call

    def flush(self) -> None:
        """Wait until what is queued now has run; at once from a callback itself."""
        if self._thread is None or self._thread is threading.current_thread():
            return
        passed = threading.Event()
        self.run(passed.set)
        passed.wait()

    def stop(self) -> None:
        """End the thread after what is queued."""
        thread = self._thread
        self._stopped = True
        if thread is not None:
            self._ready.release()
            if thread is not threading.current_thread():
                thread.join()
