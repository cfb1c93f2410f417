"""The node's streams: what generators yield, from their workers to those who iterate.

    ItemsYielded ──▶ objects, held by the stream ──TakeItems──▶ held by the client that iterates
    AwaitRoom ─────▶ answered at once, or when items have been taken (back-pressure)
    ForwardedItems, StreamProgress: the same between the node of the generator and its owner

What: which item is whose, when a stream is over, when a generator may go on.
Who calls: `node/node.py` with messages; `node/tasks.py` with results of generators, and with items
that were lost; `node/peers.py` with what other nodes say of forwarded generators.
May touch: nothing.
Invariants: the stream holds each item until it is taken, and always the object of the next one to
be taken, so that whoever waits for that waits for an object like any other; at the end that object
is there too, with nothing in it. An item is stored once, however often its task runs. A worker that
asks for room is answered: when there is some, when nobody will take any more, or not at all if its
task has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, final

import msgspec

from poolray.exceptions import InternalError, ObjectLostError
from poolray.ids import ActorId, ClientId, NodeId, ObjectId, TaskId, return_id
from poolray.node.effects import Reply, SendPeer
from poolray.node.state import NodeState
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.node import StreamProgress
from poolray.protocol.streams import (
    AwaitRoom,
    DropStream,
    ItemsTaken,
    ItemsYielded,
    OpenStream,
    RoomGranted,
    StreamMode,
    StreamRequest,
    TakeItems,
    Yielded,
    item_id,
)
from poolray.protocol.values import InArena, Outcome, Value
from poolray.tasks.lifecycle import FORWARDED, TaskRecord

if TYPE_CHECKING:
    from poolray.node.objects import Objects
    from poolray.node.peers import Peers
    from poolray.node.tasks import Tasks

_RETURNS = StreamMode.RETURNS
_DYNAMIC = StreamMode.DYNAMIC
_ITEMS = StreamMode.ITEMS

#: None, serialized: the value of what is there only to be waited for.
NOTHING = b"\x80\x05N."
#: Values that go along with an answer, so that nobody has to ask for them, in all at the most.
_VALUES_BYTES_MAX = 48 * 1024


@final
class Stream:
    """The items of one generator that a client iterates over."""

    __slots__ = ("actor_id", "backpressure", "client_id", "granted", "has_ended", "produced")

    def __init__(self, client_id: ClientId, message: OpenStream) -> None:
        self.client_id = client_id
        #: Items that may wait; 0: any number.
        self.backpressure = message.backpressure
        #: The actor whose streams share a limit; empty: it shares none.
        self.actor_id = message.actor_id if message.actor_backpressure else ActorId(b"")
        #: Items that the client was given.
        self.granted = 0
        #: Items that there are, the error at the end counted.
        self.produced = 0
        #: There will be no others.
        self.has_ended = False


@final
class _Waiter:
    """A worker whose generator waits for room."""

    __slots__ = ("client_id", "message")

    def __init__(self, client_id: ClientId, message: AwaitRoom) -> None:
        self.client_id = client_id
        self.message = message


@final
class _Share:
    """What the streams of one actor may have waiting together."""

    __slots__ = ("limit", "reserved", "streams", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: Items that have come and were not taken.
        self.waiting = 0
        #: Streams whose generators were let go on: each has room for one item.
        self.reserved: dict[TaskId, None] = {}
        self.streams: dict[TaskId, None] = {}


@final
class Streams:
    """The streams of a node."""

    __slots__ = (
        "_by_client",
        "_lost",
        "_objects",
        "_progress",
        "_remote",
        "_shares",
        "_state",
        "_streams",
        "_tasks",
        "_waiters",
        "peers",
    )

    def __init__(self, state: NodeState, objects: Objects, tasks: Tasks) -> None:
        self._state = state
        self._objects = objects
        self._tasks = tasks
        self.peers: Peers
        #: Streams that somebody iterates over, or whose generators are not over (DYNAMIC).
        self._streams: dict[TaskId, Stream] = {}
        #: client -> its streams.
        self._by_client: dict[ClientId, dict[TaskId, None]] = {}
        #: task -> the worker that asked for room for it and was not answered.
        self._waiters: dict[TaskId, _Waiter] = {}
        #: actor with a limit for all of its streams -> what these have.
        self._shares: dict[ActorId, _Share] = {}
        #: task of another node -> how far its owner has taken what it yields.
        self._progress: dict[TaskId, StreamProgress] = {}
        #: task -> items that were elsewhere when they came; some may be here or gone by now.
        self._remote: dict[TaskId, dict[ObjectId, None]] = {}
        #: task that runs -> items lost with their node -> the attempt that ran at that time.
        self._lost: dict[TaskId, dict[ObjectId, int]] = {}

    # ---- clients ---------------------------------------------------------------------------------

    def on_request(self, client_id: ClientId, message: StreamRequest) -> None:
        """What a client wants of a stream, or a worker of its generator."""
        if isinstance(message, TakeItems):
            self._take(client_id, message)
        elif isinstance(message, AwaitRoom):
            self._on_await(client_id, message)
        elif isinstance(message, OpenStream):
            self._open(client_id, message)
        else:
            self._on_drop(client_id, message)

    def _open(self, client_id: ClientId, message: OpenStream) -> None:
        task_id = message.task_id
        if task_id in self._streams:
            raise InternalError(f"the stream of task {task_id.hex()} is open already")
        stream = self._streams[task_id] = Stream(client_id, message)
        self._by_client.setdefault(client_id, {})[task_id] = None
        self._objects.client(client_id)
        self._expect(task_id, stream)
        if stream.actor_id:
            share = self._shares.get(stream.actor_id)
            if share is None:
                share = self._shares[stream.actor_id] = _Share(message.actor_backpressure)
            share.streams[task_id] = None

    def _expect(self, task_id: TaskId, stream: Stream) -> None:
        """Have an object for the next item to be taken, even if it has not come."""
        if stream.granted == stream.produced:
            record = self._state.objects[item_id(task_id, stream.granted)] = ObjectRecord(1)
            if stream.has_ended:
                record.seal(NOTHING, False, [])

    def _take(self, client_id: ClientId, message: TakeItems) -> None:
        stream = self._streams.get(message.task_id)
        if stream is None or stream.client_id != client_id:
            none = ItemsTaken(request_id=message.request_id, count=0, ended=True)
            self._state.effects.append(Reply(client_id, none))
            return
        if message.known >= stream.granted:  # else an answer was lost: it is given again
            self._grant(message.task_id, stream, message.limit)
        count = stream.granted - message.known
        reply = ItemsTaken(
            request_id=message.request_id,
            count=count,
            ended=stream.has_ended and stream.granted == stream.produced,
            values=self._values(message.task_id, message.known, count),
        )
        self._state.effects.append(Reply(client_id, reply))

    def _grant(self, task_id: TaskId, stream: Stream, limit: int) -> None:
        """Items go from the stream's hands to the client's."""
        is_limited = stream.backpressure > 0 or bool(stream.actor_id)
        if is_limited:
            limit = min(limit, 1)  # what is given counts as taken
        first = stream.granted
        stop = min(first + limit, stream.produced)
        if stop == first:
            return
        held = self._objects.client(stream.client_id).held
        for index in range(first, stop):
            object_id = item_id(task_id, index)
            if object_id in held:
                self._objects.release_all([object_id])
            else:
                held[object_id] = None
        stream.granted = stop
        self._expect(task_id, stream)
        if is_limited:
            self._on_taken(task_id, stream, stop - first)

    def _values(self, task_id: TaskId, first: int, count: int) -> list[bytes | None]:
        """Small values of items that were taken."""
        values: list[bytes | None] = []
        size = 0
        objects = self._state.objects
        for index in range(first, first + count):
            record = objects.get(item_id(task_id, index))
            if record is None or type(record.value) is not bytes or record.is_error:
                values.append(None)
                continue
            if record.state is not READY:  # lost, and made again
                values.append(None)
                continue
            size += len(record.value)
            if size > _VALUES_BYTES_MAX:
                break
            values.append(record.value)
        return values

    def _on_drop(self, client_id: ClientId, message: DropStream) -> None:
        stream = self._streams.get(message.task_id)
        if stream is None or stream.client_id != client_id:
            return
        granted = range(message.taken, stream.granted)
        self._close(message.task_id, stream)
        self._objects.release_references(
            client_id, [item_id(message.task_id, index) for index in granted]
        )

    def drop_client(self, client_id: ClientId) -> None:
        """A client is gone: nobody takes the items of its streams."""
        for task_id in list(self._by_client.get(client_id, ())):
            self._close(task_id, self._streams[task_id])

    def _close(self, task_id: TaskId, stream: Stream) -> None:
        """Let go of what was not taken. The generator runs on; what it yields is not kept."""
        del self._streams[task_id]
        owned = self._by_client[stream.client_id]
        del owned[task_id]
        if not owned:
            del self._by_client[stream.client_id]
        share = self._shares.get(stream.actor_id)
        if share is not None:
            share.waiting -= stream.produced - stream.granted
            share.reserved.pop(task_id, None)
            del share.streams[task_id]
            if not share.streams:
                del self._shares[stream.actor_id]
        self._tell_source(task_id, stream.granted, closed=True)
        if share is not None:
            self._wake_share(share)
        self._objects.release_all([item_id(task_id, index) for index in _kept(stream)])

    # ---- items -----------------------------------------------------------------------------------

    def on_yielded(self, message: ItemsYielded) -> None:
        """What generators of a worker have yielded."""
        worker = self._state.workers.get(message.worker_id)
        writer = ClientId(message.worker_id)
        for items in message.items:
            record = self._state.tasks.get(items.task_id)
            if worker is None or record is None or record.worker_id != message.worker_id:
                self.discard(items, writer)  # cancelled, or tried again elsewhere
            elif record.is_foreign:
                self.peers.send_items(record, items, writer)
            else:
                self.store(record, items, writer)

    def discard(self, items: Yielded, writer: ClientId) -> None:
        """Nobody wants these."""
        for value in items.values:
            self._objects.discard(value, writer)

    def store(self, record: TaskRecord, items: Yielded, writer: ClientId) -> None:
        """Items of a task of ours, wherever it runs: each that is new is kept."""
        task_id = record.root_id
        stream = self._streams.get(task_id)
        shift = 0 if record.class_queue.task_class.stream == _RETURNS else 1
        objects, contained = self._state.objects, items.contained
        last = len(items.values) - 1 if items.is_error else -1
        before = stream.produced if stream is not None else 0
        for offset, value in enumerate(items.values):
            index = items.start + offset
            object_id = return_id(task_id, index + shift)
            target = objects.get(object_id)
            if target is None:
                if stream is None or stream.has_ended or index < stream.produced:
                    self._objects.discard(value, writer)  # nobody wants it (any more)
                    continue
                target = objects[object_id] = ObjectRecord(1)
            elif target.state is READY:  # an earlier attempt has yielded it
                self._objects.discard(value, writer)
                continue
            if stream is not None and index >= stream.produced:
                stream.produced = index + 1
            inner = contained[offset] if contained else []
            if type(value) is bytes and not inner and offset != last:
                target.state = READY
                target.value = value
                if target.waiters is not None or target.dependents is not None:
                    self._objects.wake(target)
            else:
                self._seal(task_id, object_id, target, value, offset == last, inner, writer)
        if stream is not None and stream.actor_id:
            share = self._shares[stream.actor_id]
            share.waiting += stream.produced - before
            share.reserved.pop(task_id, None)

    def _seal(
        self,
        task_id: TaskId,
        object_id: ObjectId,
        target: ObjectRecord,
        value: Value,
        is_error: bool,
        inner: list[ObjectId],
        writer: ClientId,
    ) -> None:
        if isinstance(value, InArena) and value.node_id:
            self._remote.setdefault(task_id, {})[object_id] = None
        else:
            value = self._named(value, object_id, writer)
        self._objects.seal(object_id, target, value, is_error, inner, writer)

    def _named(self, value: Value, object_id: ObjectId, writer: ClientId) -> Value:
        """A value that its worker wrote under a name of its own, for it may be one too many."""
        if isinstance(value, bytes) or value.object_id == object_id:
            return value
        client = self._state.clients.get(writer)
        if client is not None and value.object_id in client.ranges:
            client.ranges[object_id] = client.ranges.pop(value.object_id)
        return msgspec.structs.replace(value, object_id=object_id)

    # ---- results ---------------------------------------------------------------------------------

    def must_run_again(self, record: TaskRecord, result: Outcome) -> bool:
        """Whether items were lost that this attempt had yielded before, or had not to yield."""
        lost = self._lost.get(record.root_id)
        if not lost or result.is_error or not self._tasks.may_retry(record):
            return False
        objects = self._state.objects
        return any(
            attempt == record.attempts and objects[object_id].state is not READY
            for object_id, attempt in lost.items()
            if object_id in objects
        )

    def on_result(self, record: TaskRecord, result: Outcome, writer: ClientId) -> bool:
        """A generator is over, or given up.

        Returns
        -------
        bool
            Whether items of it are on other nodes only, so that it may have to run again.
        """
        task_id = record.root_id
        mode = record.class_queue.task_class.stream
        stream = self._streams.get(task_id)
        if stream is not None and stream.actor_id:
            self._shares[stream.actor_id].reserved.pop(task_id, None)
        self.let_go_on(task_id)
        was_known = self._settle_lost(task_id, result)
        if result.is_error:
            if mode == _ITEMS and stream is not None and not stream.has_ended:
                self._end_with_error(record, stream, result, writer)
            elif mode == _ITEMS and was_known:
                self._objects.discard(result.values[0], writer)
            else:
                self._tasks.store_error(record, result.values[0], writer)
        elif mode != _RETURNS:
            self._complete(record, result, writer)
        if stream is not None:
            if mode == _DYNAMIC:
                self._close(task_id, stream)
            elif not stream.has_ended:
                self._end(task_id, stream)
        return self.is_remote(task_id)

    def _settle_lost(self, task_id: TaskId, result: Outcome) -> bool:
        """Items that were lost and have not been made again never will be; False: none was lost."""
        objects = self._state.objects
        lost = self._lost.pop(task_id, {})
        for object_id in lost:
            target = objects.get(object_id)
            if target is None or target.state is READY:
                continue
            error = result.values[0] if result.is_error else b""
            if not isinstance(error, bytes) or not error:
                reason = "its node died, and its generator did not yield it again"
                error = self._state.encode_error(
                    ObjectLostError(object_id=object_id.hex(), reason=reason)
                )
            self._objects.seal(object_id, target, error, True, [], ClientId(b""))
        return bool(lost)

    def _complete(self, record: TaskRecord, result: Outcome, writer: ClientId) -> None:
        """Object 0 says that the generator is over."""
        object_id = return_id(record.root_id, 0)
        target = self._state.objects.get(object_id)
        value = result.values[0] if result.values else NOTHING
        if target is None or target.state is READY:
            self._objects.discard(value, writer)
            return
        inner = result.contained[0] if result.contained else []
        self._seal(record.root_id, object_id, target, value, False, inner, writer)

    def _end_with_error(
        self, record: TaskRecord, stream: Stream, result: Outcome, writer: ClientId
    ) -> None:
        """The error is one more item; object 0 is there, and an error if no user code raised it."""
        task_id = record.root_id
        objects, error = self._state.objects, result.values[0]
        last, done = item_id(task_id, stream.produced), return_id(task_id, 0)
        target = objects.get(last)
        if target is None:
            target = objects[last] = ObjectRecord(1)
        stream.produced += 1
        share = self._shares.get(stream.actor_id)
        if share is not None:
            share.waiting += 1
        stopping = self._tasks.cancellation.stopping
        target.seen = record.task_id in stopping  # who cancels a task knows
        self._objects.hold(last)  # whoever is woken may let go of it
        self._seal(task_id, last, target, error, True, [], writer)
        completion = objects.get(done)
        if completion is not None and completion.state is not READY:
            if result.raised:
                self._objects.seal(done, completion, NOTHING, False, [], writer)
            else:
                completion.seen = True  # the last item shows it
                if isinstance(error, bytes):
                    self._objects.seal(done, completion, error, True, [], writer)
                else:
                    self._objects.seal_alias(done, completion, target.value, last)
        self._objects.release_all([last])

    def _end(self, task_id: TaskId, stream: Stream) -> None:
        stream.has_ended = True
        if stream.granted == stream.produced:
            record = self._state.objects[item_id(task_id, stream.granted)]
            record.seal(NOTHING, False, [])
            self._objects.wake(record)

    # ---- items elsewhere -------------------------------------------------------------------------

    def is_remote(self, task_id: TaskId) -> bool:
        """Whether an item of a task is on another node, as far as it is known."""
        remote = self._remote.get(task_id)
        if remote is None:
            return False
        while remote:
            record = self._state.objects.get(next(iter(remote)))
            if record is not None and record.location() is not None:
                return True
            del remote[next(iter(remote))]
        del self._remote[task_id]
        return False

    def forget_remote(self, task_id: TaskId) -> None:
        """A task will not run again for what is elsewhere."""
        self._remote.pop(task_id, None)

    def note_lost(self, object_id: ObjectId, record: TaskRecord) -> None:
        """An item was lost with its node while its task runs, or is about to run again."""
        if record.class_queue.task_class.stream:
            self._lost.setdefault(record.root_id, {})[object_id] = record.attempts

    # ---- back-pressure ---------------------------------------------------------------------------

    def _on_await(self, client_id: ClientId, message: AwaitRoom) -> None:
        record = self._state.tasks.get(message.task_id)
        if record is None or bytes(record.worker_id or b"") != client_id:
            self._answer(client_id, message, message.produced, closed=True)
            return
        self._waiters[message.task_id] = _Waiter(client_id, message)
        self._look(message.task_id)

    def _look(self, task_id: TaskId) -> None:
        """Answer the worker that waits for room for a task, if there is some."""
        waiter = self._waiters.get(task_id)
        record = self._state.tasks.get(task_id)
        if waiter is None or record is None:
            return
        produced = waiter.message.produced
        if record.is_foreign:
            progress = self._progress.get(task_id)
            consumed = 0 if progress is None else progress.consumed
            closed = progress is not None and progress.closed
            limit = _limit_elsewhere(record)
        else:
            stream = self._streams.get(task_id)
            closed = stream is None
            consumed = 0 if stream is None else stream.granted
            limit = 0 if stream is None else stream.backpressure
            share = None if stream is None else self._shares.get(stream.actor_id)
            if share is not None:
                if share.waiting + len(share.reserved) >= share.limit:
                    return
                if not limit or produced - consumed < limit:
                    share.reserved[task_id] = None
        if closed or not limit or produced - consumed < limit:
            del self._waiters[task_id]
            self._answer(waiter.client_id, waiter.message, consumed, closed)

    def _answer(self, client_id: ClientId, message: AwaitRoom, consumed: int, closed: bool) -> None:
        reply = RoomGranted(request_id=message.request_id, consumed=consumed, closed=closed)
        self._state.effects.append(Reply(client_id, reply))

    def _on_taken(self, task_id: TaskId, stream: Stream, count: int) -> None:
        self._tell_source(task_id, stream.granted, closed=False)
        share = self._shares.get(stream.actor_id)
        if share is not None:
            share.waiting -= count
            self._wake_share(share)

    def _wake_share(self, share: _Share) -> None:
        """Let generators of an actor go on, the one that waits longest first."""
        for task_id in [task_id for task_id in self._waiters if task_id in share.streams]:
            self._look(task_id)

    def _tell_source(self, task_id: TaskId, consumed: int, closed: bool) -> None:
        """Whoever runs the generator may go on, if it waits for that."""
        record = self._state.tasks.get(task_id)
        if record is not None and record.state is FORWARDED:
            if _limit_elsewhere(record) and record.node_id is not None:
                self._send_progress(record.node_id, task_id, consumed, closed)
        else:
            self._look(task_id)

    def _send_progress(self, node_id: NodeId, task_id: TaskId, consumed: int, closed: bool) -> None:
        progress = StreamProgress(task_id=task_id, consumed=consumed, closed=closed)
        self._state.effects.append(SendPeer(node_id, progress))

    def on_forwarded(self, record: TaskRecord, node_id: NodeId) -> None:
        """A generator goes to another node, which has to know what was taken before."""
        if _limit_elsewhere(record):
            stream = self._streams.get(record.root_id)
            if stream is None:
                self._send_progress(node_id, record.root_id, 0, closed=True)
            elif stream.granted:
                self._send_progress(node_id, record.root_id, stream.granted, closed=False)

    def on_progress(self, node_client: ClientId, message: StreamProgress) -> None:
        """The owner of a generator that runs here has taken items."""
        record = self._state.tasks.get(message.task_id)
        if record is not None and record.is_foreign and record.client_id == node_client:
            self._progress[message.task_id] = message
            self._look(message.task_id)

    def let_go_on(self, task_id: TaskId) -> None:
        """A task has ended or is to end: if a worker is still at it, it waits for nobody."""
        waiter = self._waiters.pop(task_id, None)
        if waiter is not None:
            self._answer(waiter.client_id, waiter.message, waiter.message.produced, closed=True)

    def forget_source(self, task_id: TaskId) -> None:
        """A generator of another node's is over here."""
        self.let_go_on(task_id)
        self._progress.pop(task_id, None)

    # ---- looking in ------------------------------------------------------------------------------

    def count(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    def holds(self) -> Iterator[ObjectId]:
        """Objects that streams hold."""
        for task_id, stream in self._streams.items():
            for index in _kept(stream):
                yield item_id(task_id, index)

    def check_invariants(self) -> None:
        """Raise AssertionError when streams, items and those who wait do not agree."""
        state = self._state
        for task_id, stream in self._streams.items():
            assert stream.granted <= stream.produced
            assert task_id in self._by_client[stream.client_id]
            target = state.objects[item_id(task_id, stream.granted)]
            if stream.granted == stream.produced:
                assert (target.state is READY) == stream.has_ended, "the end of a stream is known"
            assert stream.has_ended or task_id in state.tasks or stream.produced == 0
        assert sum(map(len, self._by_client.values())) == len(self._streams)
        for task_id in (*self._waiters, *self._progress):
            assert task_id in state.tasks, "a worker waits for room for a task that has ended"
        for share in self._shares.values():
            streams = [self._streams[task_id] for task_id in share.streams]
            assert share.waiting == sum(s.produced - s.granted for s in streams)
            assert share.reserved.keys() <= share.streams.keys()


def _limit_elsewhere(record: TaskRecord) -> int:
    """Items that may wait of a generator that its owner does not run; 0: any number.

    What an actor's streams share is known on its own node alone: for others each has all of it.
    """
    task_class = record.class_queue.task_class
    limits = [task_class.backpressure, task_class.actor_backpressure]
    return min((limit for limit in limits if limit), default=0)


def _kept(stream: Stream) -> Iterable[int]:
    """Places of the items that a stream holds."""
    return range(stream.granted, max(stream.produced, stream.granted + 1))
