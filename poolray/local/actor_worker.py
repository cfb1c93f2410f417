"""A worker that an actor lives in: the constructor, then its calls, until it ends.

    task queue ──RunTasks──▶ one after the other: the loop of `local/worker.py`
                         ├─▶ several at once: threads        ──TasksFinished──▶ report channel
                         └─▶ coroutine methods: an event loop

What: makes the actor, runs its methods the way its class and `max_concurrency` ask for, ends it.
Who calls: `Worker.run`, with the packet that says which actor this worker becomes.
May touch: sockets, threads, an event loop.
Invariants: no call begins before the constructor has returned; an actor that ends itself says so
before its process ends, and is never restarted.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

from poolray.local import process_state, worker_process
from poolray.local.channel import receive_nowait
from poolray.local.worker_errors import encode_constructor_error
from poolray.protocol.actors import ActorSetup
from poolray.protocol.values import Outcome
from poolray.protocol.worker import (
    ActorExiting,
    ActorStarted,
    RunTasks,
    TaskCall,
    TaskResult,
    TasksFinished,
)

if TYPE_CHECKING:
    import asyncio

    from poolray.local.worker import Function, Worker

#: Results of several calls go in one message up to about this size.
_REPORT_BYTES = 64 * 1024


class ActorExit(SystemExit):
    """Raised by `exit_actor()`: the actor ends, politely and for good."""


def run_actor(worker: Worker, message: RunTasks, receive: Callable[[], bytes]) -> None:
    """Become the actor of a packet, and run its calls until it ends.

    Raises
    ------
    ToldToExit
        The actor ended itself, or its constructor raised.
    """
    worker.mark_begun(message.sequence)
    worker.read_definitions(message)
    task = message.tasks[0]
    function = worker.classes[task.class_index]
    host = _ActorHost(worker, task, function)
    host.run(receive)


def has_coroutines(actor_class: type) -> bool:
    """Whether an actor of the class runs in an event loop: one of its methods is a coroutine's."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for name in dir(actor_class)
        if (member := inspect.getattr_static(actor_class, name, None)) is not None
    )


def _is_ready() -> bool:
    """`__ray_ready__`: once it answers, the constructor has returned."""
    return True


def _terminate() -> None:
    """`__ray_terminate__`: ends the actor after the calls before."""
    raise ActorExit(0)


