"""Workers on loan: tasks that are called one at a time go straight to a worker kept for them.

    f.remote(), f.remote(), …  ──▶ the nodes        each waits for the one before: no need to queue
    after some of these:       ──▶ a task that asks for the same as `f`: the loan
    its worker comes to our door   ══ calls, results ══▶ until it has idled, or others want it

A call that nobody competes with is placed where the one before was. So a driver asks for a worker
by a task like any other, in the place of a call: it is queued, placed and charged as `f` is, and
then, instead of running `f`, comes to us and runs that call and others (`local/lending.py`). It
gives the worker back after a tenth of a second, or when a hundredth passes without a call, or when
its node wants something of it. (Ray calls such a thing a worker lease.)

What: when to ask for a loan, doors for those who come, what becomes of calls when a loan ends.
Who calls: `client.py` with calls of functions, `direct/calls.py` with news of connections.
May touch: sockets; the node, through the client's link; a thread for a large result.
Invariants: a call goes to a worker on loan only while that has no other, so nothing ever waits
behind a call that the nodes could run elsewhere; what a worker has not begun when the loan ends
goes the nodes' way at no cost, what it has begun counts as an attempt that was lost.
"""

from __future__ import annotations

import enum
import pickle
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import msgspec

from poolray.direct.addresses import Offer, make_door, settle_in
from poolray.direct.connection import ARGUMENTS_BYTES_MAX, Connection, Waiting
from poolray.direct.seal import HandshakeError
from poolray.exceptions import TaskCancelledError
from poolray.ids import ClassId, ObjectId, return_id
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.protocol.client import CancelTask, ObjectValues, SubmitTasks
from poolray.protocol.values import CallKind, Delivery, TaskClass, TaskSpec, identified
from poolray.protocol.worker import TasksFinished

if TYPE_CHECKING:
    from poolray.direct.calls import DirectCalls
    from poolray.direct.interfaces import Host, Owner

#: A call follows the one before within so much, or is none of many.
_SOON_S = 0.02
#: A loan that served fewer calls than it takes to ask for one did not pay: the next one takes twice
#: as many, up to so many times.
_PATIENCE_MAX = 64
#: Functions that are remembered.
_CLASSES_MAX = 1000
_NO_OBJECT = ObjectId(b"")


class LoanState(enum.Enum):
    """Where a loan stands."""

    NONE = 0  #: calls go to the nodes, and are counted
    ASKED = 1  #: the task is under way, or its worker to us
    OPEN = 2  #: a worker takes our calls, or has gone and the task that it was is not over yet


@final
class Asked:
    """Has the call that is to bring a worker, in the place of the connection there will be."""

    __slots__ = ("made", "outbox", "route", "sent")

    def __init__(self, route: Loan) -> None:
        self.route = route
        self.outbox: deque[Waiting] = deque()
        #: (Nobody is told of it before there is a connection.)
        self.sent: dict[ObjectId, Waiting] = {}
        self.made = 0

    def cancel(self, order: CancelTask) -> None:
        """Nothing was sent."""

    def drop(self, call: Waiting) -> None:
        """A call is not wanted: who takes it looks whether it is pending."""


