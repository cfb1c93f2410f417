"""The local runtime: the node machine inside a driver, with forked workers around it.

      API, Pool, Executor ──requests──▶ ┌───────────────┐ ──effects──▶ WorkerHost (per group)
            ▲                           │ Node (pure)   │                  │ fork server, workers
            └── values, call results ── └───────────────┘ ◀── packets ─────┘
                                  one Guard; the Reactor decides which thread works
What: owns the machine, the arena and the workers' hosts; carries effects out; gives results to
those who wait.
Who calls: `api.py`, `pool.py`, `executor.py`; the reactor through `Pumped`.
May touch: processes, sockets, threads, the clock, the temporary folder.
Invariants: the machine is fed under the guard only; user code runs outside of it; after `shutdown`
no process, descriptor, thread or file of ours is left.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

import msgspec

from poolray.client import Client
from poolray.config import Config
from poolray.exceptions import PoolrayError, WorkerStartError
from poolray.head.head import Head
from poolray.ids import (
    NODE_ID_BYTES,
    WORKER_ID_BYTES,
    ClientId,
    GroupId,
    NodeId,
    ObjectId,
    TaskId,
    TaskIdSource,
    WorkerId,
)
from poolray.local import inspection, process_state
from poolray.local.callbacks import CallbackThread
from poolray.local.fork_server import WorkerSetup
from poolray.local.machine import Machine, Wishes, describe, memory_bytes, usable_cpus
from poolray.local.reactor import Guard, Interrupts, Reactor, Waitable
from poolray.local.session_folder import SessionFolders, sweep
from poolray.local.spilling import SpillThreads, file_name
from poolray.local.workers import WorkerHost
from poolray.node.effects import (
    DeleteFile,
    DeleteUnsealed,
    GroupDrained,
    GroupFailed,
    Interrupt,
    Notice,
    Nudge,
    Reply,
    RestoreObject,
    SendHead,
    SendWorker,
    SpillObjects,
    StartWorker,
    TakeBack,
    TerminateWorker,
    UnhandledError,
    Warn,
)
from poolray.node.node import Node, NodeStatistics
from poolray.objects.serialization import Serializer, main_definitions
from poolray.objects.shared_memory import SLOTS, Arena, create_arena_file
from poolray.protocol.actors import CallActor
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
from poolray.protocol.memory import HolderKind, MemoryTable, ObjectEntry, ObjectHolder
from poolray.protocol.node import (
    CloseGroup,
    CreateGroup,
    PacketsTakenBack,
    ResizeGroup,
    TerminateGroup,
    Tick,
    WorkerLost,
)
from poolray.protocol.state import QueryState, StateKind, StateRow, StateRows
from poolray.protocol.values import InArena, InFile, Outcome, TaskClass, TaskSpec
from poolray.protocol.worker import (
    ClientMessage,
    FromWorkers,
    TasksFinished,
    WorkerExited,
    WorkerOutput,
    WorkerReady,
)

_LOCAL = ClientId(b"driver")
_NOTHING: list[ObjectId] = []
_SHELL = b""
#: The group whose workers run plain tasks.
_PLAIN_TASKS = GroupId(0)
#: Submissions between two looks at what workers have reported.
_PUMP_EVERY = 48
_ARENA_SHARE = 0.3
#: How often a leader looks at calls that wait for room (results make it look at once).
_LOOK_AT_BATCHES_S = 0.02
_ARENA_MIN_BYTES = 64 << 20


class Sink:
    """Receives results of one submitted batch of calls."""

    __slots__ = ()

    def deliver(self, start: int, results: list[bytes | Outcome]) -> bool:
        """Results of the calls from `start` on; True when the batch is complete."""
        raise NotImplementedError


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
class GroupHandle(Waitable):
    """A group of workers; done when it has ended."""

    __slots__ = ("error", "group_id", "host", "on_failed", "serializer", "shared_globals")

    def __init__(self, group_id: GroupId, host: WorkerHost, serializer: Serializer) -> None:
        super().__init__()
        self.group_id = group_id
        self.host = host
        #: For arguments of calls that its workers run.
        self.serializer = serializer
        self.shared_globals: str | None = None
        #: Why its workers do not start, if they do not.
        self.error: bytes | None = None
        #: Called once, from some thread, when its workers do not start.
        self.on_failed: Callable[[bytes], None] | None = None


@final
class LocalRuntime:
    """One node in this process."""

    def __init__(
        self, config: Config, machine: Machine, spill_directories: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.machine = machine
        self.pid = os.getpid()
        self.node_id = NodeId(os.urandom(NODE_ID_BYTES))
        self.job_id = os.urandom(4)
        self.driver_id = os.urandom(WORKER_ID_BYTES)
        self.task_ids = TaskIdSource(os.urandom(16))
        capacity = _store_bytes(config)
        self.arena = Arena(create_arena_file(capacity), capacity)
        self._random = os.urandom(WORKER_ID_BYTES - 8)
        self._worker_numbers = itertools.count(1)
        self.node = Node(
            node_id=self.node_id,
            config=config,
            resources=machine.total,
            devices=machine.devices,
            labels=machine.labels,
            arena_bytes=capacity,
            encode_error=pickle.dumps,
            next_worker_id=lambda: WorkerId(
                self._random + next(self._worker_numbers).to_bytes(8, "big")
            ),
            local_client=_LOCAL,
            slots=SLOTS,
        )
        #: Made when the node has something to say to it.
        self._head: Head | None = None
        self.guard = Guard()
        self.reactor = Reactor(self, self.guard, config.spin_s, config.takeover_s)
        self.interrupts = Interrupts(self.guard)
        self._group_ids = itertools.count(1)
        #: group id -> handle, of groups that have not ended.
        self._groups: dict[GroupId, GroupHandle] = {}
        self._hosts: dict[GroupId, WorkerHost] = {}
        self._host_by_worker: dict[bytes, WorkerHost] = {}
        self._request_ids = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        #: root task id -> who gets its results.
        self._sinks: dict[TaskId, Sink] = {}
        #: Results and other user-visible news, to be handed over outside of the guard.
        self._deliveries: deque[Any] = deque()
        #: (source, stream) -> the parts of a text that is not complete.
        self._unfinished_output: dict[tuple[int, int], list[str]] = {}
        #: The workers of plain tasks, made by `init`.
        self.default_group: GroupHandle | None = None
        #: Batches under construction, flushed before the machine hands out more work.
        self.open_batches: dict[Any, None] = {}
        #: What finalizers of faces want done (they may only append).
        self.later: deque[Callable[[], object]] = deque()
        self._submissions = 0
        directories = list(spill_directories) or [tempfile.gettempdir()]
        sweep(directories)
        self._folders = SessionFolders(directories, f"{os.getpid()}-{self.job_id.hex()}")
        self._spill_threads = SpillThreads(
            self.arena, self._folders, config.max_io_workers, self._on_spill_news
        )
        self._decode = msgspec.msgpack.Decoder(FromWorkers).decode
        self._closed = False
        #: What has become of it, as a verb; empty: nothing, it is of use.
        self.ended = ""
        self.callbacks = CallbackThread()
        #: This process's client; `init` gives it the serializer of the group of plain tasks.
        self.client = Client(
            self,
            self.arena,
            config,
            self.task_ids,
            Serializer(main_definitions={}, out_of_band_all=True),
        )
        self._act: dict[type, Callable[[Any], None]] = {
            SendWorker: self._act_send,
            Reply: self._act_reply,
            SendHead: self._act_send_head,
            StartWorker: self._act_start_worker,
            TerminateWorker: self._act_terminate_worker,
            TakeBack: self._act_take_back,
            Nudge: self._act_nudge,
            Interrupt: self._act_interrupt,
            GroupFailed: self._deliveries.append,
            GroupDrained: self._deliveries.append,
            SpillObjects: self._spill_threads.start,
            RestoreObject: self._spill_threads.start,
            DeleteFile: self._spill_threads.start,
            DeleteUnsealed: self._spill_threads.start,
            Warn: self._deliveries.append,
            Notice: self._deliveries.append,
            UnhandledError: self._deliveries.append,
        }
        #: Messages to the machine that effects have given rise to.
        self._echoes: deque[Any] = deque()
        self.client.ring_when_dropped(self.reactor.ring_if_parked)
        self._inspection = self._open_inspection()
        process_state.on_fork_in_child(self._abandon)
        _runtimes.add(self)

    # ---- feeding the machine ---------------------------------------------------------------------

    def feed(self, sender: bytes, message: Any) -> None:
        """Give the machine a message and do what it says; under the guard."""
        effects = self.node.handle(sender, message, time.monotonic())
        act = self._act
        for effect in effects:
            act[type(effect)](effect)
        while self._echoes:
            echo = self._echoes.popleft()
            for effect in self.node.handle(_SHELL, echo, time.monotonic()):
                act[type(effect)](effect)

    def tell(self, message: Any) -> None:
        """A request of this process that needs no answer."""
        with self.guard:
            self.feed(_LOCAL, message)

    def tell_shell(self, message: Any) -> None:
        """A message that only a shell sends (groups)."""
        with self.guard:
            self.feed(_SHELL, message)

    def submit(self, message: SubmitTasks | CallActor) -> None:
        """Tasks of this process: send at once what workers have room for."""
        with self.guard:
            self.feed(_LOCAL, message)
        self.after_submit()

    def after_submit(self) -> None:
        """See to it that somebody receives: us now and then, else the background thread."""
        if self._deliveries:
            self.reactor.wake_if_other()  # a leader that sleeps has something to hand over
        self.reactor.ensure_background()
        self._submissions += 1
        if self._submissions >= _PUMP_EVERY:
            self._submissions = 0
            self.reactor.pump()

    # ---- effects ---------------------------------------------------------------------------------

    def _act_send(self, effect: SendWorker) -> None:
        self._host_by_worker[effect.worker_id].send(effect.worker_id, effect.message)

    def _act_reply(self, effect: Reply) -> None:
        message = effect.message
        if type(message) is RangeGranted and message.offset < 0:
            message = self._with_path(message)
        if effect.client_id != _LOCAL:
            host = self._host_by_worker.get(effect.client_id)
            if host is not None:
                host.reply(WorkerId(effect.client_id), message)
            return
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

    def _act_start_worker(self, effect: StartWorker) -> None:
        host = self._hosts[effect.group_id]
        try:
            host.start_worker(effect.worker_id, effect.slot)
        except OSError:
            # No descriptors left, or no server: the machine decides what that means.
            lost = WorkerLost(
                worker_id=effect.worker_id,
                pid=0,
                exit_code=255,
                signal=None,
                sequence=0,
                index=0,
            )
            self._echoes.append(lost)
            return
        self._host_by_worker[effect.worker_id] = host

    def _act_terminate_worker(self, effect: TerminateWorker) -> None:
        host = self._host_by_worker.get(effect.worker_id)
        if host is not None:
            host.terminate(effect.worker_id)

    def _act_take_back(self, effect: TakeBack) -> None:
        sequences = self._host_by_worker[effect.worker_id].take_back(effect.worker_id)
        if sequences:
            taken = PacketsTakenBack(worker_id=effect.worker_id, sequences=sequences)
            self._echoes.append(taken)

    def _act_nudge(self, effect: Nudge) -> None:
        self._host_by_worker[effect.worker_id].nudge(effect.worker_id)

    def _act_interrupt(self, effect: Interrupt) -> None:
        self._host_by_worker[effect.worker_id].interrupt(effect.worker_id, effect.message)

    def _with_path(self, message: RangeGranted) -> RangeGranted:
        """A client is to write a file: the folder is there, and locked, before it is told."""
        if message.refusal:
            return message
        try:
            path = os.path.join(self._folders.next_folders()[0], file_name(message.file_number))
            return msgspec.structs.replace(message, path=path)
        except OSError as error:
            reason = f"the object store is full, and no folder can be made for files ({error})"
            return msgspec.structs.replace(message, refusal=reason)

    def _on_spill_news(self, message: Any) -> None:
        """A thread has written or read a file."""
        with self.guard:
            if self._closed:
                return
            self.feed(_SHELL, message)
        if self._deliveries:
            self.reactor.wake_if_other()
            self.reactor.ensure_background()

    # ---- what the reactor drives (`Pumped`) ------------------------------------------------------

    def on_packet(self, host: WorkerHost, packet: bytes) -> None:
        """A worker's report; the reactor holds Ctrl-C back."""
        message = self._decode(packet)
        sender = _SHELL
        if type(message) is not TasksFinished:  # the one that comes once per task is not looked at
            if type(message) is WorkerOutput:
                self._collect_output(message)
                return
            if type(message) is ClientMessage:
                if self.default_group is None:
                    self._prepare_plain_tasks(message.message)
                sender, message = message.worker_id, message.message
            elif type(message) is WorkerReady:
                handle = host.workers.get(message.worker_id)
                if handle is not None:
                    handle.pid = message.pid
        with self.guard.lock:
            if self.open_batches:
                self._flush_batches()
            self.feed(sender, message)
            if self.open_batches:
                # A call that was added meanwhile saw the worker busy that has just become idle.
                self._flush_batches()

    def _collect_output(self, message: WorkerOutput) -> None:
        """Put the parts of one write together: workers share the channel."""
        key = (message.source, message.stream)
        if message.unfinished or key in self._unfinished_output:
            self._unfinished_output.setdefault(key, []).append(message.text)
        if message.unfinished:
            return
        if parts := self._unfinished_output.pop(key, None):
            message = msgspec.structs.replace(message, text="".join(parts))
        self._deliveries.append(message)

    def _deliver_unfinished_output(self, source: int | None = None) -> None:
        """Whoever was writing it (None: anybody) will not finish."""
        for key in list(self._unfinished_output):
            if source is None or key[0] == source:
                text = "".join(self._unfinished_output.pop(key))
                self._deliveries.append(WorkerOutput(stream=key[1], text=text, source=key[0]))

    def _prepare_plain_tasks(self, message: Any) -> None:
        """A worker of a Pool or Executor is the first to use plain tasks: they need workers too."""
        if type(message) is not DefineClass or message.task_class.group_id != _PLAIN_TASKS:
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

    def on_server_news(self, host: WorkerHost | inspection.Inspection) -> None:
        """A fork server reports exits, or is gone; or somebody wants to look in."""
        if isinstance(host, inspection.Inspection):
            host.answer()
            return
        if host.closed:
            return
        news = host.news()
        if news is None:
            self._on_server_gone(host)
            return
        for message in news:
            if type(message) is WorkerExited:
                self._on_worker_exited(host, message)

    def _on_worker_exited(self, host: WorkerHost, message: WorkerExited) -> None:
        # All that the worker said was sent before it ended: read that first.
        self.reactor.receive_all(host)
        with self.guard:
            self._lose_worker(host, message.worker_id, message)

    def _lose_worker(
        self, host: WorkerHost, worker_id: WorkerId, message: WorkerExited | None
    ) -> None:
        handle = host.workers.get(worker_id)
        if handle is None:
            return
        sequences = host.take_back(worker_id)
        if sequences:
            self.feed(_SHELL, PacketsTakenBack(worker_id=worker_id, sequences=sequences))
        sequence, index = self.arena.get_progress(handle.slot)
        self.arena.set_progress(handle.slot, 0, 0)
        self._deliver_unfinished_output(handle.pid)
        host.forget(worker_id)
        self._host_by_worker.pop(worker_id, None)
        self.feed(
            _SHELL,
            WorkerLost(
                worker_id=worker_id,
                pid=handle.pid,
                exit_code=message.exit_code if message is not None else None,
                signal=message.signal if message is not None else 9,
                sequence=sequence,
                index=index,
            ),
        )

    def _on_server_gone(self, host: WorkerHost) -> None:
        """A fork server died (killed from outside): its workers died with it. A forked one cannot
        be made again with the same globals, so its group ends with an error.
        """
        self.reactor.unwatch_server(host)
        # Somebody may be waiting for our children to end, as a notebook's kernel that stops does.
        host.reap(self.config.stop_timeout_s)
        self.reactor.receive_all(host)
        handle = self._groups.get(host.group_id)
        reason = host.failure or "the fork server of the group was killed"
        with self.guard:
            error = pickle.dumps(WorkerStartError(reason=reason))
            from poolray.protocol.node import FailGroup

            self.feed(_SHELL, FailGroup(group_id=host.group_id, error=error))
            for worker_id in list(host.workers):
                self._lose_worker(host, worker_id, None)
        if handle is not None and host.failure is None:
            import logging

            logging.getLogger("poolray").error("%s", reason)

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
        if self.client.dropped:
            self.client.sync_references()

    def _settle_at_once(self) -> None:
        """`settle` for callers that do not hold Ctrl-C back."""
        self.guard.enter()
        try:
            self.settle()
        finally:
            self.guard.leave()

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

    def _show_unhandled(self, item: UnhandledError) -> None:
        """An error whose last ref died before anybody looked at it."""
        if self.config.ignore_unhandled_errors or self._closed:
            return
        error = self.client.load_error(item.value)
        sys.stderr.write(
            f"Unhandled error (suppress with POOLRAY_IGNORE_UNHANDLED_ERRORS=1): {error}\n"
        )

    def next_timeout(self) -> float | None:
        """Seconds until the machine wants a tick."""
        with self.guard:
            deadline = self.node.next_deadline()
            hosts = self._hosts.values()
            if any(handle.outbox for host in hosts for handle in host.workers.values()):
                deadline = time.monotonic() + 0.001
        if self.open_batches:
            soon = time.monotonic() + _LOOK_AT_BATCHES_S
            deadline = soon if deadline is None else min(deadline, soon)
        return None if deadline is None else deadline - time.monotonic()

    def tick(self) -> None:
        """The machine's time has come."""
        with self.guard:
            for host in self._hosts.values():
                host.flush()
            if self.open_batches:
                self._flush_batches()
            self.feed(_SHELL, Tick())

    def is_unsettled(self) -> bool:
        """Whether results wait to be handed over."""
        return bool(self._deliveries) or bool(self.later)

    def has_work(self) -> bool:
        """Whether workers will report something."""
        if self.open_batches or self._deliveries or self.later:
            return True
        with self.guard:
            return self.node.has_work()

    # ---- requests of this process ----------------------------------------------------------------

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

    def wait(self, object_ids: list[ObjectId], count: int, timeout_s: float | None) -> list[int]:
        """Indexes of the ready ones, once there are `count` or the time is up."""
        request = _Request()
        request_id = next(self._request_ids)
        message = WaitObjects(request_id=request_id, object_ids=object_ids, count=count)
        reply: WaitReply | None = self._ask(request, request_id, message, timeout_s)
        assert reply is not None  # a request that is cancelled is answered
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
            self._requests.pop(request_id, None)
            self.tell(CancelRequest(request_id=request_id))
            raise
        self._requests.pop(request_id, None)
        return request.reply

    def when_ready(
        self, object_id: ObjectId, call: Callable[[ObjectValues], None]
    ) -> Callable[[], None]:
        """Call back once with the object's value; what it gives takes that back (`Link`)."""
        request = _Request()
        request.call = call
        request_id = next(self._request_ids)
        self._requests[request_id] = request
        with self.guard:
            self.feed(_LOCAL, GetObjects(request_id=request_id, object_ids=[object_id]))
        if self._deliveries:
            self._settle_at_once()
        self.reactor.ensure_background()

        def forget() -> None:
            if self._requests.pop(request_id, None) is not None and not self._closed:
                self.tell(CancelRequest(request_id=request_id))

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

    def query(self, kind: StateKind) -> list[StateRow]:
        """What the node tells of its tasks, workers, objects or itself (`Link`)."""
        reply: StateRows = self.ask(lambda request_id: QueryState(request_id=request_id, kind=kind))
        return reply.rows

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
        if type(message) is SubmitTasks or type(message) is CallActor:
            self.submit(message)
            return
        self.tell(message)
        if type(message) is CancelTask:
            self.settle_now()  # some may wait for what is now an error

    # ---- groups ----------------------------------------------------------------------------------

    def create_group(
        self,
        *,
        size: int,
        start_now: bool,
        setup: WorkerSetup,
        start_method: str = "fork",
        max_tasks_per_worker: int = 0,
        break_on_death: bool = False,
        out_of_band_all: bool = False,
        is_default: bool = False,
    ) -> GroupHandle:
        """Start a fork server for a new group of workers.

        Raises
        ------
        WorkerStartError
            A spawned interpreter could not prepare itself.
        OSError
            No process can be made.
        """
        group_id = _PLAIN_TASKS if is_default else GroupId(next(self._group_ids))
        setup = msgspec.structs.replace(
            setup,
            node_id=self.node_id,
            job_id=self.job_id,
            config=self.config,
            labels=dict(self.node.state.labels),
            accelerators=self.machine.variables,
        )
        preparation = None
        definitions: dict[str, object] = {}
        if start_method == "fork":
            definitions = main_definitions()
            modules = frozenset(sys.modules)
        else:
            modules = frozenset(sys.builtin_module_names)
            preparation = _preparation_data(setup.name_prefix)
        host = WorkerHost(group_id, self.arena, setup, start_method, preparation)
        if start_method != "fork":
            try:
                host.wait_spawned(self.config.worker_start_timeout_s)
            except BaseException:
                host.close(1.0)
                raise
            mine = main_definitions()
            definitions = {n: mine[n] for n in host.main_names or [] if n in mine}
        serializer = Serializer(
            main_definitions=definitions,
            out_of_band_all=out_of_band_all,
            shared_globals=setup.shared_globals,
            modules=modules,
        )
        handle = GroupHandle(group_id, host, serializer)
        handle.shared_globals = setup.shared_globals
        with self.guard:
            self._groups[group_id] = handle
            self._hosts[group_id] = host
            self.reactor.watch(host)
            self.feed(
                _SHELL,
                CreateGroup(
                    group_id=group_id,
                    size=size,
                    start_now=start_now,
                    max_tasks_per_worker=max_tasks_per_worker,
                    break_on_death=break_on_death,
                ),
            )
        self.reactor.ensure_background()
        return handle

    def close_group(self, handle: GroupHandle) -> None:
        """No more calls will come: its workers end after those in the queue."""
        with self.guard:
            self._flush_batches()
            self.feed(_SHELL, CloseGroup(group_id=handle.group_id))
        self.settle_now()

    def terminate_group(self, handle: GroupHandle) -> None:
        """Drop its calls, kill its workers, now."""
        with self.guard:
            self._flush_batches()
            self.feed(_SHELL, TerminateGroup(group_id=handle.group_id))
        self.settle_now()

    def resize_group(self, handle: GroupHandle, size: int) -> None:
        """Keep this many workers from now on."""
        self.tell_shell(ResizeGroup(group_id=handle.group_id, size=size))

    def settle_now(self) -> None:
        """Hand over what a request of this thread gave rise to."""
        self._settle_at_once()
        self.reactor.ensure_background()

    def _end_group(self, group_id: GroupId) -> None:
        """The machine has no task and no worker of the group any more."""
        with self.guard:
            handle = self._groups.pop(group_id, None)
            host = self._hosts.pop(group_id, None)
            if host is not None:
                self.reactor.unwatch(host)
                for worker_id in list(host.workers):
                    self._host_by_worker.pop(worker_id, None)
        if host is not None:
            host.close(self.config.stop_timeout_s)
        if handle is not None:
            handle.finish()

    def worker_pids(self, handle: GroupHandle) -> list[int]:
        """Process ids of a group's workers, once all that were asked for have been forked."""
        deadline = time.monotonic() + self.config.worker_start_timeout_s
        host = handle.host
        while any(not worker.pid for worker in list(host.workers.values())):
            if time.monotonic() > deadline or host.closed:
                break
            self.reactor.pump_servers(host)
            time.sleep(0.0005)
        return [worker.pid for worker in list(host.workers.values()) if worker.pid]

    def in_this_process(self) -> bool:
        """False in a fork of the process that made it."""
        return self.pid == os.getpid()

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._closed

    def wait_group_ended(self, handle: GroupHandle, timeout_s: float | None = None) -> bool:
        """Block until a closed or terminated group has ended."""
        return self.reactor.wait(handle, timeout_s)

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

    # ---- end -------------------------------------------------------------------------------------

    def statistics(self) -> NodeStatistics:
        """A snapshot of the machine."""
        with self.guard:
            return self.node.statistics()

    def memory_table(self, limit: int | None = None) -> MemoryTable:
        """Which objects there are, where, and who holds them: the `limit` largest, or all."""
        self.client.sync_references()
        with self.guard:
            table = self.node.memory_table(self.pid, limit)
        # Of this process it is known better than the node knows what is a ref and what a view.
        viewed = dict.fromkeys(self.client.viewed_only(entry.object_id for entry in table.objects))
        if not viewed:
            return table
        objects = [_pinned(e, self.pid) if e.object_id in viewed else e for e in table.objects]
        return msgspec.structs.replace(table, objects=objects)

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
            self.terminate_group(handle)
        for handle in list(self._groups.values()):
            if not self.wait_group_ended(handle, self.config.stop_timeout_s):
                self._end_group(handle.group_id)
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
        self.reactor.close()
        self.arena.close()
        self._folders.remove()
        _runtimes.discard(self)

    def _abandon(self) -> None:
        """In a forked child: close the parent's channels here, touch nothing else."""
        self._closed = True
        self.ended = self.client.ended = "belongs to the parent process of this fork"
        self.guard.reset()
        self.interrupts.restore()
        for host in list(self._hosts.values()):
            host.abandon()
        self._hosts.clear()
        self._groups.clear()
        self._close_inspection()
        self.reactor.close()
        self._folders.abandon()
        self.arena.forget_parent()
        _runtimes.discard(self)


