"""Calls of an actor with coroutine methods: they run in event loops.

    task queue ──RunTasks──▶ main thread's loop ──┬─▶ calls of no group: here
    control ──InterruptTask──▶        "           └─▶ calls of a group: its own loop, on a thread

What: runs up to so many calls of each concurrency group at once, and cancels as asyncio does.
Who calls: `local/actor_worker.py`.
May touch: sockets, threads, event loops.
Invariants: a call runs in the loop of its group, which alone touches its tables; a call is
reported once; one that was cancelled before it began never runs.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import threading
import time
from collections import deque
from types import CoroutineType
from typing import TYPE_CHECKING, Any, final

from poolray.ids import TaskId
from poolray.local import worker_process
from poolray.local.actor_reports import Reports, cancelled_outcome
from poolray.local.actor_threads import begin
from poolray.local.direct_lines import AHEAD_MAX, Line, Lines, OwnCalls
from poolray.local.spinning_selector import SpinningSelector, can_spin
from poolray.local.worker import NUDGE_SIGNAL
from poolray.protocol.values import Outcome
from poolray.protocol.worker import InterruptTask, RunTasks, TaskCall

if TYPE_CHECKING:
    from poolray.local.actor_worker import ActorHost
    from poolray.local.worker import Worker


#: A caller that waits for its result cannot have made its next call sooner after it was sent.
_ANSWER_MIN_S = 25e-6


@final
class _Running:
    """A call for which there is a coroutine."""

    __slots__ = ("coroutine", "has_begun", "is_cancelled", "line")

    def __init__(self, line: Line | None) -> None:
        #: Whose it is; None: the node's.
        self.line = line
        #: (asyncio itself keeps weak references only.)
        self.coroutine: asyncio.Task[None]
        self.has_begun = False
        self.is_cancelled = False


@final
class _Lane:
    """The calls of one concurrency group, and the loop that they run in."""

    def __init__(
        self,
        worker: Worker,
        host: ActorHost,
        reports: Reports,
        loop: asyncio.AbstractEventLoop,
        concurrency: int,
    ) -> None:
        self._worker = worker
        self._host = host
        self._reports = reports
        self.loop = loop
        #: Calls that wait for one of those that run to end, and whose they are (None: the node's).
        self.waiting: deque[tuple[TaskCall, Line | None]] = deque()
        self.running: dict[TaskId, _Running] = {}
        self._free = concurrency
        #: As an ordered set: those that have results which were not sent.
        self._unsent: dict[Reports, None] = {}
        self._will_send = False
        self.sent_s = 0.0  # when results were sent last

    def run_on_thread(self, name: str) -> None:
        """Run the loop beside the main one."""
        threading.Thread(target=self._run_loop, name=f"poolray-actor-{name}", daemon=True).start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def add(self, tasks: list[TaskCall], line: Line | None = None) -> None:
        """Calls to run, from within the loop."""
        self.waiting.extend([(task, line) for task in tasks])
        self._start()

    def _start(self) -> None:
        while self.waiting and self._free:
            self._free -= 1
            task, line = self.waiting.popleft()
            running = self.running[task.task_id] = _Running(line)
            running.coroutine = self.loop.create_task(self._run_call(task, running))

    async def _run_call(self, task: TaskCall, running: _Running) -> None:
        worker = self._worker
        function = worker.functions.classes[task.class_index]
        task_class = function.task_class
        running.has_begun = True
        outcome: bytes | Outcome
        try:
            if running.is_cancelled:
                raise asyncio.CancelledError
            begin(task, task_class.name, function.name)
            call = function.call or worker.functions.load(function)
            args, kwargs = worker.arguments(task, task.calls[0], task_class)
            result = call(*args, **kwargs)
            args = kwargs = None
            if type(result) is CoroutineType or inspect.isawaitable(result):
                result = await result
            if function.count < 0:
                outcome = await worker.streams.run_async(result, task, function)
            else:
                outcome = worker.outcomes.returned(result, task, function)
        except SystemExit as error:
            self._reports.send()  # calls that have ended keep their results
            if worker.lines is not None:
                worker.lines.send_last()
            await self._host.leave_loop(error)
            return
        except asyncio.CancelledError as error:
            if running.is_cancelled:
                outcome = cancelled_outcome(task.task_id, task_class.name)
            else:  # by the actor's own code
                outcome = worker.outcomes.raised(error, task, function)
        except BaseException as error:
            outcome = worker.outcomes.raised(error, task, function)
        result = None
        del self.running[task.task_id]
        self._report(task, outcome, running.line)
        self._free += 1
        if self.waiting:
            self._start()

    def _report(self, task: TaskCall, outcome: bytes | Outcome, line: Line | None) -> None:
        reports = self._reports if line is None else line.reports
        reports.add(task, outcome)
        self._unsent[reports] = None
        if self._will_send:
            return
        if not self.running and not self.waiting:
            self._send()
        else:  # those that end in the same round of the loop go together
            self._will_send = True
            self.loop.call_soon(self._send)

    def _send(self) -> None:
        self._will_send = False
        unsent, self._unsent = self._unsent, {}
        for reports in unsent:
            reports.send()
        lines = self._worker.lines
        if lines is not None and lines.owing:
            lines.give_word()
        self.sent_s = time.perf_counter()

    def stop_calls(self, orders: list[InterruptTask]) -> None:
        """Cancel those of the calls that are here, from within the loop."""
        for order in orders:
            self.stop_call(order.task_id, False)

    def stop_call(self, task_id: TaskId, recursive: bool) -> None:
        """Cancel a call, if it is here; with what it has submitted, if asked to."""
        running = self.running.get(task_id)
        if running is not None:
            running.is_cancelled = True
            if running.has_begun:
                running.coroutine.cancel()
            if recursive:
                self._worker.client.api.cancel_children(task_id)
            return
        for index, (task, line) in enumerate(self.waiting):
            if task.task_id == task_id:
                del self.waiting[index]
                name = self._worker.functions.classes[task.class_index].task_class.name
                self._report(task, cancelled_outcome(task_id, name), line)
                return


def _class_of(task: TaskCall) -> int:
    return task.class_index


def _make_loop(selector: SpinningSelector | None) -> asyncio.AbstractEventLoop:
    """The actor's loop: of the kind that the program asks for; ours, where that is the usual."""
    loop = asyncio.new_event_loop()
    if type(loop) is not asyncio.SelectorEventLoop or selector is None:
        return loop
    loop.close()
    return asyncio.SelectorEventLoop(selector)


