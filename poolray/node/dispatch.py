"""Who runs what: packets, leases, turns.

What: gives workers packets of calls (`node/packets.py` fills them), takes back what they cannot get
to, and decides what a worker's death means for the calls it had.
Who calls: `node/node.py` with what workers and shells report; `node/tasks.py` when a task is ready;
`node/groups.py` when a worker is ready or gone.
May touch: nothing.
Invariants: a packet's tasks are RUNNING and name the worker and the packet; resources are held by
workers that run something and are not blocked, one lease each; classes take turns by packets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import TYPE_CHECKING, final

from poolray.ids import GroupId, WorkerId
from poolray.node.effects import Notice, Nudge, SendWorker, TakeBack
from poolray.node.packets import Packets, is_in
from poolray.node.state import NodeState
from poolray.node.tasks import Tasks
from poolray.node.workers import Group, GroupState, Packet, WorkerRecord, WorkerState
from poolray.protocol.node import PacketsTakenBack, WorkerLost
from poolray.protocol.worker import (
    RunTasks,
    StopWorker,
    TasksFinished,
    TasksHandedBack,
)
from poolray.tasks.class_queue import ClassQueue, Obstacle
from poolray.tasks.lifecycle import RUNNING

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.bundles import Bundles
    from poolray.node.groups import Groups
    from poolray.node.timeouts import CallTimeouts

_IDLE = WorkerState.IDLE
_BUSY = WorkerState.BUSY
_BLOCKED = WorkerState.BLOCKED
_ACTOR = WorkerState.ACTOR
_STOPPING = WorkerState.STOPPING

#: Unread packets worth less than this are not taken from their worker to feed an idle one.
_STEAL_MIN_S = 100e-6
#: Different demands of which the user is told that no node meets them.
_TOLD_MAX = 1000
#: Packets that others are served before a class that waits for many resources at once stops them:
#: what they give back is kept for it from then on.
_PASSED_OVER_MAX = 64


@final
class Dispatcher:
    """The worker side of a node: what is sent to workers and what they report."""

    __slots__ = (
        "_notices",
        "_short",
        "_state",
        "_tasks",
        "_told",
        "actors",
        "bundles",
        "deadline_s",
        "groups",
        "is_hopeless",
        "may_run_elsewhere",
        "orders",
        "packets",
        "peers",
        "place_elsewhere",
        "timeouts",
        "try_forward",
    )

    def __init__(self, state: NodeState, tasks: Tasks) -> None:
        self._state = state
        self._tasks = tasks
        self.packets = Packets(state, tasks)
        self.actors: Actors
        self.groups: Groups
        self.timeouts: CallTimeouts
        #: Groups with calls that wait for resources, or for a worker's place: also another group's
        #: worker can free these.
        self._short: dict[GroupId, Group] = {}
        #: (when to say so, class, what is missing) of demands that no node meets.
        self._notices: list[tuple[float, ClassQueue, Obstacle]] = []
        #: Such demands of which the user was told, or will be.
        self._told: dict[str, None] = {}
        #: No worker's deadline is before this; None: nobody is watched.
        self.deadline_s: float | None = None
        #: Offers the head of a queue that cannot run here to other nodes; True when one took it.
        self.try_forward: Callable[[ClassQueue], bool] = lambda queue: False
        #: Offers it to nodes that may be better for it than this one; True when one took it.
        self.place_elsewhere: Callable[[ClassQueue], bool] = lambda queue: False
        #: Whether the only node that may run a class is gone.
        self.is_hopeless: Callable[[ClassQueue], bool] = lambda queue: False
        #: Whether a peer that is busy now may run a class later.
        self.may_run_elsewhere: Callable[[ClassQueue], bool] = lambda queue: False
        #: The nodes that it may offer them to.
        self.peers: Sized = ()
        self.bundles: Bundles
        #: Bundles of placement groups for which there is no room: they go before calls.
        self.orders: Sized = ()

    # ---- whose turn it is ------------------------------------------------------------------------

    def dispatch(self, group: Group) -> None:
        """Give the group's workers what they can take."""
        self._short.pop(group.group_id, None)
        ready = group.ready
        if len(ready) == 1:
            class_id, queue = next(iter(ready.items()))
            while queue.queued_calls and self._send_next(group, queue, None):
                pass
            if not queue.queued_calls:  # (calls that failed may have made others ready meanwhile)
                ready.pop(class_id, None)
            return
        #: The first class that waits for resources: the others may use what it cannot.
        ahead: ClassQueue | None = None
        turn = list(ready.items())
        while turn:
            again = []
            for class_id, queue in turn:
                if not queue.queued_calls:
                    ready.pop(class_id, None)
                elif self._send_next(group, queue, ahead):
                    ready.pop(class_id, None)  # behind the others, if there is more
                    if queue.queued_calls:
                        ready[class_id] = queue
                        again.append((class_id, queue))
                    if ahead is not None:
                        ahead.passed_over += 1
                elif ahead is None and queue.obstacle is None:
                    ahead = queue
            turn = again

    def offer(self, group: Group) -> None:
        """Something became free in a group: dispatch it, and what waits elsewhere for the same."""
        if self.orders:
            self.bundles.fill_orders()
        if group.ready:
            self.dispatch(group)
        for other in list(self._short.values()) if self._short else ():
            if other is not group:
                self.dispatch(other)

    def forget_group(self, group: Group) -> None:
        """The group has ended."""
        self._short.pop(group.group_id, None)

    def _send_next(self, group: Group, queue: ClassQueue, ahead: ClassQueue | None) -> bool:
        """One packet of a class to some worker; False when no worker can take one now."""
        queue.stuck = False
        if queue.obstacle is not None:
            return self._meet_obstacle(group, queue, queue.obstacle)
        if self.peers and self._may_leave(group, queue) and self.place_elsewhere(queue):
            return True
        if group.idle:
            worker = next(reversed(group.idle.values()))
            if (queue.uses_devices or group.device_workers) and not worker.suits(queue):
                return self._send_to_suitable(group, queue, ahead)
            if (
                (ahead is None or self._may_pass(queue, ahead))
                and not (self.orders and self.bundles.holds_back(queue))
                and self._state.resources.acquire(queue.demand)
            ):
                worker.move(_BUSY)
                worker.runs = worker.lease = queue
                if queue.uses_devices:
                    self._give_devices(group, worker, queue)
                queue.passed_over = 0
                self._send_packet(group, worker, queue)
                return True
            self._short[group.group_id] = group
        elif self.groups.start_for(group, queue):
            self._short[group.group_id] = group
        if (
            queue.hungry
            and queue.may_prefetch(self._state.config)
            and (ahead is None or not self._must_yield(queue, ahead))
            and not self._state.resources.is_overdrawn(queue.demand)
            and not (self.orders and self.bundles.holds_back(queue))
        ):
            worker = self._state.workers[next(iter(queue.hungry))]
            self._send_packet(group, worker, queue)
            return True
        if group.starting >= queue.queued_calls:
            return False
        # (Else the next task would want another worker.)
        queue.stuck = not self.peers
        return group.size == 0 and self.try_forward(queue)

    def _may_leave(self, group: Group, queue: ClassQueue) -> bool:
        """Whether calls are offered to other nodes before this one: short ones stay together."""
        if not queue.roams or group.size:
            return False
        return _spreads(queue) or not queue.may_prefetch(self._state.config)

    def _send_to_suitable(self, group: Group, queue: ClassQueue, ahead: ClassQueue | None) -> bool:
        """The same when the idle worker that was used last is not for such calls."""
        suitable = next((w for w in reversed(group.idle.values()) if w.suits(queue)), None)
        if suitable is not None:
            # Now it counts as the one that was used last.
            del group.idle[suitable.worker_id]
            group.idle[suitable.worker_id] = suitable
            return self._send_next(group, queue, ahead)
        if self.groups.start_for(group, queue):
            self._short[group.group_id] = group
        return False

    def _give_devices(self, group: Group, worker: WorkerRecord, queue: ClassQueue) -> None:
        """A worker gets devices with its lease; the next packet tells it which."""
        worker.devices = self._state.resources.take_devices(queue.demand)
        group.device_workers[worker.worker_id] = None
        index = worker.class_indexes.pop(queue.task_class.class_id, None)
        if index is not None:
            worker.free_indexes.append(index)

    def _meet_obstacle(self, group: Group, queue: ClassQueue, obstacle: Obstacle) -> bool:
        """Calls that this node can never run: they fail, go to another node, or wait."""
        if obstacle.is_final:
            self._tasks.give_up_unschedulable(queue, obstacle.text)
            return False
        if group.size == 0 and self.try_forward(queue):
            return True
        if self.is_hopeless(queue):
            self._tasks.give_up_unschedulable(queue, obstacle.text)
            return False
        if obstacle.text not in self._told and len(self._told) < _TOLD_MAX:
            self._told[obstacle.text] = None
            deadline_s = self._state.now + self._state.config.infeasible_notice_after_s
            self._notices.append((deadline_s, queue, obstacle))
            self.watch_time(deadline_s)
        return False

    def tell_obstacles(self, now: float) -> None:
        """Say of which calls nothing will come, if they still wait; note when to look again."""
        later: list[tuple[float, ClassQueue, Obstacle]] = []
        for deadline_s, queue, obstacle in self._notices:
            if deadline_s > now:
                continue
            if queue.queued_calls and queue.obstacle is obstacle:
                if self.may_run_elsewhere(queue):  # it is waited for, unless it dies
                    again_s = now + self._state.config.infeasible_notice_after_s
                    later.append((again_s, queue, obstacle))
                    continue
                text = f"Task {queue.task_class.name} waits for {obstacle.text}"
                self._state.effects.append(Notice(text))
            else:
                self._told.pop(obstacle.text, None)  # the next one that waits for it says so
        self._notices = [notice for notice in self._notices if notice[0] > now] + later
        for deadline_s, _, _ in self._notices:
            self.watch_time(deadline_s)

    def _may_pass(self, queue: ClassQueue, ahead: ClassQueue) -> bool:
        """Whether a class may take resources although another one has waited longer for some."""
        if ahead.passed_over < _PASSED_OVER_MAX:
            return True
        wanted = ahead.demand
        return not any(name in wanted for name in queue.demand) or not self.may_come_free(wanted)

    def may_come_free(self, wanted: Mapping[str, int]) -> bool:
        """Whether this much would be free once all calls that run now have ended: actors stay."""
        free = dict(self._state.resources.available)
        for worker in self._state.workers.values():
            if worker.lease is not None and worker.state is not _ACTOR:
                for name, amount in worker.lease.demand.items():
                    free[name] = free.get(name, 0) + amount
        return all(free.get(name, 0) >= amount for name, amount in wanted.items())

    def _must_yield(self, queue: ClassQueue, ahead: ClassQueue) -> bool:
        """Whether a class has to let go of a worker, for one that waits and could then run."""
        if not self._may_pass(queue, ahead):
            return True
        return self._state.resources.fits_with(ahead.demand, queue.demand)

    # ---- packets ---------------------------------------------------------------------------------

    def _send_packet(self, group: Group, worker: WorkerRecord, queue: ClassQueue) -> None:
        """Fill a packet from a queue and send it."""
        state = self._state
        queue.own_turn = False
        worker.sequence = sequence = worker.sequence + 1
        packet = Packet(sequence, queue, state.now)
        task_class = queue.task_class
        index = worker.class_indexes.get(task_class.class_id)
        if (
            index is None
            or worker.forget
            or (task_class.function_id and task_class.function_id not in worker.functions)
        ):
            index, news = self.packets.introduce(worker, packet, task_class)
        else:
            news = None
        limit = 1
        if queue.queued_calls > 1 and not (self.peers and self._may_leave(group, queue)):
            limit = self._calls_allowed(group, worker, queue)
        calls = self.packets.fill(worker, packet, queue, limit, index)
        worker.packets.append(packet)
        worker.calls_sent += packet.calls
        if task_class.max_calls:
            sent = worker.calls_by_class.get(task_class.class_id, 0)
            worker.calls_by_class[task_class.class_id] = sent + packet.calls
        if packet.calls > 1 or len(worker.packets) > 1:
            self.watch(worker, state.now + self._patience(queue, packet.calls))
        if task_class.timeout_s:
            self.timeouts.on_sent(worker, task_class.timeout_s)
        self._set_room(group, worker)
        if news is None:
            message = RunTasks(sequence=sequence, tasks=calls)
        else:
            message = RunTasks(
                sequence=sequence,
                tasks=calls,
                classes=news.classes,
                functions=news.functions,
                forget=news.forget,
                attempt=packet.records[0].attempts,
            )
        state.effects.append(SendWorker(worker.worker_id, message))

    def _calls_allowed(self, group: Group, worker: WorkerRecord, queue: ClassQueue) -> int:
        limit = queue.packet_calls(self._state.config, len(group.workers) - group.actors)
        if group.max_tasks_per_worker:
            limit = min(limit, max(1, group.max_tasks_per_worker - worker.calls_sent))
        if queue.task_class.max_calls:
            sent = worker.calls_by_class.get(queue.task_class.class_id, 0)
            limit = min(limit, max(1, queue.task_class.max_calls - sent))
        return limit

    def _is_used_up(self, worker: WorkerRecord, queue: ClassQueue) -> bool:
        """Whether a worker has been sent all the calls it was made for."""
        limit = worker.group.max_tasks_per_worker
        if limit and worker.calls_sent >= limit:
            return True
        limit = queue.task_class.max_calls
        return bool(limit) and worker.calls_by_class.get(queue.task_class.class_id, 0) >= limit

    def _set_room(self, group: Group, worker: WorkerRecord) -> None:
        """Enter in the tables whether a busy worker takes another packet, or has one to spare."""
        packets = worker.packets
        queue = worker.runs
        assert queue is not None
        config = self._state.config
        if (
            len(packets) < config.packets_per_worker_max
            and packets[-1].size_bytes < config.packet_bytes_max
            and not (
                (group.max_tasks_per_worker or queue.task_class.max_calls)
                and self._is_used_up(worker, queue)
            )
        ):
            queue.hungry[worker.worker_id] = None
            group.hungry[worker.worker_id] = worker
        else:
            queue.hungry.pop(worker.worker_id, None)
            group.hungry.pop(worker.worker_id, None)
        if len(packets) > 1:
            group.stocked[worker.worker_id] = worker
        else:
            group.stocked.pop(worker.worker_id, None)

    def _patience(self, queue: ClassQueue, calls: int) -> float:
        """How long a worker may be silent about that many calls before it is nudged."""
        return self._state.config.nudge_after_s + 2.0 * (queue.estimate_s or 0.0) * calls

    # ---- reports of workers ----------------------------------------------------------------------

    def on_finished(self, message: TasksFinished) -> None:
        """Results, and room for more work."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None:
            return
        if message.kept:
            self._tasks.objects.add_references(worker.client_id, message.kept, message.viewed)
        if message.pinned:
            client = self._tasks.objects.client(worker.client_id)
            self._tasks.store.pin_for(client, message.pinned)
        if message.unpinned:
            client = self._tasks.objects.client(worker.client_id)
            self._tasks.store.unpin_for(client, message.unpinned)
        calls = self._tasks.on_finished(worker, message)
        if message.released:
            self._tasks.objects.release_references(worker.client_id, message.released)
        if calls and worker.runs is not None:
            worker.runs.report(calls, message.elapsed_ns * 1e-9)
        packets = worker.packets
        while packets and packets[0].sequence <= message.sequence:
            packet = packets.popleft()
            self.packets.let_go(packet)
        if len(packets) < 2 and worker.group.stocked:
            worker.group.stocked.pop(worker.worker_id, None)
        if worker.state is _BUSY:
            self._feed(worker)
        elif worker.state is _ACTOR:
            self.actors.calls.on_reported(worker, message, calls)
        elif not packets:
            if worker.state is _BLOCKED:  # the task is over all the same: its thread waits on
                worker.move(_BUSY)
                self._rest(worker)
            self.release_lease(worker)
            worker.runs = None
            self.offer(worker.group)
        elif worker.group.ready or self.orders:
            self.offer(worker.group)

    def _feed(self, worker: WorkerRecord) -> None:
        """A busy worker has reported: it is idle now, or has room, or goes on."""
        group = worker.group
        queue = worker.runs
        assert queue is not None
        packets = worker.packets
        if packets:
            if packets[0].calls > 1 or len(packets) > 1:
                self.watch(worker, self._state.now + self._patience(queue, packets[0].calls))
            self._set_room(group, worker)
        elif (
            0 < group.size < len(group.workers) - group.leaving  # it was made smaller meanwhile
            or (
                (group.max_tasks_per_worker or queue.task_class.max_calls)
                and self._is_used_up(worker, queue)
            )
        ):
            self.groups.stop(worker)
        elif (
            queue.queued_calls
            and len(group.ready) == 1
            and (not self._short or (len(self._short) == 1 and group.group_id in self._short))
            and not self.orders
            and not (self.peers and self._may_leave(group, queue))
            and not self._state.resources.is_overdrawn(queue.demand)
        ):
            self._send_packet(group, worker, queue)  # the lease lasts while there is work for it
            if not queue.queued_calls:
                group.ready.clear()
                return
        else:
            self._rest(worker)
        if group.ready or self._short or self.orders:
            self.offer(group)
        if group.stocked and worker.state is _IDLE:
            self.steal_for_idle(group)

    def _rest(self, worker: WorkerRecord) -> None:
        """A busy worker has nothing left."""
        if worker.lease is not None:
            self._state.resources.release(worker.lease.demand)
            worker.lease = None
        if worker.devices:
            self._state.resources.give_devices(worker.devices)
            worker.devices = {}
        worker.move(_IDLE)
        worker.runs = None
        if not worker.group.size:  # others are never too many
            self.watch(worker, self._state.now + self._state.config.idle_worker_timeout_s)

    def steal_for_idle(self, group: Group) -> None:
        """An idle worker and nothing queued: take unread packets from a worker that has several."""
        if group.ready or not group.idle:
            return
        for worker in group.stocked.values():
            queue = worker.runs
            if worker.state is not _BUSY or queue is None or queue.uses_devices:
                continue
            waiting = sum(packet.calls for packet in list(worker.packets)[1:])
            if waiting * (
                queue.estimate_s or 1.0
            ) >= _STEAL_MIN_S and self._state.resources.fits_now(queue.demand):
                self._state.effects.append(TakeBack(worker.worker_id))
                return
            # So little that it is soon done, if the worker is not at something long: look again,
            # for its time may have passed while there was no idle worker to take anything.
            if worker.deadline_s > self._state.now:
                self.watch_time(worker.deadline_s)
            else:
                self.watch(worker, self._state.now + self._patience(queue, 1))

    def on_taken_back(self, message: PacketsTakenBack) -> None:
        """Packets that a worker had not read are ours again."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None:
            return
        wanted = dict.fromkeys(message.sequences)
        taken = [packet for packet in worker.packets if packet.sequence in wanted]
        for packet in reversed(taken):
            worker.packets.remove(packet)
            self.packets.unsend(worker, packet)
        if worker.state is _STOPPING:
            # Its order to stop was taken back too, if it was not read.
            self._state.effects.append(SendWorker(worker.worker_id, StopWorker()))
            if not worker.packets:
                self.release_lease(worker)
                worker.runs = None
        if not taken:
            return
        if len(worker.packets) < 2:
            worker.group.stocked.pop(worker.worker_id, None)
        if worker.state is _BUSY:
            self._feed(worker)
        else:
            self.offer(worker.group)

    def on_handed_back(self, message: TasksHandedBack) -> None:
        """Calls that a worker had read but not begun are ours again."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None:
            return
        packets = {packet.sequence: packet for packet in worker.packets}
        for task_id, first in reversed(message.tasks):
            record = self._state.tasks.get(task_id)
            if record is None or record.worker_id != worker.worker_id:
                continue
            packet = packets[record.sequence]
            stop = record.sent_offset + first
            if stop <= record.offset:
                self.packets.uncount(worker, packet, len(record.calls))
                self._tasks.requeue(record)
            elif stop < record.offset + len(record.calls):
                # The worker keeps the calls before `first` under the id it knows.
                rest = self._tasks.cut(record, stop)
                self.packets.uncount(worker, packet, len(rest.calls))
                self._tasks.requeue(rest)
        if worker.state is _BUSY and worker.runs is not None:
            # Something long runs there: nothing is to wait behind it until it has reported.
            worker.runs.hungry.pop(worker.worker_id, None)
            worker.group.hungry.pop(worker.worker_id, None)
        self.offer(worker.group)

    def on_blocked(self, worker_id: WorkerId) -> None:
        """A worker's task waits: its CPUs are free for others meanwhile."""
        worker = self._state.workers.get(worker_id)
        if worker is None or worker.lease is None or worker.state is _ACTOR:
            return
        queue, worker.lease = worker.lease, None
        self._state.resources.release(queue.lent)
        if queue.kept:
            worker.keeps = queue
        if worker.state is _BUSY:
            worker.move(_BLOCKED)
            if len(worker.packets) > 1:
                self._state.effects.append(TakeBack(worker_id))
        self.offer(worker.group)

    def on_unblocked(self, worker_id: WorkerId) -> None:
        """It goes on, even if that takes more than there is for a while."""
        worker = self._state.workers.get(worker_id)
        if worker is None or worker.runs is None or worker.lease is not None:
            return
        queue = worker.runs
        # (One that is being killed has let go of what it kept, and is never busy again.)
        if worker.keeps is None and queue.kept:
            return
        self._state.resources.acquire_anyway(queue.lent)
        worker.lease, worker.keeps = queue, None
        if worker.state is _BLOCKED:
            worker.move(_BUSY)

    def release_lease(self, worker: WorkerRecord) -> None:
        """A worker gives its resources back, if it holds any."""
        if worker.lease is not None:
            self._state.resources.release(worker.lease.demand)
            worker.lease = None
        elif worker.keeps is not None:
            self._state.resources.release(worker.keeps.kept)
            worker.keeps = None
        if worker.devices:
            self._state.resources.give_devices(worker.devices)
            worker.devices = {}

    # ---- cancelled and lost ----------------------------------------------------------------------

    def take_back(self, worker: WorkerRecord) -> None:
        """Ask for the packets that a worker has not read."""
        self._state.effects.append(TakeBack(worker.worker_id))

    def on_cancelled(self, worker_id: WorkerId, sequences: list[int]) -> None:
        """Tasks in these packets of a worker are not wanted any more: get at what has not begun."""
        worker = self._state.workers[worker_id]
        if worker.group.state >= GroupState.FAILED:
            return  # it is being killed
        self._state.effects.append(TakeBack(worker_id))
        head = worker.packets[0]
        if head.sequence in sequences and head.calls > 1:
            self._state.effects.append(Nudge(worker_id))

    def on_packets_lost(self, worker: WorkerRecord, message: WorkerLost) -> None:
        """What becomes of calls that were on their way to a worker that died."""
        late = self.timeouts.on_lost(message)
        packets = list(worker.packets)
        worker.packets.clear()
        observer = self._tasks.observer
        for packet in reversed(packets):
            self.packets.let_go(packet)
            observer.lost_since_s = packet.sent_s
            for position in range(len(packet.records) - 1, -1, -1):
                record = packet.records[position]
                if not is_in(record, worker, packet.sequence):
                    continue
                count = len(record.calls)
                if packet.sequence == message.sequence:
                    reported = record.offset - record.sent_offset
                    begun = message.index + 1 - packet.bases[position] - reported
                    is_here = 0 < begun <= count
                    begun = max(0, min(begun, count))
                else:
                    begun = count if packet.sequence < message.sequence else 0
                    is_here = False
                self._tasks.losses.on_lost_with_worker(
                    record, begun, message, late if is_here else None
                )
        observer.lost_since_s = 0.0

    # ---- time ------------------------------------------------------------------------------------

    def watch(self, worker: WorkerRecord, deadline_s: float) -> None:
        """Look at a worker again at that time."""
        worker.deadline_s = deadline_s
        if self.deadline_s is None or deadline_s < self.deadline_s:
            self.deadline_s = deadline_s

    def watch_time(self, deadline_s: float) -> None:
        """Tick at that time at the latest."""
        if self.deadline_s is None or deadline_s < self.deadline_s:
            self.deadline_s = deadline_s

    def on_silent(self, worker: WorkerRecord, now: float) -> None:
        """A busy worker has been silent for long: free what waits behind the call it runs."""
        group = worker.group
        packet = worker.packets[0]
        if self.may_nudge(worker):
            worker.nudged_sequence = packet.sequence
            self._state.effects.append(Nudge(worker.worker_id))
        if len(worker.packets) > 1 and group.idle:
            self._state.effects.append(TakeBack(worker.worker_id))
        worker.deadline_s = now + 10 * self._state.config.nudge_after_s

    def may_nudge(self, worker: WorkerRecord) -> bool:
        """Whether calls of the packet that a worker runs might run elsewhere."""
        packet = worker.packets[0]
        group = worker.group
        return (
            packet.calls > 1
            and worker.nudged_sequence != packet.sequence
            and (len(group.workers) > 1 or group.size == 0)
        )

    # ---- checks ----------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when tables of packets, queues and resources do not agree."""
        held: dict[str, int] = {}
        state = self._state
        for worker in state.workers.values():
            self._check_worker(worker)
            demand: Mapping[str, int] = {}
            if worker.lease is not None:
                demand = worker.lease.demand
            elif worker.keeps is not None:
                demand = worker.keeps.kept
            for name, amount in demand.items():
                held[name] = held.get(name, 0) + amount
        for reservation in self.bundles.reservations():
            for name, amount in reservation.total().items():
                held[name] = held.get(name, 0) + amount
        state.resources.check_invariants(held)
        for task in state.tasks.values():
            if task.state is RUNNING and not task.actor_id:
                assert task.worker_id is not None
                packets = state.workers[task.worker_id].packets
                assert any(
                    packet.sequence == task.sequence and task in packet.records
                    for packet in packets
                ), "a running task is in no packet"
        for class_id, queue in state.classes.items():
            queue.check_invariants()
            group = state.groups.get(queue.task_class.group_id)
            if queue.queued_calls:
                assert group is not None
                assert group.ready[class_id] is queue
            for worker_id in queue.hungry:
                assert state.workers[worker_id].runs is queue
        for group in state.groups.values():
            for queue in group.ready.values():
                assert queue.queued_calls, "an empty queue counts as ready"
                assert (
                    not any(worker.suits(queue) for worker in group.idle.values())
                    or queue.obstacle is not None
                    or bool(self.orders)  # what is free may be kept for these
                    or len(group.ready) > 1  # another class may be waiting for its turn
                    or not state.resources.fits_now(queue.demand)
                ), "calls wait beside an idle worker"

    def _check_worker(self, worker: WorkerRecord) -> None:
        group = worker.group
        assert group.workers[worker.worker_id] is worker
        assert (worker.worker_id in group.idle) == (worker.state is _IDLE)
        assert (worker.worker_id in group.stocked) == (len(worker.packets) > 1)
        assert worker.lease is None or worker.lease is worker.runs
        assert worker.keeps is None or worker.lease is None
        if worker.lease is not None or worker.keeps is not None:
            assert bool(worker.devices) == bool(
                worker.runs is not None and worker.runs.uses_devices
            ), "devices do not go with a lease"
        else:
            assert not worker.devices, "devices without a lease"
        if worker.state is _BUSY:
            assert worker.packets, "a busy worker without packets"
            assert worker.lease is not None
        elif worker.state is _BLOCKED:
            assert worker.packets
            assert worker.lease is None
        elif worker.state is _ACTOR:
            assert not worker.packets
            assert worker.lease is not None
        elif worker.state is not _STOPPING:
            assert not worker.packets
            assert worker.lease is None
        hungry = worker.runs is not None and worker.worker_id in worker.runs.hungry
        assert hungry == (worker.worker_id in group.hungry)
        if hungry:
            assert worker.state is _BUSY
            assert len(worker.packets) < self._state.config.packets_per_worker_max
        for packet in worker.packets:
            assert packet.calls >= 0
            assert packet.sequence <= worker.sequence


def _spreads(queue: ClassQueue) -> bool:
    placement = queue.task_class.placement
    return placement is not None and placement.spread