@final
class _ActorHost:
    """The actor, and what runs its calls."""

    def __init__(self, worker: Worker, task: TaskCall, function: Function) -> None:
        self._worker = worker
        self._task = task
        self._function = function
        self.setup: ActorSetup
        self.instance: Any = None

    def run(self, receive: Callable[[], bytes]) -> None:
        """The actor's whole life."""
        from poolray.local.worker import ToldToExit

        worker = self._worker
        loop: _Loop | None = None
        try:
            args, kwargs = self._read()
            actor_class = worker.load_function(self._function)
        except BaseException as error:
            self._fail(error)
        if has_coroutines(actor_class):  # type: ignore[arg-type]
            loop = _Loop(worker, self)
        try:
            if loop is not None:
                self.instance = loop.construct(actor_class, args, kwargs)
            else:
                self.instance = actor_class(*args, **kwargs)
            del args, kwargs
            self._settle_in()
        except BaseException as error:
            self._fail(error)
        try:
            if loop is not None:
                loop.run(self.setup.concurrency)
            elif self.setup.concurrency > 1:
                _Threads(worker, self).run(receive)
            else:
                self._run_serially(receive)
        except ToldToExit as told:
            if told.code == 0:
                self.announce_exit()
            raise
        self.run_shutdown_hook()

    def _read(self) -> tuple[Any, Any]:
        """Load the constructor's arguments; what they come with says which actor this is."""
        worker, task = self._worker, self._task
        args, kwargs, setup = worker.load(task.calls[0], False)
        self.setup = setup
        process_state.become_actor(setup)
        process_state.set_actor_label(setup.class_name)
        resources = self._function.task_class.resources
        name = f"{setup.class_name}.__init__"
        worker.actor_class_name = self._function.name
        process_state.begin_task(task.task_id, name, f"{self._function.name}.__init__", resources)
        if task.slots:
            args, kwargs = worker.fill_slots(task, args, kwargs)
        return args, kwargs

    def _settle_in(self) -> None:
        """The constructor has returned: calls are welcome."""
        worker = self._worker
        worker.bind_method = self.bind
        own_repr: object = type(self.instance).__repr__
        if own_repr is not object.__repr__:
            try:
                process_state.set_actor_label(repr(self.instance))
            except Exception:
                pass  # lines begin with the name of the class then
        worker.client.api.sync_references()  # what it keeps of its arguments, before these go
        worker.send(worker.encode(ActorStarted(worker_id=worker.worker_id)))

    def _fail(self, error: BaseException) -> None:
        """The constructor raised: the actor is dead, and this worker of no use."""
        from poolray.local.worker import ToldToExit

        if isinstance(error, ToldToExit):
            raise error
        setup = getattr(self, "setup", None)
        if setup is None:  # not even the arguments could be loaded
            from poolray.ids import ActorId

            name = self._function.task_class.name.partition(".")[0]
            setup = ActorSetup(actor_id=ActorId(b""), class_name=name, description=b"")
        worker = self._worker
        worker_process.flush_output()
        encoded = encode_constructor_error(error, setup, os.getpid())
        worker.send(worker.encode(ActorStarted(worker_id=worker.worker_id, error=encoded)))
        raise ToldToExit(1)

    def _run_serially(self, receive: Callable[[], bytes]) -> None:
        worker, decode = self._worker, self._worker.decode
        while True:
            packet = receive()
            if not packet:
                return
            message = decode(packet)
            if type(message) is not RunTasks:
                return
            worker.run_packet(message)
            # The last call's values must not live on while we wait.
            packet = message = b""

    def bind(self, name: str) -> Callable[..., Any]:
        """A method, or one of those that every actor has."""
        if name.startswith("__") and not hasattr(type(self.instance), name):
            if name in ("__ray_ready__", "__poolray_ready__"):
                return _is_ready
            if name in ("__ray_terminate__", "__poolray_terminate__"):
                return _terminate
            if name in ("__ray_call__", "__poolray_call__"):
                return self._apply
        method: Callable[..., Any] = getattr(self.instance, name)
        return method

    def _apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`__ray_call__`: a function of the caller's, with the actor for its first argument."""
        return function(self.instance, *args, **kwargs)

    def run_shutdown_hook(self) -> Any:
        """The actor's own `__ray_shutdown__`; gives what it returned."""
        for name in ("__ray_shutdown__", "__poolray_shutdown__"):
            hook = getattr(self.instance, name, None)
            if hook is not None:
                try:
                    return hook()
                except Exception:
                    sys.excepthook(*sys.exc_info())
        return None

    def announce_exit(self) -> None:
        """The actor has ended itself: say so, after its hook has run."""
        from poolray.local.worker import ToldToExit

        self.run_shutdown_hook()
        worker_process.flush_output()
        exiting = ActorExiting(
            worker_id=self._worker.worker_id,
            actor_id=self.setup.actor_id,
            reason="ended itself: exit_actor(), sys.exit() or __ray_terminate__ was called",
        )
        try:
            self._worker.send(self._worker.encode(exiting))
        except ToldToExit:
            pass  # the node is gone

    def leave_at_once(self, error: SystemExit) -> None:
        """End the process from a thread or coroutine among several."""
        from poolray.local.worker import exit_code_of

        code = exit_code_of(error)
        if code == 0:
            self.announce_exit()
        worker_process.flush_output()
        os._exit(code)  # other threads may wait for ever: they are not waited for