@final
class Loops:
    """What runs the calls of an actor with coroutine methods."""

    def __init__(self, worker: Worker, host: ActorHost) -> None:
        self._worker = worker
        self._host = host
        self._selector = SpinningSelector(worker.config.spin_s) if can_spin() else None
        self._loop = _make_loop(self._selector)
        asyncio.set_event_loop(self._loop)
        self._lanes: dict[str, _Lane] = {}
        self._own: OwnCalls
        self._last_sequence = 0  # of the packets that were read
        #: Orders for calls that were not read yet.
        self._early: list[InterruptTask] = []

    def construct(self, actor_class: Any, args: Any, kwargs: Any) -> Any:
        """Make the actor inside the running loop, where it may make tasks of its own."""

        async def make() -> Any:
            return actor_class(*args, **kwargs)

        return self._loop.run_until_complete(make())

    def run(self) -> None:
        """Run calls until told to stop; by then all of them have ended."""
        worker, host = self._worker, self._host
        reports, setup = Reports(worker), host.setup
        self._own = OwnCalls(worker, reports)
        self._lanes[""] = _Lane(worker, host, reports, self._loop, setup.concurrency)
        for name, count in setup.groups.items():
            lane = _Lane(worker, host, reports, asyncio.new_event_loop(), count)
            self._lanes[name] = lane
            lane.run_on_thread(name)
        worker.reads_orders = True
        # (Others' handlers run when they like, and the loop may be about to sleep.)
        self._loop.add_signal_handler(NUDGE_SIGNAL, self._obey)
        self._loop.call_soon(self._obey)
        self._loop.add_reader(worker.tasks.fileno(), self._read)
        self._loop.run_forever()
        self._loop.remove_reader(worker.tasks.fileno())
        self._loop.run_until_complete(host.run_shutdown_hook_in_loop())
        worker_process.flush_output()
        worker_process.leave()
        os._exit(0)  # what the actor left running in the loops ends with it

    def _read(self) -> None:
        worker = self._worker
        self.note_read()
        while (packet := worker.reader.take_nowait()) is not None:
            message = worker.decode(packet) if packet else None
            if type(message) is not RunTasks:
                self._loop.stop()
                return
            worker.functions.read(message)
            self._last_sequence = message.sequence
            tasks = self._own.take(message)
            if len(self._lanes) == 1:
                self._lanes[""].add(tasks)
            elif tasks:
                self._spread(tasks)
        if self._early:
            early, self._early = self._early, []
            self._stop_calls(early)

    def _spread(self, tasks: list[TaskCall], line: Line | None = None) -> None:
        """A packet's calls that are of one group; the node's are."""
        name = self._worker.functions.classes[tasks[0].class_index].task_class.concurrency_group
        lane = self._lanes.get(name, self._lanes[""])
        if lane.loop is self._loop:
            lane.add(tasks, line)
        else:
            lane.loop.call_soon_threadsafe(lane.add, tasks, line)

    # ---- calls that come past the node -----------------------------------------------------------

    def make_lines(self) -> Lines:
        """What lets callers in."""
        return Lines(self._worker, self, self._loop)

    def take_direct(self, tasks: list[TaskCall], line: Line) -> None:
        """Run these; their results are the line's."""
        if len(self._lanes) == 1:
            self._lanes[""].add(tasks, line)
            return
        for _, together in itertools.groupby(tasks, _class_of):
            self._spread(list(together), line)

    def cancel_direct(self, task_id: TaskId, recursive: bool) -> None:
        """Such a call is not wanted."""
        for lane in self._lanes.values():
            if lane.loop is self._loop:
                lane.stop_call(task_id, recursive)
            else:
                lane.loop.call_soon_threadsafe(lane.stop_call, task_id, recursive)

    def line_of(self, task_id: TaskId) -> Line | None:
        """Whose call runs; None: the node's."""
        for lane in self._lanes.values():
            running = lane.running.get(task_id)
            if running is not None:
                return running.line
        return None

    def has_room(self) -> bool:
        """Whether few calls wait for others to end."""
        # (A caller's calls of one group are not to wait for those of another.)
        return len(self._lanes) > 1 or len(self._lanes[""].waiting) < AHEAD_MAX

    def note_read(self) -> None:
        """Something is about to be read: whether the loop may poll for the next."""
        if self._selector is not None:
            # Calls that came sooner than an answer to the last results could are made without
            # waiting: more of them are read, run and reported together where we sleep meanwhile.
            since_s = time.perf_counter() - self._lanes[""].sent_s
            self._selector.may_poll = since_s >= _ANSWER_MIN_S

    # ---- orders ----------------------------------------------------------------------------------

    def _obey(self) -> None:
        self._read()  # calls were sent before the orders to stop them
        self._stop_calls(self._worker.take_all_orders())

    def _stop_calls(self, orders: list[InterruptTask]) -> None:
        self._early += [order for order in orders if order.sequence > self._last_sequence]
        orders = [order for order in orders if order.sequence <= self._last_sequence]
        for lane in self._lanes.values() if orders else ():
            if lane.loop is self._loop:
                lane.stop_calls(orders)
            else:
                lane.loop.call_soon_threadsafe(lane.stop_calls, orders)
