"""What a pool's workers do with their time, and what they leave behind.

What: gathers the words that workers write to the control page and the notes that they send.
Who calls: `pool.py` asks; the shell tells of notes and of workers that have ended.
May touch: the clock, the control page.
Invariants: a worker is counted once, as living or as ended. What `worker_exit` gave is kept as it
came, and is read when somebody asks.
"""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, final

from poolray.ids import WorkerId
from poolray.objects.shared_memory import (
    CALLS_DONE,
    EXIT_NS,
    PROCESS_BEGAN,
    WORKER_READY,
    WORKING_NS,
)
from poolray.protocol.worker import NoteTopic, WorkerNote

if TYPE_CHECKING:
    from poolray.local.node_shell import NodeShell
    from poolray.local.workers import WorkerHandle, WorkerHost

#: Slow calls in a summary.
_SLOWEST_MAX = 5
#: Workers that have ended and are remembered one by one.
_ENDED_MAX = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class SlowCall:
    """One of the calls that took longest."""

    seconds: float
    arguments: str  #: their `repr`, cut where it is long
    pid: int  #: of its worker


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerInsights:
    """What one worker has done with its time."""

    pid: int
    alive: bool
    tasks: int  #: items and calls that it has run to their ends
    start_up_s: float  #: from the order to the running process
    init_s: float  #: in the initializer, and in what sets up its state
    working_s: float  #: in the functions of its tasks
    waiting_s: float  #: neither: for work, and for the work's transport
    exit_s: float  #: in `worker_exit`
    slowest: tuple[SlowCall, ...]  #: the longest first


@dataclasses.dataclass(frozen=True, slots=True)
class PoolInsights:
    """What the workers of a pool have done with their time; `str` of it is a table."""

    workers: tuple[WorkerInsights, ...]

    @property
    def slowest(self) -> tuple[SlowCall, ...]:
        """The calls that took longest, of all workers."""
        calls = [call for worker in self.workers for call in worker.slowest]
        return tuple(sorted(calls, key=lambda call: -call.seconds)[:_SLOWEST_MAX])

    @property
    def tasks(self) -> int:
        """Items and calls that were run to their ends."""
        return sum(worker.tasks for worker in self.workers)

    @property
    def working_ratio(self) -> float:
        """The share of the workers' time that was spent in the functions of tasks."""
        working = sum(worker.working_s for worker in self.workers)
        return working / (self._total() or 1.0)

    def _total(self) -> float:
        return sum(
            worker.start_up_s + worker.init_s + worker.working_s + worker.waiting_s + worker.exit_s
            for worker in self.workers
        )

    def __str__(self) -> str:
        head = ("pid", "tasks", "start-up", "init", "working", "waiting", "exit")
        rows: list[tuple[str, ...]] = [head]
        for worker in self.workers:
            times = (
                worker.start_up_s,
                worker.init_s,
                worker.working_s,
                worker.waiting_s,
                worker.exit_s,
            )
            pid = str(worker.pid) + ("" if worker.alive else " (ended)")
            rows.append((pid, str(worker.tasks), *(f"{seconds:.3g} s" for seconds in times)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.append(f"{self.working_ratio:.1%} of the time was spent working; slowest calls:")
        lines += [f"  {call.seconds:.3g} s  ({call.arguments})" for call in self.slowest]
        return "\n".join(lines)


@final
class GroupWatch:
    """Gathers what the workers of one group tell."""

    def __init__(self) -> None:
        #: Guards the fields below: threads that lead write, others read. Whoever takes the node's
        #: guard as well takes that first.
        self._lock = threading.Lock()
        #: worker id -> parts of a note that is not complete.
        self._parts: dict[WorkerId, list[bytes]] = {}
        #: worker id -> (nanoseconds, arguments), the latest.
        self._slow: dict[WorkerId, list[tuple[int, str]]] = {}
        #: The latest ones.
        self._ended: deque[WorkerInsights] = deque(maxlen=_ENDED_MAX)
        #: (whether it is a result, as opposed to an error; bytes), in the order of coming.
        self._exits: list[tuple[bool, bytes]] = []

    def on_note(self, note: WorkerNote) -> None:
        """A worker tells something."""
        with self._lock:
            parts = self._parts.setdefault(note.worker_id, [])
            parts.append(note.data)
            if note.unfinished:
                return
            payload = b"".join(self._parts.pop(note.worker_id))
            if note.topic is NoteTopic.SLOW_CALL:
                slow = self._slow.setdefault(note.worker_id, [])
                slow.append(pickle.loads(payload))
                slow.sort(key=lambda call: -call[0])
                del slow[_SLOWEST_MAX:]
            else:
                self._exits.append((note.topic is NoteTopic.EXIT_RESULT, payload))

    def on_lost(self, worker: WorkerHandle, words: Sequence[int]) -> None:
        """A worker has ended; these are its words, which the next one in its place will use."""
        with self._lock:
            self._parts.pop(worker.worker_id, None)
            if words[PROCESS_BEGAN]:
                self._ended.append(self._insights(worker, words, alive=False))
            self._slow.pop(worker.worker_id, None)

    def exits(self) -> list[tuple[bool, bytes]]:
        """What `worker_exit` gave or raised, as it came."""
        with self._lock:
            return list(self._exits)

    def insights(self, shell: NodeShell, host: WorkerHost) -> PoolInsights:
        """What is known at this moment."""
        # No worker is lost, and its words used anew, meanwhile.
        with shell.guard, self._lock:
            living = [(worker, shell.arena.words(worker.slot)) for worker in host.workers.values()]
            return PoolInsights((*self._ended, *self._living(living)))

    def _living(
        self, workers: Iterable[tuple[WorkerHandle, Sequence[int]]]
    ) -> list[WorkerInsights]:
        return [
            self._insights(w, words, alive=True) for w, words in workers if words[PROCESS_BEGAN]
        ]

    def _insights(self, worker: WorkerHandle, words: Sequence[int], alive: bool) -> WorkerInsights:
        now_ns = time.monotonic_ns()
        began_ns, ready_ns = words[PROCESS_BEGAN], words[WORKER_READY] or now_ns
        working_ns, exit_ns = words[WORKING_NS], words[EXIT_NS]
        return WorkerInsights(
            pid=worker.pid,
            alive=alive,
            tasks=words[CALLS_DONE],
            start_up_s=max(0, began_ns - worker.asked_ns) * 1e-9,
            init_s=(ready_ns - began_ns) * 1e-9,
            working_s=working_ns * 1e-9,
            waiting_s=max(0, now_ns - ready_ns - working_ns - exit_ns) * 1e-9,
            exit_s=exit_ns * 1e-9,
            slowest=tuple(
                SlowCall(taken_ns * 1e-9, arguments, worker.pid)
                for taken_ns, arguments in self._slow.get(worker.worker_id, ())
            ),
        )


__all__ = ["GroupWatch", "PoolInsights", "SlowCall", "WorkerInsights"]
