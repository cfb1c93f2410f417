"""Calls of actors that go straight to the actor's worker, past the nodes; the caller's side.

    handle.f.remote() ──▶ route ──open, nothing else under way──▶ Connection ══▶ the actor's worker
                            │ else: by way of the nodes               ║
    get ◀── values, errors ◀┴─────────────────────────────────────────╝

A node that only passes a call on, and its result, costs more than the call. So after some calls of
an actor its worker is asked, by one more call, for a way in, and later calls use that. What the
nodes know nothing of they cannot lose: of such a call the caller keeps the record, and its result.

What: routes to actors, calls under way, results that only this process has.
Who calls: `client.py` with calls, with refs that the node must know, and with those that died.
May touch: sockets, through its connections; the node, through the client's link.
Invariants: the calls of a process begin in the order in which it made them: a direct one is made
only when all that went by way of the nodes are over, and one that goes by way of the nodes is
preceded there by an order to the worker to wait for the direct ones. The node knows of an object
here exactly if it is not in `unknown`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

from poolray.direct.addresses import Offer, come_to, settle_in
from poolray.direct.connection import ARGUMENTS_BYTES_MAX, Connection, Waiting
from poolray.direct.interfaces import Host, Owner, Route, Waiter
from poolray.direct.loans import Asked, Loans, cancelled_error
from poolray.direct.notes import Notes
from poolray.direct.own_calls import AFTER, LISTEN, RESULT, OwnCalls
from poolray.direct.route import ActorRoute, may_go_straight, unavailable
from poolray.direct.seal import HandshakeError
from poolray.ids import (
    ActorId,
    ClassId,
    ObjectId,
    actor_of_handle,
)
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.protocol.actors import CallActor
from poolray.protocol.client import (
    CancelTask,
    ObjectValues,
    PromiseObjects,
    PutObject,
    ReleaseReferences,
    SubmitTasks,
)
from poolray.protocol.values import TaskClass, TaskSpec
from poolray.protocol.worker import TasksFinished

#: A packet of several calls that is not reported for so long: perhaps the results of the first ones
#: wait for a long one behind them.
_NUDGE_AFTER_S = 0.005
#: An actor's refs that others want to know of cost more this way: beyond so many, and this share of
#: its calls, they go by way of the nodes.
_PROMISES_MAX = 32
_PROMISES_SHARE = 0.25
#: A caller that makes many calls looks as often what has come.
_READ_EVERY = 48
#: The worker's names of our classes must not be those that its node gives, or other callers.
_FIRST_INDEX = 1 << 20
#: What makes the id of a task's first result of the task's own.
_FIRST_RESULT = b"\0\0\0\0"


@final
class DirectCalls:
    """The direct calls of one process.

    Parameters
    ----------
    client : Owner
        Whose calls these are.
    host : Host
    worth_calls : int
        A way in is asked for after so many calls of an actor.
    """

    def __init__(self, client: Owner, host: Host, worth_calls: int) -> None:
        self._client = client
        self._host = host
        self._worth_calls = worth_calls
        #: Guards routes, connections and calls; never held while user code runs.
        self.lock = threading.Lock()
        #: Held while calls that were not sent are given to the node: later ones come after.
        self._turn = threading.RLock()
        self.routes: dict[ActorId, ActorRoute] = {}
        #: Objects that exist in this process only, while it has refs to them.
        self.unknown: dict[ObjectId, None] = {}
        #: object id -> the call under way that makes it.
        self.pending: dict[ObjectId, Waiting] = {}
        #: Of these: who waits for one, and those of which the node is to be told.
        self._waiters: dict[ObjectId, list[Waiter]] = {}
        self._promised: dict[ObjectId, None] = {}
        #: Of these: calls whose workers were told that they are not wanted, those whose results the
        #: workers keep, and those that are being given to the node -> the order to cancel, if there
        #: is one. It holds should the call go to the node.
        self._orders: dict[ObjectId, CancelTask | None] = {}
        #: object id -> what it failed with; values are in `Client.prefetched`.
        self._errors: dict[ObjectId, bytes] = {}
        #: Errors that somebody has seen.
        self._seen: dict[ObjectId, None] = {}
        #: Last results of calls by way of the nodes -> their routes.
        self.lasts: dict[ObjectId, Route] = {}
        #: Whether calls of a class may go straight.
        self._is_plain: dict[ClassId, bool] = {}
        self._index = _FIRST_INDEX + (int.from_bytes(os.urandom(5), "little") << 20)
        self.notes = Notes(client)
        self._own = OwnCalls(client)
        #: Connections that stand, also those that no call uses any more.
        self._connections: dict[Connection, None] = {}
        #: Handles that have died while calls were under way: the actor must outlive these.
        self._kept: dict[Route, ObjectId] = {}
        #: Handles that have died, and were the last ones here to their actors; for the next call.
        self.gone: deque[ObjectId] = deque()
        #: Workers that are kept for this process's tasks; None: its tasks all go to the nodes.
        self.loans: Loans | None = None
        self.is_closed = False

    def new_index(self) -> int:
        """A name for a class that no other one has in any worker."""
        self._index += 1
        return self._index

    # ---- making calls ----------------------------------------------------------------------------

    def takes(self, route: ActorRoute, task_class: TaskClass) -> bool:
        """Whether a call that is made now may go straight, if its arguments are plain and small."""
        if route.usable() is None:
            return False
        is_plain = self._is_plain.get(task_class.class_id)
        if is_plain is None:
            is_plain = self._is_plain[task_class.class_id] = may_go_straight(task_class)
        return is_plain

    def call(
        self, route: ActorRoute, task_class: TaskClass, payload: bytes
    ) -> ObjectRef[Any] | None:
        """Make a call without refs among its arguments; None: it has to go by way of the nodes.

        Ctrl-C may strike between any two steps outside of `_flush`: what has been noted by then
        is forgotten with the ref.
        """
        connection = route.usable()
        if connection is None or len(payload) > ARGUMENTS_BYTES_MAX:
            return None
        client = self._client
        task_id = client.task_ids.next_call_id()
        object_id: ObjectId = task_id + _FIRST_RESULT  # type: ignore[assignment]
        ref = make_ref(object_id, client)
        client.counts[object_id] = 1  # (without the lock: nobody else knows the id yet)
        self.unknown[object_id] = None
        call = object_id, task_id, task_class, payload, connection
        self.pending[object_id] = call
        connection.outbox.append(call)
        # (On one that was lost or left just now it would wait for ever.)
        if connection.wants_flush() or connection.is_lost or not route.is_passable:
            self._flush(connection, route)
        route.unread += 1
        if route.unread >= _READ_EVERY:
            route.unread = 0
            self._host.read_now()
        return ref

    def _flush(self, connection: Connection, route: ActorRoute) -> None:
        link = self._client.link
        link.enter()
        try:
            with self.lock:
                is_lost, is_passable = connection.is_lost, route.is_passable
                if not is_lost:
                    connection.flush()
            if is_lost:
                self.lose_route(route, connection)
            elif not is_passable:  # another thread's call goes by way of the nodes
                self.give_unsent(route, connection)
            self._host.on_sent()
        finally:
            link.leave()

    def before_other_call(self, actor_id: ActorId) -> None:
        """A call is about to go by way of the nodes: those that were made before begin before."""
        route = self.routes.get(actor_id)
        if route is not None and route.is_giving:
            with self._turn:
                pass  # what was made before is at the node now
        if route is None or route.is_together:
            return
        connection = route.connection
        if connection is not None and connection.is_busy:
            self.give_unsent(route, connection)

    def give_unsent(self, route: ActorRoute, connection: Connection) -> None:
        """The worker is to wait for what it was sent, and for nothing that waits here: if this
        process is stopped, it would wait as long, and other callers with it.
        """
        with self._giving(route):
            with self.lock:
                connection.flush()
                unsent = [call for call in connection.take_unsent() if call[0] in self.pending]
                if unsent:  # what is made from now on comes after these
                    self.lasts.pop(route.last, None)
                    route.last, route.is_clear = ObjectId(b""), False
                    self._begin_other(route)
                arguments = (connection.connection_id, connection.made)
            self._own.send(route.actor_id, AFTER, arguments)
            for call in unsent:
                self._give_call(route, call)
            if unsent:
                self.after_other_call(route, unsent[-1][0])

    def begin_other_call(self, actor_id: ActorId) -> ActorRoute:
        """A call goes by way of the nodes now; `after_other_call` is to follow."""
        route = self._route_to(actor_id)
        with self.lock:
            self._begin_other(route)
        return route

    def _route_to(self, actor_id: ActorId) -> ActorRoute:
        route = self.routes.get(actor_id)
        if route is None:
            route = self.routes.setdefault(actor_id, ActorRoute(actor_id, self))
        return route

    def _begin_other(self, route: ActorRoute) -> None:
        route.making += 1
        route.is_mixed |= route.making > 1

    def after_other_call(self, route: ActorRoute, last: ObjectId) -> None:
        """A call went by way of the nodes."""
        with self.lock:
            route.making -= 1
            is_mixed = route.is_mixed
            route.is_mixed = is_mixed and route.making > 0
            if route.is_off:
                return
            self.lasts.pop(route.last, None)
            route.is_clear = False
            if is_mixed:  # it may not be the last: the value of a later one tells
                route.last = ObjectId(b"")
            else:
                route.last = last
                self.lasts[last] = route
            route.calls += 1
            asks = (
                route.calls >= self._worth_calls
                and route.connection is None
                and not route.is_asking
                and not self.is_closed
            )
            if asks:
                route.is_asking = True
        if asks:
            self._ask_for_way(route)

    def note_values(self, object_ids: Sequence[ObjectId]) -> None:
        """These have values, as the node says."""
        for object_id in self.lasts.keys() & object_ids:
            with self.lock:  # another thread's call may become the last one
                route = self.lasts.pop(object_id, None)
                if route is not None and route.last == object_id:
                    route.is_clear = True

    def turn_off(self, actor_id: ActorId) -> None:
        """Calls of an actor go by way of the nodes from now on."""
        route = self._route_to(actor_id)
        if not route.is_off:
            route.is_off = True
            with self.lock:
                self.lasts.pop(route.last, None)

    # ---- the way in ------------------------------------------------------------------------------

    def _ask_for_way(self, route: ActorRoute) -> None:
        """Ask the worker, after all calls that were made before."""
        client = self._client
        task_class = self._own.class_of(LISTEN, LISTEN)
        (ref,) = client.submit(task_class, (self._host.machine,), {}, route.actor_id)

        def learn(reply: ObjectValues) -> None:
            error, answer = client.read_reply(reply, ref)
            if error is None:
                self.note_values([ref._id])
            if error is not None or answer is None or self.is_closed:
                # (One that died may be made again, and is asked again after as many calls.)
                route.calls, route.is_asking = 0, False
                route.is_off = error is None
                return
            offer, route.is_together = answer
            if offer[0]:
                self._come(route, offer)
            else:
                threading.Thread(
                    target=self._come, args=(route, offer), name="poolray-connect", daemon=True
                ).start()

        client.link.when_ready(ref._id, learn)

    def _come(self, route: ActorRoute, offer: Offer) -> None:
        """Connect."""
        try:
            channel = come_to(offer)
        except OSError:
            route.is_asking, route.is_off = False, True  # the nodes' way always works
            return
        try:
            settle_in(channel)
            connection = Connection(self, route, channel, offer)
        except (HandshakeError, OSError):
            channel.close()
            route.is_asking, route.is_off = False, True
            return
        if self.is_closed:
            channel.close()
            return
        self.watch(connection)

    def watch(self, connection: Connection) -> None:
        """Hear what a connection has to say."""
        self._connections[connection] = None
        self._host.watch(connection)

    def unwatch(self, connection: Connection) -> None:
        """Do not, any more."""
        self._host.unwatch(connection)

    def open_route(self, route: ActorRoute, connection: Connection) -> None:
        """A connection may be used."""
        with self.lock:
            route.is_asking = False
            if self.routes.get(route.actor_id) is route and not self.is_closed:
                route.connection = connection

    def lose_route(self, route: ActorRoute, connection: Connection) -> None:
        """A connection has ended: so has the actor, or its way to us."""
        with self._giving(route):
            self._lose(connection, route)

    @contextlib.contextmanager
    def _giving(self, route: ActorRoute) -> Iterator[None]:
        """Calls that were not sent are given to the node meanwhile, and others wait for it."""
        with self._turn:
            before, route.is_giving = route.is_giving, True
            try:
                yield
            finally:
                route.is_giving = before

    def forget(self, connection: Connection) -> tuple[list[Waiting], list[Waiting]]:
        """A connection is over; gives the calls that were sent and those that were not. Under the
        lock.
        """
        self._connections.pop(connection, None)
        connection.close()
        begun = [call for call in connection.sent.values() if call[0] in self.pending]
        waiting = [call for call in connection.take_unsent() if call[0] in self.pending]
        connection.sent.clear()
        return begun, waiting

    def _lose(self, connection: Connection, route: ActorRoute) -> None:
        self.unwatch(connection)
        with self.lock:
            begun, waiting = self.forget(connection)
            if route.connection is connection:
                route.connection = None
                route.calls = 0
            if not connection.is_open:
                route.is_asking, route.is_off = False, True
            if begun or waiting:
                route.is_clear = False  # whatever is made from now on comes after these
        if not self.is_closed:
            if begun and not route.is_together:
                # If only the way was cut: what the worker has is not to run after what follows.
                arguments = (connection.connection_id, connection.made)
                self._own.send(route.actor_id, AFTER, arguments)
            self._decide_lost(route, begun, waiting)
            self._release_handle(route)

    def _decide_lost(self, route: ActorRoute, begun: list[Waiting], waiting: list[Waiting]) -> None:
        """What was sent may have run: it fails as the nodes say. What was not goes their way."""
        client = self._client
        if begun:
            task_class = self._own.class_of("__ray_ready__", AFTER)
            (ref,) = client.submit(task_class, (), {}, route.actor_id)

            def learn(reply: ObjectValues) -> None:
                data = reply.values[0] if reply.errors else None
                client.read_reply(reply, ref)  # (what it names is seen)
                if not isinstance(data, bytes):
                    data = unavailable(route.actor_id, begun[0][2].name)
                self.fail_all(begun, data)

            client.link.when_ready(ref._id, learn)
        for call in waiting:
            self._give_call(route, call)

    def _release_handle(self, route: Route) -> None:
        """Nothing is under way any more that a dead handle was kept for."""
        handle = self._kept.pop(route, None)
        if handle is not None:
            self._client.dropped.append(handle)

    def _give_call(self, route: ActorRoute, call: Waiting) -> None:
        """A call goes by way of the nodes."""
        _, task_id, task_class, payload, _ = call
        spec = TaskSpec(task_id=task_id, class_id=task_class.class_id, calls=[payload])
        self.give_to_node(call, CallActor(actor_id=route.actor_id, task=spec))

    def give_to_node(self, call: Waiting, message: CallActor | SubmitTasks) -> None:
        """The node makes a call, unless it was cancelled; an order that comes now goes after it."""
        object_id = call[0]
        with self.lock:
            is_wanted = object_id in self.pending and self._orders.get(object_id) is None
            if is_wanted:
                self._orders[object_id] = None
        if not is_wanted:
            self.fail_all([call], cancelled_error(call))
            return
        order = self.leave_to_node(object_id, message)
        if order is not None:
            self._client.link.send(order)

    def leave_to_node(
        self, object_id: ObjectId, message: CallActor | SubmitTasks | PutObject
    ) -> CancelTask | None:
        """The node brings a call's result, and knows of it from now on; gives the order to cancel
        it that has come meanwhile.
        """
        client = self._client
        if type(message) is PutObject:
            client.link.send(message)
        else:
            client.link.submit(message)
        with self.lock:
            self.pending.pop(object_id, None)
            self._promised.pop(object_id, None)
            self.unknown.pop(object_id, None)
            order = self._orders.pop(object_id, None)
            waiters = self._waiters.pop(object_id, ())
        if client.count_of(object_id) == 0:
            client.link.send(ReleaseReferences(object_ids=[object_id]))
        for waiter in waiters:
            waiter.finish()  # who waits looks again, and asks the node
        return order

    def fail_all(self, calls: Iterable[Waiting], error: bytes) -> None:
        """These failed, those that are pending; or were cancelled before."""
        told: list[PutObject] = []
        with self.lock:
            for call in calls:
                if call[0] in self.pending:
                    is_cancelled = self._orders.get(call[0]) is not None
                    reason = cancelled_error(call) if is_cancelled else error
                    self._end(call[0], reason, True, told)
        self._tell(told)

    # ---- results ---------------------------------------------------------------------------------

    def on_report(self, connection: Connection, report: TasksFinished) -> None:
        """The worker has results."""
        told: list[PutObject] = []
        held: list[Waiting] = []
        errors: dict[int, str] = {}
        ended: list[Waiting] = []
        pending, sent = self.pending, connection.sent
        prefetched, counts = self._client.prefetched, self._client.counts
        with self.lock:
            for result in report.results:
                if not result.results:
                    continue
                object_id: ObjectId = result.task_id + _FIRST_RESULT  # type: ignore[assignment]
                call = sent.pop(object_id, None)
                if call is None or object_id not in pending:
                    continue
                outcome = result.results[0]
                if type(outcome) is bytes:
                    if self._promised or self._waiters or self._orders or object_id not in counts:
                        self._end(object_id, outcome, False, told)
                    else:
                        prefetched[object_id] = outcome
                        del pending[object_id]  # (last: `values` looks without the lock)
                elif not outcome.values:  # type: ignore[union-attr]
                    held.append(call)  # (it is pending until the node has it)
                    self._orders.setdefault(object_id, None)
                    continue
                else:
                    self._end(object_id, outcome.values[0], True, told)  # type: ignore[union-attr]
                    errors[len(ended)] = outcome.summary  # type: ignore[union-attr]
                ended.append(call)
            connection.note_reported(report)
            if connection.outbox:
                connection.flush()
            route = connection.route
            is_left = connection.outbox and not route.is_passable
        if ended:
            route.on_ended(ended, errors, report)
        if told:
            self._tell(told)
        for call in held:
            route.on_held(call)
        if is_left:
            route.on_unsent(connection)
        if self._kept and not connection.is_busy:
            self._release_handle(route)

    def _end(self, object_id: ObjectId, value: Any, is_error: bool, told: list[PutObject]) -> None:
        """A call that was pending is over; under the lock."""
        client = self._client
        if self._orders:
            self._orders.pop(object_id, None)
        if self._promised and self._promised.pop(object_id, self) is None:
            told.append(PutObject(object_id=object_id, value=value, is_error=is_error))
        elif object_id not in client.counts:
            if is_error:
                self._host.show_error(value)
        elif is_error:
            self._errors[object_id] = value
        else:
            client.prefetched[object_id] = value
        # Last: who finds it no longer pending, without the lock, has to find what became of it.
        del self.pending[object_id]
        if not self._waiters:
            return
        for waiter in self._waiters.pop(object_id, ()):
            waiter.remaining -= 1
            if waiter.remaining <= 0:
                waiter.finish()
        if is_error:
            for waiters in self._waiters.values():
                for waiter in waiters:
                    if waiter.ends_on_error:
                        waiter.finish()  # it looks whether this is one of its own

    def _tell(self, told: list[PutObject]) -> None:
        """The node was promised these."""
        client = self._client
        for message in told:
            client.link.send(message)
            if client.count_of(message.object_id) == 0:
                client.link.send(ReleaseReferences(object_ids=[message.object_id]))

    def fetch_held(self, route: ActorRoute, call: Waiting) -> None:
        """A result is large, or has refs inside: the nodes know how to bring it."""
        object_id, task_id, task_class, _, _ = call
        self._is_plain[task_class.class_id] = False  # the next ones will be like it
        spec = TaskSpec(
            task_id=task_id,
            class_id=self._own.class_of(RESULT, task_class.name).class_id,
            calls=[self._client.inline(((task_id,), {}))],
        )
        self.leave_to_node(object_id, CallActor(actor_id=route.actor_id, task=spec))

    def values(
        self, object_ids: Sequence[ObjectId], timeout_s: float | None
    ) -> list[bytes] | bytes | None:
        """Values of objects that only this process knows, once they are there.

        Returns
        -------
        list of bytes, bytes or None
            The values; or the first error; or None, when the node has been given some meanwhile.

        Raises
        ------
        TimeoutError
            They were not there in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pending = self.pending
        # From the end: an actor's calls end in order, and who has the last one has all.
        for object_id in reversed(object_ids):
            while object_id in pending and not (self._errors and self._first_error(object_ids)):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._await((object_id,), 1, left, ends_on_error=True):
                    raise TimeoutError
        if self._errors and (failed := self._first_error(object_ids)) is not None:
            self._seen[failed] = None
            return self._errors[failed]
        prefetched = self._client.prefetched
        found = [prefetched.get(object_id) for object_id in object_ids]
        return None if None in found else found  # type: ignore[return-value]

    def _first_error(self, object_ids: Iterable[ObjectId]) -> ObjectId | None:
        errors = self._errors
        return next((object_id for object_id in object_ids if object_id in errors), None)

    def _await(
        self,
        object_ids: Sequence[ObjectId],
        count: int,
        timeout_s: float | None,
        ends_on_error: bool,
    ) -> bool:
        """Wait until so many of these have ended; False when the time is up."""
        waiter = self._host.make_waiter()
        waiter.ends_on_error = ends_on_error
        with self.lock:
            waiting = [object_id for object_id in object_ids if object_id in self.pending]
            waiter.remaining = count - (len(object_ids) - len(waiting))
            if waiter.remaining <= 0:
                return True
            for object_id in waiting:
                self._waiters.setdefault(object_id, []).append(waiter)
        try:
            return self._host.wait(waiter, timeout_s)
        finally:
            if self._waiters:
                self._forget(waiter, waiting)

    def _forget(self, waiter: Waiter, object_ids: list[ObjectId]) -> None:
        with self.lock:
            for object_id in object_ids:
                waiters = self._waiters.get(object_id)
                if waiters is not None and waiter in waiters:
                    waiters.remove(waiter)
                    if not waiters:
                        del self._waiters[object_id]

    def ready(
        self, object_ids: Sequence[ObjectId], count: int, timeout_s: float | None
    ) -> list[int] | None:
        """Indexes of those, of objects that only this process knows, that have ended, once there
        are `count` or the time is up. None: the node has been given some meanwhile.
        """
        self._await(object_ids, count, timeout_s, ends_on_error=False)
        pending, unknown = self.pending, self.unknown
        with self.lock:
            if not all(map(unknown.__contains__, object_ids)):
                return None
            return [index for index, o in enumerate(object_ids) if o not in pending]

    def on_dropped(self, object_id: ObjectId) -> None:
        """The last ref to an object that only this process knew has died."""
        if self._errors:
            error = self._errors.pop(object_id, None)
            if error is not None and self._seen.pop(object_id, self) is self:
                self._host.show_error(error)

    # ---- what others are to know -----------------------------------------------------------------

    def tell_node(self, object_ids: Iterable[ObjectId]) -> None:
        """The node is to know of these from now on: they are named to somebody."""
        client, unknown = self._client, self.unknown
        for object_id in object_ids:
            if object_id not in unknown:
                continue
            with self.lock:
                call = self.pending.get(object_id)
                if call is not None:
                    self._promised[object_id] = None
                    client.link.send(PromiseObjects(object_ids=[object_id]))
                    self._count_promise(call[4])
                else:
                    error = self._errors.pop(object_id, None)
                    self._seen.pop(object_id, None)
                    value = client.prefetched.get(object_id) if error is None else error
                    if value is not None:
                        is_error = error is not None
                        message = PutObject(object_id=object_id, value=value, is_error=is_error)
                        client.link.send(message)
                unknown.pop(object_id, None)

    def _count_promise(self, connection: Connection | Asked) -> None:
        route = connection.route
        if route.is_together and not route.is_clear:
            return  # a burst in which the way has opened: refs are waited for among earlier ones
        route.promises += 1
        if route.promises > max(_PROMISES_MAX, _PROMISES_SHARE * connection.made):
            route.is_off = True

    def cancel(self, object_id: ObjectId, force: bool, recursive: bool) -> bool:
        """A call is not wanted; False when the node has to be told."""
        told: list[PutObject] = []
        with self.lock:
            call = self.pending.get(object_id)
            if call is None:
                return object_id in self.unknown  # it is over
            holder = call[4]
            force = force and holder.route.is_forcible
            order = CancelTask(task_id=call[1], force=force, recursive=recursive)
            if object_id in holder.sent:
                if force:  # its worker ends: nothing else is to come of it
                    self._end(object_id, cancelled_error(call), True, told)
                else:
                    self._orders[object_id] = order
                holder.cancel(order)
            elif object_id in self._orders:
                self._orders[object_id] = order
            else:  # it was not sent, or its worker is lost, and the node does not have it yet
                self._end(object_id, cancelled_error(call), True, told)
                holder.drop(call)
        self._tell(told)
        return True

    def keeps_handle(self, handle: ObjectId) -> bool:
        """The last handle to an actor has died: whether calls are under way that the actor must
        outlive. Then the handle is noted as dead once more, when they are over.
        """
        actor_id = actor_of_handle(handle)
        route = None if actor_id is None else self.routes.get(actor_id)
        if route is None or route.connection is None or not route.connection.is_busy:
            return False
        self._kept[route] = handle
        return True

    def forget_gone(self) -> None:
        """Actors that nobody here has a handle to any more."""
        while self.gone:
            actor_id = actor_of_handle(self.gone.popleft())
            if actor_id is not None:
                self._forget_actor(actor_id)

    def _forget_actor(self, actor_id: ActorId) -> None:
        with self.lock:
            route = self.routes.pop(actor_id, None)
            if route is None:
                return
            self.lasts.pop(route.last, None)
            connection, route.connection = route.connection, None
        if connection is not None:
            self._connections.pop(connection, None)
            self.unwatch(connection)
            connection.close()

    def on_kill(self, actor_id: ActorId) -> None:
        """An actor is to be killed: no call that is made from now on may still reach it."""
        route = self.routes.get(actor_id)
        if route is not None:
            with self.lock:
                route.connection = None
                route.calls = 0
                route.is_clear = False

    # ---- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call `tick` at the latest; None: no need."""
        deadline = self.notes.due_s()
        if self.pending:
            for connection in list(self._connections):
                push_s = connection.push_due_s()
                if push_s is not None:
                    deadline = push_s if deadline is None else min(deadline, push_s)
                if connection.waits_behind():
                    nudge_s = connection.first_sent_s + _NUDGE_AFTER_S
                    deadline = nudge_s if deadline is None else min(deadline, nudge_s)
        return deadline

    def tick(self) -> None:
        """Time has passed."""
        now = time.monotonic()
        due_s = self.notes.due_s()
        if due_s is not None and now >= due_s and not self.is_closed:
            self.notes.send()
        if self.pending:
            left: Connection | None = None
            with self.lock:
                for connection in list(self._connections):
                    push_s = connection.push_due_s()
                    if push_s is not None and now >= push_s:
                        connection.push()
                        if connection.outbox and not connection.route.is_passable:
                            left = connection
                    late_s = connection.first_sent_s + _NUDGE_AFTER_S
                    if connection.waits_behind() and now >= late_s:
                        connection.nudge()
            if left is not None:
                left.route.on_unsent(left)

    def give_up(self, error: bytes) -> None:
        """The node is gone: with it everything else, as far as this process knows."""
        for connection in list(self._connections):
            self.unwatch(connection)
        self.close()
        self.fail_all(list(self.pending.values()), error)

    def close(self) -> None:
        """The end of the runtime, or a forked child: connections are let go of."""
        self.is_closed = True
        for route in list(self.routes.values()):
            route.connection = None
        if self.loans is not None:
            self.loans.close()
        for connection in list(self._connections):
            connection.close()
        self._connections.clear()
