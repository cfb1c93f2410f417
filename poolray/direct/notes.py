"""What the node is told of calls that it has not seen, for those who look on.

What: collects ended calls, and sends many at once.
Who calls: `direct/calls.py` with reports, and when time has passed.
May touch: the node, through the client's link.
Invariants: a call is told of once, a tenth of a second late at the most while somebody reads.
"""

from __future__ import annotations

import threading
import time
from typing import final

from poolray.direct.connection import Waiting
from poolray.direct.interfaces import Owner
from poolray.ids import ActorId
from poolray.protocol.client import EndedCalls, NoteCalls
from poolray.protocol.worker import TasksFinished

#: Ended calls are told to the node when so many are, or after so long.
_NOTES_MAX = 256
_NOTE_AFTER_S = 0.1


@final
class Notes:
    """Ended calls of one process."""

    def __init__(self, client: Owner) -> None:
        self._client = client
        self._lock = threading.Lock()
        #: Those that the node has not been told of, how many, and since when.
        self._notes: list[EndedCalls] = []
        self._count = 0
        self._since_s = 0.0

    def due_s(self) -> float | None:
        """When to send; None: there are none."""
        return self._since_s + _NOTE_AFTER_S if self._notes else None

    def add(
        self,
        actor_id: ActorId,
        calls: list[Waiting],
        errors: dict[int, str],
        report: TasksFinished,
    ) -> None:
        """These have ended."""
        if not calls[0][2].is_listed:
            return
        now = time.monotonic()
        with self._lock:
            if not self._notes:
                self._since_s = now
            self._count += len(calls)
            self._notes.append(
                EndedCalls(
                    actor_id=actor_id,
                    worker_id=report.worker_id,
                    task_ids=[call[1] for call in calls],
                    class_ids=[call[2].class_id for call in calls],
                    errors=errors,
                    elapsed_ns=report.elapsed_ns,
                    ended_s=now,
                )
            )
        if self._count >= _NOTES_MAX:
            self.send()

    def send(self) -> None:
        """Tell the node."""
        with self._lock:
            notes, self._notes, self._count = self._notes, [], 0
        if notes:
            self._client.link.send(NoteCalls(calls=notes, now_s=time.monotonic()))
