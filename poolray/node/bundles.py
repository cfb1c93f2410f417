"""The node's side of placement groups: bundles kept here, and calls that want one.

    head ─PrepareBundles─▶ reserved ─CommitBundles─▶ open: calls use them ─GroupChanged─▶ closing
                              │ ReturnBundles         under the group's names  (REMOVED)    │
                              ▼                                                             ▼
                         free again ◀────────── the last worker that ran there is gone ─────┘

What: sets bundles aside for the head, opens and closes them, says which calls may run in them,
fails what asks for a group that is gone, and passes clients' requests on to the head.
Who calls: `node/node.py` with requests and the head's messages; `node/functions.py` with classes;
the dispatcher when something became free; `node/groups.py` when a worker is gone.
May touch: nothing.
Invariants: what is reserved for bundles is not available to plain calls; a call in a group uses
its bundles and nothing else; bundles of a group that was removed are free once no worker that used
them lives; who waits for a group is told of its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias, final

from poolray.exceptions import TaskPlacementGroupRemoved
from poolray.ids import ClientId, ObjectId, PlacementGroupId, WorkerId
from poolray.node.effects import Notice, Reply, SendHead, TerminateWorker
from poolray.node.placement import unschedulable
from poolray.node.state import NodeState
from poolray.node.workers import WorkerRecord, WorkerState
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.placement import (
    AwaitPlacementGroup,
    BundlesPrepared,
    CommitBundles,
    CreatePlacementGroup,
    DropGroup,
    FindGroups,
    GroupChanged,
    GroupRow,
    GroupsFound,
    GroupSpec,
    GroupState,
    KeptBundles,
    PlacementGroupReply,
    PlacementHeadMessage,
    PlacementRequest,
    PrepareBundles,
    RegisterGroup,
    RemovePlacementGroup,
    ReturnBundles,
    WatchGroup,
)
from poolray.scheduling.group_resources import Reservation, demand_in_group
from poolray.scheduling.resources import from_fixed
from poolray.tasks.class_queue import ClassQueue, Obstacle

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.dispatch import Dispatcher
    from poolray.node.objects import Objects
    from poolray.node.peers import Peers
    from poolray.node.tasks import Tasks

_CREATED, _REMOVED = GroupState.CREATED, GroupState.REMOVED
_ACTOR, _STOPPING = WorkerState.ACTOR, WorkerState.STOPPING

_Question: TypeAlias = RegisterGroup | DropGroup | FindGroups

#: Packets that calls were sent while an order waited, before it gets what comes free first.
_PASSED_OVER_MAX = 64


@final
class _Known:
    """A group that somebody here asks about."""

    __slots__ = ("awaited", "is_told", "queues", "row")

    def __init__(self, row: GroupRow) -> None:
        self.row = row
        #: Classes of calls that are to run in it.
        self.queues: dict[ClassQueue, None] = {}
        #: Object -> the value that it gets once the group is placed.
        self.awaited: dict[ObjectId, bytes] = {}
        self.is_told = False  #: the user knows that it does not fit


@final
class _Order:
    """Bundles for which the node has no room yet."""

    __slots__ = ("message", "passed_over")

    def __init__(self, message: PrepareBundles) -> None:
        self.message = message
        self.passed_over = 0


@final
class Bundles:
    """The placement groups of a node."""

    __slots__ = (
        "_asked",
        "_closing",
        "_known",
        "_next_request",
        "_objects",
        "_open",
        "_reserved",
        "_state",
        "_tasks",
        "actors",
        "dispatcher",
        "orders",
        "peers",
    )

    def __init__(self, state: NodeState, objects: Objects, tasks: Tasks) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self.actors: Actors
        self.dispatcher: Dispatcher
        self.peers: Peers
        #: Bundles that are set aside: not for calls yet.
        self._reserved: dict[tuple[PlacementGroupId, int], Reservation] = {}
        #: Bundles that calls run in; several reservations of one group after a node's death.
        self._open: dict[PlacementGroupId, list[Reservation]] = {}
        #: Bundles of removed groups, and the workers that are being killed in them.
        self._closing: list[tuple[list[Reservation], dict[WorkerId, None]]] = []
        #: Reservations that wait for room, in order.
        self.orders: dict[tuple[PlacementGroupId, int], _Order] = {}
        self._known: dict[PlacementGroupId, _Known] = {}
        #: Request id at the head -> who asked for what, and the question.
        self._asked: dict[int, tuple[ClientId, PlacementRequest, _Question]] = {}
        self._next_request = 0

    # ---- clients ---------------------------------------------------------------------------------

    def on_request(self, client_id: ClientId, message: PlacementRequest) -> None:
        """What a client wants of a group."""
        if isinstance(message, AwaitPlacementGroup):
            self._await(client_id, message)
            return
        self._next_request = number = self._next_request + 1
        question: _Question
        if isinstance(message, CreatePlacementGroup):
            spec = message.spec
            self._learn(GroupRow(spec=spec, state=GroupState.PENDING, nodes=[]))
            question = RegisterGroup(request_id=number, spec=spec)
        elif isinstance(message, RemovePlacementGroup):
            question = DropGroup(request_id=number, group_id=message.group_id)
        else:
            question = FindGroups(
                request_id=number,
                group_id=message.group_id,
                name=message.name,
                namespace=message.namespace,
                start=message.start,
            )
        self._asked[number] = (client_id, message, question)
        self._state.effects.append(SendHead(question))

    def outstanding(self) -> list[_Question]:
        """Questions without an answer, in order: a head that was started again is asked again."""
        return [question for _, _, question in self._asked.values()]

    def _await(self, client_id: ClientId, message: AwaitPlacementGroup) -> None:
        """An object that is there once the group is."""
        client = self._objects.client(client_id)
        record = self._state.objects[message.object_id] = ObjectRecord(1)
        record.seen = True  # an error is an answer here, not news
        client.held[message.object_id] = None
        known = self._known.get(message.group_id) or self._ask_about(message.group_id)
        known.awaited[message.object_id] = message.value
        self._settle_awaited(known)

    def _ask_about(self, group_id: PlacementGroupId) -> _Known:
        """Be told of a group from now on."""
        spec = GroupSpec(group_id=group_id, bundles=[])
        known = self._learn(GroupRow(spec=spec, state=GroupState.PENDING, nodes=[]))
        self._state.effects.append(SendHead(WatchGroup(group_id=group_id)))
        return known

    def _learn(self, row: GroupRow) -> _Known:
        known = self._known.get(row.spec.group_id)
        if known is None:
            known = self._known[row.spec.group_id] = _Known(row)
        return known

    def _on_found(self, message: GroupsFound) -> None:
        asked = self._asked.pop(message.request_id, None)
        if asked is None:
            return
        client_id, request, _ = asked
        assert not isinstance(request, AwaitPlacementGroup)
        if isinstance(request, CreatePlacementGroup) and message.refusal:
            self._known.pop(request.spec.group_id, None)
        reply = PlacementGroupReply(
            request_id=request.request_id, rows=message.rows, refusal=message.refusal
        )
        self._state.effects.append(Reply(client_id, reply))

    # ---- the head --------------------------------------------------------------------------------

    def on_head(self, message: PlacementHeadMessage) -> None:
        """What the head decides."""
        if isinstance(message, GroupsFound):
            self._on_found(message)
        elif isinstance(message, PrepareBundles):
            self._on_prepare(message)
        elif isinstance(message, CommitBundles):
            self._on_commit(message)
        elif isinstance(message, ReturnBundles):
            self._on_return(message)
        else:
            self._on_changed(message)

    def _on_prepare(self, message: PrepareBundles) -> None:
        key = (message.group_id, message.attempt)
        if key in self._reserved or key in self.orders:
            return
        if not self._reserve(message):
            if message.may_wait:
                self.orders[key] = _Order(message)
            else:
                self._answer(message, False)

    def _reserve(self, message: PrepareBundles) -> bool:
        reservation = Reservation(message.bundles)
        if not reservation.take(self._state.resources):
            return False
        self._reserved[message.group_id, message.attempt] = reservation
        self._answer(message, True)
        return True

    def _answer(self, message: PrepareBundles, done: bool) -> None:
        answer = BundlesPrepared(group_id=message.group_id, attempt=message.attempt, done=done)
        self._state.effects.append(SendHead(answer))

    def _on_commit(self, message: CommitBundles) -> None:
        reservation = self._reserved.pop((message.group_id, message.attempt), None)
        if reservation is None:
            return
        self._open.setdefault(message.group_id, []).append(reservation)
        reservation.open(self._state.resources, message.group_id)
        known = self._known.get(message.group_id)
        if known is not None:
            self._look_at(known)

    def _on_return(self, message: ReturnBundles) -> None:
        key = (message.group_id, message.attempt)
        self.orders.pop(key, None)
        reservation = self._reserved.pop(key, None)
        if reservation is not None:
            reservation.give(self._state.resources)
            self._offer_all()

    def _on_changed(self, message: GroupChanged) -> None:
        row = message.row
        group_id = row.spec.group_id
        known = self._known.get(group_id)
        if known is not None:
            known.row = row
        if row.state == _REMOVED:
            self._end(group_id, known)
        if known is None:
            return
        if row.is_infeasible and not known.is_told:
            known.is_told = True
            self._state.effects.append(Notice(f"{_named(row)} waits for {_wanted(row)}"))
        self.peers.placing.learn_bundles(row)
        self._look_at(known)
        self._settle_awaited(known)
        self._forget_if_unused(known)

    # ---- classes ---------------------------------------------------------------------------------

    def adopt(self, queue: ClassQueue) -> None:
        """Calls of a class want to run in a group."""
        placement = queue.task_class.placement
        assert placement is not None
        queue.demand = demand_in_group(
            queue.task_class.resources, placement.group, placement.bundle
        )
        queue.set_lent()
        known = self._known.get(placement.group) or self._ask_about(placement.group)
        known.queues[queue] = None
        queue.obstacle = self._obstacle(known, queue)

    def forget(self, queue: ClassQueue) -> None:
        """A class is not needed any more."""
        placement = queue.task_class.placement
        known = None if placement is None else self._known.get(placement.group)
        if known is not None:
            known.queues.pop(queue, None)
            self._forget_if_unused(known)

    def _forget_if_unused(self, known: _Known) -> None:
        if known.row.state == _REMOVED and not known.queues and not known.awaited:
            self._known.pop(known.row.spec.group_id, None)

    def _obstacle(self, known: _Known, queue: ClassQueue) -> Obstacle | None:
        """Why calls of a class cannot run here; None: a bundle for them is here."""
        row = known.row
        if row.state == _REMOVED:
            return Obstacle(f"{_named(row)} was removed", is_final=True)
        if self._state.resources.fits_ever(queue.demand):
            return None
        return Obstacle(f"{_named(row)}, which waits for {_wanted(row)}", is_final=False)

    def _look_at(self, known: _Known) -> None:
        """What is a group now means for its calls."""
        groups = {}
        for queue in list(known.queues):
            queue.obstacle = self._obstacle(known, queue)
            queue.stuck = False
            group = self._state.groups.get(queue.task_class.group_id)
            if queue.queued_calls and group is not None:
                groups[group.group_id] = group
        for group in groups.values():
            self.dispatcher.dispatch(group)

    def _settle_awaited(self, known: _Known) -> None:
        """Objects that stand for a group that is placed, or gone."""
        row = known.row
        if not known.awaited or row.state not in (_CREATED, _REMOVED):
            return
        awaited, known.awaited = known.awaited, {}
        for object_id, value in awaited.items():
            target = self._state.objects.get(object_id)
            if target is None or target.state is READY:
                continue
            if row.state == _CREATED:
                self._objects.seal_small(object_id, value)
            else:
                error = self._state.encode_error(
                    TaskPlacementGroupRemoved(f"{_named(row)} was removed.")
                )
                self._objects.seal(object_id, target, error, True, [], ClientId(b""))

    # ---- the end of a group ----------------------------------------------------------------------

    def _end(self, group_id: PlacementGroupId, known: _Known | None) -> None:
        """A group was removed: what runs in it ends, what asks for it fails."""
        for key in [key for key in self.orders if key[0] == group_id]:
            del self.orders[key]
        workers: dict[WorkerId, None] = {}
        if known is not None and known.queues:
            workers = self._kill(known)
        reservations = self._open.pop(group_id, None)
        if reservations:
            for reservation in reservations:
                reservation.close(self._state.resources, group_id)
            self._closing.append((reservations, workers))
            self._free_closed()

    def _kill(self, known: _Known) -> dict[WorkerId, None]:
        """End all calls of a group and the workers that run them; gives these."""
        why = f"{_named(known.row)} was removed"
        used = [w for w in self._state.workers.values() if w.runs in known.queues]
        actors = [worker.worker_id for worker in used if worker.state is _ACTOR]
        # First of all: what fails below may make others ready that ask for the same bundles.
        for queue in known.queues:
            queue.obstacle = self._obstacle(known, queue)
        for worker in used:
            if worker.state is not _ACTOR:
                self._terminate(worker)
        if actors:
            self.actors.end_in(actors, f"died: its {why}")
        if any(queue.tasks for queue in known.queues):
            errors = {
                queue: self._state.encode_error(unschedulable(queue.task_class, why))
                for queue in known.queues
            }
            for record in list(self._state.tasks.values()):
                if record.class_queue in errors and record.task_id in self._state.tasks:
                    self._tasks.give_up(record, errors[record.class_queue])
        for worker in used:  # (those of actors: the others are on their way out)
            self._terminate(worker)
        return {w.worker_id: None for w in used if w.worker_id in self._state.workers}

    def _terminate(self, worker: WorkerRecord) -> None:
        self.dispatcher.release_lease(worker)
        if worker.state is not _STOPPING:
            worker.move(_STOPPING)
            self._state.effects.append(TerminateWorker(worker.worker_id))

    def on_worker_lost(self, worker_id: WorkerId) -> None:
        """A worker's process has ended."""
        for _, workers in self._closing:
            workers.pop(worker_id, None)
        self._free_closed()

    def _free_closed(self) -> None:
        """Bundles that nobody runs in any more are the node's again."""
        done = [item for item in self._closing if not item[1]]
        if not done:
            return
        self._closing = [item for item in self._closing if item[1]]
        for reservations, _ in done:
            for reservation in reservations:
                reservation.give(self._state.resources)
        self._offer_all()

    # ---- room ------------------------------------------------------------------------------------

    def _offer_all(self) -> None:
        self.fill_orders()
        for group in list(self._state.groups.values()):
            if group.ready:
                self.dispatcher.dispatch(group)

    def fill_orders(self) -> None:
        """Something became free: bundles that wait for it go before calls that do."""
        for key, order in list(self.orders.items()):
            if self._reserve(order.message):
                del self.orders[key]
            else:
                order.passed_over += 1

    def holds_back(self, queue: ClassQueue) -> bool:
        """Whether calls have to wait, for an order that has been passed over too often."""
        for order in self.orders.values():
            if order.passed_over <= _PASSED_OVER_MAX:
                continue
            wanted = Reservation(order.message.bundles).total()
            if any(name in wanted for name in queue.demand):
                return self.dispatcher.may_come_free(wanted)
        return False

    def kept(self) -> list[KeptBundles]:
        """What this node has of groups, for a head that was started again."""
        reserved = [
            KeptBundles(group_id=group_id, attempt=attempt, indexes=list(r.bundles), is_open=False)
            for (group_id, attempt), r in self._reserved.items()
        ]
        opened = [
            KeptBundles(group_id=group_id, attempt=0, indexes=list(r.bundles), is_open=True)
            for group_id, reservations in self._open.items()
            for r in reservations
        ]
        return reserved + opened

    def watched(self) -> list[PlacementGroupId]:
        """Groups of which this node wants to hear, and of which the head must know."""
        questions = self.outstanding()
        new = {q.spec.group_id for q in questions if isinstance(q, RegisterGroup)}
        return [group_id for group_id in self._known if group_id not in new]

    # ---- looking in ------------------------------------------------------------------------------

    def reservations(self) -> Iterator[Reservation]:
        """All that is taken from the node's resources for bundles."""
        yield from self._reserved.values()
        for each in self._open.values():
            yield from each
        for closing, _ in self._closing:
            yield from closing

    def count(self) -> int:
        """Bundles that are kept here."""
        return sum(len(reservation.bundles) for reservation in self.reservations())

    def check_invariants(self, classes: Iterable[ClassQueue]) -> None:
        """Raise AssertionError when groups, classes and workers do not agree."""
        for queue in classes:
            placement = queue.task_class.placement
            if placement is not None and placement.group:
                assert queue in self._known[placement.group].queues, "a class of no known group"
        for known in self._known.values():
            for queue in known.queues:
                assert self._state.classes[queue.task_class.class_id] is queue
            if known.row.state in (_CREATED, _REMOVED):
                assert not known.awaited, "who waits for a group was not told"
        for _, workers in self._closing:
            assert workers
            assert workers.keys() <= self._state.workers.keys()
        assert not self.orders.keys() & self._reserved.keys()


def _named(row: GroupRow) -> str:
    spec = row.spec
    name = f"{spec.name} " if spec.name else ""
    return f"placement group {name}({spec.group_id.hex()})"


def _wanted(row: GroupRow) -> str:
    bundles = ", ".join(str(from_fixed(bundle)) for bundle in row.spec.bundles[:8])
    more = f" and {len(row.spec.bundles) - 8} more" if len(row.spec.bundles) > 8 else ""
    if row.is_infeasible:
        return f"bundles that the nodes do not have: {bundles}{more}"
    return f"room for its bundles: {bundles}{more}"
