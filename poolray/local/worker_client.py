"""The worker as a client: how user code in a task reaches the node.

What: requests go out on the report channel, replies and orders come back on the control channel; a
task that has to wait says so, so that its CPUs serve others meanwhile.
Who calls: `Client` in the worker's process; user code may do so from several threads. The worker's
signal handler reads what has come while user code runs.
May touch: sockets, one thread while awaits are outstanding.
Invariants: one thread at a time waits at the control channel, and hands the others their replies;
packets are taken in the order in which they came. The main thread may be interrupted (by a
KeyboardInterrupt of the signal handler) in `sleep` and nowhere else of this file.
"""

from __future__ import annotations

import _thread
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec

from poolray.client import Client
from poolray.client_link import NO_WATCH, WatchStep
from poolray.client_values import deadline_of, named
from poolray.exceptions import PoolrayError
from poolray.ids import ObjectId, TaskId, TaskIdSource, WorkerId
from poolray.local import process_state
from poolray.local.channel import SpinningReader, send_whole
from poolray.local.reactor import Doorbell
from poolray.objects.serialization import Serialized, Serializer
from poolray.objects.shared_memory import Arena
from poolray.protocol.actors import ActorReply, CallActor, CallCount, NamedActors
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    GetObjects,
    ObjectValues,
    RangeGranted,
    SubmitTasks,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.inquiry import HeadAnswer
from poolray.protocol.placement import PlacementGroupReply
from poolray.protocol.state import StateRows
from poolray.protocol.streams import AwaitRoom, RoomGranted, StreamReply
from poolray.protocol.values import Delivery, InArena, InFile
from poolray.protocol.worker import (
    ClientMessage,
    InterruptTask,
    ToWorkerControl,
    WorkerBlocked,
    WorkerNews,
    WorkerUnblocked,
)

if TYPE_CHECKING:
    from poolray.local.fork_server import WorkerSetup


T = TypeVar("T")
_Reply = (
    ObjectValues
    | WaitReply
    | RangeGranted
    | ActorReply
    | NamedActors
    | CallCount
    | StateRows
    | PlacementGroupReply
    | HeadAnswer
    | StreamReply
)
_Parts = list[_Reply]

#: The last words of a worker that its node said nonsense to.
_UNREADABLE = (
    b"poolray: worker %d ends, for its node's answer cannot be read: %s. Please report this.\n"
)

#: A thread that has handed all awaited values over waits for more this long.
_LINGER_S = 1.0


