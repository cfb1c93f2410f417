"""Direct calls of an actor: the worker's side.

    callers ══▶ doors ──proofs──▶ Caller ──packets──▶  `Worker.run_direct`
       ▲                            │  ▲
       └────── reports ◀────────────┴──┘      the node's task queue ──▶ the main loop, as ever

What: lets callers in, runs what they send between the packets of the node, keeps results that the
nodes have to bring.
Who calls: `local/actor_serial.py`, whose calls run one after the other, on their thread.
May touch: sockets.
Invariants: calls of one caller run in the order in which it sent them; a caller that is gone is
forgotten, and the actor lives on; what nobody proved is never decoded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, final

import msgspec

from poolray.direct.addresses import CONNECT_S, Offer, make_door, settle_in
from poolray.direct.ends import End
from poolray.direct.frames import ConnectionLost
from poolray.direct.seal import HandshakeError
from poolray.ids import TaskId
from poolray.local import process_state
from poolray.local.channel import Spinner
from poolray.protocol.values import Outcome
from poolray.protocol.worker import InterruptTask, LoanEnded, RunTasks, TasksFinished

if TYPE_CHECKING:
    from poolray.local.worker import Worker

#: Doors that wait for whoever asked for them.
DOORS_MAX = 64
#: A caller that reads takes what it is sent within less.
_PATIENCE_S = 1.0
#: Results that a gone caller has not fetched are kept for so long: what it asked for by way of the
#: nodes may still be under way, if only the connection was cut.
KEEP_S = 60.0
#: A gone caller is noticed after this long where only its calls are waited for.
_LOOK_AGAIN_MS = 1000.0
#: They were sent: if nothing comes for so many looks, the caller was stopped in the middle of that.
_LOOKS_MAX = 6

_decode = msgspec.msgpack.Decoder(RunTasks | InterruptTask).decode
_encode = msgspec.msgpack.Encoder().encode


@final
class Caller:
    """A process that calls directly.

    Parameters
    ----------
    channel : socket
        Connected.
    offer : Offer
    listens : bool
        It has come to us; else we have come to it.
    """

    def __init__(self, channel: socket.socket, offer: Offer, *, listens: bool = True) -> None:
        self.channel = channel
        self._end = End(channel, offer, listens=listens)
        self.is_gone = False
        self._packets: deque[RunTasks] = deque()
        #: Calls that are not wanted -> whether nothing that they have submitted is, either.
        self.cancelled: dict[TaskId, bool] = {}
        #: Whether the last look found something.
        self.has_come = False
        #: The call that this process is to end with, if it runs.
        self.forced: TaskId | None = None
        #: What its channel is polled for.
        self.wanted = select.POLLIN
        #: Calls that have run, or will not.
        self.ended = 0
        self.opened_s = time.monotonic()
        if self._end.is_far:  # it cannot send us signals: urgent data makes the system do so
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            fcntl.fcntl(channel.fileno(), fcntl.F_SETOWN, os.getpid())

    @property
    def connection_id(self) -> bytes:
        """By which it is known."""
        return self._end.connection_id

    @property
    def is_far(self) -> bool:
        """Its signals come with urgent data."""
        return self._end.is_far

    @property
    def is_open(self) -> bool:
        """It has proved who it is."""
        return self._end.is_open

    def read(self, all_of_it: bool = False) -> None:
        """Take in what has come; `is_gone` when that is the end."""
        self.has_come = False
        try:
            for frame in self._end.read(all_of_it):
                self.has_come = True
                message = _decode(frame)
                if type(message) is RunTasks:
                    self._packets.append(message)
                elif message.task_id:
                    self.cancelled[message.task_id] = message.recursive
                    if message.force:
                        self.forced = message.task_id
        except (ConnectionLost, HandshakeError, msgspec.MsgspecError, OSError):
            self.is_gone = True
            self.cancelled.clear()

    def next_packet(self) -> RunTasks | None:
        """The next packet that was read."""
        return self._packets.popleft() if self._packets else None

    def report(self, report: TasksFinished, patience_s: float = _PATIENCE_S) -> None:
        """Send results; those that a caller does not take for a second wait for `push`: a stopped
        process must not hold up the actor for others.
        """
        if self.is_gone:
            return
        end = self._end
        is_slow = end.has_unsent
        try:
            end.send(_encode(report))
            if not end.has_unsent or is_slow or not patience_s:
                return
            poller = select.poll()
            poller.register(self.channel, select.POLLOUT)
            latest_s = time.monotonic() + patience_s
            while end.has_unsent and (left_s := latest_s - time.monotonic()) > 0:
                poller.poll(left_s * 1000.0)
                end.push()
        except ConnectionLost:
            self.is_gone = True

    def close(self) -> None:
        """Let go of the connection; also in a forked child: the caller must hear of this process's
        end, not of the child's.
        """
        self.is_gone = True
        self.channel.close()

    def give_back(self) -> None:
        """Say that this worker goes, and has not begun what it has not reported."""
        with contextlib.suppress(ConnectionLost):
            self._end.send(_encode(LoanEnded()))
            self._end.push()

    @property
    def has_unsent(self) -> bool:
        """Whether results wait until it reads."""
        return self._end.has_unsent and not self.is_gone

    def push(self) -> None:
        """Send what waits, as far as there is room."""
        try:
            self._end.push()
        except ConnectionLost:
            self.is_gone = True


@final
class DirectServer:
    """The callers of one actor."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._tasks = worker.tasks.fileno()
        self._poller = select.poll()
        self._poller.register(self._tasks, select.POLLIN)
        self._spinner = Spinner(worker.config.spin_s)
        self._doors: dict[int, tuple[socket.socket, Offer]] = {}
        self._callers: dict[int, Caller] = {}
        #: Results that the nodes have to bring, and whose they are.
        self._held: dict[TaskId, tuple[Caller, Any]] = {}
        #: Whose calls run; None: the node's.
        self._at_hand: Caller | None = None
        #: Gone callers with such results -> when these are let go of; the oldest first.
        self._leavers: dict[Caller, float] = {}
        process_state.on_fork_in_child(self._abandon)

    # ---- what callers ask for by way of the nodes ------------------------------------------------

    def listen(self, machine: str) -> tuple[Offer, bool] | None:
        """A door for one caller, which is on that machine, and whether calls run side by side;
        None: it cannot come here.
        """
        setup = self._worker.setup
        made = make_door(machine == setup.machine, setup.direct_host, setup.direct_ports)
        if made is None:
            return None
        while len(self._doors) >= DOORS_MAX:
            self._close_door(next(iter(self._doors)))
        door, offer = made
        self._doors[door.fileno()] = door, offer
        self._poller.register(door, select.POLLIN)
        return offer, False

    def run_until(self, connection_id: bytes, count: int) -> None:
        """Run calls of a caller until so many have ended: the next call of it is the node's."""
        caller = next((c for c in self._callers.values() if c.connection_id == connection_id), None)
        if caller is None:
            return  # it is gone, and with it who would see the order
        looks = 0
        poller = select.poll()
        poller.register(caller.channel, select.POLLIN)
        self._worker.send_results()
        while looks < _LOOKS_MAX:
            before = caller.ended
            self._run(caller)
            if caller.is_gone or caller.ended >= count:
                return
            if caller.has_unsent:  # it reads these before it sends more
                poller.modify(caller.channel, select.POLLIN | select.POLLOUT)
                caller.push()
            else:
                poller.modify(caller.channel, select.POLLIN)
            has_come = poller.poll(_LOOK_AGAIN_MS)
            if has_come:
                caller.read()
            looks = 0 if has_come or caller.ended > before else looks + 1
        self._forget(caller.channel.fileno(), caller)  # others wait behind it

    def hold(self, task_id: TaskId, result: Any) -> Outcome | None:
        """Keep a result until the nodes bring it; what the caller is told instead. None: the
        node's call it was.
        """
        if self._at_hand is None:
            return None
        self._held[task_id] = self._at_hand, result
        return Outcome(values=[])

    def has(self, task_id: TaskId) -> bool:
        """Whether the call that runs came past the node."""
        return self._at_hand is not None

    def give_held(self, task_id: TaskId) -> Any:
        """Such a result, once."""
        return self._held.pop(task_id)[1]

    # ---- the loop --------------------------------------------------------------------------------

    def receive(self) -> bytes:
        """The node's next packet; runs direct calls until it is there. Empty: the node is gone."""
        while True:
            for descriptor, events in self._wait():
                if descriptor == self._tasks:
                    packet = self._worker.reader.take_nowait()
                    if packet is not None:
                        return packet
                elif descriptor in self._callers:
                    caller = self._callers[descriptor]
                    if events & select.POLLOUT:
                        caller.push()
                    caller.read()
                    self._run(caller)
                    if caller.is_gone:
                        self._forget(descriptor, caller)
                else:
                    self._let_in(descriptor)

    def _wait(self) -> list[tuple[int, int]]:
        for caller in self._callers.values():
            wanted = select.POLLIN | (select.POLLOUT if caller.has_unsent else 0)
            if wanted != caller.wanted:
                caller.wanted = wanted
                self._poller.modify(caller.channel, wanted)
        is_waiting = self._doors or self._leavers or self._strangers()
        timeout_ms = CONNECT_S * 1000.0 if is_waiting else None
        ready = self._spinner.wait(self._poller.poll, timeout_ms)
        if not ready:
            self._close_late()
        return ready

    def _strangers(self) -> bool:
        return any(not caller.is_open for caller in self._callers.values())

    def _run(self, caller: Caller) -> None:
        """Run what a caller has sent."""
        before, self._at_hand = self._at_hand, caller
        try:
            while (packet := caller.next_packet()) is not None:
                self._worker.run_direct(packet, caller)
                # The last call's values must not live on while we wait.
                packet = None
        finally:
            self._at_hand = before

    def _let_in(self, descriptor: int) -> None:
        """Somebody is at a door, which closes behind him."""
        door, offer = self._doors[descriptor]
        try:
            channel, _ = door.accept()
        except OSError:
            return  # he has left again
        self._close_door(descriptor)
        try:
            settle_in(channel)
            caller = Caller(channel, offer)
        except (HandshakeError, OSError):
            channel.close()
            return
        self._callers[channel.fileno()] = caller
        self._poller.register(channel, select.POLLIN)

    def _close_door(self, descriptor: int) -> None:
        door, _ = self._doors.pop(descriptor)
        self._poller.unregister(door)
        door.close()

    def _close_late(self) -> None:
        """Nobody has come for long: who asked has given up, or does not prove himself."""
        for descriptor in list(self._doors):
            self._close_door(descriptor)
        too_early = time.monotonic() - CONNECT_S
        for descriptor, caller in list(self._callers.items()):
            if not caller.is_open and caller.opened_s < too_early:
                self._forget(descriptor, caller)
        self._let_go()

    def _abandon(self) -> None:
        """In a forked child: callers must hear of this process's end, not of the child's."""
        for door, _ in self._doors.values():
            door.close()
        for caller in self._callers.values():
            caller.close()
        self._doors.clear()
        self._callers.clear()

    def _let_go(self) -> None:
        """Of what nobody will fetch."""
        now = time.monotonic()
        while self._leavers:
            caller, until_s = next(iter(self._leavers.items()))
            if until_s > now:
                return
            del self._leavers[caller]
            self._held = {t: held for t, held in self._held.items() if held[0] is not caller}

    def _forget(self, descriptor: int, caller: Caller) -> None:
        caller.is_gone = True
        self._poller.unregister(caller.channel)
        del self._callers[descriptor]
        caller.channel.close()
        self._let_go()
        if any(holder is caller for holder, _ in self._held.values()):
            self._leavers[caller] = time.monotonic() + KEEP_S
