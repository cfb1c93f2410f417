"""Ending work before the machine runs out of memory.

      Tick ──▶ MeasureMemory ──▶ shell reads ──▶ MemoryReport ──▶ below: nothing
                     ▲                                │ above, and not known who uses it
                     └──── with all workers ──────────┤
                                                      └─▶ a victim: TerminateWorker ─▶ WorkerLost:
                                                          tried again after a pause, or fails
What: when to measure, whom to end when memory is short or a task uses more than its `memory=`, and
whether what was ended is tried again.
Who calls: `node/node.py` with ticks and reports; `node/groups.py`, `node/tasks.py` and
`node/actors.py` when a worker is lost.
May touch: nothing.
Invariants: nothing is measured while no worker has work; of those that were ended for the machine's
sake one at a time is on its way; an entry of `kills` is a worker whose end was asked for here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, final

from poolray.exceptions import OutOfMemoryError, describe_exit, describe_size
from poolray.ids import TaskId, WorkerId
from poolray.node.effects import MeasureMemory, Notice, TerminateWorker
from poolray.node.state import NodeState
from poolray.node.workers import GroupState, WorkerRecord, WorkerState
from poolray.protocol.node import MemoryReport, ProcessMemory, WorkerLost
from poolray.protocol.values import CallKind
from poolray.scheduling.resources import UNIT
from poolray.tasks.lifecycle import TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.groups import Groups
    from poolray.node.retries import Retries
    from poolray.node.tasks import Tasks

_ACTOR = WorkerState.ACTOR
_STOPPING = WorkerState.STOPPING
#: Between two notes to the user that something was ended.
_NOTICE_PAUSE_S = 1.0
#: Between two notes that memory is short and nothing of ours can be ended.
_HELPLESS_PAUSE_S = 60.0


@final
class Candidate:
    """A worker that could be ended."""

    __slots__ = ("is_retriable", "owner", "started_s", "worker_id")

    def __init__(
        self, worker_id: WorkerId, owner: bytes, is_retriable: bool, started_s: float
    ) -> None:
        self.worker_id = worker_id
        #: Who asked for its work.
        self.owner = owner
        #: Ending it loses time only.
        self.is_retriable = is_retriable
        #: When its work began.
        self.started_s = started_s


@final
class Kill:
    """Why a worker was ended."""

    __slots__ = ("is_alone", "limit_bytes", "processes", "report", "worker_bytes")

    def __init__(
        self,
        report: MemoryReport,
        worker_bytes: int,
        limit_bytes: int,
        is_alone: bool,
        processes: tuple[ProcessMemory, ...] = (),
    ) -> None:
        self.report = report
        #: What the worker used.
        self.worker_bytes = worker_bytes
        #: What its task may use, if that is why; 0: the machine was short of memory.
        self.limit_bytes = limit_bytes
        #: No other work of its owner ran: the next attempt would have no more memory.
        self.is_alone = is_alone
        #: The largest processes.
        self.processes = processes

    def describe(self, threshold: float) -> str:
        """What happened, after the name of a process."""
        if self.limit_bytes:
            return (
                f"was ended for using {describe_size(self.worker_bytes)} of memory, more than the "
                f"memory={self.limit_bytes} that its task asked for"
            )
        report = self.report
        return (
            "was ended before the machine ran out of memory "
            f"({describe_size(report.used_bytes)} of {describe_size(report.total_bytes)} were in "
            f"use, memory_usage_threshold={threshold:g})"
        )


def choose(candidates: Iterable[Candidate]) -> tuple[Candidate, bool] | None:
    """Whom to end, and whether it is the only one of its group; None: there is nobody.

    What can be tried again is grouped by owner, all the rest is one group. Groups that can be tried
    again come first, then those with more members, then the one whose oldest work is youngest. Of
    the group it is the member that began last: it has the least to lose, and each owner keeps the
    work that has come furthest.
    """
    groups: dict[bytes | None, list[Candidate]] = {}
    for candidate in candidates:
        key = candidate.owner if candidate.is_retriable else None
        groups.setdefault(key, []).append(candidate)
    if not groups:
        return None
    group = max(
        groups.values(),
        key=lambda g: (g[0].is_retriable, len(g), min(each.started_s for each in g)),
    )
    victim = max(group, key=lambda each: (each.started_s, each.worker_id))
    return victim, len(group) == 1


@final
class MemoryProtection:
    """The side of a node that watches memory."""

    __slots__ = (
        "_helpless_until_s",
        "_is_on",
        "_look_s",
        "_quiet_until_s",
        "_state",
        "_tasks",
        "_victim",
        "actors",
        "groups",
        "kills",
        "retries",
        "spent",
    )

    def __init__(self, state: NodeState, tasks: Tasks, is_on: bool) -> None:
        self._state = state
        self._tasks = tasks
        self._is_on = is_on and state.config.memory_monitor_refresh_ms > 0
        self.actors: Actors
        self.retries: Retries
        self.groups: Groups
        #: When to measure next; None: nothing was running when that was last thought of.
        self._look_s: float | None = None
        #: Who was chosen last for the machine's sake and has not ended yet.
        self._victim: WorkerId | None = None
        #: Workers that were ended here and whose exit has not been dealt with.
        self.kills: dict[WorkerId, Kill] = {}
        #: task id -> how many of its attempts ended here; of few, and some of them are over.
        self.spent: dict[TaskId, int] = {}
        self._quiet_until_s = self._helpless_until_s = 0.0

    # ---- when to measure -------------------------------------------------------------------------

    def next_look_s(self) -> float | None:
        """When to tick at the latest; asked before somebody sleeps, hence not once per task."""
        if self._look_s is None and self._is_on and self._is_needed():
            self._look_s = self._state.now + self._interval_s()
        return self._look_s

    def _interval_s(self) -> float:
        return self._state.config.memory_monitor_refresh_ms / 1000.0

    def _is_needed(self) -> bool:
        state = self._state
        return bool(state.tasks) and any(
            worker.packets or worker.state is _ACTOR for worker in state.workers.values()
        )

    def on_tick(self) -> None:
        """Measure, if it is time and somebody works."""
        if self._look_s is None or self._look_s > self._state.now:
            return
        self._look_s = None
        self._forget_ended()
        if self._is_needed():
            self._look_s = self._state.now + self._interval_s()
            limited = [
                (worker.worker_id, self._limit_of(worker))
                for worker in self._working()
                if self._limit_of(worker) and worker.worker_id not in self.kills
            ]
            self._state.effects.append(MeasureMemory(limited, False))

    def _working(self) -> Iterator[WorkerRecord]:
        """Workers that run something, or that actors live in."""
        for worker in self._state.workers.values():
            if (
                worker.packets or worker.state is _ACTOR
            ) and worker.group.state < GroupState.FAILED:
                yield worker

    def _limit_of(self, worker: WorkerRecord) -> int:
        """Bytes that a worker may use; 0: as many as it wants."""
        config, wanted = self._state.config, _memory_of(worker)
        if not wanted or not config.enforce_memory_limits:
            return 0
        return wanted + config.memory_limit_slack_bytes

    def _forget_ended(self) -> None:
        if self.spent:
            tasks = self._state.tasks
            self.spent = {i: count for i, count in self.spent.items() if i in tasks}

    # ---- what was measured -----------------------------------------------------------------------

    def threshold_bytes(self, total_bytes: int) -> int:
        """What may be in use of so much."""
        config = self._state.config
        allowed = int(total_bytes * config.memory_usage_threshold)
        if config.min_memory_free_bytes >= 0:
            allowed = max(allowed, total_bytes - config.min_memory_free_bytes)
        return allowed

    def on_report(self, report: MemoryReport) -> None:
        """The shell has measured."""
        for worker_id, used_bytes in report.workers:
            worker = self._state.workers.get(worker_id)
            if worker is not None and worker_id not in self.kills:
                limit = self._limit_of(worker)
                if limit and used_bytes > limit:
                    self._end(worker, Kill(report, used_bytes, _memory_of(worker), True))
        if report.used_bytes <= self.threshold_bytes(report.total_bytes):
            return
        if self._victim is not None and self._victim in self.kills:
            return  # what it frees may be enough
        if not report.is_detailed:
            everybody = [(w.worker_id, 0) for w in (*self._working(), *self._idle())]
            self._state.effects.append(MeasureMemory(everybody, True))
            return
        self._end_one(report)

    def _idle(self) -> Iterator[WorkerRecord]:
        """Workers of plain tasks that have nothing to do: more start when there is."""
        for group in self._state.groups.values():
            if not group.size and group.state < GroupState.FAILED:
                yield from group.idle.values()

    def _stop_idle(self, report: MemoryReport) -> bool:
        """Let workers go that keep memory for nothing; False when there are none."""
        used = dict(report.workers)
        least = self._state.config.idle_worker_killing_memory_threshold_bytes
        idle = [worker for worker in self._idle() if used.get(worker.worker_id, 0) >= least]
        for worker in idle:
            self.groups.stop(worker)
        return bool(idle)

    def _end_one(self, report: MemoryReport) -> None:
        if self._stop_idle(report):
            return  # that costs nobody anything, and may be enough
        workers = {w.worker_id: w for w in self._working() if w.worker_id not in self.kills}
        chosen = choose(self._candidate(worker) for worker in workers.values())
        if chosen is None:
            self._tell_helpless(report)
            return
        victim, is_alone = chosen
        used = dict(report.workers).get(victim.worker_id, 0)
        processes = tuple(self._named(process) for process in report.processes)
        self._victim = victim.worker_id
        self._end(workers[victim.worker_id], Kill(report, used, 0, is_alone, processes))

    def _candidate(self, worker: WorkerRecord) -> Candidate:
        living = self.actors.in_worker(worker.worker_id)
        if living is not None:
            owner, is_retriable = living
            return Candidate(worker.worker_id, owner, is_retriable, worker.started_s)
        packet = worker.packets[0]
        record = next((r for r in packet.records if r.worker_id == worker.worker_id), None)
        if record is None:  # cancelled: nobody waits for it
            return Candidate(worker.worker_id, b"", True, packet.sent_s)
        is_retriable = (
            record.class_queue.task_class.max_retries != 0
            and not worker.group.break_on_death
            and self.has_budget(record)
        )
        return Candidate(worker.worker_id, record.client_id, is_retriable, packet.sent_s)

    def _named(self, process: ProcessMemory) -> ProcessMemory:
        """A process that is one of our workers goes by what it runs."""
        for worker in self._state.workers.values():
            if worker.pid == process.pid and worker.runs is not None:
                name = f"poolray worker: {worker.runs.task_class.name}"
                return ProcessMemory(pid=process.pid, used_bytes=process.used_bytes, name=name)
        return process

    def _end(self, worker: WorkerRecord, kill: Kill) -> None:
        self.kills[worker.worker_id] = kill
        if worker.state is not _ACTOR and worker.state is not _STOPPING:
            worker.move(_STOPPING)  # it gets nothing more to do
        self._state.effects.append(TerminateWorker(worker.worker_id))
        self._tell(worker, kill)

    def _tell(self, worker: WorkerRecord, kill: Kill) -> None:
        now, queue = self._state.now, worker.runs
        if now < self._quiet_until_s or queue is None or kill.limit_bytes:
            return  # (what uses too much is told by its error)
        self._quiet_until_s = now + _NOTICE_PAUSE_S
        text = f"The worker of {queue.task_class.name} (pid {worker.pid}) {self._why(kill)}."
        self._state.effects.append(Notice(text))

    def _tell_helpless(self, report: MemoryReport) -> None:
        now = self._state.now
        if now < self._helpless_until_s:
            return
        self._helpless_until_s = now + _HELPLESS_PAUSE_S
        used, total = describe_size(report.used_bytes), describe_size(report.total_bytes)
        largest = ", ".join(
            f"pid {p.pid} {describe_size(p.used_bytes)} {p.name}" for p in report.processes[:3]
        )
        self._state.effects.append(
            Notice(
                f"{used} of {total} of memory are in use, and there is no task left to end. "
                f"What uses most: {largest}."
            )
        )

    def _why(self, kill: Kill) -> str:
        return kill.describe(self._state.config.memory_usage_threshold)

    # ---- what becomes of what was ended ----------------------------------------------------------

    def on_worker_gone(self, worker_id: WorkerId) -> None:
        """Its end has been dealt with."""
        self.kills.pop(worker_id, None)

    def how(self, message: WorkerLost) -> str:
        """How a process ended, in words."""
        kill = self.kills.get(message.worker_id)
        if kill is None:
            return describe_exit(message.exit_code, message.signal)
        return self._why(kill)

    def has_budget(self, record: TaskRecord) -> bool:
        """Whether a task may be ended for memory once more and be tried again."""
        limit = self._state.config.task_oom_retries
        return limit < 0 or self.spent.get(record.task_id, 0) < limit

    def may_retry(self, record: TaskRecord, kill: Kill) -> bool:
        """Whether a call that was ended is tried again: it has a budget of its own for that."""
        task_class = record.class_queue.task_class
        if task_class.kind is CallKind.CREATE:
            return self._tasks.may_retry(record)  # an actor's restarts are counted together
        if task_class.max_retries == 0 or kill.limit_bytes:
            return False
        if kill.is_alone and self._state.config.task_oom_retries < 0:
            return False  # without an end to the attempts, they would never end
        return self.has_budget(record)

    def delay(self, record: TaskRecord) -> None:
        """A call that was ended waits before it is tried again, longer each time."""
        count = self.spent[record.task_id] = self.spent.get(record.task_id, 0) + 1
        config = self._state.config
        pause_ms = min(
            config.task_oom_retry_delay_base_ms * 2.0 ** min(count - 1, 30),
            config.task_oom_retry_delay_max_ms,
        )
        self.retries.delay_for(record, pause_ms / 1000.0)

    def error(self, record: TaskRecord, message: WorkerLost, kill: Kill) -> OutOfMemoryError:
        """The result of a call that was ended and is not tried again."""
        return OutOfMemoryError(
            task_name=record.class_queue.task_class.name,
            task_id=record.root_id.hex(),
            node_id=self._state.node_id.hex(),
            pid=message.pid,
            worker_bytes=kill.worker_bytes,
            limit_bytes=kill.limit_bytes,
            used_bytes=kill.report.used_bytes,
            total_bytes=kill.report.total_bytes,
            threshold=self._state.config.memory_usage_threshold,
            attempts=max(1, record.attempts),  # (calls of actors are not counted)
            processes=tuple((p.pid, p.used_bytes, p.name) for p in kill.processes),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError when the table of kills names workers that are gone."""
        for worker_id in self.kills:
            assert worker_id in self._state.workers, "a worker that is gone is being ended"


def _memory_of(worker: WorkerRecord) -> int:
    """What the work of a worker has asked for, in bytes; 0: it has not said."""
    if worker.runs is None:
        return 0
    demand = worker.runs.task_class.resources
    wanted = demand.get("memory", 0)
    if not wanted:
        # (In a placement group it goes by other names.)
        wanted = max((q for n, q in demand.items() if n.startswith("memory_group_")), default=0)
    return wanted // UNIT