@final
class WorkerLink:
    """A worker's way to its node."""

    def __init__(
        self,
        worker_id: WorkerId,
        control: socket.socket,
        reports: socket.socket,
        spin_s: float,
        prepare_to_block: Callable[[], None],
        on_order: Callable[[InterruptTask], None],
    ) -> None:
        self._worker_id = worker_id
        self._control = control
        self._reports = reports
        self._reader = SpinningReader(control, spin_s)
        #: Gives back what waits behind the running call; only its own thread may call it.
        self._prepare_to_block = prepare_to_block
        #: Told of orders, in whatever thread reads them.
        self._on_order = on_order
        self._task_thread = threading.get_ident()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToWorkerControl).decode
        #: Wakes the thread that waits at the channel: another one has taken what came.
        self._bell = Doorbell()
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._poller.register(self._bell.descriptor, select.POLLIN)
        #: Held from receiving a packet to the end of dealing with it: keeps the order of parts.
        self._receiving = threading.Lock()
        #: Guards the fields below.
        self._lock = threading.Lock()
        self._reading = False
        #: Locks of threads that wait while another one reads; released to make them look again.
        self._followers: list[_thread.LockType] = []
        self._next_request = 0
        #: request id -> replies that came (a large one comes in parts), of open requests only.
        self._replies: dict[int, _Parts] = {}
        #: request id -> objects that it asked for, of those that were given up and not answered;
        #: less those that parts of the answer have named.
        self._abandoned: dict[int, Iterator[ObjectId]] = {}
        #: Takes note of an object that this process was told to look at and will not.
        self.let_go: Callable[[ObjectId], None] = _do_nothing
        #: request id -> what to call with its reply, of requests that nobody waits for here.
        self._calls: dict[int, Callable[[_Parts], None]] = {}
        #: Of those, the ones whose replies are complete.
        self._arrived: deque[int] = deque()
        self._listening = False  #: a thread hands them over

    def enter(self) -> None:
        """Nothing to do: who interrupts a worker's user code sees that it is in ours."""

    def leave(self) -> None:
        """The end of `enter`."""

    def send(self, message: Any) -> None:
        """Tell the node something."""
        packet = self._encode(ClientMessage(worker_id=self._worker_id, message=message))
        send_whole(self._reports, packet, self._worker_id)

    def send_news(self, topic: str, data: bytes, wait: bool) -> bool:
        """Tell the driver something; False: it needs waiting, or there is no driver."""
        packet = self._encode(WorkerNews(topic=topic, data=data))
        try:
            self._reports.send(packet, 0 if wait else socket.MSG_DONTWAIT)
        except OSError:
            return False  # the channel is full, or the driver is gone
        return True

    def submit(self, message: SubmitTasks | CallActor) -> None:
        """The same (`Link`)."""
        self.send(message)

    def peek(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """None: the node is in another process (`Link`)."""
        return None

    def get(self, object_ids: list[ObjectId], timeout_s: float | None) -> ObjectValues | None:
        """Values once all are ready or one has failed; None when the time is up."""
        request_id = self._open()
        try:
            self.send(GetObjects(request_id=request_id, object_ids=object_ids))
            parts = self._await(request_id, deadline_of(timeout_s))
            if parts is None:
                # Answered with nothing, unless the values are on their way already.
                self.send(CancelRequest(request_id=request_id))
                parts = self._await(request_id, None, tell=False)
        except KeyboardInterrupt:
            self._abandon(request_id, object_ids)
            self.send(CancelRequest(request_id=request_id))
            raise
        finally:
            self._close(request_id)
        assert parts is not None
        reply = _joined(parts)
        return reply if reply.values else None

    def fetch(self, object_ids: list[ObjectId]) -> ObjectValues:
        """Values of objects that are there, while no user code runs."""
        request_id = self._open()
        try:
            self.send(GetObjects(request_id=request_id, object_ids=object_ids))
            parts = self._await(request_id, None, tell=False)
        finally:
            self._close(request_id)
        assert parts is not None
        return _joined(parts)

    def wait(
        self,
        object_ids: list[ObjectId],
        count: int,
        timeout_s: float | None,
        fetch: bool = False,
        watch: WatchStep = NO_WATCH,
    ) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up."""
        request_id = self._open()
        try:
            message = WaitObjects(
                request_id=request_id,
                object_ids=object_ids,
                count=count,
                fetch=fetch,
                watch=watch.number,
                left=watch.left,
            )
            self.send(message)
            parts = self._await(request_id, deadline_of(timeout_s))
            if parts is None:
                self.send(CancelRequest(request_id=request_id))
                parts = self._await(request_id, None, tell=False)
        except KeyboardInterrupt:
            self.send(CancelRequest(request_id=request_id))
            raise
        finally:
            self._close(request_id)
        assert parts is not None
        assert isinstance(parts[0], WaitReply)
        return parts[0].ready

    def allocate(self, object_id: ObjectId, size_bytes: int) -> RangeGranted:
        """Where to write an object; waits while the node makes room."""
        request_id = self._open()
        try:
            self.send(
                AllocateRange(request_id=request_id, object_id=object_id, size_bytes=size_bytes)
            )
            parts = self._await(request_id, None, tell=False)
        finally:
            self._close(request_id)
        assert parts is not None
        assert isinstance(parts[0], RangeGranted)
        return parts[0]

    def ask(self, make: Callable[[int], Any]) -> Any:
        """Send the request that `make` makes of its number; gives the answer."""
        request_id = self._open()
        try:
            self.send(make(request_id))
            parts = self._await(request_id, None, tell=False)
        finally:
            self._close(request_id)
        assert parts is not None
        return parts if isinstance(parts[0], (HeadAnswer, StateRows)) else parts[0]

    def await_room(self, task_id: TaskId, produced: int) -> RoomGranted:
        """Wait until a generator may go on; the task may be interrupted meanwhile."""
        request_id = self._open()
        try:
            self.send(AwaitRoom(request_id=request_id, task_id=task_id, produced=produced))
            parts = self._await(request_id, None)
        finally:
            self._close(request_id)
        assert parts is not None
        assert isinstance(parts[0], RoomGranted)
        return parts[0]

    def when_ready(
        self, object_id: ObjectId, call: Callable[[ObjectValues], None]
    ) -> Callable[[], None]:
        """Call back once with the object's value, from a thread that serves all such calls; what
        it gives takes that back (`Link`).
        """
        return self.when_answered(
            lambda number: GetObjects(request_id=number, object_ids=[object_id]),
            lambda parts: call(_joined(parts)),
            [object_id],
        )

    def when_there(self, object_id: ObjectId, call: Callable[[], None]) -> Callable[[], None]:
        """The same for an object of which only the arrival matters (`Link`)."""
        return self.when_answered(
            lambda number: WaitObjects(request_id=number, object_ids=[object_id], count=1),
            lambda parts: call(),
            [object_id],
        )

    def when_answered(
        self,
        make: Callable[[int], Any],
        call: Callable[[_Parts], None],
        object_ids: list[ObjectId] | None = None,
    ) -> Callable[[], None]:
        """Send the request that `make` makes of its number, and call back once with the answer.

        With `object_ids` it asks for these, and is answered also when it was taken back.
        """
        request_id = self._open(call)
        self.send(make(request_id))

        def forget() -> None:
            if object_ids is None:
                self._close(request_id)
            elif self._abandon(request_id, object_ids):
                self.send(CancelRequest(request_id=request_id))

        return forget

    # ---- replies ---------------------------------------------------------------------------------

    def _open(self, call: Callable[[_Parts], None] | None = None) -> int:
        with self._lock:
            self._next_request += 1
            request_id = self._next_request
            self._replies[request_id] = []
            if call is not None:
                self._calls[request_id] = call
                if not self._listening:
                    self._listening = True
                    thread = threading.Thread(
                        target=self._listen, name="poolray-replies", daemon=True
                    )
                    thread.start()
                else:
                    self._wake_followers()
            return request_id

    def _close(self, request_id: int) -> bool:
        """Nobody waits for it any more; False when it had been closed."""
        with self._lock:
            self._calls.pop(request_id, None)
            return self._replies.pop(request_id, None) is not None

    def _abandon(self, request_id: int, object_ids: list[ObjectId]) -> bool:
        """Nobody will look at the values that were asked for, also if they are on their way; False
        when they have been handed over.
        """
        with self._lock:
            self._calls.pop(request_id, None)
            parts = self._replies.pop(request_id, None)
            if parts is None:
                return False
            # (The node answers once: with the values, or with nothing once it has been told.)
            rest = self._abandoned[request_id] = iter(object_ids)
            for part in parts:
                self._drop(part, rest)
            return True

    def _drop(self, part: _Reply, rest: Iterator[ObjectId]) -> None:
        """A part of an answer that nobody waits for: let go of what it names; under the lock."""
        if isinstance(part, ObjectValues):
            for value, object_id in zip(part.values, rest, strict=False):
                if isinstance(value, InArena) and not value.node_id:
                    self.let_go(object_id)
        if _is_last(part):
            self._abandoned.pop(part.request_id, None)

    def _await(self, request_id: int, deadline: float | None, tell: bool = True) -> _Parts | None:
        """All parts of a reply; None when the time is up.

        With `tell` the task may be interrupted meanwhile, and the node is told that it waits.
        """
        sleep = self.sleep if tell else _wait_out
        told = False
        try:
            while True:
                with self._lock:
                    parts = self._replies[request_id]
                    if parts and _is_last(parts[-1]):
                        return parts
                    if deadline is not None and time.monotonic() >= deadline:
                        return None
                    follower = self._follow_or_read()
                if follower is not None:
                    if tell and not told:
                        told = self._tell_blocked()
                    sleep(follower.acquire, True, _lock_timeout(deadline))
                    continue
                try:
                    if not self._reader.poll_soon():
                        if tell and not told:
                            told = self._tell_blocked()
                        self._wait_at_channel(deadline, sleep)
                        self._reader.note_slept()
                    self._receive()
                finally:
                    self._stop_reading()
        finally:
            if told:
                self._reports.send(self._encode(WorkerUnblocked(worker_id=self._worker_id)))

    def _follow_or_read(self) -> _thread.LockType | None:
        """Be the one who reads, or get a lock to wait for instead; under the lock."""
        if not self._reading:
            self._reading = True
            return None
        follower = _thread.allocate_lock()
        follower.acquire()
        self._followers.append(follower)
        return follower

    def _stop_reading(self) -> None:
        with self._lock:
            self._reading = False
            self._wake_followers()

    def _wake_followers(self) -> None:
        """Make the threads that wait for a reader look again; under the lock."""
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.release()

    def sleep(self, wait: Callable[..., T], *args: Any) -> T:
        """Call what blocks, and may be interrupted."""
        return wait(*args)

    def _wait_at_channel(self, deadline: float | None, sleep: Callable[..., Any]) -> None:
        """Until something has come, somebody has taken it, or the time is up."""
        remaining = _remaining(deadline)
        timeout_ms = None if remaining is None else remaining * 1000.0
        for descriptor, _ in sleep(self._poller.poll, timeout_ms):
            if descriptor == self._bell.descriptor:
                self._bell.clear()

    def _receive(self) -> bool:
        """Take the next packet; False when there is none."""
        with self._receiving:
            packet = self._reader.take_nowait()
            if packet is None:
                return False
            if not packet:
                raise PoolrayError("the node that this worker belongs to is gone")
            self._take(packet)
            return True

    def receive_all(self) -> None:
        """From the signal handler: take what has come, whoever waits for it."""
        try:
            if not self._receive():
                return
            while self._receive():
                pass
        except PoolrayError:
            return  # whoever waits will see it too
        self._bell.ring()

    def _take(self, packet: bytes) -> None:
        try:
            message = self._decode(packet)
        except msgspec.DecodeError as error:
            # Whoever waits for this would wait for ever: nobody can tell who it was for.
            os.write(2, _UNREADABLE % (os.getpid(), str(error).encode()))
            os._exit(1)
        if isinstance(message, InterruptTask):
            self._on_order(message)
            return
        with self._lock:
            parts = self._replies.get(message.request_id)
            if parts is not None:
                parts.append(message)
                if message.request_id in self._calls and _is_last(message):
                    self._arrived.append(message.request_id)
            elif (rest := self._abandoned.get(message.request_id)) is not None:
                self._drop(message, rest)
            self._wake_followers()

    def _listen(self) -> None:
        """Hand awaited values over until there have been none for a while."""
        idle = False
        while True:
            arrived: list[tuple[Callable[[_Parts], None], _Parts]] = []
            with self._lock:
                while self._arrived:
                    request_id = self._arrived.popleft()
                    call = self._calls.pop(request_id, None)
                    if call is not None:
                        arrived.append((call, self._replies.pop(request_id)))
                if idle and not arrived and not self._calls:
                    self._listening = False
                    return
                waits = bool(self._calls) and not arrived
                follower = None
                if waits:
                    follower = self._follow_or_read()
                elif not arrived:
                    follower = _thread.allocate_lock()
                    follower.acquire()
                    self._followers.append(follower)
            idle = False
            for call, parts in arrived:
                call(parts)
            if waits and follower is None:
                try:
                    self._wait_at_channel(None, _wait_out)
                    self._receive()
                except PoolrayError:
                    return  # the node is gone, and with it this process in a moment
                finally:
                    self._stop_reading()
            elif follower is not None:
                idle = not follower.acquire(True, -1 if waits else _LINGER_S)

    def _tell_blocked(self) -> bool:
        """The task has to wait: let go of what it holds. Of several threads, the task's own one
        speaks for it.
        """
        if threading.get_ident() != self._task_thread:
            return False
        self._prepare_to_block()
        self._reports.send(self._encode(WorkerBlocked(worker_id=self._worker_id)))
        return True


def _do_nothing(_: ObjectId) -> None:
    """Before there is a client."""


def _wait_out(wait: Callable[..., T], *args: Any) -> T:
    """Call what blocks; nothing interrupts it."""
    return wait(*args)


def _is_last(message: _Reply) -> bool:
    """Whether a reply is complete with this."""
    return not (isinstance(message, (ObjectValues, StateRows, HeadAnswer)) and message.more)


def _joined(parts: _Parts) -> ObjectValues:
    """The parts of a reply as one."""
    first = parts[0]
    assert isinstance(first, ObjectValues)
    if len(parts) == 1:
        return first
    values: list[bytes | InArena | InFile] = []
    errors: list[int] = []
    for part in parts:
        assert isinstance(part, ObjectValues)
        errors.extend(len(values) + index for index in part.errors)
        values.extend(part.values)
    return ObjectValues(request_id=first.request_id, values=values, errors=errors)


def _lock_timeout(deadline: float | None) -> float:
    remaining = _remaining(deadline)
    return -1 if remaining is None else min(remaining, threading.TIMEOUT_MAX)


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


@final
class WorkerClient:
    """What a worker needs of a client, for its own loop and for user code."""

    def __init__(
        self,
        worker_id: WorkerId,
        control: socket.socket,
        reports: socket.socket,
        arena: Arena,
        setup: WorkerSetup,
        prepare_to_block: Callable[[], None],
        on_order: Callable[[InterruptTask], None],
    ) -> None:
        config = setup.config
        self.link = WorkerLink(
            worker_id,
            control,
            reports,
            config.spin_s,
            prepare_to_block,
            on_order,
        )
        #: By value for what only this process has; arrays of plain tasks stay out of band.
        self._object_serializer = Serializer(main_definitions=None, out_of_band_all=True)
        self._caller_serializer = Serializer(main_definitions=None, out_of_band_all=False)
        self.api = Client(
            self.link,
            arena,
            config,
            TaskIdSource(os.urandom(16)),
            self._object_serializer,
            is_worker=True,
            tasks_group=setup.tasks_group,
        )
        self.api.current_task = process_state.current_task_id
        self.link.let_go = self.api.unview
        self.take_reference_changes = self.api.take_reference_changes
        self.viewed_only = self.api.viewed_only
        self.take_view_changes = self.api.take_view_changes
        self.next_object_id = self.api.next_object_id

    def load(self, value: bytes | InArena | InFile, writable: bool) -> Any:
        """A value that a packet has brought; see `Client.load`."""
        return self.api.load(value, writable, is_counted=False)

    def fetch(self, object_ids: list[ObjectId]) -> list[Any]:
        """Arguments that were too much for a packet.

        Raises
        ------
        Exception
            One of them is an error, or is lost.
        """
        api = self.api
        refs = [api.adopt(object_id) for object_id in object_ids]  # until all of them are loaded
        api.sync_references()
        reply = self.link.fetch(object_ids)
        if reply.errors:
            first = reply.errors[0]
            raise api.load_error(named(reply.values[first], object_ids[first]))
        pairs = zip(reply.values, refs, strict=True)
        return [api.load(named(value, ref._id), False) for value, ref in pairs]

    def serializer_for(self, delivery: Delivery) -> Serializer:
        """The serializer of results."""
        if delivery is Delivery.CALLER:
            return self._caller_serializer
        return self._object_serializer

    def store(self, object_id: ObjectId, data: bytes | Serialized) -> InArena | InFile:
        """Write a large value; see `Client.store`."""
        return self.api.store(object_id, data)
