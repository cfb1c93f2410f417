"""Groups of workers: how many there are, when one starts, stops or is given up.

What: starts workers as calls or a size ask for them, stops surplus ones, closes, terminates and
fails groups, and deals with workers that do not start, or die.
Who calls: `node/node.py` with what shells and workers report; the dispatcher when calls wait for a
worker.
May touch: nothing.
Invariants: each worker is in the table of its group and in that of the node; each has a progress
word of its own; a group that was closed is drained exactly once, with its last task and worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

from poolray.exceptions import InternalError, PoolrayError, WorkerStartError
from poolray.ids import ClientId, GroupId, WorkerId
from poolray.node.dispatch import Dispatcher
from poolray.node.effects import (
    GroupDrained,
    GroupFailed,
    Nudge,
    SendWorker,
    StartWorker,
    TerminateWorker,
    Warn,
)
from poolray.node.observer import Observer
from poolray.node.state import NodeState
from poolray.node.tasks import Tasks
from poolray.node.workers import Group, GroupState, WorkerRecord, WorkerState
from poolray.protocol.node import CreateGroup, WorkerLost
from poolray.protocol.worker import StopWorker, WorkerFailed, WorkerReady
from poolray.scheduling.resources import UNIT
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import QUEUED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors

_IDLE = WorkerState.IDLE
_BUSY = WorkerState.BUSY
_STARTING = WorkerState.STARTING
_STOPPING = WorkerState.STOPPING
_ACTOR = WorkerState.ACTOR

#: Pause after workers failed to start again and again while others of the group live on.
_START_PAUSE_S = 1.0


@final
class Groups:
    """The workers of a node, by group."""

    __slots__ = (
        "_dispatcher",
        "_free_slots",
        "_next_worker_id",
        "_observer",
        "_slots",
        "_state",
        "_tasks",
        "actors",
    )

    def __init__(
        self,
        state: NodeState,
        tasks: Tasks,
        dispatcher: Dispatcher,
        next_worker_id: Callable[[], WorkerId],
        slots: int,
        observer: Observer,
    ) -> None:
        self.actors: Actors
        self._state = state
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._observer = observer
        self._next_worker_id = next_worker_id
        self._slots = slots
        #: Progress words that no worker uses, the next one last.
        self._free_slots = list(range(slots - 1, -1, -1))

    # ---- the life of a group ---------------------------------------------------------------------

    def create(self, message: CreateGroup) -> None:
        """Workers of a new kind may be asked for."""
        if message.group_id in self._state.groups:
            raise InternalError(f"group {message.group_id} exists already")
        group = Group(
            message.group_id,
            message.size,
            message.start_now,
            message.max_tasks_per_worker,
            message.break_on_death,
        )
        self._state.groups[message.group_id] = group
        if message.start_now:
            self._fill(group)

    def close(self, group_id: GroupId) -> None:
        """No more tasks will come."""
        group = self._state.groups.get(group_id)
        if group is None:
            return
        if group.state is GroupState.OPEN:
            group.state = GroupState.CLOSING
            if group.unfinished == 0:
                self.on_group_empty(group)
        elif group.state is GroupState.FAILED:
            group.state = GroupState.ENDED
            self._check_drained(group)

    def on_group_empty(self, group: Group) -> None:
        """A closed group has run all its tasks: its workers may go."""
        if group.state is GroupState.CLOSING:
            for worker in list(group.workers.values()):
                if worker.state is not _STARTING:  # these run their initializers to the end first
                    self.stop(worker)
        self._check_drained(group)

    def terminate(self, group_id: GroupId) -> None:
        """Drop the tasks, kill the workers."""
        group = self._state.groups.get(group_id)
        if group is None:
            return
        group.state = GroupState.ENDED
        self._kill_all(group)
        roots = [record.root_id for record in self._tasks_of(group)]
        self._tasks.cancel(roots, "its workers were terminated")
        self._check_drained(group)
        self._dispatcher.offer(group)

    def resize(self, group_id: GroupId, size: int) -> None:
        """Keep this many workers from now on."""
        group = self._state.groups.get(group_id)
        if group is None:
            return
        group.size = size
        surplus = len(group.workers) - group.leaving - size
        for worker in list(group.idle.values())[: max(0, surplus)]:
            self.stop(worker)
        if group.start_now:
            self._fill(group)
        self._dispatcher.offer(group)

    def _tasks_of(self, group: Group) -> list[TaskRecord]:
        wanted = group.group_id
        return [
            record
            for record in self._state.tasks.values()
            if record.class_queue.task_class.group_id == wanted
        ]

    def _kill_all(self, group: Group) -> None:
        self.actors.end_in(list(group.workers), "ended with the runtime that it lived in")
        for worker in group.workers.values():
            self._dispatcher.release_lease(worker)
            if worker.state is not _STOPPING:
                worker.move(_STOPPING)
            self._state.effects.append(TerminateWorker(worker.worker_id))

    def fail(self, group_id: GroupId, error: bytes) -> None:
        """The shell says that the group's workers cannot be started any more."""
        group = self._state.groups.get(group_id)
        if group is not None and group.state < GroupState.FAILED:
            self._fail(group, error)
            self._dispatcher.offer(group)

    def _fail(self, group: Group, error: bytes) -> None:
        """The group cannot work: its tasks fail with this error, now and from now on."""
        closed = group.state is GroupState.CLOSING
        group.state = GroupState.ENDED if closed else GroupState.FAILED
        group.error = error
        self._kill_all(group)
        self._state.effects.append(GroupFailed(group.group_id, error))
        self._give_up(self._tasks_of(group), error)
        self._check_drained(group)

    def _give_up(self, records: list[TaskRecord], error: bytes) -> None:
        for record in records:
            # One may have ended already, with the error of another for an argument.
            if self._state.tasks.get(record.task_id) is record:
                self._tasks.give_up(record, error)

    def _check_drained(self, group: Group) -> None:
        if (
            (group.state is GroupState.CLOSING or group.state is GroupState.ENDED)
            and not group.workers
            and group.unfinished == 0
            and self._state.groups.get(group.group_id) is group
        ):
            del self._state.groups[group.group_id]
            self._dispatcher.forget_group(group)
            self._tasks.release_classes_of(group.group_id)
            self._state.effects.append(GroupDrained(group.group_id))

    # ---- starting workers ------------------------------------------------------------------------

    def _fill(self, group: Group) -> None:
        """Start workers up to the group's size."""
        while (
            len(group.workers) < group.size
            and group.state is GroupState.OPEN
            and self._state.now >= group.start_again_s
            and self._free_slots
        ):
            self._start(group)

    def _start(self, group: Group) -> None:
        state = self._state
        worker_id = self._next_worker_id()
        slot = self._free_slots.pop()
        worker = WorkerRecord(worker_id, group, slot)
        worker.started_s = state.now
        group.workers[worker_id] = worker
        group.starting += 1
        state.workers[worker_id] = worker
        self._dispatcher.watch(worker, state.now + state.config.worker_start_timeout_s)
        state.effects.append(StartWorker(worker_id, group.group_id, slot))

    def start_for(self, group: Group, queue: ClassQueue) -> bool:
        """Start the workers that the calls of a class want.

        Returns
        -------
        bool
            Whether more were wanted, and what was missing may come free in another group.
        """
        if self._state.now < group.start_again_s:
            return False
        resources, demand = self._state.resources, queue.demand
        while group.starting < queue.queued_calls:
            if group.size:
                if len(group.workers) >= group.size:
                    return False
            elif len(group.workers) - group.actors >= self._state.config.workers_max:
                if group.idle and not group.leaving:
                    self.stop(next(iter(group.idle.values())))  # idle ones are not for this class
                return False
            # The ones that start already will take as much.
            elif not resources.fits_times(demand, group.starting + 1):
                return True
            if not self._free_slots:
                return True
            self._start(group)
        return False

    def on_ready(self, message: WorkerReady) -> None:
        """A worker says hello."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None:
            return
        worker.pid = message.pid
        group = worker.group
        group.start_failures = 0
        if worker.state is not _STARTING:
            return
        worker.move(_IDLE)
        self._dispatcher.watch(worker, self._state.now + self._state.config.idle_worker_timeout_s)
        if group.state is GroupState.CLOSING and group.unfinished == 0:
            self.stop(worker)
            return
        self._dispatcher.offer(group)
        self._dispatcher.steal_for_idle(group)

    def on_failed(self, message: WorkerFailed) -> None:
        """A worker's initializer raised; its exit follows."""
        worker = self._state.workers.get(message.worker_id)
        if worker is not None and worker.state is _STARTING:
            worker.move(_STOPPING)
            self._on_start_failure(worker.group, message.error)

    def _on_start_failure(self, group: Group, error: bytes) -> None:
        """A worker did not start: once too often, and those who wait for it are told."""
        if group.state is not GroupState.OPEN and group.state is not GroupState.CLOSING:
            return
        group.start_failures += 1
        limit = max(self._state.config.worker_start_failures_max, group.size)
        if group.break_on_death:
            self._fail(group, error)
        elif group.start_failures >= limit:
            group.start_failures = 0
            if len(group.workers) > group.starting + group.leaving:
                # Others do their work: try again, but not without a break.
                group.start_again_s = self._state.now + _START_PAUSE_S
                self._dispatcher.watch_time(group.start_again_s)
            elif group.size:
                self._fail(group, error)
            else:
                queued = [record for record in self._tasks_of(group) if record.state is QUEUED]
                self._give_up(queued, error)
                # What these kept others from, or what they were waited for by, may run.
                self._dispatcher.offer(group)

    # ---- stopping workers ------------------------------------------------------------------------

    def stop(self, worker: WorkerRecord) -> None:
        """Tell a worker to finish what it has and exit."""
        if worker.state is _STOPPING:
            return
        if worker.state is _STARTING:
            # It is not listening yet, and what it may be running is the initializer.
            self._state.effects.append(TerminateWorker(worker.worker_id))
        else:
            self._state.effects.append(SendWorker(worker.worker_id, StopWorker()))
        worker.move(_STOPPING)
        if not worker.packets:
            self._dispatcher.release_lease(worker)
            worker.runs = None

    def on_stopping(self, worker_id: WorkerId) -> None:
        """A worker says that it will exit: what it has not read is ours."""
        worker = self._state.workers.get(worker_id)
        if worker is not None and worker.packets:
            self._dispatcher.take_back(worker)
        if worker is not None:
            self.stop(worker)

    def on_lost(self, message: WorkerLost) -> None:
        """A worker's process has ended."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None:
            return
        group = worker.group
        never_ready = worker.state is _STARTING
        kill = self._tasks.protection.kills.get(message.worker_id)
        # (One that was ended for memory has been told to stop, and had work to do.)
        stopping = worker.state is _STOPPING and kill is None
        self._observer.on_worker_lost(worker, message, was_told=stopping, kill=kill)
        self._dispatcher.release_lease(worker)
        if worker.state is not _STOPPING:
            worker.move(_STOPPING)
        self._dispatcher.on_packets_lost(worker, message)
        self.actors.on_worker_lost(message)
        group.leaving -= 1
        group.actors -= worker.is_actor
        group.stocked.pop(message.worker_id, None)
        group.device_workers.pop(message.worker_id, None)
        del self._state.workers[message.worker_id]
        self._dispatcher.bundles.on_worker_lost(message.worker_id)
        del group.workers[message.worker_id]
        self._free_slots.append(worker.slot)
        self._tasks.drop_client(ClientId(message.worker_id))
        if not stopping or worker.is_actor:
            self.actors.on_client_lost(ClientId(message.worker_id))
        if not stopping:
            if never_ready and not message.with_server:
                self._on_start_failure(group, self._death(message, WorkerStartError))
            elif group.break_on_death and group.state < GroupState.FAILED:
                self._fail(group, self._death(message, PoolrayError))
        self._tasks.protection.on_worker_gone(message.worker_id)
        if group.start_now:
            self._fill(group)
        self._check_drained(group)
        self._dispatcher.offer(group)

    def _death(self, message: WorkerLost, kind: type[PoolrayError]) -> bytes:
        """What the tasks of a group are told about a worker's death."""
        how = f"a worker (pid {message.pid}) {self._tasks.protection.how(message)}"
        if kind is WorkerStartError:
            return self._state.encode_error(WorkerStartError(reason=how))
        return self._state.encode_error(
            PoolrayError(f"{how.capitalize()}: its group of workers is broken and runs no more.")
        )

    # ---- time ------------------------------------------------------------------------------------

    def on_tick(self) -> None:
        """Deal with each worker whose time is up, and find out whose is next."""
        now = self._state.now
        dispatcher = self._dispatcher
        if dispatcher.deadline_s is None or dispatcher.deadline_s > now:
            return
        for worker in list(self._state.workers.values()):
            if worker.deadline_s <= now and self._is_watched(worker):
                self._on_overdue(worker, now)
        dispatcher.deadline_s = None
        for worker in self._state.workers.values():
            if self._is_watched(worker):
                dispatcher.watch(worker, worker.deadline_s)
        dispatcher.tell_obstacles(now)
        for group in self._state.groups.values():
            if group.start_again_s > now:
                dispatcher.watch_time(group.start_again_s)
            elif group.start_again_s:
                group.start_again_s = 0.0
                if group.start_now:
                    self._fill(group)
                dispatcher.offer(group)

    def _on_overdue(self, worker: WorkerRecord, now: float) -> None:
        timeout_s = self._state.config.worker_start_timeout_s
        if worker.state is _STARTING:
            self._state.effects.append(
                Warn(
                    f"A worker has not started after {timeout_s:.0f} s and is replaced; a long "
                    "initializer needs a longer worker_start_timeout_s."
                )
            )
            self._state.effects.append(TerminateWorker(worker.worker_id))
            worker.deadline_s = now + timeout_s
        elif worker.state is _BUSY:
            self._dispatcher.on_silent(worker, now)
        elif worker.state is _ACTOR:
            self.actors.calls.nudged(worker)
            self._state.effects.append(Nudge(worker.worker_id))
        else:
            self.stop(worker)

    def _is_watched(self, worker: WorkerRecord) -> bool:
        """Whether a worker's deadline means anything now."""
        if worker.state is _STARTING:
            return True
        if worker.state is _BUSY:
            return self._dispatcher.may_nudge(worker) or (
                len(worker.packets) > 1 and bool(worker.group.idle)
            )
        if worker.state is _ACTOR:
            return self.actors.calls.may_nudge(worker)
        return worker.state is _IDLE and self._is_surplus(worker.group)

    def _is_surplus(self, group: Group) -> bool:
        """Whether an elastic group has more workers than may usually run at once."""
        if group.size:
            return False
        keep = max(1, self._state.resources.total.get("CPU", 0) // UNIT)
        return len(group.workers) - group.leaving - group.actors > keep

    # ---- checks ----------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when counts or places of workers and groups are wrong."""
        state = self._state
        used = [worker.slot for worker in state.workers.values()]
        assert sorted(used + self._free_slots) == list(range(self._slots)), "progress words"
        unfinished = dict.fromkeys(state.groups, 0)
        for task in state.tasks.values():
            group_id = task.class_queue.task_class.group_id
            assert group_id in unfinished, "a task of a group that is gone"
            unfinished[group_id] += 1
        total = 0
        for group in state.groups.values():
            assert group.unfinished == unfinished[group.group_id], "count of unfinished tasks"
            states = [worker.state for worker in group.workers.values()]
            assert group.starting == states.count(_STARTING)
            assert group.leaving == states.count(_STOPPING)
            assert group.actors == sum(w.is_actor for w in group.workers.values())
            assert len(group.idle) == states.count(_IDLE)
            assert all(state.workers[worker_id] is w for worker_id, w in group.workers.items())
            total += len(group.workers)
            if group.state is GroupState.ENDED or group.state is GroupState.FAILED:
                assert group.unfinished == 0
                assert group.starting == len(group.idle) == 0
        assert total == len(state.workers)
