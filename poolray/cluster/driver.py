"""A driver of a cluster: its requests go to its node's daemon, whose machine decides.

      API ──requests──▶ DriverRuntime ══Line: Unix socket, or TCP══▶ node's daemon
       ▲                     │ Reactor: the thread that waits is the one that reads
       └── values ◀── arena, mapped, or pieces of values; replies, what workers print ◀══╝

What: the driver's side of the conversation that `cluster/sessions.py` leads, or
`cluster/remote_sessions.py` with drivers outside of the cluster.
Who calls: `session.py`, when it is given an address; its client, through `Link`.
May touch: a line, threads, standard streams.
Invariants: replies are read by one thread at a time; when the daemon is gone, everybody who waits
is told so.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, final

import msgspec

from poolray.client import Client
from poolray.client_link import NO_WATCH, WatchStep
from poolray.cluster import places
from poolray.cluster.line import Line
from poolray.cluster.output import OutputFilter
from poolray.cluster.remote_values import Downloads, pieces_of
from poolray.cluster.stream import FRAME_BYTES_MAX
from poolray.config import Config
from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.direct.loans import Door, Loans
from poolray.exceptions import ClusterConnectionError, ObjectStoreFullError, OutOfDiskError
from poolray.ids import WORKER_ID_BYTES, NodeId, ObjectId, TaskIdSource
from poolray.local import news, process_state
from poolray.local.callbacks import CallbackThread
from poolray.local.direct_host import DirectHost, sooner
from poolray.local.reactor import Guard, Interrupts, Reactor, Waitable
from poolray.objects.checksums import Checksum
from poolray.objects.serialization import Serialized, Serializer
from poolray.protocol.actors import CallActor
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    ClientReply,
    GetObjects,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReturnRange,
    SubmitTasks,
    UnpinObjects,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.cluster import Farewell, News, Output, UserError, UserNotice
from poolray.protocol.inquiry import HeadAnswer
from poolray.protocol.remote import EndWriting, Piece, WritePiece, Written
from poolray.protocol.state import StateRows
from poolray.protocol.values import InArena, InFile

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(
    ClientReply | Farewell | Output | News | UserNotice | UserError | Piece | Written
).decode

#: What is handed over outside of the guard, in the order in which it came.
_FOR_USERS = (Output, News, UserNotice, UserError)
#: Replies that may be too large for one message.
_IN_PARTS = (ObjectValues, StateRows, HeadAnswer)
#: A daemon elsewhere may take so long to answer that a request was taken back.
_PATIENCE_S = 3.0
#: Of these a program sends many: it waits while the daemon has not taken earlier ones.
_MANY = frozenset({SubmitTasks, CallActor, PutObject, WritePiece})


@final
class _Request(Waitable):
    """A request of a thread of this process."""

    __slots__ = ("call", "kept", "object_ids", "parts")

    def __init__(self) -> None:
        super().__init__()
        #: The reply; a large one comes in parts. Nothing once done: the daemon is gone.
        self.parts: list[Any] = []
        #: Called with the reply instead of waking a thread.
        self.call: Callable[[Any], None] | None = None
        #: Values of these were asked for.
        self.object_ids: list[ObjectId] = []
        #: Refs to them: until their values are here, they must not be let go of.
        self.kept: list[Any] = []


@final
class DriverRuntime:
    """This process as a driver of a cluster.

    Parameters
    ----------
    line : Line
        To the daemon that has signed it on; ends with this.
    address : str
        By which the cluster was found.
    """

    def __init__(self, line: Line, address: str) -> None:
        self._line = line
        self.address = address
        self.welcome = welcome = line.welcome
        self.pid = os.getpid()
        self.node_id = NodeId(welcome.node_id)
        self.job_id = welcome.job_id
        self.driver_id = os.urandom(WORKER_ID_BYTES)
        fields = Config.__dataclass_fields__
        known = {k: v for k, v in welcome.config.items() if k in fields}
        self.config = Config(**{k: type(getattr(Config(), k))(v) for k, v in known.items()})
        self.guard = Guard()
        self.reactor = Reactor(self, self.guard, self.config.spin_s, self.config.takeover_s)
        self.interrupts = Interrupts(self.guard)
        self.ended = ""
        self._closed = False
        self._request_ids = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._deliveries: deque[Any] = deque()
        #: What finalizers of faces want done (they may only append).
        self.later: deque[Callable[[], object]] = deque()
        self._output = OutputFilter(welcome.node_address)
        #: Why the daemon is gone; empty: it is there.
        self._lost = ""
        #: Values that are brought here; None: they are seen where they lie.
        self._downloads: Downloads | None = None
        task_ids = TaskIdSource(os.urandom(16))
        # The daemon's workers have nothing of our `__main__`, nor of modules of ours that they
        # cannot import: these go by value.
        serializer = Serializer(
            main_definitions={}, out_of_band_all=True, modules=frozenset(sys.builtin_module_names)
        )
        self.client = Client(
            self,
            line.arena,
            self.config,
            task_ids,
            serializer,
            tasks_group=welcome.group_id,
        )
        if line.arena is None:
            self._downloads = Downloads(self.send, self._request_ids)
            self.client.upload = self._upload
        elif self.config.direct_calls_after and not self.config.record_ref_creation_sites:
            host = DirectHost(
                self.reactor,
                places.machine_id(),
                lambda error: self._deliveries.append(UserError(value=error)),
            )
            worth = self.config.direct_calls_after
            direct = self.client.direct = DirectCalls(self.client, host, worth)
            address, ports = welcome.node_address, welcome.direct_ports
            direct.loans = Loans(direct, self.client, host, address, ports, worth)
        #: Runs users' callbacks, of Pools and Executors.
        self.callbacks = CallbackThread()
        self.client.ring_when_dropped(self.reactor.ring)
        self.reactor.watch_other(line, self)  # type: ignore[arg-type]
        self.reactor.ensure_background()
        process_state.on_fork_in_child(self._abandon)

    # ---- what the reactor drives (`Pumped`) ------------------------------------------------------

    def on_packet(self, host: Any, packet: bytes) -> bool:
        """Workers are the daemon's: none reports here."""
        return False

    def on_all_read(self) -> None:
        """Nothing was collected."""

    def on_server_news(self, host: Any) -> None:
        """The daemon says something, or is gone; or a worker answers a direct call, or comes."""
        if type(host) is Connection or type(host) is Door:
            self._unless_lost(host.answer)
            return
        if self._closed:
            return
        frames = self._line.read()
        if frames is None:
            self._lose(self._line.lost)
            return
        for body in frames:
            self._take(_decode(body))

    def _take(self, message: Any) -> None:
        kind = type(message)
        if kind is Farewell:
            self._lose(message.reason)
        elif kind in _FOR_USERS:
            self._deliveries.append(message)
        elif kind is Piece:
            assert self._downloads is not None
            self._downloads.take(message, self._requests.__contains__)
        else:
            request = self._requests.get(message.request_id)
            if request is None:
                return
            request.parts.append(message)
            if isinstance(message, _IN_PARTS) and message.more:
                return
            if kind is ObjectValues and self._downloads is not None:
                answer, request.parts = _joined(request.parts), []
                if self._downloads.begin(answer, request.object_ids, self._answer):
                    return
                request.parts = [answer]
            self._finish(message.request_id, request)

    def _answer(self, reply: ObjectValues) -> None:
        """All values of an answer are here."""
        request = self._requests.get(reply.request_id)
        if request is not None:
            request.parts = [reply]
            self._finish(reply.request_id, request)

    def _finish(self, request_id: int, request: _Request) -> None:
        self._requests.pop(request_id, None)
        request.kept = []
        if request.call is not None:
            self._deliveries.append(request)
        request.finish()
        self.reactor.wake_if_other()

    def _lose(self, reason: str) -> None:
        """Nobody answers any more."""
        if self._lost or self._closed:
            return
        self._lost = reason
        self.reactor.unwatch_other(self._line)  # type: ignore[arg-type]
        for request in list(self._requests.values()):
            self._fail(request)
        self._requests.clear()
        if self.client.direct is not None:
            error = pickle.dumps(self._lost_error())
            self._unless_lost(self.client.direct.give_up, error)
        self.reactor.wake_if_other()

    def _fail(self, request: _Request) -> None:
        """There will be no answer."""
        if request.call is not None:  # a future, say: it is told as whoever waits is
            error = pickle.dumps(self._lost_error())
            request.parts = [ObjectValues(request_id=0, values=[error], errors=[0])]
            self._deliveries.append(request)
        request.finish()

    def _lost_error(self) -> ClusterConnectionError:
        return ClusterConnectionError(
            f"The connection to the cluster at {self.welcome.head_address} is gone: {self._lost}. "
            "Call shutdown(), then init() to connect again; objects and actors of this job are "
            "lost."
        )

    def settle(self) -> None:
        """Hand over what is for users."""
        deliveries = self._deliveries
        while deliveries:
            try:
                item = deliveries.popleft()
            except IndexError:
                break
            self._unless_lost(self._hand_over, item)
        self._output.flush_due()
        while self.later:
            try:
                call = self.later.popleft()
            except IndexError:
                break
            self._unless_lost(call)
        if self.has_notes():
            self._unless_lost(self.client.sync_references)

    def has_notes(self) -> bool:
        """Whether refs have died of which the daemon was not told."""
        return bool(self.client.dropped) and not self._lost

    def _unless_lost(self, call: Callable[..., object], *args: Any) -> None:
        """Call what may tell the node something. That it is gone is told to those who wait, not to
        the thread that happens to read.
        """
        try:
            call(*args)
        except ClusterConnectionError:
            if not self._lost:
                raise

    def _hand_over(self, item: Any) -> None:
        kind = type(item)
        if kind is _Request:
            item.call(_joined(item.parts))
        elif kind is Output:
            self._output.show(item)
        elif kind is News:
            is_near = item.address == self.welcome.node_address
            news.hand_over(item.topic, item.data, "" if is_near else item.address)
        elif kind is UserNotice and item.is_warning:
            import warnings

            warnings.warn(item.text, RuntimeWarning, stacklevel=2)
        elif kind is UserNotice:
            self._output.say(f"poolray: {item.text}\n")
        elif kind is UserError and not self.config.ignore_unhandled_errors and not self._closed:
            error = self.client.load_error(item.value)
            self._output.say(
                f"Unhandled error (suppress with POOLRAY_IGNORE_UNHANDLED_ERRORS=1): {error}\n"
            )

    def is_unsettled(self) -> bool:
        """Whether something waits to be handed over."""
        return bool(self._deliveries) or bool(self.later)

    def next_timeout(self) -> float | None:
        """Seconds until repeated lines are due, or direct calls want something."""
        return sooner(self._output.next_timeout(), self.client.direct)

    def tick(self) -> None:
        """Time has passed: `settle` looks, too."""
        if self.client.direct is not None and not self._lost:
            self._unless_lost(self.client.direct.tick)

    def is_crowded(self) -> bool:
        """Of who runs on this machine's cores the daemon knows: we poll briefly."""
        return True

    def has_work(self) -> bool:
        """Whether the daemon will answer something."""
        direct = self.client.direct
        return bool(self._requests or self._deliveries or (direct is not None and direct.pending))

    # ---- `Link` ----------------------------------------------------------------------------------

    def enter(self) -> None:
        """Hold Ctrl-C back until `leave`."""
        self.guard.enter()

    def leave(self) -> None:
        """The end of `enter`."""
        self.guard.leave()

    def send(self, message: Any) -> None:
        """Tell the node something."""
        body = _encode(message)
        if len(body) > FRAME_BYTES_MAX:
            raise ValueError(f"a request of {len(body) >> 20} MiB is too large: use put()")
        self.guard.enter()
        try:
            if self._lost:
                raise self._lost_error()
            self._line.send(body, type(message) in _MANY)
        except OSError as error:
            self._lose(self._line.lost)
            raise self._lost_error() from error
        finally:
            self.guard.leave()

    def _open(self) -> tuple[_Request, int]:
        request, request_id = _Request(), next(self._request_ids)
        self._requests[request_id] = request
        return request, request_id

    def _ask(
        self, request: _Request, request_id: int, message: Any, timeout_s: float | None
    ) -> Any:
        try:
            self.send(message)
            if not self.reactor.wait(request, timeout_s):
                # Answered with what there is, unless the answer is on its way already. (A daemon
                # elsewhere may be out of reach just now: then there is nothing.)
                self.send(CancelRequest(request_id=request_id))
                patience_s = None if self._downloads is None else _PATIENCE_S
                if not self.reactor.wait(request, patience_s):
                    self._requests.pop(request_id, None)
                    return None
        except BaseException:
            self._forget(request_id)
            raise
        if not request.parts:
            raise self._lost_error()
        return _joined(request.parts)

    def _forget(self, request_id: int) -> None:
        """Nobody waits for it any more."""
        if self._requests.pop(request_id, None) is not None and not self._lost:
            self.send(CancelRequest(request_id=request_id))

    def submit(self, message: SubmitTasks | CallActor) -> None:
        """The same (`Link`)."""
        self.send(message)

    def peek(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """None: the node is in another process (`Link`)."""
        return None

    def get(self, object_ids: list[ObjectId], timeout_s: float | None) -> ObjectValues | None:
        """Values once all are ready or one has failed; None when the time is up."""
        request, request_id = self._open()
        request.object_ids = object_ids
        message = GetObjects(request_id=request_id, object_ids=object_ids)
        try:
            reply: ObjectValues | None = self._ask(request, request_id, message, timeout_s)
        except BaseException:
            if request.parts and not self._lost:  # nobody will look at these
                values = zip(object_ids, _joined(request.parts).values)
                near = [o for o, v in values if type(v) is InArena and not v.node_id]
                self.send(UnpinObjects(object_ids=near))
            raise
        return reply if reply is not None and reply.values else None

    def wait(
        self,
        object_ids: list[ObjectId],
        count: int,
        timeout_s: float | None,
        fetch: bool = False,
        watch: WatchStep = NO_WATCH,
    ) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up."""
        request, request_id = self._open()
        message = WaitObjects(
            request_id=request_id,
            object_ids=object_ids,
            count=count,
            fetch=fetch,
            watch=watch.number,
            left=watch.left,
        )
        reply: WaitReply | None = self._ask(request, request_id, message, timeout_s)
        return reply.ready if reply is not None else []

    def allocate(self, object_id: ObjectId, size_bytes: int) -> RangeGranted:
        """Where to write an object; waits while the node makes room."""
        request, request_id = self._open()
        message = AllocateRange(request_id=request_id, object_id=object_id, size_bytes=size_bytes)
        try:
            self.send(message)
            # The caller holds Ctrl-C back for the sake of what it writes; nothing is written yet.
            self.guard.sleep(self.reactor.wait, request, None)
        except BaseException:
            if not self._lost:
                self._forget(request_id)
                self.send(ReturnRange(object_id=object_id))  # if it was granted meanwhile
            raise
        if not request.parts:
            raise self._lost_error()
        granted: RangeGranted = request.parts[0]
        return granted

    def _upload(self, object_id: ObjectId, serialized: Serialized) -> InArena | InFile:
        """Write a large value to the node's memory, or to its disk when that has no room.

        Raises
        ------
        ObjectStoreFullError
            There is room in neither, or it could not be written (`OutOfDiskError`: to disk).
        """
        size = serialized.size_bytes
        granted = self.allocate(object_id, size)
        if granted.refusal:
            raise OutOfDiskError(size_bytes=size, reason=granted.refusal)
        checksum = Checksum() if granted.offset < 0 else None
        try:
            note = None if checksum is None else checksum.update
            for piece in pieces_of(object_id, serialized, note):
                # The caller holds Ctrl-C back; between two pieces it may come.
                self.guard.sleep(self.send, piece)
            written: Written = self.guard.sleep(
                self.ask, lambda number: EndWriting(request_id=number, object_id=object_id)
            )
            if written.failure:
                kind = OutOfDiskError if written.is_disk_full else ObjectStoreFullError
                raise kind(size_bytes=size, reason=f"it cannot be written ({written.failure})")
        except BaseException:
            if not self._lost:
                self.send(ReturnRange(object_id=object_id))
            raise
        if checksum is None:
            return InArena(object_id=object_id, offset=granted.offset, size_bytes=size)
        return InFile(
            object_id=object_id,
            path=granted.path,
            size_bytes=size,
            checksum=checksum.value(),
        )

    def ask(self, make: Callable[[int], Any]) -> Any:
        """Send the request that `make` makes of its number; gives the answer."""
        request, request_id = self._open()
        return self._ask(request, request_id, make(request_id), None)

    def when_ready(
        self, object_id: ObjectId, call: Callable[[ObjectValues], None]
    ) -> Callable[[], None]:
        """Call back once with the object's value; what it gives takes that back."""
        return self._when_answered(
            lambda number: GetObjects(request_id=number, object_ids=[object_id]), call, object_id
        )

    def when_there(self, object_id: ObjectId, call: Callable[[], None]) -> Callable[[], None]:
        """The same for an object of which only the arrival matters."""
        return self._when_answered(
            lambda number: WaitObjects(request_id=number, object_ids=[object_id], count=1),
            lambda reply: call(),
        )

    def _when_answered(
        self,
        make: Callable[[int], Any],
        call: Callable[[Any], None],
        wanted: ObjectId | None = None,
    ) -> Callable[[], None]:
        request, request_id = self._open()
        request.call = call
        if wanted is not None and self._downloads is not None:
            request.object_ids, request.kept = [wanted], [self.client.adopt(wanted)]
        try:
            self.send(make(request_id))
        except ClusterConnectionError:
            if self._requests.pop(request_id, None) is not None:
                self._fail(request)
        self.reactor.ensure_background()
        return lambda: self._forget(request_id)

    # ---- the end ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._closed

    def shutdown(self) -> None:
        """Leave the cluster: the job ends, and all that it holds."""
        if self._closed or self.pid != os.getpid():
            return
        self._drain_output()
        self._closed = True
        self.ended = "has been shut down"
        self.client.ended = "belongs to a runtime that has been shut down"
        if not self._lost:
            self.reactor.unwatch_other(self._line)  # type: ignore[arg-type]
        for request in list(self._requests.values()):
            request.finish()
        self._requests.clear()
        if self.client.direct is not None:
            self.client.direct.close()
        self.reactor.stop()
        self.reactor.wait_for_callers(self.config.stop_timeout_s)
        self.callbacks.stop()
        self._output.flush_all()
        self.interrupts.restore()
        process_state.off_fork_in_child(self._abandon)
        self._line.close()
        self.reactor.close()

    def _drain_output(self) -> None:
        """Show what workers printed before their results were sent: it came before these."""
        self.reactor.pump()  # unless somebody reads already
        self.guard.enter()
        try:
            self.settle()
        finally:
            self.guard.leave()

    def _abandon(self) -> None:
        """In a forked child: close the parent's channel here, touch nothing else."""
        self._closed = True
        self.ended = self.client.ended = "belongs to the parent process of this fork"
        self.guard.reset()
        self.interrupts.restore()
        if self.client.direct is not None:
            self.client.direct.close()
        self._line.abandon()
        self.reactor.close()


def _joined(parts: list[Any]) -> Any:
    """The parts of a reply as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, HeadAnswer):
        return msgspec.structs.replace(first, data=b"".join(p.data for p in parts), more=False)
    if isinstance(first, StateRows):
        rows = [row for part in parts for row in part.rows]
        return msgspec.structs.replace(parts[-1], rows=rows)
    values: list[Any] = []
    errors: list[int] = []
    for part in parts:
        errors.extend(len(values) + index for index in part.errors)
        values.extend(part.values)
    return ObjectValues(request_id=first.request_id, values=values, errors=errors)


__all__ = ["DriverRuntime"]
