"""What is put around the calls of a worker when somebody asked for it.

What: the limit of a call's time.
Who calls: the worker, when it loads a function.
May touch: the clock, the worker's words on the control page.
Invariants: a worker without extras never imports this. User code may be interrupted in the frames
of the wrappers as in `Worker._run_call`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from poolray.local.worker import OPEN_CODE
from poolray.objects.shared_memory import CALL_BEGAN

if TYPE_CHECKING:
    from poolray.local.worker import Worker


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


OPEN_CODE.add(LimitedCall.__call__.__code__)

__all__ = ["LimitedCall"]
