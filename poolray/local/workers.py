"""Workers of one group as their shell holds them: a fork server, and channels to each worker.

What: starts the fork server, makes workers' channels, sends packets, takes unread ones back.
Who calls: the runtime, under its lock; `cluster/` may use it too.
May touch: processes and sockets.
Invariants: each descriptor here has one owner, this module; after `close` none is left and the
fork server has been reaped.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from typing import Any, final

import msgspec

from poolray.exceptions import WorkerStartError
from poolray.ids import GroupId, WorkerId
from poolray.local.channel import make_channel, receive_nowait, send_descriptors, send_nowait
from poolray.local.fork_server import WorkerSetup, fork_from_driver, spawn_from_driver
from poolray.local.worker import NUDGE_SIGNAL
from poolray.objects.shared_memory import Arena
from poolray.protocol.worker import (
    ForkServerFailed,
    ForkServerReady,
    ForkWorker,
    InterruptTask,
    KillWorker,
    RunTasks,
    StopForkServer,
    StopWorker,
    WorkerExited,
    WorkerStarted,
)

_decode_news = msgspec.msgpack.Decoder(
    WorkerStarted | WorkerExited | ForkServerReady | ForkServerFailed
).decode
_decode_packet = msgspec.msgpack.Decoder(RunTasks | StopWorker).decode
_encode = msgspec.msgpack.Encoder().encode


@final
class WorkerHandle:
    """The channels of one worker."""

    __slots__ = (
        "asked_ns",
        "control",
        "outbox",
        "pid",
        "queue_in",
        "queue_out",
        "signal_due",
        "slot",
        "worker_id",
    )

    def __init__(
        self,
        worker_id: WorkerId,
        slot: int,
        queue_in: socket.socket,
        queue_out: socket.socket,
        control: socket.socket,
    ) -> None:
        self.worker_id = worker_id
        self.slot = slot
        self.asked_ns = time.monotonic_ns()
        self.pid = 0
        #: We write tasks here …
        self.queue_in = queue_in
        #: … the worker reads them here, and so may we: what it has not read is taken back.
        self.queue_out = queue_out
        self.control = control
        #: Packets that found a channel full, in order: (channel, packet).
        self.outbox: deque[tuple[socket.socket, bytes]] = deque()
        #: There is an order among them that it is to be signalled of.
        self.signal_due = False

    def close(self) -> None:
        """Let go of the channels."""
        for end in (self.queue_in, self.queue_out, self.control):
            end.close()


@final
class WorkerHost:
    """One group's fork server and workers."""

    def __init__(
        self,
        group_id: GroupId,
        arena: Arena,
        setup: WorkerSetup,
        start_method: str,
        preparation: dict[str, Any] | None,
    ) -> None:
        self.group_id = group_id
        self.setup = setup
        self.start_method = start_method
        #: A worker has come of it.
        self.has_served = False
        if start_method == "fork":
            self.server_pid, self.commands, self.reports = fork_from_driver(arena, setup)
        else:
            assert preparation is not None
            self.server_pid, self.commands, self.reports = spawn_from_driver(
                arena, setup, preparation
            )
        self.workers: dict[WorkerId, WorkerHandle] = {}
        #: Names in the servers's `__main__`, once a spawned one has said so.
        self.main_names: list[str] | None = None
        self.failure: str | None = None
        self.closed = False
        self._reaped = False

    # ---- workers ---------------------------------------------------------------------------------

    def start_worker(self, worker_id: WorkerId, slot: int) -> None:
        """Ask the server for a worker.

        Raises
        ------
        OSError
            No channel can be made (out of descriptors), or the server is gone.
        """
        queue_in, queue_out = make_channel()
        control, worker_control = make_channel()
        handle = WorkerHandle(worker_id, slot, queue_in, queue_out, control)
        command = ForkWorker(worker_id=worker_id, group_id=self.group_id, slot=slot)
        try:
            send_descriptors(
                self.commands,
                _encode(command),
                [queue_out.fileno(), worker_control.fileno()],
            )
        except OSError:
            handle.close()
            raise
        finally:
            worker_control.close()
        self.workers[worker_id] = handle

    def send(self, worker_id: WorkerId, message: RunTasks | StopWorker) -> None:
        """Put a message in a worker's queue; never blocks."""
        handle = self.workers.get(worker_id)
        if handle is not None:
            self._post(handle, handle.queue_in, _encode(message))

    def reply(self, worker_id: WorkerId, message: Any) -> None:
        """Answer a worker; never blocks."""
        handle = self.workers.get(worker_id)
        if handle is not None:
            self._post(handle, handle.control, _encode(message))

    def _post(self, handle: WorkerHandle, channel: socket.socket, packet: bytes) -> None:
        if handle.outbox or not send_nowait(channel, packet):
            handle.outbox.append((channel, packet))

    def flush(self) -> bool:
        """Send what found a channel full before; True when something still waits."""
        waiting = False
        for handle in self.workers.values():
            outbox = handle.outbox
            while outbox:
                channel, packet = outbox[0]
                if not send_nowait(channel, packet):
                    waiting = True
                    break
                outbox.popleft()
            if handle.signal_due and not outbox:
                handle.signal_due = False
                self.nudge(handle.worker_id)
        return waiting

    def take_back(self, worker_id: WorkerId) -> list[int]:
        """Empty a worker's queue; gives the sequence numbers of the packets that it had not
        read. A stop message among them is put back.
        """
        handle = self.workers.get(worker_id)
        if handle is None:
            return []
        sequences = []
        stop = False
        packets = []
        while (packet := receive_nowait(handle.queue_out)) is not None:
            if not packet:
                break
            packets.append(packet)
        packets += [p for channel, p in handle.outbox if channel is handle.queue_in]
        handle.outbox = deque(item for item in handle.outbox if item[0] is not handle.queue_in)
        for packet in packets:
            message = _decode_packet(packet)
            if isinstance(message, RunTasks):
                sequences.append(message.sequence)
            else:
                stop = True
        if stop:
            self._post(handle, handle.queue_in, _encode(StopWorker()))
        return sequences

    def interrupt(self, worker_id: WorkerId, message: InterruptTask) -> None:
        """Send a worker an order and make it look."""
        handle = self.workers.get(worker_id)
        if handle is not None:
            self._post(handle, handle.control, _encode(message))
            handle.signal_due = bool(handle.outbox)
            self.nudge(worker_id)

    def nudge(self, worker_id: WorkerId) -> None:
        """Signal a worker to hand back what it has not begun."""
        handle = self.workers.get(worker_id)
        if handle is not None and handle.pid:
            try:
                os.kill(handle.pid, NUDGE_SIGNAL)
            except ProcessLookupError:
                pass  # it has ended: its exit is on its way to us

    def terminate(self, worker_id: WorkerId) -> None:
        """Kill a worker by force, through its parent, which knows whether the pid is still its."""
        self._command(KillWorker(worker_id=worker_id))

    def forget(self, worker_id: WorkerId) -> None:
        """A worker has ended: let go of its channels."""
        handle = self.workers.pop(worker_id, None)
        if handle is not None:
            handle.close()

    def news(self) -> list[WorkerStarted | WorkerExited] | None:
        """What the server has reported; None when it is gone."""
        found: list[WorkerStarted | WorkerExited] = []
        while (packet := receive_nowait(self.commands)) is not None:
            if not packet:
                return found or None
            message = _decode_news(packet)
            if isinstance(message, WorkerStarted):
                handle = self.workers.get(message.worker_id)
                if handle is not None:
                    handle.pid = message.pid
                self.has_served = True
                found.append(message)
            elif isinstance(message, WorkerExited):
                found.append(message)
            elif isinstance(message, ForkServerReady):
                self.main_names = message.main_names
            else:
                self.failure = message.reason
        return found

    def pids(self) -> list[tuple[WorkerId, int]]:
        """Its workers that have a process, with that."""
        return [(handle.worker_id, handle.pid) for handle in self.workers.values() if handle.pid]

    def wait_spawned(self, timeout_s: float) -> None:
        """Wait until a spawned server has prepared itself.

        Raises
        ------
        WorkerStartError
            It failed, with its reason.
        """
        from poolray.local.channel import wait_readable

        deadline = time.monotonic() + timeout_s
        while self.main_names is None and self.failure is None:
            if not wait_readable(self.commands, deadline - time.monotonic()):
                self.failure = f"the fresh interpreter was not ready after {timeout_s:.0f} s"
            elif self.news() is None and self.failure is None and self.main_names is None:
                self.failure = "the fresh interpreter ended before it was ready"
        if self.failure is not None:
            raise WorkerStartError(reason=self.failure)

    # ---- end -------------------------------------------------------------------------------------

    def _command(self, message: KillWorker | StopForkServer) -> None:
        try:
            self.commands.send(_encode(message))
        except OSError:
            pass  # the server is gone, and its children with it

    def close(self, timeout_s: float) -> None:
        """Kill what is left of workers, end the server, let go of all channels."""
        if self.closed:
            return
        self.closed = True
        self._command(StopForkServer())
        for handle in self.workers.values():
            handle.close()
        self.workers.clear()
        self.reap(timeout_s)
        self.commands.close()
        self.reports.close()

    def reap(self, timeout_s: float) -> None:
        """Wait for the server's end; by force when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not self._try_reap():
            if time.monotonic() > deadline:
                try:
                    os.kill(self.server_pid, signal.SIGKILL)
                except ProcessLookupError:
                    return
                deadline = float("inf")
            time.sleep(0.0005)

    def _try_reap(self) -> bool:
        if self._reaped:
            return True
        try:
            pid, _ = os.waitpid(self.server_pid, os.WNOHANG)
        except ChildProcessError:
            pid = self.server_pid  # somebody else waited for all children
        self._reaped = pid != 0
        return self._reaped

    def abandon(self) -> None:
        """In a forked child: close our copies, and nothing else; all this is the parent's."""
        for handle in self.workers.values():
            handle.close()
        self.workers.clear()
        self.commands.close()
        self.reports.close()
        self.closed = True
