"""Direct calls of an actor that runs several at once: the worker's side.

    callers ══▶ doors ──proofs──▶ Line ──calls──▶ `Loops` or `Threads`, among those of the node
       ▲                           │  ▲
       └──────── reports ◀─────────┴──┘

What: lets callers in, hands on what they send, brings them results as calls end; keeps results that
the nodes have to bring.
Who calls: `local/actor_loops.py` and `local/actor_threads.py`, from the loop on their main thread;
results come from any thread.
May touch: sockets, through an event loop.
Invariants: a packet is reported as taken while few calls wait, and not otherwise, so that a caller
sends no more than that; nothing here waits for a caller; one that is gone is forgotten.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, final

from poolray.direct.addresses import CONNECT_S, Offer, make_door, settle_in
from poolray.direct.own_calls import AFTER, LISTEN, RESULT
from poolray.direct.seal import HandshakeError
from poolray.ids import TaskId
from poolray.local import process_state, worker_process
from poolray.local.actor_reports import Reports
from poolray.local.direct_server import DOORS_MAX, KEEP_S, Caller
from poolray.protocol.values import Outcome
from poolray.protocol.worker import RunTasks, TaskCall, TaskResult, TasksFinished

if TYPE_CHECKING:
    import asyncio

    from poolray.local.poll_loop import PollLoop
    from poolray.local.worker import Worker

#: Calls that may wait in an actor for others to end before its callers are to wait themselves.
AHEAD_MAX = 512
#: Methods that are the callers' own, and take no place of a user's call.
_OWN = (LISTEN, RESULT, AFTER)
#: What is left when the actor ends itself is sent for so long.
_LAST_PATIENCE_S = 1.0


class Runner(Protocol):
    """What runs an actor's calls."""

    def take_direct(self, tasks: list[TaskCall], line: Line) -> None:
        """Run these; their results are the line's."""

    def cancel_direct(self, task_id: TaskId, recursive: bool) -> None:
        """Such a call is not wanted."""

    def line_of(self, task_id: TaskId) -> Line | None:
        """Whose call runs; None: the node's."""

    def has_room(self) -> bool:
        """Whether few calls wait for others to end."""

    def note_read(self) -> None:
        """Something is about to be read, as `may_poll` of the selector wants to know."""


@final
class Line:
    """A caller, and the results of its calls on their way to it.

    Parameters
    ----------
    caller : Caller
    lines : Lines
        What it is one of.
    """

    def __init__(self, worker: Worker, caller: Caller, lines: Lines) -> None:
        self._worker = worker
        self._lines = lines
        self.caller = caller
        self.reports = Reports(worker, self._post)
        #: Guards what is sent, and the fields below.
        self._lock = threading.Lock()
        #: The last packet that was read, its calls, and the last one that the caller was told of.
        self._read = self._read_calls = self._told = 0
        #: Since when a packet's calls take the loop's time; 0: they have had their first round.
        self._since_ns = 0
        self._elapsed_ns = 0
        #: `settle` is about to be called, after the first steps of the calls that were read last.
        self.will_settle = False

    def note_read(self, sequence: int, calls: int) -> None:
        """A packet was read."""
        self._read, self._read_calls = sequence, calls
        if not self.will_settle:
            self.will_settle = True
            self._since_ns = time.perf_counter_ns()

    def settle(self) -> None:
        """Send the results there are, and word of what was taken, if the caller waits for that."""
        self.will_settle = False
        if self._since_ns:
            self._elapsed_ns += time.perf_counter_ns() - self._since_ns
            self._since_ns = 0
        self.reports.send()
        # (Behind one packet of one call the caller sends the next one anyway.)
        behind = self._read - self._told
        if behind > 1 or (behind and self._read_calls > 1):
            if self._lines.runner.has_room():
                self._post([])
            else:
                self._lines.owing[self] = None

    def _post(self, results: list[TaskResult]) -> None:
        """Send a report."""
        worker, caller = self._worker, self.caller
        worker.client.api.sync_references()  # the node is told of these all the same
        worker_process.flush_output()
        with self._lock:
            if self._lines.runner.has_room():
                self._told = self._read
            elapsed_ns, self._elapsed_ns = self._elapsed_ns, 0
            caller.report(
                TasksFinished(
                    worker_id=worker.worker_id,
                    results=results,
                    elapsed_ns=elapsed_ns,
                    sequence=self._told,
                ),
                patience_s=0.0,
            )
            is_slow = caller.has_unsent
        if is_slow:
            self._lines.await_room(self)

    def push(self) -> bool:
        """Send what waits, as far as there is room; whether something is left."""
        with self._lock:
            self.caller.push()
            return self.caller.has_unsent

    def close(self) -> None:
        """The caller is gone."""
        with self._lock:
            self.caller.is_gone = True
            self.caller.channel.close()


