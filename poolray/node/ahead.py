"""Short tasks that a peer is given beyond what it can run at once.

    slots: what a peer has room for, one task each, charged to its view
    given: tasks that it has and has not answered for; up to `slots` times what takes a few
           milliseconds, so that it never waits for the way there and back

What: how much of each class every peer has, which one takes another task although none has room,
and which is to give back what it has not begun, for something long runs there.
Who calls: `node/peers.py` as tasks go and results come; `node/node.py` at a tick.
May touch: nothing.
Invariants: room anywhere goes before stock; only classes that cannot run here, and whose calls are
known to be short, are stocked; each task that was given is counted until its peer has answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.ids import ClassId, NodeId, TaskId
from poolray.node.effects import SendPeer
from poolray.node.state import NodeState
from poolray.protocol.node import ReturnTasks
from poolray.protocol.values import CallKind
from poolray.tasks.class_queue import ClassQueue

if TYPE_CHECKING:
    from poolray.node.dispatch import Dispatcher
    from poolray.node.placing import Placing

#: A stock is worth so many packets of a worker: on a slow network the way there and back is longer
#: than one of them takes.
_PACKETS = 4
#: Bytes of arguments in stock for each slot, by the task that is next.
_BYTES_MAX = 256 * 1024
#: A peer that is silent for this long, and twice the time that its stock takes, gives it back.
_PATIENCE_S = 0.05
#: It is asked again after so many times that.
_AGAIN = 10.0


@final
class Stock:
    """What one peer has of one class."""

    __slots__ = (
        "charged",
        "given",
        "heard_s",
        "is_stalled",
        "is_watched",
        "node_id",
        "queue",
        "report",
        "slots",
    )

    def __init__(self, node_id: NodeId, queue: ClassQueue) -> None:
        self.node_id = node_id
        self.queue = queue
        self.given = 0
        self.slots = 0
        #: Slots that were charged to the peer's last report, and which one that was: the next one
        #: counts what runs there.
        self.charged = 0
        self.report = 0
        #: When it said something of this class last, or was given the first.
        self.heard_s = 0.0
        #: It was silent for too long: it gets no more than it has room for until it has run one.
        self.is_stalled = False
        self.is_watched = False


@final
class Ahead:
    """The stocks of all peers."""

    __slots__ = (
        "_roomy",
        "_state",
        "_stock_by_task",
        "_stocks",
        "_watched",
        "dispatcher",
        "placing",
    )

    def __init__(self, state: NodeState, placing: Placing) -> None:
        self._state = state
        self.placing = placing
        self.dispatcher: Dispatcher
        #: class -> peer -> what it has; none that is empty.
        self._stocks: dict[ClassId, dict[NodeId, Stock]] = {}
        #: class -> stocks that may take more, the one that took some last at the end.
        self._roomy: dict[ClassId, dict[NodeId, Stock]] = {}
        #: Task that was given -> where it counts.
        self._stock_by_task: dict[TaskId, Stock] = {}
        #: Stocks with more tasks than slots.
        self._watched: list[Stock] = []

    def _depth(self, queue: ClassQueue) -> int:
        """How many tasks of a class a peer may have for each slot."""
        config, estimate_s = self._state.config, queue.estimate_s
        if queue.obstacle is None or not queue.may_prefetch(config) or estimate_s is None:
            return 1
        task_class = queue.task_class
        if task_class.kind is CallKind.CREATE or task_class.stream or task_class.timeout_s:
            return 1
        depth = config.packet_calls_max
        if estimate_s * depth > _PACKETS * config.packet_target_s:
            depth = int(_PACKETS * config.packet_target_s / estimate_s)
        if queue.queued_calls:
            payload = queue.first().calls[0]
            size = len(payload) if isinstance(payload, bytes) else 128
            depth = min(depth, _BYTES_MAX // (size + 64))
        return max(2, depth)

    # ---- giving ----------------------------------------------------------------------------------

    def choose(self, queue: ClassQueue) -> NodeId | None:
        """A peer that takes another task of a class into stock."""
        class_id = queue.task_class.class_id
        roomy = self._roomy.get(class_id)
        if roomy is None:
            return None
        depth = self._depth(queue)
        while roomy:
            node_id, stock = next(iter(roomy.items()))
            del roomy[node_id]
            if not stock.is_stalled and stock.given < stock.slots * depth:
                roomy[node_id] = stock
                return node_id
        del self._roomy[class_id]
        return None

    def on_given(self, task_id: TaskId, queue: ClassQueue, node_id: NodeId, has_room: bool) -> None:
        """A peer was given a task, which it has room for or takes into stock."""
        class_id = queue.task_class.class_id
        stocks = self._stocks.setdefault(class_id, {})
        stock = stocks.get(node_id)
        if stock is None:
            stock = stocks[node_id] = Stock(node_id, queue)
            stock.heard_s = self._state.now
        self._stock_by_task[task_id] = stock
        stock.given += 1
        if has_room:
            stock.slots += 1
            report = self.placing.report_of(node_id)
            stock.charged = stock.charged + 1 if stock.report == report else 1
            stock.report = report
            if not stock.is_stalled and queue.obstacle is not None:
                self._roomy.setdefault(class_id, {})[node_id] = stock
        elif not stock.is_watched:
            stock.is_watched = True
            self._watched.append(stock)
            self.dispatcher.watch_time(self._state.now + self._patience(stock))

    def _patience(self, stock: Stock) -> float:
        queue = stock.queue
        return _PATIENCE_S + 2.0 * (queue.estimate_s or 0.0) * self._depth(queue)

    # ---- answers ---------------------------------------------------------------------------------

    def was_asked_back(self, task_id: TaskId) -> bool:
        """Whether a task is in a stock that its peer was told to give back."""
        stock = self._stock_by_task.get(task_id)
        return stock is not None and stock.is_stalled

    def on_back(self, task_id: TaskId, node_id: NodeId, *, has_run: bool) -> ClassQueue | None:
        """A peer has answered for a task; gives its class if a slot is free again that was charged
        to the peer.
        """
        stock = self._stock_by_task.get(task_id)
        if stock is None or stock.node_id != node_id:
            return None
        del self._stock_by_task[task_id]
        class_id = stock.queue.task_class.class_id
        stock.given -= 1
        stock.heard_s = self._state.now
        is_free = False
        if stock.given < stock.slots:
            stock.slots -= 1
            is_free = stock.charged > 0 and stock.report == self.placing.report_of(node_id)
            stock.charged -= is_free
        if has_run:
            stock.is_stalled = False
        if not stock.given:
            self._forget(class_id, node_id)
        elif stock.slots and not stock.is_stalled and stock.queue.obstacle is not None:
            self._roomy.setdefault(class_id, {})[node_id] = stock
        return stock.queue if is_free else None

    def _forget(self, class_id: ClassId, node_id: NodeId) -> None:
        for table in (self._stocks, self._roomy):
            stocks = table.get(class_id)
            if stocks is not None:
                stocks.pop(node_id, None)
                if not stocks:
                    del table[class_id]

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: it has nothing any more."""
        for class_id in [c for c, stocks in self._stocks.items() if node_id in stocks]:
            self._stocks[class_id][node_id].given = 0
            self._forget(class_id, node_id)
        gone = [t for t, stock in self._stock_by_task.items() if stock.node_id == node_id]
        for task_id in gone:
            del self._stock_by_task[task_id]

    # ---- time ------------------------------------------------------------------------------------

    def on_tick(self) -> None:
        """Have peers give back what waits there behind something long."""
        if not self._watched:
            return
        now, watched = self._state.now, self._watched
        self._watched = []
        for stock in watched:
            if stock.given <= stock.slots:
                stock.is_watched = False
                continue
            due_s = stock.heard_s + self._patience(stock)
            if due_s <= now:
                stock.is_stalled = True
                class_id = stock.queue.task_class.class_id
                self._state.effects.append(SendPeer(stock.node_id, ReturnTasks(class_id=class_id)))
                # (What its workers have been sent may follow, once these have handed it back.)
                due_s = now + _AGAIN * self._patience(stock)
                stock.heard_s = due_s - self._patience(stock)
            self._watched.append(stock)
            self.dispatcher.watch_time(due_s)

    # ---- looking in ------------------------------------------------------------------------------

    def check_invariants(self, given: dict[TaskId, NodeId]) -> None:
        """Raise AssertionError when a task that a peer has is not counted."""
        for task_id, node_id in given.items():
            assert self._stock_by_task[task_id].node_id == node_id, "a task given is not counted"
        counts: dict[int, int] = {}
        for stock in self._stock_by_task.values():
            counts[id(stock)] = counts.get(id(stock), 0) + 1
        for class_id, stocks in self._stocks.items():
            assert stocks
            for node_id, stock in stocks.items():
                assert stock.node_id == node_id
                assert stock.queue.task_class.class_id == class_id
                assert 0 <= stock.slots <= stock.given
                is_current = stock.report == self.placing.report_of(node_id)
                assert not is_current or 0 <= stock.charged <= stock.slots
                assert stock.given == counts.pop(id(stock), 0)
        assert not counts, "stock that nobody knows"
        for class_id, roomy in self._roomy.items():
            assert roomy.keys() <= self._stocks[class_id].keys()
        for stock in self._watched:
            assert stock.is_watched
