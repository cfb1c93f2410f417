"""Actors that one node keeps and another one hosts.

    keeper: CreateActor, its arguments, restarts ──ForwardedTask──▶ host: the process, its calls
              ▲  ▲                                 ◀─result, HostedEnded──
              │  └── RestartActor, KeepActor, … ── head ◀── ActorChanged ── keeper

What: what becomes of a constructor's call that ran on another node, what a keeper is told by hosts
and by the head, and what a host is told by keepers.
Who calls: `node/tasks.py` with results of constructors, `node/peers.py` with what travels,
`node/node.py` with messages of peers and head; `node/actors.py` when an actor is born or dies.
May touch: nothing.
Invariants: an actor has one keeper, which alone reports to the head; a host never makes an actor
again by itself; after the keeper's death a host keeps a detached actor only if the head says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from poolray.actors.lifecycle import ALIVE, DEAD, PENDING, RESTARTING
from poolray.exceptions import ActorDiedError
from poolray.ids import ActorId, ClientId, NodeId, handle_of
from poolray.node.actor_record import Actor, restarts_text
from poolray.node.actors_elsewhere import ADOPTER, ActorsElsewhere
from poolray.node.borrowing import Borrowing, client_of
from poolray.node.creations import Creations
from poolray.node.effects import SendHead, SendPeer
from poolray.node.functions import Functions
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.node.tasks import Tasks
from poolray.objects.directory import ObjectRecord
from poolray.protocol.actors import CreateActor, KillActor, LookUpActor
from poolray.protocol.directory import (
    ActorAt,
    ActorChanged,
    ActorEntry,
    ActorStage,
    Creation,
    DropActor,
    KeepActor,
    KillActorEntry,
    KillKept,
    RegisterActor,
    RestartActor,
    UnwatchActor,
    WatchActor,
)
from poolray.protocol.node import (
    AskHandle,
    EndHosted,
    ForwardedTask,
    HandleLent,
    HostedEnded,
    PeerMessage,
)
from poolray.protocol.values import Outcome
from poolray.tasks.lifecycle import FAILED, FORWARDED, SUCCEEDED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors

#: Dead actors that a new head is told of.
_DEAD_MAX = 1_000

_STAGES = {
    PENDING: ActorStage.PENDING,
    ALIVE: ActorStage.ALIVE,
    RESTARTING: ActorStage.RESTARTING,
    DEAD: ActorStage.DEAD,
}


@final
class _Wanted:
    """A client's request for a handle to an actor that it has found by its name."""

    __slots__ = ("client_id", "entry", "request_id")

    def __init__(self, client_id: ClientId, request_id: int, entry: ActorEntry) -> None:
        self.client_id = client_id
        self.request_id = request_id
        #: The actor as the head had it.
        self.entry = entry


