"""What the workers of a pool on a cluster do with their time.

    worker: Measures ──facts, beside each result──▶ driver: WorkerWatch ──▶ PoolInsights

What: measures calls where they run; puts together, in the driver, what workers have told.
Who calls: `cluster_calls.py`, in the worker and in the driver.
May touch: the clock.
Invariants: facts count from the beginning of their process, so the latest of a process say all;
nothing compares clocks of two machines: workers tell how long something took.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, final

from poolray import api
from poolray.client import Client
from poolray.exceptions import PoolrayError
from poolray.local.pool_insights import PoolInsights, SlowCall, WorkerInsights

#: Processes that have ended and are remembered one by one.
_ENDED_MAX = 1000
#: Facts of a call that has come back are on their way.
_ARRIVAL_S = 5.0


class Facts(NamedTuple):
    """What a worker's process has done up to now."""

    pid: int
    tasks: int = 0
    init_s: float = 0.0
    working_s: float = 0.0
    exit_s: float = 0.0
    slowest: tuple[tuple[float, str], ...] = ()  #: (seconds, arguments), the longest first


@final
class Measures:
    """In a worker: how long what takes."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._facts = Facts(os.getpid())

    def on_ready(self) -> None:
        """It has been set up."""
        self._facts = self._facts._replace(init_s=time.perf_counter() - self._began_s)

    def on_exit(self, taken_s: float) -> None:
        """It has been wound up."""
        self._facts = self._facts._replace(exit_s=taken_s)

    def dress(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A callable whose calls are measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._note(time.perf_counter() - began_s, args, kwargs)

        return measured

    def _note(self, taken_s: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from poolray.local.worker_extras import SLOWEST_MAX, describe_arguments

        facts = self._facts
        slowest = facts.slowest
        if len(slowest) < SLOWEST_MAX or taken_s > slowest[-1][0]:
            found = [*slowest, (taken_s, describe_arguments(args, kwargs))]
            slowest = tuple(sorted(found, key=lambda slow: -slow[0])[:SLOWEST_MAX])
        self._facts = facts._replace(
            tasks=facts.tasks + 1, working_s=facts.working_s + taken_s, slowest=slowest
        )

    def facts(self) -> Facts:
        """All of it."""
        return self._facts


@final
class WorkerWatch:
    """In the driver: one worker, with all processes that it has been (others replace dead ones)."""

    def __init__(self) -> None:
        #: Guards all fields: facts come in several threads.
        self._lock = threading.Lock()
        self._asked_s = time.monotonic()
        #: When the process that told last was ready; 0: none was.
        self._ready_s = 0.0
        self._start_up_s = 0.0
        self._ended_s = 0.0
        self._facts: Facts | None = None
        #: The facts that come last: a ref; None: none were asked for.
        self._latest: Any = None
        #: Processes before this one.
        self._earlier: deque[WorkerInsights] = deque(maxlen=_ENDED_MAX)

    def expect(self, client: Client, ref: Any) -> None:
        """These facts will come: mostly they are beside a result that has come."""
        self._latest = ref

        def arrive(reply: Any) -> None:
            error, facts = client.read_reply(reply, ref, True)
            if error is None:
                self.on_facts(Facts(*facts))

        client.link.when_ready(ref._id, arrive)

    def on_facts(self, facts: Facts) -> None:
        """A process tells; it may have told since."""
        with self._lock:
            self._take(facts)

    def _take(self, facts: Facts) -> None:
        known, now = self._facts, time.monotonic()
        if known is None or known.pid != facts.pid:
            if known is not None:
                self._earlier.append(self._insights(known, alive=False))
            self._ready_s = now
            self._start_up_s = max(0.0, now - self._asked_s - facts.init_s) if not known else 0.0
        elif facts.tasks < known.tasks or facts.exit_s < known.exit_s:
            return
        self._facts = facts

    def on_end(self) -> None:
        """It was told to end, or killed."""
        self._ended_s = time.monotonic()

    def insights(self) -> list[WorkerInsights]:
        """What is known of it: nothing while its first process is being set up."""
        self._catch_up()
        with self._lock:
            own = [] if self._facts is None else [self._insights(self._facts, not self._ended_s)]
            return [*self._earlier, *own]

    def _catch_up(self) -> None:
        try:
            if self._facts is None and not api.wait([self._latest], timeout=0)[0]:
                return
            self.on_facts(Facts(*api.get(self._latest, timeout=_ARRIVAL_S)))
        except (PoolrayError, ValueError):
            pass  # it died, or the connection is gone: what it has told before is what there is

    def _insights(self, facts: Facts, alive: bool) -> WorkerInsights:
        until_s = self._ended_s or time.monotonic()
        waiting_s = until_s - self._ready_s - facts.working_s - facts.exit_s
        return WorkerInsights(
            pid=facts.pid,
            alive=alive,
            tasks=facts.tasks,
            start_up_s=self._start_up_s,
            init_s=facts.init_s,
            working_s=facts.working_s,
            waiting_s=max(0.0, waiting_s),
            exit_s=facts.exit_s,
            slowest=tuple(SlowCall(taken_s, text, facts.pid) for taken_s, text in facts.slowest),
        )


@final
class PoolWatch:
    """In the driver: the workers of a pool."""

    def __init__(self) -> None:
        self._workers: dict[WorkerWatch, None] = {}
        #: Of workers that have ended, the latest.
        self._ended: deque[WorkerWatch] = deque(maxlen=_ENDED_MAX)

    def begin(self) -> WorkerWatch:
        """A worker is about to be asked for; it is to be asked for its first facts, too."""
        made = WorkerWatch()
        self._workers[made] = None
        return made

    def end(self, worker: WorkerWatch) -> None:
        """A worker ends."""
        worker.on_end()
        self._workers.pop(worker, None)
        self._ended.append(worker)

    def insights(self) -> PoolInsights:
        """What is known at this moment."""
        found: list[WorkerInsights] = []
        for worker in [*self._ended, *self._workers]:
            found.extend(worker.insights())
        found.sort(key=lambda worker: worker.alive)
        return PoolInsights(tuple(found))
