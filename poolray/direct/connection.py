"""One way from a caller to an actor's worker: packets out, reports in.

    outbox ──at the most two packets under way──▶ frames ══▶ the worker
    `Listener.on_report` ◀─ TasksFinished ◀── frames ◀════════════╝

What: numbers packets, decides how many calls go in one, proves who we are.
Who calls: `direct/calls.py`, whose lock guards it; the loop that reads, `answer`.
May touch: its socket; a signal to the worker's process.
Invariants: calls are sent in the order in which they were made; sending never waits: what a worker
has no room for (hundreds of cancelled calls, while it is busy outside of Python) is kept for later.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

import msgspec

from poolray.direct.addresses import Offer
from poolray.direct.ends import End
from poolray.direct.frames import ConnectionLost
from poolray.direct.seal import HandshakeError
from poolray.ids import ClassId, ObjectId, TaskId
from poolray.protocol.client import CancelTask
from poolray.protocol.values import TaskClass
from poolray.protocol.worker import (
    ClassDefinition,
    InterruptTask,
    LoanEnded,
    RunTasks,
    TaskCall,
    TasksFinished,
)

if TYPE_CHECKING:
    from poolray.direct.interfaces import Route
    from poolray.direct.loans import Asked

#: What a packet holds at the most.
_PACKET_CALLS_MAX = 256
_PACKET_BYTES = 48 << 10
#: Larger arguments go by way of the nodes, which have memory for them.
ARGUMENTS_BYTES_MAX = 32 << 10
#: About so much work is given at once to a worker that is quick.
_PACKET_TARGET_S = 1e-3
_NEW_WEIGHT = 0.4
#: What the worker had no room for is tried again after so long.
_PUSH_AFTER_S = 0.005

#: No call is meant.
_NUDGE = InterruptTask(task_id=TaskId(b""), sequence=0, force=False)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TasksFinished | LoanEnded).decode

#: A call: its result, its task, its class, its arguments, who has it. (A tuple: one is made for
#: every call.)
Waiting: TypeAlias = "tuple[ObjectId, TaskId, TaskClass, bytes, Connection | Asked]"


class Listener(Protocol):
    """Who makes the calls."""

    def on_report(self, connection: Connection, report: TasksFinished) -> None:
        """The worker has results."""

    def new_index(self) -> int:
        """A name for a class that no other one has in any worker."""


@final
class Connection:
    """A way to an actor's worker.

    Raises
    ------
    HandshakeError, OSError
        Nobody is there, or somebody else.
    """

    def __init__(
        self,
        listener: Listener,
        route: Route,
        channel: socket.socket,
        offer: Offer,
        *,
        listens: bool = False,
    ) -> None:
        self._listener = listener
        self.route = route
        self.channel = channel
        self.connection_id = offer[3]
        self._end = End(channel, offer, listens=listens)
        self.is_open = self.is_lost = False
        #: Calls that were not sent; whoever makes calls appends, without the lock.
        self.outbox: deque[Waiting] = deque()
        #: Of these, calls that are not wanted: less than half, so that to cancel all takes as long
        #: for each as to cancel one.
        self._unwanted: set[ObjectId] = set()
        #: object id -> call that was sent, oldest first.
        self.sent: dict[ObjectId, Waiting] = {}
        #: Packets that were not reported: number, calls.
        self.packets: deque[tuple[int, int]] = deque()
        self._sequence = 0
        #: Since when the oldest packet is the worker's first, and whether it was told to hurry.
        self.first_sent_s = 0.0
        self.is_nudged = False
        #: When to send what waits for room; 0: nothing is known to.
        self._push_at_s = 0.0
        #: Calls that were sent.
        self._count = 0
        #: Class -> the worker's name of it.
        self._indexes: dict[ClassId, int] = {}
        #: Of one call; None: not known.
        self._estimate_s: float | None = None

    def fileno(self) -> int:
        """What to poll."""
        return self.channel.fileno()

    @property
    def is_busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self.sent or self.outbox)

    @property
    def made(self) -> int:
        """Calls that were made this way."""
        return self._count + len(self.outbox)

    @property
    def is_sealed(self) -> bool:
        """Whether what goes through is closed to others."""
        return self._end.is_sealed

    def answer(self) -> None:
        """It can be read."""
        try:
            messages = [_decode(frame) for frame in self._end.read()]
        except (ConnectionLost, HandshakeError, msgspec.MsgspecError, OSError):
            self.route.on_lost(self)
            return
        if not self.is_open and self._end.is_open:
            self.is_open = True
            self.route.on_open(self)
        for message in messages:
            if type(message) is LoanEnded:
                self.route.on_given_back(self)
                return
            self._listener.on_report(self, message)

    # ---- packets ---------------------------------------------------------------------------------

    def wants_flush(self) -> bool:
        """Whether the calls that wait are enough for a packet; two are under way at the most.

        One at once where the worker has nothing. Behind a packet of many short calls the next one
        may fill up a little: a packet costs both sides as much as several calls.
        """
        packets = self.packets
        if len(packets) != 1:
            return not packets
        waiting = len(self.outbox)
        return waiting > packets[0][1] >> 1 or waiting >= self._calls_allowed()

    def flush(self) -> None:
        """Send what the worker has room for. On a lost one calls stay, for `on_lost` to find; and
        while others are under way by way of the nodes, for whoever has made them to give there.
        """
        if not self.route.is_passable:
            return
        while not self.is_lost and self.outbox and self.wants_flush():
            self._send_packet()

    def _send_packet(self) -> None:
        outbox, sent, indexes = self.outbox, self.sent, self._indexes
        unwanted = self._unwanted
        tasks: list[TaskCall] = []
        classes: list[ClassDefinition] = []
        size, limit = 0, self._calls_allowed()
        while outbox and len(tasks) < limit:
            call = outbox[0]
            object_id, task_id, task_class, payload, _ = call
            if unwanted and object_id in unwanted:
                unwanted.remove(object_id)
                outbox.popleft()
                continue
            size += len(payload)
            if tasks and size > _PACKET_BYTES:
                break
            index = indexes.get(task_class.class_id)
            if index is None:
                index = indexes[task_class.class_id] = self._listener.new_index()
                classes.append(ClassDefinition(index=index, task_class=task_class))
            tasks.append(TaskCall(task_id=task_id, class_index=index, calls=[payload]))
            sent[object_id] = call
            outbox.popleft()
        if not tasks:
            return
        self._count += len(tasks)
        self._sequence += 1
        if not self.packets:
            self.first_sent_s, self.is_nudged = time.monotonic(), False
        self.packets.append((self._sequence, len(tasks)))
        self._send(RunTasks(sequence=self._sequence, tasks=tasks, classes=classes))

    def take_unsent(self) -> list[Waiting]:
        """Calls that were not sent, which it has no longer; others may be appended meanwhile."""
        outbox, unwanted, unsent = self.outbox, self._unwanted, []
        while outbox:
            call = outbox.popleft()
            if call[0] not in unwanted:
                unsent.append(call)
        unwanted.clear()
        return unsent

    def drop(self, call: Waiting) -> None:
        """A call that was not sent is not to be."""
        self._unwanted.add(call[0])
        if 2 * len(self._unwanted) > len(self.outbox):
            self.outbox.extendleft(reversed(self.take_unsent()))

    def _calls_allowed(self) -> int:
        estimate = self._estimate_s
        if estimate is None:
            return 1
        if estimate * _PACKET_CALLS_MAX <= _PACKET_TARGET_S:
            return _PACKET_CALLS_MAX
        return max(1, int(_PACKET_TARGET_S / estimate))

    def push_due_s(self) -> float | None:
        """When to `push` what waits; None: nothing does. It waits for room, or, if Ctrl-C has
        struck between the making of a call and its sending, for somebody to send it.
        """
        if not self._end.has_unsent and (self.packets or not self.outbox):
            self._push_at_s = 0.0
            return None
        if not self._push_at_s:
            self._push_at_s = time.monotonic() + _PUSH_AFTER_S
        return self._push_at_s

    def push(self) -> None:
        """Send what waits, as far as there is room."""
        self._push_at_s = 0.0
        if self.is_lost:
            return
        try:
            self._end.push()
        except ConnectionLost:
            return  # who reads will see it
        self.flush()

    def _send(self, message: RunTasks | InterruptTask, flags: int = 0) -> None:
        if self.is_lost:
            return
        try:
            self._end.send(_encode(message), flags)
        except ConnectionLost:
            pass  # who reads will see it

    def note_reported(self, report: TasksFinished) -> None:
        """Learn how long calls take, and which packets have ended."""
        count, packets = len(report.results), self.packets
        if self.route.is_together:  # they have been begun, and end when they like
            taken = sum(calls for number, calls in packets if number <= report.sequence)
            count = max(count, taken)
        if count:
            estimate, old = report.elapsed_ns * 1e-9 / count, self._estimate_s
            self._estimate_s = estimate if old is None else old + _NEW_WEIGHT * (estimate - old)
        while packets and packets[0][0] <= report.sequence:
            packets.popleft()
            self.first_sent_s, self.is_nudged = time.monotonic(), False

    # ---- what a worker is told in the middle of a packet -----------------------------------------

    def cancel(self, order: CancelTask) -> None:
        """A call that was sent is not wanted."""
        task_id, force, recursive = order.task_id, order.force, order.recursive
        self._interrupt(
            InterruptTask(task_id=task_id, sequence=0, force=force, recursive=recursive)
        )

    def waits_behind(self) -> bool:
        """Whether results may wait in the worker for a long call behind theirs."""
        packets = self.packets
        if not packets or self.route.is_together:
            return False
        return packets[0][1] > 1 and not self.is_nudged

    def nudge(self) -> None:
        """The worker is to report what has ended."""
        self.is_nudged = True
        self._interrupt(_NUDGE)

    def _interrupt(self, message: InterruptTask) -> None:
        """Tell the worker, and make it look also in the middle of a call."""
        if self.route.is_together:
            self._send(message)  # it reads while calls run
            return
        if self._end.is_far:
            # (The other end reads urgent data in its place, so that this frame is one like others.)
            self._send(message, socket.MSG_OOB)
            return
        self._send(message)
        try:
            if self._end.pid > 0:
                os.kill(self._end.pid, signal.SIGURG)
        except OSError:
            pass  # it is gone, as we shall read

    def close(self) -> None:
        """The end."""
        self.is_lost = True
        self.channel.close()
