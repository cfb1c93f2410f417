"""Calls of an actor that run on threads, several at once.

    task queue ──RunTasks──▶ main thread ──▶ threads of the call's concurrency group ──▶ reports
    control ──InterruptTask──▶    "      : takes out what waits, marks what runs

What: hands calls to the threads of their groups, and stops those that are cancelled.
Who calls: `local/actor_worker.py`.
May touch: sockets, threads.
Invariants: a call is reported once; one that was cancelled before it began never runs; what runs on
a thread is not interrupted, it may ask whether it was cancelled.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, final

from poolray.ids import TaskId
from poolray.local import process_state
from poolray.local.actor_reports import Reports, cancelled_outcome
from poolray.protocol.values import Outcome
from poolray.protocol.worker import InterruptTask, RunTasks, TaskCall

if TYPE_CHECKING:
    from poolray.local.actor_worker import ActorHost
    from poolray.local.worker import Worker


@final
class _Call:
    """A call that the actor has and that has not ended."""

    __slots__ = ("has_begun", "is_cancelled", "task")

    def __init__(self, task: TaskCall) -> None:
        self.task = task
        self.has_begun = False
        #: Before it began: it has been reported and will not run.
        self.is_cancelled = False


@final
class Threads:
    """What runs the calls."""

    def __init__(self, worker: Worker, host: ActorHost) -> None:
        self._worker = worker
        self._host = host
        self._reports = Reports(worker)
        setup = host.setup
        #: concurrency group -> its threads, which take calls in the order in which they came.
        self._pools = {"": ThreadPoolExecutor(setup.concurrency, "poolray-actor")}
        for name, count in setup.groups.items():
            self._pools[name] = ThreadPoolExecutor(count, f"poolray-actor-{name}")
        #: Guards the fields below, and those of the calls in them.
        self._lock = threading.Lock()
        self._calls: dict[TaskId, _Call] = {}
        self._last_sequence = 0  # of the packets that were read
        #: Orders for calls that were not read yet.
        self._early: dict[TaskId, InterruptTask] = {}

    def run(self) -> None:
        """Hand calls to threads until told to stop; by then all of them have ended."""
        worker = self._worker
        receive, decode = worker.reader.receive_or_wake, worker.decode
        # A signal that comes just before we sleep must wake us too: it writes to a pipe.
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        worker.reads_orders = True
        self._obey()
        while True:
            packet = receive(woken)
            if packet is None:
                os.read(woken, 4096)
                self._obey()
                continue
            message = decode(packet) if packet else None
            if type(message) is not RunTasks:
                for pool in self._pools.values():
                    pool.shutdown(wait=False)
                return
            worker.functions.read(message)
            self._take(message)
            packet = message = None

    def _take(self, message: RunTasks) -> None:
        calls = [_Call(task) for task in message.tasks]
        with self._lock:
            self._last_sequence = message.sequence
            for call in calls:
                self._calls[call.task.task_id] = call
            early, self._early = self._early, {}
        for order in early.values():
            self._stop(order)
        for call in calls:
            group = self._worker.functions.classes[
                call.task.class_index
            ].task_class.concurrency_group
            self._pools.get(group, self._pools[""]).submit(self._run_call, call)
        self._reports.send()

    def _run_call(self, call: _Call) -> None:
        worker, task = self._worker, call.task
        with self._lock:
            if call.is_cancelled:
                return
            call.has_begun = True
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
            self._host.leave_at_once(error)
            return
        except BaseException as error:
            outcome = worker.outcomes.raised(error, task, function)
        result = None
        with self._lock:
            del self._calls[task.task_id]
        process_state.forget_cancelled(task.task_id)
        self._reports.add(task, outcome)
        self._reports.send()

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
        task = call.task
        name = self._worker.functions.classes[task.class_index].task_class.name
        self._reports.add(task, cancelled_outcome(task.task_id, name))


def begin(task: TaskCall, name: str, function_name: str) -> None:
    """The call runs now, beside others."""
    process_state.begin_concurrent_task(task.task_id, name, function_name)
