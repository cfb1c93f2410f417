"""The node's actors: made, called, restarted, ended.

    CreateActor ──▶ a task of the class's own makes a worker the actor's ──ActorStarted──▶ ALIVE
    CallActor ────▶ `ActorCalls` ──packets─▶ that worker ──TasksFinished──▶ objects, as of tasks
    WorkerLost ───▶ the constructor's task runs again, or all calls fail

What: which worker is whose, and what the end of a process means for the calls that it has.
Who calls: `node/node.py` with requests and reports; `node/tasks.py` when a constructor's call is
given up; `node/groups.py` when a worker is gone; `node/objects.py` with the last handle.
May touch: nothing.
Invariants: an actor that is ALIVE has a worker of its own and nobody else's; calls end once,
also those of an actor that is dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, final

from poolray.actors.lifecycle import ALIVE, DEAD, PENDING, RESTARTING
from poolray.exceptions import (
    InternalError,
    PoolrayError,
)
from poolray.ids import ActorId, ClientId, GroupId, ObjectId, TaskId, WorkerId, handle_of
from poolray.node.actor_calls import ActorCalls
from poolray.node.actor_record import (
    Actor,
    died,
    restarts_text,
    row_of,
    running_calls,
    split_lost,
    unavailable,
)
from poolray.node.actors_elsewhere import ADOPTER, ActorsElsewhere
from poolray.node.borrowing import is_peer, node_of
from poolray.node.cancellation import error_of
from poolray.node.effects import Reply, SendHead, TerminateWorker
from poolray.node.state import NodeState
from poolray.node.tasks import Tasks
from poolray.node.workers import WorkerRecord, WorkerState
from poolray.objects.directory import ObjectRecord
from poolray.protocol.actors import (
    ActorReply,
    CallCount,
    CountCalls,
    CreateActor,
    KillActor,
    ListActors,
    LookUpActor,
    NamedActors,
)
from poolray.protocol.directory import (
    ActorFound,
    FindActor,
    RegisterActor,
)
from poolray.protocol.node import ListNames, NamesFound, WorkerLost
from poolray.protocol.state import ActorRow
from poolray.protocol.values import CallKind
from poolray.protocol.worker import (
    ActorExiting,
    ActorStarted,
)
from poolray.tasks.error_types import ACTOR_DIED
from poolray.tasks.lifecycle import DELAYED, QUEUED, RUNNING, SUCCEEDED, WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.dispatch import Dispatcher
    from poolray.node.groups import Groups
    from poolray.node.hosting import Hosting
    from poolray.node.objects import Objects
    from poolray.node.observer import Observer

_CREATE = CallKind.CREATE
_ACTOR = WorkerState.ACTOR
_STOPPING = WorkerState.STOPPING


@final
class Actors:
    """The actors of a node."""

    __slots__ = (
        "_asked",
        "_dispatcher",
        "_groups",
        "_next_request",
        "_objects",
        "_observer",
        "_owned",
        "_state",
        "_tasks",
        "actors",
        "by_creation",
        "by_worker",
        "calls",
        "elsewhere",
        "hosting",
    )

    def __init__(
        self,
        state: NodeState,
        objects: Objects,
        tasks: Tasks,
        dispatcher: Dispatcher,
        groups: Groups,
        observer: Observer,
    ) -> None:
        self._state = state
        self._observer = observer
        self._objects = objects
        self._tasks = tasks
        self._dispatcher = dispatcher
        self._groups = groups
        self.elsewhere: ActorsElsewhere
        self.hosting: Hosting
        #: Actors that live, and dead ones that somebody has a handle to.
        self.actors: dict[ActorId, Actor] = {}
        self.by_worker: dict[WorkerId, Actor] = {}
        self.calls = ActorCalls(state, objects, tasks, dispatcher, self)
        #: task id of the constructor's call -> actor that is not dead.
        self.by_creation: dict[TaskId, Actor] = {}
        #: client -> actors it made that are neither dead nor detached.
        self._owned: dict[ClientId, dict[ActorId, None]] = {}
        #: request id at the head -> who asked for what.
        self._asked: dict[int, tuple[ClientId, CreateActor | LookUpActor | ListActors]] = {}
        self._next_request = 0

    # ---- requests --------------------------------------------------------------------------------

    def on_request(
        self,
        client_id: ClientId,
        message: CreateActor | KillActor | LookUpActor | ListActors | CountCalls,
    ) -> None:
        """What a client wants of an actor, other than calls."""
        if isinstance(message, CreateActor):
            if message.name:
                self._ask_head(client_id, message)
            else:
                self.create(client_id, message)
        elif isinstance(message, KillActor):
            self._on_kill(message)
        elif isinstance(message, CountCalls):
            count = self._count_calls(client_id, message.actor_id)
            reply = CallCount(request_id=message.request_id, count=count)
            self._state.effects.append(Reply(client_id, reply))
        else:
            self._ask_head(client_id, message)

    def _count_calls(self, client_id: ClientId, actor_id: ActorId) -> int:
        actor = self.actors.get(actor_id)
        count = 0 if actor is None else actor.calls_by_caller.get(client_id, 0)
        remote = self.elsewhere.find(actor_id)
        if remote is None or not remote.unfinished:
            return count
        tasks = self._state.tasks.values()
        return count + sum(
            record.is_elsewhere and record.actor_id == actor_id and record.client_id == client_id
            for record in tasks
        )

    def keeps(self, actor_id: ActorId) -> bool:
        """Whether an actor is ours to make again, wherever it lives."""
        actor = self.actors.get(actor_id)
        return actor is not None and actor.hosted_for is None

    def _ask_head(
        self, client_id: ClientId, message: CreateActor | LookUpActor | ListActors
    ) -> None:
        """Names belong to the head: it is asked, and answers with the number of the request."""
        self._next_request = number = self._next_request + 1
        self._asked[number] = (client_id, message)
        self._state.effects.append(SendHead(self._question(number, message)))

    def _question(
        self, number: int, message: CreateActor | LookUpActor | ListActors
    ) -> RegisterActor | FindActor | ListNames:
        if isinstance(message, CreateActor):
            return RegisterActor(request_id=number, entry=self.hosting.entry_of(message))
        if isinstance(message, LookUpActor):
            return FindActor(request_id=number, namespace=message.namespace, name=message.name)
        return ListNames(request_id=number, namespace=message.namespace)

    def on_head_reply(self, message: ActorFound | NamesFound) -> None:
        """The head's answer, for whoever asked."""
        asked = self._asked.pop(message.request_id, None)
        if asked is None:
            return
        client_id, request = asked
        if isinstance(message, NamesFound):
            names = NamedActors(request_id=request.request_id, names=message.names)
            self._state.effects.append(Reply(client_id, names))
            return
        entry = message.entry
        if is_peer(client_id):
            assert isinstance(request, LookUpActor)
            self.hosting.on_doubt_settled(node_of(client_id), request)
            return
        found = entry.actor_id if entry is not None else ActorId(b"")
        if isinstance(request, CreateActor) and found == request.actor_id:
            self.create(client_id, request)
            self.answer(client_id, request.request_id, found, request.description)
            return
        wanted = not isinstance(request, CreateActor) or request.get_if_exists
        if entry is None or not wanted:
            self.answer(client_id, request.request_id, None, b"")
        elif self.keeps(found):
            self.answer(
                client_id, request.request_id, found, self.actors[found].message.description
            )
        else:
            self.hosting.want_handle(client_id, request.request_id, entry)

    def answer(
        self, client_id: ClientId, request_id: int, actor_id: ActorId | None, description: bytes
    ) -> None:
        """Give a client the handle it asked for, unless there is none."""
        actor = None if actor_id is None else self.actors.get(actor_id)
        if actor_id is None or (actor is not None and actor.life.state is DEAD):
            self._state.effects.append(Reply(client_id, ActorReply(request_id=request_id)))
            return
        self._objects.add_references(client_id, [handle_of(actor_id)])
        reply = ActorReply(request_id=request_id, actor_id=actor_id, description=description)
        self._state.effects.append(Reply(client_id, reply))

    def is_asked_for(self, actor_id: ActorId) -> bool:
        """Whether the head has yet to say that an actor may have its name."""
        return any(
            isinstance(message, CreateActor) and message.actor_id == actor_id
            for _, message in self._asked.values()
        )

    def outstanding(self) -> list[RegisterActor | FindActor | ListNames]:
        """Questions that the head has not answered, for one that may not have heard them."""
        return [self._question(number, message) for number, (_, message) in self._asked.items()]

    # ---- creation --------------------------------------------------------------------------------

    def create(self, client_id: ClientId, message: CreateActor, restarts: int = 0) -> None:
        """An actor is wanted: its constructor's call is a task that makes a worker its own."""
        actor_id, task_id = message.actor_id, message.task.task_id
        if actor_id in self.actors:
            raise InternalError(f"actor {actor_id.hex()} exists already")
        actor = self.actors[actor_id] = Actor(message, client_id)
        self.by_creation[task_id] = actor
        handle = handle_of(actor_id)
        if handle not in self._state.objects:
            self._state.objects[handle] = ObjectRecord()
        self._objects.handles[handle] = actor_id
        self._objects.add_references(client_id, [handle])
        if message.detached:
            self._objects.hold(handle)
        else:
            self._owned.setdefault(client_id, {})[actor_id] = None
        self.hosting.on_born(actor)
        # Arguments that are known to be errors may end it before this returns.
        self._tasks.submit(client_id, [message.task])
        actor.begin(self._state.tasks.get(task_id))
        if actor.creation is not None:
            actor.creation.attempts = restarts
            actor.required = actor.creation.class_queue.task_class.resources
        self.hosting.creations.offer(actor)

    def on_started(self, message: ActorStarted) -> None:
        """A constructor has returned, or raised."""
        worker = self._state.workers.get(message.worker_id)
        if worker is None or not worker.packets:
            return
        packet = worker.packets.popleft()
        record = packet.records[0] if packet.records else None
        self._dispatcher.packets.let_go(packet)
        actor = None if record is None else self.by_creation.get(record.task_id)
        if (
            actor is None
            or record is None
            or record.worker_id != worker.worker_id
            or worker.state is _STOPPING
        ):
            self._discard(worker)  # it was killed meanwhile
        elif message.error:
            self._discard(worker)
            self._tasks.fail_encoded(record, message.error, message="the constructor raised")
        else:
            actor.repr_name = message.repr_name
            self._move_in(actor, record, worker)

    def _discard(self, worker: WorkerRecord) -> None:
        """A worker has begun to be an actor and is of no other use."""
        if worker.state is not _STOPPING:
            self._groups.stop(worker)
        self._dispatcher.release_lease(worker)
        worker.runs = None

    def _move_in(self, actor: Actor, record: TaskRecord, worker: WorkerRecord) -> None:
        """The worker is the actor's from now on, with the resources of the constructor's call."""
        if worker.lease is None and worker.runs is not None:  # a thread of it still waits in `get`
            self._state.resources.acquire_anyway(worker.runs.lent)
            worker.lease, worker.keeps = worker.runs, None
        worker.move(_ACTOR)
        actor.worker = worker
        actor.pid, actor.lived_at = worker.pid, None
        self._observer.on_actor_made(record, worker)
        self.by_worker[worker.worker_id] = actor
        self.end_creation(record)
        self.come_alive(actor, record)

    def come_alive(self, actor: Actor, record: TaskRecord) -> None:
        """Its constructor has returned, here or on another node."""
        actor.life.move(ALIVE)
        if actor.message.max_restarts == 0 or actor.hosted_for is not None:
            self._tasks.inputs.unpin(record)
        if actor.hosted_for is not None:
            self.hosting.on_alive(actor, record)
        elif actor.host is not None:
            if actor.unfinished or not actor.is_freed:
                # (Calls made here hold the handle from now on.)
                self.hosting.own_handle(actor.message.actor_id)
                actor.is_freed = False
                self.elsewhere.known(actor.message.actor_id)
            self.hosting.tell(actor)
            self.hosting.move_calls(actor)
        else:
            self.hosting.tell(actor)
        if actor.message.max_restarts:
            self.hosting.creations.offer(actor)  # its arguments are there, whatever they are
        self.after_call(actor)
        self.calls.feed(actor)

    def end_creation(self, record: TaskRecord) -> None:
        """The constructor's call is over; its class stays, for the worker holds its resources."""
        record.move(SUCCEEDED)
        record.worker_id = None
        del self._state.tasks[record.task_id]
        group = self._state.groups[record.class_queue.task_class.group_id]
        group.unfinished -= 1
        if group.unfinished == 0:
            self._groups.on_group_empty(group)

    def creation_error(self, record: TaskRecord, message: WorkerLost) -> PoolrayError:
        """What calls get of an actor whose constructor took the worker along."""
        actor = self.by_creation[record.task_id]
        how = self._tasks.protection.how(message)
        return died(
            actor,
            f"died in its constructor: its process (pid {message.pid}) {how}"
            + restarts_text(record.attempts),
            message.pid,
        )

    def on_creation_failed(self, record: TaskRecord, error: bytes) -> None:
        """The constructor's call is given up; the caller ends the record."""
        actor = self.by_creation.get(record.task_id)
        if actor is not None:
            if not actor.cause:
                actor.cause = "The constructor raised an exception, or one of its arguments is one."
            actor.creation = None
            self.bury(actor, error)

    def after_call(self, actor: Actor) -> None:
        """Nobody may need the actor any more."""
        if actor.unfinished or not actor.is_freed:
            return
        if actor.life.state is ALIVE:
            self._stop(actor)
        elif actor.life.state is DEAD:
            self._forget(actor)
        elif (
            actor.hosted_for is None
            and actor.creation is not None
            and actor.creation.state in (WAITING, QUEUED, DELAYED)
        ):
            self.kill(actor, "went out of scope before it was created")  # it may wait for ever

    # ---- ends ------------------------------------------------------------------------------------

    def on_freed(self, actor_id: ActorId) -> None:
        """The last handle is gone."""
        self.elsewhere.on_freed(actor_id)
        actor = self.actors.get(actor_id)
        if actor is None or actor.hosted_for is not None:
            return
        actor.is_freed = True
        self.after_call(actor)

    def _stop(self, actor: Actor) -> None:
        """Nobody can call it any more, and all its calls are over: it ends politely."""
        worker = actor.worker
        self._move_out(actor)
        self.hosting.end_hosted(actor, "")
        self.bury(actor, self._state.encode_error(died(actor, "went out of scope")))
        if worker is not None and worker.state is not _STOPPING:
            self._groups.stop(worker)

    def _on_kill(self, message: KillActor) -> None:
        actor = self.actors.get(message.actor_id)
        if actor is None or actor.hosted_for is not None:
            if self.elsewhere.find(message.actor_id) is not None:
                self.hosting.kill_elsewhere(message)
            return
        if actor.life.state is DEAD:
            return
        if message.no_restart:
            self.kill(actor, "was killed by kill()")
        elif actor.host is not None:
            self.hosting.end_hosted(actor, "was killed by kill()", may_restart=True)
        elif (worker := self._worker_of(actor)) is not None:
            self._state.effects.append(TerminateWorker(worker.worker_id))

    def in_worker(self, worker_id: WorkerId) -> tuple[ClientId, bool] | None:
        """Who made the actor that lives in a worker, and whether it would be restarted."""
        actor = self.by_worker.get(worker_id)
        if actor is None:
            return None
        creation = actor.creation
        return actor.owner, creation is not None and self._tasks.may_retry(creation)

    def _worker_of(self, actor: Actor) -> WorkerRecord | None:
        """The worker that is the actor's, or runs its constructor."""
        if actor.worker is not None or actor.creation is None:
            return actor.worker
        worker_id = actor.creation.worker_id
        return None if worker_id is None else self._state.workers.get(worker_id)

    def terminate(self, actor: Actor) -> None:
        """Its process ends by force, as in a crash."""
        worker = self._worker_of(actor)
        if worker is not None:
            self._state.effects.append(TerminateWorker(worker.worker_id))

    def kill(self, actor: Actor, reason: str, error: bytes = b"") -> None:
        """It ends by force, for good; its calls fail at once."""
        worker, creation = self._worker_of(actor), actor.creation
        error = error or self._state.encode_error(died(actor, reason))
        self._move_out(actor)
        self.hosting.end_hosted(actor, reason or "is dead")
        if worker is not None:
            self._terminate(worker)
        if creation is not None and creation.task_id in self._state.tasks:
            self._tasks.give_up(creation, error)  # buries it
        if actor.life.state is not DEAD:
            self.bury(actor, error)

    def _terminate(self, worker: WorkerRecord) -> None:
        if worker.state is not _STOPPING:
            worker.move(_STOPPING)
        self._state.effects.append(TerminateWorker(worker.worker_id))

    def on_exiting(self, message: ActorExiting) -> None:
        """An actor ends itself; what it answers to the call that does so is its death."""
        actor = self.by_worker.get(message.worker_id)
        if actor is None or actor.message.actor_id != message.actor_id:
            return
        worker = actor.worker
        assert worker is not None
        self._move_out(actor)
        self.bury(actor, self._state.encode_error(died(actor, message.reason)))
        if worker.state is not _STOPPING:
            worker.move(_STOPPING)  # its exit follows

    def on_worker_lost(self, message: WorkerLost) -> None:
        """The process of an actor has ended."""
        actor = self.by_worker.get(message.worker_id)
        if actor is None:
            return
        begun, untouched = split_lost(actor, message)
        self._move_out(actor)
        if actor.hosted_for is not None:
            self._lose_hosted(actor, message, begun)
            return
        kill = self._tasks.protection.kills.get(message.worker_id)
        creation = actor.creation
        if (
            creation is not None
            and (actor.unfinished or not actor.is_freed)
            and self._tasks.may_retry(creation)
            and self._tasks.usable_group(creation) is not None
        ):
            self._restart(actor, creation, message, begun, untouched)
            return
        if kill is not None:
            for record in begun:
                self._tasks.fail(record, self._tasks.protection.error(record, message, kill))
        how = self._tasks.protection.how(message)
        restarts = 0 if creation is None else creation.attempts
        error = died(
            actor,
            f"died: its process (pid {message.pid}) {how}" + restarts_text(restarts),
            message.pid,
        )
        self.bury(actor, self._state.encode_error(error))

    def _lose_hosted(self, actor: Actor, message: WorkerLost, begun: list[TaskRecord]) -> None:
        """The process of an actor that another node keeps has ended: that one decides."""
        creation = actor.creation
        assert creation is not None
        how = self._tasks.protection.how(message)
        text = f"died: its process (pid {message.pid}) {how}" + restarts_text(creation.attempts)
        death = self._state.encode_error(died(actor, text, message.pid))
        limit = actor.message.max_restarts
        again = limit < 0 or creation.attempts < limit
        error = self._state.encode_error(unavailable(actor)) if again else death
        self.hosting.bounce(actor, begun, error)
        self.bury(actor, death, may_restart=True)

    def _restart(
        self,
        actor: Actor,
        creation: TaskRecord,
        message: WorkerLost,
        begun: list[TaskRecord],
        untouched: list[TaskRecord],
    ) -> None:
        """The constructor runs again; calls that may be tried again wait for it, others fail."""
        actor.life.move(RESTARTING)
        self.hosting.tell(actor)
        for record in [r for r in actor.sent.values() if self._tasks.is_stopping(r)]:
            self._tasks.fail(record, error_of(record))
        begun = [record for record in begun if record.task_id in actor.sent]
        untouched = [record for record in untouched if record.task_id in actor.sent]
        again: list[TaskRecord] = []
        for record in begun:
            if self._tasks.may_retry(record):
                record.attempts += 1
                self._tasks.observer.on_attempt_lost(record, message, unavailable(actor))
                again.append(record)
        again.extend(r for r in untouched if r.class_queue.task_class.max_retries)
        for record in again:
            self.calls.unsend(actor, record)
        refused = list(actor.sent.values())
        actor.put_back(again)
        self._tasks.lineage.run_again(creation)
        for record in refused:
            self._tasks.fail(record, unavailable(actor))
        self.calls.refuse_ready(actor)

    def on_client_lost(self, client_id: ClientId) -> None:
        """Who made these actors has died: they end, wherever they have handles."""
        for actor_id in list(self._owned.get(client_id, ())):
            actor = self.actors[actor_id]
            if actor.life.state is not DEAD:
                self.kill(actor, "died with its owner: the process that created it has ended")

    def end_in(self, worker_ids: list[WorkerId], reason: str) -> None:
        """These workers are killed: actors that live in them are not made again."""
        for worker_id in worker_ids:
            actor = self.by_worker.get(worker_id)
            if actor is not None:
                self.kill(actor, reason)

    def _move_out(self, actor: Actor) -> None:
        """The worker is not the actor's any more."""
        if actor.worker is not None:
            del self.by_worker[actor.worker.worker_id]
            actor.worker = None
        actor.packets.clear()

    def bury(self, actor: Actor, error: bytes, *, may_restart: bool = False) -> None:
        """It is dead: its calls fail, its name is free, what it was made with is let go."""
        message = actor.message
        actor.life.move(DEAD)
        actor.death, actor.host = error, None
        self.by_creation.pop(message.task.task_id, None)
        owned = self._owned.get(actor.owner)
        if owned is not None and owned.pop(message.actor_id, 0) is None and not owned:
            del self._owned[actor.owner]
        if actor.hosted_for is not None:
            self.hosting.on_hosted_dead(actor, error, may_restart=may_restart)
            actor.is_freed = True
        self.hosting.tell(actor)
        if actor.hosted_for is None:  # else its keeper tells of it
            self._observer.on_actor_died(row_of(actor))
        creation, actor.creation = actor.creation, None
        if creation is not None and creation.state is SUCCEEDED:
            self._tasks.lineage.drop(creation)
        for record in [*actor.sent.values(), *actor.take_all()]:
            if self._state.tasks.get(record.task_id) is record:
                self._tasks.fail_encoded(record, error, ACTOR_DIED, actor.cause)
        if message.detached and actor.hosted_for is None:
            self._objects.release_all([handle_of(message.actor_id)])
            self._objects.release_references(ADOPTER, [handle_of(message.actor_id)])
        self.after_call(actor)

    def _forget(self, actor: Actor) -> None:
        """It is dead, and nobody has a handle to it."""
        self.actors.pop(actor.message.actor_id, None)

    # ---- looking in ------------------------------------------------------------------------------

    def has_detached(self, group_id: GroupId) -> bool:
        """Whether a detached actor that is not dead belongs to these workers."""
        for actor in self.actors.values():
            if actor.message.detached and actor.life.state is not DEAD:
                queue = self._state.classes.get(actor.message.task.class_id)
                if queue is not None and queue.task_class.group_id == group_id:
                    return True
        return self.hosting.creations.expects_in(group_id)

    def kept_creations(self) -> Iterator[TaskRecord]:
        """Constructors' calls that are over and kept with the actors that they made."""
        for actor in self.actors.values():
            if actor.creation is not None and actor.creation.state is SUCCEEDED:
                yield actor.creation

    def holds(self) -> Iterable[ObjectId]:
        """What detached actors hold of themselves."""
        return [
            handle_of(actor_id)
            for actor_id, actor in self.actors.items()
            if actor.message.detached and actor.life.state is not DEAD and actor.hosted_for is None
        ] + [*self.elsewhere.holds(), *self.hosting.creations.holds()]

    def pins(self) -> Iterator[ObjectId]:
        """Objects in memory that workers look at for calls that were sent."""
        for actor in self.actors.values():
            for pins in actor.pins.values():
                yield from pins

    def rows(self) -> Iterator[ActorRow]:
        """What those who look on are told of actors that are not dead."""
        for actor in self.actors.values():
            if actor.life.state is not DEAD and actor.hosted_for is None:
                yield row_of(actor)

    def running(self) -> Iterator[TaskId]:
        """Calls that workers are at."""
        for actor in self.by_worker.values():
            yield from running_calls(actor)

    def count(self) -> int:
        """Actors that are not dead."""
        return sum(actor.life.state is not DEAD for actor in self.actors.values())

    def check_invariants(self) -> None:
        """Raise AssertionError when actors, workers and calls do not agree."""
        state = self._state
        calls = dict.fromkeys(self.actors, 0)
        for record in state.tasks.values():
            if record.actor_id in calls and not record.is_elsewhere:
                calls[record.actor_id] += 1
        for actor_id, actor in self.actors.items():
            life = actor.life.state
            assert actor.unfinished == calls[actor_id], "count of an actor's calls"
            assert (life is ALIVE) <= (actor.worker is not None or actor.host is not None)
            assert actor.worker is None or life is ALIVE
            assert actor.host is None or life in (ALIVE, RESTARTING)
            assert actor.host is None or not actor.sent
            assert life is not DEAD or not actor.unfinished, "a call of a dead actor waits"
            assert life is DEAD or self.by_creation[actor.message.task.task_id] is actor
            assert (
                actor.hosted_for is not None
                or (handle_of(actor_id) in self._objects.handles) != actor.is_freed
            )
            assert not (life is DEAD and actor.is_freed), "a dead actor without handles is kept"
            assert life in (PENDING, RESTARTING) or not (
                actor.creation is not None and actor.creation.task_id in state.tasks
            )
            for lane in actor.lanes.values():
                lane.order.check_invariants()
            self._check_sent(actor)
        for worker_id, actor in self.by_worker.items():
            assert actor.worker is not None
            assert actor.worker is state.workers[worker_id]
            assert actor.worker.state is _ACTOR
            assert actor.worker.lease is not None
        assert all(owned for owned in self._owned.values())

    def _check_sent(self, actor: Actor) -> None:
        for task_id, record in actor.sent.items():
            assert record.state is RUNNING
            assert self._state.tasks[task_id] is record
            assert actor.worker is not None
            assert record.worker_id == actor.worker.worker_id
        if actor.is_serial:
            assert len(actor.packets) <= self._state.config.packets_per_worker_max
            in_packets = {r.task_id for _, records in actor.packets for r in records}
            assert actor.sent.keys() <= in_packets, "a call that was sent is in no packet"
        for lane in actor.lanes.values():
            for record in lane.order.ready:
                assert record.state is QUEUED, "a call that may be sent is not queued"
                assert actor.lane_of(record) is lane
        sent = [actor.lane_of(record) for record in actor.sent.values()]
        assert all(lane.sent == sent.count(lane) for lane in actor.lanes.values())