@final
class Lines:
    """The callers of one actor.

    Parameters
    ----------
    runner : Runner
        What runs the actor's calls.
    loop : AbstractEventLoop or PollLoop
        That of the main thread.
    """

    def __init__(
        self, worker: Worker, runner: Runner, loop: asyncio.AbstractEventLoop | PollLoop
    ) -> None:
        self._worker = worker
        self.runner = runner
        self._loop = loop
        self._doors: dict[int, tuple[socket.socket, Offer]] = {}
        #: As an ordered set: those who have come, and those of them that wait for word.
        self._lines: dict[Line, None] = {}
        self.owing: dict[Line, None] = {}
        #: Results that the nodes have to bring, and whose they are.
        self._held: dict[TaskId, tuple[Line, Any]] = {}
        process_state.on_fork_in_child(self._abandon)

    # ---- what callers ask for by way of the nodes ------------------------------------------------

    def listen(self, machine: str) -> tuple[Offer, bool] | None:
        """A door for one caller, which is on that machine; None: it cannot come here."""
        setup = self._worker.setup
        made = make_door(machine == setup.machine, setup.direct_host, setup.direct_ports)
        if made is None:
            return None
        while len(self._doors) >= DOORS_MAX:
            self._close_door(*next(iter(self._doors.items())))
        door, offer = made
        self._doors[door.fileno()] = made
        self._loop.add_reader(door, self._let_in, door.fileno())
        self._loop.call_later(CONNECT_S, self._close_door, door.fileno(), made)
        return offer, True

    def hold(self, task_id: TaskId, result: Any) -> Outcome | None:
        """Keep a result until the nodes bring it; what the caller is told instead. None: the
        node's call it was.
        """
        line = self.runner.line_of(task_id)
        if line is None:
            return None
        if not line.caller.is_gone:
            self._held[task_id] = line, result
        return Outcome(values=[])

    def has(self, task_id: TaskId) -> bool:
        """Whether a call that runs came past the node."""
        return self.runner.line_of(task_id) is not None

    def give_held(self, task_id: TaskId) -> Any:
        """A result that was kept, once."""
        return self._held.pop(task_id)[1]

    # ---- callers ---------------------------------------------------------------------------------

    def _let_in(self, descriptor: int) -> None:
        """Somebody is at a door, which closes behind him."""
        made = self._doors[descriptor]
        try:
            channel, _ = made[0].accept()
        except OSError:
            return  # he has left again
        self._close_door(descriptor, made)
        try:
            settle_in(channel)
            caller = Caller(channel, made[1])
        except (HandshakeError, OSError):
            channel.close()
            return
        line = Line(self._worker, caller, self)
        self._lines[line] = None
        self._loop.add_reader(channel, self._read, line)
        self._loop.call_later(CONNECT_S, self._close_late, line)

    def _close_door(self, descriptor: int, made: tuple[socket.socket, Offer]) -> None:
        if self._doors.get(descriptor) is made:
            del self._doors[descriptor]
            self._loop.remove_reader(made[0])
            made[0].close()

    def _close_late(self, line: Line) -> None:
        """Who has come so long ago has proved who he is, or leaves."""
        if not line.caller.is_open:
            self._forget(line)

    def _read(self, line: Line) -> None:
        self.runner.note_read()
        caller, functions = line.caller, self._worker.functions
        caller.read()
        while (packet := caller.next_packet()) is not None:
            if packet.classes:
                functions.read(packet)
            settles = not line.will_settle
            line.note_read(packet.sequence, len(packet.tasks))
            self.runner.take_direct(packet.tasks, line)
            if settles:
                self._loop.call_soon(line.settle)
        while caller.cancelled:
            self.runner.cancel_direct(*caller.cancelled.popitem())
        if caller.is_gone:
            self._forget(line)

    def _forget(self, line: Line) -> None:
        if self._lines.pop(line, self) is self:
            return
        self.owing.pop(line, None)
        self._loop.remove_reader(line.caller.channel)
        self._loop.remove_writer(line.caller.channel)
        line.close()
        # What it asked for by way of the nodes may be under way, if only the connection was cut.
        self._loop.call_later(KEEP_S, self._let_go, line)

    def _let_go(self, line: Line) -> None:
        """Of what nobody will fetch."""
        for task_id, (holder, _) in list(self._held.items()):
            if holder is line:
                self._held.pop(task_id, None)

    # ---- sending ---------------------------------------------------------------------------------

    def give_word(self) -> None:
        """Calls have ended: those who wait for room may have some."""
        for line in list(self.owing):
            self.owing.pop(line, None)
            line.settle()

    def await_room(self, line: Line) -> None:
        """A caller does not read: the rest is sent when it does."""
        self._loop.call_soon_threadsafe(self._watch, line)

    def _watch(self, line: Line) -> None:
        if line in self._lines:
            self._loop.add_writer(line.caller.channel, self._push, line)

    def _push(self, line: Line) -> None:
        if not line.push():
            self._loop.remove_writer(line.caller.channel)

    def send_last(self) -> None:
        """The actor ends itself: calls that have ended keep their results."""
        latest_s = time.monotonic() + _LAST_PATIENCE_S
        for line in list(self._lines):
            line.reports.send()
            while line.push() and time.monotonic() < latest_s:
                time.sleep(1e-3)

    def _abandon(self) -> None:
        """In a forked child: callers must hear of this process's end, not of the child's."""
        for door, _ in self._doors.values():
            door.close()
        for line in self._lines:
            line.caller.is_gone = True
            line.caller.channel.close()
        self._doors.clear()
        self._lines.clear()


