"""Calls whose time is limited.

    packet sent ──▶ look when its call may be late ──▶ LookAtCall ──▶ CallProgress
                       ▲                                                │
                       └──────────────── not late yet ──────────────────┤
    order to stop, worker is replaced ◀──── late ───────────────────────┘
        └── has not ended soon ──▶ killed: the call fails, its neighbours run elsewhere
What: when the call that a worker runs is looked at, and what becomes of one that is late.
Who calls: `node/dispatch.py` as packets are sent and workers lost, `node/node.py` at a tick and
with what the shell has seen.
May touch: nothing.
Invariants: a worker is in `_looks` or in `_late`, not in both, and only while it has calls of a
class with a limit; a worker that was late gets no more packets. A worker with such calls sends what
has ended before it begins the next one, so that nothing is lost, or run twice, with one that hangs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from poolray.exceptions import CallTimeoutError
from poolray.ids import TaskId, WorkerId
from poolray.node.effects import Interrupt, LookAtCall, TakeBack, TerminateWorker
from poolray.node.state import NodeState
from poolray.node.workers import GroupState, WorkerRecord
from poolray.protocol.node import CallProgress, WorkerLost
from poolray.protocol.worker import InterruptTask

if TYPE_CHECKING:
    from poolray.node.dispatch import Dispatcher
    from poolray.node.groups import Groups


_NEVER = float("inf")
#: A call that has less time left than this is late: a look that is due at this very moment, as sums
#: of such times may be, would be due for ever.
_CLOSE_S = 1e-6


class _Late(NamedTuple):
    """A call that was told to stop."""

    sequence: int  #: of its packet
    call: int  #: its index in the packet
    kill_s: float  #: when its worker is killed, if it has not been
    name: str
    timeout_s: float


@final
class CallTimeouts:
    """The limits of a node's running calls."""

    __slots__ = ("_late", "_looks", "_state", "dispatcher", "groups")

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self.dispatcher: Dispatcher
        self.groups: Groups
        #: worker id -> when the call that it runs is looked at.
        self._looks: dict[WorkerId, float] = {}
        #: worker id -> the call that was late there.
        self._late: dict[WorkerId, _Late] = {}

    def on_sent(self, worker: WorkerRecord, timeout_s: float) -> None:
        """A packet of calls with a limit is on its way to a worker."""
        due_s = self._state.now + timeout_s
        if due_s < self._looks.get(worker.worker_id, _NEVER):
            self._look_at(worker, due_s)

    def _look_at(self, worker: WorkerRecord, due_s: float) -> None:
        self._looks[worker.worker_id] = due_s
        self.dispatcher.watch_time(due_s)

    def on_tick(self) -> None:
        """Look at calls that may be late; kill the workers of those that did not stop in time."""
        now, state = self._state.now, self._state
        for worker_id in [worker_id for worker_id, due_s in self._looks.items() if due_s <= now]:
            del self._looks[worker_id]
            if self._limit_of(state.workers[worker_id]):
                state.effects.append(LookAtCall(worker_id))
        for worker_id, late in list(self._late.items()):
            if late.kill_s <= now:
                self._late[worker_id] = late._replace(kill_s=_NEVER)
                if self._has_packet(state.workers[worker_id], late.sequence):
                    state.effects.append(TerminateWorker(worker_id))
            elif late.kill_s < _NEVER:
                self.dispatcher.watch_time(late.kill_s)
        if self._looks:
            self.dispatcher.watch_time(min(self._looks.values()))

    def _limit_of(self, worker: WorkerRecord) -> float:
        """The limit of the calls that a worker has; 0 when there is none."""
        return worker.packets[0].queue.task_class.timeout_s if worker.packets else 0.0

    def _has_packet(self, worker: WorkerRecord, sequence: int) -> bool:
        return any(packet.sequence == sequence for packet in worker.packets)

    def on_progress(self, message: CallProgress) -> None:
        """The shell has looked at what a worker runs."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None or message.worker_id in self._late:
            return
        timeout_s = self._limit_of(worker)
        if not timeout_s:
            return
        runs = message.running_s >= 0 and self._has_packet(worker, message.sequence)
        left_s = timeout_s - message.running_s if runs else timeout_s
        if left_s > _CLOSE_S:
            self._look_at(worker, self._state.now + left_s)
        elif worker.group.state < GroupState.FAILED:  # else it is being killed
            self._stop(worker, message, timeout_s)

    def _stop(self, worker: WorkerRecord, message: CallProgress, timeout_s: float) -> None:
        """End a call, and its worker after it."""
        worker_id = worker.worker_id
        kill_s = self._state.now + self._state.config.force_after_s
        name = worker.packets[0].queue.task_class.name
        self._looks.pop(worker_id, None)
        self._late[worker_id] = _Late(message.sequence, message.index, kill_s, name, timeout_s)
        self.dispatcher.watch_time(kill_s)
        self._state.effects.append(TakeBack(worker_id))
        self.groups.stop(worker)
        order = InterruptTask(
            task_id=TaskId(b""), sequence=message.sequence, force=False, index=message.index
        )
        self._state.effects.append(Interrupt(worker_id, order))

    def on_lost(self, message: WorkerLost) -> CallTimeoutError | None:
        """A worker is gone; gives the error of the call that it ran last if that was late."""
        self._looks.pop(message.worker_id, None)
        late = self._late.pop(message.worker_id, None)
        if late is None or (late.sequence, late.call) != (message.sequence, message.index):
            return None
        return CallTimeoutError(task_name=late.name, timeout_s=late.timeout_s, pid=message.pid)

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables name workers that are gone, or one twice."""
        assert not self._looks.keys() & self._late.keys()
        for worker_id in (*self._looks, *self._late):
            assert worker_id in self._state.workers, "the limit of a worker that is gone"


__all__ = ["CallTimeouts"]
