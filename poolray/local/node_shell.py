"""The node machine with workers around it: what a driver and a node daemon have in common.

      requests ──▶ ┌───────────────┐ ──effects──▶ WorkerHost (per group)
      replies ◀─── │ Node (pure)   │                  │ fork server, workers
                   └───────────────┘ ◀── packets ─────┘
                one Guard; the Reactor decides which thread works
What: owns the machine, the arena, the workers' hosts and the spill threads; carries effects out.
Who calls: `local/runtime.py` and the cluster's node daemon derive from it; the reactor through
`Pumped`.
May touch: processes, sockets, threads, the clock, the temporary folder.
Invariants: the machine is fed under the guard only; what is for users goes through `_deliveries`,
outside of it; after `_close_shell` no process, descriptor or file of ours is left.
"""

from __future__ import annotations

import abc
import itertools
import os
import pickle
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from poolray.config import Config
from poolray.exceptions import WorkerStartError
from poolray.ids import (
    NODE_ID_BYTES,
    PLAIN_TASKS,
    WORKER_ID_BYTES,
    ClientId,
    GroupId,
    NodeId,
    WorkerId,
)
from poolray.local.channel import PART_MARK, PartJoiner
from poolray.local.collected import Submission, take_together
from poolray.local.fork_server import WorkerSetup
from poolray.local.group_handle import GroupHandle
from poolray.local.machine import Machine, memory_bytes, usable_cpus
from poolray.local.memory_monitor import MemoryMonitor, is_supported
from poolray.local.output_parts import OutputParts
from poolray.local.reactor import Guard, Reactor
from poolray.local.session_folder import SessionFolders, sweep
from poolray.local.spawning import preparation_data
from poolray.local.spilling import SpillThreads, file_name
from poolray.local.workers import WorkerHost
from poolray.node.effects import (
    DeleteFile,
    DeleteUnsealed,
    GroupDrained,
    GroupFailed,
    Interrupt,
    LookAtCall,
    LookIntoLogs,
    MeasureMemory,
    Notice,
    Nudge,
    Reply,
    RestoreObject,
    SendHead,
    SendPeer,
    SendWorker,
    SpillObjects,
    StartWorker,
    TakeBack,
    TerminateWorker,
    UnhandledError,
    Warn,
)
from poolray.node.node import Node
from poolray.node.statistics import NodeStatistics
from poolray.objects.serialization import Serializer, main_definitions
from poolray.objects.shared_memory import SLOTS, Arena, create_arena_file
from poolray.protocol.actors import CallActor
from poolray.protocol.client import RangeGranted, SubmitTasks
from poolray.protocol.node import (
    CallProgress,
    CloseGroup,
    CreateGroup,
    FailGroup,
    LogsSeen,
    PacketsTakenBack,
    ResizeGroup,
    TerminateGroup,
    Tick,
    WorkerLost,
)
from poolray.protocol.worker import (
    ClientMessage,
    FromWorkers,
    TasksFinished,
    WorkerExited,
    WorkerNews,
    WorkerNote,
    WorkerOutput,
    WorkerReady,
)

if TYPE_CHECKING:
    from poolray.local.pool_insights import GroupWatch

#: Who the machine is told by when it is not a client.
SHELL = b""
_ARENA_SHARE = 0.3
_ARENA_MIN_BYTES = 64 << 20
#: How often a leader looks at calls that wait for room (results make it look at once).
_LOOK_AT_BATCHES_S = 0.02
#: What found a channel full is tried again after this long.
_FLUSH_AGAIN_S = 0.001


