"""The worker: reads packets, runs calls, sends results.

    task queue ──RunTasks──▶ ┌────────────┐ ──TasksFinished──▶ report channel ──▶ node
    control ◀──── replies ── │ user code  │ ──ClientMessage──▶        "
                             └────────────┘
What: the main loop, the way a call is executed, and what a signal makes it hand back.
Who calls: the fork server, in a fresh child.
May touch: sockets, shared memory, signals, standard streams.
Invariants: one packet is read at a time; before a call begins, its index is written to the
worker's progress word, so that after a crash the node knows exactly which calls had begun; while
user code runs nothing else of ours runs in the process.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from _thread import start_new_thread
from collections import deque
from typing import TYPE_CHECKING, Any, final

import msgspec

from poolray.exceptions import InternalError
from poolray.ids import WorkerId
from poolray.local import process_state, worker_process
from poolray.local.actor_reports import cancelled_outcome
from poolray.local.channel import SpinningReader, send_whole
from poolray.local.interruptible import OPEN_CODE, is_interruptible
from poolray.local.reactor import Guard
from poolray.local.worker_arguments import fill_slots
from poolray.local.worker_client import WorkerClient, WorkerLink
from poolray.local.worker_errors import OutOfTime, UnpicklableResult
from poolray.local.worker_functions import Functions
from poolray.local.worker_outcomes import Outcomes
from poolray.local.worker_streams import END, WorkerStreams
from poolray.objects.serialization import (
    PICKLE_FIRST_BYTE,
    deserialize,
)
from poolray.objects.shared_memory import Arena
from poolray.protocol.values import (
    CallKind,
    Delivery,
    InArena,
    InFile,
    Outcome,
    TaskClass,
)
from poolray.protocol.worker import (
    ForkWorker,
    InterruptTask,
    RunTasks,
    TaskCall,
    TaskResult,
    TasksFinished,
    TasksHandedBack,
    ToWorkerQueue,
    WorkerFailed,
    WorkerReady,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from poolray.local.actor_serial import SerialCalls
    from poolray.local.direct_lines import Lines
    from poolray.local.direct_server import Caller, DirectServer
    from poolray.local.fork_server import WorkerSetup
    from poolray.local.lending import Former, Lending
    from poolray.local.worker_extras import Extras

#: Ignored unless handled, and of no use to programs otherwise: Go's runtime uses it to preempt.
NUDGE_SIGNAL = signal.SIGURG

# Names of the module are found faster than members of an enum.
_CALL, _APPLY, _MAP = CallKind.CALL, CallKind.APPLY, CallKind.MAP
_STARMAP = CallKind.STARMAP
_CALLER = Delivery.CALLER

#: User code that could not be interrupted where it was is looked at again after this long.
_LOOK_AGAIN_S = 1e-3
#: What a far caller has signalled is looked for so many times more.
_LOOKS_MAX = 3
#: Results are sent early when they add up to this much.
_FLUSH_BYTES = 64 * 1024


def run_worker(
    command: ForkWorker,
    tasks: socket.socket,
    control: socket.socket,
    reports: socket.socket,
    arena: Arena,
    setup: WorkerSetup,
    number: int,
) -> int:
    """A worker's life; gives its exit code."""
    arena.forget_parent()
    worker_process.settle(setup, number, reports, command.worker_id)
    worker = Worker(command, tasks, reports, arena, setup)
    client = WorkerClient(
        worker.worker_id,
        control,
        reports,
        arena,
        setup,
        worker.prepare_to_block,
        worker.on_order,
    )
    worker.client = client
    process_state.set_worker_id(worker.worker_id)
    worker_process.install_client(client, setup)
    if not worker.initialize(setup):
        worker_process.leave()
        return 1
    try:
        worker.run()
    except ToldToExit as told:
        worker_process.leave()
        return told.code
    worker_process.leave()
    return 0


