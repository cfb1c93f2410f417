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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from poolray.direct.own_calls import AFTER, LISTEN, RESULT
from poolray.local import process_state, worker_process
from poolray.local.actor_serial import SerialCalls
from poolray.local.actor_threads import Threads
from poolray.local.worker_arguments import fill_slots
from poolray.local.worker_errors import encode_constructor_error
from poolray.protocol.actors import ActorSetup
from poolray.protocol.worker import ActorExiting, ActorStarted, RunTasks, TaskCall

if TYPE_CHECKING:
    from poolray.local.actor_loops import Loops
    from poolray.local.worker import Worker
    from poolray.local.worker_functions import Function


#: Of what an actor says of itself, those who look on are told so much.
_REPR_CHARS_MAX = 1000


class ActorExit(SystemExit):
    """Raised by `exit_actor()`: the actor ends, politely and for good."""


def run_actor(worker: Worker, message: RunTasks, receive: Callable[[], bytes]) -> None:
    """Become the actor of a packet, and run its calls until it ends.

    Raises
    ------
    ToldToExit
        The actor ended itself, or its constructor raised.
    """
    if worker.former is not None:
        worker.former.close()  # (nobody looks at it from now on)
        worker.former = None
    worker.mark_begun(message.sequence)
    worker.functions.read(message)
    task = message.tasks[0]
    function = worker.functions.classes[task.class_index]
    process_state.set_reconstructed(message.attempt > 0)
    host = ActorHost(worker, task, function)
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
class ActorHost:
    """The actor, and what runs its calls."""

    def __init__(self, worker: Worker, task: TaskCall, function: Function) -> None:
        self._worker = worker
        self._task = task
        self._function = function
        self.setup: ActorSetup
        #: What runs its calls, if several at once.
        self._together: Loops | Threads | None = None
        self.instance: Any = None

    def run(self, receive: Callable[[], bytes]) -> None:
        """The actor's whole life."""
        from poolray.local.worker import ToldToExit

        worker = self._worker
        loops: Loops | None = None
        try:
            args, kwargs = self._read()
            actor_class = worker.functions.load(self._function)
        except BaseException as error:
            self._fail(error)
        if has_coroutines(actor_class):  # type: ignore[arg-type]
            # (asyncio costs more than making an actor: only those pay who use it.)
            from poolray.local.actor_loops import Loops

            process_state.become_async()
            loops = Loops(worker, self)
        try:
            if loops is not None:
                self.instance = loops.construct(actor_class, args, kwargs)
            else:
                self.instance = actor_class(*args, **kwargs)
            del args, kwargs
            self._settle_in()
        except BaseException as error:
            self._fail(error)
        try:
            if loops is not None:
                self._together = loops
                loops.run()
            elif self.setup.concurrency > 1 or self.setup.groups:
                self._together = Threads(worker, self)
                self._together.run()
            else:
                worker.serial = SerialCalls(worker)
                worker.serial.run(receive)
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
        task_class = self._function.task_class
        name = f"{setup.class_name}.__init__"
        worker.actor_class_name = self._function.name
        process_state.set_placement(task_class.placement)
        process_state.begin_task(
            task.task_id,
            name,
            f"{self._function.name}.__init__",
            task_class.resources,
            task_class.placement,
        )
        if task.slots:
            args, kwargs = fill_slots(worker, task, args, kwargs)
        return args, kwargs

    def _settle_in(self) -> None:
        """The constructor has returned: calls are welcome."""
        worker = self._worker
        worker.bind_method = self.bind
        own_repr: object = type(self.instance).__repr__
        repr_name = ""
        if own_repr is not object.__repr__:
            try:
                repr_name = repr(self.instance)
                process_state.set_actor_label(repr_name)
            except Exception:
                pass  # lines begin with the name of the class then
        worker.client.api.sync_references()  # what it keeps of its arguments, before these go
        started = ActorStarted(worker_id=worker.worker_id, repr_name=repr_name[:_REPR_CHARS_MAX])
        worker.send(worker.encode(started))

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

    def bind(self, name: str) -> Callable[..., Any]:
        """A method, or one of those that every actor has."""
        if name.startswith("__") and not hasattr(type(self.instance), name):
            if name in ("__ray_ready__", "__poolray_ready__"):
                return _is_ready
            if name in ("__ray_terminate__", "__poolray_terminate__"):
                return _terminate
            if name in ("__ray_call__", "__poolray_call__"):
                return self._apply
            if name in (LISTEN, AFTER, RESULT):
                return self._bind_direct(name)
        method: Callable[..., Any] = getattr(self.instance, name)
        return method

    def _bind_direct(self, name: str) -> Callable[..., Any]:
        """What callers ask for that come past the node."""
        worker = self._worker
        if self._together is not None:
            if worker.lines is None:
                worker.lines = self._together.make_lines()
            return worker.lines.listen if name == LISTEN else worker.lines.give_held
        if worker.direct is None:
            from poolray.local.direct_server import DirectServer

            worker.direct = DirectServer(worker)
        if name == LISTEN:
            return worker.direct.listen
        return worker.direct.run_until if name == AFTER else worker.direct.give_held

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
        self.run_shutdown_hook()
        self._tell_of_exit()

    def _tell_of_exit(self) -> None:
        from poolray.local.worker import ToldToExit

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
        """End the process from a thread among several."""
        code = worker_process.exit_code_of(error)
        if code == 0:
            self.announce_exit()
        worker_process.flush_output()
        os._exit(code)  # other threads may wait for ever: they are not waited for

    async def leave_loop(self, error: SystemExit) -> None:
        """The same from a coroutine."""
        code = worker_process.exit_code_of(error)
        if code == 0:
            await self.run_shutdown_hook_in_loop()
            self._tell_of_exit()
        worker_process.flush_output()
        os._exit(code)

    async def run_shutdown_hook_in_loop(self) -> None:
        """The actor's own `__ray_shutdown__`, which may be a coroutine."""
        result = self.run_shutdown_hook()
        if inspect.isawaitable(result):
            try:
                await result
            except Exception:
                sys.excepthook(*sys.exc_info())