@final
class OwnCalls:
    """Calls of methods that every actor has for its callers' sake: they wait for no other call.

    Parameters
    ----------
    reports : Reports
        Those that the node gets.
    """

    def __init__(self, worker: Worker, reports: Reports) -> None:
        self._worker = worker
        self._reports = reports
        #: Names of their classes, as an ordered set.
        self._indexes: dict[int, None] = {}

    def take(self, message: RunTasks) -> list[TaskCall]:
        """Run those of a packet, here and now; gives the others."""
        for known in message.classes:
            if known.task_class.method in _OWN or known.task_class.name == AFTER:
                self._indexes[known.index] = None
        indexes, tasks = self._indexes, message.tasks
        if not indexes or all(task.class_index not in indexes for task in tasks):
            return tasks
        for task in tasks:
            if task.class_index in indexes:
                self._run(task)
        self._reports.send()
        return [task for task in tasks if task.class_index not in indexes]

    def _run(self, task: TaskCall) -> None:
        worker = self._worker
        function = worker.functions.classes[task.class_index]
        outcome: bytes | Outcome
        try:
            call = function.call or worker.functions.load(function)
            args, kwargs = worker.arguments(task, task.calls[0], function.task_class)
            outcome = worker.outcomes.returned(call(*args, **kwargs), task, function)
        except Exception as error:
            outcome = worker.outcomes.raised(error, task, function)
        self._reports.add(task, outcome)
