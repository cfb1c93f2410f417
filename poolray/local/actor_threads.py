"""Calls of an actor that run on threads, several at once.

    task queue ──RunTasks──▶ main thread ──▶ threads of the call's concurrency group ──▶ reports
    callers    ══RunTasks══▶      "
    control ──InterruptTask──▶    "      : takes out what waits, marks what runs

What: hands calls to the threads of their groups, and stops those that are cancelled.
Who calls: `local/actor_worker.py`.
May touch: sockets, threads.
Invariants: a call is reported once; one that was cancelled before it began never runs; what runs on
a thread is not interrupted, it may ask whether it was cancelled; no result waits for a call that
begins after its own has ended.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, final

from poolray.ids import TaskId
from poolray.local import process_state
from poolray.local.actor_reports import Reports, cancelled_outcome
from poolray.local.direct_lines import AHEAD_MAX, Line, Lines, OwnCalls
from poolray.local.poll_loop import PollLoop
from poolray.protocol.values import Outcome
from poolray.protocol.worker import InterruptTask, RunTasks, TaskCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolray.local.actor_worker import ActorHost
    from poolray.local.worker import Worker


@final
class _Call:
    """A call that the actor has and that has not ended."""

    __slots__ = ("has_begun", "is_cancelled", "line", "pool", "task")

    def __init__(self, task: TaskCall, pool: _Pool, line: Line | None) -> None:
        self.task = task
        self.pool = pool
        #: Whose it is; None: the node's.
        self.line = line
        self.has_begun = False
        #: Before it began: it has been reported and will not run.
        self.is_cancelled = False


@final
class _Pool:
    """The threads of one concurrency group, which take calls in the order in which they came."""

    def __init__(self, run: Callable[[_Call], None], count: int, name: str) -> None:
        self._run = run
        self._count = count
        self._name = name
        self._started = 0
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        #: Calls that have not ended; under the lock of `Threads`.
        self.unfinished = 0

    def add(self, call: _Call) -> None:
        """Run a call as soon as a thread is free."""
        if self._started < self._count and self._started < self.unfinished:
            name = f"{self._name}_{self._started}"
            self._started += 1
            threading.Thread(target=self._work, name=name, daemon=True).start()
        self._queue.put(call)

    def _work(self) -> None:
        from poolray.local.worker import ToldToExit

        while True:
            call = self._queue.get()
            try:
                self._run(call)
            except ToldToExit:
                return  # the node is gone, as the main thread will read
            del call  # its arguments must not live on while we wait

    def waiting(self) -> int:
        """Calls that no thread has taken."""
        return self._queue.qsize()


@final
class Threads:
    """What runs the calls."""

    def __init__(self, worker: Worker, host: ActorHost) -> None:
        self._worker = worker
        self._host = host
        self._reports = Reports(worker)
        self._own = OwnCalls(worker, self._reports)
        self._loop = PollLoop(worker.config.spin_s, self._obey)
        setup = host.setup
        #: concurrency group -> its threads.
        self._pools = {"": _Pool(self._run_call, setup.concurrency, "poolray-actor")}
        for name, count in setup.groups.items():
            self._pools[name] = _Pool(self._run_call, count, f"poolray-actor-{name}")
        #: Guards the fields below, and those of the calls in them.
        self._lock = threading.Lock()
        self._calls: dict[TaskId, _Call] = {}
        self._last_sequence = 0  # of the packets that were read
        #: Orders for calls that were not read yet.
        self._early: dict[TaskId, InterruptTask] = {}
        #: As an ordered set: results that the main thread is to send, for more calls were waiting.
        self._unsent: dict[Reports, None] = {}

    def run(self) -> None:
        """Hand calls to threads until told to stop; by then all of them have ended."""
        worker, loop = self._worker, self._loop
        worker.reads_orders = True
        loop.may_poll = lambda: not self._calls
        loop.call_soon(self._obey)
        loop.add_reader(worker.tasks, self._read)
        loop.run_forever()

    def _read(self) -> None:
        worker = self._worker
        packet = worker.reader.take_nowait()
        if packet is None:
            return
        message = worker.decode(packet) if packet else None
        if type(message) is not RunTasks:
            self._loop.stop()
            return
        worker.functions.read(message)
        tasks = self._own.take(message)
        with self._lock:
            self._last_sequence = message.sequence
            calls = self._note(tasks, None)
            early, self._early = self._early, {}
        for order in early.values():
            self._stop(order)
        for call in calls:
            call.pool.add(call)
        self._reports.send()

    def _note(self, tasks: list[TaskCall], line: Line | None) -> list[_Call]:
        """Calls that have come; under the lock."""
        classes, pools, calls, noted = self._worker.functions.classes, self._pools, self._calls, []
        default = pools[""]
        for task in tasks:
            group = classes[task.class_index].task_class.concurrency_group
            pool = pools.get(group, default) if group else default
            pool.unfinished += 1
            call = calls[task.task_id] = _Call(task, pool, line)
            noted.append(call)
        return noted

    def _run_call(self, call: _Call) -> None:
        worker, task = self._worker, call.task
        with self._lock:
            is_cancelled = call.is_cancelled
            call.has_begun = True
        if is_cancelled:
            if worker.lines is not None and worker.lines.owing:
                self._loop.call_soon_threadsafe(self._send)
            return
        function = worker.functions.classes[task.class_index]
        outcome: bytes | Outcome
        try:
            begin(task, function.task_class.name, function.name)
            method = function.call or worker.functions.load(function)
            args, kwargs = worker.arguments(task, task.calls[0], function.task_class)
            result = method(*args, **kwargs)
            args = kwargs = None
            if process_state.is_current_task_cancelled():
                outcome = cancelled_outcome(task.task_id, function.task_class.name)
            else:
                outcome = worker.outcomes.returned(result, task, function)
        except SystemExit as error:
            self._reports.send()  # calls that have ended keep their results
            if worker.lines is not None:
                worker.lines.send_last()
            self._host.leave_at_once(error)
            return
        except BaseException as error:
            outcome = worker.outcomes.raised(error, task, function)
        result = None
        with self._lock:
            del self._calls[task.task_id]
            call.pool.unfinished -= 1
        process_state.forget_cancelled(task.task_id)
        self._report(call, outcome)

    # ---- results ---------------------------------------------------------------------------------

    def _report(self, call: _Call, outcome: bytes | Outcome) -> None:
        """A call is over: its result goes at once, or, if more calls wait for this thread, with
        theirs, but the main thread sees to it.
        """
        reports = self._reports if call.line is None else call.line.reports
        reports.add(call.task, outcome)
        lines = self._worker.lines
        if not call.pool.waiting() and not (lines is not None and lines.owing):
            reports.send()
        elif reports not in self._unsent:
            self._unsent[reports] = None
            self._loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        while self._unsent:
            self._unsent.popitem()[0].send()
        lines = self._worker.lines
        if lines is not None and lines.owing:
            lines.give_word()

    # ---- calls that come past the node -----------------------------------------------------------

    def make_lines(self) -> Lines:
        """What lets callers in."""
        return Lines(self._worker, self, self._loop)

    def take_direct(self, tasks: list[TaskCall], line: Line) -> None:
        """Run these; their results are the line's."""
        with self._lock:
            calls = self._note(tasks, line)
        for call in calls:
            call.pool.add(call)

    def cancel_direct(self, task_id: TaskId, recursive: bool) -> None:
        """Such a call is not wanted."""
        if recursive and self.line_of(task_id) is not None:
            self._worker.client.api.cancel_children(task_id)
        self._stop(InterruptTask(task_id=task_id, sequence=0, force=False))

    def line_of(self, task_id: TaskId) -> Line | None:
        """Whose call runs; None: the node's."""
        call = self._calls.get(task_id)
        return None if call is None else call.line

    def has_room(self) -> bool:
        """Whether few calls wait for others to end."""
        # (A caller's calls of one group are not to wait for those of another.)
        return len(self._pools) > 1 or self._pools[""].waiting() < AHEAD_MAX

    def note_read(self) -> None:
        """Something is about to be read."""

    # ---- orders ----------------------------------------------------------------------------------

    def _obey(self) -> None:
        for order in self._worker.take_all_orders():
            self._stop(order)
        self._reports.send()

    def _stop(self, order: InterruptTask) -> None:
        with self._lock:
            call = self._calls.get(order.task_id)
            if call is None:
                if order.sequence > self._last_sequence:
                    self._early[order.task_id] = order
                return  # else it has ended
            if call.has_begun:
                process_state.note_cancelled(order.task_id)
                return
            call.is_cancelled = True
            del self._calls[order.task_id]
            call.pool.unfinished -= 1
        task = call.task
        name = self._worker.functions.classes[task.class_index].task_class.name
        reports = self._reports if call.line is None else call.line.reports
        reports.add(task, cancelled_outcome(task.task_id, name))
        if call.line is not None:
            reports.send()


def begin(task: TaskCall, name: str, function_name: str) -> None:
    """The call runs now, beside others."""
    process_state.begin_concurrent_task(task.task_id, name, function_name)