@final
class Loan:
    """How calls of one function go: a `Route`, whose news are for `Loans`."""

    __slots__ = (
        "asked",
        "calls",
        "coming",
        "connection",
        "doors",
        "function",
        "held",
        "is_clear",
        "is_off",
        "last",
        "last_s",
        "loans",
        "patience",
        "promises",
        "ref",
        "reply",
        "served",
        "state",
        "task_class",
    )

    is_together = False
    is_forcible = True

    def __init__(self, task_class: TaskClass, loans: Loans) -> None:
        self.task_class = task_class
        self.loans = loans
        self.state = LoanState.NONE
        #: Calls in a row of which each was made when the result of the one before had been taken.
        self.calls = 0
        #: The last one's result, whether it has been taken, and when the call was made.
        self.last = _NO_OBJECT
        self.is_clear = False
        self.last_s = 0.0
        #: So many times the usual calls are waited for.
        self.patience = 1
        self.connection: Connection | None = None
        #: Who has come, and may not have said yet who it is.
        self.coming: Connection | None = None
        #: What the worker may come by.
        self.doors: list[Door] = []
        #: The result of the task that is the loan, once it is there, and the ref to it.
        self.ref: ObjectRef[Any] | None = None
        self.reply: ObjectValues | None = None
        #: Keeps the function known to the node.
        self.function: object = None
        #: A call whose result the worker keeps, and gives back as the loan's.
        self.held: Waiting | None = None
        #: Calls that this loan has run.
        self.served = 0
        # As of an actor's route:
        self.is_off = False
        self.promises = 0
        #: The call that is to bring a worker.
        self.asked = Asked(self)

    @property
    def is_passable(self) -> bool:
        """As of an actor's route that has an order."""
        return self.is_clear

    def usable(self) -> Connection | None:
        """The way for a call that is made now; None: to the nodes."""
        connection = self.connection
        if connection is None or self.is_off or connection.is_busy or connection.is_lost:
            return None
        return connection

    def on_open(self, connection: Connection) -> None:
        """A worker has proved that it was sent here."""
        self.loans.open(self, connection)

    def on_lost(self, connection: Connection) -> None:
        """The worker is gone, or the way to it is: what it had counts as tried."""
        self.loans.part(self, connection, is_lost=True)

    def on_given_back(self, connection: Connection) -> None:
        """The worker goes, and has not begun what it has not answered."""
        self.loans.part(self, connection, is_lost=False)

    def on_ended(self, calls: list[Waiting], errors: dict[int, str], report: TasksFinished) -> None:
        """Calls are over: the worker tells its node of them."""

    def on_held(self, call: Waiting) -> None:
        """The worker keeps a result that is large, or has refs inside: it comes as the loan's."""
        self.held = call
        self.is_off = True  # the next ones will be like it

    def on_unsent(self, connection: Connection) -> None:
        """Another thread's call goes by way of the nodes: this one waits for its value."""


@final
class Door:
    """Where a worker on loan may come in; the loop that reads looks at it."""

    def __init__(self, loans: Loans, loan: Loan, channel: socket.socket, offer: Offer) -> None:
        self._loans = loans
        self.loan = loan
        self.channel = channel
        self.offer = offer

    def fileno(self) -> int:
        """What to poll."""
        return self.channel.fileno()

    def answer(self) -> None:
        """Somebody is there."""
        self._loans.let_in(self)


