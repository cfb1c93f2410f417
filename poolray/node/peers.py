"""Other nodes: tasks given to them and taken from them, objects fetched from them.

What: which peer gets a task that does not fit here, what a forwarded task becomes, where the bytes
of a remote object come from, and what a peer's death means.
Who calls: `node/node.py` with peers' and the head's messages; the dispatcher with tasks that wait.
May touch: nothing.
Invariants: a task is forwarded once (its executor queues it, it never passes it on); a result in
another node's arena is kept there, for this node as a client, until the record here is freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import msgspec

from poolray.ids import ClientId, NodeId, ObjectId, TaskId
from poolray.node.effects import SendObject, SendPeer
from poolray.node.functions import Functions
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.node.tasks import Tasks
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.node import (
    CancelForwarded,
    ForwardedResult,
    ForwardedResults,
    ForwardedTask,
    ForwardTasks,
    NodeView,
    ObjectData,
    PeerReleases,
    PullObject,
)
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
from poolray.tasks.lifecycle import FORWARDED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.cancellation import Cancellation

_PEER_PREFIX = b"node:"

#: Dead peers remembered; the first are forgotten when there are more.
_DEAD_MAX = 4096


def client_of(node_id: NodeId) -> ClientId:
    """A peer as a client: what it holds in our arena, whose tasks we run."""
    return ClientId(_PEER_PREFIX + node_id)


def node_of(client_id: ClientId) -> NodeId:
    """The peer that a client is."""
    return NodeId(client_id[len(_PEER_PREFIX) :])


@final
class Peers:
    """The side of a node that faces other nodes."""

    __slots__ = (
        "_functions",
        "_objects",
        "_pulls",
        "_state",
        "_store",
        "_tasks",
        "cancellation",
        "dead",
        "views",
    )

    def __init__(
        self, state: NodeState, store: Store, objects: Objects, tasks: Tasks, functions: Functions
    ) -> None:
        self._state = state
        self._store = store
        self._objects = objects
        self._tasks = tasks
        self._functions = functions
        self.cancellation: Cancellation
        #: Live peers as the head saw them last, less what was forwarded since.
        self.views: dict[NodeId, NodeView] = {}
        #: Peers that are dead for good; what still comes from them is ignored.
        self.dead: dict[NodeId, None] = {}
        #: (node, name that the object has there) -> objects here that wait for its bytes.
        self._pulls: dict[tuple[NodeId, ObjectId], dict[ObjectId, None]] = {}

    # ---- giving tasks away -----------------------------------------------------------------------

    def try_forward(self, queue: ClassQueue) -> bool:
        """Give the first task of a queue to a peer that has room for it now."""
        if not self.views or not queue.queued_calls:
            return False
        record = queue.first()
        functions = self._definitions(queue)
        if functions is None or not self._may_travel(record):
            return False
        target = self._choose(queue.task_class.resources)
        if target is None:
            return False
        queue.queue.popleft()
        queue.queued_calls -= 1
        self._tasks.forward(record, target)
        self._send(record, target, functions)
        return True

    def _definitions(self, queue: ClassQueue) -> list[FunctionDefinition] | None:
        """What another node needs to know of a class; None when that cannot travel in a message."""
        function_id = queue.task_class.function_id
        if not function_id:
            return []
        definition = self._state.functions[function_id]
        return [definition] if isinstance(definition.blob, bytes) else None

    def _may_travel(self, record: TaskRecord) -> bool:
        """Whether a task can run elsewhere: all that it needs goes along by value or by place."""
        return (
            record.class_queue.task_class.delivery is Delivery.OBJECTS
            # (An actor lives where it was made.)
            and record.class_queue.task_class.kind is not CallKind.CREATE
            and not record.is_foreign
            # Of other nodes' labels nothing is known here.
            and record.class_queue.task_class.placement is None
            # Refs that the task would find inside its arguments mean nothing on another node.
            and not record.borrows
            and isinstance(record.calls[0], bytes)
            and not any(
                self._state.objects[object_id].is_error or self._state.objects[object_id].contained
                for object_id in record.dependencies
            )
        )

    def _choose(self, demand: dict[str, int]) -> NodeId | None:
        """The peer with most room; its view is charged, so that one report is not spent twice."""
        best: NodeView | None = None
        best_score = 0
        for view in self.views.values():
            if any(view.available.get(name, 0) < amount for name, amount in demand.items()):
                continue
            score = sum(view.available.get(name, 0) for name in demand) or 1
            if score > best_score:
                best, best_score = view, score
        if best is None:
            return None
        available = dict(best.available)
        for name, amount in demand.items():
            available[name] = available.get(name, 0) - amount
        self.views[best.node_id] = NodeView(
            node_id=best.node_id,
            total=best.total,
            available=available,
            queued_tasks=best.queued_tasks,
        )
        return best.node_id

    def _send(
        self, record: TaskRecord, node_id: NodeId, functions: list[FunctionDefinition]
    ) -> None:
        task_class = record.class_queue.task_class
        spec = TaskSpec(
            task_id=record.root_id,
            class_id=task_class.class_id,
            calls=record.calls,
            dependencies=record.dependencies,
            slots=record.slots,
        )
        arguments = [
            self._portable(self._state.objects[object_id].value, object_id)
            for object_id in record.dependencies
        ]
        task = ForwardedTask(spec=spec, arguments=arguments, attempts=record.attempts)
        message = ForwardTasks(tasks=[task], classes=[task_class], functions=functions)
        self._state.effects.append(SendPeer(node_id, message))

    def _portable(self, value: Value, object_id: ObjectId) -> Value:
        """A value as another node can use it: ours says that it is ours, under our name for it."""
        if isinstance(value, bytes) or (isinstance(value, InArena) and value.node_id):
            return value
        return InArena(
            object_id=object_id,
            offset=0,
            size_bytes=value.size_bytes,
            node_id=self._state.node_id,
        )

    def on_results(self, node_id: NodeId, message: ForwardedResults) -> None:
        """What came of tasks that we gave away."""
        writer = client_of(node_id)
        for item in message.results:
            record = self._state.tasks.get(item.task_id)
            if record is None or record.state is not FORWARDED or record.node_id != node_id:
                if not isinstance(item.result, bytes):
                    for value in item.result.values:
                        self._objects.discard(value, writer)
            elif item.returned:
                self._tasks.on_returned(record)
            else:
                self._tasks.finish(record, item.result, writer)

    # ---- running others' tasks -------------------------------------------------------------------

    def on_forwarded(self, node_id: NodeId, message: ForwardTasks) -> None:
        """Another node's tasks to run here."""
        client_id = client_of(node_id)
        client = self._objects.client(client_id)
        for task_class in message.classes:
            self._functions.define_class(task_class)
        for definition in message.functions:
            self._functions.define(client, definition)
        for task in message.tasks:
            spec = task.spec
            if spec.task_id in self._state.tasks:
                continue  # the link delivers once, so its owner does not remember giving it to us
            fresh = [
                object_id
                for object_id, value in zip(spec.dependencies, task.arguments, strict=True)
                if self._adopt_argument(object_id, value)
            ]
            self._tasks.submit_foreign(client_id, spec, task.attempts)
            self._objects.release_all(fresh)  # the task holds them now
            record = self._state.tasks.get(spec.task_id)
            if record is not None and any(
                self._state.objects[object_id].location() in self.dead
                for object_id in spec.dependencies
            ):
                self._tasks.give_back(record)  # its owner has yet to hear of that death

    def on_cancel(self, node_id: NodeId, message: CancelForwarded) -> None:
        """The owner of a task wants it stopped."""
        record = self._state.tasks.get(message.task_id)
        if record is not None and record.is_foreign and record.client_id == client_of(node_id):
            self.cancellation.cancel(message.task_id, message.force, message.recursive)

    def _adopt_argument(self, object_id: ObjectId, value: Value) -> bool:
        """Know an argument under its owner's name.

        Returns
        -------
        bool
            Whether it is new, and held once for the caller.
        """
        known = self._state.objects.get(object_id)
        if known is not None:
            if known.is_error:  # it was lost here; its owner has it (again)
                if not isinstance(known.value, bytes):
                    self._store.forget(object_id)
                known.is_error, known.value = False, value
            return False
        record = self._state.objects[object_id] = ObjectRecord()
        record.holders = 1
        contained: list[ObjectId] = []
        if isinstance(value, InArena) and value.node_id == self._state.node_id:
            # Our own object comes back as an argument, under another name.
            contained = [value.object_id]
            self._objects.hold(value.object_id)
            original = value.object_id
            value = self._state.objects[original].value
            self._store.share(object_id, original)
        record.seal(value, False, contained)
        return True

    def send_result(self, record: TaskRecord, result: bytes | Outcome) -> None:
        """Tell the owner what came of its task."""
        if not isinstance(result, bytes):
            result = Outcome(
                values=[
                    value if isinstance(value, bytes) else self._portable(value, value.object_id)
                    for value in result.values
                ],
                is_error=result.is_error,
                retriable=result.retriable,
                contained=result.contained,
                crashed=result.crashed,
            )
        self._answer(record, ForwardedResult(task_id=record.root_id, result=result))

    def send_back(self, record: TaskRecord) -> None:
        """Tell the owner that its task could not begin here."""
        self._answer(record, ForwardedResult(task_id=record.root_id, result=b"", returned=True))

    def _answer(self, record: TaskRecord, item: ForwardedResult) -> None:
        node_id = node_of(record.client_id)
        if node_id not in self.dead:
            self._state.effects.append(SendPeer(node_id, ForwardedResults(results=[item])))

    # ---- objects elsewhere -----------------------------------------------------------------------

    def pull(self, object_id: ObjectId, node_id: NodeId) -> None:
        """Ask a node for the bytes of an object, once."""
        value = self._state.objects[object_id].value
        assert isinstance(value, InArena)
        place = (node_id, value.object_id)
        waiting = self._pulls.get(place)
        if waiting is not None:
            waiting[object_id] = None
        elif node_id not in self.dead:
            self._pulls[place] = {object_id: None}
            self._state.effects.append(SendPeer(node_id, PullObject(object_id=value.object_id)))

    def on_pull(self, node_id: NodeId, message: PullObject) -> None:
        """Another node asks for an object's bytes."""
        object_id = message.object_id
        record = self._state.objects.get(object_id)
        if (
            record is None
            or record.state is not READY
            or record.is_error
            or record.location() is not None
        ):
            reply = ObjectData(object_id=object_id, data=b"", missing=True)
            self._state.effects.append(SendPeer(node_id, reply))
        elif isinstance(record.value, bytes):
            reply = ObjectData(object_id=object_id, data=record.value)
            self._state.effects.append(SendPeer(node_id, reply))
        elif isinstance(record.value, InArena):
            value = record.value
            place = InArena(object_id=object_id, offset=value.offset, size_bytes=value.size_bytes)
            self._state.effects.append(SendObject(node_id, place))
        else:
            place_on_disk = msgspec.structs.replace(record.value, object_id=object_id)
            self._state.effects.append(SendObject(node_id, place_on_disk))

    def on_object_data(self, node_id: NodeId, message: ObjectData) -> None:
        """Bytes of an object that we asked for."""
        for object_id in self._pulls.pop((node_id, message.object_id), ()):
            record = self._state.objects.get(object_id)
            if record is None or record.state is not READY or record.location() != node_id:
                continue
            if message.missing:
                self._tasks.on_object_lost(object_id, record, "its node no longer has it")
            else:
                self._objects.store_copy(object_id, record, message.data)

    def on_releases(self, node_id: NodeId, message: PeerReleases) -> None:
        """A peer no longer holds these."""
        self._objects.release_references(client_of(node_id), message.object_ids)

    # ---- the head's word -------------------------------------------------------------------------

    def on_view(self, views: list[NodeView]) -> None:
        """Nodes that joined or whose free resources changed."""
        for view in views:
            if view.node_id != self._state.node_id and view.node_id not in self.dead:
                self.views[view.node_id] = view

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: its tasks and objects are decided again."""
        if node_id in self.dead:
            return
        self.dead[node_id] = None
        if len(self.dead) > _DEAD_MAX:
            del self.dead[next(iter(self.dead))]
        self.views.pop(node_id, None)
        client_id = client_of(node_id)
        self._tasks.cancel(
            [
                TaskId(record.root_id)
                for record in self._state.tasks.values()
                if record.is_foreign and record.client_id == client_id
            ]
        )
        self._tasks.drop_client(client_id)
        for place in [place for place in self._pulls if place[0] == node_id]:
            del self._pulls[place]
        reason = f"node {node_id.hex()[:12]} died with the only copy"
        for object_id, record in list(self._state.objects.items()):
            if object_id in self._state.objects and record.location() == node_id:
                self._tasks.on_object_lost(object_id, record, reason)
        self._objects.forget_originals(node_id)
        for task in list(self._state.tasks.values()):
            if task.state is FORWARDED and task.node_id == node_id:
                self._tasks.on_lost_with_node(task, node_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when something is awaited from a peer that is dead."""
        for node_id, _ in self._pulls:
            assert node_id not in self.dead
        for record in self._state.objects.values():
            assert record.location() not in self.dead
        for task in self._state.tasks.values():
            assert task.node_id not in self.dead