@final
class _Reports:
    """Results of calls that end in any order, on their way to the node."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        #: Guards the fields below.
        self._lock = threading.Lock()
        self._results: deque[tuple[TaskResult, int]] = deque()
        self._sending = False

    def add(self, task: TaskCall, outcome: bytes | Outcome) -> None:
        """A call is over; its result is sent with the next message."""
        result = TaskResult(task_id=task.task_id, start=0, results=[outcome])
        values = [outcome] if isinstance(outcome, bytes) else outcome.values
        size = sum(len(value) if isinstance(value, bytes) else 128 for value in values)
        with self._lock:
            self._results.append((result, size))

    def send(self) -> None:
        """Send what there is, unless another thread is at it: it will send ours too."""
        with self._lock:
            if self._sending:
                return
            self._sending = True
        while True:
            with self._lock:
                batch = self._take()
                if not batch:
                    self._sending = False
                    return
            worker = self._worker
            pinned, unpinned = worker.client.take_view_changes()
            kept, released = worker.client.take_reference_changes()
            worker_process.flush_output()
            message = TasksFinished(
                worker_id=worker.worker_id,
                results=batch,
                elapsed_ns=0,
                sequence=0,
                kept=kept,
                released=released,
                viewed=worker.client.viewed_only(kept) if kept else kept,
                pinned=pinned,
                unpinned=unpinned,
            )
            worker.send(worker.encode(message))

    def _take(self) -> list[TaskResult]:
        """Results that fit one message; the caller holds the lock."""
        batch: list[TaskResult] = []
        size = 0
        while self._results and (not batch or size + self._results[0][1] <= _REPORT_BYTES):
            result, result_bytes = self._results.popleft()
            batch.append(result)
            size += result_bytes
        return batch


@final
class _Threads:
    """Calls of an actor that run on threads."""

    def __init__(self, worker: Worker, host: _ActorHost) -> None:
        self._worker = worker
        self._host = host
        self._reports = _Reports(worker)
        self._pool = ThreadPoolExecutor(host.setup.concurrency, "poolray-actor")

    def run(self, receive: Callable[[], bytes]) -> None:
        """Hand calls to threads until told to stop; by then all of them have ended."""
        decode = self._worker.decode
        while True:
            packet = receive()
            message = decode(packet) if packet else None
            if type(message) is not RunTasks:
                self._pool.shutdown(wait=False)
                return
            self._worker.read_definitions(message)
            for task in message.tasks:
                self._pool.submit(self._run_call, task)
            packet = message = None  # type: ignore[assignment]

    def _run_call(self, task: TaskCall) -> None:
        worker = self._worker
        function = worker.classes[task.class_index]
        outcome: bytes | Outcome
        try:
            begin(task, function)
            call = function.call or worker.load_function(function)
            args, kwargs = worker.arguments(task, task.calls[0], function.task_class)
            result = call(*args, **kwargs)
            args = kwargs = None
            outcome = worker.returned(result, task, function)
        except SystemExit as error:
            self._reports.send()  # calls that have ended keep their results
            self._host.leave_at_once(error)
            return
        except BaseException as error:
            outcome = worker.raised(error, task, function)
        result = None
        self._reports.add(task, outcome)
        self._reports.send()


@final
class _Loop:
    """Calls of an actor with coroutine methods: all of its code runs in one event loop."""

    def __init__(self, worker: Worker, host: _ActorHost) -> None:
        import asyncio  # costs more than making an actor: only those pay who use it

        self._worker = worker
        self._host = host
        self._reports = _Reports(worker)
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        #: Calls that wait for one of those that run to end.
        self._waiting: deque[TaskCall] = deque()
        self._free = 0
        self._will_send = False
        #: asyncio itself keeps weak references only.
        self._running: set[asyncio.Task[None]] = set()

    def construct(self, actor_class: Any, args: Any, kwargs: Any) -> Any:
        """Make the actor inside the running loop, where it may make tasks of its own."""

        async def make() -> Any:
            return actor_class(*args, **kwargs)

        return self._loop.run_until_complete(make())

    def run(self, concurrency: int) -> None:
        """Run calls until told to stop; by then all of them have ended."""
        self._free = concurrency
        tasks = self._worker.tasks
        self._loop.add_reader(tasks.fileno(), self._read)
        self._loop.run_forever()
        self._loop.remove_reader(tasks.fileno())
        result = self._host.run_shutdown_hook()
        if inspect.isawaitable(result):
            self._loop.run_until_complete(_wait_for(result))
        worker_process.flush_output()
        worker_process.leave()
        os._exit(0)  # what the actor left running in the loop ends with it

    def _read(self) -> None:
        while (packet := receive_nowait(self._worker.tasks)) is not None:
            message = self._worker.decode(packet) if packet else None
            if type(message) is not RunTasks:
                self._loop.stop()
                return
            self._worker.read_definitions(message)
            self._waiting.extend(message.tasks)
        self._start()

    def _start(self) -> None:
        while self._waiting and self._free:
            self._free -= 1
            running = self._loop.create_task(self._run_call(self._waiting.popleft()))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _run_call(self, task: TaskCall) -> None:
        worker = self._worker
        function = worker.classes[task.class_index]
        outcome: bytes | Outcome
        try:
            begin(task, function)
            call = function.call or worker.load_function(function)
            args, kwargs = worker.arguments(task, task.calls[0], function.task_class)
            result = call(*args, **kwargs)
            args = kwargs = None
            if inspect.isawaitable(result):
                result = await result
            outcome = worker.returned(result, task, function)
        except SystemExit as error:
            self._reports.send()  # calls that have ended keep their results
            self._host.leave_at_once(error)
            return
        except BaseException as error:
            outcome = worker.raised(error, task, function)
        result = None
        self._reports.add(task, outcome)
        self._free += 1
        if not self._will_send:  # those that end in the same round of the loop go together
            self._will_send = True
            self._loop.call_soon(self._send)
        if self._waiting:
            self._start()

    def _send(self) -> None:
        self._will_send = False
        self._reports.send()


async def _wait_for(awaitable: Any) -> None:
    await awaitable


def begin(task: TaskCall, function: Function) -> None:
    """The call runs now, beside others."""
    process_state.begin_concurrent_task(task.task_id, function.task_class.name, function.name)
