"""A simulated worker: the main loop of the real one, in virtual time.

What: reads packets from its queue, runs jobs, reports, hands back, blocks, dies.
Who calls: `SimNode`, which owns its queue and hears its reports.
May touch: the node's arena, through `SimNode`.
Invariants: as in the real worker, its progress word names the call that it began last, and what it
sent before its death arrives before the news of its death.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from msgspec import structs

from poolray.exceptions import ActorDiedError, CallTimeoutError, TaskCancelledError
from poolray.ids import ObjectId, TaskId, WorkerId, return_id, task_of
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    CancelTask,
    DefineClass,
    DefineFunction,
    GetObjects,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReleaseReferences,
    SubmitTasks,
    UnpinObjects,
)
from poolray.protocol.node import CallProgress, PacketsTakenBack, WorkerLost
from poolray.protocol.streams import RoomGranted
from poolray.protocol.values import CallKind, InArena, InFile, Outcome, TaskClass, TaskSpec, Value
from poolray.protocol.worker import (
    ActorStarted,
    ClientMessage,
    InterruptTask,
    RunTasks,
    StopWorker,
    TaskCall,
    TaskResult,
    TasksFinished,
    TasksHandedBack,
    WorkerBlocked,
    WorkerFailed,
    WorkerReady,
    WorkerUnblocked,
)
from tests.simulation.jobs import INLINE_MAX_BYTES, Job, Options
from tests.simulation.streams import yield_items

if TYPE_CHECKING:
    from tests.simulation.machines import SimNode

#: What the life of a worker yields: seconds to sleep, or None to wait until something comes.
Life = Generator[float | None, None, Any]

_RESULT_DELAY_S = 1e-3


class _Raised(Exception):
    """User code raised."""

    def __init__(self, error: bytes, retriable: bool) -> None:
        self.error = error
        self.retriable = retriable


class _Interrupted(BaseException):
    """User code was told to stop."""


class _OutOfTime(BaseException):
    """User code was told that its time is up."""


class _Died(Exception):
    """User code killed the process."""


class SimWorker:
    """One worker process."""

    def __init__(self, node: SimNode, worker_id: WorkerId, fate: str) -> None:
        self.node = node
        self.world = node.world
        self.worker_id = worker_id
        self.alive = True
        #: Messages in its socket.
        self.queue: deque[RunTasks | StopWorker] = deque()
        #: Its progress word: sequence and index of the call that it began last.
        self.progress = (0, 0)
        #: The word beside it: since when the running call of limited time runs.
        self.call_began_s: float | None = None
        self._is_stuck = False  #: in code that does not look at signals
        #: Jobs that have begun and of which nothing was reported; the last one may run.
        self._unreported: list[Job] = []
        self._replies: dict[int, list[Any]] = {}
        self._requests = 0
        self._last_arrival_s = 0.0
        self._said_hello = False
        self._ticket = 0
        self._waiting = False
        self._classes: dict[int, TaskClass] = {}
        self._functions: dict[bytes, None] = {}
        self._defined: dict[str, None] = {}
        #: Objects that it keeps beyond the tasks that brought them -> where it sees what.
        self._keeping: dict[ObjectId, tuple[InArena, bytes]] = {}
        self._kept: list[ObjectId] = []
        self._released: list[ObjectId] = []
        #: Those of which it has refs alone.
        self._refs: list[ObjectId] = []
        self._pinned: list[ObjectId] = []
        self._unpinned: list[ObjectId] = []
        # The packet at hand:
        self._packet: RunTasks | None = None
        self._position = self._call_index = self._task_limit = self._call_limit = 0
        self._in_user_code = self._nudged = False
        self._finished: list[TaskResult] = []
        self._partial: list[bytes | Outcome] = []
        self._partial_start = 0
        self._started_s = 0.0
        self._signalled = self._held = self._is_actor = False
        self._orders: list[InterruptTask] = []
        self._life = self._live(fate)
        self.world.after(0.0, self._resume(0))

    # ---- being driven ----------------------------------------------------------------------------

    def _resume(self, ticket: int) -> Callable[[], None]:
        def act() -> None:
            if not self.alive or ticket != self._ticket:
                return
            self._go_on(lambda: next(self._life))

        return act

    def _go_on(self, step: Callable[[], float | None]) -> None:
        """Live on until the next pause."""
        self._ticket += 1
        self._waiting = False
        try:
            pause = step()
        except StopIteration as end:
            self.die(exit_code=int(end.value or 0))
            return
        except _Died:
            self.die(signal=9)
            return
        if pause is None:
            self._waiting = True
        else:
            self.world.after(pause, self._resume(self._ticket))

    def wake(self) -> None:
        """Something has come."""
        if self._waiting:
            self._waiting = False
            self.world.after(1e-5, self._resume(self._ticket))

    def on_reply(self, message: Any) -> None:
        """The node answers."""
        if self.alive and message.request_id in self._replies:
            self._replies[message.request_id].append(message)
            self.wake()

    def die(self, signal: int | None = None, exit_code: int | None = None) -> None:
        """The process ends; the node hears of it after all that it has said."""
        if not self.alive:
            return
        self.alive = False
        self._life.close()
        for job in self._unreported:
            job.deaths += 1
        if not self._said_hello:
            self.node.ledger.start_failures += 1
        arrival = max(self._last_arrival_s, self.world.now + self.world.between(1e-5, 1e-3))
        self.world.at(arrival, lambda: self._report_death(signal, exit_code))

    def _report_death(self, signal: int | None, exit_code: int | None) -> None:
        if not self.node.alive:
            return
        unread = [m.sequence for m in self.queue if isinstance(m, RunTasks)]
        self.node.workers.pop(self.worker_id, None)
        if self.world.chance(0.5):
            self.node.tell(b"", PacketsTakenBack(worker_id=self.worker_id, sequences=unread))
        sequence, index = self.progress
        self.node.tell(
            b"",
            WorkerLost(
                worker_id=self.worker_id,
                pid=1,
                exit_code=exit_code,
                signal=signal,
                sequence=sequence,
                index=index,
            ),
        )

    def _send(self, message: Any) -> None:
        """Reports arrive in order, a little later."""
        self._last_arrival_s = max(
            self._last_arrival_s, self.world.now + self.world.between(5e-6, 1e-4)
        )
        node = self.node
        self.world.at(self._last_arrival_s, lambda: node.alive and node.tell(b"", message))

    def _say(self, message: Any) -> None:
        self._send(ClientMessage(worker_id=self.worker_id, message=message))

    # ---- the main loop ---------------------------------------------------------------------------

    def _live(self, fate: str) -> Life:
        yield self.world.between(1e-3, 0.1)
        if fate == "hangs":
            yield 1e6
        if fate == "dies":
            return 1
        if fate == "fails":
            failure = WorkerFailed(worker_id=self.worker_id, error=b"!E0", reason="")
            self._send(structs.replace(failure, error=self.node.start_error()))
            return 1
        self._said_hello = True
        self._send(WorkerReady(worker_id=self.worker_id, pid=1))
        while True:
            while not self.queue:
                yield None
            yield self.world.between(1e-6, 2e-5)
            if not self.queue:
                continue  # taken back meanwhile
            message = self.queue.popleft()
            if isinstance(message, StopWorker):
                return 0
            yield from self._run_packet(message)

    def _run_packet(self, message: RunTasks) -> Life:
        for function_id in message.forget:
            self._functions.pop(function_id, None)
        for definition in message.functions:
            self._functions[definition.function_id] = None
        for known in message.classes:
            self._classes[known.index] = known.task_class
        self._packet = message
        if self._classes[message.tasks[0].class_index].kind is CallKind.CREATE:
            yield from self._construct(message)
            return
        self._task_limit = len(message.tasks)
        self._position = 0
        self._nudged = False
        self._started_s = self.world.now
        if self._signalled:
            self._signalled = False
            if self._take_orders(message.sequence):
                self._task_limit = 0
                handed = [(task.task_id, 0) for task in message.tasks]
                self._send(TasksHandedBack(worker_id=self.worker_id, tasks=handed))
        index = 0
        while self._position < self._task_limit:
            task = message.tasks[self._position]
            self._call_limit = len(task.calls)
            self._call_index = 0
            self._partial_start = 0
            while self._call_index < self._call_limit:
                self.progress = (message.sequence, index)
                index += 1
                yield from self._run_call(task)
                self._call_index += 1
                if self._nudged:
                    self._hand_back()
                    self._flush(False)
                elif self.world.now - self._started_s > _RESULT_DELAY_S:
                    self._flush(False)
                if self.world.chance(0.2):
                    yield 1e-6  # a signal may come between two calls
            self._end_task(task)
            self._position += 1
        self._packet = None
        self._flush(True, message)

    # ---- an actor --------------------------------------------------------------------------------

    def _construct(self, message: RunTasks) -> Life:
        """The worker becomes an actor."""
        actors = self.node.ledger.actors
        self.progress = (message.sequence, 0)
        (task,) = message.tasks
        assert not task.error_arguments, "the argument of a constructor was lost"
        found = [self.node.read(value) for value in task.arguments]
        payload = self.node.read(task.calls[0])
        expected = [actors.arguments[payload]] if payload in actors.arguments else []
        assert found == expected, f"{payload!r} was given {found}, not {expected}"
        yield self.world.between(1e-5, 1e-1)
        assert found == [self.node.read(value) for value in task.arguments], "reused while in use"
        if self.world.chance(actors.crashes):
            raise _Died
        self._is_actor = True
        self._packet = None
        error = b""
        if self.world.chance(actors.refusals):
            died = ActorDiedError(actor_id="", class_name="K", reason="raised.")
            error = self.node.ledger.encode_error(died)
        self._send(ActorStarted(worker_id=self.worker_id, error=error))

    def _method(self, payload: bytes) -> Life:
        actors = self.node.ledger.actors
        actors.begin(self.worker_id, payload)
        yield self.world.between(1e-6, self.world.random.choice([1e-5, 1e-3, 0.1]))
        if self.world.chance(actors.crashes):
            raise _Died
        self._partial.append(actors.value(payload))

    def _end_task(self, task: TaskCall) -> None:
        if self._partial:
            self._finished.append(
                TaskResult(task_id=task.task_id, start=self._partial_start, results=self._partial)
            )
            self._partial = []
        elif self._call_limit:
            self._finished.append(
                TaskResult(task_id=task.task_id, start=self._call_limit, results=[])
            )

    def _flush(self, ended: bool, packet: RunTasks | None = None) -> None:
        message = packet or self._packet
        assert message is not None
        if self._partial:
            self._finished.append(
                TaskResult(
                    task_id=message.tasks[self._position].task_id,
                    start=self._partial_start,
                    results=self._partial,
                    done=False,
                )
            )
            self._partial_start += len(self._partial)
            self._partial = []
        report = TasksFinished(
            worker_id=self.worker_id,
            results=self._finished,
            elapsed_ns=int((self.world.now - self._started_s) * 1e9),
            sequence=message.sequence if ended else message.sequence - 1,
            kept=self._kept,
            released=self._released,
            pinned=self._pinned,
            unpinned=self._unpinned,
        )
        self._finished, self._kept, self._released = [], [], []
        self._pinned, self._unpinned = [], []
        self._unreported = self._unreported[-1:] if self._in_user_code else []
        self._started_s = self.world.now
        self._send(report)

    def look_at_call(self) -> CallProgress:
        """What the shell sees on the control page, also of a process that has died."""
        sequence, index = self.progress
        began_s = self.call_began_s
        return CallProgress(
            worker_id=self.worker_id,
            sequence=sequence,
            index=index,
            running_s=-1.0 if began_s is None else self.world.now - began_s,
        )

    def on_nudge(self) -> None:
        """The signal."""
        if not self.alive or self._is_stuck:
            return
        if self._is_actor:
            if self._packet is not None and (self._finished or self._partial):
                self._flush(False)
            return
        if not self._in_user_code:
            self._nudged = self._packet is not None
            return
        self._prepare_to_block()

    def on_order(self, order: InterruptTask) -> None:
        """An order, and the signal to look."""
        if self.alive:
            self._orders.append(order)
            self._look()

    def _look(self) -> None:
        if not self.alive or self._is_stuck:
            return
        if not self._in_user_code:
            self._signalled = True
            self._nudged = self._packet is not None
        elif self._held:
            self.world.after(1e-3, self._look)
        else:
            packet = self._packet
            assert packet is not None
            self._prepare_to_block()
            task_id = packet.tasks[self._position].task_id
            orders = self._take_orders(packet.sequence)
            mine = [o for o in orders if o.task_id == task_id]
            if any(order.force for order in mine):
                self.die(signal=9)
            elif mine:
                self._go_on(lambda: self._life.throw(_Interrupted()))
            elif any((o.sequence, o.index) == self.progress for o in orders):
                self._go_on(lambda: self._life.throw(_OutOfTime()))

    def _take_orders(self, sequence: int) -> list[InterruptTask]:
        orders = [order for order in self._orders if order.sequence == sequence]
        self._orders = [order for order in self._orders if order.sequence > sequence]
        return orders

    def _prepare_to_block(self) -> None:
        self._hand_back()
        if self._finished or self._partial:
            self._flush(False)

    def _hand_back(self) -> None:
        self._nudged = False
        packet = self._packet
        if packet is None:
            return
        begun = self._call_index + (1 if self._in_user_code else 0)
        handed: list[tuple[TaskId, int]] = []
        task = packet.tasks[self._position]
        if begun < self._call_limit:
            handed.append((task.task_id, begun))
            self._call_limit = begun
        for later in packet.tasks[self._position + 1 : self._task_limit]:
            handed.append((later.task_id, 0))
        self._task_limit = self._position + 1
        if handed:
            self._send(TasksHandedBack(worker_id=self.worker_id, tasks=handed))

    # ---- one call --------------------------------------------------------------------------------

    def _run_call(self, task: TaskCall) -> Life:
        task_class = self._classes[task.class_index]
        payload = task.calls[self._call_index]
        assert isinstance(payload, bytes)
        if task_class.kind is CallKind.METHOD:
            yield from self._method(payload)
            return
        assert task_class.function_id in self._functions, "the function was never sent"
        job = self.node.ledger.begin(payload)
        self._unreported.append(job)
        try:
            arguments = [self.node.read(value) for value in task.arguments]
            for index in task.error_arguments:
                raise _Raised(b"!because " + arguments[index], False)
            self._check_arguments(job, arguments)
            if job.keeps_arguments:
                self._keep(task.arguments)
            self._in_user_code = True
            if self._nudged:
                self._prepare_to_block()
                yield from self._obey_late(task)
            contained = yield from self._limited_code(job, task_class.timeout_s)
            self._in_user_code = False
            assert arguments == [self.node.read(value) for value in task.arguments]
            outcome = yield from self._returned(job, task, contained)
        except _Raised as raised:
            self._in_user_code = False
            error: Value = raised.error
            if len(raised.error) > INLINE_MAX_BYTES:
                error = yield from self._store(self._new_name(), raised.error)
            by_itself = not raised.error.startswith(b"!because")
            outcome = Outcome(
                values=[error], is_error=True, retriable=raised.retriable, raised=by_itself
            )
        except _Interrupted:
            self._in_user_code = False
            if job.is_stubborn:
                outcome = yield from self._returned(job, task, [])
            else:
                error = self.node.ledger.encode_error(
                    TaskCancelledError(task_id=task.task_id.hex(), reason="interrupted")
                )
                outcome = Outcome(values=[error], is_error=True)
        except _OutOfTime:
            self._in_user_code = False
            error = self.node.ledger.encode_error(
                CallTimeoutError(task_name="", timeout_s=task_class.timeout_s, pid=1)
            )
            outcome = Outcome(values=[error], is_error=True)
        self._partial.append(outcome)

    def _limited_code(
        self, job: Job, timeout_s: float
    ) -> Generator[float | None, None, list[ObjectId]]:
        if not timeout_s:
            return (yield from self._user_code(job))
        if self._finished or self._partial:
            self._flush(False)
        self.call_began_s = self.world.now
        try:
            return (yield from self._user_code(job))
        finally:
            if self.alive:  # else the words stay as they were
                self.call_began_s = None

    def _obey_late(self, task: TaskCall) -> Life:
        """The order came after the packet and before the call."""
        packet = self._packet
        assert packet is not None
        mine = [o for o in self._take_orders(packet.sequence) if o.task_id == task.task_id]
        if any(order.force for order in mine):
            raise _Died
        if mine:
            raise _Interrupted
        yield 0.0

    def _check_arguments(self, job: Job, arguments: list[bytes]) -> None:
        expected = [source.value(index) for source, index in job.inputs]
        assert arguments == expected, f"{job.key!r} was given {arguments}, not {expected}"

    def _keep(self, arguments: list[Value]) -> None:
        for value in arguments:
            # (Of two refs to one object a process tells the node once, and gives one back.)
            if isinstance(value, InArena) and value.object_id not in (*self._keeping, *self._refs):
                self._keeping[value.object_id] = value, self.node.read(value)
                self._kept.append(value.object_id)
                self._pinned.append(value.object_id)

    def _let_go(self) -> None:
        """The last view of something kept dies, and with it the ref, or a little later."""
        object_id = list(self._keeping)[-1]
        place, data = self._keeping.pop(object_id)
        assert self.node.read(place) == data, "memory was reused under a view"
        if self.world.chance(0.5):
            self._unpinned.append(object_id)
            self._refs.append(object_id)
        else:
            self._released.append(object_id)

    def _user_code(self, job: Job) -> Generator[float | None, None, list[ObjectId]]:
        world = self.world
        if job.begun <= job.crashes_first:
            yield job.duration_s / 2
            yield from self._yield_some(job)
            raise _Died
        if job.hangs:
            self._is_stuck = job.hangs == "hard"
            yield 1e6
        yield job.duration_s
        if self._refs and world.chance(0.3):
            self._released.append(self._refs.pop())
        if self._keeping and world.chance(0.3):
            self._let_go()
        if job.fails or job.begun <= job.raises_first:
            yield from self._yield_some(job)
            raise _Raised(job.error(), job.options.retry_exceptions)
        if job.borrowed:
            yield from self._get(job.borrowed_ids)
        if job.children:
            yield from self._run_children(job)
        if job.puts:
            yield from self._put(job)
        yield from self._yield_items(job, job.options.items)
        contained: list[ObjectId] = []
        if job.returned_child is not None:
            contained.append(self._submit(job, job.returned_child))
            job.returned_id = contained[0]
        yield job.duration_s / 10
        return contained

    def _yield_some(self, job: Job) -> Life:
        """A generator that will not come to its end."""
        yield from self._yield_items(job, self.world.random.randint(0, job.options.items))

    def _yield_items(self, job: Job, count: int) -> Life:
        if count:
            yield from yield_items(self, job, TaskId(self._running_task_id()), count)

    def _run_children(self, job: Job) -> Life:
        ids = [self._submit(job, child) for child in job.children]
        if job.cancels_child:
            if self.world.chance(0.5):
                yield self.world.between(1e-5, 1e-2)
            job.spawned[-len(ids)].cancelled = True
            self._say(CancelTask(task_id=task_of(ids[0]), force=self.world.chance(0.3)))
        if self.world.chance(0.5):
            yield self.world.between(1e-5, 1e-3)
        try:
            yield from self._get(ids)
        finally:
            if self.alive:
                self._say(ReleaseReferences(object_ids=ids))

    def _submit(self, parent: Job, child: Job) -> ObjectId:
        # Each attempt of the parent submits anew: the same name, another payload.
        again = child.again(self.node.ids.next_key())
        parent.spawned.append(again)
        again.spawned_by = parent
        if child.options.name not in self._defined:
            self._defined[child.options.name] = None
            self._say(DefineFunction(definition=child.options.definition()))
            self._say(DefineClass(task_class=child.options.task_class()))
        task_id = self.node.ids.next_task_id()
        self.node.ledger.add(again, task_id)
        spec = TaskSpec(
            task_id=task_id,
            class_id=again.options.task_class().class_id,
            calls=[again.key],
            parent=TaskId(self._running_task_id()),
        )
        self._say(SubmitTasks(tasks=[spec]))
        return return_id(task_id, 0)

    def _running_task_id(self) -> bytes:
        assert self._packet is not None
        return self._packet.tasks[self._position].task_id

    def _put(self, job: Job) -> Life:
        object_id = return_id(self.node.ids.next_task_id(), 0)
        data = b"put by " + job.name
        value: Value = data
        if job.large:
            value = yield from self._store(object_id, data.ljust(INLINE_MAX_BYTES + 10, b"-"))
        self._say(PutObject(object_id=object_id, value=value))
        reply = yield from self._request(GetObjects(request_id=0, object_ids=[object_id]))
        found = self.node.read(reply[0].values[0])
        if reply[0].errors:
            self.node.ledger.judge_loss(found)
        else:
            assert found.startswith(data)
        self._say(ReleaseReferences(object_ids=[object_id]))

    def _get(self, ids: list[ObjectId]) -> Life:
        """Get values and judge them; an error among them is raised."""
        parts = yield from self._request(GetObjects(request_id=0, object_ids=ids), block=True)
        values: list[Value] = []
        errors: list[int] = []
        for part in parts:
            errors += [len(values) + index for index in part.errors]
            values += part.values
        ledger = self.node.ledger
        near = [
            object_id
            for object_id, value in zip(ids, values, strict=True)
            if isinstance(value, InArena) and not value.node_id
        ]
        if errors:
            error = self.node.read(values[errors[0]])
            self._say(UnpinObjects(object_ids=near))
            ledger.judge_object(ids[errors[0]], error, True)
            raise _Raised(b"!because " + error, False)
        found = [self.node.read(value) for value in values]
        for object_id, data in zip(ids, found, strict=True):
            ledger.judge_object(object_id, data, False)
        if near:
            yield self.world.between(1e-6, 1e-2)
            assert found == [self.node.read(value) for value in values]
            self._say(UnpinObjects(object_ids=near))

    def _request(self, message: Any, block: bool = False) -> Generator[Any, None, list[Any]]:
        self._requests += 1
        number = self._requests
        self._replies[number] = []
        self._say(structs.replace(message, request_id=number))
        told = False
        try:
            while True:
                replies = self._replies[number]
                if replies and not getattr(replies[-1], "more", False):
                    break
                if block and not told:
                    yield 2e-4
                    if not self._replies[number]:
                        told = True
                        self._prepare_to_block()
                        self._send(WorkerBlocked(worker_id=self.worker_id))
                    continue
                yield None
        except _Interrupted:
            self._say(CancelRequest(request_id=number))
            raise
        finally:
            if told and self.alive:
                self._send(WorkerUnblocked(worker_id=self.worker_id))
            del self._replies[number]
        known = (ObjectValues, RangeGranted, RoomGranted)
        assert all(isinstance(reply, known) for reply in replies)
        return replies

    # For generators:

    def request(self, message: Any, block: bool = False) -> Generator[Any, None, list[Any]]:
        """Ask the node, and wait for its answer."""
        return self._request(message, block)

    def send(self, message: Any) -> None:
        """Tell the node."""
        self._send(message)

    def store(self, data: bytes) -> Generator[float | None, None, InArena | InFile]:
        """Write a large value under a name of its own."""
        return self._store(self._new_name(), data)

    def _store(
        self, object_id: ObjectId, data: bytes
    ) -> Generator[float | None, None, InArena | InFile]:
        held, self._held = self._held, True  # what it asks for now it has to take
        (granted,) = yield from self._request(
            AllocateRange(request_id=0, object_id=object_id, size_bytes=len(data))
        )
        self._held = held
        return self.node.write(object_id, granted, data)

    def _new_name(self) -> ObjectId:
        return return_id(self.node.ids.next_task_id(), 0)

    def _returned(
        self, job: Job, task: TaskCall, contained: list[ObjectId]
    ) -> Generator[float | None, None, bytes | Outcome]:
        options: Options = job.options
        if options.items:
            return Outcome(values=[])
        values: list[Value] = []
        for index in range(options.num_returns):
            data = job.value(index)
            if len(data) <= INLINE_MAX_BYTES:
                values.append(data)
                continue
            own = not options.caller and len(task.task_id) == 24
            name = (
                return_id(task.task_id, index)
                if own
                else return_id(self.node.ids.next_task_id(), 0)
            )
            values.append((yield from self._store(name, data)))
        self._released.extend(contained)
        if len(values) == 1 and isinstance(values[0], bytes) and not contained:
            return values[0]
        return Outcome(values=values, contained=[contained] if contained else [])
