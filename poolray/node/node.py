"""The node machine: one per machine, the same in a driver, in a daemon and in the simulator.

    clients ──requests──▶ ┌──────────────────────────────┐ ──Reply──────────▶ clients
    workers ──reports───▶ │ Objects Tasks Actors Dispatch│ ──SendWorker …──▶ workers (by the shell)
    peers   ──messages──▶ │ Functions  Groups  Peers     │ ──SendPeer──────▶ peers
    head    ──messages──▶ └──────────────────────────────┘ ──SendHead──────▶ head
                  Store       NodeState (the tables)

What: takes messages, returns effects; decides all that one machine decides.
Who calls: its shell (`local/runtime.py`, later the daemon, the simulator), under one lock.
May touch: nothing: no clock, no socket, no file, no thread, no randomness.
Invariants: `check_invariants()`; every request is answered, every task ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeAlias, final

import msgspec

from poolray.config import Config
from poolray.exceptions import InternalError, PoolrayError
from poolray.ids import ClientId, GroupId, NodeId, ObjectId, TaskId, WorkerId
from poolray.node.borrowing import client_of
from poolray.node.effects import Effect, SendHead, Warn
from poolray.node.inquiries import Inquiries
from poolray.node.memory import memory_table
from poolray.node.parts import make_parts
from poolray.node.state import NodeState
from poolray.node.statistics import NodeStatistics, heartbeat_of, statistics_of
from poolray.node.survey import Survey
from poolray.objects.allocator import RangeAllocator
from poolray.protocol.actors import (
    CallActor,
    CallActors,
    CountCalls,
    CreateActor,
    KillActor,
    ListActors,
    LookUpActor,
)
from poolray.protocol.client import (
    AddReferences,
    AllocateRange,
    CancelRequest,
    CancelTask,
    CancelTasks,
    ClientRequest,
    DefineClass,
    DefineFunction,
    EndWatches,
    GetObjects,
    NoteCalls,
    NoteCallSite,
    PinObjects,
    PromiseObjects,
    PutObject,
    ReleaseFunction,
    ReleaseReferences,
    ReturnRange,
    SubmitTasks,
    UnpinObjects,
    WaitObjects,
)
from poolray.protocol.directory import (
    ActorAt,
    ActorFound,
    ActorsFound,
    AskCreation,
    Drain,
    DropActor,
    JobEnded,
    JobsFound,
    KeepActor,
    KillKept,
    NodesFound,
    RestartActor,
)
from poolray.protocol.inquiry import AskHead, AskHeadPart
from poolray.protocol.memory import MemoryTable
from poolray.protocol.node import (
    AskHandle,
    AskSource,
    AwaitObject,
    CallProgress,
    CancelForwarded,
    ChunkArrived,
    ChunkData,
    ChunkMissing,
    ChunksLost,
    ClientLeft,
    CloseGroup,
    ClusterView,
    CreateGroup,
    EndHosted,
    FailGroup,
    FileSealed,
    ForwardedItems,
    ForwardedResults,
    ForwardTasks,
    HandleLent,
    HeadBack,
    HeadMessage,
    HeadReply,
    HostedEnded,
    LogsSeen,
    MemoryReport,
    NamesFound,
    NodeDied,
    ObjectReady,
    PacketsTakenBack,
    PeerMessage,
    PeerQuery,
    PeerReleases,
    PeerRows,
    PullChunk,
    PullEnded,
    Refused,
    RegisterNode,
    ResizeGroup,
    RestoreDone,
    RestoreFailed,
    ReturnTasks,
    SourceDone,
    SpillDone,
    SpillFailed,
    StreamProgress,
    TakeObjects,
    TerminateGroup,
    Tick,
    UseSource,
    WorkerLost,
)
from poolray.protocol.placement import (
    AwaitPlacementGroup,
    CommitBundles,
    CreatePlacementGroup,
    DescribePlacementGroups,
    GroupChanged,
    GroupsFound,
    PrepareBundles,
    RemovePlacementGroup,
    ReturnBundles,
)
from poolray.protocol.state import QueryState
from poolray.protocol.streams import (
    AwaitRoom,
    DropStream,
    ItemsYielded,
    OpenStream,
    TakeItems,
)
from poolray.protocol.values import Delivery, FunctionDefinition, InArena
from poolray.protocol.worker import (
    ActorExiting,
    ActorStarted,
    ClientMessage,
    TasksFinished,
    TasksHandedBack,
    WorkerBlocked,
    WorkerFailed,
    WorkerReady,
    WorkerStopping,
    WorkerUnblocked,
)
from poolray.scheduling.group_resources import is_of_group
from poolray.scheduling.labels import NODE_ID_LABEL
from poolray.scheduling.resources import ResourceAccount

WorkerReport: TypeAlias = (
    TasksFinished
    | TasksHandedBack
    | WorkerReady
    | WorkerFailed
    | WorkerBlocked
    | WorkerUnblocked
    | WorkerStopping
    | ClientMessage
    | ActorStarted
    | ActorExiting
    | ItemsYielded
)
ShellMessage: TypeAlias = (
    CreateGroup
    | CloseGroup
    | TerminateGroup
    | FailGroup
    | ResizeGroup
    | PacketsTakenBack
    | WorkerLost
    | CallProgress
    | ClientLeft
    | SpillDone
    | SpillFailed
    | RestoreDone
    | RestoreFailed
    | MemoryReport
    | FileSealed
    | ChunkArrived
    | ChunkMissing
    | ChunksLost
    | HeadBack
    | LogsSeen
    | Tick
)
#: All that a node may be told.
NodeInput: TypeAlias = ClientRequest | WorkerReport | ShellMessage | PeerMessage | HeadMessage


@final
class Node:
    """The decisions of one machine.

    Parameters
    ----------
    node_id : NodeId
        Its name in the cluster.
    config : Config
        Limits and times.
    resources : mapping of str to int
        What the machine has, in units of 1/10,000.
    arena_bytes : int
        Capacity of its arena.
    encode_error : callable
        Serializes an error that the machine raises as a task's result.
    next_worker_id : callable
        A new worker id at each call.
    local_client : ClientId
        The client in the node's own process, if there is one.
    slots : int
        Progress words, hence workers, at the most.
    has_head : bool
        Whether a head listens to heartbeats.
    devices : mapping of str to sequence of str
        Ids of the devices of those resources that have some.
    labels : mapping of str to str
        What placements may ask for.
    watches_memory : bool
        Whether the shell can measure memory.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        config: Config,
        resources: Mapping[str, int],
        arena_bytes: int,
        encode_error: Callable[[PoolrayError], bytes],
        next_worker_id: Callable[[], WorkerId],
        local_client: ClientId,
        slots: int,
        has_head: bool = False,
        devices: Mapping[str, Sequence[str]] | None = None,
        labels: Mapping[str, str] | None = None,
        watches_memory: bool = False,
    ) -> None:
        state = NodeState(
            node_id,
            config,
            ResourceAccount(resources, devices),
            RangeAllocator(arena_bytes),
            encode_error,
            local_client,
            {NODE_ID_LABEL: node_id.hex(), **(labels or {})},
        )
        self.state = state
        parts = make_parts(
            state,
            next_worker_id=next_worker_id,
            slots=slots,
            has_head=has_head,
            watches_memory=watches_memory,
        )
        self._has_head = state.has_head = has_head
        self._parts = parts
        self._inquiries = Inquiries(state)
        # (Plain fields: each message looks some of them up.)
        self._actors = parts.actors
        self._bundles = parts.bundles
        self._cancellation = parts.cancellation
        self._dispatcher = parts.dispatcher
        self._draining = parts.draining
        self._functions = parts.functions
        self._groups = parts.groups
        self._objects = parts.objects
        self._survey = Survey(state, parts.observer, self.memory_table)
        self._observer = parts.observer
        self._peers = parts.peers
        self._protection = parts.protection
        self._retries = parts.retries
        self._store = parts.store
        self._streams = parts.streams
        self._tasks = parts.tasks
        self._timeouts = parts.timeouts
        #: Where other nodes reach this one, and what lists of nodes show; set by the shell.
        self.address = ""
        self.info: dict[str, str] = {}
        self._next_heartbeat_s = 0.0
        #: Type of a message -> what takes it, of those that come about once per task: asking which
        #: of a hundred types a message has would cost more than dealing with it.
        self._often: dict[type, Callable[[ClientId, NoReturn], None]] = {
            TasksFinished: self._on_finished,
            SubmitTasks: self._on_submit,
            CallActors: self._on_calls,
            CallActor: self._on_call,
            GetObjects: self._objects.on_get,
            WaitObjects: self._objects.on_wait,
            PutObject: self._objects.on_put,
            NoteCalls: self._on_note_calls,
            AddReferences: self._on_add_references,
            ReleaseReferences: self._on_release_references,
        }

    def handle(self, sender: bytes, message: NodeInput, now: float) -> list[Effect]:
        """Take one message in.

        Parameters
        ----------
        sender : bytes
            Who says it: a client id, a node id, or empty for the shell and for workers' reports
            (those name their worker).
        message : a struct of `poolray.protocol`
            What is said.
        now : float
            Seconds on the shell's monotonic clock.

        Returns
        -------
        list of Effect
            What the shell is to do, in order.

        Raises
        ------
        InternalError
            The message makes no sense; what it asked for has not been done.
        """
        state = self.state
        state.now = now
        often = self._often.get(type(message))
        if often is not None:
            often(sender, message)  # type: ignore[arg-type]
        elif isinstance(message, ClientRequest):
            self._on_client(ClientId(sender), message)
        elif isinstance(message, WorkerReport):
            self._on_worker(message)
        elif isinstance(message, ShellMessage):
            self._on_shell(message)
        elif isinstance(message, PeerMessage):
            self._on_peer(NodeId(sender), message)
        elif isinstance(message, HeadMessage):
            self._on_head(message)
        else:
            raise InternalError(f"a node cannot take {type(message).__name__}")
        if self._store.attention:
            self._store.make_room()
        if self._draining.is_draining:
            self._draining.look()
        self._peers.borrowing.flush()
        effects = state.effects
        if effects:
            state.effects = []
        return effects

    # ---- what comes once per task ----------------------------------------------------------------

    def _on_finished(self, sender: ClientId, message: TasksFinished) -> None:
        self._dispatcher.on_finished(message)

    def _on_submit(self, client_id: ClientId, message: SubmitTasks) -> None:
        self._tasks.submit(client_id, message.tasks)

    def _on_calls(self, client_id: ClientId, message: CallActors) -> None:
        self._actors.calls.on_calls(client_id, message.calls)

    def _on_call(self, client_id: ClientId, message: CallActor) -> None:
        self._actors.calls.on_calls(client_id, [message])

    def _on_add_references(self, client_id: ClientId, message: AddReferences) -> None:
        self._objects.add_references(client_id, message.object_ids, message.viewed)

    def _on_release_references(self, client_id: ClientId, message: ReleaseReferences) -> None:
        self._objects.release_references(client_id, message.object_ids)

    def _on_note_calls(self, client_id: ClientId, message: NoteCalls) -> None:
        self._observer.on_noted(message)

    # ---- conversations ---------------------------------------------------------------------------

    def _on_client(self, client_id: ClientId, message: ClientRequest) -> None:
        objects, functions = self._objects, self._functions
        match message:
            case (
                SubmitTasks()
                | CallActor()
                | CallActors()
                | GetObjects()
                | WaitObjects()
                | PutObject()
                | NoteCalls()
                | AddReferences()
                | ReleaseReferences()
            ):
                self._often[type(message)](client_id, message)  # type: ignore[arg-type]
            case PromiseObjects():
                objects.on_promise(client_id, message)
            case AllocateRange():
                objects.on_allocate(client_id, message)
            case EndWatches():
                objects.on_end_watches(client_id, message)
            case CancelRequest():
                objects.on_cancel_request(client_id, message)
            case ReturnRange():
                self._store.return_range(objects.client(client_id), message.object_id)
            case PinObjects():
                self._store.pin_for(objects.client(client_id), message.object_ids)
            case UnpinObjects():
                self._store.unpin_for(objects.client(client_id), message.object_ids)
            case DefineFunction():
                functions.define(objects.client(client_id), self._settled(message.definition))
            case DefineClass():
                functions.define_class(message.task_class)
            case ReleaseFunction():
                functions.release(objects.client(client_id), message.function_id)
            case NoteCallSite():
                objects.note_call_site(message.object_ids, message.call_site)
            case AskHead():
                self._inquiries.on_ask(client_id, message)
            case AskHeadPart():
                self._inquiries.on_part(client_id, message)
            case QueryState():
                self._survey.on_query(client_id, message)
            case CancelTasks():
                self._tasks.cancel(message.task_ids)
            case CreateActor() | KillActor() | LookUpActor() | ListActors() | CountCalls():
                self._actors.on_request(client_id, message)
            case (
                CreatePlacementGroup()
                | RemovePlacementGroup()
                | DescribePlacementGroups()
                | AwaitPlacementGroup()
            ):
                self._bundles.on_request(client_id, message)
            case OpenStream() | TakeItems() | DropStream() | AwaitRoom():
                self._streams.on_request(client_id, message)
            case CancelTask():
                self._cancellation.cancel(message.task_id, message.force, message.recursive)
            case _:
                _assert_never(message)

    def _settled(self, definition: FunctionDefinition) -> FunctionDefinition:
        """A definition whose code will stay where it is: workers load it at some later call."""
        blob = definition.blob
        if isinstance(blob, bytes):
            return definition
        place = self._store.place_of(blob)
        if isinstance(place, InArena):
            self._store.keep_in_memory(blob.object_id)
        return msgspec.structs.replace(definition, blob=place)

    def _on_worker(self, message: WorkerReport) -> None:
        dispatcher, groups = self._dispatcher, self._groups
        match message:
            case TasksFinished():
                dispatcher.on_finished(message)
            case ClientMessage():
                # What a worker said last may be read after its death was dealt with.
                if message.worker_id in self.state.workers:
                    self._on_client(ClientId(message.worker_id), message.message)
            case TasksHandedBack():
                dispatcher.on_handed_back(message)
            case WorkerBlocked():
                dispatcher.on_blocked(message.worker_id)
            case WorkerUnblocked():
                dispatcher.on_unblocked(message.worker_id)
            case WorkerReady():
                groups.on_ready(message)
            case WorkerFailed():
                groups.on_failed(message)
            case WorkerStopping():
                groups.on_stopping(message.worker_id)
            case ActorStarted():
                self._actors.on_started(message)
            case ItemsYielded():
                self._streams.on_yielded(message)
            case ActorExiting():
                self._actors.on_exiting(message)
            case _:
                _assert_never(message)

    def _on_shell(self, message: ShellMessage) -> None:
        groups = self._groups
        match message:
            case Tick():
                self._on_tick()
            case PacketsTakenBack():
                self._dispatcher.on_taken_back(message)
            case WorkerLost():
                groups.on_lost(message)
                self._forget_questions(ClientId(message.worker_id))
            case CallProgress():
                self._timeouts.on_progress(message)
            case CreateGroup():
                groups.create(message)
            case CloseGroup():
                groups.close(message.group_id)
            case TerminateGroup():
                groups.terminate(message.group_id)
            case FailGroup():
                groups.fail(message.group_id, message.error)
            case ResizeGroup():
                groups.resize(message.group_id, message.size)
            case ClientLeft():
                self._tasks.drop_client(ClientId(message.client_id))
                self._actors.on_client_lost(ClientId(message.client_id))
                self._cancellation.on_driver_left(ClientId(message.client_id))
                self._forget_questions(ClientId(message.client_id))
            case SpillDone():
                self._store.on_spill_done(message)
            case SpillFailed():
                self._store.on_spill_failed(message)
            case RestoreDone():
                self._store.on_restore_done(message)
            case RestoreFailed():
                self._store.on_restore_failed(message)
            case MemoryReport():
                self._protection.on_report(message)
            case HeadBack():
                self._on_head_back()
            case FileSealed():
                if not self._actors.hosting.creations.on_file_sealed(message):
                    self._peers.transfers.on_file_sealed(message)
            case ChunkArrived():
                self._peers.transfers.on_chunk_arrived(message)
            case ChunkMissing():
                self._peers.transfers.on_chunk_missing(message)
            case ChunksLost():
                self._peers.transfers.on_chunks_lost(message)
            case LogsSeen():
                self._survey.on_logs_seen(message)
            case _:
                _assert_never(message)

    def _forget_questions(self, client_id: ClientId) -> None:
        self._inquiries.on_left(client_id)
        self._survey.on_client_left(client_id)

    def _on_peer(self, node_id: NodeId, message: PeerMessage) -> None:
        peers = self._peers
        if node_id in peers.dead:
            return  # what a peer says after it was declared dead is not heard
        match message:
            case ForwardTasks():
                peers.on_forwarded(node_id, message)
            case ForwardedResults():
                if peers.on_results(node_id, message):
                    self._dispatch_all()  # what waited may follow where there is room again
            case PeerReleases():
                peers.borrowing.on_releases(node_id, message.object_ids)
            case CancelForwarded():
                peers.on_cancel(node_id, message)
            case ReturnTasks():
                peers.on_return_tasks(node_id, message)
            case ObjectReady():
                peers.borrowing.on_ready(node_id, message)
            case AwaitObject():
                peers.borrowing.on_await(node_id, message)
            case ForwardedItems():
                peers.on_items(node_id, message)
            case StreamProgress():
                self._streams.on_progress(client_of(node_id), message)
            case TakeObjects():
                peers.borrowing.on_take(node_id, message.object_ids)
            case EndHosted():
                self._actors.hosting.on_end_hosted(node_id, message)
            case HostedEnded():
                self._actors.hosting.on_hosted_ended(node_id, message)
            case AskHandle():
                self._actors.hosting.on_ask_handle(node_id, message)
            case HandleLent():
                self._actors.hosting.on_handle_lent(node_id, message)
            case PeerQuery():
                self._survey.on_peer_query(node_id, message)
            case PeerRows():
                self._survey.on_rows(node_id, message)
            case _:
                self._on_transfer(node_id, message)

    def _on_transfer(
        self,
        node_id: NodeId,
        message: PullChunk | ChunkData | PullEnded | AskSource | UseSource | SourceDone,
    ) -> None:
        transfers = self._peers.transfers
        match message:
            case ChunkData():
                transfers.on_chunk(node_id, message)
            case PullChunk():
                transfers.on_pull_chunk(node_id, message)
            case PullEnded():
                transfers.on_pull_ended(node_id, message)
            case AskSource():
                transfers.sourcing.on_ask(node_id, message)
            case UseSource():
                transfers.on_use_source(node_id, message)
            case SourceDone():
                transfers.sourcing.on_done(node_id, message)
            case _:
                _assert_never(message)

    def _on_head(self, message: HeadMessage) -> None:
        match message:
            case ClusterView():
                self._peers.on_view(message.nodes)
                self._dispatch_all()
            case NodeDied():
                self._peers.on_node_died(message.node_id)
                self._survey.on_node_died(message.node_id)
                self._dispatch_all()
            case Refused():
                text = f"The cluster's head refuses this node: {message.reason}"
                self.state.effects.append(Warn(text))
            case HeadReply() | NodesFound() | JobsFound() | ActorsFound():
                self._inquiries.on_answer(message)
            case ActorFound() | NamesFound():
                self._actors.on_head_reply(message)
            case (
                PrepareBundles()
                | CommitBundles()
                | ReturnBundles()
                | GroupChanged()
                | GroupsFound()
            ):
                self._bundles.on_head(message)
            case Drain():
                self._draining.on_drain(message)
            case JobEnded():
                pass  # workers are the shell's to end
            case ActorAt():
                self._actors.hosting.on_place(message)
            case RestartActor():
                self._actors.hosting.on_restart(message)
            case KeepActor():
                self._actors.hosting.on_keep(message)
            case AskCreation():
                self._actors.hosting.creations.on_asked(message.actor_id)
            case KillKept():
                self._actors.hosting.on_kill_kept(message)
            case DropActor():
                self._actors.hosting.on_drop(message)
            case _:
                raise InternalError(f"a node does not ask for {type(message).__name__}")

    def _dispatch_all(self) -> None:
        """There may be room elsewhere for what waits."""
        for group in list(self.state.groups.values()):
            if group.ready:
                self._dispatcher.dispatch(group)

    # ---- time ------------------------------------------------------------------------------------

    def register(self) -> RegisterNode:
        """How this node introduces itself to the head."""
        state = self.state
        return RegisterNode(
            node_id=state.node_id,
            total={n: q for n, q in state.resources.total.items() if not is_of_group(n)},
            labels=dict(state.labels),
            address=self.address,
            info=self.info,
            is_alone=not self._has_head,
            bundles=self._bundles.kept(),
            watched_groups=self._bundles.watched(),
            actors=self._actors.hosting.entries(),
            peers=self._peers.known(),
            dead_actors=self._actors.hosting.dead(),
        )

    def _on_head_back(self) -> None:
        """The head may be another one: it is told what we have, and asked again what it was."""
        self.state.effects.append(SendHead(self.register()))
        for question in (
            *self._actors.elsewhere.outstanding(),
            *self._actors.hosting.outstanding(),
            *self._actors.outstanding(),
            *self._inquiries.outstanding(),
            *self._bundles.outstanding(),
        ):
            self.state.effects.append(SendHead(question))

    def next_deadline(self) -> float | None:
        """When to send `Tick` at the latest, on the shell's clock; None: no need."""
        deadline = self._dispatcher.deadline_s
        for other in (self._protection.next_look_s(), self._survey.next_deadline()):
            if other is not None and (deadline is None or other < deadline):
                deadline = other
        if self._has_head and (deadline is None or self._next_heartbeat_s < deadline):
            return self._next_heartbeat_s
        return deadline

    def _on_tick(self) -> None:
        self._groups.on_tick()
        self._cancellation.on_tick()
        self._retries.on_tick()
        self._protection.on_tick()
        self._timeouts.on_tick()
        self._survey.on_tick()
        self._peers.ahead.on_tick()
        if self._peers.placing.on_tick():
            self._dispatch_all()
        state = self.state
        if self._has_head and state.now >= self._next_heartbeat_s:
            self._next_heartbeat_s = state.now + state.config.heartbeat_interval_s
            state.effects.append(SendHead(heartbeat_of(state)))
            self._peers.return_stranded()

    # ---- looking in ------------------------------------------------------------------------------

    def would_queue(self, message: SubmitTasks | CallActor) -> bool:
        """Whether a client's tasks would change nothing now but the length of a queue.

        Then they may be told together with others, before the next message of any kind.
        """
        if type(message) is CallActor:
            return self._actors.calls.is_full(message.actor_id) and not message.task.dependencies
        (spec,) = message.tasks  # type: ignore[union-attr]
        queue = self.state.classes.get(spec.class_id)
        return (
            queue is not None
            and queue.stuck
            and queue.queued_calls > 0
            and not spec.dependencies
            and queue.task_class.delivery is not Delivery.CALLER
        )

    def has_work(self) -> bool:
        """Whether something is under way that a worker will report on."""
        state = self.state
        return (
            bool(state.tasks)
            or any(group.starting for group in state.groups.values())
            # The results of a packet may come before the report of its end.
            or any(worker.packets for worker in state.workers.values())
        )

    def task_state(self, task_id: TaskId) -> str | None:
        """The name of a task's state, or None when it has ended or is unknown."""
        record = self.state.tasks.get(task_id)
        return record.state.name if record is not None else None

    def has_detached(self, group_id: GroupId) -> bool:
        """Whether a detached actor that is not dead belongs to a group's workers."""
        return self._actors.has_detached(group_id)

    def statistics(self) -> NodeStatistics:
        """A snapshot of the tables."""
        return statistics_of(self.state, self._parts)

    def small_values(self, object_ids: list[ObjectId]) -> list[bytes] | None:
        """Values, if all of them are ready and small and none is an error; changes nothing."""
        return self._objects.small_values(object_ids)

    def memory_table(self, pid: int, limit: int | None = None) -> MemoryTable:
        """Which objects there are, where, and who holds them; `pid` is the node's own process."""
        return memory_table(self.state, self._parts, pid, limit)

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree; for tests and the simulator."""
        state = self.state
        self._tasks.check_invariants()
        self._functions.check_invariants()
        self._groups.check_invariants()
        self._actors.check_invariants()
        self._actors.elsewhere.check_invariants()
        self._actors.hosting.creations.check_invariants()
        self._dispatcher.check_invariants()
        self._peers.check_invariants()
        self._cancellation.check_invariants()
        self._retries.check_invariants()
        self._protection.check_invariants()
        self._bundles.check_invariants(state.classes.values())
        self._timeouts.check_invariants()
        self._streams.check_invariants()
        packets = [packet for worker in state.workers.values() for packet in worker.packets]
        pins = [o for packet in packets for o in packet.pins or ()]
        self._store.check_invariants([*pins, *self._actors.pins(), *self._peers.transfers.pins()])
        kept = (*self._tasks.lineage.tasks.values(), *self._actors.kept_creations())
        records = [r for r in (*state.tasks.values(), *kept) if r.owner_pins]
        for packet in packets:
            records.extend(packet.cancelled or ())
        held = [i for record in records for i in (*record.dependencies, *record.borrows)]
        more = (*self._functions.blobs(), *self._actors.holds(), *self._streams.holds())
        self._objects.check_invariants([*held, *more])


def _assert_never(message: NoReturn) -> NoReturn:  # typing's own is not in Python 3.10
    raise InternalError(f"nobody takes {message!r}")