class NodeShell(abc.ABC):
    """One node's machine, and what it makes happen.

    Derived classes answer clients (`_act_reply`), speak to the head and to other nodes
    (`_act_send_head`, `_act_send_peer`), and hand over what is for users (`settle`).
    """

    def __init__(
        self,
        config: Config,
        machine: Machine,
        spill_directories: Sequence[str],
        local_client: ClientId,
        job_id: bytes,
        has_head: bool = False,
    ) -> None:
        self.config = config
        self.machine = machine
        self.pid = os.getpid()
        self.node_id = NodeId(os.urandom(NODE_ID_BYTES))
        self.job_id = job_id
        capacity = store_bytes(config)
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
            local_client=local_client,
            slots=SLOTS,
            has_head=has_head,
            watches_memory=is_supported(),
        )
        #: Made at the first look.
        self._memory: MemoryMonitor | None = None
        self._has_told_of_memory = False
        self.guard = Guard()
        self.reactor = Reactor(self, self.guard, config.spin_s, config.takeover_s)
        self._cores = usable_cpus()
        self._group_ids = itertools.count(1)
        #: group id -> handle, of groups that have not ended.
        self._groups: dict[GroupId, GroupHandle] = {}
        self._hosts: dict[GroupId, WorkerHost] = {}
        self._host_by_worker: dict[bytes, WorkerHost] = {}
        #: Results and other user-visible news, to be handed over outside of the guard.
        self._deliveries: deque[Any] = deque()
        self._output = OutputParts()
        #: When to try again what found a channel full; 0: nothing has.
        self._flush_s = 0.0
        #: The workers of plain tasks, once there are any.
        self.default_group: GroupHandle | None = None
        #: Batches under construction, flushed before the machine hands out more work.
        self.open_batches: dict[Any, None] = {}
        directories = list(spill_directories) or [tempfile.gettempdir()]
        sweep(directories)
        self._folders = SessionFolders(directories, f"{os.getpid()}-{self.job_id.hex()}")
        self._spill_threads = SpillThreads(
            self.arena, self._folders, config.max_io_workers, self._on_spill_news
        )
        self._decode = msgspec.msgpack.Decoder(FromWorkers).decode
        self._joiner = PartJoiner()
        self._closed = False
        #: What has become of it, as a verb; empty: nothing, it is of use.
        self.ended = ""
        #: Messages to the machine that effects have given rise to.
        self._echoes: deque[Any] = deque()
        self._act = self._actions()
        #: worker id -> tasks and calls of it that the machine was not told of yet.
        self._collected: dict[WorkerId, deque[Submission]] = {}

    def _actions(self) -> dict[type, Callable[[Any], None]]:
        """Type of an effect -> what carries it out."""
        deliver, spill = self._deliveries.append, self._spill_threads.start
        return {
            SendWorker: self._act_send,
            Reply: self._act_reply,
            SendHead: self._act_send_head,
            SendPeer: self._act_send_peer,
            StartWorker: self._act_start_worker,
            TerminateWorker: self._act_terminate_worker,
            TakeBack: self._act_take_back,
            Nudge: self._act_nudge,
            Interrupt: self._act_interrupt,
            LookAtCall: self._act_look_at_call,
            GroupFailed: deliver,
            GroupDrained: deliver,
            MeasureMemory: self._act_measure_memory,
            SpillObjects: spill,
            RestoreObject: spill,
            DeleteFile: spill,
            DeleteUnsealed: spill,
            LookIntoLogs: self._act_look_into_logs,
            Warn: deliver,
            Notice: deliver,
            UnhandledError: deliver,
        }

    # ---- feeding the machine ---------------------------------------------------------------------

    def feed(self, sender: bytes, message: Any) -> None:
        """Give the machine a message and do what it says; under the guard."""
        effects = self.node.handle(sender, message, time.monotonic())
        act = self._act
        for effect in effects:
            act[type(effect)](effect)
        while self._echoes:
            echo = self._echoes.popleft()
            for effect in self.node.handle(SHELL, echo, time.monotonic()):
                act[type(effect)](effect)

    def tell_shell(self, message: Any) -> None:
        """A message that only a shell sends (groups)."""
        with self.guard:
            self.feed(SHELL, message)

    # ---- effects ---------------------------------------------------------------------------------

    def _act_send(self, effect: SendWorker) -> None:
        self._host_by_worker[effect.worker_id].send(effect.worker_id, effect.message)

    def _act_reply(self, effect: Reply) -> None:
        """Answer a client: here, one of our workers."""
        message = effect.message
        if type(message) is RangeGranted and message.offset < 0:
            message = self._with_path(message)
        host = self._host_by_worker.get(effect.client_id)
        if host is not None:
            host.reply(WorkerId(effect.client_id), message)

    @abc.abstractmethod
    def _act_send_head(self, effect: SendHead) -> None:
        """Tell the head something."""

    @abc.abstractmethod
    def _act_send_peer(self, effect: SendPeer) -> None:
        """Tell another node something."""

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

    def _act_measure_memory(self, effect: MeasureMemory) -> None:
        try:
            if self._memory is None:
                self._memory = MemoryMonitor()
            self._echoes.append(self._memory.measure(effect, self._pid_of))
        except Exception:
            # A system that tells of memory in another way than we know, or no descriptors are left:
            # work goes on without protection, and the next look is tried all the same.
            if not self._has_told_of_memory:
                self._has_told_of_memory = True
                import logging

                logging.getLogger("poolray").warning("memory cannot be measured", exc_info=True)

    def _act_look_into_logs(self, effect: LookIntoLogs) -> None:
        """Without a daemon there are none."""
        self._echoes.append(LogsSeen(number=effect.number, rows=[]))

    def _pid_of(self, worker_id: WorkerId) -> int:
        host = self._host_by_worker.get(worker_id)
        handle = None if host is None else host.workers.get(worker_id)
        return 0 if handle is None else handle.pid

    def _act_look_at_call(self, effect: LookAtCall) -> None:
        handle = self._host_by_worker[effect.worker_id].workers[effect.worker_id]
        sequence, index, running_s = self.arena.look_at_call(handle.slot)
        self._echoes.append(
            CallProgress(
                worker_id=effect.worker_id, sequence=sequence, index=index, running_s=running_s
            )
        )

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
            self.feed(SHELL, message)
        if self.is_unsettled():
            self.reactor.wake_if_other()
            self.reactor.ensure_background()

    # ---- what the reactor drives (`Pumped`) ------------------------------------------------------

    def on_packet(self, host: WorkerHost, packet: bytes) -> bool:
        """A worker's report; the reactor holds Ctrl-C back.

        Returns
        -------
        bool
            Calls were collected: more of them may follow; `on_all_read` tells the machine.
        """
        if packet[0] == PART_MARK:
            joined = self._joiner.join(packet)
            if joined is None:
                return False
            packet = joined
        try:
            message = self._decode(packet)
        except msgspec.DecodeError as error:
            self._end_workers_of(host, f"{error} (a packet of {len(packet)} bytes)")
            return False
        sender = SHELL
        if type(message) is ClientMessage:
            submitted = message.message
            if type(submitted) is CallActor or type(submitted) is SubmitTasks:
                self._collected.setdefault(message.worker_id, deque()).append(submitted)
                return True
        if self._collected and (
            type(message) is not TasksFinished or message.worker_id in self._collected
        ):
            self.on_all_read()  # what a worker says after its calls comes after them
        if type(message) is not TasksFinished:  # the one that comes once per task is not looked at
            if type(message) is WorkerOutput:
                whole = self._output.add(message)
                if whole is not None:
                    self._take_output(whole)
                return False
            if type(message) is WorkerNote:
                group = self._groups.get(host.group_id)
                if group is not None and group.watch is not None:
                    group.watch.on_note(message)
                return False
            if type(message) is WorkerNews:
                self._take_news(host, message)
                return False
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
        return bool(self._collected)

    def on_all_read(self) -> None:
        """Tell the machine of the calls that workers have made; several of them together take
        less of its time, and go to their workers in fewer packets.
        """
        collected = self._collected
        if not collected:
            return
        with self.guard.lock:
            while collected:  # (what the machine refuses leaves the rest for the next time)
                worker_id = next(iter(collected))
                submissions = collected.pop(worker_id)
                while submissions:
                    self.feed(worker_id, take_together(submissions))

    def _take_news(self, host: WorkerHost, message: WorkerNews) -> None:
        """A worker has news for its driver; what it reports afterwards must not overtake them."""
        self._deliveries.append(message)

    def _take_output(self, message: WorkerOutput) -> None:
        """A worker has printed a text, which is complete."""
        self._deliveries.append(message)

    def _deliver_unfinished_output(self, source: int | None = None) -> None:
        """Whoever was writing it (None: anybody) will not finish."""
        for message in self._output.rest(source):
            self._take_output(message)

    def _prepare_plain_tasks(self, message: Any) -> None:  # noqa: B027 (a daemon has them)
        """A worker sends a request while there are no workers for plain tasks."""

    def _flush_batches(self) -> None:  # noqa: B027 (a daemon collects none)
        """Give the machine the calls that were collected; under the guard."""

    def _end_workers_of(self, host: WorkerHost, reason: str) -> None:
        """One of these workers has said what nobody can read, and waits for an answer maybe: which
        one cannot be told, so all of them end, and their tasks are tried again or fail.
        """
        import logging

        logging.getLogger("poolray").error(
            "System error: a worker's report cannot be read: %s. Its group's workers are replaced. "
            "Please report this.",
            reason,
        )
        for worker_id in [w for w, each in self._host_by_worker.items() if each is host]:
            host.terminate(WorkerId(worker_id))

    def on_server_news(self, host: Any) -> None:
        """A fork server reports exits, or is gone."""
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
        self,
        host: WorkerHost,
        worker_id: WorkerId,
        message: WorkerExited | None,
        *,
        with_server: bool = False,
    ) -> None:
        handle = host.workers.get(worker_id)
        if handle is None:
            return
        sequences = host.take_back(worker_id)
        if sequences:
            self.feed(SHELL, PacketsTakenBack(worker_id=worker_id, sequences=sequences))
        sequence, index = self.arena.get_progress(handle.slot)
        group = self._groups.get(host.group_id)
        if group is not None and group.watch is not None:
            group.watch.on_lost(handle, self.arena.words(handle.slot))
        self.arena.clear_slot(handle.slot)
        self._deliver_unfinished_output(handle.pid)
        host.forget(worker_id)
        self._joiner.forget(worker_id)
        self._host_by_worker.pop(worker_id, None)
        self.feed(
            SHELL,
            WorkerLost(
                worker_id=worker_id,
                pid=handle.pid,
                exit_code=message.exit_code if message is not None else None,
                signal=message.signal if message is not None else 9,
                sequence=sequence,
                index=index,
                with_server=with_server,
            ),
        )

    def _on_server_gone(self, host: WorkerHost) -> None:
        """A fork server died (killed from outside): its workers died with it. One that may have
        globals of the program cannot be made again, so its group ends with an error.
        """
        self.reactor.unwatch_server(host)
        # Somebody may be waiting for our children to end, as a notebook's kernel that stops does.
        host.reap(self.config.stop_timeout_s)
        self.reactor.receive_all(host)
        reason = host.failure or "the fork server of the group was killed"
        is_replaced = self._replace_server(host)
        with self.guard:
            if not is_replaced:
                error = pickle.dumps(WorkerStartError(reason=reason))
                self.feed(SHELL, FailGroup(group_id=host.group_id, error=error))
            for worker_id in list(host.workers):
                self._lose_worker(host, worker_id, None, with_server=True)
        if is_replaced:
            host.close(0.0)
        elif host.group_id in self._groups and host.failure is None:
            import logging

            logging.getLogger("poolray").error("%s", reason)

    def _replace_server(self, host: WorkerHost) -> bool:
        """Make a new fork server in the place of one that is gone, where that is possible."""
        return False

    @abc.abstractmethod
    def settle(self) -> None:
        """Hand over what is for users; outside of the guard."""

    def _settle_at_once(self) -> None:
        """`settle` for callers that do not hold Ctrl-C back."""
        self.guard.enter()
        try:
            self.settle()
        finally:
            self.guard.leave()

    def settle_now(self) -> None:
        """Hand over what a request of this thread gave rise to."""
        self._settle_at_once()
        self.reactor.ensure_background()

    def next_timeout(self) -> float | None:
        """Seconds until the machine wants a tick."""
        with self.guard:
            deadline = self.node.next_deadline()
            if not self._has_unsent():
                self._flush_s = 0.0
            else:
                # (From when it was found so: one that moves on with the clock is never reached.)
                self._flush_s = self._flush_s or time.monotonic() + _FLUSH_AGAIN_S
                deadline = self._flush_s if deadline is None else min(deadline, self._flush_s)
        if self.open_batches:
            soon = time.monotonic() + _LOOK_AT_BATCHES_S
            deadline = soon if deadline is None else min(deadline, soon)
        return None if deadline is None else deadline - time.monotonic()

    def _has_unsent(self) -> bool:
        """Whether a channel was full; under the guard."""
        hosts = self._hosts.values()
        return any(handle.outbox for host in hosts for handle in host.workers.values())

    def tick(self) -> None:
        """The machine's time has come."""
        with self.guard:
            self._flush_s = 0.0
            for host in self._hosts.values():
                host.flush()
            if self.open_batches:
                self._flush_batches()
            self.feed(SHELL, Tick())

    def is_unsettled(self) -> bool:
        """Whether something waits to be handed over."""
        return bool(self._deliveries)

    def has_notes(self) -> bool:
        """Whether finalizers have noted something; a daemon has none."""
        return False

    def has_work(self) -> bool:
        """Whether workers will report something."""
        if self.open_batches or self._deliveries:
            return True
        with self.guard:
            return self.node.has_work()

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
        watch: GroupWatch | None = None,
        group_id: GroupId | None = None,
    ) -> GroupHandle:
        """Start a fork server for a new group of workers, with the id given, or a new one.

        Raises
        ------
        WorkerStartError
            A spawned interpreter could not prepare itself.
        OSError
            No process can be made.
        """
        if group_id is None:
            group_id = PLAIN_TASKS if is_default else GroupId(next(self._group_ids))
        setup = msgspec.structs.replace(
            setup,
            node_id=self.node_id,
            job_id=setup.job_id or self.job_id,
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
            preparation = preparation_data(setup.name_prefix)
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
        handle.watch = watch
        with self.guard:
            self._groups[group_id] = handle
            self._hosts[group_id] = host
            self.reactor.watch(host)
            self.feed(
                SHELL,
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
            self.feed(SHELL, CloseGroup(group_id=handle.group_id))
        self.settle_now()

    def terminate_group(self, handle: GroupHandle) -> None:
        """Drop its calls, kill its workers, now."""
        with self.guard:
            self._flush_batches()
            self.feed(SHELL, TerminateGroup(group_id=handle.group_id))
        self.settle_now()

    def resize_group(self, handle: GroupHandle, size: int) -> None:
        """Keep this many workers from now on."""
        self.tell_shell(ResizeGroup(group_id=handle.group_id, size=size))

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

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._closed

    def wait_group_ended(self, handle: GroupHandle, timeout_s: float | None = None) -> bool:
        """Block until a closed or terminated group has ended."""
        return self.reactor.wait(handle, timeout_s)

    def is_crowded(self) -> bool:
        """Whether workers have use for every core."""
        busy = 0
        for group in self.node.state.groups.values():
            busy += len(group.workers) - len(group.idle) - group.actors
        return busy >= self._cores

    # ---- looking in, and the end -----------------------------------------------------------------

    def statistics(self) -> NodeStatistics:
        """A snapshot of the machine."""
        with self.guard:
            return self.node.statistics()

    def _end_groups(self) -> None:
        """Kill all workers, and wait for their ends."""
        for handle in list(self._groups.values()):
            self.terminate_group(handle)
        for handle in list(self._groups.values()):
            if not self.wait_group_ended(handle, self.config.stop_timeout_s):
                self._end_group(handle.group_id)

    def _close_shell(self) -> None:
        """Let go of memory, descriptors and files, after the reactor was stopped."""
        self.reactor.close()
        self.arena.close()
        self._folders.remove()

    def _abandon_shell(self) -> None:
        """In a forked child: close the parent's channels here, touch nothing else."""
        self._closed = True
        self.guard.reset()
        for host in list(self._hosts.values()):
            host.abandon()
        self._hosts.clear()
        self._groups.clear()
        self.reactor.close()
        self._folders.abandon()
        self.arena.forget_parent()


def store_bytes(config: Config) -> int:
    """Capacity of the arena."""
    default = max(_ARENA_MIN_BYTES, int(memory_bytes() * _ARENA_SHARE))
    return config.object_store_memory_bytes or default