@final
class Hosting:
    """The side of a node's actors that other nodes and the head see."""

    __slots__ = (
        "_asked_by",
        "_dead",
        "_doubts",
        "_elsewhere",
        "_functions",
        "_local",
        "_objects",
        "_orphans",
        "_state",
        "_tasks",
        "_wanted",
        "borrowing",
        "creations",
        "is_cluster",
    )

    def __init__(
        self,
        state: NodeState,
        objects: Objects,
        tasks: Tasks,
        functions: Functions,
        local: Actors,
        elsewhere: ActorsElsewhere,
        *,
        is_cluster: bool,
    ) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self._functions = functions
        self._local = local
        self._elsewhere = elsewhere
        self.borrowing: Borrowing
        self.creations = Creations(state, tasks.store, objects)
        self.creations.local, self.creations.keep = local, self._keep
        #: Actors that we kept and that died, the last ones.
        self._dead: dict[ActorId, None] = {}
        #: Detached actors that live here and whose keeper is dead: the head is asked what of them.
        self._orphans: dict[ActorId, None] = {}
        #: There is a head that other nodes listen to; else it is told of names alone.
        self.is_cluster = is_cluster
        #: actor that another node keeps, or this one is about to -> requests of clients here for a
        #: handle to it.
        self._wanted: dict[ActorId, list[_Wanted]] = {}
        #: (peer, namespace, name) of a handle that it wants -> the actor that it means, of which
        #: the head is asked.
        self._doubts: dict[tuple[NodeId, str, str], ActorId] = {}
        #: actor that this node is about to keep -> peers that want a handle to it.
        self._asked_by: dict[ActorId, dict[NodeId, None]] = {}

    def _send(self, node_id: NodeId, message: PeerMessage) -> None:
        if node_id not in self.borrowing.dead:
            self._state.effects.append(SendPeer(node_id, message))

    # ---- what the head is told -------------------------------------------------------------------

    def entry_of(self, message: CreateActor, actor: Actor | None = None) -> ActorEntry:
        """An actor that we keep as the cluster's directory has it."""
        host = b"" if actor is None or actor.host is None else actor.host
        if actor is not None and actor.life.state is ALIVE:
            host = host or self._state.node_id
        return ActorEntry(
            actor_id=message.actor_id,
            class_name=message.class_name,
            name=message.name,
            namespace=message.namespace,
            detached=message.detached,
            max_restarts=message.max_restarts,
            keeper=self._state.node_id,
            ordered=message.ordered,
            host=NodeId(host),
            stage=ActorStage.PENDING if actor is None else _STAGES[actor.life.state],
            restarts=actor.creation.attempts if actor is not None and actor.creation else 0,
            pid=0 if actor is None else actor.pid,
            description=message.description,
            creation=self.creations.recipe(message)
            if message.detached and self.is_cluster
            else None,
        )

    def on_born(self, actor: Actor) -> None:
        """An actor without a name is wanted: the head hears of it, so that others find it."""
        if self.is_cluster and not actor.message.name:
            entry = self.entry_of(actor.message)
            self._state.effects.append(SendHead(RegisterActor(request_id=0, entry=entry)))

    def tell(self, actor: Actor) -> None:
        """An actor that we keep is at another point of its life."""
        life = actor.life.state
        is_dead = life is DEAD
        message = actor.message
        if actor.hosted_for is not None:
            return
        if is_dead and self.is_cluster:
            self._dead[message.actor_id] = None
            if len(self._dead) > _DEAD_MAX:
                del self._dead[next(iter(self._dead))]
        if self.is_cluster or (message.name and is_dead):
            host = (actor.host or self._state.node_id) if life is ALIVE else b""
            change = ActorChanged(
                actor_id=message.actor_id,
                stage=_STAGES[life],
                host=NodeId(host),
                pid=actor.pid,
                restarts=actor.creation.attempts if actor.creation is not None else 0,
                death=actor.death,
            )
            self._state.effects.append(SendHead(change))
        if self._elsewhere.find(message.actor_id) is not None:
            self._elsewhere.on_place(
                ActorAt(
                    actor_id=message.actor_id,
                    stage=_STAGES[life],
                    host=NodeId((actor.host or self._state.node_id) if life is ALIVE else b""),
                    death=actor.death,
                    class_name=message.class_name,
                    ordered=message.ordered,
                )
            )

    def dead(self) -> list[ActorId]:
        """The last of the actors that we kept and that died, for a head that may not know."""
        return list(self._dead)

    def entries(self) -> list[ActorEntry]:
        """The actors that we keep, for a head that may not know."""
        return [
            self.entry_of(actor.message, actor)
            for actor in self._local.actors.values()
            if actor.hosted_for is None and actor.life.state is not DEAD
        ]

    # ---- keeping ---------------------------------------------------------------------------------

    def on_created(self, record: TaskRecord, result: bytes | Outcome, writer: ClientId) -> None:
        """The constructor has run on another node."""
        actor = self._local.by_creation[record.task_id]
        if isinstance(result, bytes):
            assert record.node_id is not None
            actor.host = actor.lived_at = record.node_id
            actor.pid = int(result or b"0")
            record.node_id = None
            self._local.end_creation(record)
            self._local.come_alive(actor, record)
            return
        if result.retriable and self._tasks.may_retry(record):  # it lost its worker
            self._tasks.discard(result, writer)
            record.attempts += 1
            if not self._tasks.retries.delay(record):
                self._tasks.try_again(record)
            return
        error = result.values[0]
        if not isinstance(error, bytes):
            self._tasks.discard(result, writer)
            text = "did not survive its constructor, whose error is too large to be shown."
            error = self._state.encode_error(self._died(actor, text))
        record.move(FAILED)
        self._local.on_creation_failed(record, error)
        self._tasks.end(record)

    def on_hosted_ended(self, node_id: NodeId, message: HostedEnded) -> None:
        """An actor of ours has ended on its host."""
        actor = self._local.actors.get(message.actor_id)
        if actor is None or actor.host != node_id or actor.life.state is not ALIVE:
            return
        actor.host = None
        creation = actor.creation
        if (
            message.may_restart
            and creation is not None
            and (actor.unfinished or not actor.is_freed)
            and self._tasks.may_retry(creation)
            and self._tasks.usable_group(creation) is not None
        ):
            self._restart(actor, creation)
        else:
            self._local.bury(actor, message.error)

    def _restart(self, actor: Actor, creation: TaskRecord) -> None:
        if actor.life.state is ALIVE:
            actor.life.move(RESTARTING)
        self.tell(actor)
        self._tasks.lineage.run_again(creation)

    def on_restart(self, message: RestartActor) -> None:
        """The head says that an actor's node is dead, and that it is to be made again."""
        actor = self._local.actors.get(message.actor_id)
        if actor is None or actor.life.state is DEAD or actor.hosted_for is not None:
            return
        creation = actor.creation
        if creation is None or creation.state is not SUCCEEDED or actor.host is None:
            return  # it is being made again already
        actor.host = None
        if self._tasks.usable_group(creation) is None:
            self._local.bury(actor, self._state.encode_error(self._died(actor, "has no node.")))
            return
        creation.attempts = message.restarts - 1  # `run_again` counts this one
        self._restart(actor, creation)

    def on_place(self, message: ActorAt) -> None:
        """The head says where an actor is, or that it is dead."""
        actor = self._local.actors.get(message.actor_id)
        if message.actor_id in self._orphans:
            self._decide_orphan(message, actor)
        if actor is not None and actor.hosted_for is None:
            if message.stage is ActorStage.DEAD and actor.life.state is not DEAD:
                actor.host = None
                error = message.death or self._state.encode_error(self._died(actor, message.reason))
                self._local.kill(actor, "", error)
            return
        self._elsewhere.on_place(message)

    def _decide_orphan(self, message: ActorAt, actor: Actor | None) -> None:
        """The head may not have known that it lives here: then it is made again elsewhere."""
        del self._orphans[message.actor_id]
        remote = self._elsewhere.find(message.actor_id)
        if remote is None or not remote.is_watched:
            self._state.effects.append(SendHead(UnwatchActor(actor_id=message.actor_id)))
        is_zombie = actor is not None and actor.hosted_for is not None
        if actor is not None and is_zombie and message.host != self._state.node_id:
            self._local.kill(actor, "was given up with the node that kept it")

    def outstanding(self) -> list[WatchActor]:
        """Questions what of an actor, for a head that has not heard them."""
        return [WatchActor(actor_id=actor_id) for actor_id in self._orphans]

    def on_keep(self, message: KeepActor) -> None:
        """The node that kept a detached actor is dead: now we do."""
        entry = message.entry
        actor = self._local.actors.get(entry.actor_id)
        if actor is not None and actor.hosted_for is None:
            return
        if self._local.is_asked_for(entry.actor_id):
            return  # it is ours: the answer that lets us make it is on its way
        if entry.creation is not None:
            self.creations.take_over(entry, entry.creation)
        elif actor is not None and actor.life.state is ALIVE:
            # It lives on, and will not be made again: nobody has what it was made with.
            creation, actor.creation = actor.creation, None
            self._keep_living(actor, entry)
            if creation is not None:
                self._tasks.lineage.drop(creation)
        else:
            gone = ActorChanged(actor_id=entry.actor_id, stage=ActorStage.DEAD)
            self._state.effects.append(SendHead(gone))

    def _keep(self, entry: ActorEntry, recipe: Creation, kill: KillKept | None) -> None:
        """All that a detached actor is made with is here."""
        actor = self._local.actors.get(entry.actor_id)
        if actor is not None and actor.hosted_for is None:
            return
        client = self._objects.client(ADOPTER)
        self._functions.define(client, recipe.function)
        self._functions.define_class(recipe.task_class)
        if actor is not None and actor.life.state is ALIVE and actor.creation is not None:
            creation = actor.creation
            creation.is_foreign, creation.client_id = False, ADOPTER
            creation.attempts = entry.restarts
            if entry.max_restarts:
                creation.calls = recipe.message.task.calls
                self._tasks.inputs.pin(creation)
            self._keep_living(actor, entry)
        else:
            if actor is not None:
                self._local.kill(actor, "is made again elsewhere")
            self._local.create(ADOPTER, recipe.message, entry.restarts)
        made = self._local.actors.get(entry.actor_id)
        if made is not None:
            made.is_durable = True
        for item in self._wanted.pop(entry.actor_id, ()):
            found = recipe.message.description
            self._local.answer(item.client_id, item.request_id, entry.actor_id, found)
        for node_id in self._asked_by.pop(entry.actor_id, ()):
            self.on_ask_handle(node_id, AskHandle(actor_id=entry.actor_id))
        if kill is not None:
            self.on_kill_kept(kill)

    def _keep_living(self, actor: Actor, entry: ActorEntry) -> None:
        actor.hosted_for = None
        self.own_handle(entry.actor_id)
        self._objects.hold(handle_of(entry.actor_id))
        actor.is_freed = False
        self.tell(actor)

    def own_handle(self, actor_id: ActorId) -> None:
        """Somebody here is about to hold a handle to an actor that we keep."""
        handle = handle_of(actor_id)
        if handle not in self._state.objects:
            self._state.objects[handle] = ObjectRecord()
        self._objects.handles[handle] = actor_id

    def on_kill_kept(self, message: KillKept) -> None:
        """Somebody elsewhere wants an actor killed that we keep."""
        if self.creations.put_off(message):
            return
        kill = KillActor(actor_id=message.actor_id, no_restart=message.no_restart)
        self._local.on_request(ClientId(b""), kill)

    def kill_elsewhere(self, message: KillActor) -> None:
        """Somebody here wants an actor killed that another node keeps."""
        kill = KillActorEntry(actor_id=message.actor_id, no_restart=message.no_restart)
        self._state.effects.append(SendHead(kill))

    def end_hosted(self, actor: Actor, reason: str, *, may_restart: bool = False) -> None:
        """An actor of ours on another node is to end."""
        node_id = actor.host
        creation = actor.creation
        if node_id is None and creation is not None and creation.state is FORWARDED:
            node_id = creation.node_id
        if node_id is not None:
            order = EndHosted(
                actor_id=actor.message.actor_id, reason=reason, may_restart=may_restart
            )
            self._send(node_id, order)

    # ---- hosting ---------------------------------------------------------------------------------

    def on_forwarded(self, node_id: NodeId, task: ForwardedTask) -> bool:
        """A call of an actor's method, or of a constructor, for us to run; False: neither."""
        if task.creation is not None:
            self._host(node_id, task, task.creation)
            return True
        if not task.actor_id:
            return False
        record = self._tasks.record_foreign(client_of(node_id), task.spec, task.attempts)
        self._tasks.inputs.take(record, task.spec)
        actor = self._local.actors.get(task.actor_id)
        if (
            actor is None
            or actor.host is not None
            or (actor.hosted_for is not None and actor.life.state is not ALIVE)
        ):
            self._tasks.give_back(record)  # who calls has yet to hear of that
            return True
        record.actor_id = task.actor_id
        self._local.calls.enter(actor, record)
        return True

    def _host(self, node_id: NodeId, task: ForwardedTask, message: CreateActor) -> None:
        client_id, spec = client_of(node_id), task.spec
        known = self._local.actors.get(message.actor_id)
        if known is not None:  # an earlier life of it that has not ended altogether
            self._local.kill(known, "is made again")
        if message.actor_id in self._local.actors:
            record = self._tasks.record_foreign(client_id, spec, task.attempts)
            self._tasks.give_back(record)
            return
        actor = self._local.actors[message.actor_id] = Actor(message, client_id)
        actor.hosted_for = node_id
        self._local.by_creation[spec.task_id] = actor
        group = self._tasks.submit_foreign(client_id, spec, task.attempts)
        actor.begin(self._state.tasks.get(spec.task_id))
        if group is not None:
            self._tasks.dispatcher.dispatch(group)

    def forget_unborn(self, record: TaskRecord) -> None:
        """An actor that was to live here goes back to its keeper before it was made."""
        actor = self._local.by_creation.pop(record.task_id)
        actor.creation = None
        del self._local.actors[actor.message.actor_id]

    def on_alive(self, actor: Actor, record: TaskRecord) -> None:
        """An actor lives here that another node keeps."""
        result = b"%d" % actor.pid
        self._tasks.peers.send_result(record, result, record.client_id)

    def bounce(self, actor: Actor, begun: list[TaskRecord], error: bytes) -> None:
        """The process of an actor that we hosted has ended: whose calls it had decides on them."""
        for record in begun:
            if self._state.tasks.get(record.task_id) is not record:
                continue
            if record.is_foreign:
                outcome = Outcome(values=[error], is_error=True, retriable=True, crashed=True)
                record.move(FAILED)
                self._tasks.peers.send_result(record, outcome, record.client_id)
                self._tasks.end(record)
            elif self._tasks.may_retry(record):
                record.attempts += 1
            else:
                self._tasks.fail_encoded(record, error)
        self.move_calls(actor)

    def move_calls(self, actor: Actor) -> None:
        """Calls of an actor that does not live here any more: back to who made them."""
        records = [*actor.sent.values(), *actor.take_all()]
        for record in records:
            if self._state.tasks.get(record.task_id) is not record:
                continue
            if record.is_foreign:
                self._tasks.give_back(record)
            elif handle_of(record.actor_id) in self._state.objects:
                self._local.calls.leave(actor, record)
                self._elsewhere.enter(record)
            else:  # its caller has let go of the actor, which goes with its calls
                text = "has died, and nobody can call it any more."
                self._tasks.fail(record, self._died(actor, text))

    def on_end_hosted(self, node_id: NodeId, message: EndHosted) -> None:
        """The keeper of an actor that we host wants it to end."""
        actor = self._local.actors.get(message.actor_id)
        if actor is None or actor.hosted_for != node_id:
            return
        if message.may_restart:
            self._local.terminate(actor)
        elif message.reason:
            self._local.kill(actor, message.reason)
        else:
            actor.is_freed = True
            self._local.after_call(actor)

    def on_hosted_dead(self, actor: Actor, error: bytes, *, may_restart: bool) -> None:
        """An actor that we hosted is dead here."""
        if actor.hosted_for is not None:
            ended = HostedEnded(
                actor_id=actor.message.actor_id, error=error, may_restart=may_restart
            )
            self._send(actor.hosted_for, ended)

    def on_drop(self, message: DropActor) -> None:
        """An actor that we host has lost its owner."""
        actor = self._local.actors.get(message.actor_id)
        if actor is not None and actor.hosted_for is not None:
            self._local.kill(actor, message.reason.rstrip("."))

    # ---- nodes that die --------------------------------------------------------------------------

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: actors that it kept end here, those that it hosted wait for the head."""
        for actor in list(self._local.actors.values()):
            if actor.hosted_for == node_id:
                if not actor.message.detached or actor.life.state is not ALIVE:
                    reason = f"died with its owner: node {node_id.hex()[:12]} is dead"
                    self._local.kill(actor, reason)
                else:
                    actor_id = actor.message.actor_id
                    self._orphans[actor_id] = None
                    self._state.effects.append(SendHead(WatchActor(actor_id=actor_id)))
            elif actor.host == node_id and actor.life.state is ALIVE:
                actor.life.move(RESTARTING)  # `host` says that the head has to decide
        for asking in self._asked_by.values():
            asking.pop(node_id, None)
        for actor_id, wanted in list(self._wanted.items()):
            remaining = [item for item in wanted if item.entry.keeper != node_id]
            if remaining:
                self._wanted[actor_id] = remaining
            else:
                del self._wanted[actor_id]
            for item in wanted:
                if item.entry.keeper == node_id:
                    self._ask_again(item)

    def died_with(self, record: TaskRecord, node_id: NodeId) -> ActorDiedError:
        """What calls get of an actor whose constructor was lost with a node."""
        actor = self._local.by_creation[record.task_id]
        text = f"died in its constructor, with node {node_id.hex()[:12]}"
        return self._died(actor, text + restarts_text(record.attempts - 1) + ".")

    def _died(self, actor: Actor, reason: str) -> ActorDiedError:
        return ActorDiedError(
            actor_id=actor.message.actor_id.hex(),
            class_name=actor.message.class_name,
            reason=reason,
            pid=actor.pid,
        )

    # ---- handles ---------------------------------------------------------------------------------

    def want_handle(self, client_id: ClientId, request_id: int, entry: ActorEntry) -> None:
        """A client has found an actor by its name that another node keeps."""
        handle = handle_of(entry.actor_id)
        if handle in self._state.objects:
            self._local.answer(client_id, request_id, entry.actor_id, entry.description)
            return
        is_coming = entry.keeper == self._state.node_id and self.creations.expects(entry.actor_id)
        if not is_coming and entry.keeper in (b"", self._state.node_id, *self.borrowing.dead):
            self._local.answer(client_id, request_id, None, b"")
            return
        wanted = self._wanted.setdefault(entry.actor_id, [])
        wanted.append(_Wanted(client_id, request_id, entry))
        if len(wanted) == 1 and not is_coming:
            ask = AskHandle(actor_id=entry.actor_id, name=entry.name, namespace=entry.namespace)
            self._send(entry.keeper, ask)

    def _ask_again(self, item: _Wanted) -> None:
        """Who kept an actor does not: the head may know who does now."""
        entry = item.entry
        message = LookUpActor(
            request_id=item.request_id, namespace=entry.namespace, name=entry.name
        )
        self._local.on_request(item.client_id, message)

    def on_ask_handle(self, node_id: NodeId, message: AskHandle) -> None:
        """A peer wants a handle to an actor of ours."""
        if self.creations.expects(message.actor_id):
            self._asked_by.setdefault(message.actor_id, {})[node_id] = None
            return
        if message.name and message.actor_id not in self._local.actors:
            # That we are to keep it may be on its way to us: the head's answer comes after that.
            doubt = (node_id, message.namespace, message.name)
            self._doubts[doubt] = message.actor_id
            look_up = LookUpActor(request_id=0, namespace=message.namespace, name=message.name)
            self._local.on_request(client_of(node_id), look_up)
            return
        handle = handle_of(message.actor_id)
        actor = self._local.actors.get(message.actor_id)
        lent = []
        if actor is not None and actor.life.state is not DEAD and handle in self._state.objects:
            lent = self.borrowing.lend(node_id, [handle], needed=False)
        description = b"" if actor is None else actor.message.description
        reply = HandleLent(actor_id=message.actor_id, lent=lent, description=description)
        self._send(node_id, reply)

    def on_doubt_settled(self, node_id: NodeId, message: LookUpActor) -> None:
        """The head has answered: what it had to say of an actor before is known."""
        actor_id = self._doubts.pop((node_id, message.namespace, message.name), None)
        if actor_id is not None and node_id not in self.borrowing.dead:
            self.on_ask_handle(node_id, AskHandle(actor_id=actor_id))

    def on_handle_lent(self, node_id: NodeId, message: HandleLent) -> None:
        """A handle that we asked for has come, or there is none."""
        fresh = self.borrowing.adopt(node_id, message.lent)
        for item in self._wanted.pop(message.actor_id, ()):
            found = message.actor_id if message.lent else None
            self._local.answer(item.client_id, item.request_id, found, message.description)
        self._objects.release_all(fresh)
