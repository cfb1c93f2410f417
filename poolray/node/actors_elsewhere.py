"""Calls of actors that live on other nodes.

    CallActor ──▶ order ──host is known──▶ forwarded, in order ──results──▶ objects, as of tasks
                    ▲ ▲                        │
     arguments are ─┘ └── the host does not ───┘      ActorAt, from the head: where it is now
     ready                have it any more

What: where each actor is that somebody here has a handle to, and which calls are under way to it;
what becomes of them when its process or its node dies.
Who calls: `node/actors.py` with calls of actors that are not its own; `node/tasks.py` when a call
is ready, tried again or over; `node/node.py` with the head's word.
May touch: nothing.
Invariants: calls go to one host at a time: none is sent to the next one before all that the last
one had are back or over, so that each caller's calls keep their order; a call that may have begun
is sent again only if it may be tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, final

from poolray.actors.call_order import CallOrder
from poolray.exceptions import ActorDiedError, ActorUnavailableError
from poolray.ids import ActorId, ClientId, NodeId, ObjectId, TaskId, actor_of_handle, handle_of
from poolray.node.effects import SendHead
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.protocol.directory import ActorAt, ActorStage, UnwatchActor, WatchActor
from poolray.tasks.lifecycle import FORWARDED, QUEUED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.peers import Peers
    from poolray.node.tasks import Tasks

#: The client that holds what detached actors need whose first keeper is dead.
ADOPTER = ClientId(b"adopter")
#: Calls under way to one actor; more wait here, where they can still be withdrawn.
_UNDER_WAY_MAX = 10_000

_NOWHERE = NodeId(b"")
_ALIVE, _DEAD = ActorStage.ALIVE, ActorStage.DEAD


@final
class RemoteActor:
    """An actor as its callers' node knows it."""

    __slots__ = (
        "actor_id",
        "class_name",
        "death",
        "generation",
        "held_back",
        "host",
        "is_watched",
        "lost",
        "named_by",
        "next_number",
        "order",
        "sent",
        "sent_generation",
        "stage",
        "unfinished",
    )

    def __init__(self, actor_id: ActorId, named_by: NodeId) -> None:
        self.actor_id = actor_id
        self.class_name = ""
        #: Who told us of it.
        self.named_by = named_by
        #: The head, or its keeper here, tells of every change.
        self.is_watched = False
        self.stage = ActorStage.PENDING
        #: Where it lives (ALIVE).
        self.host = NodeId(b"")
        #: Counts the changes of place and stage.
        self.generation = 0
        #: Until the next change nothing is sent: its host did not have it any more.
        self.held_back = False
        #: Calls that were not sent.
        self.order: CallOrder[TaskRecord] = CallOrder(True)
        #: Calls that the host has, in the order of sending, and the generation of the last.
        self.sent: dict[TaskId, TaskRecord] = {}
        self.sent_generation = 0
        #: Calls that were under way when the host's node died, until it is known what of it.
        self.lost: dict[TaskId, TaskRecord] = {}
        #: Number of the next call: those that come back are put in their places again.
        self.next_number = 0
        #: Calls that have not ended; each holds the handle.
        self.unfinished = 0
        #: The error of calls from now on (DEAD).
        self.death = b""