@final
class Loans:
    """The workers on loan to one driver.

    Parameters
    ----------
    direct : DirectCalls
        Keeps the calls and their results.
    client : Owner
        Whose calls these are.
    reads : Host
        The loop that reads for it.
    host : str
        This machine's address, for workers elsewhere.
    ports : sequence of int
        By which they may come; empty: by any.
    worth_calls : int
        Calls, one at a time, after which a loan is asked for.
    """

    def __init__(
        self,
        direct: DirectCalls,
        client: Owner,
        reads: Host,
        host: str,
        ports: Sequence[int],
        worth_calls: int,
    ) -> None:
        self._direct = direct
        self._client = client
        self._reads = reads
        self._host = host
        self._ports = ports
        self._worth_calls = worth_calls
        self._loans: OrderedDict[ClassId, Loan | None] = OrderedDict()
        #: Nobody ever came though a worker tried: there is no way here.
        self._has_come = self._is_off = False

    # ---- making calls ----------------------------------------------------------------------------

    def loan_for(self, task_class: TaskClass) -> Loan | None:
        """How calls of a function go; None: always by way of the nodes."""
        class_id = task_class.class_id
        try:
            return self._loans[class_id]
        except KeyError:
            pass
        loan = Loan(task_class, self) if _is_plain(task_class) else None
        with self._direct.lock:
            if len(self._loans) >= _CLASSES_MAX:
                self._forget_oldest()
            return self._loans.setdefault(class_id, loan)

    def _forget_oldest(self) -> None:
        for class_id, loan in self._loans.items():
            if loan is None or loan.state is LoanState.NONE:
                if loan is not None:
                    self._direct.lasts.pop(loan.last, None)
                del self._loans[class_id]
                return

    def takes(self, loan: Loan) -> bool:
        """Whether a call that is made now may go to a worker on loan, or bring one."""
        return loan.usable() is not None or self._is_due(loan)

    def _is_due(self, loan: Loan) -> bool:
        """Whether a worker is to be asked for with the call that is made now."""
        return (
            loan.state is LoanState.NONE
            and loan.calls + 1 >= self._worth_calls * loan.patience
            and loan.is_clear
            and time.monotonic() - loan.last_s < _SOON_S
            and not loan.is_off
            and not self._is_off
            and not self._direct.is_closed
        )

    def call(self, loan: Loan, task_class: TaskClass, payload: bytes) -> ObjectRef[Any] | None:
        """Make a call without refs among its arguments; None: it has to go by way of the nodes."""
        if len(payload) > ARGUMENTS_BYTES_MAX:
            return None
        direct, client = self._direct, self._client
        link = client.link
        link.enter()
        try:
            with direct.lock:
                # (Two threads may have found it free.)
                connection = loan.usable()
                if connection is None:
                    if not self._is_due(loan):
                        return None
                    loan.state = LoanState.ASKED
                way = connection or loan.asked
                task_id = client.task_ids.next_task_id()
                object_id = return_id(task_id, 0)
                ref = make_ref(object_id, client)
                client.counts[object_id] = 1
                direct.unknown[object_id] = None
                made = object_id, task_id, task_class, payload, way
                direct.pending[object_id] = made
                way.outbox.append(made)
                loan.served += 1
                if connection is not None:
                    connection.flush()
            if connection is None:
                self._ask(loan)
            self._reads.on_sent()
        finally:
            link.leave()
        return ref

    def after_other_call(self, loan: Loan, last: ObjectId) -> None:
        """A call went by way of the nodes."""
        now, direct = time.monotonic(), self._direct
        with direct.lock:
            direct.lasts.pop(loan.last, None)
            in_a_row = loan.is_clear and now - loan.last_s < _SOON_S
            loan.calls = loan.calls + 1 if in_a_row else 0
            loan.last, loan.is_clear, loan.last_s = last, False, now
            direct.lasts[last] = loan

    # ---- a loan's life ---------------------------------------------------------------------------

    def _ask(self, loan: Loan) -> None:
        """Submit the task that brings a worker here."""
        client = self._client
        doors = [make_door(True, ""), make_door(False, self._host, self._ports)]
        loan.doors = [Door(self, loan, *made) for made in doors if made is not None]
        if not loan.doors:
            loan.state, loan.is_off = LoanState.NONE, True
            self._give_back_waiting(loan)
            return
        for door in loan.doors:
            self._reads.watch(door)
        loan.reply = loan.held = None
        task_class = loan.task_class
        loan.function = client.definitions.hold(task_class.function_id)
        lends = identified(
            msgspec.structs.replace(
                task_class,
                class_id=ClassId(b""),
                kind=CallKind.LEND,
                max_retries=1,  # for those who look for what may be ended; it is not run again
                is_listed=False,
            )
        )
        client.definitions.define_class(lends)
        arguments = (self._reads.machine, [door.offer for door in loan.doors])
        (ref,) = client.submit(lends, arguments, {})
        loan.ref = ref
        client.link.when_ready(ref._id, lambda reply: self._on_over(loan, reply))

    def let_in(self, door: Door) -> None:
        """A worker is at a door."""
        loan, direct = door.loan, self._direct
        try:
            channel, _ = door.channel.accept()
        except OSError:
            return  # it has left again
        self._close_doors(loan)
        try:
            settle_in(channel)
            connection = Connection(direct, loan, channel, door.offer, listens=True)
        except (HandshakeError, OSError):
            channel.close()
            return
        loan.coming = connection
        direct.watch(connection)

    def _close_doors(self, loan: Loan) -> None:
        doors, loan.doors = loan.doors, []
        for door in doors:
            self._reads.unwatch(door)
            door.channel.close()

    def open(self, loan: Loan, connection: Connection) -> None:
        """A worker has proved that it was sent here."""
        direct = self._direct
        self._has_come = True
        with direct.lock:
            if loan.state is LoanState.ASKED and not direct.is_closed:
                loan.state, loan.connection = LoanState.OPEN, connection
                waiting = loan.asked.outbox
                while waiting:
                    object_id, task_id, task_class, payload, _ = waiting.popleft()
                    if object_id in direct.pending:  # (else it was cancelled)
                        call = object_id, task_id, task_class, payload, connection
                        direct.pending[object_id] = call
                        connection.outbox.append(call)
                connection.flush()

    def part(self, loan: Loan, connection: Connection, is_lost: bool) -> None:
        """The worker goes, or is lost."""
        direct = self._direct
        direct.unwatch(connection)
        with direct.lock:
            begun, waiting = direct.forget(connection)
            if loan.connection is connection:
                loan.connection = None
                self._weigh(loan)
        if direct.is_closed:
            return
        for call in begun if is_lost else []:
            self._try_again(call)
        for call in [*waiting, *([] if is_lost else begun)]:
            self._give_to_node(call, call[2])
        self._settle(loan)

    def _weigh(self, loan: Loan) -> None:
        """Whether it was worth it; under the lock."""
        if loan.served >= self._worth_calls * loan.patience:
            loan.patience = 1
            loan.calls, loan.is_clear = self._worth_calls, True  # the next call brings another one
        else:
            loan.patience = min(2 * loan.patience, _PATIENCE_MAX)
            loan.calls = 0
        loan.last_s, loan.served = time.monotonic(), 0

    def _on_over(self, loan: Loan, reply: ObjectValues) -> None:
        """The task that is the loan has ended."""
        loan.reply = reply
        self._settle(loan)

    def _settle(self, loan: Loan) -> None:
        """Once the task has ended and its worker has left, the next loan may be asked for."""
        with self._direct.lock:
            reply = loan.reply
            if reply is None or loan.connection is not None or loan.state is LoanState.NONE:
                return
            was_open = loan.state is not LoanState.ASKED
            ref, held, function = loan.ref, loan.held, loan.function
            loan.ref = loan.reply = loan.held = loan.function = None
            coming, loan.coming = loan.coming, None
            self._close_doors(loan)
            # (Last: from now on another thread may ask for the next one, with doors of its own.)
            loan.state = LoanState.NONE
        assert ref is not None
        if coming is not None and not coming.is_open and not coming.is_lost:
            self.part(loan, coming, is_lost=True)  # it was not that task's worker, or is stopped
        if held is not None:
            arguments = (reply, ref, held, function)
            threading.Thread(
                target=self._bring, args=arguments, name="poolray-bring", daemon=True
            ).start()
            return
        error, found = self._client.read_reply(reply, ref)
        if not was_open:
            # It was cancelled or lost on its way, or its worker found no way here.
            loan.patience = min(2 * loan.patience, _PATIENCE_MAX)
            loan.calls = loan.served = 0
            if error is None and not found[1] and not self._has_come:
                self._is_off = True
            self._give_back_waiting(loan)

    def _give_back_waiting(self, loan: Loan) -> None:
        """No worker has come for the call that was to bring one."""
        with self._direct.lock:
            waiting = loan.asked.outbox
            calls = [call for call in waiting if call[0] in self._direct.pending]
            waiting.clear()
        for call in calls:
            self._give_to_node(call, call[2])

    # ---- what becomes of calls -------------------------------------------------------------------

    def _try_again(self, call: Waiting) -> None:
        """A worker died with a call, or the way to it was cut: the nodes have the attempts left."""
        task_class = call[2]
        retries = task_class.max_retries
        if retries > 0:
            task_class = identified(
                msgspec.structs.replace(task_class, class_id=ClassId(b""), max_retries=retries - 1)
            )
            self._client.definitions.define_class(task_class)
        self._give_to_node(call, task_class)

    def _give_to_node(self, call: Waiting, task_class: TaskClass) -> None:
        _, task_id, _, payload, _ = call
        spec = TaskSpec(task_id=task_id, class_id=task_class.class_id, calls=[payload])
        self._direct.give_to_node(call, SubmitTasks(tasks=[spec]))

    def _bring(
        self,
        reply: ObjectValues,
        ref: ObjectRef[Any],
        held: Waiting,
        function: object,
    ) -> None:
        """A call's result has come as the loan's own: it is put under the call's name.

        In a thread, for it is as large as it likes, and to read it runs users' code. The function
        stays known as long.
        """
        client, direct, object_id = self._client, self._direct, held[0]
        error, found = client.read_reply(reply, ref)
        if error is not None or not found[0]:  # lost with its worker
            if not direct.is_closed:
                self._try_again(held)
            return
        try:
            message = client.put_message(object_id, found[1])
        except Exception as reason:
            if not direct.is_closed:
                direct.fail_all([held], pickle.dumps(reason))
            return
        del found
        if not direct.is_closed:
            direct.leave_to_node(object_id, message)

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """The end of the runtime, or a forked child."""
        for loan in list(self._loans.values()):
            if loan is None:
                continue
            loan.connection = None
            for door in loan.doors:
                door.channel.close()


def cancelled_error(call: Waiting) -> bytes:
    """What a call fails with that is not wanted."""
    return pickle.dumps(TaskCancelledError(task_id=call[1].hex(), task_name=call[2].name))


def _is_plain(task_class: TaskClass) -> bool:
    """Whether the nodes have nothing to decide about calls of a class but where they go, and that
    is where the one before went.
    """
    placement = task_class.placement
    return (
        task_class.kind is CallKind.CALL
        and task_class.delivery is Delivery.OBJECTS
        and task_class.num_returns == 1
        and task_class.max_retries != 0
        and not task_class.retry_exceptions
        and not task_class.max_calls
        and not task_class.stream
        and not task_class.timeout_s
        and (placement is None or (not placement.spread and not placement.group))
    )