def group_has_ended() -> PoolrayError:
    """What a call gets that comes too late."""
    return PoolrayError(
        "The workers of this Pool or Executor were shut down before this call was submitted: make "
        "a new one."
    )


def _pinned(entry: ObjectEntry, pid: int) -> ObjectEntry:
    """An object that a process holds by views only."""
    holders = [
        ObjectHolder(kind=HolderKind.PINNED_IN_MEMORY, pid=pid)
        if holder.pid == pid and holder.kind is HolderKind.LOCAL_REFERENCE
        else holder
        for holder in entry.holders
    ]
    return msgspec.structs.replace(entry, holders=holders)


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


def _store_bytes(config: Config) -> int:
    """Capacity of the arena."""
    default = max(_ARENA_MIN_BYTES, int(memory_bytes() * _ARENA_SHARE))
    return config.object_store_memory_bytes or default


def _preparation_data(name: str) -> dict[str, Any]:
    from multiprocessing import spawn

    if getattr(sys.modules.get("multiprocessing.process"), "current_process", None) is not None:
        from multiprocessing import process

        if getattr(process.current_process(), "_inheriting", False):
            raise RuntimeError(
                "An attempt has been made to start workers while `__main__` is being imported by "
                "a spawned process: put the code that starts them under "
                "`if __name__ == '__main__':`."
            )
    data = spawn.get_preparation_data(name or "poolray")
    if not os.path.exists(data.get("init_main_from_path", __file__)):
        # A program on standard input: there is no `__main__` to import, its functions go by value.
        del data["init_main_from_path"]
    return data


#: Set by the API: makes the group of plain tasks where the driver has not.
make_default_group: Callable[[LocalRuntime], None] | None = None
_runtimes: weakref.WeakSet[LocalRuntime] = weakref.WeakSet()
_current: LocalRuntime | None = None


def current() -> LocalRuntime | None:
    """This process's runtime, if it has one."""
    if _current is None or _current.closed or _current.pid != os.getpid():
        return None
    return _current


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
        machine = describe(made, wishes or Wishes(), _store_bytes(made))
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