@final
class ActorsElsewhere:
    """The actors of other nodes, as seen from here."""

    __slots__ = ("_actors", "_objects", "_state", "_tasks", "local", "peers")

    def __init__(self, state: NodeState, objects: Objects, tasks: Tasks) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self.local: Actors
        self.peers: Peers
        self._actors: dict[ActorId, RemoteActor] = {}

    def known(self, actor_id: ActorId, named_by: NodeId = _NOWHERE) -> RemoteActor:
        """An actor that somebody here has a handle to."""
        remote = self._actors.get(actor_id)
        if remote is None:
            remote = self._actors[actor_id] = RemoteActor(actor_id, named_by)
        return remote

    def find(self, actor_id: ActorId) -> RemoteActor | None:
        """The same, if it has been called or heard of."""
        return self._actors.get(actor_id)

    def on_handle(self, object_id: ObjectId, node_id: NodeId) -> None:
        """A node has lent an object; maybe it is a handle."""
        actor_id = actor_of_handle(object_id)
        if actor_id is None:
            return
        self._objects.handles[object_id] = actor_id
        self.known(actor_id, node_id)

    def on_freed(self, actor_id: ActorId) -> None:
        """Nobody here has a handle any more; no call is under way, for those hold it."""
        remote = self._actors.pop(actor_id, None)
        if remote is not None and remote.is_watched:
            self._state.effects.append(SendHead(UnwatchActor(actor_id=actor_id)))

    def outstanding(self) -> list[WatchActor]:
        """Questions where actors are, for a head that has not heard them."""
        return [
            WatchActor(actor_id=actor_id, named_by=remote.named_by)
            for actor_id, remote in self._actors.items()
            if remote.is_watched
        ]

    # ---- calls -----------------------------------------------------------------------------------

    def enter(self, record: TaskRecord) -> None:
        """A call of an actor that lives elsewhere, or of which it is not known where."""
        actor_id = record.actor_id
        remote = self.known(actor_id)
        self._objects.hold(handle_of(actor_id))
        record.is_elsewhere = True
        remote.unfinished += 1
        record.sequence = remote.next_number
        remote.next_number += 1
        if not remote.is_watched and not self.local.keeps(actor_id):
            remote.is_watched = True
            watch = WatchActor(actor_id=actor_id, named_by=remote.named_by)
            self._state.effects.append(SendHead(watch))
        if remote.stage is _DEAD:
            self._tasks.fail_encoded(record, remote.death)
        elif remote.stage is ActorStage.RESTARTING and not _may_wait(record):
            self._tasks.fail(record, self._unavailable(remote))
        else:
            waits = record.missing > 0
            if not waits and record.state is not QUEUED:
                record.move(QUEUED)
            remote.order.add(record.client_id, record, waits)
            self._feed(remote)

    def on_ready(self, record: TaskRecord) -> None:
        """The arguments of a call are there."""
        remote = self._actors[record.actor_id]
        record.move(QUEUED)
        remote.order.on_ready(record.client_id, record)
        if remote.stage is ActorStage.RESTARTING:
            self._refuse_ready(remote)
        self._feed(remote)

    def _feed(self, remote: RemoteActor) -> None:
        """Send what may be sent."""
        ready = remote.order.ready
        if remote.stage is not _ALIVE or remote.held_back or not ready:
            return
        if remote.host == self._state.node_id:
            if not remote.sent and self.local.calls.is_here(remote.actor_id):
                self._hand_in(remote)
            return  # (if it is not, it has ended again, as the head is about to say)
        if remote.host in self.peers.dead:
            return  # the head is about to tell
        while ready and len(remote.sent) < _UNDER_WAY_MAX:
            if remote.sent:
                if remote.sent_generation != remote.generation:
                    return  # the last host still has some, or has yet to say so
                if _may_come_back(next(reversed(remote.sent.values()))):
                    return  # what is behind it would run before its next attempt
            record = ready.popleft()
            remote.sent[record.task_id] = record
            remote.sent_generation = remote.generation
            self._tasks.forward(record, remote.host)
            self.peers.send_call(record, remote.host)

    def _hand_in(self, remote: RemoteActor) -> None:
        """It lives here now: the calls that can go to it go to it directly."""
        ready = list(remote.order.ready)
        remote.order.ready.clear()
        for record in ready:
            record.is_elsewhere = False
            remote.unfinished -= 1
            self.local.calls.enter_here(record)
        # (With the last handle it may end; by then the calls are its own.)
        self._objects.release_all([handle_of(remote.actor_id)] * len(ready))

    def _put_back(self, remote: RemoteActor, record: TaskRecord) -> None:
        """A call that was sent goes back to its place among those that were not."""
        remote.sent.pop(record.task_id, None)
        record.move(QUEUED)
        record.node_id = None
        ready = remote.order.ready
        at = next((i for i, other in enumerate(ready) if other.sequence > record.sequence), None)
        ready.insert(len(ready) if at is None else at, record)

    def try_again(self, record: TaskRecord, *, returned: bool) -> None:
        """A call came back: it raised what may be tried again, lost its worker, or (`returned`)
        the host does not have the actor any more.
        """
        remote = self._actors[record.actor_id]
        was_current = remote.sent_generation == remote.generation
        self._put_back(remote, record)
        if remote.stage is _DEAD:
            remote.order.remove(record.client_id, record)
            self._tasks.fail_encoded(record, remote.death)
            return
        if returned:
            # Its host has lost it, and said so to the head before, or is about to.
            remote.held_back = remote.held_back or was_current
            if not _may_wait(record) and remote.stage is ActorStage.RESTARTING:
                remote.order.remove(record.client_id, record)
                self._tasks.fail(record, self._unavailable(remote))
                return
        self._feed(remote)

    def on_host_died(self, record: TaskRecord) -> None:
        """The node that had a call is dead; the head tells in a moment what of the actor."""
        remote = self._actors[record.actor_id]
        self._put_back(remote, record)
        if remote.stage is _DEAD:
            remote.order.remove(record.client_id, record)
            self._tasks.fail_encoded(record, remote.death)
            return
        remote.lost[record.task_id] = record
        remote.held_back = True

    def withdraw(self, record: TaskRecord) -> None:
        """A call that was not sent is not wanted any more; the caller ends it."""
        remote = self._actors.get(record.actor_id)
        if remote is not None and record.state is not FORWARDED:
            remote.order.remove(record.client_id, record)
            if remote.stage is ActorStage.RESTARTING:
                self._refuse_ready(remote)
            self._feed(remote)

    def on_ended(self, record: TaskRecord) -> bool:
        """A call is over; False when it was none of ours."""
        if not record.is_elsewhere:
            return False
        remote = self._actors[record.actor_id]
        remote.sent.pop(record.task_id, None)
        remote.lost.pop(record.task_id, None)
        remote.unfinished -= 1
        if remote.order.ready:
            self._feed(remote)
        self._objects.release_all([handle_of(remote.actor_id)])
        return True

    # ---- where actors are ------------------------------------------------------------------------

    def on_place(self, message: ActorAt) -> None:
        """An actor is somewhere else, or at another point of its life."""
        remote = self._actors.get(message.actor_id)
        if remote is None or remote.stage is _DEAD:
            return
        remote.class_name = message.class_name or remote.class_name
        remote.stage, remote.host = message.stage, message.host
        remote.generation += 1
        remote.held_back = False
        if message.stage is not ActorStage.PENDING:
            self._set_order(remote, message.ordered)
        if message.stage is _DEAD:
            remote.is_watched = False
            remote.death = message.death or self._state.encode_error(
                self._died(remote, message.reason)
            )
            self._fail_all(remote)
            return
        self._decide_lost(remote)
        if message.stage is ActorStage.RESTARTING:
            self._refuse_ready(remote)
        self._feed(remote)

    def _set_order(self, remote: RemoteActor, ordered: bool) -> None:
        """Whether calls wait for each other is known with the actor's first place."""
        if remote.order.ordered == ordered:
            return
        calls = remote.order.take_all()
        remote.order = CallOrder(ordered)
        for record in sorted(calls, key=lambda call: call.sequence):
            remote.order.add(record.client_id, record, record.missing > 0)

    def _decide_lost(self, remote: RemoteActor) -> None:
        """Calls that a dead node had begun, for all we know."""
        lost, remote.lost = remote.lost, {}
        for record in lost.values():
            if self._tasks.may_retry(record):
                record.attempts += 1
            else:
                remote.order.remove(record.client_id, record)
                self._tasks.fail(record, self._unavailable(remote))

    def _fail_all(self, remote: RemoteActor) -> None:
        remote.lost.clear()
        # (What its last host still has comes back by itself.)
        for record in remote.order.take_all():
            if self._state.tasks.get(record.task_id) is record:
                self._tasks.fail_encoded(record, remote.death)

    def _refuse_ready(self, remote: RemoteActor) -> None:
        ready = remote.order.ready
        for record in [record for record in ready if not _may_wait(record)]:
            if record in ready:
                ready.remove(record)
                self._tasks.fail(record, self._unavailable(remote))

    # ---- errors ----------------------------------------------------------------------------------

    def _died(self, remote: RemoteActor, reason: str) -> ActorDiedError:
        return ActorDiedError(
            actor_id=remote.actor_id.hex(),
            class_name=remote.class_name,
            reason=reason or "is dead.",
        )

    def _unavailable(self, remote: RemoteActor) -> ActorUnavailableError:
        return ActorUnavailableError(
            actor_id=remote.actor_id.hex(),
            class_name=remote.class_name,
            reason="is unavailable: its process or its node died and it is being restarted. The "
            "call may or may not have run; call again, or allow max_task_retries=.",
        )

    # ---- looking in ------------------------------------------------------------------------------

    def holds(self) -> Iterator[ObjectId]:
        """Handles that calls under way hold."""
        for actor_id, remote in self._actors.items():
            for _ in range(remote.unfinished):
                yield handle_of(actor_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when calls are in no place, or in two."""
        counts = dict.fromkeys(self._actors, 0)
        for record in self._state.tasks.values():
            if record.is_elsewhere:
                counts[record.actor_id] += 1
        for actor_id, remote in self._actors.items():
            assert remote.unfinished == counts[actor_id], "count of calls to an actor elsewhere"
            remote.order.check_invariants()
            for task_id, record in remote.sent.items():
                assert record.state is FORWARDED
                assert self._state.tasks[task_id] is record
            numbers = [record.sequence for record in remote.order.ready]
            callers = {record.client_id for record in remote.order.ready}
            for caller in callers:
                mine = [r.sequence for r in remote.order.ready if r.client_id == caller]
                assert mine == sorted(mine), f"calls out of order: {numbers}"
            assert all(record.state is QUEUED for record in remote.order.ready)
            assert handle_of(actor_id) in self._state.objects, "an actor without handles is kept"


def _may_wait(record: TaskRecord) -> bool:
    """Whether a call may wait until its actor is made again."""
    return bool(record.class_queue.task_class.max_retries)


def _may_come_back(record: TaskRecord) -> bool:
    """Whether what a call raises may be tried again."""
    return bool(record.class_queue.task_class.retry_exceptions)
