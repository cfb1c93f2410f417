"""The local runtime: the node machine inside a driver, with forked workers around it.

      API, Pool, Executor ──requests──▶ NodeShell ──▶ workers
            ▲                               │
            └── values, call results ───────┘
What: what a driver adds to `local/node_shell.py`: its threads' requests, calls of Pools and
Executors with their results, the head of a cluster of one, its end.
Who calls: `session.py`, `pool.py`, `executor.py`; the reactor through `Pumped`.
May touch: processes, sockets, threads, the clock, the temporary folder.
Invariants: the machine is fed under the guard only; user code runs outside of it; after `shutdown`
no process, descriptor, thread or file of ours is left.
"""

from __future__ import annotations

import abc
import atexit
import itertools
import os
import pickle
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

from poolray.client import Client
from poolray.client_link import NO_WATCH, WatchStep
from poolray.config import Config
from poolray.direct.calls import DirectCalls
from poolray.direct.connection import Connection
from poolray.exceptions import InternalError, PoolrayError
from poolray.head.head import Head
from poolray.ids import PLAIN_TASKS, WORKER_ID_BYTES, ClientId, ObjectId, TaskId, TaskIdSource
from poolray.local import inspection, news, process_state
from poolray.local.callbacks import CallbackThread
from poolray.local.collected import Submission, take_together
from poolray.local.direct_host import DirectHost, sooner
from poolray.local.group_handle import GroupHandle
from poolray.local.machine import Machine, Wishes, describe, usable_cpus
from poolray.local.memory_views import with_views
from poolray.local.node_shell import NodeShell, store_bytes
from poolray.local.reactor import Interrupts, Waitable
from poolray.node.effects import (
    GroupDrained,
    GroupFailed,
    Notice,
    Reply,
    SendHead,
    SendPeer,
    UnhandledError,
    Warn,
)
from poolray.objects.serialization import Serializer
from poolray.protocol.client import (
    AllocateRange,
    CallResults,
    CancelRequest,
    CancelTask,
    DefineClass,
    GetObjects,
    ObjectValues,
    RangeGranted,
    ReleaseReferences,
    ReturnRange,
    SubmitTasks,
    UnpinObjects,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.memory import MemoryTable
from poolray.protocol.values import InArena, InFile, Outcome, TaskClass, TaskSpec
from poolray.protocol.worker import WorkerNews, WorkerOutput

__all__ = [
    "CallbackThread",
    "GroupHandle",
    "LocalRuntime",
    "PoolrayError",
    "Sink",
    "current",
    "ensure",
    "shutdown",
    "usable_cpus",
]

_LOCAL = ClientId(b"driver")
_NOTHING: list[ObjectId] = []
#: Submissions between two looks at what workers have reported.
_PUMP_EVERY = 48
#: What follows on what a `wait` finds is looked at along with it, for the next one.
_WAIT_AHEAD = 64
#: Calls that are collected at the most.
_BEHIND_MAX = 256


class Sink(abc.ABC):
    """Receives results of one submitted batch of calls."""

    __slots__ = ()

    @abc.abstractmethod
    def deliver(self, start: int, results: list[bytes | Outcome]) -> bool:
        """Results of the calls from `start` on; True when the batch is complete."""


@final
class _Request(Waitable):
    """A request of a thread of this process to the machine."""

    __slots__ = ("call", "reply")

    def __init__(self) -> None:
        super().__init__()
        self.reply: Any = None
        #: Called with the reply instead of waking a thread.
        self.call: Callable[[Any], None] | None = None


@final
class LocalRuntime(NodeShell):
    """One node in this process."""

    def __init__(
        self, config: Config, machine: Machine, spill_directories: Sequence[str] = ()
    ) -> None:
        super().__init__(config, machine, spill_directories, _LOCAL, os.urandom(4))
        self.driver_id = os.urandom(WORKER_ID_BYTES)
        self.task_ids = TaskIdSource(os.urandom(16))
        #: Made when the node has something to say to it.
        self._head: Head | None = None
        self.interrupts = Interrupts(self.guard)
        self._request_ids = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        #: root task id -> who gets its results.
        self._sinks: dict[TaskId, Sink] = {}
        #: What finalizers of faces want done (they may only append).
        self.later: deque[Callable[[], object]] = deque()
        self._submissions = 0
        #: Tasks and calls that the machine would only queue, in order: it is told of them before it
        #: is told anything else.
        self._behind: deque[Submission] = deque()
        self.callbacks = CallbackThread()
        #: This process's client; `init` gives it the serializer of the group of plain tasks.
        self.client = Client(
            self,
            self.arena,
            config,
            self.task_ids,
            Serializer(main_definitions={}, out_of_band_all=True),
        )
        if config.direct_calls_after and not config.record_ref_creation_sites:
            host = DirectHost(self.reactor, "", self._show_error_of_call)
            self.client.direct = DirectCalls(self.client, host, config.direct_calls_after)
        self.client.ring_when_dropped(self.reactor.ring)
        self.client.ring_for_streams = self.reactor.ring
        self._inspection = self._open_inspection()
        process_state.on_fork_in_child(self._abandon)
        _runtimes.add(self)

    # ---- effects ---------------------------------------------------------------------------------

    def _act_reply(self, effect: Reply) -> None:
        if effect.client_id != _LOCAL:
            super()._act_reply(effect)
            return
        message = effect.message
        if type(message) is RangeGranted and message.offset < 0:
            message = self._with_path(message)
        if type(message) is CallResults:
            self._deliveries.append(message)
            return
        request = self._requests.pop(message.request_id, None)  # type: ignore[union-attr]
        if request is None:
            return
        request.reply = message
        if request.call is not None:
            self._deliveries.append(request)
        request.finish()
        self.reactor.wake_if_other()

    def _act_send_head(self, effect: SendHead) -> None:
        """The head lives here as well, and hears of time only what its one node says."""
        head, now = self._head, time.monotonic()
        if head is None:
            head = self._head = Head(self.config)
            head.handle(self.node_id, self.node.register(), now)
        for sent in head.handle(self.node_id, effect.message, now):
            self._echoes.append(sent.message)

    def _act_send_peer(self, effect: SendPeer) -> None:
        raise InternalError("a node without peers has something to say to one")

    # ---- what the reactor drives (`Pumped`) ------------------------------------------------------

    def _prepare_plain_tasks(self, message: Any) -> None:
        """A worker of a Pool or Executor is the first to use plain tasks: they need workers too."""
        if type(message) is not DefineClass or message.task_class.group_id != PLAIN_TASKS:
            return
        while not process_state.lock.acquire(timeout=0.05):
            if self._closed:
                return  # whoever has the lock is ending this runtime, and waits for this thread
        try:
            if self.default_group is None and not self._closed and make_default_group is not None:
                make_default_group(self)
        finally:
            process_state.lock.release()

    def _open_inspection(self) -> inspection.Inspection | None:
        """Let `poolray memory` look in, where the system can do that."""
        if not inspection.is_supported():
            return None
        try:
            made = inspection.Inspection(
                self.job_id.hex(), lambda: self.memory_table(inspection.LIMIT)
            )
        except OSError:
            return None  # no descriptors left, or a sandbox: a comfort, nothing depends on it
        self.reactor.watch_other(made.listener, made)
        return made

    def _close_inspection(self) -> None:
        if self._inspection is not None:
            self.reactor.unwatch_other(self._inspection.listener)
            self._inspection.close()
            self._inspection = None

    def on_server_news(self, host: Any) -> None:
        """A fork server reports exits, or is gone; an actor answers a direct call; or somebody
        wants to look in.
        """
        if type(host) is Connection or isinstance(host, inspection.Inspection):
            host.answer()
        else:
            super().on_server_news(host)

    def settle(self) -> None:
        """Hand results over; outside of the guard, for this runs users' code.

        Ctrl-C is held back by whoever calls this: what has been taken out of a queue must arrive.
        """
        deliveries = self._deliveries
        while deliveries:
            try:
                item = deliveries.popleft()
            except IndexError:
                break  # another thread was faster
            self._hand_over(item)
        while self.later:
            try:
                call = self.later.popleft()
            except IndexError:
                break
            call()
        if self.has_notes():
            self.client.sync_references()

    def has_notes(self) -> bool:
        """Whether refs have died of which the machine was not told."""
        return bool(self.client.dropped or self.client.dropped_streams)

    def _hand_over(self, item: Any) -> None:
        kind = type(item)
        if kind is CallResults:
            sink = self._sinks.get(item.task_id)
            if sink is None:
                self.release([v.object_id for v in _places(item.results)])
            elif sink.deliver(item.start, item.results):
                del self._sinks[item.task_id]
        elif kind is _Request:
            item.call(item.reply)
        elif kind is WorkerOutput:
            _write_out(sys.stdout if item.stream == 1 else sys.stderr, item.text)
        elif kind is WorkerNews:
            news.hand_over(item.topic, item.data)
        elif kind is GroupFailed:
            handle = self._groups.get(item.group_id)
            if handle is not None:
                handle.error = item.error
                if handle.on_failed is not None:
                    handle.on_failed(item.error)
        elif kind is GroupDrained:
            self._end_group(item.group_id)
        elif kind is UnhandledError:
            self._show_unhandled(item)
        elif kind is Notice:
            _write_out(sys.stderr, f"poolray: {item.text}\n")
        elif kind is Warn:
            import warnings

            warnings.warn(item.text, RuntimeWarning, stacklevel=2)

    def _show_error_of_call(self, error: bytes) -> None:
        """The same of a direct call."""
        self._deliveries.append(UnhandledError(error))

    def next_timeout(self) -> float | None:
        """Seconds until `tick` is due."""
        return sooner(super().next_timeout(), self.client.direct)

    def tick(self) -> None:
        """Time has passed."""
        if self.client.direct is not None:
            self.client.direct.tick()
        super().tick()

    def _show_unhandled(self, item: UnhandledError) -> None:
        """An error whose last ref died before anybody looked at it."""
        if self.config.ignore_unhandled_errors or self._closed:
            return
        error = self.client.load_error(item.value)
        sys.stderr.write(
            f"Unhandled error (suppress with POOLRAY_IGNORE_UNHANDLED_ERRORS=1): {error}\n"
        )

    def is_unsettled(self) -> bool:
        """Whether results wait to be handed over."""
        return bool(self._deliveries) or bool(self.later)

    def has_work(self) -> bool:
        """Whether workers will report something."""
        if self.open_batches or self._deliveries or self.later or self._behind:
            return True
        if self.client.direct is not None and self.client.direct.pending:
            return True
        with self.guard:
            return self.node.has_work()

    # ---- requests of this process ----------------------------------------------------------------

    def tell(self, message: Any) -> None:
        """A request of this process that needs no answer."""
        with self.guard:
            self.feed(_LOCAL, message)

    def submit(self, message: Submission) -> None:
        """Tasks of this process (`Link`): send at once what workers have room for.

        Where they have none, calls are collected: the machine takes many in less time than one by
        one. Whatever gives a worker room is a message, and takes them along.
        """
        behind, would_queue = self._behind, self.node.would_queue
        if behind or would_queue(message):
            behind.append(message)
            # (Asked after that line: until then another thread may make room, and not see it.)
            if would_queue(message) and len(behind) < _BEHIND_MAX:
                self._submissions += 1
                if self._submissions >= _PUMP_EVERY:
                    self._submissions = 0
                    self.reactor.pump()
                return
            with self.guard:
                self._tell_behind()
        else:
            with self.guard:
                self.feed(_LOCAL, message)
        self.after_submit()

    def feed(self, sender: bytes, message: Any) -> None:
        """Give the machine a message, after the calls that were made before it."""
        if self._behind:
            self._tell_behind()
        super().feed(sender, message)
        if self._behind:
            # Another thread found no room a moment ago, which this message may have made: perhaps
            # no other one comes.
            self._tell_behind()

    def _tell_behind(self) -> None:
        """Tell the machine of the calls that were collected; under the guard."""
        while self._behind:
            super().feed(_LOCAL, take_together(self._behind))

    def after_submit(self) -> None:
        """See to it that somebody receives: us now and then, else the background thread."""
        if self._deliveries:
            self.reactor.wake_if_other()  # a leader that sleeps has something to hand over
        self.reactor.ensure_background()
        self._submissions += 1
        if self._submissions >= _PUMP_EVERY:
            self._submissions = 0
            self.reactor.pump()

    def peek(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """Values that are ready and small; None: ask with `get` (`Link`)."""
        with self.guard.lock:
            return self.node.small_values(object_ids)

    def get(self, object_ids: list[ObjectId], timeout_s: float | None) -> ObjectValues | None:
        """Values once all are ready or one has failed; None when the time is up."""
        request = _Request()
        request_id = next(self._request_ids)
        message = GetObjects(request_id=request_id, object_ids=object_ids)
        try:
            reply: ObjectValues | None = self._ask(request, request_id, message, timeout_s)
        except BaseException:
            if request.reply is not None:  # nobody will look at these
                values = zip(object_ids, request.reply.values, strict=True)
                near = [
                    object_id
                    for object_id, value in values
                    if type(value) is InArena and not value.node_id
                ]
                self.tell(UnpinObjects(object_ids=near))
            raise
        return reply

    def wait(
        self,
        object_ids: list[ObjectId],
        count: int,
        timeout_s: float | None,
        fetch: bool = False,
        watch: WatchStep = NO_WATCH,
    ) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up."""
        request = _Request()
        request_id = next(self._request_ids)
        message = WaitObjects(
            request_id=request_id,
            object_ids=object_ids,
            count=count,
            ahead=_WAIT_AHEAD if watch.is_front else 0,
            watch=watch.number,
            left=watch.left,
        )
        reply: WaitReply | None = self._ask(request, request_id, message, timeout_s)
        assert reply is not None  # a request that is cancelled is answered
        if reply.ahead:
            self.client.note_ready([object_ids[index] for index in reply.ahead])
        elif reply.ahead_ids:
            self.client.note_ready(reply.ahead_ids)
        return reply.ready

    def _ask(
        self, request: _Request, request_id: int, message: Any, timeout_s: float | None
    ) -> Any:
        self._requests[request_id] = request
        try:
            with self.guard:
                if self.open_batches:
                    self._flush_batches()
                self.feed(_LOCAL, message)
            if not request.done:
                self.reactor.wait(request, timeout_s)
                if not request.done:
                    self.tell(CancelRequest(request_id=request_id))
        except BaseException:
            # In this order: an answer that comes before the machine has heard must be taken.
            try:
                self.tell(CancelRequest(request_id=request_id))
            finally:
                self._requests.pop(request_id, None)
            raise
        self._requests.pop(request_id, None)
        return request.reply

    def when_ready(
        self, object_id: ObjectId, call: Callable[[ObjectValues], None]
    ) -> Callable[[], None]:
        """Call back once with the object's value; what it gives takes that back (`Link`)."""
        return self._when_answered(
            lambda number: GetObjects(request_id=number, object_ids=[object_id]), call
        )

    def when_there(self, object_id: ObjectId, call: Callable[[], None]) -> Callable[[], None]:
        """The same for an object of which only the arrival matters (`Link`)."""
        return self._when_answered(
            lambda number: WaitObjects(request_id=number, object_ids=[object_id], count=1),
            lambda reply: call(),
        )

    def _when_answered(
        self, make: Callable[[int], Any], call: Callable[[Any], None]
    ) -> Callable[[], None]:
        request = _Request()
        request.call = call
        request_id = next(self._request_ids)
        self._requests[request_id] = request
        with self.guard:
            self.feed(_LOCAL, make(request_id))
        if self._deliveries:
            self._settle_at_once()
        self.reactor.ensure_background()

        def forget() -> None:
            # (An answer that comes meanwhile is handed to `call`, which lets go of it.)
            if request_id in self._requests and not self._closed:
                self.tell(CancelRequest(request_id=request_id))
            self._requests.pop(request_id, None)

        return forget

    def allocate(self, object_id: ObjectId, size_bytes: int) -> RangeGranted:
        """Where to write an object; waits while the machine makes room (`Link`)."""
        request = _Request()
        request_id = next(self._request_ids)
        self._requests[request_id] = request
        message = AllocateRange(request_id=request_id, object_id=object_id, size_bytes=size_bytes)
        with self.guard:
            self.feed(_LOCAL, message)
        if not request.done:
            self._wait_for_room(request, request_id, object_id)
        reply: RangeGranted = request.reply
        return reply

    def _wait_for_room(self, request: _Request, request_id: int, object_id: ObjectId) -> None:
        try:
            # The caller holds Ctrl-C back for the sake of what it writes; nothing is written yet.
            self.guard.sleep(self.reactor.wait, request, None)
        except BaseException:
            self._requests.pop(request_id, None)
            self.tell(CancelRequest(request_id=request_id))
            self.tell(ReturnRange(object_id=object_id))  # if it was granted meanwhile
            raise

    def ask(self, make: Callable[[int], Any]) -> Any:
        """Send the request that `make` makes of its number; gives the answer (`Link`)."""
        request: _Request = _Request()
        request_id = next(self._request_ids)
        self._requests[request_id] = request
        with self.guard:
            if self.open_batches:
                self._flush_batches()
            self.feed(_LOCAL, make(request_id))
        self.reactor.ensure_background()
        return request.reply

    def release(self, object_ids: list[ObjectId]) -> None:
        """This process no longer looks at these objects."""
        if object_ids:
            self.tell(ReleaseReferences(object_ids=object_ids))

    def enter(self) -> None:
        """Hold Ctrl-C back until `leave` (`Link`)."""
        self.guard.enter()

    def leave(self) -> None:
        """The end of `enter` (`Link`)."""
        self.guard.leave()

    def send(self, message: Any) -> None:
        """Tell the node something (`Link`)."""
        self.tell(message)
        if type(message) is CancelTask:
            self.settle_now()  # some may wait for what is now an error

    # ---- calls with results for the caller -------------------------------------------------------

    def submit_calls(
        self,
        task_class: TaskClass,
        calls: list[bytes | InArena | InFile],
        sink: Sink,
        borrows: list[ObjectId] = _NOTHING,
    ) -> TaskId:
        """Submit a batch of calls whose results go to `sink`; under no lock."""
        with self.guard:
            task_id = self.submit_calls_guarded(task_class, calls, sink, borrows)
        if self._deliveries:
            self._settle_at_once()  # it failed at once: the group has ended
        return task_id

    def submit_calls_guarded(
        self,
        task_class: TaskClass,
        calls: list[bytes | InArena | InFile],
        sink: Sink,
        borrows: list[ObjectId] = _NOTHING,
    ) -> TaskId:
        """The same, for a caller that is under the guard already."""
        task_id = self.task_ids.next_task_id()
        self._sinks[task_id] = sink
        class_id = task_class.class_id
        if class_id in self.node.state.classes:
            spec = TaskSpec(task_id=task_id, class_id=class_id, calls=calls, borrows=borrows)
            self.feed(_LOCAL, SubmitTasks(tasks=[spec]))
        else:  # another thread has ended the group, and with it its classes
            refusal = Outcome(values=[pickle.dumps(group_has_ended())], is_error=True)
            self._deliveries.append(
                CallResults(task_id=task_id, start=0, results=[refusal] * len(calls))
            )
        return task_id

    def _flush_batches(self) -> None:
        """Give the machine the calls that were collected; under the guard."""
        for batch in list(self.open_batches):
            self.open_batches.pop(batch, None)
            batch.flush_guarded()  # opens itself again when workers have no room for all of it

    def flush_batches(self) -> None:
        """Give the machine the calls that were collected."""
        with self.guard:
            self._flush_batches()
        if self._deliveries:
            self._settle_at_once()  # some failed at once: the group has ended

    # ---- looking in ------------------------------------------------------------------------------

    def in_this_process(self) -> bool:
        """False in a fork of the process that made it."""
        return self.pid == os.getpid()

    def memory_table(self, limit: int | None = None) -> MemoryTable:
        """Which objects there are, where, and who holds them: the `limit` largest, or all."""
        self.client.sync_references()
        with self.guard:
            self._tell_behind()
            table = self.node.memory_table(self.pid, limit)
        return with_views(table, self.client, self.pid)

    def shutdown(self) -> None:
        """End everything that this runtime has started, and wait for its end."""
        if self._closed or self.pid != os.getpid():
            return
        self.client.sync_references()
        self._settle_at_once()
        self._closed = True
        self.ended = "has been shut down"
        self.client.ended = "belongs to a runtime that has been shut down"
        ended = pickle.dumps(PoolrayError("poolray.shutdown() ended this before it had a result."))
        for handle in list(self._groups.values()):
            if handle.on_failed is not None:
                handle.on_failed(ended)  # whoever waits for a call of it is told
        if self.client.direct is not None:
            self.client.direct.close()
        self._end_groups()
        self.reactor.stop()
        self._close_inspection()
        self._deliver_unfinished_output()
        self._settle_at_once()
        self.reactor.wait_for_callers(self.config.stop_timeout_s)
        self._spill_threads.stop()
        self.callbacks.stop()
        self.interrupts.restore()
        # From here on a forked child has nothing of ours to close: the numbers of our descriptors
        # may soon be those of files of the program.
        process_state.off_fork_in_child(self._abandon)
        self._close_shell()
        _runtimes.discard(self)

    def _abandon(self) -> None:
        """In a forked child: close the parent's channels here, touch nothing else."""
        self.ended = self.client.ended = "belongs to the parent process of this fork"
        self._close_inspection()
        if self.client.direct is not None:
            self.client.direct.close()
        self._abandon_shell()
        self.interrupts.restore()
        _runtimes.discard(self)


def group_has_ended() -> PoolrayError:
    """What a call gets that comes too late."""
    return PoolrayError(
        "The workers of this Pool or Executor were shut down before this call was submitted: make "
        "a new one."
    )


def _write_out(stream: Any, text: str) -> None:
    """Write what a worker has printed."""
    try:
        stream.write(text)
        stream.flush()
    except Exception:
        # Closed, absent, full: the thread that happens to lead, and waits for something else,
        # must not fail for it.
        pass


def _places(results: list[bytes | Outcome]) -> list[InArena | InFile]:
    """Values of results that occupy memory or disk."""
    return [
        value
        for result in results
        if isinstance(result, Outcome)
        for value in result.values
        if not isinstance(value, bytes)
    ]


#: Set by the API: makes the group of plain tasks where the driver has not.
make_default_group: Callable[[LocalRuntime], None] | None = None
_runtimes: weakref.WeakSet[LocalRuntime] = weakref.WeakSet()
_current: LocalRuntime | None = None


def current() -> LocalRuntime | None:
    """This process's runtime, if it has one."""
    # (In a forked child the parent's is closed: `_abandon`. Asking for the process's number at each
    # call would cost more than all the rest of this.)
    found = _current
    return found if found is not None and not found._closed else None


def ensure(
    config: Config | None = None,
    wishes: Wishes | None = None,
    spill_directories: Sequence[str] = (),
) -> LocalRuntime:
    """This process's runtime, made if there is none."""
    global _current
    with process_state.lock:
        found = current()
        if found is not None:
            return found
        made = config if config is not None else Config.load()
        machine = describe(made, wishes or Wishes(), store_bytes(made))
        _current = LocalRuntime(made, machine, spill_directories)
        return _current


def shutdown() -> None:
    """End this process's runtime, if it has one."""
    global _current
    with process_state.lock:
        found, _current = _current, None
    if found is not None:
        found.shutdown()


def _at_exit() -> None:
    for runtime in list(_runtimes):
        runtime.shutdown()


# Registered through threading too: plain atexit handlers run after the interpreter has joined
# non-daemon threads, and executors must finish their work before that.
atexit.register(_at_exit)
