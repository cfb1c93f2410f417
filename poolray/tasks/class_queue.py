"""The queue of a task class, and how many of its calls travel together.

What: a moving estimate of a class's run time, and from it the number of calls in a packet. Long
calls go one at a time; calls of microseconds go in packets worth about a millisecond.
Who calls: the node machine.
May touch: nothing.
Invariants: `queued_calls` is the sum over the queued tasks; an estimate comes from reports only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from poolray.config import Config
from poolray.ids import WorkerId
from poolray.protocol.values import TaskClass

if TYPE_CHECKING:
    from poolray.tasks.lifecycle import TaskRecord

#: Weight of a new report in the estimate: two slow reports in a row outweigh a long fast past.
_NEW_WEIGHT = 0.4


@final
class Obstacle:
    """Why calls of a class cannot run on this node, now or later."""

    __slots__ = ("is_final", "text")

    def __init__(self, text: str, is_final: bool) -> None:
        #: What is missing, for the user.
        self.text = text
        #: The calls fail; otherwise they wait for a node that can run them.
        self.is_final = is_final


@final
class ClassQueue:
    """A task class: its queue and what is known of its run time."""

    __slots__ = (
        "demand",
        "estimate_s",
        "full_at",
        "function_name",
        "hungry",
        "kept",
        "lent",
        "obstacle",
        "own_turn",
        "passed_over",
        "queue",
        "queued_calls",
        "released",
        "removed",
        "roams",
        "stuck",
        "task_class",
        "tasks",
        "uses_devices",
        "wanted",
    )

    def __init__(self, task_class: TaskClass, obstacle: Obstacle | None = None) -> None:
        self.task_class = task_class
        #: Why none of its calls can ever run here; None: they can, the usual case.
        self.obstacle = obstacle
        #: What a call takes of a node, under the names that the node has for it: those of a
        #: placement group where the class names one.
        self.demand: Mapping[str, int] = task_class.resources
        self.set_lent()
        #: Whether its calls may be better off on another node although this one could run them.
        self.roams = False
        #: State of the cluster in which no other node had room for a call.
        self.full_at = 0
        #: Of calls that nodes take by turns: it is this node's, until it has run one.
        self.own_turn = False
        #: Whether its workers are given devices, and serve nobody else afterwards.
        self.uses_devices = False
        #: Module and name of the function.
        self.function_name = task_class.name
        #: Tasks that may run, in order; among them are removed ones, which `first` skips.
        self.queue: deque[TaskRecord] = deque()
        self.queued_calls = 0
        #: Entries of `queue` that count no more (taking them out at once would cost a search).
        self.removed: dict[TaskRecord, None] = {}
        #: Tasks of this class that have not ended or are kept as lineage.
        self.tasks = 0
        #: Workers that run this class and have room for another packet, longest waiting first.
        self.hungry: dict[WorkerId, None] = {}
        #: Packets that other classes were served while this one waited for resources.
        self.passed_over = 0
        #: It waits for something that a dispatch follows (a worker, resources): more tasks behind
        #: it change nothing.
        self.stuck = False
        #: Nobody will name the class again: it goes with its last task.
        self.released = False
        #: Seconds per call, moving average; None until a first report.
        self.estimate_s: float | None = None

    def set_lent(self) -> None:
        """The demand is known, or another one than it was."""
        #: What a call that waits in `get` or `wait` lends to others: its CPUs. Of the rest, a
        #: device say, its memory is full of things.
        self.lent = {n: q for n, q in self.demand.items() if n == "CPU" or n[:10] == "CPU_group_"}
        self.kept = {n: q for n, q in self.demand.items() if n not in self.lent and q}
        #: What a node must have free to be chosen: an actor that takes no CPU later needs one then.
        self.wanted = self.demand
        placed_with = self.task_class.placed_with
        if placed_with and self.demand is self.task_class.resources:
            both = (*self.demand, *placed_with)
            amounts = self.demand.get, placed_with.get
            self.wanted = {n: sum(get(n, 0) for get in amounts) for n in both}

    def push(self, record: TaskRecord) -> None:
        """Queue a task behind the others."""
        self.queue.append(record)
        self.queued_calls += len(record.calls)

    def push_front(self, record: TaskRecord) -> None:
        """Queue a task before the others (it was sent already, or it is tried again)."""
        self.queue.appendleft(record)
        self.queued_calls += len(record.calls)

    def remove(self, record: TaskRecord) -> None:
        """Take a task out of the queue, wherever in it it is."""
        self.queued_calls -= len(record.calls)
        self.removed[record] = None
        if 2 * len(self.removed) > len(self.queue):
            removed, self.removed = self.removed, {}
            self.queue = deque(task for task in self.queue if task not in removed)

    def first(self) -> TaskRecord:
        """The task that is next; the queue has calls."""
        queue, removed = self.queue, self.removed
        while removed and queue[0] in removed:
            del removed[queue.popleft()]
        return queue[0]

    def clear(self) -> None:
        """Take all tasks out."""
        self.queue.clear()
        self.removed.clear()
        self.queued_calls = 0

    def report(self, calls: int, elapsed_s: float) -> None:
        """Learn from calls that have run."""
        new = elapsed_s / calls
        old = self.estimate_s
        self.estimate_s = new if old is None else old + _NEW_WEIGHT * (new - old)

    def packet_calls(self, config: Config, workers: int) -> int:
        """How many calls the next packet may hold.

        Parameters
        ----------
        workers : int
            Workers that share the queue: the end of a queue is spread over all of them.
        """
        estimate = self.estimate_s
        if estimate is None or self.queued_calls == 1:
            return 1
        if estimate * config.packet_calls_max > config.packet_target_s:
            count = int(config.packet_target_s / estimate)
        else:
            count = config.packet_calls_max
        share = -(-self.queued_calls // (2 * max(1, workers)))
        return max(1, min(count, share))

    def may_prefetch(self, config: Config) -> bool:
        """Whether a call may wait behind another one of this class in a worker's queue."""
        return self.estimate_s is not None and self.estimate_s < config.prefetch_below_s

    def check_invariants(self) -> None:
        """Raise AssertionError when the count of calls is not that of the queue."""
        live = [record for record in self.queue if record not in self.removed]
        assert self.queued_calls == sum(len(record.calls) for record in live)
        assert all(record.calls for record in live)
        assert len(live) + len(self.removed) == len(self.queue)
        assert self.tasks >= len(live)
