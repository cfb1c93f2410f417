"""The node's objects: values, holders, requests that wait.

What: seals, counts, answers, frees. Where large values are is `node/store.py`'s affair.
Who calls: `node/node.py` with clients' requests, `node/tasks.py` with results.
May touch: nothing.
Invariants: an object's record goes exactly when its last holder does, its memory and its inner
references with it; a request is answered exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import final

from poolray.exceptions import ObjectLostError
from poolray.ids import ActorId, ClientId, NodeId, ObjectId, TaskId
from poolray.node.effects import Reply, UnhandledError
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.node.watches import Watches
from poolray.objects.directory import READY, ClientRecord, ObjectRecord, Request
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    EndWatches,
    GetObjects,
    ObjectValues,
    PromiseObjects,
    PutObject,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.values import InArena, InFile, Value

#: A reply to a worker must fit one packet of its control channel.
_REPLY_BYTES_MAX = 96 * 1024
_REPLY_VALUES_MAX = 512


@final
class Objects:
    """The object side of a node."""

    __slots__ = (
        "_releasing",
        "_state",
        "_store",
        "_to_release",
        "_wake_task",
        "_watches",
        "call_sites",
        "give_back",
        "handles",
        "on_actor_freed",
        "on_awaited",
        "on_forgotten",
        "on_handle",
        "on_local",
        "on_lost",
        "on_sourced",
        "originals",
        "promised",
        "pull",
        "sourced",
    )

    def __init__(
        self,
        state: NodeState,
        store: Store,
        wake_task: Callable[[TaskId], None],
    ) -> None:
        self._state = state
        self._store = store
        store.wake = self.wake
        #: Tells the task side that one dependency of a task is here.
        self._wake_task = wake_task
        #: Asks another node for an object's bytes.
        self.pull: Callable[[ObjectId], None]
        self._watches = Watches(state, lambda object_id: self.pull(object_id))
        #: object id -> (node, name there) of the original that another node keeps for us until the
        #: object is freed here, also after its bytes have come.
        self.originals: dict[ObjectId, tuple[NodeId, ObjectId]] = {}
        #: object id -> the client that will put it: the result of a call that this node does not
        #: see.
        self.promised: dict[ObjectId, ClientId] = {}
        #: object id -> where it was made, if that is recorded.
        self.call_sites: dict[ObjectId, str] = {}
        #: Holds to let go of, and whether `release_all` is at work on them.
        self._to_release: list[ObjectId] = []
        self._releasing = False
        #: Called with the id of each object that cannot be lost with another node (any more).
        self.on_local: Callable[[ObjectId], None] = lambda object_id: None
        #: object that stands for an actor's handles -> actor.
        self.handles: dict[ObjectId, ActorId] = {}
        #: Told of actors that nobody has a handle to any more.
        self.on_actor_freed: Callable[[ActorId], None] = lambda actor_id: None
        #: Told what another node need not keep for us any more.
        self.give_back: Callable[[NodeId, ObjectId], None] = lambda node_id, name: None
        #: Told of peers that wait for an object which is there now.
        self.on_awaited: Callable[[ClientId, ObjectId], None]
        #: Told of objects that are freed, or whose value is not where it was.
        self.on_forgotten: Callable[[ObjectId], None] = lambda object_id: None
        self.on_lost: Callable[[ObjectId], None] = lambda object_id: None
        #: Told of objects that another node has lent, if they stand for actors.
        self.on_handle: Callable[[ObjectId, NodeId], None] = lambda object_id, node_id: None
        #: Objects that others pull, and who is told when one of them is there (again).
        self.sourced: Collection[ObjectId] = ()
        self.on_sourced: Callable[[ObjectId], None]

    # ---- clients ---------------------------------------------------------------------------------

    def client(self, client_id: ClientId) -> ClientRecord:
        """A client's record, made at its first word."""
        record = self._state.clients.get(client_id)
        if record is None:
            record = self._state.clients[client_id] = ClientRecord()
        return record

    def drop_client(self, client_id: ClientId) -> None:
        """A client is gone: all it held, waited for and was writing is let go."""
        record = self._state.clients.pop(client_id, None)
        if record is None:
            return
        record.requests.clear()
        self._watches.drop_client(record)
        self._store.drop_client(client_id, record)
        held = list(record.held)
        record.held.clear()
        record.viewed.clear()
        self.release_all(held)
        for object_id in [o for o, promiser in self.promised.items() if promiser == client_id]:
            del self.promised[object_id]
            waiting = self._state.objects.get(object_id)
            if waiting is not None:
                self.seal(object_id, waiting, self._lost(object_id), True, [], client_id)

    def add_references(
        self,
        client_id: ClientId,
        object_ids: Iterable[ObjectId],
        viewed: Iterable[ObjectId] = (),
    ) -> None:
        """A client holds these from now on; of `viewed` it has views only."""
        client = self.client(client_id)
        held = client.held
        for object_id in object_ids:
            if object_id not in held:
                held[object_id] = None
                self.hold(object_id)
        for object_id in viewed:
            if object_id in held:
                client.viewed[object_id] = None

    def release_references(self, client_id: ClientId, object_ids: Iterable[ObjectId]) -> None:
        """A client no longer holds these."""
        client = self._state.clients.get(client_id)
        if client is None:
            return
        held = client.held
        released = []
        for object_id in object_ids:
            if object_id in held:
                del held[object_id]
                released.append(object_id)
                if client.viewed:
                    client.viewed.pop(object_id, None)
                if client.pins:
                    self._store.unpin_all_for(client, object_id)
        self.release_all(released)

    def on_put(self, client_id: ClientId, message: PutObject) -> None:
        """A client stores a value."""
        client = self.client(client_id)
        record = self._state.objects.get(message.object_id)
        if record is None:
            record = self._state.objects[message.object_id] = ObjectRecord()
            if (
                type(message.value) is bytes
                and not message.contained
                and not self.sourced
                and not message.is_error
            ):
                # Nobody waits for it yet, and it is nowhere else: nearly always so.
                client.held[message.object_id] = None
                record.holders = 1
                record.seal(message.value, False, message.contained)
                return
        if message.object_id not in client.held:
            client.held[message.object_id] = None
            record.holders += 1
        self.promised.pop(message.object_id, None)
        self.seal(
            message.object_id,
            record,
            message.value,
            message.is_error,
            message.contained,
            client_id,
        )

    def on_promise(self, client_id: ClientId, message: PromiseObjects) -> None:
        """A client will put these."""
        held = self.client(client_id).held
        for object_id in message.object_ids:
            if object_id not in self._state.objects:
                self._state.objects[object_id] = ObjectRecord(1)
                held[object_id] = None
                self.promised[object_id] = client_id

    def on_allocate(self, client_id: ClientId, message: AllocateRange) -> None:
        """A client wants to write a large value."""
        self._store.on_allocate(client_id, self.client(client_id), message)

    # ---- get and wait ----------------------------------------------------------------------------

    def on_get(self, client_id: ClientId, message: GetObjects) -> None:
        """Answer with values, now or when the last of them is ready."""
        object_ids = message.object_ids
        pending = self._pending(object_ids)
        has_failed = bool(pending) and self._any_failed(object_ids)
        restoring = [] if pending else self._restore(object_ids)
        if has_failed or not (pending or restoring):
            self._answer_get(client_id, message.request_id, object_ids)
            return
        request = Request(client_id, message.request_id, object_ids, 0, True)
        request.has_restored = bool(restoring)
        self._await(request, pending or restoring, len(pending or restoring))

    def small_values(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """Values, if all of them are ready and small and none is an error; changes nothing."""
        objects = self._state.objects
        values: list[bytes] = []
        # The last one first: of many tasks it is the likeliest to be missing.
        for object_id in reversed(object_ids):
            record = objects.get(object_id)
            if record is None or record.state is not READY or record.is_error:
                return None
            value = record.value
            if type(value) is not bytes:
                return None
            values.append(value)
        values.reverse()
        return values

    def on_wait(self, client_id: ClientId, message: WaitObjects) -> None:
        """Answer with the ready ones once there are enough."""
        if message.watch:
            self._watches.on_wait(self.client(client_id), client_id, message)
            return
        objects = self._state.objects
        pending: list[ObjectId] = []
        elsewhere: list[ObjectId] = []
        found = 0
        for object_id in message.object_ids:
            record = objects.get(object_id)
            if record is not None and record.state is not READY:
                pending.append(object_id)
                continue
            if message.fetch and record is not None and record.location() is not None:
                pending.append(object_id)
                elsewhere.append(object_id)
                continue
            found += 1
            if found == message.count:
                break  # a loop over thousands of refs finds its next one near the front
        request = Request(client_id, message.request_id, message.object_ids, message.count, False)
        request.ahead, request.fetches = message.ahead, message.fetch
        if found >= message.count or not pending:
            self._answer_wait(request)
        else:
            self._await(request, pending, message.count - found)
        for object_id in elsewhere:
            self.pull(object_id)

    def on_end_watches(self, client_id: ClientId, message: EndWatches) -> None:
        """A client has dropped lists that it waited for."""
        self._watches.end(self.client(client_id), message.watches)

    def on_cancel_request(self, client_id: ClientId, message: CancelRequest) -> None:
        """A client no longer waits; a `wait` is told what it would have got so far."""
        request = self.client(client_id).requests.get(message.request_id)
        if request is None:
            self._store.cancel(client_id, message.request_id)
            return
        self._forget_request(request)
        if request.is_get:
            del self.client(client_id).requests[message.request_id]
            if client_id != self._state.local_client:
                # It waits for this answer, unless the values were sent before it gave up.
                nothing = ObjectValues(request_id=message.request_id, values=[])
                self._state.effects.append(Reply(client_id, nothing))
        else:
            self._answer_wait(request)

    def _any_failed(self, object_ids: list[ObjectId]) -> bool:
        """Whether one of them is an error: a `get` raises it without waiting for the others."""
        objects = self._state.objects
        return any(
            (record := objects.get(object_id)) is not None
            and record.is_error
            and record.location() is None
            for object_id in object_ids
        )

    def _pending(self, object_ids: list[ObjectId]) -> list[ObjectId]:
        """Those that are not ready here; what is elsewhere is asked for."""
        objects = self._state.objects
        pending = []
        for object_id in object_ids:
            record = objects.get(object_id)
            if record is None:
                continue  # answered with an error
            if record.state is not READY:
                pending.append(object_id)
            elif record.location() is not None:
                pending.append(object_id)
                self.pull(object_id)
        return pending

    def _restore(self, object_ids: list[ObjectId]) -> list[ObjectId]:
        """Those that are on disk and for which memory has room: they are on their way there."""
        objects = self._state.objects
        return [
            object_id
            for object_id in object_ids
            if (record := objects.get(object_id)) is not None
            and type(record.value) is InFile
            and self._store.restore(object_id)
        ]

    def _await(self, request: Request, pending: list[ObjectId], count: int) -> None:
        request.remaining = count
        self.client(request.client_id).requests[request.request_id] = request
        for object_id in pending:
            record = self._state.objects[object_id]
            if record.waiters is None:
                record.waiters = {request: 1}
            else:
                record.waiters[request] = record.waiters.get(request, 0) + 1

    def _forget_request(self, request: Request) -> None:
        """An answered request must not pile up at objects that it no longer waits for."""
        objects = self._state.objects
        for object_id in request.object_ids:
            record = objects.get(object_id)
            if record is not None and record.waiters is not None:
                record.waiters.pop(request, None)
                if not record.waiters:
                    record.waiters = None

    def _answer_get(self, client_id: ClientId, request_id: int, object_ids: list[ObjectId]) -> None:
        values: list[bytes | InArena | InFile] = []
        errors: list[int] = []
        objects = self._state.objects
        client = self.client(client_id)
        for index, object_id in enumerate(object_ids):
            record = objects.get(object_id)
            if record is None:
                values.append(self._lost(object_id))
                errors.append(index)
                continue
            value = record.value
            values.append(value)
            if type(value) is not bytes:
                self._store.deliver(client, object_id, value)  # type: ignore[arg-type]
            if record.is_error and record.location() is None:  # elsewhere: another error is here
                record.seen = True
                errors.append(index)
        if client_id == self._state.local_client:
            reply = ObjectValues(request_id=request_id, values=values, errors=errors)
            self._state.effects.append(Reply(client_id, reply))
        else:
            self._answer_in_parts(client_id, request_id, values, errors)

    def _answer_in_parts(
        self,
        client_id: ClientId,
        request_id: int,
        values: list[bytes | InArena | InFile],
        errors: list[int],
    ) -> None:
        """A worker's control channel takes packets of limited size."""
        start = 0
        is_error = dict.fromkeys(errors)
        while True:
            stop, size = start, 0
            while stop < len(values) and stop - start < _REPLY_VALUES_MAX:
                value = values[stop]
                size += len(value) if isinstance(value, bytes) else 128
                if size > _REPLY_BYTES_MAX and stop > start:
                    break
                stop += 1
            part = ObjectValues(
                request_id=request_id,
                values=values[start:stop],
                errors=[i - start for i in range(start, stop) if i in is_error],
                more=stop < len(values),
            )
            self._state.effects.append(Reply(client_id, part))
            if stop >= len(values):
                return
            start = stop

    def await_for(self, request: Request) -> None:
        """A peer waits for an object that is not there: `on_awaited` tells it."""
        self._await(request, request.object_ids, 1)

    def forget_await(self, request: Request) -> None:
        """A peer does not wait any more."""
        self._forget_request(request)
        client = self._state.clients.get(request.client_id)
        if client is not None:
            client.requests.pop(request.request_id, None)

    def _answer_wait(self, request: Request) -> None:
        if request.watch is not None:
            self._watches.answer(request, request.watch)
            return
        if request.is_peers:
            self.on_awaited(request.client_id, request.object_ids[0])
            return
        objects = self._state.objects
        ready: list[int] = []
        for index, object_id in enumerate(request.object_ids):
            record = objects.get(object_id)
            if record is None or (
                record.state is READY and not (request.fetches and record.location() is not None)
            ):
                ready.append(index)
                if len(ready) == request.count:
                    break
        for index in ready:
            if (record := objects.get(request.object_ids[index])) is not None:
                record.seen = True
        client = self.client(request.client_id)
        client.requests.pop(request.request_id, None)
        ahead = self._ready_ahead(request, ready[-1] + 1) if request.ahead and ready else []
        reply = WaitReply(request_id=request.request_id, ready=ready, ahead=ahead)
        self._state.effects.append(Reply(request.client_id, reply))

    def _ready_ahead(self, request: Request, start: int) -> list[int]:
        """What a `wait` would be answered with next, of values that are here to stay."""
        objects = self._state.objects
        found: list[int] = []
        for index in range(start, min(start + request.ahead, len(request.object_ids))):
            record = objects.get(request.object_ids[index])
            if record is not None and record.is_here_to_stay():
                found.append(index)
        return found

    def _lost(self, object_id: ObjectId) -> bytes:
        return self._state.encode_error(
            ObjectLostError(
                object_id=object_id.hex(),
                reason="nobody on this node knows it: its last reference was dropped, or it "
                "belongs to a runtime that was shut down",
            )
        )

    def note_call_site(self, object_ids: Iterable[ObjectId], call_site: str) -> None:
        """These objects were made there."""
        for object_id in object_ids:
            if object_id in self._state.objects:  # else it has come and gone
                self.call_sites[object_id] = call_site

    # ---- values ----------------------------------------------------------------------------------

    def seal_small(self, object_id: ObjectId, value: bytes) -> None:
        """A task's only return value is there, small and without refs; maybe nobody wants it."""
        record = self._state.objects.get(object_id)
        if record is not None and record.state is not READY:
            record.state = READY
            record.value = value
            if record.waiters is not None or record.dependents is not None:
                self.wake(record)

    def seal(
        self,
        object_id: ObjectId,
        record: ObjectRecord,
        value: bytes | InArena | InFile,
        is_error: bool,
        contained: list[ObjectId],
        writer: ClientId,
    ) -> None:
        """A value is there: count what it refers to, wake who waits."""
        for inner in contained:
            self.hold(inner)
        record.seal(value, is_error, contained)
        if isinstance(value, InArena):
            if value.node_id:
                # (What was lent to us is kept by who lent it, wherever the bytes are.)
                self.originals.setdefault(object_id, (value.node_id, value.object_id))
            else:
                self._store.adopt(object_id, value, writer)
        elif isinstance(value, InFile):
            self._store.adopt(object_id, value, writer)
        if record.waiters is not None and record.location() is not None:
            self._wake_elsewhere(object_id, record)
        else:
            self.wake(record)
        if self.sourced and object_id in self.sourced:
            self.on_sourced(object_id)

    def seal_alias(
        self, object_id: ObjectId, record: ObjectRecord, error: Value, first: ObjectId
    ) -> None:
        """An error that another object has in its memory stands for this one as well."""
        self.hold(first)
        record.seal(error, True, [first])
        self._store.share(object_id, first)
        self.wake(record)

    def discard(self, value: Value, writer: ClientId) -> None:
        """A value that nobody wants any more."""
        if isinstance(value, InArena) and value.node_id:
            self.give_back(value.node_id, value.object_id)
        elif not isinstance(value, bytes):
            self._store.discard(value, writer)

    def deliver(self, client_id: ClientId, value: Value, writer: ClientId) -> None:
        """A value goes straight to a client: of its memory the client becomes the holder."""
        if isinstance(value, bytes):
            return
        client = self._state.clients.get(client_id)
        if client is None:  # gone meanwhile
            self.discard(value, writer)
            return
        object_id = value.object_id
        if object_id in self._state.objects:
            # Known here already, as the argument of another task, and made once more.
            self.discard(value, writer)
        else:
            record = self._state.objects[object_id] = ObjectRecord()
            self.seal(object_id, record, value, False, [], writer)
        if object_id not in client.held:
            client.held[object_id] = None
            self.hold(object_id)

    def deliver_result(self, client_id: ClientId, value: Value, writer: ClientId) -> None:
        """A call's result goes straight to the client that submitted it, which will look at it."""
        self.deliver(client_id, value, writer)
        client = self._state.clients.get(client_id)
        if not isinstance(value, bytes) and client is not None:
            self._store.deliver(client, value.object_id, value)

    def wake(self, record: ObjectRecord) -> None:
        """The object can be read here now."""
        waiters = record.waiters
        if waiters is not None:
            record.waiters = None
            for request, times in waiters.items():
                if request.watch is not None:
                    self._watches.on_ready(request.watch, times)
                    continue
                request.remaining -= times
                if request.remaining == 0 or (record.is_error and request.is_get):
                    self._wake_request(request)
        dependents = record.dependents
        if dependents is not None:
            record.dependents = None
            for task_id in dependents:
                self._wake_task(TaskId(task_id))

    def _wake_elsewhere(self, object_id: ObjectId, record: ObjectRecord) -> None:
        """The object is ready, on another node: a `wait` that wants it here goes on waiting."""
        waiters = record.waiters or {}
        fetching = {request: times for request, times in waiters.items() if request.fetches}
        record.waiters = {r: t for r, t in waiters.items() if r not in fetching} or None
        self.wake(record)
        if fetching and self._state.objects.get(object_id) is record:
            record.waiters = {**fetching, **(record.waiters or {})}
            self.pull(object_id)

    def _wake_request(self, request: Request) -> None:
        client = self._state.clients.get(request.client_id)
        if client is None or client.requests.pop(request.request_id, None) is None:
            return
        self._forget_request(request)
        if not request.is_get:
            self._answer_wait(request)
            return
        pending = self._pending(request.object_ids)
        if pending and not self._any_failed(request.object_ids):
            # All ready, but some on another node: these are on their way now.
            self._await(request, pending, len(pending))
            return
        if not pending and not request.has_restored:
            request.has_restored = True
            restoring = self._restore(request.object_ids)
            if restoring:
                self._await(request, restoring, len(restoring))
                return
        self._answer_get(request.client_id, request.request_id, request.object_ids)

    def hold(self, object_id: ObjectId) -> None:
        """One more holder (a task, an object, a client)."""
        record = self._state.objects.get(object_id)
        if record is None:
            # Known to its holder, not to us: it was freed before the news of the new holder came,
            # which our own messages exclude. It is an object lost; readers are told so.
            record = self._state.objects[object_id] = ObjectRecord()
            record.seal(self._lost(object_id), True, [])
        record.holders += 1

    def release_all(self, object_ids: Sequence[ObjectId]) -> None:
        """One holder less of each; the last one frees an object and all that only it held.

        Freeing one may let go of others, by what it contains or as the last result of a task whose
        arguments were kept: these go on the same list, for such chains can be long.
        """
        pending = self._to_release
        pending.extend(object_ids)
        if self._releasing:
            return
        self._releasing = True
        objects = self._state.objects
        while pending:
            current = pending.pop()
            record = objects[current]
            record.holders -= 1
            if record.holders == 0:
                del objects[current]
                self._free_value(current, record)
                if record.contained:
                    pending.extend(record.contained)
        self._releasing = False

    def _free_value(self, object_id: ObjectId, record: ObjectRecord) -> None:
        value = record.value
        if record.is_error and not record.seen and isinstance(value, bytes):
            self._state.effects.append(UnhandledError(value))
        if not isinstance(value, bytes):
            self._store.forget(object_id)
        if self.call_sites:
            self.call_sites.pop(object_id, None)
        if self.promised:
            self.promised.pop(object_id, None)
        if self.originals or self.sourced:
            self.on_forgotten(object_id)
            original = self.originals.pop(object_id, None)
            if original is not None:
                self.give_back(*original)
        if self.handles:
            actor_id = self.handles.pop(object_id, None)
            if actor_id is not None:
                self.on_actor_freed(actor_id)
        self.on_local(object_id)

    def forget_originals(self, node_id: NodeId) -> None:
        """A node is dead: what it kept for us, beside the copies here, is gone."""
        for object_id in [o for o, (keeper, _) in self.originals.items() if keeper == node_id]:
            del self.originals[object_id]

    def lose(self, object_id: ObjectId, record: ObjectRecord) -> None:
        """The only copy of a value was elsewhere and is gone."""
        self.on_lost(object_id)
        contained = record.contained
        record.lose()
        self.release_all(contained)

    def check_invariants(self, tasks_holds: Iterable[ObjectId]) -> None:
        """Raise AssertionError when a count of holders is wrong.

        Parameters
        ----------
        tasks_holds : iterable of ObjectId
            What tasks hold, each as often as it is held.
        """
        state = self._state
        counts = dict.fromkeys(state.objects, 0)
        for client in state.clients.values():
            for object_id in client.held:
                counts[object_id] += 1
        for record in state.objects.values():
            for inner in record.contained:
                counts[inner] += 1
        for object_id in tasks_holds:
            counts[object_id] += 1
        assert not self._to_release
        self._watches.check_invariants()
        for object_id, record in state.objects.items():
            assert record.holders > 0, f"object {object_id.hex()} is kept by nobody"
            assert record.holders == counts[object_id], (
                f"object {object_id.hex()} has {record.holders} holders on record, "
                f"{counts[object_id]} in fact"
            )
            if record.state is READY and record.waiters is not None:
                assert record.location() or self._store.is_returning(object_id)
        for client in state.clients.values():
            assert client.viewed.keys() <= client.held.keys(), "a view of what is not held"
        for object_id in (*self.originals, *self.call_sites):
            assert object_id in state.objects, f"what was kept for {object_id.hex()} leaks"
