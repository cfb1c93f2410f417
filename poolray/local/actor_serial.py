"""Calls of an actor that run one after the other, in the order in which they came.

What: runs packets, and takes out of them the calls that were cancelled before they began, also out
of packets that wait in the queue.
Who calls: `local/actor_worker.py`; `local/worker.py` when orders have come.
May touch: sockets.
Invariants: calls are never reordered; a call that was cancelled before it began is reported at once
and never runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from poolray.ids import TaskId
from poolray.local.actor_reports import cancelled_outcome
from poolray.local.channel import receive_nowait
from poolray.protocol.worker import InterruptTask, RunTasks, TaskCall, TaskResult, TasksFinished

if TYPE_CHECKING:
    from poolray.local.worker import Worker


@final
class SerialCalls:
    """What runs the calls."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        #: Packets that were read, to look for cancelled calls in them, and are next.
        self._read_ahead: deque[bytes] = deque()
        #: Calls that will not run: they were reported already.
        self.skipped: dict[TaskId, None] = {}

    def run(self, receive: Callable[[], bytes]) -> None:
        """Run calls until told to stop."""
        worker, decode, read_ahead = self._worker, self._worker.decode, self._read_ahead
        while True:
            if read_ahead:
                packet = read_ahead.popleft()
            else:
                packet = receive() if worker.direct is None else worker.direct.receive()
            if not packet:
                return
            message = decode(packet)
            if type(message) is not RunTasks:
                return
            worker.run_packet(message)
            # The last call's values must not live on while we wait.
            packet = message = b""

    def skip_cancelled(self, packet: RunTasks, begun: int, orders: deque[InterruptTask]) -> None:
        """Orders have come: calls that have not begun end here and now.

        Parameters
        ----------
        packet : RunTasks
            The packet at hand.
        begun : int
            How many of its calls have begun.
        orders : deque of InterruptTask
            Those that are for other calls stay in it.
        """
        upcoming = self._upcoming(packet, begun)
        results = []
        for _ in range(len(orders)):
            order = orders.popleft()
            name = upcoming.get(order.task_id)
            if name is None:
                orders.append(order)
            elif order.task_id not in self.skipped:
                self.skipped[order.task_id] = None
                outcome = cancelled_outcome(order.task_id, name)
                results.append(TaskResult(task_id=order.task_id, start=0, results=[outcome]))
        if results:
            worker = self._worker
            report = TasksFinished(
                worker_id=worker.worker_id,
                results=results,
                elapsed_ns=0,
                sequence=packet.sequence - 1,
            )
            worker.send(worker.encode(report))

    def _upcoming(self, packet: RunTasks, begun: int) -> dict[TaskId, str]:
        """Calls that have not begun -> their names."""
        worker = self._worker
        if not self._read_ahead or self._read_ahead[-1]:  # (an empty one is the end)
            while (read := receive_nowait(worker.tasks)) is not None:
                self._read_ahead.append(read)
                if not read:
                    break
        tasks: list[TaskCall] = packet.tasks[begun:]
        names = {index: known.task_class.name for index, known in worker.functions.classes.items()}
        for read in self._read_ahead:
            message = worker.decode(read) if read else None
            if isinstance(message, RunTasks):
                names.update((c.index, c.task_class.name) for c in message.classes)
                tasks = tasks + message.tasks
        return {task.task_id: names.get(task.class_index, "") for task in tasks}
