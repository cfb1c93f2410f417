"""The worker as a client: how user code in a task reaches the node.

What: requests go out on the report channel, replies come back on the control channel; a task that
has to wait says so, so that its CPUs serve others meanwhile.
Who calls: `Client` in the worker's process; user code may do so from several threads.
May touch: sockets.
Invariants: one thread at a time reads the control channel, and hands the others their replies.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import msgspec

from poolray.client import Client, deadline_of
from poolray.exceptions import PoolrayError
from poolray.ids import ObjectId, TaskIdSource, WorkerId
from poolray.local.channel import SpinningReader, receive_nowait, wait_readable
from poolray.objects.serialization import Serialized, Serializer
from poolray.objects.shared_memory import Arena
from poolray.protocol.actors import ActorReply, CallCount, NamedActors
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    GetObjects,
    ObjectValues,
    RangeGranted,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.values import Delivery, InArena, InFile
from poolray.protocol.worker import (
    ClientMessage,
    ToWorkerControl,
    WorkerBlocked,
    WorkerUnblocked,
)

if TYPE_CHECKING:
    from poolray.local.fork_server import WorkerSetup


_Reply = ObjectValues | WaitReply | RangeGranted | ActorReply | NamedActors | CallCount


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
    ) -> None:
        self._worker_id = worker_id
        self._control = control
        self._reports = reports
        self._reader = SpinningReader(control, spin_s)
        #: Gives back what waits behind the running call; only its own thread may call it.
        self._prepare_to_block = prepare_to_block
        self._task_thread = threading.get_ident()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToWorkerControl).decode
        #: Guards the fields below.
        self._condition = threading.Condition()
        self._reading = False
        self._next_request = 0
        #: request id -> replies that came (a large one comes in parts), of open requests only.
        #: request id -> whom to call with the reply, for requests that no thread waits for.
        self._calls: dict[int, Callable[[ObjectValues], None]] = {}
        self._caller: threading.Thread | None = None
        self._replies: dict[int, list[_Reply]] = {}

    def enter(self) -> None:
        """Ctrl-C does not reach workers: there is nothing to hold back."""

    def leave(self) -> None:
        """The end of `enter`."""

    def send(self, message: Any) -> None:
        """Tell the node something."""
        self._reports.send(self._encode(ClientMessage(worker_id=self._worker_id, message=message)))

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
        finally:
            self._close(request_id)
        assert parts is not None
        if len(parts) == 1:
            assert isinstance(parts[0], ObjectValues)
            return parts[0] if parts[0].values else None
        values: list[bytes | InArena | InFile] = []
        errors: list[int] = []
        for part in parts:
            assert isinstance(part, ObjectValues)
            errors.extend(len(values) + index for index in part.errors)
            values.extend(part.values)
        return ObjectValues(request_id=request_id, values=values, errors=errors)

    def wait(self, object_ids: list[ObjectId], count: int, timeout_s: float | None) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up."""
        request_id = self._open()
        try:
            self.send(WaitObjects(request_id=request_id, object_ids=object_ids, count=count))
            parts = self._await(request_id, deadline_of(timeout_s))
            if parts is None:
                self.send(CancelRequest(request_id=request_id))
                parts = self._await(request_id, None)
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
        return parts[0]

    def when_ready(self, object_id: ObjectId, call: Callable[[ObjectValues], None]) -> None:
        """Call back once with the object's value, from whichever thread reads it."""
        with self._condition:
            self._next_request = request_id = self._next_request + 1
            self._replies[request_id] = []
            self._calls[request_id] = call
            if self._caller is None:
                self._caller = threading.Thread(
                    target=self._call_back, name="poolray-futures", daemon=True
                )
                self._caller.start()
            self._condition.notify_all()
        self.send(GetObjects(request_id=request_id, object_ids=[object_id]))

    def _call_back(self) -> None:
        """The thread that reads replies while nobody waits but those who are called back."""
        while True:
            with self._condition:
                if self._reading or not self._calls:
                    self._condition.wait()
                    continue
                self._reading = True
            try:
                packet = self._read(None)
            finally:
                with self._condition:
                    self._reading = False
                    self._condition.notify_all()
            if packet == b"":
                return  # the node is gone: nothing will come any more
            if packet is not None:
                self._take(packet)

    # ---- replies ---------------------------------------------------------------------------------

    def _open(self) -> int:
        with self._condition:
            self._next_request += 1
            self._replies[self._next_request] = []
            return self._next_request

    def _close(self, request_id: int) -> None:
        with self._condition:
            self._replies.pop(request_id, None)

    def _await(
        self, request_id: int, deadline: float | None, tell: bool = True
    ) -> list[_Reply] | None:
        """All parts of a reply; None when the time is up."""
        told = False
        try:
            while True:
                with self._condition:
                    parts = self._replies[request_id]
                    if parts and not getattr(parts[-1], "more", False):
                        return parts
                    if deadline is not None and time.monotonic() >= deadline:
                        return None
                    if self._reading:
                        self._condition.wait(_remaining(deadline))
                        continue
                    self._reading = True
                try:
                    packet = self._poll()
                    if packet is None and tell and not told:
                        told = self._tell_blocked()
                    if packet is None:
                        packet = self._read(deadline)
                finally:
                    with self._condition:
                        self._reading = False
                        self._condition.notify_all()
                if packet is not None:
                    self._take(packet)
        finally:
            if told:
                self._reports.send(self._encode(WorkerUnblocked(worker_id=self._worker_id)))

    def _poll(self) -> bytes | None:
        return self._reader.receive_soon()

    def _read(self, deadline: float | None) -> bytes | None:
        if not wait_readable(self._control, _remaining(deadline)):
            return None
        return receive_nowait(self._control)

    def _take(self, packet: bytes) -> None:
        if not packet:
            raise PoolrayError("the node that this worker belongs to is gone")
        message = self._decode(packet)
        with self._condition:
            parts = self._replies.get(message.request_id)
            if parts is not None:
                parts.append(message)
            call = self._calls.pop(message.request_id, None) if self._calls else None
            if call is not None:
                del self._replies[message.request_id]
            self._condition.notify_all()
        if call is not None:
            assert isinstance(message, ObjectValues)  # of one value, hence in one part
            call(message)

    def _tell_blocked(self) -> bool:
        """The task has to wait: let go of what it holds. Of several threads, the task's own one
        speaks for it.
        """
        if threading.get_ident() != self._task_thread:
            return False
        self._prepare_to_block()
        self._reports.send(self._encode(WorkerBlocked(worker_id=self._worker_id)))
        return True


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
    ) -> None:
        config = setup.config
        self.link = WorkerLink(worker_id, control, reports, config.spin_s, prepare_to_block)
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
        )
        self.take_reference_changes = self.api.take_reference_changes
        self.viewed_only = self.api.viewed_only
        self.take_view_changes = self.api.take_view_changes
        self.next_object_id = self.api.next_object_id

    def load(self, value: bytes | InArena | InFile, writable: bool) -> Any:
        """A value that a packet has brought; see `Client.load`."""
        return self.api.load(value, writable, is_counted=False)

    def serializer_for(self, delivery: Delivery) -> Serializer:
        """The serializer of results."""
        if delivery is Delivery.CALLER:
            return self._caller_serializer
        return self._object_serializer

    def store(self, object_id: ObjectId, data: bytes | Serialized) -> InArena | InFile:
        """Write a large value; see `Client.store`."""
        return self.api.store(object_id, data)
