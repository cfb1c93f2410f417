"""Direct calls on a bench: no node and no worker, the ends of real connections in one process.

What: `DirectBench` has the caller's side, keeps what it tells its node, and plays the workers.
Who calls: `test_direct_*.py`.
May touch: sockets.
Invariants: nothing happens between two steps of a test; what the node is told is in `sent`.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from poolray.direct.addresses import Offer, come_to
from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.direct.ends import End
from poolray.direct.loans import Door, Loan, Loans
from poolray.direct.route import ActorRoute
from poolray.ids import (
    ActorId,
    ClassId,
    FunctionId,
    GroupId,
    ObjectId,
    TaskIdSource,
    WorkerId,
    return_id,
    task_of,
)
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.protocol.client import ObjectValues
from poolray.protocol.values import CallKind, Outcome, TaskClass, identified
from poolray.protocol.worker import InterruptTask, RunTasks, TaskResult, TasksFinished

ACTOR = ActorId(b"a" * 16)
METHOD = identified(
    TaskClass(
        class_id=ClassId(b""),
        function_id=FunctionId(b""),
        name="Actor.f",
        kind=CallKind.METHOD,
        method="f",
        max_retries=0,
    )
)
FUNCTION = identified(TaskClass(class_id=ClassId(b""), function_id=FunctionId(b"f"), name="f"))

_decode = msgspec.msgpack.Decoder(RunTasks | InterruptTask).decode
_encode = msgspec.msgpack.Encoder().encode


class Worker:
    """The other end of a connection."""

    def __init__(self, channel: socket.socket, offer: Offer, *, listens: bool) -> None:
        self.channel = channel
        self._end = End(channel, offer, listens=listens)
        self._sequence = 0

    def read(self) -> list[Any]:
        """What the caller has sent."""
        found = [_decode(frame) for frame in self._end.read(all_of_it=True)]
        self._sequence += sum(type(message) is RunTasks for message in found)
        return found

    def report(self, results: dict[ObjectId, bytes | Outcome]) -> None:
        """Calls have ended."""
        ended = [
            TaskResult(task_id=task_of(object_id), start=0, results=[result])
            for object_id, result in results.items()
        ]
        report = TasksFinished(
            worker_id=WorkerId(b"w"), results=ended, elapsed_ns=1000, sequence=self._sequence
        )
        self._end.send(_encode(report))


class DirectBench:
    """One process's direct calls, and what is around them."""

    def __init__(self, worth_calls: int = 1) -> None:
        self.machine = "here"
        self.prefetched: dict[ObjectId, bytes] = {}
        self.counts: dict[ObjectId, int] = {}
        self.dropped: deque[ObjectId] = deque()
        self.task_ids = TaskIdSource(os.urandom(16))
        self.tasks_group = GroupId(0)
        self.link = self.definitions = self
        #: What the node was told, and calls of our own that were made by way of it.
        self.sent: list[Any] = []
        self.own: list[tuple[str, tuple[Any, ...]]] = []
        #: What answers of the node are for.
        self.answers: list[Callable[[ObjectValues], None]] = []
        #: Called when the node is told something.
        self.on_send: Callable[[Any], None] | None = None
        self.watched: dict[Connection | Door, None] = {}
        self.direct = DirectCalls(self, self, worth_calls)  # type: ignore[arg-type]
        self.loans = self.direct.loans = Loans(self.direct, self, self, "", (), 1)  # type: ignore[arg-type]

    # ---- the client and its link -----------------------------------------------------------------

    def enter(self) -> None:
        """Nothing to hold back."""

    leave = on_sent = read_now = enter

    def send(self, message: Any) -> None:
        """Tell the node."""
        self.sent.append(message)
        if self.on_send is not None:
            self.on_send(message)

    def submit(self, first: Any, *args: Any) -> Any:
        """A link's, of a message; a client's, of a call."""
        if not args:
            self.send(first)
            return None
        self.own.append((first.name, args[0]))
        return [self.ref(return_id(self.task_ids.next_task_id(), 0))]

    def ref(self, object_id: ObjectId) -> ObjectRef[Any]:
        """A handle."""
        self.counts[object_id] = 1
        return make_ref(object_id, self)  # type: ignore[arg-type]

    def when_ready(self, object_id: ObjectId, call: Callable[[ObjectValues], None]) -> None:
        """The node answers when the test says so."""
        self.answers.append(call)

    def read_reply(self, reply: ObjectValues, ref: Any) -> tuple[BaseException | None, Any]:
        """Errors are not looked at here."""
        return (RuntimeError(), None) if reply.errors else (None, (False, True))

    def inline(self, value: Any) -> bytes:
        """Nobody reads it."""
        return b""

    def count_of(self, object_id: ObjectId) -> int:
        """Handles."""
        return self.counts.get(object_id, 0)

    def hold(self, function_id: FunctionId) -> object:
        """A function stays known."""
        return function_id

    def define_class(self, task_class: TaskClass) -> None:
        """The node knows it."""

    def show_error(self, error: bytes) -> None:
        """Nobody reads it."""

    def watch(self, source: Connection | Door) -> None:
        """The test reads itself."""
        self.watched[source] = None

    def unwatch(self, source: Connection | Door) -> None:
        """Not any more."""
        self.watched.pop(source, None)

    # ---- ways ------------------------------------------------------------------------------------

    def open_way(self, is_together: bool = False) -> tuple[ActorRoute, Connection, Worker]:
        """A way to an actor."""
        near, far = socket.socketpair()
        offer: Offer = ("pair", "", 0, os.urandom(32), os.urandom(32))
        route = self.direct.routes.setdefault(ACTOR, ActorRoute(ACTOR, self.direct))
        route.is_together = is_together
        worker = Worker(far, offer, listens=True)
        connection = Connection(self.direct, route, near, offer)
        self.direct.watch(connection)
        worker.read()
        connection.answer()
        worker.read()
        assert route.usable() is connection
        return route, connection, worker

    def ask(self) -> tuple[Loan, ObjectRef[Any]]:
        """Ask for a worker on loan, by a call."""
        loan = self.loans.loan_for(FUNCTION)
        assert loan is not None
        before = self.ref(return_id(self.task_ids.next_task_id(), 0))
        self.loans.after_other_call(loan, before._id)
        self.direct.note_values([before._id])
        ref = self.loans.call(loan, FUNCTION, b"")
        assert ref is not None
        return loan, ref

    def come(self) -> tuple[Connection, Worker]:
        """The worker that was asked for comes."""
        _, (_, offers) = self.own[-1]
        door = next(door for door in self.watched if type(door) is Door)
        worker = Worker(come_to(offers[0]), offers[0], listens=False)
        door.answer()
        connection = next(each for each in self.watched if type(each) is Connection)
        connection.answer()
        worker.read()
        connection.answer()
        return connection, worker

    def cut(self, connection: Connection, worker: Worker) -> None:
        """The other end is gone."""
        worker.channel.close()
        connection.answer()

    # ---- what has become of calls ----------------------------------------------------------------

    def call(self, route: ActorRoute) -> ObjectRef[Any]:
        """Call the actor."""
        ref = self.direct.call(route, METHOD, b"")
        assert ref is not None
        return ref

    def cancel(self, ref: ObjectRef[Any], force: bool = False) -> bool:
        """As `Client.cancel`: False when the node is to be told."""
        return self.direct.cancel(ref._id, force, True)

    def error_of(self, ref: ObjectRef[Any]) -> bytes:
        """What a call failed with; empty: it has not."""
        return self.direct._errors.get(ref._id, b"")

    def kinds(self) -> list[str]:
        """Names of what the node was told."""
        return [type(message).__name__ for message in self.sent]