class ToldToExit(BaseException):
    """The worker ends now, with this code."""

    def __init__(self, code: int) -> None:
        self.code = code


@final
class Worker:
    """The main loop and its buffers."""

    def __init__(
        self,
        command: ForkWorker,
        tasks: socket.socket,
        reports: socket.socket,
        arena: Arena,
        setup: WorkerSetup,
    ) -> None:
        config = setup.config
        self.worker_id: WorkerId = command.worker_id
        self.client: WorkerClient
        self._slot = command.slot
        self._reports = reports
        self._arena = arena
        self.config = config
        self.setup = setup
        self.tasks = tasks
        self.accelerators = setup.accelerators
        self.reader = SpinningReader(tasks, config.spin_s)
        self.inline_max_bytes = config.inline_max_bytes
        self.streams = WorkerStreams(self, config.result_delay_max_s)
        self.encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToWorkerQueue).decode
        self.functions = Functions(self)
        self.outcomes = Outcomes(self)
        #: Once an actor lives here: gives its methods by name.
        self.bind_method: Callable[[str], Callable[..., Any]] | None = None
        self.actor_class_name = ""  #: with its module
        #: What runs an actor's calls, if they run one after the other.
        self.serial: SerialCalls | None = None
        #: What lets callers in that come past the node; None: nobody has asked.
        self.direct: DirectServer | None = None
        #: The same of an actor that runs several at once.
        self.lines: Lines | None = None
        #: While this worker is on loan to its driver.
        self.lending: Lending | None = None
        #: Who it was on loan to last, until he has heard that it is not any more.
        self.former: Former | None = None
        #: Signals that have come: somebody wants something.
        self.nudges = 0
        #: Whose packet is at hand, where it is not the node's.
        self._caller: Caller | None = None
        #: What runs an actor's calls reads orders itself, woken by the signal's descriptor.
        self.reads_orders = False
        #: The actor's call that runs was cancelled: what it returns is not its result.
        self.is_call_cancelled = False
        #: The node has asked for results of an actor's packet: none waits for the packet's end.
        self._eager = False
        # The packet at hand, as the nudge handler sees it:
        self._packet: RunTasks | None = None
        self._position = 0  #: index of the task that runs
        self._call_index = 0  #: index of the call of that task that runs
        self._task_limit = 0  #: tasks from here on have been handed back
        self._call_limit = 0  #: calls of the running task from here on have been handed back
        self._in_user_code = False
        self._nudged = False
        #: A signal came that may mean an order: the control channel is to be read.
        self._signalled = False
        #: Orders that were read and not dealt with; appended to by any thread.
        self._orders: deque[InterruptTask] = deque()
        #: The signal handler is reading orders: it needs no signal for them.
        self._obeying = False
        #: A thread will signal us again: user code could not be interrupted where it was.
        self._signal_due = False
        #: Signals in a row for which nothing was there to read.
        self._looks = 0
        self._thread = threading.get_ident()
        #: What its group asked for beyond running calls.
        self.extras: Extras | None = None
        #: What the running call was told when its time was up.
        self.late: OutOfTime | None = None
        #: Results not sent yet; the last may be the first part of the running task's.
        self._finished: list[TaskResult] = []
        self._partial: list[bytes | Outcome] = []
        self._partial_start = 0
        self.buffered_bytes = 0
        self._started_ns = 0  #: since when `elapsed_ns` of the next report counts

    # ---- life ------------------------------------------------------------------------------------

    def initialize(self, setup: WorkerSetup) -> bool:
        """Run the initializer and say hello; False when it raised."""
        signal.signal(NUDGE_SIGNAL, self._on_nudge)
        signal.siginterrupt(NUDGE_SIGNAL, False)
        if setup.extras is not None:
            from poolray.local.worker_extras import Extras

            self.extras = Extras(self, setup.extras)
        try:
            if setup.initializer is not None:
                setup.initializer(*setup.initargs)
            if self.extras is not None:
                self.extras.prepare()
        except BaseException as error:
            from poolray.local import worker_errors

            text = traceback.format_exc()
            failure = WorkerFailed(
                worker_id=self.worker_id,
                error=worker_errors.encode_task_error(error, "initializer", os.getpid()),
                reason=text[-2000:],
            )
            if setup.log_initializer_error:
                import logging

                logging.getLogger("concurrent.futures").critical(
                    "Exception in initializer:", exc_info=True
                )
            elif not (isinstance(error, SystemExit) and error.code in (0, None)):
                sys.stderr.write(text)
            self.send(self.encode(failure))
            return False
        self.send(self.encode(WorkerReady(worker_id=self.worker_id, pid=os.getpid())))
        return True

    def decode(self, packet: bytes) -> Any:
        """A packet of the task queue.

        Raises
        ------
        InternalError
            It makes no sense. The worker ends, and the node gives its tasks to others or fails
            them.
        """
        try:
            return self._decode(packet)
        except msgspec.DecodeError as error:
            raise InternalError(
                f"System error: worker {self.worker_id.hex()[:12]} (pid {os.getpid()}) ends, for "
                f"its node sent {len(packet)} bytes that cannot be read: {error}. Please report "
                "this."
            ) from error

    def run(self) -> None:
        """Packets until told to stop or until the node is gone."""
        receive, decode = self.reader.receive, self.decode
        while True:
            if self.former is not None:
                self.former.wait(self)
            packet = receive()
            if not packet:
                return
            message = decode(packet)
            if type(message) is not RunTasks:  # an order to stop
                if self.extras is not None:
                    self.extras.finish()
                return
            if message.classes and message.classes[0].task_class.kind is CallKind.CREATE:
                from poolray.local.actor_worker import run_actor

                run_actor(self, message, receive)
                return
            self.run_packet(message)
            # A blocked worker must not keep the last call's values alive.
            packet = message = b""

    def mark_begun(self, sequence: int) -> None:
        """From here on the packet's only call counts as begun, should the process die."""
        self._arena.progress[self._slot * 8] = sequence << 24

    def send(self, data: bytes) -> None:
        """Tell the node something."""
        try:
            send_whole(self._reports, data, self.worker_id)
        except (BrokenPipeError, ConnectionResetError):
            raise ToldToExit(0) from None  # the node is gone, and with it who wants results

    # ---- packets ---------------------------------------------------------------------------------

    def run_packet(self, message: RunTasks) -> None:
        """Run the calls of a packet, one after the other."""
        if message.classes or message.functions or message.forget:
            self.functions.read(message)
        self._task_limit = len(message.tasks)
        self._position = 0
        self._call_index = self._call_limit = 0
        self._nudged = self._eager = False
        self._packet = message  # from here on a nudge counts
        caller = self._caller
        if self._signalled:
            if caller is None:
                self._obey_before(message)
            else:
                self._read_orders()
                self._eager = True
        self._started_ns = time.perf_counter_ns()
        progress, slot = self._arena.progress, self._slot * 8
        word = message.sequence << 24
        if caller is not None:  # the node counts what it has sent
            progress, slot = _NOBODY_LOOKS, 0
        delay_ns = int(self.config.result_delay_max_s * 1e9)
        skipped = self.serial.skipped if self.serial is not None else None
        while self._position < self._task_limit:
            task = message.tasks[self._position]
            if caller is not None:
                caller.ended += 1
                self.client.api.children.clear()
                if caller.cancelled and task.task_id in caller.cancelled:
                    self._skip(task, caller)
                    continue
            elif skipped and task.task_id in skipped:
                del skipped[task.task_id]
                self._position += 1
                continue
            self._call_limit = len(task.calls)
            self._call_index = 0
            self._partial_start = 0
            while self._call_index < self._call_limit:
                progress[slot] = word
                word += 1
                try:
                    self._run_call(task)
                except KeyboardInterrupt as interrupt:
                    self._end_interrupted(interrupt, task)
                self._call_index += 1
                if self._nudged:
                    self._read_orders()
                    self._hand_back()
                    self._flush(message, False)
                elif (
                    time.perf_counter_ns() - self._started_ns > delay_ns
                    or self.buffered_bytes > _FLUSH_BYTES
                    or self._eager
                ) and (
                    # After the last call the packet's end is reported at once, in one message.
                    self._call_index < self._call_limit or self._position + 1 < self._task_limit
                ):
                    self._flush(message, False)
            self._end_task(task)
            self._position += 1
        self._packet = None
        self._flush(message, True)

    def run_direct(self, message: RunTasks, caller: Caller) -> None:
        """Run a packet that came past the node, perhaps in the middle of one of the node's."""
        outer = self._packet
        position, limit = self._position, self._task_limit
        call, call_limit, start = self._call_index, self._call_limit, self._partial_start
        eager, in_user_code = self._eager, self._in_user_code
        before, self._caller, self._in_user_code = self._caller, caller, False
        try:
            self.run_packet(message)
        finally:
            self._caller = before
        if outer is not None:
            self._packet, self._position, self._task_limit = outer, position, limit
            self._call_index, self._call_limit, self._partial_start = call, call_limit, start
            self._eager, self._in_user_code = eager, in_user_code
            self._started_ns = time.perf_counter_ns()

    def _skip(self, task: TaskCall, caller: Caller) -> None:
        """A caller does not want a call any more that has not begun."""
        del caller.cancelled[task.task_id]
        name = self.functions.classes[task.class_index].task_class.name
        outcome = cancelled_outcome(task.task_id, name)
        self._finished.append(TaskResult(task_id=task.task_id, start=0, results=[outcome]))
        self._position += 1

    def _end_task(self, task: TaskCall) -> None:
        if self._partial or not task.calls:
            self._finished.append(
                TaskResult(task_id=task.task_id, start=self._partial_start, results=self._partial)
            )
            self._partial = []
        elif self._call_limit == 0:
            pass  # handed back whole
        else:
            # All of its results have been sent; say that these were the last.
            self._finished.append(
                TaskResult(task_id=task.task_id, start=self._call_limit, results=[])
            )

    def _flush(self, message: RunTasks, ended: bool) -> None:
        """Send the results there are."""
        if ended:
            worker_process.flush_output()
        finished = self._finished
        if self._partial:
            task = message.tasks[self._position]
            finished.append(
                TaskResult(
                    task_id=task.task_id,
                    start=self._partial_start,
                    results=self._partial,
                    done=False,
                )
            )
            self._partial_start += len(self._partial)
            self._partial = []
        now = time.perf_counter_ns()
        if self._caller is not None:
            self._report_to_caller(message, ended, now)
            return
        pinned, unpinned = self.client.take_view_changes()
        kept, released = self.client.take_reference_changes()
        viewed = self.client.viewed_only(kept) if kept else kept
        report = TasksFinished(
            worker_id=self.worker_id,
            results=finished,
            elapsed_ns=now - self._started_ns,
            sequence=message.sequence if ended else message.sequence - 1,
            kept=kept,
            released=released,
            viewed=viewed,
            pinned=pinned,
            unpinned=unpinned,
        )
        self._finished = []
        self.buffered_bytes = 0
        self._started_ns = now
        self.send(self.encode(report))
        if self.client.api.dropped_streams:
            self.client.api.sync_streams()
        self.client.api.sync_watches()

    def _report_to_caller(self, message: RunTasks, ended: bool, now: int) -> None:
        """Results of a packet that came past the node."""
        assert self._caller is not None
        self.client.api.sync_references()  # the node is told of these all the same
        report = TasksFinished(
            worker_id=self.worker_id,
            results=self._finished,
            elapsed_ns=now - self._started_ns,
            sequence=message.sequence if ended else message.sequence - 1,
        )
        if self.lending is not None:
            self.lending.note(message, report)
        self._finished = []
        self.buffered_bytes = 0
        self._started_ns = now
        self._caller.report(report)

    # ---- signals ---------------------------------------------------------------------------------

    def _on_nudge(self, signal_number: int, frame: FrameType | None) -> None:
        """The node wonders why nothing comes, or wants a task stopped. In user code: give back what
        has not begun, now; between two calls the loop does it in a moment.
        """
        if self.reads_orders:
            return
        self.nudges += 1
        if not self._in_user_code:
            self._signalled = True
            self._nudged = self._packet is not None
        elif is_interruptible(frame):
            self._obey()
        else:  # our own code between two steps: leave it alone
            self._look_again()

    def _look_again(self) -> None:
        """Be signalled once more in a moment."""
        if not self._signal_due:
            self._signal_due = True
            start_new_thread(self._signal_soon, ())

    def _signal_soon(self) -> None:
        time.sleep(_LOOK_AGAIN_S)
        self._signal_due = False
        signal.pthread_kill(self._thread, NUDGE_SIGNAL)

    def on_order(self, order: InterruptTask) -> None:
        """The node wants a task stopped, as some thread has read."""
        self._orders.append(order)
        if not self._obeying:
            signal.pthread_kill(self._thread, NUDGE_SIGNAL)

    def take_all_orders(self) -> list[InterruptTask]:
        """The orders that have come."""
        self._read_orders()
        orders = []
        while self._orders:
            orders.append(self._orders.popleft())
        return orders

    def _read_orders(self) -> None:
        """Read what has come; drop the orders for packets and tasks that are done."""
        self._signalled = False
        self._obeying = True
        self.client.link.receive_all()
        self._obeying = False
        if self._caller is not None:
            self._caller.read(all_of_it=True)

    def _obey(self) -> None:
        """In user code: hand back the rest; stop the running task if that was ordered.

        Raises
        ------
        KeyboardInterrupt
            It was.
        """
        packet, caller = self._packet, self._caller
        assert packet is not None
        self._read_orders()
        if caller is None or not caller.is_far or caller.has_come or self._looks >= _LOOKS_MAX:
            self._looks = 0
        else:  # the system signals urgent data a moment before it can be read
            self._looks += 1
            self._look_again()
        self._hand_back()
        if self._finished or self._partial:
            self._flush(packet, False)
        task_id = packet.tasks[self._position].task_id
        if caller is not None:
            if task_id in caller.cancelled:
                recursive = caller.cancelled.pop(task_id)
                process_state.cancel_current_task()
                if recursive:
                    self.client.api.cancel_children(task_id)
                if caller.forced == task_id:
                    worker_process.end_by_force()
                if self.bind_method is None:
                    raise KeyboardInterrupt
                self.is_call_cancelled = True
            return
        orders = self._take_orders(packet.sequence)
        mine = [order for order in orders if order.task_id == task_id]
        if any(order.force for order in mine):
            worker_process.end_by_force()
        if mine:
            process_state.cancel_current_task()
            if self.bind_method is None:
                raise KeyboardInterrupt
            self.is_call_cancelled = True  # an actor's state is not torn: its method may ask
        word = self._arena.progress[self._slot * 8]
        if any(word == order.sequence << 24 | order.index for order in orders):
            task_class = self.functions.classes[packet.tasks[self._position].class_index].task_class
            self.late = OutOfTime(task_class.name, task_class.timeout_s)
            raise self.late

    def _obey_before(self, packet: RunTasks) -> None:
        """Orders may have come before their packet: then nothing of it is begun here."""
        self._read_orders()
        if self.serial is not None:
            self._eager = True  # we may have been asked for this packet's results already
            self.serial.skip_cancelled(packet, 0, self._orders)
        elif self._take_orders(packet.sequence):
            handed = [(task.task_id, 0) for task in packet.tasks]
            self._task_limit = 0
            self.send(self.encode(TasksHandedBack(worker_id=self.worker_id, tasks=handed)))

    def _take_orders(self, sequence: int) -> list[InterruptTask]:
        """The orders for a packet; those for earlier ones are forgotten."""
        orders, later = [], []
        while self._orders:
            order = self._orders.popleft()
            if order.sequence == sequence:
                orders.append(order)
            elif order.sequence > sequence:
                later.append(order)
        self._orders.extend(later)
        return orders

    def _end_interrupted(self, interrupt: KeyboardInterrupt, task: TaskCall) -> None:
        """The order struck when the call had raised something else already."""
        while True:
            try:
                self._in_user_code = False
                break
            except KeyboardInterrupt:
                continue  # a second order, before the first was dealt with
        self._partial.append(
            self.outcomes.raised(interrupt, task, self.functions.classes[task.class_index])
        )
        self.buffered_bytes += 256

    # ---- handing back ----------------------------------------------------------------------------

    def prepare_to_block(self) -> None:
        """User code is about to wait in `get` or `wait`: nothing may wait behind it."""
        if self._packet is not None:
            self._hand_back()
            self.send_results()

    def _hand_back(self) -> None:
        """Give the calls back that have not begun."""
        self._nudged = False
        packet = self._packet
        if packet is None:
            return
        if self.bind_method is not None:  # an actor's calls have nowhere else to go
            self._eager = True  # one that takes long may be behind those that run now
            if self.serial is not None and self._orders:
                self.serial.skip_cancelled(packet, self._position + 1, self._orders)
            return
        # In user code call `_call_index` runs; between calls it has been counted already.
        begun = self._call_index + (1 if self._in_user_code else 0)
        handed: list[tuple[Any, int]] = []
        task = packet.tasks[self._position]
        if begun < self._call_limit:
            handed.append((task.task_id, begun))
            self._call_limit = begun
        for later in packet.tasks[self._position + 1 : self._task_limit]:
            handed.append((later.task_id, 0))
        self._task_limit = self._position + 1
        if handed:
            self.send(self.encode(TasksHandedBack(worker_id=self.worker_id, tasks=handed)))

    # ---- one call --------------------------------------------------------------------------------

    def _run_call(self, task: TaskCall) -> None:
        payload = task.calls[self._call_index]
        function = self.functions.classes[task.class_index]
        task_class = function.task_class
        for_caller = function.for_caller
        outcome: Outcome | bytes
        try:
            call = function.call or self.functions.load(function)
            kind = function.kind
            if not for_caller:
                process_state.begin_task(
                    task.task_id,
                    task_class.name,
                    function.name,
                    None if task_class.method else task_class.resources,  # the actor's, for life
                    task_class.placement,
                )
            if kind is _CALL:
                if for_caller and type(payload) is bytes and payload[0] == PICKLE_FIRST_BYTE:
                    args, kwargs = pickle.loads(payload)
                else:
                    args, kwargs = self.arguments(task, payload, task_class)
                self._in_user_code = True
                if self._nudged:
                    self._obey()
                result = call(*args, **kwargs)
            elif kind is _APPLY:
                call, args, kwargs = self.load(payload, True)
                call = self.functions.dress(call, task_class)
                self._in_user_code = True
                result = call(*args, **kwargs)
            elif kind is _MAP:
                args = self.load(payload, True)
                self._in_user_code = True
                result = list(map(call, args))
                if len(result) != len(args):
                    raise RuntimeError(f"{task_class.name} raised StopIteration")
            elif kind is _STARMAP:
                args = self.load(payload, True)
                self._in_user_code = True
                result = [call(*arguments) for arguments in args]
            else:
                from poolray.local.lending import lend  # few workers need it

                result = lend(self, self.load(payload, False)[0])
            self._in_user_code = False
            args = kwargs = None
            if for_caller:
                try:
                    data = function.serializer.dumps(result)
                except Exception as error:
                    raise UnpicklableResult(error, repr(result)) from error
                if type(data) is bytes and len(data) <= self.config.inline_max_bytes:
                    self._partial.append(data)
                    self.buffered_bytes += len(data)
                    return
                outcome = Outcome(values=[self.outcomes.place(data, task, 0)])
            elif self.is_call_cancelled:
                outcome = cancelled_outcome(task.task_id, task_class.name)
            else:
                outcome = self.outcomes.returned(result, task, function)
        except ToldToExit:
            raise
        except SystemExit as error:
            self._in_user_code = False
            if not for_caller:
                # As in the reference, a task that exits takes its worker along.
                assert self._packet is not None
                if self._finished or self._partial:
                    self._flush(self._packet, False)
                raise ToldToExit(worker_process.exit_code_of(error)) from None
            outcome = self.outcomes.raised(error, task, function)
        except BaseException as error:
            self._in_user_code = False
            outcome = self.outcomes.raised(error, task, function)
        self.is_call_cancelled = False
        self._partial.append(outcome)
        self.buffered_bytes += 256

    # ---- generators ------------------------------------------------------------------------------

    def runs_on_this_thread(self) -> bool:
        """Whether this is the main loop's thread, in a packet: it may be interrupted."""
        return self._packet is not None and threading.get_ident() == self._thread

    def flush_before_stream(self) -> None:
        """A generator may run for long: results of the tasks before it do not wait for it."""
        if self._finished and self._packet is not None:
            self._flush(self._packet, False)

    def advance(self, items: Iterator[Any]) -> Any:
        """The next item of a generator, or `END`."""
        self._in_user_code = True
        if self._nudged:
            self._obey()
        value = next(items, END)
        self._in_user_code = False
        return value

    def enter_user_code(self) -> None:
        """A call waits for something: it may be interrupted."""
        self._in_user_code = True

    def leave_user_code(self, is_main: bool) -> None:
        """The end of that, and of what a generator ran when it raised."""
        if is_main:
            self._in_user_code = False

    def arguments(
        self, task: TaskCall, payload: bytes | InArena | InFile, task_class: TaskClass
    ) -> tuple[Any, Any]:
        """A call's positional and keyword arguments, those from refs in their places."""
        args, kwargs = self.load(payload, task_class.writable)
        return fill_slots(self, task, args, kwargs) if task.slots else (args, kwargs)

    def load(self, value: bytes | InArena | InFile, writable: bool) -> Any:
        """A value from where it is."""
        if isinstance(value, bytes):
            return deserialize(value, writable)
        return self.client.load(value, writable)

    def hold_for_caller(self, result: Any, task: TaskCall) -> Outcome | None:
        """Keep a result that is more than a small value, if its caller has come past the node;
        None: the node takes it.
        """
        keeper = self.lending or self.direct or self.lines
        return None if keeper is None else keeper.hold(task.task_id, result)

    def has_caller(self, task: TaskCall) -> bool:
        """Whether a call that runs came past the node."""
        server = self.lending or self.direct or self.lines
        return server is not None and server.has(task.task_id)

    def send_results(self) -> None:
        """From user code: send what has ended, so that it is not lost with the running call."""
        if self._packet is not None and (self._finished or self._partial):
            self._flush(self._packet, False)

    @property
    def words(self) -> tuple[memoryview, int]:
        """This worker's words on the control page: the memory, and where they begin in it."""
        return self._arena.progress, self._slot * 8


#: Where a packet that came past the node notes which of its calls have begun.
_NOBODY_LOOKS = memoryview(bytearray(8)).cast("Q")

# User code may be interrupted in itself, and where it waits in ours.
OPEN_CODE.update(
    (
        Worker._run_call.__code__,
        Worker.advance.__code__,
        WorkerLink.sleep.__code__,
        Guard.sleep.__code__,
    )
)
