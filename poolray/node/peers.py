"""Other nodes: tasks given to them and taken from them.

What: which peer gets a task that does not fit here, what a forwarded task becomes, and what a
peer's death means. What travels with tasks is `node/borrowing.py`'s affair, bytes of objects that
of `node/transfers.py`.
Who calls: `node/node.py` with peers' and the head's messages; the dispatcher with tasks that wait.
May touch: nothing.
Invariants: a task is forwarded once (its executor queues it, it never passes it on); a result in
another node's arena is kept there, for this node as a client, until the record here is freed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

import msgspec

from poolray.ids import ClientId, GroupId, NodeId, ObjectId, TaskId
from poolray.node.ahead import Ahead
from poolray.node.borrowing import Borrowing, client_of, is_peer, node_of
from poolray.node.effects import SendPeer
from poolray.node.functions import Functions
from poolray.node.objects import Objects
from poolray.node.placing import Placing
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.node.tasks import Tasks
from poolray.node.transfers import Transfers
from poolray.node.workers import Group
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.node import (
    CancelForwarded,
    ForwardedItems,
    ForwardedResult,
    ForwardedResults,
    ForwardedTask,
    ForwardTasks,
    NodeView,
    PeerMessage,
    ReturnTasks,
)
from poolray.protocol.streams import Yielded
from poolray.protocol.values import (
    CallKind,
    Delivery,
    FunctionDefinition,
    InArena,
    Outcome,
    TaskSpec,
    Value,
)
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import DELAYED, FORWARDED, QUEUED, WAITING, TaskRecord

if TYPE_CHECKING:
    from poolray.node.actors import Actors
    from poolray.node.cancellation import Cancellation
    from poolray.node.draining import Draining
    from poolray.node.streams import Streams

#: Dead peers remembered; the first are forgotten when there are more.
_DEAD_MAX = 4096
#: Of those, the ones that are still shown to who looks on.
_GONE_MAX = 100
#: Others' tasks that do not fit here go back when they have waited for so long, at most twice.
_STRANDED_S = 0.5


@final
class Peers:
    """The side of a node that faces other nodes."""

    __slots__ = (
        "_functions",
        "_look_s",
        "_objects",
        "_state",
        "_tasks",
        "_unbegun",
        "actors",
        "ahead",
        "borrowing",
        "cancellation",
        "dead",
        "draining",
        "gone",
        "own",
        "placing",
        "streams",
        "transfers",
        "views",
    )

    def __init__(
        self, state: NodeState, store: Store, objects: Objects, tasks: Tasks, functions: Functions
    ) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self._functions = functions
        self.cancellation: Cancellation
        self.streams: Streams
        self.actors: Actors
        self.draining: Draining
        #: Live peers as the head saw them last, less what was forwarded since.
        self.views: dict[NodeId, NodeView] = {}
        #: This node as the head sees it, once it has said so.
        self.own: NodeView | None = None
        #: Peers that died or left, as they were last; for those who look on.
        self.gone: dict[NodeId, NodeView] = {}
        #: Peers that are dead for good; what still comes from them is ignored.
        self.dead: dict[NodeId, None] = {}
        #: Others' tasks that had not begun when we looked last -> whether they did not fit then.
        self._unbegun: dict[TaskId, bool] = {}
        #: When to look again.
        self._look_s = 0.0
        self.placing = Placing(state, self.views)
        self.ahead = Ahead(state, self.placing)
        self.transfers = Transfers(state, store, objects, self.dead)
        self.borrowing = Borrowing(state, store, objects, self.dead)
        self.borrowing.tasks = self.transfers.tasks = tasks
        self.borrowing.transfers, self.transfers.borrowing = self.transfers, self.borrowing

    # ---- giving tasks away -----------------------------------------------------------------------

    def try_forward(self, queue: ClassQueue) -> bool:
        """Give the first task of a queue, which cannot run here, to a peer that has room now."""
        return self._forward(queue, self.placing.in_place_of_here)

    def place_elsewhere(self, queue: ClassQueue) -> bool:
        """Give the first task of a queue to a peer, if one is better for it than this node."""
        return self._forward(queue, self.placing.before_here)

    def _forward(self, queue: ClassQueue, choose: Callable[[ClassQueue], NodeId | None]) -> bool:
        if not self.views or not queue.queued_calls:
            return False
        record = queue.first()
        functions = self._definitions(queue)
        if functions is None or not self._may_travel(record):
            return False
        target = choose(queue)
        has_room = target is not None
        if target is None:
            target = self.ahead.choose(queue)
            if target is None or not self.placing.is_open(target):
                return False
        queue.queue.popleft()
        queue.queued_calls -= 1
        self.give(record, target, functions, has_room=has_room)
        return True

    def give(
        self,
        record: TaskRecord,
        target: NodeId,
        functions: list[FunctionDefinition],
        *,
        has_room: bool = True,
    ) -> None:
        """A task goes to a peer, which has room for it or keeps it in stock."""
        if has_room:
            self.placing.charge(target, record.class_queue.demand)
        self.ahead.on_given(record.task_id, record.class_queue, target, has_room)
        self._tasks.forward(record, target)
        self._send(record, target, functions)

    def follow_arguments(self, record: TaskRecord) -> bool:
        """Give a task to the peer that has most bytes of its arguments, rather than fetch them."""
        queue = record.class_queue
        if queue.task_class.placement is not None or not self.views:
            return False
        held: dict[NodeId, int] = {}
        here = 0
        for object_id in record.dependencies:
            target = self._state.objects[object_id]
            value = target.value
            if target.state is not READY or isinstance(value, bytes):
                continue
            location = target.location()
            if location is None:
                here += value.size_bytes
            else:
                held[location] = held.get(location, 0) + value.size_bytes
        best = max(held, key=lambda node_id: held[node_id], default=None)
        if best is None or held[best] <= here or not self.placing.has_room(best, queue):
            return False
        functions = self._definitions(queue)
        if functions is None or not self._may_travel(record):
            return False
        self.give(record, best, functions)
        return True

    def _definitions(self, queue: ClassQueue) -> list[FunctionDefinition] | None:
        """What another node needs to know of a class; None when that is not here."""
        function_id = queue.task_class.function_id
        if not function_id:
            return []
        definition = self._state.functions.get(function_id)
        return None if definition is None else [definition]

    def _may_travel(self, record: TaskRecord) -> bool:
        """Whether a task can run elsewhere: all that it needs goes along by value or by place."""
        return record.class_queue.task_class.delivery is Delivery.OBJECTS and not record.is_foreign

    def _send(
        self, record: TaskRecord, node_id: NodeId, functions: list[FunctionDefinition]
    ) -> None:
        task_class = record.class_queue.task_class
        payload = record.calls[0]
        behind = [payload.object_id] if not isinstance(payload, bytes) else []
        sent = []
        for definition in functions:
            blob = definition.blob
            if not isinstance(blob, bytes):
                behind.append(blob.object_id)
                blob = self.borrowing.portable(blob, blob.object_id, 0)
                definition = msgspec.structs.replace(definition, blob=blob)
            sent.append(definition)
        calls: list[Value] = [
            call if isinstance(call, bytes) else self.borrowing.portable(call, call.object_id, 0)
            for call in record.calls
        ]
        spec = TaskSpec(
            task_id=record.root_id,
            class_id=task_class.class_id,
            calls=calls,
            dependencies=record.dependencies,
            slots=record.slots,
            borrows=[*record.borrows, *behind],
        )
        needed = [*record.dependencies, *behind]
        lent = self.borrowing.lend(node_id, needed, needed=True)
        lent += self.borrowing.lend(node_id, record.borrows, needed=False)
        is_creation = task_class.kind is CallKind.CREATE
        task = ForwardedTask(
            spec=spec,
            attempts=record.attempts,
            lent=lent,
            actor_id=record.actor_id,
            creation=self.actors.by_creation[record.task_id].message if is_creation else None,
        )
        message = ForwardTasks(tasks=[task], classes=[task_class], functions=sent)
        self._send_together(node_id, message)
        self.streams.on_forwarded(record, node_id)

    def _send_together(self, node_id: NodeId, message: ForwardTasks | ForwardedResults) -> None:
        """Send a message, with the one before it if that may be."""
        effects = self._state.effects
        last = effects[-1] if effects else None
        if (
            type(last) is not SendPeer
            or last.node_id != node_id
            or not absorb(last.message, message)
        ):
            effects.append(SendPeer(node_id, message))

    def send_call(self, record: TaskRecord, node_id: NodeId) -> None:
        """A call of an actor goes to the node that it lives on."""
        self._send(record, node_id, [])

    def on_results(self, node_id: NodeId, message: ForwardedResults) -> bool:
        """What came of tasks that we gave away; True: there may be room for others now."""
        writer, may_have_room = client_of(node_id), False
        for item in message.results:
            is_refused = item.returned and not self.ahead.was_asked_back(item.task_id)
            may_have_room |= not is_refused
            fresh = self.borrowing.adopt(node_id, item.lent)
            freed = self.ahead.on_back(item.task_id, node_id, has_run=not item.returned)
            record = self._state.tasks.get(item.task_id)
            is_free = {} if freed is None else freed.demand
            if record is None or record.state is not FORWARDED or record.node_id != node_id:
                if not isinstance(item.result, bytes):
                    for value in item.result.values:
                        self._objects.discard(value, writer)
            else:
                queue = record.class_queue
                if item.estimate_s:
                    queue.report(1, item.estimate_s)
                if item.returned:
                    placement = queue.task_class.placement
                    if (
                        is_refused
                        and (placement is None or not placement.node_id)
                        and self.placing.refuse(node_id, queue.demand)
                    ):
                        is_free, may_have_room = {}, True
                    self._tasks.losses.on_returned(record)
                else:
                    self._tasks.finish(record, item.result, writer)
                    if queue.task_class.kind is CallKind.CREATE and type(item.result) is bytes:
                        kept = queue.task_class.resources  # (often less than it was placed with)
                        is_free = {n: q - kept.get(n, 0) for n, q in is_free.items()}
            if is_free:  # (Afterwards, for the same reason.)
                self.placing.discharge(node_id, is_free)
            self._objects.release_all(fresh)  # the values hold them now
        return may_have_room

    def on_return_tasks(self, node_id: NodeId, message: ReturnTasks) -> None:
        """A peer wants back what we have not begun of a class."""
        queue = self._state.classes.get(message.class_id)
        if queue is not None:
            client_id = client_of(node_id)
            waiting = [record for record in queue.queue if record not in queue.removed]
            for record in waiting:
                if record.is_foreign and record.client_id == client_id:
                    self._tasks.return_unbegun(record)

    def on_items(self, node_id: NodeId, message: ForwardedItems) -> None:
        """What a generator that we gave away has yielded there."""
        writer, items = client_of(node_id), message.items
        fresh = self.borrowing.adopt(node_id, message.lent)
        record = self._state.tasks.get(items.task_id)
        if record is None or record.state is not FORWARDED or record.node_id != node_id:
            self.streams.discard(items, writer)
        else:
            self.streams.store(record, items, writer)
        self._objects.release_all(fresh)  # the values hold them now

    # ---- running others' tasks -------------------------------------------------------------------

    def on_forwarded(self, node_id: NodeId, message: ForwardTasks) -> None:
        """Another node's tasks to run here."""
        client_id = client_of(node_id)
        client = self._objects.client(client_id)
        for task_class in message.classes:
            self._functions.define_class(task_class)
        groups: dict[GroupId, Group] = {}
        for task in message.tasks:
            fresh = self.borrowing.adopt(node_id, task.lent)
            for definition in message.functions:
                self._functions.define(client, definition)
            spec = task.spec
            if not task.actor_id:
                self._unbegun[spec.task_id] = False
            if self.draining.is_draining and not task.actor_id:
                record = self._tasks.record_foreign(client_id, spec, task.attempts)
                self._tasks.give_back(record)
            elif spec.task_id not in self._state.tasks and not self.actors.hosting.on_forwarded(
                node_id, task
            ):
                group = self._tasks.submit_foreign(client_id, spec, task.attempts)
                if group is not None:
                    groups[group.group_id] = group
            # (Else: the link delivers once, so its owner does not remember giving it to us.)
            self._objects.release_all(fresh)  # the task holds them now
        for group in groups.values():
            self._tasks.dispatcher.dispatch(group)

    def return_stranded(self) -> None:
        """Give back others' tasks that have waited for a while and do not fit now.

        A placement group, an actor or something long has taken what was free when they were sent,
        and may keep it for ever; their owner knows of other nodes, and waits for room here as well.
        """
        state = self._state
        if not self._unbegun or state.now < self._look_s:
            return
        self._look_s = state.now + _STRANDED_S
        for task_id, has_waited in list(self._unbegun.items()):
            record = state.tasks.get(task_id)
            if record is None or record.state not in (QUEUED, WAITING, DELAYED):
                del self._unbegun[task_id]
                continue
            queue = record.class_queue
            placement = queue.task_class.placement
            if (
                record.state is not QUEUED
                or (placement is not None and bool(placement.node_id))
                or state.resources.fits_now(queue.demand)
            ):
                self._unbegun[task_id] = False
            elif has_waited:
                del self._unbegun[task_id]
                self._tasks.return_unbegun(record)
            else:
                self._unbegun[task_id] = True

    def on_cancel(self, node_id: NodeId, message: CancelForwarded) -> None:
        """The owner of a task wants it stopped."""
        record = self._state.tasks.get(message.task_id)
        if record is not None and record.is_foreign and record.client_id == client_of(node_id):
            self.cancellation.cancel(message.task_id, message.force, message.recursive)

    def send_result(self, record: TaskRecord, result: bytes | Outcome, writer: ClientId) -> None:
        """Tell the owner what came of its task; what is large stays here for it."""
        self.streams.forget_source(record.task_id)
        node_id = node_of(record.client_id)
        if node_id in self.dead:
            self._tasks.discard(result, writer)
            return
        if isinstance(result, bytes):
            estimate_s = record.class_queue.estimate_s or 0.0
            item = ForwardedResult(task_id=record.root_id, result=result, estimate_s=estimate_s)
            self._answer(node_id, item)
            return
        # (The items that a list of items refers to are known to the owner alone.)
        found = [] if record.class_queue.task_class.stream else result.contained
        values: list[Value] = []
        for index, value in enumerate(result.values):
            inner = found[index] if index < len(found) else []
            if isinstance(value, bytes):
                values.append(value)
                continue
            self.borrowing.keep_result(node_id, value, writer, inner)
            values.append(self.borrowing.portable(value, value.object_id, 0))
        contained = [object_id for inner in found for object_id in inner]
        outcome = msgspec.structs.replace(result, values=values)
        lent = self.borrowing.lend(node_id, contained, needed=False)
        estimate_s = record.class_queue.estimate_s or 0.0
        item = ForwardedResult(
            task_id=record.root_id, result=outcome, lent=lent, estimate_s=estimate_s
        )
        self._answer(node_id, item)

    def send_items(self, record: TaskRecord, items: Yielded, writer: ClientId) -> None:
        """Give the owner what its generator has yielded here; what is large stays here for it."""
        node_id = node_of(record.client_id)
        if node_id in self.dead:
            self.streams.discard(items, writer)
            return
        values: list[Value] = []
        for index, value in enumerate(items.values):
            if not isinstance(value, bytes):
                inner = items.contained[index] if items.contained else []
                self.borrowing.keep_result(node_id, value, writer, inner)
                value = self.borrowing.portable(value, value.object_id, 0)
            values.append(value)
        contained = [object_id for inner in items.contained for object_id in inner]
        lent = self.borrowing.lend(node_id, contained, needed=False)
        sent = msgspec.structs.replace(items, values=values)
        self._state.effects.append(SendPeer(node_id, ForwardedItems(items=sent, lent=lent)))

    def send_back(self, record: TaskRecord) -> None:
        """Tell the owner that its task could not begin here."""
        self.streams.forget_source(record.task_id)
        item = ForwardedResult(task_id=record.root_id, result=b"", returned=True)
        self._answer(node_of(record.client_id), item)

    def _answer(self, node_id: NodeId, item: ForwardedResult) -> None:
        if node_id not in self.dead:
            self._send_together(node_id, ForwardedResults(results=[item]))

    # ---- objects elsewhere -----------------------------------------------------------------------

    def find_again(self, object_id: ObjectId, record: ObjectRecord) -> bool:
        """A value is not where it was: whether it may be had from somewhere else."""
        location = record.location()
        if object_id in self.borrowing.borrowed:
            self.borrowing.on_lost(object_id, record, location or self._state.node_id)
            return True
        copy = self.transfers.sourcing.copy_of(object_id, location)
        original = self._objects.originals.pop(object_id, None)
        if original is not None:
            self.borrowing.give_back(*original)
        value = record.value
        if copy is None or isinstance(value, bytes):
            return False
        self.transfers.stop(object_id)
        # That copy is kept for somebody else: ours has to be one of our own.
        record.value = InArena(
            object_id=object_id, offset=0, size_bytes=value.size_bytes, node_id=copy
        )
        self.transfers.pull(object_id)
        return True

    # ---- the head's word -------------------------------------------------------------------------

    def on_view(self, views: list[NodeView]) -> None:
        """Nodes that joined or whose free resources changed."""
        self.placing.is_informed = True
        for view in views:
            if view.node_id == self._state.node_id:
                self.own = view
            elif view.node_id not in self.dead:
                self.views[view.node_id] = view
                self.placing.note(view.node_id)

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: its tasks and objects are decided again."""
        if node_id in self.dead:
            return
        self.dead[node_id] = None
        if len(self.dead) > _DEAD_MAX:
            del self.dead[next(iter(self.dead))]
        view = self.views.pop(node_id, None)
        if view is not None:
            self.gone[node_id] = view
            if len(self.gone) > _GONE_MAX:
                del self.gone[next(iter(self.gone))]
        self.actors.hosting.on_node_died(node_id)
        self.placing.note(node_id)
        self.ahead.on_node_died(node_id)
        stopped = self.transfers.on_node_died(node_id)
        client_id = client_of(node_id)
        self.cancellation.abandon(
            [
                record
                for record in self._state.tasks.values()
                if record.is_foreign and record.client_id == client_id
            ]
        )
        self._tasks.drop_client(client_id)
        self.borrowing.on_node_died(node_id)
        reason = f"node {node_id.hex()[:12]} died with the only copy"
        for object_id, record in list(self._state.objects.items()):
            if object_id in self._state.objects and record.location() == node_id:
                self._tasks.lineage.on_object_lost(object_id, record, reason)
        self._objects.forget_originals(node_id)
        self.transfers.restart(stopped)
        for task in list(self._state.tasks.values()):
            if task.state is FORWARDED and task.node_id == node_id:
                self._tasks.losses.on_lost_with_node(task, node_id)

    def known(self) -> list[NodeId]:
        """Peers that are not known to be dead."""
        clients = [node_of(c) for c in self._state.clients if is_peer(c)]
        return list(dict.fromkeys([*self.views, *clients]))

    def on_local(self, object_id: ObjectId) -> None:
        """An object that was elsewhere, or was held by somebody, is not any more."""
        self._tasks.lineage.on_object_local(object_id)
        self.borrowing.on_local(object_id)
        self.actors.hosting.creations.on_local(object_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when something is awaited from a peer that is dead."""
        self.borrowing.check_invariants()
        self.transfers.check_invariants()
        for record in self._state.objects.values():
            assert record.location() not in self.dead
        for task in self._state.tasks.values():
            assert task.node_id not in self.dead
        self.ahead.check_invariants(
            {
                task_id: task.node_id
                for task_id, task in self._state.tasks.items()
                if task.state is FORWARDED and not task.actor_id and task.node_id is not None
            }
        )


def absorb(into: PeerMessage, message: PeerMessage) -> bool:
    """Put what a message says into the one that goes to the same peer before it, if that may be.

    Neither of them may have been looked at by anybody else.
    """
    if type(into) is ForwardedResults and type(message) is ForwardedResults:
        into.results.extend(message.results)
        return True
    if type(into) is not ForwardTasks or type(message) is not ForwardTasks:
        return False
    # (Code that is an object is lent with the first task of its class.)
    if into.functions or message.functions:
        if into.classes[0].class_id != message.classes[0].class_id:
            return False
    else:
        known = [task_class.class_id for task_class in into.classes]
        into.classes.extend(c for c in message.classes if c.class_id not in known)
    into.tasks.extend(message.tasks)
    return True
